"""Maps on axes: marks, colours, ground and warnings are those of the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

import strank
from strank.errors import InputError
from strank.slides.pixels import ArrayPixels
from strank.slides.slide import Slide

TOLD = "50 % of the tiles look $unlike$ anything in training; do not trust this map"
UM, STRIDE = 2.0, 50.0


def ax_of() -> Axes:
    return FigureCanvasAgg(Figure()).figure.subplots()


@pytest.fixture
def scores() -> AnnData:
    """Six by four tiles of 50 µm, at 2 µm a pixel; the right half is odd."""
    y, x = np.mgrid[:4, :6].reshape(2, -1) * STRIDE / UM + 112.5
    rng = np.random.default_rng(0)
    odd = x > x.mean()
    return AnnData(
        rng.normal(size=(24, 2)),
        obs=pd.DataFrame(
            {"novelty": np.where(odd, 1.7, 0.3), "odd": odd}, index=[f"tile{i}" for i in range(24)]
        ),
        var=pd.DataFrame(index=["ERBB2", "a$\\frac{$b"]),
        obsm={"spatial": np.column_stack([x, y])},
        layers={"se": rng.uniform(0.6, 0.9, (24, 2))},
        uns={
            "strank": {"um_per_pixel": UM, "stride_um": STRIDE, "image": "/none/a.png"},
            "strank_novelty": {"share": 0.5, "warning": TOLD},
        },
    )


def test_tiles_are_coloured_by_scores_centred_at_zero(scores):
    ax = ax_of()
    assert strank.pl.map(scores, "a$\\frac{$b", ax=ax) is ax
    marks, crossed = ax.collections
    np.testing.assert_allclose(marks.get_array(), scores.X[:, 1])
    np.testing.assert_allclose(marks.get_offsets(), scores.obsm["spatial"])
    low, high = marks.get_clim()
    assert -low == high == pytest.approx(np.quantile(np.abs(scores.X[:, 1]), 0.98))
    # An outline, so that a tile near 0 is seen.
    assert marks.get_linewidths()[0] > 0
    np.testing.assert_allclose(crossed.get_offsets(), scores.obsm["spatial"][scores.obs["odd"]])
    assert ax.get_title().startswith("a$\\frac{$b, predicted\nhatched")
    assert ax.get_xlabel().replace("\n", " ") == TOLD
    assert ax.yaxis_inverted()
    ax.figure.canvas.draw()


def test_novelty_and_errors_begin_at_nothing(scores):
    marks = strank.pl.novelty(scores, ax=ax_of()).collections[0]
    np.testing.assert_allclose(marks.get_array(), scores.obs["novelty"])
    assert marks.get_clim() == (0, 2)
    ax = strank.pl.uncertainty(scores, "ERBB2", ax=ax_of())
    marks = ax.collections[0]
    np.testing.assert_allclose(marks.get_array(), scores.layers["se"][:, 0])
    assert marks.get_clim() == (0, pytest.approx(np.quantile(scores.layers["se"][:, 0], 0.98)))
    assert ax.get_title().startswith("ERBB2, standard error")


def test_what_is_lacking_is_said(scores):
    del scores.layers["se"], scores.obs["novelty"]
    with pytest.raises(InputError, match="no standard errors"):
        strank.pl.uncertainty(scores, "ERBB2")
    with pytest.raises(InputError, match="novelty"):
        strank.pl.novelty(scores)
    for draw in (strank.pl.map, strank.pl.uncertainty):
        with pytest.raises(InputError, match="no gene VWF; there is ERBB2"):
            draw(scores, "VWF")
    spots = AnnData(
        np.ones((5, 1)), obsm={"spatial": np.random.default_rng(0).uniform(size=(5, 2))}
    )
    spots.uns["strank_model"] = "{}"
    with pytest.raises(InputError, match="a map needs the size of a pixel"):
        strank.pl.map(spots, "0")


def test_observed_counts_are_discs_of_spots(section_of):
    section = section_of()
    ax = strank.pl.map(section, "G2", ax=ax_of())
    [marks] = ax.collections
    counts = section[:, "G2"].X.toarray()[:, 0] / section.obs["library_size"].to_numpy()
    expected = np.log1p(1e4 * counts)
    np.testing.assert_allclose(marks.get_array(), expected - expected.mean())
    ax.figure.canvas.draw()
    # A disc of 100 µm at 0.7 µm a pixel.
    radius = marks.get_transforms()[0][0, 0]
    assert radius == pytest.approx(100 / 0.7 / 2)
    assert len(marks.get_paths()[0].vertices) > 10
    assert "a scale of its own" in ax.get_title()
    # As a table of counts in memory, too: depth is filled in.
    bare = AnnData(section.X, var=section.var, obsm=section.obsm, uns=section.uns)
    with pytest.warns(UserWarning, match="library_size is the sum over 6 genes"):
        again = strank.pl.map(bare, "G2", ax=ax_of())
    assert np.corrcoef(again.collections[0].get_array(), expected)[0, 1] > 0.5


def test_scores_of_spots_are_discs(scores, section_of):
    section = section_of()
    spots = AnnData(np.ones((30, 1)), obsm={"spatial": section.obsm["spatial"]})
    spots.uns = {"strank": section.uns["strank"], "strank_model": "{}"}
    ax = strank.pl.map(spots, "0", ax=ax_of())
    ax.figure.canvas.draw()
    assert ax.collections[0].get_transforms()[0][0, 0] == pytest.approx(100 / 0.7 / 2)
    assert ax.get_title() == "0, predicted"


def _red_where_odd() -> np.ndarray:
    image = np.full((300, 400, 3), 220, np.uint8)
    image[:, 175:] = [200, 0, 0]
    return image


@pytest.mark.parametrize("source", ["slide", "file", "scanpy"])
def test_the_ground_lies_where_the_marks_do(scores, tmp_path, source):
    image, slide = _red_where_odd(), None
    if source == "slide":
        slide = Slide(ArrayPixels(image), UM, Path("x.png"))
    elif source == "file":
        Image.fromarray(image).save(tmp_path / "a.png")
        scores.uns["strank"]["image"] = str(tmp_path / "a.png")
    else:
        small = {"hires": image[::2, ::2] / 255.0}
        factors = {"tissue_hires_scalef": 0.5}
        scores.uns["spatial"] = {"lib": {"images": small, "scalefactors": factors}}
    ax = strank.pl.map(scores, "ERBB2", slide=slide, ax=ax_of())
    [shown] = ax.images
    pixels = np.asarray(shown.get_array())
    left, right, bottom, top = shown.get_extent()
    # Where the image turns red, in pixels of the full image.
    turn = (pixels[len(pixels) // 2, :, 1] > 100).sum() / pixels.shape[1]
    assert left + turn * (right - left) == pytest.approx(175, abs=2)
    # 150 µm of margin around the marks.
    places = scores.obsm["spatial"]
    assert ax.get_xlim() == pytest.approx((places[:, 0].min() - 75, places[:, 0].max() + 75))
    assert (bottom - top) / len(pixels) == pytest.approx((right - left) / pixels.shape[1], rel=0.03)


def test_without_an_image_the_ground_is_white(scores):
    ax = strank.pl.map(scores, "ERBB2", ax=ax_of())
    assert not ax.images
    assert ax.get_aspect() == 1
