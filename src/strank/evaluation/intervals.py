"""How sure a mean over sections and genes is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Intervals", "mean_intervals"]


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
        no value in a section. All tables see the same draws.
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
        rng.multinomial(n, np.full(n, 1 / n), size=n_draws).astype(np.float32)
        for n in (n_sections, n_genes)
    )
    known = np.isfinite(values)
    # Of every table and section: the sum over the genes of a draw, and how many have a value.
    total, number = (
        (table.reshape(-1, n_genes).astype(np.float32) @ genes.T).reshape(*values.shape[:2], -1)
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
