"""Spearman and Pearson against scipy, and the laws that each score obeys."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import pearsonr, spearmanr

from strank.metrics.correlation import log1p_cp10k, pearson, spearman
from strank.metrics.depth import depth_matched_spearman, lift
from strank.metrics.deviance import calibration_slope, deviance_explained, list_gain

# Each score with the laws that hold for it. "no draws": it makes no use of random numbers, so that
# it does not matter in which order spots, genes and sections come.
SCORES = {
    "spearman": (spearman, "monotone, negation, no draws"),
    "spearman_counts": (partial(spearman, target="log1p_counts"), "monotone, negation, no draws"),
    "pearson": (pearson, "linear, negation, no draws"),
    "pearson_counts": (partial(pearson, target="log1p_counts"), "linear, negation, no draws"),
    "depth_matched": (partial(depth_matched_spearman, n_draws=3), "monotone, negation"),
    "lift": (lift, "monotone, negation, no draws"),
    "relative_lift": (partial(lift, relative=True), "monotone, negation, no draws"),
    "deviance_explained": (deviance_explained, "no draws"),
    "list_gain": (list_gain, "no draws"),
    "calibration_slope": (calibration_slope, "no draws"),
}


def scores_that_obey(law):
    found = {name: score for name, (score, laws) in SCORES.items() if law in laws}
    return pytest.mark.parametrize("score", found.values(), ids=found)


any_score = scores_that_obey("")
seeds = given(seed=st.integers(0, 2**31))
quick = settings(deadline=None, max_examples=25)


def some_spots(seed):
    """Three sections, one of a single spot, with ties, a spot without counts and odd genes."""
    rng = np.random.default_rng(seed)
    section = rng.permutation(np.repeat(["b", "a", "c"], [rng.integers(2, 20), 15, 1]))
    n = len(section)
    scores = rng.normal(size=(n, 5)).round(1)
    rate = rng.lognormal(1, 1, size=n)[:, None] * np.array([0.0, 0.1, 1.0, 3.0, 30.0])
    counts = rng.poisson(rate)
    counts[rng.integers(n)] = 0
    scores[:, 3] = 0.1
    library_size = (counts.sum(1) + rng.poisson(20, n)) * (counts.sum(1) > 0)
    return scores, counts, {"section": section, "library_size": library_size}


@pytest.mark.parametrize("target", ["log1p_cp10k", "log1p_counts"])
@pytest.mark.parametrize(("score", "scipys"), [(spearman, spearmanr), (pearson, pearsonr)])
@pytest.mark.filterwarnings("ignore:An input array is constant")
@quick
@seeds
def test_agreement_with_scipy(score, scipys, target, seed):
    scores, counts, spots = some_spots(seed)
    got = score(scores, counts, **spots, target=target)
    for s, name in enumerate(["a", "b"]):
        rows = spots["section"] == name
        depth = np.maximum(spots["library_size"][rows], 1)[:, None]
        observed = counts[rows] if target == "log1p_counts" else 1e4 * counts[rows] / depth
        for g in range(scores.shape[1]):
            expected = scipys(scores[rows, g], np.log1p(observed[:, g])).statistic
            np.testing.assert_allclose(got[s, g], expected, atol=1e-12)
    assert np.isnan(got[2]).all()


def test_spearman_is_undefined_for_constants_and_single_spots():
    scores = np.array([[1.0, 2.0, 1.0], [2.0, 2.0, 5.0], [3.0, 4.0, 4.0]])
    counts = np.array([[0, 1, 1], [0, 2, 2], [9, 3, 3]])
    spots = {"section": np.array([0, 0, 1]), "library_size": np.full(3, 10)}
    for score in (spearman, pearson):
        got = score(scores, counts, **spots)
        np.testing.assert_allclose(got, [[np.nan, np.nan, 1.0], [np.nan] * 3])


def test_a_constant_is_constant_whatever_its_mean_rounds_to():
    counts, spots = np.arange(7)[:, None], {"section": np.zeros(7), "library_size": np.full(7, 9)}
    for dtype in (np.float32, np.float64):
        scores = np.full((7, 1), 0.1, dtype=dtype)
        assert np.isnan(pearson(scores, counts, **spots))
        assert np.isnan(spearman(scores, counts, **spots))


def test_log1p_cp10k_keeps_sparsity_and_survives_empty_spots():
    got = log1p_cp10k(np.array([[1, 0], [0, 0]]), [100, 0])
    assert got.nnz == 1
    np.testing.assert_allclose(got.toarray(), [[np.log1p(100), 0], [0, 0]])


def test_log1p_cp10k_leaves_its_input_and_adds_up_what_is_stored_twice():
    counts = sparse.csr_matrix((np.array([1.0, 2.0]), np.array([0, 0]), np.array([0, 2])), (1, 1))
    np.testing.assert_allclose(log1p_cp10k(counts, [10]).toarray(), np.log1p([[3000.0]]))
    assert counts.data.tolist() == [1, 2]


@quick
@given(st.integers(1, 10_000), st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))
def test_equal_shares_are_tied(depth, count, first, second):
    """The order of two spots is not decided by rounding."""
    times = np.array([first, second])
    target = log1p_cp10k(count * times[:, None], depth * count * times).toarray()
    assert target[0] == target[1]


@any_score
@quick
@seeds
def test_a_constant_added_to_the_scores_of_a_section_changes_nothing(score, seed):
    scores, counts, spots = some_spots(seed)
    level = np.array([{"a": 8.0, "b": -64.0, "c": 0.0}[name] for name in spots["section"]])
    got, expected = (score(x, counts, **spots) for x in (scores + level[:, None], scores))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@scores_that_obey("no draws")
@quick
@seeds
def test_the_order_of_spots_and_genes_does_not_matter(score, seed):
    scores, counts, spots = some_spots(seed)
    rng = np.random.default_rng(seed)
    rows, genes = rng.permutation(len(scores)), rng.permutation(scores.shape[1])
    moved = {name: values[rows] for name, values in spots.items()}
    got = score(scores[rows][:, genes], counts[rows][:, genes], **moved)
    expected = score(scores, counts, **spots)[:, genes]
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@scores_that_obey("no draws")
@quick
@seeds
def test_sections_are_scored_on_their_own_and_sorted_by_label(score, seed):
    scores, counts, spots = some_spots(seed)
    got = score(scores, counts, **spots)
    renamed = np.array([{"a": 9, "b": 2, "c": 5}[name] for name in spots["section"]])
    relabelled = score(scores, counts, section=renamed, library_size=spots["library_size"])
    np.testing.assert_array_equal(relabelled, got[[1, 2, 0]])
    for s, name in enumerate("abc"):
        rows = spots["section"] == name
        alone = {key: values[rows] for key, values in spots.items()}
        np.testing.assert_array_equal(score(scores[rows], counts[rows], **alone), got[[s]])


@scores_that_obey("monotone")
@quick
@seeds
def test_only_the_order_of_scores_matters(score, seed):
    scores, counts, spots = some_spots(seed)
    expected = score(scores, counts, **spots)
    for transformed in (
        np.exp(scores),
        scores**3 * 1e4,
        np.searchsorted(np.unique(scores), scores),
    ):
        np.testing.assert_array_equal(score(transformed, counts, **spots), expected)


@scores_that_obey("linear")
@quick
@seeds
def test_the_unit_of_scores_does_not_matter(score, seed):
    scores, counts, spots = some_spots(seed)
    got, expected = (score(x, counts, **spots) for x in (scores * 1e4 - 3, scores))
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@scores_that_obey("negation")
@quick
@seeds
def test_reversed_scores_score_the_opposite(score, seed):
    scores, counts, spots = some_spots(seed)
    got, expected = (score(x, counts, **spots) for x in (-scores, scores))
    np.testing.assert_allclose(got, -expected, atol=1e-12)
    assert np.nanmax(np.abs(got)) <= 1 + 1e-12


@any_score
@quick
@seeds
def test_how_numbers_are_stored_does_not_matter(score, seed):
    scores, counts, spots = some_spots(seed)
    scores = scores.astype(np.float32)
    expected = score(scores.astype(np.float64), counts, **spots)
    single = spots | {"library_size": spots["library_size"].astype(np.float32)}
    for stored in (sparse.csr_matrix(counts), sparse.csc_array(counts.astype(np.float32))):
        got = score(scores, stored, **single)
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-9)


@any_score
@pytest.mark.filterwarnings("error")
def test_a_section_without_counts_is_undefined(score):
    spots = {"section": np.repeat([0, 1], 4), "library_size": np.repeat([0, 10], 4)}
    counts = np.repeat([0, 1], 4)[:, None] * np.arange(1, 9)[:, None]
    empty, other = score(np.arange(8.0)[:, None], counts, **spots)[:, 0]
    np.testing.assert_equal(empty, 0.0 if score is list_gain else np.nan)
    assert np.isfinite(other)


@any_score
@pytest.mark.filterwarnings("error")
def test_extreme_scores_give_finite_results(score):
    rng = np.random.default_rng(0)
    scores, counts = rng.uniform(-1e4, 1e4, size=(40, 4)), rng.poisson(5, size=(40, 4))
    spots = {"section": np.zeros(40), "library_size": np.full(40, 1000)}
    for dtype in (np.float32, np.float64):
        assert np.isfinite(score(scores.astype(dtype), counts, **spots)).all()
