"""Optical density and hematoxylin/eosin separation of RGB patches, and statistics of the stains."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

# Optical density (red, green, blue) of hematoxylin and of eosin; Ruifrok & Johnston (2001).
HEMATOXYLIN_EOSIN = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
# Optical density, averaged over the colours, above which a pixel counts as tissue.
TISSUE_DENSITY = 0.12
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_HOLE_DEPTHS_UM = (5, 15)
# Quantiles of a stain are kept between these optical densities: 256 levels of 0.01.
_LOWEST, _STEP = -0.5, 0.01

_EDGES = _LOWEST + _STEP * (np.arange(257) - 0.5)
# Keeps the ratio of two densities finite on white.
_FAINT = 0.05
_LEVELS = np.arange(256, dtype=np.float32) + 1
_DENSITY_OF_LEVEL = np.repeat(np.log10(256 / _LEVELS)[None, :, None], 3, axis=2)


class Stains(NamedTuple):
    """Optical densities of one patch, each float32 ``[height, width]``."""

    # Below zero where a colour lies outside the cone of the two.
    hematoxylin: NDArray[np.float32]
    eosin: NDArray[np.float32]
    density: NDArray[np.float32]  # Mean over red, green and blue, 0 to 2.41


def optical_density(patch: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Optical density, ``log10(256 / (level + 1))``, of an RGB patch ``[height, width, 3]``.

    >>> optical_density(np.array([[[255, 127, 0]]], np.uint8)).round(2)
    array([[[0.  , 0.3 , 2.41]]], dtype=float32)
    """
    return np.asarray(cv2.LUT(np.ascontiguousarray(patch), _DENSITY_OF_LEVEL))


def unmixing_matrix() -> NDArray[np.float64]:
    """Take an optical density (red, green, blue) to hematoxylin, eosin and the rest, ``[3, 3]``.

    The third direction stands at right angles on the two stains and all three have unit length,
    so what neither stain explains changes neither: Ruifrok & Johnston (2001), Anal. Quant. Cytol.
    Histol. 23, 291-299.

    >>> (unmixing_matrix() @ [0.65, 0.70, 0.29]).round(2).tolist()
    [1.0, 0.0, 0.0]
    """
    hematoxylin, eosin = np.asarray(HEMATOXYLIN_EOSIN)
    stains = np.stack([hematoxylin, eosin, np.cross(hematoxylin, eosin)], axis=1)
    return np.asarray(np.linalg.inv(stains / np.linalg.norm(stains, axis=0)))


_ROWS = np.vstack([unmixing_matrix()[:2], np.full((1, 3), 1 / 3)]).astype(np.float32)


def separate_stains(density: NDArray[np.float32]) -> Stains:
    """Hematoxylin, eosin and mean of an optical density ``[height, width, 3]``."""
    # One row at a time is faster than all three and a split.
    return Stains(*(cv2.transform(density, row[None]) for row in _ROWS))


def quantiles(image: NDArray[np.float32], shares: tuple[float, ...]) -> NDArray[np.float64]:
    """Quantiles of a stain, good to 0.01, from a histogram: much faster than sorting.

    >>> quantiles(np.linspace(0, 1, 10_000, dtype=np.float32).reshape(100, 100), (0.25,)).round(2)
    array([0.25])
    """
    # `convertScaleAbs` rounds and saturates, but would mirror what lies below zero.
    levels = cv2.convertScaleAbs(cv2.max(image, _LOWEST), alpha=1 / _STEP, beta=-_LOWEST / _STEP)
    counts = cv2.calcHist([levels], [0], None, [256], [0, 256]).ravel()
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    return np.asarray(np.interp(np.asarray(shares) * below[-1], below, _EDGES))


def describe_stains(stains: Stains, density: NDArray[np.float32]) -> dict[str, float]:
    """Mean, deviation and quantiles of either stain; ratios of green and of blue to red."""
    features = {}
    for name in ("hematoxylin", "eosin"):
        image = getattr(stains, name)
        mean, deviation = cv2.meanStdDev(image)
        features[f"{name}.mean"] = mean.item()
        features[f"{name}.sd"] = deviation.item()
        for share, value in zip(_QUANTILES, quantiles(image, _QUANTILES), strict=True):
            features[f"{name}.q{100 * share:02.0f}"] = float(value)
    red, green, blue, _ = cv2.mean(density)
    features["hue.green_to_red"] = green / (red + _FAINT)
    features["hue.blue_to_red"] = blue / (red + _FAINT)
    return features


def describe_tissue(stains: Stains, um_per_pixel: float) -> dict[str, float]:
    """Share of tissue, and roots of the shares of pixels deep in holes (fat, ducts, beside it)."""
    smooth = cv2.GaussianBlur(stains.density, (0, 0), 2 / um_per_pixel)
    empty = cv2.compare(smooth, TISSUE_DENSITY, cv2.CMP_LT)
    features = {"tissue.share": 1 - cv2.countNonZero(empty) / empty.size}
    depth = cv2.distanceTransform(empty, cv2.DIST_L2, cv2.DIST_MASK_5)
    for um in _HOLE_DEPTHS_UM:
        deep = cv2.compare(depth, um / um_per_pixel, cv2.CMP_GT)
        share = cv2.countNonZero(deep) / deep.size
        features[f"holes.sqrt_share_{um}um_deep"] = math.sqrt(share)
    return features
