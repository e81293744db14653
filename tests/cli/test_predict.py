"""``strank predict`` as a user types it: several slides, resuming, exports, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import spatialdata
import torch
from PIL import Image
from typer.testing import CliRunner

from strank.cli import app
from strank.encoders.base import encoder_facts
from strank.encoders.registry import get_encoder
from strank.io import exports as geojson
from strank.model.novelty import fit_novelty
from strank.model.rank_model import RankModel
from strank.neural.heads import ContextHead, LinearHead

GENES = ["ERBB2", "HLA/A <b>", "VWF"]


def run(*arguments: object, code: int = 0):
    if "--genes" not in arguments:
        arguments = (*arguments, "--genes", "VWF")
    result = CliRunner().invoke(app, ["predict", *(str(a) for a in arguments)])
    assert result.exit_code == code, result.output
    return result


def refuse(*arguments: object) -> str:
    told = run(*arguments, code=2)
    [error] = [line for line in told.stderr.splitlines() if line.startswith("Error: ")]
    return error.removeprefix("Error: ")


def make_model(
    folder: Path, head_of: Callable = LinearHead, *, seed: int = 0, novelty: bool = False
) -> Path:
    facts = encoder_facts(get_encoder("morphology"))
    width = facts["n_features"]
    head = head_of(width, len(GENES))
    rng = np.random.default_rng(seed)
    if isinstance(head, LinearHead):
        head.weight.data = torch.as_tensor(rng.normal(size=(width, 3)), dtype=torch.float32)
    usual = fit_novelty(rng.normal(size=(60, width)), np.repeat([0, 1], 30)) if novelty else None
    provenance = {"spot_diameter_um": 100.0, "spot_pitch_um": 200.0}
    panel = pd.DataFrame({"counts": 1.0}, index=pd.Index(GENES))
    RankModel(head, panel, facts, provenance, None, usual).save(folder)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def slides(tmp_path) -> list[Path]:
    """Three slides of 0.8 x 0.7 mm, 2 µm a pixel, which only the TIFF says of itself."""
    paths = [tmp_path / name for name in ("one.png", "two.jpg", "three.tif")]
    for number, path in enumerate(paths):
        pixels = np.full((350, 400, 3), 240, np.uint8)
        tissue = np.random.default_rng(number).integers(60, 200, (250, 300, 3))
        pixels[50:300, 50:350] = tissue
        resolution = {"resolution": 5000.0, "resolution_unit": 3} if path.suffix == ".tif" else {}
        Image.fromarray(pixels).save(path, **resolution)
    return paths


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """Names of the slides that were embedded, in order."""
    from strank import prediction as predict
    from strank.encoders.tiles import embed_spots

    seen: list[str] = []

    def spy(slide, *arguments, **options):
        seen.append(slide.path.name)
        return embed_spots(slide, *arguments, **options)

    monkeypatch.setattr(predict, "embed_spots", spy)
    return seen


def test_several_slides_have_a_folder_each(slides, model, tmp_path):
    out = tmp_path / "out"
    told = run(*slides, "--mpp", 2, "--model", model, "-o", out, "--json")
    found = json.loads(told.stdout)
    assert [Path(row["scores"]) for row in found["slides"]] == [
        out / name / "scores.h5ad" for name in ("one", "two", "three")
    ]
    assert found["failed"] == {}
    for name in ("one", "two", "three"):
        assert sorted(p.name for p in (out / name).iterdir()) == [
            "VWF.png",
            "record.json",
            "scores.h5ad",
            "tissue.png",
        ]
    # A slide alone is written to the folder itself, with the same scores.
    alone = json.loads(run(slides[1], "--mpp", 2, "--model", model, "-o", out, "--json").stdout)
    assert alone["slides"][0]["scores"] == str(out / "scores.h5ad")
    np.testing.assert_array_equal(
        anndata.read_h5ad(out / "scores.h5ad").X, anndata.read_h5ad(out / "two/scores.h5ad").X
    )


def test_what_was_scored_is_not_scored_again(slides, model, tmp_path, embedded):
    arguments = ["--mpp", 2, "--model", model, "-o", tmp_path / "out"]
    run(slides[0], slides[1], *arguments)
    assert embedded == ["one.png", "two.jpg"]
    told = run(*slides, *arguments, "--genes", "ERBB2")
    assert embedded[2:] == ["three.tif"]
    assert told.stdout.count("Scored before:") == 2
    # Maps of other genes are drawn all the same.
    assert (tmp_path / "out/one/ERBB2.png").is_file()


@pytest.mark.parametrize(
    "change",
    [
        lambda slide, model, scores: ["--stride", 50],
        lambda slide, model, scores: ["--mpp", 1.5],
        lambda slide, model, scores: make_model(model, seed=1) and [],
        lambda slide, model, scores: scores.write_bytes(scores.read_bytes()[:2000]) and [],
        lambda slide, model, scores: Image.open(slide).rotate(180).save(slide),
    ],
)
def test_other_scale_stride_model_image_or_a_damaged_file_are_scored_again(
    slides, model, tmp_path, embedded, change
):
    out = tmp_path / "out"
    arguments = [slides[0], "--mpp", 2, "--model", model, "-o", out]
    run(*arguments)
    before = anndata.read_h5ad(out / "scores.h5ad")
    more = change(slides[0], model, out / "scores.h5ad") or []
    run(*arguments, *more)
    assert embedded == ["one.png"] * 2
    after = anndata.read_h5ad(out / "scores.h5ad")
    assert after.uns["strank"].keys() == before.uns["strank"].keys()
    run(*arguments, *more)
    assert len(embedded) == 2


def test_a_job_that_was_killed_goes_on(slides, model, tmp_path, monkeypatch, embedded):
    from strank import prediction as predict

    spy = predict.embed_spots

    def killed(slide, *arguments, **options):
        if slide.path.name == "two.jpg":
            raise KeyboardInterrupt
        return spy(slide, *arguments, **options)

    arguments = [*slides, "--mpp", 2, "--model", model, "-o", tmp_path / "out"]
    monkeypatch.setattr(predict, "embed_spots", killed)
    run(*arguments, code=130)
    assert not (tmp_path / "out/two").exists()
    monkeypatch.setattr(predict, "embed_spots", spy)
    run(*arguments)
    assert embedded == ["one.png", "two.jpg", "three.tif"]


def _truncated(slide: Path, monkeypatch) -> None:
    slide.write_bytes(slide.read_bytes()[:900])


def _raising(error: Exception) -> Callable:
    """A bug, or a machine at its end, that only this slide meets."""

    def break_it(slide: Path, monkeypatch) -> None:
        from strank import prediction

        embed = prediction.embed_spots

        def fragile(of, *arguments, **options):
            if of.path == slide:
                raise error
            return embed(of, *arguments, **options)

        monkeypatch.setattr(prediction, "embed_spots", fragile)

    return break_it


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (_truncated, "truncated image"),
        (lambda slide, _: slide.unlink(), "no such image"),
        (lambda slide, _: (slide.unlink(), slide.mkdir()), "two.jpg"),
        (
            _raising(IndexError("index 7 is out of bounds\nfor axis 0")),
            "IndexError in test_predict.py",
        ),
        (_raising(MemoryError()), "MemoryError in test_predict.py, line"),
        (_raising(RuntimeError("CUDA out of memory")), "CUDA out of memory"),
        (_raising(OSError(5, "Input/output error")), "Input/output error"),
        (_raising(ModuleNotFoundError("x", name="tifffile")), "pip install 'strank[images]'"),
    ],
)
def test_a_bad_slide_does_not_stop_the_others(
    slides, model, tmp_path, monkeypatch, break_it, reason
):
    break_it(slides[1], monkeypatch)
    out = tmp_path / "out"
    told = run(*slides, "--mpp", 2, "--model", model, "-o", out, "--json", code=1)
    found = json.loads(told.stdout)
    assert [Path(row["slide"]).name for row in found["slides"]] == ["one.png", "three.tif"]
    assert list(found["failed"]) == [str(slides[1])]
    assert f"Error: 1 of 3 slides failed: {slides[1]}" in told.stderr
    message = found["failed"][str(slides[1])]
    assert reason in message
    assert str(slides[1]) in message
    assert f"Note: {message}\n" in told.stderr
    assert not (out / "two/scores.h5ad").exists()
    table = pd.read_csv(out / "slides.csv", keep_default_na=False).set_index("name")
    assert list(table.index) == ["one", "two", "three"]
    assert table.loc["two", "error"] == message
    assert (table["error"] == "").tolist() == [True, False, True]
    assert table.loc["three", "scores"] == found["slides"][1]["scores"]


def test_an_output_that_cannot_be_written_is_told_before_the_work(slides, model, tmp_path):
    (tmp_path / "out").touch()
    assert "out: cannot write there" in refuse(
        *slides, "--mpp", 2, "--model", model, "-o", tmp_path / "out"
    )


def test_the_scale_is_the_files_or_asked_for(slides, model, tmp_path):
    arguments = ["--model", model, "-o", tmp_path / "out"]
    assert "one.png" in (error := refuse(slides[0], *arguments))
    assert "--mpp" in error
    run(slides[2], *arguments)
    scores = anndata.read_h5ad(tmp_path / "out/scores.h5ad")
    assert scores.uns["strank"]["um_per_pixel"] == pytest.approx(2)


@pytest.mark.parametrize("mpp", [1.0, 1.89, 2.11])
def test_another_scale_than_the_files_must_be_meant(mpp, slides, model, tmp_path):
    arguments = ["--mpp", mpp, "--model", model, "-o", tmp_path / "out"]
    error = refuse(slides[2], *arguments)
    assert f"three.tif: the file says 2 µm per pixel, not --mpp {mpp:g}; leave that out" in error
    assert "add --mpp-override if it is meant" in error
    run(slides[2], *arguments, "--mpp-override")
    scores = anndata.read_h5ad(tmp_path / "out/scores.h5ad")
    assert scores.uns["strank"]["um_per_pixel"] == mpp


@pytest.mark.parametrize("n_slides", [1, 3])
def test_an_override_without_a_scale_is_refused(n_slides, slides, model, tmp_path):
    error = refuse(*slides[:n_slides], "--mpp-override", "--model", model, "-o", tmp_path / "out")
    assert "--mpp-override takes --mpp in the place of what files say; give it too" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["one", "One", "ONE"])
def test_slides_of_the_same_name_are_refused(slides, model, tmp_path, name):
    twin = tmp_path / f"elsewhere/{name}.jpg"
    twin.parent.mkdir()
    Image.open(slides[0]).save(twin)
    error = refuse(slides[0], twin, "--mpp", 2, "--model", model, "-o", tmp_path / "out")
    assert f"two slides are called {name}, and would share" in error
    assert not (tmp_path / "out").exists()


def test_exports_of_the_chosen_genes(slides, model, tmp_path):
    arguments = [slides[0], "--mpp", 2, "--model", model, "-o", tmp_path / "out", "--stride", 50]
    chosen = ["--genes", "VWF,ERBB2", "--geojson", "--spatialdata", "--json"]
    (found,) = json.loads(run(*arguments, *chosen).stdout)["slides"]
    features = json.loads(Path(found["geojson"]).read_text())["features"]
    assert len(features) == found["n_tiles"]
    assert list(features[0]["properties"]["measurements"]) == ["VWF", "ERBB2"]
    data = spatialdata.read_zarr(found["spatialdata"])
    assert data["table"].var_names.tolist() == GENES
    assert len(data["tiles"]) == found["n_tiles"]


def test_a_geojson_that_is_too_large_is_refused_before_the_work(
    slides, model, tmp_path, monkeypatch, embedded
):
    monkeypatch.setattr(geojson, "_MOST_NUMBERS", 20)
    arguments = [slides[0], "--mpp", 2, "--model", model, "-o", tmp_path / "out"]
    assert "name fewer --genes, or raise --stride" in refuse(*arguments, "--geojson")
    assert embedded == []
    assert not (tmp_path / "out").exists()


def test_a_slide_unlike_the_training_is_told_each_time(slides, tmp_path):
    model = make_model(tmp_path / "model", novelty=True)
    arguments = [slides[0], "--mpp", 2, "--model", model, "-o", tmp_path / "out", "--json"]
    for _ in range(2):
        told = run(*arguments)
        assert "one.png: 100 % of the tiles look unlike anything in training" in told.stderr
        found = json.loads(told.stdout)
        assert "do not trust this map" in found["slides"][0]["warnings"][0]
        assert any("do not trust this map" in text for text in found["warnings"])
    scores = anndata.read_h5ad(tmp_path / "out/scores.h5ad")
    assert (scores.obs["novelty"] > 1).all()
    assert scores.obs["odd"].all()
    [warning] = scores.uns["strank"]["warnings"]
    assert warning == scores.uns["strank_novelty"]["warning"]


def test_odd_tissue_stands_in_table_page_and_export(slides, tmp_path):
    model = make_model(tmp_path / "model", novelty=True)
    out = tmp_path / "out"
    run(*slides[:2], "--mpp", 2, "--model", model, "-o", out, "--geojson", "--stride", 100)
    table = pd.read_csv(out / "slides.csv", keep_default_na=False).set_index("name")
    assert table["odd_share"].tolist() == [1, 1]
    assert (table["seconds"] > 0).all()
    assert table["warnings"].str.contains("do not trust this map").all()
    assert table["n_tiles"].tolist() == [anndata.read_h5ad(p).n_obs for p in table["scores"]]
    page = (out / "index.html").read_text()
    assert page.count("do not trust this map") == 2
    assert 'href="./one/scores.geojson"' in page
    features = json.loads((out / "one/scores.geojson").read_text())["features"]
    assert {tile["properties"]["classification"]["name"] for tile in features} == {
        "unlike training"
    }


def test_neighbours_nearer_than_in_training_are_told(slides, tmp_path):
    model = make_model(tmp_path / "model", ContextHead)
    arguments = [slides[0], "--mpp", 2, "--model", model, "-o", tmp_path / "out"]
    assert "neighbours" not in run(*arguments).stderr
    assert "200 µm away in training and 100 µm here" in run(*arguments, "--stride", 100).stderr
