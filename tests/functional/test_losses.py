"""Laws that all losses obey, through the table in `conftest.py`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def some_mask() -> Tensor:
    return torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) > 0.3


def random_batch(seed: int) -> tuple[dict[str, Tensor], torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "scores": torch.randn(10, 4, generator=generator, dtype=torch.float64),
        "counts": torch.randint(0, 9, (10, 4), generator=generator).double(),
        "section": torch.randint(0, 4, (10,), generator=generator),
        "offset": torch.randn(10, generator=generator, dtype=torch.float64),
    }, generator


def taken(batch: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {name: values[rows] for name, values in batch.items()}


def assert_equal(got: Tensor, expected) -> None:
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-11, atol=1e-12)


# Definitions


def test_equals_its_definition(loss, batch):
    expected = loss.total(batch)
    assert loss(batch).item() == pytest.approx(expected, rel=1e-12)


def test_each_element_equals_its_definition(loss, batch):
    each = loss(batch, reduction="none")
    assert_equal(each.flatten(0, -2), np.nan_to_num(loss.elements(batch)).T)


def test_no_offset_is_an_offset_of_zero(loss, batch):
    if loss.function.__name__ in ("mse_loss", "pearson_loss"):
        # A library size of 10,000 makes counts per 10k the counts.
        batch["offset"] = torch.full((9,), np.log(1e4), dtype=torch.float64)
    else:
        batch["offset"] = torch.zeros(9, dtype=torch.float64)
    assert_equal(loss(batch, offset=None), loss(batch))


def test_offset_of_each_element(loss, batch):
    offset = torch.randn(9, 4, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = loss.total(batch | {"offset": offset})
    assert loss(batch, offset=offset).item() == pytest.approx(expected, rel=1e-12)
    assert_equal(loss(batch, offset=batch["offset"][:, None].expand(9, 4)), loss(batch))


# Gradients


@pytest.mark.parametrize(
    ("where", "reduction"),
    [(None, "sum"), (some_mask(), "mean"), (some_mask(), "per_gene")],
    ids=["sum", "masked_mean", "masked_per_gene"],
)
def test_gradient(loss, batch, where, reduction):
    scores = batch["scores"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: loss(batch, scores=s, where=where, reduction=reduction), (scores,)
    )


@pytest.mark.parametrize("where", [None, some_mask()], ids=["all", "masked"])
def test_gradient_of_each_element(loss, batch, where):
    if loss.name == "nb_free":
        pytest.skip("documented: the level is held fixed, which is exact for sums only")
    scores = batch["scores"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: loss(batch, scores=s, where=where, reduction="none"), (scores,)
    )


@pytest.mark.parametrize("shape", [(9,), (9, 4)])
def test_gradient_of_an_offset(smooth_loss, batch, shape):
    generator = torch.Generator().manual_seed(1)
    offset = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda o: smooth_loss(batch, offset=o, where=some_mask()), (offset,)
    )


def test_gradient_with_weight_of_each_element(element_weighted_loss, batch):
    loss = element_weighted_loss
    scores = batch["scores"].requires_grad_()
    weight = torch.rand(9, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: loss(batch, scores=s, weight=weight), (scores,))


def test_gradient_of_a_weight(loss, batch):
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss(batch, scores=batch["scores"].requires_grad_(), weight=weight).backward()
    assert_equal(weight.grad, [np.nansum(gene) for gene in loss.elements(detached(batch))])


def detached(batch):
    return {name: values.detach() for name, values in batch.items()}


@pytest.mark.parametrize("name", ["nb", "nb_per_gene", "nb_free"])
@pytest.mark.parametrize("where", [None, some_mask()], ids=["all", "masked"])
def test_gradient_of_the_dispersion(row_named, batch, name, where):
    phi = torch.tensor([0.3, 1.5, 0.7, 4.0], dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: row_named[name](batch, dispersion=p, where=where), (phi,)
    )


# Invariances


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_order_of_spots_and_names_of_sections_do_not_matter(loss, seed):
    batch, generator = random_batch(seed)
    order = torch.randperm(10, generator=generator)
    assert_equal(loss(taken(batch, order)), loss(batch))
    names = torch.tensor([70, -3, 11, 4])[batch["section"]]
    assert_equal(loss(batch, section=names), loss(batch))


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), size=st.floats(0, 50))
def test_a_constant_in_a_section_does_not_matter(level_free_loss, seed, size):
    batch, generator = random_batch(seed)
    level = size * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    shifted = batch["scores"] + level[batch["section"]]
    torch.testing.assert_close(
        level_free_loss(batch, scores=shifted), level_free_loss(batch), rtol=1e-9, atol=1e-9
    )


def test_a_constant_in_a_section_matters_to_losses_with_a_level(level_bound_loss, batch):
    shifted = batch["scores"] + (batch["section"] == 5)[:, None]
    difference = level_bound_loss(batch, scores=shifted) - level_bound_loss(batch)
    assert difference.abs() > 0.1


def test_a_constant_everywhere_does_not_matter_to_pooled_correlation(row_named, batch):
    loss = row_named["pearson_pooled"]
    assert_equal(loss(batch, scores=batch["scores"] + 3), loss(batch))


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**31))
def test_genes_do_not_meet(loss, seed):
    batch, generator = random_batch(seed)
    order = torch.randperm(4, generator=generator)
    phi = {}
    if loss.phi is not None:
        phi = {"dispersion": torch.tensor(loss.phi, dtype=torch.float64)[order]}
    moved = batch | {name: batch[name][:, order] for name in ("scores", "counts")}
    assert_equal(loss(moved, reduction="none", **phi), loss(batch, reduction="none")[..., order])


# Reductions and weights


def by_hand(loss, batch, reduction, where=None, weight=(1, 1, 1, 1)):
    elements, counts = loss.elements(batch, where), loss.counts_of(batch, where)
    sums = np.array([np.nansum(gene) for gene in elements]) * weight
    sizes = np.array([np.isfinite(gene).sum() for gene in elements])
    if reduction == "sum":
        return sums.sum()
    if reduction == "mean":
        return sums.sum() / sizes.sum()
    if reduction == "per_count":
        return sums.sum() / counts.sum()
    sizes = counts if loss.obeys("likelihood") else sizes
    return np.mean([s / n for s, n in zip(sums, sizes, strict=True) if n > 0])


@pytest.mark.parametrize("where", [None, some_mask()], ids=["all", "masked"])
@pytest.mark.parametrize("reduction", ["sum", "mean", "per_gene"])
def test_reductions_divide_by_what_they_say(loss, batch, reduction, where):
    got = loss(batch, reduction=reduction, where=where)
    assert got.item() == pytest.approx(by_hand(loss, batch, reduction, where), rel=1e-11)


@pytest.mark.parametrize("where", [None, some_mask()], ids=["all", "masked"])
def test_per_count_divides_by_the_counts(likelihood, batch, where):
    got = likelihood(batch, reduction="per_count", where=where)
    expected = by_hand(likelihood, batch, "per_count", where)
    assert got.item() == pytest.approx(expected, rel=1e-11)


def test_per_count_is_for_likelihoods(no_likelihood, batch):
    with pytest.raises(ValueError, match="'per_count' is for likelihoods of counts; use 'mean'"):
        no_likelihood(batch, reduction="per_count")


def test_a_gene_without_counts_enters_no_mean_over_genes(loss, batch):
    batch["counts"][:, 1] = 0
    got = loss(batch, reduction="per_gene")
    assert got.item() == pytest.approx(by_hand(loss, batch, "per_gene"), rel=1e-11)


def test_no_counts_at_all_are_finite(likelihood, batch):
    batch["counts"] = torch.zeros(9, 4)
    for reduction in ("per_count", "per_gene", "mean"):
        assert torch.isfinite(likelihood(batch, reduction=reduction))


@pytest.mark.parametrize("where", [None, some_mask()], ids=["all", "masked"])
def test_sum_of_the_elements_is_the_sum(loss, batch, where):
    each = loss(batch, reduction="none", where=where)
    assert_equal(each.sum(), loss(batch, where=where))


@pytest.mark.parametrize("reduction", ["mean", "per_gene", "sum"])
def test_weights_multiply_genes_and_enter_no_divisor(loss, batch, reduction):
    weight = [0.0, 1.0, 2.0, 0.5]
    got = loss(batch, weight=torch.tensor(weight), reduction=reduction)
    expected = by_hand(loss, batch, reduction, weight=weight)
    assert got.item() == pytest.approx(expected, rel=1e-11)


def test_weights_enter_no_count(likelihood, batch):
    weight = [0.0, 1.0, 2.0, 0.5]
    got = likelihood(batch, weight=torch.tensor(weight), reduction="per_count")
    expected = by_hand(likelihood, batch, "per_count", weight=weight)
    assert got.item() == pytest.approx(expected, rel=1e-11)


def test_weights_multiply_each_element(loss, batch):
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    each = loss(batch, reduction="none")
    assert_equal(loss(batch, weight=weight, reduction="none"), each * weight)


def test_weight_of_each_element(element_weighted_loss, batch):
    weight = torch.rand(9, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    each = element_weighted_loss(batch, reduction="none")
    assert_equal(element_weighted_loss(batch, weight=weight), (each * weight).sum())
    weighted = element_weighted_loss(batch, weight=weight, reduction="none")
    assert_equal(weighted, each * weight)


def test_weight_of_each_section_in_pearson(row_named, batch):
    weight = torch.rand(4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss = row_named["pearson"]
    each = loss(batch, reduction="none")
    assert_equal(loss(batch, weight=weight), (each * weight).sum())
