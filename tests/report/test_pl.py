"""Pictures on axes: what is drawn is what was given, whoever made the axes."""

from __future__ import annotations

import inspect
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from scipy.stats import t

import strank
from strank.errors import InputError
from strank.evaluation.held_out import Evaluation

METHODS = ["linear, $list$", "_ridge", "library size"]


@pytest.fixture(autouse=True)
def _no_figure_stays():
    yield
    plt.close("all")


def ax_of() -> plt.Axes:
    return Figure().subplots()


@pytest.fixture
def evaluation() -> Evaluation:
    """Three methods on four sections of as many patients, of five genes, one not known in one."""
    rng = np.random.default_rng(0)
    index = pd.MultiIndex.from_product(
        [METHODS, [f"S{i}" for i in range(4)], list("abcde")], names=["method", "section", "gene"]
    )
    table = pd.DataFrame(index=index).reset_index()
    table["patient"] = table["section"].str.replace("S", "P")
    base = table["method"].map({METHODS[0]: 0.4, METHODS[1]: 0.5, METHODS[2]: 0.3})
    table["scc"] = base + 0.05 * rng.normal(size=len(table))
    table["depth_matched"] = table["scc"] - table["method"].map(
        {METHODS[0]: 0.1, METHODS[1]: 0.3, METHODS[2]: 0.3}
    )
    table.loc[3, ["scc", "depth_matched"]] = np.nan
    return Evaluation(table, {}, ())


def rows_of(ax) -> dict[str, float]:
    return {
        text.get_text(): y for text, y in zip(ax.get_yticklabels(), ax.get_yticks(), strict=True)
    }


def test_scores_are_means_with_students_intervals(evaluation):
    ax = ax_of()
    assert strank.pl.scores(evaluation, ax=ax) is ax
    rows = rows_of(ax)
    # The best on top, by the score that is drawn.
    assert sorted(rows, key=rows.get) == ["library size", "_ridge", METHODS[0]]
    [bars] = ax.containers
    points, _, (lines,) = bars
    means = evaluation.scores.pivot_table("depth_matched", "method", "section")
    at = dict(zip(points.get_ydata(), points.get_xdata(), strict=True))
    for method, row in rows.items():
        assert at[row] == pytest.approx(means.loc[method].mean())
    dots = ax.collections[0].get_offsets()
    expected = {(round(v, 9), rows[m]) for m in METHODS for v in means.loc[m]}
    assert {(round(x, 9), y) for x, y in dots} == expected
    ends = {segment[0, 1]: np.ptp(segment[:, 0]) for segment in lines.get_segments()}
    for method in METHODS:
        # At least the part of sections.
        least = 2 * t.ppf(0.975, 3) * means.loc[method].std() / 2
        assert least * (1 - 1e-9) < ends[rows[method]] < 3 * least


def test_sections_of_a_patient_are_no_new_evidence(evaluation):
    def width(of: Evaluation) -> float:
        (_, _, (lines,)) = strank.pl.scores(of, ax=ax_of()).containers[0]
        return np.ptp(lines.get_segments()[0][:, 0])

    pairs = evaluation.scores["patient"].map({"P0": "P", "P1": "P", "P2": "Q", "P3": "Q"})
    of_two = Evaluation(evaluation.scores.assign(patient=pairs), {}, ())
    # Student's t of one degree of freedom, not of three.
    assert width(of_two) > 1.5 * width(evaluation)


def test_an_interval_that_hides_all_else_is_cut_and_told(evaluation):
    two = Evaluation(evaluation.scores[evaluation.scores["section"].isin(["S0", "S1"])], {}, ())
    ax = strank.pl.scores(two, ax=ax_of())
    assert "beyond the axis" in ax.get_title()
    assert np.ptp(ax.get_xlim()) < 1
    assert strank.pl.scores(evaluation, ax=ax_of()).get_title() == ""


def test_depth_shows_what_is_left_of_a_score(evaluation):
    ax = strank.pl.depth(evaluation, ax=ax_of())
    rows, table = rows_of(ax), evaluation.scores
    _, plain, matched = ax.collections
    for drawn, column in ((plain, "scc"), (matched, "depth_matched")):
        means = table.groupby(["method", "section"])[column].mean().groupby("method").mean()
        found = {y: x for x, y in drawn.get_offsets()}
        assert found == pytest.approx({rows[name]: means[name] for name in METHODS})
    legend = [text.get_text() for text in ax.get_legend().get_texts()]
    assert legend == ["SCC", "depth-matched SCC"]


def test_a_score_that_is_not_there_is_refused(evaluation):
    with pytest.raises(InputError, match=r"no score 'spearman'; choose one of scc"):
        strank.pl.scores(evaluation, "spearman")
    with pytest.raises(InputError, match="no score 'lift'"):
        strank.pl.scores(evaluation, "lift")


def test_names_in_a_column_have_lines_that_do_not_cross():
    rng = np.random.default_rng(1)
    changes = pd.DataFrame({"predicted": np.abs(rng.normal(size=60)) + 0.3})
    changes = changes.assign(gene=[f"G{i}" for i in range(60)], a="A", b="B")
    # Far and near points of about the same height: by height alone lines would cross.
    changes["p"] = 10.0 ** rng.uniform(-3.2, -3, 60)
    figure = Figure(figsize=(7, 5), layout="constrained")
    ax = strank.pl.volcano(changes.assign(q=0.01), ax=figure.subplots())
    lines = [
        ax.transData.transform([text.xy, text.get_position()])
        for text in ax.texts
        if text.get_text()
    ]
    assert len(lines) == 8
    assert not any(_cross(a, b) for i, a in enumerate(lines) for b in lines[:i])


def _cross(a: np.ndarray, b: np.ndarray) -> bool:
    def side(line, point):
        return np.sign(np.linalg.det([line[1] - line[0], point - line[0]]))

    return bool(side(a, b[0]) * side(a, b[1]) < 0 and side(b, a[0]) * side(b, a[1]) < 0)


def test_epochs_are_whole_numbers_and_a_cut_is_told(tmp_path):
    for name, first in (("A", -9.0), ("B", 0.1)):
        (tmp_path / f"without-{name}").mkdir()
        history = {
            "epoch": range(6),
            "train/loss": 1.0,
            "validation/list_gain": [first, 0.12, 0.15, 0.18, 0.2, 0.2],
        }
        pd.DataFrame(history).to_csv(tmp_path / f"without-{name}" / "history.csv")
    ax = strank.pl.learning(tmp_path, ax=ax_of())
    ticks = ax.get_xticks()
    np.testing.assert_array_equal(ticks, ticks.round())
    assert "not shown" in ax.get_title()
    assert ax.get_ylim()[0] > -1
    (tmp_path / "without-A" / "history.csv").unlink()
    whole = strank.pl.learning(tmp_path, ax=ax_of())  # B begins at half of what it reaches
    assert whole.get_title() == ""
    assert whole.get_ylim()[0] < 0.1
    assert strank.pl.learning(tmp_path, training=True, ax=ax_of()).get_title() == ""


def test_without_axes_a_figure_is_made_for_the_notebook(evaluation):
    before = plt.get_fignums()
    ax = strank.pl.depth(evaluation)
    assert plt.figure(plt.get_fignums()[-1]) is ax.figure
    assert len(plt.get_fignums()) == len(before) + 1


@pytest.mark.parametrize("name", strank.pl.__all__)
def test_every_picture_takes_axes_by_name_alone(name):
    parameters = inspect.signature(getattr(strank.pl, name)).parameters
    assert parameters["ax"].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["ax"].default is None


@pytest.mark.parametrize("name", ["pl.map", "pl.scores", "report.write_volcano"])
def test_without_matplotlib_one_error_says_what_brings_it(name):
    code = f"import sys; sys.modules['matplotlib'] = None; import strank; strank.{name}"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "InputError: this needs matplotlib" in told.stderr
    assert "pip install 'strank[plots]'" in told.stderr


def test_matplotlib_is_not_imported_before_something_is_drawn():
    code = "import strank.pl, sys; dir(strank.pl); assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
