"""Where tissue is, and whether spots lie on it."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.errors import InputError
from strank.slides.slide import Slide, thumbnail

# About the size of a pixel of the mask.
_MASK_UM = 8.0

_SMALLEST_MM2 = 0.02
_DARKEST_GLASS_OD = 0.15
# Below this, the difference between the two classes is glass and dust, not stain.
_FAINTEST_OD = 0.06

_LEAST_SHARE = 0.5
_CLEARLY_MORE = 0.25
# Range of the optical density of glass; of pale tissue it is at least twice that.
_EVEN_OD = 0.1

# Nuclei in fluorescence are averaged with the dark between them here. In 8 bits: what is not black,
# and a luminance that stained tissue exceeds where it is densest.
_FIELD_UM = 64.0
_LIT, _DIM = 12, 75.0


def is_dark_field(slide: Slide) -> bool:
    """Whether a slide is dim wherever it is not black, as fluorescence is; glass never is."""
    small, _ = thumbnail(slide, _FIELD_UM)
    # Padding is of one colour; so is glass at times, and stained tissue is no dimmer without it.
    packed = small @ np.array([1, 256, 65536])
    colours, counts = np.unique(packed, return_counts=True)
    lit = small[(small.max(axis=-1) > _LIT) & (packed != colours[counts.argmax()])]
    return lit.size > 0 and float(np.median(lit @ np.array([0.299, 0.587, 0.114]))) < _DIM


def tissue_mask(slide: Slide) -> tuple[NDArray[np.bool_], float]:
    """Find tissue as what absorbs green light (both stains do), by Otsu's threshold.

    A mask ``[height, width]`` and its µm per pixel. Holes smaller than a spot are closed, specks
    below 0.02 mm² dropped.
    """
    small, scale = thumbnail(slide, _MASK_UM)
    return _mask_of(small, scale, slide), scale


def _mask_of(small: NDArray[np.uint8], scale: float, slide: Slide) -> NDArray[np.bool_]:
    density = -np.log10((small[..., 1].astype(np.float32) + 1) / 256)
    density = cv2.GaussianBlur(density, (0, 0), 15 / scale)
    # Glass is rarely pure white: density is counted from the brightest tenth of the image, unless
    # that is itself too dark for glass.
    density -= min(float(np.quantile(density, 0.1)), _DARKEST_GLASS_OD)
    as_bytes = np.clip(density * 200, 0, 255).astype(np.uint8)
    cut, _ = cv2.threshold(as_bytes, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    mask = (density > max(cut / 200 * 0.6, _FAINTEST_OD)).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, _disc(15 / scale))
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, _disc(50 / scale))
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask)
    large = stats[:, cv2.CC_STAT_AREA] * (scale / 1e3) ** 2 >= _SMALLEST_MM2
    large[0] = False
    if not large.any():
        raise InputError(
            f"{slide.path}: no tissue found; is µm per pixel right ({slide.um_per_pixel:g})?"
        )
    return np.asarray(large[labels])


def tile_centres(
    slide: Slide, *, stride_um: float, tile_um: float, least_tissue: float = 0.5
) -> NDArray[np.float64]:
    """Lay a square grid over the tissue: centres (x, y) in pixels, row by row, ``[n_tiles, 2]``.

    ``least_tissue`` of the square of ``tile_um`` must be tissue.
    """
    mask, scale = tissue_mask(slide)
    side = max(1, round(tile_um / scale))
    share = cv2.blur(mask.astype(np.float32), (side, side), borderType=cv2.BORDER_CONSTANT)
    step = stride_um / scale
    rows, columns = (np.arange(step / 2, n, step) for n in mask.shape)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    enough = share[y.astype(int), x.astype(int)] >= least_tissue
    if not enough.any():
        raise InputError(f"{slide.path}: no tile of {tile_um:g} µm is half full of tissue")
    return np.column_stack([x[enough], y[enough]]) * scale / slide.um_per_pixel


def _disc(radius: float) -> NDArray[np.uint8]:
    size = 2 * max(1, round(radius)) + 1
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)), dtype=np.uint8)


def check_on_tissue(slide: Slide, centres: NDArray[np.float64], *, name: str) -> None:
    """Refuse spots most of which stand on glass, or that stand better with x and y swapped."""
    small, scale = thumbnail(slide, _MASK_UM)
    mask, green = _mask_of(small, scale, slide), small[..., 1]
    # An image without glass, cut out of tissue, cannot tell, and passes: what lies outside its mask
    # is pale tissue, and uneven.
    glass = np.log10(green[~mask] + 1.0)
    if len(glass) and np.ptp(np.quantile(glass, [0.05, 0.95])) > _EVEN_OD:
        return
    shares = [
        _share(mask, order * slide.um_per_pixel / scale) for order in (centres, centres[:, ::-1])
    ]
    if shares[1] > shares[0] + _CLEARLY_MORE:
        raise InputError(
            f"section {name}: {shares[0]:.0%} of the spots stand on the tissue of "
            f"{slide.path.name}, and {shares[1]:.0%} would with x and y swapped; swap them"
        )
    if shares[0] < _LEAST_SHARE:
        first, last = centres.min(0), centres.max(0)
        raise InputError(
            f"section {name}: only {shares[0]:.0%} of the spots stand on the tissue of "
            f"{slide.path.name} (x {first[0]:.0f} to {last[0]:.0f}, y {first[1]:.0f} to "
            f"{last[1]:.0f}; the image is {slide.size[0]} x {slide.size[1]}); is it the image that "
            f"the positions are pixels of, at {slide.um_per_pixel:g} µm per pixel?"
        )


def _share(mask: NDArray[np.bool_], positions: NDArray[np.float64]) -> float:
    """Share of positions (x, y in pixels of the mask) on tissue; outside the mask is glass."""
    column, row = np.floor(positions).astype(int).T
    inside = (row >= 0) & (row < mask.shape[0]) & (column >= 0) & (column < mask.shape[1])
    return float(mask[row[inside], column[inside]].sum() / len(positions))
