"""The noise ceiling: what a perfect model would score, given how few counts there are."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import gammaln
from scipy.stats import gamma

from strank.functional.groups import rows_of
from strank.metrics.correlation import correlation, log1p_cp10k, rank_correlation
from strank.metrics.depth import check_draws, deep_enough

_Array = NDArray[np.float64]

_DISPERSIONS = np.geomspace(1e-4, 30, 40)
# Rates of a gene are taken from so many classes: of the gamma distribution's mass between these
# edges, finer where a few spots have most counts.
_EDGES = np.r_[0, np.geomspace(1e-3, 0.05, 5), np.linspace(0.1, 0.9, 17)]
_EDGES = np.r_[_EDGES, 1 - np.geomspace(0.07, 1e-4, 8), 1]
# From the gamma distribution to the one of highest likelihood, as far as the data of a sparse gene
# can say: more steps order well counted genes better, and sparse genes of two values worse.
_STEPS = 10
# Values of a dense block of genes.
_BLOCK = 1_000_000 // len(_EDGES)


class Ceiling(NamedTuple):
    """Of a model that knows every rate, ``[n_sections, n_genes]`` each."""

    spearman: _Array
    pearson: _Array
    depth_matched: _Array


def noise_ceiling(
    counts: NDArray | sparse.spmatrix | sparse.sparray,
    *,
    section: NDArray,
    library_size: NDArray,
    quantile: float = 0.1,
    n_draws: int = 10,
    seed: int = 0,
) -> Ceiling:
    r"""Estimate, for each section and gene, the score of a model without error.

    Counts are taken as :math:`c_i \sim \mathrm{Poisson}(l_i\, p\, \lambda_i)`, where :math:`p` is
    the gene's share of all counts and :math:`\lambda_i`, gamma distributed with mean 1, is what a
    model should know. The variance of :math:`\lambda` is fitted by maximum likelihood, and its
    distribution then follows the counts by ten steps of EM (of Laird's nonparametric likelihood);
    rates are drawn from their distribution given the counts, counts are drawn from those rates, and
    the rates are scored against them, several times. Rates of well counted genes follow the tissue,
    whatever their distribution, also of two values; for sparse genes it is the gamma assumption
    that speaks.

    The usual way, to split counts in halves, needs no distribution. But both halves share the depth
    of their spots: for log1p(CP10k) it is up to 0.7 too high where depth varies as in real
    sections.

    All variance beyond Poisson counts as something to be predicted. Noise of other kinds, between
    neighbouring spots of one tissue, raises the ceiling: of real sections, read it as an upper
    bound. A model that knows depth besides rates can exceed ``spearman`` and ``pearson`` of sparse
    genes; prefer ``depth_matched``.

    Measured on simulated sections (180 and 700 spots, 0.1 to 50 counts a spot), mean over genes of
    a kind, the worst of the grid: with log rates of a standard deviation of 0.2 to 1.5, 0.06 too
    low to 0.04 too high; with two values, 2 to 20 times apart, 0.17 too low (for sparse genes that
    are 20 times higher in a tenth of the spots) to 0.07 too high. Genes without signal get 0.05 to
    0.12 instead of 0. Over all kinds with signal it is up to 0.02 too low. The
    estimate for one gene has a standard deviation of up to 0.2 if it is sparse: trust means over
    genes.

    Parameters
    ----------
    counts
        Raw counts, ``[n_spots, n_genes]``.
    section, library_size
        As in `spearman`.
    quantile
        As in `depth_matched_spearman`.
    n_draws
        The mean over so many draws is taken.
    seed
        Of the draws.

    Returns
    -------
    spearman, pearson, depth_matched
        Of `spearman`, of `pearson` for scores on the scale of log1p(CP10k), and of
        `depth_matched_spearman`: ``[n_sections, n_genes]`` each, sections in sorted order; NaN for
        a gene without counts.

    Raises
    ------
    ValueError
        For a quantile or number of draws out of range.

    Examples
    --------
    >>> counts = np.random.default_rng(0).poisson(np.linspace([1, 1], [3, 200], 99))
    >>> spots = {"section": np.zeros(99), "library_size": np.full(99, 5000)}
    >>> noise_ceiling(counts, **spots).depth_matched.round(1)
    array([[0.4, 1. ]])
    """
    check_draws(quantile, n_draws)
    by_spot, rng, found = (
        sparse.csr_matrix(counts, dtype=np.float64),
        np.random.default_rng(seed),
        [],
    )
    for rows in rows_of(section):
        by_gene, depth = by_spot[rows].tocsc(), np.asarray(library_size, dtype=np.float64)[rows]
        width = max(_BLOCK // len(rows), 1)
        blocks = [
            _ceilings(by_gene[:, at : at + width].toarray(), depth, quantile, n_draws, rng)
            for at in range(0, max(by_gene.shape[1], 1), width)
        ]
        found.append(np.concatenate(blocks, axis=1))
    return Ceiling(*np.stack(found, axis=1))


def _ceilings(
    counts: NDArray, library_size: _Array, quantile: float, n_draws: int, rng: np.random.Generator
) -> _Array:
    share = counts.sum(0) / max(library_size.sum(), 1.0)
    expected = library_size[:, None] * share
    classes, chance = _rates_given_counts(counts, expected)
    depth, kept = deep_enough(library_size, quantile)
    total, defined = np.zeros((3, counts.shape[1])), np.zeros((3, counts.shape[1]))
    for _ in range(n_draws):
        rate = _draw(classes, chance, rng)
        target = log1p_cp10k(rng.poisson(expected * rate), library_size).toarray()
        scores = np.stack(
            [
                rank_correlation(rate, target),
                correlation(np.log1p(1e4 * share * rate), target),
                rank_correlation(rate[kept], rng.poisson(depth * share * rate[kept])),
            ]
        )
        defined += np.isfinite(scores)
        total += np.nan_to_num(scores)
    mean = np.divide(total, defined, out=np.full(total.shape, np.nan), where=defined > 0)
    return np.maximum(mean, 0)


def _rates_given_counts(counts: NDArray, expected: _Array) -> tuple[_Array, _Array]:
    """Find classes of rates, ``[n_genes, n_classes]``, and the chance of each given the counts.

    Chances are summed up over the classes, ``[n_spots, n_genes, n_classes]``, and those of the
    n-th spot and gene begin at n.
    """
    classes = _gamma_classes()[_dispersion(counts, expected)]
    likelihood = counts[..., None] * np.log(classes)
    likelihood -= expected[..., None] * classes
    likelihood -= likelihood.max(2, keepdims=True)
    np.exp(likelihood, out=likelihood)
    mass = np.broadcast_to(np.diff(_EDGES), classes.shape)
    for _ in range(_STEPS):
        whole = np.einsum("sgk,gk->sg", likelihood, mass)
        mass = mass * np.einsum("sgk,sg->gk", likelihood, 1 / whole) / len(counts)
    likelihood *= mass
    chance = np.cumsum(likelihood, axis=2, out=likelihood)
    chance /= chance[:, :, -1:]
    # All distributions in a row, each from its own whole number on, so that one search draws all.
    chance += np.arange(counts.size).reshape(*counts.shape, 1)
    return classes, chance


def _draw(classes: _Array, chance: _Array, rng: np.random.Generator) -> _Array:
    """Draw the rate of every spot and gene from its distribution, ``[n_spots, n_genes]``."""
    n_spots, n_genes, n_classes = chance.shape
    row = np.arange(n_spots * n_genes)
    at = np.searchsorted(chance.ravel(), row + rng.random(len(row))) - row * n_classes
    which = at.clip(0, n_classes - 1).reshape(n_spots, n_genes)
    return np.asarray(classes[np.arange(n_genes), which])


@cache
def _gamma_classes() -> _Array:
    """Medians of classes of gamma distributions of mean 1, ``[n_dispersions, n_classes]``."""
    at, dispersion = (_EDGES[1:] + _EDGES[:-1]) / 2, _DISPERSIONS[:, None]
    return np.maximum(gamma.ppf(at, 1 / dispersion, scale=dispersion), 1e-9)


def _dispersion(counts: NDArray, expected: _Array) -> NDArray[np.intp]:
    """Find which of the dispersions is most likely, ``[n_genes]``."""
    values, which = np.unique(counts, return_inverse=True)
    which, likelihood = which.reshape(counts.shape), []
    for dispersion in _DISPERSIONS:
        shape = 1 / dispersion
        of_counts = gammaln(values + shape) - gammaln(shape) + values * np.log(dispersion)
        of_zeros = (counts + shape) * np.log1p(dispersion * expected)
        likelihood.append((of_counts[which] - of_zeros).sum(0))
    return np.argmax(likelihood, axis=0)
