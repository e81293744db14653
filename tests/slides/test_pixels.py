"""Every kind of file gives the same pixels; what cannot be read, or trusted, is refused."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from strank.errors import InputError
from strank.slides import pixels as module
from strank.slides.slide import (
    Slide,
    check_image,
    open_slide,
    picture_um,
    read_field,
    read_region,
    thumbnail,
)
from strank.slides.tissue import find_tissue, is_dark_field, without_ignored

SIZE = 900, 700
TILES = {"tile": (128, 128), "compression": "deflate", "photometric": "rgb"}
HALF_UM = {"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """Smooth, so that levels of a pyramid are alike where they should be."""
    noise = np.random.default_rng(0).normal(size=(SIZE[1], SIZE[0], 3))
    smooth = cv2.GaussianBlur(noise, (0, 0), 12)
    return (128 + 60 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)


def levels_of(picture: np.ndarray) -> list[np.ndarray]:
    return [
        picture,
        *(cv2.resize(picture, None, fx=f, fy=f, interpolation=cv2.INTER_AREA) for f in (0.5, 0.25)),
    ]


def write_pyramid(path: Path, picture: np.ndarray, **options) -> None:
    """A generic tiled TIFF with one page a level, as HEST's slides are."""
    with tifffile.TiffWriter(path) as file:
        for i, level in enumerate(levels_of(picture)):
            file.write(level, **TILES, **(options if i == 0 else {}), subfiletype=int(i > 0))


def write_ome(path: Path, picture: np.ndarray, axes: str = "YXS", **metadata) -> None:
    """An OME-TIFF whose lower levels are sub-images; ``CYX`` has a page a channel."""
    first, *rest = (np.moveaxis(p, -1, 0) if axes == "CYX" else p for p in levels_of(picture))
    options = TILES if axes == "YXS" else {**TILES, "photometric": "minisblack"}
    with tifffile.TiffWriter(path, ome=True) as file:
        file.write(first, **options, subifds=len(rest), metadata={"axes": axes, **metadata})
        for level in rest:
            file.write(level, **options, subfiletype=1)


def write_svs(path: Path, picture: np.ndarray) -> None:
    """Enough of Aperio's format for openslide to know it."""
    description = "Aperio Image Library v10\r\n900x700 (128x128) Q=70|AppMag = 20|MPP = 0.4990"
    tifffile.imwrite(path, picture, **TILES, description=description, metadata=None)


WRITERS = {
    "plain.png": lambda path, a: Image.fromarray(a).save(path),
    "alpha.png": lambda path, a: Image.fromarray(a).convert("RGBA").save(path),
    "plain.tif": lambda path, a: Image.fromarray(a).save(path),
    "strips.tif": lambda path, a: tifffile.imwrite(path, a, photometric="rgb", rowsperstrip=64),
    "planar.tif": lambda path, a: tifffile.imwrite(
        path, np.moveaxis(a, -1, 0), photometric="rgb", planarconfig="separate"
    ),
    "tiled.tif": lambda path, a: tifffile.imwrite(path, a, **TILES),
    "big.tif": lambda path, a: tifffile.imwrite(path, a, **TILES, bigtiff=True),
    "pyramid.tif": write_pyramid,
    "slide.svs": write_svs,
    "slide.ome.tif": write_ome,
    "channels.ome.tif": lambda path, a: write_ome(path, a, "CYX"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_lossless_formats_give_the_same_pixels(name, picture, tmp_path):
    WRITERS[name](tmp_path / name, picture)
    slide = open_slide(tmp_path / name, 0.5)
    assert slide.size == SIZE
    np.testing.assert_array_equal(read_region(slide, 0, 0, *SIZE), picture)
    np.testing.assert_array_equal(read_region(slide, 301, 207, 90, 41), picture[207:248, 301:391])
    check_image(slide)


@pytest.mark.parametrize("name", ["pyramid.tif", "slide.ome.tif", "channels.ome.tif"])
def test_windows_of_lower_levels_are_where_they_should_be(name, picture, tmp_path):
    WRITERS[name](tmp_path / name, picture)
    WRITERS["tiled.tif"](tmp_path / "one.tif", picture)
    many, one = open_slide(tmp_path / name, 0.5), open_slide(tmp_path / "one.tif", 0.5)
    assert len(many.source.sizes) == 3
    assert len(one.source.sizes) == 1
    centres = np.random.default_rng(1).uniform(-20, 720, (25, 2))
    for um in (32.0, 70.0, 150.0):  # 1, 2.2 and 4.7 pixels of the image in one of the field
        fields = [read_field(s, centres, um=um, pixels=64).astype(float) for s in (many, one)]
        # Corners are whole pixels of a level: at most two pixels of the full image away.
        assert np.abs(fields[0] - fields[1]).mean() < 5
        assert np.corrcoef(fields[0].ravel(), fields[1].ravel())[0, 1] > 0.99
    smalls = [thumbnail(s, 2.0) for s in (many, one)]
    assert smalls[0][1] == smalls[1][1]
    assert np.abs(smalls[0][0].astype(int) - smalls[1][0]).max() <= 3


def test_grey_becomes_rgb(picture, tmp_path):
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.png")
    region = read_region(open_slide(tmp_path / "grey.png", 0.5), 0, 0, *SIZE)
    grey = np.asarray(Image.open(tmp_path / "grey.png"))
    np.testing.assert_array_equal(region, np.stack([grey] * 3, axis=-1))


def test_jpeg_as_pillow_decodes_it(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "a.jpg", quality=90)
    region = read_region(open_slide(tmp_path / "a.jpg", 0.5), 0, 0, *SIZE)
    np.testing.assert_array_equal(region, np.asarray(Image.open(tmp_path / "a.jpg")))


def test_content_counts_not_the_suffix(picture, tmp_path):
    Image.fromarray(picture).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert open_slide(tmp_path / "a.jpg", 0.5).size == SIZE


@pytest.mark.parametrize("name", ["plain.png", "tiled.tif", "pyramid.tif", "slide.ome.tif"])
def test_a_file_that_was_written_anew_is_read_anew(name, picture, tmp_path):
    for shown in (picture, 255 - picture, picture[::-1].copy()):
        WRITERS[name](tmp_path / name, shown)
        slide = open_slide(tmp_path / name, 0.5)
        np.testing.assert_array_equal(read_region(slide, 0, 0, *SIZE), shown)
        np.testing.assert_array_equal(thumbnail(slide, 0.5)[0], shown)


def test_other_threads_and_processes(picture, tmp_path):
    for name in ("slide.svs", "slide.ome.tif"):
        WRITERS[name](tmp_path / name, picture)
        slide = open_slide(tmp_path / name, 0.5)
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda x, s=slide: read_region(s, x, 0, 50, 700), range(850)))
        for x, part in enumerate(parts):
            np.testing.assert_array_equal(part, picture[:, x : x + 50])
        again: Slide = pickle.loads(pickle.dumps(slide))
        np.testing.assert_array_equal(read_region(again, 0, 0, *SIZE), picture)


def test_the_scale_that_the_file_says(picture, tmp_path):
    write_pyramid(tmp_path / "a.tif", picture, **HALF_UM)
    write_ome(tmp_path / "b.ome.tif", picture, PhysicalSizeX=0.2125, PhysicalSizeY=0.2125)
    nm = {"PhysicalSizeX": 274.0, "PhysicalSizeXUnit": "nm"}
    nm |= {"PhysicalSizeY": 274.0, "PhysicalSizeYUnit": "nm"}
    write_ome(tmp_path / "c.ome.tif", picture, **nm)
    write_svs(tmp_path / "d.svs", picture)
    tifffile.imwrite(tmp_path / "e.tif", picture, photometric="rgb", **HALF_UM)
    names = ["a.tif", "b.ome.tif", "c.ome.tif", "d.svs", "e.tif"]
    found = [open_slide(tmp_path / name).um_per_pixel for name in names]
    assert found == pytest.approx([0.5, 0.2125, 0.274, 0.499, 0.5])
    assert open_slide(tmp_path / "d.svs", 0.25).um_per_pixel == 0.25


def test_a_scale_that_is_absent_or_a_printers_is_asked_for(picture, tmp_path):
    write_ome(tmp_path / "a.ome.tif", picture)
    tifffile.imwrite(tmp_path / "b.tif", picture, photometric="rgb")
    uneven = {"resolution": (20000, 10000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(tmp_path / "c.tif", picture, photometric="rgb", **uneven)
    Image.fromarray(picture).save(tmp_path / "d.jpg", dpi=(25400, 25400))
    Image.fromarray(picture).save(tmp_path / "e.tif", dpi=(72, 72))
    with pytest.raises(InputError, match=r"c.tif: .* 0.5 µm per pixel across and 1 down"):
        open_slide(tmp_path / "c.tif")
    for name in ("a.ome.tif", "b.tif", "d.jpg", "e.tif"):
        with pytest.raises(InputError, match=f"{name}: the file does not say .* `um_per_pixel`"):
            open_slide(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jpg", *WRITERS])
def test_truncated_images_are_refused(name, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    path = tmp_path / name
    WRITERS.get(name, WRITERS["plain.png"])(path, noise)
    # Of a pyramid so much that its full resolution is hit.
    cut = 0.6 if name in ("pyramid.tif", "slide.ome.tif", "channels.ome.tif") else 0.05
    path.write_bytes(path.read_bytes()[: -int(path.stat().st_size * cut)])
    with pytest.raises(InputError, match=f"{name}: (damaged or truncated|truncated|not an image)"):
        check_image(open_slide(path, 1.0))


CODECS = ["lzw", "adobe_deflate", "packbits", "jpeg", "webp", "zstd", "lzma", "jpeg2000", 33003]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("tile", [None, (64, 64)])
def test_what_cannot_be_unpacked_is_never_black(codec, tile, picture, tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture, photometric="rgb", compression=codec, tile=tile)
    told, region = "", picture
    try:
        region = read_region(open_slide(path, 0.5), 0, 0, *SIZE)
    except InputError as error:  # libvips comes with some codecs and without others
        told = str(error)
    assert re.search(r"^$|packed in a way that this libvips cannot unpack \(\w+\)", told)
    assert np.abs(region.astype(int) - picture).mean() < (10 if codec == "jpeg" else 0.5)


@pytest.mark.parametrize("codec", ["lzw", "adobe_deflate", "webp", "jpeg"])
@pytest.mark.parametrize("levels", [1, 2])
def test_a_damaged_tile_is_never_black(codec, levels, picture, tmp_path):
    path = tmp_path / "a.tif"
    options = {"photometric": "rgb", "compression": codec, "tile": (64, 64)}
    with tifffile.TiffWriter(path) as file:
        for level in levels_of(picture)[:levels]:
            file.write(level, **options)
    with tifffile.TiffFile(path) as file:
        page = file.pages[levels - 1]
        start, n_bytes = page.dataoffsets[8], page.databytecounts[8]
    whole = bytearray(path.read_bytes())
    whole[start : start + n_bytes] = bytes([0 if codec == "jpeg" else 254]) * n_bytes
    path.write_bytes(whole)
    slide = open_slide(path, 0.5)
    told = r"a.tif: damaged or truncated image \(.*; copy or export"
    with pytest.raises(InputError, match=told):
        slide.source.read(levels - 1, 0, 0, *slide.source.sizes[levels - 1])
    for step in (1, 2):
        with pytest.raises(InputError, match=told):
            slide.source.shrunk(levels - 1, step)


@pytest.mark.parametrize("kind", ["cielab", "icclab"])
@pytest.mark.parametrize("tile", [None, (128, 128)])
def test_colours_of_a_measurement_are_no_damage(kind, tile, picture, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", picture, photometric=kind, tile=tile)
    with pytest.raises(InputError, match=r"a.tif: has the colours of print or of a "):
        check_image(open_slide(tmp_path / "a.tif", 0.5))


def write_sparse(
    path: Path, picture: np.ndarray, absent: np.ndarray, overview_first=False, **options
):
    """A pyramid whose tiles are not written where ``absent`` [rows, columns] of the first is."""
    with tifffile.TiffWriter(path) as file:
        if overview_first:
            file.write(picture[::8, ::8], photometric="rgb")
        for level, image in enumerate(levels_of(picture)[:2]):
            tiles = []
            for y in range(0, image.shape[0], 128):
                for x in range(0, image.shape[1], 128):
                    gone = absent[y << level >> 7, x << level >> 7] and level == 0
                    tile = np.zeros((128, 128, 3), np.uint8)
                    part = image[y : y + 128, x : x + 128]
                    tile[: part.shape[0], : part.shape[1]] = part
                    tiles.append(None if gone else tile)
            shape = {"shape": image.shape, "dtype": np.uint8, "subfiletype": int(level > 0)}
            given = {**TILES, **(HALF_UM if level == 0 else {}), **shape, **options}
            file.write(iter(tiles), **given)


@pytest.mark.parametrize("codec", [None, "zlib", "lzw", "jpeg"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_tiles_that_were_not_scanned_are_glass(codec, share, picture, tmp_path):
    absent = np.random.default_rng(1).random((6, 8)) < share
    absent[0, 0] = False  # by which tifffile knows the type
    write_sparse(tmp_path / "a.tif", picture, absent, compression=codec)
    slide = open_slide(tmp_path / "a.tif")
    check_image(slide)
    assert slide.um_per_pixel == pytest.approx(0.5)
    assert slide.source.sizes == (SIZE, (450, 350))
    white = np.kron(absent, np.ones((128, 128), bool))[: SIZE[1], : SIZE[0]]
    found = read_region(pickle.loads(pickle.dumps(slide)), 0, 0, *SIZE)
    assert (found[white] == 255).all()
    off = np.abs(found[~white].astype(int) - picture[~white])
    assert off.max() == 0 if codec != "jpeg" else off.mean() < 4
    thumbnail(slide, 2.0)


def test_what_no_library_reads_sparse_is_told(picture, tmp_path):
    absent = np.zeros((6, 8), bool)
    absent[2, 3] = True
    write_sparse(tmp_path / "a.tif", picture, absent, overview_first=True)
    with pytest.raises(InputError, match=r"a.tif: the file is whole, but .* \(sparse\).* export"):
        open_slide(tmp_path / "a.tif", 0.5)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pixels_are_read_as_stored_and_a_turn_is_known(name, orientation, picture, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(picture).save(tmp_path / name, exif=exif)
    slide = open_slide(tmp_path / name, 0.5)
    assert (slide.size, slide.source.orientation) == (SIZE, orientation)


@pytest.mark.parametrize("name", ["a.jpg", "a.tif"])
def test_colours_of_print_are_refused(name, picture, tmp_path):
    Image.fromarray(picture).convert("CMYK").save(tmp_path / name)
    with pytest.raises(InputError, match=r"a\..*: has the colours of print .*cmyk.*; export it as"):
        open_slide(tmp_path / name, 0.5)


def test_a_palette_is_read_as_its_colours(picture, tmp_path):
    reduced = Image.fromarray(picture).quantize(64)
    for name in ("a.png", "a.tif", "a.gif"):
        reduced.save(tmp_path / name)
        region = read_region(open_slide(tmp_path / name, 0.5), 0, 0, *SIZE)
        np.testing.assert_array_equal(region, np.asarray(reduced.convert("RGB")))


def test_reasons_of_other_libraries_are_short(tmp_path):
    tags = [(60000 + i, "s", 0, "odd " * 50, True) for i in range(40)]
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), tile=(64, 64), extratags=tags, **LZW)
    whole = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        start, n_bytes = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    path.write_bytes(whole[:start] + b"\xfe" * n_bytes + whole[start + n_bytes :])
    with pytest.raises(InputError) as caught:
        check_image(open_slide(path, 0.5))
    assert len(str(caught.value)) < 300 + len(str(path))
    assert "\n" not in str(caught.value)


LZW = {"photometric": "rgb", "compression": "lzw"}


def test_other_refusals(tmp_path):
    with pytest.raises(InputError, match=r"none.jpg: no such image"):
        open_slide(tmp_path / "none.jpg", 1.0)
    Image.new("I;16", (40, 40)).save(tmp_path / "deep.tif")
    with pytest.raises(InputError, match=r"deep.tif: not an image of 8 bits a colour"):
        open_slide(tmp_path / "deep.tif", 1.0)
    (tmp_path / "text.tif").write_text("Dear reviewer,")
    with pytest.raises(InputError, match=r"text.tif: not an image .*export the slide"):
        open_slide(tmp_path / "text.tif", 1.0)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=r"a.png: µm per pixel must be positive; got"):
            open_slide(tmp_path / "a.png", wrong)


def test_a_decompression_bomb_is_refused_before_it_goes_off(tmp_path):
    import pyvips

    bomb = tmp_path / "bomb.png"
    pyvips.Image.black(30_000, 30_000, bands=3).pngsave(str(bomb), compression=9)
    assert bomb.stat().st_size < 3e6
    with pytest.raises(InputError, match=r"bomb.png: 30000 x 30000 px in a file of .* MB are no"):
        open_slide(bomb, 0.25)


def test_plain_images_that_do_not_fit_the_disk_are_refused(picture, tmp_path, monkeypatch):
    Image.fromarray(picture).save(tmp_path / "a.png")
    write_pyramid(tmp_path / "a.tif", picture)
    monkeypatch.setattr(module, "_MOST_UNTILED", 1000)
    with pytest.raises(InputError, match=r"a.png: 900 x 700 px without tiles .* vips tiffsave"):
        open_slide(tmp_path / "a.png", 0.5)
    assert open_slide(tmp_path / "a.tif", 0.5).size == SIZE


def by_area(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Means over the squares of a grid, by sums up to their edges."""
    for n in reversed(size):
        sums = np.concatenate([np.zeros_like(image[:1]), np.cumsum(image, 0, dtype=float)])
        edges = np.linspace(0, len(image), n + 1)
        low = np.minimum(edges.astype(int), len(image) - 1)
        part = (edges - low)[:, None, None]
        means = np.diff(sums[low] * (1 - part) + sums[low + 1] * part, axis=0) / edges[1]
        image = np.swapaxes(means, 0, 1)
    return image


@pytest.mark.parametrize("name", ["a.jpg", *WRITERS])
def test_small_pictures_are_means_over_areas(name, picture, tmp_path, monkeypatch):
    """Read whole, or shrunk as they are read, by up to 16, which does not divide their sides."""
    write = WRITERS.get(name, lambda path, a: Image.fromarray(a).save(path, quality=98))
    write(tmp_path / name, picture)
    whole = open_slide(tmp_path / name, 0.125)
    monkeypatch.setattr(module, "_STRIP_PIXELS", 100_000)
    exact = name != "a.jpg" and len(whole.source.sizes) == 1
    # Of 2.4 µm squares of 16 pixels are of hardly less.
    for um, most in {0.25: 6, 1.0: 6, 2.4: 32, 4.0: 17}.items():
        small, scale = thumbnail(whole, um)
        size = tuple(round(n * 0.125 / um) for n in SIZE)
        assert small.shape == (size[1], size[0], 3)
        assert scale == pytest.approx(0.125 * SIZE[0] / size[0])
        expected = by_area(picture, size)
        assert np.abs(small - expected).max() < (0.51 if exact else 6)
        with monkeypatch.context() as patch:
            patch.setattr("strank.slides.slide._MOST_PIXELS", 1)
            shrunk, same = thumbnail(open_slide(tmp_path / name, 0.125), um)
        assert (shrunk.shape, same) == (small.shape, scale)
        # Of squares that the edge cuts some libraries keep nothing.
        assert np.abs(shrunk - expected)[:-1, :-1].max() < most


def test_what_is_made_of_a_slide_reads_it_once(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = np.full((500, 500, 3), 240, np.uint8)
    pixels[100:400, 100:400] = rng.integers(60, 200, (300, 300, 3))
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    slide, reads = open_slide(tmp_path / "a.jpg", 2.0), []
    shrunk = slide.source.shrunk
    monkeypatch.setattr(slide.source, "read", None)
    monkeypatch.setattr(slide.source, "shrunk", lambda *at: reads.append(at) or shrunk(*at))
    check_image(slide)
    assert not is_dark_field(slide)
    find_tissue(slide)
    thumbnail(slide, picture_um(slide))
    assert reads == [(0, 1)]


def test_the_end_of_every_level_is_read(picture, tmp_path, monkeypatch):
    write_pyramid(tmp_path / "a.tif", picture)
    slide, ends = open_slide(tmp_path / "a.tif", 0.5), []
    read = slide.source.read
    monkeypatch.setattr(slide.source, "read", lambda *at: ends.append(at) or read(*at))
    check_image(slide)
    # Of the third all is read.
    assert ends == [(0, 899, 699, 1, 1), (1, 449, 349, 1, 1)]


def test_a_whitened_slide_is_white_in_small_too(picture, tmp_path, monkeypatch):
    image = picture.copy()
    image[:, :200], image[:100, 300:500] = 0, 255
    WRITERS["tiled.tif"](tmp_path / "a.tif", image)
    clean = without_ignored(open_slide(tmp_path / "a.tif", 2.0))
    whole = read_region(clean, 0, 0, *SIZE)
    assert (whole[:, :190] == 255).all()
    assert (whole != image).any()
    for step in (1, 4):
        small = clean.source.shrunk(0, step)
        expected = cv2.resize(whole, small.shape[1::-1], interpolation=cv2.INTER_AREA)
        # Only the squares that the edge of the mask cuts are not the same.
        assert (np.abs(small.astype(int) - expected) > 1).any(-1).mean() <= (
            0.02 if step > 1 else 0
        )


@pytest.mark.parametrize("name", ["pyramid.tif", "slide.ome.tif"])
def test_levels_are_opened_anew_while_others_read(name, picture, tmp_path, monkeypatch):
    WRITERS[name](tmp_path / name, picture)
    slide = open_slide(tmp_path / name, 0.5)
    before = slide.source._levels[0]._image
    monkeypatch.setattr(module, "_MOST_DECODED", 500_000)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda x: read_region(slide, x, 0, 50, 700), range(0, 850, 5)))
    for x, part in zip(range(0, 850, 5), parts, strict=True):
        np.testing.assert_array_equal(part, picture[:, x : x + 50])
    assert slide.source._levels[0]._image is not before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["png", "jpg", "tif"])
def test_small_pictures_in_a_process_forked_after_others_were_made(kind, picture, tmp_path):
    files = [tmp_path / f"{name}.{kind}" for name in "ab"]
    for file in files:
        if kind == "tif":
            tifffile.imwrite(file, picture, **TILES)
        else:
            Image.fromarray(picture).save(file)
    expected = thumbnail(open_slide(files[0], 0.5), 4.0)[0]
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found, _ = pool.apply_async(thumbnail, (open_slide(files[1], 0.5), 4.0)).get(timeout=60)
    np.testing.assert_array_equal(found, expected)
