"""What is known of a section's features before all are: on disk, batch by batch."""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

import numpy as np
from numpy.typing import DTypeLike, NDArray

from strank.files import writing

__all__ = ["Part"]

# First row, number of rows and CRC-32 of their bytes, before every batch.
_RECORD = struct.Struct("<III")


class Part:
    """Features of the first spots of a section; what was added survives the end of the process.

    The file is a line of JSON, what the features belong to, and the batches one after another, each
    with its checksum. What is torn, damaged or belongs to something else is dropped.

    Parameters
    ----------
    path
        The file, continued if there is one.
    belongs_to
        All that the features depend on, JSON-able.
    shape
        Numbers of spots and features.
    dtype
        In which features are stored.

    Attributes
    ----------
    features
        ``[n_spots, n_features]``, of which the first ``n_done`` rows are known.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "C2.part"
    >>> Part(path, {"encoder": "mine"}, (5, 2), "float32").add(np.ones((3, 2)))
    >>> Part(path, {"encoder": "mine"}, (5, 2), "float32").n_done
    3
    >>> Part(path, {"encoder": "other"}, (5, 2), "float32").n_done
    0
    """

    def __init__(
        self, path: Path, belongs_to: dict[str, Any], shape: tuple[int, int], dtype: DTypeLike
    ) -> None:
        self.path = path
        self.features: NDArray = np.empty(shape, dtype)
        self.n_done = 0
        facts = belongs_to | {"dtype": self.features.dtype.name, "shape": shape}
        header = (json.dumps(facts) + "\n").encode()
        good = self._read(header)
        with writing(path):
            if good:
                os.truncate(path, good)
            else:
                path.write_bytes(header)

    def add(self, rows: NDArray) -> None:
        """Append the features of the next spots; an :class:`InputError` if that fails."""
        first, stop = self.n_done, self.n_done + len(rows)
        self.features[first:stop] = rows
        stored = self.features[first:stop].tobytes()
        with writing(self.path), self.path.open("ab") as file:
            file.write(_RECORD.pack(first, len(rows), crc32(stored)) + stored)
        self.n_done = stop

    def _read(self, header: bytes) -> int:
        """Take over what is good; return where that ends, 0 if nothing is."""
        end = 0
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            if file.read(len(header)) == header:
                end = file.tell()
                while self._read_batch(file):
                    end = file.tell()
        return end

    def _read_batch(self, file: BinaryIO) -> bool:
        head = file.read(_RECORD.size)
        if len(head) < _RECORD.size:
            return False
        first, n_rows, checksum = _RECORD.unpack(head)
        rows = self.features[self.n_done : self.n_done + n_rows]
        stored = file.read(rows.nbytes)
        in_order = first == self.n_done and 0 < n_rows == len(rows)
        if not in_order or crc32(stored) != checksum:
            return False
        rows[:] = np.frombuffer(stored, rows.dtype).reshape(rows.shape)
        self.n_done += n_rows
        return True
