"""Which pages of a TIFF are the slide: its largest image, with the levels and channels of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from strank.errors import InputError, some
from strank.slides.scale import OmeImage, Stated, ome_images

if TYPE_CHECKING:
    from tifffile import TiffPage

# The share of the largest image from which another may be the slide as well.
_RIVAL = 0.5

TiffPart = dict[str, int]  # what libvips is to open: a page, or one of its sub-images


@dataclass(frozen=True)
class Layout:
    """The parts of each level, full resolution first: one, or three grey ones that are its RGB."""

    levels: list[list[TiffPart]]
    stated: Stated | None = None  # None: the resolution tags say it
    description: str = ""


class _Page(NamedTuple):
    part: TiffPart
    width: int
    height: int
    bands: int
    planar_tiles: bool
    end: int  # of its pixels in the file

    @property
    def size(self) -> tuple[int, int]:
        return self.width, self.height

    def is_level_of(self, full: _Page) -> bool:
        """Whether it is the full image, smaller; pages may also be channels, or a label."""
        shrink = full.width / self.width
        return shrink > 1 and abs(full.height / self.height / shrink - 1) < 0.01


def tiff_layout(path: Path) -> Layout:
    """Find the slide in a TIFF; a file that ends before its pixels do is refused."""
    pages, inner, description = _pages(path)
    _check_whole(path, [page for group in (pages, *inner) for page in group])
    chosen = max(range(len(pages)), key=lambda i: pages[i].width * pages[i].height)
    full = pages[chosen]
    images = ome_images(description) if "OME" in description else []
    others = {image.size for image in images} - {full.size}
    smaller = [
        page
        for page in inner[chosen] or pages
        if page.is_level_of(full) and (inner[chosen] or page.size not in others)
    ]
    smaller = sorted(
        {page.size: page for page in reversed(smaller)}.values(),
        reverse=True,
        key=lambda page: page.width,
    )
    _check_alone(path, pages, images, full)
    if any(page.planar_tiles for page in (full, *smaller)):
        raise InputError(
            f"{path}: the file is whole, but its tiles hold one colour each (planar), which "
            "libvips does not read; convert it with `tiffcp -p contig -t IN OUT.tif` (libtiff), or "
            "export it as RGB OME-TIFF (QuPath)"
        )
    levels = [_channels(page, pages, inner) for page in (full, *smaller)]
    return Layout(levels, _ome_stated(description, images, full), description)


def _pages(path: Path) -> tuple[list[_Page], list[list[_Page]], str]:
    """Read all headers: the pages, the sub-images of each, and the first page's description."""
    from tifffile import TiffFile

    try:
        with TiffFile(path) as file:
            pages = [page.aspage() for page in file.pages]
            inner = [[sub.aspage() for sub in page.pages or []] for page in pages]
            return (
                [_page(page, {"page": i}) for i, page in enumerate(pages)],
                [
                    [_page(sub, {"page": i, "subifd": j}) for j, sub in enumerate(subs)]
                    for i, subs in enumerate(inner)
                ],
                pages[0].description,
            )
    except Exception as error:  # Damaged headers raise anything.
        raise InputError(f"{path}: damaged or truncated image ({error})") from error


def _page(page: TiffPage, part: TiffPart) -> _Page:
    places = zip(page.dataoffsets, page.databytecounts, strict=True)
    bands = int(page.samplesperpixel)
    if min(page.imagewidth, page.imagelength) < 1:
        raise ValueError("a page without pixels")
    return _Page(
        part,
        int(page.imagewidth),
        int(page.imagelength),
        bands,
        page.is_tiled and bands > 1 and page.planarconfig == 2,
        max((offset + n for offset, n in places), default=0),
    )


def _check_whole(path: Path, pages: list[_Page]) -> None:
    """Refuse a TIFF that ends before its pixels do: libvips would take those for black."""
    if (end := max(page.end for page in pages)) > (size := path.stat().st_size):
        raise InputError(f"{path}: truncated image ({size:,} bytes of at least {end:,})")


def _check_alone(path: Path, pages: list[_Page], images: list[OmeImage], full: _Page) -> None:
    """Refuse a file with several images that may be the slide."""
    least = _RIVAL * full.width * full.height
    large = [image.name for image in images if image.size[0] * image.size[1] >= least]
    if len(large) > 1:
        raise InputError(
            f"{path}: holds several images that may be the slide ({some(large, 10)}); keep one: "
            "`bfconvert -series NUMBER IN OUT.ome.tif`, or export it (QuPath)"
        )
    rivals = [
        page.part["page"]
        for page in pages
        if page.bands == full.bands >= 3
        and page.width * page.height >= least
        and not page.is_level_of(full)
    ]
    if not images and len(rivals) > 1:
        raise InputError(
            f"{path}: holds several images that may be the slide (pages {some(rivals, 10)}); keep "
            "one: vips tiffsave IN[page=NUMBER] OUT.tif --tile --pyramid --bigtiff"
        )


def _channels(page: _Page, pages: list[_Page], inner: list[list[_Page]]) -> list[TiffPart]:
    """Take three grey pages of one size for the colours of one image."""
    if page.bands > 1:
        return [page.part]
    group = [other for other in pages if "subifd" not in page.part and other.size == page.size]
    if "subifd" in page.part:
        group = [sub for subs in inner for sub in subs if sub.size == page.size]
    group = [other for other in group if other.bands == 1]
    return [other.part for other in group] if len(group) == 3 else [page.part]


def _ome_stated(description: str, images: list[OmeImage], full: _Page) -> Stated | None:
    if "<OME" not in description and ":OME" not in description:
        return None
    for image in images:
        if image.size == full.size or len(images) == 1:
            return image.stated
    return Stated(why="its OME-XML does not tell of this image")
