"""``strank synthetic``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, finish, records, show_table
from strank.progress import progress

__all__ = ["synthetic"]


def synthetic(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder of the study; a stopped one continues.")
    ] = Path("strank-synthetic"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A short look, in about a minute.")
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=2, help="Data sets of each function (3; 2 if quick).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of data, weights and batches.")] = 0,
    as_json: Json = False,
) -> None:
    """Repeat the paper's synthetic study: objectives on curves of known truth.

    Table 1, the list sizes of table 3, and sweeps of scale, bias, dispersion,
    sample size, sparsity and depth, beside the paper's numbers and the exact
    optimum: about 15 minutes on two cores. A stopped study continues.

    [bold]Example:[/] strank synthetic -o strank-synthetic --quick
    """
    from strank.studies.synthetic.study import run_study

    n_seeds = seeds or (2 if quick else 3)
    with ExitStack() as stack:
        result = run_study(
            output,
            quick=quick,
            n_seeds=n_seeds,
            seed=seed,
            progress=lambda total: stack.enter_context(
                progress("Training (thousand steps)", total)
            ),
        )
    if not as_json:
        shown = result.table1.query("selection != 'truth'").drop(columns=["selection", "seeds"])
        show_table(shown, "Mean SCC against the truth")
    finish(
        {
            "output": str(output),
            "seed": seed,
            "seeds": n_seeds,
            "quick": quick,
            "table1": records(result.table1),
            "table3": records(result.table3),
            "findings": result.findings,
        },
        as_json=as_json,
        lines=["", *(f"• {finding}" for finding in result.findings), "", f"Page: {result.page}"],
    )
