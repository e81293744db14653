"""The tables, and the text of benchmarks/synthetic_findings.py, follow the numbers."""

from __future__ import annotations

import itertools
import re
import runpy
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from strank.studies.synthetic.objectives import COMPARED, LIST_SIZES, PAPER
from strank.studies.synthetic.tables import Scores, sweep_table, table1, table3

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "synthetic_findings.py"
_script = runpy.run_path(str(SCRIPT))
findings, difference = _script["findings"], _script["difference"]


def cells():
    """Study, objective, sampling, head, factor, value and whether depth was told."""
    for sampling in PAPER:
        for objective in COMPARED:
            yield "table1", objective, sampling, "mlp", "", np.nan, True
        for objective in ("list", "mse", "poisson"):
            yield "table1", objective, sampling, "spline", "", np.nan, True
        for size in LIST_SIZES:
            yield "table3", f"list_{size}", sampling, "mlp", "", np.nan, True
    for setting in (("base", 1.0, True), ("depth_spread", 1.0, True), ("depth_spread", 1.0, False)):
        for objective in ("mse", "list", "section-pcc"):
            yield "sweep", objective, "imbalanced", "mlp", *setting
        yield "sweep", "list", "imbalanced", "spline", *setting


def make_scores(**means: float) -> Scores:
    """Every fit of a study; an objective's SCC is its mean (0.5) and a little of its own."""
    rng = np.random.default_rng(0)
    rows = []
    for study, objective, sampling, head, *setting in cells():
        mean = means.get(f"{objective}_{head}", 0.5)
        chosen = ("counts", "truth") if head == "mlp" else ("none",)
        for selection, function, seed in itertools.product(chosen, range(4), range(2)):
            scc = mean + rng.normal(0, 0.001)
            label = (study, objective, sampling, head, *setting, selection, function, seed)
            rows.append((*label, scc))
    columns = "study objective sampling head factor value corrected selection function seed scc"
    return Scores(pd.DataFrame(rows, columns=columns.split()).assign(seconds=0.3))


def test_who_leads_is_read_off_the_numbers():
    order, *_ = findings(make_scores(list_mlp=0.99, pair_mlp=0.95))
    assert "ours is ListSTRank 0.990, PairSTRank 0.950" in order
    assert "ListSTRank is clearly ahead of 6 of the six others" in order
    assert "ListSTRank reaches the paper's 0.945 with 0.990." in order
    order, *_ = findings(make_scores(mse_mlp=0.99))
    assert "ours is MSE 0.990" in order
    assert "ListSTRank misses the paper's 0.945 with 0.500." in order


@pytest.mark.parametrize(
    ("section", "verdict"), [(0.9, "behind, -0.4"), (0.1, "ahead, +0.4"), (0.5, "not clearly")]
)
def test_where_pearson_per_section_stands_is_told(section, verdict):
    text = next(
        text
        for text in findings(make_scores(**{"section-pcc_mlp": section}))
        if "per section" in text
    )
    assert f"is {verdict}" in text


def test_gap_of_the_optima():
    text = next(
        text
        for text in findings(make_scores(list_spline=0.99, mse_spline=0.7, poisson_spline=0.6))
        if text.startswith("Exact")
    )
    # Above the better of the two, MSE.
    assert re.search(r"optimum is 0\.2[89]\d below that of ListSTRank \(uniform\)", text)


def test_depth_told_and_not_told_stand_side_by_side():
    (text,) = (text for text in findings(make_scores()) if "Depth told" in text)
    assert "mlp head at 1: 0.5" in text
    assert "spline head at 1: 0.5" in text


def test_tables_hold_means_and_spread_over_seeds():
    scores = make_scores(list_mlp=0.9)
    table = table1(scores).set_index(["sampling", "objective", "head", "selection"])
    row = table.loc["uniform", "list", "mlp", "counts"]
    values = scores.of("list", "uniform").groupby("seed").mean()
    assert row["scc"] == pytest.approx(values.mean())
    assert row["sd"] == pytest.approx(values.std())
    assert (row["seeds"], row["paper"]) == (2, 0.945)
    assert np.isnan(table.loc["uniform", "list", "spline", "none"]["paper"])


def test_large_lists_are_whole_sections():
    table = table3(make_scores(list_mlp=0.9)).set_index(["sampling", "selection", "n_k"])
    rows = table.sort_index().loc["imbalanced", "counts"]
    assert list(rows.index) == [*LIST_SIZES, 128, 256]
    assert rows["scc"][128] == rows["scc"][256] == pytest.approx(0.9, abs=0.01)
    assert rows["paper"][8] == 0.839


def test_a_sweep_has_the_papers_setting_in_it():
    table = sweep_table(make_scores())
    assert set(table["factor"]) == {"depth_spread"}
    assert set(table["value"]) == {0.0, 1.0}


def test_difference_is_a_t_interval():
    first, second = pd.Series([1.0, 2.0, 4.0]), pd.Series([0.5, 1.0, 2.0])
    found = difference(first, second)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found.low == pytest.approx(expected.low)
    assert found.high == pytest.approx(expected.high)
