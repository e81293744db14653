"""Small valid inputs of every kind that is read, and how each is read and judged.

A seed is a folder that is made once; the fuzzer changes one of its files at a time, and `read` must
then refuse it (an `InputError`), or give what is finite and of the right shape.
"""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import tifffile
from PIL import Image
from scipy import sparse
from scipy.io import mmwrite

UM = 2.0
WIDTH, HEIGHT = 360, 320
N_GENES = 6
SYMBOLS = [f"GENE{i}" for i in range(N_GENES)]
IDS = [f"ENSG{i:011}" for i in range(N_GENES)]
ACROSS, DOWN = 8, 6
N_SPOTS = ACROSS * DOWN


@dataclass(frozen=True)
class Kind:
    """What is read: how a valid one is made, how it is read, and which of its files are changed."""

    make: Callable[[Path], None]
    #: Given the folder of the input, and an empty one to write to.
    read: Callable[[Path, Path], None]
    #: Patterns of the files that are changed.
    files: tuple[str, ...]


KINDS: dict[str, Kind] = {}


def kind(
    name: str, make: Callable[[Path], None], *files: str
) -> Callable[[Callable[[Path, Path], None]], Callable[[Path, Path], None]]:
    """Register how a kind is read."""

    def register(read: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        KINDS[name] = Kind(make, read, files)
        return read

    return register


def tissue(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """A piece of tissue, in the colours of H&E, on glass."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((height, width, 3))
    pixels[:] = (240, 238, 242)
    inside = (slice(30, height - 30), slice(30, width - 30))
    pixels[inside] = rng.normal((150, 60, 150), 15, pixels[inside].shape)
    return pixels.clip(0, 255).astype(np.uint8)


def save_image(path: Path, seed: int = 0) -> Path:
    Image.fromarray(tissue(seed)).save(path)
    return path


def write_alignment(path: Path, scale: float) -> None:
    np.savetxt(path, np.diag([scale, scale, 1]), delimiter=",")


def square_grid() -> tuple[np.ndarray, np.ndarray]:
    """Array positions (column, row) and pixels of spots on the tissue."""
    y, x = np.mgrid[0:DOWN, 0:ACROSS].reshape(2, -1)
    return np.column_stack([x, y]), np.column_stack([60 + 34.0 * x, 60 + 38.0 * y])


def draw(n: int = N_SPOTS, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(2.0, size=(n, N_GENES)).astype(np.int32)


def barcodes(n: int) -> list[str]:
    return [f"{i:012b}".translate(str.maketrans("01", "AC")) + "-1" for i in range(n)]


def write_h5_matrix(path: Path, counts: np.ndarray, names: list[str]) -> None:
    """As 10x Genomics writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = sparse.csr_matrix(counts)
    packed = {"compression": "gzip", "chunks": True}
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group.create_dataset("barcodes", data=np.array(names, "S"), **packed)
        for part in ("data", "indices", "indptr"):
            group.create_dataset(part, data=getattr(stored, part), **packed)
        group["shape"] = np.array(counts.shape[::-1], np.int32)
        for key, values in {
            "id": IDS,
            "name": SYMBOLS,
            "feature_type": ["Gene Expression"] * N_GENES,
            "genome": ["GRCh38"] * N_GENES,
        }.items():
            group[f"features/{key}"] = np.array(values, "S")
        group["features/_all_tag_keys"] = np.array(["genome"], "S")


def write_matrix_folder(folder: Path, counts: np.ndarray, names: list[str]) -> None:
    folder.mkdir(parents=True)
    features = [f"{i}\t{s}\tGene Expression" for i, s in zip(IDS, SYMBOLS, strict=True)]
    for name, rows in {"features": features, "barcodes": names}.items():
        text = "".join(f"{row}\n" for row in rows).encode()
        (folder / f"{name}.tsv.gz").write_bytes(gzip.compress(text, mtime=0))
    with gzip.open(folder / "matrix.mtx.gz", "wb") as file:
        mmwrite(file, sparse.coo_matrix(counts.T))


def judge(section: anndata.AnnData) -> None:
    """What was accepted is finite, of one shape, and counts."""
    from strank.cohort.contract import check_section

    check_section(section, name="accepted")
    counts = sparse.csr_matrix(section.X)
    counts.check_format(full_check=True)
    assert counts.shape == (section.n_obs, section.n_vars), "shape"
    assert np.isfinite(counts.data).all(), "counts"
    assert (counts.data >= 0).all(), "counts"
    assert np.isfinite(section.obs["library_size"].to_numpy(float)).all(), "library size"
    assert section.obsm["spatial"].shape == (section.n_obs, 2), "shape of positions"
    assert np.isfinite(section.obsm["spatial"]).all(), "positions"
    facts = section.uns["strank"]
    assert all(0 < float(facts[k]) < np.inf for k in facts if k.endswith("_um")), "sizes"
    assert 0 < float(facts["um_per_pixel"]) < np.inf, "scale"


# Platforms


def make_visium(folder: Path, form: str = "h5") -> None:
    outs = folder / "run" / "outs"
    (outs / "spatial").mkdir(parents=True)
    counts, names = draw(), barcodes(N_SPOTS)
    if form == "h5":
        write_h5_matrix(outs / "filtered_feature_bc_matrix.h5", counts, names)
    else:
        write_matrix_folder(outs / "filtered_feature_bc_matrix", counts, names)
    if form == "tar":
        where = outs / "filtered_feature_bc_matrix"
        with tarfile.open(f"{where}.tar.gz", "w:gz") as archive:
            archive.add(where, where.name)
        shutil.rmtree(where)
    row, col = np.divmod(np.arange(N_SPOTS), ACROSS)
    col = 2 * col + row % 2
    table = pd.DataFrame({"barcode": names, "in_tissue": 1, "array_row": row, "array_col": col})
    table["pxl_row_in_fullres"] = 60 + row * 15 * 3**0.5
    table["pxl_col_in_fullres"] = 60 + col * 15.0
    if form == "h5":
        table.to_csv(outs / "spatial" / "tissue_positions.csv", index=False)
    else:
        table.to_parquet(outs / "spatial" / "tissue_positions.parquet")
    scales = {"tissue_hires_scalef": 0.2, "spot_diameter_fullres": 16.5}
    (outs / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    save_image(folder / "he.png")


@kind("visium", make_visium, "*.h5", "*.csv", "*.json")
def read_visium(folder: Path, out: Path) -> None:
    from strank.io import read_visium

    judge(read_visium(folder / "run", image=folder / "he.png", patient="P"))


kind("visium-mtx", lambda f: make_visium(f, "mtx"), "*.gz", "*.parquet", "*.json")(read_visium)
kind("visium-tar", lambda f: make_visium(f, "tar"), "*.gz")(read_visium)


def make_visium_hd(folder: Path) -> None:
    place = folder / "run" / "outs" / "binned_outputs" / "square_016um"
    (place / "spatial").mkdir(parents=True)
    at, pixels = square_grid()
    names = [f"s_016um_{row:05}_{col:05}-1" for col, row in at]
    write_h5_matrix(place / "filtered_feature_bc_matrix.h5", draw(), names)
    table = pd.DataFrame({"barcode": names, "in_tissue": 1})
    table["array_row"], table["array_col"] = at[:, 1], at[:, 0]
    table["pxl_row_in_fullres"], table["pxl_col_in_fullres"] = pixels[:, 1], pixels[:, 0]
    table.to_parquet(place / "spatial" / "tissue_positions.parquet")
    scales = {"microns_per_pixel": 0.45, "bin_size_um": 16.0, "spot_diameter_fullres": 35.0}
    (place / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    save_image(folder / "he.png")


@kind("visium-hd", make_visium_hd, "*.h5", "*.parquet", "*.json")
def read_visium_hd(folder: Path, out: Path) -> None:
    from strank.io import read_visium_hd

    judge(read_visium_hd(folder / "run", image=folder / "he.png", patient="P", bin_um=16))


def make_hd_cells(folder: Path) -> None:
    place = folder / "run" / "outs" / "segmented_outputs"
    (place / "spatial").mkdir(parents=True)
    _, pixels = square_grid()
    names = [f"cellid_{i:09}-1" for i in range(1, N_SPOTS + 1)]
    write_h5_matrix(place / "filtered_feature_cell_matrix.h5", draw(), names)
    corners = np.array([[-4, -4], [4, -4], [4, 4], [-4, 4], [-4, -4]])
    cells = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [(xy + corners).tolist()]},
            "properties": {"cell_id": i},
        }
        for i, xy in enumerate(pixels, 1)
    ]
    collection = {"type": "FeatureCollection", "features": cells}
    (place / "cell_segmentations.geojson").write_text(json.dumps(collection))
    (place / "spatial" / "scalefactors_json.json").write_text('{"microns_per_pixel": 0.45}')
    save_image(folder / "he.png")


@kind("hd-cells", make_hd_cells, "*.h5", "*.geojson", "*.json")
def read_hd_cells(folder: Path, out: Path) -> None:
    from strank.io import read_visium_hd_cells

    judge(read_visium_hd_cells(folder / "run", image=folder / "he.png", patient="P"))


def make_xenium(folder: Path, form: str = "h5") -> None:
    bundle = folder / "bundle"
    bundle.mkdir(parents=True)
    _, pixels = square_grid()
    names = [f"{name[:-2].lower()}-1" for name in barcodes(N_SPOTS)]
    cells = pd.DataFrame({"cell_id": names, "x_centroid": pixels[:, 0] * UM})
    cells["y_centroid"] = pixels[:, 1] * UM
    if form == "h5":
        write_h5_matrix(bundle / "cell_feature_matrix.h5", draw(), names)
        cells.to_parquet(bundle / "cells.parquet")
    else:
        write_matrix_folder(bundle / "cell_feature_matrix", draw(), names)
        packed = {"method": "gzip", "mtime": 0}
        cells.to_csv(bundle / "cells.csv.gz", index=False, compression=packed)
    about = {"analysis_sw_version": "xenium-2.0.0.10", "panel_name": "Breast"}
    (bundle / "experiment.xenium").write_text(json.dumps({**about, "pixel_size": 0.2125}))
    save_image(folder / "he.png")
    write_alignment(folder / "healignment.csv", UM / 0.2125)


@kind("xenium", make_xenium, "*.h5", "*.parquet", "*.xenium", "healignment.csv")
def read_xenium(folder: Path, out: Path) -> None:
    from strank.io import read_xenium

    given = {"image": folder / "he.png", "alignment": folder / "healignment.csv", "patient": "P"}
    judge(read_xenium(folder / "bundle", **given))
    judge(read_xenium(folder / "bundle", bin_um=20, **given))


kind("xenium-csv", lambda f: make_xenium(f, "csv"), "*.gz", "*.xenium")(read_xenium)


def make_merscope(folder: Path) -> None:
    region = folder / "region"
    (region / "images").mkdir(parents=True)
    _, pixels = square_grid()
    names = [str(10**18 + i) for i in range(N_SPOTS)]
    counts = pd.DataFrame(draw(), columns=SYMBOLS).assign(**{"Blank-1": 0})
    counts.insert(0, "cell", names)
    counts.to_csv(region / "cell_by_gene.csv", index=False)
    cells = pd.DataFrame({"EntityID": names, "fov": 1})
    cells["center_x"], cells["center_y"] = (pixels * UM).T
    cells.to_csv(region / "cell_metadata.csv", index=False)
    scale = np.diag([1 / 0.108, 1 / 0.108, 1])
    np.savetxt(region / "images" / "micron_to_mosaic_pixel_transform.csv", scale)
    save_image(folder / "he.png")
    write_alignment(folder / "he.csv", UM / 0.108)


@kind("merscope", make_merscope, "*.csv")
def read_merscope(folder: Path, out: Path) -> None:
    from strank.io import read_merscope

    given = {"image": folder / "he.png", "alignment": folder / "he.csv", "patient": "P"}
    judge(read_merscope(folder / "region", **given))


def make_cosmx(folder: Path) -> None:
    slide = folder / "slide"
    slide.mkdir(parents=True)
    _, pixels = square_grid()
    keys = pd.DataFrame({"fov": 1, "cell_ID": range(1, N_SPOTS + 1)})
    counts = pd.concat([keys, pd.DataFrame(draw(), columns=SYMBOLS)], axis=1)
    counts.to_csv(slide / "S_exprMat_file.csv", index=False)
    keys["CenterX_global_px"], keys["CenterY_global_px"] = (15 * pixels).T
    keys.to_csv(slide / "S_metadata_file.csv", index=False)
    fields = pd.DataFrame({"fov": [1, 2], "x_global_px": [0, 100], "y_global_px": [0, 100]})
    fields["x_global_mm"] = fields["y_global_mm"] = [0, 100 * 0.12028e-3]
    fields.to_csv(slide / "S_fov_positions_file.csv", index=False)
    save_image(folder / "he.png")
    write_alignment(folder / "he.csv", 15.0)


@kind("cosmx", make_cosmx, "*_file.csv")
def read_cosmx(folder: Path, out: Path) -> None:
    from strank.io import read_cosmx

    given = {"image": folder / "he.png", "alignment": folder / "he.csv", "patient": "P"}
    judge(read_cosmx(folder / "slide", **given))


def make_st(folder: Path) -> None:
    for part in ("images", "counts", "spots"):
        (folder / "st" / part).mkdir(parents=True)
    at, _ = square_grid()
    names = [f"{x + 5}x{y + 5}" for x, y in at]
    table = pd.DataFrame(draw(), index=names, columns=SYMBOLS)
    packed = {"method": "gzip", "mtime": 0}
    table.to_csv(folder / "st" / "counts" / "A1.tsv.gz", sep="\t", compression=packed)
    spots = pd.DataFrame({"x": at[:, 0] + 5, "y": at[:, 1] + 5})
    spots["new_x"], spots["new_y"] = spots["x"], spots["y"]
    spots["pixel_x"], spots["pixel_y"], spots["selected"] = (
        60 + at[:, 0] * 34,
        60 + at[:, 1] * 34,
        1,
    )
    spots.to_csv(folder / "st" / "spots" / "A1_selection.tsv", sep="\t", index=False)
    Image.fromarray(tissue()).save(folder / "st" / "images" / "A1.jpg")


@kind("st", make_st, "*.gz", "*.tsv")
def read_st(folder: Path, out: Path) -> None:
    from strank.io import find_st, read_st

    for name in find_st(folder / "st"):
        judge(read_st(folder / "st", section=name))


def make_anndata(folder: Path, compression: str | None = "gzip") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _, pixels = square_grid()
    names = barcodes(N_SPOTS)
    obs = pd.DataFrame({"section": pd.Categorical(["S"] * N_SPOTS), "patient": "P"}, index=names)
    given = anndata.AnnData(
        sparse.csr_matrix(draw(), dtype=np.float32),
        obs=obs.assign(score=0.5),
        var=pd.DataFrame({"gene_ids": IDS}, index=SYMBOLS),
        obsm={"spatial": pixels},
        uns={"spatial": {"S": {"scalefactors": {"spot_diameter_fullres": 20.0}, "images": {}}}},
        layers={"dense": draw(seed=1).astype(np.float32)},
    )
    given.raw = given.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given.write_h5ad(folder / "mine.h5ad", compression=compression)
    save_image(folder / "he.png")


@kind("anndata", make_anndata, "*.h5ad")
def read_anndata(folder: Path, out: Path) -> None:
    from strank.cohort.store import read_h5ad
    from strank.errors import InputError
    from strank.io import find_anndata, read_anndata
    from strank.io.generic import object_counts

    path = folder / "mine.h5ad"
    given: dict[str, Any] = {"image": folder / "he.png", "um_per_pixel": UM, "patient": "P"}
    (name, *_) = find_anndata(path)
    adata = read_h5ad(path)
    for layer in (None, "dense", "raw"):
        with suppress(InputError):
            counts = object_counts(adata, path, layer)
            assert counts.shape == adata.shape, "shape"
            assert np.isfinite(counts.data).all(), "counts"
    judge(read_anndata(path, section=name, **given))


kind("anndata-plain", lambda f: make_anndata(f, None), "*.h5ad")(read_anndata)


def make_spatialdata(folder: Path) -> None:
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel

    folder.mkdir(parents=True, exist_ok=True)
    _, pixels = square_grid()
    he = Image2DModel.parse(np.moveaxis(tissue(), -1, 0), dims=("c", "y", "x"))
    index = np.arange(1, N_SPOTS + 1)
    spots = ShapesModel.parse(pixels, geometry=0, radius=10, index=index)
    obs = pd.DataFrame({"region": pd.Categorical(["spots"] * N_SPOTS), "instance": index})
    obs = obs.assign(patient="P").set_axis(barcodes(N_SPOTS))
    table = anndata.AnnData(
        sparse.csr_matrix(draw(), dtype=np.float32), obs=obs, var=pd.DataFrame(index=SYMBOLS)
    )
    keys = {"region": "spots", "region_key": "region", "instance_key": "instance"}
    elements = {"he": he, "spots": spots, "table": TableModel.parse(table, **keys)}
    SpatialData.init_from_elements(elements).write(folder / "P1.zarr")


@kind("spatialdata", make_spatialdata, "P1.zarr/**/*")
def read_spatialdata(folder: Path, out: Path) -> None:
    from strank.io import read_spatialdata

    given = {"um_per_pixel": UM, "image_folder": out}
    judge(read_spatialdata(folder / "P1.zarr", **given))


def make_hest(folder: Path) -> None:
    at, pixels = square_grid()
    names = [f"{x:03d}x{y:03d}" for x, y in at]
    corners = (pixels - 12).astype(int)
    for part in ("st", "patches", "metadata", "wsis"):
        (folder / "hest" / part).mkdir(parents=True)
    for number, name in enumerate(["X1", "X2"]):
        scales = {"spot_diameter_fullres": 20.0}
        given = anndata.AnnData(
            sparse.csr_matrix(draw(seed=number), dtype=np.float32),
            obs=pd.DataFrame({"array_row": range(N_SPOTS)}, index=names),
            var=pd.DataFrame(index=SYMBOLS),
            obsm={"spatial": pixels},
            uns={"spatial": {"ST": {"images": {}, "scalefactors": scales}}},
        )
        given.write_h5ad(folder / f"hest/st/{name}.h5ad")
        he = tissue(number)
        with h5py.File(folder / f"hest/patches/{name}.h5", "w") as file:
            cut = np.stack([he[y : y + 24, x : x + 24] for x, y in corners])
            packed = {} if number else {"chunks": (1, 24, 24, 3), "compression": "gzip"}
            file.create_dataset("img", data=cut, **packed)
            file["coords"] = corners
            file["barcode"] = np.array(names, dtype="S")[:, None]
            file["coords"].attrs.update({"patch_size_src": 24, "pixel_size": UM})
        facts = {"id": name, "pixel_size_um_estimated": UM, "patient": "P", "dataset_title": "T"}
        facts |= {"st_technology": "Xenium", "spot_diameter": None, "inter_spot_dist": None}
        (folder / f"hest/metadata/{name}.json").write_text(json.dumps(facts))
    tiles = {"tile": (128, 128), "compression": "deflate", "photometric": "rgb"}
    tifffile.imwrite(folder / "hest/wsis/X1.tif", tissue(0), **tiles)
    table = pd.DataFrame({"id": ["X1", "X2"], "patient": "P", "spot_diameter": 50.0})
    table.to_csv(folder / "hest/HEST_v1_0_2.csv", index=False)


@kind("hest", make_hest, "*.h5ad", "*.h5", "*.json", "*.csv")
def read_hest(folder: Path, out: Path) -> None:
    from strank.errors import InputError
    from strank.io import find_hest, read_hest

    refused = None
    for name in find_hest(folder / "hest"):
        try:
            judge(read_hest(folder / "hest", section=name, image_folder=out))
        except InputError as error:
            refused = error
    if refused is not None:
        raise refused


def make_bench(folder: Path) -> None:
    for part in ("task/splits", "task/adata", "emb"):
        (folder / part).mkdir(parents=True)
    names = [f"s{i}" for i in range(20)]
    for number, name in enumerate(["X1", "X2", "X3"]):
        anndata.AnnData(
            sparse.csr_matrix(draw(20, number), dtype=np.float32),
            obs=pd.DataFrame(index=names),
            var=pd.DataFrame(index=SYMBOLS),
        ).write_h5ad(folder / f"task/adata/{name}.h5ad")
        features = np.random.default_rng(number).normal(size=(20, 3)).astype(np.float32)
        with h5py.File(folder / f"emb/{name}.h5", "w") as file:
            for key, values in {
                "embeddings": features,
                "barcodes": np.array(names, "S")[:, None],
                "coords": np.zeros((20, 2)),
            }.items():
                file.create_dataset(key, data=values, maxshape=(None, *values.shape[1:]))
    (folder / "task/var_50genes.json").write_text(json.dumps({"genes": SYMBOLS[:3]}))
    for k, test in enumerate(["X1", "X2", "X3"]):
        for part, those in {"train": {"X1", "X2", "X3"} - {test}, "test": {test}}.items():
            rows = [(n, f"patches/{n}.h5", f"adata/{n}.h5ad") for n in sorted(those)]
            split = pd.DataFrame(rows, columns=["sample_id", "patches_path", "expr_path"])
            split.to_csv(folder / f"task/splits/{part}_{k}.csv", index=False)


@kind("bench", make_bench, "*.h5ad", "*.h5", "*.json", "*.csv")
def read_bench(folder: Path, out: Path) -> None:
    from strank.io import read_hest_task

    task = read_hest_task(folder / "task", folder / "emb")
    for sample in task.samples.values():
        assert sample.features.ndim == 2, "shape"
        assert np.isfinite(sample.features).all(), "features"
        assert sample.counts.shape == (len(sample.features), len(task.panel)), "shape"
        assert np.isfinite(sample.counts.data).all(), "counts"
        assert np.isfinite(sample.library_size).all(), "library size"


# What belongs to all


def make_cohort(folder: Path) -> None:
    from strank.io import read_st, write_sections

    make_st(folder / "raw")
    sections = []
    for name, patient in {"A1": "A", "B1": "B"}.items():
        sections.append(read_st(folder / "raw" / "st", section="A1", patient=patient))
        sections[-1].obs["section"] = pd.Categorical([name] * sections[-1].n_obs)
    write_sections(sections, folder / "cohort")
    strip_seals(folder / "cohort")
    from strank.cohort.contract import spots_checksum

    for adata in sections:
        name = adata.obs["section"].iloc[0]
        made = anndata.AnnData(
            np.random.default_rng(0).normal(size=(adata.n_obs, 3)).astype(np.float32),
            obs=pd.DataFrame(index=adata.obs_names),
            uns={"spots_sha256": spots_checksum(adata), "encoder": json.dumps({"name": "cheap"})},
        )
        (folder / "cohort/features/cheap").mkdir(parents=True, exist_ok=True)
        made.write_h5ad(folder / f"cohort/features/cheap/{name}.h5ad")


def strip_seals(folder: Path) -> None:
    """Without a seal a changed file is looked at, and not only known to be another."""
    for path in folder.rglob("*.h5ad"):
        content = path.read_bytes()
        path.write_bytes(content[: content.rindex(b"\nstrank sha256 ")])


@kind("cohort", make_cohort, "cohort/*.h5ad", "cohort/features/cheap/*.h5ad")
def read_cohort(folder: Path, out: Path) -> None:
    from strank.cohort.contract import counts_checksum, section_info, spots_checksum
    from strank.cohort.folder import count_spots
    from strank.cohort.store import read_cohort

    count_spots(folder / "cohort")
    for adata in read_cohort(folder / "cohort", encoder="cheap").values():
        judge(adata)
        section_info(adata)
        counts_checksum(adata)
        spots_checksum(adata)
        features = adata.obsm["cheap"]
        assert features.shape[0] == adata.n_obs, "shape"
        assert np.isfinite(features).all(), "features"


def make_patients(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(f"S{i}", f"P{i // 2}") for i in range(8)]
    table = pd.DataFrame(rows, columns=["section", "patient"])
    table.to_csv(folder / "patients.csv", index=False)


@kind("patients", make_patients, "*.csv")
def read_patients(folder: Path, out: Path) -> None:
    from strank.io.sections import read_patients

    found = read_patients(folder / "patients.csv")
    assert all(name and patient for name, patient in found.items()), "names"


def make_regions(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def half(name: object, left: int, right: int) -> dict[str, Any]:
        ring = [[left, 0], [right, 0], [right, 320], [left, 320], [left, 0]]
        shape = {"type": "Polygon", "coordinates": [ring]}
        return {"type": "Feature", "geometry": shape, "properties": {"classification": name}}

    features = [half({"name": "West", "color": [1, 2, 3]}, 0, 180), half("East", 181, 360)]
    features.append({"type": "Feature", "geometry": None, "properties": {"name": "none"}})
    collection = {"type": "FeatureCollection", "features": features}
    (folder / "r.geojson").write_text(json.dumps(collection))


@kind("geojson", make_regions, "*.geojson")
def read_regions(folder: Path, out: Path) -> None:
    from strank.evaluation.regions import choose_pair, find_regions

    _, pixels = square_grid()
    spots = anndata.AnnData(np.zeros((N_SPOTS, 1)), obsm={"spatial": pixels})
    regions, left_out = find_regions(spots, folder / "r.geojson")
    choose_pair(regions, None, source=str(folder / "r.geojson"), left_out=left_out)
    assert all(inside.shape == (N_SPOTS,) for inside in regions.values()), "shape"


def make_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = tissue(0, 300, 260)
    tiles = {"tile": (128, 128), "compression": "deflate", "photometric": "rgb"}
    scale = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}
    Image.fromarray(pixels).save(folder / "a.jpg", quality=90)
    Image.fromarray(pixels[::2, ::2]).save(folder / "progressive.jpg", progressive=True)
    Image.fromarray(pixels[::2, ::2]).save(folder / "a.png")
    tifffile.imwrite(folder / "tiled.tif", pixels, **tiles, **scale)
    jpeg = {**tiles, "compression": "jpeg"}
    tifffile.imwrite(folder / "jpegt.tif", pixels, **jpeg, **scale)
    tifffile.imwrite(folder / "strips.tif", pixels, photometric="rgb", rowsperstrip=64, **scale)
    with tifffile.TiffWriter(folder / "pyr.tif") as file:
        for i in range(3):
            level = np.ascontiguousarray(pixels[:: 2**i, :: 2**i])
            file.write(level, **tiles, subfiletype=int(i > 0))
    sizes = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "axes": "YXS"}
    with tifffile.TiffWriter(folder / "pyr.ome.tif", ome=True) as file:
        file.write(pixels, **tiles, subifds=1, metadata=sizes)
        file.write(np.ascontiguousarray(pixels[::2, ::2]), **tiles, subfiletype=1)
    told = "Aperio Image Library v10\r\n300x260 (128x128) Q=70|AppMag = 20|MPP = 0.4990"
    tifffile.imwrite(folder / "aperio.svs", pixels, **jpeg, description=told, metadata=None)


def read_image(folder: Path, out: Path, name: str) -> None:
    from strank.slides.slide import check_image, open_slide, read_region, thumbnail

    slide = open_slide(folder / name, 0.5)
    open_pixels_scale = slide.source.stated.um_per_pixel
    assert open_pixels_scale is None or 0 < open_pixels_scale < np.inf, "scale"
    check_image(slide)
    width, height = slide.size
    assert read_region(slide, 0, 0, 64, 48).shape == (48, 64, 3), "shape"
    if width * height < 1e8:
        small, um = thumbnail(slide, 4.0)
        assert small.shape[2] == 3, "shape"
        assert 0 < um < np.inf, "scale"


IMAGES = ("a.jpg", "progressive.jpg", "a.png", "tiled.tif", "jpegt.tif", "strips.tif", "pyr.tif")
IMAGES += ("pyr.ome.tif", "aperio.svs")


def image_kind(name: str) -> None:
    def make(folder: Path) -> None:
        make_images(folder)
        for path in folder.iterdir():
            if path.name != name:
                path.unlink()

    kind(f"image-{name}", make, name)(lambda folder, out: read_image(folder, out, name))


for _name in IMAGES:
    image_kind(_name)


def make_toml(folder: Path) -> None:
    from strank.evaluation.protocol import PRESETS

    folder.mkdir(parents=True, exist_ok=True)
    PRESETS["hest"].write(folder / "p.toml")
    paper = next(p for name, p in PRESETS.items() if name.startswith("paper-"))
    paper.write(folder / "q.toml")


@kind("toml", make_toml, "*.toml")
def read_toml(folder: Path, out: Path) -> None:
    from strank.evaluation.protocol import get_protocol

    get_protocol(folder / "p.toml")
    get_protocol(folder / "q.toml")


def make_model(folder: Path, head: str = "linear") -> None:
    from strank import fit
    from strank.cohort.store import read_cohort
    from strank.neural.recipe import Recipe

    make_cohort(folder)
    cohort = read_cohort(folder / "cohort", encoder="cheap")
    facts = {"name": "cheap", "version": "1", "fields": [], "n_features": 3}
    for adata in cohort.values():
        adata.uns["cheap"] = facts
    options: dict[str, Any] = {"n_genes": 3, "encoder": "cheap"}
    if head == "linear":
        options["penalty"] = 100.0
    else:
        options |= {"head": head, "recipe": Recipe(max_epochs=1, networks=1), "validation": ["B1"]}
    model = fit(cohort, **options)
    model.save(folder / "model")
    shutil.rmtree(folder / "raw")


@kind("model", make_model, "model/*")
def read_model(folder: Path, out: Path) -> None:
    import torch

    from strank import RankModel

    model = RankModel.load(folder / "model")
    model.card()
    with torch.no_grad():
        scores = model.head(torch.ones(2, int(model.encoder["n_features"])))
    assert scores.shape == (2, len(model.panel)), "shape"


kind("mlp", lambda f: make_model(f, "mlp"), "model/*")(read_model)


def training_facts() -> dict[str, Any]:
    return {"genes": SYMBOLS, "turns": [[0]], "head": {"kind": "mlp"}, "seed": 0}


def make_training(folder: Path) -> None:
    import torch

    from strank.files import claim_folder
    from strank.neural.checkpoints import Keep

    claim_folder(folder / "training", training_facts(), kind="training")
    keep, network = Keep("validation/loss", folder / "training"), torch.nn.Linear(3, 2)
    keep.remember({"epoch": 0, "validation/loss": 1.0}, network)
    keep.write(finished=True, network=network)
    keep.show(there=False)


@kind("training", make_training, "training/*")
def read_training(folder: Path, out: Path) -> None:
    import torch

    from strank.files import claim_folder
    from strank.neural.checkpoints import Keep

    claim_folder(folder / "training", training_facts(), kind="training", resume=True)
    keep, network = Keep("validation/loss", folder / "training"), torch.nn.Linear(3, 2)
    if keep.read(network=network):
        keep.show(there=True)
        assert all(np.isfinite(value).all() for value in keep.best_weights.values()), "weights"


def make_features(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    scores = anndata.AnnData(
        rng.normal(size=(N_SPOTS, 3)).astype(np.float32),
        obs=pd.DataFrame({"section": pd.Categorical(["S"] * N_SPOTS)}, index=barcodes(N_SPOTS)),
        var=pd.DataFrame({"counts": [1.0, 2.0, 3.0]}, index=SYMBOLS[:3]),
        obsm={"spatial": square_grid()[1]},
        uns={"strank_model": json.dumps({"method": {"name": "list"}})},
    )
    scores.write_h5ad(folder / "scores.h5ad")


@kind("tiles", make_features, "scores.h5ad")
def read_tiles(folder: Path, out: Path) -> None:
    from strank.cohort.store import read_h5ad

    found = read_h5ad(folder / "scores.h5ad")
    assert found.X is None or found.X.shape == found.shape, "shape"
