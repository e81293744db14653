"""Arrays by section or group: rows, means, and groups dealt into folds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold


def centre_within(values: NDArray, section: NDArray) -> NDArray[np.float64]:
    """Subtract the mean of its section from every row, ``[n_spots, ...]``.

    >>> centre_within(np.array([[1.0], [3.0], [7.0]]), np.array(["a", "a", "b"])).ravel()
    array([-1.,  1.,  0.])
    """
    # A section at a time: sums over all at once would add in another order, to other last digits.
    centred = np.array(values, dtype=np.float64)
    for rows in rows_of(section):
        centred[rows] -= centred[rows].mean(0)
    return centred


def deal(group: Any, max_folds: int, name: str = "group") -> NDArray[np.int64]:
    """Deal groups out to at most so many folds, of about the same number of spots.

    >>> deal(np.array(["a", "b", "b", "c", "c", "c"]), 2)
    array([1, 1, 1, 0, 0, 0])
    """
    codes = codes_of(name, as_labels(group))
    if max_folds < 2:
        raise ValueError(f"max_folds must be at least 2; got {max_folds}")
    if codes.max() < max_folds:
        return codes
    folds = np.empty_like(codes)
    for fold, (_, test) in enumerate(GroupKFold(max_folds).split(codes, groups=codes)):
        folds[test] = fold
    return folds


def as_labels(values: Any) -> NDArray:
    """Return labels as an array; NumPy alone would make a word of what a list lacks.

    >>> as_labels(["a", float("nan")])
    array(['a', nan], dtype=object)
    """
    return np.asarray(values, dtype=object if isinstance(values, (list, tuple)) else None)


def codes_of(name: str, labels: NDArray, *, in_order: bool = False) -> NDArray[np.int64]:
    """Give labels numbers from 0, as they come or sorted; a missing one is refused."""
    codes, _ = pd.factorize(labels, sort=in_order)
    if (codes < 0).any():
        raise ValueError(f"{name}: missing label in row {int(np.argmax(codes < 0))}")
    return codes.astype(np.int64)


def rows_of(section: NDArray) -> list[NDArray[np.intp]]:
    """Find the rows of every section, sections in sorted order.

    >>> rows_of(np.array(["b", "a", "b"]))
    [array([1]), array([0, 2])]
    """
    return [np.flatnonzero(section == label) for label in np.unique(section)]
