"""Depth-matched Spearman and lift against their definitions, spot by spot."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.integrate import trapezoid
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from strank.metrics.correlation import spearman
from strank.metrics.depth import depth_matched_spearman, lift, thin

seeds = given(seed=st.integers(0, 2**31))
quick = settings(deadline=None, max_examples=30)


def some_spots(seed, n_spots=12, n_genes=4):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n_spots, n_genes)).round(rng.integers(0, 3))
    counts = rng.poisson(rng.lognormal(0, 1.5, size=(n_spots, 1)), size=(n_spots, n_genes))
    counts[rng.integers(n_spots)] = 0
    library_size = counts.sum(1) * rng.integers(1, 4, n_spots)
    return scores, counts, {"section": np.zeros(n_spots), "library_size": library_size}


def plain_lift(r, c, exposure):
    """The double sum."""
    above, everything = 0.0, 0.0
    for i in range(len(r)):
        for j in range(len(r)):
            above += c[i] * exposure[j] * np.sign(r[i] - r[j])
            everything += c[i] * exposure[j]
    return above / everything if everything else np.nan


@quick
@seeds
def test_lift_is_the_double_sum(seed):
    scores, counts, spots = some_spots(seed)
    got = lift(scores, counts, **spots)[0]
    each = zip(scores.T, counts.T, strict=True)
    expected = [plain_lift(r, c, spots["library_size"]) for r, c in each]
    np.testing.assert_allclose(got, expected, atol=1e-13)


def test_lift_by_hand():
    """The second spot has 3 of 4 counts and 1/4 of the depth; the two deep ones are tied."""
    scores, counts = np.array([[0.0], [7.0], [0.0]]), np.array([[1], [3], [0]])
    spots = {"section": np.zeros(3), "library_size": np.array([50, 50, 100])}
    # Counts of spot 2 lie above 150 of 200 units of depth, that of spot 1 below 50.
    assert lift(scores, counts, **spots) == (3 * 150 - 1 * 50) / (4 * 200)
    # The order of the shares is 3, 1, 2: 3 x 150 + 1 x (100 - 50).
    np.testing.assert_allclose(lift(scores, counts, **spots, relative=True), 400 / 500)


@quick
@seeds
def test_lift_is_twice_the_area_above_the_ordered_lorenz_curve(seed):
    _, counts, spots = some_spots(seed)
    scores = np.random.default_rng(seed).permuted(np.arange(12.0)[:, None] * [1, 1, 1, 1], axis=0)
    for g, got in enumerate(lift(scores, counts, **spots)[0]):
        order = np.argsort(scores[:, g])
        x, y = spots["library_size"][order], counts[order, g]
        if y.any():
            curve = np.append(0, y.cumsum() / y.sum()), np.append(0, x.cumsum() / x.sum())
            np.testing.assert_allclose(got, 1 - 2 * trapezoid(*curve), atol=1e-12)


@quick
@seeds
def test_lift_is_an_area_under_the_roc_curve(seed):
    """Of telling units of counts from units of depth: twice it, less one."""
    scores, counts, spots = some_spots(seed, n_genes=1)
    counts[0] += 1
    weights = np.concatenate([counts[:, 0], spots["library_size"]])
    labels = np.repeat([1, 0], len(scores))
    area = roc_auc_score(labels, np.tile(scores[:, 0], 2), sample_weight=weights)
    np.testing.assert_allclose(lift(scores, counts, **spots), 2 * area - 1, atol=1e-12)
    # Counts of 0 and 1 at equal depth: of telling the spots, shrunk by the share of ones.
    seen, spots["library_size"] = counts[:, 0] > 0, np.full(len(scores), 100)
    area = roc_auc_score(seen, scores[:, 0])
    got = lift(scores, (counts > 0).astype(int), **spots)
    np.testing.assert_allclose(got, (2 * area - 1) * (1 - seen.mean()), atol=1e-12)


@settings(deadline=None, max_examples=10)
@seeds
def test_no_order_has_more_lift_than_that_of_the_shares(seed):
    rng = np.random.default_rng(seed)
    counts, depth = rng.poisson(2, size=5), rng.integers(1, 20, size=5)
    depth[0] = counts[0] = 0
    counts[1] += 1
    orders = np.array(list(permutations(range(5)))).T
    counts = np.repeat(counts[:, None], orders.shape[1], axis=1)
    spots = {"section": np.zeros(5), "library_size": depth}
    best = lift(orders, counts, **spots).max()
    relative = lift(orders, counts, **spots, relative=True)
    if best > 0:
        np.testing.assert_allclose(relative.max(), 1)
        np.testing.assert_allclose(relative * best, lift(orders, counts, **spots))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.filterwarnings("error")
def test_scores_without_order_have_no_lift_at_all(dtype):
    depth = (np.random.default_rng(0).lognormal(8, 1, size=187)).astype(dtype)
    counts = np.arange(187)[:, None] % 7 * np.array([1, 0])
    spots = {"section": np.zeros(187), "library_size": depth}
    np.testing.assert_array_equal(lift(np.ones((187, 2)), counts, **spots), [[0, np.nan]])
    # Counts exactly as depth is: there is no best order either.
    counts = depth.astype(np.int64)[:, None]
    spots = {"section": np.zeros(187), "library_size": counts[:, 0]}
    scores = np.arange(187)[:, None]
    np.testing.assert_allclose(lift(scores, counts, **spots), 0, atol=1e-15)
    assert np.isnan(lift(scores, counts, **spots, relative=True))


def test_one_spot_has_no_lift_and_no_rank():
    spots = {"section": np.zeros(1), "library_size": np.array([9])}
    scores, counts = np.ones((1, 2)), np.array([[3, 0]])
    np.testing.assert_array_equal(lift(scores, counts, **spots), [[0, np.nan]])
    assert np.isnan(depth_matched_spearman(scores, counts, **spots)).all()


def plain_depth_matched(scores, counts, library_size, *, quantile, n_draws, rng):
    """One spot, gene and draw after the other."""
    depth = max(np.quantile(library_size, quantile), 1)
    kept = np.flatnonzero(library_size >= depth)
    found = np.zeros((n_draws, scores.shape[1]))
    for draw in range(n_draws):
        thinned = np.zeros(counts.shape)
        for g in range(scores.shape[1]):
            for i in kept:
                if counts[i, g]:
                    thinned[i, g] = rng.binomial(counts[i, g], depth / library_size[i])
        for g in range(scores.shape[1]):
            found[draw, g] = spearmanr(scores[kept, g], thinned[kept, g]).statistic
    nothing = np.isnan(found).all(0)
    return np.where(nothing, np.nan, np.nan_to_num(found).mean(0))


@pytest.mark.parametrize("quantile", [0, 0.1, 0.5])
@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_depth_matched_is_the_plain_loop(quantile):
    scores, counts, spots = some_spots(3, n_spots=45, n_genes=6)
    counts[:, 0] = np.arange(45) == 30
    spots["section"] = np.resize(["b", "a", "b"], 45)
    how = {"quantile": quantile, "n_draws": 4}
    got = depth_matched_spearman(scores, counts, **spots, **how, seed=5)
    rng = np.random.default_rng(5)
    for s, name in enumerate("ab"):
        rows = spots["section"] == name
        library_size = spots["library_size"][rows]
        expected = plain_depth_matched(scores[rows], counts[rows], library_size, **how, rng=rng)
        np.testing.assert_allclose(got[s], expected, atol=1e-12)


@quick
@seeds
def test_at_equal_depth_nothing_is_thinned(seed):
    scores, counts, spots = some_spots(seed)
    spots["library_size"] = np.full(len(scores), 60)
    expected = spearman(scores, counts, **spots, target="log1p_counts")
    for quantile in (0, 0.3):
        got = depth_matched_spearman(scores, counts, **spots, quantile=quantile, n_draws=2)
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_shallow_spots_are_left_out_and_the_seed_decides_the_draws():
    scores, counts, spots = some_spots(1, n_spots=60)
    shallow = spots["library_size"] < np.quantile(spots["library_size"], 0.4)
    changed = np.where(shallow[:, None], 9 - scores, scores)
    args = {"quantile": 0.4, **spots}
    first, second, other = (
        depth_matched_spearman(r, counts, **args, seed=seed)
        for r, seed in ((scores, 1), (changed, 1), (scores, 2))
    )
    np.testing.assert_array_equal(first, second)
    assert (first != other).all()


def test_a_draw_without_the_gene_counts_as_no_order():
    """Else a deep spot's count, kept by few draws, would weigh as much as a shallow spot's."""
    library_size, n_draws = np.array([10, 10, 100, 1000]), 4000
    scores = np.repeat(np.arange(4.0)[:, None], 4, axis=1)
    spots = {"section": np.zeros(4), "library_size": library_size}
    # Four genes, each with a single count.
    got = depth_matched_spearman(scores, np.eye(4), **spots, quantile=0, n_draws=n_draws)[0]
    seen = 10 / library_size
    if_seen = np.array([spearmanr(np.arange(4), one).statistic for one in np.eye(4)])
    error = np.abs(if_seen) * np.sqrt(seen * (1 - seen) / n_draws)
    assert (np.abs(got - seen * if_seen) <= 5 * error + 1e-12).all()
    # One count that lies anywhere, the more likely the deeper, is no order in the mean.
    np.testing.assert_allclose(library_size @ (seen * if_seen), 0, atol=1e-12)


def test_thinning_is_binomial():
    n, keep = 20_000, np.array([0.0, 0.2, 0.9, 1.0])
    counts = sparse.csc_matrix(np.repeat([[7], [7], [30], [5]], n, axis=1))
    drawn = thin(counts, keep, np.random.default_rng(0)).toarray()
    full = np.array([7, 7, 30, 5])
    mean, variance = full * keep, full * keep * (1 - keep)
    assert (np.abs(drawn.mean(1) - mean) <= 5 * np.sqrt(variance / n)).all()
    np.testing.assert_allclose(drawn.var(1), variance, rtol=0.06)
    assert (drawn <= full[:, None]).all()
    assert (counts.toarray() == full[:, None]).all()


@pytest.mark.parametrize("wrong", [{"quantile": 1.0}, {"quantile": -0.1}, {"n_draws": 0}])
def test_draws_that_make_no_sense_are_refused(wrong):
    scores, counts, spots = some_spots(0)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), and n_draws .* be >= 1"):
        depth_matched_spearman(scores, counts, **spots, **wrong)
