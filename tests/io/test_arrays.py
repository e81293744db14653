"""Printed arrays are told by their positions, however few, turned, mirrored and jittered."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import pyvips
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from strank.cohort.arrays import (
    ST_1K,
    ST_2K,
    VISIUM,
    Printed,
    array_of_pitch,
    find_array,
    measure_grid,
)
from strank.cohort.contract import section_info
from strank.cohort.in_memory import as_sections
from strank.errors import InputError
from strank.io import read_anndata, read_spatialdata, read_st, read_visium
from strank.io.extent import check_extent, slide_of_array

KNOWN = (ST_1K, ST_2K, VISIUM)
DBIT = VISIUM._replace(technology="DBiT", pitch_um=50.0, staggered=False, most=(50, 50))
# Rows and columns of whole arrays, and µm a step along each.
WHOLE = {
    "1k": (ST_1K, (33, 35), (200.0, 200.0)),
    "2k": (ST_2K, (66, 63), (100.0, 100.0)),
    "6.5 mm": (VISIUM, (78, 128), (50 * 3**0.5, 50.0)),
    "11 mm": (VISIUM, (128, 224), (50 * 3**0.5, 50.0)),
    "DBiT-seq": (None, (50, 50), (50.0, 50.0)),
    "AtlasXomics": (None, (96, 96), (30.0, 30.0)),
    "220 channels": (None, (220, 220), (20.0, 20.0)),
}


def printed(kind: str, *, first: int = 1, odd: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Positions of all spots of an array, and where they are in µm."""
    array, (rows, columns), steps = WHOLE[kind]
    positions = np.stack(np.mgrid[0:rows, 0:columns], -1).reshape(-1, 2)
    if array is not None and array.staggered:
        positions = positions[positions.sum(1) % 2 == odd]
    return positions + first, positions * np.array(steps)


def in_pixels(um: np.ndarray, *, scale=0.5, turn=0.0, mirrored=False, jitter=0.0, rng=None):
    """Positions in pixels of an image in which the array lies turned, and printed with jitter."""
    sine, cosine = np.sin(np.deg2rad(turn)), np.cos(np.deg2rad(turn))
    turned = um @ np.array([[cosine, sine], [-sine, cosine]]) * [1, -1 if mirrored else 1]
    turned = turned + (rng.normal(0, jitter, um.shape) if rng is not None else 0)
    return turned / scale + 5000


def measured(positions, pixels):
    return measure_grid(positions, pixels, name="S1")


def told(grid) -> Printed | None:
    """As the reader of ST does, for which a square grid may be an array."""
    return find_array(grid, among=KNOWN)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("turn", [0, 1.3, 90, 217])
@pytest.mark.parametrize("mirrored", [False, True])
def test_whole_arrays_are_told_with_their_scale(kind, turn, mirrored):
    positions, um = printed(kind)
    grid = measured(positions, in_pixels(um, turn=turn, mirrored=mirrored))
    array = WHOLE[kind][0]
    assert told(grid) == array
    assert find_array(grid) == (None if array == ST_1K else array)
    if array is not None:
        assert array.step_um / grid.step_px == pytest.approx(0.5, rel=1e-9)
    assert grid.staggered is (array is not None and array.staggered)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("off_parity", [0.0, 0.02, 0.05])
def test_a_share_of_the_spots_tells_the_array(kind, share, off_parity):
    """From 5 % of the spots on, and with up to 5 % of wrong parity, every array is told."""
    array, _, steps = WHOLE[kind]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        positions, um = printed(kind)
        kept = rng.choice(len(um), max(12, round(share * len(um))), replace=False)
        positions, um = positions[kept], um[kept]
        if array is not None and array.staggered:
            off = rng.random(len(um)) < off_parity
            off &= np.cumsum(off) <= off_parity * len(um)
            positions, um = positions + np.outer(off, [0, 1]), um + np.outer(off, [0, steps[1]])
        grid = measured(positions, in_pixels(um, turn=3, jitter=0.05 * steps[1], rng=rng))
        assert told(grid) == array
        if array is not None:
            assert array.step_um / grid.step_px == pytest.approx(0.5, rel=0.02)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(list(WHOLE)),
    rows=st.integers(4, 30),
    columns=st.integers(4, 30),
    start=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    turn=st.floats(0, 360),
    mirrored=st.booleans(),
    scale=st.floats(0.1, 5),
    odd=st.booleans(),
)
def test_a_piece_of_tissue_tells_the_array(kind, rows, columns, start, turn, mirrored, scale, odd):
    """Any block of 4 x 4 positions or more with a dozen spots, from any corner, of any parity."""
    array = WHOLE[kind][0]
    positions, um = printed(kind, first=0, odd=odd)
    low = np.minimum(start, np.array(WHOLE[kind][1]) - (rows, columns)).clip(0)
    inside = ((positions >= low) & (positions < np.add(low, (rows, columns)))).all(1)
    if inside.sum() < 12:
        return
    pixels = in_pixels(um[inside], scale=scale, turn=turn, mirrored=mirrored)
    grid = measured(positions[inside], pixels)
    if array is None:  # as small as an array of ST, a square grid could be one
        assert told(grid) in (None, ST_1K)
        assert find_array(grid) is None
    else:
        assert told(grid) == array
        assert array.step_um / grid.step_px == pytest.approx(scale, rel=1e-6)


@pytest.mark.parametrize("kind", ["1k", "2k", "6.5 mm"])
@pytest.mark.parametrize("jitter", [0.02, 0.05, 0.1])
def test_jitter_does_not_bias_the_scale(kind, jitter):
    """The nearest neighbour is the one that jitter brought closer; the fit is not fooled."""
    array, _, steps = WHOLE[kind]
    positions, um = printed(kind)
    rng = np.random.default_rng(0)
    grid = measured(positions, in_pixels(um, jitter=jitter * min(steps), rng=rng))
    assert told(grid) == array
    assert array.step_um / grid.step_px == pytest.approx(0.5, rel=0.003)


def test_positions_that_were_adjusted_to_the_image_are_no_whole_numbers():
    for kind in ("1k", "2k", "6.5 mm"):
        positions, um = printed(kind)
        moved = np.random.default_rng(1).normal(0, 0.08, um.shape)
        adjusted = positions + moved
        grid = measured(adjusted, in_pixels(um + moved * np.array(WHOLE[kind][2])))
        assert told(grid) == WHOLE[kind][0]
        assert WHOLE[kind][0].step_um / grid.step_px == pytest.approx(0.5, rel=1e-6)


def mixed(share: float):
    """A chessboard of which a share of the spots has the other colour."""
    positions, um = printed("2k")
    off = np.arange(len(um)) % round(1 / share) == 0
    return positions + np.outer(off, [0, 1]), um + np.outer(off, [0, 100.0])


def compressed():
    """Rows of Visium counted without gaps: every other row is shifted by half a step."""
    positions, um = printed("6.5 mm")
    kept = (positions < 30).all(1)
    return np.column_stack([positions[kept, 0], positions[kept, 1] // 2]), um[kept]


def few(kind: str, n: int):
    positions, um = printed(kind)
    block = (positions < 6).all(1)
    return positions[block][:n], um[block][:n]


UNTOLD = {
    "eleven spots, 1k": few("1k", 11),
    "eleven spots, 2k": few("2k", 11),
    "four spots": few("1k", 8)[0][[0, 1, 6, 7]] * 1.0,
    "a fifth of the other colour": mixed(0.2),
    "an eighth of the other colour": mixed(0.125),
    "rows counted without gaps": compressed(),
    "larger than any, square": (printed("1k")[0] * 2, printed("1k")[1] * 2),
    "larger than any, hexagonal": (printed("11 mm")[0] * 3, printed("11 mm")[1] * 3),
    "steps that no array has": (printed("2k")[0], printed("2k")[1] * [1.0, 4.0]),
}


@pytest.mark.parametrize("kind", UNTOLD)
def test_what_cannot_be_told_is_asked_for(kind):
    case = UNTOLD[kind]
    positions, um = case if isinstance(case, tuple) else (case, case * 200.0)
    assert told(measured(positions, in_pixels(um))) is None


def test_array_positions_of_another_section_are_refused():
    positions, um = printed("6.5 mm")
    wrong = np.random.default_rng(0).permutation(len(um))
    with pytest.raises(InputError, match=r"S1: the (spots do not span|array positions do not fit)"):
        measured(positions, in_pixels(um[wrong]))
    with pytest.raises(InputError, match=r"S1: the spots do not span a grid"):
        measured(positions[positions[:, 0] == 4], in_pixels(um[positions[:, 0] == 4]))


@pytest.mark.parametrize(
    ("kind", "pitch", "technology", "diameter"),
    [
        ("1k", 200, "ST", 100),
        ("1k", 205, "ST", 100),
        ("2k", 141.4, "ST 2k", 100),
        ("6.5 mm", 100, "Visium", 55),
        ("DBiT-seq", 50, "square grid", 50),
        ("AtlasXomics", 30, "square grid", 30),
        ("220 channels", 20, "square grid", 20),
        ("2k", 50, "staggered grid", 50),
        ("6.5 mm", 50, "staggered grid", 50),
    ],
)
@pytest.mark.parametrize("n_spots", [8, 40, None])
def test_a_pitch_that_is_given_measures_any_array(kind, pitch, technology, diameter, n_spots):
    positions, um = printed(kind)
    if n_spots:
        order = np.argsort(um.sum(1))[:n_spots]
        positions, um = positions[order], um[order]
    distances = np.hypot(*(um[1:] - um[0]).T)
    grid = measured(positions, in_pixels(um * (pitch / distances.min())))
    array = array_of_pitch(grid, pitch)
    assert array.step_um / grid.step_px == pytest.approx(0.5, rel=1e-9)
    assert (array.technology, array.diameter_um, array.pitch_um) == (technology, diameter, pitch)


@pytest.mark.parametrize("pitch", [0.0, -1.0, np.nan, np.inf])
def test_a_pitch_must_be_positive(pitch):
    positions, um = printed("1k")
    grid = measured(positions, in_pixels(um))
    with pytest.raises(InputError, match=r"`pitch_um=.*`: the distance .* must be positive"):
        array_of_pitch(grid, pitch)


@pytest.mark.parametrize("kind", ["1k", "2k", "6.5 mm", "11 mm"])
@pytest.mark.parametrize("turn", [0, 30, 45])
def test_whole_arrays_fit_on_their_slides_and_twice_as_large_ones_do_not(kind, turn):
    um = in_pixels(printed(kind)[1], scale=1.0, turn=turn)
    array = WHOLE[kind][0]
    assert check_extent(um, array.pitch_um, array.technology, name="S1") == []
    with pytest.raises(InputError) as caught:
        check_extent(2 * um, array.pitch_um, array.technology, name="S1")
    if kind != "6.5 mm":  # which is 13 mm then
        largest = "11 x 11" if kind == "11 mm" else "6.2 x 6.6"
        assert f"of {array.technology} has {largest} mm at most" in str(caught.value)
    assert "check `um_per_pixel`" in str(caught.value)


@pytest.mark.parametrize(
    ("technology", "sides", "fits"),
    [
        ("Xenium", (10.4, 22.4), True),
        ("Xenium", (22.4, 10.4), True),
        ("Xenium", (22.4, 22.4), False),
        ("Xenium", (5.0, 30.0), False),
        ("ST", (2.0, 8.0), False),
        ("Visium HD", (6.7, 6.7), True),
        ("Visium HD", (11, 11), True),
        ("Visium HD", (26, 26), False),
        ("unknown", (22, 60), True),
        ("unknown", (22, 100), None),
        ("square grid", (300, 300), None),
    ],
)
def test_extents_of_other_technologies(technology, sides, fits):
    um = np.random.default_rng(0).random((5000, 2)) * np.array(sides) * 1e3
    if fits is False:
        with pytest.raises(InputError, match=f"the capture area of {technology} has"):
            check_extent(um, 10.0, technology, name="S1")
    else:
        assert bool(check_extent(um, 10.0, technology, name="S1")) is (fits is None)


def test_spots_closer_than_a_micrometre_are_doubted():
    um = np.random.default_rng(0).random((50, 2)) * 20
    assert "is µm per pixel right?" in check_extent(um, 0.4, "unknown", name="S1")[0]
    assert check_extent(um, 4.0, "unknown", name="S1") == []


# ---- through the readers and the command line ----


def disc(kind: str, mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Spots of a round piece of tissue."""
    positions, um = printed(kind)
    near = np.hypot(*(um - um.mean(0)).T) < 500 * mm
    return positions[near], um[near] - um[near].min(0)


def write_he(path: Path, pixels: np.ndarray) -> Path:
    """An image with tissue under the spots."""
    width, height = (pixels.max(0) + 150).astype(int)
    image = np.full((height, width, 3), 243, np.uint8)
    drawn = np.random.default_rng(0).integers(90, 200, size=image.shape, dtype=np.uint8)
    low, high = (pixels.min(0) - 25).astype(int), (pixels.max(0) + 25).astype(int)
    image[low[1] : high[1], low[0] : high[0]] = drawn[low[1] : high[1], low[0] : high[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def write_st(folder: Path, kind: str, name: str = "A1", mm: float = 3.0, scale: float = 6.0):
    positions, um = disc(kind, mm)
    pixels = um / scale + 100
    write_he(folder / f"images/{name}.png", pixels)
    x, y = positions.T
    names = [f"{a}x{b}" for a, b in positions]
    counts = np.random.default_rng(0).poisson(3, size=(len(x), 3))
    for part in ("counts", "spots"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(counts, index=names, columns=list("ABC"))
    table.to_csv(folder / f"counts/{name}.tsv.gz", sep="\t")
    spots = pd.DataFrame({"x": x, "y": y, "pixel_x": pixels[:, 0], "pixel_y": pixels[:, 1]})
    spots.assign(selected=1).to_csv(folder / f"spots/{name}_selection.tsv", sep="\t", index=False)
    return folder


@pytest.mark.parametrize(
    ("kind", "technology", "pitch", "told"),
    [
        ("1k", "ST", 200, "ST: every position used, spots 200 µm apart"),
        ("2k", "ST 2k", 100 * 2**0.5, "ST 2k: every other position used, spots 141.4 µm apart"),
        ("6.5 mm", "Visium", 100, "Visium: every other position used, spots 100 µm apart"),
    ],
)
def test_import_st_tells_arrays(tmp_path, command, kind, technology, pitch, told):
    write_st(tmp_path / "st", kind)
    info = section_info(read_st(tmp_path / "st"))
    assert info.um_per_pixel == pytest.approx(6.0, rel=1e-9)
    assert (info.technology, info.provenance["array"]) == (technology, told)
    assert info.spot_pitch_um == pytest.approx(pitch)
    assert info.spot_diameter_um == (55 if technology == "Visium" else 100)
    done = command("import", "st", tmp_path / "st", "-o", tmp_path / "c")
    assert f"6.0 µm per pixel by the array of {told}" in " ".join(done.stdout.split())
    done = command("import", "st", tmp_path / "st", "-o", tmp_path / "c", "--json")
    (section,) = json.loads(done.stdout)["sections"]
    assert (section["array"], section["technology"]) == (told, technology)
    assert section["spot_pitch_um"] == pytest.approx(pitch)


def test_import_st_asks_for_the_pitch_of_another_array(tmp_path, command):
    write_st(tmp_path / "st", "AtlasXomics", mm=2.0, scale=1.0)
    start = "import", "st", tmp_path / "st", "-o", tmp_path / "c"
    wrong = command(*start, code=2).stderr
    assert "A1_selection.tsv: " in wrong
    assert "neither a 1k array of ST" in wrong
    assert "in µm with --pitch" in wrong
    assert not (tmp_path / "c").exists()
    done = command(*start, "--pitch", 30).stdout
    assert "A1: square grid, patient A," in done
    info = section_info(read_st(tmp_path / "st", pitch_um=30))
    assert info.um_per_pixel == pytest.approx(1.0, rel=1e-9)


def test_spots_named_by_adjusted_positions_are_found_by_the_nearest_whole_ones(tmp_path):
    write_st(tmp_path / "st", "1k")
    path = tmp_path / "st/spots/A1_selection.tsv"
    before = read_st(tmp_path / "st")
    spots = pd.read_csv(path, sep="\t").astype({"x": float, "y": float})
    spots[["x", "y"]] += np.where(np.arange(2 * len(spots)) % 2, 0.04, -0.06).reshape(-1, 2)
    spots.to_csv(path, sep="\t", index=False)
    after = read_st(tmp_path / "st")
    assert list(after.obs_names) == list(before.obs_names)
    assert section_info(after).um_per_pixel == pytest.approx(6.0, rel=1e-9)


def write_dbit(outs: Path, write_space_ranger, kind: str, **how) -> np.ndarray:
    positions, um = disc(kind, 2.0)
    pixels = in_pixels(um, **how)
    pixels -= pixels.min(0) - 100
    barcodes = [f"ACGT{i:05}-1" for i in range(len(um))]
    table = pd.DataFrame({"barcode": barcodes, "in_tissue": 1})
    table[["array_row", "array_col"]] = positions
    table["pxl_row_in_fullres"], table["pxl_col_in_fullres"] = pixels.T[::-1]
    features = pd.DataFrame({"id": [f"ENSG{i:011}" for i in range(3)], "symbol": list("ABC")})
    counts = np.random.default_rng(0).poisson(3, size=(len(um), 3))
    write_space_ranger(outs, counts, features, table)
    with h5py.File(outs / "filtered_feature_bc_matrix.h5", "r+") as file:
        file.attrs["library_ids"] = np.array(["S1"], dtype="S")
    return pixels


@pytest.mark.parametrize(
    ("kind", "pitch", "how"),
    [
        ("DBiT-seq", 50, {"scale": 2.0}),
        ("AtlasXomics", 30, {"scale": 1.0, "turn": 4}),
        ("220 channels", 20, {"scale": 1.0, "turn": 92, "mirrored": True}),
        ("1k", 200, {"scale": 4.0}),
    ],
)
def test_square_grids_in_space_rangers_layout_are_asked_for_their_pitch(
    tmp_path, write_space_ranger, command, kind, pitch, how
):
    pixels = write_dbit(tmp_path / "S1/outs", write_space_ranger, kind, **how)
    image = write_he(tmp_path / "he.png", pixels)
    given = {"image": image, "patient": "P1"}
    with pytest.raises(
        InputError, match=r"tissue_positions.csv: a square grid \(.* `pitch_um` \(D"
    ):
        read_visium(tmp_path / "S1/outs", **given)
    section = read_visium(tmp_path / "S1/outs", **given, pitch_um=pitch)
    info = section_info(section)
    assert info.um_per_pixel == pytest.approx(how["scale"], rel=1e-9)
    assert info.technology == ("ST" if kind == "1k" else "square grid")
    assert info.spot_pitch_um == pitch
    start = "import", "visium", tmp_path / "S1", "--image", image, "--patient", "P1"
    assert "with --pitch (DBiT" in command(*start, "-o", tmp_path / "c", code=2).stderr
    done = command(*start, "-o", tmp_path / "c", "--pitch", pitch).stdout
    assert f"S1: {info.technology}, patient P1" in done


@pytest.mark.parametrize(
    ("kind", "pitch", "kept", "wide"),
    [
        ("DBiT-seq", 50, {"spot_diameter_fullres": 12.5}, 25),
        ("AtlasXomics", 30, {"spot_diameter_fullres": 7.5}, 15),
        ("220 channels", 20, {"spot_diameter_fullres": 5}, 10),
        ("DBiT-seq", 50, {"spot_diameter_fullres": 89.0}, None),
        ("DBiT-seq", 50, {"spot_diameter_fullres": "25"}, None),
        ("DBiT-seq", 50, {}, None),
        ("DBiT-seq", 50, [1, 2], None),
        ("6.5 mm", 55, {}, None),
    ],
)
def test_spots_of_an_unknown_array_are_as_wide_as_scale_factors_say(
    tmp_path, write_space_ranger, kind, pitch, kept, wide
):
    pixels = write_dbit(tmp_path / "S1/outs", write_space_ranger, kind, scale=2.0)
    (tmp_path / "S1/outs/spatial/scalefactors_json.json").write_text(json.dumps(kept))
    given = {"image": write_he(tmp_path / "he.png", pixels), "patient": "P1"}
    info = section_info(read_visium(tmp_path / "S1/outs", **given, pitch_um=pitch))
    assert info.spot_diameter_um == pytest.approx(wide or pitch)
    assumed = [text for text in info.provenance["notes"] if "taken to be as wide as" in text]
    assert len(assumed) == (wide is None)


@pytest.mark.parametrize(
    ("kind", "pitch", "times"), [("6.5 mm", 50, "2"), ("11 mm", 130, "0.769"), ("2k", 100, "1.41")]
)
def test_a_pitch_against_a_known_array_is_pointed_out(
    tmp_path, write_space_ranger, command, kind, pitch, times
):
    pixels = write_dbit(tmp_path / "S1/outs", write_space_ranger, kind, scale=4.0)
    image = write_he(tmp_path / "he.png", pixels)
    start = "import", "visium", tmp_path / "S1", "--image", image, "--patient", "P1"
    told = command(*start, "-o", tmp_path / "c", "--pitch", pitch).stderr
    array = WHOLE[kind][0]
    assert f"--pitch {pitch} is taken, but positions are as those of {array.told}" in told
    assert f"µm per pixel {times} times as large" in told
    right = command(*start, "-o", tmp_path / "d", "--pitch", array.pitch_um).stderr
    assert "--pitch" not in right
    st_folder = write_st(tmp_path / "st", "1k")
    notes = section_info(read_st(st_folder, pitch_um=150)).provenance["notes"]
    assert "positions are as those of ST: every position used" in notes[0]


def bins(um: int, n: int = 60, keep: float = 1.0, suffix: str = "-1") -> AnnData:
    """Bins of Visium HD, of 1 µm a pixel, in the middle of a slide."""
    rng = np.random.default_rng(0)
    positions = np.stack(np.mgrid[0:n, 0:n], -1).reshape(-1, 2)
    positions = positions[rng.random(n * n) < keep]
    names = [f"s_{um:03}um_{r + 300:05}_{c + 400:05}{suffix}" for r, c in positions]
    obs = pd.DataFrame(positions + np.array([300, 400]), names, columns=["array_row", "array_col"])
    counts = rng.poisson(3, size=(len(obs), 3)).astype(np.float32)
    return AnnData(counts, obs, obsm={"spatial": positions[:, ::-1] * um + 100.0})


@pytest.mark.parametrize(
    ("um", "keep", "with_array", "suffix"),
    [
        *((um, keep, keep < 1, "-1") for um in (2, 8, 16, 48) for keep in (0.1, 1.0)),
        *((8, 0.1, with_array, suffix) for with_array in (False, True) for suffix in ("-1-S1", "")),
    ],
)
def test_bins_of_visium_hd_are_told_by_their_names(tmp_path, um, keep, with_array, suffix):
    adata = bins(um, keep=keep, suffix=suffix)
    if not with_array:
        adata.obs = adata.obs[[]]
    adata.write_h5ad(tmp_path / "S1.h5ad")
    image = write_he(tmp_path / "he.png", adata.obsm["spatial"])
    facts = facts_of(read_anndata(tmp_path / "S1.h5ad", image=image, patient="P1"))
    told = f"Visium HD: every position used, spots {um} µm apart"
    assert (facts["technology"], facts["array"]) == ("Visium HD", told)
    found = [facts[k] for k in ("um_per_pixel", "spot_diameter_um", "spot_pitch_um")]
    assert found == pytest.approx([1.0, um, um])


def test_bins_of_visium_hd_without_names_or_elsewhere(tmp_path, write_space_ranger):
    many, given = bins(8, n=240), {"patient": "P1", "image": tmp_path / "he.png"}
    many.obs_names = [f"b{i}" for i in range(many.n_obs)]
    write_he(tmp_path / "he.png", many.obsm["spatial"])
    many.write_h5ad(tmp_path / "S1.h5ad")
    facts = facts_of(read_anndata(tmp_path / "S1.h5ad", **given, um_per_pixel=1.0))
    assert (facts["technology"], facts["spot_pitch_um"]) == ("Visium HD", pytest.approx(8))
    both = AnnData(
        np.ones((2 * 3600, 2), np.float32),
        pd.concat([bins(8).obs, bins(16).obs])[[]],
        obsm={"spatial": np.concatenate([bins(8).obsm["spatial"], bins(16).obsm["spatial"]])},
    )
    both.write_h5ad(tmp_path / "S1.h5ad")
    with pytest.raises(InputError, match="Visium HD of 8, 16 µm; keep those of one"):
        read_anndata(tmp_path / "S1.h5ad", **given)


def put_together(label: str | None, shift: float) -> AnnData:
    """Two sections in one object."""
    one, other = as_anndata("6.5 mm", scale=4.0), as_anndata("6.5 mm", 0.9, scale=4.0)
    other.obsm["spatial"] = other.obsm["spatial"] + [shift, 0.0]
    return anndata.concat({"L1": one, "L2": other}, label=label, index_unique="-")


@pytest.mark.parametrize("shift", [3.0, 900.0])
@pytest.mark.parametrize(
    ("label", "told"),
    [
        (None, "several spots have one place on the array"),
        ("sample", "several spots have one place on the array"),
        ("library_id", r'obs\["library_id"\] names several \(L1, L2\)'),
        ("section", None),
    ],
)
def test_sections_that_were_put_together_are_told_apart(tmp_path, label, told, shift):
    adata = put_together(label, shift)
    adata.write_h5ad(tmp_path / "S1.h5ad")
    image = write_he(tmp_path / "he.png", adata.obsm["spatial"])
    given = {"image": image, "patient": "P1"}
    if told is None:
        facts = facts_of(read_anndata(tmp_path / "S1.h5ad", section="L2", **given))
        assert (facts["technology"], round(facts["um_per_pixel"], 4)) == ("Visium", 4.0)
    else:
        with pytest.raises(InputError, match=told):
            read_anndata(tmp_path / "S1.h5ad", **given)


def test_a_column_that_was_filled_is_no_array(tmp_path):
    adata = as_anndata("6.5 mm", scale=2.0)
    adata.obs["array_row"] = 0
    adata.write_h5ad(tmp_path / "S1.h5ad")
    image = write_he(tmp_path / "he.png", adata.obsm["spatial"])
    section = read_anndata(tmp_path / "S1.h5ad", image=image, patient="P1", um_per_pixel=2.0)
    assert facts_of(section)["technology"] == "unknown"


@pytest.mark.parametrize("form", [int, bool, str, "category"])
def test_spots_off_the_tissue_measure_the_array_and_are_left_out(tmp_path, form):
    adata = as_anndata("6.5 mm", scale=2.0)
    image = write_he(tmp_path / "he.png", adata.obsm["spatial"])
    under = np.arange(adata.n_obs) % 3 > 0
    for kept in (under, np.zeros(adata.n_obs, bool)):  # filled with a number it tells nothing
        adata.obs["in_tissue"] = kept.astype(int) if form is str else kept
        adata.obs["in_tissue"] = adata.obs["in_tissue"].astype(form)
        adata.write_h5ad(tmp_path / "S1.h5ad")
        section = read_anndata(tmp_path / "S1.h5ad", image=image, patient="P1")
        names = adata.obs_names[kept] if kept.any() else adata.obs_names
        assert list(section.obs_names) == list(names)
        dropped = section_info(section).provenance["dropped_spots"]
        assert dropped == {"not in tissue": adata.n_obs - len(names)}
        assert facts_of(section)["technology"] == "Visium"


@pytest.mark.parametrize(
    "kept",
    [
        np.array([1, 2]),
        {"L": {"scalefactors": {"spot_diameter_fullres": "wide"}}},
        {"L": {"scalefactors": np.array([1.0])}},
        {"L": {"scalefactors": {"spot_diameter_fullres": -3.0}}},
    ],
)
def test_scale_factors_that_are_none_are_not_known(tmp_path, kept):
    adata = as_anndata("6.5 mm", scale=2.0)
    adata.obs, adata.uns["spatial"] = adata.obs[[]], kept
    adata.write_h5ad(tmp_path / "S1.h5ad")
    image = write_he(tmp_path / "he.png", adata.obsm["spatial"])
    section = read_anndata(tmp_path / "S1.h5ad", image=image, patient="P1", um_per_pixel=2.0)
    assert facts_of(section)["spot_diameter_um"] == pytest.approx(100)


def test_the_smaller_slide_of_visium_is_told_by_its_positions():
    for kind, fits in {"6.5 mm": (True, False), "11 mm": (True, True)}.items():
        positions, um = printed(kind)
        spots = pd.DataFrame(positions, columns=["array_row", "array_col"])
        on = slide_of_array(spots, "Visium")
        for times, room in zip((1.0, 1.7 if kind == "6.5 mm" else 1.0), fits, strict=True):
            refused = pytest.raises(InputError, match="area of Visium of 78 x 128 positions")
            with nullcontext() if room else refused:
                check_extent(um * times, 100.0 * times, on, name="S1")
    assert slide_of_array(spots, "Xenium") == "Xenium"
    assert slide_of_array(spots[["array_row"]], "Visium") == "Visium"


def test_an_array_of_st_in_space_rangers_layout_is_told(tmp_path, write_space_ranger):
    pixels = write_dbit(tmp_path / "S1/outs", write_space_ranger, "2k", scale=4.0)
    image = write_he(tmp_path / "he.png", pixels)
    info = section_info(read_visium(tmp_path / "S1/outs", image=image, patient="P1"))
    assert (info.technology, info.spot_diameter_um) == ("ST 2k", 100)
    assert info.um_per_pixel == pytest.approx(4.0, rel=1e-9)


def test_a_scale_that_no_slide_has_room_for_is_refused_even_where_it_is_meant(
    tmp_path, write_space_ranger, command
):
    pixels = write_dbit(tmp_path / "S1/outs", write_space_ranger, "6.5 mm", scale=4.0)
    image = write_he(tmp_path / "he.png", pixels)
    start = "import", "visium", tmp_path / "S1", "--image", image, "--patient", "P1"
    given = "--mpp", 40, "--mpp-override", "-o", tmp_path / "c"
    told = command(*start, *given, code=2).stderr
    assert "section S1: the spots span 19." in told
    assert "the capture area of Visium of 78 x 128 positions has 6.5 x 6.7 mm at most" in told
    assert "check --mpp" in told
    assert not (tmp_path / "c").exists()


# ---- AnnData and SpatialData that other tools made ----


def facts_of(section: AnnData) -> dict:
    info = section_info(section)
    names = "um_per_pixel", "technology", "spot_diameter_um", "spot_pitch_um"
    return {name: getattr(info, name) for name in names} | {"array": info.provenance.get("array")}


def by_scanpy(outs: Path) -> AnnData:
    scanpy = pytest.importorskip("scanpy")
    adata = scanpy.read_visium(outs)
    adata.var_names_make_unique()
    return adata


def by_squidpy(outs: Path) -> AnnData:
    adata = pytest.importorskip("squidpy").read.visium(outs)
    adata.var_names_make_unique()
    return adata


def check_alike(section: AnnData, other: AnnData) -> None:
    """The same section, by five digits of its scale: others drop spots outside the tissue."""
    one, two = facts_of(section), facts_of(other)
    assert two.pop("um_per_pixel") == pytest.approx(one.pop("um_per_pixel"), rel=1e-5)
    assert one == two
    rows = section.obs_names
    np.testing.assert_allclose(other[rows].obsm["spatial"], section.obsm["spatial"], rtol=1e-12)
    assert (other[rows].X != section.X).nnz == 0


@pytest.mark.parametrize("read_it", [by_scanpy, by_squidpy])
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("6.5 mm", {"scale": 2.0, "turn": 1.1}),
        ("11 mm", {"scale": 2.5, "turn": 90.4, "mirrored": True}),
        ("2k", {"scale": 3.0, "turn": 181}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_scanpy_and_squidpy_read_is_measured_as_its_own_reader_does(
    tmp_path, write_space_ranger, command, read_it, kind, how
):
    pixels = write_dbit(tmp_path / "S1/outs", write_space_ranger, kind, **how)
    image = write_he(tmp_path / "he.png", pixels)
    adata = read_it(tmp_path / "S1/outs")
    adata.write_h5ad(tmp_path / "S1.h5ad")
    given = {"image": image, "patient": "P1"}
    section = read_visium(tmp_path / "S1/outs", **given)
    check_alike(section, read_anndata(tmp_path / "S1.h5ad", **given))
    adata.obs["patient"] = "P1"
    check_alike(section, as_sections({"S1": adata})["S1"])
    start = "import", "anndata", tmp_path / "S1.h5ad", "--image", image, "--patient", "P1"
    told = command(*start, "-o", tmp_path / "c").stdout
    assert f"µm per pixel by the array of {WHOLE[kind][0].told}" in told
    far = command(*start, "-o", tmp_path / "c", "--mpp", 0.7 * how["scale"], code=2).stderr
    assert "but the positions make it" in far
    near = read_anndata(tmp_path / "S1.h5ad", **given, um_per_pixel=1.02 * how["scale"])
    assert section_info(near).um_per_pixel == 1.02 * how["scale"]


@pytest.mark.filterwarnings("ignore")
def test_the_real_run_is_measured_alike(tmp_path):
    """Of the smallest picture of Space Ranger, enlarged, since the image is not published."""
    outs = Path(__file__).resolve().parents[3] / "shared/data/platforms/visium-1.0.0"
    if not outs.is_dir():
        pytest.skip(f"{outs} is not there")
    scale = json.loads((outs / "spatial/scalefactors_json.json").read_text())
    small = pyvips.Image.new_from_file(str(outs / "spatial/tissue_lowres_image.png"))[:3]
    image = tmp_path / "he.tif"
    enlarged = small.resize(1 / scale["tissue_lowres_scalef"], kernel="nearest")
    enlarged.tiffsave(str(image), tile=True, compression="jpeg")
    given = {"image": image, "patient": "P1"}
    section = read_visium(outs, section="S1", **given)
    assert facts_of(section)["um_per_pixel"] == pytest.approx(0.725184, abs=1e-6)
    for read_it in (by_scanpy, by_squidpy):
        adata = read_it(outs)
        adata.write_h5ad(tmp_path / "S1.h5ad")
        check_alike(section, read_anndata(tmp_path / "S1.h5ad", **given))
        adata.obs["patient"] = "P1"
        check_alike(section, as_sections({"S1": adata})["S1"])
    # What the scale is taken from where rows and columns are not known.
    assert 65 / scale["spot_diameter_fullres"] == pytest.approx(0.725184, rel=0.003)


def as_anndata(kind: str, keep: float = 1.0, **how) -> AnnData:
    """As scanpy keeps it, without scale factors."""
    rng = np.random.default_rng(0)
    positions, um = disc(kind, 2.0)
    pixels = in_pixels(um, **how)
    kept = rng.random(len(um)) < keep
    obs = pd.DataFrame(positions[kept], columns=["array_row", "array_col"]).set_index(
        pd.Index([f"s{i}" for i in range(kept.sum())])
    )
    counts = rng.poisson(3, size=(kept.sum(), 3)).astype(np.float32)
    return AnnData(counts, obs, obsm={"spatial": (pixels - pixels.min(0) + 100)[kept]})


@pytest.mark.parametrize(
    ("kind", "mpp", "technology", "diameter", "pitch"),
    [
        ("6.5 mm", None, "Visium", 55, 100),
        ("2k", None, "ST 2k", 100, 141.42),
        ("1k", 2.0, "ST", 100, 200),
        ("DBiT-seq", 2.0, "square grid", 50, 50),
        ("AtlasXomics", 2.0, "square grid", 30, 30),
    ],
)
@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_arrays_in_any_anndata(tmp_path, kind, mpp, technology, diameter, pitch, keep):
    adata = as_anndata(kind, keep, scale=2.0, turn=7)
    adata.write_h5ad(tmp_path / "S1.h5ad")
    image = write_he(tmp_path / "he.png", adata.obsm["spatial"])
    given = {"image": image, "patient": "P1"}
    if mpp is not None:
        with pytest.raises(InputError, match="does not say its µm per pixel"):
            read_anndata(tmp_path / "S1.h5ad", **given)
    facts = facts_of(read_anndata(tmp_path / "S1.h5ad", **given, um_per_pixel=mpp))
    assert facts["technology"] == technology
    found = [facts[k] for k in ("um_per_pixel", "spot_diameter_um", "spot_pitch_um")]
    assert found == pytest.approx([2.0, diameter, pitch], rel=1e-4)


def test_positions_that_tell_no_array_leave_an_anndata_as_it_was(tmp_path):
    adata = as_anndata("6.5 mm", scale=2.0)
    image = write_he(tmp_path / "he.png", adata.obsm["spatial"])
    shuffled = adata.copy()
    shuffled.obs = shuffled.obs.sample(frac=1, random_state=0).set_index(adata.obs_names)
    unknown = adata.copy()
    unknown.obs["array_row"] = np.nan
    for one in (shuffled, unknown, adata[:10].copy()):
        one.write_h5ad(tmp_path / "S1.h5ad")
        section = read_anndata(tmp_path / "S1.h5ad", image=image, patient="P1", um_per_pixel=2.0)
        facts = facts_of(section)
        assert (facts["technology"], facts["array"]) == ("unknown", None)
        assert facts["spot_pitch_um"] == pytest.approx(100, rel=0.8)


@pytest.mark.filterwarnings("ignore")
def test_a_spatialdata_of_visium_is_measured_too(tmp_path, write_space_ranger):
    visium = pytest.importorskip("spatialdata_io").visium
    pixels = write_dbit(tmp_path / "S1/outs", write_space_ranger, "6.5 mm", scale=4.0)
    image = write_he(tmp_path / "he.png", pixels)
    data = visium(tmp_path / "S1/outs", dataset_id="S1", fullres_image_file=image)
    data.write(tmp_path / "S1.zarr")
    section = read_visium(tmp_path / "S1/outs", image=image, patient="P1")
    data["table"].obs["patient"] = "P1"
    for held in (data, data["table"]):
        check_alike(section, as_sections({"S1": held})["S1"])
    given = {"image": "S1_full_image", "image_folder": tmp_path / "images", "patient": "P1"}
    check_alike(section, read_spatialdata(tmp_path / "S1.zarr", **given))
