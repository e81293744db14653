"""What `spaceranger aggr` writes: several samples in one matrix, told apart by suffix."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from strank.cohort.contract import section_info
from strank.errors import InputError
from strank.io import read_visium

SAMPLES = ["left", "right", "007"]
FEATURES = pd.DataFrame({"id": [f"ENSG{i:011}" for i in range(5)], "symbol": [*"ABCDE"]})


def grid(number: int) -> pd.DataFrame:
    """The same barcodes in every sample, which lies elsewhere and at another scale on its image."""
    row, half = (part.ravel() for part in np.mgrid[0:9, 0:8])
    column = 2 * half + row % 2
    pitch = 40 + 4 * number
    return pd.DataFrame(
        {
            "barcode": [f"ACGT{i:04}-{number}" for i in range(len(row))],
            "in_tissue": 1,
            "array_row": row,
            "array_col": column,
            "pxl_row_in_fullres": 50 + 10 * number + pitch * np.sqrt(3) / 2 * row,
            "pxl_col_in_fullres": 60 + 5 * number + pitch / 2 * column,
        }
    )


COUNTS = {
    number: np.random.default_rng(number).poisson(3, size=(72, 5))
    for number in range(1, len(SAMPLES) + 1)
}


def write_aggregate(folder: Path, write_tenx, numbers: list[int], form: str = ".h5") -> Path:
    outs = folder / "aggr/outs"
    tables = pd.concat([grid(number) for number in numbers])
    counts = np.concatenate([COUNTS[number] for number in numbers])
    write_tenx(outs / f"filtered_feature_bc_matrix{form}", counts, tables["barcode"], FEATURES)
    tables.to_csv(outs / "aggr_tissue_positions.csv", index=False)
    named = pd.DataFrame({"library_id": [SAMPLES[number - 1] for number in numbers]})
    named.assign(molecule_h5="m.h5", cloupe_file="c").to_csv(outs / "aggregation.csv", index=False)
    return outs


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.full((700, 700, 3), 240, np.uint8)
    pixels[40:620, 40:620] = np.random.default_rng(1).integers(60, 200, size=(580, 580, 3))
    Image.fromarray(pixels).save(tmp_path / "he.png")
    return tmp_path / "he.png"


def version_1(outs: Path) -> None:
    path = outs / "aggr_tissue_positions.csv"
    pd.read_csv(path).to_csv(outs / "aggr_tissue_positions_list.csv", index=False, header=False)
    path.unlink()


def of_geo(outs: Path) -> None:
    for path in list(outs.iterdir()):
        path.rename(outs / f"GSE1_{path.name}")


LAYOUTS = {"2.x": lambda outs: None, "1.x": version_1, "GEO": of_geo}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_each_sample_has_its_own_counts_and_places(tmp_path, image, write_tenx, layout, number):
    outs = write_aggregate(tmp_path, write_tenx, [1, 2, 3])
    LAYOUTS[layout](outs)
    name = SAMPLES[number - 1]
    adata = read_visium(outs, image=image, section=name, patient="P")
    table = grid(number).set_index("barcode")
    assert list(adata.obs_names) == list(table.index)
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[number])
    np.testing.assert_allclose(adata.obsm["spatial"], table.iloc[:, [4, 3]])
    info = section_info(adata)
    assert info.um_per_pixel == pytest.approx(100 / (40 + 4 * number))
    (note,) = info.provenance["notes"]
    assert f"one of 3 samples of {Path(info.provenance['counts_file']).name}" in note
    assert f"end in -{number}" in note
    assert set(info.provenance["dropped_spots"].values()) == {0}


@pytest.mark.parametrize("form", [".h5", ""])
@pytest.mark.parametrize("numbers", [[1, 2], [1, 2, 3]])
def test_a_sample_has_to_be_chosen(tmp_path, image, write_tenx, numbers, form):
    outs = write_aggregate(tmp_path, write_tenx, numbers, form)
    names = ", ".join(SAMPLES[: len(numbers)])
    message = rf"\(72 end in -1, 72 end in -2.* `spaceranger aggr` .* `section`: {names}$"
    with pytest.raises(InputError, match=message):
        read_visium(outs, image=image, patient="P")


@pytest.mark.parametrize("of", [1, 2, 3])
def test_positions_of_one_sample_do_not_get_the_counts_of_another(tmp_path, image, write_tenx, of):
    """All samples have the same barcodes, and the table of any run says -1."""
    outs = write_aggregate(tmp_path, write_tenx, [1, 2, 3])
    (outs / "aggr_tissue_positions.csv").unlink()
    table = grid(of)
    table["barcode"] = table["barcode"].str.replace(r"-\d$", "-1", regex=True)
    (outs / "spatial").mkdir()
    table.to_csv(outs / "spatial/tissue_positions.csv", index=False)
    with pytest.raises(InputError, match="positions are of one sample only; give the outs of each"):
        read_visium(outs, image=image, section=SAMPLES[of - 1], patient="P")
    (outs / "aggregation.csv").unlink()
    with pytest.raises(InputError, match=r"no aggregation.csv names them; give the outs of each"):
        read_visium(outs, image=image, patient="P")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_one_sample_cut_out_of_the_matrix_takes_its_own_positions(
    tmp_path, image, write_tenx, number
):
    """The others' would make another grid."""
    outs = write_aggregate(tmp_path, write_tenx, [1, 2, 3])
    matrix = outs / "filtered_feature_bc_matrix.h5"
    write_tenx(matrix, COUNTS[number], grid(number)["barcode"], FEATURES)
    adata = read_visium(outs, image=image, patient="P")
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[number])
    assert section_info(adata).um_per_pixel == pytest.approx(100 / (40 + 4 * number))
    # And with the table of its own run, whose barcodes end in -1.
    shutil.rmtree(outs / "spatial", ignore_errors=True)
    (outs / "aggr_tissue_positions.csv").unlink()
    table = grid(number)
    table["barcode"] = table["barcode"].str.replace(r"-\d$", "-1", regex=True)
    table.to_csv(outs / "tissue_positions.csv", index=False)
    np.testing.assert_array_equal(
        read_visium(outs, image=image, patient="P").X.toarray(), COUNTS[number]
    )


def test_the_command_says_which_samples_there_are(tmp_path, image, write_tenx, command):
    outs = write_aggregate(tmp_path, write_tenx, [1, 2])
    start = "import", "visium", outs, "--image", image, "--patient", "P", "-o", tmp_path / "cohort"
    assert "choose one with --section: left, right" in command(*start, code=2).stderr
    assert not (tmp_path / "cohort").exists()
    done = command(*start, "--section", "right")
    assert "right: Visium, patient P, 72 spots" in done.stdout
    assert "Note: section right: one of 2 samples" in done.stderr


def test_the_case_of_the_issue(command, tmp_path):
    outs = Path("/work/shared/cases/visium_aggr/outs")
    if not outs.is_dir():
        pytest.skip("needs /work/shared/cases, which is not here")
    start = "import", "visium", outs, "--image", outs.parent / "he.jpg", "--patient", "P"
    told = command(*start, "-o", tmp_path / "cohort", code=2).stderr
    assert "(2405 end in -1, 2405 end in -2), as `spaceranger aggr` writes them" in told


@pytest.mark.parametrize(
    "names", [["left", "left", "007"], [" left", "left ", "right"], ["7", "7", "7"]]
)
def test_samples_of_one_name_are_not_taken_for_each_other(tmp_path, image, write_tenx, names):
    outs = write_aggregate(tmp_path, write_tenx, [1, 2, 3])
    pd.DataFrame({"library_id": names}).to_csv(outs / "aggregation.csv", index=False)
    with pytest.raises(InputError, match=r"aggregation.csv: library_id .* stands twice"):
        read_visium(outs, image=image, patient="P", section=names[0])
