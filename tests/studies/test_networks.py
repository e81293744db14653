"""Networks trained together are what each would be alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strank.losses import ListSTRankLoss, MSELoss, NegativeBinomialLoss
from strank.studies.synthetic.cells import CurveNetworks, CurveRecipe, CurveSpots, train_curves

RECIPE = CurveRecipe(steps=30, batch=32, checks=3)


def spots(n_sets: int) -> CurveSpots:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n_sets, 2, 200, generator=generator)
    return CurveSpots(x, torch.poisson(5 * x, generator=generator), torch.zeros_like(x))


def trained(data: CurveSpots, losses, recipe: CurveRecipe = RECIPE) -> list[torch.Tensor]:
    seen = []
    x = torch.linspace(0, 1, 50)
    train_curves(
        data,
        losses,
        recipe=recipe,
        generator=torch.Generator().manual_seed(2),
        check=lambda networks: seen.append(networks(x.expand(len(losses) * len(data.x), -1))),
    )
    return seen


def test_a_batched_network_is_a_sequential_one():
    networks = CurveNetworks(3, torch.Generator().manual_seed(0))
    x = torch.rand(3, 7)
    for k, row in enumerate(networks(x)):
        alone = nn.Sequential(
            nn.Linear(1, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1)
        )
        for layer, weight, bias in zip(alone[::2], networks.weights, networks.biases, strict=True):
            layer.weight.data, layer.bias.data = weight[k].T, bias[k, 0]
        standardised = (x[k] - 0.5) / (1 / 12) ** 0.5
        torch.testing.assert_close(alone(standardised[:, None])[:, 0], row)


def test_bends_start_within_the_positions():
    networks = CurveNetworks(20, torch.Generator().manual_seed(0))
    bends = 0.5 - (networks.biases[0] / networks.weights[0]).detach() / 12**0.5
    assert bends.min() >= -1e-5
    assert bends.max() <= 1 + 1e-5
    assert bends.std().item() == pytest.approx((1 / 12) ** 0.5, rel=0.05)


def test_data_sets_do_not_touch_each_other():
    data = spots(2)
    other = CurveSpots(data.x, data.counts.clone(), data.offset)
    other.counts[1] = 50
    first, second = (trained(s, [ListSTRankLoss(reduction="sum")])[-1] for s in (data, other))
    torch.testing.assert_close(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_objectives_do_not_touch_each_other():
    data = spots(2)
    first, second = (
        trained(data, [MSELoss("sum"), other])[-1]
        for other in (ListSTRankLoss(reduction="sum"), NegativeBinomialLoss(2, reduction="sum"))
    )
    torch.testing.assert_close(first[:2], second[:2])
    assert not torch.allclose(first[2:], second[2:])


def test_training_learns_a_rising_curve():
    seen = trained(spots(1), [ListSTRankLoss(reduction="sum")], CurveRecipe(steps=200, batch=64))
    assert len(seen) == CurveRecipe().checks
    position = torch.arange(50.0)
    assert torch.corrcoef(torch.stack([position, seen[-1][0]]))[0, 1] > 0.9


def test_the_same_seed_gives_the_same_networks():
    first, second = (trained(spots(1), [MSELoss("sum")])[-1] for _ in range(2))
    assert torch.equal(first, second)
