"""Networks of pathology: as their cards and an independent registry say; weights from files."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from strank.encoders.architectures import TOWERS, fitted
from strank.encoders.backbone import Backbone, weights_checksum
from strank.encoders.base import encoder_facts
from strank.encoders.catalogue import CATALOGUE
from strank.encoders.load import backbone_from_config, load_backbone, load_encoder
from strank.encoders.registry import get_encoder
from strank.encoders.weights import read_weights
from strank.errors import InputError
from strank.neural.finetune import checkpoint_activations, prepare

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

# What the registry calls them.
REGISTERED = {name: name for name in CATALOGUE if name != "resnet50"}
REGISTERED |= {"uni2-h": "uni2", "phikon-v2": "phikonv2", "conch-224": "conch"}
# Of these the registry counts parts besides the image network.
NOT_ALONE = {"conch", "conch-224", "conch_v1.5"}

SMALL = {
    "plain": ("uni", {"embed_dim": 48, "depth": 2, "num_heads": 4, "init_values": 0.5}),
    "class+mean": (
        "virchow2",
        {"embed_dim": 48, "depth": 2, "num_heads": 4, "init_values": 0.5, "mlp_ratio": 4.0}
        | {"reg_tokens": 4, "global_pool": "", "mlp_layer": "swiglu", "act_layer": "silu"},
    ),
    "transformers": (
        "midnight",
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
}


def _config(entry):
    mean, std = entry.mean, entry.std
    facts = {"library": entry.library, "name": entry.name, "architecture": entry.architecture}
    facts |= {"pixels": entry.pixels, "um": entry.field.um, "pooling": entry.pooling}
    return {**facts, "mean": mean, "std": std}


def _imagined(name):
    """An architecture without memory, where a giant costs nothing."""
    with torch.device("meta"):
        return backbone_from_config(_config(CATALOGUE[name]))


def _made(build):
    """Random weights none of which is without effect."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point() and tensor.min() == tensor.max():
                nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


def _patches(pixels, n=2):
    return np.random.default_rng(0).integers(0, 256, (n, pixels, pixels, 3), dtype=np.uint8)


@pytest.fixture
def small(monkeypatch):
    """Give small networks of each kind, in the catalogue under the names they are asked for by."""

    def make(kind):
        like, args = SMALL[kind]
        entry = CATALOGUE[like]
        if entry.library == "timm":
            old = entry.architecture
            args = {"num_classes": 0, "img_size": 32, "patch_size": 8, **args}
            name = "vit_tiny_patch16_224"
            architecture = {**old, "architecture": name, "model_args": args}
        else:
            architecture = {**entry.architecture, **args, "image_size": 56, "patch_size": 8}
        width = 96 if entry.pooling == "class+mean" else 48
        entry = replace(
            entry, name=kind, architecture=architecture, pixels=32, n_features=width, rest=()
        )
        monkeypatch.setitem(CATALOGUE, kind, entry)
        return _made(lambda: backbone_from_config(_config(entry)).model), entry

    return make


@pytest.fixture(scope="module")
def registry():
    return pytest.importorskip("lazyslide_models").MODEL_REGISTRY


@pytest.mark.parametrize("name", CATALOGUE)
def test_an_architecture_is_built_without_weights_and_has_its_width(name):
    backbone, entry = _imagined(name), CATALOGUE[name]
    assert backbone.n_features == entry.n_features
    assert backbone.pixels == entry.pixels
    assert json.loads(json.dumps(backbone.config)) == json.loads(json.dumps(_config(entry)))


@pytest.mark.parametrize("name", REGISTERED)
def test_facts_are_those_of_the_registry(registry, name):
    known, entry = registry[REGISTERED[name]], CATALOGUE[name]
    assert (entry.licence, entry.gated) == (known.license, known.is_gated)
    # The class token alone; there the mean of the patch tokens, too.
    assert entry.n_features * (2 if name == "h0-mini" else 1) == known.encode_dim
    if known.paper_url:
        assert entry.citation.endswith(known.paper_url.removeprefix("https://doi.org/"))
    if known.hf_url and name not in ("conch_v1.5", "hibou-l"):
        assert known.hf_url == f"https://huggingface.co/{entry.repo}"


@pytest.mark.parametrize("name", sorted(REGISTERED.keys() - NOT_ALONE))
def test_it_has_as_many_parameters_as_the_registry_says(registry, name):
    stated = registry[REGISTERED[name]].param_size
    size = float(stated[:-1]) * {"M": 1e6, "B": 1e9}[stated[-1]]
    found = sum(p.numel() for p in _imagined(name).model.parameters())
    # As printed: rounded to its last digit.
    assert found == pytest.approx(size, abs=0.51 * size / float(stated[:-1]) * 10.0 ** -_n(stated))


@pytest.mark.parametrize(
    ("name", "n_registers"),
    [
        ("uni", 0),
        ("uni2-h", 8),
        ("virchow2", 4),
        ("h-optimus-0", 4),
        ("h0-mini", 4),
        ("gigapath", 0),
    ],
)
def test_it_has_as_many_registers_as_its_card_says(name, n_registers):
    assert _imagined(name).model.num_prefix_tokens == 1 + n_registers


def _n(stated):
    return len(stated[:-1].partition(".")[2])


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "wrapped.pth"])
@pytest.mark.parametrize("kind", SMALL)
def test_features_come_back_from_a_file_of_weights(small, tmp_path, kind, suffix):
    model, entry = small(kind)
    path = tmp_path / f"weights.{suffix}"
    if suffix == "safetensors":
        save_file(model.state_dict(), path)
    elif suffix == "pt":
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    else:
        named = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"model": named, "args": {"lr": 0.1}}, path)
    before = torch.get_rng_state()
    encoder = load_encoder(kind, weights=path)
    assert torch.get_rng_state().equal(before)
    expected = Backbone(model, _config(entry))
    patches = _patches(32)
    np.testing.assert_array_equal(
        encoder.encode([patches]), expected(torch.as_tensor(patches)).detach()
    )
    assert encoder.version == weights_checksum(expected)
    assert (encoder.name, encoder.revision) == (kind, None)
    facts = encoder_facts(encoder)
    assert "source" not in facts
    assert facts["n_features"] == entry.n_features
    rebuilt = backbone_from_config(json.loads(json.dumps(encoder.backbone.config)))
    rebuilt.load_state_dict(encoder.backbone.state_dict())
    assert weights_checksum(rebuilt) == encoder.version


def test_the_class_token_and_the_mean_of_the_patches(small):
    for kind, n_other in (("class+mean", 5), ("transformers", 1)):
        model, entry = small(kind)
        patches = torch.as_tensor(_patches(32))
        mean, std = (torch.tensor(c)[:, None, None] for c in (entry.mean, entry.std))
        images = (patches.permute(0, 3, 1, 2) / 255 - mean) / std
        with torch.no_grad():
            tokens = model(images)
            tokens = getattr(tokens, "last_hidden_state", tokens)
            features = Backbone(model, _config(entry))(patches)
        assert tokens.shape == (2, n_other + 16, 48)
        expected = torch.cat([tokens[:, 0], tokens[:, n_other:].mean(1)], 1)
        torch.testing.assert_close(features, expected)


def test_half_precision_is_computed_in_float32(small, tmp_path):
    model, _ = small("plain")
    path = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in model.state_dict().items()}, path)
    backbone = load_backbone("plain", weights=path)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}


def test_positions_of_the_size_of_training_are_taken_as_they_are(small, tmp_path):
    model, _ = small("transformers")
    weights = model.state_dict()
    positions = weights["embeddings.position_embeddings"]
    weights["embeddings.position_embeddings"] = positions[:, :17].clone()
    save_file(weights, tmp_path / "x.safetensors")
    backbone = load_backbone("transformers", weights=tmp_path / "x.safetensors")
    assert backbone.config["architecture"]["image_size"] == 32
    assert len(backbone.model.embeddings.position_embeddings[0]) == 17


@pytest.mark.parametrize("damage", ["lacking", "more", "narrower", "empty", "no tensors", "absent"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_other_weights_are_refused_and_named(small, tmp_path, damage, suffix):
    model, _ = small("plain")
    weights, path = dict(model.state_dict()), tmp_path / f"x.{suffix}"
    message = {
        "lacking": "not the weights of plain: lacks norm.bias; give the file that its authors",
        "more": "not the weights of plain: has reg_token besides",
        "narrower": "not the weights of plain: norm.bias is [47] and not [48]",
        "empty": "holds no state dict",
        "no tensors": "holds no state dict",
        "absent": "no such file of weights",
    }[damage]
    if damage == "lacking":
        del weights["norm.bias"]
    elif damage == "more":
        weights["reg_token"] = torch.zeros(1)
    elif damage == "narrower":
        weights["norm.bias"] = torch.zeros(47)
    else:
        weights = {} if suffix == "safetensors" or damage == "empty" else {"a": 1}
    if damage != "absent":
        (save_file if suffix == "safetensors" else torch.save)(weights, path)
    with pytest.raises(InputError, match=re.escape(f"{path}: {message}")):
        load_encoder("plain", weights=path)


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(timm.create_model("resnet18", num_classes=0).state_dict(), path)
    for name in ("resnet50", "ctranspath", "uni"):
        with pytest.raises(InputError, match=rf"x.safetensors: not the weights of {name}: "):
            get_encoder(name, weights=path)


class _Harmful:
    def __reduce__(self):
        return (pytest.fail, ("something was run",))


@pytest.mark.parametrize("content", ["pickle", "module", "text", "cut"])
def test_nothing_but_tensors_is_unpickled(tmp_path, content):
    path = tmp_path / "x.pt"
    if content == "text":
        path.write_text("<html>404</html>")
    else:
        torch.save({"pickle": _Harmful(), "module": nn.Identity()}.get(content, {}), path)
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(
        InputError, match=r"x.pt: (not a checkpoint that can be read safely|damaged)"
    ):
        read_weights(path)
    (tmp_path / "y.safetensors").write_text("<html>404</html>")
    with pytest.raises(InputError, match=r"y.safetensors: damaged"):
        read_weights(tmp_path / "y.safetensors")


def test_weights_come_from_the_hub_at_a_commit(small, tmp_path, monkeypatch):
    model, entry = small("plain")
    folder = tmp_path / ("a1" * 20)
    folder.mkdir()
    torch.save(model.state_dict(), folder / entry.file)
    asked = []

    def download(repo, **wanted):
        asked.append((repo, wanted))
        return folder

    monkeypatch.setattr("strank.encoders.load.download", download)
    encoder = load_encoder("plain")
    assert asked == [(entry.repo, {"revision": None, "allow_patterns": [entry.file]})]
    assert encoder.revision == folder.name
    # What must agree is what the weights are, not where they came from.
    local = load_encoder("plain", weights=folder / entry.file)
    assert encoder_facts(encoder) == encoder_facts(local)


def test_a_gate_and_the_terms_are_said_when_the_hub_refuses(monkeypatch):
    def download(repo, **_):
        raise InputError(f"{repo}: gated (403): accept its licence")

    monkeypatch.setattr("strank.encoders.load.download", download)
    expected = (
        "MahmoodLab/UNI: gated (403): accept its licence; or give the file as `weights` "
        "(uni: licence CC-BY-NC-ND-4.0, gated: ask at https://huggingface.co/MahmoodLab/UNI)"
    )
    with pytest.raises(InputError, match=f"^{re.escape(expected)}$"):
        get_encoder("uni")
    with pytest.raises(InputError, match=r"\(phikon-v2: licence Owkin non-commercial license\)$"):
        get_encoder("phikon-v2")


def test_no_network_is_explained(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"^paige-ai/Virchow2: .*cache.*the file as `weights`"):
        get_encoder("virchow2")


def _published(model):
    """Weights of CTransPath as its authors gave them, by the timm of their time."""
    down = re.compile(r"layers\.(\d)\.downsample")
    weights = {
        down.sub(lambda m: f"layers.{int(m[1]) - 1}.downsample", key): value
        for key, value in model.state_dict().items()
    }
    buffers = {"layers.0.blocks.1.attn_mask": torch.zeros(64, 49, 49)}
    buffers |= {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49).long()}
    return {"model": {**weights, **buffers}}


def test_ctranspath_takes_the_file_of_its_authors(tmp_path):
    model = _made(TOWERS["ctranspath"])
    torch.save(_published(model), tmp_path / "ctranspath.pth")
    encoder = get_encoder("ctranspath", weights=tmp_path / "ctranspath.pth")
    patches = torch.as_tensor(_patches(224, 1))
    with torch.no_grad():
        expected = Backbone(model, _config(CATALOGUE["ctranspath"]))(patches)
    np.testing.assert_array_equal(encoder.encode([patches.numpy()]), expected)
    assert float(expected.std()) > 0.01


def test_resnet50_leaves_its_classifier(tmp_path):
    model = _made(lambda: timm.create_model("resnet50"))
    save_file(model.state_dict(), tmp_path / "x.safetensors")
    encoder = get_encoder("resnet50", weights=tmp_path / "x.safetensors")
    assert encoder.encode([_patches(224, 1)]).shape == (1, 2048)


def test_conch_takes_the_image_tower_alone(tmp_path):
    tower = _made(TOWERS["conch"])
    weights = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    others = ("text.cls_emb", "text_decoder.ln", "logit_scale", "visual.proj_contrast")
    for name in (*others, "visual.attn_pool_caption.query", "visual.ln_caption.bias"):
        weights[name] = torch.zeros(3)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    backbone = load_backbone("conch", weights=tmp_path / "pytorch_model.bin")
    assert all(
        value.equal(weights[f"visual.{key}"]) for key, value in backbone.model.state_dict().items()
    )


def test_conch_at_224_pixels_gets_positions_as_timm_makes_them_at_every_use(tmp_path):
    tower = _made(TOWERS["conch"])
    weights = {f"visual.{key}": value for key, value in tower.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    backbone = load_backbone("conch-224", weights=tmp_path / "pytorch_model.bin")
    assert CATALOGUE["conch-224"].field == CATALOGUE["uni"].field
    trunk = timm.create_model(
        "vit_base_patch16_224", img_size=448, num_classes=0, dynamic_img_size=True
    )
    trunk.load_state_dict(tower.trunk.state_dict())
    tower.trunk = trunk.eval()
    patches = torch.as_tensor(_patches(224))
    mean, std = (torch.tensor(backbone.config[c]).view(3, 1, 1) for c in ("mean", "std"))
    with torch.no_grad():
        expected = tower((patches.movedim(-1, 1) / 255 - mean) / std)
        found = backbone(patches)
    torch.testing.assert_close(found, expected)
    assert found.std(0).min() > 0
    # Positions matter: without them the network gives something else.
    backbone.model.trunk.pos_embed.data.zero_()
    assert (backbone(patches) - expected).abs().max() > 1e-3
    rebuilt = backbone_from_config(json.loads(json.dumps(backbone.config)))
    rebuilt.load_state_dict(backbone.state_dict())


def test_conch_pools_its_tokens_by_attention():
    """By hand, from the equations: eight heads, one query."""
    for name, width in (("conch", 512), ("conch_v1.5", 768)):
        with torch.device("meta"):
            pool = TOWERS[name]().attn_pool_contrast
        pool = pool.to_empty(device="cpu")
        generator = torch.Generator().manual_seed(0)
        for parameter in pool.parameters():
            nn.init.normal_(parameter, 0, 0.05, generator)
        context = 768 if name == "conch" else 1024
        tokens = torch.randn(2, 7, context, generator=generator)
        with torch.no_grad():
            keys = functional.layer_norm(tokens, [context], pool.ln_k.weight, pool.ln_k.bias)
            query = functional.layer_norm(pool.query, [width], pool.ln_q.weight, pool.ln_q.bias)
            if name == "conch":
                own = pool.attn
                bias = own.in_proj_bias.chunk(3)
                q, k, v = (
                    given @ getattr(own, f"{part}_proj_weight").T + b
                    for given, part, b in zip((query, keys, keys), "qkv", bias, strict=True)
                )
                out = own.out_proj
            else:
                q, (k, v) = pool.to_q(query), pool.to_kv(keys).chunk(2, -1)
                out = pool.to_out
            heads = []
            for part in range(0, width, width // 8):
                at = slice(part, part + width // 8)
                share = (q[:, at] @ k[..., at].mT / (width / 8) ** 0.5).softmax(-1)
                heads.append((share @ v[..., at])[:, 0])
            torch.testing.assert_close(pool(tokens), out(torch.cat(heads, 1)), rtol=1e-4, atol=1e-5)


def test_conch15_gets_positions_for_its_larger_patches():
    rows = torch.arange(14.0).repeat_interleave(14)
    before = torch.cat([torch.tensor([99.0]), rows])[None, :, None].repeat(1, 1, 3)
    after = fitted("conch_v1.5", {"trunk.pos_embed": before}, nn.Identity())["trunk.pos_embed"]
    assert after.shape == (1, 28 * 28 + 1, 3)
    assert after[0, 0, 0] == 99
    grid = after[0, 1:, 0].reshape(28, 28)
    torch.testing.assert_close(grid, grid[:, :1].expand(28, 28))
    # A position, half a patch in, and a tenth of a patch of slack.
    place = (torch.arange(4, 24) + 0.5) * 14 / 28.1 - 0.5
    torch.testing.assert_close(grid[4:24, 0], place, rtol=0, atol=0.05)
    kept = fitted("conch_v1.5", {"trunk.pos_embed": after}, nn.Identity())["trunk.pos_embed"]
    assert kept.equal(after)


@pytest.mark.parametrize("name", ["conch", "uni", "phikon-v2"])
def test_networks_of_the_catalogue_can_be_fine_tuned(name):
    backbone = _imagined(name)
    checkpoint_activations(backbone)
    trained = {
        key for key, value in prepare(backbone, "last-1").named_parameters() if value.requires_grad
    }
    block = {"conch": "trunk.blocks.11.", "uni": "blocks.23."}.get(name, "layer.23.")
    assert any(block in key for key in trained)
    assert not any(block.replace("1.", "0.").replace("3.", "2.") in key for key in trained)
