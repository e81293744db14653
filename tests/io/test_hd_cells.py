"""Cells of Visium HD, in the layout of Space Ranger 4."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from PIL import Image
from scipy.spatial import distance_matrix

from strank.cohort.contract import section_info
from strank.cohort.store import read_section
from strank.errors import InputError
from strank.io import read_visium, read_visium_hd, read_visium_hd_cells

UM_PER_PIXEL = 0.4
N_CELLS = 300
FEATURES = pd.DataFrame(
    {"id": [f"ENSG{i:011}" for i in range(6)], "symbol": [f"GENE{i}" for i in range(6)]}
)
RNG = np.random.default_rng(4)
CENTRES = RNG.uniform([60, 50], [640, 450], size=(N_CELLS, 2))
COUNTS = RNG.poisson(1.0, size=(N_CELLS, 6))
# Not in the order of the outlines, and numbered with gaps.
NUMBERS = np.sort(RNG.choice(5000, N_CELLS, replace=False)) + 1
BARCODES = [f"cellid_{number:09}-1" for number in NUMBERS]


def outline(centre: np.ndarray, corners: int, radius: float) -> list[list[float]]:
    """A regular polygon, whose centroid is its middle."""
    angle = 2 * np.pi * np.arange(corners) / corners + 0.3
    ring = centre + radius * np.column_stack([np.cos(angle), np.sin(angle)])
    return [*ring.tolist(), ring[0].tolist()]


def features() -> list[dict]:
    found = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [outline(xy, 5 + n % 4, 4 + n % 5)]},
            "properties": {"cell_id": int(n), "classification": {"name": "Cell"}},
        }
        for n, xy in zip(NUMBERS, CENTRES, strict=True)
    ]
    return [found[i] for i in np.random.default_rng(5).permutation(N_CELLS)]


@pytest.fixture
def outs(tmp_path: Path, write_tenx) -> Path:
    outs = tmp_path / "run/outs"
    folder = outs / "segmented_outputs"
    write_tenx(folder / "filtered_feature_cell_matrix.h5", COUNTS, BARCODES, FEATURES)
    write_tenx(folder / "filtered_feature_cell_matrix", COUNTS, BARCODES, FEATURES)
    write_outlines(outs, features())
    (folder / "spatial").mkdir()
    scale = {"microns_per_pixel": UM_PER_PIXEL, "tissue_hires_scalef": 0.5}
    scale |= {"tissue_lowres_scalef": 0.1, "spot_diameter_fullres": 20.0}
    (folder / "spatial/scalefactors_json.json").write_text(json.dumps(scale))
    pixels = np.full((800, 1000, 3), 240, np.uint8)
    noise = np.random.default_rng(1).integers(-15, 16, size=(420, 600, 3))
    pixels[40:460, 50:650] = np.array([150, 60, 150]) + noise
    Image.fromarray(pixels).save(tmp_path / "he.png")
    return outs


def write_outlines(outs: Path, found: list[dict], name="cell_segmentations.geojson") -> Path:
    path = outs / "segmented_outputs" / name
    path.write_text(json.dumps({"type": "FeatureCollection", "features": found}))
    return path


def read(path: Path, **options) -> AnnData:
    image = next(folder for folder in path.parents if (folder / "he.png").exists()) / "he.png"
    return read_visium_hd_cells(path, **({"image": image, "patient": "P"} | options))


def check_whole(adata: AnnData) -> None:
    assert list(adata.obs_names) == BARCODES
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS)
    np.testing.assert_allclose(adata.obsm["spatial"], CENTRES)


def test_cells_come_back_where_they_are(outs):
    adata = read(outs)
    check_whole(adata)
    assert adata.obs["section"].unique() == ["run"]
    info = section_info(adata)
    assert (info.technology, info.um_per_pixel) == ("Visium HD", UM_PER_PIXEL)
    apart = distance_matrix(CENTRES, CENTRES) + 1e9 * np.eye(N_CELLS)
    assert info.spot_pitch_um == pytest.approx(np.median(apart.min(0)) * UM_PER_PIXEL)
    assert not info.provenance["notes"]


@pytest.mark.parametrize("size", [16, 50, 100.5])
def test_squares_agree_with_groupby(outs, size):
    adata = read(outs, bin_um=size)
    square = np.floor(CENTRES * UM_PER_PIXEL / size).astype(int)
    groups = pd.DataFrame(COUNTS).groupby([f"{x}x{y}" for x, y in square])
    assert adata.n_obs == len(groups)
    np.testing.assert_array_equal(adata.X.toarray(), groups.sum().loc[adata.obs_names])
    place = np.array([name.split("x") for name in adata.obs_names], float)
    np.testing.assert_allclose(adata.obsm["spatial"], (place + 0.5) * size / UM_PER_PIXEL)
    assert section_info(adata).spot_pitch_um == size


def annotated_only(outs: Path) -> None:
    folder = outs / "segmented_outputs"
    name = "cell_segmentations.geojson"
    (folder / name).rename(folder / f"graphclust_annotated_{name}")


def annotated_too(outs: Path) -> None:
    write_outlines(outs, [], "graphclust_annotated_cell_segmentations.geojson")
    write_outlines(outs, [], "nucleus_segmentations.geojson")


def prefixed(outs: Path) -> None:
    annotated_too(outs)
    for path in list((outs / "segmented_outputs").iterdir()):
        if path.is_file():
            path.rename(path.with_name(f"GSM1_{path.name}"))


LAYOUTS = {
    "folder of the matrix": lambda outs: (
        outs / "segmented_outputs/filtered_feature_cell_matrix.h5"
    ).unlink(),
    "HDF5 only": lambda outs: shutil.rmtree(
        outs / "segmented_outputs/filtered_feature_cell_matrix"
    ),
    "annotated only": annotated_only,
    "annotated too": annotated_too,
    "GEO": prefixed,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(outs, layout):
    LAYOUTS[layout](outs)
    check_whole(read(outs))


@pytest.mark.parametrize("inside", ["..", ".", "segmented_outputs"])
def test_any_folder_above_the_cells_will_do(outs, inside):
    adata = read((outs / inside).resolve())
    check_whole(adata)
    assert adata.obs["section"].unique() == ["run"]


def test_outlines_of_other_kinds(outs):
    """A cell in two parts, one with a hole, and two that lost their outlines."""
    found = sorted(features(), key=lambda f: f["properties"]["cell_id"])
    square = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
    far = [[x + 30, y] for x, y in square]
    hole = [[x / 5 + 4, y / 5 + 4] for x, y in square]
    shifted = [[[x + 300, y + 200] for x, y in ring] for ring in (square, far, hole)]
    found[0]["geometry"] = {"type": "MultiPolygon", "coordinates": [[shifted[0]], [shifted[1]]]}
    found[1]["geometry"] = {"type": "Polygon", "coordinates": [shifted[0], shifted[2]]}
    found[2]["geometry"] = None
    found[3]["geometry"] = {"type": "Polygon", "coordinates": []}
    write_outlines(outs, found)
    adata = read(outs)
    assert list(adata.obs_names) == [*BARCODES[:2], *BARCODES[4:]]
    np.testing.assert_allclose(adata.obsm["spatial"][:2], [[320, 205], [305, 205]])
    dropped = section_info(adata).provenance["dropped_spots"]
    assert dropped == {"in counts only": 2, "in positions only": 0, "beyond the image": 0}


def edited(change):
    return lambda outs: write_outlines(outs, change(features()))


BAD = {
    "no segmentation": (
        lambda outs: shutil.rmtree(outs / "segmented_outputs"),
        {},
        "outs: no segmented_outputs there; Space Ranger 4 writes them",
    ),
    "no matrix": (
        lambda outs: [
            LAYOUTS["folder of the matrix"](outs),
            LAYOUTS["HDF5 only"](outs),
        ],
        {},
        "segmented_outputs: no filtered_feature_cell_matrix.h5 and no folder",
    ),
    "damaged outlines": (
        lambda outs: (outs / "segmented_outputs/cell_segmentations.geojson").write_text("{"),
        {},
        "cell_segmentations.geojson: not a readable JSON",
    ),
    "no features": (
        lambda outs: (outs / "segmented_outputs/cell_segmentations.geojson").write_text("{}"),
        {},
        "cell_segmentations.geojson: not the outlines of cells",
    ),
    "no cell_id": (
        edited(lambda found: [f | {"properties": {"name": "Cell"}} for f in found]),
        {},
        "not the outlines of cells, a GeoJSON with a cell_id each",
    ),
    "a cell twice": (
        edited(lambda found: [*found, found[0]]),
        {},
        "cell_segmentations.geojson: cellid_.* stands twice",
    ),
    "other cells": (
        edited(
            lambda found: [f | {"properties": {"cell_id": 10**6 + i}} for i, f in enumerate(found)]
        ),
        {},
        "no name in common with the matrix beside it",
    ),
    "scale": (
        lambda outs: None,
        {"um_per_pixel": 0.2},
        "`um_per_pixel` says 0.2 µm per pixel, but",
    ),
    "size": (lambda outs: None, {"bin_um": -1}, "`bin_um=-1`: the size of a pseudo-spot must be"),
    "reduced image": (
        lambda outs: (
            Image.open(outs.parents[1] / "he.png").resize((70, 50)).save(outs.parents[1] / "he.png")
        ),
        {},
        "he.png: only .* of the cells lie on the image .* is it the image of this run, at full",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named(outs, kind):
    break_it, options, message = BAD[kind]
    break_it(outs)
    with pytest.raises(InputError, match=message):
        read(outs, **options)


def test_spatialdata_reads_the_same(outs):
    from spatialdata_io import visium_hd

    about = {"hd_layout_json": json.dumps({"file_format": "1.0", "transform": [0] * 9})}
    with h5py.File(outs / "feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps(about)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about images that it does not find
        sdata = visium_hd(outs, load_segmentations_only=True)
    theirs, mine = sdata["cell_segmentations"], read(outs)
    assert list(mine.obs_names) == list(theirs.obs_names)
    assert (mine.X != theirs.X).nnz == 0
    centres = sdata.shapes["_cell_segmentations"].centroid.get_coordinates()
    np.testing.assert_allclose(mine.obsm["spatial"], centres.loc[mine.obs_names])


@pytest.mark.parametrize("size", [None, 40])
def test_the_command_reads_cells(outs, tmp_path, command, size):
    start = "import", "visium-hd", outs, "--cells", "--patient", "P", "--section", "H1"
    squares = () if size is None else ("--bin", size)
    done = command(*start, "--image", tmp_path / "he.png", *squares, "-o", tmp_path / "cohort")
    assert "H1: Visium HD, patient P," in done.stdout
    written = read_section(tmp_path / "cohort/H1.h5ad")
    np.testing.assert_array_equal(written.X.toarray(), read(outs, bin_um=size).X.toarray())


@pytest.mark.parametrize("folder", [".", "outs", "outs/segmented_outputs"])
def test_bins_that_are_none_but_cells_are_told(outs, folder):
    run = outs.parent
    told = "no binned_outputs/square_.* there are cells only: `strank import visium-hd --cells`"
    with pytest.raises(InputError, match=told):
        read_visium_hd(run / folder, image=run.parent / "he.png", patient="P")
    if folder != "outs/segmented_outputs":
        with pytest.raises(InputError, match="for Visium HD use visium-hd"):
            read_visium(run / folder, image=run.parent / "he.png", patient="P")
