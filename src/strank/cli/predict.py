"""``strank predict``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import Json, finish, note, split_names
from strank.errors import InputError, some
from strank.progress import progress

if TYPE_CHECKING:
    from anndata import AnnData

    from strank.encoders.base import Encoder
    from strank.model.rank_model import RankModel
    from strank.slides.slide import Slide

__all__ = ["predict"]

_PICTURES = 6


@dataclass(frozen=True)
class _Job:
    """What is the same for all slides; ``facts`` tell whether scores are of this model."""

    model: RankModel
    encoder: Encoder
    facts: dict[str, Any]
    genes: list[str]
    mpp: float | None
    stride: float | None
    spatialdata: bool
    geojson: bool


def predict(
    slides: Annotated[
        list[Path],
        typer.Argument(
            help="Slides (whole-slide image, TIFF, JPEG, PNG), or sections' .h5ad of a cohort."
        ),
    ],
    model: Annotated[Path, typer.Option(help="A trained model.")],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", help="Folder for scores and maps; of several slides, one each."
        ),
    ],
    genes: Annotated[
        str | None,
        typer.Option(
            help="Genes to draw, and of the GeoJSON, separated by commas; "
            f"the first {_PICTURES} if not given."
        ),
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="µm per pixel of the slides, if the files do not say it.")
    ] = None,
    stride: Annotated[
        float | None,
        typer.Option(help="µm between tiles; a spot's diameter if not given, less is denser."),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="The model's encoder, where it is a module:callable of your own."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="File with the encoder's weights, not those on the hub.")
    ] = None,
    spatialdata: Annotated[
        bool, typer.Option("--spatialdata", help="Also write scores.zarr (napari, squidpy).")
    ] = False,
    geojson: Annotated[
        bool, typer.Option("--geojson", help="Also write scores.geojson (QuPath).")
    ] = False,
    as_json: Json = False,
) -> None:
    """5. Find the tissue of slides, score tiles over it and draw maps.

    Slides that were scored before (same image, model and stride) are not scored again.

    [bold]Example:[/] strank predict slide.svs --model model -o out --genes ERBB2,FASN --geojson

    [bold]Example:[/] strank predict slides/*.tif --mpp 0.5 --stride 25 --model model -o out

    [bold]Example:[/] strank predict cohort/C5.h5ad --model model -o out
    (observed beside predicted)
    """
    from strank.encoders.backbone import on_gpu
    from strank.files import sha256
    from strank.model.rank_model import RankModel
    from strank.prediction import encoder_of
    from strank.version import __version__

    trained = RankModel.load(model)
    drawn = _genes_to_draw(trained, split_names(genes))
    facts = {"model_sha256": sha256(model / "model.json"), "strank_version": __version__}
    eyes, _ = on_gpu(encoder_of(trained, name=encoder, weights=weights))
    job = _Job(trained, eyes, facts, drawn, mpp, stride, spatialdata, geojson)
    pitch = float(trained.provenance["spot_pitch_um"])
    if stride not in (None, pitch) and getattr(trained.head, "n_neighbours", 0) > 0:
        note(
            f"the model looks at neighbours, {pitch:g} µm away in training and {stride:g} µm here: "
            "a map without --stride is closer to what was evaluated"
        )
    done, failed = [], {}
    for slide, folder in _folders(slides, output).items():
        try:
            done.append(_predict_one(slide, folder, job))
        except InputError as error:
            if len(slides) == 1:
                raise
            # One bad slide must not end a night's work.
            note(str(error))
            failed[str(slide)] = str(error)
    told = [_line(result, job) for result in done]
    summary = done[0] if len(slides) == 1 else {"slides": done, "failed": failed}
    finish(summary, as_json=as_json, lines=told)
    if failed:
        raise InputError(f"{len(failed)} of {len(slides)} slides failed: {some(failed, 20)}")


def _folders(slides: list[Path], output: Path) -> dict[Path, Path]:
    """Where the results of each slide go."""
    if len(slides) == 1:
        return {slides[0]: output}
    folders: dict[Path, Path] = {}
    for slide in slides:
        if (folder := output / slide.stem) in folders.values():
            raise InputError(
                f"two slides are called {slide.stem}, and would share {folder}; predict one of "
                "them apart, with another -o"
            )
        folders[slide] = folder
    return folders


def _predict_one(path: Path, folder: Path, job: _Job) -> dict[str, Any]:
    from strank.files import output_folder
    from strank.report.maps import map_layers, write_gene_maps

    slide, section = _open(path, job.mpp)
    output_folder(folder)
    predictions, scored_before = _scores(slide, folder / "scores.h5ad", job)
    if section is not None:
        absent = job.model.panel.index.difference(section.var_names)
        if len(absent):
            note(f"{path} has no counts of {some(absent)}: predicted only")
    warning = str(predictions.uns.get("strank_novelty", {}).get("warning", ""))
    if warning:
        note(f"{path}: {warning}")
    with progress(f"Drawing {path.stem}", len(job.genes)) as advance:
        layers = map_layers(predictions, section)
        maps = write_gene_maps(folder, slide, layers, job.genes, advance=advance)
    return {
        "slide": str(path),
        "scores": str(folder / "scores.h5ad"),
        "scored_before": scored_before,
        "n_tiles": predictions.n_obs,
        "n_genes": predictions.n_vars,
        "warning": warning,
        "maps": [str(drawn) for drawn in maps],
        **_export(slide, predictions, folder, job),
    }


def _scores(slide: Slide, path: Path, job: _Job) -> tuple[AnnData, bool]:
    """Score a slide, or read its scores if they are there; and say which."""
    from strank.cohort.store import write_h5ad
    from strank.files import sha256
    from strank.io.exports import check_geojson_size
    from strank.prediction import grid_facts, predict_slide, tile_grid

    facts = grid_facts(slide, job.model, stride_um=job.stride)
    facts |= {"image_sha256": sha256(slide.path), **job.facts}
    predictions = _before(path, facts)
    tiles = predictions
    if tiles is None:
        tiles = tile_grid(slide, job.model, stride_um=job.stride, encoder=job.encoder)
    if job.geojson:
        check_geojson_size(tiles.n_obs, len(job.genes))
    if predictions is not None:
        return predictions, True
    with progress(f"Scoring tiles of {slide.path.stem}", tiles.n_obs) as advance:
        predictions = predict_slide(slide, job.model, tiles, encoder=job.encoder, advance=advance)
    predictions.uns["strank"] = facts
    write_h5ad(predictions, path)
    return predictions, False


def _before(path: Path, facts: dict[str, Any]) -> AnnData | None:
    from strank.cohort.store import read_h5ad

    try:
        found = read_h5ad(path)
    except InputError:
        return None
    stored = found.uns.get("strank", {})
    # A file that was moved is still the same.
    same = all(stored.get(key) == value for key, value in facts.items() if key != "image")
    return found if same else None


def _export(slide: Slide, predictions: AnnData, folder: Path, job: _Job) -> dict[str, str]:
    written = {}
    if job.geojson:
        from strank.io.exports import write_geojson

        write_geojson(folder / "scores.geojson", predictions, job.genes)
        written["geojson"] = str(folder / "scores.geojson")
    if job.spatialdata:
        from strank.io.exports import write_spatialdata

        write_spatialdata(folder / "scores.zarr", slide, predictions)
        written["spatialdata"] = str(folder / "scores.zarr")
    return written


def _line(result: dict[str, Any], job: _Job) -> str:
    how = "Scored before:" if result["scored_before"] else "Scored"
    return (
        f"{how} {result['n_tiles']} tiles for {result['n_genes']} genes: {result['scores']}; "
        f"maps of {some(job.genes, 10)}."
    )


def _genes_to_draw(model: RankModel, genes: list[str] | None) -> list[str]:
    panel = list(model.panel.index)
    unknown = [gene for gene in genes or [] if gene not in panel]
    if unknown:
        raise InputError(
            f"--genes: the model has no {some(unknown)}; its panel is {some(panel, 60)}"
        )
    return list(dict.fromkeys(genes or panel[:_PICTURES]))


def _open(image: Path, mpp: float | None) -> tuple[Slide, AnnData | None]:
    from strank.cohort.store import read_section
    from strank.slides.slide import open_slide, slide_of

    if image.suffix == ".h5ad":
        if mpp is not None:
            raise InputError(f"--mpp: {image} knows its µm per pixel; leave the option out")
        section = read_section(image)
        return slide_of(section), section
    return open_slide(image, mpp), None
