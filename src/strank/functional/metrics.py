"""How well scores order the spots of a section: arrays in, ``[n_sections, n_genes]`` out."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.stats import rankdata

__all__ = ["correlation", "log1p_cp10k", "rank_correlation", "spearman"]


def log1p_cp10k(
    counts: ArrayLike | sparse.spmatrix | sparse.sparray, library_size: ArrayLike
) -> sparse.csr_matrix:
    r"""Compute the field's usual target, :math:`\log(1 + 10^4\, c_{ig} / l_i)`, natural log.

    Parameters
    ----------
    counts
        Raw counts, ``[n_spots, n_genes]``, dense or sparse.
    library_size
        A spot's total over **all** measured genes, ``[n_spots]``. A spot without counts gives 0.

    Returns
    -------
    scipy.sparse.csr_matrix
        Same shape; zeros stay zeros.

    Examples
    --------
    >>> log1p_cp10k([[1, 0]], [10_000]).toarray().round(4)
    array([[0.6931, 0.    ]])
    """
    library_size = np.asarray(library_size, dtype=np.float64)
    per_count = 1e4 / np.maximum(library_size, 1.0)
    return (sparse.diags(per_count) @ sparse.csr_matrix(counts, dtype=np.float64)).log1p().tocsr()


def spearman(
    scores: NDArray,
    counts: NDArray | sparse.csr_matrix,
    *,
    section: NDArray,
    library_size: NDArray,
) -> NDArray[np.float64]:
    """Spearman correlation with log1p(CP10k), per section and gene: the paper's SCC.

    It measures how well the order of the spots is predicted; ties get their mean rank. For sparse
    genes it also rewards knowing nothing but a spot's depth (see DESIGN, section 1).

    Parameters
    ----------
    scores
        Predicted scores, ``[n_spots, n_genes]``, any monotone scale.
    counts
        Raw counts, ``[n_spots, n_genes]``.
    section
        Section label of each spot, ``[n_spots]``.
    library_size
        A spot's total over all measured genes, ``[n_spots]``.

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
    target = log1p_cp10k(counts, library_size)
    rows = [np.flatnonzero(section == label) for label in np.unique(section)]
    return np.stack([rank_correlation(scores[r], target[r].toarray()) for r in rows])


def rank_correlation(first: NDArray, second: NDArray) -> NDArray[np.float64]:
    """Spearman correlation, column by column; NaN for a constant column.

    Parameters
    ----------
    first, second
        ``[n_spots, n_genes]``; ties get their mean rank.

    Examples
    --------
    >>> rank_correlation(np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [8.0], [9.0]]))
    array([1.])
    """
    return correlation(rankdata(first, axis=0), rankdata(second, axis=0))


def correlation(first: NDArray, second: NDArray) -> NDArray[np.float64]:
    """Pearson correlation, column by column; NaN for a constant column.

    Examples
    --------
    >>> correlation(np.array([[1.0, 5.0], [2.0, 5.0]]), np.array([[3.0, 1.0], [4.0, 2.0]]))
    array([ 1., nan])
    """
    varies = (np.ptp(first, axis=0) > 0) & (np.ptp(second, axis=0) > 0)
    a, b = (np.asarray(values, dtype=np.float64) for values in (first, second))
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.sqrt((a * a).sum(0) * (b * b).sum(0))
    return np.divide((a * b).sum(0), norm, out=np.full(norm.shape, np.nan), where=varies)
