"""The ceiling is what scores of the true rates get, on sections whose rates are known."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from scipy.stats import gamma

import strank.metrics.ceiling as module
from strank.metrics.ceiling import Ceiling, noise_ceiling
from strank.metrics.correlation import log1p_cp10k, pearson, rank_correlation, spearman
from strank.metrics.depth import depth_matched_spearman, thin

_script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "error_rates.py"))
KNOWN_RATES, Rates, MEANS_OF_GRID = (_script[name] for name in ("KNOWN_RATES", "Rates", "MEANS"))
# As in the docstring.
STATED = {"flat": (0.04, 0.12), "smooth": (-0.064, 0.044), "two values": (-0.17, 0.073)}
MEANS, SPREADS = (0.1, 1.0, 10.0, 50.0), (0.0, 0.2, 0.5, 1.0)
N_GENES = 40
SCORES = Ceiling._fields


def tissue(rng, n_spots, *, depth_spread=0.65):
    """Library sizes and rates: N_GENES genes of every kind, kinds [n_means * n_spreads, 2]."""
    kinds = np.array([(mean, spread) for mean in MEANS for spread in SPREADS])
    mean, spread = np.repeat(kinds, N_GENES, axis=0).T
    shape = (n_spots, len(mean))
    pattern = rng.normal(size=shape)
    library_size = rng.lognormal(np.log(5000), depth_spread, n_spots).round()
    rates = np.exp(spread * pattern)
    return library_size, rates / rates.mean(0) * mean / library_size.mean(), kinds


def ceiling_of(counts, *, library_size, **how):
    """Of a single section, ``[n_genes]`` each."""
    section = np.zeros(len(library_size))
    found = noise_ceiling(counts, section=section, library_size=library_size, **how)
    return Ceiling(*(values[0] for values in found))


def draw(rng, library_size, rates):
    return sparse.csr_matrix(rng.poisson(library_size[:, None] * rates))


def scores_of_truth(rng, library_size, rates, n_repeats=15):
    """Mean scores of the true rates; of rates that are all the same, 0."""
    found = np.zeros((3, rates.shape[1]))
    section = np.zeros(len(rates))
    for _ in range(n_repeats):
        to = {"section": section, "library_size": library_size}
        counts = draw(rng, library_size, rates)
        found += np.nan_to_num(
            [
                spearman(rates, counts, **to)[0],
                pearson(np.log1p(1e4 * rates), counts, **to)[0],
                depth_matched_spearman(rates, counts, **to, n_draws=2)[0],
            ]
        )
    return found / n_repeats


def errors(seed, n_spots, **kwargs):
    """Ceiling less score of the truth, [3, n_kinds, N_GENES], and the kinds."""
    rng = np.random.default_rng(seed)
    library_size, rates, kinds = tissue(rng, n_spots, **kwargs)
    truth = scores_of_truth(rng, library_size, rates)
    ceiling = ceiling_of(draw(rng, library_size, rates), library_size=library_size)
    found = np.array([getattr(ceiling, name) for name in SCORES])
    return (found - truth).reshape(3, len(kinds), N_GENES), kinds


@pytest.mark.parametrize("n_spots", [180, pytest.param(700, marks=pytest.mark.slow)])
def test_bias_and_spread(n_spots):
    error, kinds = errors(n_spots, n_spots)
    bias, signal = np.nanmean(error, axis=2), kinds[:, 1] > 0
    assert (np.abs(bias[:, signal].mean(1)) < 0.025).all()
    assert (np.abs(bias[:, signal]) < 0.12).all()
    # Genes without signal get no 0, because a variance cannot be estimated below 0.
    assert (bias[:, ~signal] < 0.15).all()
    spread = np.nanstd(error, axis=2)
    assert spread.max() < (0.2 if n_spots == 180 else 0.13)
    well_counted = (kinds[:, 0] >= 10) & (kinds[:, 1] >= 0.5)
    assert spread[:, well_counted].max() < 0.05


@pytest.mark.parametrize(
    ("n_spots", "n_genes"),
    [(180, 20), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((180, 120), (700, 40)))],
)
def test_bias_is_what_is_stated(n_spots, n_genes):
    """Of smooth rates, of two values, and of none; worst of the grid, and five standard errors."""
    for of in (of for of in KNOWN_RATES if of.n_spots == n_spots):
        low, high = STATED["flat" if not of.spread else "two values" if of.share else "smooth"]
        error = of.errors(n_genes, seed=1, n_repeats=4)
        bias = np.nanmean(error, axis=2)
        allowed = 5 * np.nanstd(error, axis=2, ddof=1) / np.sqrt(n_genes) + 0.01
        assert (low - allowed < bias).all(), of
        assert (bias < high + allowed).all(), of


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_gene_of_two_values_has_the_ceiling_of_two_values(share):
    """20 times higher in some spots, well counted: by a gamma distribution alone .2 too high."""
    bias = Rates(180, 20, share).errors(20, seed=2).mean(2).T
    assert np.abs(bias[MEANS_OF_GRID.index(10) :]).max() < 0.1


def test_rates_given_counts_are_those_of_bayes():
    """For a gamma distribution, of which many spots say nothing else."""
    expected = np.full((4000, 1), 5.0)
    rng = np.random.default_rng(3)
    counts = rng.poisson(expected * rng.gamma(2, 1 / 2, size=expected.shape))
    classes, chance = module._rates_given_counts(counts, expected)
    drawn = np.concatenate([module._draw(classes, chance, rng) for _ in range(30)], axis=1)
    for c in (0, 4, 12):
        of_spots = drawn[counts[:, 0] == c].ravel()
        posterior = gamma(2 + c, scale=1 / (2 + 5))
        assert of_spots.mean() == pytest.approx(posterior.mean(), rel=0.08)
        assert of_spots.std() == pytest.approx(posterior.std(), rel=0.15)


def split_half(rng, counts, library_size):
    """The usual ceiling: correlation of two halves, by Spearman and Brown at full depth."""
    half = np.full(len(library_size), 0.5)
    first = thin(counts, half, rng)
    targets = [log1p_cp10k(x, library_size / 2).toarray() for x in (first, counts - first)]
    reliability = np.maximum(rank_correlation(*targets), 0)
    return np.sqrt(2 * reliability / (1 + reliability))


def test_depth_is_no_signal():
    """Halves share their spots' depth; for flat genes that is all that they share."""
    rng = np.random.default_rng(4)
    library_size, rates, kinds = tissue(rng, 180, depth_spread=1.5)
    counts = draw(rng, library_size, rates)
    flat = np.repeat((kinds[:, 1] == 0) & (kinds[:, 0] == 1), N_GENES)
    assert split_half(rng, counts[:, flat], library_size).mean() > 0.5
    ceiling = ceiling_of(counts[:, flat], library_size=library_size)
    assert max(getattr(ceiling, name).mean() for name in SCORES) < 0.15


def test_noise_beyond_poisson_counts_as_signal():
    """Of gamma-Poisson counts with no signal at all, a model is asked for the noise."""
    rng = np.random.default_rng(5)
    library_size = rng.lognormal(np.log(5000), 0.65, 180).round()
    noise = rng.gamma(2, 1 / 2, size=(180, 100))
    counts = rng.poisson(10 * library_size[:, None] / 5000 * noise)
    ceiling = ceiling_of(counts, library_size=library_size)
    assert min(getattr(ceiling, name).mean() for name in SCORES) > 0.7


def test_fewer_counts_lower_it():
    rng = np.random.default_rng(6)
    library_size, rates, _ = tissue(rng, 180)
    counts = draw(rng, library_size, rates)[:, -N_GENES:]
    tenth = thin(counts, np.full(180, 0.1), rng)
    full = ceiling_of(counts, library_size=library_size)
    less = ceiling_of(tenth, library_size=library_size / 10)
    for name in SCORES:
        assert getattr(less, name).mean() < getattr(full, name).mean() - 0.05


def test_the_truth_reaches_it():
    rng = np.random.default_rng(7)
    library_size, rates, _ = tissue(rng, 300)
    ceiling = ceiling_of(draw(rng, library_size, rates), library_size=library_size)
    truth = scores_of_truth(rng, library_size, rates, n_repeats=6)
    for name, score in zip(SCORES, truth, strict=True):
        both = np.isfinite(score) & np.isfinite(getattr(ceiling, name))
        assert 0.9 < score[both].sum() / getattr(ceiling, name)[both].sum() < 1.05


def test_blocks_of_genes_and_seeds(monkeypatch):
    rng = np.random.default_rng(8)
    counts = rng.poisson(rng.gamma(2, 2, size=(60, 7)))
    whole = ceiling_of(counts, library_size=np.full(60, 500.0), n_draws=200)
    again = ceiling_of(sparse.csr_matrix(counts), library_size=np.full(60, 500), n_draws=200)
    np.testing.assert_array_equal(whole.spearman, again.spearman)
    monkeypatch.setattr(module, "_BLOCK", 120)
    blocks = ceiling_of(counts, library_size=np.full(60, 500.0), n_draws=200)
    for name in SCORES:
        np.testing.assert_allclose(getattr(whole, name), getattr(blocks, name), atol=0.02)


@pytest.mark.filterwarnings("error")
def test_undefined_without_counts_or_spots():
    counts = np.c_[np.zeros(20), np.arange(20), np.zeros(20)]
    counts[0] = 0
    library_size = np.r_[0, np.full(19, 100)]
    ceiling = ceiling_of(counts, library_size=library_size)
    for name in SCORES:
        np.testing.assert_array_equal(np.isfinite(getattr(ceiling, name)), [False, True, False])
    one = ceiling_of(np.array([[3, 4]]), library_size=np.array([10]))
    assert np.isnan(one.spearman).all()
    assert ceiling_of(np.zeros((3, 0)), library_size=np.ones(3)).spearman.shape == (0,)


@pytest.mark.parametrize("wrong", [{"quantile": 1.0}, {"n_draws": 0}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\), and n_draws .* be >= 1"):
        ceiling_of(np.ones((3, 1)), library_size=np.ones(3), **wrong)
