"""``strank contrast``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import Json, finish, note, records, show_table
from strank.errors import InputError, some

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from strank.evaluation.regions import Regions

__all__ = ["contrast"]

_TOP = 10
_COVERS = (
    "The interval and q cover where in the tissue one looked: blocks of tissue were resampled. "
    "They do not cover the error of the model, so a small q says that the predictions differ, not "
    "that expression does."
)
_CIRCULAR = (
    "If the groups were found from these scores (by clustering, say), intervals and q are too sure."
)


def contrast(
    predictions: Annotated[Path, typer.Argument(help="scores.h5ad of `strank predict`.")],
    groups: Annotated[
        str,
        typer.Option(help="Regions: GeoJSON as QuPath exports it (pixels), or a column of obs."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for table and plot.")],
    between: Annotated[
        str | None, typer.Option(help="The two regions, `A,B`; needed if there are more.")
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option(help="The section's .h5ad of a cohort, for observed changes."),
    ] = None,
    block: Annotated[
        float | None,
        typer.Option(help="Side of the blocks of tissue in µm; 1000 if not given."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    as_json: Json = False,
) -> None:
    """Rank genes by their predicted change between two regions, with intervals.

    The change is the log ratio of mean predicted rates, A over B.

    [bold]Example:[/] strank contrast out/scores.h5ad --groups regions.geojson -o contrast

    [bold]Example:[/] strank contrast out/scores.h5ad --groups regions.geojson
    --between Tumor,Stroma --counts cohort/C5.h5ad -o contrast
    """
    from strank.evaluation.fold_change import BLOCK_UM, contrast_predicted
    from strank.evaluation.regions import choose_pair, find_regions
    from strank.files import output_folder

    how: Any = {"block_um": BLOCK_UM if block is None else _positive(block), "seed": seed}
    tiles = _read_predictions(predictions)
    regions = find_regions(tiles, groups)
    pair = choose_pair(regions, between, source=f"--groups {groups}")
    chosen, warnings = _chosen(regions, pair, tiles, str(predictions))
    predicted = contrast_predicted(tiles, chosen, **how)
    table, blocks = predicted.table, {"predicted": predicted.blocks}
    facts: dict[str, Any] = {
        "change": f"log mean rate in {pair[0]} - log mean rate in {pair[1]}",
        "between": list(pair),
        "blocks": blocks,
        "caveats": [_COVERS] + [_CIRCULAR] * (groups in tiles.obs),
        "warnings": [*warnings, *_unknown_scale(tiles, predictions), *predicted.warnings],
    }
    if counts is not None:
        table, blocks["observed"] = _add_observed(counts, tiles, groups, table, facts, how)
    inputs = {"predictions": predictions, "counts": counts}
    if groups not in tiles.obs:
        inputs["groups"] = Path(groups)
    output_folder(output)
    _write(output, table, {**facts, **_provenance(inputs, tiles, groups, how)})
    _tell(output, table, facts, as_json)


def _add_observed(
    path: Path,
    tiles: AnnData,
    groups: str,
    table: pd.DataFrame,
    facts: dict[str, Any],
    how: dict[str, Any],
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Join the observed changes; what limits them, and how they agree, goes to the facts."""
    from strank.evaluation.fold_change import agreement, contrast_observed

    section, chosen, told = _observed_regions(path, tiles, groups, tuple(facts["between"]))
    observed = contrast_observed(section, chosen, tiles.var_names, **how)
    table = table.merge(observed.table, on="gene")
    facts["warnings"] += [*told, *observed.warnings]
    facts["agreement"] = agreement(table)
    return table, observed.blocks


def _write(output: Path, table: pd.DataFrame, content: dict[str, Any]) -> None:
    from strank.files import atomic_path, write_json
    from strank.report.plots import write_volcano

    with atomic_path(output / "contrast.csv") as part:
        table.to_csv(part, index=False, float_format="%.6g")
    write_volcano(output / "volcano.png", table)
    write_json(output / "contrast.json", content)


def _provenance(
    inputs: dict[str, Path | None], tiles: AnnData, groups: str, how: dict[str, Any]
) -> dict[str, Any]:
    from strank.evaluation.fold_change import N_DRAWS
    from strank.files import sha256
    from strank.version import __version__

    return {
        "strank_version": __version__,
        "inputs": {
            name: {"path": str(path), "sha256": sha256(path)}
            for name, path in inputs.items()
            if path is not None
        },
        "parameters": {"groups": groups, "n_draws": N_DRAWS, "interval": 0.95, **how},
        "model": _model(tiles),
    }


def _tell(output: Path, table: pd.DataFrame, facts: dict[str, Any], as_json: bool) -> None:
    for warning in facts["warnings"]:
        note(warning)
    (a, b), (up, down) = facts["between"], _most(table)
    if not as_json:
        for part, more, less in ((up, a, b), (down, b, a)):
            if len(part):
                show_table(part, f"Predicted higher in {more} than in {less}")
    finish(
        {"output": str(output), **facts, "up": records(up), "down": records(down)},
        as_json=as_json,
        lines=[
            *_agreement_line(facts.get("agreement")),
            *(f"• {caveat}" for caveat in facts["caveats"]),
            f"Wrote contrast.csv, contrast.json and volcano.png to {output}.",
        ],
    )


def _positive(block: float) -> float:
    if not 0 < block < float("inf"):
        raise InputError(f"--block must be positive, in µm; got {block:g}")
    return block


def _read_predictions(path: Path) -> AnnData:
    from strank.cohort.store import read_h5ad

    tiles = read_h5ad(path)
    if "library_size" in tiles.obs and "strank_model" not in tiles.uns:
        raise InputError(f"{path}: counts, not predictions; run `strank predict {path}` first")
    sections = tiles.obs["section"].unique() if "section" in tiles.obs else []
    if len(sections) > 1:
        raise InputError(
            f"{path}: holds sections {some(sections)}; a contrast is of one, write each to its own "
            "file"
        )
    return tiles


def _chosen(
    regions: Regions, pair: tuple[str, ...], spots: AnnData, path: str
) -> tuple[Regions, list[str]]:
    """Keep two regions, each with spots of its own."""
    from strank.evaluation.regions import disjoint

    chosen, shared = disjoint(regions, pair)
    for name in pair:
        if not regions[name].any():
            centres = spots.obsm["spatial"]
            (left, top), (right, bottom) = centres.min(0), centres.max(0)
            raise InputError(
                f"{path}: no spot lies in region {name!r}; spots lie at x {left:.0f} to "
                f"{right:.0f}, y {top:.0f} to {bottom:.0f}, in pixels of the full image"
            )
        if not chosen[name].any():
            raise InputError(f"{path}: all spots of region {name!r} lie in the other one too")
    told = f"{path}: {shared} spots lie in both regions, and are left out"
    return chosen, [told] if shared else []


def _observed_regions(
    path: Path, tiles: AnnData, groups: str, pair: tuple[str, ...]
) -> tuple[AnnData, Regions, list[str]]:
    """Read the section with counts, and find the same regions there."""
    from strank.cohort.contract import counts_checksum
    from strank.cohort.store import read_section
    from strank.evaluation.regions import find_regions

    section = read_section(path)
    _same_slide(path, section, tiles)
    if groups in tiles.obs and groups not in section.obs:
        raise InputError(
            f"{path}: obs has no column {groups}; add it there too, or give regions as GeoJSON"
        )
    regions = find_regions(section, groups)
    absent = [name for name in pair if name not in regions]
    if absent:
        raise InputError(f"{path}: obs[{groups!r}] has no {some(absent)}, as the predictions have")
    chosen, told = _chosen(regions, pair, section, str(path))
    lacking = tiles.var_names.difference(section.var_names)
    if len(lacking):
        told.append(f"{path} has no counts of {some(lacking)}: predicted only")
    trained = _model(tiles).get("sections", {}).values()
    if counts_checksum(section) in [known.get("counts_sha256") for known in trained]:
        told.append(f"the model was trained on {path}: its observed changes are no test")
    return section, chosen, told


def _same_slide(path: Path, section: AnnData, tiles: AnnData) -> None:
    """Refuse counts whose positions are in pixels of another image."""
    mine, theirs = section.uns["strank"], tiles.uns.get("strank", {})
    image, other = (Path(str(facts.get("image", ""))).name for facts in (mine, theirs))
    scales = [float(facts.get("um_per_pixel", 0)) for facts in (mine, theirs)]
    if other and (image != other or abs(scales[0] - scales[1]) > 1e-6 * scales[0]):
        raise InputError(
            f"{path}: counts of {image} ({scales[0]:.6g} µm per pixel), but the predictions are of "
            f"{other} ({scales[1]:.6g}); regions are places of one image"
        )


def _model(tiles: AnnData) -> dict[str, Any]:
    import json

    found: dict[str, Any] = json.loads(tiles.uns.get("strank_model", "{}"))
    return found


def _unknown_scale(tiles: AnnData, path: Path) -> list[str]:
    if "strank_model" in tiles.uns:
        return []
    return [f"{path} was not written by strank: X is taken for log relative rates (natural log)"]


def _most(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Genes that change most in each direction."""
    columns = ["gene", "predicted", "low", "high", "q"]
    columns += [column for column in ["observed"] if column in table]
    up, down = table[table["predicted"] > 0], table[table["predicted"] < 0]
    return up[columns].head(_TOP), down[columns].iloc[::-1].head(_TOP)


def _agreement_line(found: dict[str, Any] | None) -> list[str]:
    if found is None or found["pearson"] is None:
        return []
    return [
        f"Observed against predicted, {found['genes']} genes: r = {found['pearson']:.2f}, "
        f"{found['same_direction']:.0%} in the same direction."
    ]
