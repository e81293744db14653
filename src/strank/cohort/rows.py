"""Features of several sections in one, which stay where they are: in memory, or in their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from strank.cohort.contract import LEAST_FEATURE


@dataclass(frozen=True)
class RowsOnDisk:
    """A table in a file, of which rows are read when they are asked for."""

    path: Path
    slot: str  #: in the file
    shape: tuple[int, int]
    stored: np.dtype
    #: bytes before the first row, where rows lie one after the other as they are
    offset: int | None
    tiny: bool  #: whether some are smaller than what a model can hold
    dtype = np.dtype(np.float32)
    ndim = 2

    @classmethod
    def of(cls, path: Path, values: h5py.Dataset, *, tiny: bool) -> RowsOnDisk:
        """Find the rows of an open file."""
        # What does not lie there as it is, is read by HDF5: compressed or turned numbers.
        plain = values.dtype.isnative and values.dtype.kind == "f" and values.chunks is None
        offset = values.id.get_offset() if plain else None
        return cls(path, values.name, values.shape, values.dtype, offset, tiny)

    def __getitem__(self, rows: slice) -> NDArray[np.float32]:
        """Read some rows."""
        first, last, _ = rows.indices(self.shape[0])
        if self.offset is None:  # packed, by another program
            with h5py.File(self.path, "r") as file:
                return np.asarray(file[self.slot][first:last], self.dtype)
        with self.path.open("rb", buffering=0) as file:
            return self._read(file, first, max(last, first))

    def take(self, rows: NDArray[np.intp]) -> NDArray[np.float32]:
        """Read rows in any order: one by one if they are few."""
        first, last = int(rows.min(initial=0)), int(rows.max(initial=-1)) + 1
        if self.offset is None or 4 * len(rows) > last - first:
            return self[first:last][rows - first]
        found = np.empty((len(rows), self.shape[1]), self.dtype)
        with self.path.open("rb", buffering=0) as file:
            for place, row in enumerate(rows.tolist()):
                found[place] = self._read(file, row, row + 1)
        return found

    def _read(self, file: Any, first: int, last: int) -> NDArray[np.float32]:
        width = self.shape[1]
        assert self.offset is not None  # else they are read by HDF5
        file.seek(self.offset + first * width * self.stored.itemsize)
        values = np.fromfile(file, self.stored, (last - first) * width)
        return values.reshape(last - first, width).astype(self.dtype, copy=False)


@dataclass(frozen=True)
class SectionRows:
    """Features of the spots of a section that have counts."""

    source: Any  #: an array, or `RowsOnDisk`
    kept: NDArray[np.intp] | None = None  #: its rows; all if ``None``
    #: Whether some are smaller than what a model can hold; beside others, they are 0.
    tiny: bool = False
    centre: NDArray[np.float64] | None = None  #: subtracted, ``[n_features]``

    def __len__(self) -> int:
        return self.source.shape[0] if self.kept is None else len(self.kept)

    def __getitem__(self, rows: slice) -> NDArray:
        if self.kept is None:
            return self._held(self.source[rows])
        spots = self.kept[rows]
        first, last = int(spots.min(initial=0)), int(spots.max(initial=-1)) + 1
        return self._held(self.source[first:last][spots - first])

    def take(self, rows: NDArray[np.intp]) -> NDArray:
        """Read rows in any order."""
        rows = rows if self.kept is None else self.kept[rows]
        of_array = isinstance(self.source, np.ndarray)
        return self._held(self.source[rows] if of_array else self.source.take(rows))

    def _held(self, values: NDArray) -> NDArray:
        values = np.where(np.abs(values) < LEAST_FEATURE, 0, values) if self.tiny else values
        return values if self.centre is None else values.astype(np.float64) - self.centre


class StackedRows:
    """Features of sections, one after the other; rows come as an array.

    >>> parts = [SectionRows(np.arange(4.0).reshape(2, 2)), SectionRows(np.ones((1, 2)))]
    >>> stacked = StackedRows(parts)
    >>> stacked.shape, stacked[1:3].tolist(), stacked.take(np.array([2, 0])).tolist()
    ((3, 2), [[2.0, 3.0], [1.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]])
    """

    ndim = 2

    def __init__(self, parts: Sequence[SectionRows]) -> None:
        self._parts = list(parts)
        self._bounds = [0, *accumulate(map(len, self._parts))]
        self.shape = (self._bounds[-1], int(self._parts[0].source.shape[1]))
        self.dtype = np.result_type(*(part.source.dtype for part in self._parts))

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of a copy in memory."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def __getitem__(self, rows: slice | NDArray) -> NDArray:
        """Read rows: a slice, or their numbers, or a mask."""
        if not isinstance(rows, slice):
            return self.take(np.flatnonzero(rows) if rows.dtype == bool else rows)
        first, last, _ = rows.indices(len(self))
        found = [
            part[max(first - start, 0) : last - start]
            for part, start in zip(self._parts, self._bounds, strict=False)
            if start < last and first < start + len(part)
        ]
        if not found:
            return np.empty((0, self.shape[1]), self.dtype)
        whole = found[0] if len(found) == 1 else np.concatenate(found)
        return whole.astype(self.dtype, copy=False)

    def take(self, rows: NDArray[np.intp], axis: int = 0) -> NDArray:
        """Read rows in any order, those of a section together."""
        del axis  # as arrays have it: rows are the only one
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1 and (np.diff(rows) == 1).all():
            return self[int(rows[0]) : int(rows[-1]) + 1]
        found = np.empty((len(rows), self.shape[1]), self.dtype)
        of = np.searchsorted(self._bounds, rows, side="right") - 1
        for number in np.unique(of):
            places = np.flatnonzero(of == number)
            found[places] = self._parts[number].take(rows[places] - self._bounds[number])
        return found

    def in_memory(self) -> NDArray:
        """Copy all, a section at a time."""
        whole = np.empty(self.shape, self.dtype)
        for part, start in zip(self._parts, self._bounds, strict=False):
            whole[start : start + len(part)] = part[:]
        return whole

    def as_float32(self, *, centred: bool) -> StackedRows:
        """Let rows come in float32, about the mean of their section if they are to be ``centred``.

        >>> parts = [SectionRows(np.array([[1.0], [3.0]])), SectionRows(np.ones((1, 1)))]
        >>> rows = StackedRows(parts)
        >>> rows.as_float32(centred=True)[0:3].ravel().tolist()
        [-1.0, 1.0, 0.0]
        """
        parts = self._parts
        if centred:
            parts = [replace(part, centre=part[:].astype(np.float64).mean(0)) for part in parts]
        other = StackedRows(parts)
        other.dtype = np.dtype(np.float32)
        return other

    def of_sections(self, kept: NDArray[np.bool_]) -> StackedRows:
        """Keep the sections of some spots, given as a mask."""
        firsts = zip(self._parts, self._bounds, strict=False)
        return StackedRows([part for part, first in firsts if kept[first]])
