"""Errors of the library name arguments; the command line shows options."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import strank
from strank.cli import app as strank_app
from strank.cli.console import _OPTIONS, ErrorGroup, note, with_options
from strank.errors import InputError

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
