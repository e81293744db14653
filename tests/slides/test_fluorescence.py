"""Fluorescence is told from stained tissue, whatever its colours; padding is not taken for it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from strank.slides.pixels import ArrayPixels
from strank.slides.slide import Slide, open_slide
from strank.slides.tissue import is_dark_field

UM = 2.0


def dark(image: np.ndarray) -> bool:
    return is_dark_field(Slide(ArrayPixels(np.ascontiguousarray(image)), UM, Path("made.png")))


def amount(seed: int, coverage: float = 0.3) -> np.ndarray:
    """Nuclei of 8 µm in an ellipse of 1.6 x 1.2 mm, 0 to 1."""
    rng = np.random.default_rng(seed)
    nuclei = np.zeros((800, 1000), np.float32)
    for x, y in rng.uniform((0, 0), (1000, 800), (int(coverage * 800 * 1000 / 16), 2)).astype(int):
        cv2.circle(nuclei, (int(x), int(y)), 2, float(rng.uniform(0.4, 1)), -1)
    inside = cv2.ellipse(np.zeros((800, 1000), np.uint8), (500, 400), (400, 300), 0, 0, 360, 1, -1)
    return nuclei * inside


@pytest.mark.parametrize("colour", [(0, 0, 255), (200, 200, 200), (40, 90, 255), (0, 255, 60)])
@pytest.mark.parametrize("background", [0, 8, 25])
def test_fluorescence_of_any_colour_and_background(colour, background):
    rng = np.random.default_rng(1)
    light = amount(0)[..., None] * np.array(colour)
    light = light + background * rng.uniform(0.5, 1.5, (800, 1000, 1))
    assert dark(np.clip(light, 0, 255).astype(np.uint8))


def stained(seed: int, density: float) -> np.ndarray:
    """Nuclei as hematoxylin lets light through, in eosin, on glass."""
    nuclei = amount(seed, 0.4)[..., None]
    eosin = cv2.GaussianBlur((nuclei > 0).astype(np.float32), (0, 0), 15)[..., None] > 0.1
    passed = 10 ** -(density * (nuclei * [0.65, 0.7, 0.29] + eosin * [0.04, 0.25, 0.1]))
    return np.clip(240 * passed, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("density", [0.5, 1.0, 2.0])
def test_stained_tissue_is_not_taken_for_it(density):
    image = stained(0, density)
    assert not dark(image)
    assert not dark(image[250:550, 300:700])  # without glass
    padded = image.copy()
    for grey in (0, 20, 60):
        padded[:, :700] = grey
        assert not dark(padded)
    padded[:, :700] = np.random.default_rng(0).integers(0, 6, (800, 700, 3))  # black, then JPEG
    assert not dark(padded)
    turn = cv2.getRotationMatrix2D((500, 400), 30, 1)
    assert not dark(cv2.warpAffine(image, turn, (1000, 800)))
    penned = image.copy()
    cv2.circle(penned, (500, 400), 350, (20, 20, 30), 40)
    assert not dark(penned)
    assert not dark(np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2))


def test_what_holds_nothing_is_not_judged():
    assert not dark(np.zeros((800, 1000, 3), np.uint8))
    assert not dark(np.full((800, 1000, 3), 255, np.uint8))
    assert not dark(np.full((3, 3, 3), 200, np.uint8))


@pytest.mark.parametrize("name", ["reference", "black_strip", "pen_black", "transparent"])
def test_real_slides_are_not_taken_for_it(name):
    folder = Path(__file__).parents[3] / "shared/cases" / name
    if not folder.is_dir():
        pytest.skip("no shared cases")
    [path] = folder.glob("slide.*")
    assert not is_dark_field(open_slide(path, 1.0))
