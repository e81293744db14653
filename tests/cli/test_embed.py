"""`strank embed` as a user types it."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pytest
from typer.testing import CliRunner

from strank.cli import app
from strank.io import find_st, read_st, write_sections

ENCODER = """
import numpy as np
from strank.encoders.base import Field

class Means:
    name, version, fields, feature_names = "means", "{version}", (Field(100, 8),), ("r", "g", "b")
    def encode(self, patches):
        return patches[0].mean((1, 2)).astype(np.float32)
"""


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def refused(*arguments: object) -> str:
    errors = [e for e in run(*arguments, code=2).stderr.splitlines() if e.startswith("Error: ")]
    assert len(errors) == 1
    return errors[0]


@pytest.fixture
def folder(st_folder, tmp_path, monkeypatch):
    write_sections(
        (read_st(st_folder, section=name) for name in find_st(st_folder)), tmp_path / "cohort"
    )
    for number in (1, 2):
        (tmp_path / f"means_{number}.py").write_text(ENCODER.format(version=number))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "cohort"


def test_an_encoder_of_ones_own_is_run_once_and_again_when_it_changed(folder):
    options = ("--dtype", "float16", "--batch-size", 7, "--json")
    first = run("embed", folder, "--encoder", "means_1:Means", *options)
    summary = json.loads(first.stdout)
    assert summary["encoder"] == "means"
    assert summary["n_features"] == 3
    assert (summary["embedded"], summary["done_before"]) == (["A1", "B1"], [])
    assert "Note:" not in first.stderr
    stored = anndata.read_h5ad(folder / "features/means/A1.h5ad")
    assert stored.X.dtype == np.float16
    facts = json.loads(stored.uns["encoder"])
    assert {"name", "version", "preprocessing"} <= facts.keys()
    again = run("embed", folder, "--encoder", "means_1:Means", "--json")
    assert json.loads(again.stdout)["done_before"] == ["A1", "B1"]
    changed = run("embed", folder, "--encoder", "means_2:Means")
    assert "means 2: 3 features a spot; 2 sections embedded, 0 were done before." in changed.stdout
    told = "Note: section A1: embedded again, because the encoder changed: version was 1, now 2"
    assert told in " ".join(changed.stderr.split())


def test_the_bar_shows_tiles_a_second_and_the_time_left(folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    shown = run("embed", folder, "--encoder", "means_1:Means", "--batch-size", 1).stderr
    assert "tiles/s" in shown
    assert "50/50" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "dtype 'int8': choose one of float32, float16"),
        (["--precision", "fp8"], "no precision 'fp8'; choose one of float32, bf16, fp16"),
        (["--precision", "bf16"], "--precision bf16 is for image networks on a GPU; leave it out"),
        (["--weights", "w.pt"], "--weights is for image networks, which"),
    ],
)
def test_options_that_cannot_be(folder, options, message):
    assert message in refused("embed", folder, *options)
    assert "batch-size" in run("embed", folder, "--batch-size", 0, code=2).stderr
