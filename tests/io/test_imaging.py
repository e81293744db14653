"""CosMx and MERSCOPE: cells in the layout of each, on an H&E image that is aligned to them."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from anndata import AnnData
from PIL import Image

from strank.cohort.contract import section_info
from strank.cohort.store import read_section
from strank.errors import InputError
from strank.io import read_cosmx, read_merscope

N_CELLS, N_GENES = 240, 12
SCALE = 2.5  # pixels of the run a pixel of the H&E
PIXEL_UM = {"cosmx": 0.12028, "merscope": 0.108}
SHIFT = np.array([1500.0, -700.0])
GENES = [f"GENE{i}" for i in range(N_GENES)]
CONTROLS = {
    "cosmx": ["NegPrb01", "NegPrb2", "Negative3", "SystemControl1", "FalseCode7"],
    "merscope": ["Blank-1", "Blank-12", "blank_3"],
}
DROPPED = {"cosmx": {"negative probe": 3, "system control": 2}, "merscope": {"blank": 3}}
TRANSFORM = "images/micron_to_mosaic_pixel_transform.csv"


@dataclass(frozen=True)
class Run:
    """A folder of a platform, and where in the H&E image its cells truly are."""

    platform: str
    folder: Path
    pixels: np.ndarray
    counts: np.ndarray
    names: list[str]

    def read(self, **options) -> AnnData:
        given = {"image": self.folder.parent / "he.png", "section": "S1", "patient": "P"}
        given |= {"alignment": self.folder.parent / "he.csv"} | options
        return {"cosmx": read_cosmx, "merscope": read_merscope}[self.platform](self.folder, **given)

    @property
    def um(self) -> np.ndarray:
        px = np.column_stack([self.pixels, np.ones(N_CELLS)]) @ matrix(self.platform).T
        px = px[:, :2]
        return px * PIXEL_UM["cosmx"] if self.platform == "cosmx" else (px - 300) * 0.108

    def file(self, name: str) -> Path:
        return next(self.folder.rglob(f"*{name}*"))


def matrix(platform: str) -> np.ndarray:
    """Turned a little; CosMx' y goes up."""
    turn = np.deg2rad(8)
    found = np.eye(3)
    found[:2, :2] = SCALE * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    found[:2, 2] = SHIFT
    return np.diag([1, -1 if platform == "cosmx" else 1, 1]) @ found


def write_cosmx(folder: Path, px: np.ndarray, counts: np.ndarray) -> list[str]:
    fov, cell = np.arange(N_CELLS) // 80 + 1, np.arange(N_CELLS) % 80 + 1
    table = pd.DataFrame(counts, columns=[*GENES, *CONTROLS["cosmx"]])
    table.insert(0, "fov", fov)
    table.insert(1, "cell_ID", cell)
    outside = pd.DataFrame([[n, 0, *[9] * (table.shape[1] - 2)] for n in (1, 2, 3)])
    table = pd.concat([outside.set_axis(table.columns, axis=1), table])
    table.to_csv(folder / "S1_exprMat_file.csv", index=False)
    places = pd.DataFrame({"fov": fov, "cell_ID": cell, "Area": 400})
    origin = np.array([[0, 0], [4256, 0], [0, 4256]])[fov - 1]
    places[["CenterX_local_px", "CenterY_local_px"]] = px - origin
    places[["CenterX_global_px", "CenterY_global_px"]] = px
    places.to_csv(folder / "S1_metadata_file.csv", index=False)
    fields = pd.DataFrame({"FOV": [1, 2, 3]})
    fields[["x_global_px", "y_global_px"]] = [[0, 0], [4256, 0], [0, 4256]]
    mm = fields[["x_global_px", "y_global_px"]] * PIXEL_UM["cosmx"] / 1000
    fields[["x_global_mm", "y_global_mm"]] = mm + 7
    fields.to_csv(folder / "S1_fov_positions_file.csv", index=False)
    return [f"{c}_{f}" for f, c in zip(fov, cell, strict=True)]


def write_merscope(folder: Path, px: np.ndarray, counts: np.ndarray) -> list[str]:
    # Longer than any integer of a machine.
    names = [f"1108834247646119244002{i:017}" for i in range(N_CELLS)]
    table = pd.DataFrame(counts, names, columns=[*GENES, *CONTROLS["merscope"]])
    table.to_csv(folder / "cell_by_gene.csv", index_label="cell")
    um = (px - 300) * PIXEL_UM["merscope"]
    places = pd.DataFrame({"fov": 3, "volume": 500.0}, index=names)
    places[["center_x", "center_y"]] = um
    places.sample(frac=1, random_state=0).to_csv(
        folder / "cell_metadata.csv", index_label="EntityID"
    )
    (folder / "images").mkdir()
    scale = 1 / PIXEL_UM["merscope"]
    np.savetxt(folder / TRANSFORM, [[scale, 0, 300], [0, scale, 300], [0, 0, 1]])
    return names


def make(platform: str, folder: Path) -> Run:
    rng = np.random.default_rng(2)
    pixels = rng.uniform([60, 50], [640, 450], size=(N_CELLS, 2))
    counts = rng.poisson(0.9, size=(N_CELLS, N_GENES + len(CONTROLS[platform])))
    folder.mkdir()
    px = (np.column_stack([pixels, np.ones(N_CELLS)]) @ matrix(platform).T)[:, :2]
    write = {"cosmx": write_cosmx, "merscope": write_merscope}[platform]
    names = write(folder, px, counts)
    image = np.full((500, 700, 3), 240, np.uint8)
    image[40:460, 50:650] = rng.integers(80, 190, size=(420, 600, 3))
    Image.fromarray(image).save(folder.parent / "he.png")
    np.savetxt(folder.parent / "he.csv", matrix(platform), delimiter=",")
    return Run(platform, folder, pixels, counts, names)


@pytest.fixture(params=["cosmx", "merscope"])
def run(request, tmp_path: Path) -> Run:
    return make(request.param, tmp_path / "S1")


@pytest.fixture
def cosmx(tmp_path: Path) -> Run:
    return make("cosmx", tmp_path / "S1")


def check_whole(run: Run, adata: AnnData) -> None:
    at = [run.names.index(name) for name in adata.obs_names]
    assert sorted(at) == list(range(N_CELLS))
    np.testing.assert_array_equal(adata.X.toarray(), run.counts[at, :N_GENES])
    np.testing.assert_allclose(adata.obsm["spatial"], run.pixels[at], atol=1e-6)
    assert list(adata.var_names) == GENES


def test_cells_come_back_where_they_are(run):
    adata = run.read()
    check_whole(run, adata)
    info = section_info(adata)
    assert info.technology == {"cosmx": "CosMx", "merscope": "MERSCOPE"}[run.platform]
    assert info.um_per_pixel == pytest.approx(SCALE * PIXEL_UM[run.platform])
    assert info.provenance["dropped_features"] == DROPPED[run.platform]
    outside = 3 if run.platform == "cosmx" else 0
    assert info.provenance["dropped_spots"]["in counts only"] == outside


@pytest.mark.parametrize("size", [20, 55.5, 100])
def test_squares_agree_with_groupby(run, size):
    adata = run.read(bin_um=size)
    square = np.floor(run.um / size).astype(int)
    groups = pd.DataFrame(run.counts[:, :N_GENES]).groupby([f"{x}x{y}" for x, y in square])
    seen = groups.sum().loc[adata.obs_names]
    np.testing.assert_array_equal(adata.X.toarray(), seen)
    beyond = section_info(adata).provenance["dropped_spots"]["beyond the image"]
    assert adata.n_obs + beyond == len(groups)
    assert section_info(adata).spot_pitch_um == size


def packed(run: Run) -> None:
    names = ["exprMat_file.csv", "metadata_file.csv", "fov_positions_file.csv"]
    for name in names if run.platform == "cosmx" else ["cell_by_gene.csv", "cell_metadata.csv"]:
        path = run.file(name)
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def prefixed(run: Run) -> None:
    for path in [p for p in run.folder.rglob("*") if p.is_file()]:
        path.rename(path.with_name(f"GSM1_{path.name}"))


def edit(run: Run, name: str, change: Callable[[str], str]) -> None:
    path = run.file(name)
    path.write_text(change(path.read_text()))


def without_titles(run: Run) -> None:
    """MERSCOPE until 2022; CosMx with columns that name cells again."""
    if run.platform == "merscope":
        edit(run, "cell_by_gene.csv", lambda text: text.removeprefix("cell"))
        edit(run, "cell_metadata.csv", lambda text: text.removeprefix("EntityID"))
    else:
        table = pd.read_csv(run.file("exprMat_file"))
        table.insert(2, "cell", [f"c_1_{f}_{c}" for f, c in table[["fov", "cell_ID"]].to_numpy()])
        table.to_csv(run.file("exprMat_file"), index=False)


def as_floats(run: Run) -> None:
    name = "exprMat_file" if run.platform == "cosmx" else "cell_by_gene"
    keys = 2 if run.platform == "cosmx" else 1
    table = pd.read_csv(run.file(name), dtype={0: str})
    table = pd.concat([table.iloc[:, :keys], table.iloc[:, keys:].astype(float)], axis=1)
    table.to_csv(run.file(name), index=False)


def spaced_alignment(run: Run) -> None:
    np.savetxt(run.folder.parent / "he.csv", matrix(run.platform), delimiter="  ")


LAYOUTS = {
    "gzip": packed,
    "prefixed": prefixed,
    "titles": without_titles,
    "floats": as_floats,
    "an alignment with blanks": spaced_alignment,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(run, layout):
    LAYOUTS[layout](run)
    check_whole(run, run.read())


@pytest.mark.parametrize("start", ["", "1", "22"])
def test_names_that_are_numbers(tmp_path, start):
    """MERSCOPE calls cells by numbers; leading zeros stay, which no number has."""
    run, long = make("merscope", tmp_path / "S1"), "1108834247646119244002"
    for name in ("cell_by_gene.csv", "cell_metadata.csv"):
        edit(run, name, lambda text: text.replace(long, start))
    adata = run.read()
    assert list(adata.obs_names) == [name.replace(long, start) for name in run.names]
    np.testing.assert_array_equal(adata.X.toarray(), run.counts[:, :N_GENES])


def test_a_large_table_is_read_in_parts(run, monkeypatch):
    monkeypatch.setattr("strank.io.tables._ROWS", 7)
    check_whole(run, run.read())


def no_fields(run: Run) -> None:
    run.file("fov_positions").unlink()


def fields_in_pixels(run: Run) -> None:
    path = run.file("fov_positions")
    pd.read_csv(path).drop(columns=["x_global_mm", "y_global_mm"]).to_csv(path, index=False)


def one_field(run: Run) -> None:
    path = run.file("fov_positions")
    pd.read_csv(path).iloc[:1].to_csv(path, index=False)


@pytest.mark.parametrize("lack", [no_fields, fields_in_pixels, one_field])
@pytest.mark.parametrize("truly", [0.12028, 0.18])
def test_without_places_in_mm_the_image_tells_the_scale(cosmx, lack, truly):
    """The first CosMx had pixels of 0.18 µm, and neither is assumed."""
    lack(cosmx)
    with pytest.raises(InputError, match="`um_per_pixel`"):
        cosmx.read()
    adata = cosmx.read(um_per_pixel=SCALE * truly)
    check_whole(cosmx, adata)
    assert section_info(adata).um_per_pixel == SCALE * truly
    squares = cosmx.read(um_per_pixel=SCALE * truly, bin_um=50)
    place = np.floor(cosmx.um / 0.12028 * truly / 50).astype(int)
    counts = pd.Series(1, [f"{x}x{y}" for x, y in place]).groupby(level=0).sum()
    assert list(squares.obs["n_cells"]) == list(counts[squares.obs_names])


def test_a_scale_that_the_image_states_is_checked_against_the_fields(cosmx):
    pixels = np.asarray(Image.open(cosmx.folder.parent / "he.png"))
    wrong = cosmx.folder.parent / "he.tif"
    tifffile.imwrite(wrong, pixels, photometric="rgb", resolution=(2e4, 2e4), resolutionunit=3)
    with pytest.raises(InputError, match=r"the image says 0.5 µm .* the positions make it 0.3007"):
        cosmx.read(image=wrong)


def drop(name: str) -> Callable[[Run], object]:
    return lambda run: run.file(name).unlink()


BAD = {
    "no counts": (
        lambda run: drop("exprMat" if run.platform == "cosmx" else "by_gene")(run),
        {},
        r"S1: no (exprMat_file|cell_by_gene).csv or .*.csv.gz; give the folder of a",
    ),
    "no cells": (
        drop("metadata"),
        {},
        r"S1: no (metadata_file|cell_metadata).csv or .*.csv.gz; give the folder of a",
    ),
    "no centres": (
        lambda run: edit(run, "metadata", lambda t: t.replace("enter", "entre")),
        {},
        "metadata.*: lacks column [Cc]enter",
    ),
    "an absent centre": (
        lambda run: edit(
            run, "metadata", lambda t: "\n".join([*t.split("\n")[:-2], _without_end(t), ""])
        ),
        {},
        "metadata.*: cell .* has no centre",
    ),
    "a gene twice": (
        lambda run: edit(run, "gene" if run.platform == "merscope" else "exprMat", _twice),
        {},
        "column GENE0 stands twice",
    ),
    "no number": (
        lambda run: edit(run, "gene" if run.platform == "merscope" else "exprMat", _word),
        {},
        "not a readable table of counts .*many",
    ),
    "half a count": (
        lambda run: edit(run, "gene" if run.platform == "merscope" else "exprMat", _half),
        {},
        "gene GENE11: 0.5 is not a whole number",
    ),
    "other cells": (
        lambda run: edit(run, "metadata", _other_cells),
        {},
        "no name in common with the matrix beside it",
    ),
    "no alignment": (
        lambda run: None,
        {"alignment": None},
        "he.png: no alignment given; .* `alignment=FILE`. .* 1,0,0 and 0,1,0 and 0,0,1",
    ),
    "no image": (lambda run: None, {"image": None}, "give the full-resolution H&E image"),
    "stretched": (
        lambda run: (run.folder.parent / "he.csv").write_text("2,0,1\n0,1,1\n0,0,1\n"),
        {},
        "the alignment scales one direction by 2 and another by 1",
    ),
    "of another image": (
        lambda run: (run.folder.parent / "he.csv").write_text("1,0,9000\n0,1,0\n0,0,1\n"),
        {"um_per_pixel": None},
        "with he.csv only .* of the cells lie on the image .* is it the alignment of this image",
    ),
}


def _without_end(text: str) -> str:
    return text.strip().split("\n")[-1].rsplit(",", 1)[0] + ","


def _twice(text: str) -> str:
    return text.replace("GENE1,", "GENE0,", 1)


def _last_gene(text: str, value: str) -> str:
    head, *rows = text.strip().split("\n")
    at = head.split(",").index("GENE11")
    cells = rows[-1].split(",")
    cells[at] = value
    return "\n".join([head, *rows[:-1], ",".join(cells), ""])


def _word(text: str) -> str:
    return _last_gene(text, "many")


def _half(text: str) -> str:
    return _last_gene(text, "0.5")


def _other_cells(text: str) -> str:
    head, *rows = text.strip().split("\n")
    return "\n".join([head, *(f"9{row}" for row in rows), ""])


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named(run, kind):
    break_it, options, message = BAD[kind]
    break_it(run)
    with pytest.raises(InputError, match=message):
        run.read(**options)


def test_spatialdata_reads_the_same_merscope(tmp_path):
    from spatialdata_io import merscope

    run = make("merscope", tmp_path / "S1")
    cells = pd.read_csv(run.folder / "cell_metadata.csv", dtype={0: str}).set_index("EntityID")
    # It takes the two tables to be in one order.
    cells.loc[run.names].to_csv(run.folder / "cell_metadata.csv")
    off = {"transcripts": False, "cells_boundaries": False, "mosaic_images": False}
    theirs, mine = merscope(run.folder, **off)["table"], run.read()
    assert list(mine.var_names) == list(theirs.var_names)
    np.testing.assert_array_equal(mine.X.toarray(), theirs[mine.obs_names].X)
    scale = np.genfromtxt(run.folder / TRANSFORM)
    mosaic = np.column_stack([theirs[mine.obs_names].obsm["spatial"], np.ones(N_CELLS)]) @ scale.T
    pixels = mosaic @ np.linalg.inv(matrix("merscope")).T
    np.testing.assert_allclose(mine.obsm["spatial"], pixels[:, :2], atol=1e-6)


def test_spatialdata_reads_the_same_cosmx(cosmx):
    from spatialdata_io import cosmx as read_theirs

    for name in ("CellComposite", "CellLabels"):
        (cosmx.folder / name).mkdir()
    theirs, mine = read_theirs(cosmx.folder, transcripts=False)["table"], cosmx.read()
    assert list(mine.obs_names) == list(theirs.obs_names)
    assert (mine.X != theirs[:, mine.var_names].X).nnz == 0
    assert set(theirs.var_names) - set(mine.var_names) == set(CONTROLS["cosmx"])
    px = np.column_stack([theirs.obsm["global"], np.ones(N_CELLS)])
    pixels = px @ np.linalg.inv(matrix("cosmx")).T
    np.testing.assert_allclose(mine.obsm["spatial"], pixels[:, :2], atol=1e-6)


def test_the_command_reads_and_pools(run, tmp_path, command):
    start = "import", run.platform, run.folder, "--patient", "P", "--image", tmp_path / "he.png"
    told = command(*start, "-o", tmp_path / "c", code=2).stderr
    assert "no alignment given" in told
    assert "--alignment FILE" in told
    start = *start, "--alignment", tmp_path / "he.csv", "-o", tmp_path / "c"
    done = command(*start, "--bin", 40)
    told = ", ".join(f"{n} {kind}" for kind, n in DROPPED[run.platform].items())
    assert f"Note: section S1: dropped features: {told}" in done.stderr
    written = read_section(tmp_path / "c/S1.h5ad")
    np.testing.assert_array_equal(written.X.toarray(), run.read(bin_um=40).X.toarray())
    shutil.copytree(run.folder, tmp_path / "S2")
    told = command(*start[:2], tmp_path / "S2", *start[2:], "--image", "x.png", code=2).stderr
    assert "--alignment is of one image; import runs one after the other" in told


def edit_table(run: Run, name: str, change, **how) -> None:
    path = run.file(name)
    change(pd.read_csv(path, **how)).to_csv(path, index=False)


def test_numbers_of_cells_as_other_programs_write_them(cosmx):
    edit_table(cosmx, "metadata_file", lambda table: table.astype({"cell_ID": float, "fov": float}))
    check_whole(cosmx, cosmx.read())
    edit_table(cosmx, "exprMat_file", lambda table: table.astype({"cell_ID": float}))
    check_whole(cosmx, cosmx.read())


@pytest.mark.parametrize("at", [0, 2, -1])
def test_the_column_that_names_cells_may_stand_anywhere(tmp_path, at):
    run = make("merscope", tmp_path / "S1")

    def moved(table: pd.DataFrame) -> pd.DataFrame:
        others = list(table.columns.drop("EntityID"))
        return table[[*others[:at], "EntityID", *others[at:]]]

    edit_table(run, "cell_metadata", moved, dtype={"EntityID": str})
    check_whole(run, run.read())


@pytest.mark.parametrize("n", [1, 5])
def test_a_cell_that_is_counted_twice_is_named(run, n):
    name = {"cosmx": "exprMat_file", "merscope": "cell_by_gene"}[run.platform]
    edit_table(run, name, lambda table: pd.concat([table, table.iloc[9 : 9 + n]]), dtype=str)
    with pytest.raises(InputError, match=f"{name}.csv: cell .* stands twice"):
        run.read()
