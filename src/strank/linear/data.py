"""Spots checked for the exact fit, and features that are read by rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from strank.functional.batch import check_logarithm
from strank.functional.groups import as_labels, codes_of

# Spots of small sections that are multiplied together: products of fewer rows waste time.
TILE = 1024
# From here on float64 skips whole numbers.
_MOST_COUNTS = 2**53
# Counts that are looked at together.
_CHECKED = 2**20


@dataclass(frozen=True)
class Data:
    """Spots to fit on, those of a section together."""

    features: Any  #: ``[n_spots, n_features]``; a tensor, an array, or rows that are read by slice
    #: ``[n_spots, n_genes]``; a CSR matrix, or genes that are read by slice or number
    counts: Any
    section: NDArray[np.int64]  #: codes from 0, ascending, ``[n_spots]``
    offset: NDArray[np.float64]  #: log library size, ``[n_spots]``
    group: NDArray[np.int64]  #: what is left out together, ``[n_sections]``

    @cached_property
    def bounds(self) -> tuple[int, ...]:
        """First row of each section, and the number of rows."""
        return (*np.flatnonzero(np.diff(self.section, prepend=-1)).tolist(), len(self.section))

    @cached_property
    def by_gene(self) -> Any:
        """Counts of which genes can be cut out."""
        return self.counts.tocsc() if sparse.issparse(self.counts) else self.counts


def gather(features: Any, counts: Any, section: Any, offset: Any, group: Any = None) -> Data:
    """Check shapes and values, and bring the spots of a section together.

    One section, equal depth and one group where ``section``, ``offset`` and ``group`` are ``None``.
    """
    if not is_read_by_genes(counts):
        counts = sparse.csr_matrix(counts if counts.ndim == 2 else counts[:, None])
    n = features.shape[0]
    section = np.zeros(n) if section is None else as_labels(section)
    offset = np.zeros(n) if offset is None else np.asarray(offset, dtype=np.float64)
    group = np.zeros(n) if group is None else as_labels(group)
    each = {"y": counts, "section": section, "offset": offset, "group": group}
    for name, values in each.items():
        if values.shape[:1] != (n,):
            raise ValueError(f"{name} has {(*values.shape, 1)[0]} rows, but X has {n}")
        if name != "y":
            one_a_spot(name, values)
    _check_size(counts)
    if not np.isfinite(offset).all():
        raise ValueError("offset must be finite; leave out spots without counts")
    check_logarithm(float(offset.min(initial=np.inf)), float(offset.max(initial=-np.inf)))
    codes = codes_of("section", section)
    pairs = np.unique(np.column_stack([codes, codes_of("group", group)]), axis=0)
    if len(pairs) > codes.max() + 1:
        raise ValueError("group: a section stands in two groups")
    group = pairs[:, 1]
    if (np.diff(codes) >= 0).all():
        return Data(features, counts, codes, offset, group)
    if is_read_by_rows(features):
        raise ValueError(
            "section: where X is read by rows, those of a section must stand together; "
            "write them section after section"
        )
    order = np.argsort(codes, kind="stable")
    return Data(features[order], counts[order], codes[order], offset[order], group)


def _check_size(counts: Any) -> None:
    values = counts.data if sparse.issparse(counts) else np.empty(0)
    if len(values) and values.min() < 0:
        raise ValueError("y must not be negative: it holds raw counts")
    if len(values) and values.max() >= _MOST_COUNTS:
        raise ValueError("y must be below 2^53: from there on counts are not exact")


def one_a_spot(name: str, values: Any) -> Any:
    """Return values that are one a spot; refuse a column or a table."""
    if len(shape := np.shape(values)) == 1:
        return values
    ravel = f"; flatten it: np.ravel({name})" if shape[1:] == (1,) else ""
    raise ValueError(f"`{name}` must be [n_spots], one value a spot; got {list(shape)}{ravel}")


def no_counts(y: Any, counts: Any) -> str | None:
    """Say what a target holds that is no count, as the given or as checked; ``None`` for counts."""
    if is_read_by_genes(counts):
        return None
    odd = _no_numbers(y)
    if odd is None and (part := _part_of_a_count(counts)) is not None:
        odd = f"{part:g}"
    return odd


def _part_of_a_count(counts: sparse.csr_matrix | NDArray) -> float | None:
    """Find a value that is no whole number within rounding; ``None`` if all are."""
    values = counts.data if sparse.issparse(counts) else counts.reshape(-1)
    for start in range(0, len(values), _CHECKED):
        some = values[start : start + _CHECKED]
        odd = np.abs(some - np.rint(some)) > 1e-5 * np.maximum(1, np.abs(some))
        if odd.any():
            return float(some[odd.argmax()])
    return None


def _no_numbers(y: Any) -> str | None:
    """Say what a target holds that only becomes numbers, ``None`` for numbers themselves."""
    if isinstance(y, pd.DataFrame) and (y := y.select_dtypes(exclude="number")).empty:
        return None
    values = y.data if sparse.issparse(y) else np.asarray(y)
    kind, first = values.dtype.kind, values.reshape(-1)[0] if values.size else 0
    if kind == "b" or (kind == "O" and isinstance(first, bool)):
        return "True and False"
    return "text" if kind in "SU" or (kind == "O" and isinstance(first, str)) else None


def is_read_by_rows(X: Any) -> bool:
    """Whether features stay where they are: on disk, in blocks, or on a GPU."""
    if isinstance(X, torch.Tensor):
        return X.device.type != "cpu"
    return len(getattr(X, "shape", ())) == 2 and not (
        isinstance(X, (np.ndarray, pd.DataFrame)) or sparse.issparse(X)
    )


def is_read_by_genes(y: Any) -> bool:
    """Whether counts stay on disk, where they were checked before they came there."""
    return len(getattr(y, "shape", ())) == 2 and not (
        isinstance(y, (np.ndarray, torch.Tensor, pd.DataFrame)) or sparse.issparse(y)
    )


@dataclass(eq=False)
class Rows:
    """Rows of features, section after section, that are read when they are needed.

    >>> rows = Rows(np.arange(6.0).reshape(3, 2), (0, 2, 3), block=1)
    >>> rows.times(rows.of(0), torch.ones(2, 1, dtype=torch.float64)).flatten()
    tensor([1., 5.], dtype=torch.float64)
    >>> rows.sums(rows.of(0), torch.ones(2, 1, dtype=torch.float64)).flatten()
    tensor([2., 4.], dtype=torch.float64)
    """

    #: ``[n_spots, n_features]``: a tensor (its device is where the work is done), an array, or
    #: anything that gives rows for a slice (a memmap, an HDF5 or zarr dataset, a dask array)
    source: Any
    bounds: tuple[int, ...]  #: section ``s`` has the rows ``bounds[s]`` to ``bounds[s + 1]``
    unit: Tensor | None = None  #: every row is multiplied by it, ``[n_features]``
    centre: Tensor | None = None  #: subtracted after that, ``[n_features]``
    block: int = 2**62  #: most rows that are read at once
    dtype: torch.dtype = torch.float64  #: precision of the products
    _last: tuple[slice, Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the work is done."""
        return self.source.device if isinstance(self.source, Tensor) else torch.device("cpu")

    @property
    def n_sections(self) -> int:
        """Number of sections."""
        return len(self.bounds) - 1

    @property
    def n_features(self) -> int:
        """Number of features."""
        return int(self.source.shape[1])

    @property
    def wide(self) -> bool:
        """Whether there are fewer spots than features: then few axes have all that varies."""
        return self.bounds[-1] < self.n_features

    @property
    def n_bytes(self) -> int:
        """Size of a copy in memory."""
        return self.bounds[-1] * self.n_features * self.dtype.itemsize

    def of(self, sections: int | range) -> slice:
        """Rows of a section, or of sections side by side."""
        if isinstance(sections, int):
            sections = range(sections, sections + 1)
        return slice(self.bounds[sections.start], self.bounds[sections.stop])

    def size(self, section: int) -> int:
        """Count the spots of a section."""
        return self.bounds[section + 1] - self.bounds[section]

    def tiles(self, sections: Sequence[int]) -> list[range]:
        """Put sections side by side together, as long as they are small.

        >>> Rows(np.zeros((5000, 1)), (0, 600, 900, 1500, 5000)).tiles([0, 1, 2, 3])
        [range(0, 2), range(2, 3), range(3, 4)]
        """
        found: list[range] = []
        for s in sections:
            start = found[-1].start if found and found[-1].stop == s else s
            if start < s and self.bounds[s + 1] - self.bounds[start] <= TILE:
                found[-1] = range(start, s + 1)
            else:
                found.append(range(s, s + 1))
        return found

    def times(self, rows: slice, weights: Tensor) -> Tensor:
        """Product of some rows with ``[n_features, n_genes]``."""
        shape = rows.stop - rows.start, weights.shape[1]
        result = torch.empty(shape, dtype=weights.dtype, device=weights.device)
        for block, features in self.each_block(rows):
            part = result[block.start - rows.start : block.stop - rows.start]
            torch.mm(features, weights, out=part)
        return result

    def sums(self, rows: slice, values: Tensor) -> Tensor:
        """Features summed over some rows, weighted by ``[n_rows, n_genes]``, in float64."""
        total = torch.zeros(
            self.n_features, values.shape[1], dtype=torch.float64, device=values.device
        )
        for block, features in self.each_block(rows):
            total += features.T @ values[block.start - rows.start : block.stop - rows.start]
        return total

    def each_block(self, rows: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield some rows, block by block."""
        for start in range(rows.start, rows.stop, self.block):
            block = slice(start, min(start + self.block, rows.stop))
            yield block, self._read(block)

    def _read(self, block: slice) -> Tensor:
        """Read a block, or take the one that was read last: most sections are a single block."""
        # One look, since threads with other genes read the same rows.
        last = self._last
        if last is not None and last[0] == block:
            return last[1]
        self._last = None  # before another takes memory
        part = self.source[block]
        if not isinstance(part, Tensor):
            part = np.asarray(part)
            # torch shares the memory of an array, and warns where that cannot be written to.
            part = torch.from_numpy(part if part.flags.writeable else part.copy())
        copied, part = part.dtype != self.dtype, part.to(self.dtype)
        for change, values in ((torch.mul, self.unit), (torch.sub, self.centre)):
            if values is not None:
                part = change(part, values.to(self.dtype), out=part if copied else None)
                copied = True
        self._last = (block, part)
        return part
