"""P-values are uniform for fields that have nothing in common, however smooth they are."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control, pearsonr, spearmanr

from strank.metrics.correlation import unit_columns, unit_ranks
from strank.metrics.depth import thinned_ranks
from strank.metrics.significance import (
    _LEAST_SPOTS,
    SpatialNull,
    combine_sections,
    false_discovery_rate,
    moran_basis,
    p_values,
)

_script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "error_rates.py"))
fields, irregular, hexagonal, ranks_of = (
    _script[name] for name in ("fields", "irregular", "hexagonal", "ranks_of")
)
UNRELATED, EDGES, power = (_script[name] for name in ("UNRELATED", "EDGES", "power"))
N_GENES = 1500
# As in the docstring of p_values.
STATED_5, STATED_1, STATED_EDGE = 0.061, 0.023, 0.37
POWER = {"hexagonal": (1.0, 0.80, 0.32), "irregular": (0.93, 0.40, 0.14)}


def p_of(rng, scores, targets, positions):
    return SpatialNull.of(positions).p_values(scores, targets, rng=rng)


def permutation_p(rng, scores, targets, n_draws=199):
    null = [(scores[rng.permutation(len(scores))] * targets).sum(0) for _ in range(n_draws)]
    return (1 + (np.array(null) >= (scores * targets).sum(0)).sum(0)) / (1 + n_draws)


# What is stated, and three and a half binomial standard errors of so many fields.
def highest(rate, n):
    return rate + 3.5 * np.sqrt(rate * (1 - rate) / n)


@pytest.mark.parametrize("n_genes", [200, pytest.param(3_000, marks=pytest.mark.slow)])
def test_unrelated_maps_are_called_as_rarely_as_is_stated(n_genes):
    called = np.array([maps.share_called(n_genes, seed=1) for maps in UNRELATED])
    assert called[:, 0].max() < highest(STATED_5, n_genes)
    assert called[:, 1].max() < highest(STATED_1, n_genes)
    # Far less on the whole: two nulls must be refused.
    assert 0.01 < called[:, 0].mean() < 0.04


def test_what_follows_the_edge_is_called_too_often():
    """As is stated."""
    called = max(maps.share_called(200, seed=1)[0] for maps in EDGES)
    assert 0.2 < called < highest(STATED_EDGE, 200)


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 8])
def test_larger_tissue_with_regions(length):
    """About 650 spots; rates have two values with smooth borders between them."""
    rng, positions = np.random.default_rng(3), irregular(40)
    scores = fields(rng, positions, length, N_GENES)
    log_rate = np.sign(fields(rng, positions, length, N_GENES))
    p = p_of(rng, *ranks_of(rng, positions, scores, log_rate))
    assert 0.01 < (p <= 0.05).mean() < 0.07


@pytest.mark.parametrize("length", [2, 4])
def test_permuting_spots_is_wrong(length):
    rng, positions = np.random.default_rng(4), irregular()
    scores, log_rate = (fields(rng, positions, length, N_GENES) for _ in range(2))
    scores, targets, _ = ranks_of(rng, positions, scores, log_rate)
    assert (permutation_p(rng, scores, targets) <= 0.05).mean() > 0.15


@pytest.mark.parametrize(("length", "least"), [(0, 0.95), (2, 0.95), (4, 0.85)])
def test_true_scores_are_significant(length, least):
    rng, positions = np.random.default_rng(5), irregular()
    log_rate = fields(rng, positions, length, n_genes=300)
    noisy = log_rate + 0.4 * fields(rng, positions, length, n_genes=300)
    p = p_of(rng, *ranks_of(rng, positions, noisy, log_rate))
    assert (p <= 0.05).mean() > least
    against = p_of(rng, *ranks_of(rng, positions, -noisy, log_rate))
    assert against.min() > 0.05


def test_true_rates_as_wide_as_the_tissue_are_often_missed():
    """As stated, for a quarter, half and the whole of the tissue."""
    for layout, stated in POWER.items():
        for length, share in zip((0.25, 0.5, 1), stated, strict=True):
            assert power(layout, length, 400, seed=1)[0] == pytest.approx(share, abs=0.09)


def test_agrees_with_shifts_on_a_torus():
    """Shifting one of two periodic fields is exact; the two nulls are near it."""
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
    null = SpatialNull.of(np.c_[x, y])
    trend = null._chance_beyond_trends(scores, targets, 999, rng)
    smooth = null._chance_as_smooth(scores, targets)
    assert spearmanr(smooth, by_shift).statistic > 0.98
    assert np.abs(smooth - by_shift).mean() < 0.05
    assert spearmanr(trend, by_shift).statistic > 0.8
    np.testing.assert_array_equal(
        null.p_values(scores, targets, rng=np.random.default_rng(0)),
        np.maximum(
            smooth, null._chance_beyond_trends(scores, targets, 999, np.random.default_rng(0))
        ),
    )


def test_white_noise_is_worth_all_its_spots():
    """Then the null of smoothness is the usual test of a correlation, but for its chance lags."""
    rng, positions = np.random.default_rng(14), hexagonal()
    scores, targets = (unit_columns(rng.normal(size=(len(positions), 300))) for _ in range(2))
    p = SpatialNull.of(positions)._chance_as_smooth(scores, targets)
    expected = [
        pearsonr(s, c, alternative="greater").pvalue
        for s, c in zip(scores.T, targets.T, strict=True)
    ]
    assert np.abs(p - expected).mean() < 0.02
    assert np.abs(p - expected).max() < 0.1


def test_products_by_distance_are_those_of_a_loop():
    rng = np.random.default_rng(15)
    y, x = np.mgrid[:5, :7].reshape(2, -1).astype(float)
    kept = rng.random(35) < 0.8
    positions, values = np.c_[x, y][kept] * 250 + 40, rng.normal(size=(kept.sum(), 3))
    distance = np.rint(cdist(positions, positions) / 250).astype(int)
    found = SpatialNull.of(positions)._products(values)
    for k in range(found.shape[1]):
        expected = [v @ (distance == k) @ v for v in values.T]
        np.testing.assert_allclose(found[:, k], expected, atol=1e-9)


@pytest.mark.parametrize("share", [1 / 8, 1 / 4, 1 / 2])
def test_independent_spots_are_those_of_the_variance_of_correlations(share):
    """Of n independent spots it is 1 / (n - 1); noise makes a pattern no finer."""
    rng, positions = np.random.default_rng(16), hexagonal()
    pattern = fields(rng, positions, share * 14.5, 1000)
    null = SpatialNull.of(positions)
    r = (unit_columns(pattern) * unit_columns(fields(rng, positions, share * 14.5, 1000))).sum(0)
    for noise in (0.0, 0.7):
        seen = unit_columns(pattern + noise * rng.normal(size=pattern.shape))
        worth = np.nanmedian(null.independent_spots(seen))
        assert worth == pytest.approx(1 + 1 / r.var(), rel=0.35)
    assert (worth < _LEAST_SPOTS) == (share == 1 / 2)
    assert np.isnan(null.independent_spots(rng.normal(size=(210, 50)))).mean() > 0.5


def test_it_warns_of_patterns_as_wide_as_the_tissue():
    """Two of six genes have the same wide wave."""
    rng, positions = np.random.default_rng(17), hexagonal()
    rate = np.tile(10.0, (210, 6))
    rate[:, :2] = 200 * np.exp(2 * np.sin(positions[:, :1] / 5))
    spots = {"section": np.zeros(210), "library_size": np.full(210, 5000), "positions": positions}
    with pytest.warns(UserWarning, match="2 of 6 patterns of genes in sections are as wide as the"):
        p_values(rate, rng.poisson(rate), **spots, n_draws=19)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p_values(rate[:, 2:], rng.poisson(rate[:, 2:]), **spots, n_draws=19)


def test_several_sections():
    """Together as rarely called without a relation, and more often with one."""
    rng, positions = np.random.default_rng(7), irregular()
    found = {}
    for signal in (0.0, 0.25):
        p = []
        for _ in range(4):
            log_rate = fields(rng, positions, 2, N_GENES)
            scores = signal * log_rate + fields(rng, positions, 2, N_GENES)
            p.append(p_of(rng, *ranks_of(rng, positions, scores, log_rate)))
        found[signal] = (p[0] <= 0.05).mean(), (combine_sections(np.array(p)) <= 0.05).mean()
    assert found[0.0][1] < 0.06
    assert found[0.25][1] > found[0.25][0] + 0.2


def test_basis_is_orthonormal_and_of_no_unit():
    rng = np.random.default_rng(8)
    positions = rng.uniform(0, 10, size=(40, 2))
    basis = moran_basis(positions)
    # A level, the distance to the centre, that to all others, both squared, and crowding.
    assert basis.shape == (40, 32)
    np.testing.assert_allclose(basis.T @ basis, np.eye(32), atol=1e-10)
    radius = np.linalg.norm(positions - positions.mean(0), axis=1)
    for trend in (np.ones(40), radius, radius**2, cdist(positions, positions).mean(0)):
        np.testing.assert_allclose(basis.T @ trend, 0, atol=1e-7)
    moved = moran_basis(positions @ [[0, 300], [-300, 0]] + 5000)
    np.testing.assert_allclose(np.abs(moved), np.abs(basis), atol=1e-5)
    # From coarse to fine: neighbours are alike in the first, and not in the last.
    distance = cdist(positions, positions) + 99 * np.eye(40)
    of_next = basis[distance.argmin(0)]
    assert (of_next * basis)[:, :5].sum() > 2 > -1 > (of_next * basis)[:, -5:].sum()


@pytest.mark.parametrize("positions", [np.zeros((5, 2)), np.repeat(np.eye(2), 3, axis=0)])
def test_basis_of_spots_in_one_place(positions):
    basis = moran_basis(positions)
    assert basis.shape[1] >= len(positions) - 4
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=1e-10)
    np.testing.assert_allclose(basis.sum(0), 0, atol=1e-10)


@pytest.mark.filterwarnings("error")
def test_a_gene_does_not_depend_on_the_others():
    rng, positions = np.random.default_rng(9), irregular()
    scores, targets = (unit_ranks(fields(rng, positions, 2, n_genes=5)) for _ in range(2))
    targets[:, 3] = np.nan
    null = SpatialNull.of(positions)
    whole = null.p_values(scores, targets, rng=np.random.default_rng(0))
    part = null.p_values(scores[:, 1:2], targets[:, 1:2], rng=np.random.default_rng(0))
    np.testing.assert_allclose(whole[1:2], part, atol=1e-12)
    assert np.isnan(whole).tolist() == [False, False, False, True, False]
    assert np.isnan(null.independent_spots(targets)).tolist() == [0, 0, 0, 1, 0]


@pytest.mark.filterwarnings("error")
def test_few_spots_are_never_significant():
    """With all signs alike a draw is the observed correlation itself; it counts as reached."""
    rng = np.random.default_rng(10)
    for n in (1, 2, 4, 9):
        scores, targets = (unit_ranks(rng.normal(size=(n, 50))) for _ in range(2))
        p = p_of(rng, scores, targets, rng.normal(size=(n, 2)))
        assert np.isnan(p).all() if n == 1 else p.min() > 0.08


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
        null = SpatialNull.of(positions[own][thinned.kept])
        expected.append(null.p_values(ranks, thinned.ranks, n_draws=199, rng=draws))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.isnan(found), [[0, 0, 0, 0, 0, 1], [0] * 6])
    assert (found[:, :3] == 1 / 200).all()
    assert np.nanmin(found[:, 3:5]) > 0.01
