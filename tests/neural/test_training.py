"""Training from cohort to model: what is learned, resumed, refused, and never looked at."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

pytest.importorskip("lightning")

import strank
from strank.errors import InputError
from strank.fitting.objectives import OBJECTIVES
from strank.model.rank_model import RankModel
from strank.neural import checkpoints as keep
from strank.neural import training as logs
from strank.neural import training as run_module
from strank.neural.data import BatchPlan
from strank.neural.heads import ContextHead, MLPHead
from strank.neural.recipe import Machine, Recipe
from strank.neural.training import Step
from strank.storage import DamageWarning

QUICK = Recipe(learning_rate=0.02, weight_decay=0.01, max_epochs=15, patience=15, networks=1)
SMALL = partial(MLPHead, width=16)


@pytest.fixture
def cohort(section_of):
    """Four sections of four patients, whose rates follow the same three features."""
    return {name: section_of(name, patient=name, n_spots=90) for name in ("A1", "B1", "C1", "D1")}


@pytest.fixture
def fit(cohort):
    return partial(strank.fit, cohort, encoder="mine", n_genes=4, recipe=QUICK, head=SMALL)


def scores_of(model, adata):
    return np.asarray(model.predict(adata).X)


def test_a_linear_head_comes_to_the_exact_optimum(fit, cohort, section_of, tmp_path):
    # Whole sections as lists, no decay: what is left is the convex function that is also solved
    # exactly, on the three sections that the network sees.
    recipe = Recipe(learning_rate=0.1, weight_decay=0.0, max_epochs=250, patience=250, clip=None)
    recipe = replace(recipe, batches=BatchPlan(sections=3, spots=90))
    network = fit(head="linear", recipe=recipe, validation=["D1"], folder=tmp_path / "t")
    last = torch.load(tmp_path / "t" / "without-D1" / "last.ckpt", weights_only=True)["step"]
    # The best epoch by the held-out section is not the last, which is nearest to the optimum.
    weights = {name.removeprefix("network.head."): value for name, value in last.items()}
    network.head.load_state_dict(weights)
    train = {name: adata for name, adata in cohort.items() if name != "D1"}
    exact = strank.fit(train, encoder="mine", genes=list(network.panel.index), penalty=0.0)
    new = section_of("E1", n_spots=200)
    np.testing.assert_allclose(scores_of(network, new), scores_of(exact, new), atol=2e-3)


def test_networks_and_the_exact_linear_head_are_averaged(fit, cohort, section_of, tmp_path):
    recipe = replace(QUICK, max_epochs=2, networks=2)
    both, networks = fit(head="mlp+linear", recipe=recipe), fit(head="mlp", recipe=recipe)
    exact = strank.fit(cohort, encoder="mine", genes=list(both.panel.index))
    new = section_of("E1")
    mean = (scores_of(networks, new) + scores_of(exact, new)) / 2
    np.testing.assert_allclose(scores_of(both, new), mean, atol=1e-5)
    both.save(tmp_path / "m")
    np.testing.assert_array_equal(
        scores_of(RankModel.load(tmp_path / "m"), new), scores_of(both, new)
    )


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_objective_orders_the_spots_of_a_new_section(fit, section_of, loss):
    model = fit(loss=loss)
    new = section_of("E1", n_spots=200)
    slopes = np.random.default_rng(99).normal(size=(3, 6)) * 0.5
    truth = pd.DataFrame(new.obsm["mine"] @ slopes, columns=new.var_names)[model.panel.index]
    found = pd.DataFrame(scores_of(model, new), columns=model.panel.index)
    assert found.corrwith(truth).mean() > 0.8
    assert model.method == f"own head, {loss}, own recipe"


def test_levels_do_not_decay(fit, cohort):
    """Decay draws a gene's scores towards their mean, and that nowhere."""
    # Steps so small that nothing is learned, of which each takes nearly all of what decays.
    recipe = Recipe(learning_rate=1e-6, weight_decay=0.99e6, max_epochs=1)
    model = fit(head="linear", loss="poisson", recipe=recipe, validation=["D1"])
    train = [cohort[name] for name in ("A1", "B1", "C1")]
    counts = sum(np.asarray(a[:, model.panel.index].X.sum(0)).ravel() for a in train)
    depth = sum(a.obs["library_size"].sum() for a in train)
    weights = {name: value.numpy(force=True) for name, value in model.head.named_parameters()}
    np.testing.assert_allclose(weights["level"], np.log(counts / depth), atol=1e-4)
    assert np.abs(weights["readout.weight"]).max() < 0.01


@pytest.mark.parametrize("head", ["mlp", "context", "linear"])
def test_heads_by_name_are_saved_loaded_and_predict_the_same(fit, section_of, tmp_path, head):
    model = fit(head=head, recipe=replace(QUICK, max_epochs=2, networks=4))
    assert len(model.provenance["networks"]) == 4
    model.save(tmp_path / "m")
    new = section_of("E1", n_spots=40)
    loaded = RankModel.load(tmp_path / "m")
    np.testing.assert_array_equal(scores_of(loaded, new), scores_of(model, new))
    assert loaded.method == f"{head}, list, own recipe"


def test_networks_take_turns_and_none_sees_the_sections_that_stop_it(fit, monkeypatch):
    seen, scored = [], []
    forward, score = Step.forward, run_module.score_validation

    def watched(self, batch):
        seen.append((id(self), set(batch.section.tolist())))
        return forward(self, batch)

    def watched_score(scores, batch, monitor):
        scored.append((seen[-1][0], set(batch.section.tolist())))
        return score(scores, batch, monitor)

    monkeypatch.setattr(Step, "forward", watched)
    monkeypatch.setattr(run_module, "score_validation", watched_score)
    model = fit(recipe=replace(QUICK, max_epochs=2, networks=4))
    turns = [network["validation"] for network in model.provenance["networks"]]
    assert sorted(turns) == [["A1"], ["B1"], ["C1"], ["D1"]]
    for module in {key for key, _ in seen}:
        train = set.union(*(sections for key, sections in seen if key == module))
        validation = set.union(*(sections for key, sections in scored if key == module))
        assert not train & validation
        assert train | validation == {0, 1, 2, 3}


def test_patients_are_held_out_whole(section_of):
    cohort = {n: section_of(n, patient=n[0]) for n in ("A1", "A2", "B1", "C1", "C2")}
    model = strank.fit(
        cohort,
        head=SMALL,
        encoder="mine",
        n_genes=4,
        recipe=replace(QUICK, max_epochs=1, networks=5),
    )
    turns = [network["validation"] for network in model.provenance["networks"]]
    assert sorted(turns) == [["A1", "A2"], ["B1"], ["C1", "C2"]]


def test_the_best_epoch_is_kept_and_patience_ends_the_run(fit, cohort, tmp_path):
    # A learning rate so high that the held-out score falls after a few epochs.
    recipe = replace(QUICK, learning_rate=0.3, max_epochs=60, patience=4)
    model = fit(recipe=recipe, validation=["D1"], folder=tmp_path / "t")
    history = pd.read_csv(tmp_path / "t" / "without-D1" / "history.csv")
    score = history["validation/list_gain"]
    best = int(score.idxmax())
    assert len(history) == best + 5 < 60
    assert model.provenance["networks"][0]["best_epoch"] == best
    # An independent computation of that score, from the model that came out.
    adata = cohort["D1"]
    counts = adata[:, model.panel.index].X.toarray().astype(np.float64)
    depth = np.log(adata.obs["library_size"].to_numpy())[:, None]
    logits = scores_of(model, adata).astype(np.float64) + depth
    log_share = logits - np.log(np.exp(logits).sum(0))
    null = depth - np.log(np.exp(depth).sum())
    gain = (counts * (log_share - null)).sum(0).mean()
    assert gain == pytest.approx(score[best], rel=1e-4)


def test_the_same_seed_gives_the_same_model_and_another_another(fit, section_of):
    new, state = section_of("E1"), torch.random.get_rng_state()
    dropout = partial(MLPHead, width=16, dropout=0.5)
    a, b, c = (scores_of(fit(seed=s, loss="pair", head=dropout), new) for s in (1, 1, 2))
    fit(head="mlp+linear", recipe=replace(QUICK, max_epochs=1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 1e-3
    assert torch.equal(torch.random.get_rng_state(), state), "the user's generator was moved"


@pytest.mark.parametrize("loss", ["list", "pair", "nb"])
def test_an_interrupted_run_resumes_bit_for_bit(fit, section_of, tmp_path, monkeypatch, loss):
    head = partial(MLPHead, width=16, dropout=0.3)
    # Two batches an epoch, of which the second kills.
    recipe = replace(QUICK, max_epochs=9, networks=2, batches=BatchPlan(sections=2, spots=45))
    whole = fit(head=head, loss=loss, recipe=recipe, folder=tmp_path / "whole")
    monkeypatch.setattr(keep, "_SECONDS", 0.0)
    forward, epochs = Step.forward, []

    def killed(self, batch):
        epochs.append(1)
        # In its second network; the first is done, and must not be trained again.
        if len(epochs) == 9 * 2 + 5 * 2 + 1:
            raise OSError("the power went")
        return forward(self, batch)

    monkeypatch.setattr(Step, "forward", killed)
    with pytest.raises(OSError, match="the power went"):
        fit(head=head, loss=loss, recipe=recipe, folder=tmp_path / "cut")
    epochs.clear()
    resumed = fit(head=head, loss=loss, recipe=recipe, folder=tmp_path / "cut", resume=True)
    assert len(epochs) == 4 * 2
    for name, value in whole.head.state_dict().items():
        assert torch.equal(value, resumed.head.state_dict()[name]), name
    assert whole.provenance["networks"] == resumed.provenance["networks"]
    histories = [sorted((tmp_path / run).glob("*/history.csv")) for run in ("whole", "cut")]
    assert len(histories[0]) == 2
    for one, other in zip(*histories, strict=True):
        assert one.read_text() == other.read_text()


@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors", "history.csv"])
def test_what_is_damaged_is_named_and_made_anew(fit, tmp_path, name):
    """Never believed, wherever the bit is; only a damaged checkpoint is trained again."""
    whole, folder = fit(folder=tmp_path / "t", validation=["D1"]), tmp_path / "t" / "without-D1"
    kept = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    size = len(kept[name])
    for place in (0, 9, size // 3, size // 2, size - 90, size - 40, size - 1):
        wrong = bytearray(kept[name])
        wrong[place] ^= 1 << place % 8
        (folder / name).write_bytes(wrong)
        with pytest.warns(DamageWarning, match=rf"without-D1/{name}: damaged .*; it is made anew"):
            again = fit(folder=tmp_path / "t", validation=["D1"], resume=True)
        for key, value in whole.head.state_dict().items():
            assert torch.equal(value, again.head.state_dict()[key])
        assert {n: (folder / n).read_bytes() for n in kept} == kept


def test_checkpoints_are_read_without_unpickling(fit, tmp_path):
    fit(folder=tmp_path / "t", validation=["D1"])
    stored = torch.load(tmp_path / "t" / "without-D1" / "last.ckpt", weights_only=True)
    assert len(stored["history"]) == QUICK.max_epochs


def test_a_folder_of_another_training_is_refused(fit, tmp_path):
    with pytest.raises(InputError, match="no training to resume; start anew"):
        fit(folder=tmp_path / "t", resume=True)
    fit(folder=tmp_path / "t", recipe=replace(QUICK, max_epochs=1))
    with pytest.raises(InputError, match="training of another recipe; choose another `folder`"):
        fit(folder=tmp_path / "t", recipe=replace(QUICK, max_epochs=2), resume=True)
    wider = partial(MLPHead, width=17)
    with pytest.raises(InputError, match="training of another head"):
        fit(folder=tmp_path / "t", recipe=replace(QUICK, max_epochs=1), resume=True, head=wider)
    with pytest.raises(InputError, match="training of another seed"):
        fit(folder=tmp_path / "t", recipe=replace(QUICK, max_epochs=1), seed=1, resume=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    with pytest.raises(InputError, match="thesis: exists and is not a training"):
        fit(folder=tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


class Broken(nn.Module):
    """Scores of one gene that are not finite, in one section, after a while."""

    def __init__(self, n_features: int, n_genes: int) -> None:
        super().__init__()
        self.linear, self.steps = nn.Linear(n_features, n_genes), 0

    def forward(self, features):
        scores = self.linear(features)
        self.steps += self.training
        if self.steps > 3:
            gene = torch.arange(scores.shape[1]) == 2
            scores = torch.where((features[:, :1] > 0) & gene, torch.nan, scores)
        return scores


def test_a_loss_that_is_not_finite_names_batch_section_and_gene(fit, cohort):
    cohort["B1"].obsm["mine"][:, 0] = np.abs(cohort["B1"].obsm["mine"][:, 0])
    for name in ("A1", "C1", "D1"):
        cohort[name].obsm["mine"][:, 0] = -np.abs(cohort[name].obsm["mine"][:, 0])
    recipe = replace(QUICK, batches=BatchPlan(sections=3, spots=45))
    with pytest.raises(InputError) as error:
        fit(head=Broken, validation=["D1"], recipe=recipe)
    gene = fit(head=SMALL, recipe=replace(QUICK, max_epochs=1)).panel.index[2]
    assert f"epoch 1, batch 1: section B1, gene {gene} (its scores are not finite)" in str(error)


def test_any_module_is_trained_but_saved_only_under_a_name(fit, section_of, tmp_path):
    class Mine(nn.Module):
        def __init__(self, n_features: int, n_genes: int) -> None:
            super().__init__()
            self.linear = nn.Linear(n_features, n_genes)

        def forward(self, features):
            return self.linear(features).tanh()

    model = fit(head=Mine, recipe=replace(QUICK, max_epochs=2, networks=2))
    assert np.abs(scores_of(model, section_of("E1"))).max() > 0
    with pytest.raises(InputError, match=r"add the class to strank\.neural\.heads\.HEADS"):
        model.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "transformer"}, "no head 'transformer'; choose one of linear, mlp, context"),
        ({"loss": "hinge"}, "no loss 'hinge'; choose one of list, pair"),
        ({"recipe": "secret"}, "no recipe 'secret'; choose one of default, published"),
        ({"validation": ["Z9"]}, "cannot hold out Z9: name some, but not all, of A1, B1, C1, D1"),
        ({"validation": ["A1", "B1", "C1", "D1"]}, "cannot hold out A1, B1, C1"),
        ({"encoder": "theirs"}, r"has no features obsm\['theirs'\]"),
        ({"machine": Machine(accelerator="abacus")}, "cannot train on abacus"),
        ({"union": True, "loss": "mse"}, "mse cannot tell a gene that a section does not measure"),
    ],
)
def test_what_does_not_exist_is_refused(fit, options, message):
    with pytest.raises(InputError, match=message):
        fit(**options)


def test_a_section_without_a_gene_has_no_say_in_it(cohort):
    """Whatever the counts of that section were: the same network."""
    measured = [g for g in cohort["A1"].var_names if g != "G5"]
    lacking = {**cohort, "A1": cohort["A1"][:, measured].copy()}
    empty = {**cohort, "A1": cohort["A1"].copy()}
    empty["A1"].X = empty["A1"].X.multiply(cohort["A1"].var_names != "G5").tocsr()
    options = {"encoder": "mine", "genes": ["G0", "G5"], "seed": 0, "head": "linear"}
    recipe = Recipe(max_epochs=3, networks=1)
    one = strank.fit(lacking, **options, recipe=recipe, union=True)
    other = strank.fit(empty, **options, recipe=recipe)
    np.testing.assert_array_equal(*(scores_of(model, cohort["A1"]) for model in (one, other)))
    with pytest.raises(InputError, match="section A1 has no gene G5"):
        strank.fit(lacking, **options, recipe=recipe)


def test_one_section_cannot_stop_a_network(section_of):
    with pytest.raises(InputError, match="only section A1, and a network needs another"):
        strank.fit({"A1": section_of("A1")}, encoder="mine", n_genes=4, head="mlp")


def test_logs_are_written(fit, tmp_path):
    fit(folder=tmp_path / "t", validation=["D1"], recipe=replace(QUICK, max_epochs=3))
    folder = tmp_path / "t" / "without-D1"
    assert list(pd.read_csv(folder / "history.csv").columns) == [
        "epoch",
        "train/loss",
        "validation/list_gain",
    ]
    assert len(list((folder / "tensorboard").glob("events.out.tfevents*"))) == 1
    assert json.loads((tmp_path / "t" / "training.json").read_text())["seed"] == 0


@pytest.mark.parametrize(
    ("loss", "monitor", "column"),
    [("list", None, "list_gain"), ("list", "spearman", "spearman"), ("mse", None, "spearman")],
)
def test_the_score_is_named_for_what_it_is(fit, loss, monitor, column):
    model = fit(loss=loss, recipe=replace(QUICK, monitor=monitor))
    score = model.provenance["networks"][0][f"validation/{column}"]
    assert score > 1 if column == "list_gain" else 0 < score <= 1


def test_a_context_head_needs_positions_to_predict(fit, section_of):
    model = fit(head=partial(ContextHead, width=8, n_neighbours=4), recipe=QUICK)
    new = section_of("E1")
    del new.obsm["spatial"]
    with pytest.raises(InputError, match=r"^section E1: lacks obsm\[\"spatial\"\]"):
        model.predict(new)


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precisions_train(fit, section_of, precision):
    model = fit(machine=Machine(precision=precision))
    same = fit()
    new = section_of("E1")
    found, expected = (scores_of(m, new).ravel() for m in (model, same))
    assert np.corrcoef(found, expected)[0, 1] > 0.98


def test_weights_and_biases_must_be_there(fit, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="asked for, but not there: pip install wandb"):
        fit(machine=Machine(wandb="project"))


def test_folders_of_many_sections_have_names_that_a_file_system_takes(section_of, tmp_path):
    names = [f"{patient}-slide-{n}" for patient in "AB" for n in range(30)]
    cohort = {name: section_of(name, patient=name[0], n_spots=4) for name in names}
    strank.fit(
        cohort,
        head=SMALL,
        encoder="mine",
        n_genes=2,
        validation=names[:40],
        recipe=replace(QUICK, max_epochs=1),
        folder=tmp_path / "t",
    )
    (folder,) = (path for path in (tmp_path / "t").iterdir() if path.is_dir())
    assert len(folder.name) < 120
