"""Patterns over the spots of one section: who is a neighbour, and Moran's I."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

__all__ = ["morans_i", "neighbours_within"]

# Genes at a time: what is computed for them is a few times as large as their counts.
_GENES = 1024


def neighbours_within(positions: NDArray, radius: float) -> sparse.csr_matrix:
    """Weight 1 for every pair of spots that stand within a radius, and 0 for the rest.

    Parameters
    ----------
    positions
        ``[n_spots, 2]``.
    radius
        In the same unit.

    Returns
    -------
    scipy.sparse.csr_matrix
        Symmetric, ``[n_spots, n_spots]``; no spot is its own neighbour.

    Examples
    --------
    >>> neighbours_within(np.array([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]]), 1.5).toarray()
    array([[0., 1., 0.],
           [1., 0., 0.],
           [0., 0., 0.]])
    """
    first, second = cKDTree(positions).query_pairs(radius, output_type="ndarray").T
    shape = len(positions), len(positions)
    one_way = sparse.csr_matrix((np.ones(len(first)), (first, second)), shape)
    return (one_way + one_way.T).tocsr()


def morans_i(
    values: NDArray | sparse.csr_matrix, neighbours: sparse.csr_matrix
) -> NDArray[np.float64]:
    r"""Moran's I of every gene: how far neighbours are alike.

    .. math::
        I = \frac{n}{\sum_{ij} w_{ij}}\,
            \frac{\sum_{ij} w_{ij}\, (x_i - \bar x)(x_j - \bar x)}{\sum_i (x_i - \bar x)^2}

    Without any pattern its mean is :math:`-1 / (n - 1)`.

    What can fool it: a sparse gene whose few counts happen to stand side by side; and depth, which
    has a pattern of its own that normalised values of sparse genes follow.

    Parameters
    ----------
    values
        ``[n_spots, n_genes]``; sparse ones stay sparse.
    neighbours
        Weights ``[n_spots, n_spots]``, `neighbours_within` say.

    Returns
    -------
    NDArray
        ``[n_genes]``; NaN for a gene that is constant, or where no two spots are neighbours.

    Examples
    --------
    >>> line = neighbours_within(np.c_[np.arange(4.0), np.zeros(4)], 1)
    >>> morans_i(np.array([[0, 0, 5], [0, 1, 5], [1, 0, 5], [1, 1, 5]]), line).round(3)
    array([ 0.333, -1.   ,    nan])
    """
    by_gene = sparse.csc_matrix(values, dtype=np.float64)
    starts = range(0, max(by_gene.shape[1], 1), _GENES)
    return np.concatenate([_of_block(by_gene[:, at : at + _GENES], neighbours) for at in starts])


def _of_block(values: sparse.csc_matrix, neighbours: sparse.csr_matrix) -> NDArray[np.float64]:
    # Products of centred values, multiplied out, so that zeros need not be stored.
    n_spots, total = values.shape[0], float(neighbours.sum())
    mean, squares = _sum(values) / n_spots, _sum(values.multiply(values))
    weight = np.asarray(neighbours.sum(0)).ravel() + np.asarray(neighbours.sum(1)).ravel()
    alike = _sum(values.multiply(neighbours @ values))
    alike += mean * (mean * total - values.T @ weight)
    spread = squares - n_spots * mean * mean
    # What rounding leaves of the spread of a constant gene is far less.
    defined = (spread > 1e-12 * squares) & (total > 0)
    scale = n_spots / total if total > 0 else 0.0
    return np.divide(scale * alike, spread, out=np.full(len(mean), np.nan), where=defined)


def _sum(values: sparse.spmatrix) -> NDArray[np.float64]:
    return np.asarray(values.sum(0)).ravel()
