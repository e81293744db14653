"""The command line: parses, calls, prints. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import sys
import warnings
from io import TextIOWrapper
from signal import SIGINT
from typing import Annotated, Any

import typer

from strank.cli import (
    collect,
    contrast,
    embed,
    evaluate,
    fit,
    imports,
    model,
    predict,
    reproduce,
    studies,
)
from strank.cli.console import ErrorGroup, note, say_stopped
from strank.errors import printable
from strank.processes import follow_first, heed_signals, told_to_end
from strank.storage import DamageWarning
from strank.version import __version__

_HELP = """Learn relative gene expression from pathology images.

The workflow: [bold]import[/] sections, [bold]embed[/] their images, [bold]fit[/] a model,
[bold]evaluate[/] it on held-out sections, [bold]predict[/] on new slides.
See it all at work on simulated tissue with [bold]strank demo[/], and repeat the paper's
experiments with [bold]strank reproduce[/].
"""

app = typer.Typer(
    cls=ErrorGroup,
    help=_HELP,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
hub_data = typer.Typer(help="HEST-1k and HEST-Benchmark.", no_args_is_help=True)
hub_data.command("download")(imports.download)
app.add_typer(hub_data, name="hest", cls=ErrorGroup)
app.add_typer(imports.imports, name="import", cls=ErrorGroup)
app.command("encoders")(embed.encoders)
app.command("embed")(embed.embed)
app.command("fit")(fit.fit)
app.command("evaluate")(evaluate.evaluate_command)
app.command("predict")(predict.predict_command)
app.command("collect")(collect.collect)
models = typer.Typer(
    help="Cards of models; to and from the Hugging Face hub.", no_args_is_help=True
)
models.command("show")(model.show)
models.command("push")(model.push)
models.command("pull")(model.pull)
app.add_typer(models, name="model", cls=ErrorGroup)
app.command("contrast")(contrast.contrast_command)
app.command("benchmark")(studies.benchmark)
app.command("report")(studies.report)
app.command("demo")(studies.demo)
app.add_typer(reproduce.reproduce, name="reproduce", cls=ErrorGroup)
app.command("hest-benchmark")(studies.hest_benchmark)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"strank {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Say all of an error, with its traceback.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # A console that lacks a letter (Windows, LC_ALL=C) must not end a run.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    plain = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, DamageWarning):
            note(str(message))
        else:
            plain(printable(str(message)), category, *rest)

    warnings.showwarning = show  # type: ignore[assignment]
    if not follow_first():
        heed_signals(say_stopped)
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(say_stopped(told_to_end() or SIGINT))
