from __future__ import annotations

import json
import shutil
import tarfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from PIL import Image
from scipy import sparse

from strank.cohort.contract import section_info
from strank.cohort.store import read_section
from strank.errors import InputError
from strank.io import read_visium_hd

UM_PER_PIXEL = 0.5
N = 150  # bins of 2 µm on a side
N_GENES = 6
POSITIONS = "square_002um/spatial/tissue_positions.parquet"


def to_pixels(array_um: np.ndarray) -> np.ndarray:
    """The capture area turned by 92 degrees and mirrored, as slides lie under the microscope."""
    angle = np.deg2rad(92)
    turn = np.array([[np.cos(angle), np.sin(angle)], [np.sin(angle), -np.cos(angle)]])
    return (array_um - 150) @ turn.T / UM_PER_PIXEL + [370, 340]


def write_matrix(path: Path, counts: pd.DataFrame) -> None:
    stored = sparse.csr_matrix(counts.to_numpy(np.int32))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["barcodes"] = counts.index.to_numpy("S")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(stored, key)
        group["shape"] = np.array(counts.shape[::-1], np.int32)
        ids = [f"ENSG{i:011}" for i in range(counts.shape[1])]
        kinds = ["Gene Expression"] * len(ids)
        for key, values in {"id": ids, "name": list(counts), "feature_type": kinds}.items():
            group[f"features/{key}"] = np.array(values, "S")
        group["features/genome"] = np.array(["GRCh38"] * len(ids), "S")


def write_bins(base: Path, size: int, counts: pd.DataFrame) -> None:
    """All bins of one size on a grid, counts for those under tissue, as Space Ranger does."""
    folder = base / f"square_{size:03}um"
    (folder / "spatial").mkdir(parents=True)
    side = -(-2 * N // size)
    row, column = np.divmod(np.arange(side * side), side)
    pixels = to_pixels((np.column_stack([column, row]) + 0.5) * size)
    names = [f"s_{size:03}um_{r:05}_{c:05}-1" for r, c in zip(row, column, strict=True)]
    table = pd.DataFrame({"barcode": names})
    table = table.assign(in_tissue=table["barcode"].isin(counts.index).astype(int))
    table = table.assign(array_row=row, array_col=column)
    table = table.assign(pxl_row_in_fullres=pixels[:, 1], pxl_col_in_fullres=pixels[:, 0])
    table.to_parquet(folder / "spatial" / "tissue_positions.parquet", index=False)
    scale = {"microns_per_pixel": UM_PER_PIXEL, "bin_size_um": float(size)}
    scale |= {"spot_diameter_fullres": size / UM_PER_PIXEL}
    scale |= {"tissue_hires_scalef": 0.3, "tissue_lowres_scalef": 0.1}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scale))
    write_matrix(folder / "filtered_feature_bc_matrix.h5", counts)


def squares(fine: pd.DataFrame, size: int) -> pd.DataFrame:
    """Counts of 2 µm summed by pandas, from the barcodes alone."""
    place = fine.index.str.extract(r"_(\d+)_(\d+)-1").astype(int).to_numpy() * 2 // size
    return fine.groupby([f"s_{size:03}um_{r:05}_{c:05}-1" for r, c in place]).sum()


@pytest.fixture(scope="module")
def fine() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    row, column = np.mgrid[10:131, 13:144].reshape(2, -1)  # neither starts on a bin of 8 µm
    names = [f"s_002um_{r:05}_{c:05}-1" for r, c in zip(row, column, strict=True)]
    genes = [f"GENE{i}" for i in range(N_GENES)]
    return pd.DataFrame(rng.poisson(0.3, size=(len(row), N_GENES)), names, genes)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, fine: pd.DataFrame) -> Path:
    folder = tmp_path_factory.mktemp("made")
    base = folder / "run" / "outs" / "binned_outputs"
    for size in (2, 8, 16):
        write_bins(base, size, fine if size == 2 else squares(fine, size))
    pixels = np.full((700, 740, 3), 240, np.uint8)
    x, y = to_pixels(np.array([[20.0, 12.0], [290.0, 270.0]])).T.astype(int)
    patch = pixels[y.min() : y.max(), x.min() : x.max()]
    patch[:] = np.random.default_rng(1).integers(80, 190, size=patch.shape)
    Image.fromarray(pixels).save(folder / "he.png")
    return folder


@pytest.fixture
def run(tmp_path: Path, made: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def read(run: Path, bin_um: float, **options) -> AnnData:
    given = {"image": run.parent / "he.png", "section": "H1", "patient": "P"} | options
    return read_visium_hd(run, bin_um=bin_um, **given)


@pytest.mark.parametrize("size", [8, 16])
def test_bins_are_taken_as_they_are(run, fine, size):
    adata = read(run, size)
    expected = squares(fine, size).loc[adata.obs_names]
    np.testing.assert_array_equal(adata.X.toarray(), expected)
    array = adata.obs[["array_col", "array_row"]].to_numpy()
    np.testing.assert_allclose(adata.obsm["spatial"], to_pixels((array + 0.5) * size))
    info = section_info(adata)
    assert (info.technology, info.um_per_pixel) == ("Visium HD", UM_PER_PIXEL)
    assert (info.spot_diameter_um, info.spot_pitch_um) == (size, size)
    assert list(adata.var["gene_id"][:2]) == ["ENSG00000000000", "ENSG00000000001"]


@pytest.mark.parametrize("size", [8, 16])
def test_pooled_bins_are_those_of_space_ranger(run, size):
    taken = read(run, size)
    shutil.rmtree(run / f"outs/binned_outputs/square_{size:03}um")
    pooled = read(run, size)[taken.obs_names]
    assert pooled.n_obs == taken.n_obs
    assert (pooled.X != taken.X).nnz == 0
    np.testing.assert_allclose(pooled.obsm["spatial"], taken.obsm["spatial"], atol=1e-6)
    pd.testing.assert_frame_equal(pooled.obs[list(taken.obs)], taken.obs, check_dtype=False)


@pytest.mark.parametrize("size", [6, 56])
def test_any_size_agrees_with_groupby(run, fine, size):
    adata = read(run, size)
    expected = squares(fine, size)
    assert set(adata.obs_names) == set(expected.index)
    np.testing.assert_array_equal(adata.X.toarray(), expected.loc[adata.obs_names])
    assert adata.obs["n_bins"].sum() == len(fine)
    assert section_info(adata).spot_pitch_um == size


@pytest.mark.parametrize("inside", ["outs", "outs/binned_outputs"])
def test_any_folder_above_the_bins_will_do(run, inside):
    (run / inside).rename(run.parent / "moved")
    assert read(run.parent / "moved", 16).n_obs == 16 * 17


def edit_positions(run: Path, change) -> None:
    path = run / "outs/binned_outputs" / POSITIONS.replace("002", "008")
    change(pd.read_parquet(path)).to_parquet(path)


def test_bins_off_the_tissue_are_dropped_and_counted(run):
    n_bins = read(run, 8).n_obs

    def change(table):
        tissue = table.index[table["in_tissue"] == 1]
        table.loc[tissue[:5], "in_tissue"] = 0
        table.loc[table.index[table["in_tissue"] == 0][:2], "in_tissue"] = 1
        return table.drop(index=tissue[-3:])

    edit_positions(run, change)
    adata = read(run, 8)
    assert adata.n_obs == n_bins - 8
    dropped = section_info(adata).provenance["dropped_spots"]
    assert dropped == {"in counts only": 8, "in positions only": 2}


@pytest.mark.parametrize("form", ["folder", "archive", "GEO"])
def test_matrices_in_other_forms(run, fine, write_tenx, form):
    """As GEO has them, or where the HDF5 was not kept."""
    bins = run / "outs/binned_outputs/square_008um"
    (bins / "filtered_feature_bc_matrix.h5").unlink()
    counts, folder = squares(fine, 8), bins / "filtered_feature_bc_matrix"
    ids = [f"ENSG{i:011}" for i in range(N_GENES)]
    features = pd.DataFrame({"id": ids, "symbol": counts.columns})
    if form == "GEO":
        write_tenx(bins / "GSM1_filtered_feature_bc_matrix.h5", counts, counts.index, features)
    else:
        write_tenx(folder, counts.to_numpy(), counts.index, features)
    if form == "archive":
        with tarfile.open(folder.with_suffix(".tar.gz"), "w:gz") as archive:
            archive.add(folder, folder.name)
        shutil.rmtree(folder)
    adata = read(run, 8)
    np.testing.assert_array_equal(adata.X.toarray(), counts.loc[adata.obs_names])


@pytest.mark.parametrize(("share", "size"), [(0.05, 8), (0.12, 8), (0.5, 16), (0.3, 24)])
def test_many_bins_without_a_position_are_a_warning(run, share, size):
    source = 2 if size == 24 else size
    path = run / f"outs/binned_outputs/square_{source:03}um/spatial/tissue_positions.parquet"
    table = pd.read_parquet(path)
    tissue = table.index[table["in_tissue"] == 1]
    absent = round(share * len(tissue))
    table.drop(index=tissue[:absent]).to_parquet(path)
    notes = section_info(read(run, size)).provenance["notes"]
    told = f"{absent} of {len(tissue)} barcodes ({share:.0%}) have no usable position in"
    assert [note.startswith(told) for note in notes] == [True] * (share > 0.1)


def write(name, text):
    return lambda run: (run / "outs/binned_outputs/square_008um" / name).write_text(text)


BAD = {
    "not hd": (lambda r: (r / "outs").rename(r / "o"), {}, "no binned_outputs/square_.*um there"),
    "odd size": (
        lambda r: None,
        {"bin_um": 7},
        "bins of 7 µm cannot be made; give a mul",
    ),
    "nothing to pool": (
        lambda r: shutil.rmtree(r / "outs/binned_outputs/square_002um"),
        {"bin_um": 24},
        "has square_008um, square_016um, but neither square_024um nor square_002um to make it",
    ),
    "no scale": (
        write("spatial/scalefactors_json.json", '{"spot_diameter_fullres": 29}'),
        {},
        "scalefactors_json.json: lacks microns_per_pixel",
    ),
    "scale": (
        lambda r: None,
        {"um_per_pixel": 0.25},
        "he.png: `um_per_pixel` says 0.25 µm per pixel, but the positions make it 0.5",
    ),
    "damaged positions": (
        write("spatial/tissue_positions.parquet", "?"),
        {},
        "tissue_positions.parquet: not a readable table",
    ),
    "no column": (
        lambda r: edit_positions(r, lambda t: t.drop(columns="array_row")),
        {},
        "tissue_positions.parquet: not a readable table .*array_row",
    ),
    "other bins": (
        lambda r: edit_positions(r, lambda t: t.assign(barcode="x" + t["barcode"])),
        {},
        "tissue_positions.parquet: no name in common with the matrix .* are they of one run",
    ),
    "no image": (
        lambda r: None,
        {"image": None},
        "run: give the full-resolution H&E image with `image`",
    ),
    "off the tissue": (
        lambda r: edit_positions(r, lambda t: t.assign(pxl_col_in_fullres=720 + t.index % 20)),
        {},
        "section H1: only .* of the spots stand on the tissue",
    ),
    "outside": (
        lambda r: edit_positions(r, lambda t: t.assign(pxl_col_in_fullres=9e3)),
        {},
        "section H1: spot .* lies outside he.png",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named(run, kind):
    break_it, options, message = BAD[kind]
    break_it(run)
    with pytest.raises(InputError, match=message):
        read(run, **({"bin_um": 8} | options))


def test_spatialdata_reads_the_same(run):
    """An independent reader accepts the folder, and finds the same bins in the same places."""
    from spatialdata_io import visium_hd

    about = {"hd_layout_json": json.dumps({"file_format": "1.0", "transform": [0] * 9})}
    with h5py.File(run / "outs/feature_slice.h5", "w") as file:
        file.attrs["metadata_json"] = json.dumps(about)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about images that it does not find
        sdata = visium_hd(run / "outs", bin_size=[8], load_segmentations_only=False)
    theirs, mine = sdata["square_008um"], read(run, 8)
    assert (mine.X != theirs.X).nnz == 0
    assert list(mine.var_names) == list(theirs.var_names)
    np.testing.assert_allclose(mine.obsm["spatial"], theirs.obsm["spatial"])
    centres = sdata.shapes["_square_008um"].centroid.get_coordinates()
    np.testing.assert_allclose(mine.obsm["spatial"], centres)


def test_the_command_warns(run, tmp_path, command):
    edit_positions(run, lambda table: table[table.index % 2 == 0])
    start = "import", "visium-hd", run, "--patient", "P", "--section", "H1", "-o", tmp_path / "c"
    done = command(*start, "--image", run.parent / "he.png", "--bin", 8, "--json")
    left_out = "have no usable position in tissue_positions.parquet, and are left out"
    (warning,) = [text for text in json.loads(done.stdout)["warnings"] if left_out in text]
    assert "section H1: " in warning
    assert f"Note: {warning}" in done.stderr


def test_the_command_pools_bins(run, tmp_path, command):
    start = "import", "visium-hd", run, "--patient", "P", "--section", "H1", "-o", tmp_path / "c"
    done = command(*start, "--image", run.parent / "he.png", "--bin", 20, "--json")
    told = json.loads(done.stdout)["sections"]
    assert [(e["section"], e["technology"]) for e in told] == [("H1", "Visium HD")]
    assert read_section(tmp_path / "c/H1.h5ad").n_obs == told[0]["spots"]
