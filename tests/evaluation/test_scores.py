"""`score_section`: every column is the function it is named after, whatever the block."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats

from strank.evaluation import scores as module
from strank.evaluation.scores import (
    INTERVAL,
    SCORES,
    ceilings,
    disagreements,
    score_section,
    summarise,
)
from strank.metrics.correlation import pearson, spearman, unit_ranks
from strank.metrics.depth import deep_enough, depth_matched_spearman, lift, thinned_ranks
from strank.metrics.deviance import calibration_slope, deviance_explained, slope_error
from strank.metrics.significance import SpatialNull

PANEL = pd.Index(["G4", "G0", "GONE", "G2", "G5"])
MEASURED = np.array([0, 1, 3, 4])
SLOPES = np.array([0.5, 2.0, 1.0, 0.1, 3.0])
DRAWN = ["depth_matched", "p_value"]


@pytest.fixture
def section(section_of):
    adata = section_of(n_spots=60, n_genes=6)
    # Depth that no gene of the panel has a part in.
    adata.obs["library_size"] += np.random.default_rng(1).integers(0, 300, 60)
    return adata


@pytest.fixture
def predicted() -> dict[str, np.ndarray]:
    one, two = np.random.default_rng(2).normal(size=(2, 60, len(PANEL)))
    return {"one": one, "two": two.round(0)}


def column(table: pd.DataFrame, method: str, name: str) -> np.ndarray:
    return table[table["method"] == method].set_index("gene")[name].to_numpy()


@pytest.mark.parametrize("depth", ["all", "panel"])
@pytest.mark.parametrize("method", ["one", "two"])
def test_every_column_is_the_function_of_its_name(section, predicted, depth, method):
    table = score_section(
        predicted, section, PANEL, slopes={"two": SLOPES}, depth=depth, seed=3, significance=True
    )
    scores = predicted[method][:, MEASURED]
    counts = sparse.csr_matrix(section[:, PANEL[MEASURED]].X.toarray())
    library_size = section.obs["library_size"].to_numpy()
    spots = {"section": np.zeros(60), "library_size": library_size}
    target = spots if depth == "all" else spots | {"library_size": counts.sum(1).A1}
    slope = SLOPES[MEASURED] if method == "two" else None
    # The seed of thinning is that of the call and the number of the block.
    thinned = thinned_ranks(counts, library_size, rng=np.random.default_rng((3, 0)))
    ranks, kept = unit_ranks(scores[thinned.kept]), deep_enough(library_size)[1]
    null = SpatialNull.of(section.obsm["spatial"][kept])
    p = null.p_values(ranks, thinned.ranks, rng=np.random.default_rng((3, 1)))
    expected = {
        "scc": spearman(scores, counts, **target),
        "pearson": pearson(scores, counts, **target),
        "pearson_counts": pearson(scores, counts, **spots, target="log1p_counts"),
        "depth_matched": depth_matched_spearman(scores, counts, **spots, seed=(3, 0)),
        "lift": lift(scores, counts, **spots),
        "lift_relative": lift(scores, counts, **spots, relative=True),
        "deviance": deviance_explained(scores, counts, **spots, slope=slope),
        "slope": calibration_slope(scores, counts, **spots, slope=slope),
        "p_value": p[None],
    }
    assert set(expected) == set(SCORES)
    for name in SCORES:
        found = column(table, method, name)
        assert np.isnan(found[2])
        np.testing.assert_allclose(found[MEASURED], expected[name][0], rtol=1e-9, err_msg=name)
    rates = scores if slope is None else scores * slope
    error = slope_error(expected["slope"], rates, counts, **spots)[0]
    for name, sign in zip(INTERVAL, (-1, 1), strict=True):
        end = expected["slope"][0] + sign * 1.96 * error
        np.testing.assert_allclose(column(table, method, name)[MEASURED], end, rtol=1e-9)
    if depth == "panel":
        differs = column(table, method, "scc") != column(
            score_section(predicted, section, PANEL), method, "scc"
        )
        assert differs[MEASURED].any()


def test_blocks_of_genes_change_nothing_but_draws(section, predicted, monkeypatch):
    options = {"slopes": {"two": SLOPES}, "significance": True}
    whole = score_section(predicted, section, PANEL, **options)
    monkeypatch.setattr(module, "_GENES", 2)
    parts = score_section(predicted, section, PANEL, **options)
    pd.testing.assert_frame_equal(parts.drop(columns=DRAWN), whole.drop(columns=DRAWN))
    np.testing.assert_allclose(parts["depth_matched"], whole["depth_matched"], atol=0.15)
    assert not parts["depth_matched"].equals(whole["depth_matched"])
    assert parts["p_value"].notna().equals(whole["p_value"].notna())


def test_methods_are_scored_each_for_itself(section, predicted):
    both = score_section(predicted, section, PANEL, significance=True)
    alone = score_section({"two": predicted["two"]}, section, PANEL, significance=True)
    rest = both[both["method"] == "two"].reset_index(drop=True)
    pd.testing.assert_frame_equal(rest, alone)
    other = score_section(predicted, section, PANEL, seed=1, significance=True)
    pd.testing.assert_frame_equal(other.drop(columns=DRAWN), both.drop(columns=DRAWN))
    assert not other["depth_matched"].equals(both["depth_matched"])
    assert score_section(predicted, section, PANEL)["p_value"].isna().all()


def test_rows_say_what_was_scored(section, predicted):
    table = score_section(predicted, section, PANEL)
    assert table["method"].tolist() == ["one"] * 5 + ["two"] * 5
    assert table["gene"].tolist() == [*PANEL, *PANEL]
    assert set(table["section"]) == {"A1"}
    assert set(table["patient"]) == {"A"}
    assert set(table["n_spots"]) == {60}
    means = section.to_df().astype(float).mean().reindex(PANEL)
    np.testing.assert_allclose(column(table, "two", "mean_counts"), means, rtol=1e-12)
    assert column(table, "one", "note").tolist() == ["", "", "not measured", "", ""]


def test_what_cannot_be_ordered_is_noted(section, predicted):
    counts = section.X.toarray()
    counts[:, 0] = 0
    section.X = sparse.csr_matrix(counts)
    predicted["one"][:, [0, 1, 2]] = 0.1
    table = score_section(predicted, section, PANEL, significance=True)
    table = table.set_index(["method", "gene"])
    notes = table["note"]
    assert notes["one"].tolist() == ["constant scores", "constant counts", "not measured", "", ""]
    assert notes["two"].tolist() == ["", "constant counts", "not measured", "", ""]
    values = table[list(SCORES)]
    flat = values.loc[("one", "G4")]
    assert flat.drop(["slope", "p_value"]).tolist() == [0.0] * 7
    assert flat[["slope", "p_value"]].isna().all()
    assert values.xs("G0", level="gene").isna().all(axis=None)
    assert values.xs("GONE", level="gene").isna().all(axis=None)
    assert values.drop(["G4", "G0", "GONE"], level="gene").notna().all(axis=None)
    # Of a gene without counts, the mean is known; of one that is not measured, it is not.
    means = table.loc["one", "mean_counts"]
    assert means["G0"] == 0
    assert np.isnan(means["GONE"])


def test_counts_in_step_with_depth_have_nothing_to_order(section, predicted):
    """Counts differ among spots, but their share does not: constant is what the target is."""
    section.obs["library_size"] = 1000.0 * np.tile([1, 2], 30)
    counts = section.X.toarray()
    counts[:, 4] = 3 * np.tile([1, 2], 30)
    section.X = sparse.csr_matrix(counts)
    row = score_section(predicted, section, PANEL).set_index(["method", "gene"]).loc[("one", "G4")]
    assert row["note"] == "constant counts"
    assert row[list(SCORES)].isna().all()


def test_a_panel_of_nothing_measured(section):
    panel = pd.Index(["X", "Y"])
    table = score_section({"m": np.zeros((60, 2))}, section, panel, significance=True)
    assert table["note"].tolist() == ["not measured"] * 2
    assert table[list(SCORES)].isna().all(axis=None)


def test_scores_of_the_truth_come_near_their_ceilings(section_of):
    """Rates that are known, counts drawn from them."""
    rng, n = np.random.default_rng(0), 400
    share = np.array([1e-4, 1e-4, 1e-4, 1e-3, 1e-3, 1e-2])
    rate = share * rng.lognormal(0, 0.6, size=(n, 6))
    adata = section_of(n_spots=n, n_genes=6)
    # The rest of the transcriptome has the depth to itself.
    adata.obs["library_size"] = depth = 10_000 * rng.lognormal(0, 0.5, size=n)
    adata.X = sparse.csr_matrix(rng.poisson(rate * depth[:, None]))
    panel = pd.Index(["G0", "G1", "G2", "G3", "G4", "GONE"])
    found = ceilings(adata, panel, seed=1)
    table = score_section({"truth": np.log1p(1e4 * rate)}, adata, panel)
    for name in ("scc", "pearson", "depth_matched"):
        ceiling = found[f"ceiling_{name}"]
        assert np.isnan(ceiling[5])
        assert ceiling[:5].mean() == pytest.approx(table[name][:5].mean(), abs=0.05)
        assert stats.spearmanr(ceiling[:5], [1, 1, 1, 2, 2]).statistic > 0.8
    assert found["n_matched"].tolist() == [360] * 6
    assert found["gene"].tolist() == panel.tolist()


def test_the_order_of_the_genes_in_a_section_is_nothing_and_stays(section, predicted):
    """Columns picked from a sparse matrix come in an order that must not be put right in place."""
    mixed = section[:, [5, 2, 0, 4, 1, 3]].copy()
    before = mixed.to_df()
    table = score_section(predicted, mixed, PANEL, significance=True)
    pd.testing.assert_frame_equal(
        table, score_section(predicted, section, PANEL, significance=True)
    )
    pd.testing.assert_frame_equal(mixed.to_df(), before)


def test_slopes_are_summed_up_by_medians_with_intervals():
    rng, names = np.random.default_rng(0), ["A", "B", "C", "D"]
    slopes = {name: rng.normal(0.8, 0.3, 41) for name in names}
    parts = [
        pd.DataFrame({"section": name, "method": "m", "slope": values, "note": ""})
        for name, values in slopes.items()
    ]
    table = pd.concat(parts).assign(scc=0.1, depth_matched=0.1, lift=0.1, deviance=0.1)
    found = summarise(table).set_index("section")
    for name, values in slopes.items():
        assert found.loc[name, "slope"] == np.median(values)
        # Of 41 values the 14th and 28th: binomial tails of .0138 each.
        ends = np.sort(values)[[13, 27]]
        np.testing.assert_allclose(found.loc[name, list(INTERVAL)].astype(float), ends)
    medians = [np.median(values) for values in slopes.values()]
    margin = stats.t.ppf(0.975, 3) * np.std(medians, ddof=1) / 2
    ends = np.mean(medians) + np.array([-margin, margin])
    np.testing.assert_allclose(found.loc["mean", list(INTERVAL)].astype(float), ends)
    two = summarise(table[table["section"] < "C"]).set_index("section")
    assert two.loc["mean", list(INTERVAL)].isna().all()


@pytest.mark.parametrize(
    ("means", "told"),
    [
        ((0.1, 0.05, 0.2), None),
        ((-0.1, -0.05, -0.2), None),
        ((0.1, 0.05, -0.001), None),
        ((0.1, 0.05, -0.2), "its order tells something, the size"),
        ((0.1, -0.05, 0.2), "holds for one of them only"),
        ((np.nan, 0.05, np.nan), None),
    ],
)
def test_scores_that_disagree_are_told(means, told):
    row = dict(zip(("depth_matched", "lift", "deviance"), means, strict=True))
    table = pd.DataFrame([{"section": "mean", "method": m, "slope": 0.1, **row} for m in "ab"])
    table.loc[1, "method"] = "shuffled"
    found = disagreements(table)
    assert len(found) == (told is not None)
    assert all(text.startswith("a: ") and told in text for text in found)
