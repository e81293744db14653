"""``strank contrast``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strank.cli.console import Json, finish, note, records, show_table
from strank.files import claims

if TYPE_CHECKING:
    import pandas as pd

_TOP = 10


_Predictions = Annotated[Path, typer.Argument(help="scores.h5ad of `strank predict`.")]
_Groups = Annotated[
    str,
    typer.Option(help="Regions: GeoJSON as QuPath exports it (pixels), or a column of obs."),
]
_Output = Annotated[Path, typer.Option("-o", "--output", help="Folder for table and plot.")]
_Between = Annotated[
    str | None, typer.Option(help="The two regions, `A,B`; needed if there are more.")
]
_Counts = Annotated[
    Path | None,
    typer.Option(help="The section's .h5ad of a cohort, for observed changes."),
]
_Block = Annotated[
    float | None,
    typer.Option(help="Side of the blocks of tissue in µm; 1000 if not given."),
]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of the resampling.")]


@claims("output")
def contrast_command(
    predictions: _Predictions,
    groups: _Groups,
    output: _Output,
    between: _Between = None,
    counts: _Counts = None,
    block: _Block = None,
    seed: _Seed = 0,
    as_json: Json = False,
) -> None:
    """Rank genes by their predicted change between two regions, with intervals.

    The change is the log ratio of mean predicted rates, A over B.

    [bold]Example:[/] strank contrast strank-demo/maps/scores.h5ad
    --groups strank-demo/regions.geojson --between tumour,stroma -o contrast

    [bold]Example:[/] strank contrast strank-demo/maps/scores.h5ad
    --groups strank-demo/regions.geojson --between tumour,stroma
    --counts strank-demo/cohort/D1.h5ad -o observed
    """
    from strank.evaluation.fold_change import contrast
    from strank.report.plots import write_volcano

    given = {} if block is None else {"block_um": block}
    found = contrast(predictions, groups, counts, between=between, seed=seed, **given)
    write_volcano(output / "volcano.png", found.table)
    found.write(output)
    (a, b), (up, down) = found.facts["between"], _most(found.table)
    for warning in found.warnings:
        note(warning)
    if not as_json:
        for part, more, less in ((up, a, b), (down, b, a)):
            if len(part):
                show_table(part, f"Predicted higher in {more} than in {less}")
    told = {name: found.facts[name] for name in ("change", "between", "blocks", "caveats")}
    told["agreement"] = None if counts is None else found.facts["agreement"]
    finish(
        {**told, "up": records(up), "down": records(down)},
        outputs=[output / name for name in ("contrast.csv", "contrast.json", "volcano.png")],
        as_json=as_json,
        lines=[
            *_agreement_line(told["agreement"]),
            *(f"• {caveat}" for caveat in told["caveats"]),
            f"Wrote contrast.csv, contrast.json and volcano.png to {output}.",
        ],
    )


def _most(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Genes that change most in each direction."""
    columns = ["gene", "predicted", "low", "high", "q"]
    columns += [name for name in ["model_low", "model_high", "observed"] if name in table]
    up, down = table[table["predicted"] > 0], table[table["predicted"] < 0]
    return up[columns].head(_TOP), down[columns].iloc[::-1].head(_TOP)


def _agreement_line(found: dict[str, Any] | None) -> list[str]:
    if found is None or found["pearson"] is None:
        return []
    return [
        f"Observed against predicted, {found['genes']} genes: r = {found['pearson']:.2f}, "
        f"{found['same_direction']:.0%} in the same direction."
    ]
