"""What the benchmark fits: every name fits, and by training sections alone."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from PIL import Image
from scipy import sparse
from sklearn.linear_model import PoissonRegressor
from sklearn.preprocessing import StandardScaler

pytest.importorskip("lightning")

from strank import fit
from strank.cohort.folds import Fold
from strank.cohort.training_set import training_data
from strank.errors import InputError
from strank.evaluation.methods import draw_validation, fit_method
from strank.evaluation.protocol import Protocol
from strank.files import sha256
from strank.fitting.exact import (
    ExactOptions,
    hest_components,
    hest_ridge,
    solve_poisson,
    solve_ridge,
)
from strank.fitting.method import CENTRED_RIDGE, HEST_RIDGE, REFERENCE, RIDGE, Method
from strank.linear.penalty import DEFAULT_PENALTY
from strank.linear.penalty import PENALTIES as ALL_PENALTIES
from strank.linear.regressor import STRankRegressor
from strank.neural.recipe import RECIPES
from strank.studies.benchmark import runner as cells
from strank.studies.benchmark.grid import LOSSES, Cell, Task
from strank.studies.benchmark.runner import run_cell

PENALTIES = ALL_PENALTIES[::2]
PANEL = pd.Index(["G3", "G0", "G4"])
FOLD = Fold("C", ("A1", "B1"), ("C1",))
RIDGES = (RIDGE, CENTRED_RIDGE, HEST_RIDGE)
PAIR, POISSON = Method("linear", "pair"), Method("linear", "poisson")
QUICK = [REFERENCE, PAIR, POISSON, *RIDGES]
HEADS = ("mlp", "context", "mlp+linear", "context+linear")
TRAINED = [method for loss in LOSSES if not (method := Method("linear", loss)).is_exact]
TRAINED += [Method(head, "list") for head in HEADS]
named = {"ids": lambda method: method.name}


@pytest.fixture
def train(cohort) -> dict[str, AnnData]:
    return {name: cohort[name] for name in ("A1", "A2", "B1")}


def run(cohort: dict[str, AnnData], method: Method, out: Path, monkeypatch) -> AnnData:
    """Run a cell on sections that are in memory."""
    monkeypatch.setattr(cells, "_cohort", lambda folder, encoder, protocol: cohort)
    cell = Cell(Task("mine", 4, FOLD), method)
    run_cell(cell, Protocol("one", n_genes=(4,)), Path(), out)
    return cells.read_h5ad(cell.path(out))


@pytest.mark.parametrize("method", [*QUICK, *TRAINED], **named)
def test_every_method_predicts_sections_that_have_no_counts(cohort, tmp_path, monkeypatch, method):
    """Panel, penalties, networks, slopes: none can have come from the test."""
    new = cohort["C1"]
    cohort["C1"] = AnnData(obs=new.obs[["section", "patient"]], obsm=new.obsm, uns=new.uns)
    state = torch.get_rng_state()
    found = run(cohort, method, tmp_path, monkeypatch)
    assert found.shape == (30, 4)
    assert np.isfinite(found.X).all()
    assert np.ptp(found.X, axis=0).min() > 0
    assert set(found.obs["section"]) == {"C1"}
    # Those who draw numbers beside it get theirs.
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", QUICK, **named)
def test_other_counts_in_the_test_give_the_same_predictions(cohort, tmp_path, monkeypatch, method):
    one = run(cohort, method, tmp_path / "one", monkeypatch)
    wild = np.random.default_rng(0).poisson(9000, size=(30, 6))
    left_out = ~cohort["C1"].var_names.isin(one.var_names)
    wild[::2, left_out] = 0
    cohort["C1"].X = sparse.csr_matrix(wild.astype(np.float32))
    cohort["C1"].obs["library_size"] = 1e5
    other = run(cohort, method, tmp_path / "other", monkeypatch)
    np.testing.assert_array_equal(one.X, other.X)
    pd.testing.assert_frame_equal(one.var, other.var)
    # A panel of all sections would be another.
    panel = Protocol("all", panel_from="all", n_genes=(4,)).choose_panel(cohort, FOLD, 4)
    assert set(panel) > set(cohort["C1"].var_names[left_out])


def test_what_is_kept_of_a_cell(cohort, tmp_path, monkeypatch):
    found = run(cohort, RIDGE, tmp_path, monkeypatch)
    train = {name: cohort[name] for name in FOLD.train}
    solved = solve_ridge(training_data(train, found.var_names, "mine"), ExactOptions())
    np.testing.assert_allclose(found.X, solved.predict(cohort["C1"].obsm["mine"]), rtol=1e-5)
    assert found.obs_names[:2].tolist() == ["C1:0x0", "C1:1x1"]
    np.testing.assert_array_equal(found.obsm["spatial"], cohort["C1"].obsm["spatial"])
    about = json.loads(found.uns["strank_benchmark"])
    assert about["method"] == "ridge"
    assert about["train"] == list(FOLD.train)
    # Only scores that are no log rates have a slope.
    assert (found.var["slope"] > 0).all()
    assert list(run(cohort, POISSON, tmp_path, monkeypatch).var) == []


def by_sklearn(data, rows: np.ndarray, gene: int, penalty: float) -> np.ndarray:
    """Scores of all spots by Poisson regression of the rates of some, with exposure as weight."""
    scaler = StandardScaler().fit(data.features[rows].astype(float))
    features = scaler.transform(data.features.astype(float))
    depth = data.library_size.astype(float)
    counts = data.counts[:, [gene]].toarray()[:, 0]
    # Its loss is divided by the weights; and rates near 1 suit its optimiser.
    rate, total = counts[rows] / depth[rows], depth[rows].sum()
    unit = counts[rows].sum() / total
    model = PoissonRegressor(alpha=penalty / counts[rows].sum(), tol=1e-10, max_iter=1000)
    model.fit(features[rows], rate / unit, sample_weight=depth[rows])
    return features @ model.coef_


def held_out_loss(scores: np.ndarray, counts: np.ndarray, depth: np.ndarray) -> float:
    """Multinomial: how a section's counts are shared among its spots."""
    share = depth * np.exp(scores)
    return -float((counts * np.log(share / share.sum())).sum())


def test_poisson_is_scikit_learns_at_the_penalty_of_the_best_held_out_list(train):
    """Two patients, so each of the three sections is left out in turn."""
    rng, chosen = np.random.default_rng(0), []
    for section in train.values():
        noise = rng.normal(size=(30, 4)).astype(np.float32)
        section.obsm["mine"] = np.hstack([section.obsm["mine"], noise])
        # The fewer counts a gene has, the more it takes to learn from them.
        seen = rng.binomial(section.X.toarray().astype(int), [0.04, 1, 1, 1, 0.2, 1])
        section.X = sparse.csr_matrix(seen.astype(np.float32))
    data = training_data(train, PANEL, "mine")
    ours = fit_method(POISSON, train, PANEL, encoder="mine", aim="known-patients")
    scores = np.concatenate([ours(section) for section in train.values()])
    scores = scores / solve_poisson(data, ExactOptions()).table["temperature"]
    everything = np.ones(len(data.section), dtype=bool)
    for gene in range(len(PANEL)):
        counts = data.counts[:, [gene]].toarray()[:, 0]
        losses = np.zeros(len(PENALTIES))
        for (number, penalty), name in product(enumerate(PENALTIES), train):
            test = data.section == name
            predicted = by_sklearn(data, ~test, gene, penalty)[test]
            losses[number] += held_out_loss(predicted, counts[test], data.library_size[test])
        chosen.append(PENALTIES[losses.argmin()])
        best = by_sklearn(data, everything, gene, chosen[-1])
        np.testing.assert_allclose(scores[:, gene], best, atol=1e-4)
    assert len(set(chosen)) > 1
    assert max(PENALTIES) > max(chosen)


def test_poisson_shares_one_level_and_the_list_has_one_a_section(train):
    """Features that say which section a spot is of: Poisson learns its level, the list does not."""
    for number, section in enumerate(train.values()):
        section.obsm["mine"][:, 2] = number
        section.obs["library_size"] = 1000.0 * 4**number
    gap = {}
    for method in (POISSON, REFERENCE):
        predict = fit_method(method, train, PANEL, encoder="mine")
        first, *_, last = (predict(section).mean() for section in train.values())
        gap[method] = last - first
    assert gap[POISSON] < -0.5
    assert abs(gap[REFERENCE]) < 0.3


def test_exact_methods_are_those_of_the_package(train, cohort):
    data, new = training_data(train, PANEL, "mine"), cohort["C1"]

    def predicted(method: Method) -> np.ndarray:
        return fit_method(method, train, PANEL, encoder="mine")(new)

    model = fit(train, encoder="mine", genes=list(PANEL))
    np.testing.assert_array_equal(predicted(REFERENCE), model.predict(new).X)
    features = new.obsm["mine"]
    for method, centred in ((RIDGE, False), (CENTRED_RIDGE, True)):
        by_hand = solve_ridge(data, ExactOptions(), centred=centred).predict(features)
        np.testing.assert_array_equal(predicted(method), by_hand)
    inner, outer = hest_components(data.features, features, n_components=3)
    by_hand = hest_ridge(inner, data.counts.log1p().toarray(), outer)
    np.testing.assert_array_equal(predicted(HEST_RIDGE), by_hand)


@pytest.mark.parametrize("method", QUICK, **named)
def test_the_model_of_a_method_scores_as_the_method_does(train, cohort, method):
    """But for the level of a section, which a model leaves out, and float32."""
    how = {"head": method.head, "loss": method.loss, "recipe": method.recipe}
    model = fit(train, encoder="mine", genes=list(PANEL), **how)
    scores = fit_method(method, train, PANEL, encoder="mine")(cohort["C1"])
    expected = np.asarray(model.predict(cohort["C1"]).X)
    np.testing.assert_allclose(scores - scores.mean(0), expected, atol=3e-6)
    assert model.method == method.name


@pytest.mark.parametrize(
    ("method", "validation"),
    [(Method("mlp", "poisson"), ()), (Method("linear", "list", "published-quick"), ("A2",))],
)
def test_a_network_is_that_of_fit(train, cohort, method, validation):
    new, options = cohort["C1"], {"encoder": "mine", "genes": list(PANEL), "seed": 1}
    how = {"head": method.head, "loss": method.loss, "recipe": method.recipe}
    model = fit(train, validation=validation or None, **how, **options)
    assert (model.method, model.provenance["method"]["recipe"]) == (method.name, method.recipe)
    expected = np.asarray(model.predict(new).X)
    options = {"encoder": "mine", "seed": 1, "validation": validation}
    np.testing.assert_array_equal(fit_method(method, train, PANEL, **options)(new), expected)


def recounted(section: AnnData) -> AnnData:
    """Other counts of the same rates, about."""
    other = section.copy()
    counts = np.random.default_rng(5).poisson(section.X.toarray() + 0.5)
    other.X = sparse.csr_matrix(counts.astype(np.float32))
    other.obs["library_size"] = counts.sum(1) + 5.0
    return other


def test_validation_sections_stop_the_published_recipe_and_are_not_trained_on(cohort, monkeypatch):
    # So few and large steps that the last is the best, whatever the validation section's counts.
    few = replace(RECIPES["published"], learning_rate=0.01, max_epochs=5)
    monkeypatch.setitem(RECIPES, "published", few)
    published = Method("linear", "list", "published")
    how = {"encoder": "mine", "validation": ("A2",)}
    train, new = {name: cohort[name] for name in ("A1", "A2", "B1")}, cohort["C1"]

    def predicted(train: dict[str, AnnData], method: Method = published) -> np.ndarray:
        return fit_method(method, train, PANEL, **how)(new)

    one = predicted(train)
    model = fit(train, genes=list(PANEL), recipe="published", seed=0, **how)
    np.testing.assert_array_equal(one, model.predict(new).X)
    [network] = model.provenance["networks"]
    assert (network["validation"], network["epochs"], network["best_epoch"]) == (["A2"], 5, 4)
    other = {**train, "A2": recounted(cohort["A2"])}
    model = fit(other, genes=list(PANEL), recipe="published", seed=0, **how)
    [again] = model.provenance["networks"]
    assert again["best_epoch"] == 4
    assert again != network
    np.testing.assert_array_equal(predicted(other), one)
    assert not np.allclose(predicted({**train, "A1": recounted(cohort["A1"])}), one)
    # All else trains on them.
    for method in (REFERENCE, RIDGE, POISSON):
        assert not np.allclose(predicted(other, method), predicted(train, method))
    # None named: one is drawn, by the seed.
    how.pop("validation")
    drawn = draw_validation(train, 3)
    expected = fit(train, genes=list(PANEL), recipe="published", validation=drawn, seed=3, **how)
    found = fit_method(published, train, PANEL, seed=3, **how)(new)
    np.testing.assert_array_equal(found, expected.predict(new).X)


def test_validation_is_drawn_by_patient_where_there_are_three(cohort):
    drawn = {draw_validation(cohort, seed) for seed in range(20)}
    assert drawn == {("A1", "A2"), ("B1",), ("C1",)}
    two = {name: cohort[name] for name in ("A1", "A2", "B1")}
    assert {draw_validation(two, seed) for seed in range(20)} == {("A1",), ("A2",), ("B1",)}


@pytest.mark.parametrize("loss", ["list", "pair", "poisson"])
def test_without_library_size_all_spots_are_as_deep(train, cohort, loss):
    def predicted(**how) -> np.ndarray:
        scores = fit_method(Method("linear", loss, **how), train, PANEL, encoder="mine")
        return (found := scores(cohort["C1"])) - found.mean(0)

    found = predicted(library_size=False)
    assert not np.allclose(found, predicted(), atol=1e-2)
    for section in train.values():
        section.obs["library_size"] = 1e4
    np.testing.assert_allclose(found, predicted(), atol=1e-5)


@pytest.mark.parametrize("method", QUICK, **named)
def test_one_gene_and_spots_without_counts(train, cohort, method):
    """A spot without counts is not trained on, and predicted as any other."""
    empty = train["A1"]
    empty.X = sparse.csr_matrix(empty.X.toarray() * (np.arange(30) >= 4)[:, None])
    empty.obs.iloc[:4, empty.obs.columns.get_loc("library_size")] = 0
    empty.obsm["mine"][:4] = 1e3
    scores = fit_method(method, train, PANEL[:1], encoder="mine")(cohort["C1"])
    assert scores.shape == (30, 1)
    without = {**train, "A1": empty[4:].copy()}
    expected = fit_method(method, without, PANEL[:1], encoder="mine")(cohort["C1"])
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_one_training_section(cohort):
    """Nothing can be left out: exact methods have a penalty for that, networks refuse."""
    one = {"A1": cohort["A1"]}
    for method in QUICK:
        assert fit_method(method, one, PANEL, encoder="mine")(cohort["C1"]).shape == (30, 3)
    data = training_data(one, PANEL, "mine")
    expected = STRankRegressor(DEFAULT_PENALTY).fit(
        data.features, data.counts, offset=np.log(data.library_size)
    )
    found = fit_method(POISSON, one, PANEL, encoder="mine")(cohort["C1"])
    np.testing.assert_allclose(found, expected.predict(cohort["C1"].obsm["mine"]), rtol=1e-9)
    with pytest.raises(InputError, match="there is only section A1"):
        fit_method(Method("mlp", "list"), one, PANEL, encoder="mine")


@pytest.fixture
def image_network(tmp_path) -> str:
    """A tiny vision transformer with random weights, in the layout of the hub."""
    timm = pytest.importorskip("timm")
    arguments = {"img_size": 32, "patch_size": 8}
    model = timm.create_model("test_vit", num_classes=2, **arguments)
    folder, about = tmp_path / "tiny", {"input_size": (3, 32, 32), "mean": [0.5] * 3}
    timm.models.save_for_hf(model, folder, model_args=arguments, safe_serialization=True)
    stored = json.loads((folder / "config.json").read_text())
    stored["pretrained_cfg"].update(about, std=[0.2] * 3)
    (folder / "config.json").write_text(json.dumps(stored))
    return f"timm:{folder}"


@pytest.mark.parametrize("loss", ["list", "mse"])
def test_an_image_network_is_trained_from_images(
    cohort, image_network, tmp_path, monkeypatch, loss
):
    rng = np.random.default_rng(0)
    for name, section in cohort.items():
        image = tmp_path / f"{name}.png"
        Image.fromarray(rng.integers(0, 255, (600, 600, 3)).astype(np.uint8)).save(image)
        section.uns["strank"] |= {"image": str(image), "image_sha256": sha256(image)}
        # Features have no part in it.
        del section.obsm["mine"]
    cohort["C1"].X = sparse.csr_matrix((30, 6), dtype=np.float32)
    found = run(cohort, Method(image_network, loss), tmp_path / "out", monkeypatch)
    assert found.shape == (30, 4)
    assert np.ptp(found.X, axis=0).min() > 0
    assert ("slope" in found.var) == (loss == "mse")
