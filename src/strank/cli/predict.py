"""``strank predict``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import (
    Dask,
    FewJobs,
    Json,
    Mpp,
    MppOverride,
    Shard,
    fail,
    finish,
    note,
    split_names,
)
from strank.errors import InputError, some
from strank.extras import need
from strank.files import claims
from strank.progress import Say, progress

if TYPE_CHECKING:
    from anndata import AnnData

    from strank.prediction import Scoring
    from strank.slide_runs import SlideEntry
    from strank.slides.slide import Slide

_PICTURES = 6
_WRITTEN = ("scores", "tissue", "geojson", "spatialdata")


_Slides = Annotated[
    list[Path],
    typer.Argument(
        help="Slides (whole-slide image, TIFF, JPEG, PNG), or sections' .h5ad of a cohort; or a "
        ".csv with a row a slide: path, and if wanted name, mpp, model and more."
    ),
]
_Model = Annotated[
    Path | None, typer.Option(help="A trained model; of a list, for slides that name none.")
]
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
_Stride = Annotated[
    float | None,
    typer.Option(help="µm between tiles; a spot's diameter if not given, less is denser."),
]
_Features = Annotated[
    Path | None,
    typer.Option(help="Folder of `strank embed SLIDES`: score its tiles by their features."),
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
    output: _Output,
    model: _Model = None,
    genes: _Genes = None,
    mpp: Mpp = None,
    mpp_override: MppOverride = False,
    stride: _Stride = None,
    features: _Features = None,
    encoder: _Encoder = None,
    weights: _Weights = None,
    spatialdata: _Spatialdata = False,
    geojson: _Geojson = False,
    jobs: FewJobs = 1,
    dask: Dask = None,
    shard: Shard = None,
    as_json: Json = False,
) -> None:
    """5. Find the tissue of slides, score tiles over it and draw maps.

    Slides that were scored before (same image, model and stride) are not scored again.

    [bold]Example:[/] strank predict strank-demo/st/images/D1.jpg --mpp 0.8
    --model strank-demo/model -o slide --geojson

    [bold]Example:[/] strank predict strank-demo/st/images/*.jpg --mpp 0.8 --stride 150
    --model strank-demo/model -o slides

    [bold]Example:[/] strank predict slides.csv --model model -o slides --jobs 4

    [bold]Example:[/] strank predict slides.csv --features tiles --model model -o slides

    [bold]Example:[/] strank predict strank-demo/cohort/D1.h5ad --model strank-demo/model -o section
    (observed beside predicted)
    """
    exported = ("geopandas", "shapely", "spatialdata") if geojson or spatialdata else ()
    table = next((path for path in slides if path.suffix == ".csv"), None)
    page = ["jinja2"] * (len(slides) > 1 or table is not None)
    need("cv2", "pyvips", "PIL", "matplotlib", *page, *exported)
    from strank.prediction import Scoring
    from strank.slide_runs import SlideEntry, entries_of, run_slides
    from strank.slides.slide import check_override
    from strank.where import Where

    check_override(mpp, mpp_override)
    where = Where(jobs, dask, shard)
    entries = entries_of(slides, output)
    scoring = Scoring(model, encoder, weights, stride, mpp, mpp_override, features)
    drawn = split_names(genes)
    if any(entry.model is None for entry in entries):
        scorer = scoring.scorer()
        _ = _genes_to_draw(list(scorer.model.panel.index), drawn)
        for text in scorer.warnings:
            note(text)
    exports = {"geojson": geojson, "spatialdata": spatialdata}
    work = partial(_predict_one, scoring, drawn, exports)
    if len(slides) == 1 and table is None:
        result = work(output, progress, SlideEntry("", slides[0]), note)
        _finish([result], {}, [], as_json)
        return
    here = where.is_here
    bar = progress if here else partial(progress, hidden=True)
    every = partial(_predict_in, work, output, bar)
    facts = {**scoring.facts, "genes": drawn, **exports}
    n_slides = len(where.mine([entry.name for entry in entries]))
    with progress("Slides", n_slides, hidden=here) as advance:
        done, failed = run_slides(entries, every, output, where, facts, tell=note, advance=advance)
    files = {entry.name: entry.file for entry in entries}
    failures = {files[name]: error for name, error in failed.items()}
    _finish(list(done.values()), failures, pages(output) if shard is None else [], as_json)
    if failed:
        fail(f"{len(failed)} of {n_slides} slides failed: {some(failures, 20)}")
        raise typer.Exit(1)


def pages(output: Path) -> list[Path]:
    """Write the page of several slides; name it, and their table."""
    from strank.report.slides import write_slides_page
    from strank.slide_runs import SLIDES

    return [output / SLIDES, write_slides_page(output)]


def _finish(
    done: list[dict[str, Any]], failed: dict[str, str], tables: list[Path], as_json: bool
) -> None:
    written = [result[kind] for result in done for kind in _WRITTEN if kind in result]
    finish(
        {"slides": done, "failed": failed},
        outputs=[*written, *(path for result in done for path in result["maps"]), *tables],
        as_json=as_json,
        lines=[
            *(_line(result) for result in done),
            *(f"All: {page}" for page in tables if page.suffix == ".html"),
        ],
    )


def _predict_in(
    work: Callable[..., dict[str, Any]], output: Path, bar: Any, entry: SlideEntry, say: Say
) -> dict[str, Any]:
    """Predict one of several, in a folder of its own."""
    return work(output / entry.name, bar, entry, say)


def _predict_one(
    scoring: Scoring,
    asked: list[str] | None,
    exports: dict[str, bool],
    folder: Path,
    bar: Any,
    entry: SlideEntry,
    say: Say,
) -> dict[str, Any]:
    from strank.prediction import ignored_part, trust_of
    from strank.report.maps import write_gene_maps, write_tissue_map

    scorer, (slide, section, name) = scoring.scorer(entry.model), scoring.open(entry)
    genes = _genes_to_draw(list(scorer.model.panel.index), asked)

    def check(n_tiles: int) -> None:
        if exports["geojson"]:
            from strank.io.exports import check_geojson_size

            check_geojson_size(n_tiles, len(genes), scorer.model.uncertainty is not None)

    scores, before = scorer.score(slide, folder / "scores.h5ad", name, check=check, bar=bar)
    if section is not None:
        absent = scores.var_names.difference(section.var_names)
        if len(absent):
            say(f"{entry.file} has no counts of {some(absent)}: predicted only")
    for text in scorer.limits_of(scores):
        say(f"{entry.file}: {text}")
    with bar(f"Drawing {slide.path.stem}", len(genes)) as advance:
        maps = write_gene_maps(folder, scores, genes, section=section, slide=slide, advance=advance)
    tissue = write_tissue_map(folder, slide)
    return {
        "slide": entry.file,
        "scores": str(folder / "scores.h5ad"),
        "scored_before": before,
        "n_genes": scores.n_vars,
        "genes": genes,
        "ignored": ignored_part(scores),
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


def _line(result: dict[str, Any]) -> str:
    how = "Scored before:" if result["scored_before"] else "Scored"
    return (
        f"{how} {result['n_tiles']} tiles for {result['n_genes']} genes: {result['scores']}; "
        f"maps of {some(result['genes'], 10)}."
    )


def _genes_to_draw(panel: list[str], genes: list[str] | None) -> list[str]:
    unknown = [gene for gene in genes or [] if gene not in panel]
    if unknown:
        raise InputError(
            f"--genes: the model has no {some(unknown)}; its panel is {some(panel, 60)}"
        )
    return list(dict.fromkeys(genes or panel[:_PICTURES]))
