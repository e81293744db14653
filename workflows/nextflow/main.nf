// Slides to maps, a task a slide: nextflow run workflows/nextflow -profile docker --slides slides.csv --model model
include { STRANK_PREDICT } from './modules/local/strank/predict/main'

workflow {
    main:
    slides = Channel
        .fromPath(params.slides, checkIfExists: true)
        .splitCsv(header: true)
        .map { row ->
            def slide = file(row.path, checkIfExists: true)
            [[id: row.name ?: slide.baseName, mpp: row.mpp], slide]
        }
    STRANK_PREDICT(slides, file(params.model, checkIfExists: true))
}
