"""Matrices of 10x Genomics: all forms give the same, and every refusal."""

from __future__ import annotations

import gzip
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from strank.errors import InputError
from strank.io.tenx import find_file, read_matrix

COUNTS = np.array([[0, 2, 5], [1, 0, 7]])
BARCODES = ["AC-1", "GT-1"]
# pandas would take "NA" for nothing, and a quote for the beginning of a text.
FEATURES = pd.DataFrame({"id": ["ENSG1", "ENSG2", "ENSG3"], "symbol": ["NA", '"B', "C"]})


@pytest.fixture(params=["m.h5", "m"])
def path(request, tmp_path: Path) -> Path:
    return tmp_path / request.param


def test_both_forms_hold_the_same(path, write_tenx):
    matrix = read_matrix(write_tenx(path, COUNTS, BARCODES, FEATURES))
    np.testing.assert_array_equal(matrix.counts.toarray(), COUNTS)
    assert list(matrix.barcodes) == BARCODES
    assert [*matrix.symbols, *matrix.ids] == [*FEATURES["symbol"], *FEATURES["id"]]
    assert matrix.dropped_features == {}


def test_counts_that_float32_rounds(path, write_tenx):
    """As scanpy reads them."""
    counts = (COUNTS * (2**24 + 1)).astype(np.int32)
    matrix = read_matrix(write_tenx(path, counts, BARCODES, FEATURES))
    np.testing.assert_array_equal(matrix.counts.toarray().astype(np.int64), counts)


def test_what_is_no_gene_is_dropped_and_counted(path, write_tenx):
    kinds = FEATURES.assign(kind=["Negative Control Probe", "Gene Expression", "Antibody Capture"])
    matrix = read_matrix(write_tenx(path, COUNTS, BARCODES, kinds))
    np.testing.assert_array_equal(matrix.counts.toarray(), [[2], [0]])
    assert list(matrix.ids) == ["ENSG2"]
    assert matrix.dropped_features == {"Negative Control Probe": 1, "Antibody Capture": 1}


def test_a_folder_of_version_2_behind_a_prefix(tmp_path, write_tenx):
    folder = write_tenx(tmp_path / "m", COUNTS, BARCODES, FEATURES)
    text = "".join(f"{r.id}\t{r.symbol}\n" for r in FEATURES.itertuples())
    (folder / "genes.tsv.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "features.tsv.gz").unlink()
    for held in list(folder.iterdir()):
        held.rename(held.with_name(f"GSM1_{held.name}"))
    matrix = read_matrix(folder)
    np.testing.assert_array_equal(matrix.counts.toarray(), COUNTS)
    assert list(matrix.symbols) == list(FEATURES["symbol"])


def test_hdf5_of_version_2(tmp_path, write_tenx):
    path = write_tenx(tmp_path / "m.h5", COUNTS, BARCODES, FEATURES)
    with h5py.File(path, "r+") as file:
        file.move("matrix", "GRCh38")
        features = file["GRCh38/features"]
        file["GRCh38/genes"], file["GRCh38/gene_names"] = features["id"][:], features["name"][:]
        del file["GRCh38/features"]
    matrix = read_matrix(path)
    np.testing.assert_array_equal(matrix.counts.toarray(), COUNTS)
    assert list(matrix.symbols) == list(FEATURES["symbol"])


def test_empty_filters_are_told(path, write_tenx):
    write_tenx(path, COUNTS, BARCODES, FEATURES.assign(kind="Antibody Capture"))
    with pytest.raises(InputError, match=r"m(\.h5)?: holds no genes; was everything filtered out"):
        read_matrix(path)


def test_no_barcodes_are_told(tmp_path, write_tenx):
    path = write_tenx(tmp_path / "m.h5", COUNTS[:0], np.array([], dtype="S1"), FEATURES)
    with pytest.raises(InputError, match=r"m.h5: holds no barcodes"):
        read_matrix(path)


def test_a_barcode_twice(path, write_tenx):
    write_tenx(path, COUNTS, ["AC-1", "AC-1"], FEATURES)
    with pytest.raises(InputError, match="barcode AC-1 stands twice"):
        read_matrix(path)


def test_folders_that_cannot_be_read(tmp_path, write_tenx):
    folder = write_tenx(tmp_path / "m", COUNTS, BARCODES, FEATURES)
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"AC-1\n"))
    with pytest.raises(InputError, match=r"m: the matrix is 3 x 2, but there are 3 .* and 1 bar"):
        read_matrix(folder)
    (folder / "barcodes.tsv.gz").unlink()
    with pytest.raises(InputError, match=r"m: needs matrix.mtx, features.tsv"):
        read_matrix(folder)
    with pytest.raises(InputError, match="absent: no such matrix"):
        read_matrix(tmp_path / "absent")


@pytest.mark.parametrize("name", ["m.h5", "m/matrix.mtx.gz", "m/features.tsv.gz"])
def test_truncated_files(tmp_path, write_tenx, name):
    path = tmp_path / name.split("/")[0]
    write_tenx(path, COUNTS, BARCODES, FEATURES)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"{path}: not a readable 10x matrix"):
        read_matrix(path)


def test_the_exact_name_wins_over_a_prefix(tmp_path):
    for name in ("a_m.h5", "b_m.h5"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"several m.h5 \(a_m.h5, b_m.h5\)"):
        find_file(tmp_path, "m.h5")
    (tmp_path / "m.h5").touch()
    assert find_file(tmp_path, "x.h5", "m.h5") == tmp_path / "m.h5"
    assert find_file(tmp_path / "absent", "m.h5") is None
