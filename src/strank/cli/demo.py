"""``strank demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, finish, note, records, show_table

__all__ = ["demo"]


def demo(
    output: Annotated[
        Path, typer.Option("-o", "--output", help="A new folder for all that the demo makes.")
    ] = Path("strank-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation.")] = 0,
    as_json: Json = False,
) -> None:
    """See the whole way at work on simulated tissue with known truth (about a minute).

    [bold]Example:[/] strank demo -o strank-demo --seed 1
    """
    from rich.console import Console

    from strank.studies.demo import run_demo

    console = Console(stderr=True)
    with console.status("Starting") as status:

        def say(line: str) -> None:
            console.print(f"• {line}")
            status.update(line)

        result = run_demo(output, seed=seed, say=say)
    for warning in result.evaluation.warnings:
        note(warning)
    if not as_json:
        show_table(result.table, "Mean SCC on a patient that no method has seen")
    finish(
        {
            "output": str(output),
            "seed": seed,
            "table": records(result.table),
            "maps": [str(path) for path in result.maps],
        },
        as_json=as_json,
        lines=[f"Maps: {', '.join(str(path) for path in result.maps)}"],
    )
