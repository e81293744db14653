"""``strank report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strank.cli.console import Json, finish, note, working

__all__ = ["report"]


def report(
    folder: Annotated[Path, typer.Argument(help="Folder that `strank benchmark` wrote.")],
    cohort: Annotated[
        Path | None,
        typer.Option(help="Folder with the sections, if it has moved since the benchmark."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one page of a benchmark: methods, depth, ceilings, genes, maps, calibration.

    FOLDER/report.html holds all it needs, so it can be sent as it is and opens without a network.

    [bold]Example:[/] strank report out
    """
    from strank.report.benchmark_page import write_report

    with working("Making the page"):
        made = write_report(folder, cohort=cohort)
    for line in made.notes:
        note(line)
    finish(
        {"report": str(made.path), "bytes": made.n_bytes, "notes": list(made.notes)},
        as_json=as_json,
        lines=[f"Wrote {made.path} ({made.n_bytes / 1e6:.1f} MB); open it in a browser."],
    )
