"""The image that stands in for a slide: every patch where it was cut, over the edges, too."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from strank.errors import InputError
from strank.io.patches import BAND, read_patches, write_mosaic, write_tiff
from strank.slides.slide import check_image, open_slide, read_region, thumbnail

SIDE = 30


def write(path: Path, corners, *, shrink: float = 1.0, seed: int = 0, **changed) -> np.ndarray:
    images = np.random.default_rng(seed).integers(0, 255, (len(corners), SIDE, SIDE, 3), np.uint8)
    names = np.array([f"s{i}" for i in range(len(corners))], dtype="S")[:, None]
    data = {"img": images, "coords": np.asarray(corners), "barcode": names, **changed}
    with h5py.File(path, "w") as file:
        for key, values in data.items():
            if values is not None:
                file[key] = values
        if "coords" in file:
            file["coords"].attrs.update(pixel_size=0.25, patch_size_src=round(SIDE * shrink))
    return images


@settings(max_examples=15, deadline=None)
@given(
    corners=st.lists(
        st.tuples(st.integers(-20, 2 * BAND), st.integers(-20, 2 * BAND)), min_size=1, max_size=8
    ),
    shrink=st.sampled_from([1.0, 2.0, 1.4]),
)
def test_patches_stand_where_they_were_cut(corners, shrink):
    where = np.array(corners) * shrink
    with TemporaryDirectory() as folder:
        images = write(Path(folder) / "p.h5", where, shrink=shrink)
        um = write_mosaic(read_patches(Path(folder) / "p.h5"), Path(folder) / "m.tif")
        got = tifffile.imread(Path(folder) / "m.tif", series=0, level=0)
    assert um == pytest.approx(0.25 * shrink)
    # Room for what hangs over the edges, which is cut off below.
    expected = np.full((2 * BAND + 80, 2 * BAND + 80, 3), 255, np.uint8)
    for (x, y), image in zip(corners, images, strict=True):
        expected[y + 20 : y + 20 + SIDE, x + 20 : x + 20 + SIDE] = image
    width, height = np.max(corners, axis=0) + SIDE
    assert got.shape == (height, width, 3)
    np.testing.assert_array_equal(got, expected[20 : 20 + height, 20 : 20 + width])


def test_a_large_tiff_holds_its_scale_and_a_smaller_level(tmp_path):
    """Checked by the package's other way into TIFFs; an edge stays where it is on both levels."""
    size, edge = 4200, 1001
    band = np.full((BAND, size, 3), 250, np.uint8)
    band[:, :edge] = 50
    write_tiff(tmp_path / "t.tif", [*[band] * 8, band[:104]], (size, size), 0.5)
    slide = open_slide(tmp_path / "t.tif")
    assert slide.um_per_pixel == pytest.approx(0.5, rel=1e-6)
    assert slide.source.sizes == ((size, size), (size // 8, size // 8))
    check_image(slide)
    np.testing.assert_array_equal(read_region(slide, 0, 3000, size, BAND), band)
    small, _ = thumbnail(slide, 4.0)
    assert small.shape == (525, 525, 3)
    assert ((small == 50).sum(1) == edge // 8).all()


def test_a_write_that_fails_leaves_nothing(tmp_path):
    def bands():
        yield np.zeros((BAND, 600, 3), np.uint8)
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_tiff(tmp_path / "t.tif", bands(), (600, 2 * BAND), 0.5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"img": None}, "p.h5: lacks dataset img; it has barcode, coords"),
        ({"img": np.zeros((2, 9, 9, 3))}, r"p.h5: img is float64 of shape \(2, 9, 9, 3\), coords"),
        ({"img": np.zeros((2, 9, 8, 3), "u1")}, r"img is uint8 of shape \(2, 9, 8, 3\)"),
        ({"coords": np.zeros((2, 3))}, r"coords of shape \(2, 3\); uint8 \[2 barcodes"),
        ({"coords": np.full((2, 2), -99)}, "p.h5: all patches lie outside the slide"),
    ],
)
def test_patches_that_cannot_be_used(tmp_path, changed, message):
    write(tmp_path / "p.h5", [[0, 0], [9, 9]], **changed)
    with pytest.raises(InputError, match=message):
        write_mosaic(read_patches(tmp_path / "p.h5"), tmp_path / "m.tif")
    assert [path.name for path in tmp_path.iterdir()] == ["p.h5"]
