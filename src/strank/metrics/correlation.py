"""How well scores order the spots of a section: arrays in, ``[n_sections, n_genes]`` out."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.stats import rankdata

from strank.functional.groups import rows_of

Target = Literal["log1p_cp10k", "log1p_counts"]


def log1p_cp10k(
    counts: ArrayLike | sparse.spmatrix | sparse.sparray, library_size: ArrayLike
) -> sparse.csr_matrix:
    r"""Compute :math:`\log(1 + 10^4\, c_{ig} / l_i)`, CSR; a spot without counts gives 0."""
    target = sparse.csr_matrix(counts, dtype=np.float64, copy=True)
    target.sum_duplicates()
    depth = np.maximum(np.asarray(library_size, dtype=np.float64), 1.0)
    # The division comes last and alone is rounded: 1 of 7 and 3 of 21 counts are tied.
    target.data = np.log1p(1e4 * target.data / np.repeat(depth, np.diff(target.indptr)))
    return target


def spearman(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
    target: Target = "log1p_cp10k",
) -> NDArray[np.float64]:
    """Spearman correlation with log1p(CP10k), per section and gene: the paper's SCC.

    It measures how well the order of the spots is predicted; ties get their mean rank.

    What can fool it: depth. Deep spots see a sparse gene more often, so predicting nothing but
    library size scores up to 0.5 on counts without any signal;
    `depth_matched_spearman` is 0 there.

    Parameters
    ----------
    scores
        Predicted scores, ``[n_spots, n_genes]``, any monotone scale.
    counts
        Raw counts, ``[n_spots, n_genes]``.
    section
        Section label of each spot, ``[n_spots]``.
    library_size
        A spot's total over **all** measured genes, ``[n_spots]``.
    target
        ``"log1p_counts"`` for raw counts, as HEST-Benchmark does: then it is mostly depth.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``, sections in sorted order; NaN where the order is undefined: one
        spot, or a gene whose counts or scores are constant in the section.

    Examples
    --------
    >>> scores, counts = np.array([[1.0], [2.0], [3.0]]), np.array([[0], [5], [9]])
    >>> spearman(scores, counts, section=np.zeros(3), library_size=np.full(3, 100))
    array([[1.]])
    """
    observed = target_of(counts, library_size, target)
    return np.stack([rank_correlation(scores[r], observed[r].toarray()) for r in rows_of(section)])


def pearson(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
    target: Target = "log1p_cp10k",
) -> NDArray[np.float64]:
    """Pearson correlation with log1p(CP10k), or log1p(counts), per section and gene.

    It measures how well a straight line through the scores follows the target.

    What can fool it: depth, as in `spearman`; a few spots with extreme values; and the scale: a
    log rate bends against log1p of a sparse gene's counts, so scores fitted to the target itself
    are at an advantage.

    Parameters
    ----------
    scores, counts, section, library_size, target
        As in `spearman`; the scale of the scores matters.

    Returns
    -------
    NDArray
        ``[n_sections, n_genes]``, as `spearman`.

    Examples
    --------
    >>> scores, counts = np.log1p([[0.0], [5.0], [9.0]]), np.array([[0], [5], [9]])
    >>> depth = np.array([10, 100, 1000])
    >>> pearson(scores, counts, section=np.zeros(3), library_size=depth, target="log1p_counts")
    array([[1.]])
    """
    observed = target_of(counts, library_size, target)
    return np.stack([correlation(scores[r], observed[r].toarray()) for r in rows_of(section)])


def target_of(
    counts: ArrayLike | sparse.spmatrix, library_size: ArrayLike, target: Target
) -> sparse.csr_matrix:
    """Compute what scores are correlated with, log1p(CP10k) or log1p(counts), CSR."""
    if target == "log1p_cp10k":
        return log1p_cp10k(counts, library_size)
    return sparse.csr_matrix(counts, dtype=np.float64, copy=True).log1p()


def rank_correlation(first: NDArray, second: NDArray) -> NDArray[np.float64]:
    """Spearman correlation, column by column; NaN for a constant column."""
    return (unit_ranks(first) * unit_ranks(second)).sum(0)


def correlation(first: NDArray, second: NDArray) -> NDArray[np.float64]:
    """Pearson correlation, column by column; NaN for a constant column."""
    return (unit_columns(first) * unit_columns(second)).sum(0)


def unit_ranks(values: NDArray) -> NDArray[np.float64]:
    """Ranks within each column as `unit_columns`: their products sum to Spearman correlations."""
    return unit_columns(rankdata(values, axis=0))


def unit_columns(values: NDArray) -> NDArray[np.float64]:
    """Columns of mean 0 and norm 1, ``[n_spots, n_genes]``; NaN for a constant column."""
    varies = np.ptp(values, axis=0) > 0
    centred = np.asarray(values, dtype=np.float64) - values.mean(0, dtype=np.float64)
    norm = np.sqrt((centred * centred).sum(0))
    return np.divide(centred, norm, out=np.full(centred.shape, np.nan), where=varies & (norm > 0))
