"""A slide: an image at a physical scale, of which windows are read as they are needed."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.in_memory import known_facts, name_of
from strank.errors import InputError
from strank.slides.pixels import Pixels, open_pixels
from strank.slides.scale import Stated

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")

# Of any image, by far; else sizes in pixels are no numbers.
_FINEST_UM, _COARSEST_UM = 1e-3, 1e4

# Sizes of a pixel that small pictures of a slide share: of the mask of the tissue, and below marks,
# fine for a small section and no more pixels than can be seen.
MASK_UM = 8.0
_FINE_UM, _SEEN_PIXELS = 4.0, 2000
# A side of the one that goes with spots: 3 MB in memory at most.
_KEPT_PIXELS = 1000
# Pixels of a level from which it is shrunk as it is read, and how many times is left to do then.
_MOST_PIXELS, _MARGIN = 16_000_000, 1.1


@dataclass(frozen=True)
class Slide:
    """An image with its scale; it may go to another process, which opens the file again."""

    source: Pixels
    um_per_pixel: float  # of the full resolution
    path: Path

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels of the full resolution."""
        return self.source.sizes[0]


def open_slide(path: Path, um_per_pixel: float | None = None) -> Slide:
    """Open an image; its pixels are read when they are needed. Its scale is never guessed."""
    source = open_pixels(path)
    scale = source.stated.um_per_pixel if um_per_pixel is None else um_per_pixel
    if scale is None:
        but = ", with `um_per_pixel_override=True`" if math.isfinite(source.stated.x) else ""
        raise InputError(f"{path}: {source.stated} give it as `um_per_pixel`{but}")
    if not (scale > 0 and np.isfinite(scale)):
        raise InputError(f"{path}: µm per pixel must be positive; got {scale:g}")
    if not _FINEST_UM <= scale <= _COARSEST_UM:
        raise InputError(
            f"{path}: no slide has {scale:g} µm per pixel; look it up (scanner, objective)"
        )
    return Slide(source, float(scale), path)


def open_told(path: Path, um_per_pixel: float | None, override: bool = False) -> Slide:
    """Open an image at the scale that a user gives, if any; another than the file's must be meant.

    What a cohort or scores know of an image was checked when they were made: `open_slide`.
    """
    check_override(um_per_pixel, override)
    slide = open_slide(path, um_per_pixel)
    if um_per_pixel is not None and not override:
        check_told(path, um_per_pixel, slide.source.stated)
    return slide


def check_override(um_per_pixel: float | None, override: bool) -> None:
    """Refuse to override what a file says by nothing."""
    if override and um_per_pixel is None:
        raise InputError(
            "`um_per_pixel_override` takes `um_per_pixel` in the place of what files say; give it "
            "too"
        )


def check_told(path: Path, um_per_pixel: float, known: Stated, who: str = "the file says") -> None:
    """Refuse a scale that a user gives against what is known."""
    if known.contradicts(um_per_pixel):
        sides = dict.fromkeys(f"{side:.4g}" for side in (known.x, known.y))
        usual = "leave that out" if known.um_per_pixel else "resample the image"
        raise InputError(
            f"{path}: {who} {' x '.join(sides)} µm per pixel, not `um_per_pixel={um_per_pixel:g}`; "
            f"{usual}, or add `um_per_pixel_override=True` if it is meant"
        )


def slide_of(section: AnnData) -> Slide:
    """Open the image that a section of a cohort belongs to."""
    known = known_facts(section, name_of(section))
    if not known.get("image"):
        raise InputError(
            "the image of a section is not known; `strank.embed(sections, image=...)` keeps it, or "
            "give the file of the image itself"
        )
    return open_slide(Path(str(known["image"])), float(known["um_per_pixel"]))


def check_image(slide: Slide) -> None:
    """Read the end of every level, so that a truncated file is found now."""
    # All of one level, which is needed soon: of a plain image the last pixel costs as much.
    _overview(slide)
    read, _ = _level(slide, _shared_shrink(slide))
    for level, (width, height) in enumerate(slide.source.sizes):
        if level != read:
            slide.source.read(level, width - 1, height - 1, 1, 1)


def read_field(
    slide: Slide, centres: NDArray[np.float64], *, um: float, pixels: int
) -> NDArray[np.uint8]:
    """Cut square windows of ``um`` around spots (x, y in full pixels), resampled to ``pixels``.

    ``uint8``, ``[n_spots, pixels, pixels, 3]``; white where a window leaves the image.
    """
    # From the coarsest level that is fine enough; by area where it shrinks.
    level, shrink = _level(slide, um / slide.um_per_pixel / pixels)
    side = um / slide.um_per_pixel / shrink
    halvings = max(0, math.floor(math.log2(side / pixels)))
    side = max(1, round(side / 2**halvings)) << halvings
    corners = np.floor(centres / shrink - side / 2 + 0.5).astype(int)
    out = np.full((len(centres), pixels, pixels, 3), 255, np.uint8)
    method = cv2.INTER_AREA if side >> halvings > pixels else cv2.INTER_LINEAR

    def cut(i: int) -> None:
        x, y = corners[i]
        window = _window(slide.source, level, x, y, side, side)
        for halved in range(1, halvings + 1):
            # The mean of four pixels is fast, that of any other share of them slow.
            size = side >> halved, side >> halved
            window = np.asarray(cv2.resize(window, size, interpolation=cv2.INTER_AREA))
        cv2.resize(window, (pixels, pixels), dst=out[i], interpolation=method)

    list(_readers().map(cut, range(len(centres))))
    return out


def read_region(slide: Slide, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
    """RGB ``[height, width, 3]`` of a window at full resolution; white outside the image."""
    return _window(slide.source, 0, x, y, width, height)


def thumbnail(slide: Slide, um_per_pixel: float) -> tuple[NDArray[np.uint8], float]:
    """Shrink a slide to about ``um_per_pixel``; return it with the scale that came out."""
    wanted = max(1.0, um_per_pixel / slide.um_per_pixel)
    common = _shared_shrink(slide)
    # A coarser level of its own is smaller still.
    shared = wanted >= common and _level(slide, wanted) == _level(slide, common)
    found, covered = _overview(slide) if shared else _shrunken(slide, wanted)
    width, height = (max(1, round(n / wanted)) for n in slide.size)
    # Where one side grew, OpenCV would take no means of the other.
    scale = {"fx": min(1.0, width / covered[0]), "fy": min(1.0, height / covered[1])}
    small = cv2.resize(found, None, **scale, interpolation=cv2.INTER_AREA)
    # A last square that was cut may be there, or not.
    lacking = max(0, height - small.shape[0]), max(0, width - small.shape[1])
    small = cv2.copyMakeBorder(small, 0, lacking[0], 0, lacking[1], cv2.BORDER_REPLICATE)
    small = np.ascontiguousarray(small[:height, :width])
    return small.astype(np.uint8, copy=False), slide.um_per_pixel * slide.size[0] / width


def picture_um(slide: Slide) -> float:
    """Size of a pixel, in µm, of a picture of a slide that is looked at."""
    return max(_FINE_UM, max(slide.size) * slide.um_per_pixel / _SEEN_PIXELS)


def picture_for(slide: Slide, mark_um: float) -> dict[str, Any]:
    """Make what scanpy and squidpy draw marks over: of a section its ``uns["spatial"]``."""
    longest = max(slide.size)
    # Never finer than the overview, which was read by then.
    picture, _ = thumbnail(slide, max(_FINE_UM, longest * slide.um_per_pixel / _KEPT_PIXELS))
    return {
        "images": {"hires": picture},
        "scalefactors": {
            "tissue_hires_scalef": max(picture.shape) / longest,
            "spot_diameter_fullres": mark_um / slide.um_per_pixel,
            "microns_per_pixel": slide.um_per_pixel,
        },
        "metadata": {"source_image_path": str(slide.path.resolve())},
    }


def _shared_shrink(slide: Slide) -> float:
    """Tell how many times `_overview` may be shrunk: as the finest of what is made of it."""
    return max(1.0, min(MASK_UM, picture_um(slide)) / slide.um_per_pixel)


# A slide is asked several times in a row.
@lru_cache(maxsize=1)
def _overview(slide: Slide) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    return _shrunken(slide, _shared_shrink(slide))


def _shrunken(slide: Slide, wanted: float) -> tuple[NDArray[np.uint8], tuple[float, float]]:
    """Read a slide, shrunk at most so many times, and how many of its pixels the slide covers."""
    level, shrink = _level(slide, wanted)
    width, height = slide.source.sizes[level]
    # No more than memory wants, since squares do not lie on the pixels of what is made of them.
    step, most = 1, min(wanted / shrink / _MARGIN, width, height)
    while width * height > _MOST_PIXELS * step**2 and 2 * step <= most:
        step *= 2
    return slide.source.shrunk(level, step), (width / step, height / step)


def _level(slide: Slide, wanted: float) -> tuple[int, float]:
    """Find the coarsest level that is not coarser than ``wanted`` times the full resolution."""
    shrinks = [slide.size[0] / width for width, _ in slide.source.sizes]
    level = max(i for i, shrink in enumerate(shrinks) if i == 0 or shrink <= wanted * 1.001)
    return level, shrinks[level]


@cache
def _readers() -> ThreadPoolExecutor:
    """Threads that read; always the same, since libvips keeps buffers for each that ever did."""
    return ThreadPoolExecutor(thread_name_prefix="read")


# Threads do not follow into a forked process; Windows has none.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_readers.cache_clear)


def _window(
    source: Pixels, level: int, x: int, y: int, width: int, height: int
) -> NDArray[np.uint8]:
    level_width, level_height = source.sizes[level]
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, level_width), min(y + height, level_height)
    if left >= right or top >= bottom:
        return np.full((height, width, 3), 255, np.uint8)
    inside = source.read(level, int(left), int(top), int(right - left), int(bottom - top))
    if inside.shape[:2] == (height, width):
        return inside
    window = np.full((height, width, 3), 255, np.uint8)
    window[top - y : bottom - y, left - x : right - x] = inside
    return window
