"""The published recipe: step by step against plain PyTorch, and against what the paper's code gave.

The plain loop below is written from the paper and its code's description, with nothing of ours.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

pytest.importorskip("lightning")

import strank
from strank.errors import InputError
from strank.fitting.method import Method
from strank.fitting.objectives import OBJECTIVES
from strank.fitting.published import (
    N_PERMUTATIONS,
    PermutedPairLoss,
    PermutedRankLoss,
    share_entropy,
    torch_start,
)
from strank.functional.pairwise import permuted_pairs
from strank.neural.data import BatchPlan, SectionBatches, Spots
from strank.neural.heads import Network
from strank.neural.recipe import RECIPES, Machine
from strank.neural.training import Run, SpotNames, _Loop, train

PUBLISHED = RECIPES["published"]
WITHOUT_CHANCE = ("list", "mse", "pcc", "poisson", "nb")
LOSSES = (*WITHOUT_CHANCE, "rank", "pair")


def plain_loss(name, scores, counts, section, log_theta, pairs=None):
    """Every loss as the paper and its code have it, section by section where they do."""
    mean = counts.mean(1, keepdim=True)
    expression = (1e4 * counts / counts.sum(1, keepdim=True) + 1).log()
    if name == "list":
        logits = scores + (mean + 1e-6).log()
        parts = [
            -counts[section == s] * logits[section == s].log_softmax(0) for s in section.unique()
        ]
        return torch.cat(parts).mean()
    if name == "mse":
        return (scores - expression).square().mean()
    if name == "pcc":
        a, b = scores - scores.mean(0), expression - expression.mean(0)
        return -((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))).mean()
    if name == "poisson":
        log_rate = scores + mean.log()
        return (log_rate.exp() - counts * log_rate).mean()
    if name == "nb":
        theta, rate = log_theta.exp(), scores.exp() * mean
        probability = torch.distributions.NegativeBinomial(theta, logits=(rate / theta).log())
        return -probability.log_prob(counts).mean()
    first, second = pairs.unbind(1)
    if name == "rank":
        order = torch.where(expression[first] > expression[second], 1.0, -1.0)
        return torch.nn.functional.margin_ranking_loss(
            scores[first], scores[second], order, margin=0.0
        )
    logits = torch.stack([(scores + (mean + 1e-6).log())[side] for side in (first, second)])
    log_share = logits.log_softmax(0)
    entropy = -(log_share.exp() * log_share).mean()
    return (-torch.stack([counts[first], counts[second]]) * log_share).mean() + entropy


class Plain:
    """A linear layer and AdamW, stepped through given batches."""

    def __init__(self, name, start):
        self.name, self.layer = name, torch.nn.Linear(*reversed(start[0].shape))
        self.layer.weight.data.copy_(start[0])
        self.layer.bias.data.copy_(start[1])
        self.log_theta = torch.nn.Parameter(torch.zeros(len(start[1])))
        self.optimiser = torch.optim.AdamW([*self.layer.parameters(), self.log_theta], lr=5e-5)

    def loss(self, features, counts, section):
        scores = self.layer(features)
        if self.name == "poisson":
            self.log_theta.grad = None
        return plain_loss(self.name, scores, counts, section, self.log_theta)

    def step(self, *batch):
        self.optimiser.zero_grad()
        loss = self.loss(*batch)
        loss.backward()
        self.optimiser.step()
        return loss.item()


def ours(name, spots, start, orders, monkeypatch, epochs):
    """Train through given batches; loss of every batch, of validation, and the trained modules."""
    head, objective = torch_start(*reversed(start[0].shape)), OBJECTIVES[name]
    with torch.no_grad():
        head.readout.weight.copy_(start[0])
        head.level.copy_(start[1])
    module = objective.published.module(len(start[1]))
    seen = {True: [], False: []}
    module.register_forward_hook(lambda m, _, out: seen[m.training].append(out.item()))
    monkeypatch.setattr(SectionBatches, "_batches", lambda self: orders[self.epoch])
    depth = np.log(objective.published.depth(spots["counts"])).astype(np.float32)
    spots = Spots(spots["features"], spots["counts"], spots["section"], depth)
    # So that the last weights are the best: what is compared is every step.
    recipe = replace(PUBLISHED, max_epochs=epochs, patience=10**6)
    run = Run(recipe, Machine("cpu"), validation=(int(spots.section.max()),))
    last = {}
    with monkeypatch.context() as patched:
        patched.setattr(Network, "load_state_dict", lambda self, _: last.update(self.state_dict()))
        genes = tuple(map(str, range(len(start[1]))))
        train(Network(head), module, spots, SpotNames(tuple("abcd"), genes), run)
    return np.array(seen[True]), np.array(seen[False]), last, module


def toy(seed=0, sizes=(45, 40, 20), n_features=6, n_genes=4):
    """Three sections of Poisson counts of two different depths; the last is for validation."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(sum(sizes), n_features)).astype(np.float32)
    rates = np.exp(0.4 * features @ rng.normal(size=(n_features, n_genes)))
    depth = np.repeat([3.0, 12.0, 6.0], sizes)[:, None]
    counts = rng.poisson(depth * rates * rng.uniform(0.3, 2, n_genes)).astype(np.float32)
    counts[:, 0] += 1  # no spot without counts, which plain code cannot have
    section = np.repeat([0, 1, 2], sizes)
    return {"features": features, "counts": counts, "section": section}


@pytest.mark.parametrize("name", WITHOUT_CHANCE)
def test_every_step_is_that_of_plain_pytorch(name, monkeypatch):
    spots, rng, epochs = toy(), np.random.default_rng(1), 25
    start = torch.randn(4, 6) * 0.3, torch.randn(4) * 0.1
    orders = [np.split(rng.permutation(85), [32, 64]) for _ in range(epochs)]
    tensors = [torch.from_numpy(spots[k]) for k in ("features", "counts", "section")]
    plain, batches, validation = Plain(name, start), [], []
    for order in orders:
        batches += [plain.step(*(t[rows] for t in tensors)) for rows in order]
        validation.append(plain.loss(*(t[85:] for t in tensors)).item())
    found = ours(name, spots, start, orders, monkeypatch, epochs)
    np.testing.assert_allclose(found[0], batches, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(found[1], validation, rtol=2e-5, atol=1e-6)
    moved = found[2]["head.readout.weight"] - start[0]
    assert moved.abs().max() > 1e-3
    assert (found[2]["head.readout.weight"] - plain.layer.weight).norm() < 1e-4 * moved.norm()
    if name not in ("list", "pcc"):  # to which a level means nothing
        torch.testing.assert_close(found[2]["head.level"], plain.layer.bias.data)
    if name == "nb":
        torch.testing.assert_close(-found[3].log_dispersion.data, plain.log_theta.data)


@pytest.mark.parametrize("name", ["rank", "pair"])
def test_losses_with_chance_are_the_plain_ones_of_their_pairs(name):
    spots = {key: torch.from_numpy(value) for key, value in toy().items()}
    scores = torch.randn(spots["counts"].shape)
    torch.manual_seed(3)
    pairs = permuted_pairs(spots["section"], N_PERMUTATIONS if name == "rank" else 1)
    assert len(pairs) == (32 * 105 if name == "rank" else 105)
    offset = torch.from_numpy(OBJECTIVES[name].published.depth(spots["counts"].numpy())).log()
    torch.manual_seed(3)
    loss = OBJECTIVES[name].published.module(4)
    found = loss(scores, spots["counts"], section=spots["section"], offset=offset.float())
    expected = plain_loss(name, scores, spots["counts"], spots["section"], None, pairs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_ranks_of_many_genes_are_those_of_some_at_a_time(monkeypatch):
    spots = {key: torch.from_numpy(value) for key, value in toy(n_genes=11).items()}
    offset = spots["counts"].sum(1).log()
    scores = torch.randn(spots["counts"].shape, requires_grad=True)
    found = []
    # All at once, four genes at a time, and of a single gene still one.
    for most in (2**20, 4 * 32 * 105, 1):
        monkeypatch.setattr("strank.fitting.published._COMPARISONS", most)
        torch.manual_seed(3)
        value = PermutedRankLoss()(scores, spots["counts"], section=spots["section"], offset=offset)
        found.append((value, *torch.autograd.grad(value, scores)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-8)


def test_the_entropy_of_equal_shares_is_log_two_and_can_be_left_out():
    pairs = torch.tensor([[0, 1]])
    # -p log p of both spots, log 2 together, is a mean over the two.
    assert share_entropy(torch.zeros(2, 1), pairs).item() == pytest.approx(np.log(2) / 2)
    assert share_entropy(torch.tensor([[0.0], [1e4]]), pairs).item() == 0.0
    counts, section = torch.ones(4, 1), torch.zeros(4, dtype=torch.long)
    what = {"section": section, "offset": torch.zeros(4)}
    without = PermutedPairLoss(entropy=False)(torch.zeros(4, 1), counts, **what)
    assert without.item() == pytest.approx(np.log(2))
    whole = PermutedPairLoss()(torch.zeros(4, 1), counts, **what)
    assert whole.item() == pytest.approx(1.5 * np.log(2))


@given(section=st.lists(st.integers(-2, 2), min_size=1, max_size=30), n=st.integers(1, 3))
def test_a_permutation_has_every_spot_once_on_either_side(section, n):
    section = torch.tensor(section)
    pairs = permuted_pairs(section, n).reshape(n, len(section), 2)
    for side in pairs.permute(0, 2, 1).flatten(0, 1):
        assert sorted(side.tolist()) == list(range(len(section)))
    assert (section[pairs[..., 0]] == section[pairs[..., 1]]).all()


def test_all_permutations_of_a_section_are_equally_likely():
    torch.manual_seed(0)
    pairs = permuted_pairs(torch.zeros(3, dtype=torch.long), 6000).reshape(6000, 3, 2)
    partner = pairs[..., 1].gather(1, pairs[..., 0].argsort(1))
    _, times = partner.unique(dim=0, return_counts=True)
    assert len(times) == 6
    # Chance of a worse fit: 1e-4.
    assert stats.chisquare(times.numpy()).pvalue > 1e-4


def test_a_spot_without_counts_of_the_panel_has_no_say():
    counts = np.array([[3.0, 1], [0, 0], [2, 5]], np.float32)
    scores = torch.tensor([[0.1, 0.2], [0.7, -0.4], [0.3, 0.0]])
    section = torch.zeros(3, dtype=torch.long)
    for name in WITHOUT_CHANCE:
        objective = OBJECTIVES[name].published
        offset = torch.from_numpy(np.log(objective.depth(counts))).float()
        learned = scores.clone().requires_grad_()
        loss = objective.module(2)(
            learned, torch.from_numpy(counts), section=section, offset=offset
        )
        loss.backward()
        assert loss.isfinite()
        assert learned.grad.isfinite().all()
        if name in ("list", "poisson", "nb"):
            assert learned.grad[1].abs().max() < 1e-5


# The whole way, by `strank.fit`.


def cohort_of(arrays, **sizes):
    """Sections "a", "b", ... of features named "mine" and counts, of one patient each."""
    info = {"um_per_pixel": 1.0, "spot_pitch_um": 100.0, "spot_diameter_um": 55.0, "image": ""}
    info |= {"technology": "Visium", "image_sha256": "", "provenance": {}, "schema": 1}
    found = {}
    for name, (features, counts) in arrays.items():
        adata = AnnData(np.asarray(counts, np.float32))
        adata.var_names = [f"G{i:02}" for i in range(counts.shape[1])]
        adata.obs_names = [f"{name}{i}" for i in range(len(counts))]
        adata.obs = adata.obs.assign(section=name, patient=name)
        # Not that of the panel, which alone counts here.
        adata.obs["library_size"] = counts.sum(1) * 2.0 + np.arange(len(counts)) + 1
        place = np.stack([np.arange(len(counts)), np.zeros(len(counts))], 1) * 100.0
        adata.obsm = {"mine": features, "spatial": place}
        adata.uns["strank"] = info
        found[name] = adata
    return found


@pytest.fixture
def sections():
    spots = toy()
    rows = [spots["section"] == code for code in range(3)]
    arrays = zip("abc", rows, strict=True)
    return cohort_of({s: (spots["features"][r], spots["counts"][r]) for s, r in arrays})


def fitted(sections, tmp_path=None, epochs=3, **options):
    own = {"recipe": replace(PUBLISHED, max_epochs=epochs), "validation": ["c"], "encoder": "mine"}
    return strank.fit(sections, **own | {"n_genes": 4, "folder": tmp_path} | options)


@pytest.mark.parametrize("name", LOSSES)
def test_fit_trains_a_linear_layer_on_raw_features_by_the_published_loss(sections, tmp_path, name):
    spots = toy()
    model = fitted(sections, tmp_path / "t", epochs=2, loss=name, seed=4)
    last = torch.load(tmp_path / "t" / "without-c" / "last.ckpt", weights_only=True)["step"]
    seed = int(np.random.SeedSequence([4, 0]).generate_state(1)[0])
    torch.manual_seed(seed)
    layer = torch.nn.Linear(6, 4)
    genes = [int(gene[1:]) for gene in model.panel.index]
    arrays = spots["features"], spots["counts"][:, genes], spots["section"]
    tensors = [torch.from_numpy(array) for array in arrays]
    if name in WITHOUT_CHANCE:
        plain = Plain(name, (layer.weight.data, layer.bias.data))
        for epoch in range(2):
            batches = SectionBatches(spots["section"], np.arange(85), PUBLISHED.batches, seed=seed)
            batches.set_epoch(epoch)
            for _, rows in batches:
                plain.step(*(t[rows] for t in tensors))
        torch.testing.assert_close(
            last["network.head.readout.weight"], plain.layer.weight.data, rtol=1e-5, atol=1e-7
        )
    moved = last["network.head.readout.weight"] - layer.weight.data
    # AdamW's first steps are as long as the learning rate.
    assert 0.5e-4 < moved.abs().max() < 1.1e-4
    assert model.head.centre.abs().max() == 0
    assert (model.head.scale == 1).all()
    assert model.method == f"linear, {name}, own recipe"


def test_validation_sections_stop_the_network_and_are_not_trained_on(sections, tmp_path):
    other = {**sections, "c": sections["c"].copy()}
    other["c"].X = other["c"].X[::-1].copy()
    runs = {"one": sections, "other": other}
    for name, cohort in runs.items():
        fitted(cohort, tmp_path / name, epochs=6, genes=["G00", "G01", "G02", "G03"], n_genes=None)
    last = [
        torch.load(tmp_path / name / "without-c" / "last.ckpt", weights_only=True)["step"]
        for name in runs
    ]
    for key in last[0]:
        torch.testing.assert_close(last[0][key], last[1][key], rtol=0, atol=0)
    curves = [pd.read_csv(tmp_path / name / "without-c" / "history.csv") for name in runs]
    assert list(curves[0]) == ["epoch", "train/loss", "validation/loss"]
    assert (curves[0]["validation/loss"] != curves[1]["validation/loss"]).all()


def test_it_stops_when_the_validation_loss_has_not_fallen_for_patience_epochs(sections, tmp_path):
    # Validation counts that go against the training: the loss rises from the first epoch on.
    against = {**sections, "c": sections["a"][:20].copy()}
    against["c"].obs = against["c"].obs.assign(section="c", patient="c")
    against["c"].obs_names = [f"c{i}" for i in range(20)]
    against["c"].obsm["mine"] = -against["c"].obsm["mine"]
    recipe = replace(PUBLISHED, learning_rate=0.01)
    model = fitted(against, tmp_path / "t", recipe=recipe, loss="list")
    (network,) = model.provenance["networks"]
    path = tmp_path / "t" / "without-c" / "history.csv"
    history = pd.read_csv(path, float_precision="round_trip")
    best = history["validation/loss"].idxmin()
    assert network == {
        "validation": ["c"],
        "epochs": best + 31,
        "best_epoch": best,
        "validation/loss": history["validation/loss"].min(),
    }
    assert len(history) == best + 31


class Stopped(Exception):
    """As by a user."""


@pytest.mark.parametrize("loss", ["pair", "nb"])
def test_a_resumed_run_is_the_run(sections, tmp_path, monkeypatch, loss):
    recipe, score, calls = replace(PUBLISHED, max_epochs=12), _Loop._score, []
    whole = fitted(sections, tmp_path / "1", recipe=recipe, loss=loss)

    def scored(loop):
        calls.append(1)
        if len(calls) == 7:
            raise Stopped
        return score(loop)

    monkeypatch.setattr(_Loop, "_score", scored)
    monkeypatch.setattr("strank.neural.checkpoints._SECONDS", -1.0)
    with pytest.raises(Stopped):
        fitted(sections, tmp_path / "2", recipe=recipe, loss=loss)
    again = fitted(sections, tmp_path / "2", recipe=recipe, loss=loss, resume=True)
    assert len(calls) == 7 + 6
    weights = (model.head.readout.weight for model in (whole, again))
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_without_the_entropy_term_the_pair_loss_is_another(sections, tmp_path):
    def losses(recipe, folder):
        recipe = replace(RECIPES[recipe], max_epochs=1)
        fitted(sections, tmp_path / folder, loss="pair", recipe=recipe)
        return pd.read_csv(tmp_path / folder / "without-c" / "history.csv")["train/loss"][0]

    more = losses("published", "with") - losses("published-no-entropy", "without")
    # Shares of a pair are near a half at first: of the entropy, which is at most log(2) / 2.
    assert 0.5 * np.log(2) / 2 < more <= np.log(2) / 2


def test_lists_may_have_a_size(sections):
    def weight(list_size):
        recipe = replace(PUBLISHED, max_epochs=2, learning_rate=1e-2, list_size=list_size)
        return fitted(sections, loss="list", recipe=recipe, seed=1).head.readout.weight

    torch.testing.assert_close(weight(None), weight(1000), rtol=0, atol=0)
    assert (weight(None) - weight(2)).abs().max() > 1e-3


def test_only_the_pair_loss_has_an_entropy_term_to_leave_out():
    pair, one = (Method("linear", loss, "published-no-entropy") for loss in ("pair", "list"))
    assert pair.name == "linear, pair, published-no-entropy"
    assert one == Method("linear", "list", "published")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": None}, "stopped by sections that are named: give `validation`"),
        ({"loss": "section-pcc"}, "not for linear, section-pcc, but for `head` linear and `loss` "),
        ({"loss": "rank-published"}, "not for linear, rank-published"),
        ({"head": "mlp"}, "not for mlp, list"),
        ({"machine": Machine(devices=2)}, "of one process: take one of `devices`"),
        ({"finetune": "lora", "encoder": "timm:resnet18"}, "for features: leave `finetune`"),
        ({"validation": ["z"]}, "cannot hold out z: name some, but not all, of a, b, c"),
        (
            {"loss": "mse", "recipe": replace(PUBLISHED, list_size=4)},
            "mse has no lists: leave list_size out of the `recipe`",
        ),
        (
            {"loss": "mse", "library_size": False},
            "mse has no exposure that `library_size` could .* as list, pair, poisson, nb",
        ),
    ],
)
def test_refused(sections, options, message):
    for recipe in ("published", replace(PUBLISHED, max_epochs=1)):
        with pytest.raises(InputError, match=message):
            fitted(sections, **{"recipe": recipe} | options)


@pytest.mark.parametrize("loss", ["list", "pcc", "poisson"])
def test_validation_is_cut_into_batches_in_order(sections, loss):
    """As the paper's code does it: their mean, each weighing as many as its spots."""
    recipe = replace(PUBLISHED, max_epochs=1, batches=BatchPlan(sections=None, spots=7))
    model, held = fitted(sections, recipe=recipe, loss=loss), sections["c"]
    assert held.n_obs % 7
    features = torch.from_numpy(held.obsm["mine"])
    counts = torch.from_numpy(held[:, model.panel.index].X.toarray())
    parts = list(zip(model.head(features).split(7), counts.split(7), strict=True))
    losses = [plain_loss(loss, r, c, torch.zeros(len(c)), torch.zeros(4)) for r, c in parts]
    sizes = [len(c) for _, c in parts]
    (network,) = model.provenance["networks"]
    expected = np.average([one.item() for one in losses], weights=sizes)
    assert network["validation/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_section_that_tells_nothing_cannot_stop(sections):
    """Its loss is the same in every epoch, so the first would seem the best."""
    empty = sections["c"].copy()
    empty.X = empty.X * 0
    for recipe in ("published", "default"):
        with pytest.raises(InputError, match="section c cannot stop a network: no count"):
            fitted(sections | {"c": empty}, genes=["G01", "G02"], n_genes=None, recipe=recipe)


@pytest.mark.parametrize("how", [{}, {"recipe": "published", "validation": ["c"]}])
@pytest.mark.parametrize("loss", ["list", "pair", "poisson", "nb"])
def test_without_library_size_all_spots_count_as_of_one_depth(sections, loss, how):
    if how:
        how = how | {"recipe": replace(PUBLISHED, max_epochs=3)}
    elif loss == "nb":
        how = {"recipe": replace(RECIPES["default"], max_epochs=3)}
    options = {"encoder": "mine", "genes": ["G01", "G02", "G03"], "loss": loss, "seed": 0} | how
    if not options.get("recipe"):
        del options["seed"]
    model = strank.fit(sections, library_size=False, **options)
    assert model.method.endswith(", no library size")
    assert model.provenance["method"]["library_size"] is False
    flat = {name: adata.copy() for name, adata in sections.items()}
    for adata in flat.values():
        adata.obs["library_size"] = 1e4
    predicted = np.asarray(model.predict(sections["a"]).X)
    if "published" not in str(how):
        np.testing.assert_allclose(
            predicted, strank.fit(flat, **options).predict(sections["a"]).X, rtol=1e-5, atol=1e-6
        )
    usual = np.asarray(strank.fit(sections, **options).predict(sections["a"]).X)
    assert np.abs(predicted - usual).max() > 1e-5


# Beside numbers of the paper's own code.


@pytest.fixture(scope="module")
def task(reference):
    return dict(np.load(reference / "paper_recipe.npz"))


@pytest.mark.parametrize("name", WITHOUT_CHANCE)
def test_every_step_is_that_of_the_papers_code(task, name, monkeypatch):
    samples = ("a", "b", "val")
    spots = {
        key: np.concatenate([task[f"{key}_{sample}"] for sample in samples]).astype(np.float32)
        for key in ("features", "counts")
    }
    spots["section"] = np.repeat([0, 1, 2], [len(task[f"counts_{s}"]) for s in samples])
    start = torch.from_numpy(task["weight0"]), torch.from_numpy(task["bias0"])
    orders = [np.split(order, range(256, len(order), 256)) for order in task["order"]]
    found = ours(name, spots, start, orders, monkeypatch, 60)
    np.testing.assert_allclose(found[0], task[f"{name}_batch_loss"].ravel(), rtol=1e-4)
    # A validation loss of the correlation passes through 0.
    np.testing.assert_allclose(found[1], task[f"{name}_val_loss"], rtol=1e-4, atol=1e-6)
    weight = torch.from_numpy(task[f"{name}_weight"])
    assert (found[2]["head.readout.weight"] - weight).norm() < 1e-5 * weight.norm()
    if name == "nb":
        theta = torch.from_numpy(task["nb_log_theta"])
        torch.testing.assert_close(-found[3].log_dispersion.data, theta, rtol=1e-4, atol=1e-6)


def test_a_batch_is_cut_as_the_papers_code_does():
    batches = SectionBatches(np.zeros(600, int), np.arange(600), PUBLISHED.batches, seed=0)
    sizes = [len(rows) for _, rows in batches]
    assert sizes == [256, 256, 88]
    assert PUBLISHED.batches == BatchPlan(sections=None, spots=256)


def scc_of(task, name, seed):
    """Mean over genes of the test sample's Spearman correlation, and when the run was stopped."""
    cohort = cohort_of({s: (task[f"features_{s}"], task[f"counts_{s}"]) for s in ("a", "b", "val")})
    model = strank.fit(
        cohort,
        encoder="mine",
        genes=list(cohort["a"].var_names),
        loss=name,
        recipe="published",
        validation=["val"],
        seed=seed,
    )
    with torch.no_grad():
        scores = model.head(torch.from_numpy(task["features_test"])).numpy()
    counts = task["counts_test"]
    target = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    each = [stats.spearmanr(a, b).statistic for a, b in zip(scores.T, target.T, strict=True)]
    return float(np.mean(each)), model.provenance["networks"][0]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_stopped_runs_agree_with_the_papers_code_in_distribution(task, reference, name):
    """Over seeds: t-test of the SCC at 0.001; of the pair loss, which is unstable, Mann-Whitney.

    That is at 0.01: by three seeds of theirs it cannot be much below, but without its entropy term
    the pair loss is (it runs for all 1,000 epochs, too).
    """
    known = json.loads((reference / "paper_recipe.json").read_text())[name]
    n_seeds = 24 if name == "pair" else 2
    found, networks = zip(*(scc_of(task, name, seed) for seed in range(n_seeds)), strict=True)
    if name == "pair":
        for mine, theirs in (
            (found, known["scc"]),
            ([network["epochs"] for network in networks], known["epochs_run"]),
        ):
            assert stats.mannwhitneyu(mine, theirs).pvalue > 0.01
        return
    assert stats.ttest_ind(found, known["scc"], equal_var=True).pvalue > 0.001
    assert abs(np.mean(found) - np.mean(known["scc"])) < 0.06
    if name in WITHOUT_CHANCE:
        assert {network["epochs"] for network in networks} == {1000}
