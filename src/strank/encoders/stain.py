"""Optical density and hematoxylin/eosin separation of RGB patches, and statistics of the stains."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

#: Optical density (red, green, blue) of pure hematoxylin and eosin; Ruifrok & Johnston (2001).
HEMATOXYLIN_EOSIN = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
#: Mean optical density over the colours above which a pixel counts as tissue.
TISSUE_DENSITY = 0.12
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_DENSITY_OF_LEVEL = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)
_BINS = 512
_LOWEST, _HIGHEST = -1.0, 4.0


class Stains(NamedTuple):
    """Optical densities of one patch, each float32 ``[height, width]``."""

    hematoxylin: NDArray[np.float32]
    eosin: NDArray[np.float32]
    density: NDArray[np.float32]


def optical_density(patch: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical density, log10(256 / (level + 1)), of an RGB patch.

    Parameters
    ----------
    patch
        uint8 ``[height, width, 3]``.

    Returns
    -------
    NDArray[np.float32]
        Same shape, from 0 (white) to 2.41 (black).

    Examples
    --------
    >>> optical_density(np.full((1, 1, 3), 255, np.uint8)).ravel().tolist()
    [0.0, 0.0, 0.0]
    """
    table = np.repeat(_DENSITY_OF_LEVEL[None, :, None], 3, axis=2)
    return np.asarray(cv2.LUT(patch, table))


def unmixing_matrix() -> NDArray[np.float64]:
    """Matrix that takes optical density (column RGB) to hematoxylin, eosin and residual.

    The residual's vector stands at right angles on the two stains, all three of unit length, so
    what neither stain explains leaves the two unchanged.

    Returns
    -------
    NDArray[np.float64]
        ``[3, 3]``; multiply from the left: ``matrix @ density``.

    References
    ----------
    Ruifrok & Johnston (2001), Anal. Quant. Cytol. Histol. 23, 291-299.
    """
    hematoxylin, eosin = np.asarray(HEMATOXYLIN_EOSIN)
    stains = np.stack([hematoxylin, eosin, np.cross(hematoxylin, eosin)])
    stains /= np.linalg.norm(stains, axis=1, keepdims=True)
    return np.asarray(np.linalg.inv(stains.T))


def separate(density: NDArray[np.float32]) -> Stains:
    """Hematoxylin, eosin and mean optical density of a patch.

    Parameters
    ----------
    density
        Optical density, float32 ``[height, width, 3]``, as from `optical_density`.

    Returns
    -------
    Stains
        Amounts of stain in optical density (may be below zero where the colours lie outside the
        cone of the two stains), and the mean density over red, green and blue.
    """
    rows = np.vstack([unmixing_matrix()[:2], np.full((1, 3), 1 / 3)])
    return Stains(*cv2.split(cv2.transform(density, rows.astype(np.float32))))


def quantiles(image: NDArray[np.float32], shares: tuple[float, ...]) -> NDArray[np.float64]:
    """Quantiles of an optical-density image, from a histogram with bins of 0.01.

    Parameters
    ----------
    image
        float32 ``[height, width]``; values outside [-1, 4] are drawn to that range.
    shares
        Sorted, between 0 and 1.

    Returns
    -------
    NDArray[np.float64]
        ``[len(shares)]``, exact to 0.01.
    """
    counts = cv2.calcHist([image], [0], None, [_BINS], [_LOWEST, _HIGHEST]).ravel()
    edges = np.linspace(_LOWEST, _HIGHEST, _BINS + 1)
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    return np.interp(np.asarray(shares) * below[-1], below, edges)
