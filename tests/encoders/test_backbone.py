"""Networks of timm and transformers: as their own library would use them, whole and by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from strank.encoders.backbone import Backbone, BackboneEncoder, place, weights_checksum
from strank.encoders.base import Field, encoder_facts, preprocessing_hash
from strank.encoders.load import backbone_from_config, load_backbone, load_encoder
from strank.encoders.registry import get_encoder
from strank.errors import InputError

MEAN, STD = (0.7, 0.55, 0.6), (0.2, 0.25, 0.15)
TIMM = {
    "resnet": ("test_resnet", {}),
    "vit": ("test_vit", {"img_size": 32, "patch_size": 8, "init_values": 0.1}),
}
HF = ("vit", "dinov2", "convnext")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of random networks in the layout of the hub, as the libraries themselves save it."""
    root = tmp_path_factory.mktemp("hub")
    made = {}

    def make(kind):
        if kind not in made:
            path = root / kind.replace(":", "-")
            library, _, model = kind.partition(":")
            with torch.random.fork_rng():
                torch.manual_seed(0)
                (_save_timm if library == "timm" else _save_hf)(model, path)
            made[kind] = path
        return made[kind]

    return make


def _save_timm(kind, path):
    timm = pytest.importorskip("timm")
    name, model_args = TIMM[kind]
    model = timm.create_model(name, num_classes=7, **model_args)
    for module in model.modules():
        # A fresh one has statistics that do nothing, and weights of zero.
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    overlay = {"mean": MEAN, "std": STD, "input_size": (3, 32, 32)}
    timm.models.save_for_hf(
        model,
        path,
        model_config={"pretrained_cfg": overlay},
        model_args=model_args,
        safe_serialization=True,
    )
    # Versions differ in what they record.
    config = json.loads((path / "config.json").read_text())
    config["pretrained_cfg"].update(overlay)
    (path / "config.json").write_text(json.dumps(config))


def _save_hf(kind, path):
    transformers = pytest.importorskip("transformers")
    size = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
    size |= {"num_hidden_layers": 3, "num_attention_heads": 2}
    config = {
        "vit": lambda: transformers.ViTConfig(**size),
        "dinov2": lambda: transformers.Dinov2Config(**size),
        "convnext": lambda: transformers.ConvNextConfig(
            hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]
        ),
    }[kind]()
    transformers.AutoModel.from_config(config).save_pretrained(path)
    prepare = {"image_mean": MEAN, "image_std": STD}
    if kind == "dinov2":
        prepare |= {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}
        transformers.BitImageProcessor(**prepare).save_pretrained(path)
    else:
        prepare |= {"size": {"height": 32, "width": 32}}
        transformers.ViTImageProcessor(**prepare).save_pretrained(path)


@pytest.fixture(scope="module")
def patches():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


ALL = [f"timm:{kind}" for kind in TIMM] + [f"hf:{kind}" for kind in HF]


@pytest.fixture(params=ALL)
def kind(request):
    return request.param


def _load(folder, kind, **options):
    return load_backbone(f"{kind.partition(':')[0]}:{folder(kind)}", **options)


def in_float64(model):
    """Let a network compute so that its rounding is none of float32.

    We give patches as they lie in memory, channels last, and the libraries do not: other kernels
    take other sums, which are as far apart as float32 and the processor make them.
    """

    def double(_, given, named):
        return tuple(x.double() for x in given), {name: x.double() for name, x in named.items()}

    model.double().register_forward_pre_hook(double, with_kwargs=True)
    return model


@pytest.mark.parametrize("kind", list(TIMM))
def test_features_are_those_that_timm_computes(folder, patches, kind):
    timm = pytest.importorskip("timm")
    from PIL import Image

    path = folder(f"timm:{kind}")
    name, model_args = TIMM[kind]
    model = in_float64(timm.create_model(name, num_classes=7, **model_args).eval())
    model.load_state_dict(load_file(path / "model.safetensors"))
    backbone, pooled = _load(folder, f"timm:{kind}"), []
    in_float64(backbone.model)
    model.get_classifier().register_forward_pre_hook(lambda _, given: pooled.append(given[0]))
    prepare = timm.data.create_transform((3, 32, 32), mean=MEAN, std=STD, crop_pct=1.0)
    with torch.no_grad():
        model(torch.stack([prepare(Image.fromarray(patch)) for patch in patches]))
        features = backbone(torch.as_tensor(patches))
    # Features are stored in float32, whose rounding is 6e-8.
    expected = pooled[0].flatten(1).float()
    torch.testing.assert_close(features, expected, rtol=2e-7, atol=1e-12)
    assert (features.std(0) > 1e-4).float().mean() > 0.5


@pytest.mark.parametrize("kind", HF)
def test_features_are_those_that_transformers_computes(folder, patches, kind):
    transformers = pytest.importorskip("transformers")
    path = folder(f"hf:{kind}")
    prepare = transformers.AutoImageProcessor.from_pretrained(path)
    images = prepare(list(patches), return_tensors="pt", do_resize=False)
    backbone = _load(folder, f"hf:{kind}")
    in_float64(backbone.model)
    with torch.no_grad():
        output = in_float64(transformers.AutoModel.from_pretrained(path).eval())(**images)
        features = backbone(torch.as_tensor(patches))
    expected = output.pooler_output if kind == "convnext" else output.last_hidden_state[:, 0]
    expected = expected.flatten(1).float()
    # What they prepare is a rounding of float32 away from what we do.
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    assert (features.std(0) > 1e-4).float().mean() > 0.5


def test_a_network_is_rebuilt_from_its_config_alone(folder, patches, kind):
    backbone = _load(folder, kind, um=128.0)
    assert not backbone.training
    config = json.loads(json.dumps(backbone.config))
    assert config == backbone.config
    assert config["pixels"] == 32
    assert config["um"] == 128.0
    assert str(folder(kind)) not in json.dumps(config["architecture"])
    rebuilt = backbone_from_config(config)
    assert weights_checksum(rebuilt) != weights_checksum(backbone)
    rebuilt.load_state_dict(backbone.state_dict())
    assert weights_checksum(rebuilt) == weights_checksum(backbone)
    assert rebuilt.n_features == backbone.n_features
    with torch.no_grad():
        assert rebuilt(torch.as_tensor(patches)).equal(backbone(torch.as_tensor(patches)))


def test_the_encoder_gives_what_the_network_gives(folder, patches, kind):
    library = kind.partition(":")[0]
    encoder = load_encoder(f"{library}:{folder(kind)}")
    assert encoder.name == f"{library}_{folder(kind).name}"
    assert encoder.fields == (Field(112.0, 32),)
    encoder.backbone.train()
    features = encoder.encode([patches])
    assert encoder.backbone.training
    assert features.dtype == np.float32
    assert features.shape == (5, len(encoder.feature_names)) == (5, encoder.backbone.n_features)
    with torch.no_grad():
        expected = encoder.backbone.eval()(torch.as_tensor(patches))
    np.testing.assert_array_equal(features, expected)
    np.testing.assert_allclose(encoder.encode([patches[2:3]]), features[2:3], rtol=1e-4, atol=1e-5)
    again = load_encoder(f"{library}:{folder(kind)}")
    assert encoder_facts(again) == encoder_facts(encoder)


def test_batch_normalisation_keeps_its_statistics_in_training(folder, patches):
    backbone = _load(folder, "timm:resnet")
    before = weights_checksum(backbone)
    with torch.no_grad():
        expected = backbone(torch.as_tensor(patches))
        assert backbone.train()(torch.as_tensor(patches)).equal(expected)
    assert backbone.training
    assert weights_checksum(backbone) == before


def test_the_version_follows_the_weights(folder):
    backbone = _load(folder, "timm:vit")
    before = weights_checksum(backbone)
    with torch.no_grad():
        backbone.model.norm.bias[0] += 1e-6
    assert weights_checksum(backbone) != before


def test_placing_leaves_the_encoder_and_its_facts_as_they_are(folder, patches):
    encoder = BackboneEncoder(_load(folder, "timm:resnet"), "mine", "1")
    # A device without memory stands for one that is not there to test on.
    moved = place(encoder, "meta", "bf16")
    assert {t.device.type for t in moved.backbone.state_dict().values()} == {"meta"}
    assert {t.device.type for t in encoder.backbone.state_dict().values()} == {"cpu"}
    assert moved.backbone.state_dict().keys() == encoder.backbone.state_dict().keys()
    assert (moved.precision, encoder.precision) == ("bf16", "float32")
    assert encoder_facts(moved) == encoder_facts(encoder)
    here = place(encoder, "cpu", "bf16")
    np.testing.assert_array_equal(here.encode([patches]), encoder.encode([patches]))


def test_places_that_are_not_there_are_refused(folder):
    encoder = BackboneEncoder(_load(folder, "timm:resnet"), "mine", "1")
    with pytest.raises(InputError, match=r"no precision 'half'; choose one of float32, bf16, fp16"):
        place(encoder, "cpu", "half")
    with pytest.raises(InputError, match=r"no GPU cuda:99: torch sees \d+; use cpu"):
        place(encoder, "cuda:99")


def test_what_is_not_a_network_stays_on_the_cpu():
    encoder = get_encoder("morphology")
    assert place(encoder, "meta", "fp16") is encoder


def test_preprocessing_follows_colours_and_scale_but_not_the_weights(folder):
    backbone = _load(folder, "timm:resnet")
    known = preprocessing_hash(BackboneEncoder(backbone, "mine", "1"))
    assert preprocessing_hash(BackboneEncoder(backbone, "other", "2", "bf16")) == known
    assert encoder_facts(BackboneEncoder(backbone, "mine", "1"))["preprocessing"] == known
    others = [
        preprocessing_hash(BackboneEncoder(Backbone(backbone.model, changed), "mine", "1"))
        for changed in (
            {**backbone.config, "um": 100.0},
            {**backbone.config, "mean": [0.7, 0.5, 0.6]},
            {**backbone.config, "std": [0.2, 0.2, 0.2]},
        )
    ]
    assert len({known, *others}) == 4


def test_patches_of_another_shape_are_refused(folder, patches):
    encoder = BackboneEncoder(_load(folder, "timm:resnet"), "mine", "1")
    for wrong in ([], [patches, patches], [patches[:, :16]], [patches.astype(float)], [patches[0]]):
        with pytest.raises(InputError, match=r"mine: expected one array .* \[n_spots, 32, 32, 3\]"):
            encoder.encode(wrong)


@pytest.mark.parametrize("name", ["resnet18", "timm:", "torch:resnet18", ""])
def test_names_without_a_library_are_refused(name):
    with pytest.raises(InputError, match=r"no image network .*; write timm:NAME"):
        load_backbone(name)


@pytest.mark.parametrize("library", ["timm", "hf"])
def test_an_absent_folder_is_named(library, tmp_path):
    with pytest.raises(InputError, match=r"absent: no such folder"):
        load_backbone(f"{library}:{tmp_path / 'absent'}")


def _copy(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["timm:vit", "hf:dinov2"])
@pytest.mark.parametrize("damage", ["truncated", "lacking", "narrower", "unknown", "no JSON"])
def test_a_damaged_folder_is_one_clear_error(folder, tmp_path, kind, damage):
    copy = _copy(folder(kind), tmp_path / "copy")
    weights, config = copy / "model.safetensors", copy / "config.json"
    tensors = load_file(weights)
    norm = next(name for name in tensors if name.endswith("norm.weight"))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "lacking":
        save_file({k: v for k, v in tensors.items() if k != norm}, weights, {"format": "pt"})
    elif damage == "narrower":
        save_file({**tensors, norm: tensors[norm][:-1]}, weights, {"format": "pt"})
    elif damage == "unknown":
        _edit(config, architecture="no_such_net", model_type="no_such_net")
    else:
        config.write_text("{")
    with pytest.raises(InputError, match=r"copy.*(cannot be|lacks|not a readable|damaged)"):
        load_backbone(f"{kind.partition(':')[0]}:{copy}")


@pytest.mark.parametrize("kind", ["timm:vit", "hf:dinov2"])
def test_pickled_weights_are_not_read(folder, tmp_path, kind):
    copy = _copy(folder(kind), tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(tensors, copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model.safetensors"):
        load_backbone(f"{kind.partition(':')[0]}:{copy}")


def test_an_untrained_pooler_is_neither_needed_nor_used(folder, tmp_path):
    copy = _copy(folder("hf:vit"), tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    rest = {name: value for name, value in tensors.items() if "pooler" not in name}
    assert len(rest) < len(tensors)
    save_file(rest, copy / "model.safetensors", {"format": "pt"})
    assert weights_checksum(load_backbone(f"hf:{copy}")) == weights_checksum(
        _load(folder, "hf:vit")
    )


@pytest.mark.parametrize(
    ("name", "kind", "repository", "encoder"),
    [
        ("timm:resnet18", "timm:resnet", "timm/resnet18.a1_in1k", "timm_resnet18"),
        ("timm:owner/net", "timm:resnet", "owner/net", "timm_owner_net"),
        ("hf:owner/net", "hf:dinov2", "owner/net", "hf_owner_net"),
    ],
)
def test_the_hub_is_asked_for_safetensors(
    folder, monkeypatch, tmp_path, name, kind, repository, encoder
):
    asked = []

    def download(repo, *, allow_patterns):
        asked.append(repo)
        assert not any(pattern.endswith(".bin") for pattern in allow_patterns)
        return folder(kind)

    monkeypatch.setattr("strank.encoders.load.download", download)
    monkeypatch.chdir(tmp_path)
    loaded = load_encoder(name)
    assert asked == [repository]
    assert loaded.name == encoder
    assert loaded.backbone.config["name"] == name


def test_no_network_is_one_clear_error(monkeypatch):
    pytest.importorskip("timm")

    def download(*_, **__):
        raise InputError("owner/net: the hub cannot be reached")

    monkeypatch.setattr("strank.encoders.load.download", download)
    with pytest.raises(InputError, match=r"^owner/net: the hub cannot be reached$"):
        load_backbone("hf:owner/net")
    with pytest.raises(InputError, match=r"timm:resnet1: no such pretrained network"):
        load_backbone("timm:resnet1")


def test_a_missing_library_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(InputError, match=r"^this needs transformers: pip install"):
        load_backbone(f"hf:{tmp_path}")


def test_an_architecture_that_the_library_lacks_is_named(folder):
    config = _load(folder, "timm:vit").config
    config["architecture"]["architecture"] = "no_such_net"
    with pytest.raises(InputError, match=r"cannot be built .*install another version of timm"):
        backbone_from_config(config)


def test_a_network_that_does_not_pool_is_refused(folder, tmp_path):
    copy = _copy(folder("timm:vit"), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    _edit(copy / "config.json", model_args={**config["model_args"], "global_pool": ""})
    with pytest.raises(InputError, match=r"gives no pooled features"):
        load_backbone(f"timm:{copy}")
