"""Networks: parts of a batch, one after the other, are the batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strank.functional.listwise import list_loss, pearson_loss
from strank.functional.pairwise import pair_loss
from strank.functional.pointwise import mse_loss
from strank.neural.heads import ContextHead, Network

N_SPOTS, PIXELS, N_FEATURES, N_GENES = 11, 4, 6, 3


def pairs_of_a_fixed_draw(scores, counts, **rest):
    generator = torch.Generator().manual_seed(0)
    return pair_loss(scores, counts, n_partners=2, generator=generator, **rest)


LOSSES = {
    "list": list_loss,
    "pair": pairs_of_a_fixed_draw,
    "pearson": pearson_loss,
    "mse": mse_loss,
}
# Of one spot, of a part left over, all but one, exactly the batch, and more than it.
SIZES = [1, 3, 4, 10, 11, 50]
NEAR = {torch.float32: 1e-6, torch.float64: 1e-12}


class Logged(torch.autograd.Function):
    """The identity, which writes down what is computed, and whose gradient is taken."""

    @staticmethod
    def forward(ctx, values, log):
        ctx.log, ctx.size = log, len(values)
        log.append(("computed", len(values)))
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.log.append(("gradient", ctx.size))
        return gradient, None


class Backbone(nn.Module):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.first = nn.Linear(PIXELS * PIXELS * 3, 8)
        self.dropout, self.last = nn.Dropout(dropout), nn.Linear(8, N_FEATURES)
        self.log = []

    def forward(self, patches):
        hidden = torch.tanh(self.first(patches.flatten(1)))
        return self.last(self.dropout(Logged.apply(hidden, self.log)))


def make(micro_batch, dtype=torch.float64, dropout=0.0, head=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = nn.Linear(N_FEATURES, N_GENES) if head is None else head()
        return Network(head, Backbone(dropout), micro_batch).to(dtype)


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    patches = torch.rand(N_SPOTS, PIXELS, PIXELS, 3, generator=generator, dtype=torch.float64)
    counts = torch.poisson(torch.full((N_SPOTS, N_GENES), 4.0), generator=generator)
    # Sections spread over the parts.
    return patches.to(dtype), counts.to(dtype), torch.arange(N_SPOTS) % 2


def learn(network, loss, dtype=torch.float64, around=()):
    patches, counts, section = batch(dtype)
    torch.manual_seed(7)
    scores = network(patches, *around)
    value = loss(scores, counts, section=section)
    value.backward()
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert all(g.any() for g in gradients)
    return scores.detach(), value.detach(), *gradients


def assert_same(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= NEAR[b.dtype] * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro_batch", SIZES)
def test_parts_have_scores_loss_and_gradients_of_the_whole(micro_batch, loss, dtype):
    expected = learn(make(None, dtype), LOSSES[loss], dtype)
    assert_same(learn(make(micro_batch, dtype), LOSSES[loss], dtype), expected)


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_a_spot_and_its_neighbours_may_be_in_different_parts(micro_batch):
    def head():
        options = {"n_neighbours": 2, "width": 4}
        return ContextHead(N_FEATURES, N_GENES, **options, dropout=0, input_dropout=0)

    rows = torch.arange(N_SPOTS)
    steps = torch.tensor([0, 5, 1])
    neighbours = (rows[:, None] + steps) % N_SPOTS
    neighbours[3, 2] = -1
    around = neighbours, steps.expand(neighbours.shape) * 100.0
    expected = learn(make(None, head=head), list_loss, around=around)
    assert_same(learn(make(micro_batch, head=head), list_loss, around=around), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_computed_again_drops_the_same_units(loss):
    network = make(3, dropout=0.5)

    class InParts(nn.Module):
        """The same draws, in parts of which all activations are kept."""

        def __init__(self, backbone):
            super().__init__()
            self.backbone = backbone

        def forward(self, patches):
            return torch.cat([self.backbone(part) for part in patches.split(3)])

    kept = make(None, dropout=0.5)
    kept.backbone = InParts(kept.backbone)
    expected, got = learn(kept, LOSSES[loss]), learn(network, LOSSES[loss])
    assert_same(got, expected)
    assert not got[0].allclose(learn(make(3), LOSSES[loss])[0])


def test_taking_a_gradient_leaves_the_stream_of_draws_as_it_was():
    """What is computed again draws again, and that must not move the draws that follow."""

    def next_draw(micro_batch):
        network = make(micro_batch, dropout=0.5)
        patches, counts, section = batch()
        value = list_loss(network(patches), counts, section=section)
        torch.manual_seed(3)
        value.backward()
        return torch.rand(1)

    assert next_draw(3).equal(next_draw(None))


@pytest.mark.parametrize("micro_batch", [*SIZES, None])
def test_without_gradient_each_part_is_computed_once(micro_batch):
    patches, *_ = batch()
    network = make(micro_batch)
    expected = make(None)(patches).detach()
    with torch.no_grad():
        scores = network(patches)
    assert not scores.requires_grad
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    sizes = [size for _, size in network.backbone.log]
    assert sum(sizes) == N_SPOTS
    assert max(sizes) == min(micro_batch or N_SPOTS, N_SPOTS)


def test_the_backward_pass_holds_one_part_at_a_time():
    network = make(4)
    learn(network, list_loss)
    log = network.backbone.log
    assert log[:3] == [("computed", 4), ("computed", 4), ("computed", 3)]
    # The gradient of a part is taken before the next one is computed again.
    again = log[3:]
    assert [what for what, _ in again] == ["computed", "gradient"] * 3
    assert [size for _, size in again[::2]] == [size for _, size in again[1::2]]
    assert sorted(size for _, size in again[::2]) == [3, 4, 4]


@pytest.mark.parametrize("micro_batch", [11, 50, None])
def test_one_part_is_not_computed_again(micro_batch):
    network = make(micro_batch)
    learn(network, list_loss)
    assert network.backbone.log == [("computed", N_SPOTS), ("gradient", N_SPOTS)]


def test_after_the_forward_pass_no_activations_of_the_backbone_are_held():
    patches, *_ = batch()

    def held(micro_batch):
        """Numbers kept for the backward pass, but for patches and weights, in storages."""
        network, kept = make(micro_batch), {}
        own = {p.untyped_storage().data_ptr() for p in (patches, *network.parameters())}

        def pack(values):
            kept[values.untyped_storage().data_ptr()] = values
            return values

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
            scores = network(patches)
        # Keeps the graph, and with it what it holds, until it is counted.
        assert scores.requires_grad
        return sum(values.numel() for pointer, values in kept.items() if pointer not in own)

    # The head needs its features; what the backbone's 8 hidden units were, only without parts.
    assert held(4) == N_SPOTS * N_FEATURES
    assert held(None) >= N_SPOTS * (N_FEATURES + 8)


def test_of_a_frozen_backbone_the_head_learns_the_same():
    gradients = []
    for micro_batch in (3, None):
        network = make(micro_batch)
        network.backbone.requires_grad_(False)
        gradients.append(learn(network, list_loss))
        assert all(p.grad is None for p in network.backbone.parameters())
    assert_same(*gradients)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_features_go_straight_to_the_head(micro_batch):
    head, features = nn.Linear(N_FEATURES, N_GENES), torch.rand(5, N_FEATURES)
    network = Network(head, micro_batch=micro_batch)
    assert network.features(features) is features
    assert network(features).equal(head(features))


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_batch_of_no_spots_has_no_scores_and_no_gradient(micro_batch):
    """As on a process of several that has none of a batch."""
    network = make(micro_batch)
    scores = network(batch()[0][:0])
    assert scores.shape == (0, N_GENES)
    scores.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in network.parameters())
