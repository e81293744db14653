"""Where tissue is: one answer for tiles, maps and the placement of spots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.errors import InputError, per_cent
from strank.slides.artefacts import (
    PALE,
    Density,
    Mask,
    density_of,
    disc,
    find_ink,
    find_padding,
    grown,
    large_parts,
    mean_within,
    over_colours,
    roughness,
)
from strank.slides.pixels import Pixels
from strank.slides.slide import MASK_UM, Slide, thumbnail

# Glass is smooth, whatever its colour, and tissue is not: the standard deviation of its density
# over 40 µm. On real slides 95 % of the glass is below 0.005, of the tissue 1 to 5 %; noise and
# compression roughen both. Of these borders the one is taken whose glass is palest.
_SMOOTH_OD = (0.015, 0.03, 0.045)
# Where the best border parts densities no better (sum of two error rates), or so little is glass,
# all is tissue.
_WORST_PARTING, _LEAST_GLASS = 0.25, 0.01
# What is this much denser than white is tissue where nothing is known of glass.
_FAINTEST_OD = 0.06
# Of the way from glass to the median of the tissue. Half would lose pale tissue.
_WAY = 0.35

# Shares of an image that are worth a word.
_WORTH_A_WORD = 0.002

# Nuclei in fluorescence are averaged with the dark between them here. In 8 bits: what is not black,
# and a luminance that stained tissue exceeds where it is densest.
_FIELD_UM = 64.0
_LIT, _DIM = 12, 75.0
FLUORESCENCE = (
    "the slide is dim wherever it is not black, as fluorescence (DAPI) is, and H&E is not"
)


@dataclass(frozen=True)
class TissueMask:
    """The tissue of a slide, and what of the image was left out of the search for it."""

    #: The slide, shrunken, RGB ``[height, width, 3]``.
    image: NDArray[np.uint8]
    um_per_pixel: float
    #: ``[height, width]``
    mask: Mask
    #: Padding and ink.
    ignored: Mask
    #: Share of the image by what it was taken for.
    shares: dict[str, float]
    #: Share of the image that is glass, or white without detail.
    clear: float

    @property
    def notes(self) -> list[str]:
        """Say what was ignored, a sentence a kind."""
        return [
            f"{per_cent(share)} of the image is {what}: ignored"
            for what, share in self.shares.items()
            if share >= _WORTH_A_WORD
        ]


def is_dark_field(slide: Slide) -> bool:
    """Whether a slide is dim wherever it is not black, as fluorescence is; glass never is."""
    small, _ = thumbnail(slide, _FIELD_UM)
    # Padding is of one colour; so is glass at times, and stained tissue is no dimmer without it.
    packed = small @ np.array([1, 256, 65536])
    colours, counts = np.unique(packed, return_counts=True)
    lit = small[(over_colours(np.maximum, small) > _LIT) & (packed != colours[counts.argmax()])]
    return lit.size > 0 and float(np.median(lit @ np.array([0.299, 0.587, 0.114]))) < _DIM


# A slide is asked several times in a row.
@lru_cache(maxsize=1)
def find_tissue(slide: Slide) -> TissueMask:
    """Find tissue as what is denser than glass in green, which both stains absorb.

    Glass is told by being smooth and pale. Padding and ink count as neither. Holes smaller than a
    spot are closed, specks below 0.02 mm² dropped.
    """
    if is_dark_field(slide):
        raise InputError(f"{slide.path}: {FLUORESCENCE}; give the H&E image of the section")
    image, scale = thumbnail(slide, MASK_UM)
    found = tissue_of(image, scale)
    if not found.mask.any():
        told = "".join(f"{note}; " for note in found.notes)
        raise InputError(
            f"{slide.path}: no tissue found; {told}is µm per pixel right ({slide.um_per_pixel:g})?"
        )
    return found


def without_ignored(slide: Slide) -> Slide:
    """Let a slide be white where it is padding or ink, as it is beyond its edge."""
    ignored = find_tissue(slide).ignored
    if not ignored.any():
        return slide
    return replace(slide, source=_Whitened(slide.source, grown(ignored, disc(1))))


class _Whitened:
    """Pixels that are white where a mask of the whole image says it."""

    def __init__(self, source: Pixels, mask: Mask) -> None:
        self.source, self.mask = source, mask
        self.sizes, self.stated, self.orientation = (
            source.sizes,
            source.stated,
            source.orientation,
        )

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        return self._whitened(self.source.read(level, x, y, width, height), level, (y, x))

    def shrunk(self, level: int, step: int) -> NDArray[np.uint8]:
        return self._whitened(self.source.shrunk(level, step), level, step=step)

    def _whitened(
        self, window: NDArray[np.uint8], level: int, corner: Sequence[int] = (0, 0), step: int = 1
    ) -> NDArray[np.uint8]:
        at = []
        for axis, side in enumerate(reversed(self.sizes[level])):
            centres = corner[axis] + step * (np.arange(window.shape[axis]) + 0.5)
            # The middle of a last square that was cut may lie outside.
            shares = np.minimum(centres, side - 0.5) / side
            at.append((shares * self.mask.shape[axis]).astype(int))
        # Most windows have nothing of it, and the mask's own pixels are few.
        if not self.mask[tuple(slice(places[0], places[-1] + 1) for places in at)].any():
            return window
        covered = self.mask[np.ix_(*at)]
        return np.where(covered[..., None], np.uint8(255), window)


def tissue_of(image: NDArray[np.uint8], um_per_pixel: float) -> TissueMask:
    """Find tissue on a thumbnail; the mask may be empty."""
    density = density_of(image)
    padding = find_padding(image, density, um_per_pixel)
    around = disc(8 / um_per_pixel)
    usable = ~grown(padding, around)
    glass = _find_glass(density, usable, um_per_pixel)
    white = padding & (over_colours(np.maximum, density) < PALE / 2)
    # White of one colour was not scanned, or is glass: all of it where there is no other, and here
    # and there where it has the colour of other glass.
    clear = density[glass if glass.any() else white]
    level = np.median(clear, axis=0) if len(clear) else np.zeros(3, np.float32)
    if white.any():
        glass |= white & _like(density, clear)
    padding &= ~glass
    ink = find_ink(density, padding, level, um_per_pixel)
    usable = ~grown(padding | ink, around)
    glass &= usable
    green = _smoothed(density[..., 1], usable, um_per_pixel)
    cut = _cut(green[glass], green[usable & ~glass], float(level[1]))
    ignored = padding | ink
    mask = _cleaned((green > cut) & ~ignored, um_per_pixel) & ~ignored
    return TissueMask(
        image,
        um_per_pixel,
        large_parts(mask, um_per_pixel, 8),
        ignored,
        _shares(image, padding, ink, um_per_pixel),
        float((glass | white).mean()),
    )


def _like(density: Density, clear: Density) -> Mask:
    """Tell which pixels have the colour of glass, which may be lit unevenly."""
    if not len(clear):
        return np.zeros(density.shape[:2], bool)
    lightest, densest = np.quantile(clear, [0.05, 0.95], axis=0)
    within = (density > lightest - 0.01) & (density < densest + 0.01)
    return over_colours(np.logical_and, within)


def _find_glass(density: Density, where: Mask, um_per_pixel: float) -> Mask:
    """Find what is smooth and pale; nothing where that tells no glass from tissue."""
    rough = roughness(density[..., 1], where, 5)
    # Of the densest colour, since ink may be pale in any other.
    densest = over_colours(np.maximum, density)
    pale, densest = where & (densest < PALE), _smoothed(densest, where, um_per_pixel)
    best, glass = _WORST_PARTING, np.zeros_like(where)
    for border in _SMOOTH_OD:
        smooth = pale & (rough < border)
        other = where & ~smooth
        if smooth.sum() < _LEAST_GLASS * where.sum() or not other.any():
            continue
        _, error = _parting(densest[smooth], densest[other])
        if error < best:
            best, glass = error, smooth
    return glass


def _smoothed(green: Density, where: Mask, um_per_pixel: float) -> Density:
    return mean_within(green, where, lambda x: cv2.GaussianBlur(x, (0, 0), 15 / um_per_pixel))


def _cut(glass: Density, other: Density, level: float) -> float:
    """Density from which it is tissue: some way from glass to tissue, where both are known."""
    if not len(glass) or not len(other):
        return level + _FAINTEST_OD
    least, _ = _parting(glass, other)
    other = other[other > least]
    if not len(other):
        return least
    middle = float(np.median(glass))
    way = middle + _WAY * (float(np.median(other)) - middle)
    # Pale tissue may be a tenth.
    return max(least, min(way, float(np.quantile(other, 0.1))))


def _parting(low: Density, high: Density) -> tuple[float, float]:
    """Find the value with the least share of ``low`` above plus of ``high`` below, and that sum."""
    edges = np.linspace(0, 1, 201)
    below = [np.histogram(np.clip(x, 0, 1), edges)[0].cumsum() / len(x) for x in (low, high)]
    error = 1 - below[0] + below[1]
    return float(edges[1:][error.argmin()]), float(error.min())


def _cleaned(mask: Mask, um_per_pixel: float) -> Mask:
    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, disc(15 / um_per_pixel))
    return np.asarray(cv2.morphologyEx(opened, cv2.MORPH_CLOSE, disc(50 / um_per_pixel)) > 0)


def _shares(
    image: NDArray[np.uint8], padding: Mask, ink: Mask, um_per_pixel: float
) -> dict[str, float]:
    """Shares of the image by kind."""
    least, most = (over_colours(which, image) for which in (np.minimum, np.maximum))
    coloured = padding & (most - least > 60)
    dark = padding & ~coloured & (most < 100)
    # Padding reaches the edge of the image; a black ring of a pen does not.
    _, labels = cv2.connectedComponents(dark.astype(np.uint8))
    edge = np.unique(np.concatenate([labels[[0, -1]].ravel(), labels[:, [0, -1]].ravel()]))
    outer = dark & np.isin(labels, edge)
    inked = ink | coloured | (dark & ~outer)
    fringe = inked & ~coloured & grown(padding & ~inked, disc(50 / um_per_pixel))
    bright = padding & (least >= 250)
    kinds = {
        "black padding": outer,
        "white padding, or transparent": bright,
        "of one colour": padding & ~coloured & ~dark & ~bright,
        "ink, of colours that H&E has not": inked & ~fringe,
    }
    return {what: float(where.mean()) for what, where in kinds.items() if where.any()}


def tile_centres(
    tissue: TissueMask, *, stride_um: float, tile_um: float, least_tissue: float = 0.5
) -> NDArray[np.float64]:
    """Lay a square grid over the tissue: centres (x, y) in µm, row by row, ``[n_tiles, 2]``.

    ``least_tissue`` of the square of ``tile_um`` must be tissue.
    """
    down, across = (n * tissue.um_per_pixel for n in tissue.mask.shape)
    y, x = np.mgrid[stride_um / 2 : down : stride_um, stride_um / 2 : across : stride_um]
    centres = np.column_stack([x.ravel(), y.ravel()])
    return centres[share_within(tissue.mask, tissue.um_per_pixel, centres, tile_um) >= least_tissue]


def share_within(
    mask: Mask, um_per_pixel: float, centres: NDArray[np.float64], side_um: float
) -> NDArray[np.float32]:
    """Share of squares around centres (x, y in µm) that a mask covers; it ends with the image."""
    side = max(1, round(side_um / um_per_pixel))
    share = cv2.blur(mask.astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
    column, row = (centres / um_per_pixel).astype(int).T
    return np.asarray(share[row, column])
