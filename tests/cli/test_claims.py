"""Two of us, one output: the second is told at once, and touches nothing."""

import time
from pathlib import Path
from threading import Thread

import anndata
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import strank
from strank.cli import app
from strank.errors import InputError
from strank.evaluation.fold_change import Contrast
from strank.evaluation.held_out import Evaluation
from strank.files import claimed, claims
from strank.io import write_sections
from strank.model.rank_model import pull_model
from strank.report import write_report
from strank.studies.hest_benchmark import hest_benchmark

# Of what is not there, so that nothing can have been computed.
COMMANDS = {
    "fit": ["fit", "nowhere"],
    "network": ["fit", "nowhere", "--head", "mlp"],
    "benchmark": ["benchmark", "nowhere"],
    "predict": ["predict", "slide.png", "--model", "nowhere"],
    "several": ["predict", "a.png", "b.png", "--model", "nowhere"],
    "evaluate": ["evaluate", "nowhere", "--folds", "section"],
    "contrast": ["contrast", "nowhere.h5ad", "--groups", "nowhere.geojson"],
    "pull": ["model", "pull", "nowhere"],
    "hest-benchmark": ["hest-benchmark", "nowhere", "--embeddings", "nowhere"],
    "synthetic": ["reproduce", "synthetic"],
    "demo": ["demo"],
    "genes": ["reproduce", "genes", "--data", "nowhere"],
    "list-size": ["reproduce", "list-size", "--data", "nowhere"],
    "hest": ["reproduce", "hest", "--data", "nowhere"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_is_told_in_one_line(name, tmp_path):
    out = tmp_path / "out"
    with claimed(out):
        result = CliRunner().invoke(app, [*COMMANDS[name], "-o", str(out)])
        assert result.exit_code == 2
        told = f"Error: {out}: another run is writing there; wait for it, or choose another -o\n"
        assert result.stderr == told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_is_told_before_the_work(name, tmp_path):
    (tmp_path / "file").write_text("thesis")
    result = CliRunner().invoke(app, [*COMMANDS[name], "-o", str(tmp_path / "file" / "out")])
    assert result.exit_code == 2
    assert "file: cannot write there" in result.stderr
    assert (tmp_path / "file").read_text() == "thesis"


TABLE = pd.DataFrame({"gene": ["A"]})
CALLS = {
    "predict": lambda out: strank.predict("slide.png", "nowhere", out),
    "benchmark": lambda out: strank.benchmark("nowhere", out),
    "evaluation": lambda out: Evaluation(TABLE, {}, ()).write(out),
    "contrast": lambda out: Contrast(TABLE, {}, ()).write(out),
    "report": lambda out: write_report(out),
    "pull": lambda out: pull_model("nowhere", out),
    "hest-benchmark": lambda out: hest_benchmark("nowhere", "nowhere", out),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_is_told_in_python_too(name, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "of the first").touch()
    with claimed(out), pytest.raises(InputError) as told:
        CALLS[name](out)
    expected = f"{out}: another run is writing there; wait for it, or choose another `folder`"
    assert str(told.value) == expected
    assert [path.name for path in out.iterdir()] == ["of the first"]
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_run_has_its_parts_have_too(tmp_path):
    @claims("out")
    def inner(out: Path) -> None:
        (out / "file").touch()

    @claims("out")
    def outer(out: Path) -> None:
        out.mkdir()
        inner(out)
        # It has it still.
        with pytest.raises(InputError, match="another run is writing there"), claimed(out):
            pass

    outer(tmp_path / "out")
    with claimed(tmp_path / "out"), pytest.raises(InputError, match="another run is writing"):
        inner(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "out"]


def test_imports_into_one_cohort_wait_for_each_other(tmp_path):
    cohort = tmp_path / "cohort"
    section = anndata.AnnData(np.ones((2, 1)), obs=pd.DataFrame({"section": "A"}, ["a", "b"]))
    section.obs["patient"] = "P"
    done = []
    second = Thread(target=lambda: done.append(write_sections([section], cohort)))
    with claimed(cohort):
        second.start()
        time.sleep(0.3)
        assert second.is_alive()
        assert not cohort.exists()
    second.join()
    assert [list(sections) for sections in done] == [["A"]]
    assert [path.name for path in tmp_path.rglob("*")] == ["cohort", "A.h5ad"]
