"""The synthetic study, quick: what it finds, writes, resumes and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.special import logsumexp
from typer.testing import CliRunner

from strank import reproduce
from strank.cli import app
from strank.errors import InputError
from strank.simulate.curves import CurveDesign, curve, draw_curves
from strank.studies.synthetic import study
from strank.studies.synthetic.cells import CurveCell, CurveRecipe, fit_spline, run_curve_cell
from strank.where import Where

POINTWISE = ("mse", "poisson", "nb")
TINY = CurveRecipe(steps=4, batch=16, checks=2)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Iterator[Path]:
    """Run the quick study on half of its batches, and a few where none asks what is learned."""
    folder, plan = tmp_path_factory.mktemp("synthetic") / "study", study.plan

    def shorter(**options: Any) -> list[CurveCell]:
        cells = plan(**options)
        half = replace(cells[0].recipe, batch=128)
        return [replace(c, recipe=half if c.study == "table1" else TINY) for c in cells]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "plan", shorter)
        result = CliRunner().invoke(app, ["reproduce", "synthetic", "-o", str(folder), "--quick"])
        assert result.exit_code == 0, result.output
        assert "Mean SCC against the truth" in result.output
        assert "section-pcc" in result.output
        yield folder


def by_objective(folder: Path) -> pd.DataFrame:
    """SCC of the networks, a row a sampling, function and seed, a column an objective."""
    parts = [pd.read_csv(path) for path in (folder / "cells").glob("table1-*-scores.csv")]
    table = pd.concat(parts)
    networks = table[(table["head"] == "mlp") & (table["selection"] == "counts")]
    return networks.pivot_table("scc", ["sampling", "function", "seed"], "objective")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("better", "worse"),
    [("list", "pair"), *((a, b) for a in ("list", "pair") for b in POINTWISE)],
)
def test_list_is_above_pair_above_the_pointwise_losses(quick, better, worse):
    """A signed rank test over 16 data sets: without a difference it passes once in a hundred."""
    scores = by_objective(quick)
    assert len(scores) == 16
    assert stats.wilcoxon(scores[better], scores[worse], alternative="greater").pvalue < 0.01


@pytest.mark.slow
def test_the_exact_list_reaches_the_goal(quick):
    table = pd.read_csv(quick / "table1.csv")
    exact = table[(table["head"] == "spline") & (table["objective"] == "list")]
    scc = exact.set_index("sampling")["scc"]
    assert scc["uniform"] >= 0.997
    assert scc["imbalanced"] >= 0.97


@pytest.mark.slow
def test_what_is_written(quick):
    assert {path.name for path in quick.iterdir()} == {
        *("cells", "study.json", "index.html"),
        *(f"{name}.csv" for name in ("table1", "table3", "sweeps")),
        *(f"{name}.png" for name in ("table1", "table3", "sweeps", "curves")),
    }
    about = json.loads((quick / "study.json").read_text())
    assert (about["seed"], about["seeds"], about["quick"]) == (0, 2, True)
    page = (quick / "index.html").read_text()
    for image in ("table1.png", "curves.png", "table3.png", "sweeps.png"):
        assert f'src="{image}"' in page
    table = pd.read_csv(quick / "table1.csv")
    assert f"{table['scc'][0]:.3f}" in page


@pytest.mark.slow
def test_a_finished_study_is_not_run_again(quick, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("ran again")

    monkeypatch.setattr(study, "run_curve_cell", refuse)
    before = pd.read_csv(quick / "table1.csv")
    (quick / "table1.csv").unlink()
    reproduce.synthetic(quick, quick=True)
    pd.testing.assert_frame_equal(pd.read_csv(quick / "table1.csv"), before)


@pytest.mark.slow
def test_a_study_of_other_settings_is_refused(quick):
    result = CliRunner().invoke(
        app, ["reproduce", "synthetic", "-o", str(quick), "--quick", "--seed", "1"]
    )
    assert result.exit_code == 2
    assert ": study of another seed; choose another" in result.output


def test_a_folder_with_anything_else_is_refused(tmp_path):
    (tmp_path / "thesis.doc").touch()
    with pytest.raises(InputError, match="exists and is not a study; choose another"):
        reproduce.synthetic(tmp_path, quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


def test_one_seed_is_refused(tmp_path):
    with pytest.raises(InputError, match="`seeds` must be at least 2"):
        reproduce.synthetic(tmp_path / "study", seeds=1)
    assert not (tmp_path / "study").exists()


def test_a_stopped_study_continues(tmp_path, monkeypatch):
    """The cells that are there are kept, and the result is that of a study in one go."""
    design = CurveDesign(n_spots=200)
    cells = [
        CurveCell("table1", design, ("mse",), n_seeds=2, recipe=TINY),
        CurveCell("table3", design, ("list_2",), n_seeds=2, recipe=TINY),
    ]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        (folder / "cells").mkdir(parents=True)
    for cell, result in study._run(cells, 0, Where()):
        study._keep(study._path(whole, cell), result.scores)
    for part in (cells[:1], cells[1:]):
        for cell, result in study._run(part, 0, Where()):
            study._keep(study._path(halves, cell), result.scores)
    for cell in cells:
        first, second = (study._path(folder, cell).read_text() for folder in (whole, halves))
        assert first == second


def test_cells_have_names_of_their_own():
    for quick in (False, True):
        names = [cell.name for cell in study.plan(quick=quick)]
        assert len(set(names)) == len(names)


def test_a_cell_reports_every_fit():
    cell = CurveCell(
        "sweep",
        CurveDesign(n_spots=300),
        ("mse", "list_4"),
        ("list",),
        factor="kept",
        value=1.0,
        n_seeds=2,
        recipe=TINY,
    )
    scores, curves = run_curve_cell(cell, seed=3)
    # Two networks, each chosen in two ways, and a spline; four functions, two seeds.
    assert len(scores) == (2 * 2 + 1) * 4 * 2
    assert set(scores["objective"]) == {"mse", "list_4", "list"}
    assert scores["scc"].abs().max() <= 1
    assert len(curves) == (2 + 1) * 4 * 400


def test_a_checkpoint_chosen_by_the_truth_is_no_worse_on_the_truth():
    cell = CurveCell("table1", CurveDesign(n_spots=2000), ("rank",), n_seeds=2, recipe=TINY)
    table = run_curve_cell(cell, seed=0).scores.pivot_table(
        "scc", ["seed", "function"], "selection"
    )
    # Chosen and tested on different positions of one curve.
    assert (table["truth"] >= table["counts"] - 0.02).all()


def test_spline_fit_is_the_optimum_of_its_own_likelihood():
    """No other curve near it gives the counts a higher list likelihood."""
    data = draw_curves(0, design=CurveDesign(n_spots=3000), rng=np.random.default_rng(0))
    predict = fit_spline("list", data)

    def loss(scores):
        total = 0.0
        for tissue in (0, 1):
            rows = data.tissue == tissue
            counts, part = data.counts[rows], scores[rows]
            total -= (counts * (part - logsumexp(part))).sum()
        return total

    best = loss(predict(data.x))
    truth = np.log(curve(0, data.x).clip(min=1e-9))
    assert best < loss(truth)
    for wave in (np.sin(9 * data.x), data.x, np.cos(20 * data.x)):
        for step in (0.02, -0.02):
            assert best < loss(predict(data.x) + step * wave)


def test_spline_of_another_objective_is_refused():
    data = draw_curves(0, design=CurveDesign(n_spots=50), rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match="no exact estimator 'nb'"):
        fit_spline("nb", data)
