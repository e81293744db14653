"""Nuclei of a stained patch: found by threshold and blobs, measured by moments, summarised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.special import expit

from strank.encoders.morphology.stain import TISSUE_DENSITY, Stains
from strank.encoders.morphology.texture import blur

_Floats = NDArray[np.float64]
_Image = NDArray[np.float32]
# Hematoxylin (optical density) between which the threshold may lie: Otsu's choice means nothing
# where a patch has no nuclei, or nothing else.
_THRESHOLD_RANGE = (0.3, 0.6)
_SMOOTHING_UM = 0.8
# A blob's Gaussian; a nucleus has a radius of about 1.4 times that, or more.
_BLOB_UM = 2.0
_BLOB_CONTRAST = 0.03
_LEAST_AREA_UM2 = 8.0
# Statistics over nuclei begin with this many typical ones, so that they are defined, and change
# smoothly, down to no nucleus at all.
_N_TYPICAL = 2.0


class _Group(NamedTuple):
    n: float
    mean: float
    sd: float


_TYPICAL = {
    "log_area_um2": _Group(_N_TYPICAL, 3.6, 0.5),
    "elongation": _Group(_N_TYPICAL, 0.4, 0.2),
    "hematoxylin": _Group(_N_TYPICAL, 0.8, 0.1),
    "chromatin_sd": _Group(_N_TYPICAL, 0.15, 0.05),
    "green_to_red": _Group(_N_TYPICAL, 0.8, 0.1),
    "blue_to_red": _Group(_N_TYPICAL, 0.4, 0.1),
    "log_nearest_um": _Group(_N_TYPICAL, 3.7, 0.4),
}

_PER_NUCLEUS = tuple(name for name in _TYPICAL if name != "log_nearest_um")
_TYPICAL_BETWEEN = {
    "hematoxylin": _Group(_N_TYPICAL, 0.2, 0.05),
    "eosin": _Group(_N_TYPICAL, 0.03, 0.05),
}


@dataclass(frozen=True)
class MeasuredNuclei:
    """Measurements of the nuclei of a patch, each ``[n_nuclei]`` unless said otherwise."""

    centre_um: _Floats  # Column and row, [n_nuclei, 2]
    log_area_um2: _Floats
    # Log of the ratio of the axes of the ellipse with the same second moments.
    elongation: _Floats
    hematoxylin: _Floats  # Mean inside, in optical density
    chromatin_sd: _Floats  # Standard deviation of hematoxylin inside
    green_to_red: _Floats  # Ratios of the mean optical densities inside
    blue_to_red: _Floats


def find_nuclei(hematoxylin: _Image, um_per_pixel: float) -> tuple[NDArray[np.int32], int]:
    """Label the pixels of each nucleus, 0 outside; and count the connected areas of them.

    Pixels above the threshold of Otsu (1979), IEEE Trans. SMC 9, 62-66 (kept between 0.3 and 0.6)
    are nuclear; touching nuclei are told apart by giving each pixel to the nearest blob (peak of a
    difference of Gaussians). A pixel as near to one blob as to another may go to either, so shapes
    are not quite the same in a turned or mirrored patch.
    """
    smooth = blur(hematoxylin, _SMOOTHING_UM / um_per_pixel)
    levels = cv2.convertScaleAbs(cv2.max(smooth, 0), alpha=100)
    otsu = cv2.threshold(levels, 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)[0] / 100
    nuclear = (smooth > np.clip(otsu, *_THRESHOLD_RANGE)).astype(np.uint8)
    nuclear = cv2.morphologyEx(nuclear, cv2.MORPH_OPEN, _disc(1 / um_per_pixel))
    blobs = blur(hematoxylin, _BLOB_UM / um_per_pixel)
    blobs = blobs - blur(hematoxylin, 1.6 * _BLOB_UM / um_per_pixel)
    highest = cv2.dilate(blobs, _disc(0.75 * _BLOB_UM / um_per_pixel + 0.5))
    peaks = (blobs >= highest) & (blobs > _BLOB_CONTRAST) & (nuclear > 0)
    n_clumps = cv2.connectedComponents(nuclear)[0] - 1
    if not peaks.any():
        return np.zeros(hematoxylin.shape, np.int32), n_clumps
    _, nearest = cv2.distanceTransformWithLabels(
        1 - peaks.astype(np.uint8), cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_CCOMP
    )
    return nearest * nuclear, n_clumps


def _disc(radius: float) -> NDArray[np.uint8]:
    """Structuring element of the pixels at most `radius` from the middle one."""
    steps = np.arange(-int(radius), int(radius) + 1)
    return (steps[:, None] ** 2 + steps**2 <= radius**2).astype(np.uint8)


def measure_nuclei(
    labels: NDArray[np.int32],
    hematoxylin: _Image,
    density: _Image,
    um_per_pixel: float,
) -> MeasuredNuclei:
    """Size, shape, place and stain of labelled nuclei; those below 8 µm² are left out."""
    found = cv2.findNonZero((labels > 0).astype(np.uint8))
    column, row = np.empty((2, 0)) if found is None else found.reshape(-1, 2).T.astype(np.float64)
    inside = (row * labels.shape[1] + column).astype(np.intp)
    label = labels.ravel().take(inside).astype(np.intp)
    pixels = np.bincount(label, minlength=1)
    pixels[0] = 0
    kept = np.flatnonzero(pixels * um_per_pixel**2 >= _LEAST_AREA_UM2)

    def mean(values: NDArray) -> _Floats:
        return np.asarray(np.bincount(label, values, pixels.size)[kept] / pixels[kept])

    x, y = mean(column), mean(row)
    # A twelfth: the variance of a pixel's own square.
    xx = mean(column * column) - x**2 + 1 / 12
    yy = mean(row * row) - y**2 + 1 / 12
    xy = mean(column * row) - x * y
    middle, half = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    long_axis = np.sqrt(middle + half)
    short_axis = np.sqrt(np.maximum(middle - half, 1 / 12))
    stain = hematoxylin.ravel().take(inside).astype(np.float64)
    amount = mean(stain)
    red, green, blue = (mean(colour) for colour in density.reshape(-1, 3).take(inside, axis=0).T)
    return MeasuredNuclei(
        centre_um=np.stack([x, y], axis=1) * um_per_pixel,
        log_area_um2=np.log(pixels[kept] * um_per_pixel**2),
        elongation=np.log(long_axis / short_axis),
        hematoxylin=amount,
        chromatin_sd=np.sqrt(np.maximum(mean(stain**2) - amount**2, 0)),
        green_to_red=green / (red + 0.05),
        blue_to_red=blue / (red + 0.05),
    )


def describe_nuclei(stains: Stains, density: _Image, um_per_pixel: float) -> dict[str, float]:
    """Density, size, shape, stain and arrangement of a patch's nuclei, and the tissue between."""
    # Kinds are soft classes, so that no nucleus jumps from one to another; statistics over few
    # nuclei are drawn towards those of a typical one.
    labels, n_clumps = find_nuclei(stains.hematoxylin, um_per_pixel)
    nuclei = measure_nuclei(labels, stains.hematoxylin, density, um_per_pixel)
    n_nuclei = len(nuclei.elongation)
    mm2 = labels.size * um_per_pixel**2 * 1e-6
    features = {
        "sqrt_density_per_mm2": float(np.sqrt(n_nuclei / mm2)),
        "area_share": cv2.countNonZero(labels) / labels.size,
        "log_per_clump": float(np.log((n_nuclei + _N_TYPICAL) / (n_clumps + _N_TYPICAL))),
    }
    for kind, membership in _kinds(nuclei).items():
        features[f"{kind}.sqrt_density_per_mm2"] = float(np.sqrt(membership.sum() / mm2))
    measured = {name: getattr(nuclei, name) for name in _PER_NUCLEUS}
    measured["log_nearest_um"] = _log_nearest(nuclei.centre_um)
    for name, values in measured.items():
        features |= _drawn_to(_TYPICAL[name], name, _group(values))
    return features | _between(stains, labels)


def _between(stains: Stains, labels: NDArray[np.int32]) -> dict[str, float]:
    """Stains of the tissue outside nuclei: cytoplasm and stroma."""
    tissue = ((labels == 0) & (stains.density > TISSUE_DENSITY)).astype(np.uint8)
    n_pixels = cv2.countNonZero(tissue)
    features = {"between.share": n_pixels / labels.size}
    for name, typical in _TYPICAL_BETWEEN.items():
        mean, sd = cv2.meanStdDev(getattr(stains, name), mask=tissue)
        # As many typical pixels as a fiftieth of the patch.
        found = _Group(n_pixels, mean.item(), sd.item())
        features |= _drawn_to(typical._replace(n=labels.size / 50), f"between.{name}", found)
    return features


def _kinds(nuclei: MeasuredNuclei) -> dict[str, _Floats]:
    spindle = expit((nuclei.elongation - 0.6) / 0.1)
    large = expit((nuclei.log_area_um2 - np.log(60)) / 0.15)
    small = expit((np.log(30) - nuclei.log_area_um2) / 0.15)
    dark = expit((nuclei.hematoxylin - 0.9) / 0.08)
    return {
        "spindle": spindle,
        "large": large,
        "small_round": small * (1 - spindle),
        "dark": dark,
        "large_pale": large * (1 - dark),
        "small_dark": small * dark,
    }


def _group(values: _Floats) -> _Group:
    if values.size == 0:
        return _Group(0, 0.0, 0.0)
    return _Group(values.size, float(values.mean()), float(values.std()))


def _drawn_to(typical: _Group, name: str, found: _Group) -> dict[str, float]:
    """Mean and standard deviation of the found and the typical taken together."""
    n = found.n + typical.n
    mean = (found.n * found.mean + typical.n * typical.mean) / n
    between = found.n * typical.n * ((found.mean - typical.mean) / n) ** 2
    variance = (found.n * found.sd**2 + typical.n * typical.sd**2) / n + between
    return {f"{name}.mean": mean, f"{name}.sd": float(np.sqrt(variance))}


def _log_nearest(centre_um: _Floats) -> _Floats:
    """Log of 1 + the distance to the nearest other nucleus in µm; empty for one nucleus."""
    if len(centre_um) < 2:
        return np.empty(0)
    distance, _ = cKDTree(centre_um).query(centre_um, k=2)
    return np.asarray(np.log1p(distance[:, 1]))
