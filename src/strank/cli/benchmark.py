"""``strank benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strank.cli.console import Json, finish, note, records, show_table, split_names
from strank.errors import InputError
from strank.progress import progress

if TYPE_CHECKING:
    import pandas as pd

    from strank.evaluation.folds import Protocol
    from strank.studies.benchmark.runner import Grid

__all__ = ["benchmark"]


def benchmark(
    cohort: Annotated[Path, typer.Argument(help="A cohort with features.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")],
    protocol: Annotated[
        str,
        typer.Option(help="`strank`, `section`, `paper`, `hest`, a .toml file or a HEST task."),
    ] = "strank",
    losses: Annotated[
        str | None,
        typer.Option(
            help="list, pair, mse, poisson, nb, rank, pcc, section-pcc, hest-ridge, separated by "
            "commas; the protocol's, or the first eight, if not given."
        ),
    ] = None,
    heads: Annotated[
        str,
        typer.Option(
            help="linear, linear-paper, mlp, context, mlp+linear, context+linear, or timm:NAME to "
            "train an image network end to end; separated by commas."
        ),
    ] = "linear",
    encoders: Annotated[
        str, typer.Option(help="Image features, separated by commas.")
    ] = "morphology",
    genes: Annotated[
        str | None, typer.Option(help="Sizes of the panel, such as 50,1000,all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of what is trained step by step.")] = 1,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Processes; all cores if not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare objectives, heads, encoders and panels on the folds of a protocol.

    A run that was stopped goes on. [bold]strank report[/] makes a page of the tables.

    [bold]Example:[/] strank benchmark cohort -o benchmark --genes 50,1000

    [bold]Example:[/] strank benchmark cohort -o heads --heads linear,mlp --seeds 3
    """
    import pandas as pd
    from joblib import cpu_count

    from strank.evaluation.folds import get_protocol
    from strank.studies.benchmark.runner import run_benchmark

    chosen = get_protocol(protocol)
    grid = _grid(chosen, losses, heads, encoders, genes, seeds)
    facts = run_benchmark(cohort, chosen, grid, output, jobs=jobs or cpu_count(), progress=progress)
    for text in (*facts["warnings"], *facts["notes"]):
        note(text)
    for text in facts["failed"]:
        note(f"not done: {text}")
    summary = pd.read_csv(output / "summary.csv")
    if not as_json:
        _show(summary, chosen.headline)
    finish(
        {"output": str(output), **facts, "summary": records(summary)},
        as_json=as_json,
        lines=[
            f"Protocol {chosen.name}, SHA-256 {chosen.sha256[:12]}.",
            f"Wrote results.parquet, results.csv.gz, summary.csv, .md and .tex to {output}; "
            f"strank report {output} makes a page of them.",
        ],
    )


def _grid(
    protocol: Protocol, losses: str | None, heads: str, encoders: str, genes: str | None, seeds: int
) -> Grid:
    from strank.studies.benchmark.runner import LOSSES, Grid

    return Grid(
        losses=tuple(split_names(losses) or protocol.methods or LOSSES),
        heads=tuple(split_names(heads) or ()),
        encoders=tuple(split_names(encoders) or ()),
        n_genes=tuple(map(_size, split_names(genes) or ())) or protocol.n_genes,
        seeds=seeds,
    )


def _size(text: str) -> int | None:
    if text != "all" and not (text.isdecimal() and int(text) > 0):
        raise InputError(f"--genes: {text!r} is neither a number of genes nor `all`")
    return None if text == "all" else int(text)


def _show(summary: pd.DataFrame, headline: str) -> None:
    """One table a size of the panel and kind of patient."""
    columns = list(dict.fromkeys((headline, "depth_matched", "lift", "deviance", "scc")))
    for (encoder, genes, seen), rows in summary.groupby(["encoder", "genes", "patient_seen"]):
        wide = rows.pivot_table("mean", "method", "score", dropna=False)[columns]
        wide = wide.sort_values(headline, ascending=False).reset_index()
        patient = "a patient of the training" if seen else "new patients"
        show_table(wide.rename_axis(columns=None), f"{encoder}, {genes} genes, {patient}")
