"""``strank benchmark``, ``report``, ``demo`` and ``hest-benchmark``."""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from strank.cli.console import (
    Dask,
    Jobs,
    Json,
    Shard,
    cores,
    fail,
    finish,
    note,
    records,
    show_table,
    split_names,
    working,
)
from strank.errors import InputError, some
from strank.extras import need

if TYPE_CHECKING:
    import pandas as pd


_Cohort = Annotated[Path, typer.Argument(help="A cohort with features.")]
_Output = Annotated[Path, typer.Option("-o", "--output", help="Folder of the results.")]
_Protocol = Annotated[
    str,
    typer.Option(
        help="`strank`, `section`, `hest`, a task of the paper such as `paper-IDC`, a .toml file "
        "or a task of HEST-Benchmark."
    ),
]
_Losses = Annotated[
    str | None,
    typer.Option(
        help="list, pair, rank, rank-published, pcc, section-pcc, mse, poisson, nb or "
        "hest-ridge, separated by commas; if not given, the protocol's, or all but "
        "rank-published and hest-ridge."
    ),
]
_Heads = Annotated[
    str,
    typer.Option(
        help="linear, mlp, context, mlp+linear, context+linear, or timm:NAME to train an image "
        "network end to end; separated by commas."
    ),
]
_Recipes = Annotated[
    str | None,
    typer.Option(
        help="How a network is trained: default, published, published-no-entropy, or usual, "
        "which is the exact solver where there is one; separated by commas; if not given, the "
        "protocol's, or usual."
    ),
]
_LibrarySize = Annotated[
    bool,
    typer.Option(
        "--library-size/--no-library-size",
        help="Without: what knows the depth of a spot is fitted a second time without it, as an "
        "ablation.",
    ),
]
_Encoders = Annotated[str, typer.Option(help="Image features, separated by commas.")]
_Genes = Annotated[str | None, typer.Option(help="Sizes of the panel, such as 50,1000,all.")]
_Seeds = Annotated[int, typer.Option(min=1, help="Of what is trained step by step.")]
_OutputDemo = Annotated[
    Path, typer.Option("-o", "--output", help="A new folder for all that the demo makes.")
]
_Seed = Annotated[int, typer.Option(min=0, help="Seed of the simulation.")]
_Data = Annotated[Path, typer.Argument(help="bench_data, or one of its tasks.")]
_Embeddings = Annotated[
    Path,
    typer.Option(
        help="ST_data_emb: TASK/ENCODER/SAMPLE.h5; of one task, also an encoder's folder."
    ),
]
_OutputHest = Annotated[
    Path, typer.Option("-o", "--output", help="Folder of the tables; a stopped run continues.")
]
_ProtocolHest = Annotated[
    str,
    typer.Option(
        help="hest, hest-a13 (no PCA), each also with -cv (alpha chosen), -per-sample (Pearson "
        "within samples) or -cv-per-sample; separated by commas, or all."
    ),
]
_Tasks = Annotated[str | None, typer.Option("--task", help="Only these, separated by commas.")]
_EncodersHest = Annotated[str | None, typer.Option(help="Only these, separated by commas.")]
_Components = Annotated[
    int, typer.Option(min=1, help="Principal components; 256 in the benchmark.")
]
_SeedHest = Annotated[int, typer.Option(min=0, help="Seed of the PCA; 1 in the benchmark.")]
_Folder = Annotated[Path, typer.Argument(help="Folder that `strank benchmark` wrote.")]
_CohortReport = Annotated[
    Path | None,
    typer.Option(help="Folder with the sections, if it has moved since the benchmark."),
]


def benchmark(
    cohort: _Cohort,
    output: _Output,
    protocol: _Protocol = "strank",
    losses: _Losses = None,
    heads: _Heads = "linear",
    recipes: _Recipes = None,
    encoders: _Encoders = "morphology",
    genes: _Genes = None,
    library_size: _LibrarySize = True,
    seeds: _Seeds = 1,
    jobs: Jobs = None,
    dask: Dask = None,
    shard: Shard = None,
    as_json: Json = False,
) -> None:
    """Compare objectives, heads, encoders and panels on the folds of a protocol.

    A run that was stopped goes on. [bold]strank report[/] makes a page of the tables.

    [bold]Example:[/] strank benchmark strank-demo/cohort -o benchmark --genes 20,50

    [bold]Example:[/] strank benchmark strank-demo/cohort -o heads --heads linear,mlp --losses list
    """
    from strank.studies.benchmark.runner import benchmark as run

    result = run(
        cohort,
        output,
        protocol=protocol,
        losses=split_names(losses),
        heads=split_names(heads) or (),
        recipes=split_names(recipes),
        encoders=split_names(encoders) or (),
        n_genes=[_size(text) for text in split_names(genes) or ()] or None,
        library_size=library_size,
        seeds=seeds,
        jobs=cores(jobs, dask),
        dask=dask,
        shard=shard,
        verbose=True,
    )
    facts, summary = result.facts, result.summary
    for text in (*facts["warnings"], *facts["notes"]):
        note(text)
    for text in facts["failed"]:
        note(f"not done: {text}")
    chosen = facts["protocol"]
    if not as_json and shard is None:
        _show(summary, chosen["headline"])
    finish(
        {**facts, "summary": records(summary)},
        outputs=[output],
        as_json=as_json,
        lines=[
            f"Protocol {chosen['name']}, SHA-256 {chosen['sha256'][:12]}.",
            "The share is fitted; when all are, the same without --shard scores them."
            if shard
            else f"Wrote summary.csv, .md and .tex, and every score into results, to {output}; "
            f"strank report {output} makes a page of them.",
        ],
    )
    if failed := facts["failed"]:
        fail(f"{len(failed)} fits not done; run again to try them")
        raise typer.Exit(1)


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


def demo(
    output: _OutputDemo = Path("strank-demo"),
    seed: _Seed = 0,
    as_json: Json = False,
) -> None:
    """See the whole way at work on simulated tissue with known truth (about a minute).

    Patients differ by design, as much as real ones: so little holds on the one left out.

    [bold]Example:[/] strank demo
    """
    need("cv2", "pyvips", "PIL", "matplotlib", "jinja2")
    from rich.console import Console
    from rich.progress import Progress

    from strank.studies.demo import NEXT, run_demo

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        steps = count()
        task = bar.add_task("Demo", total=7)

        def say(line: str) -> None:
            console.print(f"• {line}")
            bar.update(task, completed=next(steps))

        result = run_demo(output, seed=seed, say=say)
    for warning in result.evaluation.warnings:
        note(warning)
    if not as_json:
        show_table(
            result.table,
            "Mean SCC on a new patient (within section: by the rest of that very section)",
        )
    finish(
        {
            "seed": seed,
            "table": records(result.table),
            "maps": [str(path) for path in result.maps],
            "page": str(result.page),
        },
        outputs=[output],
        as_json=as_json,
        lines=[
            f"Maps, scores and what to do next: {result.page}",
            f"What {output} holds is of the kind that all commands take. Next:",
            *(f"  strank {command.format(output)}" for command in NEXT),
        ],
    )
    if not as_json:
        _open_page(result.page)


def _open_page(path: Path) -> None:
    """Open a page where somebody looks: on a terminal that has a display."""
    windows = sys.platform in ("win32", "darwin")
    if sys.stdout.isatty() and (windows or {"DISPLAY", "WAYLAND_DISPLAY"} & {*os.environ}):
        typer.launch(str(path))


def hest_benchmark(
    data: _Data,
    embeddings: _Embeddings,
    output: _OutputHest,
    protocol: _ProtocolHest = "hest,hest-a13",
    task: _Tasks = None,
    encoders: _EncodersHest = None,
    components: _Components = 256,
    seed: _SeedHest = 1,
    jobs: Jobs = None,
    dask: Dask = None,
    as_json: Json = False,
) -> None:
    """Run HEST-Benchmark: its ridge by its own protocols, and the exact list objective beside it.

    Its code's numbers to the digit from its embeddings (PCA or none, ridge, Pearson
    with log1p(counts)), and scores within sections; one leaderboard of all tasks.

    [bold]Example:[/] strank hest-benchmark bench_data --embeddings ST_data_emb -o hest
    """
    from strank.studies.hest_benchmark import hest_benchmark as run

    result = run(
        data,
        embeddings,
        output,
        protocols=split_names(protocol) or (),
        tasks=split_names(task),
        encoders=split_names(encoders),
        n_components=components,
        seed=seed,
        jobs=cores(jobs, dask),
        dask=dask,
        verbose=True,
    )
    facts, board = result.facts, result.leaderboard
    for text in (*facts["notes"], *(f"not done: {text}" for text in facts["failed"])):
        note(text)
    if not as_json:
        for name, about in facts["protocols"].items():
            if len(rows := board[board["protocol"] == name]):
                show_table(rows.drop(columns="protocol"), f"{name}: {about}")
    finish(
        {**facts, "leaderboard": records(board), "summary": records(result.summary)},
        outputs=[output],
        as_json=as_json,
        lines=[
            *(f"• {caveat}" for caveat in facts["caveats"]),
            f"Wrote leaderboard.csv and .md, summary.csv and results.csv to {output}.",
        ],
    )
    if failed := facts["failed"]:
        fail(f"{len(failed)} tasks not done: {some(failed, 20)}")
        raise typer.Exit(1)


def report(
    folder: _Folder,
    cohort: _CohortReport = None,
    as_json: Json = False,
) -> None:
    """Make one page of a benchmark: methods, depth, ceilings, genes, maps, calibration.

    FOLDER/report.html holds all it needs, so it can be sent as it is and opens without a network.
    Where that would be more than 20 MB, genes and maps lie in FOLDER/report_files beside it.

    [bold]Example:[/] strank report benchmark
    """
    need("cv2", "pyvips", "PIL", "jinja2", "plotly")
    from strank.report.benchmark import write_report

    with working("Making the page"):
        made = write_report(folder, cohort=cohort)
    for line in made.notes:
        note(line)
    finish(
        {"report": str(made.path), "bytes": made.n_bytes},
        outputs=[path for path in (made.path, made.files) if path is not None],
        as_json=as_json,
        lines=[f"Wrote {made.path} ({made.n_bytes / 1e6:.1f} MB); open it in a browser."],
    )
