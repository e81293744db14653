"""HEST-1k and its benchmark: real sections come back identical, and the quirks that users meet."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import pyvips
from PIL import Image
from scipy import sparse

from strank.cohort.contract import section_info
from strank.cohort.store import read_cohort
from strank.errors import InputError
from strank.evaluation.protocol import from_hest
from strank.io import find_hest, find_st, read_hest, read_st, write_sections
from strank.slides.slide import read_region, slide_of

SIDE = 40
UM = 2.0
GENES = ["A", "B", "NegControlProbe_1", "C", "BLANK_0001"]


def write_patches(path: Path, pixels, centres, barcodes, um: float, side: int, **attrs) -> None:
    """As HEST's patcher at the resolution of the slide; ``coords`` are the upper left corners."""
    corners = (centres - side // 2).astype(int)
    cut = [np.asarray(pixels)[y : y + side, x : x + side] for x, y in corners]
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["img"] = np.stack(cut)
        file["coords"] = corners
        file["barcode"] = np.array(barcodes, dtype="S")[:, None]
        facts = {"patch_size_src": side, "patch_size_target": side, "pixel_size": um, **attrs}
        file["coords"].attrs.update({k: v for k, v in facts.items() if v is not None})


def write_counts(path: Path, counts, centres, *, spots, genes, diameter_px: float = 50.0) -> None:
    scales = {"spot_diameter_fullres": diameter_px, "tissue_downscaled_fullres_scalef": 0.1}
    path.parent.mkdir(parents=True, exist_ok=True)
    anndata.AnnData(
        sparse.csr_matrix(counts),
        obs=pd.DataFrame({"array_row": range(len(spots))}, index=pd.Index(spots, dtype=str)),
        var=genes if isinstance(genes, pd.DataFrame) else pd.DataFrame(index=list(genes)),
        obsm={"spatial": centres},
        uns={"spatial": {"ST": {"images": {}, "scalefactors": scales}}},
    ).write_h5ad(path)


def write_facts(folder: Path, name: str, **facts) -> None:
    (folder / "metadata").mkdir(exist_ok=True)
    (folder / f"metadata/{name}.json").write_text(json.dumps({"id": name, **facts}))


def tissue(seed: int = 0, width: int = 460, height: int = 400) -> np.ndarray:
    pixels = np.full((height, width, 3), 245, np.uint8)
    size = (height - 120, width - 120, 3)
    pixels[60:-60, 60:-60] = np.random.default_rng(seed).integers(60, 200, size=size)
    return pixels


def write_slide(path: Path, pixels) -> None:
    """As HEST writes its slides: tiled, pyramidal, by libvips; the resolution is a screen's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, pyvips.Image) else pyvips.Image.new_from_array(pixels)
    image.tiffsave(
        str(path), tile=True, pyramid=True, compression="deflate", xres=96 / 25.4, yres=96 / 25.4
    )


def write_sample(folder: Path, name: str, seed: int = 0, *, counts_in: str = "st", **changed):
    """A sample of 6 x 5 spots of which four have no patch; returns pixels, counts and positions."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:5, 0:6].reshape(2, -1)
    centres = np.column_stack([80 + 50.0 * x, 80 + 50.0 * y])
    spots = [f"{a:03d}x{b:03d}" for a, b in zip(x, y, strict=True)]
    counts, pixels = rng.poisson(3, size=(30, 5)).astype(np.float32), tissue(seed)
    given = {"spots": spots, "genes": GENES, **changed}
    write_counts(folder / f"{counts_in}/{name}.h5ad", counts, centres, **given)
    order = rng.permutation(26)
    where = folder / f"patches/{name}.h5"
    write_patches(where, pixels, centres[order], np.array(spots)[order], UM, SIDE)
    return pixels, counts, centres


@pytest.fixture
def hest(tmp_path: Path) -> Path:
    """Two samples; X2 has no slide."""
    folder = tmp_path / "hest"
    for number, name in enumerate(["X1", "X2"]):
        pixels, *_ = write_sample(folder, name, number)
        facts = {"pixel_size_um_estimated": UM, "pixel_size_um_embedded": 0.26, "patient": "P"}
        write_facts(folder, name, **facts, st_technology="Xenium", spot_diameter=float("nan"))
        if name == "X1":
            write_slide(folder / "wsis/X1.tif", pixels)
    return folder


def load(folder: Path, samples=None, *, cohort: str = "cohort", **options):
    into = folder.parent / cohort
    given = {"image_folder": into / "images", **options}
    names = find_hest(folder) if samples is None else samples
    return write_sections((read_hest(folder, section=name, **given) for name in names), into)


def refused(folder: Path, *samples: str, **options) -> str:
    with pytest.raises(InputError) as caught:
        load(folder, samples or None, **options)
    assert not list(folder.parent.glob("cohort/*.h5ad"))
    return str(caught.value).replace(str(folder), "")


def test_slide_or_patches_give_the_same_spots_counts_and_pixels(hest):
    load(hest)
    cohort = read_cohort(hest.parent / "cohort")
    assert list(cohort) == ["X1", "X2"]
    for number, (name, adata) in enumerate(cohort.items()):
        pixels, counts, centres = write_sample(hest.parent / "again", name, number)
        info = section_info(adata)
        assert info.provenance["image_from"] == ("slide" if name == "X1" else "patches")
        assert info.provenance["dropped_spots"] == {"without a patch": 4}
        assert info.provenance["dropped_controls"] == 2
        assert list(adata.var_names) == ["A", "B", "C"]
        np.testing.assert_array_equal(adata.X.toarray(), counts[:26][:, [0, 1, 3]])
        np.testing.assert_array_equal(adata.obsm["spatial"], centres[:26])
        assert (info.um_per_pixel, info.spot_diameter_um, info.spot_pitch_um) == (UM, 100.0, 100.0)
        assert adata.obs["patient"].iloc[0] == "P"
        for x, y in centres[:26].astype(int) - SIDE // 2:
            shown = read_region(slide_of(adata), x, y, SIDE, SIDE)
            np.testing.assert_array_equal(shown, pixels[y : y + SIDE, x : x + SIDE])
    again = load(hest)["X2"]
    assert section_info(again).image_sha256 == section_info(cohort["X2"]).image_sha256


def test_shrunk_patches_make_a_smaller_mosaic_in_its_own_pixels(hest):
    path = hest / "patches/X2.h5"
    with h5py.File(path, "r+") as file:
        small = np.stack([np.asarray(Image.fromarray(p).resize((20, 20))) for p in file["img"]])
        del file["img"]
        file["img"] = small
    adata = load(hest, ["X2"])["X2"]
    info, centres = section_info(adata), write_sample(hest.parent / "again", "X2", 1)[2]
    assert info.um_per_pixel == 2 * UM
    np.testing.assert_allclose(adata.obsm["spatial"], centres[:26] / 2)
    with h5py.File(path) as file:
        x, y = file["coords"][7] // 2
        np.testing.assert_array_equal(read_region(slide_of(adata), x, y, 20, 20), file["img"][7])


def test_without_patches_all_spots_of_a_slide_are_kept(hest):
    (hest / "patches/X1.h5").unlink()
    assert load(hest, ["X1"])["X1"].n_obs == 30
    (hest / "patches/X2.h5").unlink()
    with pytest.raises(InputError, match=r"sample X2: neither .*wsis/X2.tif nor .*/X2.h5"):
        load(hest, ["X2"])


def test_the_newest_table_corrects_the_patients(hest):
    (hest / "HEST_v1_9_0.csv").write_text("id,patient,dataset_title\nX1,Patient 1,T\nX2,Old,T\n")
    (hest / "HEST_v1_10_0.csv").write_text("id,patient,dataset_title\nX1,Patient 2,A study\nX2,,\n")
    cohort = load(hest)
    # Labels count within a study: the same one stands in many.
    assert cohort["X1"].obs["patient"].iloc[0] == "Patient 2 (A study)"
    assert cohort["X2"].obs["patient"].iloc[0] == "P"
    cohort = load(hest, patients={"X2": "Q"})
    assert cohort["X2"].obs["patient"].iloc[0] == "Q"
    elsewhere = hest.parent / "HEST_v1_8_0.csv"
    elsewhere.write_text("id,patient,dataset_title\nX1,Patient 3,B\nX2,,B\n")
    cohort = load(hest, patients=elsewhere)
    assert cohort["X1"].obs["patient"].iloc[0] == "Patient 3 (B)"
    assert cohort["X2"].obs["patient"].iloc[0] == "P"


def test_tables_of_patients(hest, tmp_path):
    (tmp_path / "mine.csv").write_text("section,patient\nX1,P1\n")
    section = read_hest(hest, section="X1", patients=tmp_path / "mine.csv")
    assert section.obs["patient"].iloc[0] == "P1"
    (tmp_path / "HEST_v2_0_0.csv").write_text("sample,patient\nX1,P1\n")
    with pytest.raises(InputError, match=r"HEST_v2_0_0.csv: lacks column id; it has sample, pati"):
        read_hest(hest, section="X1", patients=tmp_path / "HEST_v2_0_0.csv")


def test_a_mosaic_needs_a_folder(hest):
    with pytest.raises(InputError, match=r"X2.h5: the image of section X2 .* give `image_folder`"):
        read_hest(hest, section="X2")


def test_visium_keeps_its_own_spot_size(hest):
    facts = {"st_technology": "Visium", "spot_diameter": 55.0, "inter_spot_dist": 100.0}
    write_facts(hest, "X1", pixel_size_um_estimated=UM, patient="P", **facts)
    info = section_info(load(hest, ["X1"])["X1"])
    assert (info.technology, info.spot_diameter_um, info.spot_pitch_um) == ("Visium", 55.0, 100.0)


@pytest.mark.parametrize("technology", ["Visium", "Spatial Transcriptomics"])
@pytest.mark.parametrize(
    ("diameter", "pitch", "taken", "told"),
    [
        (55, 100, (55, 100), None),
        (50, 110, (50, 110), None),
        (100, 55, (55, 100), "spots of 100 µm, 55 µm apart: the two are swapped, since at 2 µm"),
        (110, 70, (70, 110), "spots of 110 µm, 70 µm apart: the two are swapped"),
        (150, 100, (100, 100), "100 µm apart, which would overlap; at 2 µm per pixel they stand"),
        (100, 200, (100, 200), "apart, but at 2 µm per pixel they stand 100 µm apart; is µm per"),
        (25, 50, (25, 50), "50 µm apart, but at 2 µm per pixel they stand 100 µm apart"),
    ],
)
def test_stated_sizes_of_spots_are_questioned(hest, technology, diameter, pitch, taken, told):
    """Spots are 100 µm apart; of some samples the table has the diameter above the pitch."""
    size = {"spot_diameter": diameter, "inter_spot_dist": pitch, "st_technology": technology}
    write_facts(hest, "X1", pixel_size_um_estimated=UM, patient="P", **size)
    info = section_info(load(hest, ["X1"])["X1"])
    assert (info.spot_diameter_um, info.spot_pitch_um) == taken
    notes = info.provenance["notes"]
    assert len(notes) == (told is not None)
    assert told is None or told in notes[0]


def test_the_command_says_which_sizes_are_swapped(hest, tmp_path, command):
    size = {"spot_diameter": 100.0, "inter_spot_dist": 55.0, "st_technology": "Visium"}
    write_facts(hest, "X1", pixel_size_um_estimated=UM, patient="P", **size)
    start = "import", "hest", hest, "--samples", "X1", "-o", tmp_path / "c"
    assert "section X1: the metadata say spots of 100 µm, 55 µm" in command(*start).stderr
    done = json.loads(command(*start, "--json").stdout)
    assert "the two are swapped" in " ".join(done["warnings"])


@pytest.mark.parametrize(
    ("step", "stagger", "technology", "um"),
    [((50, 50), 2, "ST 2k", 2.0), ((43.3, 25), 2, "Visium", 2.0), ((50, 50), 1, "ST", 4.0)],
)
def test_a_scale_that_the_array_contradicts_is_pointed_out(hest, step, stagger, technology, um):
    """Metadata that took one array for another are of another scale."""
    y, x = np.mgrid[0:5, 0:6].reshape(2, -1)
    x = stagger * x + (y % 2 if stagger == 2 else 0)
    spots, centres = [f"s{i}" for i in range(30)], 70 + np.column_stack([x, y]) * step[::-1] / 2
    write_counts(hest / "st/X1.h5ad", np.ones((30, 5)), centres, spots=spots, genes=GENES)
    adata = anndata.read_h5ad(hest / "st/X1.h5ad")
    adata.obs["array_row"], adata.obs["array_col"] = y, x
    adata.write_h5ad(hest / "st/X1.h5ad")
    (hest / "patches/X1.h5").unlink()
    size = {"st_technology": "Spatial Transcriptomics"}
    size |= {"spot_diameter": 100.0, "inter_spot_dist": 200.0}
    write_facts(hest, "X1", pixel_size_um_estimated=um, patient="P", **size)
    notes = section_info(load(hest, ["X1"])["X1"]).provenance["notes"]
    right = {"ST 2k": "4", "Visium": "4", "ST": "8"}[technology]
    assert f"the array of {technology}: " in notes[0]
    assert notes[0].endswith(f"`um_per_pixel={right}` and `um_per_pixel_override=True`")


def test_what_no_metadata_say_is_asked_for(hest):
    write_facts(hest, "X1", pixel_size_um_estimated=UM)
    assert "section X1: the patient is not known" in refused(hest)
    write_facts(hest, "X1", patient="P")
    # The patches say it, too.
    assert section_info(load(hest, ["X1"])["X1"]).um_per_pixel == UM
    (hest.parent / "cohort/X1.h5ad").unlink()
    (hest / "patches/X1.h5").unlink()
    told = refused(hest, "X1")
    assert "sample X1: the metadata do not say the µm per pixel of /wsis/X1.tif" in told
    assert "`um_per_pixel`" in told
    assert section_info(load(hest, ["X1"], um_per_pixel=1.5)["X1"]).um_per_pixel == 1.5


@pytest.mark.parametrize("wrong", [0.5 * UM, 0.94 * UM, 1.06 * UM])
def test_another_scale_than_the_metadata_or_the_patches_must_be_meant(wrong, hest):
    write_facts(hest, "X1", patient="P", pixel_size_um_estimated=UM)
    told = f"X1.tif: the metadata say {UM:.4g} µm per pixel, not `um_per_pixel={wrong:g}`"
    assert told in refused(hest, "X1", um_per_pixel=wrong)
    write_facts(hest, "X1", patient="P")
    told = f"X1.h5: the file says {UM:.4g} µm per pixel, not `um_per_pixel={wrong:g}`"
    assert told in refused(hest, "X1", um_per_pixel=wrong)
    (hest / "patches/X1.h5").unlink()
    meant = {"um_per_pixel": wrong, "um_per_pixel_override": True}
    write_facts(hest, "X1", patient="P", pixel_size_um_estimated=UM)
    assert section_info(load(hest, ["X1"], **meant)["X1"]).um_per_pixel == wrong


def test_nothing_is_overridden_by_nothing(hest):
    with pytest.raises(InputError, match="`um_per_pixel_override` takes `um_per_pixel` in the"):
        read_hest(hest, section="X1", um_per_pixel_override=True)


@pytest.mark.parametrize("odd", ["100 um", "", "none", -5, 0, [3]])
def test_sizes_that_are_no_numbers_are_not_known(odd, hest):
    sizes = {"spot_diameter": odd, "inter_spot_dist": odd, "st_technology": "Visium"}
    write_facts(hest, "X1", patient="P", pixel_size_um_estimated=UM, **sizes)
    usual = section_info(read_hest(hest, section="X1", image_folder=hest / "images"))
    assert usual.spot_pitch_um > 0
    (hest / "patches/X1.h5").unlink()
    write_facts(hest, "X1", patient="P", pixel_size_um_estimated=odd)
    assert "the metadata do not say the µm per pixel" in refused(hest, "X1")


def test_patches_of_older_versions(hest):
    """Without attributes the patches are of 0.5 µm per pixel, `um_per_pixel` says the slide's."""
    pixels, _, centres = write_sample(hest, "X2", 1)
    spots = [f"{int(x - 80) // 50:03d}x{int(y - 80) // 50:03d}" for x, y in centres]
    path, none = hest / "patches/X2.h5", {"pixel_size": None, "patch_size_src": None}
    write_patches(path, pixels, centres, spots, UM, SIDE, **none)
    write_facts(hest, "X2", patient="P")
    assert "/patches/X2.h5: does not say the µm per pixel of the slide" in refused(hest, "X2")
    # At 2 µm a pixel a patch would span 10 pixels of the slide, not 40.
    told = refused(hest, "X2", um_per_pixel=UM)
    assert "the middle of most patches of /patches/X2.h5 is more than an eighth of a patch" in told
    assert load(hest, ["X2"], um_per_pixel=0.5, patient="P")["X2"].n_obs == 30


def test_genes_by_symbol_and_by_id(hest):
    ids = [f"ENSG0000000000{i}" for i in range(5)]
    write_sample(hest, "X1", genes=pd.DataFrame({"gene_ids": ids}, index=list("ABCDA")))
    adata = load(hest, ["X1"])["X1"]
    named = ["A_ENSG00000000000", "B", "C", "D", "A_ENSG00000000004"]
    assert list(adata.var_names) == named
    assert list(adata.var["gene_id"]) == ids
    assert list(load(hest, ["X1"], gene_id=True)["X1"].var_names) == ids
    write_sample(hest, "X1", genes=ids)
    assert list(load(hest, ["X1"])["X1"].var_names) == ids
    with pytest.raises(InputError, match=r"named in two ways: .*X1 by Ensembl ids"):
        load(hest)


def test_data_that_cannot_be_used(hest):
    assert refused(hest, "X9") == ": no section X9; there are X1, X2"
    with pytest.raises(InputError, match=r"no st/\*.h5ad there and no splits/"):
        find_hest(hest / "st")
    write_sample(hest, "X1", spots=[f"other{i}" for i in range(30)])
    with h5py.File(hest / "patches/X1.h5", "r+") as file:
        file["barcode"][:] = np.array([f"p{i}" for i in range(26)], dtype="S")[:, None]
    assert "sample X1: no barcode stands in both /patches/X1.h5 and /st/X1.h5ad" in refused(hest)
    with h5py.File(hest / "patches/X1.h5", "r+") as file:
        file["barcode"][:] = np.array(["twice"] * 26, dtype="S")[:, None]
    assert "/patches/X1.h5: barcode twice stands twice" in refused(hest)
    (hest / "patches/X1.h5").write_bytes(b"no HDF5")
    assert "/patches/X1.h5: not a readable HDF5 file" in refused(hest)
    (hest / "patches/X1.h5").unlink()
    whole = (hest / "wsis/X1.tif").read_bytes()
    (hest / "wsis/X1.tif").write_bytes(whole[: len(whole) // 2])
    # Its directory stands at the end, so nothing of it can be read.
    assert "/wsis/X1.tif: not an image that can be read" in refused(hest)
    (hest / "metadata/X1.json").write_text('{"id": ')
    assert "/metadata/X1.json: not a readable JSON file" in refused(hest)


def test_counts_must_be_raw(hest):
    _, counts, centres = write_sample(hest, "X1")
    spots = [f"{int(x - 80) // 50:03d}x{int(y - 80) // 50:03d}" for x, y in centres]
    counts[3, 1] = -1.5
    write_counts(hest / "st/X1.h5ad", counts, centres, spots=spots, genes=GENES)
    told = refused(hest)
    assert told == "/st/X1.h5ad: spot 003x000, gene B: -1.5 is negative; raw counts are needed"
    assert not (hest.parent / "cohort").exists()


def write_task(task: Path, *names: str) -> None:
    (task / "splits").mkdir(parents=True)
    for k, test in enumerate(names):
        for part, of in {"train": [n for n in names if n != test], "test": [test]}.items():
            rows = [(name, f"patches/{name}.h5", f"adata/{name}.h5ad") for name in of]
            table = pd.DataFrame(rows, columns=["sample_id", "patches_path", "expr_path"])
            table.to_csv(task / f"splits/{part}_{k}.csv", index=False)
    (task / "var_50genes.json").write_text('{"genes": ["C", "A"]}')


def test_a_task_becomes_a_cohort_with_its_folds(tmp_path):
    for number, name in enumerate(["X1", "X2"]):
        write_sample(tmp_path / "IDC", name, number, counts_in="adata")
    write_task(tmp_path / "IDC", "X1", "X2")
    assert find_hest(tmp_path / "IDC") == ["X1", "X2"]
    with pytest.raises(InputError, match=r"section X1: the patient is not known.*`patients=FILE`"):
        load(tmp_path / "IDC")
    cohort = load(tmp_path / "IDC", patients={"X1": "P1", "X2": "P2"})
    protocol = from_hest(tmp_path / "IDC")
    patients = {name: adata.obs["patient"].iloc[0] for name, adata in cohort.items()}
    folds = protocol.make_folds(patients)
    assert [fold.test for fold in folds] == [("X1",), ("X2",)]
    assert list(protocol.choose_panel(cohort, folds[0], None)) == ["C", "A"]


def test_real_sections_come_back_identical(her2st, tmp_path):
    """Rewrite sections in both layouts; what comes back is what the ST reader gives."""
    folder, task, names = tmp_path / "hest", tmp_path / "task", []
    expected = {}
    for name in find_st(her2st)[:2]:  # of two patients
        adata = expected[name] = read_st(her2st, section=name)
        info, centres = section_info(adata), adata.obsm["spatial"]
        names.append(name)
        counts = adata.X, centres
        how = {"spots": adata.obs_names, "genes": adata.var_names}
        diameter = 100.0 / info.um_per_pixel
        for place in (folder / "st", task / "adata"):
            write_counts(place / f"{name}.h5ad", *counts, **how, diameter_px=diameter)
        image = pyvips.Image.new_from_file(str(her2st / f"images/{name}.jpg"))
        write_slide(folder / f"wsis/{name}.tif", image)
        scale = info.um_per_pixel
        where = task / f"patches/{name}.h5"
        write_patches(where, image.numpy(), centres, adata.obs_names, scale, 224)
        size = {"spot_diameter": 100.0, "inter_spot_dist": 200.0}
        known = {"patient": name[0], "st_technology": "Spatial Transcriptomics", **size}
        write_facts(folder, name, pixel_size_um_estimated=scale, **known)
    write_task(task, *names)
    patients = {name: name[0] for name in names}
    from_slides = load(folder, cohort="a")
    from_patches = load(task, cohort="b", patients=patients)
    for name, adata in expected.items():
        info = section_info(adata)
        for got in (from_slides[name], from_patches[name]):
            assert (got.X != adata.X).nnz == 0
            assert list(got.obs_names) == list(adata.obs_names)
            assert list(got.var_names) == list(adata.var_names)
            np.testing.assert_array_equal(got.obsm["spatial"], adata.obsm["spatial"])
            np.testing.assert_array_equal(got.obs["library_size"], adata.obs["library_size"])
            assert got.obs["patient"].iloc[0] == name[0]
            assert section_info(got).um_per_pixel == info.um_per_pixel
        same = section_info(from_slides[name])
        assert (same.spot_diameter_um, same.spot_pitch_um) == (100.0, 200.0)
        assert same.technology == "ST"
        assert section_info(from_patches[name]).spot_pitch_um == pytest.approx(200, rel=0.01)
        for x, y in adata.obsm["spatial"][::50].astype(int) - 100:
            shown = [read_region(slide_of(a), x, y, 200, 200) for a in (adata, from_patches[name])]
            np.testing.assert_array_equal(shown[0], shown[1])


def test_the_commands_say_where_patches_stand_in(hest, tmp_path, command):
    told = command("import", "hest", hest, "--samples", "X9", "-o", tmp_path / "c", code=2).stderr
    assert f"Error: {hest}: no sample X9; there are X1, X2" in told
    done = command("import", "hest", hest, "--samples", "X2,X1", "-o", tmp_path / "c")
    assert "section X2: no slide, so patches stand in" in done.stderr
    assert "section X1: no slide" not in done.stderr
    assert "2 control probes" in done.stderr
    assert sorted(read_cohort(tmp_path / "c")) == ["X1", "X2"]
    for number, name in enumerate(["X1", "X2"]):
        write_sample(tmp_path / "IDC", name, number, counts_in="adata")
    write_task(tmp_path / "IDC", "X1", "X2")
    table = tmp_path / "HEST_v1_1_0.csv"
    table.write_text("id,patient,dataset_title\nX1,Patient 1,A\nX2,Patient 1,B\n")
    command("import", "hest-bench", tmp_path / "IDC", "--patients", table, "-o", tmp_path / "b")
    patients = {a.obs["patient"].iloc[0] for a in read_cohort(tmp_path / "b").values()}
    assert len(patients) == 2
