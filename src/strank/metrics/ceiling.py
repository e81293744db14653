"""The noise ceiling: what a perfect model would score, given how few counts there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import gammaln

from strank.metrics.correlation import correlation, log1p_cp10k, rank_correlation
from strank.metrics.depth import deep_enough, thin

Array = NDArray[np.float64]

# Values of a dense block of genes.
_BLOCK = 1_000_000

_DISPERSIONS = np.geomspace(1e-4, 30, 40)


@dataclass(frozen=True)
class Ceiling:
    """Scores to expect from a model that knows the rate of every gene in every spot.

    Attributes
    ----------
    scc, pearson
        Of `strank.metrics.correlation.spearman` and of `strank.metrics.correlation.pearson` with
        log1p(CP10k), ``[n_genes]``; the latter for scores on the scale of that target.
    depth_matched
        Of `strank.metrics.depth.depth_matched_spearman`, ``[n_genes]``.
    """

    scc: Array
    pearson: Array
    depth_matched: Array


def noise_ceiling(
    counts: NDArray | sparse.spmatrix | sparse.sparray,
    *,
    library_size: NDArray,
    quantile: float = 0.1,
    n_draws: int = 10,
    seed: int = 0,
) -> Ceiling:
    r"""Estimate, for each gene of one section, the score of a model without error.

    Counts are taken as :math:`c_i \sim \mathrm{Poisson}(l_i\, p\, \lambda_i)`, where :math:`p` is
    the gene's share of all counts and :math:`\lambda_i`, gamma distributed with mean 1, is what a
    model should know. The variance of :math:`\lambda` is fitted by maximum likelihood; then rates
    are drawn from their distribution given the counts, counts are drawn from those rates, and the
    rates are scored against them, several times. Rates of well counted genes follow the tissue,
    whatever their distribution; for sparse genes it is the gamma assumption that speaks.

    The usual way, to split counts in halves (`split_half_ceiling`), needs no distribution. But both
    halves share the depth of their spots: for log1p(CP10k) it is up to 0.7 too high where depth
    varies as in real sections.

    All variance beyond Poisson counts as something to be predicted. Noise of other kinds, between
    neighbouring spots of one tissue, raises the ceiling: of real sections, read it as an upper
    bound. A model that knows depth besides rates can exceed `Ceiling.scc` and `Ceiling.pearson` of
    sparse genes; prefer `Ceiling.depth_matched`.

    Measured on simulated sections (180 and 700 spots, 0.1 to 50 counts a spot, log rates with a
    standard deviation of 0.2 to 1): 0.06 too low to 0.07 too high by kind of gene, and 0.01 too
    high in the mean over genes; if rates have two values only, 0.14 too low (sparse) to 0.14 too
    high (well counted). Genes without signal get 0.03 to 0.12 instead of 0. The estimate for one
    gene has a standard deviation of up to 0.17 if it is sparse: trust means over genes.

    Parameters
    ----------
    counts
        Raw counts of one section, ``[n_spots, n_genes]``.
    library_size
        A spot's total over all measured genes, ``[n_spots]``.
    quantile
        As in `strank.metrics.depth.depth_matched_spearman`.
    n_draws
        The mean over so many draws is taken.
    seed
        Of the draws.

    Returns
    -------
    Ceiling
        NaN for a gene without counts.

    Raises
    ------
    ValueError
        For a quantile or number of draws out of range.

    Examples
    --------
    >>> counts = np.random.default_rng(0).poisson(np.linspace([1, 1], [3, 200], 99))
    >>> noise_ceiling(counts, library_size=np.full(99, 5000)).depth_matched.round(1)
    array([0.3, 1. ])
    """
    if not 0 <= quantile < 1 or n_draws < 1:
        raise ValueError(f"quantile {quantile} must lie in [0, 1), and n_draws {n_draws} be >= 1")
    by_gene, library_size = sparse.csc_matrix(counts), np.asarray(library_size, dtype=np.float64)
    rng = np.random.default_rng(seed)
    width = max(_BLOCK // max(len(library_size), 1), 1)
    blocks = [
        _ceilings(by_gene[:, at : at + width].toarray(), library_size, quantile, n_draws, rng)
        for at in range(0, max(by_gene.shape[1], 1), width)
    ]
    return Ceiling(*np.concatenate(blocks, axis=1))


def _ceilings(
    counts: NDArray, library_size: Array, quantile: float, n_draws: int, rng: np.random.Generator
) -> Array:
    share = counts.sum(0) / max(library_size.sum(), 1.0)
    expected = library_size[:, None] * share
    shape = 1 / _dispersion(counts, expected)
    depth, kept = deep_enough(library_size, quantile)
    total, defined = np.zeros((3, counts.shape[1])), np.zeros((3, counts.shape[1]))
    for _ in range(n_draws):
        rate = rng.gamma(shape + counts, 1 / (shape + expected))
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


def _dispersion(counts: NDArray, expected: Array) -> Array:
    values, which = np.unique(counts, return_inverse=True)
    which, likelihood = which.reshape(counts.shape), []
    for dispersion in _DISPERSIONS:
        shape = 1 / dispersion
        of_counts = gammaln(values + shape) - gammaln(shape) + values * np.log(dispersion)
        of_zeros = (counts + shape) * np.log1p(dispersion * expected)
        likelihood.append((of_counts[which] - of_zeros).sum(0))
    return _DISPERSIONS[np.argmax(likelihood, axis=0)]


def split_half_ceiling(
    counts: NDArray | sparse.spmatrix | sparse.sparray,
    *,
    library_size: NDArray,
    quantile: float = 0.1,
    n_draws: int = 10,
    seed: int = 0,
) -> Array:
    r"""Estimate `Ceiling.depth_matched` by split-half reliability, without a distribution.

    Counts are thinned to one depth and dealt binomially to two halves. From the Spearman
    correlation :math:`r` of the halves, Spearman and Brown's formula gives the reliability at full
    depth, and :math:`\sqrt{2r / (1 + r)}` is what a model without error would score.

    Over-dispersion that is not tissue is shared by both halves, and counts as signal. The formula
    is for sums, not ranks: on the simulated sections of `noise_ceiling` it is up to 0.1 too high
    for sparse genes that vary much, and its standard deviation is 1.5 to 4 times as large.

    Parameters
    ----------
    counts, library_size, quantile, n_draws, seed
        As in `noise_ceiling`.

    Returns
    -------
    NDArray
        ``[n_genes]``; 0 where the halves disagree, NaN where one is constant in every draw.

    Examples
    --------
    >>> counts = np.random.default_rng(0).poisson(np.linspace([1, 1], [3, 200], 99))
    >>> split_half_ceiling(counts, library_size=np.full(99, 5000)).round(1)
    array([0.4, 1. ])
    """
    depth, kept = deep_enough(library_size, quantile)
    by_gene, rng = sparse.csc_matrix(counts)[kept], np.random.default_rng(seed)
    keep, half = depth / np.maximum(np.asarray(library_size)[kept], depth), np.full(kept.sum(), 0.5)
    width, found = max(_BLOCK // max(len(half), 1), 1), []
    for at in range(0, max(by_gene.shape[1], 1), width):
        drawn = []
        for _ in range(n_draws):
            matched = thin(by_gene[:, at : at + width], keep, rng)
            first = thin(matched, half, rng)
            drawn.append(rank_correlation(first.toarray(), (matched - first).toarray()))
        known = np.isfinite(drawn)
        total, n = np.where(known, drawn, 0.0).sum(0), known.sum(0)
        mean = np.divide(total, n, out=np.full(n.shape, np.nan), where=n > 0)
        found.append(np.sqrt(2 * np.maximum(mean, 0) / (1 + np.maximum(mean, 0))))
    return np.concatenate(found)


def fraction_of_ceiling(score: NDArray, ceiling: NDArray) -> float:
    """Mean score over mean ceiling, of the genes that have both: ceilings near 0 do no harm.

    Parameters
    ----------
    score, ceiling
        Of the same shape.

    Returns
    -------
    float
        NaN if no gene has both.

    Examples
    --------
    >>> fraction_of_ceiling(np.array([0.3, 0.1, 0.9]), np.array([0.6, 0.2, np.nan]))
    0.5
    """
    both = np.isfinite(score) & np.isfinite(ceiling)
    best = float(ceiling[both].sum())
    return float(score[both].sum()) / best if best > 0 else float("nan")
