"""Spots on glass, or with x and y swapped, are found before anything is trained on them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from strank.errors import InputError
from strank.slides.pixels import ArrayPixels
from strank.slides.slide import Slide
from strank.slides.tissue import check_on_tissue


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
    check_on_tissue(slide, centres, name="S1")
    # Some beside it, as at every edge.
    check_on_tissue(slide, centres + np.array([0, 150]), name="S1")


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
    pale = cv2.GaussianBlur(rng.normal(size=(1500, 1500)), (0, 0), 15)
    shade = 190 + 25 * pale / pale.std()
    shade[:, 900:] -= 90
    pixels = np.repeat(shade.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
    crop = Slide(ArrayPixels(pixels), 2.0, Path("crop.tif"))
    check_on_tissue(crop, centres * 0.6, name="S1")
