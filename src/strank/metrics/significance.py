"""Whether a gene is predicted at all, and how surely a mean is known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control, norm

from strank.functional.groups import rows_of
from strank.metrics.correlation import unit_ranks
from strank.metrics.depth import check_draws, thinned_ranks

_Array = NDArray[np.float64]
_LEAST_P = 1e-3


class Intervals(NamedTuple):
    """Means and the ends of their 95 % intervals, ``[n_tables]`` each."""

    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def mean_intervals(values: NDArray, *, n_draws: int = 2000, seed: int = 0) -> Intervals:
    """Mean of tables of sections by genes, and its bootstrap interval over sections and genes.

    Every section weighs the same: the mean over sections of the mean over genes. Sections and
    genes are drawn with replacement, independently of each other (Owen 2007, the pigeonhole
    bootstrap), since all genes of a section share its spots, and all sections a gene's nature. Of
    the difference of two methods on the same genes and sections it is the paired interval.

    It does not know that models of different folds share training sections, and with few sections
    it is too narrow: with one, it is over genes only.

    Parameters
    ----------
    values
        ``[n_tables, n_sections, n_genes]``, of the same sections and genes; NaN where a gene has
        no value in a section. All tables see the same draws, and what is found of a table does
        not depend on the others beside it, to the last digit.
    n_draws, seed
        Of the bootstrap.

    Returns
    -------
    Intervals
        NaN for a table without values.

    Examples
    --------
    >>> found = mean_intervals(np.array([[[0.2, 0.4], [0.2, np.nan]], [[0.5, 0.5], [0.5, 0.5]]]))
    >>> found.mean, found.low[1], found.high[1]
    (array([0.25, 0.5 ]), np.float64(0.5), np.float64(0.5))
    """
    rng, (_, n_sections, n_genes) = np.random.default_rng(seed), values.shape
    sections, genes = (
        rng.multinomial(n, np.full(n, 1 / n), size=n_draws).astype(np.float64)
        for n in (n_sections, n_genes)
    )
    known = np.isfinite(values)
    # Of every table and section: the sum over the genes of a draw, and how many have a value. A
    # product for each table, whose rounding would else depend on how many tables there are.
    total, number = (
        np.ascontiguousarray(table, dtype=np.float64) @ genes.T
        for table in (np.where(known, values, 0.0), known)
    )
    by_section = np.divide(total, number, out=np.zeros_like(total), where=number > 0)
    # A section none of whose genes was drawn has no mean in that draw.
    weight = sections.T * (number > 0)
    n_drawn = weight.sum(1)
    nothing = np.full(n_drawn.shape, np.nan)
    means = np.divide((weight * by_section).sum(1), n_drawn, out=nothing, where=n_drawn > 0)
    return Intervals(_mean(values, known), *_quantiles(means))


def _mean(values: NDArray, known: NDArray) -> NDArray[np.float64]:
    n = known.sum(2)
    sums = np.where(known, values, 0.0).sum(2)
    by_section = np.divide(sums, n, out=np.zeros(n.shape), where=n > 0)
    n_sections = (n > 0).sum(1)
    nothing = np.full(len(n), np.nan)
    return np.divide(by_section.sum(1), n_sections, out=nothing, where=n_sections > 0)


def _quantiles(means: NDArray) -> tuple[NDArray, NDArray]:
    ends = np.full((2, len(means)), np.nan)
    some = np.isfinite(means).any(1)
    ends[:, some] = np.nanquantile(means[some], [0.025, 0.975], axis=1)
    return ends[0], ends[1]


def moran_basis(positions: NDArray) -> _Array:
    """Patterns over spots, from coarse to fine: orthonormal columns, ``[n_spots, n_spots - 1]``.

    Moran's eigenvector maps: eigenvectors of the doubly centred matrix of spatial weights.
    """
    # Negative distance is the limit of exp(-d / rho) for a long rho: there is no scale to choose,
    # and the null holds for fields of any smoothness. Weights of neighbours only, or of 1 / d, mix
    # coarse patterns up: of unrelated fields smooth over half a tissue, 21 % and 9 % come out
    # significant at 5 %, here 5 to 6 %.
    weights = -cdist(positions, positions)
    centred = weights - weights.mean(0) - weights.mean(1)[:, None] + weights.mean()
    # No eigenvalue is negative, so this makes the constant's, 0, the largest: it comes last.
    constant = 2 * max(float(np.trace(centred)), 1.0) / len(centred)
    return np.linalg.eigh(centred + constant)[1][:, -2::-1]


def null_correlations(
    score_ranks: NDArray,
    target_ranks: NDArray,
    basis: NDArray,
    *,
    n_draws: int = 999,
    rng: np.random.Generator,
) -> _Array:
    r"""Draw rank correlations of fields as smooth as these that have nothing in common.

    Surrogates of the scores (unit ranks, ``[n_spots, n_genes]``) keep the size of every coefficient
    in the basis and get random signs :math:`s_k`. With coefficients :math:`a = V^\top` scores and
    :math:`b = V^\top` targets, their correlation with the targets is :math:`\sum_k s_k a_k b_k`,
    ``[n_draws, n_genes]``.
    """
    # All genes get the same signs: a gene's null does not depend on the other genes.
    signs = rng.integers(0, 2, size=(n_draws, basis.shape[1])) * 2.0 - 1.0
    return signs @ ((basis.T @ score_ranks) * (basis.T @ target_ranks))


def chance_of_more(observed: NDArray, null: NDArray) -> _Array:
    """Share of draws that reach the observed correlation, ``[n_genes]``: p-values, one-sided."""
    # Signs that are all alike give the observed value itself, but for rounding.
    reached = (null >= observed - 1e-12).sum(0)
    undefined = np.isnan(observed) | np.isnan(null).any(0)
    return np.where(undefined, np.nan, (1 + reached) / (1 + len(null)))


def p_values(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
    positions: NDArray,
    quantile: float = 0.1,
    n_draws: int = 999,
    seed: int = 0,
) -> _Array:
    r"""Chance of at least this depth-matched correlation for a gene that scores say nothing of.

    Neighbouring spots are alike, and two smooth fields agree by chance as two noises of far fewer
    spots would. So the null is of fields that are as smooth as the scores: Moran spectral
    randomisation (Wagner and Dray, 2015). Of unrelated simulated fields, smooth over 0 to 16 spot
    pitches on tissues 6 to 30 pitches wide, permuting spots calls 5 to 44 % significant at 5 %, and
    these draws 4 to 6 %; 4 to 7 % of Gaussian fields smooth over half the tissue or more.

    What cannot be seen: a pattern as wide as the tissue is often matched by chance. Of genes smooth
    over a quarter, half and the whole of a tissue of 164 spots, scores equal to the true rates are
    significant at 5 % for 100, 92 and 55 %. More sections help: see `combine_sections`.

    Parameters
    ----------
    scores, counts, section, library_size, quantile
        As in `depth_matched_spearman`.
    positions
        Centres of the spots in any unit, ``[n_spots, 2]``. Time grows with the third power of the
        number of spots of a section.
    n_draws
        Of the null; the correlation is the mean over ten thinnings.
    seed
        Of all draws.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``, sections in sorted order, one-sided, at least ``1 / (1 +
        n_draws)``; NaN where the correlation is undefined.

    Raises
    ------
    ValueError
        For a quantile or number of draws out of range.

    Examples
    --------
    >>> rng, line = np.random.default_rng(0), np.c_[np.arange(100), np.zeros(100)]
    >>> counts = rng.poisson(1 + 9 * (rng.random((100, 1)) < 0.5)) * [[1, 0]]
    >>> spots = {"section": np.zeros(100), "library_size": np.full(100, 5000), "positions": line}
    >>> p_values(counts + rng.random((100, 2)), counts, **spots)
    array([[0.001,   nan]])
    """
    check_draws(quantile, n_draws)
    counts, rng, found = sparse.csr_matrix(counts), np.random.default_rng(seed), []
    for rows in rows_of(section):
        thinned = thinned_ranks(counts[rows], library_size[rows], quantile=quantile, rng=rng)
        kept = rows[thinned.kept]
        ranks, basis = unit_ranks(scores[kept]), moran_basis(positions[kept])
        null = null_correlations(ranks, thinned.ranks, basis, n_draws=n_draws, rng=rng)
        found.append(chance_of_more((ranks * thinned.ranks).sum(0), null))
    return np.stack(found)


def combine_sections(p: NDArray) -> _Array:
    """Combine the p-values of sections by Stouffer's method; NaN does not count.

    Parameters
    ----------
    p
        ``[n_sections, ...]``; taken as between 0.001 and 0.999, so that a 1, which a finite number
        of draws can give, does not outweigh the smallest.

    Returns
    -------
    NDArray
        ``[...]``; NaN where no section has one.

    Examples
    --------
    >>> combine_sections(np.array([[0.01, 0.5, np.nan], [0.02, 0.5, np.nan]])).round(4)
    array([0.001, 0.5  ,   nan])
    """
    # As scipy.stats.combine_pvalues, which takes minutes for a table with NaN.
    scores, known = norm.isf(p.clip(_LEAST_P, 1 - _LEAST_P)), np.isfinite(p).sum(0)
    total = np.where(known > 0, np.nansum(scores, axis=0), np.nan)
    return np.asarray(norm.sf(total / np.sqrt(np.maximum(known, 1))))


def combine_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Combine p-values (``method, seed, section, gene, value``) over sections: methods by genes.

    Of several seeds the first stands for a method. What a method does not order, where others do,
    it does not predict: its p-value there is 1.
    """
    rows = rows[rows["seed"] == rows.groupby("method", observed=True)["seed"].transform("min")]
    wide = rows.pivot_table("value", "method", ["section", "gene"], observed=True, dropna=False)
    sections, genes = (wide.columns.unique(name) for name in ("section", "gene"))
    cells = pd.MultiIndex.from_product([sections, genes])
    p = wide.reindex(columns=cells).to_numpy().reshape(len(wide), len(sections), len(genes))
    p = np.where(np.isnan(p) & np.isfinite(p).any(0), 1.0, p).swapaxes(0, 1)
    return pd.DataFrame(combine_sections(p), index=wide.index, columns=genes)


def false_discovery_rate(p: NDArray) -> _Array:
    """Adjust p-values of many genes (Benjamini and Hochberg); NaN stays NaN and does not count.

    Parameters
    ----------
    p
        ``[n_genes]``.

    Returns
    -------
    NDArray
        ``[n_genes]``; calling a gene predicted below 0.05 is wrong of 5 % of those called.

    Examples
    --------
    >>> false_discovery_rate(np.array([0.01, np.nan, 0.02, 0.6]))
    array([0.03,  nan, 0.03, 0.6 ])
    """
    adjusted, known = np.full(np.shape(p), np.nan), np.isfinite(p)
    adjusted[known] = false_discovery_control(p[known]) if known.any() else np.nan
    return adjusted
