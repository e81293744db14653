"""Scores that know nothing of depth: arrays in, ``[n_sections, n_genes]`` out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from strank.functional.groups import rows_of
from strank.metrics.correlation import unit_ranks

# Genes at a time: draws are dense for so many.
_GENES = 1024


@dataclass(frozen=True)
class ThinnedRanks:
    """Ranks of the counts of one section after thinning to one depth."""

    kept: NDArray[np.bool_]  # spots that have at least the depth
    # Of those, the mean of the draws' `unit_ranks`, [n_kept, n_genes]: the product with the unit
    # ranks of scores is the mean Spearman correlation.
    ranks: NDArray[np.float64]


def depth_matched_spearman(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
    quantile: float = 0.1,
    n_draws: int = 10,
    seed: int = 0,
) -> NDArray[np.float64]:
    r"""Spearman correlation with counts after thinning every spot of a section to one depth.

    It measures how well the order of the spots is predicted, with depth taken out: spot
    :math:`i` keeps each of its counts with probability :math:`D / l_i`, where :math:`D` is a
    quantile of the section's library sizes, and spots below it are left out. For Poisson or
    gamma-Poisson counts without signal the thinned counts are alike in all spots, so any function
    of depth scores 0.

    What can fool it: scores of sections with other depths are not on one scale (the shallower,
    the lower; see `noise_ceiling`), and noise that is shared between neighbours.

    Parameters
    ----------
    scores, counts, section, library_size
        As in `spearman`.
    quantile
        Of library size, at least 0 and below 1.
    n_draws
        The mean over so many thinnings is taken; one that leaves a gene constant counts as 0.
    seed
        Of the draws.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``, sections in sorted order; NaN where the order is undefined, as in
        `spearman`.

    Raises
    ------
    ValueError
        For a quantile or number of draws out of range.

    Examples
    --------
    >>> scores, counts = np.array([[1.0], [2.0], [3.0]]), np.array([[10], [500], [90_000]])
    >>> depth = np.array([1_000, 10_000, 1_000_000])
    >>> depth_matched_spearman(scores, counts, section=np.zeros(3), library_size=depth, quantile=0)
    array([[1.]])
    """
    counts, rng, found = sparse.csr_matrix(counts), np.random.default_rng(seed), []
    for rows in rows_of(section):
        thinned = thinned_ranks(
            counts[rows], library_size[rows], quantile=quantile, n_draws=n_draws, rng=rng
        )
        found.append((unit_ranks(scores[rows][thinned.kept]) * thinned.ranks).sum(0))
    return np.stack(found)


def thinned_ranks(
    counts: sparse.csr_matrix,
    library_size: NDArray,
    *,
    quantile: float = 0.1,
    n_draws: int = 10,
    rng: np.random.Generator,
) -> ThinnedRanks:
    """Thin the counts of one section to one depth, several times, and rank them."""
    check_draws(quantile, n_draws)
    depth, kept = deep_enough(library_size, quantile)
    deeper = np.maximum(np.asarray(library_size, dtype=np.float64)[kept], depth)
    by_gene, keep = sparse.csc_matrix(counts[kept]), depth / deeper
    blocks = [
        _mean_ranks(by_gene[:, start : start + _GENES], keep, n_draws, rng)
        for start in range(0, max(by_gene.shape[1], 1), _GENES)
    ]
    return ThinnedRanks(kept, np.concatenate(blocks, axis=1))


def check_draws(quantile: float, n_draws: int) -> None:
    """Refuse a quantile of depth, or a number of draws, out of range."""
    if not 0 <= quantile < 1 or n_draws < 1:
        raise ValueError(f"quantile {quantile} must lie in [0, 1), and n_draws {n_draws} be >= 1")


def deep_enough(library_size: NDArray, quantile: float = 0.1) -> tuple[float, NDArray[np.bool_]]:
    """Find the depth that spots of a section are matched at, and which spots have it."""
    library_size = np.asarray(library_size, dtype=np.float64)
    depth = max(float(np.quantile(library_size, quantile)), 1.0)
    # A section without counts keeps its spots, so that its genes are undefined like any constant.
    return depth, library_size >= min(depth, library_size.max())


def _mean_ranks(
    counts: sparse.csc_matrix, keep: NDArray, n_draws: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    total, defined = np.zeros(counts.shape), np.zeros(counts.shape[1])
    for _ in range(n_draws):
        ranks = unit_ranks(thin(counts, keep, rng).toarray())
        defined += np.isfinite(ranks).all(0)
        total += np.nan_to_num(ranks)
    # Not the mean of those defined: a gene's few counts are drawn more often from deep spots.
    return np.where(defined > 0, total / n_draws, np.nan)


def thin(counts: sparse.spmatrix, keep: NDArray, rng: np.random.Generator) -> sparse.csc_matrix:
    """Keep every count of a spot with a probability: binomial thinning."""
    thinned = sparse.csc_matrix(counts).astype(np.int64)
    thinned.data = rng.binomial(thinned.data, keep[thinned.indices])
    return thinned


def lift(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
    relative: bool = False,
) -> NDArray[np.float64]:
    r"""Gini with exposure: how far counts outrun library size when spots are ordered by score.

    The ordered Lorenz curve has the share of library size of the lowest scored spots on its x axis
    and the share of their counts on its y axis (Frees, Meyers and Cummings, 2011). Twice the area
    between diagonal and curve is

    .. math::
        \frac{\sum_{ij} c_i\, l_j\, \mathrm{sign}(r_i - r_j)}{\sum_i c_i \sum_j l_j}

    the chance that a random count lies in a higher scored spot than a random unit of depth does,
    less the chance of the opposite. Between -1 and 1; equal scores count as neither. Where shares
    have nothing to do with depth, any function of depth scores 0 for Poisson counts. Counts whose
    rates vary beyond depth, by the dispersion :math:`\phi` (variance over squared mean), share what
    varies with the denominator, and shift it by at most

    .. math::
        \phi \sum_{ij} l_i^2\, l_j\, \mathrm{sign}(l_i - l_j) \Big/ \Big(\sum_i l_i\Big)^3

    below 0 for scores that rise with depth, above for those that fall. Measured, for scores that
    are depth, 0.1 to 20 counts a spot and log depth of a standard deviation of 0.4, 0.65, 0.9 and
    1.2: at 200 spots -0.001, -0.003, -0.005 and -0.009 for a dispersion of 1, and -0.006, -0.012,
    -0.021 and -0.038 for 5; at 1,000 spots a fourth; at worst, at 50 spots, -0.025 and -0.096.

    What can fool it: a few spots with most of the counts decide it; and it is small for a gene that
    varies little, however well it is ordered. ``relative`` compares with the best order there
    is, which for sparse genes is mostly noise.

    Parameters
    ----------
    scores, counts, section, library_size
        As in `spearman`.
    relative
        Divide by the lift of the best order, that of the observed shares.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``, sections in sorted order; NaN for a gene without counts, or,
        where relative, whose best lift is 0.

    Examples
    --------
    >>> scores, counts = np.array([[1.0], [2.0]]), np.array([[1], [3]])
    >>> spots = {"section": np.zeros(2), "library_size": np.array([100, 100])}
    >>> lift(scores, counts, **spots), lift(scores, counts, relative=True, **spots)
    (array([[0.25]]), array([[1.]]))
    """
    counts, found = sparse.csr_matrix(counts), []
    for rows in rows_of(section):
        observed = counts[rows].toarray().astype(np.float64)
        exposure = np.asarray(library_size[rows], dtype=np.float64)
        gini = _gini(scores[rows], observed, exposure)
        if relative:
            share = observed / np.where(exposure > 0, exposure, 1.0)[:, None]
            best = _gini(share, observed, exposure)
            gini = np.divide(gini, best, out=np.full(gini.shape, np.nan), where=best > 0)
        found.append(gini)
    return np.stack(found)


def _gini(scores: NDArray, counts: NDArray, exposure: NDArray) -> NDArray[np.float64]:
    order = np.argsort(scores, axis=0, kind="stable")
    ordered, counts = (np.take_along_axis(values, order, 0) for values in (scores, counts))
    # Exposure of all lower scored spots, and of those with equal or lower scores.
    reached = np.vstack([np.zeros(counts.shape[1]), np.cumsum(exposure[order], axis=0)])
    position = np.arange(len(scores))[:, None]
    rises = ordered[1:] != ordered[:-1]
    edge = np.ones((1, counts.shape[1]), dtype=bool)
    first = np.maximum.accumulate(np.where(np.vstack([edge, rises]), position, 0), axis=0)
    last = np.where(np.vstack([rises, edge]), position, len(scores) - 1)
    last = np.minimum.accumulate(last[::-1], axis=0)[::-1]
    below, up_to = (np.take_along_axis(reached, at, 0) for at in (first, last + 1))
    # The sum as it was accumulated, so that scores without order are left with exactly 0.
    total = reached[-1]
    above_less = (counts * (below + up_to - total)).sum(0)
    norm = total * counts.sum(0)
    return np.divide(above_less, norm, out=np.full(norm.shape, np.nan), where=norm > 0)
