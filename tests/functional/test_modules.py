"""Modules are thin shells over their functions."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from strank import losses
from strank.functional.listwise import list_loss, pearson_loss
from strank.functional.pairwise import margin_ranking_loss, pair_loss
from strank.functional.pointwise import mse_loss, negative_binomial_loss, poisson_loss

# Module, its arguments, function, the same arguments there.
SHELLS = [
    (losses.ListSTRankLoss, {}, list_loss, {}),
    (losses.ListSTRankLoss, {"list_size": 2, "seed": 5}, list_loss, {"list_size": 2, "seed": 5}),
    (losses.PairSTRankLoss, {"seed": 5}, pair_loss, {"seed": 5}),
    (losses.PairSTRankLoss, {"n_partners": None}, pair_loss, {"n_partners": None}),
    (
        losses.PairSTRankLoss,
        {"n_partners": 3, "seed": 5},
        pair_loss,
        {"n_partners": 3, "seed": 5},
    ),
    (losses.MarginRankingLoss, {"seed": 5}, margin_ranking_loss, {"seed": 5}),
    (
        losses.MarginRankingLoss,
        {"margin": 0.5, "ties": "second", "n_partners": 2, "seed": 5},
        margin_ranking_loss,
        {"margin": 0.5, "ties": "second", "n_partners": 2, "seed": 5},
    ),
    (losses.PearsonLoss, {}, pearson_loss, {}),
    (losses.PearsonLoss, {"pooled": True}, pearson_loss, {"pooled": True}),
    (losses.MSELoss, {}, mse_loss, {}),
    (losses.PoissonLoss, {}, poisson_loss, {}),
    (losses.PoissonLoss, {"free_level": True}, poisson_loss, {"free_level": True}),
    (losses.NegativeBinomialLoss, {"n_genes": 4}, negative_binomial_loss, {}),
    (
        losses.NegativeBinomialLoss,
        {"n_genes": 4, "free_level": True},
        negative_binomial_loss,
        {"free_level": True},
    ),
]
SEEDED = [losses.ListSTRankLoss, losses.PairSTRankLoss, losses.MarginRankingLoss]


def inputs(batch):
    return (batch["scores"], batch["counts"]), {k: batch[k] for k in ("section", "offset")}


@pytest.mark.parametrize("reduction", ["mean", "per_gene", "sum", "none"])
@pytest.mark.parametrize(
    ("module", "arguments", "function", "options"),
    SHELLS,
    ids=[f"{module.__name__}{i}" for i, (module, *_) in enumerate(SHELLS)],
)
def test_equals_its_function(batch, module, arguments, function, options, reduction):
    options = dict(options)
    if "seed" in options:
        options["generator"] = torch.Generator().manual_seed(options.pop("seed"))
    (scores, counts), rest = inputs(batch)
    # Spots of equal depth, so that there are ties.
    rest["offset"] = rest["offset"].sign()
    rest |= {"where": counts > 1, "weight": torch.tensor([1.0, 2.0, 0.5, 3.0])}
    got = module(**arguments, reduction=reduction)(scores, counts, **rest)
    expected = function(scores, counts, **rest, **options, reduction=reduction)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("module", "arguments"), [shell[:2] for shell in SHELLS])
def test_words_as_sections(batch, module, arguments):
    tensors, rest = inputs(batch)
    words = [f"section {code + 1}" for code in rest["section"].tolist()]  # sorted as the numbers
    got = module(**arguments)(*tensors, **rest | {"section": words})
    torch.testing.assert_close(got, module(**arguments)(*tensors, **rest), rtol=0, atol=0)


def test_the_mean_is_what_a_module_gives_unless_told(batch):
    tensors, rest = inputs(batch)
    got = losses.MSELoss()(*tensors, **rest)
    torch.testing.assert_close(got, mse_loss(*tensors, **rest))


def test_all_modules_are_in_the_table():
    modules = {getattr(losses, name) for name in losses.__all__} - {losses.SectionLoss}
    assert {module for module, *_ in SHELLS} == modules


def options_of(module):
    return {"list_size": 2} if module is losses.ListSTRankLoss else {}


def draws(loss, batch, n=4):
    tensors, rest = inputs(batch)
    return [loss(*tensors, **rest).item() for _ in range(n)]


@pytest.mark.parametrize("module", SEEDED)
def test_a_seed_makes_a_stream_of_its_own(batch, module):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = draws(module(seed=1, **options_of(module)), batch)
    torch.testing.assert_close(torch.get_rng_state(), before)
    assert draws(module(seed=1, **options_of(module)), batch) == first
    assert len(set(first)) > 1
    assert draws(module(seed=2, **options_of(module)), batch) != first


@pytest.mark.parametrize("module", SEEDED)
def test_without_a_seed_draws_follow_torch(batch, module):
    loss = module(**options_of(module))
    torch.manual_seed(3)
    first = draws(loss, batch)
    torch.manual_seed(3)
    assert draws(loss, batch) == first
    assert draws(loss, batch) != first


@pytest.mark.parametrize("module", SEEDED)
def test_a_copy_continues_the_stream(batch, module):
    loss = module(seed=1, **options_of(module))
    draws(loss, batch)
    twin = copy.deepcopy(loss)
    assert draws(twin, batch) == draws(loss, batch)


def test_only_the_negative_binomial_has_parameters():
    for module, arguments, *_ in SHELLS:
        names = set(module(**arguments).state_dict())
        assert names == ({"log_dispersion"} if "n_genes" in arguments else set())


@pytest.mark.parametrize("free_level", [False, True])
def test_dispersions_are_learned(free_level):
    rng = np.random.default_rng(0)
    truth = np.array([0.1, 0.5, 3.0])
    scores = rng.normal(size=(2000, 1)) * np.ones((1, 3))
    rates = 5 * np.exp(scores) * rng.gamma(1 / truth, truth, size=(2000, 3))
    loss = losses.NegativeBinomialLoss(3, free_level=free_level)
    optimiser = torch.optim.Adam(loss.parameters(), lr=0.1)
    arguments = {"section": torch.arange(2000) % 4, "offset": torch.full((2000,), np.log(5.0))}
    for _ in range(60):
        optimiser.zero_grad()
        loss(torch.tensor(scores), torch.tensor(rng.poisson(rates)), **arguments).backward()
        optimiser.step()
    # 2,000 spots know a log dispersion to about 0.1.
    np.testing.assert_allclose(loss.log_dispersion.detach(), np.log(truth), atol=0.3)


def test_dispersions_are_saved_and_loaded():
    loss = losses.NegativeBinomialLoss(3)
    torch.nn.init.constant_(loss.log_dispersion, -1.5)
    other = losses.NegativeBinomialLoss(3)
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other.log_dispersion, loss.log_dispersion)
