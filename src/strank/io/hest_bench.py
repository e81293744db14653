"""Tasks in the layout of HEST-Benchmark, with embeddings as its own code writes them.

A task is a folder with ``splits/train_<k>.csv`` and ``splits/test_<k>.csv`` (columns ``sample_id``
and ``expr_path``, the latter relative to the folder), ``var_50genes.json`` (key ``genes``) and raw
counts, ``adata/<sample>.h5ad``. Embeddings are a folder with ``<sample>.h5`` (datasets
``embeddings`` and ``barcodes``). A sample is a section.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from strank.cohort.contract import raw_counts
from strank.cohort.folds import Fold
from strank.cohort.store import read_h5ad
from strank.errors import InputError, some
from strank.files import read_json
from strank.io.tables import check_unique, decoded, open_hdf5, read_table

PANEL = "var_50genes.json"


@dataclass(frozen=True)
class TaskSample:
    """Spots of one sample that have both an embedding and counts, in the embeddings' order."""

    #: As stored, ``[n_spots, n_features]``.
    features: NDArray
    #: Raw counts of the panel, in its order, ``[n_spots, n_genes]``.
    counts: sparse.csr_matrix
    #: Total over all measured genes, ``[n_spots]``.
    library_size: NDArray[np.float64]
    #: Embeddings without counts, left out.
    n_unmatched: int
    #: What was read: ``counts`` and ``embeddings``.
    files: Mapping[str, Path]


@dataclass(frozen=True)
class HestTask:
    """One task of the benchmark."""

    folder: Path
    panel: tuple[str, ...]
    folds: tuple[Fold, ...]
    samples: Mapping[str, TaskSample]


def read_hest_task(
    folder: Path | str,
    embeddings: Path | str,
    *,
    advance: Callable[[int], object] | None = None,
) -> HestTask:
    """Read a task of HEST-Benchmark with embeddings of its patches, as its own code writes them.

    Parameters
    ----------
    folder
        The task, ``bench_data/IDC`` say: ``splits/``, ``adata/`` and ``var_50genes.json``.
    embeddings
        Folder with one ``<sample>.h5`` each (datasets ``embeddings`` and ``barcodes``).
    advance
        Called with 1 after every sample.

    Returns
    -------
    HestTask
        ``panel``, the genes; ``folds``, in the order of their numbers, whose patients are not
        known; ``samples``, name to spots that have both: ``features`` ``[n_spots, n_features]``,
        raw ``counts`` of the panel ``[n_spots, n_genes]``, ``library_size`` over all genes.

    Raises
    ------
    InputError
        For anything that cannot be used, naming file, sample, spot or gene.

    Examples
    --------
    >>> import strank
    >>> strank.io.read_hest_task("bench_data/IDC", "ST_data_emb/IDC/uni_v1")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: bench_data/IDC: no such folder; a task has splits/, adata/ and ...
    """
    folder = Path(folder)
    files = sample_files(folder, Path(embeddings))
    panel, (folds, _) = read_panel(folder / PANEL), read_folds(folder)
    samples: dict[str, TaskSample] = {}
    for name, of_sample in files.items():
        samples[name] = _read_sample(name, of_sample, panel)
        width, expected = (
            s.features.shape[1] for s in (samples[name], next(iter(samples.values())))
        )
        if width != expected:
            raise InputError(
                f"{of_sample['embeddings']}: {width} features, but {next(iter(samples))} has "
                f"{expected}; embed all samples with one encoder"
            )
        if advance is not None:
            advance(1)
    return HestTask(folder, panel, folds, samples)


def sample_files(folder: Path, embeddings: Path) -> dict[str, dict[str, Path]]:
    """Find the two files of every sample of a task, ``counts`` and ``embeddings``."""
    for needed in (folder, folder / "splits", embeddings):
        if not needed.is_dir():
            raise InputError(f"{needed}: no such folder; a task has splits/, adata/ and {PANEL}")
    _, expression = read_folds(folder)
    files = {
        name: {"counts": folder / path, "embeddings": embeddings / f"{name}.h5"}
        for name, path in expression.items()
    }
    for name, of_sample in files.items():
        for what, path in of_sample.items():
            if not path.is_file():
                raise InputError(f"{path}: no such file; sample {name} has no {what}")
    return files


def find_hest_tasks(folder: Path) -> dict[str, Path]:
    """Find the tasks of a folder, which may be one itself."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in (folder, *inside) if (path / "splits").is_dir()]
    if not found:
        raise InputError(
            f"{folder}: neither a task (splits/, adata/, {PANEL}) nor a folder of them"
        )
    # What lies within a task is none.
    return {path.absolute().name: path for path in (found[:1] if found[0] == folder else found)}


def find_embeddings(folder: Path, tasks: Sequence[str]) -> dict[str, dict[str, Path]]:
    """Find the embeddings of tasks: encoder to its folder of ``<sample>.h5``, for each task.

    HEST's code writes ``<task>/<encoder>/<sample>.h5``; in 2024, ``fp32/`` stood below the encoder.
    A folder without any of a task may be that of the only task, or of one encoder.
    """
    found = {}
    for task in tasks:
        root = folder / task if (folder / task).is_dir() else folder
        # Not "**", which passes by folders that are links.
        depths = ("*.h5", "*/*.h5", "*/*/*.h5") if root != folder or len(tasks) == 1 else ("*.h5",)
        inside = sorted({path.parent for depth in depths for path in root.glob(depth)})
        names = [root.absolute().name if at == root else str(at.relative_to(root)) for at in inside]
        found[task] = dict(zip(names, inside, strict=True))
    if not any(found.values()):
        raise InputError(f"{folder}: no embeddings there; needs <task>/<encoder>/<sample>.h5")
    return found


def read_panel(path: Path) -> tuple[str, ...]:
    """Read a list of genes."""
    content = read_json(path)
    genes = content.get("genes") if isinstance(content, dict) else None
    if not isinstance(genes, list) or not genes or not all(isinstance(g, str) for g in genes):
        raise InputError(f'{path}: needs {{"genes": [names]}}')
    if twice := sorted({gene for gene in genes if genes.count(gene) > 1}):
        raise InputError(f"{path}: gene {some(twice)} stands twice")
    return tuple(genes)


def read_folds(folder: Path) -> tuple[tuple[Fold, ...], dict[str, str]]:
    """Read all splits; also the path of each sample's counts, relative to the task."""
    splits = folder / "splits"
    numbers = {
        int(path.stem.rsplit("_", 1)[1])
        for part in ("train", "test")
        for path in splits.glob(f"{part}_*.csv")
        if path.stem.rsplit("_", 1)[1].isdecimal()
    }
    if not numbers:
        raise InputError(f"{splits}: no train_<number>.csv and test_<number>.csv there")
    folds, expression = [], dict[str, str]()
    for k in sorted(numbers):
        train, test = (_read_split(splits / f"{part}_{k}.csv") for part in ("train", "test"))
        if both := sorted(set(train) & set(test)):
            raise InputError(
                f"{splits}: fold {k} has sample {some(both)} in training and in test; "
                "take it out of one"
            )
        for name, path in [*train.items(), *test.items()]:
            if expression.setdefault(name, path) != path:
                raise InputError(
                    f"{splits}: sample {name} has two expr_path: {expression[name]} and {path}"
                )
        folds.append(Fold(str(k), tuple(train), tuple(test), ()))
    return tuple(folds), expression


def _read_split(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; every fold has a train and a test split")
    columns = ["sample_id", "expr_path"]
    table = read_table(path, columns, dtype=str, keep_default_na=False)
    names = table["sample_id"]
    if table.empty or names.duplicated().any():
        what = "no samples" if table.empty else f"sample {names[names.duplicated()].iloc[0]} twice"
        raise InputError(f"{path}: {what}")
    for name, relative in zip(names, table["expr_path"], strict=True):
        # By what the table says only: links are the user's, the hub's cache is made of them.
        target = Path(relative)
        if not name or Path(name).name != name:
            raise InputError(f"{path}: sample_id {name!r} is not the name of a file")
        if not relative or target.is_absolute() or ".." in target.parts:
            raise InputError(
                f"{path}: sample {name}: expr_path {relative!r} is not inside the task folder"
            )
    return dict(zip(names, table["expr_path"], strict=True))


def _read_sample(name: str, files: Mapping[str, Path], panel: tuple[str, ...]) -> TaskSample:
    features, barcodes = _read_embeddings(files["embeddings"])
    path = files["counts"]
    adata = read_h5ad(path)
    check_unique(barcodes, f"{files['embeddings']}: barcode")
    check_unique(adata.obs_names, f"{path}: barcode")
    rows = adata.obs_names.get_indexer(barcodes)
    found = rows >= 0
    if not found.any():
        raise InputError(
            f"sample {name}: no barcode stands in both {files['embeddings']} and {path} "
            f"(e.g. {some(barcodes, 2)}; {some(adata.obs_names, 2)})"
        )
    columns = _columns(adata, panel, path)
    counts = raw_counts(
        adata.X[rows[found]], spots=barcodes[found], genes=adata.var_names, name=str(path)
    )
    library_size = np.asarray(counts.sum(1)).ravel()
    n_unmatched = int((~found).sum())
    return TaskSample(features[found], counts[:, columns], library_size, n_unmatched, files)


def _columns(adata: AnnData, panel: tuple[str, ...], path: Path) -> NDArray[np.intp]:
    absent = [gene for gene in panel if gene not in adata.var_names]
    if absent:
        raise InputError(
            f"{path}: no counts of {some(absent)}, which {PANEL} lists; take the gene out of the "
            "list, or the sample out of the splits"
        )
    if adata.X is None:
        raise InputError(f"{path}: X is empty; raw counts are needed there")
    columns = adata.var_names.get_indexer_for(list(panel))
    check_unique(adata.var_names[columns], f"{path}: gene")
    return columns


def _read_embeddings(path: Path) -> tuple[NDArray, pd.Index]:
    with open_hdf5(path, "embeddings", "barcodes") as file:
        features = np.asarray(file["embeddings"][:])
        barcodes = decoded(np.asarray(file["barcodes"][:]).ravel())
    if features.ndim != 2 or len(features) != len(barcodes) or features.dtype.kind != "f":
        raise InputError(
            f"{path}: embeddings are {features.dtype} of shape {features.shape}, but floats "
            f"[{len(barcodes)} barcodes, features] are needed; embed the sample again"
        )
    wrong = ~np.isfinite(features).all(1)
    if wrong.any():
        raise InputError(f"{path}: embedding of spot {some(barcodes[wrong])} is not finite")
    return features, barcodes
