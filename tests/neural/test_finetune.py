"""What of a backbone is trained, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from strank.encoders.backbone import Backbone
from strank.encoders.load import backbone_from_config
from strank.errors import InputError
from strank.neural.finetune import checkpoint_activations, freeze_unused, merge, prepare

# Library and architecture; the blocks of each in order; what comes after them.
NETWORKS = {
    "timm-vit": (
        {"architecture": "test_vit", "model_args": {"img_size": 32, "patch_size": 8}},
        [f"blocks.{i}." for i in range(6)],
        ["norm."],
    ),
    "timm-resnet": (
        {"architecture": "test_resnet", "model_args": {}},
        [f"layer{i}.0." for i in range(1, 5)],
        [],
    ),
    "timm-convnext": (
        {"architecture": "test_convnext", "model_args": {}},
        [f"stages.{s}.blocks.{b}." for s, depth in enumerate((1, 2, 4, 2)) for b in range(depth)],
        ["norm_pre.", "head."],
    ),
    "hf-dinov2": (
        {
            "model_type": "dinov2",
            "image_size": 32,
            "patch_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
        },
        [f"encoder.layer.{i}." for i in range(3)],
        ["layernorm."],
    ),
}


def _backbone(kind):
    library = pytest.importorskip("timm" if kind.startswith("timm") else "transformers").__name__
    architecture = copy.deepcopy(NETWORKS[kind][0])
    if library == "timm":
        architecture["pretrained_cfg"] = {"input_size": (3, 32, 32), "num_classes": 3}
    config = {"library": library, "name": kind, "architecture": architecture}
    config |= {"mean": [0.5] * 3, "std": [0.2] * 3, "pixels": 32, "um": 112.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = backbone_from_config(config)
        _liven(backbone)
    return backbone


def _liven(network):
    """Give every layer an effect: fresh networks start with some that have none."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for name, parameter in network.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)


@pytest.fixture(params=NETWORKS)
def kind(request):
    return request.param


@pytest.fixture
def backbone(kind):
    return _backbone(kind)


@pytest.fixture(scope="module")
def patches():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8, generator=generator)


def _trained(backbone):
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}


def _loss(features):
    # Plain sums and squares of what a final norm gives would be constant.
    return (features * torch.linspace(-1, 1, features.shape[1])).sum()


def _step(backbone, patches, rate=0.1):
    optimiser = torch.optim.SGD([p for p in backbone.parameters() if p.requires_grad], rate)
    optimiser.zero_grad()
    _loss(backbone.train()(patches)).backward()
    optimiser.step()


def test_all_or_nothing(backbone):
    everything = {name for name, _ in backbone.named_parameters()}
    assert _trained(prepare(backbone, "frozen")) == set()
    assert _trained(prepare(backbone, "full")) == everything


@pytest.mark.parametrize("n_blocks", [1, 2])
def test_the_last_blocks_and_what_follows_are_trained(kind, backbone, n_blocks):
    _, blocks, after = NETWORKS[kind]
    names = [name.removeprefix("model.") for name, _ in backbone.named_parameters()]
    wanted = tuple(blocks[-n_blocks:] + after)
    trained = {n.removeprefix("model.") for n in _trained(prepare(backbone, f"last-{n_blocks}"))}
    # Between two blocks may stand what halves the resolution.
    assert {name for name in trained if "downsample" not in name or "layer" in name} == {
        name for name in names if name.startswith(wanted)
    }


def test_every_block_can_be_trained_and_no_more(kind, backbone):
    n_blocks = len(NETWORKS[kind][1])
    trained = _trained(prepare(backbone, f"last-{n_blocks}"))
    assert all(any(block in name for name in trained) for block in NETWORKS[kind][1])
    assert not any("embed" in name or "stem" in name for name in trained)
    with pytest.raises(InputError, match=rf"last-{n_blocks + 1}: the network has {n_blocks} bloc"):
        prepare(backbone, f"last-{n_blocks + 1}")


@pytest.mark.parametrize("mode", ["last", "last-0", "last--1", "last-1.5", "LORA", "", "all"])
def test_unknown_modes_list_the_choices(mode):
    with pytest.raises(InputError, match=r"no mode .*choose one of frozen, last-K .*, lora, full"):
        prepare(nn.Linear(2, 2), mode)


def test_a_step_changes_what_is_trained_and_nothing_else(backbone, patches):
    prepare(backbone, "last-1")
    trained = _trained(backbone)
    before = copy.deepcopy(backbone.state_dict())
    _step(backbone, patches)
    changed = {
        name for name, value in backbone.state_dict().items() if not value.equal(before[name])
    }
    assert changed
    assert changed <= trained


def test_adapters_start_without_effect_and_alone_are_trained(backbone, patches):
    pytest.importorskip("peft")
    with torch.no_grad():
        plain = backbone(patches)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    assert prepare(backbone, "lora", lora_rank=2) is backbone
    assert torch.get_rng_state().equal(state)
    assert _trained(backbone)
    assert all("lora_" in name for name in _trained(backbone))
    with torch.no_grad():
        torch.testing.assert_close(backbone.eval()(patches), plain)
    for _ in range(2):
        _step(backbone, patches)
    after = {
        name.replace(".base_layer", ""): value
        for name, value in backbone.state_dict().items()
        if "lora_" not in name
    }
    assert after.keys() == before.keys()
    assert all(value.equal(before[name]) for name, value in after.items())
    with torch.no_grad():
        assert not backbone.eval()(patches).allclose(plain, atol=1e-5)


def test_merged_adapters_give_the_same_features_as_a_plain_network(backbone, patches):
    pytest.importorskip("peft")
    prepare(backbone, "lora", lora_rank=2)
    for name, parameter in backbone.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        adapted = backbone.eval()(patches)
        merged = merge(backbone)
        assert backbone(patches).equal(adapted)
        assert isinstance(merged, Backbone)
        torch.testing.assert_close(merged(patches), adapted, rtol=1e-5, atol=1e-5)
        fresh = backbone_from_config(backbone.config)
        assert list(fresh.state_dict()) == list(merged.state_dict())
        fresh.load_state_dict(merged.state_dict())
        assert fresh(patches).equal(merged(patches))
        assert not hasattr(merged, "peft_config")


def test_the_seed_makes_the_adapters(kind):
    pytest.importorskip("peft")
    first, same, other = (
        prepare(_backbone(kind), "lora", seed=seed).state_dict() for seed in (1, 1, 2)
    )
    assert all(value.equal(same[name]) for name, value in first.items())
    drawn = [name for name in first if "lora_A" in name]
    assert drawn
    assert not any(first[name].equal(other[name]) for name in drawn)


def test_adapters_stand_beside_linear_layers_or_else_convolutions(kind, backbone):
    pytest.importorskip("peft")
    prepare(backbone, "lora", lora_rank=2)
    adapted = {type(m.base_layer) for m in backbone.modules() if hasattr(m, "base_layer")}
    assert adapted == {nn.Conv2d if kind == "timm-resnet" else nn.Linear}


def test_adapters_need_a_place():
    pytest.importorskip("peft")
    with pytest.raises(InputError, match=r"lora: no linear layers or convolutions"):
        prepare(nn.Sequential(nn.Linear(2, 2)), "lora")


def test_a_plain_network_merges_to_itself(backbone, patches):
    with torch.no_grad():
        assert merge(backbone)(patches).equal(backbone(patches))


@pytest.mark.parametrize("mode", ["full", "last-2", "lora"])
def test_recomputed_activations_give_the_same_gradients(kind, patches, mode):
    if mode == "lora":
        pytest.importorskip("peft")
    gradients = []
    for checkpointed in (False, True):
        backbone = prepare(_backbone(kind), mode)
        if checkpointed:
            checkpoint_activations(backbone)
        _loss(backbone.train()(patches)).backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert any(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=0)


def test_activations_are_recomputed_in_the_backward_pass(kind, patches):
    backbone = prepare(_backbone(kind), "full").train()
    block = backbone.model.get_submodule(NETWORKS[kind][1][-1].rstrip("."))
    calls = []
    layer = next(module for module in block.modules() if not list(module.children()))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    backbone(patches).sum().backward()
    assert len(calls) == 1
    checkpoint_activations(backbone)
    backbone(patches).sum().backward()
    assert len(calls) == 3


def test_networks_that_cannot_recompute_are_named():
    backbone = _backbone("timm-resnet")
    backbone.model = nn.Identity()
    with pytest.raises(InputError, match=r"timm-resnet: cannot recompute activations"):
        checkpoint_activations(backbone)


def test_weights_that_no_feature_depends_on_are_left_alone(backbone):
    every = _trained(prepare(backbone, "full"))
    backbone.model.register_parameter("mask_of_patches", nn.Parameter(torch.ones(3)))
    freeze_unused(backbone)
    assert "model.mask_of_patches" not in _trained(backbone)
    # Some networks bring such weights themselves: a mask token, position of no patch.
    assert _trained(backbone) >= {name for name in every if "mask" not in name}
    freeze_unused(prepare(backbone, "frozen"))
    assert not _trained(backbone)
