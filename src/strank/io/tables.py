"""Tables and HDF5 files of the platforms: read, and refused by name of the file."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from strank.cohort.names import clean_names
from strank.errors import InputError, said_by, some

# 160 MB of 20,000 genes.
_ROWS = 1000


def read_table(path: Path, needed: Iterable[str], **options: Any) -> pd.DataFrame:
    """Read a CSV or Parquet table that has these columns; ``options`` are those of pandas."""
    try:
        read = pd.read_parquet if path.suffix == ".parquet" else pd.read_csv
        table = read(path, **options)
    except (ValueError, OSError, EOFError) as error:  # pyarrow's errors are ValueErrors
        how = "" if path.suffix == ".parquet" else "; save it as CSV in UTF-8, with commas"
        raise InputError(f"{path}: not a readable table ({said_by(error)}){how}") from error
    table.columns = pd.Index([c.strip() if isinstance(c, str) else c for c in table.columns])
    check_columns(table, needed, path)
    return table


def read_counts_table(
    path: Path, named: Collection[str] = ()
) -> tuple[pd.DataFrame, sparse.csr_matrix, pd.Index]:
    """Read a table with a row a cell and a column a gene; the first column, and ``named``, say who.

    Returned are these columns as text, the counts, and the genes.
    """
    # pandas would rename a gene that stands twice without a word.
    head: dict[str, Any] = {"header": None, "nrows": 1, "dtype": str, "keep_default_na": False}
    names = clean_names(read_table(path, [], **head).iloc[0])
    check_unique(names, f"{path}: column")
    is_key = names.isin(list(named))
    is_key[0] = True
    texts = dict.fromkeys(np.flatnonzero(is_key), str)
    options: dict[str, Any] = {"header": None, "skiprows": 1, "chunksize": _ROWS, "dtype": texts}
    keys, counts = [], []
    try:
        # A part at a time: most are zeros, of hundreds of thousands of cells.
        for part in pd.read_csv(path, low_memory=False, **options):
            if part.shape[1] != len(names):
                raise ValueError(f"{len(names)} columns in the header, {part.shape[1]} below")
            keys.append(part.loc[:, is_key].set_axis(names[is_key], axis=1))
            counts.append(sparse.csr_matrix(part.loc[:, ~is_key].to_numpy(np.float64)))
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a readable table of counts ({error})") from error
    found = pd.concat(keys, ignore_index=True)
    return found, sparse.csr_matrix(sparse.vstack(counts)), names[~is_key]


def check_columns(table: pd.DataFrame, needed: Iterable[str], path: Path) -> None:
    """Refuse a table that lacks columns."""
    if absent := [column for column in needed if column not in table]:
        commas = "; columns are separated by commas" * (len(table.columns) == 1)
        raise InputError(
            f"{path}: lacks column {some(absent)}; it has {some(table.columns, 8)}{commas}"
        )


def check_numbers(table: pd.DataFrame, columns: Iterable[str], what: str) -> None:
    """Refuse what is no finite number; ``what`` names the file and says what a row is of."""
    for column in columns:
        wrong = ~np.isfinite(pd.to_numeric(table[column], errors="coerce").astype(float))
        if wrong.any():
            raise InputError(
                f"{what} {table.index[wrong][0]}, column {column}: "
                f"{table[column][wrong].iloc[0]!r} is not a number"
            )


def decoded(names: Iterable[object]) -> pd.Index:
    """Names that are bytes, text or numbers by the version of the software, as text."""
    return pd.Index([name.decode() if isinstance(name, bytes) else str(name) for name in names])


def check_unique(names: pd.Index, what: str) -> None:
    """Refuse names that stand twice; ``what`` names the file and says what they are of."""
    if not names.is_unique:
        raise InputError(f"{what} {some(names[names.duplicated()].unique())} stands twice")


@contextmanager
def open_hdf5(path: Path, *datasets: str) -> Iterator[h5py.File]:
    """Open an HDF5 file that has these datasets; also explain what cannot be read of it."""
    try:
        with h5py.File(path, "r") as file:
            if absent := [name for name in datasets if name not in file]:
                raise InputError(f"{path}: lacks dataset {some(absent)}; it has {some(file)}")
            yield file
    except InputError:
        raise
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a readable HDF5 file ({error})") from error
