"""Where losses break: single spots, absent genes, ties, very large scores, half precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_a_single_spot_contributes_exactly_nothing(alone_is_zero_loss, batch):
    loss, alone = alone_is_zero_loss, batch["section"] == 8
    scores = batch["scores"].requires_grad_()
    loss(batch).backward()
    assert scores.grad[alone].eq(0).all()
    assert scores.grad[~alone].ne(0).any()
    single = {name: values[alone] for name, values in batch.items()}
    for reduction in ("sum", "mean", "per_gene"):
        assert loss(single, reduction=reduction).item() == 0.0


@pytest.mark.parametrize("name", ["poisson_free", "nb_free"])
def test_a_single_spot_with_a_free_level_has_no_gradient(row_named, batch, name):
    scores = batch["scores"].requires_grad_()
    row_named[name](batch).backward()
    # The level of the negative binomial is found by iteration.
    assert scores.grad[batch["section"] == 8].abs().max() < 1e-12


def test_an_absent_gene_contributes_exactly_nothing(absent_is_zero_loss, batch):
    absent = batch["section"] == 2
    scores = batch["scores"].requires_grad_()
    absent_is_zero_loss(batch).backward()
    assert scores.grad[absent, 2].eq(0).all()
    assert scores.grad[absent, 1].ne(0).any()
    section = {name: values[absent] for name, values in batch.items()}
    assert absent_is_zero_loss(section, reduction="none")[..., 2].eq(0).all()


def test_a_gene_present_nowhere(absent_is_zero_loss, batch):
    scores = batch["scores"].requires_grad_()
    value = absent_is_zero_loss(batch, counts=torch.zeros(9, 4), reduction="per_gene")
    value.backward()
    assert value.item() == 0.0
    assert scores.grad.eq(0).all()


def test_equal_scores_of_equal_spots_get_equal_gradients(loss, batch):
    scores = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    tied = {
        "counts": torch.tensor([[2.0, 1.0, 0.0, 4.0]] * 2 + [[5.0] * 4] * 2).double(),
        "section": torch.zeros(4).long(),
        "offset": torch.tensor([1.0, 1.0, 2.0, 2.0]).double(),
    }
    value = loss(tied, scores=scores)
    value.backward()
    assert torch.isfinite(value)
    torch.testing.assert_close(scores.grad[0], scores.grad[1])
    torch.testing.assert_close(scores.grad[2], scores.grad[3])


def test_equal_spots_share_equally(row_named):
    tied = {"counts": torch.ones(2, 1), "section": torch.zeros(2).long()}
    for name in ("list", "pair_all"):
        value = row_named[name](tied, scores=torch.zeros(2, 1))
        assert value.item() == pytest.approx(2 * np.log(2), rel=1e-6)


@pytest.mark.parametrize("constant", ["scores", "counts", "both"])
def test_constant_scores_or_counts_have_no_correlation(row_named, constant):
    # Means of so many sections are rounded: deviations from them would correlate at random.
    section = torch.arange(2, 40).repeat_interleave(torch.arange(2, 40))
    generator = torch.Generator().manual_seed(0)
    batch = {
        "scores": torch.rand(len(section), 1, generator=generator),
        "counts": torch.poisson(torch.full((len(section), 1), 5.0), generator=generator),
        "section": section,
    }
    for name in ("scores", "counts") if constant == "both" else (constant,):
        batch[name] = torch.full((len(section), 1), 0.7 if name == "scores" else 5.0)
    scores = batch["scores"].requires_grad_()
    value = row_named["pearson"](batch, reduction="none")
    value.sum().backward()
    assert value.eq(0).all()
    assert scores.grad.eq(0).all()


def test_ties_are_no_comparison_or_ask_for_the_second(row_named):
    counts, section = torch.tensor([[2.0], [1.0]]), torch.zeros(2).long()
    # Twice the counts at twice the depth, whose logarithms are rounded.
    tied = {"counts": counts, "section": section, "offset": (counts * 777).log().flatten()}
    scores = torch.tensor([[0.5], [0.0]])
    loss = row_named["margin_all"]
    assert loss(tied, scores=scores, ties="none").item() == 0
    assert loss(tied, scores=scores, ties="none", reduction="mean").item() == 0
    assert loss(tied, scores=scores, ties="second").item() == pytest.approx(1.5)


def large(dtype, size):
    return {
        "scores": torch.tensor([[size], [-size], [0.0], [size]]).repeat(1, 4).to(dtype),
        "counts": torch.tensor([[5.0], [0.0], [1.0], [2.0]]).repeat(1, 4).to(dtype),
        "section": torch.tensor([0, 0, 0, 1]),
        "offset": torch.tensor([0.0, 1.0, 0.5, 0.0]).to(dtype),
    }


@pytest.mark.parametrize("dtype", FLOATS)
def test_very_large_scores(bounded_loss, dtype):
    # Where chances are 0 and 1 to the last bit, a negative binomial has no level to find.
    size = 40 if bounded_loss.name == "nb_free" else 1e4
    batch = large(dtype, size)
    scores = batch["scores"].requires_grad_()
    value = bounded_loss(batch)
    value.backward()
    expected = bounded_loss.total({k: v.detach() for k, v in batch.items()})
    assert value.item() == pytest.approx(expected, rel=1e-9 if dtype == torch.float64 else 1e-6)
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_very_large_scores_stay_finite(bounded_loss, dtype):
    batch = large(dtype, 1e4)
    for reduction in ("none", "sum"):
        scores = batch["scores"].clone().requires_grad_()
        value = bounded_loss(batch, scores=scores, reduction=reduction).sum()
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("dtype", FLOATS[1:])
def test_half_precision_is_computed_in_float32(loss, batch, dtype):
    rough = {name: values.to(dtype) for name, values in batch.items() if name != "section"}
    scores = rough["scores"].requires_grad_()
    value = loss(batch | rough)
    assert value.dtype == torch.float32
    exact = {name: values.detach().double() for name, values in rough.items()}
    expected = loss.total(batch | exact)
    assert value.item() == pytest.approx(expected, rel=1e-5)
    value.backward()
    assert scores.grad.dtype == dtype
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_counts_of_whole_numbers(loss, batch, dtype):
    got = loss(batch, counts=batch["counts"].to(dtype))
    torch.testing.assert_close(got, loss(batch), rtol=0, atol=0)


def test_values_without_gradient_are_the_same(loss, batch):
    with torch.no_grad():
        expected = loss(batch)
    got = loss(batch, scores=batch["scores"].requires_grad_())
    assert got.requires_grad
    torch.testing.assert_close(got.detach(), expected, rtol=0, atol=0)


def test_inputs_are_left_as_they_were(loss, batch):
    before = {name: values.clone() for name, values in batch.items()}
    loss(batch, where=batch["counts"] > 1, weight=torch.ones(4))
    for name, values in before.items():
        torch.testing.assert_close(batch[name], values, rtol=0, atol=0)


@pytest.mark.parametrize("phi", [1e-6, 1e-4, 1e-2, 1e2])
def test_dispersion_from_almost_none_to_much(row_named, batch, phi):
    single = {name: values.float() for name, values in batch.items() if name != "section"}
    value, slope = value_and_slope(row_named["nb"], batch, torch.tensor(phi).double())
    rough, rough_slope = value_and_slope(row_named["nb"], batch | single, torch.tensor(phi))
    assert rough.item() == pytest.approx(value.item(), rel=1e-5)
    assert rough_slope.item() == pytest.approx(slope.item(), rel=1e-2)


def value_and_slope(loss, batch, phi):
    value = loss(batch, dispersion=phi.requires_grad_())
    value.backward()
    return value.detach(), phi.grad


def test_dispersion_as_a_number_is_as_exact_as_the_scores(row_named, batch):
    got = row_named["nb"](batch, dispersion=0.1)
    expected = row_named["nb"](batch, dispersion=torch.tensor(0.1, dtype=torch.float64))
    assert got.item() == pytest.approx(expected.item(), rel=1e-13)


def test_pairs_of_many_counts_keep_their_digits(row_named):
    batch = {
        "scores": torch.tensor([[0.0], [8.0]]),
        "counts": torch.tensor([[0.0], [30_000.0]]),
        "section": torch.zeros(2).long(),
    }
    expected = 30_000 * np.log1p(np.exp(-8.0))
    assert row_named["pair_all"](batch).item() == pytest.approx(expected, rel=1e-5)
