"""Features of tiles over slides, kept for models that come later."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import sparse
from typer.testing import CliRunner

from strank import embed_slides
from strank.cli import app
from strank.cohort.store import write_h5ad
from strank.encoders.base import Field, encoder_facts
from strank.encoders.registry import get_encoder
from strank.errors import InputError
from strank.model.novelty import fit_novelty
from strank.model.rank_model import RankModel
from strank.neural.heads import ContextHead, LinearHead
from strank.prediction import predict
from strank.progress import progress
from strank.slide_features import TileEmbedding, _embed_one
from strank.slide_runs import SlideEntry

UM = 2.0


class MeanColour:
    """Mean red, green and blue of a window of 80 µm, and of one of 160."""

    name, version = "mean-colour", "1"
    fields = (Field(um=160.0, pixels=40), Field(um=80.0, pixels=20))
    feature_names = ("red", "green", "blue", "red around")

    def encode(self, patches: Sequence[np.ndarray]) -> np.ndarray:
        near, far = patches[1].mean((1, 2)), patches[0][..., 0].mean((1, 2))
        return np.column_stack([near, far]).astype(np.float32)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """Two slides of 800 x 600 µm, with a black bar that nobody scanned."""
    found = []
    for number, name in enumerate("ab"):
        pixels = np.full((300, 400, 3), 240, np.uint8)
        pixels[40:260, 50:350] = np.random.default_rng(number).integers(60, 200, (220, 300, 3))
        pixels[:, 200:240] = 0
        found.append(tmp_path / f"{name}.png")
        Image.fromarray(pixels).save(found[-1])
    return found


@pytest.fixture
def model() -> RankModel:
    rng, facts = np.random.default_rng(0), encoder_facts(MeanColour())
    head = LinearHead(4, 2)
    head.weight.data = torch.as_tensor(rng.normal(size=(4, 2)), dtype=torch.float32)
    usual = fit_novelty(rng.normal(130, 9, size=(300, 4)), np.repeat(list("ABC"), 100))
    panel = pd.DataFrame(index=pd.Index(["RED", "BLUE"]))
    sizes = {"spot_diameter_um": 100.0, "spot_pitch_um": 200.0}
    return RankModel(head, panel, facts, sizes, novelty=usual)


def scored(files, model, **how) -> dict[str, anndata.AnnData]:
    return predict(files, model, um_per_pixel=UM, **how)


def test_scores_by_kept_features_are_those_of_the_slide(files, model, tmp_path, monkeypatch):
    found = embed_slides(files, tmp_path / "tiles", MeanColour(), um_per_pixel=UM, stride_um=100.0)
    assert found == {name: tmp_path / "tiles" / name / "features.h5ad" for name in "ab"}
    expected = scored(files, model, encoder=MeanColour())
    # No encoder is loaded: its weights may be elsewhere.
    monkeypatch.setattr("strank.prediction.encoder_of", None)
    kept = scored(files, model, features=tmp_path / "tiles")
    for name, scores in kept.items():
        np.testing.assert_array_equal(scores.X, expected[name].X)
        pd.testing.assert_frame_equal(scores.obs, expected[name].obs)
        assert (scores.obs["ignored"] > 0).any()
        assert scores.uns["strank"] == expected[name].uns["strank"]
        assert scores.uns.keys() == expected[name].uns.keys()
    table = pd.read_csv(tmp_path / "tiles/slides.csv")
    assert table["state"].tolist() == ["done", "done"]
    assert table["n_tiles"].tolist() == [kept[name].n_obs for name in "ab"]
    stored = anndata.read_h5ad(found["a"])
    assert stored.var_names.tolist() == list(MeanColour.feature_names)
    assert stored.shape == (kept["a"].n_obs, 4)


def test_tiles_lie_side_by_side_as_windows_do(files, model, tmp_path):
    embed_slides(files, tmp_path / "tiles", MeanColour(), um_per_pixel=UM)
    kept = scored(files, model, features=tmp_path / "tiles")["a"]
    assert (kept.uns["strank"]["stride_um"], kept.uns["strank"]["tile_um"]) == (80.0, 80.0)
    steps = np.diff(np.unique(kept.obsm["spatial"][:, 0]))
    np.testing.assert_allclose(steps[steps < 60], 40)


def test_neighbours_at_another_distance_are_told(files, model, tmp_path):
    embed_slides(files[0], tmp_path / "tiles", MeanColour(), um_per_pixel=UM, stride_um=100.0)
    facts = dict(model.provenance)
    around = RankModel(ContextHead(4, 2), model.panel, model.encoder, facts)
    said: list[str] = []
    kept = predict(files[0], around, um_per_pixel=UM, features=tmp_path / "tiles", say=said.append)
    told = "the model looks at neighbours, 200 µm away in training and 100 µm here"
    assert any(told in line for line in said)
    assert any(told in line for line in kept.uns["strank"]["warnings"])


def test_half_precision_is_nearly_the_same(files, model, tmp_path):
    how = {"um_per_pixel": UM, "stride_um": 100.0, "dtype": "float16"}
    found = embed_slides(files, tmp_path / "tiles", MeanColour(), **how)
    assert anndata.read_h5ad(found["a"]).X.dtype == np.float16
    expected = scored(files, model, encoder=MeanColour())
    for name, scores in scored(files, model, features=tmp_path / "tiles").items():
        np.testing.assert_allclose(scores.X, expected[name].X, atol=0.2)


def test_what_is_there_is_not_made_again(files, tmp_path):
    counts: list[int] = []

    def embedded(**how) -> int:
        counts.clear()
        how = {"um_per_pixel": UM, "stride_um": 100.0} | how
        embed_slides(files, tmp_path / "tiles", MeanColour(), advance=counts.append, **how)
        return sum(counts)

    every = embedded()
    assert every > 0
    assert embedded() == 0
    for change in ({"stride_um": 90.0}, {"um_per_pixel": 1.9}, {"dtype": "float16"}):
        assert embedded(**change) > 0
        assert embedded(**change) == 0
    embedded()
    files[0].write_bytes(files[1].read_bytes())
    assert 0 < embedded() < every


def test_a_slide_that_fails_does_not_stop_the_others(files, tmp_path):
    files[0].write_bytes(b"no image")
    pd.DataFrame({"path": ["a.png", "b.png"], "mpp": UM, "patient": ["P", "Q"]}).to_csv(
        tmp_path / "list.csv", index=False
    )
    said: list[str] = []
    with pytest.raises(InputError, match=r"1 of 2 slides failed: a; .*slides.csv says why"):
        embed_slides(tmp_path / "list.csv", tmp_path / "tiles", MeanColour(), say=said.append)
    table = pd.read_csv(tmp_path / "tiles/slides.csv", keep_default_na=False)
    assert table["state"].tolist() == ["failed", "done"]
    assert table["patient"].tolist() == ["P", "Q"]
    assert "a.png" in table["error"][0]
    assert any("of the image" in line for line in said)  # what was taken for padding
    assert not (tmp_path / "tiles/a/features.h5ad").exists()


def with_(held: anndata.AnnData, part: str, key: str, value: Any) -> anndata.AnnData:
    getattr(held, part)[key] = value
    return held


def of(held: anndata.AnnData, X: Any) -> anndata.AnnData:
    return anndata.AnnData(X, obs=held.obs, var=held.var, obsm=held.obsm, uns=held.uns)


UNLIKE = r"a.features.h5ad: no features of tiles of .*a.png, as `strank embed` writes them of sli"
# What files of others may hold, or those of ours become.
STRANGE: dict[str, Callable[[anndata.AnnData], anndata.AnnData]] = {
    "another": lambda _: anndata.AnnData(np.ones((3, 4), np.float32)),
    "no JSON": lambda held: with_(held, "uns", "encoder", "[" * 10_000),
    "two sums": lambda held: with_(held, "uns", "strank", {"image_sha256": np.array(["a", "b"])}),
    "elsewhere": lambda held: with_(held, "obsm", "spatial", 100 * held.obsm["spatial"]),
    "nowhere": lambda held: with_(held, "obsm", "spatial", np.nan * held.obsm["spatial"]),
    "narrower": lambda held: held[:, :3].copy(),
    "turned": lambda held: held[:, ::-1].copy(),
    "sparse": lambda held: of(held, sparse.csr_matrix(held.X)),
    "whole numbers": lambda held: of(held, held.X.astype(int)),
    "none": lambda held: of(held, None),
}


@pytest.mark.parametrize(
    ("change", "how", "told"),
    [
        ("image", {}, r"features.h5ad: features of another image than .*a.png; embed again$"),
        ("", {"um_per_pixel": 2.5}, r"features at 2 µm per pixel, and .*a.png is at 2.5; embed"),
        ("", {"stride_um": 50.0}, r"features of tiles every 100 µm, and not 50; embed again, or"),
        ("absent", {}, r"a.features.h5ad: no such file; embed .*a.png, called a, with `strank em"),
        *((change, {}, UNLIKE) for change in STRANGE),
        ("NaN", {}, r"mean-colour features"),
        ("damaged", {}, r"features.h5ad"),
        ("version", {}, r"another mean-colour than the model's \(version differ\)"),
        ("", {"encoder": MeanColour()}, "`encoder` and `weights` are not used with `features`"),
    ],
)
def test_features_of_something_else_are_refused(files, model, tmp_path, change, how, told):
    found = embed_slides(files, tmp_path / "tiles", MeanColour(), um_per_pixel=UM, stride_um=100.0)
    if change == "image":
        files[0].write_bytes(files[1].read_bytes())
    elif change == "absent":
        found["a"].unlink()
    elif change in STRANGE:
        write_h5ad(STRANGE[change](anndata.read_h5ad(found["a"])), found["a"])
    elif change == "NaN":
        held = anndata.read_h5ad(found["a"])
        held.X[3, 1] = np.nan
        write_h5ad(held, found["a"])
    elif change == "damaged":
        found["a"].write_bytes(found["a"].read_bytes()[:5000])
    elif change == "version":
        model.encoder["version"] = "2"
    with pytest.raises(InputError, match=told):
        predict(files[0], model, features=tmp_path / "tiles", **({"um_per_pixel": UM} | how))


def test_scores_are_made_again_where_features_changed(files, model, tmp_path):
    model.save(tmp_path / "model")
    how = {"um_per_pixel": UM, "stride_um": 100.0}
    embed_slides(files, tmp_path / "tiles", MeanColour(), **how)

    def first(**given) -> np.ndarray:
        given = {"um_per_pixel": UM} | given
        found = predict(files, tmp_path / "model", tmp_path / "out", **given)
        return anndata.read_h5ad(found["a"]).X

    exact = first(features=tmp_path / "tiles")
    embed_slides(files, tmp_path / "tiles", MeanColour(), dtype="float16", **how)
    assert (first(features=tmp_path / "tiles") != exact).any()
    np.testing.assert_array_equal(first(encoder=MeanColour()), exact)


@pytest.mark.parametrize("given", [{"batch_size": 0}, {"workers": -1}, {"stride_um": -5.0}])
def test_what_no_slide_could_be_embedded_with_is_refused_at_once(files, tmp_path, given):
    (name,) = given
    with pytest.raises(InputError, match=rf"^`{name}` must be "):
        embed_slides(files, tmp_path / "tiles", MeanColour(), um_per_pixel=UM, **given)
    assert not (tmp_path / "tiles/run.json").exists()


def test_a_column_called_as_a_result_of_the_other_kind_is_carried(files, model, tmp_path):
    slides = pd.DataFrame({"path": [str(f) for f in files], "mpp": UM, "features": ["old", "new"]})
    predict(slides, model, tmp_path / "out", encoder=MeanColour())
    assert pd.read_csv(tmp_path / "out/slides.csv")["features"].tolist() == ["old", "new"]


def test_features_and_scores_have_folders_of_their_own(files, model, tmp_path):
    how = {"um_per_pixel": UM, "stride_um": 100.0}
    embed_slides(files, tmp_path / "tiles", MeanColour(), **how)
    before = (tmp_path / "tiles/slides.csv").read_text()
    with pytest.raises(InputError, match=r"tiles: holds features of slides; choose another `outpu"):
        predict(files, model, tmp_path / "tiles", um_per_pixel=UM, features=tmp_path / "tiles")
    assert (tmp_path / "tiles/slides.csv").read_text() == before
    predict(files, model, tmp_path / "maps", um_per_pixel=UM, features=tmp_path / "tiles")
    with pytest.raises(InputError, match=r"maps: holds scores of slides; choose another `output`"):
        embed_slides(files, tmp_path / "maps", MeanColour(), **how)


def test_features_that_are_not_finite_are_named(files, tmp_path):
    class Endless(MeanColour):
        def encode(self, patches):
            return super().encode(patches) * 1e4

    how = {"um_per_pixel": UM, "stride_um": 100.0}
    said: list[str] = []
    with pytest.raises(InputError, match="2 of 2 slides failed"):
        embed_slides(files, tmp_path / "t", Endless(), dtype="float16", say=said.append, **how)
    assert "a.png: mean-colour features are not finite as float16; store them as float32" in said[0]
    embed_slides(files, tmp_path / "t", Endless(), **how)


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def test_what_travels_to_processes_embeds_as_here(files, tmp_path):
    looking = TileEmbedding(get_encoder("morphology"), 100.0, UM, False, "float32", None, 64, None)
    work = pickle.dumps(partial(_embed_one, looking, tmp_path / "two", progress))
    found = pickle.loads(work)(SlideEntry("a", files[0]), print)
    here = embed_slides(files[:1], tmp_path / "one", um_per_pixel=UM, stride_um=100.0)
    assert Path(found["features"]).read_bytes() == here["a"].read_bytes()


def test_shares_make_the_same_files(files, tmp_path):
    how = ("--mpp", UM, "--stride", 100, "--json")
    summary = json.loads(run("embed", *files, "-o", tmp_path / "one", *how).stdout)
    assert (summary["embedded"], summary["done_before"]) == (["a", "b"], [])
    assert summary["n_features"] == len(get_encoder("morphology").feature_names)
    again = json.loads(run("embed", *files, "-o", tmp_path / "one", *how).stdout)
    assert (again["embedded"], again["done_before"]) == ([], ["a", "b"])
    run("embed", *files, "-o", tmp_path / "shares", "--shard", "1/2", *how)
    run("collect", tmp_path / "shares", code=1)
    run("embed", *files, "-o", tmp_path / "shares", "--shard", "2/2", *how)
    done = json.loads(run("collect", tmp_path / "shares", "--json").stdout)
    assert done["states"] == {"done": 2}
    assert not (tmp_path / "shares/index.html").exists()
    for name in "ab":
        one, other = (tmp_path / run / name / "features.h5ad" for run in ("one", "shares"))
        assert one.read_bytes() == other.read_bytes()


def test_a_map_is_drawn_from_kept_features(files, tmp_path):
    facts = encoder_facts(get_encoder("morphology"))
    head = LinearHead(facts["n_features"], 1)
    head.weight.data[:] = 0.1
    panel = pd.DataFrame({"counts": 1.0}, index=pd.Index(["ERBB2"]))
    sizes = {"spot_diameter_um": 100.0, "spot_pitch_um": 200.0}
    RankModel(head, panel, facts, sizes).save(tmp_path / "model")
    how = ("--mpp", UM, "--model", tmp_path / "model")
    run("embed", *files, "--mpp", UM, "--stride", 100, "-o", tmp_path / "tiles")
    run("predict", *files, *how, "--features", tmp_path / "tiles", "-o", tmp_path / "kept")
    run("predict", *files, *how, "-o", tmp_path / "fresh")
    for name in "ab":
        pictures = [tmp_path / run / name / "ERBB2.png" for run in ("kept", "fresh")]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert (tmp_path / "kept/index.html").is_file()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["embed", "a.png"], "-o is missing: the folder for the features of slides"),
        (["embed", ".", "-o", "t"], "--output: for slides; . is taken for a cohort"),
        (["embed", "list.csv", "a.png", "-o", "t"], "list.csv: give a list of slides alone"),
        (["embed", "a.png", "-o", "t", "--dtype", "int8"], "dtype 'int8': choose one of"),
        (["embed", "a.png", "-o", "t", "--stride", "0"], "--stride must be above 0, in µm; got 0"),
        (["embed", "a.png", "-o", "t", "--stride", "nan"], "--stride must be above 0, in µm; got"),
        (["embed", "a.png", "-o", "t", "--precision", "fp8"], "no precision 'fp8'; choose one of"),
        (["embed", "nowhere", "-o", "t"], "nowhere: no such folder; make a cohort with"),
        (["embed", ".", "."], "give one cohort, or slides"),
        (["embed", "a.png", "-o", "t", "--mpp-override"], "--mpp-override takes --mpp in the"),
    ],
)
def test_what_is_asked_wrongly_is_told(files, tmp_path, monkeypatch, given, told):
    monkeypatch.chdir(tmp_path)
    errors = [e for e in run(*given, code=2).stderr.splitlines() if e.startswith("Error: ")]
    assert len(errors) == 1
    assert told in errors[0]
    assert not Path("t").exists()
