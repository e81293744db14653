"""TIFFs written band by band, and the mosaic of patches that stands in for an absent slide.

Patches are HDF5 files as HEST writes them: ``img`` ``[n, side, side, 3]``, ``barcode``, and
``coords`` ``[n, 2]`` (x, y of the upper left corner in pixels of the slide), with the attributes
``pixel_size`` (µm per pixel of the slide) and ``patch_size_src`` (side of a patch in its pixels).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from strank.errors import InputError
from strank.files import safe_name
from strank.io.tables import check_unique, decoded, open_hdf5
from strank.storage import new_file

BAND = 512
# µm per pixel of HEST's patches, where they do not say it.
_PATCH_UM = 0.5
_MOST_CLASSIC_BYTES = 2**31
_SHRINK = 8
# Of a slide, pixels that a pixel of a patch stands for, and those of a small one.
_SPREAD, _SMALL, _FARTHEST = 200, 100_000_000, 10_000_000


@dataclass(frozen=True)
class Patches:
    """Where patches stand on a slide; their pixels stay in the file."""

    path: Path
    barcodes: pd.Index
    #: Upper left (x, y) in pixels of the slide, ``[n_patches, 2]``.
    corners: NDArray[np.float64]
    #: Pixels of a stored patch.
    side: int
    #: Pixels of the slide a pixel of a patch.
    shrink: float
    slide_um_per_pixel: float

    @property
    def centres(self) -> NDArray[np.float64]:
        """Middle of each patch (x, y) in pixels of the slide."""
        return self.corners + self.side * self.shrink / 2


def patches_um(path: Path) -> float | None:
    """µm per pixel of the slide that patches are cut from, where the file says it."""
    return _number(_read_facts(path)[-1].get("pixel_size"))


def read_patches(path: Path, um_per_pixel: float | None = None) -> Patches:
    """Read where patches stand; µm per pixel is that of the slide, ``None`` for what they say."""
    shape, dtype, corners, names, facts = _read_facts(path)
    n = len(names)
    fits = len(shape) == 4 and shape == (n, shape[1], shape[1], 3) and corners.shape == (n, 2)
    if not fits or dtype != np.uint8 or n == 0:
        raise InputError(
            f"{path}: img is {dtype} of shape {shape}, coords of shape {corners.shape}; uint8 "
            f"[{n} barcodes, side, side, 3] and [{n}, 2] are needed"
        )
    if not (np.abs(corners) < _FARTHEST).all():
        raise InputError(f"{path}: coords are not all pixels of a slide; write the file again")
    check_unique(names, f"{path}: barcode")
    um = _number(facts.get("pixel_size")) if um_per_pixel is None else um_per_pixel
    if um is None:
        raise InputError(
            f"{path}: does not say the µm per pixel of the slide that its patches are cut from; "
            "give it with `um_per_pixel`"
        )
    side = int(shape[1])
    source = _number(facts.get("patch_size_src")) or round(side * _PATCH_UM / um)
    return Patches(path, names, corners, side, source / side, um)


def _read_facts(path: Path) -> tuple[Any, Any, NDArray[np.float64], pd.Index, dict[str, Any]]:
    """Shape and type of the pictures, corners, barcodes, and the attributes."""
    with open_hdf5(path, "img", "coords", "barcode") as file:
        images, coords = file["img"], file["coords"]
        corners = np.asarray(coords[:], dtype=np.float64)
        names = decoded(np.asarray(file["barcode"][:]).ravel())
        return images.shape or (), images.dtype, corners, names, {**images.attrs, **coords.attrs}


def image_file(path: Path, section: str, folder: Path | str | None) -> Path:
    """Where to write the image of a section that has no file of its own."""
    if folder is None:
        raise InputError(
            f"{path}: the image of section {section} has to be put together in a file; give "
            "`image_folder`, where it is to be written"
        )
    return Path(folder).resolve() / f"{safe_name(section)}.tif"


def write_mosaic(patches: Patches, path: Path) -> float:
    """Write an image in which every patch stands where it was cut, white between; return its scale.

    A pixel of the mosaic is a pixel of a patch, so positions on the slide are divided by
    ``patches.shrink``. Patches are placed to the nearest pixel; where two overlap, the later shows.
    """
    corners = np.rint(patches.corners / patches.shrink).astype(int)
    width, height = corners.max(0) + patches.side
    if min(width, height) < 1:
        raise InputError(f"{patches.path}: all patches lie outside the slide")
    if int(width) * int(height) > _SPREAD * len(corners) * patches.side**2 + _SMALL:
        raise InputError(
            f"{patches.path}: {len(corners)} patches would lie in an image of {width} x {height} "
            "px; are coords pixels of the slide?"
        )
    um_per_pixel = patches.slide_um_per_pixel * patches.shrink
    with open_hdf5(patches.path, "img") as file:
        bands = _bands(file["img"], corners, int(width), int(height))
        write_tiff(path, bands, (int(width), int(height)), um_per_pixel)
    return um_per_pixel


def write_tiff(
    path: Path, bands: Iterable[NDArray[np.uint8]], size: tuple[int, int], um_per_pixel: float
) -> None:
    """Write a tiled TIFF, deflated, so no pixel changes; if large, also shrunk by 8.

    Bands are RGB ``[BAND, width, 3]`` from top to bottom, the last may be lower.
    """
    import tifffile

    width, height = size
    small: list[NDArray[np.uint8]] = []
    options: dict[str, Any] = {
        "tile": (BAND, BAND),
        "photometric": "rgb",
        "compression": "zlib",
        "compressionargs": {"level": 1},
        "predictor": True,
    }
    per_cm = (1e4 / um_per_pixel, 1e4 / um_per_pixel)
    bigtiff = width * height * 3 > _MOST_CLASSIC_BYTES
    with new_file(path) as part, tifffile.TiffWriter(part, bigtiff=bigtiff) as file:
        file.write(
            _tiles(bands, small),
            shape=(height, width, 3),
            dtype=np.uint8,
            resolution=per_cm,
            resolutionunit="CENTIMETER",
            **options,
        )
        if min(size) >= BAND * _SHRINK:
            file.write(np.concatenate(small), subfiletype=1, **options)


def _tiles(
    bands: Iterable[NDArray[np.uint8]], small: list[NDArray[np.uint8]]
) -> Iterator[NDArray[np.uint8]]:
    """Cut bands into tiles, and collect them shrunk, so that finding tissue reads few pixels."""
    for band in bands:
        size = -(-band.shape[1] // _SHRINK), -(-band.shape[0] // _SHRINK)
        small.append(np.asarray(cv2.resize(band, size, interpolation=cv2.INTER_AREA), np.uint8))
        for x in range(0, band.shape[1], BAND):
            yield np.ascontiguousarray(band[:, x : x + BAND])


def _bands(
    images: Any, corners: NDArray[np.intp], width: int, height: int
) -> Iterator[NDArray[np.uint8]]:
    side = images.shape[1]
    for top in range(0, height, BAND):
        band = np.full((min(BAND, height - top), width, 3), 255, np.uint8)
        y = corners[:, 1] - top
        for i in np.flatnonzero((y < len(band)) & (y + side > 0)):
            left, upper = max(corners[i, 0], 0), max(y[i], 0)
            place = band[upper : y[i] + side, left : max(corners[i, 0] + side, 0)]
            inside = images[i][upper - y[i] :, left - corners[i, 0] :]
            place[:] = inside[: place.shape[0], : place.shape[1]]
        yield band


def _number(value: Any) -> float | None:
    try:
        number = float(np.asarray(value).ravel()[0]) if value is not None else 0.0
    except (TypeError, ValueError, IndexError):
        return None
    return number if number > 0 and np.isfinite(number) else None
