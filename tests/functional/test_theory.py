"""What the objectives are to each other, and what they estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from strank.functional.listwise import list_loss
from strank.functional.pairwise import pair_loss, sample_pairs
from strank.functional.pointwise import negative_binomial_loss, poisson_loss
from strank.functional.segments import random_lists

FREE = ["list", "pair_all", "poisson_free", "nb_free"]


def gradient(loss, batch, **changes):
    scores = batch["scores"].clone().requires_grad_()
    value = loss(batch, scores=scores, **changes)
    return value.detach(), torch.autograd.grad(value, scores)[0]


# What equals what


def test_a_list_of_two_spots_is_a_pair(row_named, batch):
    two = {name: values[[0, 2]] for name, values in batch.items()}
    for got, expected in zip(
        gradient(row_named["list"], two), gradient(row_named["pair_all"], two), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_lists_of_two_are_pairs(row_named, batch):
    lists = random_lists(batch["section"], 2, generator=torch.Generator().manual_seed(4))
    pairs = [
        rows.tolist()
        for label in lists.unique()
        if len(rows := (lists == label).nonzero().flatten()) == 2
    ]
    assert len(pairs) == 3
    listwise = gradient(
        row_named["list"], batch, list_size=2, generator=torch.Generator().manual_seed(4)
    )
    pairwise = gradient(row_named["pair_given"], batch, pairs=torch.tensor(pairs))
    for got, expected in zip(listwise, pairwise, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", [None, torch.arange(36).reshape(9, 4) % 5 != 0])
def test_list_has_the_gradient_of_poisson_with_a_free_level(row_named, batch, where):
    value, slope = gradient(row_named["list"], batch, where=where)
    free_value, free_slope = gradient(row_named["poisson_free"], batch, where=where)
    torch.testing.assert_close(free_slope, slope, rtol=1e-11, atol=1e-12)
    # And the value, up to the total T - T log T of each section and gene.
    counts = batch["counts"] if where is None else batch["counts"] * where
    totals = torch.stack([counts[batch["section"] == s].sum(0) for s in (-1, 2, 5, 8)])
    constant = (totals - torch.special.xlogy(totals, totals)).sum()
    torch.testing.assert_close(free_value, value + constant, rtol=1e-12, atol=1e-12)


# Free levels


def fitted_level(batch, phi):
    """Level of every element, read off the gradient: (c + 1/phi) chance - c."""
    scores = batch["scores"].clone().requires_grad_()
    negative_binomial_loss(
        scores, **rest(batch), dispersion=phi, free_level=True, reduction="sum"
    ).backward()
    chance = (scores.grad + batch["counts"]) / (batch["counts"] + 1 / phi)
    return chance.logit() - np.log(phi) - batch["scores"] - batch["offset"][:, None]


def rest(batch):
    return {name: values for name, values in batch.items() if name != "scores"}


@pytest.mark.parametrize("phi", [0.05, 1.0, 20.0])
def test_level_of_the_negative_binomial_is_its_optimum(batch, phi):
    level = fitted_level(batch, phi)
    for label, g in [(5, 0), (5, 3), (2, 1), (8, 1)]:
        rows = batch["section"] == label
        one = {"section": batch["section"][rows], "offset": batch["offset"][rows]}
        one |= {name: batch[name][rows, g : g + 1] for name in ("scores", "counts")}

        def cost(a, one=one):
            shifted = one["scores"] + a
            options = {"dispersion": phi, "reduction": "sum"}
            return negative_binomial_loss(shifted, **rest(one), **options).item()

        best = minimize_scalar(cost, bounds=(-20, 20), method="bounded", options={"xatol": 1e-9})
        np.testing.assert_allclose(level[rows, g], best.x, atol=1e-5)
        free = negative_binomial_loss(
            **one, dispersion=phi, free_level=True, reduction="sum"
        ).item()
        assert free == pytest.approx(best.fun, rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 1.0, 10.0, 30.0]),
    mean=st.sampled_from([0.05, 1.0, 100.0]),
    phi=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
)
def test_level_is_found_wherever_it_is(row_named, seed, spread, mean, phi):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "scores": spread * torch.randn(40, 4, generator=generator, dtype=torch.float64),
        "counts": torch.poisson(torch.full((40, 4), mean).double(), generator=generator),
        "section": torch.randint(0, 3, (40,), generator=generator),
        "offset": torch.randn(40, generator=generator, dtype=torch.float64),
    }
    _, slope = gradient(row_named["nb_free"], batch, dispersion=phi)
    for label in range(3):
        rows = batch["section"] == label
        total = batch["counts"][rows].sum(0)
        # A shift of all scores of a section has no derivative: it is at the optimum.
        assert (slope[rows].sum(0).abs() <= 1e-9 * (total + 1)).all()


# Large differences, many counts


@settings(deadline=None, max_examples=50)
@given(
    difference=st.floats(-60, 60),
    counts=st.tuples(st.integers(0, 50), st.integers(0, 50)),
)
def test_pair_loss_approaches_a_hinge_weighted_by_counts(difference, counts):
    first, second = counts
    got = pair_loss(
        torch.tensor([[difference], [0.0]], dtype=torch.float64),
        torch.tensor([[first], [second]]),
        section=torch.zeros(2).long(),
        n_partners=None,
        reduction="sum",
    ).item()
    hinge = first * max(0.0, -difference) + second * max(0.0, difference)
    bound = (first + second) * np.log1p(np.exp(-abs(difference)))
    assert -1e-9 <= got - hinge <= bound + 1e-9


@pytest.mark.parametrize("name", ["list", "pair_all"])
def test_a_section_weighs_by_its_counts(row_named, batch, name):
    section = {k: v[batch["section"] == 5] for k, v in batch.items()}
    value, slope = gradient(row_named[name], section)
    more, more_slope = gradient(row_named[name], section, counts=7 * section["counts"])
    torch.testing.assert_close(more, 7 * value)
    torch.testing.assert_close(more_slope, 7 * slope)


@pytest.mark.parametrize("factor", [1.0, 7.0])
@pytest.mark.parametrize("name", FREE)
def test_observed_rates_are_the_optimum(row_named, batch, name, factor):
    counts = batch["counts"] + 1
    rates = counts.log() - batch["offset"][:, None]
    level = torch.randn(20, generator=torch.Generator().manual_seed(0))[batch["section"] + 1]
    optimum = batch | {"scores": rates + level[:, None]}
    _, slope = gradient(row_named[name], optimum, counts=factor * counts)
    assert slope.abs().max() < 1e-10
    _, elsewhere = gradient(row_named[name], optimum | {"scores": 0.9 * optimum["scores"]})
    assert elsewhere.abs().max() > 0.01


# Expectations

DRAWS = 4000


def gradient_at_the_truth(row, shape, offset=None):
    """Mean gradient over many draws of counts in standard errors; a draw is a gene."""
    rng = np.random.default_rng(5)
    scores, depth = rng.normal(size=(12, 1)), rng.lognormal(2, 0.7, size=(12, 1))
    mean = depth * np.exp(scores) * np.ones((1, DRAWS))
    if shape is not None:
        mean = mean * rng.gamma(shape, 1 / shape, size=mean.shape)
    batch = {
        "scores": torch.tensor(scores).repeat(1, DRAWS),
        "counts": torch.tensor(rng.poisson(mean)).double(),
        "section": torch.arange(12) % 2,
        "offset": torch.tensor(np.log(depth[:, 0])) if offset is None else offset,
    }
    _, slope = gradient(row, batch)
    return slope.mean(1) / slope.std(1) * DRAWS**0.5


@pytest.mark.parametrize("shape", [None, 2.0, 0.5], ids=["poisson", "gamma_2", "gamma_0.5"])
@pytest.mark.parametrize("name", ["list", "pair_all", "poisson_free"])
def test_expected_gradient_at_the_true_rates_is_zero(row_named, name, shape):
    # 12 normal deviates: one beyond 4.5 has a chance below 1e-4, and the seed is fixed.
    assert gradient_at_the_truth(row_named[name], shape).abs().max() < 4.5


@pytest.mark.parametrize("name", ["list", "pair_all", "poisson_free"])
def test_expected_gradient_without_the_depth_is_not_zero(row_named, name):
    z = gradient_at_the_truth(row_named[name], None, offset=torch.zeros(12))
    assert z.abs().max() > 50


def test_sampled_partners_are_uniform_over_the_other_spots():
    section = torch.tensor([1, 0, 1, 1, 0, 1, 7])
    pairs = sample_pairs(section, 20_000, generator=torch.Generator().manual_seed(0))
    assert (section[pairs[:, 0]] == section[pairs[:, 1]]).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert 6 not in pairs
    partners = torch.bincount(pairs[pairs[:, 0] == 2, 1], minlength=7)
    # Three equal chances; 5 standard deviations of the binomial, error below 1e-5.
    assert (partners[[0, 3, 5]] - 20_000 / 3).abs().max() < 5 * np.sqrt(20_000 * 2 / 9)
    assert partners.sum() == 20_000


@pytest.mark.parametrize("label", [5, 2])
def test_expected_pair_loss_is_the_all_pairs_loss(row_named, batch, label):
    section = {k: v[batch["section"] == label] for k, v in batch.items()}
    n_spots, n_partners = len(section["scores"]), 4000
    drawn = row_named["pair_all"](
        section, n_partners=n_partners, generator=torch.Generator().manual_seed(1)
    )
    # Each ordered pair of a section of n is drawn with chance 1 / (n - 1) for each of its spots.
    expected = row_named["pair_all"](section) * 2 * n_partners / (n_spots - 1)
    assert drawn.item() == pytest.approx(expected.item(), rel=0.02)


def test_list_by_hand():
    # Shares 1/4 and 3/4, counts 1 and 3.
    scores, counts = torch.tensor([[0.0], [np.log(3.0)]]), torch.tensor([[1.0], [3.0]])
    got = list_loss(scores, counts, section=torch.zeros(2).long(), reduction="sum")
    assert got.item() == pytest.approx(-np.log(0.25) - 3 * np.log(0.75), rel=1e-6)


def test_poisson_with_a_free_level_by_hand():
    # The level makes both rates 2.
    scores, counts = torch.full((2, 1), 9.0), torch.tensor([[1.0], [3.0]])
    got = poisson_loss(
        scores, counts, section=torch.zeros(2).long(), reduction="sum", free_level=True
    )
    assert got.item() == pytest.approx(4 - 4 * np.log(2), rel=1e-6)
