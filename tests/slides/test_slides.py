from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from strank.errors import InputError
from strank.slides.pixels import ArrayPixels
from strank.slides.slide import Slide, read_field
from strank.slides.tissue import find_tissue, tile_centres

UM = 2.0


@pytest.fixture
def slide() -> Slide:
    """3 x 2.4 mm of pinkish glass with an ellipse of tissue (1.6 x 1.2 mm) and a speck of dust."""
    rng = np.random.default_rng(0)
    pixels = np.full((1200, 1500, 3), [240, 225, 238], np.uint8)
    cv2.ellipse(pixels, (700, 600), (400, 300), 0, 0, 360, (150, 90, 160), -1)
    cv2.circle(pixels, (1400, 100), 12, (60, 60, 60), -1)
    noisy = pixels + rng.normal(0, 6, pixels.shape)
    return Slide(ArrayPixels(noisy.clip(0, 255).astype(np.uint8)), UM, Path("made.png"))


def test_tissue_is_the_ellipse(slide):
    tissue = find_tissue(slide)
    mask, scale = tissue.mask, tissue.um_per_pixel
    area = mask.sum() * (scale / 1000) ** 2
    assert area == pytest.approx(np.pi * 0.8 * 0.6, rel=0.05)
    y, x = np.nonzero(mask)
    assert np.array([x.mean(), y.mean()]) * scale / UM == pytest.approx([700, 600], abs=5)


def test_tiles_lie_on_a_grid_over_the_tissue(slide):
    centres = tile_centres(find_tissue(slide), stride_um=100, tile_um=100) / UM
    inside = ((centres - [700, 600]) / [400, 300]) ** 2
    assert (inside.sum(1) < 1.2).all()
    # One tile for each 100 x 100 µm of tissue.
    assert len(centres) == pytest.approx(np.pi * 0.8 * 0.6 * 100, rel=0.07)
    steps = np.diff(np.unique(centres[:, 0].round(3)))
    np.testing.assert_allclose(steps, 100 / UM, rtol=1e-3)


def test_the_grid_does_not_depend_on_the_pixel_size(slide):
    half = cv2.resize(slide.source.array, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    coarse = Slide(ArrayPixels(half), 2 * UM, slide.path)
    one = tile_centres(find_tissue(slide), stride_um=100, tile_um=100)
    other = tile_centres(find_tissue(coarse), stride_um=100, tile_um=100)
    assert len(one) == pytest.approx(len(other), rel=0.03)
    np.testing.assert_allclose(one.mean(0), other.mean(0), atol=10)


def test_glass_alone_has_no_tissue(slide):
    glass = Slide(ArrayPixels(np.full((600, 600, 3), 235, np.uint8)), UM, Path("glass.png"))
    with pytest.raises(
        InputError, match=r"glass.png: no tissue found; is µm per pixel right \(2\)"
    ):
        find_tissue(glass)


def test_an_image_without_glass_is_all_tissue():
    rng = np.random.default_rng(0)
    pixels = rng.normal([150, 90, 160], 15, (600, 600, 3)).clip(0, 255).astype(np.uint8)
    mask = find_tissue(Slide(ArrayPixels(pixels), UM, Path("crop.png"))).mask
    assert mask.mean() > 0.95


def test_fields_have_the_physical_size_asked_for():
    """A square of 40 µm covers the same share of a 160 µm field at any pixel size."""
    for um in (0.5, 1.0, 2.0):
        pixels = np.full((int(400 / um), int(400 / um), 3), 255, np.uint8)
        low, high = int(180 / um), int(220 / um)
        pixels[low:high, low:high] = 0
        slide = Slide(ArrayPixels(pixels), um, Path("x.png"))
        field = read_field(slide, np.array([[200 / um, 200 / um]]), um=160, pixels=64)
        assert field.shape == (1, 64, 64, 3)
        assert (255 - field.mean()) / 255 == pytest.approx(1 / 16, rel=0.02)
        y, x = np.nonzero(field[0, ..., 0] < 128)
        assert x.mean() == pytest.approx(31.5, abs=0.6)
        assert y.mean() == pytest.approx(31.5, abs=0.6)


def test_outside_the_image_is_white():
    slide = Slide(ArrayPixels(np.zeros((50, 50, 3), np.uint8)), 1.0, Path("x.png"))
    centres = np.array([[0.0, 0.0], [50, 50], [25, 0], [-100, 20], [300, 300]])
    fields = read_field(slide, centres, um=20, pixels=20)
    shares = (fields == 255).all(-1).mean((1, 2))
    np.testing.assert_allclose(shares, [0.75, 0.75, 0.5, 1, 1])


def test_a_field_larger_than_the_image():
    slide = Slide(ArrayPixels(np.zeros((10, 10, 3), np.uint8)), 1.0, Path("x.png"))
    field = read_field(slide, np.array([[5.0, 5.0]]), um=20, pixels=20)
    assert (field == 0).all(-1).sum() == 100
