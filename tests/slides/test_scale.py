"""What a file states is its scale, or it is said why not; which of its images is the slide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from strank.errors import InputError
from strank.slides.scale import unit_um
from strank.slides.slide import check_image, open_slide, open_told, read_region

PICTURE = np.random.default_rng(0).integers(0, 255, (320, 448, 3), dtype=np.uint8)
RGB = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
CASES = Path("/work/shared/cases")


def write_ome(path: Path, *images: tuple[str, np.ndarray, str], resolution: float = 0) -> Path:
    """An OME-TIFF of images by name, with attributes of theirs in the XML as it is given."""
    inner = "".join(
        f'<Image ID="Image:{i}" Name="{name}"><Pixels ID="Pixels:{i}" Type="uint8" SizeC="3" '
        f'SizeX="{pixels.shape[1]}" SizeY="{pixels.shape[0]}" {stated}>'
        f'<TiffData IFD="{i}" PlaneCount="1"/></Pixels></Image>'
        for i, (name, pixels, stated) in enumerate(images)
    )
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">{inner}</OME>'
    )
    with tifffile.TiffWriter(path, ome=False) as file:
        for i, (_, pixels, _) in enumerate(images):
            per_cm = {"resolution": (resolution,) * 2, "resolutionunit": "CENTIMETER"}
            options = RGB | (per_cm if resolution else {})
            file.write(pixels, **options, description=text.encode() if i == 0 else None)
    return path


def sides(x: str, y: str, unit: str | None) -> str:
    """Attributes of a pixel's size."""
    units = "" if unit is None else f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    return f'PhysicalSizeX="{x}" PhysicalSizeY="{y}"{units}'


@pytest.mark.parametrize(
    ("size", "unit"),
    [
        ("0.25", None),
        *[("0.25", u) for u in ("µm", "μm", "um", "&#181;m", "&#xB5;m", "&#xb5;m", "&#956;m")],
        *[("0.25", u) for u in ("&micro;m", "&mu;m", "&amp;#181;m", "Âµm", "micron", " µm ")],
        ("250", "nm"),
        ("0.00025", "mm"),
        ("2.5E-5", "cm"),
        ("2.5e-7", "m"),
        ("9.84251968503937e-06", "in"),
        ("2500", "Å"),
    ],
)
def test_ome_units_however_they_are_spelled(size, unit, tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", ("slide", PICTURE, sides(size, size, unit)))
    assert open_slide(path).um_per_pixel == pytest.approx(0.25, rel=1e-12)


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        (sides("0.25", "0.25", "pixel"), "PhysicalSizeXUnit is 'pixel', no known unit of length"),
        (sides("0.25", "0.25", "?m"), r"'\?m', no known unit"),
        (sides("0,25", "0,25", "µm"), "PhysicalSizeX is '0,25', no number"),
        (sides("0.25", "0.25 µm", None), "PhysicalSizeY is '0.25 µm', no number"),
        (sides("352.8", "352.8", "µm"), "makes it 352.8 x 352.8: no slide has such pixels"),
        ('PhysicalSizeX="0.25"', "one of two is absent"),
        ("", "PhysicalSizeX and PhysicalSizeY of its OME-XML is absent; no resolution"),
    ],
)
def test_ome_without_a_scale_says_why(stated, why, tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", ("slide", PICTURE, stated))
    with pytest.raises(InputError, match=rf"the file does not say .*{why}.* `um_per_pixel`"):
        open_slide(path)
    assert open_slide(path, 0.5).um_per_pixel == 0.5


@pytest.mark.parametrize("stated", ["", sides("1", "1", "pixel"), sides("352.8", "352.8", "µm")])
def test_ome_that_says_no_scale_leaves_it_to_the_resolution(stated, tmp_path):
    path = write_ome(tmp_path / "a.ome.tif", ("slide", PICTURE, stated), resolution=20000)
    assert open_slide(path).um_per_pixel == pytest.approx(0.5)
    # Where it says one, that counts.
    both = write_ome(
        tmp_path / "b.ome.tif", ("s", PICTURE, sides("1", "1", "µm")), resolution=20000
    )
    assert open_slide(both).um_per_pixel == 1
    printer = write_ome(tmp_path / "c.ome.tif", ("slide", PICTURE, stated), resolution=28.35)
    with pytest.raises(InputError, match=r"OME-XML|Unit is.*; its resolution makes it 352.7 x"):
        open_slide(printer)


def test_units_that_are_none():
    assert np.isnan([unit_um(name) for name in ("", "pixel", "m²", "µ m", "reference frame")]).all()


@pytest.mark.parametrize("per_unit", [300, 4000, 72])
def test_a_resolution_without_a_unit_is_no_scale(per_unit, tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, PICTURE, **RGB, resolution=(per_unit, per_unit), resolutionunit="NONE")
    with pytest.raises(InputError, match=r"does not say .*\(its resolution has no unit\)"):
        open_slide(path)


@pytest.mark.parametrize(
    ("unit", "per_unit"), [("CENTIMETER", 40000), ("INCH", 101600), ("MILLIMETER", 4000)]
)
def test_a_resolution_with_a_unit_is_a_scale(unit, per_unit, tmp_path):
    path = tmp_path / "a.tif"
    options = {"resolution": (per_unit, per_unit), "resolutionunit": unit}
    if unit == "MILLIMETER":  # ImageJ writes the unit into the description
        options |= {"resolutionunit": "NONE", "description": "ImageJ=1.54f\nimages=1\nunit=mm\n"}
    tifffile.imwrite(path, PICTURE, **RGB, **options)
    assert open_slide(path).um_per_pixel == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize(("x", "y"), [(0.5, 0.25), (0.25, 0.26), (2.76, 2.0)])
@pytest.mark.parametrize("kind", ["tags", "ome"])
def test_pixels_that_are_not_square_are_said(kind, x, y, tmp_path):
    path = tmp_path / "a.tif"
    if kind == "ome":
        write_ome(path, ("slide", PICTURE, sides(str(x), str(y), "µm")))
    else:
        per_cm = {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(path, PICTURE, **RGB, **per_cm)
    match = f"says {x:g} µm per pixel across and {y:g} down.*, with `um_per_pixel_override=True`$"
    with pytest.raises(InputError, match=match):
        open_slide(path)


def half(pixels: np.ndarray) -> np.ndarray:
    return pixels[::2, ::2].copy()


MACRO = "macro", half(half(PICTURE)), sides("8", "8", "µm")
LABEL = "label", PICTURE[:100, :100].copy(), ""
SLIDE = "slide", PICTURE, sides("0.5", "0.5", "µm")


@pytest.mark.parametrize(
    "images", [(MACRO, SLIDE), (SLIDE, MACRO), (LABEL, MACRO, SLIDE), (LABEL, SLIDE)]
)
def test_the_largest_image_of_an_ome_tiff_is_the_slide(images, tmp_path):
    slide = open_slide(write_ome(tmp_path / "a.ome.tif", *images))
    check_image(slide)
    assert slide.um_per_pixel == 0.5
    # A macro of the same shape is no level of it.
    assert slide.source.sizes == ((448, 320),)
    np.testing.assert_array_equal(read_region(slide, 0, 0, 448, 320), PICTURE)


@pytest.mark.parametrize("first", [LABEL[1], half(half(PICTURE)), half(PICTURE)])
def test_the_largest_page_of_a_tiff_is_the_slide_and_others_its_levels(first, tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for pixels in (first, PICTURE, half(PICTURE)):
            file.write(pixels, **RGB, resolution=(20000, 20000), resolutionunit="CENTIMETER")
    slide = open_slide(tmp_path / "a.tif")
    check_image(slide)
    shapes = sorted({(448, 320), (224, 160)} | {first.shape[1::-1]} - {(100, 100)}, reverse=True)
    assert list(slide.source.sizes) == shapes
    np.testing.assert_array_equal(read_region(slide, 0, 0, 448, 320), PICTURE)


def test_images_that_all_may_be_the_slide_are_named(tmp_path):
    other = PICTURE[:300].copy()
    two = ("left", PICTURE, ""), ("right", other, "")
    write_ome(tmp_path / "a.ome.tif", *two)
    write_ome(tmp_path / "b.ome.tif", MACRO, ("left", PICTURE, ""), ("right", PICTURE, ""))
    tifffile.imwrite(tmp_path / "c.tif", np.stack([PICTURE] * 3), **RGB)
    for name, which in [("a.ome", "left, right"), ("b.ome", "left, right"), ("c", "pages 0, 1, 2")]:
        with pytest.raises(InputError, match=rf"{name}.tif: holds several images .*{which}"):
            open_slide(tmp_path / f"{name}.tif", 0.5)


@pytest.mark.parametrize("name", ["a.vsi", "B.VSI", "slide.1.vsi"])
def test_a_vsi_is_refused_with_what_is_missing(name, tmp_path):
    tifffile.imwrite(tmp_path / name, PICTURE, **RGB)
    folder = tmp_path / f"_{Path(name).stem}_"
    with pytest.raises(InputError, match=rf"overview only; .*{folder}, which is missing; export"):
        open_slide(tmp_path / name, 0.5)
    folder.mkdir()
    with pytest.raises(InputError, match="which strank does not read; export"):
        open_slide(tmp_path / name, 0.5)


@pytest.mark.parametrize("name", ["a.mrxs", "B.MRXS", "slide.1.mrxs"])
def test_an_mrxs_without_its_folder_is_refused_with_what_is_missing(name, tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / name, format="jpeg")
    folder = (tmp_path / name).with_suffix("")
    with pytest.raises(InputError, match=f"and the folder {folder} is missing; copy it whole"):
        open_slide(tmp_path / name, 0.5)
    folder.mkdir()
    with pytest.raises(InputError, match=f"Slidedat.ini in the folder {folder} is missing"):
        open_slide(tmp_path / name, 0.5)


@pytest.mark.parametrize("levels", ["one", "pages", "subifds"])
def test_planar_tiles_are_said_with_how_to_convert(levels, tmp_path):
    planes = np.moveaxis(PICTURE, -1, 0).copy()
    options = {**RGB, "planarconfig": "separate"}
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(planes, **options, subifds=int(levels == "subifds"))
        if levels != "one":
            file.write(planes[:, ::2, ::2].copy(), **options)
    with pytest.raises(InputError, match=r"a.tif: the file is whole, .* `tiffcp -p contig"):
        open_slide(tmp_path / "a.tif", 0.5)


@pytest.mark.parametrize("smaller", [0, 1, 2, 3])
@pytest.mark.parametrize("where", ["pages", "subifds"])
def test_a_grey_pyramid_is_read_in_grey(smaller, where, tmp_path):
    grey = PICTURE[..., 0].copy()
    options = {"photometric": "minisblack", "tile": (64, 64), "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(grey, **options, subifds=smaller if where == "subifds" else 0)
        for i in range(1, smaller + 1):
            file.write(grey[:: 2**i, :: 2**i].copy(), **options)
    slide = open_slide(tmp_path / "a.tif", 0.5)
    check_image(slide)
    assert len(slide.source.sizes) == 1 + smaller
    np.testing.assert_array_equal(read_region(slide, 0, 0, 448, 320), np.stack([grey] * 3, -1))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_mask_of_the_slides_size_is_not_the_slide(order, tmp_path):
    pages = [(PICTURE, "rgb"), (PICTURE[..., 0].copy(), "minisblack")]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for pixels, colours in (pages[i] for i in order):
            file.write(pixels, photometric=colours)
    region = read_region(open_slide(tmp_path / "a.tif", 0.5), 0, 0, 448, 320)
    np.testing.assert_array_equal(region, PICTURE)


PLANES = np.moveaxis(PICTURE, -1, 0).copy()
NAMES = {"Name": ["DAPI", "FITC", "Cy3"]}


@pytest.mark.parametrize(
    ("planes", "options", "what"),
    [
        (PLANES, {}, "a stack, or channels"),
        (PLANES[:2], {}, "2 grey pages of one size .a stack"),
        (np.concatenate([PLANES, PLANES]), {}, "6 grey pages"),
        (PLANES, {"imagej": True, "metadata": {"axes": "CYX"}}, "a stack, or channels"),
        (PLANES, {"imagej": True, "metadata": {"axes": "ZYX"}}, "a stack, or channels"),
        (np.stack([PLANES] * 2), {"imagej": True, "metadata": {"axes": "ZCYX"}}, "6 grey pages"),
        (PLANES, {"ome": True, "metadata": {"axes": "ZYX"}}, r"\(3 focal planes\)"),
        (PLANES, {"ome": True, "metadata": {"axes": "TYX"}}, r"\(3 times\)"),
        (PLANES[:2], {"ome": True, "metadata": {"axes": "CYX"}}, r"\(2 channels\)"),
        (np.stack([PLANES] * 2), {"ome": True, "metadata": {"axes": "ZCYX"}}, r"\(2 focal planes"),
        (PLANES, {"ome": True, "metadata": {"axes": "CYX", "Channel": NAMES}}, "DAPI, FITC, Cy3"),
        (
            PLANES,
            {
                "ome": True,
                "metadata": {"axes": "CYX", "Channel": {"EmissionWavelength": [461] * 3}},
            },
            r"\(3 channels\)",
        ),
        (
            np.stack([PICTURE] * 3),
            {"ome": True, "metadata": {"axes": "ZYXS"}, "photometric": "rgb"},
            r"3 pages of one size \(3 focal planes\)",
        ),
    ],
)
def test_pages_that_are_no_colours_are_refused(planes, options, what, tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", planes, **{"photometric": "minisblack", **options})
    with pytest.raises(InputError, match=rf"a.tif: holds .*{what}.*, not one H&E image; give that"):
        open_slide(tmp_path / "a.tif", 0.5)


@pytest.mark.parametrize(
    "names", [None, ["Red", "Green", "Blue"], ["R", "G", "B"], ["Channel 0", "Channel 1", "C2"]]
)
def test_channels_of_an_ome_tiff_that_are_colours_are_read(names, tmp_path):
    metadata = {"axes": "CYX"} | ({"Channel": {"Name": names}} if names else {})
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, PLANES, photometric="minisblack", metadata=metadata)
    region = read_region(open_slide(path, 0.5), 0, 0, 448, 320)
    np.testing.assert_array_equal(region, PICTURE)


def test_grey_with_alpha_is_read(tmp_path):
    pixels = np.dstack([PICTURE[..., 0], np.full(PICTURE.shape[:2], 255, np.uint8)])
    pixels[:9, :, 1] = 0
    options = {"photometric": "minisblack", "extrasamples": ["unassalpha"], "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", pixels, **options)
    region = read_region(open_slide(tmp_path / "a.tif", 0.5), 0, 0, 448, 320)
    assert (region[:9] == 255).all()
    np.testing.assert_array_equal(region[9:], PICTURE[9:, :, :1].repeat(3, -1))


@pytest.mark.parametrize("bands", [2, 3, 4, 5])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_samples_that_are_no_colours_are_refused(bands, planar, tmp_path):
    pixels = np.concatenate([PICTURE, PICTURE], -1)[..., :bands].copy()
    shaped = pixels if planar == "contig" else np.moveaxis(pixels, -1, 0).copy()
    options = {"photometric": "minisblack", "planarconfig": planar, "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", shaped, **options)
    with pytest.raises(InputError, match=rf"holds {bands} samples a pixel that it does not call"):
        open_slide(tmp_path / "a.tif", 0.5)


def test_a_scale_that_is_told_against_the_files_must_be_meant(tmp_path):
    square = write_ome(tmp_path / "a.ome.tif", SLIDE)
    uneven = write_ome(tmp_path / "b.ome.tif", ("slide", PICTURE, sides("0.5", "0.25", "µm")))
    silent = write_ome(tmp_path / "c.ome.tif", ("slide", PICTURE, ""))
    for path, told in [(square, 0.48), (square, 0.52), (square, None), (silent, 7.0)]:
        assert open_told(path, told).um_per_pixel == (told or 0.5)
    for path, told, says in [
        (square, 0.47, "0.5"),
        (square, 0.53, "0.5"),
        (square, 4.5, "0.5"),
        (uneven, 0.5, "0.5 x 0.25"),
        (uneven, 0.25, "0.5 x 0.25"),
    ]:
        match = rf"the file says {says} µm per pixel, not `um_per_pixel={told}`; .*_override=True`"
        with pytest.raises(InputError, match=match):
            open_told(path, told)
        assert open_told(path, told, override=True).um_per_pixel == told


@pytest.mark.skipif(not CASES.is_dir(), reason="needs the shared cases")
@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("ome_entity/slide.ome.tif", 2.76),
        ("ome_macro_first/slide.ome.tif", 2.76),
        ("grey_pyramid/slide.tif", 2.76),
        ("unit_none/slide.tif", "has no unit"),
        ("anisotropic/slide.tif", "2.76 µm per pixel across and 2 down"),
        ("vsi_alone/slide.vsi", "which is missing"),
        ("planar_tiled/slide.tif", "tiffcp"),
    ],
)
def test_shared_cases(name, result):
    if isinstance(result, float):
        assert open_slide(CASES / name).um_per_pixel == pytest.approx(result)
    else:
        with pytest.raises(InputError, match=result):
            open_slide(CASES / name)
    with pytest.raises(InputError, match=r"the file says 2.76 .*, not `um_per_pixel=1`"):
        open_told(CASES / "mpp_conflict/slide.tif", 1.0)
