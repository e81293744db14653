"""Feature-barcode matrices of 10x Genomics: HDF5, or matrix, features and barcodes in a folder."""

from __future__ import annotations

import csv
import tarfile
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pandas as pd
from scipy import sparse
from scipy.io import mmread

from strank.errors import InputError, some

__all__ = ["TenxMatrix", "find_file", "read_matrix"]

_GENES = "Gene Expression"


class TenxMatrix(NamedTuple):
    """Counts of genes, and what the file calls their rows and columns.

    Attributes
    ----------
    counts
        ``[n_barcodes, n_genes]``, CSR.
    barcodes
        Of spots, bins or cells, unique.
    symbols, ids
        Of genes, as in the file.
    dropped_features
        Features that are no genes (antibodies, controls), and were left out: kind to number.
    """

    counts: sparse.csr_matrix
    barcodes: pd.Index
    symbols: pd.Index
    ids: pd.Index
    dropped_features: dict[str, int]


def read_matrix(path: Path) -> TenxMatrix:
    """Read the genes of a matrix.

    Parameters
    ----------
    path
        ``*.h5``, a folder with ``matrix.mtx``, ``features.tsv`` or ``genes.tsv``, and
        ``barcodes.tsv``, each compressed or not, or such a folder as ``*.tar.gz``.

    Raises
    ------
    InputError
        For a file that is absent or damaged, a barcode that stands twice, or a matrix without
        barcodes or genes.
    """
    if not path.exists():
        raise InputError(f"{path}: no such matrix")
    try:
        counts, barcodes, features = _read(path)
    except InputError:
        raise
    except Exception as error:  # h5py, scanpy, scipy and pandas raise many kinds for a damaged file
        raise InputError(f"{path}: not a readable 10x matrix ({error})") from error
    if counts.shape != (len(barcodes), len(features)):
        raise InputError(
            f"{path}: the matrix is {counts.shape[1]} x {counts.shape[0]}, but there are "
            f"{len(features)} features and {len(barcodes)} barcodes"
        )
    if not barcodes.is_unique:
        twice = some(barcodes[barcodes.duplicated()].unique())
        raise InputError(f"{path}: barcode {twice} stands twice")
    genes = (features["kind"] == _GENES).to_numpy()
    for what, n in {"barcodes": len(barcodes), "genes": genes.sum()}.items():
        if n == 0:
            raise InputError(f"{path}: holds no {what}; was everything filtered out?")
    if not genes.all():
        counts = counts[:, genes]
    dropped = features.loc[~genes, "kind"].value_counts().to_dict()
    symbols, ids = (pd.Index(features.loc[genes, column]) for column in ("symbol", "id"))
    return TenxMatrix(counts, barcodes, symbols, ids, dropped)


def find_file(folder: Path, *names: str) -> Path | None:
    """Find the first of some names in a folder, also behind a prefix, as files of GEO have it.

    Raises
    ------
    InputError
        If several files have the name behind a prefix.
    """
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
    if tarfile.is_tarfile(path):
        with TemporaryDirectory() as folder, tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
            parents = {p.parent for p in Path(folder).rglob("*matrix.mtx*")}
            return _read_folder(parents.pop() if len(parents) == 1 else Path(folder))
    import scanpy as sc

    with warnings.catch_warnings():
        # Barcodes are checked by `read_matrix`, symbols made unique by `name_genes`.
        warnings.filterwarnings("ignore", ".* names are not unique")
        adata = sc.read_10x_h5(path, gex_only=False)
    kinds = adata.var.get("feature_types")
    features = pd.DataFrame({"id": adata.var["gene_ids"].to_numpy(), "symbol": adata.var_names})
    features["kind"] = _GENES if kinds is None else kinds.to_numpy()
    return sparse.csr_matrix(adata.X), adata.obs_names, features


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
    table = _read_table(features)
    named = pd.DataFrame(
        {
            "id": table[0],
            "symbol": table[min(1, table.shape[1] - 1)],
            "kind": table[2] if table.shape[1] > 2 else _GENES,
        }
    )
    return sparse.csr_matrix(mmread(matrix).T), pd.Index(_read_table(barcodes)[0]), named


def _read_table(path: Path) -> pd.DataFrame:
    return pd.read_csv(
        path, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE
    )
