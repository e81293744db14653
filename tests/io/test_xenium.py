from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
import zarr
from anndata import AnnData
from scipy import sparse
from scipy.io import mmwrite

from strank.cohort.contract import section_info
from strank.cohort.store import read_section
from strank.errors import InputError
from strank.io import read_xenium, write_sections

PIXEL_UM = 0.2125
SIZE = 800, 600
N_CELLS = 400
IMAGE = "run_he_image.ome.tif"
ALIGNMENT = "run_he_imagealignment.csv"
FEATURES = pd.DataFrame(
    [(f"ENSG{i:011}", f"GENE{i}", "Gene Expression") for i in range(10)]
    + [(f"NegControlProbe_{i}",) * 2 + ("Negative Control Probe",) for i in range(2)]
    + [("BLANK_1", "BLANK_1", "Unassigned Codeword")],
    columns=["id", "name", "feature_type"],
)


@dataclass(frozen=True)
class World:
    """A bundle on disk, and where in the H&E image its cells truly are."""

    folder: Path
    pixels: np.ndarray
    counts: np.ndarray
    matrix: np.ndarray

    def read(self, bin_um: float | None = None, **options) -> AnnData:
        options = {"image": self.folder / IMAGE, "section": "X1", "patient": "P"} | options
        return read_xenium(self.folder, bin_um=bin_um, **options)

    @property
    def um(self) -> np.ndarray:
        ones = np.ones((len(self.pixels), 1))
        return (np.hstack([self.pixels, ones]) @ self.matrix.T)[:, :2] * PIXEL_UM


def similarity(scale: float, degrees: float, *, mirrored: bool = False) -> np.ndarray:
    """Of the kind that Explorer exports: the image keeps to positive pixels of the morphology."""
    angle = np.deg2rad(degrees)
    turn = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix = np.eye(3)
    matrix[:2, :2] = scale * np.array(turn) @ np.diag([-1 if mirrored else 1, 1])
    matrix[:2, 2] = 6000, 7000
    return matrix


def write_matrix(path: Path, counts: np.ndarray, names: list[str]) -> None:
    stored = sparse.csr_matrix(counts.astype(np.int32))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = np.array(names, "S")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(stored, key)
        group["shape"] = np.array(counts.shape[::-1], np.int32)
        for key in FEATURES:
            group[f"features/{key}"] = FEATURES[key].to_numpy("S")
        group["features/genome"] = np.array(["Unknown"] * len(FEATURES), "S")


def make(folder: Path, matrix: np.ndarray) -> World:
    rng = np.random.default_rng(3)
    folder.mkdir()
    image = np.full((SIZE[1], SIZE[0], 3), 243, np.uint8)
    image[60:540, 80:720] = rng.integers(90, 190, size=(480, 640, 3))
    tifffile.imwrite(folder / IMAGE, image[None], photometric="rgb", metadata={"axes": "ZYXS"})
    pixels = rng.uniform([90, 70], [710, 530], size=(N_CELLS, 2))
    world = World(folder, pixels, rng.poisson(0.8, size=(N_CELLS, len(FEATURES))), matrix)
    names = [f"{i:08b}".translate(str.maketrans("01", "ab")).rjust(8, "a") for i in range(N_CELLS)]
    names = [f"{name[-8:]}-{i // 256 + 1}" for i, name in enumerate(names)]
    cells = pd.DataFrame({"cell_id": names})
    cells[["x_centroid", "y_centroid"]] = world.um
    cells.assign(cell_area=80.0).to_parquet(folder / "cells.parquet")
    write_matrix(folder / "cell_feature_matrix.h5", world.counts, names)
    about = {"analysis_sw_version": "xenium-2.0.0.10", "panel_name": "Breast", "z_step_size": 3.0}
    (folder / "experiment.xenium").write_text(json.dumps(about | {"pixel_size": PIXEL_UM}))
    np.savetxt(folder / ALIGNMENT, matrix, delimiter=",")
    return world


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make(tmp_path / "bundle", similarity(4.5, 93))


def edit_cells(world: World, change) -> None:
    path = world.folder / "cells.parquet"
    change(pd.read_parquet(path)).to_parquet(path)


def test_cells_come_back_where_they_are(world):
    adata = world.read()
    np.testing.assert_array_equal(adata.X.toarray(), world.counts[:, :10])
    np.testing.assert_allclose(adata.obsm["spatial"], world.pixels, atol=1e-6)
    assert list(adata.var_names) == [f"GENE{i}" for i in range(10)]
    info = section_info(adata)
    assert (info.technology, info.um_per_pixel) == ("Xenium", pytest.approx(4.5 * PIXEL_UM))
    assert info.provenance["dropped_features"] == {
        "Negative Control Probe": 2,
        "Unassigned Codeword": 1,
    }
    assert info.provenance["panel"] == "Breast"
    # The expected distance to the nearest of points thrown at random.
    density = N_CELLS / np.prod([620, 460]) / info.um_per_pixel**2
    assert info.spot_pitch_um == pytest.approx(0.5 / np.sqrt(density), rel=0.15)


@pytest.mark.parametrize("degrees", [0, 90, 201.5])
@pytest.mark.parametrize("mirrored", [False, True])
def test_turned_and_mirrored_images(tmp_path, degrees, mirrored):
    world = make(tmp_path / "bundle", similarity(4.7, degrees, mirrored=mirrored))
    np.testing.assert_allclose(world.read().obsm["spatial"], world.pixels, atol=1e-6)


def test_pseudo_spots_agree_with_groupby(world, tmp_path):
    adata = world.read(55)
    square = np.floor(world.um / 55).astype(int)
    groups = pd.DataFrame(world.counts[:, :10]).groupby([f"{x}x{y}" for x, y in square])
    expected = groups.sum().loc[adata.obs_names]
    np.testing.assert_array_equal(adata.X.toarray(), expected)
    assert len(groups) == adata.n_obs
    np.testing.assert_array_equal(adata.obs["n_cells"], groups.size().loc[adata.obs_names])
    assert adata.X.sum() == world.counts[:, :10].sum()
    info = section_info(adata)
    assert info.spot_diameter_um == info.spot_pitch_um == 55
    # A square's centre lies within half a diagonal of its cells, in the image.
    centre = pd.DataFrame(adata.obsm["spatial"], index=adata.obs_names)
    names = [f"{x}x{y}" for x, y in square]
    far = np.linalg.norm(centre.loc[names].to_numpy() - world.pixels, axis=1) * info.um_per_pixel
    assert 25 < far.max() <= 55 / np.sqrt(2)
    back = write_sections([adata], tmp_path / "cohort")["X1"]
    assert section_info(back) == info


def numbered(world, cells):
    write_matrix(world.folder / "cell_feature_matrix.h5", world.counts, [*map(str, cells.index)])
    return cells.assign(cell_id=cells.index)


def as_csv(world, cells):
    cells.to_csv(world.folder / "cells.csv.gz", index=False)
    (world.folder / "cells.parquet").unlink()


def as_folder(world, cells):
    (world.folder / "cell_feature_matrix.h5").unlink()
    folder = world.folder / "cell_feature_matrix"
    folder.mkdir()
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        mmwrite(file, sparse.coo_matrix(world.counts.T))
    FEATURES.to_csv(folder / "features.tsv.gz", sep="\t", header=False, index=False)
    cells["cell_id"].to_csv(folder / "barcodes.tsv.gz", header=False, index=False)


VERSIONS = {
    "numbers": numbered,
    "bytes": lambda world, cells: cells.assign(cell_id=[c.encode() for c in cells["cell_id"]]),
    "another order": lambda world, cells: cells.sample(frac=1, random_state=0),
    "csv": as_csv,
    "csv of numbers": lambda world, cells: as_csv(world, numbered(world, cells)),
    "mtx": as_folder,
}


@pytest.mark.parametrize("version", VERSIONS)
def test_layouts_of_all_versions(world, version):
    cells = VERSIONS[version](world, pd.read_parquet(world.folder / "cells.parquet"))
    if cells is not None:
        cells.to_parquet(world.folder / "cells.parquet")
    adata = world.read()
    np.testing.assert_array_equal(adata.X.toarray(), world.counts[:, :10])
    np.testing.assert_allclose(adata.obsm["spatial"], world.pixels, atol=1e-6)


def test_what_is_dropped_is_counted(world):
    """The image covers three quarters of the run, and the tables do not quite fit."""
    image = tifffile.imread(world.folder / IMAGE)
    tifffile.imwrite(world.folder / IMAGE, image[..., :560, :], photometric="rgb")
    edit_cells(world, lambda cells: cells.iloc[3:])
    adata = world.read()
    seen = (world.pixels[:, 0] < 560) & (np.arange(N_CELLS) >= 3)
    np.testing.assert_array_equal(adata.X.toarray(), world.counts[seen, :10])
    assert section_info(adata).provenance["dropped_spots"] == {
        "in counts only": 3,
        "in positions only": 0,
        "beyond the image": N_CELLS - 3 - seen.sum(),
    }


def test_an_image_in_morphology_pixels_is_aligned_by_the_identity(tmp_path):
    world = make(tmp_path / "bundle", np.eye(3))
    world = World(world.folder, world.pixels, world.counts, np.eye(3))
    identity = world.folder / "identity.csv"
    identity.write_text("1,0,0\n0,1,0\n0,0,1\n")
    adata = world.read(alignment=identity)
    np.testing.assert_allclose(adata.obsm["spatial"] * PIXEL_UM, world.um)
    assert section_info(adata).um_per_pixel == PIXEL_UM


def write(name, text):
    return lambda world: (world.folder / name).write_text(text)


BAD = {
    "no experiment": (
        lambda w: (w.folder / "experiment.xenium").unlink(),
        {},
        "bundle: no experiment.xenium; give the output folder of a Xenium run",
    ),
    "no pixel size": (write("experiment.xenium", "{}"), {}, "experiment.xenium: lacks pixel_size"),
    "no cells": (
        lambda w: (w.folder / "cells.parquet").unlink(),
        {},
        "no cells.parquet or cells.csv.gz or cells.csv",
    ),
    "damaged cells": (write("cells.parquet", "?"), {}, "cells.parquet: not a readable table"),
    "no column": (
        lambda w: edit_cells(w, lambda c: c.drop(columns="y_centroid")),
        {},
        "cells.parquet: lacks column y_centroid",
    ),
    "no centre": (
        lambda w: edit_cells(w, lambda c: c.assign(x_centroid=c["x_centroid"].where(c.index != 2))),
        {},
        "cells.parquet: cell aaaaaaba-1 has no centre",
    ),
    "cell twice": (
        lambda w: edit_cells(w, lambda c: pd.concat([c, c.iloc[:1]])),
        {},
        "cells.parquet: aaaaaaaa-1 stands twice",
    ),
    "other cells": (
        lambda w: edit_cells(w, lambda c: c.assign(cell_id="z" + c["cell_id"])),
        {},
        "cells.parquet: no name in common with the matrix .* are they of one run",
    ),
    "no alignment": (
        lambda w: (w.folder / ALIGNMENT).unlink(),
        {},
        "run_he_image.ome.tif: no alignment .* export it from Xenium Explorer .* 1,0,0 and 0,1,0",
    ),
    "keypoints": (
        write(ALIGNMENT, "fixedX,fixedY,alignmentX,alignmentY\n1,2,3,4\n"),
        {},
        "alignment.csv: not a readable 3 x 3 matrix",
    ),
    "2 x 3": (write(ALIGNMENT, "1,0,0\n0,1,0\n"), {}, "alignment.csv: not an image alignment"),
    "singular": (
        write(ALIGNMENT, "0,0,5\n0,0,5\n0,0,1\n"),
        {},
        "alignment.csv: the alignment scales one direction by 0 and another by 0",
    ),
    "flat": (write(ALIGNMENT, "1,1,0\n1,1,0\n0,0,1\n"), {}, "must rotate, mirror, scale and shift"),
    "shift": (
        lambda w: np.savetxt(
            w.folder / ALIGNMENT, w.matrix + np.eye(3)[[0]].T * 5000 * np.eye(3)[2], delimiter=","
        ),
        {},
        r"run_he_imagealignment.csv only 0% of the cells lie on the image .* it is 800 x 600",
    ),
    "resolution": (
        lambda w: None,
        {"um_per_pixel": 0.5},
        "he_image.ome.tif: `um_per_pixel` says 0.5 µm per pixel, but the positions make it 0.956",
    ),
    "size": (lambda w: None, {"bin_um": 0}, "`bin_um=0`: the size of a pseudo-spot must be positi"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named(world, kind):
    break_it, options, message = BAD[kind]
    break_it(world)
    with pytest.raises(InputError, match=message):
        world.read(**options)


def test_spatialdata_puts_cells_and_image_in_the_same_places(world):
    """An independent reader: its transformations of circles and of the H&E image."""
    from spatialdata.transformations import get_transformation
    from spatialdata_io import xenium

    with zarr.storage.ZipStore(world.folder / "cells.zarr.zip", mode="w") as store:
        cells = zarr.create_group(store)
        ids = pd.read_parquet(world.folder / "cells.parquet")["cell_id"]
        shifted = [i.split("-")[0].translate(str.maketrans("abc", "012")) for i in ids]
        prefix = [[int(p, 16), int(i.split("-")[1])] for p, i in zip(shifted, ids, strict=True)]
        cells["cell_id"] = np.array(prefix, np.uint32)
        names = {"column_names": ["z_level"]}
        cells.create_array("cell_summary", data=np.zeros((N_CELLS, 1)), attributes=names)
    off = {f"{k}_{v}": False for k in ("cells", "nucleus") for v in ("boundaries", "labels")}
    off |= {"transcripts": False, "morphology_mip": False, "morphology_focus": False}
    sdata = xenium(world.folder, cells_as_circles=True, **off)
    matrices = {
        name: get_transformation(sdata[name]).to_affine_matrix(("x", "y"), ("x", "y"))
        for name in ("cell_circles", "he_image")
    }
    to_image = np.linalg.inv(matrices["he_image"]) @ matrices["cell_circles"]
    circles = sdata["cell_circles"].geometry.get_coordinates().to_numpy()
    theirs = (np.column_stack([circles, np.ones(N_CELLS)]) @ to_image.T)[:, :2]
    mine = world.read()
    np.testing.assert_allclose(mine.obsm["spatial"], theirs, atol=1e-6)
    assert (mine.X != sdata["table"].X).nnz == 0
    assert list(mine.obs_names) == list(sdata["table"].obs["cell_id"])


def test_the_command_pools_cells(world, tmp_path, command):
    start = "import", "xenium", world.folder, "--patient", "P", "--section", "X1", "-o", tmp_path
    told = command(*start, code=2).stderr
    assert "bundle: give the full-resolution H&E image with --image" in told
    done = command(*start, "--image", world.folder / IMAGE, "--bin", 100)
    assert "X1: Xenium, patient P," in done.stdout
    assert "2 Negative Control Probe" in done.stderr
    written = read_section(tmp_path / "X1.h5ad")
    np.testing.assert_array_equal(written.X.toarray(), world.read(100.0).X.toarray())
