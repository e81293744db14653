"""P-values are uniform for fields that have nothing in common, however smooth they are."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control, kstest, spearmanr

from strank.metrics.correlation import unit_ranks
from strank.metrics.depth import thinned_ranks
from strank.metrics.significance import (
    chance_of_more,
    false_discovery_rate,
    moran_basis,
    null_correlations,
    p_values,
)

N_GENES = 1500


def irregular(side=20):
    """Part of a grid: a lobed outline with a hole, 164 spots one pitch apart for 20."""
    y, x = np.mgrid[0:side, 0:side].reshape(2, -1).astype(float) * 20 / side
    angle = np.arctan2(y - 9.5, x - 9.5)
    outline = 8 + 1.8 * np.sin(2 * angle + 1) + 1.2 * np.cos(3 * angle)
    inside = (np.hypot(x - 9.5, 1.25 * (y - 9.5)) < outline) & (np.hypot(x - 13, y - 8) > 1.6)
    return np.c_[x, y][inside] * side / 20


def fields(rng, positions, length, n_genes=N_GENES, kernel="gaussian"):
    """Stationary Gaussian fields with a length scale in pitches; 0 for white noise."""
    if length == 0:
        return rng.normal(size=(len(positions), n_genes))
    distance = cdist(positions, positions) / length
    covariance = np.exp(-distance if kernel == "exponential" else -(distance**2) / 2)
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0)) @ rng.normal(size=(len(positions), n_genes))


def ranks_of(rng, positions, scores, log_rate, *, mean=20):
    """Ranks of scores and of thinned counts, and positions, of the spots kept."""
    library_size = rng.lognormal(np.log(5000), 0.65, len(positions)).round()
    counts = rng.poisson(library_size[:, None] / 5000 * mean * np.exp(0.6 * log_rate))
    thinned = thinned_ranks(sparse.csr_matrix(counts), library_size, n_draws=3, rng=rng)
    return unit_ranks(scores[thinned.kept]), thinned.ranks, positions[thinned.kept]


def p_of(rng, scores, targets, positions):
    null = null_correlations(scores, targets, moran_basis(positions), rng=rng)
    return chance_of_more((scores * targets).sum(0), null)


def permutation_p(rng, scores, targets, n_draws=199):
    null = np.stack(
        [(scores[rng.permutation(len(scores))] * targets).sum(0) for _ in range(n_draws)]
    )
    return chance_of_more((scores * targets).sum(0), null)


LENGTHS = [
    *((0, 0, "gaussian"), (1, 1, "gaussian"), (2, 2, "gaussian"), (4, 4, "gaussian")),
    *((0, 4, "gaussian"), (4, 0, "gaussian"), (1, 4, "gaussian"), (4, 1, "gaussian")),
    *((4, 4, "exponential"), (8, 2, "exponential"), (16, 16, "exponential")),
]


@pytest.mark.parametrize(("of_scores", "of_counts", "kernel"), LENGTHS)
def test_p_values_are_uniform_without_a_relation(of_scores, of_counts, kernel):
    """5 % are significant at 5 %, within 3.5 binomial standard errors of 1,500 genes."""
    rng, positions = np.random.default_rng(1), irregular()
    scores, log_rate = (fields(rng, positions, at, kernel=kernel) for at in (of_scores, of_counts))
    p = p_of(rng, *ranks_of(rng, positions, scores, log_rate))
    assert 0.03 < (p <= 0.05).mean() < 0.07
    assert kstest(p, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("length", [8, 16])
def test_fields_as_smooth_as_the_tissue_is_wide(length):
    """What is left of the inflation; weights of neighbours alone would let through 20 %."""
    rng, positions = np.random.default_rng(2), irregular()
    scores, log_rate = fields(rng, positions, length), fields(rng, positions, length)
    p = p_of(rng, *ranks_of(rng, positions, scores, log_rate))
    assert 0.03 < (p <= 0.05).mean() < 0.085


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 8])
def test_larger_tissue_with_regions(length):
    """About 650 spots; rates have two values with smooth borders between them."""
    rng, positions = np.random.default_rng(3), irregular(40)
    scores, log_rate = fields(rng, positions, length), np.sign(fields(rng, positions, length))
    p = p_of(rng, *ranks_of(rng, positions, scores, log_rate))
    assert 0.03 < (p <= 0.05).mean() < 0.07


@pytest.mark.parametrize("length", [2, 4])
def test_permuting_spots_is_wrong(length):
    rng, positions = np.random.default_rng(4), irregular()
    scores, log_rate = fields(rng, positions, length), fields(rng, positions, length)
    scores, targets, _ = ranks_of(rng, positions, scores, log_rate)
    assert (permutation_p(rng, scores, targets) <= 0.05).mean() > 0.15


@pytest.mark.parametrize("length", [0, 2, 4])
def test_true_scores_are_significant(length):
    rng, positions = np.random.default_rng(5), irregular()
    log_rate = fields(rng, positions, length, n_genes=300)
    noisy = log_rate + 0.4 * fields(rng, positions, length, n_genes=300)
    p = p_of(rng, *ranks_of(rng, positions, noisy, log_rate))
    assert (p <= 0.05).mean() > 0.9
    against = p_of(rng, *ranks_of(rng, positions, -noisy, log_rate))
    assert against.min() > 0.05


def test_agrees_with_shifts_on_a_torus():
    """Shifting one of two periodic fields is exact, and p-values are nearly the same."""
    rng, side = np.random.default_rng(6), 14
    y, x = np.mgrid[0:side, 0:side].reshape(2, -1)
    near = np.exp(-(np.minimum(np.arange(side), side - np.arange(side)) ** 2) / 4)
    filtered = np.fft.fft2(np.outer(near, near))
    white = rng.normal(size=(2, 400, side, side))
    smooth = np.fft.ifft2(np.fft.fft2(white) * filtered).real.reshape(2, 400, -1)
    scores, targets = (unit_ranks(field.T) for field in smooth)
    as_grid = scores.reshape(side, side, -1)
    shifted = [
        np.roll(as_grid, (dy, dx), (0, 1)).reshape(len(scores), -1)
        for dy in range(side)
        for dx in range(side)
    ]
    by_shift = np.mean([(s * targets).sum(0) >= (scores * targets).sum(0) for s in shifted], axis=0)
    p = p_of(rng, scores, targets, np.c_[x, y])
    assert spearmanr(p, by_shift).statistic > 0.95
    assert np.abs(p - by_shift).mean() < 0.06


def test_several_sections():
    """Mean over sections of both: uniform without a relation, sharper with one."""
    rng, positions = np.random.default_rng(7), irregular()
    found = {}
    for signal in (0.0, 0.25):
        observed, nulls = [], []
        for _ in range(4):
            log_rate = fields(rng, positions, 2)
            scores = signal * log_rate + fields(rng, positions, 2)
            scores, targets, kept = ranks_of(rng, positions, scores, log_rate)
            observed.append((scores * targets).sum(0))
            nulls.append(null_correlations(scores, targets, moran_basis(kept), rng=rng))
        alone = (chance_of_more(observed[0], nulls[0]) <= 0.05).mean()
        p = chance_of_more(np.nanmean(observed, 0), np.nanmean(nulls, 0))
        found[signal] = alone, (p <= 0.05).mean()
    assert 0.03 < found[0.0][1] < 0.07
    assert found[0.25][1] > found[0.25][0] + 0.2


def test_basis_is_orthonormal_and_of_no_unit():
    rng = np.random.default_rng(8)
    positions = rng.uniform(0, 10, size=(40, 2))
    basis = moran_basis(positions)
    assert basis.shape == (40, 39)
    np.testing.assert_allclose(basis.T @ basis, np.eye(39), atol=1e-10)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-10)
    moved = moran_basis(positions @ [[0, 300], [-300, 0]] + 5000)
    np.testing.assert_allclose(np.abs(moved), np.abs(basis), atol=1e-6)
    # From coarse to fine: neighbours are alike in the first, and not in the last.
    distance = cdist(positions, positions) + 99 * np.eye(40)
    of_next = basis[distance.argmin(0)]
    assert (of_next * basis)[:, :5].sum() > 3 > -1 > (of_next * basis)[:, -5:].sum()


@pytest.mark.parametrize("positions", [np.zeros((5, 2)), np.repeat(np.eye(2), 3, axis=0)])
def test_basis_of_spots_in_one_place(positions):
    basis = moran_basis(positions)
    np.testing.assert_allclose(basis.T @ basis, np.eye(len(positions) - 1), atol=1e-10)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-10)


@pytest.mark.filterwarnings("error")
def test_a_gene_does_not_depend_on_the_others():
    rng, positions = np.random.default_rng(9), irregular()
    scores, targets = (unit_ranks(fields(rng, positions, 2, n_genes=5)) for _ in range(2))
    targets[:, 3] = np.nan
    basis = moran_basis(positions)
    whole = null_correlations(scores, targets, basis, rng=np.random.default_rng(0))
    part = null_correlations(scores[:, 1:2], targets[:, 1:2], basis, rng=np.random.default_rng(0))
    np.testing.assert_allclose(whole[:, 1:2], part, atol=1e-12)
    assert np.isnan(whole).any(0).tolist() == [False, False, False, True, False]
    p = chance_of_more((scores * targets).sum(0), whole)
    assert np.isnan(p).tolist() == [False, False, False, True, False]


def test_the_observed_is_one_of_the_draws():
    """With all signs alike a draw is the observed correlation itself; it counts as reached."""
    rng = np.random.default_rng(10)
    scores, targets = (unit_ranks(rng.normal(size=(4, 50))) for _ in range(2))
    null = null_correlations(scores, targets, moran_basis(rng.normal(size=(4, 2))), rng=rng)
    assert chance_of_more((scores * targets).sum(0), null).min() > 0.08
    assert chance_of_more(np.ones(50), np.zeros((999, 50))).tolist() == [1 / 1000] * 50


def test_false_discovery_rate_leaves_out_nan():
    p = np.random.default_rng(11).uniform(size=20) ** 2
    with_nan = np.insert(p, [0, 7], np.nan)
    adjusted = false_discovery_rate(with_nan)
    np.testing.assert_array_equal(np.isnan(adjusted), np.isnan(with_nan))
    np.testing.assert_allclose(adjusted[~np.isnan(with_nan)], false_discovery_control(p))
    assert np.isnan(false_discovery_rate(np.full(3, np.nan))).all()


def test_p_values_of_sections_are_those_of_each_alone():
    """By the parts of the public function; sections in sorted order, one stream of draws."""
    rng = np.random.default_rng(12)
    positions = np.tile(irregular(), (2, 1))
    n = len(positions) // 2
    section = np.repeat(["b", "a"], n)
    log_rate = np.concatenate([fields(rng, positions[:n], 2, n_genes=6) for _ in range(2)])
    library_size = rng.lognormal(np.log(5000), 0.65, 2 * n).round()
    counts = rng.poisson(library_size[:, None] / 5000 * 20 * np.exp(0.6 * log_rate))
    counts[section == "a", 5] = 0
    scores = log_rate * [1, 1, 1, 0, 0, 1] + fields(rng, positions, 0, n_genes=6) / 2
    spots = {"section": section, "library_size": library_size, "positions": positions}
    found = p_values(scores, counts, **spots, n_draws=199, seed=3)
    draws, expected = np.random.default_rng(3), []
    for name in "ab":
        own = section == name
        thinned = thinned_ranks(sparse.csr_matrix(counts[own]), library_size[own], rng=draws)
        ranks = unit_ranks(scores[own][thinned.kept])
        basis = moran_basis(positions[own][thinned.kept])
        null = null_correlations(ranks, thinned.ranks, basis, n_draws=199, rng=draws)
        expected.append(chance_of_more((ranks * thinned.ranks).sum(0), null))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.isnan(found), [[0, 0, 0, 0, 0, 1], [0] * 6])
    assert (found[:, :3] == 1 / 200).all()
    assert np.nanmin(found[:, 3:5]) > 0.01
