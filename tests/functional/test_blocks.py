"""Counts in CSR and work in blocks change nothing but time and memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strank.functional import segments
from strank.functional.listwise import list_loss

MASK = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) > 0.3
WEIGHT = torch.rand(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
OPTIONS = {
    "plain": {},
    "no_offset": {"offset": None},
    "offset_of_elements": {"offset": WEIGHT.log()},
    "masked": {"where": MASK},
    "masked_spots": {"where": MASK[:, 0]},
    "masked_genes": {"where": torch.tensor([[True, False, True, True]])},
    "gene_weight": {"weight": WEIGHT[0]},
    "element_weight": {"weight": WEIGHT, "where": MASK},
    "spot_weight": {"weight": WEIGHT[:, :1]},
    "lists": {"list_size": 3},
}
each_option = pytest.mark.parametrize("name", OPTIONS)


def csr(counts):
    return counts.to_sparse_csr()


def evaluate(loss, batch, **changes):
    scores = batch["scores"].clone().requires_grad_()
    if changes.get("list_size"):
        changes["generator"] = torch.Generator().manual_seed(3)
    value = loss(batch, scores=scores, **changes)
    return value.detach(), torch.autograd.grad(value.sum(), scores)[0]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_option
@pytest.mark.parametrize("reduction", ["sum", "mean", "per_count", "per_gene", "none"])
def test_csr_counts_equal_dense_counts(row_named, batch, name, reduction):
    options = OPTIONS[name] | {"reduction": reduction}
    got = evaluate(row_named["list"], batch, counts=csr(batch["counts"]), **options)
    assert_same(got, evaluate(row_named["list"], batch, **options))


@pytest.mark.parametrize("reduction", ["sum", "mean", "per_count", "per_gene"])
def test_csr_counts_are_not_densified(row_named, batch, reduction, monkeypatch):
    counts = csr(batch["counts"])

    def refuse(*_args, **_options):
        raise AssertionError("densified")

    monkeypatch.setattr(torch.Tensor, "to_dense", refuse)
    for options in OPTIONS.values():
        evaluate(row_named["list"], batch, counts=counts, reduction=reduction, **options)
    with pytest.raises(AssertionError, match="densified"):
        evaluate(row_named["list"], batch, counts=counts, reduction="none")


def test_csr_counts_of_whole_numbers(row_named, batch):
    counts = csr(batch["counts"].long())
    assert_same(
        evaluate(row_named["list"], batch, counts=counts), evaluate(row_named["list"], batch)
    )


def test_csr_without_counts(row_named, batch):
    value, slope = evaluate(row_named["list"], batch, counts=csr(torch.zeros(9, 4)))
    assert value.item() == 0
    assert slope.eq(0).all()


def test_csr_scores_left_out_may_be_anything(row_named, batch):
    scores = torch.where(MASK, batch["scores"], torch.nan)
    got = evaluate(row_named["list"], batch | {"scores": scores}, where=MASK)
    wild = evaluate(
        row_named["list"],
        batch | {"scores": scores, "counts": csr(batch["counts"])},
        where=MASK,
    )
    assert_same(wild, got)
    assert wild[1][~MASK].eq(0).all()


@pytest.mark.parametrize("wild", [-3.0, torch.nan, torch.inf])
@pytest.mark.parametrize("reduction", ["sum", "per_count"])
def test_csr_counts_left_out_may_be_anything(row_named, batch, wild, reduction):
    counts = csr(torch.where(MASK, batch["counts"], wild))
    options = {"where": MASK, "reduction": reduction}
    got = evaluate(row_named["list"], batch, counts=counts, **options)
    assert_same(got, evaluate(row_named["list"], batch, **options))


def test_csr_no_exposure(row_named, batch):
    counts, offset = batch["counts"].clone(), batch["offset"].clone()
    counts[4], offset[4] = 0, -torch.inf
    got = evaluate(row_named["list"], batch, counts=csr(counts), offset=offset)
    assert_same(got, evaluate(row_named["list"], batch, counts=counts, offset=offset))
    masked = {"offset": offset, "where": (torch.arange(9) != 4)[:, None]}
    got = evaluate(row_named["list"], batch, counts=csr(batch["counts"]), **masked)
    assert_same(got, evaluate(row_named["list"], batch, counts=batch["counts"], **masked))


def test_csr_errors(row_named, batch):
    loss, counts = row_named["list"], csr(batch["counts"])
    offset = batch["offset"].clone()
    offset[4] = -torch.inf
    with pytest.raises(ValueError, match=r"offset is -inf \(no exposure\) at a spot that has"):
        loss(batch, counts=counts, offset=offset)
    with pytest.raises(ValueError, match="counts must not be negative"):
        loss(batch, counts=csr(-batch["counts"]))
    with pytest.raises(ValueError, match=r"scores and counts must both be .* and \[9, 3\]"):
        loss(batch, counts=csr(batch["counts"][:, :3]))


@each_option
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_list_in_blocks_of_one_gene(row_named, batch, name, layout, monkeypatch):
    counts = csr(batch["counts"]) if layout == "csr" else batch["counts"]
    expected = evaluate(row_named["list"], batch, counts=counts, **OPTIONS[name])
    monkeypatch.setattr(segments, "_BLOCK", {"cpu": 1})
    assert len(list(segments.gene_blocks(batch["scores"]))) == 4
    assert_same(evaluate(row_named["list"], batch, counts=counts, **OPTIONS[name]), expected)


@pytest.mark.parametrize("width", [1, 27])
@pytest.mark.parametrize("name", ["plain", "masked", "masked_spots", "masked_genes", "gene_weight"])
@pytest.mark.parametrize("loss", ["pair_all", "pair_given"])
def test_pairs_in_blocks(row_named, batch, loss, name, width, monkeypatch):
    expected = evaluate(row_named[loss], batch, **OPTIONS[name])
    monkeypatch.setattr(segments, "_BLOCK", {"cpu": width})
    assert_same(evaluate(row_named[loss], batch, **OPTIONS[name]), expected)


def test_more_pairs_than_spots_are_cut(row_named, batch):
    batch["section"] = torch.zeros(9).long()
    assert_same(
        [row_named["pair_all"](batch)],
        [row_named["pair_all"](batch, reduction="none").sum()],
    )


@pytest.mark.parametrize("name", ["list", "pair_all"])
def test_one_derivative_only(row_named, batch, name):
    scores = batch["scores"].requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    value = scale * row_named[name](batch)
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.grad(value, scores, create_graph=True)


@pytest.mark.parametrize("name", ["list", "pair_all"])
def test_no_wrong_second_derivative(row_named, batch, name):
    with pytest.raises(RuntimeError, match="differentiated only once"):
        torch.autograd.functional.hessian(
            lambda s: row_named[name](batch, scores=s), batch["scores"]
        )


@pytest.mark.parametrize("name", ["list", "pair_all"])
def test_elements_have_a_second_derivative(row_named, batch, name):
    scores = batch["scores"].requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda s: row_named[name](batch, scores=s, reduction="none").sum(), (scores,)
    )


def test_scores_need_not_be_contiguous(row_named, batch):
    scores = batch["scores"].T.contiguous().T
    assert not scores.is_contiguous()
    for name in ("list", "pair_all"):
        got = evaluate(row_named[name], batch | {"scores": scores})
        assert_same(got, evaluate(row_named[name], batch))


def test_lists_are_drawn_anew_and_reproducibly(batch):
    options = {"section": batch["section"], "list_size": 2}
    generator = torch.Generator().manual_seed(0)
    draws = [
        list_loss(batch["scores"], batch["counts"], generator=generator, **options).item()
        for _ in range(8)
    ]
    assert len(set(draws)) > 1
    generator.manual_seed(0)
    again = list_loss(batch["scores"], batch["counts"], generator=generator, **options).item()
    assert again == draws[0]
    assert np.isfinite(draws).all()


@each_option
@pytest.mark.parametrize("layout", ["dense", "csr"])
@pytest.mark.parametrize("width", [8, 12, 20])
def test_list_in_blocks_of_sections(row_named, batch, name, layout, width, monkeypatch):
    counts = csr(batch["counts"]) if layout == "csr" else batch["counts"]
    expected = evaluate(row_named["list"], batch, counts=counts, **OPTIONS[name])
    monkeypatch.setattr(segments, "_BLOCK", {"cpu": width})
    assert_same(evaluate(row_named["list"], batch, counts=counts, **OPTIONS[name]), expected)


@pytest.mark.parametrize("width", [1, 12, 100])
def test_sections_in_turn_are_sections_mixed(row_named, batch, width, monkeypatch):
    monkeypatch.setattr(segments, "_BLOCK", {"cpu": width})
    order = batch["section"].argsort(stable=True)
    value, slope = evaluate(row_named["list"], batch)
    in_turn = {key: values[order] for key, values in batch.items()}
    assert_same(evaluate(row_named["list"], in_turn), (value, slope[order]))


@pytest.mark.parametrize("level", [-3000.0, -40.0, -20.0, 0.0, 20.0, 3000.0])
def test_a_level_of_the_scores_cancels(row_named, batch, level):
    # Sums of exponentials overflow or vanish at some, and are taken as they are at others, where
    # no spot is alone.
    together = batch | {"section": torch.tensor([0, 1, 0, 1, 2, 2, 0, 1, 2])}
    expected = evaluate(row_named["list"], together, reduction="none")
    raised = together | {"scores": together["scores"] + level}
    value, slope = evaluate(row_named["list"], raised, reduction="sum")
    torch.testing.assert_close(value, expected[0].sum(), rtol=1e-10, atol=0)
    torch.testing.assert_close(slope, expected[1], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["list", "pair_all"])
def test_backward_twice_adds_up(row_named, batch, name):
    scores = batch["scores"].requires_grad_()
    value = row_named[name](batch)
    value.backward(retain_graph=True)
    once = scores.grad.clone()
    (3 * value).backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(scores.grad, 5 * once)


def test_spots_alone_in_float32_are_left_with_nothing():
    generator = torch.Generator().manual_seed(0)
    scores = (3 * torch.randn(99, 20, generator=generator)).requires_grad_()
    counts = torch.randint(1, 1000, (99, 20), generator=generator)
    value = list_loss(scores, counts, section=torch.arange(99), offset=torch.rand(99))
    value.backward()
    assert value.item() == 0
    assert scores.grad.eq(0).all()
