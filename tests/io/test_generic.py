"""AnnData and SpatialData of any origin: positions come into the pixels of the image."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy import sparse
from spatialdata import SpatialData
from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel, TableModel
from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation

from strank.cohort.contract import section_info
from strank.cohort.store import read_cohort
from strank.errors import InputError
from strank.io import find_anndata, read_anndata, read_spatialdata, write_sections
from strank.slides.slide import read_region, slide_of

WIDTH, HEIGHT, UM = 460, 400, 2.0
Y, X = np.mgrid[0:5, 0:6].reshape(2, -1)
CENTRES = np.column_stack([80 + 50.0 * X, 80 + 50.0 * Y])
COUNTS = np.random.default_rng(0).poisson(3, size=(30, 4))
SPOTS = [f"s{i}" for i in range(30)]


def tissue() -> np.ndarray:
    pixels = np.full((HEIGHT, WIDTH, 3), 245, np.uint8)
    pixels[60:-60, 60:-60] = np.random.default_rng(1).integers(60, 200, size=(280, 340, 3))
    return pixels


def make(counts=COUNTS, *, centres=CENTRES, **slots) -> anndata.AnnData:
    return anndata.AnnData(
        sparse.csr_matrix(counts, dtype=np.float32),
        obs=slots.pop("obs", pd.DataFrame(index=SPOTS)),
        var=slots.pop("var", pd.DataFrame(index=list("ABCD"))),
        obsm={} if centres is None else {"spatial": centres},
        **slots,
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(tissue()).save(tmp_path / "he.png")
    return tmp_path / "he.png"


def load(he: Path, adata: anndata.AnnData, **options):
    path = he.parent / "mine.h5ad"
    adata.write_h5ad(path)
    given = {"image": he, "um_per_pixel": UM, "patient": "P", **options}
    sections = find_anndata(path) if "section" not in given else [given.pop("section")]
    read = (read_anndata(path, section=name, **given) for name in sections)
    return write_sections(read, he.parent / "cohort")


def refused(he: Path, adata: anndata.AnnData, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(he, adata, **options)
    assert not (he.parent / "cohort").exists()
    return str(caught.value).replace(str(he.parent), "")


@pytest.mark.parametrize("share", [0.5, 0.94, 1.06])
def test_another_scale_than_the_images_must_be_meant(share, image):
    tiff = image.with_suffix(".tif")
    Image.open(image).save(tiff, resolution_unit=3, resolution=1e4 / UM)
    meant = {"um_per_pixel": share * UM}
    told = refused(tiff, make(), **meant)
    assert (
        f"/he.tif: the file says {UM:.4g} µm per pixel, not `um_per_pixel={share * UM:g}`" in told
    )
    (section,) = load(tiff, make(), **meant, um_per_pixel_override=True).values()
    assert section_info(section).um_per_pixel == share * UM


def test_anndata_with_a_layer_an_annotation_and_scanpys_spot_size(image):
    scales = {"spot_diameter_fullres": 27.5}
    adata = make(
        np.log1p(COUNTS),
        layers={"counts": COUNTS},
        obs=pd.DataFrame({"region": "tumour"}, index=SPOTS),
        uns={"spatial": {"any": {"scalefactors": scales}}},
    )
    load(image, adata, layer="counts")
    got = read_cohort(image.parent / "cohort")["mine"]
    np.testing.assert_array_equal(got.X.toarray(), COUNTS)
    np.testing.assert_array_equal(got.obsm["spatial"], CENTRES)
    assert set(got.obs["region"]) == {"tumour"}
    info = section_info(got)
    assert (info.spot_diameter_um, info.spot_pitch_um, info.um_per_pixel) == (55.0, 100.0, UM)
    assert info.image == str(image)


def test_sections_and_patients_of_obs(image):
    half = np.repeat(["left", "right"], 15)
    obs = pd.DataFrame({"section": half, "patient": ["P" + side for side in half]}, index=SPOTS)
    with pytest.raises(InputError, match="no image called left; name one image by the section"):
        load(image, make(obs=obs), image=image.parent)
    folder = image.parent / "images"
    folder.mkdir()
    for name in ("left", "right"):
        Image.fromarray(tissue()).save(folder / f"{name}.png")
    cohort = load(image, make(obs=obs), image=folder, patient=None, patients={"right": "Q"})
    assert {n: a.obs["patient"].iloc[0] for n, a in cohort.items()} == {
        "left": "Pleft",
        "right": "Q",
    }
    np.testing.assert_array_equal(cohort["right"].X.toarray(), COUNTS[15:])
    assert list(load(image, make(obs=obs), image=folder, section="left")) == ["left"]
    with pytest.raises(InputError, match=r"h5ad: no section top; there are left, right$"):
        load(image, make(obs=obs), image=folder, section="top")
    with pytest.raises(InputError, match=r"h5ad: holds several sections; .*`section`: left, right"):
        read_anndata(image.parent / "mine.h5ad", image=folder)


def test_the_only_section_may_be_called_otherwise(image):
    obs = pd.DataFrame({"section": "S1"}, index=SPOTS)
    assert list(load(image, make(obs=obs))) == ["S1"]
    assert list(load(image, make(obs=obs), section="mine")) == ["mine"]
    assert list(load(image, make(), section="other")) == ["other"]


def test_an_image_is_needed(image):
    assert "/mine.h5ad: give the full-resolution H&E image with `image`" in refused(
        image, make(), image=None
    )


def test_genes_by_symbol_and_by_id(image):
    ids = [f"ENSG0000000000{i}" for i in range(4)]
    symbols = pd.Index(["A", "B", "A", "D"])
    by_id = make(var=pd.DataFrame({"feature_name": symbols}, index=ids))
    named = ["A_ENSG00000000000", "B", "A_ENSG00000000002", "D"]
    assert list(load(image, by_id)["mine"].var_names) == named
    assert list(load(image, by_id, gene_id=True)["mine"].var_names) == ids
    # Ids of which one is unknown tell nothing apart.
    partly = pd.DataFrame({"gene_ids": [*ids[:3], None]}, index=list("ABCD"))
    assert list(load(image, make(var=partly))["mine"].var_names) == list("ABCD")
    with pytest.raises(InputError, match="holds no gene ids"):
        load(image, make(var=partly), gene_id=True)


@pytest.mark.parametrize(
    ("adata", "options", "message"),
    [
        (make(centres=None), {}, '/mine.h5ad: lacks obsm["spatial"], the positions (x, y) in pix'),
        (make(), {"layer": "raw"}, "/mine.h5ad: no layer raw; it has none"),
        (make(np.log1p(COUNTS)), {}, "is not a whole number; raw counts are needed"),
        (
            make(-1.0 * COUNTS, layers={"raw": COUNTS}),
            {},
            "is negative; raw counts are needed; are they in `layer=raw`?",
        ),
        (make(centres=np.where(CENTRES > 320, np.nan, CENTRES)), {}, "s5, s11, s17, s23, s29 is"),
        (
            make(centres=CENTRES + 300),
            {},
            "spot s2, s3, s4, s5, s6 and 23 more lies outside he.png",
        ),
        (make(), {"um_per_pixel": None}, "/he.png: the file does not say its µm per pixel"),
        (make(), {"patient": None}, "section mine: the patient is not known"),
        (make()[:1].copy(), {}, "a section of one spot"),
        (make(centres=CENTRES[:, :1]), {}, 'obsm["spatial"] has the shape (30, 1); it must have x'),
        (make(centres=np.full((30, 2), "left")), {}, 'obsm["spatial"] holds what is no number'),
        (
            make(),
            {"um_per_pixel": None, "um_per_pixel_override": True},
            "`um_per_pixel_override` takes `um_per_pixel` in the place of what files say; give it",
        ),
    ],
)
def test_anndata_that_cannot_be_used(image, adata, options, message):
    assert message in refused(image, adata, **options)


@pytest.mark.parametrize("patient", [np.nan, None, "nan", " NA ", "Null", "none", "", "\u00a0"])
def test_what_is_no_name_is_no_patient(image, patient):
    column = pd.Categorical([None] * 30, ["P1"]) if patient is None else [patient] * 30
    adata = make(obs=pd.DataFrame({"patient": column}, index=SPOTS))
    assert "section mine: the patient is not known" in refused(image, adata, patient=None)
    if isinstance(patient, str):
        assert "`patient`" in refused(image, make(), patient=patient)
        assert "the patient is not" in refused(
            image, make(), patient=None, patients={"mine": patient}
        )


@pytest.mark.parametrize("rest", ["P2", "nan", "p1", None])
def test_several_patients_of_one_section_are_named(image, rest):
    adata = make(obs=pd.DataFrame({"patient": ["P1"] * 29 + [rest]}, index=SPOTS))
    told = refused(image, adata, patient=None)
    assert "section mine: the patient is not known" in told
    several = f"P1, {rest}" if rest in ("P2", "p1") else "none, P1"
    assert told.endswith(f'; obs["patient"] says several: {several}')
    assert list(load(image, adata)) == ["mine"]


def test_names_of_an_anndata_are_stripped(image):
    obs = pd.DataFrame({"patient": ["P1", "P1 "] * 15, "section": " S1\t"}, index=SPOTS)
    var = pd.DataFrame(index=["A ", " B", "C\u00a0", "D"])
    cohort = load(image, make(obs=obs, var=var), patient=None)
    assert list(cohort) == ["S1"]
    assert set(cohort["S1"].obs["patient"]) == {"P1"}
    assert list(cohort["S1"].var_names) == list("ABCD")
    obs["section"] = ["S1"] * 29 + ["nan"]
    with pytest.raises(InputError, match=r"section.*has no name, .* for spot s29"):
        load(image, make(obs=obs))


@pytest.mark.parametrize("where", ["X", "layer", "raw"])
def test_true_and_false_are_no_counts(image, where):
    seen = sparse.csr_matrix(COUNTS > 0)
    adata = make(layers={"seen": seen})
    if where == "X":
        adata.X = seen
    if where == "raw":
        adata.raw = anndata.AnnData(seen, adata.obs, adata.var)
    layer = {"X": None, "layer": "seen", "raw": "raw"}[where]
    assert "holds True and False" in refused(image, adata, layer=layer)


def test_counts_in_raw_are_named_and_can_be_chosen(image):
    """Raw holds all genes, X those that vary most."""
    adata = make(np.log1p(COUNTS))
    adata.raw = make()
    adata = adata[:, ["B", "D"]].copy()
    told = refused(image, adata)
    assert told.endswith("raw counts are needed; are they in `layer=raw`? (raw is .raw)")
    for half in (None, np.repeat(["left", "right"], 15)):
        if half is not None:
            adata.obs["section"] = half
        name = "mine" if half is None else "right"
        section = load(image, adata, layer="raw", section=name)[name]
        assert list(section.var_names) == list("ABCD")
        rows = slice(0 if half is None else 15, None)
        np.testing.assert_array_equal(section.X.toarray(), COUNTS[rows])
        assert section.uns["strank"]["provenance"]["layer"] == "raw"


def test_what_holds_no_counts_is_not_offered(image):
    adata = make(np.log1p(COUNTS), layers={"scaled": COUNTS - 0.5})
    adata.raw = make(np.log1p(COUNTS))
    assert refused(image, adata).endswith("raw counts are needed; nor are they in scaled, raw")
    assert "no layer counts; it has scaled, raw" in refused(image, adata, layer="counts")


@pytest.mark.parametrize("off", [2e-7, -2e-7, 3e-6])
def test_counts_are_whole_within_rounding(image, off):
    counts = COUNTS.astype(np.float64) + 9
    counts[3, 2] += counts[3, 2] * off
    if off < 1e-6:
        np.testing.assert_array_equal(load(image, make(counts))["mine"].X.toarray(), COUNTS + 9)
    else:
        number = repr(float(np.float32(counts[3, 2])))
        assert f"spot s3, gene C: {number} is not a whole number" in refused(image, make(counts))


def test_an_anndata_without_x(image):
    adata = make()
    adata.X = None
    assert "mine.h5ad: X is empty; raw counts are needed there or in a `layer`" in refused(
        image, adata
    )


def spatial(
    element, pixels=None, *, several_scales: bool = False, to=None, **images
) -> SpatialData:
    """An object whose table annotates ``element``, in another order than the element has."""
    scales = [2] if several_scales else None
    pixels = tissue() if pixels is None else pixels
    he = Image2DModel.parse(
        np.moveaxis(pixels, -1, 0),
        dims=("c", "y", "x"),
        scale_factors=scales,
        transformations={"global": to or Identity()},
    )
    order = np.random.default_rng(3).permutation(30)
    obs = {"region": pd.Categorical(["spots"] * 30), "instance": order + 1, "patient": "P"}
    table = make(COUNTS[order], centres=None, obs=pd.DataFrame(obs, index=np.array(SPOTS)[order]))
    annotates = {"region": "spots", "region_key": "region", "instance_key": "instance"}
    elements = {"he": he, "spots": element, "table": TableModel.parse(table, **annotates)}
    return SpatialData.init_from_elements({**elements, **images})


def circles(centres=CENTRES, to=None):
    index = np.arange(1, len(centres) + 1)
    options = {"index": index, "transformations": {"global": to or Identity()}}
    return ShapesModel.parse(centres, geometry=0, radius=10, **options)


def load_zarr(tmp_path: Path, data: SpatialData, **options):
    shutil.rmtree(tmp_path / "P1.zarr", ignore_errors=True)
    data.write(tmp_path / "P1.zarr")
    given = {"um_per_pixel": UM, "image_folder": tmp_path / "cohort/images", **options}
    section = read_spatialdata(tmp_path / "P1.zarr", **given)
    return write_sections([section], tmp_path / "cohort")


MICRONS = Affine(
    [[0.0, 2.0, 7.0], [2.0, 0.0, -3.0], [0, 0, 1]], input_axes=("x", "y"), output_axes=("x", "y")
)


@pytest.mark.parametrize(
    ("shapes_to", "image_to", "move"),
    [
        (None, None, lambda c: c),
        # The image lies in µm, shifted; the shapes are in µm.
        (
            None,
            Sequence([Scale([UM, UM], ("x", "y")), Translation([5, 9], ("x", "y"))]),
            lambda c: c * UM + [5, 9],
        ),
        # A registered image: turned, with x and y exchanged.
        (Scale([4.0, 4.0], ("x", "y")), MICRONS, lambda c: (c[:, ::-1] * 2 + [7, -3]) / 4),
    ],
    ids=["identity", "microns", "registered"],
)
@pytest.mark.parametrize("several_scales", [False, True])
def test_positions_come_into_the_pixels_of_the_image(
    tmp_path, shapes_to, image_to, move, several_scales
):
    element = circles(move(CENTRES), shapes_to)
    data = spatial(element, to=image_to, several_scales=several_scales)
    adata = load_zarr(tmp_path, data)["P1"]
    number = [int(name[1:]) for name in adata.obs_names]
    np.testing.assert_allclose(adata.obsm["spatial"], CENTRES[number], atol=1e-9)
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[number])
    assert adata.obs["patient"].iloc[0] == "P"
    shown = read_region(slide_of(adata), 0, 0, WIDTH, HEIGHT)
    np.testing.assert_array_equal(shown, tissue())


@pytest.mark.parametrize("layer", ["counts", "raw", "layer and .raw"])
def test_counts_of_a_spatialdata_may_lie_in_a_layer(tmp_path, layer):
    data = spatial(circles())
    table = data["table"]
    counts = table.X.copy()
    if layer == "raw":
        table.raw = table.copy()
    else:
        table.layers["raw" if " " in layer else layer] = counts
    table.X = counts.log1p()
    with pytest.raises(InputError, match=r"raw counts are needed; are they in `layer=") as caught:
        load_zarr(tmp_path, data)
    name = re.findall(r"`layer=(\w+)`", str(caught.value))[0]
    got = load_zarr(tmp_path, data, layer=name)["P1"]
    np.testing.assert_array_equal(got.X.toarray(), counts.toarray())
    assert section_info(got).provenance["layer"] == name
    with pytest.raises(InputError, match="no layer other; it has"):
        load_zarr(tmp_path, data, layer="other")


def test_an_image_larger_than_a_band_is_written_whole(tmp_path):
    pixels = np.tile(tissue(), (4, 3, 1))
    adata = load_zarr(tmp_path, spatial(circles(), pixels))["P1"]
    slide = slide_of(adata)
    assert slide.size == (3 * WIDTH, 4 * HEIGHT)
    np.testing.assert_array_equal(read_region(slide, 0, 0, *slide.size), pixels)


def test_labels_and_an_image_file_in_global_pixels(tmp_path, image):
    labels = np.zeros((HEIGHT, WIDTH), np.int32)
    for number, (x, y) in enumerate(CENTRES.astype(int), start=1):
        labels[y - 5 : y + 5, x - 5 : x + 5] = number
    element = Labels2DModel.parse(labels, dims=("y", "x"))
    adata = load_zarr(tmp_path, spatial(element), image=image, section="mine")["mine"]
    number = [int(name[1:]) for name in adata.obs_names]
    np.testing.assert_allclose(adata.obsm["spatial"], CENTRES[number])
    assert section_info(adata).image == str(image)


def test_spatialdata_that_cannot_be_used(tmp_path):
    def refused_zarr(data: SpatialData, **options) -> str:
        with pytest.raises(InputError) as caught:
            load_zarr(tmp_path, data, **options)
        assert not (tmp_path / "cohort").exists()
        return str(caught.value).replace(str(tmp_path), "")

    for option, message in {
        "um_per_pixel": "/P1.zarr: µm per pixel of image he is not known; give it with `um_per_pi",
        "table": "/P1.zarr: no other, but tables: table; choose one with `table`",
        "image": "other: neither a file nor an image of /P1.zarr, which has he",
    }.items():
        given = {option: None if option == "um_per_pixel" else "other"}
        assert message in refused_zarr(spatial(circles()), **given)
    two = spatial(circles(), small=Image2DModel.parse(np.zeros((3, 9, 9), np.uint8)))
    assert "/P1.zarr: several images: he, small; choose one with `image`" in refused_zarr(two)
    grey = spatial(circles(), tissue()[..., :1])
    assert "the image is uint8 with 1 channels, not RGB" in refused_zarr(grey)
    assert "the table annotates 30, which the element lacks" in refused_zarr(
        spatial(circles(CENTRES[:29]))
    )
    fractional = spatial(circles())
    fractional["table"].X = fractional["table"].X * 0.5
    assert "is not a whole number; raw counts are needed" in refused_zarr(fractional)
    apart = spatial(ShapesModel.parse(CENTRES, geometry=0, radius=10, index=np.arange(1, 31)))
    apart["spots"].attrs["transform"] = {"elsewhere": Identity()}
    assert "the spots and the image have no coordinate system in common" in refused_zarr(apart)
    (tmp_path / "P1.zarr/zarr.json").write_text("{")
    with pytest.raises(InputError, match=r"P1.zarr: not a readable SpatialData zarr"):
        read_spatialdata(tmp_path / "P1.zarr")
    with pytest.raises(InputError, match="no such folder; a SpatialData zarr is one"):
        read_spatialdata(tmp_path / "P2.zarr")


def test_what_spatialdata_io_makes_of_a_visium_run(tmp_path, write_space_ranger, image):
    """Its own reader decides names, transformations and the order of spots."""
    visium = pytest.importorskip("spatialdata_io").visium
    barcodes = [f"AAAC{i:02d}-1" for i in range(30)]
    positions = pd.DataFrame({"barcode": barcodes, "in_tissue": 1, "array_row": Y, "array_col": X})
    positions["pxl_row_in_fullres"], positions["pxl_col_in_fullres"] = CENTRES.T[::-1]
    features = pd.DataFrame({"id": [f"ENSG{i:011d}" for i in range(4)], "symbol": list("ABCD")})
    outs = write_space_ranger(tmp_path / "outs", COUNTS, features, positions)
    data = visium(
        outs,
        dataset_id="run",
        fullres_image_file=image,
        counts_file="filtered_feature_bc_matrix.h5",
    )
    adata = load_zarr(tmp_path, data, image="run_full_image", patient="P")["P1"]
    number = [int(name[4:6]) for name in adata.obs_names]
    np.testing.assert_allclose(adata.obsm["spatial"], CENTRES[number])
    np.testing.assert_array_equal(adata.X.toarray(), COUNTS[number])
    assert list(adata.var["gene_id"]) == list(features["id"])
    np.testing.assert_array_equal(read_region(slide_of(adata), 0, 0, WIDTH, HEIGHT), tissue())


def test_the_commands(tmp_path, image, command):
    make().write_h5ad(tmp_path / "mine.h5ad")
    start = "import", "anndata", tmp_path / "mine.h5ad", "--image", image, "-o", tmp_path / "c"
    assert "does not say its µm per pixel" in command(*start, "--patient", "P", code=2).stderr
    assert "mine: " in command(*start, "--patient", "P", "--mpp", UM).stdout
    third = command(*start, "--patient", " p ", "--mpp", UM, "--section", "third", "--json")
    assert "patients 'P' and 'p' are taken for different ones" in third.stderr
    assert json.loads(third.stdout)["warnings"][0].startswith("patients 'P' and 'p'")
    (tmp_path / "c/third.h5ad").unlink()
    spatial(circles()).write(tmp_path / "zarr.zarr")
    start = "import", "spatialdata", tmp_path / "zarr.zarr", "-o", tmp_path / "c"
    done = command(*start, "--patient", "P", "--mpp", UM, "--section", "other")
    assert "other: " in done.stdout
    assert sorted(p.name for p in (tmp_path / "c").glob("*.h5ad")) == ["mine.h5ad", "other.h5ad"]
