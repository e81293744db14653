"""Networks from the command line: trained, resumed, shared by processes, fine-tuned, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import anndata
import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("lightning")

from strank import RankModel
from strank.cli import app
from strank.neural.recipe import RECIPES


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def refuse(*arguments: object) -> str:
    result = run(*arguments, code=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.output
    return errors[0]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Three sections with features of three numbers, on disk as `strank embed` leaves them."""
    from PIL import Image
    from scipy import sparse

    from strank.cohort.contract import SectionInfo, make_section, spots_checksum
    from strank.cohort.folder import features_path
    from strank.cohort.store import write_h5ad

    folder = tmp_path_factory.mktemp("networks") / "cohort"
    slopes = np.random.default_rng(9).normal(size=(3, 5)) * 0.7
    for number, name in enumerate(["A1", "B1", "C1"]):
        rng = np.random.default_rng(number)
        y, x = np.mgrid[:6, :6].reshape(2, -1)
        spots = pd.DataFrame({"x": 40.0 * x + 30, "y": 40.0 * y + 30})
        spots.index = [f"{a}x{b}" for a, b in zip(x, y, strict=True)]
        features = rng.normal(size=(36, 3)).astype(np.float32)
        # The image shows the features as colours, so that an image network can find them.
        pixels = np.full((270, 270, 3), [150.0, 60.0, 150.0])
        for (a, b), colours in zip(np.c_[x, y], features, strict=True):
            pixels[40 * b + 10 : 40 * b + 50, 40 * a + 10 : 40 * a + 50] += 15 * colours
        image = folder.parent / f"{name}.png"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(image)
        from strank.files import sha256

        info = SectionInfo(str(image), sha256(image), 2.5, 55.0, 100.0, "ST", {"reader": "test"})
        counts = sparse.csr_matrix(rng.poisson(20 * np.exp(features @ slopes)))
        adata = make_section(
            counts,
            spots=spots,
            genes=pd.Index([f"G{i}" for i in range(5)]),
            section=name,
            patient=name,
            info=info,
        )
        write_h5ad(adata, folder / f"{name}.h5ad")
        facts = {"name": "mine", "version": "1", "fields": [], "n_features": 3}
        stored = anndata.AnnData(X=features, obs=pd.DataFrame(index=adata.obs_names))
        stored.uns = {"encoder": json.dumps(facts), "spots_sha256": spots_checksum(adata)}
        write_h5ad(stored, features_path(folder, "mine", name))
    return folder


def fit(cohort, output, *options, **kwargs):
    given = ("--encoder", "mine", "--genes", 4)
    return run("fit", cohort, "-o", output, *given, *options, **kwargs)


def test_a_network_is_trained_evaluated_and_says_where_its_curves_are(cohort, tmp_path):
    told = fit(cohort, tmp_path / "m", "--head", "mlp", "--sections", "A1,B1").stdout
    assert "stopped by A1: best of " in told
    assert "stopped by B1: best of " in told
    assert "Wrote a model of 4 genes from 2 sections" in told
    training = tmp_path / "m.training"
    assert {p.name for p in training.iterdir()} == {
        "training.json",
        "learning.png",
        "without-A1",
        "without-B1",
    }
    told = run("evaluate", cohort, "--model", tmp_path / "m", "-o", tmp_path / "ev").stdout
    assert "mlp, list" in told
    scores = pd.read_csv(tmp_path / "ev/scores.csv")
    assert scores.groupby("method")["scc"].mean()["mlp, list"] > 0.5


def test_a_note_stands_for_curves_that_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    from strank.cli.fit import _draw

    monkeypatch.setitem(sys.modules, "strank.report.plots", None)
    _draw(tmp_path)
    assert "no learning curves are drawn: pip install 'strank[plots]'" in capsys.readouterr().err


def test_a_fit_by_the_negative_binomial_says_its_dispersions(cohort, tmp_path):
    options = ("--encoder", "mine", "--genes", 3, "--loss", "nb", "-o", tmp_path / "m")
    told = " ".join(run("fit", cohort, *options).stdout.split())
    model = RankModel.load(tmp_path / "m")
    assert f"; dispersion: {model.provenance['dispersion']}" in told
    assert (model.panel["dispersion"] >= 0).all()


def test_folds_take_any_head_and_loss(cohort, tmp_path):
    options = ("--encoder", "mine", "--genes", 3, "--head", "linear", "--loss", "rank")
    run("evaluate", cohort, "--folds", "section", *options, "-o", tmp_path / "ev")
    assert "linear, rank" in set(pd.read_csv(tmp_path / "ev/summary.csv")["method"])
    facts = json.loads((tmp_path / "ev/evaluation.json").read_text())
    assert facts["folds"][0]["networks"][0]["validation"] != facts["folds"][0]["test"]


def test_folds_draw_the_sections_that_stop_the_published_recipe(cohort, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "published", replace(RECIPES["published"], max_epochs=2))
    options = ("--encoder", "mine", "--genes", 3, "--recipe", "published", "--seed", 1)
    told = run("evaluate", cohort, "--folds", "section", *options, "-o", tmp_path / "ev").stderr
    assert "Note: linear, list, published: stopped by the sections of one training patient" in told
    assert "linear, list, published" in set(pd.read_csv(tmp_path / "ev/summary.csv")["method"])
    for fold in json.loads((tmp_path / "ev/evaluation.json").read_text())["folds"]:
        [network] = fold["networks"]
        assert len(network["validation"]) == 1
        assert not set(network["validation"]) & set(fold["test"])
        assert set(network["validation"]) < set(fold["sections"])


def test_resume_goes_on_and_changes_nothing_in_what_is_done(cohort, tmp_path):
    options = ("--head", "mlp", "--validation", "C1", "--epochs", 5)
    fit(cohort, tmp_path / "m", *options)
    before = (tmp_path / "m" / "head.safetensors").read_bytes()
    fit(cohort, tmp_path / "m", *options, "--resume")
    assert (tmp_path / "m" / "head.safetensors").read_bytes() == before
    other = ("--head", "mlp", "--validation", "B1", "--epochs", 5, "--resume")
    error = refuse("fit", cohort, "-o", tmp_path / "m", "--encoder", "mine", "--genes", 4, *other)
    assert "training of another turns" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--head", "mpl"], "no head 'mpl'; choose one of linear, mlp, context"),
        (["--head", "mlp", "--loss", "lst"], "no loss 'lst'; choose one of list, pair"),
        (["--recipe", "good"], "no recipe 'good'; choose one of default, published"),
        (["--patience", "3"], "--patience is for networks: give --head mlp or context"),
        (["--resume"], "--resume is for networks"),
        (["--recipe", "exact", "--resume"], "--resume is for networks"),
        (["--seed", "0"], "--seed is for networks"),
        (["--devices", "2"], "--devices is for networks"),
        (["--precision", "bf16-mixed"], "--precision is for networks"),
        (["--head", "mlp", "--penalty", "3"], "--penalty is for the exact solver"),
        (["--head", "mlp", "--workers", "1"], "--workers is for training the encoder: give --fine"),
        (["--head", "mlp", "--micro-batch", "8"], "--micro-batch is for training the encoder"),
        (["--head", "mlp", "--sections", "A1"], "only section A1, and a network needs another"),
        (["--head", "mlp", "--validation", "Q"], "cannot hold out Q"),
        (["--head", "mlp", "--resume"], "no training to resume"),
        (["--head", "mlp", "--precision", "8"], "cannot train on auto"),
        (["--head", "mlp", "--finetune", "lora"], "no image network 'mine'; write timm:NAME"),
    ],
)
def test_refusals_leave_nothing(cohort, tmp_path, options, message):
    arguments = ("fit", cohort, "-o", tmp_path / "m", "--encoder", "mine", "--genes", 4)
    assert message in refuse(*arguments, *options)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("recipe", ["exact", "centred"])
def test_an_exact_recipe_may_be_named(cohort, tmp_path, recipe):
    options = ("--encoder", "mine", "--genes", 4, "--loss", "mse", "--recipe", recipe)
    run("fit", cohort, "-o", tmp_path / "m", *options)


def test_evaluation_refuses_what_it_would_ignore(cohort, tmp_path):
    folds = ("evaluate", cohort, "--folds", "section", "--encoder", "mine", "-o", tmp_path / "ev")
    assert "--seed is for networks" in refuse(*folds, "--seed", 1)
    model = ("evaluate", cohort, "--model", tmp_path / "m", "-o", tmp_path / "ev")
    assert "are the model's own" in refuse(*model, "--recipe", "published")


def launch(arguments, *, processes=None):
    """Run a command as a user would: with two processes by Lightning, or by torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes else []), "-m", "strank"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    told = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert told.returncode == 0, told.stderr
    return told


def test_two_processes_train_what_one_does(cohort, tmp_path):
    # Batches of odd size, which two processes share unevenly; one section stops the network.
    options = ("--head", "linear", "--recipe", "default", "--validation", "C1", "--epochs", 40)
    arguments = ("fit", cohort, "--encoder", "mine", "--genes", 4, *options)
    fit(cohort, tmp_path / "one", *options)
    told = launch([*arguments, "-o", tmp_path / "two", "--devices", 2])
    assert told.stdout.count("Wrote a model") == 1
    one, two = (load_file(tmp_path / m / "head.safetensors") for m in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6)
    curves = [
        pd.read_csv(tmp_path / f"{m}.training/without-C1/history.csv") for m in ("one", "two")
    ]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def image_network(tmp_path_factory):
    """A tiny vision transformer with random weights, in the layout of the hub."""
    timm = pytest.importorskip("timm")
    pytest.importorskip("peft")
    import torch

    folder = tmp_path_factory.mktemp("hub") / "tiny"
    arguments = {"img_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model("test_vit", num_classes=2, **arguments)
    overlay = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    config = {"pretrained_cfg": overlay}
    timm.models.save_for_hf(
        model, folder, model_config=config, model_args=arguments, safe_serialization=True
    )
    stored = json.loads((folder / "config.json").read_text())
    stored["pretrained_cfg"].update(overlay)
    (folder / "config.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize("mode", ["full", "last-1", "lora"])
def test_an_encoder_is_trained_saved_and_used(cohort, image_network, tmp_path, mode):
    model = tmp_path / "m"
    options = ("--encoder", f"timm:{image_network}", "--finetune", mode, "--genes", 4)
    told = run(
        "fit", cohort, "-o", model, *options, "--validation", "B1", "--epochs", 3,
        "--sections", "A1,B1", "--micro-batch", 20,
    )  # fmt: skip
    assert "stopped by B1" in told.stdout
    assert {p.name for p in model.iterdir()} == {
        "model.json",
        "head.safetensors",
        "encoder.safetensors",
    }
    run("predict", cohort / "C1.h5ad", "--model", model, "-o", tmp_path / "p", "--stride", 100)
    on_tiles = anndata.read_h5ad(tmp_path / "p" / "scores.h5ad")
    assert np.ptp(on_tiles.X, axis=0).min() > 0
    run("evaluate", cohort, "--model", model, "-o", tmp_path / "ev", "--sections", "C1")
    # As many epochs as are given here make it a recipe of one's own.
    assert "linear, list, own recipe" in set(pd.read_csv(tmp_path / "ev/scores.csv")["method"])
    # The features that evaluation made are the trained network's, kept beside the others.
    facts = json.loads((model / "model.json").read_text())["encoder"]
    assert facts["name"].startswith(f"timm_tiny-{mode}-")
    assert (cohort / "features" / facts["name"] / "C1.h5ad").is_file()


def test_a_trained_encoder_that_is_damaged_is_refused(cohort, image_network, tmp_path):
    model = tmp_path / "m"
    options = ("--encoder", f"timm:{image_network}", "--finetune", "last-1", "--genes", 4)
    run("fit", cohort, "-o", model, *options, "--validation", "B1", "--epochs", 1)
    weights = model / "encoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    error = refuse("predict", cohort / "C1.h5ad", "--model", model, "-o", tmp_path / "p")
    assert "encoder.safetensors: damaged" in error


def test_finetuning_learns_what_the_image_shows(cohort, image_network, tmp_path):
    from strank import RankModel, fit, read_cohort
    from strank.encoders.tiles import embed_spots
    from strank.neural.data import BatchPlan
    from strank.neural.recipe import Finetune, Recipe
    from strank.prediction import encoder_of
    from strank.slides.slide import slide_of

    recipe = Recipe(learning_rate=3e-3, weight_decay=1e-2, max_epochs=40, patience=40)
    recipe = Recipe(**{**vars(recipe), "batches": BatchPlan(sections=2, spots=36)})
    sections = read_cohort(cohort)
    train = {name: sections[name] for name in ("A1", "B1")}
    # Augmentation would hide the colours that this image is made of.
    model = fit(
        train,
        encoder=f"timm:{image_network}",
        finetune=Finetune("full", augment=False),
        recipe=recipe,
        n_genes=4,
        validation=["B1"],
    )
    model.save(tmp_path / "m")
    loaded, new = RankModel.load(tmp_path / "m"), sections["C1"]
    encoder = encoder_of(loaded)
    new.obsm[encoder.name] = embed_spots(slide_of(new), new.obsm["spatial"], encoder)
    scores = pd.DataFrame(np.asarray(loaded.predict(new).X), columns=loaded.panel.index)
    observed = np.log1p(new[:, loaded.panel.index].to_df()).reset_index(drop=True)
    assert scores.corrwith(observed).mean() > 0.5


def test_a_frozen_image_network_is_an_encoder_as_any_other(cohort, image_network, tmp_path):
    told = run("embed", cohort, "--encoder", f"timm:{image_network}").stdout
    assert "timm_tiny" in told
    options = ("--encoder", "timm_tiny", "--genes", 4, "--sections", "A1,B1")
    run("fit", cohort, "-o", tmp_path / "m", *options)
    predict = ("predict", cohort / "C1.h5ad", "--model", tmp_path / "m")
    # A folder that a file names is not opened.
    told = refuse(*predict, "-o", tmp_path / "p")
    assert f"if you trust it, embed with it first, or give --encoder timm:{image_network}" in told
    predict = (*predict, "--encoder", f"timm:{image_network}")
    run(*predict, "-o", tmp_path / "p")
    assert np.ptp(anndata.read_h5ad(tmp_path / "p" / "scores.h5ad").X, axis=0).min() > 0
    # Of another version, it is refused.
    stored = json.loads((tmp_path / "m" / "model.json").read_text())
    stored["encoder"]["version"] = "0" * 16
    (tmp_path / "m" / "model.json").write_text(json.dumps(stored))
    error = refuse(*predict, "-o", tmp_path / "q")
    assert "another timm_tiny than the model's (version differ)" in error


def test_two_processes_of_torchrun_fine_tune_what_one_does(cohort, image_network, tmp_path):
    options = ("--encoder", f"timm:{image_network}", "--finetune", "last-1", "--genes", 4)
    arguments = ("fit", cohort, *options, "--validation", "C1", "--epochs", 2)
    run(*arguments, "-o", tmp_path / "one")
    told = launch([*arguments, "-o", tmp_path / "two", "--devices", 2], processes=2)
    assert told.stdout.count("Wrote a model") == 1
    one, two = (
        pd.read_csv(tmp_path / f"{model}.training/without-C1/history.csv")
        for model in ("one", "two")
    )
    np.testing.assert_allclose(two, one, rtol=1e-4)
