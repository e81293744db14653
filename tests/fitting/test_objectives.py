"""A name means one loss, with the same options, in every command that takes it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

pytest.importorskip("lightning")

from strank import fit
from strank.cohort.training_set import training_data
from strank.evaluation.methods import fit_method
from strank.fitting import networks
from strank.fitting.exact import ExactOptions
from strank.fitting.objectives import OBJECTIVES, get_objective
from strank.functional import (
    list_loss,
    margin_ranking_loss,
    mse_loss,
    negative_binomial_loss,
    pair_loss,
    pearson_loss,
    poisson_loss,
)
from strank.losses import SectionLoss
from strank.neural.heads import Network
from strank.neural.recipe import RECIPES, Recipe
from strank.studies.benchmark.grid import LOSSES, Grid
from strank.studies.synthetic.objectives import COMPARED, LISTS, make_loss

# What every name is, written out; those that draw take a generator.
PLAIN = {
    "list": list_loss,
    "pair": partial(pair_loss, n_partners=1),
    "rank": partial(margin_ranking_loss, margin=1.0, ties="none", n_partners=1),
    "rank-published": partial(margin_ranking_loss, margin=0.0, ties="second", n_partners=32),
    "pcc": partial(pearson_loss, pooled=True),
    "section-pcc": partial(pearson_loss, pooled=False),
    "mse": mse_loss,
    "poisson": poisson_loss,
    "nb": partial(negative_binomial_loss, dispersion=torch.ones(3)),
}
DRAWS = ("pair", "rank", "rank-published")


@pytest.fixture
def batch():
    """Twelve spots of two sections, three genes; counts have ties."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, 3, generator=generator)
    counts = torch.poisson(3 * scores.exp(), generator=generator)
    offset = torch.rand(12, generator=generator) + 7
    return scores, counts, {"section": torch.arange(12) % 2, "offset": offset}


def value_of(function, batch, seed=None, **options) -> torch.Tensor:
    """A loss by its function; drawn from a seed, or by torch's default generator."""
    scores, counts, spots = batch
    if seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed)
    return function(scores, counts, **spots, **options)


def called(loss, batch) -> torch.Tensor:
    scores, counts, spots = batch
    return loss(scores, counts, **spots).detach()


def test_all_names_are_here_and_no_two_are_the_same_loss(batch):
    assert list(PLAIN) == list(OBJECTIVES) == [each.name for each in OBJECTIVES.values()]
    assert len({each.title for each in OBJECTIVES.values()}) == len(OBJECTIVES)
    values = [float(called(each.module(3, "sum", seed=0), batch)) for each in OBJECTIVES.values()]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize("reduction", ["mean", "per_gene", "sum"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_module_of_a_name_is_its_function(batch, name, reduction):
    seed = {"seed": 3} if name in DRAWS else {}
    expected = value_of(PLAIN[name], batch, reduction=reduction, **seed)
    found = called(get_objective(name).module(3, reduction, seed=3), batch)
    torch.testing.assert_close(found, expected)


class Stop(Exception):
    """Enough was seen."""


class Seen(NamedTuple):
    """A training as it would begin."""

    network: Network
    loss: SectionLoss
    depth: np.ndarray
    turns: list[tuple[int, ...]]
    recipe: Recipe


@pytest.fixture
def begun(monkeypatch) -> list[Seen]:
    """What would be trained; the training is left out."""
    seen = []

    def train_ensemble(start, spots, names, turns, run):
        network, loss = start(np.arange(len(spots.section)))
        seen.append(Seen(network, loss, np.exp(spots.offset), turns, run.recipe))
        raise Stop

    monkeypatch.setattr(networks, "train_ensemble", train_ensemble)
    return seen


def begin(command, cohort, method, validation) -> None:
    """Fit a method by the verb, or as a benchmark does."""
    genes = ["G0", "G1", "G2"]
    if command == "benchmark":
        options = {"encoder": "mine", "validation": validation}
        with pytest.raises(Stop):
            fit_method(method, cohort, pd.Index(genes), **options)
        return
    how = {"loss": method.loss, "recipe": method.recipe}
    with pytest.raises(Stop):
        fit(cohort, encoder="mine", genes=genes, validation=validation or None, **how)


def assert_its_loss(loss, name, batch, **options):
    torch.manual_seed(5)
    found = called(loss, batch)
    torch.manual_seed(5)
    torch.testing.assert_close(found, value_of(PLAIN[name], batch, **options))


@pytest.mark.parametrize("reduction", ["per_gene", "mean"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_network_is_trained_by_its_name(cohort, begun, batch, name, reduction):
    with pytest.raises(Stop):
        fit(cohort, encoder="mine", n_genes=3, loss=name, recipe=Recipe(reduction=reduction))
    assert_its_loss(begun[0].loss, name, batch, reduction=reduction)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_benchmark_trains_by_the_same_name(cohort, begun, batch, name):
    method = Grid(losses=(name,), recipes=("default",)).methods[-1]
    assert method.objective is OBJECTIVES[name]
    begin("benchmark", cohort, method, ())
    assert_its_loss(begun[0].loss, name, batch, reduction="per_gene")


PUBLISHED = [recipe for recipe, of in RECIPES.items() if of.published]


@pytest.mark.parametrize("command", ["fit", "benchmark"])
@pytest.mark.parametrize("recipe", ["default", *PUBLISHED])
@pytest.mark.parametrize("name", [name for name, each in OBJECTIVES.items() if each.published])
def test_a_network_is_trained_by_the_recipe_that_it_is_named_for(
    cohort, begun, batch, name, recipe, command
):
    """Loss, depth, features and first weights are the recipe's, and so is how it is trained."""
    of = RECIPES[recipe]
    method = Grid(losses=(name,), recipes=(recipe,)).methods[-1]
    begin(command, cohort, method, ["C1"] if of.published else ())
    [seen] = begun
    if recipe == "published-no-entropy" and name != "pair":
        of = RECIPES["published"]
    monitor = "loss" if of.published else OBJECTIVES[name].monitor
    assert seen.recipe == replace(of, monitor=monitor)
    assert len(seen.turns) == (1 if of.published else 3)
    totals = np.concatenate([adata[:, :3].X.toarray().sum(1) for adata in cohort.values()])
    library = np.concatenate([adata.obs["library_size"] for adata in cohort.values()])
    usual = {"poisson": totals / 3, "nb": totals / 3, "list": totals / 3 + 1e-6}
    usual["pair"] = usual["list"]
    expected = usual.get(name, totals) if of.published else library
    np.testing.assert_allclose(seen.depth, expected, rtol=1e-5)
    raw = bool((seen.network.head.scale == 1).all())
    assert raw == of.published
    options = {"entropy": of.pair_entropy} if name == "pair" and of.published else {}
    made = OBJECTIVES[name].published if of.published else OBJECTIVES[name]
    losses = [seen.loss, made.module(3, of.reduction, **options)]
    values = []
    for loss in losses:
        torch.manual_seed(5)
        values.append(called(loss, batch))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("name", COMPARED)
def test_the_synthetic_study_compares_what_it_names(batch, name):
    options = {"seed": 4} if name in DRAWS else {}
    if name == "rank":
        options["n_partners"] = 32
    expected = value_of(PLAIN[name], batch, reduction="sum", **options)
    torch.testing.assert_close(called(make_loss(name, 3, 4), batch), expected)


def test_lists_of_the_synthetic_study_have_their_sizes(batch):
    for name, size in LISTS.items():
        expected = value_of(list_loss, batch, seed=4, list_size=size, reduction="sum")
        torch.testing.assert_close(called(make_loss(name, 3, 4), batch), expected)


def test_all_commands_have_the_same_names():
    assert set(COMPARED) == set(OBJECTIVES)
    assert set(OBJECTIVES) - set(LOSSES) == {"rank-published"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_scores_are_log_rates_where_it_is_said(name):
    """Only then are the true log rates, and not twice them, where the loss is level."""
    generator = torch.Generator().manual_seed(1)
    rates = 0.4 * torch.randn(40, 3, generator=generator, dtype=torch.float64)
    offset = torch.rand(40, generator=generator, dtype=torch.float64)
    counts = (rates + offset[:, None]).exp()
    loss = OBJECTIVES[name].module(3, "mean", seed=0).double()

    def is_level(scores):
        scores = scores.clone().requires_grad_()
        loss(scores, counts, section=torch.arange(40) % 2, offset=offset).backward()
        return scores.grad.abs().max() < 1e-9

    assert (is_level(rates) and not is_level(2 * rates)) == OBJECTIVES[name].log_rates


@pytest.mark.parametrize("name", [name for name, each in OBJECTIVES.items() if each.exact])
def test_the_exact_fit_is_where_its_loss_is_least(section_of, name):
    """Of the scores of an exact fit and of any near them, in the loss of the same name."""
    cohort = {n: section_of(n, patient=n, n_spots=150) for n in ("A1", "B1")}
    genes = pd.Index(["G0", "G1", "G2"])
    data = training_data(cohort, genes, "mine")
    options = ExactOptions() if name == "mse" else ExactOptions(penalty=1e-3)
    solved = OBJECTIVES[name].exact(data, options)
    # All pairs, of which the solver has drawn some.
    more = {"n_partners": None} if name == "pair" else {}
    more |= {"free_level": True} if name == "nb" else {}
    loss = OBJECTIVES[name].module(3, "mean", **more)
    if name == "nb":
        loss.log_dispersion = torch.nn.Parameter(torch.as_tensor(solved.table["dispersion"]).log())
    section = torch.as_tensor(np.unique(data.section, return_inverse=True)[1])
    offset = torch.as_tensor(np.log(data.library_size))
    counts = torch.as_tensor(data.counts.toarray().astype(float))
    standard = (data.features - solved.centre) / solved.scale

    def value(weight):
        scores = torch.as_tensor(standard @ weight)
        if name == "mse":
            scores += torch.as_tensor(solved.predict(data.features) - standard @ solved.weight)
        else:
            # The level, which only some of them see, at its own optimum.
            scores -= (scores + offset[:, None]).logsumexp(0) - counts.sum(0).log()
        return float(loss(scores, counts, section=section, offset=offset).detach())

    rng, best = np.random.default_rng(0), value(solved.weight)
    for _ in range(20):
        near = solved.weight + rng.normal(0, 0.1, solved.weight.shape)
        assert value(near) > best
