"""Where pixels come from: an array, a slide that openslide reads, or any other image by libvips.

Each source gives windows of one of its levels, or all of it shrunken, and holds no more than its
library's small cache. Of plain images without tiles, windows are read from a temporary file, to
which they are decoded once and which libvips unlinks.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.errors import InputError
from strank.slides.scale import Stated, stated_by_scanner, stated_by_tags
from strank.slides.tiff import Layout, TiffPart, damaged, tiff_layout

if TYPE_CHECKING:
    import openslide
    import pyvips

Size = tuple[int, int]

# Of libvips' loaders, those that are used. Others draw what a file describes (SVG, PDF), run other
# programs (ImageMagick), or take an image of any size into memory.
_LOADERS = re.compile(r"VipsForeignLoad(Jpeg|Png|Tiff|Nsgif)File")
_UNTILED = re.compile(r"(jpeg|png|gif)load")
# A progressive JPEG is held whole, as numbers of two bytes.
_MOST_HELD = 100_000_000
_MOST_UNTILED = 5_000_000_000
# Bytes of tiles after which a level is opened anew.
_MOST_DECODED = 256_000_000
_BOMB_PIXELS, _BOMB_RATIO = 500_000_000, 1000
# Of a level that is shrunken, 3 bytes a pixel are held; of a JPEG, libjpeg shrinks so far.
_STRIP_PIXELS = 16_000_000
_JPEG_STEP = 8
_EXPORT = "export the slide as OME-TIFF (QuPath, bfconvert)"


class Pixels(Protocol):
    """A pyramid of RGB images, of which windows are read."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Width and height of every level, full resolution first."""

    @property
    def stated(self) -> Stated:
        """µm per pixel of the full resolution as the file says it."""

    @property
    def orientation(self) -> int:
        """How the file says to show it, as EXIF numbers turns and mirrors; read as stored, 1."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """RGB ``[height, width, 3]`` of a window that lies inside the level."""

    def shrunk(self, level: int, step: int) -> NDArray[np.uint8]:
        """RGB of a whole level by squares of ``step`` pixels, a power of two; the last may lack."""


class ArrayPixels:
    """An image in memory: RGB, uint8 ``[height, width, 3]``."""

    stated, orientation = Stated(), 1

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array
        self.sizes: tuple[Size, ...] = ((array.shape[1], array.shape[0]),)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Cut the window, without a copy."""
        return self.array[y : y + height, x : x + width]

    def shrunk(self, level: int, step: int) -> NDArray[np.uint8]:
        """Take means of squares; without a copy of single pixels."""
        return _by_strips(self, level, step)


def _by_strips(source: Pixels, level: int, step: int) -> NDArray[np.uint8]:
    """Read and shrink a level strip by strip, so that little of it is held."""
    width, height = (side // step for side in source.sizes[level])
    rows = max(1, _STRIP_PIXELS // (step * step * width))
    if step == 1 and rows >= height:
        return source.read(level, 0, 0, width, height)
    out = np.empty((height, width, 3), np.uint8)
    for y in range(0, height, rows):
        part = out[y : y + rows]
        strip = source.read(level, 0, step * y, step * width, step * len(part))
        part[:] = cv2.resize(strip, (width, len(part)), interpolation=cv2.INTER_AREA)
    return out


def open_pixels(path: Path) -> Pixels:
    """Open an image lazily: nothing but its header is read."""
    import openslide

    if not path.is_file():
        raise InputError(f"{path}: no such image")
    _check_parts(path)
    try:
        # Tiles of a TIFF that no scanner's program wrote, libvips reads four times as fast; and of
        # OME-TIFF openslide knows neither the scale nor the levels.
        scanner = openslide.OpenSlide.detect_format(path)
        if scanner not in (None, "generic-tiff"):
            return _OpenSlidePixels(path)
        pixels = _VipsPixels(path)
        if not pixels.sparse:
            return pixels
        # libvips refuses tiles that were never written, or takes them for black.
        sparse = None if scanner is None else _OpenSlidePixels(path, pixels.stated)
    except openslide.OpenSlideError as error:
        raise damaged(path, error) from error
    if sparse is None or sparse.sizes[0] != pixels.sizes[0]:
        raise InputError(
            f"{path}: the file is whole, but tiles that were not scanned were not written "
            "(sparse), and neither libvips nor openslide reads that; export it anew (QuPath)"
        )
    return sparse


class _OpenSlidePixels:
    orientation = 1

    def __init__(self, path: Path, stated: Stated | None = None) -> None:
        self.path, self._stated = path, stated
        self.sizes: tuple[Size, ...] = self._slide.level_dimensions

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._stated)

    @cached_property
    def _slide(self) -> openslide.OpenSlide:
        import openslide

        return openslide.OpenSlide(self.path)

    @property
    def stated(self) -> Stated:
        if self._stated is not None:
            return self._stated
        known = self._slide.properties
        sides = [known.get(f"openslide.mpp-{axis}") for axis in "xy"]
        return stated_by_scanner(known.get("openslide.vendor", "unknown"), *sides)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        import openslide

        # openslide wants the corner in pixels of the full resolution.
        shrink = np.divide(self.sizes[0], self.sizes[level])
        left, top = np.ceil(np.array([x, y]) * shrink - 1e-6).astype(int).tolist()
        try:
            region = self._slide.read_region((left, top), level, (width, height))
        except openslide.OpenSlideError as error:
            # An openslide handle that failed once fails for ever.
            del self._slide
            raise damaged(self.path, error) from error
        rgba = np.asarray(region)
        # What was not scanned is transparent.
        return np.where(rgba[..., 3:] == 0, np.uint8(255), rgba[..., :3])

    def shrunk(self, level: int, step: int) -> NDArray[np.uint8]:
        return _by_strips(self, level, step)


class _VipsPixels:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: tuple[Size, ...] = tuple(level.size for level in self._levels)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    @cached_property
    def _levels(self) -> list[_VipsLevel]:
        layout = self._layout
        with _explained(self.path):
            return [_VipsLevel(self.path, parts) for parts in layout.levels]

    @cached_property
    def _layout(self) -> Layout:
        with _explained(self.path):
            first = _open(self.path)
            _check_size(self.path, first)
            if not first.get("vips-loader").startswith("tiff"):
                why = "JPEG and PNG say at best how large they are printed"
                return Layout([[{}]], Stated(why=why), orientation=_orientation(first))
            layout = tiff_layout(self.path)
            full = _open(self.path, **layout.levels[0][0])
            _check_size(self.path, full)
            unit = "resolution-unit" in full.get_fields()
            tags = stated_by_tags((full.xres, full.yres), unit, layout.description)
            stated = layout.stated.or_else(tags)
            return replace(layout, stated=stated, orientation=_orientation(full))

    @property
    def stated(self) -> Stated:
        return self._layout.stated

    @property
    def sparse(self) -> bool:
        return self._layout.sparse

    @property
    def orientation(self) -> int:
        return self._layout.orientation

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        with _explained(self.path):
            return self._levels[level].read(x, y, width, height)

    def shrunk(self, level: int, step: int) -> NDArray[np.uint8]:
        with _explained(self.path):
            return self._levels[level].shrunk(step)


class _VipsLevel:
    """One level, opened anew from time to time: libvips keeps up to a thousand of its tiles."""

    def __init__(self, path: Path, parts: list[TiffPart]) -> None:
        self.path, self.parts = path, parts
        self._image = _rgb(path, parts)
        self._tile = [_number(self._image, f"tile-{side}") for side in ("width", "height")]
        self._decoded = 0

    @property
    def size(self) -> Size:
        return self._image.width, self._image.height

    def read(self, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        import pyvips

        # Images are shared between threads, regions are not.
        window = pyvips.Region.new(self._image).fetch(x, y, width, height)
        if all(self._tile):
            across, down = self._tile
            self._decoded += 3 * (width + 2 * across) * (height + 2 * down)
            if self._decoded > _MOST_DECODED:
                self._decoded = 0
                self._image = _rgb(self.path, self.parts)
        return np.frombuffer(window, np.uint8).reshape(height, width, 3)

    def shrunk(self, step: int) -> NDArray[np.uint8]:
        """Read it once, from its first row to its last: nothing is held, nor put on the disk."""
        import pyvips

        on_load = 1
        options: TiffPart = {"access": "sequential"}
        if self._image.get("vips-loader").startswith("jpeg"):
            on_load = min(step, _JPEG_STEP)
            options["shrink"] = on_load
        image = _rgb(self.path, [part | options for part in self.parts])
        if (rest := step // on_load) > 1:
            image = image.shrink(rest, rest, ceil=True)
        # By this thread: those of libvips are no more in a process that was forked.
        region, out = pyvips.Region.new(image), np.empty((image.height, image.width, 3), np.uint8)
        rows = max(1, _STRIP_PIXELS // (step * step * image.width))
        for y in range(0, image.height, rows):
            part = out[y : y + rows]
            window = region.fetch(0, y, image.width, len(part))
            part[:] = np.frombuffer(window, np.uint8).reshape(part.shape)
        return out


def _open(path: Path, **options: int | str) -> pyvips.Image:
    """Open an image by a loader that is allowed, whatever its name says."""
    import pyvips

    # Else libvips may answer with what stood in the file before, and with all that it cached.
    given = {"fail_on": "error", "revalidate": True} | options
    found = pyvips.vips_lib.vips_foreign_find_load(os.fsencode(path))
    loader = "" if found == pyvips.ffi.NULL else pyvips.ffi.string(found).decode()
    if not _LOADERS.fullmatch(loader):
        pyvips.vips_lib.vips_error_clear()
        raise _no_image(path)
    return pyvips.Operation.call(loader, str(path), **given)


def _orientation(image: pyvips.Image) -> int:
    return _number(image, "orientation") or 1


def _number(image: pyvips.Image, field: str) -> int:
    return int(image.get(field)) if field in image.get_fields() else 0


def _rgb(path: Path, parts: list[TiffPart]) -> pyvips.Image:
    """One level in RGB; its channels may be pages of their own."""
    image, *others = (_open(path, **part) for part in parts)
    if image.format != "uchar":
        raise InputError(
            f"{path}: not an image of 8 bits a colour ({image.format}); export it as RGB of 8 bits "
            "(QuPath, ImageJ)"
        )
    if image.interpretation not in ("srgb", "rgb", "b-w"):
        raise _no_colours(path, image.interpretation)
    if others:
        return image.bandjoin(others).copy(interpretation="srgb")
    if image.interpretation != "srgb":
        image = image.colourspace("srgb")
    # What is transparent is glass, whatever colour lies below.
    return image.flatten(background=[255, 255, 255]) if image.hasalpha() else image


def _no_image(path: Path) -> InputError:
    return InputError(
        f"{path}: not an image that can be read (whole-slide formats of openslide, TIFF, JPEG, "
        f"PNG); {_EXPORT}"
    )


def _no_colours(path: Path, space: str) -> InputError:
    return InputError(
        f"{path}: has the colours of print or of a measurement ({space}), and what they are in RGB "
        "is a choice; export it as RGB (QuPath, ImageJ)"
    )


def _check_size(path: Path, image: pyvips.Image) -> None:
    """Refuse what would fill the disk when it is decoded."""
    n_pixels = image.width * image.height
    size = f"{path}: {image.width} x {image.height} px"
    if n_pixels > _BOMB_PIXELS and 3 * n_pixels > _BOMB_RATIO * path.stat().st_size:
        raise InputError(
            f"{size} in a file of {path.stat().st_size / 1e6:.3g} MB are no picture of tissue "
            "(a decompression bomb?)"
        )
    if not _UNTILED.match(image.get("vips-loader")):
        return
    if n_pixels > _MOST_HELD and _number(image, "interlaced"):
        raise InputError(
            f"{size} that are progressive or interlaced are held in memory whole; save it plainly"
        )
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if n_pixels > _MOST_UNTILED or 3 * n_pixels > free:
        raise InputError(
            f"{size} without tiles take {3 * n_pixels / 1e9:.0f} GB of temporary disk "
            f"({free / 1e9:.0f} GB free), at most {3 * _MOST_UNTILED / 1e9:.0f}; convert it: "
            "vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --bigtiff"
        )


def _check_parts(path: Path) -> None:
    """Refuse what is only the head of a slide, whose pixels lie in a folder beside it."""
    suffix, stem = path.suffix.lower(), path.with_suffix("")
    if suffix == ".vsi":
        folder = path.with_name(f"_{path.stem}_")
        why = "which strank does not read" if folder.is_dir() else "which is missing"
        raise InputError(
            f"{path}: an Olympus .vsi holds an overview only; its pixels lie in the folder "
            f"{folder}, {why}; {_EXPORT}"
        )
    if suffix == ".mrxs" and not (stem / "Slidedat.ini").is_file():
        what = "Slidedat.ini in the folder" if stem.is_dir() else "the folder"
        raise InputError(
            f"{path}: the pixels of an .mrxs lie in a folder of its name beside it, and {what} "
            f"{stem} is missing; copy it whole"
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    import pyvips

    try:
        yield
    except pyvips.Error as error:
        reason = " ".join(str(error).split())
        if found := re.search(
            r"(\w+) compression support is not|scheme (\d+) .*not impl|built without (\w+)", reason
        ):
            codec = next(filter(None, found.groups()))
            raise InputError(
                f"{path}: its tiles are packed in a way that this libvips cannot unpack ({codec}); "
                "export it with JPEG or deflate (QuPath), or install a libvips that can"
            ) from error
        if "labq" in reason:
            raise _no_colours(path, "CIELAB") from error
        if "write failed" in reason:
            raise InputError(
                f"{path}: the temporary disk ({tempfile.gettempdir()}) is full; make room, or "
                "set TMPDIR"
            ) from error
        raise damaged(path, error) from error
