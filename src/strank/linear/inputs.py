"""Spots to fit on, checked, with those of a section together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.model_selection import GroupKFold

__all__ = ["Data", "deal", "gather", "groups_of", "is_read_by_rows"]


@dataclass(frozen=True)
class Data:
    """Spots to fit on.

    Attributes
    ----------
    features
        ``[n_spots, n_features]``, not scaled; a tensor, an array, or rows that are read by slice.
    counts
        CSR, ``[n_spots, n_genes]``.
    section
        Codes ``0 .. n_sections - 1``, ``[n_spots]``, in ascending order.
    offset
        Log library size, ``[n_spots]``.
    group
        What is left out together, ``[n_sections]``.
    """

    features: Any
    counts: sparse.csr_matrix
    section: NDArray[np.int64]
    offset: NDArray[np.float64]
    group: NDArray[np.int64]

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """First row of each section, and the number of rows."""
        return (*np.flatnonzero(np.diff(self.section, prepend=-1)).tolist(), len(self.section))


def is_read_by_rows(X: Any) -> bool:
    """Whether features stay where they are: on disk, in blocks, or on a GPU."""
    if isinstance(X, torch.Tensor):
        return X.device.type != "cpu"
    return len(getattr(X, "shape", ())) == 2 and not (
        isinstance(X, (np.ndarray, pd.DataFrame)) or sparse.issparse(X)
    )


def gather(features: Any, counts: Any, section: Any, offset: Any, group: Any = None) -> Data:
    """Check shapes and values, and bring the spots of a section together.

    Parameters
    ----------
    features, counts
        ``[n_spots, n_features]``, and ``[n_spots, n_genes]`` or ``[n_spots]``.
    section, offset, group
        ``[n_spots]``; one section, equal depth and one group if ``None``.

    Raises
    ------
    ValueError
        For shapes that do not fit, negative counts, values that are missing or not finite, a
        section in two groups, and sections in pieces where features are read by rows.
    """
    counts = sparse.csr_matrix(counts if counts.ndim == 2 else counts[:, None])
    n = features.shape[0]
    section = np.zeros(n) if section is None else np.asarray(section)
    offset = np.zeros(n) if offset is None else np.asarray(offset, dtype=np.float64)
    group = np.zeros(n) if group is None else np.asarray(group)
    each = {"y": counts, "section": section, "offset": offset, "group": group}
    for name, values in each.items():
        if values.shape[0] != n:
            raise ValueError(f"{name} has {values.shape[0]} rows, but X has {n}")
    if counts.nnz and counts.data.min() < 0:
        raise ValueError("y must not be negative: it holds raw counts")
    if not np.isfinite(offset).all():
        raise ValueError("offset must be finite; leave out spots without counts")
    codes = _codes("section", section)
    groups = groups_of(codes, _codes("group", group))
    if (np.diff(codes) >= 0).all():
        return Data(features, counts, codes, offset, groups)
    if is_read_by_rows(features):
        raise ValueError(
            "section: where X is read by rows, those of a section must stand together; "
            "write them section after section"
        )
    order = np.argsort(codes, kind="stable")
    return Data(features[order], counts[order], codes[order], offset[order], groups)


def groups_of(section: NDArray[np.int64], group: NDArray[np.int64]) -> NDArray[np.int64]:
    """Group of each section, from the codes of both for each spot.

    Examples
    --------
    >>> groups_of(np.array([0, 0, 1, 2]), np.array([0, 0, 1, 0]))
    array([0, 1, 0])
    """
    pairs = np.unique(np.column_stack([section, group]), axis=0)
    if len(pairs) > section.max() + 1:
        raise ValueError("group: a section stands in two groups")
    return pairs[:, 1]


def deal(group: Any, max_folds: int) -> NDArray[np.int64]:
    """Deal groups out to at most so many folds, of about the same number of spots.

    Examples
    --------
    >>> deal(np.array(["a", "b", "b", "c", "c", "c"]), 2)
    array([1, 1, 1, 0, 0, 0])
    """
    codes = _codes("group", np.asarray(group))
    if max_folds < 2:
        raise ValueError(f"max_folds must be at least 2; got {max_folds}")
    if codes.max() < max_folds:
        return codes
    folds = np.empty_like(codes)
    for fold, (_, test) in enumerate(GroupKFold(max_folds).split(codes, groups=codes)):
        folds[test] = fold
    return folds


def _codes(name: str, labels: NDArray) -> NDArray[np.int64]:
    codes, _ = pd.factorize(labels)
    if (codes < 0).any():
        raise ValueError(f"{name}: missing label in row {int(np.argmax(codes < 0))}")
    return codes.astype(np.int64)
