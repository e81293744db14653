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
from strank.doors import unpacked
from strank.errors import InputError, said_by, some
from strank.hdf5_guard import check_hdf5

# 160 MB of 20,000 genes.
_ROWS, _NUMBERS = 1000, 20_000_000
# Rows of a small table; and one for each of its bytes.
_MOST_ROWS = 1_000_000
# Cells of a Parquet table: of a small file, and for each of its bytes.
_MOST_CELLS, _CELLS_A_BYTE = 10_000_000, 4
# Of places and names, which pack less well than counts, how many times a file becomes its size.
_TIMES = 20
# What HDF5 raises for a damaged file.
_DAMAGE = (OSError, TypeError, ValueError, LookupError, RuntimeError, AttributeError, MemoryError)


def read_table(path: Path, needed: Iterable[str], **options: Any) -> pd.DataFrame:
    """Read a CSV or Parquet table that has these columns; ``options`` are those of pandas."""
    try:
        if path.suffix == ".parquet":
            _check_rows(path)
            table = pd.read_parquet(path, **options)
        else:
            with unpacked(path, times=_TIMES) as file:
                table = pd.read_csv(file, **options)
    except InputError:
        raise
    except Exception as error:  # pyarrow, gzip and pandas raise many kinds for a damaged file
        how = "" if path.suffix == ".parquet" else "; save it as CSV in UTF-8, with commas"
        raise InputError(f"{path}: not a readable table ({said_by(error)}){how}") from error
    if path.suffix != ".parquet" and "index_col" not in options and table.index.nlevels > 1:
        raise InputError(f"{path}: not a readable table: more columns below than in the header")
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
    keys, counts = [], []
    for part in table_parts(path, len(names), header=None, skiprows=1, dtype=texts):
        if part.shape[1] != len(names):
            raise InputError(
                f"{path}: {len(names)} columns in the header, {part.shape[1]} below; write it again"
            )
        keys.append(part.loc[:, is_key].set_axis(names[is_key], axis=1))
        try:
            counts.append(sparse.csr_matrix(part.loc[:, ~is_key].to_numpy(np.float64)))
        except (TypeError, ValueError) as error:
            said = said_by(error)
            raise InputError(f"{path}: not a readable table of counts ({said})") from error
    if not keys:
        raise InputError(f"{path}: not a readable table of counts (no rows)")
    found = pd.concat(keys, ignore_index=True)
    return found, sparse.csr_matrix(sparse.vstack(counts)), names[~is_key]


def table_parts(path: Path, n_columns: int, **options: Any) -> Iterator[pd.DataFrame]:
    """Read a wide table of counts a part at a time: most are zeros, of many thousands of cells."""
    n_read, most = 0, most_rows(path)
    options["chunksize"] = rows_at_once(n_columns)
    try:
        with unpacked(path) as file:
            for part in pd.read_csv(file, low_memory=False, **options):
                yield part
                n_read += len(part)
                if n_read > most:
                    raise InputError(
                        f"{path}: more than {most:,} rows in a small file (a decompression bomb?); "
                        "unpack it, if it is meant"
                    )
    except InputError:
        raise
    except Exception as error:  # gzip and pandas raise many kinds for a damaged file
        said = said_by(error)
        raise InputError(f"{path}: not a readable table of counts ({said})") from error


def rows_at_once(n_columns: int) -> int:
    """Tell how many rows of a wide table are held at a time."""
    return min(_ROWS, 1 + _NUMBERS // max(n_columns, 1))


def most_rows(path: Path) -> int:
    """Tell how many rows a file may hold, by its size."""
    return _MOST_ROWS + path.stat().st_size


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
        wrong = ~np.isfinite(_numbers(table[column]))
        if wrong.any():
            raise InputError(
                f"{what} {table.index[wrong][0]}, column {column}: "
                f"{table[column][wrong].iloc[0]!r} is not a number"
            )


def _numbers(column: pd.Series) -> pd.Series:
    """Numbers of a column, NaN for what is none."""
    try:
        return pd.to_numeric(column, errors="coerce").astype(float)
    except (TypeError, ValueError):  # lists and tables in it
        return pd.Series(np.nan, column.index)


def _check_rows(path: Path) -> None:
    """Refuse a Parquet table of far more cells than its size can hold."""
    from pyarrow.parquet import read_metadata

    found = read_metadata(path)
    cells = found.num_rows * found.num_columns
    if cells > _MOST_CELLS + _CELLS_A_BYTE * path.stat().st_size:
        raise InputError(
            f"{path}: {found.num_rows:,} rows in a small file (a decompression bomb?); write it "
            "again as CSV, if it is meant"
        )


def decoded(names: Iterable[object]) -> pd.Index:
    """Names that are bytes, text or numbers by the version of the software, as text."""
    return pd.Index([n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in names])


def check_unique(names: pd.Index, what: str) -> None:
    """Refuse names that stand twice; ``what`` names the file and says what they are of."""
    if not names.is_unique:
        raise InputError(f"{what} {some(names[names.duplicated()].unique())} stands twice")


@contextmanager
def open_hdf5(path: Path, *datasets: str) -> Iterator[h5py.File]:
    """Open an HDF5 file that has these datasets; also explain what cannot be read of it."""
    if path.is_file():
        check_hdf5(path)
    try:
        with h5py.File(path, "r") as file:
            if absent := [name for name in datasets if name not in file]:
                raise InputError(f"{path}: lacks dataset {some(absent)}; it has {some(file)}")
            yield file
    except InputError:
        raise
    except _DAMAGE as error:
        said = said_by(error)
        raise InputError(f"{path}: not a readable HDF5 file ({said})") from error
