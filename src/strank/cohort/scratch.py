"""Counts that do not fit into memory, in files that go with what reads them."""

from __future__ import annotations

import os
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile, gettempdir, mkstemp
from threading import Lock
from typing import IO, Any, Protocol
from weakref import finalize

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from strank.errors import InputError
from strank.storage import writing

_UNREACHED = (
    "counts are not within reach of a worker; set TMPDIR to a folder that all workers see, or "
    "`max_memory` so that counts fit"
)


@dataclass(frozen=True)
class _Section:
    """Where the counts of a section lie: values, then spots, gene by gene."""

    first: int  #: byte
    n_spots: int
    starts: NDArray[np.int64]  #: of each gene, and the end
    dtype: np.dtype


class Scratch(Protocol):
    """What takes the counts of one section after the other to disk."""

    def append(self, counts: sparse.csr_matrix) -> None:
        """Take one more section."""

    def whole(self) -> Any:
        """Return what reads the counts of all."""


class _File:
    """A file without a name, or if it is to be ``shared`` one that is removed with this object.

    Where it is shared, what is pickled is its path; a process that is killed leaves it.
    """

    def __init__(self, *, shared: bool) -> None:
        self._lock, self._path = Lock(), ""
        if not shared:
            self._file: IO[bytes] = TemporaryFile()  # noqa: SIM115
            return
        handle, self._path = mkstemp(prefix="strank-counts-")
        self._file = os.fdopen(handle, "w+b")
        finalize(self, _remove, self._file, Path(self._path))

    def __getstate__(self) -> str:
        # Other machines see what has come to the disk.
        os.fsync(self._file.fileno())
        return self._path

    def __setstate__(self, path: str) -> None:
        self._lock, self._path = Lock(), path
        try:
            self._file = Path(path).open("rb")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"{path}: {_UNREACHED}") from error

    def append(self, *parts: NDArray) -> int:
        """Write more; return where it begins."""
        with writing(Path(gettempdir())):
            first = self._file.seek(0, os.SEEK_END)
            for part in parts:
                self._file.write(part.data)
            self._file.flush()
        return first

    def read(self, first: int, dtype: np.dtype, n: int) -> NDArray:
        """Read numbers from a byte on."""
        with self._lock:
            self._file.seek(first)
            found = np.frombuffer(self._file.read(n * dtype.itemsize), dtype)
        if len(found) < n:
            raise InputError(f"{self._path}: {_UNREACHED}")
        return found

    def mapped(self, dtype: type) -> NDArray:
        """Map all that was written."""
        # Nothing cannot be mapped.
        return np.memmap(self._file, dtype, mode="r") if self._file.tell() else np.empty(0, dtype)


def _remove(file: IO[bytes], path: Path) -> None:
    file.close()
    path.unlink(missing_ok=True)


class CountsOnDisk:
    """Counts ``[n_spots, n_genes]``, section after section, of which genes or sections are read.

    If they are ``shared``, other processes can read them while this one has them.

    >>> counts = CountsOnDisk(2)
    >>> counts.append(sparse.csr_matrix(np.array([[0.0, 3.0], [1.0, 2.0]])))
    >>> counts.append(sparse.csr_matrix(np.array([[5.0, 0.0]])))
    >>> counts.shape, counts[:, 1:2].toarray().T.tolist(), counts[2:3].toarray().tolist()
    ((3, 2), [[3.0, 2.0, 0.0]], [[5.0, 0.0]])
    """

    ndim = 2

    def __init__(self, n_genes: int, *, shared: bool = False) -> None:
        self.shape = (0, n_genes)
        self.dtype = np.dtype(np.float32)
        self._sections: list[_Section] = []
        self._file = _File(shared=shared)

    def append(self, counts: sparse.csr_matrix) -> None:
        """Write the counts of one more section."""
        by_gene = counts.tocsc()
        first = self._file.append(by_gene.data, by_gene.indices.astype(np.int32))
        starts = by_gene.indptr.astype(np.int64)
        at = _Section(first, counts.shape[0], starts, counts.dtype)
        self._sections.append(at)
        self.shape = (self.shape[0] + at.n_spots, self.shape[1])
        self.dtype = np.result_type(self.dtype, at.dtype)

    def whole(self) -> CountsOnDisk:
        """Return this, which reads them."""
        return self

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
        values = [self._file.read(at.first + a * each, at.dtype, b - a) for a, b in spans]
        after = at.first + nnz * each
        rows = [self._file.read(after + 4 * a, np.dtype(np.int32), b - a) for a, b in spans]
        sizes = np.diff(at.starts)[np.concatenate(runs)]
        parts = np.concatenate(values), np.concatenate(rows), np.concatenate([[0], sizes.cumsum()])
        by_gene = sparse.csc_matrix(parts, shape=(at.n_spots, len(sizes)))
        return by_gene.tocsr().astype(self.dtype, copy=False)


class SpotCountsOnDisk:
    """Counts of which spots are read in any order: a CSR matrix whose numbers are mapped from disk.

    >>> counts = SpotCountsOnDisk(2)
    >>> counts.append(sparse.csr_matrix(np.array([[0.0, 3.0], [1.0, 2.0]])))
    >>> counts.append(sparse.csr_matrix(np.array([[5.0, 0.0]])))
    >>> counts.whole()[[2, 0]].toarray().tolist()
    [[5.0, 0.0], [0.0, 3.0]]
    """

    def __init__(self, n_genes: int) -> None:
        self._n_genes, self._sizes = n_genes, [np.zeros(1, np.int64)]
        self._values, self._genes = _File(shared=False), _File(shared=False)

    def append(self, counts: sparse.csr_matrix) -> None:
        """Write the counts of one more section."""
        self._values.append(counts.data.astype(np.float32))
        # As wide as what says where spots begin, or SciPy would copy them.
        self._genes.append(counts.indices.astype(np.int64))
        self._sizes.append(np.diff(counts.indptr))

    def whole(self) -> sparse.csr_matrix:
        """Return all of them."""
        starts = np.concatenate(self._sizes).astype(np.int64).cumsum()
        counts = sparse.csr_matrix((len(starts) - 1, self._n_genes), dtype=np.float32)
        # What SciPy is given when it makes one, it may copy.
        counts.data, counts.indptr = self._values.mapped(np.float32), starts
        counts.indices = self._genes.mapped(np.int64)
        return counts
