"""Spots on glass, or with x and y swapped, are found before anything is trained on them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import anndata
import cv2
import numpy as np
import pytest

from strank.errors import InputError
from strank.slides.pixels import ArrayPixels
from strank.slides.placement import check_on_tissue
from strank.slides.slide import Slide, open_slide

CASES = Path(__file__).parents[3] / "shared" / "cases" / "placement"


@pytest.fixture
def slide() -> Slide:
    """A wide strip of tissue: 2.4 x 0.8 mm in the upper part of 3 x 3 mm of glass."""
    rng = np.random.default_rng(0)
    pixels = np.full((1500, 1500, 3), [240, 225, 238], np.uint8)
    cv2.rectangle(pixels, (150, 100), (1350, 500), (150, 90, 160), -1)
    noisy = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
    return Slide(ArrayPixels(noisy), 2.0, Path("strip.tif"))


@pytest.fixture
def centres() -> np.ndarray:
    y, x = np.mgrid[120:480:50, 170:1330:50].reshape(2, -1)
    return np.column_stack([x, y]).astype(float)


def test_spots_on_tissue_pass(slide, centres):
    assert check_on_tissue(slide, centres, name="S1") == []
    # Some beside it, as at every edge.
    assert check_on_tissue(slide, centres + np.array([0, 150]), name="S1") == []


@pytest.mark.parametrize("what", ["black strip", "white strip", "pen", "white background"])
def test_what_is_no_tissue_does_not_switch_the_check_off(slide, centres, what):
    pixels = slide.source.array.copy()
    if what == "pen":
        cv2.circle(pixels, (900, 1000), 300, (20, 20, 20), 60)
    elif what == "white background":
        pixels[(pixels[..., 1] > 180)] = 255
    else:
        pixels[-120:] = 0 if what == "black strip" else 255
    inked = Slide(ArrayPixels(pixels), 2.0, slide.path)
    notes = check_on_tissue(inked, centres, name="S1")
    assert all(note.endswith(": ignored") for note in notes)
    assert bool(notes) == (what != "white background")
    with pytest.raises(InputError, match=r"100% would with x and y swapped; swap them"):
        check_on_tissue(inked, centres[:, ::-1], name="S1")
    with pytest.raises(InputError, match=r"only \d+% of the spots stand on the tissue"):
        check_on_tissue(inked, centres * 0.3 + np.array([900, 900]), name="S1")


def test_spots_around_little_of_the_tissue_are_doubted(slide, centres):
    (note,) = check_on_tissue(slide, centres * 0.3 + np.array([200, 150]), name="S1")
    assert "around 8% of the tissue" in note
    assert "pixels of a smaller image" in note


def test_swapped_coordinates_are_recognised(slide, centres):
    with pytest.raises(InputError, match=r"section S1: 26% of the spots .* and 100% would with x"):
        check_on_tissue(slide, centres[:, ::-1], name="S1")


@pytest.mark.parametrize("factor", [0.1, 2.5, 10.0])
def test_spots_at_another_scale_fall_off(slide, centres, factor):
    with pytest.raises(InputError, match=r"section S1: (only \d+%|\d+% of the spots).* tissue"):
        check_on_tissue(slide, centres * factor + np.array([0, 900 * (factor < 1)]), name="S1")


def test_an_image_cut_out_of_tissue_cannot_tell(centres):
    """Its pale half, of uneven stroma, is no glass."""
    rng = np.random.default_rng(0)
    pale = cv2.GaussianBlur(rng.normal(size=(1500, 1500)), (0, 0), 3)
    shade = 190 + 25 * pale / pale.std()
    shade[:, 900:] -= 90
    pixels = np.repeat(shade.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    crop = Slide(ArrayPixels(pixels), 2.0, Path("crop.tif"))
    *_, note = check_on_tissue(crop, centres * 0.6, name="S1")
    assert "crop.tif has hardly any glass, so whether the spots stand where they belong can" in note


def test_an_image_of_fluorescence_cannot_tell(slide, centres):
    dim = Slide(ArrayPixels((255 - slide.source.array) // 3), 2.0, Path("dapi.tif"))
    (note,) = check_on_tissue(dim, centres, name="S1")
    assert "as fluorescence (DAPI) is" in note
    assert "cannot be judged" in note


@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")
@pytest.mark.parametrize("image", ["he_clean.jpg", "he_black.jpg"])
@pytest.mark.parametrize(
    ("positions", "refused"),
    [("base", None), ("swapped", "swap them"), ("hires", "only 0% of the spots stand")],
)
def test_positions_on_real_tissue(image, positions, refused):
    adata = anndata.read_h5ad(CASES / f"{positions}.h5ad")
    slide = open_slide(CASES / image, 2.743)
    with nullcontext() if refused is None else pytest.raises(InputError, match=refused):
        notes = check_on_tissue(slide, np.asarray(adata.obsm["spatial"]), name="C5")
        told = ["2.1 % of the image is black padding: ignored"]
        assert notes == (told if image == "he_black.jpg" else [])
