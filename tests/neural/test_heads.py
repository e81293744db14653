"""Heads: what they compute, what they cannot see, and that their options make them again."""

from __future__ import annotations

import json
from math import erf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strank.neural.data import find_neighbours
from strank.neural.heads import (
    HEADS,
    ContextHead,
    LinearHead,
    LinearNetwork,
    MeanHead,
    MLPHead,
    stored_head,
)

N_FEATURES, N_GENES = 3, 7
CONTEXT = {"n_neighbours": 4, "n_heads": 2, "width": 8}
# All options other than they are by default.
OTHERS = {"dropout": 0.4, "input_dropout": 0.1, "rank": 2, "centred": False}
OPTIONS = {
    "linear": {},
    "linear-network": {"rank": 2, "centred": True},
    "mlp": OTHERS | {"width": 6, "depth": 3},
    "context": OTHERS | CONTEXT | {"depth": 2},
}
OPTIONS["mean"] = {
    "members": [{"kind": kind, "options": OPTIONS[kind]} for kind in ("mlp", "context")]
}


def lively(head, seed=0):
    """Give a head weights and a scaling in which nothing is 0 or 1, and float64."""
    generator = torch.Generator().manual_seed(seed)
    head.double()
    for values in head.parameters():
        values.data = torch.randn(values.shape, generator=generator).double() * 0.7
    for name, values in head.named_buffers():
        noise = torch.rand(values.shape, generator=generator).double()
        values.copy_(0.5 + noise if name.endswith("scale") else noise)
    return head.eval()


def tissue(seed=0, n_spots=24, n_sections=2):
    rng = np.random.default_rng(seed)
    features = torch.from_numpy(rng.normal(size=(n_spots, N_FEATURES)))
    positions = rng.uniform(0, 600, size=(n_spots, 2))
    return features, positions, np.arange(n_spots) % n_sections


def around(positions, section, n_neighbours=4):
    found = find_neighbours(positions, section, n_neighbours)
    return torch.from_numpy(found.rows), torch.from_numpy(found.distance)


def seen_by(head, features, positions, section):
    """Arguments of a head: with neighbours if it looks at any."""
    if head.n_neighbours == 0:
        return (features,)
    return features, *around(positions, section, head.n_neighbours)


def scores_of(head, features, positions, section):
    with torch.no_grad():
        return head(*seen_by(head, features, positions, section))


def numbers(module):
    return {name: values.detach().numpy() for name, values in module.state_dict().items()}


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def normed(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def affine(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def test_without_layers_the_head_is_linear_in_the_standardised_features():
    head = lively(LinearNetwork(N_FEATURES, N_GENES)).train()
    w, (features, *_) = numbers(head), tissue()
    expected = (features.numpy() - w["centre"]) / w["scale"] @ w["readout.weight"].T + w["level"]
    np.testing.assert_allclose(head(features).detach(), expected, rtol=1e-12)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    a=st.floats(-3, 3),
    b=st.floats(-3, 3),
    rank=st.sampled_from([None, 2]),
)
def test_without_layers_scores_superpose(seed, a, b, rank):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 5, N_FEATURES, generator=generator).double()
    head = lively(LinearNetwork(N_FEATURES, N_GENES, rank=rank))
    deep = lively(MLPHead(N_FEATURES, N_GENES, depth=1, width=8, rank=rank))

    def excess(head):
        zero = head(torch.zeros(5, N_FEATURES).double())
        whole = head(a * x + b * y) - zero
        return (whole - a * (head(x) - zero) - b * (head(y) - zero)).abs().max().item()

    assert excess(head) < 1e-12
    # At a = 0, b = 1 and the like any head does.
    if min(abs(a), abs(b)) > 0.1:
        assert excess(deep) > 1e-6


def layers_by_hand(w, depth, x):
    """Hidden layers, which see nothing beyond 8 standard deviations."""
    x = np.clip(x, -8, 8)
    for layer in range(depth):
        first = 2 + 4 * layer
        x = affine(w, f"layers.{first}", x)
        x = gelu(normed(x, w[f"layers.{first + 1}.weight"], w[f"layers.{first + 1}.bias"]))
    return x


@pytest.mark.parametrize("depth", [1, 2])
def test_layers_are_what_they_are_by_hand(depth):
    head = lively(MLPHead(N_FEATURES, N_GENES, width=5, depth=depth, rank=2))
    w, (features, *_) = numbers(head), tissue()
    features[3, 1], features[4, 0] = 100, -100
    hidden = layers_by_hand(w, depth, (features.numpy() - w["centre"]) / w["scale"])
    expected = affine(w, "readout.0", hidden) @ w["readout.1.weight"].T + w["level"]
    np.testing.assert_allclose(head(features).detach(), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", ["dropout", "input_dropout"])
@pytest.mark.parametrize("make", [MLPHead, ContextHead])
def test_units_and_features_are_left_out_in_training_only(make, kind):
    shares = {"dropout": 0.0, "input_dropout": 0.0} | {kind: 0.5}
    head = lively(make(N_FEATURES, N_GENES, **shares))
    seen = seen_by(head, *tissue())
    assert head(*seen).equal(head(*seen))
    head.train()
    assert not head(*seen).equal(head(*seen))


@pytest.mark.parametrize("kind", ["mlp", "context"])
def test_the_rank_bounds_the_rank_of_the_scores(kind):
    def rank_of(rank):
        head = lively(
            HEADS[kind](N_FEATURES, N_GENES, **OPTIONS[kind] | {"width": 8, "rank": rank})
        )
        scores = scores_of(head, *tissue(n_spots=60))
        return torch.linalg.matrix_rank(scores - scores.mean(0), rtol=1e-9).item()

    assert [rank_of(rank) for rank in (1, 2, 3, None)] == [1, 2, 3, N_GENES]


def context_by_hand(head, features, rows, distance):
    """Scores of one spot, the first of ``rows``, by the formula, head by head."""
    w = numbers(head)
    features = (features.numpy() - w["centre"]) / w["scale"]
    seen = [features[rows[0]]]
    for h in range(head.n_heads):
        decay = np.log1p(np.exp(w["nearness"][h]))
        logits = -decay * np.asarray(distance[1:]) / 100
        weights = np.exp(logits)
        around = zip(weights / weights.sum(), rows[1:], strict=True)
        seen.append(sum(weight * features[row] for weight, row in around))
    hidden = layers_by_hand(w, head.options["depth"], np.concatenate(seen))
    return hidden @ w["readout.weight"].T + w["level"]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("n_heads", [1, 3])
def test_means_of_neighbours_are_what_they_are_by_hand(n_heads, depth):
    options = CONTEXT | {"n_heads": n_heads, "depth": depth}
    head = lively(ContextHead(N_FEATURES, N_GENES, **options))
    features, positions, section = tissue(n_spots=12, n_sections=3)
    neighbours, distance = around(positions, section)
    got = head(features, neighbours, distance).detach().numpy()
    for spot in range(12):
        # Sections of 4: each spot sees three others, and once none.
        rows = neighbours[spot][neighbours[spot] >= 0].tolist()
        assert len(rows) == 4
        expected = context_by_hand(head, features, rows, distance[spot, :4].double().numpy())
        # Distances are float32.
        np.testing.assert_allclose(got[spot], expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    angle=st.floats(0, 2 * np.pi),
    mirrored=st.booleans(),
    shift=st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)),
)
def test_turning_mirroring_and_moving_a_section_changes_nothing(seed, angle, mirrored, shift):
    features, positions, section = tissue(seed)
    head = lively(ContextHead(N_FEATURES, N_GENES, **CONTEXT))
    expected = scores_of(head, features, positions, section)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    flip = np.diag([-1.0 if mirrored else 1.0, 1.0])
    moved = np.where(section[:, None] == 0, positions @ turn @ flip + shift, positions)
    # Distances are float32.
    got = scores_of(head, features, moved, section)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_in_another_order_spots_have_the_same_scores(seed):
    features, positions, section = tissue(seed)
    order = np.random.default_rng(seed).permutation(len(section))
    head = lively(ContextHead(N_FEATURES, N_GENES, **CONTEXT))
    expected = scores_of(head, features, positions, section)[order]
    got = scores_of(head, features[order], positions[order], section[order])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_other_sections_have_no_influence():
    features, positions, section = tissue()
    head = lively(ContextHead(N_FEATURES, N_GENES, **CONTEXT))
    # Row 0, which an absent neighbour could be taken for, is of the other one.
    own = section == 1
    expected = scores_of(head, features[own], positions[own], section[own])
    changed = torch.where(torch.from_numpy(own)[:, None], features, 1e6)
    got = scores_of(head, changed, positions, section)[own]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_absent_neighbours_have_no_influence():
    features, positions, section = tissue()
    head = lively(ContextHead(N_FEATURES, N_GENES, **CONTEXT))
    neighbours, distance = around(positions, section)
    expected = head(features, neighbours, distance)
    none = torch.full((len(section), 3), -1)
    # Whatever stands where a distance would, and whatever row a -1 could be taken for.
    padded = (
        torch.cat([neighbours, none], 1),
        torch.cat([distance, torch.rand(none.shape) * 9e3], 1),
    )
    torch.testing.assert_close(head(features, *padded), expected, rtol=1e-12, atol=1e-12)
    alone = torch.tensor([[5, -1, -1, -1, -1]]), torch.zeros(1, 5)
    expected = head(features[5:6], torch.tensor([[0]]), torch.zeros(1, 1))
    features = features.clone().requires_grad_()
    got = head(features, *alone)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    got.sum().backward()
    assert features.grad.isfinite().all()
    assert features.grad.any(1).nonzero().flatten().tolist() == [5]


def test_a_score_depends_on_the_spot_and_its_neighbours_and_nothing_else():
    features, positions, section = tissue()
    head = lively(ContextHead(N_FEATURES, N_GENES, **CONTEXT))
    neighbours, distance = around(positions, section)
    features.requires_grad_()
    for spot in (0, 5, 23):
        (slope,) = torch.autograd.grad(head(features, neighbours, distance)[spot].sum(), features)
        seen = slope.any(1).nonzero().flatten().tolist()
        assert seen == sorted(neighbours[spot].tolist())
        assert len(seen) == 5


def test_the_distance_of_a_neighbour_matters():
    features, positions, section = tissue()
    head = lively(ContextHead(N_FEATURES, N_GENES, **CONTEXT))
    neighbours, distance = around(positions, section)
    farther = head(features, neighbours, distance * 2) - head(features, neighbours, distance)
    assert (farther.abs().amax(1) > 1e-6).all()


@pytest.mark.parametrize("kind", ["mlp", "context"])
def test_the_mean_of_heads_is_the_mean_of_their_scores(kind):
    heads = [lively(HEADS[kind](N_FEATURES, N_GENES, **OPTIONS[kind]), seed) for seed in range(3)]
    mean = MeanHead.of(heads)
    expected = np.mean([scores_of(head, *tissue()) for head in heads], axis=0)
    np.testing.assert_allclose(scores_of(mean, *tissue()), expected, rtol=1e-12)
    assert mean.n_neighbours == (4 if kind == "context" else 0)


def test_heads_with_and_without_neighbours_have_a_mean():
    """Also of some spots among more rows, as in a batch."""
    heads = [
        lively(ContextHead(N_FEATURES, N_GENES, **CONTEXT)),
        lively(MLPHead(N_FEATURES, N_GENES)),
        lively(MeanHead.of([MLPHead(N_FEATURES, N_GENES), MLPHead(N_FEATURES, N_GENES)])),
    ]
    expected = torch.stack([scores_of(head, *tissue()) for head in heads]).mean(0)
    mean = MeanHead.of(heads)
    got = scores_of(mean, *tissue())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    features, positions, section = tissue()
    some = [7, 2]
    neighbours, distance = around(positions, section)
    got = mean(features, neighbours[some], distance[some])
    torch.testing.assert_close(got, expected[some], rtol=1e-12, atol=1e-12)


def test_a_mean_wants_centred_features_if_a_member_does():
    centred, plain = (MLPHead(2, 2, centred=centred) for centred in (True, False))
    assert MeanHead.of([plain, centred]).centred is True
    assert MeanHead.of([plain, plain]).centred is False


@pytest.mark.parametrize("kind", HEADS)
def test_kind_and_options_make_the_head_again(kind):
    head = lively(HEADS[kind](N_FEATURES, N_GENES, **OPTIONS[kind]))
    assert head.options == OPTIONS[kind]
    # They are stored as JSON.
    stored = json.loads(json.dumps(stored_head(head)))
    assert stored["kind"] == kind
    again = HEADS[stored["kind"]](N_FEATURES, N_GENES, **stored["options"]).double().eval()
    again.load_state_dict(head.state_dict())
    assert scores_of(again, *tissue()).equal(scores_of(head, *tissue()))
    assert again.options == head.options
    assert (again.n_neighbours, again.centred) == (head.n_neighbours, head.centred)
    # Shares of dropout are no weights, and come from the options too.
    shares = [module.p for module in again.modules() if isinstance(module, torch.nn.Dropout)]
    assert set(shares) == (set() if kind.startswith("linear") else {0.1, 0.4})


def test_the_exact_head_is_linear_in_the_standardised_features():
    head = lively(LinearHead(N_FEATURES, N_GENES))
    w, (features, *_) = numbers(head), tissue()
    expected = (features.numpy() - w["centre"]) / w["scale"] @ w["weight"]
    np.testing.assert_allclose(head(features).detach(), expected, rtol=1e-12)
    assert (head.centred, head.n_neighbours) == (False, 0)


@pytest.mark.parametrize("make", [LinearNetwork, MLPHead, ContextHead])
def test_options_that_are_not_given_are_kept_with_their_values(make):
    head = make(N_FEATURES, N_GENES)
    assert make(N_FEATURES, N_GENES, **head.options).options == head.options
    kind = stored_head(head)["kind"]
    assert head.options.keys() == OPTIONS[kind].keys()
    # What makes every option count in the tests above.
    assert all(head.options[name] != value for name, value in OPTIONS[kind].items())


def test_only_known_heads_have_a_name(monkeypatch):
    class Mine(MLPHead):
        """A subclass may compute anything."""

    assert stored_head(torch.nn.Linear(2, 2)) == {"kind": None, "options": {}}
    assert stored_head(Mine(2, 2))["kind"] is None
    monkeypatch.setitem(HEADS, "mine", Mine)
    assert stored_head(Mine(2, 2))["kind"] == "mine"
