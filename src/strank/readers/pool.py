"""Points with counts, bins or cells: joined to their places, and pooled into squares."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from strank.errors import InputError, some
from strank.readers.tenx import TenxMatrix

__all__ = ["Pooled", "join_points", "pool_points"]


class Pooled(NamedTuple):
    """Points summed within squares; a square without a point is left out.

    Attributes
    ----------
    counts
        ``[n_squares, n_genes]``, squares by row and then column.
    squares
        Their column and row, from 0 at the origin, ``[n_squares, 2]``.
    n_points
        In each square, ``[n_squares]``.
    """

    counts: sparse.csr_matrix
    squares: NDArray[np.int64]
    n_points: NDArray[np.int64]


def join_points(
    matrix: TenxMatrix, points: pd.DataFrame, *, name: str
) -> tuple[sparse.csr_matrix, pd.DataFrame, dict[str, int]]:
    """Keep the points that have both counts and a place.

    Parameters
    ----------
    matrix
        Counts by barcode.
    points
        Places, indexed by barcode.
    name
        File of the places, named in an error.

    Returns
    -------
    counts, points, dropped
        In the matrix's order, and how many stood in one of the two only.

    Raises
    ------
    InputError
        If a point stands twice, or none in both.
    """
    if not points.index.is_unique:
        twice = some(points.index[points.index.duplicated()].unique())
        raise InputError(f"{name}: {twice} stands twice")
    at = points.index.get_indexer(matrix.barcodes)
    known = at >= 0
    if not known.any():
        raise InputError(
            f"{name}: no name in common with the matrix beside it (e.g. "
            f"{some(points.index, 2)}; {some(matrix.barcodes, 2)}); are they of one run?"
        )
    n_joined = int(known.sum())
    dropped = {"in counts only": len(known) - n_joined, "in positions only": len(points) - n_joined}
    # The matrix of 2 µm is not copied for nothing.
    counts = matrix.counts if known.all() else matrix.counts[known]
    return counts, points.iloc[at[known]], dropped


def pool_points(
    counts: sparse.csr_matrix, positions_um: NDArray[np.float64], size_um: float
) -> Pooled:
    """Sum the counts of points within squares whose edges are multiples of their size.

    It is one sparse product: nothing is made dense, and pooling to 8 µm and then to 16 gives what
    pooling to 16 gives.

    Parameters
    ----------
    counts
        ``[n_points, n_genes]``.
    positions_um
        Finite (x, y), ``[n_points, 2]``.
    size_um
        Side of a square.

    Examples
    --------
    >>> pooled = pool_points(sparse.eye(3, format="csr"), np.array([[1.0, 1], [9, 2], [3, 4]]), 8)
    >>> pooled.counts.toarray()
    array([[1., 0., 1.],
           [0., 1., 0.]])
    >>> pooled.squares
    array([[0, 0],
           [1, 0]])
    """
    square = np.floor(positions_um / size_um).astype(np.int64)
    # One number a square, since sorting rows of two is several times slower.
    first = square.min(0)
    column, row = (square - first).T
    width = int(column.max()) + 1
    found, group = np.unique(row * width + column, return_inverse=True)
    ones = np.ones(len(group), counts.dtype)
    member = sparse.csr_matrix((ones, (group, np.arange(len(group)))))
    squares = np.column_stack([found % width, found // width]) + first
    return Pooled(sparse.csr_matrix(member @ counts), squares, np.bincount(group))
