"""scanpy and squidpy draw sections and scores over their H&E, with nothing else given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import cv2
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy
import squidpy
import torch
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from PIL import Image

import strank
from strank.cohort.folder import digest_of
from strank.cohort.store import read_h5ad, write_h5ad
from strank.encoders.base import Field, encoder_facts
from strank.io import write_sections
from strank.model.rank_model import RankModel
from strank.neural.heads import LinearHead
from strank.slides.slide import open_slide, picture_for

UM = 2.0


class MeanColour:
    """Mean red, green and blue of a window of 100 µm."""

    name, version = "mean-colour", "1"
    fields = (Field(um=100.0, pixels=50),)
    feature_names = ("red", "green", "blue")

    def encode(self, patches: Sequence[np.ndarray]) -> np.ndarray:
        return patches[0].mean((1, 2)).astype(np.float32)


def draw_slide(path: Path, seed: int, size: tuple[int, int]) -> Path:
    """Tissue with a darker field, each somewhere else, whose green differs from place to place."""
    rng, (width, height) = np.random.default_rng(seed), size
    image = rng.integers(240, 250, (height, width, 3)).astype(np.uint8)
    coarse = rng.integers(60, 200, (height // 100, width // 100, 1)).astype(np.uint8)
    green = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    tissue = np.stack([np.full_like(green, 170), green, np.full_like(green, 160)], -1)
    top, left = 100 + 200 * seed, 300 - 100 * seed
    inside = np.s_[top : height - 200, left : width - 400]
    image[inside] = tissue[inside]
    Image.fromarray(image).save(path)
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("slides")
    sizes = {"wide": (2400, 1300), "high": (1100, 2100)}
    return {
        n: draw_slide(folder / f"{n}.png", i, size) for i, (n, size) in enumerate(sizes.items())
    }


@pytest.fixture(scope="module")
def model() -> RankModel:
    """ERBB2's score is the mean green of the window."""
    head = LinearHead(3, 1)
    head.weight.data = torch.tensor([[0.0], [1.0], [0.0]])
    sizes = {"spot_diameter_um": 100.0, "spot_pitch_um": 200.0}
    return RankModel(head, pd.DataFrame(index=["ERBB2"]), encoder_facts(MeanColour()), sizes)


@pytest.fixture(scope="module")
def predicted(slides, model) -> dict[str, AnnData]:
    how = {"um_per_pixel": UM, "stride_um": 100.0, "encoder": MeanColour()}
    return strank.predict(slides, model, **how)


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def check_drawn(ax: Axes, width: float, scores: AnnData) -> None:
    """Marks of a width lie on what they are of: what is seen below has the green of the score."""
    (picture,), image = ax.images, np.asarray(ax.images[0].get_array())
    assert image.dtype == np.uint8
    assert picture.get_extent() == [-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5]
    (marks,) = [each for each in ax.collections if isinstance(each, PatchCollection)]
    boxes = [path.get_extents() for path in marks.get_paths()]
    values = np.asarray(marks.get_array())
    assert len(boxes) == scores.n_obs
    corners = np.array([box.get_points() for box in boxes])
    # The middle of a picture's first pixel is at 0.
    pixels = np.round(corners + 0.5).astype(int)
    below = [image[y0:y1, x0:x1, 1].mean() for (x0, y0), (x1, y1) in pixels]
    assert np.corrcoef(below, values)[0, 1] > 0.99
    np.testing.assert_allclose(np.sort(values), np.sort(scores.X.ravel()), rtol=1e-5)
    np.testing.assert_allclose(corners[:, 1] - corners[:, 0], width, rtol=1e-3)


def shrunk(slide: Path) -> float:
    """How many pixels a tile of 100 µm has in a picture of 1000 pixels a side."""
    return 100 / UM * 1000 / max(Image.open(slide).size)


@pytest.mark.parametrize("name", ["wide", "high"])
def test_scores_lie_over_the_tissue(slides, predicted, name):
    scores, width = predicted[name], shrunk(slides[name])
    squidpy.pl.spatial_scatter(scores, color="ERBB2", shape="square")
    check_drawn(plt.gcf().axes[0], width, scores)
    squidpy.pl.spatial_scatter(scores, color="ERBB2")
    check_drawn(plt.gcf().axes[0], width, scores)
    (ax,) = scanpy.pl.spatial(scores, color="ERBB2", show=False)
    check_drawn(ax, width, scores)


def test_several_lie_over_their_own(slides, predicted):
    scores = anndata.concat(predicted.values(), uns_merge="unique", index_unique="-")
    squidpy.pl.spatial_scatter(scores, color="ERBB2", library_key="section", shape="square")
    axes = [ax for ax in plt.gcf().axes if ax.images]
    assert len(axes) == 2
    for ax, name in zip(axes, scores.uns["spatial"], strict=True):
        marks = next(each for each in ax.collections if isinstance(each, PatchCollection))
        own = predicted[name]
        np.testing.assert_allclose(np.sort(marks.get_array()), np.sort(own.X.ravel()), rtol=1e-5)
        check_drawn(ax, shrunk(slides[name]), own)


@pytest.fixture
def cohort(tmp_path, st_folder) -> Path:
    """Two sections of a reader; their tissue has patches of some brightness."""
    for seed, name in enumerate(["A1", "B1"]):
        draw_tissue(st_folder / "images" / f"{name}.jpg", seed)
    read = [strank.io.read_st(st_folder, section=name, pitch_um=200) for name in ("A1", "B1")]
    write_sections(read, tmp_path / "cohort")
    return tmp_path / "cohort"


def draw_tissue(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(240, 250, (280, 300, 3)).astype(np.uint8)
    image[10:220, 20:260] = (170, 0, 160)
    cells = rng.integers(60, 200, (21, 24)).astype(np.uint8)
    image[10:220, 20:260, 1] = cv2.resize(cells, (240, 210), interpolation=cv2.INTER_CUBIC)
    Image.fromarray(image).save(path, quality=100)


def colours_of(image: Path, section: AnnData) -> np.ndarray:
    """Mean colours of squares as wide as spots, ``[n_spots, 3]``."""
    pixels, half = np.asarray(Image.open(image)), 50 / section.uns["strank"]["um_per_pixel"]
    around = np.stack([section.obsm["spatial"] - half, section.obsm["spatial"] + half], 1)
    boxes = np.round(around).astype(int)
    return np.array([pixels[y0:y1, x0:x1].mean((0, 1)) for (x0, y0), (x1, y1) in boxes])


def test_sections_and_scores_of_their_spots_lie_over_their_tissue(cohort, st_folder, model):
    """Written by a reader, read by AnnData alone, scored, written and read again."""
    scored = {}
    for path in sorted(cohort.glob("*.h5ad")):
        section = anndata.read_h5ad(path)
        colours = colours_of(st_folder / "images" / f"{path.stem}.jpg", section)
        section.X = np.repeat(colours[:, 1:2], section.n_vars, 1)
        width = 100 / section.uns["strank"]["um_per_pixel"]
        squidpy.pl.spatial_scatter(section, color="GENE0")
        check_drawn(plt.gcf().axes[0], width, section[:, "GENE0"])
        section.obsm["mean-colour"] = colours.astype(np.float32)
        write_h5ad(model.predict(section), cohort.parent / "scores.h5ad")
        scored[path.stem] = anndata.read_h5ad(cohort.parent / "scores.h5ad")
    scores = anndata.concat(scored.values(), uns_merge="unique", index_unique="-")
    assert list(scores.uns["spatial"]) == ["A1", "B1"]
    squidpy.pl.spatial_scatter(scores, color="ERBB2", library_key="section")
    for ax, own in zip((a for a in plt.gcf().axes if a.images), scored.values(), strict=True):
        check_drawn(ax, width, own)
    one = scores[scores.obs["section"] == "B1"]
    (ax,) = scanpy.pl.spatial(one, color="ERBB2", library_id="B1", show=False)
    check_drawn(ax, width, scored["B1"])
    # Those that are scored at once, too.
    sections = strank.read_cohort(cohort, sections=list(scored)).values()
    several = anndata.concat(sections, uns_merge="unique", index_unique="-")
    several.obsm["mean-colour"] = np.ones((several.n_obs, 3))
    for name, library in model.predict(several).uns["spatial"].items():
        np.testing.assert_array_equal(
            library["images"]["hires"], scores.uns["spatial"][name]["images"]["hires"]
        )


def test_a_cohort_of_before_reads_as_it_did(cohort, model):
    """A picture is neither asked for nor part of what features hang on."""
    path = cohort / "A1.h5ad"
    section, digest = read_h5ad(path), digest_of(path)
    before = section.copy()
    del before.uns["spatial"]
    write_h5ad(before, path)
    again = strank.read_cohort(cohort)["A1"]
    assert digest_of(path) == digest
    assert "spatial" not in again.uns
    again.obsm["mean-colour"] = np.ones((again.n_obs, 3))
    assert "spatial" not in model.predict(again).uns


def test_pictures_are_small(tmp_path):
    """However large the slide: at most 1000 pixels a side, whose scale is that of both sides."""
    for size in [(9000, 4301), (1, 7000), (300, 280)]:
        Image.new("RGB", size, "white").save(tmp_path / "slide.png")
        library = picture_for(open_slide(tmp_path / "slide.png", 1.0), 50.0)
        picture, scales = library["images"]["hires"], library["scalefactors"]
        assert picture.dtype == np.uint8
        assert max(picture.shape) <= 1000
        wanted = np.array(size) * scales["tissue_hires_scalef"]
        np.testing.assert_allclose(picture.shape[1::-1], wanted, atol=1)
        assert scales["spot_diameter_fullres"] == 50.0


def test_names_that_files_would_divide(tmp_path, model):
    """A slash in the name of a library would make groups of an HDF5 file."""
    section = AnnData(obsm={"spatial": np.eye(3, 2), "mean-colour": np.ones((3, 3))})
    section.obs["section"] = pd.Categorical(["P1/B"] * 3)
    section.uns["spatial"] = {"V1_of_10x": {"scalefactors": {"tissue_hires_scalef": 0.1}}}
    scores = model.predict(section)
    write_h5ad(scores, tmp_path / "scores.h5ad")
    (library,) = anndata.read_h5ad(tmp_path / "scores.h5ad").uns["spatial"].values()
    assert library == section.uns["spatial"]["V1_of_10x"]
    assert list(section.uns["spatial"]) == ["V1_of_10x"]


def test_scores_of_sections_are_called_as_they_are(cohort, model, tmp_path):
    """So scores of several can be put together, though their images have one name."""
    sections = strank.read_cohort(cohort)
    for name, section in sections.items():
        image = Path(section.uns["strank"]["image"])
        (tmp_path / name).mkdir()
        section.uns["strank"]["image"] = str(image.rename(tmp_path / name / "he.jpg"))
    several = strank.predict(sections, model, encoder=MeanColour())
    alone = strank.predict(sections["B1"], model, encoder=MeanColour())
    for name, scores in {**several, "B1": alone}.items():
        assert set(scores.obs["section"]) == {name} == set(scores.uns["spatial"])
    # Those that are kept under another name are made anew.
    model.save(tmp_path / "model")
    how = {"output": tmp_path / "out", "encoder": MeanColour()}
    for name in ("B1", "other"):
        sections["B1"].obs["section"] = pd.Categorical([name] * sections["B1"].n_obs)
        scores = strank.predict(sections["B1"], tmp_path / "model", **how)
        assert set(scores.obs["section"]) == {name} == set(scores.uns["spatial"])
