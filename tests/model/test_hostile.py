"""A model that somebody else wrote: no code of it runs, no file but its own opens, no one is asked.

All are loaded in one process of their own that keeps account of what Python opens and connects to.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from strank.encoders.backbone import weights_checksum
from strank.encoders.catalogue import CATALOGUE
from strank.encoders.config import check_network
from strank.encoders.load import backbone_from_config
from strank.encoders.weights import filled
from strank.errors import InputError
from strank.files import sha256
from strank.model.rank_model import RankModel, pull_model
from strank.neural.heads import MLPHead

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

TIMM = {
    "architecture": "test_vit",
    "model_args": {"num_classes": 0, "img_size": 32, "patch_size": 8},
    "pretrained_cfg": {},
}
VIT = {"model_type": "vit", "image_size": 32, "patch_size": 8, "hidden_size": 32}
VIT |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
COLOURS = {"mean": [0.5] * 3, "std": [0.5] * 3, "pixels": 32, "um": 112.0}


def config(library="timm", architecture=TIMM):
    return {"library": library, "name": "a", "architecture": architecture, **COLOURS}


class Marker:
    """What a pickle runs when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A good model, and what lies beside it for a bad one to open."""
    root = tmp_path_factory.mktemp("hostile")
    with torch.random.fork_rng():
        backbone = backbone_from_config(config())
        facts = {"name": "net", "version": weights_checksum(backbone), "fields": []}
        facts |= {"n_features": backbone.n_features}
        head = MLPHead(backbone.n_features, 2, width=4)
        panel = pd.DataFrame({"counts": [3.0, 4.0]}, index=["A", "B"])
        RankModel(head, panel, facts, {}, backbone).save(root / "good")
        plain = RankModel(MLPHead(3, 2, width=4), panel, {**facts, "n_features": 3}, {})
        plain.save(root / "plain")
    (root / "elsewhere").mkdir()
    (root / "evil.pth").write_bytes(pickle.dumps(Marker(root / "ran")))
    (root / "elsewhere" / "config.json").write_text(json.dumps(TIMM))
    return root


def put(path, value):
    """Change one field of model.json; ``{}`` in a text stands for the folder above."""

    def change(model, root):
        *way, last = path.split("/")
        for key in way:
            model = model[int(key)] if isinstance(model, list) else model[key]
        model[last] = value.format(root) if isinstance(value, str) else value

    return change


def hf(**given):
    def change(model, _):
        model["backbone"]["config"] |= config("transformers", {**VIT, **given})

    return change


def large(model, _):
    """Within all ranges, and 2.4 GB."""
    architecture = model["backbone"]["config"]["architecture"]
    architecture["model_args"] |= {"embed_dim": 2048, "depth": 12, "num_heads": 8}


ARGS = "backbone/config/architecture/model_args/"
NET = "backbone/config/architecture/"

# By the field that the error must name.
ATTACKS = {
    "model_args.checkpoint_path": put(ARGS + "checkpoint_path", "{}/evil.pth"),
    "model_args.pretrained": put(ARGS + "pretrained", True),
    "model_args.pretrained_cfg": put(ARGS + "pretrained_cfg", {"file": "/etc/passwd"}),
    "model_args.pretrained_cfg_overlay": put(ARGS + "pretrained_cfg_overlay", {"url": "http://x"}),
    "model_args.cache_dir": put(ARGS + "cache_dir", "{}/cache"),
    "model_args.features_only": put(ARGS + "features_only", True),
    "model_args.pretrained_strict": put(ARGS + "pretrained_strict", False),
    "model_args.block_fn": put(ARGS + "block_fn", "os:system"),
    "model_args.mlp_layer": put(ARGS + "mlp_layer", "os.system"),
    "model_args.act_layer": put(ARGS + "act_layer", "../evil.pth"),
    "model_args.global_pool": put(ARGS + "global_pool", ["avg"]),
    "model_args.depth": put(ARGS + "depth", 10**9),
    "model_args.embed_dim": put(ARGS + "embed_dim", 10**12),
    "model_args.img_size": put(ARGS + "img_size", [10**6, 10**6]),
    "model_args.num_classes": put(ARGS + "num_classes", 10**12),
    "model_args.patch_size": put(ARGS + "patch_size", 0),
    "not the weights of the network": large,
    "not the weights of the network: the head": put("head/options/width", 2**20),
    "architecture: 1": put(NET + "architecture", "local-dir:{}/elsewhere"),
    "architecture: 2": put(NET + "architecture", "hf-hub:evil/net"),
    "architecture: 3": put(NET + "architecture", "hf_hub:evil/net"),
    "architecture: 4": put(NET + "architecture", "{}/elsewhere"),
    "architecture: 5": put(NET + "architecture", "no_such_net"),
    "pretrained_cfg.file": put(NET + "pretrained_cfg/file", "{}/evil.pth"),
    "pretrained_cfg.url": put(NET + "pretrained_cfg/url", "http://127.0.0.1:9/evil.pth"),
    "pretrained_cfg.hf_hub_id": put(NET + "pretrained_cfg/hf_hub_id", "evil/net"),
    "pretrained_cfg.custom_load": put(NET + "pretrained_cfg/custom_load", True),
    "pretrained_cfg.first_conv": put(NET + "pretrained_cfg/first_conv", "a/b"),
    "library": put("backbone/config/library", "os"),
    "pixels": put("backbone/config/pixels", 10**6),
    "trust_remote_code": put("backbone/config/trust_remote_code", True),
    "mean": put("backbone/config/mean", [0.5]),
    "auto_map": hf(auto_map={"AutoModel": "evil/net--code.Net"}),
    "_attn_implementation": hf(_attn_implementation="evil/kernel"),
    "attn_implementation": hf(attn_implementation="evil/kernel"),
    "quantization_config": hf(quantization_config={"quant_method": "bitsandbytes"}),
    "backbone": hf(backbone="hf-hub:evil/net"),
    "use_kernels": hf(use_kernels=True),
    "model_type: 1": hf(model_type="timm_wrapper", architecture="hf-hub:evil/net"),
    "model_type: 2": hf(model_type="evil/net"),
    "num_hidden_layers": hf(num_hidden_layers=10**9),
    "hidden_size": hf(hidden_size=10**12),
    "image_size": hf(image_size=10**9),
    "hidden_act": hf(hidden_act="../evil"),
    "layer_norm_eps": hf(layer_norm_eps=float("nan")),
    "head.kind": put("head/kind", ["mlp"]),
    "a head 'os:system'": put("head/kind", "os:system"),
    "head.options.width": put("head/options/width", 2**40),
    "head.options": put("head/options", {"members": [{"kind": "mlp", "options": {}}] * 10**5}),
    "head.options.depth": put("head/options/depth", -1),
    "head.sha256": put("head/sha256", "../../x"),
    "encoder.n_features": put("encoder/n_features", 10**12),
    "encoder.name": put("encoder/name", "a\nb"),
    "panel.1.gene": put("panel/1/gene", {"a": 1}),
    "columns": put("panel/1/other", 1),
    "a gene twice": put("panel/1/gene", "A"),
    "provenance.sections": put("provenance/sections", [1]),
    "provenance.spot_pitch_um": put("provenance/spot_pitch_um", "x"),
}

RECORDER = """
import json, os, resource, sys
from pathlib import Path
import torch, timm, transformers
from strank.errors import InputError
from strank.model.rank_model import RankModel
root = Path(sys.argv[1])
RankModel.load(root / "good")
opened, allowed, on = [], None, [False]
roots = [sys.prefix, sys.base_prefix, *(p for p in sys.path if p), "/proc", "/sys", "/dev/null"]
roots += [os.path.realpath(r) for r in roots]
def hook(event, args):
    if not on[0]:
        return
    if event == "open" and isinstance(args[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(args[0]))
        if not any(path.startswith(r) for r in (*roots, allowed)):
            opened.append(path)
    elif event.startswith(("socket.", "subprocess.", "os.system", "pickle.", "os.exec")):
        opened.append(event)
sys.addaudithook(hook)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
said = {}
for folder in sorted(p for p in root.iterdir() if (p / "model.json").is_file()):
    allowed, before = str(folder), peak()
    opened.clear()
    on[0] = True
    try:
        RankModel.load(folder)
        error = None
    except InputError as problem:
        error = str(problem)
    except BaseException as problem:
        error = f"TRACEBACK {problem!r}"
    on[0] = False
    said[folder.name] = [error, list(opened), (peak() - before) // 1024]
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def account(place):
    """What became of each model: the error, what was opened besides, MiB taken."""
    good = json.loads((place / "good" / "model.json").read_text())
    for number, attack in enumerate(ATTACKS.values()):
        folder = place / f"attack-{number}"
        folder.mkdir()
        for file in (place / "good").iterdir():
            os.link(file, folder / file.name)
        model = copy.deepcopy(good)
        attack(model, place)
        (folder / "model.json").unlink()
        (folder / "model.json").write_text(json.dumps(model))
    for name in SAFETENSORS:
        _lying(place, name)
    done = subprocess.run(
        [sys.executable, "-c", RECORDER, place], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not (place / "ran").exists()
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("field", ATTACKS)
def test_a_field_that_opens_runs_or_bursts_is_named(account, field):
    error, opened, mib = account[f"attack-{list(ATTACKS).index(field)}"]
    assert error is not None
    assert field.partition(":")[0] in error
    assert "TRACEBACK" not in error
    assert "\n" not in error
    assert len(error) < 700
    assert opened == []
    assert mib < 200


def test_the_account_is_kept_and_a_good_model_opens_itself_only(account):
    assert account["good"][:2] == [None, []]
    assert account["plain"][:2] == [None, []]


# Headers that lie, by what they say of the head's centre.
SAFETENSORS = {
    "lie-huge": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]},
    "lie-beyond": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]},
    "lie-dtype": {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]},
    "lie-shape": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "lie-more": {"dtype": "NOPE", "shape": [3], "data_offsets": [0, 12]},
}


def _lying(place, name):
    folder = place / name
    folder.mkdir()
    header = json.dumps({"centre": SAFETENSORS[name]}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(24)
    (folder / "head.safetensors").write_bytes(content[: 8 + len(header) + 24])
    model = json.loads((place / "plain" / "model.json").read_text())
    model["head"]["sha256"] = sha256(folder / "head.safetensors")
    (folder / "model.json").write_text(json.dumps(model))


@pytest.mark.parametrize("name", SAFETENSORS)
def test_a_header_that_lies_takes_no_memory(account, name):
    error, opened, mib = account[name]
    assert error.startswith("/")
    assert "TRACEBACK" not in error
    assert (opened, mib < 200) == ([], True)


@pytest.mark.parametrize("change", ["dtype", "nan", "more"])
def test_weights_are_exactly_those_that_are_described(place, tmp_path, change):
    from safetensors.torch import load_file, save_file

    folder = _copied(place / "plain", tmp_path / "m")
    weights = load_file(folder / "head.safetensors")
    if change == "dtype":
        weights["level"] = weights["level"].double()
    elif change == "nan":
        weights["level"][1] = float("nan")
    else:
        weights["more"] = torch.ones(1)
    save_file(weights, folder / "head.safetensors")
    model = json.loads((folder / "model.json").read_text())
    model["head"]["sha256"] = sha256(folder / "head.safetensors")
    (folder / "model.json").write_text(json.dumps(model))
    message = {"dtype": "level is torch.float64", "nan": "not finite", "more": "has more besides"}
    with pytest.raises(InputError, match=message[change]):
        RankModel.load(folder)


def _copied(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("name", ["head.safetensors", "model.json", "README.md"])
def test_a_link_out_of_the_folder_is_not_followed(place, tmp_path, name):
    folder = _copied(place / "plain", tmp_path / "m")
    (tmp_path / "secret").write_bytes((folder / name).read_bytes() if name != "README.md" else b"s")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=f"{name}: a link out of the model's folder"):
        RankModel.load(folder)
    with pytest.raises(InputError, match=f"{name}: a link out of the model's folder"):
        pull_model(str(folder), tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("name", ["model.json", "head.safetensors", "encoder.safetensors"])
def test_a_pipe_is_not_waited_for(place, tmp_path, name):
    folder = _copied(place / "plain", tmp_path / "m")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name}: no ordinary file"):
        RankModel.load(folder)


def test_only_files_of_a_model_are_pulled(place, tmp_path):
    folder = _copied(place / "good", tmp_path / "m")
    for name in ("evil.pth", "config.json", "evil.safetensors", "code.py"):
        (folder / name).write_bytes(b"x")
    pulled = pull_model(str(folder), tmp_path / "pulled")
    assert {f.name for f in pulled.iterdir()} == {f.name for f in (place / "good").iterdir()}


@pytest.mark.parametrize(
    "source",
    [
        *("os:system", "hf:evil/net", "timm:evil/net", "timm:{}/elsewhere", "timm:../elsewhere"),
        *("hf:{}/elsewhere", "timm:hf-hub:evil/net", "timm:local-dir:{}/elsewhere", "timm:.."),
        *("hf:x", "timm:"),
    ],
)
def test_what_a_model_names_as_its_encoder_is_not_fetched(place, tmp_path, monkeypatch, source):
    from strank.prediction import encoder_of

    def never(*_, **__):
        raise AssertionError

    for name in ("download", "read_json"):
        monkeypatch.setattr(f"strank.encoders.load.{name}", never)
    folder = _copied(place / "plain", tmp_path / "m")
    model = json.loads((folder / "model.json").read_text())
    model["encoder"]["source"] = source.format(place)
    (folder / "model.json").write_text(json.dumps(model))
    loaded = RankModel.load(folder)
    with pytest.raises(InputError, match=r"if you trust it, .*give `encoder="):
        encoder_of(loaded)


def test_a_network_that_timm_registers_is_fetched_by_its_name(monkeypatch):
    from strank.encoders.registry import get_encoder

    asked = []

    def download(repo, **_):
        asked.append(repo)
        raise InputError("no network here")

    monkeypatch.setattr("strank.encoders.load.download", download)
    with pytest.raises(InputError, match="no network here"):
        get_encoder("timm:resnet18", own=False)
    assert asked == ["timm/resnet18.a1_in1k"]


def _random(module):
    """Weights none of which is without effect."""
    for tensor in module.state_dict().values():
        if tensor.is_floating_point() and tensor.numel() and tensor.min() == tensor.max():
            nn.init.uniform_(tensor, 0.5, 1.5)
    return module


def _timm(name, pixels=224, **args):
    architecture = {"architecture": name, "model_args": args, "pretrained_cfg": {}}
    return config(architecture=architecture) | {"pixels": pixels}


# With what they compute and do not store (positions, rotations, masks), or store under two names.
NETWORKS = {
    "test_vit": config(),
    "swin": _timm("swin_tiny_patch4_window7_224"),
    "eva": _timm("eva02_tiny_patch14_224"),
    "relative": _timm("vit_relpos_small_patch16_224"),
    "levit": _timm("levit_128s"),
    "tiny_vit": _timm("tiny_vit_5m_224"),
    "twice": _timm("coat_lite_tiny"),
    "hf swin": config(
        "transformers",
        {"model_type": "swin", "image_size": 32, "patch_size": 2, "embed_dim": 8}
        | {"depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
    ),
    "hf swinv2": config(
        "transformers",
        {"model_type": "swinv2", "image_size": 32, "patch_size": 2, "embed_dim": 8}
        | {"depths": [1, 2], "num_heads": [1, 2], "window_size": 4},
    ),
    "hf dinov3": config("transformers", {**VIT, "model_type": "dinov3_vit"}),
    "hf clip": config("transformers", {**VIT, "model_type": "clip_vision_model"}),
}
# And all of the catalogue that is made in a second or two.
for _name in ("resnet50", "ctranspath", "conch-224"):
    _entry = CATALOGUE[_name]
    NETWORKS[_name] = config(architecture=dict(_entry.architecture)) | {"pixels": _entry.pixels}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_is_imagined_first_is_the_same(tmp_path, name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        usual = _random(backbone_from_config(NETWORKS[name])).train().eval()
    save_model(usual, str(tmp_path / "x.safetensors"))
    made = filled(lambda: backbone_from_config(NETWORKS[name]), tmp_path / "x.safetensors")
    buffers = dict(made.named_buffers())
    assert all(b.equal(buffers[k]) for k, b in usual.named_buffers())
    assert weights_checksum(made) == weights_checksum(usual)
    pixels = usual.pixels
    patch = np.random.default_rng(0).integers(0, 256, (1, pixels, pixels, 3), dtype=np.uint8)
    with torch.no_grad():
        assert made(torch.as_tensor(patch)).equal(usual(torch.as_tensor(patch)))
    assert all(p.requires_grad for p in made.parameters()) or "hf" in name


@pytest.mark.parametrize("name", sorted(CATALOGUE))
def test_the_catalogue_passes_and_computes_little(name):
    entry = CATALOGUE[name]
    facts = {"library": entry.library, "name": name, "pixels": entry.pixels, "um": 112.0}
    facts |= {"mean": entry.mean, "std": entry.std, "pooling": entry.pooling}
    stored = json.loads(json.dumps({**facts, "architecture": entry.architecture}))
    check_network(stored)
    with torch.device("meta"):
        network = backbone_from_config(stored)
    computed = {n for n, _ in network.named_buffers()} - network.state_dict().keys()
    # These are made anew where they are; the others have nothing to go wrong.
    assert bool(computed) == (name == "ctranspath")


@pytest.mark.parametrize(
    ("library", "changes"),
    [
        ("timm", {"model_args": {"checkpoint_path": "/etc/passwd"}}),
        ("timm", {"architecture": "hf-hub:evil/net"}),
        ("timm", {"architecture": "local-dir:/etc"}),
        ("timm", {"model_args": {"embed_dim": 16384, "num_heads": 8}}),
        ("timm", {"model_args": {"num_classes": 2**20}, "num_classes": 2**20}),
        ("hf", {"auto_map": {"AutoModel": "evil/net--code.Net"}}),
        ("hf", {"model_type": "timm_wrapper"}),
        ("hf", {"hidden_size": 2**14, "num_hidden_layers": 500}),
        ("hf", {"_attn_implementation": "evil/kernel"}),
    ],
)
def test_a_folder_of_an_encoder_is_read_by_the_same_list(tmp_path, monkeypatch, library, changes):
    from strank.encoders.load import load_backbone

    folder = _encoder_folder(tmp_path / "net", library)
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | changes))
    monkeypatch.setattr("socket.socket.connect", None)
    with pytest.raises(InputError, match=r"file|cannot be built|not the weights of what|pattern"):
        load_backbone(f"{library}:{folder}")


def _encoder_folder(folder, library):
    if library == "timm":
        network = timm.create_model("test_vit", num_classes=3, img_size=32, patch_size=8)
        timm.models.save_for_hf(
            network,
            folder,
            model_args=TIMM["model_args"] | {"num_classes": 3},
            safe_serialization=True,
        )
    else:
        transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(**VIT)
        ).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_what_lies_in_an_encoders_folder_besides_is_not_followed(tmp_path):
    from strank.encoders.load import load_backbone

    folder = _encoder_folder(tmp_path / "net", "hf")
    known = weights_checksum(load_backbone(f"hf:{folder}"))
    adapter = {"base_model_name_or_path": "/none/such", "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../x"}}')
    prepare = json.loads((folder / "preprocessor_config.json").read_text())
    prepare["auto_map"] = {"AutoImageProcessor": "evil/net--code.Prepare"}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    assert weights_checksum(load_backbone(f"hf:{folder}")) == known
    folder = _encoder_folder(tmp_path / "timm", "timm")
    known = weights_checksum(load_backbone(f"timm:{folder}"))
    stored = json.loads((folder / "config.json").read_text())
    more = {"file": str(tmp_path / "evil.pth"), "custom_load": True, "hf_hub_id": "evil/net"}
    stored["pretrained_cfg"] |= more
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Marker(tmp_path / "ran")))
    (folder / "config.json").write_text(json.dumps(stored | more))
    assert weights_checksum(load_backbone(f"timm:{folder}")) == known
    assert not (tmp_path / "ran").exists()


def test_a_head_of_ones_own_is_filled_too(monkeypatch, tmp_path):
    class Own(nn.Module):
        def __init__(self, n_features, n_genes, *, scale):
            super().__init__()
            self.options = {"scale": scale}
            self.weight = nn.Parameter(torch.ones(n_features, n_genes))
            self.register_buffer("steps", torch.arange(n_genes) * scale, persistent=False)

        def forward(self, features):
            return features @ self.weight + self.steps

    monkeypatch.setitem(__import__("strank.neural.heads").neural.heads.HEADS, "own", Own)
    facts = {"name": "mine", "version": "1", "fields": [], "n_features": 3}
    panel = pd.DataFrame(index=["A", "B"])
    RankModel(Own(3, 2, scale=0.5), panel, facts, {}).save(tmp_path / "m")
    head = RankModel.load(tmp_path / "m").head
    assert head(torch.ones(1, 3)).tolist() == [[3.0, 3.5]]
    assert isinstance(filled(lambda: Own(3, 2, scale=1), tmp_path / "m/head.safetensors"), Own)
