"""``strank hest-probe``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, finish, note, records, show_table, working
from strank.progress import progress

__all__ = ["hest_probe"]


def hest_probe(
    task: Annotated[Path, typer.Argument(help="A task with splits/, adata/ and var_50genes.json.")],
    embeddings: Annotated[
        Path, typer.Option(help="Folder with one <sample>.h5 each, as the benchmark writes them.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the tables.")],
    components: Annotated[
        int, typer.Option(min=1, help="Principal components; 256 in the benchmark.")
    ] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the PCA; 1 in the benchmark.")] = 1,
    as_json: Json = False,
) -> None:
    """Run a HEST-Benchmark task: its ridge and the exact list objective, side by side.

    Its own protocol to the digit (PCA, ridge, Pearson over the pooled test spots
    with log1p(counts), mean over genes and folds), and scores within sections.

    [bold]Example:[/] strank hest-probe bench_data/IDC --embeddings ST_data_emb/IDC/uni_v1 -o idc
    """
    from strank.files import output_folder
    from strank.readers.hest_bench import read_task
    from strank.studies.probe import run_probe

    with working("Reading the samples"):
        data = read_task(task, embeddings)
    output_folder(output)
    with progress("Folds", len(data.folds)) as advance:
        result = run_probe(data, n_components=components, seed=seed, advance=advance)
    result.write(output)
    for warning in result.warnings:
        note(warning)
    summary = result.summary
    if not as_json:
        shown = summary[summary["fold"] == "mean"].drop(columns="fold")
        show_table(shown, f"Mean over {len(data.panel)} genes and {len(data.folds)} folds")
    caveats = result.facts["caveats"]
    finish(
        {
            "output": str(output),
            "task": str(task),
            "warnings": result.warnings,
            "caveats": caveats,
            "summary": records(summary),
        },
        as_json=as_json,
        lines=[
            *(f"• {caveat}" for caveat in caveats),
            f"Wrote results.csv, summary.csv and probe.json to {output}.",
        ],
    )
