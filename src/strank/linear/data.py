"""Spots checked for the exact fit, and features that are read by rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from strank.functional.groups import codes_of


class Rows:
    """Rows of features, section after section, that are read when they are needed.

    Parameters
    ----------
    source
        ``[n_spots, n_features]``: a tensor (its device is where the work is done), an array, or
        anything that gives rows for a slice (a memmap, an HDF5 or zarr dataset, a dask array).
    bounds
        Section ``s`` has the rows ``bounds[s]`` to ``bounds[s + 1]``.
    centre
        Subtracted from every row, ``[n_features]``.
    block
        Most rows that are read at once.
    dtype
        Precision of the products.

    Examples
    --------
    >>> rows = Rows(np.arange(6.0).reshape(3, 2), (0, 2, 3), block=1)
    >>> rows.times(rows.of(0), torch.ones(2, 1, dtype=torch.float64)).flatten()
    tensor([1., 5.], dtype=torch.float64)
    >>> rows.sums(rows.of(0), torch.ones(2, 1, dtype=torch.float64)).flatten()
    tensor([2., 4.], dtype=torch.float64)
    """

    def __init__(
        self,
        source: Any,
        bounds: tuple[int, ...],
        *,
        centre: Tensor | None = None,
        block: int = 2**62,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.source, self.bounds, self.centre = source, bounds, centre
        self.block, self.dtype = block, dtype
        self.device = source.device if isinstance(source, Tensor) else torch.device("cpu")
        self._last: tuple[slice, Tensor] | None = None

    @property
    def n_sections(self) -> int:
        """Number of sections."""
        return len(self.bounds) - 1

    @property
    def n_features(self) -> int:
        """Number of features."""
        return int(self.source.shape[1])

    def of(self, sections: int | range) -> slice:
        """Rows of a section, or of sections side by side."""
        if isinstance(sections, int):
            sections = range(sections, sections + 1)
        return slice(self.bounds[sections.start], self.bounds[sections.stop])

    def size(self, section: int) -> int:
        """Count the spots of a section."""
        return self.bounds[section + 1] - self.bounds[section]

    def of_source(self, source: Any, *, centre: Tensor | None = None) -> Rows:
        """Return other features of the same spots, read alike."""
        return Rows(source, self.bounds, centre=centre, block=self.block, dtype=self.dtype)

    def in_precision(self, dtype: torch.dtype) -> Rows:
        """Return the same rows with products in another precision."""
        return Rows(self.source, self.bounds, centre=self.centre, block=self.block, dtype=dtype)

    def times(self, rows: slice, weights: Tensor) -> Tensor:
        """Product of some rows with ``[n_features, n_genes]``."""
        shape = rows.stop - rows.start, weights.shape[1]
        result = torch.empty(shape, dtype=weights.dtype, device=weights.device)
        for block in self._blocks(rows):
            part = result[block.start - rows.start : block.stop - rows.start]
            torch.mm(self._read(block), weights, out=part)
        return result

    def sums(self, rows: slice, values: Tensor) -> Tensor:
        """Features summed over some rows, weighted by ``[n_rows, n_genes]``, in float64."""
        total = torch.zeros(
            self.n_features, values.shape[1], dtype=torch.float64, device=values.device
        )
        for block in self._blocks(rows):
            part = values[block.start - rows.start : block.stop - rows.start]
            total += self._read(block).T @ part
        return total

    def each_block(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows, block by block."""
        for block in self._blocks(rows):
            yield block, self._read(block)

    def _blocks(self, rows: slice) -> list[slice]:
        starts = range(rows.start, rows.stop, self.block)
        return [slice(start, min(start + self.block, rows.stop)) for start in starts]

    def _read(self, block: slice) -> Tensor:
        """Read a block, or take the one that was read last: most sections are a single block."""
        if self._last is not None and self._last[0] == block:
            return self._last[1]
        part = self.source[block]
        if not isinstance(part, Tensor):
            part = np.asarray(part)
            # torch shares the memory of an array, and warns where that cannot be written to.
            part = torch.from_numpy(part if part.flags.writeable else part.copy())
        part = part.to(self.dtype)
        if self.centre is not None:
            part = part - self.centre.to(self.dtype)
        self._last = (block, part)
        return part


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
    codes = codes_of("section", section)
    groups = groups_of(codes, codes_of("group", group))
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
