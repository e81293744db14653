"""Tasks of HEST-Benchmark: what is read, in which order, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from strank.errors import InputError
from strank.io import read_hest_task

# Rows are the spots s0 s1 s2 s3, columns the genes C A B and one that no panel asks for.
GENES = ["C", "A", "B", "other"]
COUNTS = np.array([[1, 2, 0, 5], [0, 3, 1, 0], [4, 0, 2, 1], [0, 0, 0, 0]])
SPOTS = ["s0", "s1", "s2", "s3"]


def write_counts(folder: Path, name: str = "X1", counts=COUNTS, genes=GENES, spots=SPOTS) -> None:
    adata = anndata.AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame(index=spots),
        var=pd.DataFrame(index=genes),
    )
    adata.write_h5ad(folder / f"task/adata/{name}.h5ad")


def write_embeddings(folder: Path, name: str = "X1", **changed) -> None:
    """In the shapes of HEST's ``save_hdf5``: one-dimensional assets get a second axis."""
    datasets = {
        "embeddings": np.arange(12, dtype=np.float32).reshape(4, 3),
        "barcodes": np.array([["s2"], ["s0"], ["nowhere"], ["s3"]], dtype="S"),
        "coords": np.zeros((4, 2)),
        **changed,
    }
    with h5py.File(folder / f"emb/{name}.h5", "w") as file:
        for key, values in datasets.items():
            if values is not None:
                file.create_dataset(key, data=values, maxshape=(None, *values.shape[1:]))


def write_split(folder: Path, which: str, *names: str, path: str = "adata/{}.h5ad") -> None:
    rows = [(name, f"patches/{name}.h5", path.format(name)) for name in names]
    table = pd.DataFrame(rows, columns=["sample_id", "patches_path", "expr_path"])
    table.to_csv(folder / f"task/splits/{which}.csv", index=False)


def write_panel(folder: Path, content: object) -> None:
    (folder / "task/var_50genes.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("task/splits", "task/adata", "emb"):
        (tmp_path / part).mkdir(parents=True)
    for name in ("X1", "X2", "X3"):
        write_counts(tmp_path, name)
        write_embeddings(tmp_path, name)
    write_panel(tmp_path, {"genes": ["A", "B", "C"]})
    for k, test in {0: "X1", 10: "X2", 2: "X3"}.items():
        write_split(tmp_path, f"train_{k}", *({"X1", "X2", "X3"} - {test}))
        write_split(tmp_path, f"test_{k}", test)
    return tmp_path


def read(folder: Path, **options):
    return read_hest_task(folder / "task", folder / "emb", **options)


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        read(folder)
    return str(caught.value).replace(str(folder), "")


def test_spots_come_in_the_order_of_embeddings_and_genes_in_that_of_the_panel(folder):
    told: list[int] = []
    task = read(folder, advance=told.append)
    assert told == [1, 1, 1]
    assert task.panel == ("A", "B", "C")
    assert [(fold.name, fold.test) for fold in task.folds] == [
        ("0", ("X1",)),
        ("2", ("X3",)),
        ("10", ("X2",)),
    ]
    assert set(task.folds[0].train) == {"X2", "X3"}
    sample = task.samples["X1"]
    np.testing.assert_array_equal(sample.features, [[0, 1, 2], [3, 4, 5], [9, 10, 11]])
    assert sample.features.dtype == np.float32
    np.testing.assert_array_equal(sample.counts.toarray(), [[0, 2, 4], [2, 0, 1], [0, 0, 0]])
    np.testing.assert_array_equal(sample.library_size, [7, 8, 0])
    assert sample.n_unmatched == 1


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("task/splits", "/task/splits: no such folder"),
        ("emb", "/emb: no such folder"),
        ("task/var_50genes.json", "/task/var_50genes.json: no such file"),
        ("task/splits/test_2.csv", "/task/splits/test_2.csv: no such file; every fold has"),
        ("task/adata/X2.h5ad", "/task/adata/X2.h5ad: no such file; sample X2 has no counts"),
        ("emb/X2.h5", "/emb/X2.h5: no such file; sample X2 has no embeddings"),
    ],
)
def test_what_is_absent_is_named(folder, gone, message):
    path = folder / gone
    path.rename(folder / "elsewhere")
    assert refused(folder).startswith(message)


def test_no_splits_at_all(folder):
    for path in (folder / "task/splits").iterdir():
        path.unlink()
    assert "no train_<number>.csv and test_<number>.csv there" in refused(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["A"], 'needs {"genes": [names]}'),
        ({"genes": []}, 'needs {"genes": [names]}'),
        ({"genes": ["A", "B", "A"]}, "gene A stands twice"),
        ({"genes": ["A", "ERBB2"]}, "X1.h5ad: no counts of ERBB2, which var_50genes.json lists"),
    ],
)
def test_panels_that_cannot_be_used(folder, content, message):
    write_panel(folder, content)
    write_split(folder, "train_0", "X1")
    write_split(folder, "test_0", "X2")
    assert message in refused(folder)


def test_splits_that_cannot_be_used(folder):
    split = folder / "task/splits/test_0.csv"
    split.write_text("sample_id,patches_path\nX1,patches/X1.h5\n")
    assert "test_0.csv: lacks column expr_path; it has sample_id, patches_path" in refused(folder)
    split.write_text("")
    assert "test_0.csv: not a readable table" in refused(folder)
    write_split(folder, "test_0")
    assert "test_0.csv: no samples" in refused(folder)
    write_split(folder, "test_0", "X1", "X1")
    assert "test_0.csv: sample X1 twice" in refused(folder)
    write_split(folder, "test_0", "X1", "X2")
    assert "fold 0 has sample X2 in training and in test" in refused(folder)
    write_split(folder, "test_0", "X1", path="adata/again/{}.h5ad")
    assert "sample X1 has two expr_path: adata/again/X1.h5ad and adata/X1.h5ad" in refused(folder)


@pytest.mark.parametrize("path", ["/etc/{}.h5ad", "../{}.h5ad", "adata/../../{}.h5ad", ""])
def test_no_path_leads_out_of_the_task(folder, path):
    write_split(folder, "test_0", "X1", path=path)
    assert "sample X1: expr_path" in refused(folder)
    assert "is not inside the task folder" in refused(folder)


@pytest.mark.parametrize("name", ["../X1", "/X1", "sub/X1", "", ".."])
def test_no_sample_leads_out_of_the_embeddings(folder, name):
    write_split(folder, "test_0", name, path="adata/X1.h5ad")
    # ".." is a name here: its file would be "...h5".
    told = "sample .. has no embeddings" if name == ".." else "is not the name of a file"
    assert told in refused(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"barcodes": None}, "/emb/X1.h5: lacks dataset barcodes; it has coords, embeddings"),
        (
            {"barcodes": np.array([["s2"], ["s0"], ["s2"], ["s3"]], dtype="S")},
            "/emb/X1.h5: barcode s2 stands twice",
        ),
        (
            {"barcodes": np.array([["a"], ["b"], ["c"], ["d"]], dtype="S")},
            "sample X1: no barcode stands in both /emb/X1.h5 and /task/adata/X1.h5ad "
            "(e.g. a, b and 2 more; s0, s1 and 2 more)",
        ),
        (
            {"embeddings": np.ones((3, 3), np.float32)},
            "embeddings are float32 of shape (3, 3), but floats [4 barcodes, features] are needed",
        ),
        (
            {"embeddings": np.array([[1, 2], [np.nan, 1], [1, 1], [0, np.inf]])},
            "/emb/X1.h5: embedding of spot s0, s3 is not finite",
        ),
    ],
)
def test_embeddings_that_cannot_be_used(folder, changed, message):
    write_embeddings(folder, "X1", **changed)
    write_split(folder, "train_0", "X1")
    write_split(folder, "test_0", "X2")
    assert message in refused(folder)


def test_other_embeddings_that_cannot_be_used(folder):
    write_split(folder, "train_0", "X1")
    write_split(folder, "test_0", "X2")
    write_embeddings(folder, "X2", embeddings=np.ones((4, 5), np.float32))
    assert "/emb/X2.h5: 5 features, but X1 has 3; embed all samples with" in refused(folder)
    (folder / "emb/X1.h5").write_bytes(b"no HDF5")
    assert "/emb/X1.h5: not a readable HDF5 file" in refused(folder)


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "is negative"), (0.5, "is not a whole number"), (np.nan, "is not a finite number")],
)
def test_counts_must_be_raw_in_genes_outside_the_panel_too(folder, value, message):
    counts = COUNTS.astype(np.float64)
    counts[2, 3] = value
    for name in ("X1", "X2", "X3"):
        write_counts(folder, name, counts=counts)
    told = refused(folder)
    assert f".h5ad: spot s2, gene other: {value:g} {message}; raw counts are needed" in told


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_matrix])
def test_true_and_false_are_no_counts(folder, form):
    for name in ("X1", "X2", "X3"):
        path = folder / f"task/adata/{name}.h5ad"
        adata = anndata.read_h5ad(path)
        adata.X = form(COUNTS > 0)
        adata.write_h5ad(path)
    assert ".h5ad: holds True and False, whether a gene was seen" in refused(folder)


def test_names_of_spots_and_genes_must_be_unambiguous(folder):
    write_split(folder, "train_0", "X1")
    write_split(folder, "test_0", "X2")
    write_counts(folder, spots=["s0", "s1", "s0", "s3"])
    assert "/task/adata/X1.h5ad: barcode s0 stands twice" in refused(folder)
    write_counts(folder, genes=["C", "A", "B", "A"])
    assert "/task/adata/X1.h5ad: gene A stands twice" in refused(folder)
    (folder / "task/adata/X1.h5ad").write_bytes(b"no HDF5")
    assert "/task/adata/X1.h5ad: not a readable .h5ad file" in refused(folder)
    anndata.AnnData(obs=pd.DataFrame(index=SPOTS), var=pd.DataFrame(index=GENES)).write_h5ad(
        folder / "task/adata/X1.h5ad"
    )
    assert "X1.h5ad: X is empty; raw counts are needed there" in refused(folder)
