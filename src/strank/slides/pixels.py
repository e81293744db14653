"""Where pixels come from: an array, a slide that openslide reads, or any other image by libvips.

Each source gives windows of one of its levels, and holds no more than its library's small cache.
Plain images without tiles are decoded once to a temporary file, which libvips unlinks.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from strank.errors import InputError

if TYPE_CHECKING:
    import openslide
    import pyvips

Size = tuple[int, int]

_UNTILED = re.compile(r"(jpeg|png|webp|gif|heif|jp2k)load")
_MOST_UNTILED = 5_000_000_000
# Bytes of tiles after which a level is opened anew.
_MOST_DECODED = 256_000_000
_BOMB_PIXELS, _BOMB_RATIO = 500_000_000, 1000
# Outside, a TIFF's resolution is that of a printer or a default of the program that wrote it.
_PLAUSIBLE_UM = (0.05, 10.0)
_OME_UM = {"": 1.0, "µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}


class Pixels(Protocol):
    """A pyramid of RGB images, of which windows are read."""

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Width and height of every level, full resolution first."""

    @property
    def um_per_pixel(self) -> float | None:
        """Of the full resolution, where the file says it."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """RGB ``[height, width, 3]`` of a window that lies inside the level."""


class ArrayPixels:
    """An image in memory: RGB, uint8 ``[height, width, 3]``."""

    um_per_pixel = None

    def __init__(self, array: NDArray[np.uint8]) -> None:
        self.array = array
        self.sizes: tuple[Size, ...] = ((array.shape[1], array.shape[0]),)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Cut the window, without a copy."""
        return self.array[y : y + height, x : x + width]


def open_pixels(path: Path) -> Pixels:
    """Open an image lazily: nothing but its header is read."""
    import openslide

    if not path.is_file():
        raise InputError(f"{path}: no such image")
    try:
        # Tiles of a TIFF that no scanner's program wrote, libvips reads four times as fast; and of
        # OME-TIFF openslide knows neither the scale nor the levels.
        if openslide.OpenSlide.detect_format(path) not in (None, "generic-tiff"):
            return _OpenSlidePixels(path)
    except openslide.OpenSlideError as error:
        raise InputError(f"{path}: damaged or truncated image ({error})") from error
    return _VipsPixels(path)


class _OpenSlidePixels:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: tuple[Size, ...] = self._slide.level_dimensions

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    @cached_property
    def _slide(self) -> openslide.OpenSlide:
        import openslide

        return openslide.OpenSlide(self.path)

    @property
    def um_per_pixel(self) -> float | None:
        stored = [self._slide.properties.get(f"openslide.mpp-{axis}") for axis in "xy"]
        return _plausible(*(float(value or "nan") for value in stored))

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
            raise InputError(f"{self.path}: damaged or truncated image ({error})") from error
        rgba = np.asarray(region)
        # What was not scanned is transparent.
        return np.where(rgba[..., 3:] == 0, np.uint8(255), rgba[..., :3])


class _VipsPixels:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.sizes: tuple[Size, ...] = tuple(level.size for level in self._levels)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    @cached_property
    def _levels(self) -> list[_VipsLevel]:
        with _explained(self.path):
            full = _open(self.path)
            _check_size(self.path, full)
            if full.get("vips-loader").startswith("tiff"):
                _check_whole(self.path)
            parts = [{"subifd": i} for i in range(_number(full, "n-subifds"))]
            parts = parts or [{"page": i} for i in range(1, _number(full, "n-pages"))]
            smaller = [part for part in parts if _is_level(_open(self.path, **part), full)]
            return [_VipsLevel(self.path, part) for part in ({}, *smaller)]

    @property
    def um_per_pixel(self) -> float | None:
        full = _open(self.path)
        if not full.get("vips-loader").startswith("tiff"):
            return None  # JPEG and PNG say at best how large they are printed
        text = _description(full)
        if "<OME" in text:
            return _plausible(*(_ome_um(text, axis) for axis in "XY"))
        return _plausible(1e3 / full.xres, 1e3 / full.yres)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        with _explained(self.path):
            return self._levels[level].read(x, y, width, height)


class _VipsLevel:
    """One level, opened anew from time to time: libvips keeps up to a thousand of its tiles."""

    def __init__(self, path: Path, part: Mapping[str, int]) -> None:
        self.path, self.part = path, part
        self._image = _rgb(path, part)
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
                self._image = _rgb(self.path, self.part)
        return np.frombuffer(window, np.uint8).reshape(height, width, 3)


def _open(path: Path, **options: int) -> pyvips.Image:
    import pyvips

    # Else libvips may answer with what stood in the file before, and with all that it cached.
    return pyvips.Image.new_from_file(str(path), fail_on="error", revalidate=True, **options)


def _number(image: pyvips.Image, field: str) -> int:
    return int(image.get(field)) if field in image.get_fields() else 0


def _is_level(image: pyvips.Image, full: pyvips.Image) -> bool:
    """Whether it is the full image, smaller; pages may also be channels, or the slide's label."""
    shrink = full.width / image.width
    return shrink > 1 and abs(full.height / image.height / shrink - 1) < 0.01


def _rgb(path: Path, part: Mapping[str, int]) -> pyvips.Image:
    """One level in RGB; its channels may be pages of their own."""
    image = _open(path, **part)
    if image.format != "uchar":
        raise InputError(f"{path}: not an image of 8 bits a colour; convert it")
    if image.bands == 1 and _number(image, "n-pages") == 3:
        image = image.bandjoin([_open(path, page=page, **part) for page in (1, 2)])
        return image.copy(interpretation="srgb")
    if image.interpretation != "srgb":
        image = image.colourspace("srgb")
    return image.extract_band(0, n=3) if image.bands > 3 else image


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
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if n_pixels > _MOST_UNTILED or 3 * n_pixels > free:
        raise InputError(
            f"{size} without tiles take {3 * n_pixels / 1e9:.0f} GB of temporary disk "
            f"({free / 1e9:.0f} GB free), at most {3 * _MOST_UNTILED / 1e9:.0f}; convert it: "
            "vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --bigtiff"
        )


def _check_whole(path: Path) -> None:
    """Refuse a TIFF that ends before its pixels do: libvips would take those for black."""
    from tifffile import TiffFile, TiffFileError

    try:
        with TiffFile(path) as file:
            first = file.pages[0].aspage()
            levels = [page.aspage() for page in [*file.pages, *(first.pages or [])]]
            ends = [
                o + n for p in levels for o, n in zip(p.dataoffsets, p.databytecounts, strict=True)
            ]
    except (TiffFileError, ValueError, IndexError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated image ({error})") from error
    if (end := max(ends, default=0)) > (size := path.stat().st_size):
        raise InputError(f"{path}: truncated image ({size:,} bytes of at least {end:,})")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    import pyvips

    try:
        yield
    except pyvips.Error as error:
        reason = " ".join(str(error).split())
        if "not a known file format" in reason:
            raise InputError(
                f"{path}: not an image that can be read (whole-slide formats, TIFF, JPEG, PNG)"
            ) from error
        if "write failed" in reason:
            raise InputError(
                f"{path}: the temporary disk ({tempfile.gettempdir()}) is full; make room, or "
                "set TMPDIR"
            ) from error
        raise InputError(f"{path}: damaged or truncated image ({reason})") from error


def _description(image: pyvips.Image) -> str:
    known = "image-description" in image.get_fields()
    return str(image.get("image-description")) if known else ""


def _ome_um(text: str, axis: str) -> float:
    size = re.search(rf'PhysicalSize{axis}="([^"]+)"', text)
    unit = re.search(rf'PhysicalSize{axis}Unit="([^"]*)"', text)
    scale = _OME_UM.get(unit[1] if unit else "", float("nan"))
    return float(size[1]) * scale if size else float("nan")


def _plausible(x: float, y: float) -> float | None:
    """One size of a pixel, if both sides agree and it can be that of a slide."""
    low, high = _PLAUSIBLE_UM
    if not (low <= x <= high and abs(x - y) <= 0.01 * x):
        return None
    return (x * y) ** 0.5
