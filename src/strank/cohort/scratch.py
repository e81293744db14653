"""Counts that do not fit into memory, in a file without a name that goes with the process."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from strank.storage import writing


@dataclass(frozen=True)
class _Section:
    """Where the counts of a section lie: values, then spots, gene by gene."""

    first: int  #: byte
    n_spots: int
    starts: NDArray[np.int64]  #: of each gene, and the end
    dtype: np.dtype


class CountsOnDisk:
    """Counts ``[n_spots, n_genes]``, section after section, of which genes or sections are read.

    >>> counts = CountsOnDisk(2)
    >>> counts.append(sparse.csr_matrix(np.array([[0.0, 3.0], [1.0, 2.0]])))
    >>> counts.append(sparse.csr_matrix(np.array([[5.0, 0.0]])))
    >>> counts.shape, counts[:, 1:2].toarray().T.tolist(), counts[2:3].toarray().tolist()
    ((3, 2), [[3.0, 2.0, 0.0]], [[5.0, 0.0]])
    """

    ndim = 2

    def __init__(self, n_genes: int) -> None:
        self.shape = (0, n_genes)
        self.dtype = np.dtype(np.float32)
        self._sections: list[_Section] = []
        self._file, self._end, self._lock = TemporaryFile(), 0, Lock()  # noqa: SIM115

    def append(self, counts: sparse.csr_matrix) -> None:
        """Write the counts of one more section."""
        by_gene = counts.tocsc()
        at = _Section(self._end, counts.shape[0], by_gene.indptr.astype(np.int64), counts.dtype)
        with writing(Path(gettempdir())):
            self._file.seek(self._end)
            for part in (by_gene.data, by_gene.indices.astype(np.int32)):
                self._file.write(part.data)
            self._file.flush()
            self._end = self._file.tell()
        self._sections.append(at)
        self.shape = (self.shape[0] + at.n_spots, self.shape[1])
        self.dtype = np.result_type(self.dtype, at.dtype)

    @property
    def nnz(self) -> int:
        """Number of counts that are not 0."""
        return sum(int(at.starts[-1]) for at in self._sections)

    def __getitem__(self, key: Any) -> sparse.csr_matrix:
        """Read genes of all sections, ``[:, genes]``, or all genes of whole sections, ``[rows]``.

        Genes are a slice or numbers; rows a slice or, of sections side by side, numbers.
        """
        spots, genes = key if isinstance(key, tuple) else (key, slice(None))
        index = np.arange(self.shape[1])[genes]
        runs = np.split(index, np.flatnonzero(np.diff(index) != 1) + 1)
        found = [self._read(at, runs) for at in self._within(spots)]
        return sparse.vstack(found, "csr") if len(found) > 1 else found[0]

    def of_sections(self, kept: NDArray[np.bool_]) -> CountsOnDisk:
        """Keep the sections of some spots, given as a mask."""
        other = copy(self)
        firsts = np.cumsum([0, *(at.n_spots for at in self._sections)])
        pairs = zip(self._sections, firsts, strict=False)
        other._sections = [at for at, first in pairs if kept[first]]
        other.shape = (sum(at.n_spots for at in other._sections), self.shape[1])
        return other

    def _within(self, spots: Any) -> list[_Section]:
        if isinstance(spots, slice):
            first, last, _ = spots.indices(self.shape[0])
        else:
            first, last = int(spots[0]), int(spots[-1]) + 1
        starts = np.cumsum([0, *(at.n_spots for at in self._sections)])
        if not {first, last} <= set(starts.tolist()):
            raise ValueError("counts on disk are read by whole sections")
        pairs = zip(self._sections, starts, strict=False)
        return [at for at, start in pairs if first <= start < last]

    def _read(self, at: _Section, runs: list[NDArray]) -> sparse.csr_matrix:
        """Read runs of genes of one section."""
        nnz, each = int(at.starts[-1]), at.dtype.itemsize
        spans = [(int(at.starts[run[0]]), int(at.starts[run[-1] + 1])) for run in runs if len(run)]
        values = [self._part(at.first + a * each, at.dtype, b - a) for a, b in spans]
        after = at.first + nnz * each
        rows = [self._part(after + 4 * a, np.dtype(np.int32), b - a) for a, b in spans]
        sizes = np.diff(at.starts)[np.concatenate(runs)]
        parts = np.concatenate(values), np.concatenate(rows), np.concatenate([[0], sizes.cumsum()])
        by_gene = sparse.csc_matrix(parts, shape=(at.n_spots, len(sizes)))
        return by_gene.tocsr().astype(self.dtype, copy=False)

    def _part(self, first: int, dtype: np.dtype, n: int) -> NDArray:
        with self._lock:
            self._file.seek(first)
            return np.frombuffer(self._file.read(n * dtype.itemsize), dtype)
