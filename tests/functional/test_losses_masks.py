"""What is left out of a loss leaves no trace: masks, spots without exposure, empty batches."""

from __future__ import annotations

import pytest
import torch

KEPT = torch.tensor([0, 1, 3, 5, 6, 8])
LEFT_OUT = torch.tensor([2, 4, 7])
WILD = [torch.nan, torch.inf, -torch.inf, 1e4]


def kept(batch):
    return {name: values[KEPT] for name, values in batch.items()}


def only_kept(shape=(9, 1)):
    where = torch.zeros(shape, dtype=torch.bool)
    where[KEPT] = True
    return where


def spoil(values, wild):
    """Put something wild where spots are left out."""
    spoilt = values.clone()
    spoilt[LEFT_OUT] = wild
    return spoilt


def gradient(loss, batch, **changes):
    scores = batch["scores"].clone().requires_grad_()
    value = loss(batch, scores=scores, **changes)
    return value, torch.autograd.grad(value, scores)[0]


def assert_left_out(loss, batch, where, **changes):
    """Value and gradient are those of the spots that are kept, and exactly 0 elsewhere."""
    expected, expected_gradient = gradient(loss, kept(batch))
    got, got_gradient = gradient(loss, batch | changes, where=where)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_gradient[KEPT], expected_gradient, rtol=1e-9, atol=1e-12)
    assert got_gradient[LEFT_OUT].eq(0).all()


@pytest.mark.parametrize("wild", WILD)
def test_scores_left_out_leave_no_trace(loss, batch, wild):
    assert_left_out(loss, batch, only_kept(), scores=spoil(batch["scores"], wild))


@pytest.mark.parametrize("wild", [-3.0, torch.nan, torch.inf])
def test_counts_left_out_leave_no_trace(loss, batch, wild):
    assert_left_out(loss, batch, only_kept(), counts=spoil(batch["counts"], wild))


@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf, -1e4])
def test_offsets_left_out_leave_no_trace(loss, batch, wild):
    assert_left_out(loss, batch, only_kept(), offset=spoil(batch["offset"], wild))


@pytest.mark.parametrize("shape", [(9,), (9, 4)])
def test_masks_of_other_shapes(loss, batch, shape):
    assert_left_out(loss, batch, only_kept(shape), scores=spoil(batch["scores"], torch.nan))


@pytest.mark.parametrize("reduction", ["mean", "per_gene", "none"])
def test_reductions_of_a_mask_are_those_of_the_kept(loss, batch, reduction):
    scores = spoil(batch["scores"], torch.nan)
    got = loss(batch, scores=scores, where=only_kept(), reduction=reduction)
    expected = loss(kept(batch), reduction=reduction)
    if reduction == "none":
        assert torch.isfinite(got).all()
        got, expected = got.flatten(0, -2).sum(0), expected.flatten(0, -2).sum(0)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_gradient_of_each_element_left_out_is_zero(loss, batch):
    scores = spoil(batch["scores"], torch.nan).requires_grad_()
    loss(batch, scores=scores, where=only_kept(), reduction="none").sum().backward()
    assert scores.grad[LEFT_OUT].eq(0).all()
    assert torch.isfinite(scores.grad).all()


@pytest.mark.parametrize("reduction", ["sum", "mean", "per_gene", "none"])
def test_a_gene_left_out_leaves_no_trace(loss, batch, reduction):
    where = torch.ones(9, 4, dtype=torch.bool)
    where[:, 3] = False
    scores = batch["scores"].clone()
    scores[:, 3] = torch.nan
    phi = {} if loss.phi is None else {"dispersion": torch.tensor(loss.phi[:3])}
    three = {name: batch[name][:, :3] for name in ("scores", "counts")}
    expected = loss(batch | three, reduction=reduction, **phi)
    got = loss(batch, scores=scores.requires_grad_(), where=where, reduction=reduction)
    got.sum().backward()
    assert scores.grad[:, 3].eq(0).all()
    if reduction == "none":
        assert got[..., 3].eq(0).all()
        got = got[..., :3]
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean", "per_gene", "none"])
def test_nothing_left_is_nothing(loss, batch, reduction):
    scores = torch.full((9, 4), torch.nan, dtype=torch.float64, requires_grad=True)
    value = loss(batch, scores=scores, where=torch.zeros(9, 1).bool(), reduction=reduction)
    value.sum().backward()
    assert value.eq(0).all()
    assert scores.grad.eq(0).all()


def test_a_section_left_out_leaves_no_trace(loss, batch):
    # With it goes a whole segment: an empty sum, an empty maximum.
    where = (batch["section"] != 5)[:, None]
    rest = batch["section"] != 5
    expected = loss({name: values[rest] for name, values in batch.items()})
    got, slope = gradient(loss, batch, where=where)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert slope[~rest].eq(0).all()
    assert torch.isfinite(slope).all()


@pytest.mark.parametrize("reduction", ["sum", "mean", "per_gene"])
def test_no_spots_at_all(loss, reduction):
    empty = torch.zeros(0, 4)
    scores = torch.zeros(0, 4, requires_grad=True)
    batch = {"counts": empty, "section": torch.zeros(0).long(), "offset": torch.zeros(0)}
    value = loss(batch, scores=scores, reduction=reduction)
    value.backward()
    assert value.item() == 0


# No exposure


def test_no_exposure_equals_leaving_the_spot_out(loss, batch):
    counts = spoil(batch["counts"], 0.0)
    offset = spoil(batch["offset"], -torch.inf)
    assert_left_out(loss, batch, None, counts=counts, offset=offset)
    mean = loss(batch, counts=counts, offset=offset, reduction="mean")
    torch.testing.assert_close(mean, loss(kept(batch), reduction="mean"), rtol=1e-12, atol=1e-12)


def test_no_exposure_beside_a_mask(loss, batch):
    where = torch.ones(9, 1, dtype=torch.bool)
    where[2] = False
    counts = batch["counts"].clone()
    counts[[4, 7]] = 0
    offset = batch["offset"].clone()
    offset[[4, 7]] = -torch.inf
    scores = spoil(batch["scores"], torch.nan)
    assert_left_out(loss, batch, where, scores=scores, counts=counts, offset=offset)


def test_no_exposure_of_one_gene(loss, batch):
    offset = batch["offset"][:, None].repeat(1, 4)
    offset[4, 1] = -torch.inf
    counts = batch["counts"].clone()
    counts[4, 1] = 0
    where = torch.ones(9, 4, dtype=torch.bool)
    where[4, 1] = False
    got, slope = gradient(loss, batch, counts=counts, offset=offset)
    expected = loss.total(batch | {"counts": counts}, where)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    assert slope[4, 1] == 0
    assert torch.isfinite(slope).all()


def test_no_exposure_may_have_counts_where_left_out(loss, batch):
    offset = spoil(batch["offset"], -torch.inf)
    assert_left_out(loss, batch, only_kept(), offset=offset)
    with pytest.raises(ValueError, match=r"offset is -inf \(no exposure\) at a spot that has"):
        loss(batch, offset=offset)
