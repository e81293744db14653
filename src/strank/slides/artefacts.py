"""What on an image is neither tissue nor glass: padding, areas never scanned, and marks of a pen.

Density is optical density, -log10 of the light that comes through, of each colour.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

Mask: TypeAlias = NDArray[np.bool_]
Density: TypeAlias = NDArray[np.float32]

# Denser in every colour is black: the densest nuclei are no half as dense in blue.
_BLACK = 0.9
# Smaller parts of tissue, or areas of one colour, are chance.
_SMALLEST_MM2 = 0.02
# Where all colours are below, light comes through as it does through glass.
PALE = 0.3

# The colours of H&E, as ratios of densities: red to green at most 1.13, blue to green 0.5 to 0.7
# (quantiles of 1 and 99 % over tissue of two laboratories), and how dense they become.
_MOST_RED, _MOST_BLUE, _LEAST_BLUE, _DENSEST = 1.2, 0.8, 0.48, 0.9
# Hematoxylin may be low in blue, but is then pale in red, too.
_BLUISH_RED = 0.8
# Ink is more even than tissue: the deviation of its density from pixel to pixel, as a share, or, as
# compression roughens what is dark, of its light.
_EVEN, _EVEN_LIGHT = 0.12, 0.025
# Of paler ink the ratios are those of noise; and hue tells ink alone only where no tissue, be it
# as red as this, comes near.
_FAINTEST_INK, _FAR_RED = 0.2, 1.05 * _MOST_RED
# Grey that is not dark may be the tissue of a grey image.
_GREY, _DARK = 0.7, 0.5
_STROKE_UM, _FRINGE_UM = 20.0, 50.0


def density_of(image: NDArray[np.uint8]) -> Density:
    """Optical density of each colour of an image of 8 bits, ``[height, width, 3]``."""
    table = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)
    return np.asarray(table[image])


def over_colours(which: np.ufunc, values: NDArray) -> NDArray:
    """Take the least, say, of the colours of each pixel; along an axis so short NumPy is slow."""
    return np.asarray(reduce(which, np.moveaxis(values, -1, 0)))


def disc(radius: float) -> NDArray[np.uint8]:
    """Make a disc to open and close masks with, of at least 3 pixels."""
    size = 2 * max(1, round(radius)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)), dtype=np.uint8)


def grown(mask: Mask, by: NDArray[np.uint8]) -> Mask:
    """Dilate a mask."""
    return np.asarray(cv2.dilate(mask.astype(np.uint8), by) > 0)


def large_parts(mask: Mask, um_per_pixel: float, connectivity: int) -> Mask:
    """Keep connected parts, by 4 or 8 neighbours, of 0.02 mm² and more."""
    _, labels, stats, _ = cv2.connectedComponentsWithStats(
        mask.astype(np.uint8), connectivity=connectivity
    )
    large = stats[:, cv2.CC_STAT_AREA] * (um_per_pixel / 1e3) ** 2 >= _SMALLEST_MM2
    large[0] = False
    return np.asarray(large[labels])


def mean_within(
    values: Density, where: Mask, blur: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> Density:
    """Blur, as if there were nothing but ``where``."""
    if where.all():
        return np.asarray(blur(values))
    weight = np.maximum(blur(where.astype(np.float32)), 1e-6)
    if values.ndim == 2:
        return np.asarray(blur(values * where) / weight)
    return np.asarray(blur(values * where[..., None]) / weight[..., None])


def roughness(values: Density, where: Mask, side: int) -> Density:
    """Take the standard deviation within squares of ``side`` pixels, ``where`` only."""

    def box(part: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(cv2.blur(part, (side, side)))

    mean = mean_within(values, where, box)
    return np.sqrt(np.maximum(mean_within(values**2, where, box) - mean**2, 0))


def find_padding(image: NDArray[np.uint8], density: Density, um_per_pixel: float) -> Mask:
    """Find what is black, and larger areas of exactly one colour."""
    square = np.ones((3, 3), np.uint8)
    flat = over_colours(np.logical_and, cv2.dilate(image, square) == cv2.erode(image, square))
    # Squares of one colour that touch have the same.
    even = grown(large_parts(flat, um_per_pixel, 4), square)
    return np.asarray(even | (over_colours(np.minimum, density) > _BLACK))


def find_ink(
    density: Density, padding: Mask, glass: NDArray[np.float32], um_per_pixel: float
) -> Mask:
    """Find strokes of a colour that H&E has not, at least 40 µm wide, and the fringe of padding.

    Ink that lets tissue through is told by its hue; red, brown and dark ink, which blood and dense
    nuclei come close to, by being even as well.
    """
    densest = over_colours(np.maximum, density)
    dark = padding & (densest > PALE / 2)
    where = ~padding | dark
    smooth = mean_within(density, where, lambda x: cv2.GaussianBlur(x, (0, 0), 5 / um_per_pixel))
    red, least_blue, most_blue = _hue(smooth, glass)
    strongest, green = over_colours(np.maximum, smooth), smooth[..., 1]
    odd = (red > _MOST_RED) | (least_blue > _MOST_BLUE) | (green > _DENSEST)
    odd |= (red > _BLUISH_RED) & (most_blue < _LEAST_BLUE)
    even = (_unevenness(density, where) < _EVEN * strongest) | (
        _unevenness(10**-density, where) < _EVEN_LIGHT
    )
    even &= (red < _GREY) | (least_blue < _MOST_BLUE) | (strongest > _DARK)
    hue_alone = (strongest > PALE) & (red > _FAR_RED)
    inked = dark | (where & (hue_alone | ((strongest > _FAINTEST_INK) & even & odd)))
    wide = disc(_STROKE_UM / um_per_pixel)
    stroke = cv2.morphologyEx(inked.astype(np.uint8), cv2.MORPH_OPEN, wide) > 0
    near = grown(stroke, disc(_FRINGE_UM / um_per_pixel))
    fringe = near & odd & (densest > PALE / 2)
    return np.asarray(~padding & (fringe | stroke))


def _unevenness(values: Density, where: Mask) -> Density:
    """Take the largest deviation of any colour from pixel to pixel."""
    return np.asarray(np.max([roughness(values[..., c], where, 3) for c in range(3)], axis=0))


def _hue(density: Density, glass: NDArray[np.float32]) -> tuple[Density, Density, Density]:
    """Densities of red and blue as shares of green's: the least of red, the least and most of blue.

    Counted from white and from the glass, whose own colour may be light or stain.
    """
    shares = [
        (part[..., c] / np.maximum(part[..., 1], 0.02))
        for c in (0, 2)
        for part in (density, np.maximum(density - glass, 0))
    ]
    return np.minimum(*shares[:2]), np.minimum(*shares[2:]), np.maximum(*shares[2:])
