"""What every command shares: errors in one line, tables and JSON."""

from __future__ import annotations

import json
import platform
import re
import signal
import sys
import traceback
from collections.abc import Iterable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from strank.errors import InputError, one_line, printable
from strank.processes import heed_parent, told_to_end
from strank.version import __version__

if TYPE_CHECKING:
    import pandas as pd

Json = Annotated[bool, typer.Option("--json", help="Print the summary as JSON on stdout.")]

# Where units run, as in `strank.where.Where`.
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes; all cores if not given.")]
FewJobs = Annotated[
    int, typer.Option("--jobs", min=1, help="Processes, one thread each; they share the GPUs.")
]
Dask = Annotated[
    str | None,
    typer.Option(help="Run on the workers of this scheduler: tcp://HOST:PORT, or its .json."),
]
Shard = Annotated[
    str | None,
    typer.Option(help="Only this share, as 2/8, or slurm: that of the array's task."),
]
Mpp = Annotated[
    float | None, typer.Option(help="µm per pixel of the slides, if the files do not say it.")
]
MppOverride = Annotated[
    bool, typer.Option("--mpp-override", help="Take --mpp even where the files say another scale.")
]

# Arguments of the library whose option is called otherwise.
_OPTIONS = {
    "block_um": "block",
    "folder": "output",
    "head": "heads",
    "loss": "losses",
    "n_components": "components",
    "n_genes": "genes",
    "n_seeds": "seeds",
    "protocols": "protocol",
    "recipe": "recipes",
    "samples": "ids",
    "stride_um": "stride",
    "tasks": "task",
    "um_per_pixel": "mpp",
    "um_per_pixel_override": "mpp_override",
}
# What a line says at most, its first word included.
_LONGEST = 300
# Version of what `--json` prints; raised when a key goes or changes its meaning.
_SCHEMA = 1
_DEBUG: ContextVar[bool] = ContextVar("whether to say all of an error", default=False)
_RUNNING: ContextVar[Any] = ContextVar("the command that runs", default=None)
_CALLED: ContextVar[str] = ContextVar("what the command is called by", default="")
# What was noted since the command began, by whichever thread.
_NOTED: list[str] = []


def with_options(message: str) -> str:
    """Turn arguments of the library, named as `um_per_pixel` or `um_per_pixel=0.5`, into options.

    Only those of the running command, and only between backquotes: files and genes have such names.
    """
    known = {parameter.name: parameter for parameter in getattr(_RUNNING.get(), "params", ())}

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        parameter = known.get(name) or known.get(_OPTIONS.get(name, ""))
        if parameter is None:
            return found[0]
        if parameter.param_type_name == "argument":
            return str(parameter.name).upper()
        return parameter.opts[0] + (f" {value}" if value not in (None, "True") else "")

    return re.sub(r"`(\w+)(?:=([^`]*))?`", option, message)


class ErrorGroup(TyperGroup):
    """Turns errors of the input into one line on stderr and exit code 2."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Remember which command is run, since its options are what errors are about."""
        found = super().resolve_command(ctx, args)
        _RUNNING.set(found[1])
        _CALLED.set(" ".join((*_groups(ctx), str(found[0]))))
        _NOTED.clear()
        return found

    def get_params(self, ctx: Any) -> Any:
        """Show flags without a type."""
        return _as_flags(super().get_params(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Show flags without a type, of commands as well."""
        if (found := super().get_command(ctx, cmd_name)) is not None:
            _as_flags(found.get_params(ctx))
        return found

    def list_commands(self, ctx: Any) -> list[str]:
        """Keep the order of the workflow, which Typer breaks for groups."""
        known = super().list_commands(ctx)
        if ctx.parent is not None:
            return known
        return sorted(known, key=lambda name: _WORKFLOW.index(name) if name in _WORKFLOW else 99)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        _DEBUG.set(bool(ctx.find_root().params.get("debug")))
        try:
            return super().invoke(ctx)
        except _TYPERS_OWN:
            raise
        except (Exception, KeyboardInterrupt) as error:
            # Where a signal has ended others first, whatever comes of that is not the error.
            if told_to_end() or not isinstance(error, Exception):
                raise typer.Exit(say_stopped(told_to_end() or signal.SIGINT)) from None
            heed_parent()
            from strank.units import reason_of

            message = with_options(told) if (told := reason_of(error)) else None
            if isinstance(error, MemoryError):
                message = "the memory is not enough; ask for less at once, or take a larger machine"
            if _DEBUG.get():
                typer.echo(printable("".join(traceback.format_exception(error))), err=True)
            fail(_bug(error, ctx) if message is None else message)
            raise typer.Exit(1 if message is None else 2) from None


def _as_flags(parameters: Any) -> Any:
    """Take the type off what takes no value: newer Typer shows `--json <bool>`."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


# What ends the command line itself: `ClickException`, which older Typer has from Click and newer
# one for itself, and a reader that has gone, as `head` does.
_TYPERS_OWN: tuple[type[Exception], ...] = (
    typer.Exit,
    typer.Abort,
    next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"),
    BrokenPipeError,
)


def say_stopped(number: int) -> int:
    """Say that a signal has ended the command; return its exit code."""
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    fail(f"stopped by {by}; what was finished is kept")
    return 128 + number


def _bug(error: Exception, ctx: Any) -> str:
    """Say where strank itself failed, and how to report it."""
    frames = traceback.extract_tb(error.__traceback__)
    at = next((f for f in reversed(frames) if _HOUSE in Path(f.filename).parents), frames[-1])
    said = one_line(f"{type(error).__name__}: {error}", 80)
    versions = f"strank {__version__}, Python {platform.python_version()}, {sys.platform}"
    again = f"{ctx.find_root().info_name} --debug {_CALLED.get()}"
    return (
        f"a bug in {Path(at.filename).name}, line {at.lineno} ({versions}): {said}; please report "
        f"to whoever maintains strank what `{again} ...` says"
    )


def _groups(ctx: Any) -> list[str]:
    """Name the groups that lead to a command."""
    return str(ctx.command_path).removeprefix(str(ctx.find_root().info_name)).split()


_HOUSE = Path(__file__).parents[1]


def fail(message: str) -> None:
    """Say on stderr what went wrong: in one line, or with ``--debug`` all of it."""
    head = "Error: "
    typer.secho(head, fg="red", bold=True, err=True, nl=False)
    shown = printable(message) if _DEBUG.get() else one_line(message, _LONGEST - len(head))
    typer.echo(shown, err=True)


_WORKFLOW = [
    "import",
    "encoders",
    "embed",
    "fit",
    "evaluate",
    "benchmark",
    "report",
    "predict",
    "collect",
    "contrast",
    "model",
    "demo",
    "hest",
    "hest-benchmark",
    "reproduce",
]


def cores(jobs: int | None, dask: str | None) -> int:
    """How many processes: as asked for, or all cores; none beside workers of Dask."""
    from joblib import cpu_count

    return jobs or (1 if dask else cpu_count())


def working(description: str) -> AbstractContextManager[object]:
    """Show that something is under way whose length is not known, on stderr."""
    from rich.console import Console
    from rich.text import Text

    return Console(stderr=True).status(Text(printable(description)))


def note(message: str) -> None:
    """Say something on stderr that must not go unseen; it is a warning of the JSON."""
    told = with_options(message)
    _NOTED.append(told)
    typer.secho("Note: ", fg="yellow", bold=True, err=True, nl=False)
    typer.echo(printable(told), err=True)


def summarize(results: dict[str, Any], outputs: Iterable[Path | str]) -> dict[str, Any]:
    """Put what every command says before what this one found; docs/command-line.md has the keys."""
    about = {
        "schema": _SCHEMA,
        "strank_version": __version__,
        "command": _CALLED.get(),
        "warnings": list(dict.fromkeys(_NOTED)),
        "outputs": [str(path) for path in outputs],
    }
    return about | {key: value for key, value in results.items() if key not in about}


def finish(
    results: dict[str, Any],
    *,
    outputs: Iterable[Path | str] = (),
    as_json: bool,
    lines: Iterable[str],
) -> None:
    """End a command, which wrote ``outputs``: with JSON, or with lines for people."""
    summary = summarize(results, outputs)
    if as_json:
        # What is piped on Windows is seldom UTF-8; escapes are read alike everywhere.
        escaped = "utf" not in (sys.stdout.encoding or "").lower()
        text = json.dumps(summary, indent=2, ensure_ascii=escaped, allow_nan=False, default=str)
        shown = (c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
        sys.stdout.write("".join(shown) + "\n")
    else:
        for line in lines:
            typer.echo(printable(line))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Turn a table into JSON rows; what is undefined becomes null."""
    rows: list[dict[str, Any]] = json.loads(table.to_json(orient="records", double_precision=15))
    return rows


def show_table(table: pd.DataFrame, title: str) -> None:
    """Print a table; numbers with three decimals, a dash for what is undefined."""
    columns = [(str(name), column.dtype.kind in "fi") for name, column in table.items()]
    show_rows(columns, table.itertuples(index=False), title)


def show_rows(
    columns: Iterable[tuple[str, bool]], rows: Iterable[Iterable[object]], title: str
) -> None:
    """Print rows below the names of their columns, each with whether it holds numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=Text(printable(title)), title_justify="left")
    for name, number in columns:
        shown.add_column(
            Text(printable(name)), justify="right" if number else "left", overflow="fold"
        )
    for row in rows:
        shown.add_row(*(Text(_cell(value)) for value in row))
    Console().print(shown)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return printable(str(value))
    return "–" if value != value else f"{value:.3f}"


def given_options(context: typer.Context, panel: str) -> list[str]:
    """Name the options of a help panel that were typed."""
    return [
        parameter.opts[0]
        for parameter in context.command.params
        if getattr(parameter, "rich_help_panel", None) == panel
        and getattr(context.get_parameter_source(str(parameter.name)), "name", "") == "COMMANDLINE"
    ]


def split_names(text: str | None) -> list[str] | None:
    """Split a comma-separated option; an :class:`InputError` if nothing is left."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"no name in {text!r}; separate names by commas")
    return names
