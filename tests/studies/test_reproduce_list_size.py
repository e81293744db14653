"""The paper's Table 3: lists of curves, and of Xenium samples of breast by the published recipe."""

from __future__ import annotations

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from typer.testing import CliRunner

from strank.cli import app
from strank.cohort.store import read_cohort
from strank.errors import InputError
from strank.evaluation.protocol import PRESETS
from strank.fitting.method import fit
from strank.neural.recipe import get_recipe
from strank.reproduce import list_size
from strank.simulate.curves import CurveDesign
from strank.studies.synthetic.cells import CurveCell, CurveRecipe

_hest = runpy.run_path(str(Path(__file__).with_name("test_reproduce.py")))
Colour, write_sample = _hest["Colour"], _hest["write_sample"]

VALIDATION, TEST = ("TENX95", "TENX97"), ("TENX94", "TENX96")
# Two of the five that may train.
SAMPLES = (*VALIDATION, *TEST, "NCBI784", "TENX99")


@pytest.fixture(autouse=True)
def few_curves(monkeypatch) -> None:
    def plan(*, quick, n_seeds):
        how = {"n_seeds": n_seeds, "recipe": CurveRecipe(steps=2, batch=16, checks=1)}
        designs = [CurveDesign(sampling, n_spots=100) for sampling in ("uniform", "imbalanced")]
        cells = [CurveCell("table1", design, ("list",), **how) for design in designs]
        return cells + [CurveCell("table3", design, ("list_2",), **how) for design in designs]

    monkeypatch.setattr("strank.studies.reproduce.list_size.list_size_plan", plan)


def write_hest(folder: Path) -> Path:
    for number, name in enumerate((*SAMPLES, "TENX1")):
        write_sample(folder, name, patient=f"P{number}", n_spots=20)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_hest(tmp_path_factory.mktemp("lists") / "hest")


def test_table_3_with_the_column_of_breast_xenium(data, tmp_path):
    out = tmp_path / "out"
    # Curves first, Breast Xenium later.
    assert set(list_size(out, quick=True).table["data"]) == {"uniform", "imbalanced"}
    found = list_size(out, data, encoder=Colour(), quick=True)
    table = found.table.set_index(["data", "n_k"])
    assert table.loc[("breast_xenium", 16), "paper"] == 0.458
    assert table.loc[("uniform", 2), "paper"] == 0.907
    assert table.loc[("imbalanced", 256), "paper"] == 0.828
    assert (table["seeds"] == 2).all()
    train = [name for name in SAMPLES if name not in VALIDATION + TEST]
    assert sorted(found.facts["xenium"]["samples"]) == sorted(SAMPLES)
    protocol = PRESETS["paper-IDC"]
    cohort = protocol.filtered(read_cohort(out / "breast_xenium/cohort", encoder="colour"))
    assert sorted(cohort) == sorted(SAMPLES)
    fold = replace(protocol.folds[0], train=tuple(train), test=TEST, validation=VALIDATION)
    panel = protocol.choose_panel(cohort, fold, 50)
    sccs = []
    for seed in range(2):
        model = fit(
            {name: cohort[name] for name in fold.development},
            recipe=replace(get_recipe("published-quick"), list_size=2),
            encoder="colour",
            genes=list(panel),
            validation=VALIDATION,
            seed=seed,
        )
        for name in TEST:
            counts = cohort[name][:, panel].X.toarray()
            target = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
            scores = np.asarray(model.predict(cohort[name]).X)
            sccs += [spearmanr(scores[:, g], target[:, g])[0] for g in range(50)]
    assert table.loc[("breast_xenium", 2), "scc"] == pytest.approx(np.mean(sccs), abs=1e-5)
    assert table.loc[("breast_xenium", 16), "scc"] != table.loc[("breast_xenium", 2), "scc"]
    text = (out / "table.md").read_text()
    assert text.startswith("- A first look")
    assert "trains on the other samples of a folder, which it does not name" in text
    assert "| 0.447 " in text


def test_what_is_done_is_not_done_again(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    how = {"encoder": Colour(), "quick": True}
    list_size(out, data, **how)
    before = (out / "table.csv").read_text()
    for name in ("fit", "_import_sample"):
        where = "list_size" if name == "fit" else "task_data"
        monkeypatch.setattr(f"strank.studies.reproduce.{where}.{name}", pytest.fail)
    monkeypatch.setattr("strank.studies.synthetic.study.run_curve_cell", pytest.fail)
    list_size(out, data, **how)
    assert (out / "table.csv").read_text() == before
    # A sample more would train another model.
    more = tmp_path / "hest"
    more.symlink_to(data)
    with pytest.raises(InputError, match="out: reproduction of another seeds; choose another"):
        list_size(out, data, seeds=3, **how)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("TENX96", r"^sample TENX96 of Breast Xenium: .*hest/st/TENX96.h5ad is not there; ge"),
        ("NCBI784 TENX99", "hest: none of NCBI783, NCBI784, NCBI785, TENX98, TENX99 is there, to"),
        (" ".join((*SAMPLES, "TENX1")), "hest: no st/.* there and no splits/; it is neither"),
    ],
)
def test_samples_that_are_not_there_are_named(tmp_path, absent, message):
    folder = write_hest(tmp_path / "hest")
    for name in absent.split():
        (folder / f"st/{name}.h5ad").unlink()
    with pytest.raises(InputError, match=message):
        list_size(tmp_path / "out", folder, encoder=Colour(), quick=True)
    assert not (tmp_path / "out").exists()


def test_one_seed_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"^`seeds` must be at least 2, or there is no spread"):
        list_size(tmp_path / "out", seeds=1)


def test_the_command(tmp_path):
    command = ["reproduce", "list-size", "-o", str(tmp_path / "out"), "--quick", "--jobs", "1"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.stderr
    assert "lists of 128 and 256 are whole" in found.stderr
    assert "SCC, ours" in found.stdout
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert [row["n_k"] for row in told["rows"]] == [2, 128, 256] * 2
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "out/table.csv"), pd.DataFrame(told["rows"]), rtol=1e-4
    )
