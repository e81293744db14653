"""From a slide to scores: tiles, dense maps, and how far from training they look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anndata
import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from strank.cohort.store import write_h5ad
from strank.encoders.base import Field, encoder_facts
from strank.errors import InputError
from strank.model.novelty import fit_novelty, novelty_of
from strank.model.rank_model import RankModel
from strank.neural.heads import ContextHead, LinearHead
from strank.prediction import grid_of, novelty_warning, predict, predict_slide, tile_grid
from strank.slides.pixels import ArrayPixels
from strank.slides.slide import Slide, open_slide

UM = 2.0
PROVENANCE = {"spot_diameter_um": 100.0, "spot_pitch_um": 200.0}


class MeanColour:
    """Mean red, green and blue of a window of 100 µm."""

    name, version = "mean-colour", "1"
    fields = (Field(um=100.0, pixels=50),)
    feature_names = ("red", "green", "blue")

    def encode(self, patches: Sequence[np.ndarray]) -> np.ndarray:
        return patches[0].mean((1, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """2 x 1.6 mm: tissue that gets redder from left to right, on glass."""
    image = np.full((800, 1000, 3), 245, np.uint8)
    x = np.arange(1000)[None, :]
    rng = np.random.default_rng(0)
    colour = np.stack(np.broadcast_arrays(100 + x // 10, 60 + 0 * x, 180 - x // 20), axis=-1)
    colour = colour + rng.integers(-20, 20, (800, 1000, 3))
    inside = cv2.ellipse(np.zeros((800, 1000), np.uint8), (500, 400), (400, 300), 0, 0, 360, 1, -1)
    image[inside == 1] = colour[inside == 1]
    return image


@pytest.fixture(scope="module")
def slide(pixels) -> Slide:
    return Slide(ArrayPixels(pixels), UM, Path("made.png"))


@pytest.fixture
def model() -> RankModel:
    """RED's score is the mean red of the window, BLUE's minus the mean blue."""
    head = LinearHead(3, 2)
    head.weight.data = torch.tensor([[1.0, 0], [0, 0], [0, -1.0]])
    panel = pd.DataFrame(index=pd.Index(["RED", "BLUE"]))
    return RankModel(head, panel, encoder_facts(MeanColour()), PROVENANCE)


def test_a_score_is_of_the_window_around_its_tile(slide, model, pixels):
    tiles = tile_grid(slide, model, encoder=MeanColour())
    predictions = predict_slide(slide, model, tiles, encoder=MeanColour())
    corners = np.floor(predictions.obsm["spatial"] - 25 + 0.5).astype(int)
    means = np.array([pixels[y : y + 50, x : x + 50].mean((0, 1)) for x, y in corners])
    expected = (means - means.mean(0))[:, [0, 2]] * [1, -1]
    np.testing.assert_allclose(predictions.X, expected, atol=1e-2)
    assert predictions.uns["strank"] == grid_of(slide, model) | {"ignored": ""}
    assert predictions.uns["strank"]["stride_um"] == 100


@settings(max_examples=10, deadline=None)
@given(stride=st.floats(18.0, 130.0))
def test_a_dense_map_changes_no_score(slide, stride):
    """Tiles overlap; each is scored as it would be alone, up to one constant a gene."""
    head = LinearHead(3, 2)
    head.weight.data = torch.tensor([[1.0, 0.5], [0, 0.2], [0, -1.0]])
    panel = pd.DataFrame(index=pd.Index(["A", "B"]))
    model = RankModel(head, panel, encoder_facts(MeanColour()), PROVENANCE)
    tiles = tile_grid(slide, model, stride_um=stride, encoder=MeanColour())
    x, _ = tiles.obsm["spatial"].T
    assert np.diff(np.unique(x.round(3))).min() == pytest.approx(stride / UM, rel=1e-3)
    # One tile for each square of the stride.
    area = np.pi * 0.8 * 0.6 * 1e6
    assert tiles.n_obs == pytest.approx(area / stride**2, rel=0.12)
    few = tiles[:: max(1, tiles.n_obs // 50)].copy()
    difference = (
        predict_slide(slide, model, few, encoder=MeanColour()).X
        - predict_slide(slide, model, tiles, encoder=MeanColour())[few.obs_names].X
    )
    np.testing.assert_allclose(difference, difference[:1].repeat(len(few), 0), atol=1e-3)


def test_a_head_that_looks_at_neighbours_gets_them_as_far_as_in_training(slide, model):
    around = RankModel(ContextHead(3, 2), model.panel, model.encoder, PROVENANCE)
    assert grid_of(slide, around)["stride_um"] == 200
    assert grid_of(slide, around, 50.0)["stride_um"] == 50


@pytest.mark.parametrize("stride", [0, -5, 1.9, float("nan"), float("inf")])
def test_a_stride_below_a_pixel_is_refused(slide, model, stride):
    with pytest.raises(
        InputError, match=r"`stride_um` must be at least a pixel of made.png \(2 µm\)"
    ):
        grid_of(slide, model, stride_um=stride)


def test_more_tiles_than_memory_are_refused(model):
    source = ArrayPixels(np.empty((1, 1, 3), np.uint8))
    source.sizes = ((100_000, 80_000),)
    huge = Slide(source, 0.25, Path("huge.svs"))
    wide = RankModel(model.head, model.panel, {**model.encoder, "n_features": 1536}, PROVENANCE)
    with pytest.raises(InputError, match=r"500,000,000 tiles on huge\.svs.* 2861 GiB; 19 µm"):
        grid_of(huge, wide, stride_um=1.0)
    # What the message offers is possible.
    assert grid_of(huge, wide, stride_um=19)["stride_um"] == 19


def test_tissue_unlike_the_training_is_told(slide, model, pixels):
    tiles = tile_grid(slide, model, encoder=MeanColour())
    assert "novelty" not in predict_slide(slide, model, tiles, encoder=MeanColour()).obs
    rng = np.random.default_rng(0)
    usual = rng.normal([120, 60, 150], [50, 5, 30], (400, 3))
    novelty = fit_novelty(usual, np.repeat(list("abcd"), 100))
    known = RankModel(model.head, model.panel, model.encoder, PROVENANCE, None, novelty)
    near = predict_slide(slide, known, tiles, encoder=MeanColour())
    assert near.uns["strank_novelty"]["warning"] == ""
    assert near.uns["strank_novelty"]["share"] == near.obs["odd"].mean()
    np.testing.assert_array_equal(near.obs["odd"], near.obs["novelty"] > 1)
    green = Slide(ArrayPixels(pixels[..., [1, 0, 2]]), UM, Path("green.png"))
    far = predict_slide(green, known, tiles, encoder=MeanColour())
    assert far.uns["strank_novelty"]["share"] > 0.9
    assert "do not trust this map" in far.uns["strank_novelty"]["warning"]
    centre = tiles.obsm["spatial"][:1].astype(int)[0] - 25
    window = pixels[centre[1] : centre[1] + 50, centre[0] : centre[0] + 50, [1, 0, 2]]
    assert far.obs["novelty"].iloc[0] == pytest.approx(
        novelty_of([window.mean((0, 1))], novelty)[0], rel=0.05
    )


@pytest.mark.parametrize("what", ["black strip", "blue strip", "pen"])
def test_padding_and_ink_change_no_score_beside_them(slide, model, pixels, tmp_path, what):
    inked = pixels.copy()
    covered = np.zeros(pixels.shape[:2], np.uint8)
    if what == "pen":
        cv2.circle(covered, (700, 400), 100, 1, 30)
    else:
        covered[:, :160] = 1
    inked[covered > 0] = {"black strip": 0, "blue strip": (20, 40, 220), "pen": (20, 25, 20)}[what]
    Image.fromarray(inked).save(tmp_path / "a.png")
    usual = np.random.default_rng(0).normal([130, 60, 160], [60, 5, 30], (400, 3))
    novelty = fit_novelty(usual, np.repeat(list("abcd"), 100))
    known = RankModel(model.head, model.panel, model.encoder, PROVENANCE, None, novelty)
    said: list[str] = []
    options = {"encoder": MeanColour(), "um_per_pixel": UM, "say": said.append}
    scores = predict(tmp_path / "a.png", known, **options)
    assert [text.endswith(": ignored") for text in said] == [True]
    assert scores.uns["strank"]["ignored"] in said[0]
    clean = predict(slide, known, encoder=MeanColour())
    at = {tuple(place): row for row, place in enumerate(clean.obsm["spatial"].round().tolist())}
    rows = [at[tuple(place)] for place in scores.obsm["spatial"].round().tolist()]
    # Scores are centred on the tiles that are there.
    whole = (scores.obs["ignored"] == 0).to_numpy()
    assert 20 < whole.sum() < len(whole)
    # What is masked reaches a pixel of the mask, 8 µm, into the window of a neighbour.
    change = (scores.X - clean.X[rows])[whole]
    change = np.abs(change - np.median(change, axis=0)).max(1)
    assert (change < 0.01).mean() > 0.8
    assert change.max() < 25
    # What is cut sees white, which is no tissue's colour, and does not count.
    far = (scores.obs["novelty"] > 1).to_numpy()
    assert far[~whole].mean() > 0.3
    counted = (scores.obs["ignored"] < 0.1).to_numpy()
    assert scores.uns["strank_novelty"]["share"] == far[counted].mean()
    np.testing.assert_array_equal(scores.obs["odd"], far & counted)


def test_fluorescence_is_told_in_a_sentence_of_its_own(slide, model, pixels):
    tiles = tile_grid(slide, model, encoder=MeanColour())
    dim = Slide(ArrayPixels((255 - pixels) // 4), UM, Path("dapi.png"))
    sentence = "as fluorescence (DAPI) is"
    novelty = fit_novelty(np.random.default_rng(0).normal(200, 9, (400, 3)), np.arange(400) % 4)
    known = RankModel(model.head, model.panel, model.encoder, PROVENANCE, None, novelty)
    for each in (model, known):
        assert sentence in novelty_warning(predict_slide(dim, each, tiles, encoder=MeanColour()))
        told = novelty_warning(predict_slide(slide, each, tiles, encoder=MeanColour()))
        assert sentence not in told
    # A model that knows such slides has nothing to say.
    usual = predict_slide(dim, model, tiles, encoder=MeanColour())
    features = np.random.default_rng(0).normal([20, 40, 20], 15, (400, 3))
    fits = fit_novelty(features, np.arange(400) % 4)
    knows = RankModel(model.head, model.panel, model.encoder, PROVENANCE, None, fits)
    assert usual.n_obs == tiles.n_obs
    assert novelty_warning(predict_slide(dim, knows, tiles, encoder=MeanColour())) == ""


@pytest.fixture
def files(pixels, tmp_path) -> list[Path]:
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, (pixels, pixels[:, ::-1]), strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_one_slide_or_many_is_one_verb(slide, model, files, tmp_path):
    told: list[int] = []
    options = {"encoder": MeanColour(), "stride_um": 150.0, "advance": told.append}
    one = predict(files[0], model, um_per_pixel=UM, **options)
    assert sum(told) == one.n_obs > 50
    tiles = tile_grid(slide, model, stride_um=150.0, encoder=MeanColour())
    expected = predict_slide(slide, model, tiles, encoder=MeanColour())
    np.testing.assert_array_equal(one.X, expected.X)
    np.testing.assert_array_equal(predict(slide, model, **options).X, one.X)
    many = predict(files, model, um_per_pixel=UM, **options)
    assert list(many) == ["a", "b"]
    np.testing.assert_array_equal(many["a"].X, one.X)
    named = predict({"x": files[1]}, model, um_per_pixel=UM, **options)
    np.testing.assert_array_equal(named["x"].X, many["b"].X)
    assert not list(tmp_path.glob("*/"))


def test_a_section_stands_for_its_image(section_of, model, files, tmp_path):
    section = section_of("A1")
    section.uns["strank"] |= {"image": str(files[0]), "um_per_pixel": UM}
    options = {"encoder": MeanColour(), "stride_um": 150.0}
    one = predict(section, model, **options)
    np.testing.assert_array_equal(one.X, predict(files[0], model, um_per_pixel=UM, **options).X)
    section.write_h5ad(tmp_path / "A1.h5ad")
    several = predict([tmp_path / "A1.h5ad"], model, **options)
    np.testing.assert_array_equal(several["A1"].X, one.X)
    with pytest.raises(InputError, match="section A1 knows its µm per pixel; leave `um_per_pixel`"):
        predict(section, model, um_per_pixel=1.0, **options)
    with pytest.raises(InputError, match=r"a.png is open at its scale; leave `um_per_pixel` out"):
        predict(open_slide(files[0], UM), model, um_per_pixel=1.0, **options)


@pytest.mark.parametrize("n_slides", [1, 2])
def test_what_files_say_is_not_overridden_by_nothing(model, files, tmp_path, n_slides):
    with pytest.raises(InputError, match=r"^`um_per_pixel_override` takes `um_per_pixel` in the"):
        predict(files[:n_slides], model, tmp_path / "out", um_per_pixel_override=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("none", [[], {}])
@pytest.mark.parametrize("output", [None, "out"])
def test_no_slides_are_an_error(model, tmp_path, none, output):
    with pytest.raises(InputError, match=r"^no slides are given$"):
        predict(none, model, output and tmp_path / output, encoder=MeanColour())


def test_scores_in_a_folder_are_read_again(model, files, tmp_path):
    model.save(tmp_path / "model")
    said: list[str] = []
    counts: list[int] = []

    def scored(which, trained) -> dict[str, Path]:
        counts.clear()
        options = {"um_per_pixel": UM, "stride_um": 150.0, "encoder": MeanColour()}
        return predict(
            which, trained, tmp_path / "out", advance=counts.append, say=said.append, **options
        )

    found = scored(files, tmp_path / "model")
    assert found == {name: tmp_path / "out" / name / "scores.h5ad" for name in "ab"}
    stored = anndata.read_h5ad(found["b"])
    assert counts
    scored(files, tmp_path / "model")
    assert not counts
    old = stored.copy()
    del old.uns["strank"]["warnings"]
    write_h5ad(old, found["b"])
    scored(files, tmp_path / "model")
    assert counts
    # A model in memory has no name by which its scores could be known again.
    for _ in range(2):
        scored(files, model)
        assert counts
    np.testing.assert_array_equal(anndata.read_h5ad(found["b"]).X, stored.X)
    files[0].write_bytes(b"no image")
    with pytest.raises(InputError, match="1 of 2 slides failed: a"):
        scored(files, tmp_path / "model")
    assert "a.png" in said[-1]
    with pytest.raises(InputError, match="two slides are called a, and would share"):
        scored([files[0], tmp_path / "elsewhere" / "a.png"], tmp_path / "model")
    with pytest.raises(InputError, match="two slides are called A, and would share"):
        scored({"a": files[0], "A": files[1]}, tmp_path / "model")


@pytest.mark.parametrize("name", ["", ".", "..", "../out2", "a/b", "/tmp/a"])
def test_slides_are_not_written_beside_the_output(model, files, tmp_path, name):
    with pytest.raises(InputError, match="no name of a folder in `output`"):
        predict({name: files[0]}, model, tmp_path / "out", encoder=MeanColour())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), ZeroDivisionError("0"), OSError()])
def test_any_error_fails_its_slide_only(model, files, tmp_path, error):
    class Fragile(MeanColour):
        n = 0

        def encode(self, patches):
            self.n += 1
            if self.n == 1:
                raise error
            return super().encode(patches)

    said: list[str] = []
    options = {"um_per_pixel": UM, "encoder": Fragile(), "stride_um": 150.0}
    with pytest.raises(InputError, match=r"1 of 2 slides failed: a; .*slides.csv says why"):
        predict(files, model, tmp_path / "out", say=said.append, **options)
    assert said[0].startswith(f"{files[0]}: {type(error).__name__} in test_prediction.py, line")
    table = pd.read_csv(tmp_path / "out" / "slides.csv", keep_default_na=False)
    assert table["error"].tolist() == [said[0], ""]
    assert Path(table["scores"][1]) == tmp_path / "out" / "b" / "scores.h5ad"
    assert anndata.read_h5ad(table["scores"][1]).n_obs == int(table["n_tiles"][1])


def test_a_stride_unlike_the_training_is_told(model, files):
    around = RankModel(ContextHead(3, 2), model.panel, model.encoder, PROVENANCE)
    said: list[str] = []
    options = {"um_per_pixel": UM, "encoder": MeanColour(), "say": said.append}
    predict(files[0], around, stride_um=150.0, **options)
    assert "200 µm away in training and 150 µm here" in said[0]
    assert "a map without `stride_um`" in said[0]
    predict(files[0], around, **options)
    assert len(said) == 1
