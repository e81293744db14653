"""Tissue is found whatever else is on the image: a drawn section, of which the truth is known."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from strank.errors import InputError
from strank.report.maps import write_tissue_map
from strank.slides.pixels import ArrayPixels
from strank.slides.slide import Slide, open_slide, read_region
from strank.slides.tissue import find_tissue, tile_centres

UM, TILE = 4.0, 100.0
CASES = Path(__file__).parents[3] / "shared" / "cases"
GLASS = {"white": (250, 249, 250), "grey": (226, 226, 228), "pink": (232, 205, 226)}
INK = {
    "black": (20, 20, 20),
    "faded black": (40, 36, 38),
    "blue": (30, 60, 180),
    "navy": (20, 20, 110),
    "green": (20, 120, 60),
    "light green": (60, 190, 90),
    "red": (200, 30, 40),
    "dark red": (150, 15, 25),
    "pure blue": (0, 0, 255),
}


def drawn(glass: str = "pink", seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """2.4 x 2.4 mm of glass with tissue, half of it pale, half full of nuclei; and where it is."""
    rng = np.random.default_rng(seed)
    side = 600
    truth = np.zeros((side, side), np.uint8)
    outline = np.array([[90, 140], [330, 60], [520, 240], [430, 470], [160, 520]])
    cv2.fillPoly(truth, [outline], 1)
    dense = (np.arange(side) > 300)[None, :]
    light = np.ones((side, side, 3))
    stroma = 0.75 + 0.15 * _cloud(rng, side)
    light *= np.where(truth[..., None] > 0, np.power([0.95, 0.72, 0.86], stroma[..., None]), 1)
    nuclei = np.zeros((side, side), np.uint8)
    y, x = np.nonzero((truth > 0) & (rng.random((side, side)) < np.where(dense, 0.06, 0.012)))
    for at in zip(x.tolist(), y.tolist(), strict=True):
        cv2.circle(nuclei, at, 1, 1, -1)
    light[nuclei > 0] *= [0.42, 0.36, 0.66]
    image = np.array(GLASS[glass]) * light + rng.normal(0, 2, light.shape)
    return image.clip(0, 255).round().astype(np.uint8), truth > 0


def _cloud(rng: np.random.Generator, side: int) -> np.ndarray:
    cloud = cv2.GaussianBlur(rng.normal(size=(side, side)), (0, 0), 2)
    return cloud / cloud.std()


def found(image: np.ndarray) -> np.ndarray:
    """The mask in pixels of the image."""
    tissue = find_tissue(Slide(ArrayPixels(np.ascontiguousarray(image)), UM, Path("made.png")))
    mask = tissue.mask.astype(np.uint8)
    return cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 0


def agreement(mask: np.ndarray, truth: np.ndarray, covered: np.ndarray) -> tuple[float, float]:
    """Share of the true tiles found, and of false ones; what ink half covers may be either."""
    strict, loose = _tiles(truth & ~covered), _tiles(truth)
    tiles = _tiles(mask)
    return (tiles & strict).sum() / strict.sum(), (tiles & ~loose).sum() / strict.sum()


def _tiles(mask: np.ndarray) -> np.ndarray:
    side = int(TILE / UM)
    rows, columns = (n // side for n in mask.shape)
    blocks = mask[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return blocks.mean((1, 3)) >= 0.5


def assert_found(
    image: np.ndarray, truth: np.ndarray, covered: np.ndarray | None = None, most: float = 0.03
) -> None:
    none = np.zeros(truth.shape, bool)
    true, false = agreement(found(image), truth, none if covered is None else covered)
    assert true >= 0.97
    assert false <= most


def jpeg(image: np.ndarray, quality: int = 85) -> np.ndarray:
    _, packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return cv2.imdecode(packed, cv2.IMREAD_COLOR)


@pytest.mark.parametrize("glass", GLASS)
@pytest.mark.parametrize("quality", [None, 85, 60])
def test_the_section_as_it_is(glass, quality):
    image, truth = drawn(glass)
    assert_found(image if quality is None else jpeg(image, quality), truth)


@pytest.mark.parametrize("noise", [0, 5, 12, 25])
def test_noise_roughens_glass_and_tissue_alike(noise):
    image, truth = drawn("grey")
    noisy = image + np.random.default_rng(1).normal(0, noise, image.shape)
    assert_found(noisy.clip(0, 255).astype(np.uint8), truth)


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1, 0.2])
@pytest.mark.parametrize("colour", [0, 128, 255, (0, 0, 255)])
def test_strips_of_one_colour(share, colour):
    for side in range(4):
        image, truth = drawn()
        image, truth = np.rot90(image, side).copy(), np.rot90(truth, side).copy()
        n = round(share * len(image))
        image[:n], truth[:n] = colour, False
        assert_found(image, truth)
        # Of a thin grey strip that was compressed nothing tells that it is no tissue.
        if (share, colour) != (0.02, 128):
            assert_found(jpeg(image), truth)


@pytest.mark.parametrize("degrees", [7, 20, 45])
@pytest.mark.parametrize("colour", [0, 255])
def test_corners_of_a_rotated_image(degrees, colour):
    image, truth = drawn()
    turn = cv2.getRotationMatrix2D((300, 300), degrees, 1.0)
    turn[:, 2] += 150
    turned = cv2.warpAffine(image, turn, (900, 900), borderValue=(colour,) * 3)
    truth = cv2.warpAffine(truth.astype(np.uint8), turn, (900, 900)) > 0
    assert_found(turned, truth)
    # What compression adds along the corners looks like pale glass.
    assert_found(jpeg(turned), truth, most=0.04)


@pytest.mark.parametrize("colour", [0, 200, 240, 255])
def test_blocks_that_were_not_scanned(colour):
    image, truth = drawn()
    for y, x, height, width in [(0, 0, 120, 600), (150, 420, 200, 90), (480, 60, 90, 300)]:
        image[y : y + height, x : x + width] = colour
        truth[y : y + height, x : x + width] = False
    assert_found(image, truth)


@pytest.mark.parametrize("ink", INK)
@pytest.mark.parametrize("glass", ["white", "pink"])
@pytest.mark.parametrize("how", ["ring", "line", "thin", "translucent", "compressed"])
def test_rings_and_lines_of_pens(ink, glass, how):
    image, truth = drawn(glass)
    stroke = np.zeros(truth.shape, np.uint8)
    thickness = {"thin": 15, "line": 40}.get(how, 50)
    if how in ("line", "thin"):
        cv2.line(stroke, (40, 560), (560, 330), 255, thickness, cv2.LINE_AA)
    else:
        cv2.circle(stroke, (330, 420), 130, 255, thickness, cv2.LINE_AA)
    through = stroke[..., None] / 255 * (0.8 if how == "translucent" else 1.0)
    inked = (image * (1 - through) + np.array(INK[ink]) * through).astype(np.uint8)
    assert_found(jpeg(inked) if how == "compressed" else inked, truth, stroke > 0)


@pytest.mark.parametrize("colour", [0, 240, 255])
@pytest.mark.parametrize("rim_um", [0, 60])
def test_tissue_cut_out_on_one_colour(colour, rim_um):
    image, truth = drawn()
    kept = cv2.dilate(truth.astype(np.uint8), np.ones((2 * int(rim_um / UM) + 1,) * 2)) > 0
    image[~kept] = colour
    assert_found(image, truth)


def test_pale_and_dense_tissue_are_both_tissue():
    """Half a section is four times as dense as the other, and Otsu's threshold lies between."""
    image, truth = drawn("white")
    light = (image[:, 300:] / 255.0) ** 3
    image[:, 300:] = np.where(truth[:, 300:, None], 255 * light, image[:, 300:]).astype(np.uint8)
    # A threshold for the pale half lies 10 µm outside the dense one.
    assert_found(image, truth, most=0.05)


def test_an_image_without_glass_is_all_tissue():
    image, _ = drawn()
    assert found(image[180:420, 200:400]).mean() > 0.97


def _with_alpha(path: Path, image: np.ndarray, alpha: np.ndarray, below: int) -> None:
    under = np.where(alpha[..., None] > 0, image, below).astype(np.uint8)
    rgba = np.dstack([under, alpha])
    if path.suffix == ".png":
        Image.fromarray(rgba).save(path)
        return
    kind = "assocalpha" if path.stem == "associated" else "unassalpha"
    tile = {"tile": (256, 256)} if path.stem == "tiled" else {}
    tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=[kind], **tile)


@pytest.mark.parametrize("name", ["a.png", "associated.tif", "unassociated.tif", "tiled.tif"])
@pytest.mark.parametrize("below", [0, 90, 255])
def test_what_is_transparent_is_glass_whatever_colour_lies_below(name, below, tmp_path):
    image, truth = drawn()
    kept = cv2.dilate(truth.astype(np.uint8), np.ones((31, 31)))
    under = 0 if name.startswith("associated") else below
    _with_alpha(tmp_path / name, image, kept * np.uint8(255), under)
    slide = open_slide(tmp_path / name, UM)
    assert (read_region(slide, 0, 0, 40, 40) == 255).all()
    inside = read_region(slide, 250, 250, 40, 40)
    np.testing.assert_array_equal(inside, image[250:290, 250:290])
    mask = cv2.resize(find_tissue(slide).mask.astype(np.uint8), (600, 600)) > 0
    assert agreement(mask, truth, np.zeros_like(truth)) >= (0.97, 0)
    assert agreement(mask, truth, np.zeros_like(truth))[1] <= 0.03


def test_half_transparent_is_half_white(tmp_path):
    colour = np.full((64, 64, 3), (100, 50, 150), np.uint8)
    _with_alpha(tmp_path / "a.png", colour, np.full((64, 64), 128, np.uint8), 0)
    pixel = read_region(open_slide(tmp_path / "a.png", UM), 30, 30, 1, 1)[0, 0]
    expected = np.array([100, 50, 150]) * 128 / 255 + 255 * 127 / 255
    np.testing.assert_allclose(pixel, expected, atol=1)


def _notes(image: np.ndarray) -> list[str]:
    return find_tissue(Slide(ArrayPixels(image), UM, Path("made.png"))).notes


def test_what_was_ignored_is_said_with_its_share():
    image, _ = drawn()
    assert _notes(image) == []
    strip = image.copy()
    strip[:, :48] = 0
    assert _notes(strip) == ["8 % of the image is black padding: ignored"]
    strip[:, :48] = 255
    assert _notes(strip) == ["8 % of the image is white padding, or transparent: ignored"]
    strip[:, :48] = 150
    assert _notes(strip) == ["8 % of the image is of one colour: ignored"]
    for name in INK:
        ring = image.copy()
        cv2.circle(ring, (300, 300), 150, INK[name], 24)
        (note,) = _notes(ring)
        share, _, what = note.partition(" % of the image is ")
        assert what == "ink, of colours that H&E has not: ignored"
        assert float(share) == pytest.approx(100 * 2 * np.pi * 150 * 24 / 600**2, rel=0.15)


@pytest.mark.parametrize("stain", [(1.0, 1.0), (1.6, 0.6), (0.6, 1.6), (1.8, 1.8), (0.5, 0.5)])
@pytest.mark.parametrize("light", [(1, 1, 1), (0.94, 0.98, 1.0), (1.0, 0.97, 0.88)])
def test_no_stain_and_no_lamp_is_taken_for_ink(stain, light):
    """Hematoxylin and eosin as Ruifrok and Johnston measured them, in any strength."""
    from skimage.color import hed_from_rgb, rgb_from_hed

    image, truth = drawn("white")
    density = -np.log(np.maximum(image / 255, 1e-3))
    parts = density @ hed_from_rgb
    density = (parts * [*stain, 1.0]) @ rgb_from_hed
    stained = (255 * np.exp(-density) * light).clip(0, 255).astype(np.uint8)
    assert _notes(stained) == []
    assert_found(stained, truth)


def test_nothing_but_padding_and_ink_is_no_tissue():
    image = np.full((600, 600, 3), 240, np.uint8)
    image[:60] = 0
    cv2.circle(image, (300, 300), 150, INK["red"], 24)
    with pytest.raises(
        InputError, match=r"no tissue found; 10 % of the image is black padding: ig"
    ):
        found(image)
    with pytest.raises(InputError, match="no tissue found"):
        found(np.zeros((600, 600, 3), np.uint8))
    with pytest.raises(InputError, match="no tissue found"):
        found(np.full((600, 600, 3), 255, np.uint8))


def test_fluorescence_is_refused_in_a_sentence_of_its_own():
    image, _ = drawn()
    with pytest.raises(InputError, match=r"made.png: the slide is dim .* give the H&E image"):
        found((255 - image) // 3)


def test_the_picture_of_the_tissue(tmp_path):
    image, _ = drawn()
    image[:, :60] = 0
    path = write_tissue_map(tmp_path, Slide(ArrayPixels(image), UM, Path("made.png")))
    assert path == tmp_path / "tissue.png"
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    green = (picture[..., 1] > picture[..., 0] + 60) & (picture[..., 1] > picture[..., 2] + 60)
    assert 500 < green.sum() < 0.05 * green.size


@pytest.mark.skipif(not CASES.is_dir(), reason="needs ../shared/cases")
@pytest.mark.parametrize(
    ("case", "um", "least"),
    [
        ("black_strip/slide.tif", None, 254),
        ("pen_black/slide.tif", None, 240),
        ("transparent/slide.png", 1.38, 254),
    ],
)
def test_cases_of_real_tissue(case, um, least):
    def grid(name: str, um: float | None) -> set[tuple[float, ...]]:
        tissue = find_tissue(open_slide(CASES / name, um))
        return {tuple(at) for at in tile_centres(tissue, stride_um=100, tile_um=100).round()}

    control = grid("reference/slide.tif", None)
    assert len(control) == 261
    tiles = grid(case, um)
    assert len(tiles & control) >= least
    assert len(tiles - control) <= 0.03 * len(control)
