"""One table of tests through all losses, as functions and as modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strank.functional.listwise import list_loss
from strank.functional.pairs import sample_pairs
from strank.functional.pairwise import pair_loss
from strank.losses import ListSTRankLoss, PairSTRankLoss


def all_pairs(section: Tensor) -> Tensor:
    i, j = torch.triu_indices(len(section), len(section), 1)
    keep = section[i] == section[j]
    return torch.stack([i[keep], j[keep]], 1)


def pair_all(scores: Tensor, counts: Tensor, *, section: Tensor, **options) -> Tensor:
    return pair_loss(scores, counts, section=section, pairs=all_pairs(section), **options)


def plain_list(scores, counts, section, offset):
    """The definition, spot by spot, in Python."""
    total = 0.0
    for i in range(len(scores)):
        for g in range(scores.shape[1]):
            mates = [j for j in range(len(scores)) if section[j] == section[i]]
            rates = [np.exp(scores[j, g] + offset[j]) for j in mates]
            total -= counts[i, g] * np.log(np.exp(scores[i, g] + offset[i]) / sum(rates))
    return total


def plain_pair(scores, counts, section, offset):
    total = 0.0
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            if section[i] != section[j]:
                continue
            for g in range(scores.shape[1]):
                a, b = np.exp(scores[i, g] + offset[i]), np.exp(scores[j, g] + offset[j])
                total -= counts[i, g] * np.log(a / (a + b)) + counts[j, g] * np.log(b / (a + b))
    return total


LOSSES = [
    pytest.param(list_loss, plain_list, id="list"),
    pytest.param(pair_all, plain_pair, id="pair"),
]
each_loss = pytest.mark.parametrize(("loss", "plain"), LOSSES)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "scores": torch.randn(9, 4, generator=generator, dtype=torch.float64),
        "counts": torch.poisson(torch.full((9, 4), 3.0, dtype=torch.float64), generator=generator),
        "section": torch.tensor([5, 2, 5, 2, 2, 5, 8, 5, 2]),
        "offset": torch.randn(9, generator=generator, dtype=torch.float64),
    }


def value(loss, batch, **changes) -> Tensor:
    arguments = batch | {"reduction": "sum"} | changes
    return loss(arguments.pop("scores"), arguments.pop("counts"), **arguments)


@each_loss
def test_equals_its_definition(loss, plain, batch):
    expected = plain(*(batch[k].numpy() for k in ("scores", "counts", "section", "offset")))
    assert value(loss, batch).item() == pytest.approx(expected, rel=1e-12)


def test_list_by_hand():
    # Shares 1/4 and 3/4, counts 1 and 3.
    scores = torch.tensor([[0.0], [np.log(3.0)]])
    got = list_loss(
        scores, torch.tensor([[1.0], [3.0]]), section=torch.zeros(2).long(), reduction="sum"
    )
    assert got.item() == pytest.approx(-np.log(0.25) - 3 * np.log(0.75), rel=1e-6)


@pytest.mark.parametrize("name", ["list_offset", "list_no_offset", "pair_offset"])
def test_agrees_with_the_published_implementation(reference, name):
    stored = {k: torch.as_tensor(v) for k, v in np.load(reference / "loss_values.npz").items()}
    scores = stored["scores"].clone().requires_grad_()
    options = {"section": stored["section"]}
    if name != "list_no_offset":
        options["offset"] = (stored["counts"].mean(1) + 1e-6).log()
    if name == "pair_offset":
        options["pairs"] = torch.stack([stored["pair_first"], stored["pair_second"]], 1)
    loss = pair_loss if name == "pair_offset" else list_loss
    got = loss(scores, stored["counts"], **options)
    got.backward()
    torch.testing.assert_close(got.double(), stored[name], rtol=5e-7, atol=0)
    torch.testing.assert_close(scores.grad, stored[f"{name}_grad"], rtol=1e-5, atol=1e-7)


@each_loss
def test_gradient(loss, plain, batch):
    scores = batch["scores"].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: value(loss, batch, scores=s), (scores,))
    mask = torch.rand(9, 4, generator=torch.Generator().manual_seed(0)) > 0.3
    assert torch.autograd.gradcheck(lambda s: value(loss, batch, scores=s, where=mask), (scores,))


@each_loss
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), shift=st.floats(-50, 50))
def test_invariances(loss, plain, seed, shift):
    generator = torch.Generator().manual_seed(seed)
    batch = {
        "scores": torch.randn(10, 3, generator=generator, dtype=torch.float64),
        "counts": torch.randint(0, 9, (10, 3), generator=generator).double(),
        "section": torch.randint(0, 4, (10,), generator=generator),
        "offset": torch.randn(10, generator=generator, dtype=torch.float64),
    }
    expected = value(loss, batch)
    shifted = batch["scores"] + shift * torch.randn(4, 3, generator=generator)[batch["section"]]
    torch.testing.assert_close(value(loss, batch, scores=shifted), expected)
    order = torch.randperm(10, generator=generator)
    permuted = {name: values[order] for name, values in batch.items()}
    torch.testing.assert_close(value(loss, permuted), expected)
    names = torch.tensor([70, -3, 11, 4])[batch["section"]]
    torch.testing.assert_close(value(loss, batch, section=names), expected)


@each_loss
def test_reductions(loss, plain, batch):
    each = value(loss, batch, reduction="none")
    torch.testing.assert_close(each.sum(), value(loss, batch))
    torch.testing.assert_close(each.mean(), value(loss, batch, reduction="mean"))
    with pytest.raises(ValueError, match="reduction must be one of"):
        value(loss, batch, reduction="avg")


@each_loss
def test_mean_counts_the_elements_that_take_part(loss, plain, batch):
    where = torch.ones(9, 4, dtype=torch.bool)
    where[:, 2] = False
    three = {k: v[:, [0, 1, 3]] for k, v in batch.items() if v.dim() == 2}
    expected = value(loss, batch | three, reduction="mean")
    torch.testing.assert_close(value(loss, batch, where=where, reduction="mean"), expected)


@each_loss
def test_mask_equals_leaving_the_spots_out(loss, plain, batch):
    kept = torch.tensor([0, 1, 3, 5, 6, 8])
    where = torch.zeros(9, 1, dtype=torch.bool)
    where[kept] = True
    wild = batch["scores"].clone()
    wild[[2, 4, 7]] = torch.tensor([torch.nan, 1e4, torch.inf], dtype=wild.dtype)[:, None]
    wild = torch.where(where, batch["scores"], wild.nan_to_num(5.0))
    expected = value(loss, {k: v[kept] for k, v in batch.items()})
    torch.testing.assert_close(value(loss, batch, scores=wild, where=where), expected)


@each_loss
def test_weights_multiply_genes(loss, plain, batch):
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    each = value(loss, batch, reduction="none")
    torch.testing.assert_close(value(loss, batch, weight=weight), (each * weight).sum())


@each_loss
def test_single_spots_and_absent_genes_contribute_exactly_nothing(loss, plain):
    scores = torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.5, -1.0]], requires_grad=True)
    counts = torch.tensor([[7.0, 0.0], [9.0, 0.0], [4.0, 6.0]])
    # Spot 2 is alone; gene 1 is absent from the section of spots 0 and 1.
    section = torch.tensor([0, 0, 1])
    each = loss(scores, counts, section=section, reduction="none")
    total = loss(scores, counts, section=section, reduction="sum")
    total.backward()
    assert each[..., 1].eq(0).all()
    assert scores.grad[2].eq(0).all()
    assert scores.grad[:, 1].eq(0).all()
    alone = loss(scores[2:], counts[2:], section=section[2:])
    assert alone.item() == 0.0


@each_loss
def test_ties_split_equally(loss, plain):
    got = loss(torch.zeros(2, 1), torch.ones(2, 1), section=torch.zeros(2).long(), reduction="sum")
    assert got.item() == pytest.approx(2 * np.log(2))


@each_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_very_large_scores(loss, plain, dtype):
    scores = torch.tensor([[1e4], [-1e4], [0.0]], dtype=dtype, requires_grad=True)
    counts = torch.tensor([[5.0], [0.0], [1.0]], dtype=dtype)
    got = loss(scores, counts, section=torch.zeros(3).long(), reduction="sum")
    got.backward()
    assert got.item() == pytest.approx(1e4, rel=1e-2)
    assert torch.isfinite(scores.grad).all()


@each_loss
def test_bfloat16_is_computed_in_float32(loss, plain, batch):
    half = value(loss, batch, scores=batch["scores"].bfloat16(), counts=batch["counts"].bfloat16())
    assert half.dtype == torch.float32
    full = value(loss, batch, scores=batch["scores"].bfloat16().double())
    assert half.item() == pytest.approx(full.item(), rel=1e-5)


@each_loss
def test_no_exposure_without_counts_is_legal(loss, plain, batch):
    offset = batch["offset"].clone()
    offset[4] = -torch.inf
    counts = batch["counts"].clone()
    counts[4] = 0
    kept = torch.arange(9) != 4
    expected = value(loss, {k: v[kept] for k, v in (batch | {"counts": counts}).items()})
    scores = batch["scores"].requires_grad_()
    got = value(loss, batch, counts=counts, offset=offset, scores=scores)
    torch.testing.assert_close(got, expected)
    assert torch.isfinite(torch.autograd.grad(got, scores)[0]).all()


@each_loss
def test_errors_name_the_argument(loss, plain, batch):
    with pytest.raises(
        ValueError, match=r"scores and counts must both be .* \[9, 4\] and \[9, 3\]"
    ):
        value(loss, batch, counts=batch["counts"][:, :3])
    with pytest.raises(ValueError, match="counts must not be negative"):
        value(loss, batch, counts=-batch["counts"])
    with pytest.raises(ValueError, match="offset is -inf"):
        value(loss, batch, offset=torch.full((9,), -torch.inf))
    with pytest.raises(ValueError, match=r"section must be \[n_spots\] = \[9\]; got \[8\]"):
        list_loss(batch["scores"], batch["counts"], section=batch["section"][:8])


def test_pairs_across_sections_are_refused(batch):
    with pytest.raises(ValueError, match="same section"):
        value(pair_loss, batch, pairs=torch.tensor([[0, 1]]))


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


def test_expected_pair_loss_is_the_all_pairs_loss(batch):
    n_partners = 4000
    drawn = value(
        pair_loss, batch, n_partners=n_partners, generator=torch.Generator().manual_seed(1)
    )
    size = torch.tensor([4, 4, 4, 4, 4, 4, 1, 4, 4])
    # Each ordered pair of a section of n is drawn with chance 1 / (n - 1) for each of its spots.
    expected = value(pair_all, batch) * 2 / (size[0] - 1)
    assert drawn.item() / n_partners == pytest.approx(expected.item(), rel=0.02)


def test_modules_equal_their_functions(batch):
    inputs = batch["scores"], batch["counts"]
    options = {"section": batch["section"], "offset": batch["offset"]}
    torch.testing.assert_close(ListSTRankLoss()(*inputs, **options), list_loss(*inputs, **options))
    torch.testing.assert_close(
        PairSTRankLoss(n_partners=3, seed=5)(*inputs, **options),
        pair_loss(*inputs, **options, n_partners=3, generator=torch.Generator().manual_seed(5)),
    )
