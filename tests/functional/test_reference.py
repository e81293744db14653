"""Agreement with the authors' published implementation, value and gradient of every objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strank.functional.listwise import list_loss, pearson_loss
from strank.functional.pairwise import margin_ranking_loss, pair_loss
from strank.functional.pointwise import mse_loss, negative_binomial_loss, poisson_loss


@pytest.fixture(scope="module")
def stored(reference):
    values = np.load(reference / "loss_values.npz")
    return {name: torch.as_tensor(value) for name, value in values.items()}


def pairs_of(stored, name):
    if name == "pair_offset":
        return torch.stack([stored["pair_first"], stored["pair_second"]], 1)
    partners = stored["ranking_partners"]
    return torch.cat([torch.stack([torch.arange(64), row], 1) for row in partners])


def published(stored, name):
    """Return the loss and the arguments that make it the published one."""
    counts = stored["counts"]
    level = {"offset": (counts.mean(1) + 1e-6).log()}
    depth = {"offset": counts.sum(1).log()}
    mean = {"offset": counts.mean(1).log()}
    return {
        "list_offset": (list_loss, level),
        "list_no_offset": (list_loss, {}),
        "pair_offset": (pair_loss, level | {"pairs": pairs_of(stored, "pair_offset")}),
        "mse": (mse_loss, depth),
        "poisson": (poisson_loss, mean),
        "nb_theta1": (negative_binomial_loss, mean | {"dispersion": 1.0}),
        "pearson_pooled": (pearson_loss, depth | {"pooled": True}),
        "margin_ranking": (
            margin_ranking_loss,
            depth | {"margin": 0.0, "ties": "second", "pairs": pairs_of(stored, "margin_ranking")},
        ),
    }[name]


NAMES = [
    "list_offset",
    "list_no_offset",
    "pair_offset",
    "mse",
    "poisson",
    "nb_theta1",
    "pearson_pooled",
    "margin_ranking",
]


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient(stored, name):
    loss, options = published(stored, name)
    scores = stored["scores"].clone().requires_grad_()
    got = loss(scores, stored["counts"], section=stored["section"], **options)
    got.backward()
    torch.testing.assert_close(got.double(), stored[name], rtol=1e-6, atol=0)
    torch.testing.assert_close(scores.grad, stored[f"{name}_grad"], rtol=1e-5, atol=1e-7)


def test_every_stored_value_is_compared(stored):
    inputs = {"scores", "counts", "section", "pair_first", "pair_second", "ranking_partners"}
    compared = {*NAMES, *(f"{name}_grad" for name in NAMES), "pair_entropy_term"}
    assert set(stored) == inputs | compared


def test_entropy_term_of_the_published_training_code(stored):
    _, options = published(stored, "pair_offset")
    counts = torch.ones_like(stored["counts"])
    log_chance = -pair_loss(
        stored["scores"], counts, section=stored["section"], reduction="none", **options
    )
    got = -(log_chance.exp() * log_chance).mean()
    assert got.item() == pytest.approx(stored["pair_entropy_term"].item(), rel=5e-7)
