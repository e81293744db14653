"""From a name to a pretrained network: of the catalogue, timm or transformers.

No code of a hub is run and nothing but tensors is read: architectures come from the installed
library, and of their arguments a file sets those that `strank.encoders.config` lists.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from strank.encoders.architectures import TOWERS, fitted
from strank.encoders.backbone import (
    FIELD_UM,
    Backbone,
    BackboneEncoder,
    has_class_token,
    weights_checksum,
)
from strank.encoders.catalogue import CATALOGUE, LIBRARIES, EncoderEntry
from strank.encoders.config import (
    TIMM_FACTS,
    check_network,
    prepared,
    timm_arguments,
    transformers_arguments,
)
from strank.encoders.weights import check_size, match_weights, read_weights
from strank.errors import InputError, some
from strank.extras import need
from strank.files import read_json, safe_name
from strank.hub import download

_WEIGHTS = "model.safetensors"
_PREPARE = "preprocessor_config.json"
_HUB_FILES = ["config.json", _PREPARE, "model*.safetensors"]


def load_encoder(
    name: str, *, um: float | None = None, weights: Path | str | None = None
) -> BackboneEncoder:
    """Load a pretrained network as an encoder, under a name that is fit for files."""
    # timm:resnet18 becomes timm_resnet18, hf:owner/name hf_owner_name, and of a folder only the
    # last part stays.
    backbone = load_backbone(name, um=um, weights=weights)
    if name not in CATALOGUE:
        library, source = _split(name)
        folder = Path(source).expanduser()
        stem = folder.resolve().name if folder.is_dir() else source.replace("/", "_")
        name = f"{library}_{safe_name(stem)}"
    return BackboneEncoder(backbone, name, weights_checksum(backbone))


def load_backbone(
    name: str, *, um: float | None = None, weights: Path | str | None = None
) -> Backbone:
    """Load a pretrained network, in evaluation mode; names and files as of `get_encoder`."""
    if name in CATALOGUE:
        return _load_entry(CATALOGUE[name], um, None if weights is None else Path(weights))
    library, source = _split(name)
    if weights is not None:
        raise InputError(
            f"{name}: `weights` is for networks of the catalogue; give a folder with its "
            f"config.json and {_WEIGHTS} as {library}:FOLDER"
        )
    with _explained(f"{name}: cannot be loaded", "check the name, the network or the folder"):
        folder = _folder(name, library, source)
        load = _load_timm if library == "timm" else _load_transformers
        model, facts = load(folder)
        config = {"library": LIBRARIES[library], "name": name, **facts, "um": um or FIELD_UM}
        config |= _revision(folder)
        return Backbone(model, json.loads(json.dumps(config)))


def backbone_from_config(config: Mapping[str, Any]) -> Backbone:
    """Build the network of another `Backbone`, whose state dict fits; nothing is opened."""
    check_network(config)
    library = config["library"]
    with _explained(f"{config['name']}: cannot be built", f"install another version of {library}"):
        build = _build_timm if library == "timm" else _build_transformers
        return Backbone(build(config["architecture"]), config)


def _load_entry(entry: EncoderEntry, um: float | None, path: Path | None) -> Backbone:
    revision = {}
    if path is None:
        try:
            folder = download(entry.repo, revision=entry.revision, allow_patterns=[entry.file])
        except InputError as error:
            # Where to ask is said once: a line is not long.
            asked = f"huggingface.co/{entry.repo}" in str(error)
            terms = f"licence {entry.licence}" if asked else entry.terms
            raise InputError(
                f"{error}; or give the file as `weights` ({entry.name}: {terms})"
            ) from error
        path, revision = folder / entry.file, _revision(folder)
    weights = read_weights(path)
    config = json.loads(json.dumps(_config_of(entry, um) | revision))
    return _filled(entry, config, weights, str(path))


def _config_of(entry: EncoderEntry, um: float | None = None) -> dict[str, Any]:
    names = ("library", "name", "architecture", "mean", "std", "pixels", "pooling")
    return {name: getattr(entry, name) for name in names} | {"um": um or entry.field.um}


def _filled(
    entry: EncoderEntry, config: dict[str, Any], weights: dict[str, Tensor], source: str
) -> Backbone:
    positions = weights.get("embeddings.position_embeddings")
    if entry.library == "transformers" and positions is not None and positions.ndim == 3:
        # They are for the size of training, and interpolated when the network is used.
        side = isqrt(positions.shape[1] - 1) * config["architecture"]["patch_size"]
        config["architecture"]["image_size"] = side
    # First without memory: drawing weights takes longer than reading them.
    with torch.device("meta"):
        backbone = backbone_from_config(config)
    architecture = config["architecture"].get("architecture", "")
    rest = {key: value for key, value in weights.items() if not key.startswith(entry.rest)}
    problem = f"{source}: not the weights of {entry.name}"
    with _explained(problem, "give the file that its authors offer"):
        tensors = fitted(architecture, rest, backbone.model)
    wanted = backbone.model.state_dict()
    matched = match_weights(tensors, wanted, source=source, name=entry.name)
    state = {f"model.{key}": value for key, value in matched.items()}
    state |= {name: torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std")}
    if {name for name, _ in backbone.named_buffers()} - state.keys():
        # It computes what it does not store, for which it needs memory after all.
        with torch.random.fork_rng(devices=[]):
            backbone = backbone_from_config(config)
    backbone.load_state_dict(state, assign=True)
    return backbone


def _revision(folder: Path) -> dict[str, str]:
    """Find the commit that a snapshot in the hub's cache is of, by its folder's name."""
    return {"revision": folder.name} if re.fullmatch("[0-9a-f]{40}", folder.name) else {}


def _split(name: str) -> tuple[str, str]:
    library, _, source = name.partition(":")
    if library not in LIBRARIES or not source:
        raise InputError(
            f"no image network {name!r}; write timm:NAME, hf:OWNER/NAME, timm:FOLDER or hf:FOLDER"
        )
    return library, source


@contextmanager
def _explained(problem: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (InputError, ImportError):
        raise
    # Two libraries, their configs and the client of the hub raise nearly anything.
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"{problem} ({reason}); {advice}") from error


def _folder(name: str, library: str, source: str) -> Path:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or source.startswith("."):
        raise InputError(f"{name}: no such folder")
    if library == "timm" and "/" not in source:
        need("timm")
        from timm import get_pretrained_cfg

        known = get_pretrained_cfg(source)
        if known is None or not known.hf_hub_id:
            raise InputError(f"{name}: no such pretrained network; see timm.list_pretrained()")
        source = known.hf_hub_id
    return download(source, allow_patterns=_HUB_FILES)


def _load_timm(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    stored = _read_config(folder / "config.json")
    if not (folder / _WEIGHTS).is_file():
        raise InputError(f"{folder}: no {_WEIGHTS}; weights of other formats are not read")
    # Old exports have one level, later ones two, of which the upper holds.
    below = stored.get("pretrained_cfg")
    known = {**(below if isinstance(below, dict) else {}), **stored}
    architecture = {
        "architecture": known.get("architecture"),
        "model_args": known.get("model_args") or {},
        "pretrained_cfg": {fact: known[fact] for fact in sorted(TIMM_FACTS & known.keys())},
    }
    timm_arguments(architecture, f"{folder}: config.json")
    weights = read_weights(folder / _WEIGHTS)
    check_size(lambda: _timm_network(architecture), weights, str(folder))
    model: Any = _timm_network(architecture, folder / _WEIGHTS)
    # Only now, because timm tolerates missing weights when it makes a model without classifier.
    model.reset_classifier(0)
    facts = {"mean": model.pretrained_cfg["mean"], "std": model.pretrained_cfg["std"]}
    pixels = model.pretrained_cfg["input_size"][-1]
    return model, {"architecture": architecture, **facts, "pixels": pixels}


def _read_config(path: Path) -> dict[str, Any]:
    stored = read_json(path)
    if not isinstance(stored, dict):
        raise InputError(f"{path}: describes no network; download it again")
    return stored


def _build_timm(architecture: Mapping[str, Any]) -> nn.Module:
    if (name := architecture["architecture"]) in TOWERS:
        given = architecture["model_args"]
        return TOWERS[name](**{key: given[key] for key in given.keys() & {"img_size"}})
    model: Any = _timm_network(architecture)
    model.reset_classifier(0)
    return model


def _timm_network(architecture: Mapping[str, Any], weights: Path | None = None) -> nn.Module:
    need("timm")
    from timm import create_model
    from timm.layers.mlp import SwiGLUPacked

    model_args = dict(architecture["model_args"])
    if "mlp_layer" in model_args:
        model_args["mlp_layer"] = SwiGLUPacked
    network: nn.Module = create_model(
        architecture["architecture"],
        pretrained=weights is not None,
        pretrained_cfg=dict(architecture["pretrained_cfg"]),
        pretrained_cfg_overlay={"file": str(weights), "custom_load": False} if weights else None,
        **model_args,
    )
    return network


def _load_transformers(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    need("transformers")
    from transformers import AutoModel

    stored = _read_config(folder / "config.json")
    architecture = transformers_arguments(stored, f"{folder}: config.json")
    weights: dict[str, Tensor] = {}
    for path in _shards(folder):
        weights |= read_weights(path)
    check_size(lambda: _build_transformers(architecture), weights, str(folder))
    config = _transformers_config(architecture)
    # Given no folder it looks for none: neither for adapters that name another, nor for code.
    kind: Any = AutoModel._model_mapping[type(config)]
    model, loaded = kind.from_pretrained(
        None, config=config, state_dict=weights, output_loading_info=True
    )
    model = _plain(model)
    missing = set(loaded["missing_keys"]) & set(model.state_dict())
    if missing:
        raise InputError(f"{folder}: lacks the weights {some(sorted(missing))}; download it again")
    facts = prepared(read_json(folder / _PREPARE), f"{folder}: {_PREPARE}")
    return model, {"architecture": architecture, **facts}


def _shards(folder: Path) -> list[Path]:
    """Files of a network's weights: one, or those that an index names, all in the folder."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if not shards:
        raise InputError(f"{folder}: no {_WEIGHTS}; weights of other formats are not read")
    return shards


def _build_transformers(architecture: Mapping[str, Any]) -> nn.Module:
    from transformers import AutoModel

    config = _transformers_config(architecture)
    return _plain(AutoModel.from_config(config, trust_remote_code=False))


def _transformers_config(architecture: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    # Older versions of strank stored what every config has, too.
    return AutoConfig.for_model(**transformers_arguments(architecture, "config"))


def _plain(model: Any) -> Any:
    """Without the pooler that is not used, and in float32 whatever the checkpoint's precision."""
    if has_class_token(model) and hasattr(model, "pooler"):
        model.pooler = nn.Identity()
    return model.float()
