"""Where the tissue is, and a grid of tiles over it."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.errors import InputError
from strank.slides.image import Slide, thumbnail

__all__ = ["MASK_UM", "tile_centres", "tissue_mask"]

#: About the size of a pixel of the mask, in µm.
MASK_UM = 8.0
_SMALLEST_MM2 = 0.02
_DARKEST_GLASS_OD = 0.15
# Below this, the difference between the two classes is glass and dust, not stain.
_FAINTEST_OD = 0.06


def tissue_mask(slide: Slide) -> tuple[NDArray[np.bool_], float]:
    """Find tissue as what absorbs green light (both stains do), by Otsu's threshold.

    Parameters
    ----------
    slide
        The image.

    Returns
    -------
    mask, um_per_pixel
        ``bool``, ``[height, width]`` at about 8 µm a pixel, and its scale. Holes smaller than a
        spot are closed, specks below 0.02 mm² dropped.

    Raises
    ------
    InputError
        If there is no tissue.
    """
    small, scale = thumbnail(slide, MASK_UM)
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
    return large[labels], scale


def tile_centres(
    slide: Slide, *, stride_um: float, tile_um: float, least_tissue: float = 0.5
) -> NDArray[np.float64]:
    """Lay a square grid of tiles over the tissue.

    Parameters
    ----------
    slide
        The image.
    stride_um
        Distance between neighbouring centres, in µm.
    tile_um
        Side of the area that must hold tissue, in µm.
    least_tissue
        The share of it that must.

    Returns
    -------
    NDArray
        Centres (x, y) in pixels of the image, row by row, ``[n_tiles, 2]``.

    Raises
    ------
    InputError
        If no tile holds enough tissue.
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
