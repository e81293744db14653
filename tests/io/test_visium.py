"""Visium as Space Ranger's versions write it, what users do to it, and every refusal."""

from __future__ import annotations

import gzip
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse

from strank.cohort.contract import section_info
from strank.cohort.store import read_section
from strank.errors import InputError
from strank.io import read_st, read_visium, write_sections

FEATURES = pd.DataFrame(
    {"id": [f"ENSG{i:011}" for i in range(6)], "symbol": [*"ABCD", "MATR3", "MATR3"]}
)
NAMES = ["A", "B", "C", "D", "MATR3_ENSG00000000004", "MATR3_ENSG00000000005"]
UM_PER_PIXEL = 100 / 60
WHO = {"section": "S1", "patient": "P1"}


def grid() -> pd.DataFrame:
    """12 x 11 spots, a pitch of 60 px, turned a little and mirrored like a CytAssist slide."""
    row, half = (part.ravel() for part in np.mgrid[0:12, 0:11])
    column = 2 * half + row % 2
    x, y = 30.0 * (22 - column), 30 * np.sqrt(3) * row
    turn = np.deg2rad(1)
    down = 60 + y * np.cos(turn) + x * np.sin(turn)
    right = 60 + x * np.cos(turn) - y * np.sin(turn)
    return pd.DataFrame(
        {
            "barcode": [f"ACGT{i:04}-1" for i in range(len(row))],
            "in_tissue": ((right > 50) & (right < 540) & (down > 50) & (down < 460)).astype(int),
            "array_row": row,
            "array_col": column,
            "pxl_row_in_fullres": down,
            "pxl_col_in_fullres": right,
        }
    )


COUNTS = np.random.default_rng(0).poisson(3, size=(132, 6))


def write_image(path: Path, size: tuple[int, int] = (900, 760)) -> Path:
    pixels = np.full((size[1], size[0], 3), 240, np.uint8)
    pixels[30:480, 30:560] = np.random.default_rng(1).integers(60, 200, size=(450, 530, 3))
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_image(tmp_path / "full.png")


@pytest.fixture
def outs(tmp_path: Path, write_space_ranger) -> Path:
    return write_space_ranger(tmp_path / "run/outs", COUNTS, FEATURES, grid())


def read(outs: Path, image: Path | None = None, **options):
    image = image or outs.parents[1] / "full.png"
    return read_visium(outs, image=image, **(WHO | options))


def check_whole(adata) -> None:
    table = grid().set_index("barcode")
    table = table[table["in_tissue"] == 1]
    assert 50 < len(table) < 132
    assert list(adata.obs_names) == list(table.index)
    np.testing.assert_array_equal(adata.obsm["spatial"], table.iloc[:, [4, 3]])
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[grid()["in_tissue"] == 1])
    assert list(adata.var_names) == NAMES
    assert list(adata.var["gene_id"]) == list(FEATURES["id"])
    info = section_info(adata)
    assert info.um_per_pixel == pytest.approx(UM_PER_PIXEL, rel=1e-9)
    assert (info.technology, info.spot_diameter_um, info.spot_pitch_um) == ("Visium", 55, 100)


def as_parquet(outs: Path) -> None:
    path = outs / "spatial/tissue_positions.csv"
    grid().to_parquet(path.with_suffix(".parquet"))
    path.unlink()


def as_version_1(outs: Path) -> None:
    path = outs / "spatial/tissue_positions.csv"
    grid().to_csv(path.with_stem("tissue_positions_list"), index=False, header=False)
    path.unlink()


def as_version_1_with_header(outs: Path) -> None:
    (outs / "spatial/tissue_positions.csv").rename(outs / "spatial/tissue_positions_list.csv")


def with_other_titles(outs: Path) -> None:
    path = outs / "spatial/tissue_positions.csv"
    path.write_text(grid().rename(columns=lambda name: f" {name.upper()}").to_csv(index=False))


def with_true_and_false(outs: Path) -> None:
    path = outs / "spatial/tissue_positions.csv"
    grid().assign(in_tissue=grid()["in_tissue"] == 1).to_csv(path, index=False)


def as_folder(outs: Path) -> None:
    (outs / "filtered_feature_bc_matrix.h5").unlink()


def as_unpacked_folder(outs: Path) -> None:
    as_folder(outs)
    for path in (outs / "filtered_feature_bc_matrix").iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()


def as_archive(outs: Path) -> None:
    as_folder(outs)
    folder = outs / "filtered_feature_bc_matrix"
    with tarfile.open(outs / "V1_filtered_feature_bc_matrix.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    shutil.rmtree(folder)


def as_geo_has_it(outs: Path) -> None:
    spatial = outs / "spatial"
    text = (spatial / "tissue_positions.csv").read_bytes()
    (outs / "GSM7_P1_tissue_positions.csv.gz").write_bytes(gzip.compress(text))
    (outs / "filtered_feature_bc_matrix.h5").rename(outs / "GSM7_P1_filtered_feature_bc_matrix.h5")
    shutil.rmtree(spatial)
    shutil.rmtree(outs / "filtered_feature_bc_matrix")


def without_suffix(outs: Path) -> None:
    path = outs / "spatial/tissue_positions.csv"
    path.write_text(path.read_text().replace("-1,", ","))


LAYOUTS = {
    "2.x": lambda outs: None,
    "parquet": as_parquet,
    "1.x": as_version_1,
    "1.x with header": as_version_1_with_header,
    "other titles": with_other_titles,
    "True and False": with_true_and_false,
    "folder": as_folder,
    "unpacked folder": as_unpacked_folder,
    "archive": as_archive,
    "GEO": as_geo_has_it,
    "no suffix": without_suffix,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_give_the_same_section(outs, image, layout):
    LAYOUTS[layout](outs)
    check_whole(read(outs, image))


def test_the_folder_of_the_run_and_the_raw_matrix_give_it_too(outs, image):
    adata = read(outs.parent, image, raw=True)
    check_whole(adata)
    dropped = section_info(adata).provenance["dropped_spots"]
    n_outside = int((grid()["in_tissue"] == 0).sum())
    assert dropped == {"in counts only": 0, "in positions only": 0, "not in tissue": n_outside}


def test_spatialdata_reads_the_layout_and_finds_the_same(outs, image):
    """The folders of these tests are Space Ranger's, in the eyes of an independent reader."""
    spatialdata_io = pytest.importorskip("spatialdata_io")
    pytest.importorskip("dask_image")
    table = spatialdata_io.visium(outs, dataset_id="S1").tables["table"]
    adata = read(outs, image)
    assert list(table.obs_names) == list(adata.obs_names)
    assert (table.X != adata.X).nnz == 0
    np.testing.assert_allclose(table.obsm["spatial"], adata.obsm["spatial"], rtol=1e-14)


def test_spots_in_one_file_only_are_dropped_and_counted(outs, image, write_tenx):
    table = grid()
    tissue = np.flatnonzero(table["in_tissue"] == 1)
    rows = tissue[2:]  # two spots are not in the matrix
    path = outs / "filtered_feature_bc_matrix.h5"
    write_tenx(path, COUNTS[rows], table["barcode"][rows], FEATURES)
    table.drop(index=tissue[-1]).to_csv(outs / "spatial/tissue_positions.csv", index=False)
    adata = read(outs, image)
    assert adata.n_obs == len(tissue) - 3
    assert section_info(adata).provenance["dropped_spots"] == {
        "in counts only": 1,
        "in positions only": 2,
        "not in tissue": 0,
    }


def test_antibodies_are_dropped_and_counted_and_ids_kept_where_wished(outs, image, write_tenx):
    kinds = FEATURES.assign(kind=["Gene Expression"] * 4 + ["Antibody Capture"] * 2)
    tissue = grid()["in_tissue"] == 1
    path = outs / "filtered_feature_bc_matrix.h5"
    write_tenx(path, COUNTS[tissue], grid()["barcode"][tissue], kinds)
    adata = read(outs, image, gene_id=True)
    assert list(adata.var_names) == list(FEATURES["id"][:4])
    assert section_info(adata).provenance["dropped_features"] == {"Antibody Capture": 2}
    np.testing.assert_array_equal(adata.obs["library_size"], COUNTS[tissue, :4].sum(1))


def test_what_is_given_is_taken_when_it_agrees(outs, image):
    assert section_info(read(outs, image, um_per_pixel=1.65)).um_per_pixel == 1.65
    with pytest.raises(InputError) as caught:
        read(outs, image, um_per_pixel=0.5)
    told = f"{image}: `um_per_pixel` says 0.5 µm per pixel, but the positions make it 1.667"
    assert told in str(caught.value)


def test_an_image_that_contradicts_the_grid_is_refused(outs, image):
    pixels = Image.open(image)
    pixels.save(image.with_suffix(".tif"), resolution_unit=3, resolution=1e4 / 0.5)
    with pytest.raises(
        InputError, match=r"the image says 0.5 µm .* make it 1.667.* `um_per_pixel=1.667`"
    ):
        read(outs, image.with_suffix(".tif"))
    adata = read(outs, image.with_suffix(".tif"), um_per_pixel=UM_PER_PIXEL)
    assert section_info(adata).um_per_pixel == UM_PER_PIXEL


def test_import_writes_all_or_nothing(outs, image, tmp_path):
    both = (read(outs, image, section=name) for name in ("S2", "S1"))
    told: list[int] = []
    sections = write_sections(both, tmp_path / "cohort", advance=told.append)
    assert told == [1, 1]
    assert list(sections) == ["S1", "S2"]
    check_whole(read_section(tmp_path / "cohort/S2.h5ad"))
    with pytest.raises(InputError, match="full-resolution"):
        write_sections(
            (read_visium(outs, image=i, **WHO) for i in (image, None)), tmp_path / "other"
        )
    assert not (tmp_path / "other").exists()


def edit_positions(change: Callable[[pd.DataFrame], pd.DataFrame]):
    def edit(outs: Path) -> None:
        path = outs / "spatial/tissue_positions.csv"
        change(pd.read_csv(path)).to_csv(path, index=False)

    return edit


def swap(table: pd.DataFrame) -> pd.DataFrame:
    x, y = table["pxl_col_in_fullres"], table["pxl_row_in_fullres"]
    return table.assign(pxl_col_in_fullres=y, pxl_row_in_fullres=x)


def moved(**by: float):
    return edit_positions(lambda t: t.assign(**{c: t[c] + n for c, n in by.items()}))


def two_samples(outs: Path) -> None:
    path = outs / "filtered_feature_bc_matrix.h5"
    shutil.copy(path, outs / f"a_{path.name}")
    path.rename(outs / f"b_{path.name}")


BAD = {
    "no matrix": (
        lambda o: [as_folder(o), shutil.rmtree(o / "filtered_feature_bc_matrix")],
        r"outs: no filtered_feature_bc_matrix.h5 and no folder filtered_feature_bc_matrix",
    ),
    "Visium HD": (
        lambda o: [BAD["no matrix"][0](o), (o / "binned_outputs").mkdir()],
        r"no folder filtered_feature_bc_matrix there; for Visium HD use visium-hd",
    ),
    "no positions": (
        lambda o: (o / "spatial/tissue_positions.csv").unlink(),
        r"outs: no spatial/tissue_positions.csv .*unpack it",
    ),
    "truncated matrix": (
        lambda o: (o / "filtered_feature_bc_matrix.h5").write_bytes(
            (o / "filtered_feature_bc_matrix.h5").read_bytes()[:3000]
        ),
        r"filtered_feature_bc_matrix.h5: not a readable 10x matrix",
    ),
    "two samples": (
        two_samples,
        r"several filtered_feature_bc_matrix.h5 \(a_.*, b_.*\); put each sample in a folder",
    ),
    "empty positions": (
        lambda o: (o / "spatial/tissue_positions.csv").write_text(""),
        r"tissue_positions.csv: not a readable table",
    ),
    "no column": (
        edit_positions(lambda t: t.drop(columns="array_row")),
        r"tissue_positions.csv: lacks column array_row; it has barcode, in_tissue",
    ),
    "not a number": (
        edit_positions(lambda t: t.astype(object).replace({"array_col": {4: "?"}})),
        r"tissue_positions.csv: barcode ACGT0002-1, column array_col: '\?' is not a number",
    ),
    "duplicate barcode": (
        edit_positions(lambda t: pd.concat([t, t[:1]])),
        r"tissue_positions.csv: barcode ACGT0000-1 stands twice",
    ),
    "other barcodes": (
        edit_positions(lambda t: t.assign(barcode="T" + t["barcode"])),
        r"section S1: no spot under tissue stands in both filtered.* \(e.g. ACGT.*; TACGT",
    ),
    "no tissue": (
        edit_positions(lambda t: t.assign(in_tissue=0)),
        r"section S1: no spot under tissue stands in both",
    ),
    "one row": (
        edit_positions(lambda t: t[t["array_row"] == 3]),
        r"tissue_positions.csv: the spots do not span a grid",
    ),
    "outside": (
        moved(pxl_col_in_fullres=400),
        r"section S1: spot .* lies outside full.png .*900 x 760\)$",
    ),
    "off the tissue": (
        moved(pxl_col_in_fullres=260, pxl_row_in_fullres=230),
        r"section S1: only \d+% of the spots stand on the tissue of full.png",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named(outs, image, kind):
    break_it, message = BAD[kind]
    break_it(outs)
    with pytest.raises(InputError, match=message):
        read(outs, image)


@pytest.mark.parametrize("size", [(1400, 500), (1000, 1000)])
def test_swapped_axes_are_told(outs, tmp_path, size):
    image = write_image(tmp_path / "full.png", size)
    path = outs / "spatial/tissue_positions.csv"
    table = pd.read_csv(path)
    # Far from the diagonal, so that it matters.
    table["pxl_col_in_fullres"] += 400
    pixels = np.array(Image.open(image))
    Image.fromarray(np.roll(pixels, 400, axis=1)).save(image)
    table.to_csv(path, index=False)
    read(outs, image)
    swap(table).to_csv(path, index=False)
    with pytest.raises(InputError, match="with x and y swapped"):
        read(outs, image)


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1, "is negative"), (0.5, "is not a whole number"), (np.nan, "is not a finite number")],
)
def test_counts_must_be_raw(outs, image, write_tenx, value, message):
    tissue = np.flatnonzero(grid()["in_tissue"] == 1)
    counts = COUNTS[tissue].astype(float)
    counts[3, 2] = value
    path = outs / "filtered_feature_bc_matrix.h5"
    write_tenx(path, counts, grid()["barcode"][tissue], FEATURES)
    barcode = grid()["barcode"][tissue[3]]
    with pytest.raises(InputError) as caught:
        read(outs, image)
    assert f"{path}: spot {barcode}, gene C: {value:g} {message}" in str(caught.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (None, r"S1: Space Ranger's output holds only a reduced image; .* `image=FILE`"),
        (Path("tissue_hires_image.png"), r"S1: tissue_hires_image.png is only a reduced image"),
        (Path("absent.tif"), r"absent.tif: no such"),
    ],
)
def test_the_full_image_is_needed(outs, image, message):
    with pytest.raises(InputError, match=message):
        read_visium(outs, image=image, **WHO)


def test_absent_folder(tmp_path):
    with pytest.raises(InputError, match="absent: no such folder"):
        read_visium(tmp_path / "absent", image="full.png", **WHO)


def test_the_folder_names_the_section(outs, image):
    adata = read_visium(outs, image=image, patients={"run": "P9", "other": "P1"})
    assert [adata.obs[c].iloc[0] for c in ("section", "patient")] == ["run", "P9"]
    with pytest.raises(
        InputError, match=r"section run: the patient is not known, .*`patients=FILE`"
    ):
        read_visium(outs, image=image)


def as_space_ranger(section, spots_file: Path) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    """Counts and positions of a section of her2st, at all spots of its table."""
    table = pd.read_csv(spots_file, sep="\t")
    barcode = table["x"].astype(str) + "x" + table["y"].astype(str)
    at = section.obs_names.get_indexer(barcode)
    positions = pd.DataFrame(
        {
            "barcode": barcode,
            "in_tissue": (at >= 0).astype(int),
            "array_row": table["y"],
            "array_col": table["x"],
            "pxl_row_in_fullres": table["pixel_y"],
            "pxl_col_in_fullres": table["pixel_x"],
        }
    )
    held = np.flatnonzero(at >= 0)
    place = sparse.csr_matrix((np.ones(len(held)), (held, at[held])), (len(at), section.n_obs))
    return (place @ section.X).astype(np.int32), positions


@pytest.mark.parametrize("name", ["C3", pytest.param("B4", marks=pytest.mark.slow)])
def test_real_sections_come_back_identical(her2st, tmp_path, write_space_ranger, name):
    """Of another array than Visium's, whose pitch is given."""
    section = read_st(her2st, section=name)
    counts, positions = as_space_ranger(section, her2st / f"spots/{name}_selection.tsv")
    features = pd.DataFrame({"id": "ID_" + section.var_names, "symbol": section.var_names})
    outs = write_space_ranger(tmp_path / "outs", counts, features, positions)
    image = her2st / f"images/{name}.jpg"
    given = {"section": name, "patient": section.obs["patient"].iloc[0], "pitch_um": 200.0}
    back = read_visium(outs, image=image, **given)
    assert (back.X != section.X).nnz == 0
    assert back.var_names.equals(section.var_names)
    pd.testing.assert_frame_equal(
        back.obs[["section", "patient", "library_size"]],
        section.obs[["section", "patient", "library_size"]],
        check_names=False,
    )
    np.testing.assert_array_equal(back.obsm["spatial"], section.obsm["spatial"])
    facts = [
        {k: v for k, v in vars(section_info(a)).items() if k != "provenance"}
        for a in (back, section)
    ]
    assert facts[0] == facts[1]


def test_the_command_reads_runs_in_their_order(tmp_path, image, write_space_ranger, command):
    other = write_image(tmp_path / "other.png")
    for name in ("S1", "S2"):
        write_space_ranger(tmp_path / name / "outs", COUNTS, FEATURES, grid())
    runs, out = [tmp_path / "S1" / "outs", tmp_path / "S2"], tmp_path / "cohort"
    (tmp_path / "patients.csv").write_text("section,patient\nS1,P1\nS2,P2\n")
    start = "import", "visium", *runs, "-o", out
    told = command(*start, "--image", image, "--patient", "P", code=2).stderr
    assert "Error: --image: 1 for 2 runs; give one each" in told
    images = "--image", image, "--image", other
    told = command(*start, *images, code=2).stderr
    assert "section S1: the patient is not known" in told
    assert "give --patient NAME, or --patients FILE with columns section,patient" in told
    assert not out.exists()
    done = command(*start, *images, "--patients", tmp_path / "patients.csv")
    assert "S1: Visium, patient P1," in done.stdout
    for name, picture in {"S1": image, "S2": other}.items():
        section = read_section(out / f"{name}.h5ad")
        assert section_info(section).image == str(picture.resolve())
        assert list(section.var_names) == NAMES
    told = command(
        *("import", "visium", runs[1], "--image", image, "--gene-id", "--patient", "P2"),
        *("--section", "S3", "-o", out),
        code=2,
    )
    assert "section S3 by Ensembl ids" in told.stderr
    assert "import all with --gene-id, or" in told.stderr
    assert sorted(p.name for p in out.iterdir()) == ["S1.h5ad", "S2.h5ad"]
