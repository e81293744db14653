"""``strank predict``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import Json, explained, fail, finish, note, split_names
from strank.errors import InputError, some
from strank.extras import need
from strank.files import claims
from strank.progress import progress

if TYPE_CHECKING:
    from anndata import AnnData

    from strank.prediction import Scorer
    from strank.slides.slide import Slide

_PICTURES = 6
_WRITTEN = ("scores", "tissue", "geojson", "spatialdata")


_Slides = Annotated[
    list[Path],
    typer.Argument(
        help="Slides (whole-slide image, TIFF, JPEG, PNG), or sections' .h5ad of a cohort."
    ),
]
_Model = Annotated[Path, typer.Option(help="A trained model.")]
_Output = Annotated[
    Path,
    typer.Option("-o", "--output", help="Folder for scores and maps; of several slides, one each."),
]
_Genes = Annotated[
    str | None,
    typer.Option(
        help="Genes to draw, and of the GeoJSON, separated by commas; "
        f"the first {_PICTURES} if not given."
    ),
]
_Mpp = Annotated[
    float | None, typer.Option(help="µm per pixel of the slides, if the files do not say it.")
]
_Override = Annotated[
    bool, typer.Option("--mpp-override", help="Take --mpp even where the files say another scale.")
]
_Stride = Annotated[
    float | None,
    typer.Option(help="µm between tiles; a spot's diameter if not given, less is denser."),
]
_Encoder = Annotated[
    str | None,
    typer.Option(help="The model's encoder, where it is a module:callable of your own."),
]
_Weights = Annotated[
    Path | None, typer.Option(help="File with the encoder's weights, not those on the hub.")
]
_Spatialdata = Annotated[
    bool, typer.Option("--spatialdata", help="Also write scores.zarr (napari, squidpy).")
]
_Geojson = Annotated[bool, typer.Option("--geojson", help="Also write scores.geojson (QuPath).")]


@claims("output")
def predict_command(
    slides: _Slides,
    model: _Model,
    output: _Output,
    genes: _Genes = None,
    mpp: _Mpp = None,
    mpp_override: _Override = False,
    stride: _Stride = None,
    encoder: _Encoder = None,
    weights: _Weights = None,
    spatialdata: _Spatialdata = False,
    geojson: _Geojson = False,
    as_json: Json = False,
) -> None:
    """5. Find the tissue of slides, score tiles over it and draw maps.

    Slides that were scored before (same image, model and stride) are not scored again.

    [bold]Example:[/] strank predict strank-demo/st/images/D1.jpg --mpp 0.8
    --model strank-demo/model -o slide --geojson

    [bold]Example:[/] strank predict strank-demo/st/images/*.jpg --mpp 0.8 --stride 150
    --model strank-demo/model -o slides

    [bold]Example:[/] strank predict strank-demo/cohort/D1.h5ad --model strank-demo/model -o section
    (observed beside predicted)
    """
    exported = ("geopandas", "shapely", "spatialdata") if geojson or spatialdata else ()
    page = ["jinja2"] * (len(slides) > 1)
    need("cv2", "pyvips", "PIL", "matplotlib", *page, *exported)
    from strank.encoders.backbone import on_gpu
    from strank.model.rank_model import RankModel
    from strank.prediction import RUN, Scorer, each_alone, encoder_of, named_subjects
    from strank.slides.slide import check_override

    check_override(mpp, mpp_override)
    trained = RankModel.load(model)
    drawn = _genes_to_draw(list(trained.panel.index), split_names(genes))
    eyes, _ = on_gpu(encoder_of(trained, encoder=encoder, weights=weights))
    scorer = Scorer(trained, eyes, stride, model)
    for text in scorer.warnings:
        note(text)
    exports = {"geojson": geojson, "spatialdata": spatialdata}
    named, told = named_subjects(slides, output), (mpp, mpp_override)
    if len(slides) == 1:
        result = _predict_one(slides[0], output, scorer, told, drawn, exports)
        _finish([result], {}, [], as_json, drawn)
        return
    from strank.report.slides import write_slides_page

    def one(name: str, slide: Path) -> dict[str, Any]:
        return _predict_one(slide, output / name, scorer, told, drawn, exports)

    done, failed = each_alone(named, one, output, note, explain=explained)
    failures = {str(named[name]): error for name, error in failed.items()}
    written = [output / RUN, write_slides_page(output)]
    _finish(list(done.values()), failures, written, as_json, drawn)
    if failed:
        fail(f"{len(failed)} of {len(slides)} slides failed: {some(failures, 20)}")
        raise typer.Exit(1)


def _finish(
    done: list[dict[str, Any]],
    failed: dict[str, str],
    tables: list[Path],
    as_json: bool,
    drawn: list[str],
) -> None:
    written = [result[kind] for result in done for kind in _WRITTEN if kind in result]
    finish(
        {"slides": done, "failed": failed},
        outputs=[*written, *(path for result in done for path in result["maps"]), *tables],
        as_json=as_json,
        lines=[
            *(_line(result, drawn) for result in done),
            *(f"All: {page}" for page in tables if page.suffix == ".html"),
        ],
    )


def _predict_one(
    path: Path,
    folder: Path,
    scorer: Scorer,
    told: tuple[float | None, bool],
    genes: list[str],
    exports: dict[str, bool],
) -> dict[str, Any]:
    from strank.cohort.in_memory import name_of
    from strank.prediction import ignored_part, novelty_warning, open_subject, trust_of
    from strank.report.maps import write_gene_maps, write_tissue_map

    slide, section = open_subject(path, *told)

    def check(n_tiles: int) -> None:
        if exports["geojson"]:
            from strank.io.exports import check_geojson_size

            check_geojson_size(n_tiles, len(genes), scorer.model.uncertainty is not None)

    name = "" if section is None else name_of(section)
    scores, before = scorer.score(slide, folder / "scores.h5ad", name, check=check, bar=progress)
    if section is not None:
        absent = scores.var_names.difference(section.var_names)
        if len(absent):
            note(f"{path} has no counts of {some(absent)}: predicted only")
    ignored = ignored_part(scores)
    for text in (ignored, novelty_warning(scores)):
        if text:
            note(f"{path}: {text}")
    with progress(f"Drawing {path.stem}", len(genes)) as advance:
        maps = write_gene_maps(folder, scores, genes, section=section, slide=slide, advance=advance)
    tissue = write_tissue_map(folder, slide)
    return {
        "slide": str(path),
        "scores": str(folder / "scores.h5ad"),
        "scored_before": before,
        "n_genes": scores.n_vars,
        "ignored": ignored,
        **trust_of(scores),
        "tissue": str(tissue),
        "maps": [str(drawn) for drawn in maps],
        **_export(slide, scores, folder, genes, exports),
    }


def _export(
    slide: Slide, scores: AnnData, folder: Path, genes: list[str], wanted: dict[str, bool]
) -> dict[str, str]:
    written = {}
    if wanted["geojson"]:
        from strank.io import write_geojson

        write_geojson(scores, folder / "scores.geojson", genes=genes)
        written["geojson"] = str(folder / "scores.geojson")
    if wanted["spatialdata"]:
        from strank.io import write_spatialdata

        write_spatialdata(scores, folder / "scores.zarr", image=slide.path)
        written["spatialdata"] = str(folder / "scores.zarr")
    return written


def _line(result: dict[str, Any], genes: list[str]) -> str:
    how = "Scored before:" if result["scored_before"] else "Scored"
    return (
        f"{how} {result['n_tiles']} tiles for {result['n_genes']} genes: {result['scores']}; "
        f"maps of {some(genes, 10)}."
    )


def _genes_to_draw(panel: list[str], genes: list[str] | None) -> list[str]:
    unknown = [gene for gene in genes or [] if gene not in panel]
    if unknown:
        raise InputError(
            f"--genes: the model has no {some(unknown)}; its panel is {some(panel, 60)}"
        )
    return list(dict.fromkeys(genes or panel[:_PICTURES]))
