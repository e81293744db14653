"""What comes from elsewhere may be deep, packed, huge or a trap: each is one line, and little work.

Inputs are made here; those that were found by chance, or by hand, stand for their kinds.
"""

from __future__ import annotations

import gzip
import io
import json
import signal
import tarfile
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

from strank import hdf5_guard
from strank.cohort.store import read_h5ad
from strank.doors import parse_json, parse_toml, unpacked
from strank.errors import InputError
from strank.evaluation.regions import outlines
from strank.files import read_json
from strank.io.cells import read_transform
from strank.io.patches import read_patches, write_mosaic
from strank.io.spatialdata import _check_arrays
from strank.io.st import _read_counts
from strank.io.tables import open_hdf5, read_table
from strank.io.tenx import read_matrix
from strank.model.card import read_evidence
from strank.slides.slide import open_slide
from strank.storage import new_file

DEEP = 200


def test_lists_in_lists_end_at_a_depth(tmp_path):
    path = tmp_path / "a.json"
    for depth, far in {DEEP: False, DEEP + 1: True, 100_000: True}.items():
        path.write_text("[" * depth + "]" * depth)
        if far:
            with pytest.raises(InputError, match=r"a.json: lists within lists more than 200 deep"):
                read_json(path)
        else:
            assert read_json(path)
    path.write_text(json.dumps({"text": "[" * 1000, "list": [{}] * 5}))
    assert parse_json(path)["list"] == [{}] * 5


def test_toml_is_of_a_depth_and_size(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text("a = " + "[" * 10**5 + "]" * 10**5)
    with pytest.raises(InputError, match=r"p.toml: lists within lists"):
        parse_toml(path)
    path.write_text("a = 1\n" + "#" * 2**21)
    with pytest.raises(InputError, match=r"p.toml: 2 MB; at most 2 MB are read"):
        parse_toml(path)
    path.write_text("a = [")
    with pytest.raises(InputError, match=r"p.toml: not a readable TOML file"):
        parse_toml(path)


def test_gzip_unpacks_to_what_its_size_allows(tmp_path):
    path = tmp_path / "a.csv.gz"
    with gzip.open(path, "wb", 9) as file:
        file.write(b"x,y\n")
        for _ in range(40):
            file.write(b"0,0\n" * 2**18)
    with pytest.raises(InputError, match=r"a.csv.gz: unpacks to more than 20 times its size"):
        read_table(path, [])
    with unpacked(path, times=2000) as file:
        assert sum(map(len, iter(lambda: file.read(2**20), b""))) == 40 * 2**20 + 4


def test_a_table_of_counts_has_no_more_rows_than_its_size_allows(tmp_path, monkeypatch):
    from strank.io import tables

    monkeypatch.setattr(tables, "_MOST_ROWS", 1000)
    path = tmp_path / "A1.tsv.gz"
    path.write_bytes(gzip.compress(b"\tA\tB\n" + b"1x1\t0\t0\n" * 200_000, 9))
    with pytest.raises(InputError, match=r"A1.tsv.gz: more than [\d,]+ rows in a small file"):
        _read_counts(path)


def test_damaged_and_odd_gzip_is_named(tmp_path):
    path = tmp_path / "A1.tsv.gz"
    whole = gzip.compress("".join(f"{i}x{i}\t{i}\n" for i in range(500)).encode())
    path.write_bytes(whole[:40] + b"\xff\x00" * 30 + whole[100:])
    with pytest.raises(InputError, match=r"A1.tsv.gz: .*damaged"):
        _read_counts(path)
    path.write_bytes(gzip.compress(b"\t" + b"G" * 200_000 + b"\n1x1\t1\n"))
    with pytest.raises(InputError, match=r"A1.tsv.gz: empty or damaged table \(field larger"):
        _read_counts(path)
    path.write_bytes(whole[:3] + b"\x08" + whole[4:10] + b"n" * 2**17)
    with pytest.raises(InputError, match=r"A1.tsv.gz: a gzip file whose head does not end"):
        _read_counts(path)


def write_matrix(folder: Path, head: bytes = b"2 3 1\n1 1 4\n") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "features.tsv").write_bytes(b"E1\tA\nE2\tB\n")
    (folder / "barcodes.tsv").write_bytes(b"C-1\nD-1\nE-1\n")
    kind = b"%%MatrixMarket matrix coordinate integer general\n"
    (folder / "matrix.mtx").write_bytes(kind + head)
    return folder


def test_a_matrix_says_what_stands_beside_it(tmp_path):
    assert read_matrix(write_matrix(tmp_path / "m")).counts.toarray().tolist()[0] == [4, 0]
    for head, message in {
        b"2 3 100000000000\n1 1 4\n": "matrix.mtx: 100,000,000,000 numbers in its head, 1 below",
        b"100000 100000 1\n1 1 4\n": "m: the matrix is 100000 x 100000, but there are 2 features",
        b"2 3 1\n5 1 4\n": "m: ",
        b"2 3 1\n0 1 4\n": "m: not a readable 10x matrix",
        b"2 3 1\n1 1 x\n": "m: not a readable 10x matrix",
        b"2 3 x\n": "m: not a readable 10x matrix",
    }.items():
        with pytest.raises(InputError, match=message):
            read_matrix(write_matrix(tmp_path / "m", head))
    (tmp_path / "m/matrix.mtx").write_bytes(b"%%MatrixMarket matrix array real general\n9 9\n")
    with pytest.raises(InputError, match=r"matrix.mtx: not a sparse matrix of Matrix Market"):
        read_matrix(tmp_path / "m")


def test_of_an_archive_only_the_matrix_is_unpacked(tmp_path):
    folder, path = write_matrix(tmp_path / "m"), tmp_path / "m.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, "../../elsewhere")
        archive.addfile(link := tarfile.TarInfo("out"))
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
    assert read_matrix(path).counts.nnz == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.tar.gz"]
    with tarfile.open(path, "w:gz") as archive:
        for number in range(1500):
            archive.addfile(tarfile.TarInfo(f"{number}"))
    with pytest.raises(InputError, match=r"m.tar.gz: more than 1000 files; unpack it"):
        read_matrix(path)
    bomb = tarfile.TarInfo("matrix.mtx")
    bomb.size = 2**27
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(bomb, io.BytesIO(bytes(bomb.size)))
    with pytest.raises(InputError, match=r"m.tar.gz: unpacks to more than 100 times its size"):
        read_matrix(path)


# HDF5


def linked(file: h5py.File) -> None:
    file["X"] = h5py.ExternalLink("other.h5", "/X")


def outside(file: h5py.File) -> None:
    file.create_dataset("X", (4,), "u1", external=[("/etc/passwd", 0, 4)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4,), "u1")
    layout[:] = h5py.VirtualSource("other.h5", "X", (4,))
    file.create_virtual_dataset("X", layout)


def huge(file: h5py.File) -> None:
    file.create_dataset("X", (10**6, 10**6), "f4", chunks=(100, 100), compression="gzip")


def strings(file: h5py.File) -> None:
    file.create_dataset("X", (10**7,), h5py.string_dtype(), chunks=(1000,))


TRAPS = {
    linked: "/X lies in another file; copy it into this one",
    outside: "/X lies in another file; copy it into this one",
    virtual: "/X lies in another file; copy it into this one",
    huge: "asks for 4e+03 GB of memory, by a small file",
    strings: "asks for 1 GB of memory, by a small file",
}


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_hdf5_that_is_more_than_its_data(tmp_path, trap):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["group/same"] = file["/"]
        trap(file)
    told = TRAPS[trap].replace("+", r"\+")
    with pytest.raises(InputError, match=rf"a.h5: {told}; write the file again"):
        hdf5_guard.check_hdf5(path)
    for read in (read_h5ad, read_matrix, lambda path: open_hdf5(path, "X").__enter__()):
        with pytest.raises(InputError, match=told):
            read(path)


def test_a_string_of_four_gigabytes_in_a_small_file(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.attrs["encoding-version"] = "0.1.0"
    whole = bytearray(path.read_bytes())
    # The length of the string stands before the address of its text.
    at = whole.index(b"\x05\x00\x00\x00", whole.index(b"encoding-version"))
    whole[at : at + 4] = b"\xf0\xff\xff\xff"
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"a.h5: asks for more memory than a file of its size"):
        hdf5_guard.check_hdf5(path)


@pytest.mark.parametrize("slot", ["obs", "var"])
def test_a_column_without_values(tmp_path, slot):
    path = tmp_path / "a.h5ad"
    anndata.AnnData(
        np.eye(3, dtype=np.float32), pd.DataFrame({"section": [1, 2, 3]}, ["a", "b", "c"])
    ).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        frame = file[slot]
        frame.attrs["column-order"] = np.array(["section"], "O")
        if "section" in frame:
            del frame["section"]
        frame["section"] = h5py.Empty("f")
        frame["section"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    with pytest.raises(InputError, match=rf'a.h5ad: {slot}\["section"\] has no values'):
        read_h5ad(path)


def test_a_matrix_that_is_no_array(tmp_path):
    path = tmp_path / "a.h5ad"
    anndata.AnnData(sparse.csr_matrix(np.eye(3, dtype=np.float32))).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        attributes = dict(file["X/data"].attrs)
        del file["X/data"]
        file["X/data"] = h5py.Empty("f")
        file["X/data"].attrs.update(attributes)
    with pytest.raises(InputError, match=r"a.h5ad: X is damaged|a.h5ad: not a readable"):
        read_h5ad(path)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (-signal.SIGSEGV, "damaged (HDF5 crashes when it reads it)"),
        (-signal.SIGABRT, "damaged (HDF5 crashes when it reads it)"),
        (-signal.SIGXCPU, "damaged (reading it does not end, or takes all memory)"),
        (0xC0000005, "damaged (HDF5 crashes when it reads it)"),
        (0, None),
        (1, None),
    ],
)
def test_how_a_walk_may_end(tmp_path, monkeypatch, code, message):
    path = tmp_path / "a.h5"
    path.write_bytes(b"?")
    monkeypatch.setattr(hdf5_guard, "run_walk", lambda *given: (code, ""))
    if message is None:
        hdf5_guard.check_hdf5(path)
    else:
        with pytest.raises(InputError) as caught:
            hdf5_guard.check_hdf5(path)
        assert message in str(caught.value)


def test_a_walk_ends_in_time(tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("X", (2**31, 8), "f8", chunks=(2**10, 8), compression="gzip")
    code, _ = hdf5_guard.run_walk(path, 2**40, 1.0)
    assert code == -signal.SIGXCPU


def test_a_file_is_walked_through_once_and_a_sealed_one_never(tmp_path, monkeypatch):
    walked = []
    walk = hdf5_guard.run_walk
    monkeypatch.setattr(hdf5_guard, "run_walk", lambda *given: walked.append(given) or walk(*given))
    adata = anndata.AnnData(sparse.csr_matrix(np.eye(3, dtype=np.float32)))
    adata.write_h5ad(tmp_path / "plain.h5ad")
    content = (tmp_path / "plain.h5ad").read_bytes()
    with new_file(tmp_path / "sealed.h5ad", seal=True) as file:
        file.write(content)
    for _ in range(2):
        for name in ("plain", "sealed"):
            read_h5ad(tmp_path / f"{name}.h5ad")
            read_h5ad(tmp_path / f"{name}.h5ad", backed="r").file.close()
    assert [given[0].name for given in walked] == ["plain.h5ad"]
    # Another file in its place is another file.
    (tmp_path / "plain.h5ad").write_bytes(content + b" ")
    read_h5ad(tmp_path / "plain.h5ad")
    assert len(walked) == 2


# Pictures and places


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="20000" height="20000"/>'),
        ("a.png", b'<svg xmlns="http://www.w3.org/2000/svg" width="20000" height="20000"/>'),
        ("a.pdf", b"%PDF-1.4\n"),
        ("a.ppm", b"P6 2 2 255\n" + bytes(12)),
        ("a.csv", b"1,2\n3,4\n"),
        ("a.tif", b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 2 +X 2\n" + bytes(16)),
    ],
)
def test_what_is_no_picture_is_not_drawn(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: not an image that can be read"):
        open_slide(tmp_path / name, 0.5)


def test_webp_is_not_read(tmp_path):
    Image.new("RGB", (40, 30), "white").save(tmp_path / "a.webp")
    with pytest.raises(InputError, match=r"a.webp: not an image that can be read"):
        open_slide(tmp_path / "a.webp", 0.5)


@pytest.mark.parametrize("um", [1e-320, 1e-9, 1e9, 1e308])
def test_no_slide_has_such_pixels(tmp_path, um):
    Image.new("RGB", (40, 30), "white").save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"a.png: no slide has .* µm per pixel"):
        open_slide(tmp_path / "a.png", um)


@pytest.mark.parametrize("corner", [(2e6, 0), (3e5, 3e5), (1e300, 0), (np.nan, 0)])
def test_patches_far_apart_make_no_mosaic(tmp_path, corner):
    path = tmp_path / "X1.h5"
    with h5py.File(path, "w") as file:
        file["img"] = np.zeros((3, 24, 24, 3), np.uint8)
        file["coords"] = np.array([(0, 0), (30, 30), corner], float)
        file["barcode"] = np.array([b"a", b"b", b"c"])
        file["coords"].attrs.update({"pixel_size": 0.5, "patch_size_src": 24})
    with pytest.raises(InputError, match=r"X1.h5: (3 patches would lie in|coords are not)"):
        write_mosaic(read_patches(path), tmp_path / "X1.tif")
    assert not (tmp_path / "X1.tif").exists()


def write_region(path: Path, corners: np.ndarray) -> Path:
    ring = [*corners.tolist(), corners[0].tolist()]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    return path


def test_an_outline_that_crosses_itself_all_over(tmp_path):
    path, turns = tmp_path / "r.geojson", np.arange(20_000)
    write_region(path, 1000 * np.column_stack([np.cos(turns), np.sin(turns)]))
    with pytest.raises(InputError, match=r"r.geojson: region 'unnamed': the 20,000 sides .* cross"):
        outlines(path)


def test_many_corners_that_are_an_outline(tmp_path):
    angle = np.linspace(0, 2 * np.pi, 50_000, endpoint=False)
    radius = 1000 + 5 * np.sin(2000 * angle)
    corners = radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
    regions, _ = outlines(write_region(tmp_path / "r.geojson", corners))
    assert regions["unnamed"].area == pytest.approx(np.pi * 1e6, rel=1e-3)


def test_tables_of_more_columns_below_than_above(tmp_path):
    (tmp_path / "a.csv").write_text("x,y\n1,2,3,4\n1,2,3,4\n")
    with pytest.raises(InputError, match=r"a.csv: not a readable table: more columns below"):
        read_table(tmp_path / "a.csv", ["x"])


def test_a_parquet_of_a_billion_rows(tmp_path, monkeypatch):
    from strank.io import tables

    monkeypatch.setattr(tables, "_MOST_CELLS", 1000)
    pd.DataFrame({"a": np.zeros(10**6)}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a.parquet: 1,000,000 rows in a small file"):
        read_table(tmp_path / "a.parquet", ["a"])


def test_a_group_whose_names_cannot_be_listed(tmp_path):
    """anndata looks its members up by name, and in some of these HDF5 never comes back."""
    path = tmp_path / "a.h5ad"
    with h5py.File(path, "w", libver="earliest") as file:
        file["X"], file["obs"] = np.eye(3), np.eye(3)
    path.write_bytes(path.read_bytes().replace(b"SNOD", b"SNOX"))
    with pytest.raises(InputError, match=r"a.h5ad: / is damaged \(its members cannot be listed\)"):
        read_h5ad(path, backed="r")


@pytest.mark.parametrize("content", ["[]", "1", '"text"', "null", '{"warnings": 1}'])
def test_facts_have_names(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    (tmp_path / "summary.csv").write_text("method,section,scc,depth_matched,lift,deviance,slope\n")
    with pytest.raises(InputError, match=r"evaluation.json: (holds no named facts|warnings: not)"):
        read_evidence(tmp_path, {})


def write_zarr(folder: Path, shape: list[int], *, image: bool = False) -> Path:
    place = folder / ("images/he" if image else "tables/table/X")
    place.mkdir(parents=True)
    grid = {"name": "regular", "configuration": {"chunk_shape": [64, 64]}}
    array = {"node_type": "array", "shape": shape, "chunk_grid": grid}
    (place / "zarr.json").write_text(json.dumps(array))
    return folder


def test_a_zarr_asks_for_what_its_folder_can_hold(tmp_path):
    with pytest.raises(InputError, match=r"a.zarr: asks for .* GB of memory, by a small folder"):
        _check_arrays(write_zarr(tmp_path / "a.zarr", [10**6, 10**5]))
    _check_arrays(write_zarr(tmp_path / "b.zarr", [10**3, 10**3]))
    # An image is read by its chunks.
    _check_arrays(write_zarr(tmp_path / "c.zarr", [10**6, 10**5], image=True))
    (tmp_path / "b.zarr/zarr.json").write_text("[" * 300 + "]" * 300)
    with pytest.raises(InputError, match=r"b.zarr: not a readable SpatialData zarr .*lists within"):
        _check_arrays(tmp_path / "b.zarr")


def test_a_number_at_which_pandas_crashes(tmp_path):
    path = tmp_path / "he.csv"
    path.write_text("1 0 0\n0 1 0.000000000000000000e+00259259259259522e+00\n0 0 1\n")
    with pytest.raises(InputError, match=r"he.csv: not a readable 3 x 3 matrix"):
        read_transform(path)
