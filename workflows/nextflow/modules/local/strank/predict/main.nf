process STRANK_PREDICT {
    tag "$meta.id"
    label 'process_medium'

    conda "${moduleDir}/environment.yml"
    container "strank:latest"

    input:
    tuple val(meta), path(slide)
    path model

    output:
    tuple val(meta), path("${prefix}/scores.h5ad"), emit: scores
    tuple val(meta), path("${prefix}/*.png")      , emit: maps
    tuple val(meta), path("${prefix}")            , emit: folder
    path "versions.yml"                           , emit: versions

    when:
    task.ext.when == null || task.ext.when

    script:
    def args = task.ext.args ?: ''
    def scale = meta.mpp ? "--mpp ${meta.mpp}" : ''
    prefix = task.ext.prefix ?: "${meta.id}"
    """
    export OMP_NUM_THREADS=${task.cpus}
    strank predict ${slide} --model ${model} --output ${prefix} ${scale} ${args}

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        strank: \$(strank --version | sed 's/.* //')
    END_VERSIONS
    """

    stub:
    prefix = task.ext.prefix ?: "${meta.id}"
    """
    mkdir ${prefix}
    touch ${prefix}/scores.h5ad ${prefix}/tissue.png

    cat <<-END_VERSIONS > versions.yml
    "${task.process}":
        strank: \$(strank --version | sed 's/.* //')
    END_VERSIONS
    """
}
