"""Errors of the library name arguments; the command line shows options."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from strank.cli.console import ErrorGroup, note, with_options
from strank.errors import InputError

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
