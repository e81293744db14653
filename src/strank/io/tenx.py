"""10x matrices: read, brought together with positions, and pooled into squares."""

from __future__ import annotations

import csv
import shutil
import tarfile
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, NamedTuple, cast

import h5py
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from strank.cohort.contract import FLOAT32_COUNTS, dtype_of_counts
from strank.cohort.names import clean_names
from strank.cohort.store import check_matrix
from strank.doors import unpacked
from strank.errors import InputError, said_by, some
from strank.extras import need
from strank.files import sha256
from strank.hdf5_guard import check_hdf5
from strank.io.tables import check_unique, read_table

_GENES = "Gene Expression"
_ARCHIVES = (".tar.gz", ".tar")
_PARTS = tuple(
    f"{name}{packed}"
    for name in ("matrix.mtx", "features.tsv", "genes.tsv", "barcodes.tsv")
    for packed in ("", ".gz")
)
_MOST_MEMBERS = 1000
# Of Matrix Market: a line of its head, how many times it becomes its size, entries at a time.
_LONGEST_LINE, _MTX_TIMES, _ENTRIES = 2**16, 25, 2**20
# Tables of one run lack a few barcodes at most.
_MOST_UNPLACED = 0.1


class TenxMatrix(NamedTuple):
    """Counts of genes ``[n_barcodes, n_genes]``, and what the file calls their rows and columns."""

    counts: sparse.csr_matrix
    barcodes: pd.Index
    symbols: pd.Index
    ids: pd.Index | None
    #: Of what is no gene (antibodies, controls): kind to number.
    dropped_features: dict[str, int]


def read_matrix(path: Path) -> TenxMatrix:
    """Read the genes of ``*.h5``, a folder with ``matrix.mtx`` and so on, or its ``.tar.gz``."""
    if not path.exists():
        raise InputError(f"{path}: no such matrix")
    try:
        counts, barcodes, features = _read(path)
    except InputError:
        raise
    except Exception as error:  # h5py, scanpy, scipy and pandas raise many kinds for a damaged file
        raise InputError(f"{path}: not a readable 10x matrix ({said_by(error)})") from error
    check_matrix(counts, f"{path}: the matrix")
    if counts.shape != (len(barcodes), len(features)):
        raise InputError(
            f"{path}: the matrix is {counts.shape[1]} x {counts.shape[0]}, but there are "
            f"{len(features)} features and {len(barcodes)} barcodes"
        )
    check_unique(barcodes, f"{path}: barcode")
    genes = (features["kind"] == _GENES).to_numpy()
    for what, n in {"barcodes": len(barcodes), "genes": genes.sum()}.items():
        if n == 0:
            raise InputError(f"{path}: holds no {what}; was everything filtered out?")
    if not genes.all():
        counts = counts[:, genes]
    dropped = features.loc[~genes, "kind"].value_counts().to_dict()
    symbols, ids = (pd.Index(features.loc[genes, column]) for column in ("symbol", "id"))
    return TenxMatrix(counts, barcodes, symbols, ids, dropped)


def needed_file(folder: Path, names: Iterable[str], what: str) -> Path:
    """Find a file, or say that ``what`` is to be given."""
    found = find_file(folder, *names)
    if found is None:
        raise InputError(f"{folder}: no {' or '.join(names)}; give {what}")
    return found


def find_matrix(folder: Path, name: str, hint: str = "") -> Path:
    """Find a matrix in any of the forms that `read_matrix` reads."""
    found = find_file(folder, f"{name}.h5", name, f"{name}.tar.gz")
    if found is None:
        raise InputError(f"{folder}: no {name}.h5 and no folder {name} there{hint}")
    return found


def matrix_checksum(path: Path) -> str:
    """SHA-256 of the file that holds the counts, which may stand in a folder."""
    return sha256(path if path.is_file() else next(path.glob("*matrix.mtx*")))


def one_sample(
    matrix: TenxMatrix, positions: pd.DataFrame, *, section: str, file: Path
) -> tuple[TenxMatrix, pd.DataFrame, list[str]]:
    """Of samples that `spaceranger aggr` put into one ``file`` keep one, and say so."""
    # aggr numbers barcodes, -1, -2 and so on, by the rows of aggregation.csv. Without their numbers
    # they are the same ones in every sample.
    numbers, placed = (
        pd.Series(names.str.extract(r"-(\d+)$", expand=False).fillna("none"))
        for names in (matrix.barcodes, positions.index)
    )
    several = len(found := numbers.value_counts(sort=False)) > 1
    all_placed = len(placed.unique()) > 1
    number = str(numbers[0])
    if several:
        names = _aggregated(file.parent)
        told = ", ".join(f"{n} end in -{suffix}" for suffix, n in found.items())
        told = f"{file}: barcodes of several samples ({told}), as `spaceranger aggr` writes them"
        if not (names and all_placed):
            lacks = "positions are of one sample only" if names else "no aggregation.csv names them"
            raise InputError(f"{told}, but {lacks}; give the outs of each sample's own run")
        if section not in names:
            raise InputError(f"{told}; choose one with `section`: {some(names, 20)}")
        number = names[section]
        at = np.flatnonzero(numbers == number)
        matrix = matrix._replace(counts=matrix.counts[at], barcodes=matrix.barcodes[at])
    if all_placed:
        positions = positions[(placed == number).to_numpy()]
    note = (
        f"one of {len(found)} samples of {file.name}, barcodes that end in -{number}; "
        "`spaceranger aggr` leaves out reads of the deeper ones unless told not to"
    )
    return matrix, positions, [note] * several


def _aggregated(folder: Path) -> dict[str, str]:
    """Name the samples of an aggregate, each with the number that its barcodes end in."""
    table = find_file(folder, "aggregation.csv", "aggregation.csv.gz")
    if table is None:
        return {}
    names = clean_names(read_table(table, ["library_id"], dtype=str)["library_id"])
    check_unique(names, f"{table}: library_id")
    return {name: str(number) for number, name in enumerate(names, 1)}


def without_controls(
    counts: sparse.csr_matrix, cells: pd.Index, names: pd.Index, controls: Mapping[str, str]
) -> TenxMatrix:
    """Take out and count what is no gene: kind to a pattern of its names, in capitals or not."""
    of_kind = {kind: names.str.contains(pattern, case=False) for kind, pattern in controls.items()}
    genes = ~np.any(list(of_kind.values()), axis=0)
    dropped = {kind: int(found.sum()) for kind, found in of_kind.items() if found.any()}
    return TenxMatrix(counts[:, genes], cells, names[genes], None, dropped)


def find_file(folder: Path, *names: str) -> Path | None:
    """Find the first of some names in a folder, also behind a prefix, as files of GEO have it."""
    held = sorted(folder.iterdir()) if folder.is_dir() else []
    for name in names:
        found = [p for p in held if p.name == name] or [
            p for p in held if p.name.endswith(f"_{name}")
        ]
        if len(found) > 1:
            listed = some(p.name for p in found)
            raise InputError(f"{folder}: several {name} ({listed}); put each sample in a folder")
        if found:
            return found[0]
    return None


def _read(path: Path) -> tuple[sparse.csr_matrix, pd.Index, pd.DataFrame]:
    """Return counts, barcodes, and the table of features: ``id``, ``symbol`` and ``kind``."""
    if path.is_dir():
        return _read_folder(path)
    if path.name.endswith(_ARCHIVES):
        return _read_archive(path)
    check_hdf5(path)
    need("scanpy")
    import scanpy as sc

    with warnings.catch_warnings():
        # Barcodes are checked by `read_matrix`, symbols made unique by `name_genes`.
        warnings.filterwarnings("ignore", ".* names are not unique")
        adata = sc.read_10x_h5(path, gex_only=False)
    kinds = adata.var.get("feature_types")
    features = pd.DataFrame({"id": adata.var["gene_ids"].to_numpy(), "symbol": adata.var_names})
    features["kind"] = _GENES if kinds is None else kinds.to_numpy()
    return _exact(sparse.csr_matrix(adata.X), path), adata.obs_names, features


def _exact(counts: sparse.csr_matrix, path: Path) -> sparse.csr_matrix:
    """Read counts again that scanpy, which makes them float32, has rounded."""
    if counts.dtype != np.float32 or counts.data.max(initial=0) < FLOAT32_COUNTS:
        return counts
    with h5py.File(path) as file:
        stored = next(group["data"][:] for group in file.values() if "data" in group)
    return sparse.csr_matrix((stored, counts.indices, counts.indptr), counts.shape)


def _read_archive(path: Path) -> tuple[sparse.csr_matrix, pd.Index, pd.DataFrame]:
    """Read a folder that was packed: of its members, the first few that the matrix needs."""
    with TemporaryDirectory() as place, unpacked(path) as file:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for number, member in enumerate(archive):
                if number == _MOST_MEMBERS:
                    raise InputError(f"{path}: more than {_MOST_MEMBERS} files; unpack it")
                if member.isfile() and member.name.endswith(_PARTS):
                    # What it calls itself may lead elsewhere; only the last part is believed.
                    target = Path(place, PurePosixPath(member.name).name)
                    if target.exists():
                        raise InputError(f"{path}: several {target.name}; unpack it")
                    with target.open("wb") as whole:
                        shutil.copyfileobj(cast(BinaryIO, archive.extractfile(member)), whole)
        try:
            return _read_folder(Path(place))
        except InputError as error:
            raise InputError(str(error).replace(place, str(path))) from error


def _read_mtx(path: Path, n_features: int, n_barcodes: int) -> sparse.csr_matrix:
    """Read a matrix in coordinates, whose head must agree with what stands beside it."""
    # SciPy's own reader crashes at some that are damaged.
    with unpacked(path, times=_MTX_TIMES) as file:
        lines = (line for line in iter(lambda: file.readline(_LONGEST_LINE), b""))
        kind = next(lines, b"").decode("ascii", "replace").lower().split()
        head = next((line for line in lines if not line.startswith(b"%") and line.strip()), b"")
        if kind[:3] != ["%%matrixmarket", "matrix", "coordinate"] or kind[4:] != ["general"]:
            raise InputError(f"{path}: not a sparse matrix of Matrix Market (coordinate, general)")
        rows, columns, n_stored = (int(number) for number in head.split())
        if (rows, columns) != (n_features, n_barcodes):
            raise InputError(
                f"{path.parent}: the matrix is {rows} x {columns}, but there are {n_features} "
                f"features and {n_barcodes} barcodes"
            )
        kinds = {0: "i4", 1: "i4", 2: "i8" if kind[3] == "integer" else "f8"}
        options: dict[str, Any] = {
            "sep": r"\s+",
            "header": None,
            "dtype": kinds,
            "names": [0, 1, 2],
        }
        stored = [] if n_stored == 0 else list(pd.read_csv(file, chunksize=_ENTRIES, **options))
    row, column, values = (
        np.concatenate([part[i].to_numpy() for part in stored] or [np.zeros(0, "i4")])
        for i in range(3)
    )
    if len(values) != n_stored:
        raise InputError(f"{path}: {n_stored:,} numbers in its head, {len(values):,} below")
    # The constructor checks that all lie inside.
    counts = sparse.coo_matrix((values, (column - 1, row - 1)), shape=(n_barcodes, n_features))
    return sparse.csr_matrix(counts)


def _read_folder(folder: Path) -> tuple[sparse.csr_matrix, pd.Index, pd.DataFrame]:
    # scanpy knows neither version 3 unpacked nor version 2 packed, and makes "NA" no name.
    matrix = find_file(folder, "matrix.mtx.gz", "matrix.mtx")
    features = find_file(folder, "features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv")
    barcodes = find_file(folder, "barcodes.tsv.gz", "barcodes.tsv")
    if matrix is None or features is None or barcodes is None:
        raise InputError(
            f"{folder}: needs matrix.mtx, features.tsv (or genes.tsv) and barcodes.tsv, each "
            "compressed or not"
        )
    table = _rows(features)
    named = pd.DataFrame(
        {
            "id": table[0],
            "symbol": table[min(1, table.shape[1] - 1)],
            "kind": table[2] if table.shape[1] > 2 else _GENES,
        }
    )
    names = pd.Index(_rows(barcodes)[0])
    return _read_mtx(matrix, len(named), len(names)), names, named


def _rows(path: Path) -> pd.DataFrame:
    options: dict[str, Any] = {"sep": "\t", "header": None, "dtype": str, "keep_default_na": False}
    with unpacked(path) as file:
        return pd.read_csv(file, quoting=csv.QUOTE_NONE, **options)


class Pooled(NamedTuple):
    """Points summed within squares, by row and column; squares without a point are left out."""

    counts: sparse.csr_matrix
    #: Column and row, from 0 at the origin, ``[n_squares, 2]``.
    squares: NDArray[np.int64]
    n_points: NDArray[np.int64]


def warn_unplaced(n_barcodes: int, n_placed: int, name: str) -> list[str]:
    """Say when more barcodes than a few have no position in the file of that ``name``."""
    absent = n_barcodes - n_placed
    if absent <= _MOST_UNPLACED * n_barcodes:
        return []
    share = f"{absent} of {n_barcodes} barcodes ({absent / n_barcodes:.0%})"
    return [f"{share} have no usable position in {name}, and are left out; are they of one run?"]


def join_points(
    matrix: TenxMatrix, points: pd.DataFrame, *, name: str
) -> tuple[sparse.csr_matrix, pd.DataFrame, dict[str, Any]]:
    """Keep the points that have both counts and a place, and count the others for provenance."""
    check_unique(points.index, f"{name}:")
    at = points.index.get_indexer(matrix.barcodes)
    known = at >= 0
    if not known.any():
        raise InputError(
            f"{name}: no name in common with the matrix beside it (e.g. "
            f"{some(points.index, 2)}; {some(matrix.barcodes, 2)}); are they of one run?"
        )
    n_joined = int(known.sum())
    dropped = {"in counts only": len(known) - n_joined, "in positions only": len(points) - n_joined}
    notes = warn_unplaced(len(known), n_joined, Path(name).name)
    # The matrix of 2 µm is not copied for nothing.
    counts = matrix.counts if known.all() else matrix.counts[known]
    return counts, points.iloc[at[known]], {"dropped_spots": dropped, "notes": notes}


def pool_points(
    counts: sparse.csr_matrix, positions_um: NDArray[np.float64], size_um: float
) -> Pooled:
    """Sum the counts of points within squares whose edges are multiples of their size.

    >>> pooled = pool_points(sparse.eye(3, format="csr"), np.array([[1.0, 1], [9, 2], [3, 4]]), 8)
    >>> pooled.counts.toarray()
    array([[1., 0., 1.],
           [0., 1., 0.]])
    >>> pooled.squares
    array([[0, 0],
           [1, 0]])
    """
    # One sparse product: nothing is made dense, and pooling to 8 µm and then to 16 gives what
    # pooling to 16 gives.
    square = np.floor(positions_um / size_um).astype(np.int64)
    # One number a square, since sorting rows of two is several times slower.
    first = square.min(0)
    column, row = (square - first).T
    width = int(column.max()) + 1
    found, group = np.unique(row * width + column, return_inverse=True)
    n_points = np.bincount(group)
    dtype = dtype_of_counts(float(counts.data.max(initial=0)) * n_points.max())
    member = sparse.csr_matrix((np.ones(len(group), dtype), (group, np.arange(len(group)))))
    squares = np.column_stack([found % width, found // width]) + first
    return Pooled(sparse.csr_matrix(member @ counts), squares, n_points)
