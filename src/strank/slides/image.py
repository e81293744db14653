"""Opening an image and reading square fields of a physical size from it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from strank.cohort.contract import section_info
from strank.errors import InputError

__all__ = [
    "IMAGE_SUFFIXES",
    "Slide",
    "image_size",
    "open_slide",
    "read_field",
    "slide_of",
    "thumbnail",
]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


@dataclass(frozen=True)
class Slide:
    """An image in memory with its scale.

    Attributes
    ----------
    pixels
        RGB, ``uint8``, ``[height, width, 3]``.
    um_per_pixel
        Size of a pixel, in µm.
    path
        The file it came from.
    """

    pixels: NDArray[np.uint8]
    um_per_pixel: float
    path: Path


def open_slide(path: Path, um_per_pixel: float) -> Slide:
    """Read a JPEG, PNG or TIFF into memory (3 bytes a pixel).

    Raises
    ------
    InputError
        For a file that is absent, damaged, truncated or not an image, and for a pixel size that
        is not positive.
    """
    if not um_per_pixel > 0:
        raise InputError(f"{path}: µm per pixel must be positive; got {um_per_pixel}")
    with _opened(path) as image:
        return Slide(np.asarray(image.convert("RGB")), um_per_pixel, path)


def slide_of(section: AnnData) -> Slide:
    """Open the image that a section of a cohort belongs to; errors as `open_slide`."""
    info = section_info(section)
    return open_slide(Path(info.image), info.um_per_pixel)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels of an image that has been decoded to its end.

    Raises
    ------
    InputError
        As `open_slide`.
    """
    with _opened(path) as image:
        size: tuple[int, int] = image.size
        # A JPEG decodes at an eighth of its size several times faster, and still to its end.
        image.draft("RGB", (size[0] // 8, size[1] // 8))
        image.load()
        return size


def read_field(
    slide: Slide, centres: NDArray[np.float64], *, um: float, pixels: int
) -> NDArray[np.uint8]:
    """Cut square windows around spots, at a fixed physical size.

    Parameters
    ----------
    slide
        The image.
    centres
        Spot centres (x, y) in pixels of the image, ``[n_spots, 2]``.
    um
        Side of a window, in µm.
    pixels
        Side of the result, to which a window is resampled (by area when it shrinks).

    Returns
    -------
    NDArray
        ``uint8``, ``[n_spots, pixels, pixels, 3]``; white where a window leaves the image.
    """
    side = max(1, round(um / slide.um_per_pixel))
    corners = np.floor(centres - side / 2 + 0.5).astype(int)
    out = np.full((len(centres), pixels, pixels, 3), 255, np.uint8)
    method = cv2.INTER_AREA if side > pixels else cv2.INTER_LINEAR

    def cut(i: int) -> None:
        x, y = corners[i]
        window = _window(slide.pixels, x, y, side)
        cv2.resize(window, (pixels, pixels), dst=out[i], interpolation=method)

    with ThreadPoolExecutor() as pool:
        list(pool.map(cut, range(len(centres))))
    return out


def thumbnail(slide: Slide, um_per_pixel: float) -> tuple[NDArray[np.uint8], float]:
    """Shrink a slide to about ``um_per_pixel``; return it with the scale that came out."""
    height, width = slide.pixels.shape[:2]
    shrink = max(1.0, um_per_pixel / slide.um_per_pixel)
    size = max(1, round(width / shrink)), max(1, round(height / shrink))
    small = cv2.resize(slide.pixels, size, interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.uint8), slide.um_per_pixel * width / size[0]


def _window(pixels: NDArray[np.uint8], x: int, y: int, side: int) -> NDArray[np.uint8]:
    inside = pixels[max(y, 0) : max(y + side, 0), max(x, 0) : max(x + side, 0)]
    if inside.shape[:2] == (side, side):
        return inside
    top, left = min(max(-y, 0), side), min(max(-x, 0), side)
    window = np.full((side, side, 3), 255, np.uint8)
    window[top : top + inside.shape[0], left : left + inside.shape[1]] = inside
    return window


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():
        raise InputError(f"{path}: no such image")
    try:
        with warnings.catch_warnings():
            # Sections of 10,000 x 10,000 px are ordinary; Pillow still refuses twice its limit.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode.startswith(("I", "F")):
                    raise InputError(f"{path}: not an image of 8 bits a colour; convert it")
                yield image
    except Image.DecompressionBombError as error:
        raise InputError(f"{path}: too large to decode in memory; export it smaller") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path}: not an image that can be read (JPEG, PNG or TIFF)") from error
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a broken PNG
        raise InputError(f"{path}: damaged or truncated image ({error})") from error
