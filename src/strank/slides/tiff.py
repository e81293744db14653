"""Which pages of a TIFF are the slide: its largest image, with the levels and channels of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from strank.errors import InputError, said_by, some
from strank.slides.scale import OmeImage, Stated, ome_images

if TYPE_CHECKING:
    from tifffile import TiffPage

# The share of the largest image from which another may be the slide as well.
_RIVAL = 0.5

# What libvips is to open, a page or one of its sub-images, and which of its errors are fatal.
TiffPart = dict[str, int | str]


@dataclass(frozen=True)
class Layout:
    """The parts of each level, full resolution first: one, or three grey ones that are its RGB."""

    levels: list[list[TiffPart]]
    stated: Stated = field(default_factory=Stated)  # by its OME-XML; the resolution tags come after
    description: str = ""
    sparse: bool = False  # tiles that were not scanned were not written
    orientation: int = 1  # how to show it, as EXIF numbers turns and mirrors


class _Page(NamedTuple):
    part: TiffPart
    width: int
    height: int
    bands: int
    planar_tiles: bool
    odd_samples: bool
    sparse: bool
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
    # Of two of one size, a mask beside the slide say, the coloured one.
    chosen = max(
        range(len(pages)), key=lambda i: (pages[i].width * pages[i].height, pages[i].bands)
    )
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
    image = next((i for i in images if i.size == full.size or len(images) == 1), None)
    same = [page for page in pages if (page.size, page.bands) == (full.size, full.bands)]
    _check_colours(path, full, same, image)
    levels = [_channels(page, pages, inner) for page in (full, *smaller)]
    stated = Stated() if image is None else image.stated
    if image is None and ("<OME" in description or ":OME" in description):
        stated = Stated(why="its OME-XML does not tell of this image")
    sparse = any(page.sparse for page in (full, *smaller))
    return Layout(levels, stated, description, sparse)


def _pages(path: Path) -> tuple[list[_Page], list[list[_Page]], str]:
    """Read all headers: the pages, the sub-images of each, and the first page's description."""
    from tifffile import TiffFile

    # Odd tags are no news for a user; without any handler, errors go to the terminal.
    if not (log := logging.getLogger("tifffile")).handlers:
        log.addHandler(logging.NullHandler())
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
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> InputError:
    """Make the error of a file that a library cannot read to its end."""
    return InputError(
        f"{path}: damaged or truncated image ({said_by(error)}); copy or export it again"
    )


def _page(page: TiffPage, part: TiffPart) -> _Page:
    # libvips takes for a warning, and for black, a tile that it cannot unpack; only of JPEG are
    # there warnings that do no harm.
    if page.compression not in (6, 7):
        part = part | {"fail_on": "warning"}
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
        # Grey with alpha is all that libvips reads right.
        page.photometric in (0, 1)
        and (bands > 2 or (bands == 2 and (page.planarconfig == 2 or 0 in page.extrasamples))),
        page.is_tiled and 0 in page.databytecounts,
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


def _check_colours(path: Path, full: _Page, same: list[_Page], image: OmeImage | None) -> None:
    """Refuse pages of one size, and samples, that are not the colours of one image."""
    what = "a stack, or channels of fluorescence?" if image is None else image.other_than_rgb
    if full.odd_samples:
        found = f"{full.bands} samples a pixel that it does not call colours"
    elif len(same) == 1 or (image is not None and not what and (full.bands > 1 or len(same) == 3)):
        return
    else:
        found = f"{len(same)} {'grey ' * (full.bands == 1)}pages of one size ({what or 'no RGB'})"
    raise InputError(
        f"{path}: holds {found}, not one H&E image; give that, and if they are red, green and "
        "blue, export them as RGB (QuPath, ImageJ)"
    )


def _channels(page: _Page, pages: list[_Page], inner: list[list[_Page]]) -> list[TiffPart]:
    """Take grey pages of one size for the colours of one image."""
    if page.bands > 1:
        return [page.part]
    group = [other for other in pages if "subifd" not in page.part and other.size == page.size]
    if "subifd" in page.part:
        group = [sub for subs in inner for sub in subs if sub.size == page.size]
    return [other.part for other in group if other.bands == 1]
