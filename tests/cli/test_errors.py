"""Errors of the library name arguments; the command line shows options."""

from __future__ import annotations

import ast
import json
import platform
import re
from errno import EPIPE
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

import strank
from strank.cli import app as strank_app
from strank.cli import console
from strank.cli.console import (
    _OPTIONS,
    ErrorGroup,
    finish,
    note,
    show_table,
    with_options,
    working,
)
from strank.errors import InputError
from strank.progress import progress

SOURCE = Path(strank.__file__).parent
MESSAGE = "a `stride_um`.png: `stride_um=5` or `genes`, without `again=True`, but no `encoder`"
SHOWN = "a --stride.png: --stride 5 or --genes, without --again, but no `encoder`"


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer(cls=ErrorGroup)
    inner = typer.Typer()

    def predict(
        slides: str,
        stride: float = 1,
        genes: str = "",
        again: bool = typer.Option(False, "--again"),
    ) -> None:
        note("lower `stride_um`")
        raise InputError(slides)

    app.command()(predict)
    inner.command()(predict)
    inner.command("other")(lambda: None)
    app.add_typer(inner, name="inner", cls=ErrorGroup)
    return app


@pytest.mark.parametrize("path", [["predict"], ["inner", "predict"]])
def test_arguments_become_options_of_the_running_command(app, path):
    told = CliRunner().invoke(app, [*path, MESSAGE])
    assert told.exit_code == 2
    assert told.stderr == f"Note: lower --stride\nError: {SHOWN}\n"


@pytest.mark.parametrize(
    "message", ["slides/stride_um/genes", "GENES of stride_um", "see `strank predict`"]
)
def test_what_only_looks_like_an_argument_stays(app, message):
    told = CliRunner().invoke(app, ["predict", message])
    assert told.stderr.endswith(f"Error: {message}\n")


def test_an_argument_by_position_is_shown_as_the_help_shows_it(app):
    told = CliRunner().invoke(app, ["predict", "give one more of `slides`"])
    assert told.stderr.endswith("Error: give one more of SLIDES\n")


LONG = "cohort/A1.h5ad: " + "slot x is wrong, " * 40 + "make it again"
HOSTILE = "A\x1b[2J\x9b1m\u202e\x07\r\tB"


@pytest.fixture
def broken() -> typer.Typer:
    """Fails as it is told to."""
    app = typer.Typer(cls=ErrorGroup)

    @app.callback()
    def options(debug: bool = typer.Option(False, "--debug")) -> None:
        pass

    def fail(kind: str, text: str) -> None:
        raise {kind.__name__: kind for kind in (InputError, KeyError, MemoryError, OSError)}[kind](
            text
        )

    app.command("fail")(fail)
    inner = typer.Typer()
    inner.command("fail")(fail)
    inner.command("other")(lambda: None)
    app.add_typer(inner, name="inner", cls=ErrorGroup)
    return app


def test_an_error_is_one_short_line_with_its_file_and_what_to_do(broken):
    told = CliRunner().invoke(broken, ["fail", "InputError", LONG])
    assert told.exit_code == 2
    [line] = told.stderr.splitlines()
    assert line.startswith("Error: cohort/A1.h5ad: slot x is wrong, ")
    assert line.endswith("make it again")
    assert len(line) == 300


def test_of_a_long_path_the_name_is_kept(broken):
    path = "/".join(["folder"] * 60) + "/A1.h5ad"
    told = CliRunner().invoke(broken, ["fail", "InputError", f"{path}: no slot x\n; import again"])
    [line] = told.stderr.splitlines()
    assert line.startswith("Error: folder/")
    assert line.endswith("/folder/A1.h5ad: no slot x ; import again")


def test_debug_tells_all_of_an_error(broken):
    told = CliRunner().invoke(broken, ["--debug", "fail", "InputError", LONG])
    assert told.exit_code == 2
    assert f"Error: {LONG}\n" in told.stderr
    assert "Traceback" in told.stderr


@pytest.mark.parametrize("path", [["fail"], ["inner", "fail"]])
@pytest.mark.parametrize("kind", ["KeyError", "OSError"])
def test_a_bug_says_how_to_report_it(broken, kind, path):
    told = CliRunner().invoke(broken, [*path, kind, HOSTILE + LONG])
    assert told.exit_code == 1
    [line] = told.stderr.splitlines()
    assert len(line) <= 300
    again = " ".join(["root --debug", *path])
    assert line.startswith("Error: a bug in console.py, line ")
    assert f"strank {strank.__version__}, Python {platform.python_version()}" in line
    assert f"{kind}: " in line
    assert line.endswith(f"please report to whoever maintains strank what `{again} ...` says")
    everything = CliRunner().invoke(broken, ["--debug", *path, kind, LONG])
    assert everything.exit_code == 1
    assert "Traceback" in everything.stderr
    assert LONG in everything.stderr


def test_memory_that_is_short_is_no_bug(broken):
    told = CliRunner().invoke(broken, ["fail", "MemoryError", ""])
    assert (told.exit_code, "the memory is not enough" in told.stderr) == (2, True)


@pytest.mark.parametrize("debug", [[], ["--debug"]])
@pytest.mark.parametrize("kind", ["InputError", "KeyError"])
def test_a_terminal_obeys_no_name_of_an_error(broken, kind, debug):
    told = CliRunner().invoke(broken, [*debug, "fail", kind, HOSTILE])
    assert all(c.isprintable() or c == "\n" for c in told.stderr)
    assert "A\\x1b[2J\\x9b1m\\u202e\\x07" in told.stderr.replace("\\\\", "\\")


def test_a_terminal_obeys_no_name_of_a_result(capsys, documented, monkeypatch):
    monkeypatch.setitem(documented, "nothing", (set(), True))
    console._CALLED.set("nothing")
    note(HOSTILE)
    finish({}, as_json=False, lines=[HOSTILE])
    finish({"gene": HOSTILE}, as_json=True, lines=[])
    show_table(pd.DataFrame({HOSTILE: [HOSTILE, 1.5]}), HOSTILE)
    with progress(HOSTILE + "[red]", 1):
        pass
    with working(HOSTILE):
        pass
    told = capsys.readouterr()
    assert all(c.isprintable() or c == "\n" for c in told.out + told.err)
    assert told.out.count("\\x1b[2J") >= 4
    shown = json.loads(told.out[told.out.index("{") : told.out.index("}") + 1])
    assert shown["gene"] == HOSTILE
    assert shown["warnings"][-1] == HOSTILE


def test_what_reads_no_further_is_no_bug():
    app = typer.Typer(cls=ErrorGroup)
    app.command("one")(lambda: (_ for _ in ()).throw(BrokenPipeError(EPIPE, "gone")))
    app.command("two")(lambda: None)
    told = CliRunner().invoke(app, ["one"])
    assert (told.exit_code, told.stderr) == (1, "")


def test_without_a_command_nothing_changes():
    assert with_options("give `something_else`") == "give `something_else`"


def messages() -> dict[str, str]:
    """Text of every message of the library, by place; what is put in shows as a number."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        if "cli" in path.relative_to(SOURCE).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError":
                parts = (part for part in ast.walk(node) if isinstance(part, ast.Constant))
                text = " ".join(str(part.value) for part in parts if isinstance(part.value, str))
                found[f"{path.relative_to(SOURCE)}:{node.lineno}"] = text
    return found


def parameters(command: object) -> set[str]:
    inner = getattr(command, "commands", {}).values()
    own = {parameter.name for parameter in command.params}
    return own.union(*(parameters(part) for part in inner))


def test_messages_of_the_library_name_arguments_that_a_command_has():
    # Commands that need `image_folder` always give it.
    known = parameters(typer.main.get_command(strank_app)) | {*_OPTIONS, "image_folder"}
    wrong = {}
    for place, text in messages().items():
        # Whole commands to run, of strank and others, may have options.
        quoted = re.sub(r"`([^`]*)`", lambda part: "" if " " in part[1] else part[0], text)
        bare = re.sub(r"vips tiffsave.*", "", quoted)
        named = set(re.findall(r"`(\w+)(?:=[^`]*)?`", bare)) - known
        if options := set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", bare)) | named:
            wrong[place] = sorted(options)
    assert not wrong


def test_evaluate_leaves_no_folder_behind_where_it_is_refused(tmp_path):
    out = tmp_path / "a" / "out"
    given = ["evaluate", str(tmp_path), "-o", str(out), "--model", str(tmp_path / "none")]
    assert CliRunner().invoke(strank_app, given).exit_code == 2
    assert not out.parent.exists()


def test_fit_looks_at_its_output_first(tmp_path):
    (tmp_path / "mine").write_text("")
    result = CliRunner().invoke(strank_app, ["fit", str(tmp_path / "none"), "-o", str(tmp_path)])
    assert result.exit_code == 2
    assert "exists and is not a model; choose another -o" in result.output
