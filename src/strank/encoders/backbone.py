"""Image networks of timm and transformers as encoders."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from strank.encoders.base import Encoder, Field
from strank.errors import InputError

# Side of the window around a spot, in µm: 224 pixels of 0.5 µm, as most networks are trained on.
FIELD_UM = 112.0

# What networks may compute in on a GPU; on a CPU it is always float32.
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Backbone(nn.Module):
    """An image network of timm or transformers that takes patches as they are cut, and pools.

    ``config``, JSON-able, has ``library``, ``name``, ``architecture`` (what rebuilds it without
    weights), ``mean`` and ``std`` of the colours, 0 to 1, ``pixels`` and ``um`` of a patch's side;
    ``pooling``, if it is ``"class+mean"``; ``revision``, where it is known.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.config = dict(config)
        self.pixels: int = config["pixels"]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(3, 1, 1))
        self.eval()
        with torch.no_grad():
            features = self(torch.zeros(1, self.pixels, self.pixels, 3, dtype=torch.uint8))
        if features.ndim != 2:
            raise InputError(f"{config['name']}: gives no pooled features; choose another network")
        self.n_features: int = features.shape[1]

    def forward(self, patches: Tensor) -> Tensor:
        """Features, float32 ``[n, n_features]``, of uint8 patches ``[n, pixels, pixels, 3]``."""
        images = (patches.movedim(-1, 1).float() / 255 - self.mean) / self.std
        if self.config.get("pooling") == "class+mean":
            return self._class_and_mean(images).float()
        if self.config["library"] == "timm":
            return self.model(images).float()
        output = self.model(pixel_values=images)
        # Not the pooler that some models put on the class token: it is often untrained.
        if has_class_token(self.model):
            return output.last_hidden_state[:, 0].float()
        return output.pooler_output.flatten(1).float()

    def _class_and_mean(self, images: Tensor) -> Tensor:
        model: Any = self.model
        if self.config["library"] == "timm":
            tokens, n_other = model(images), model.num_prefix_tokens
        else:
            tokens = model(pixel_values=images).last_hidden_state
            n_other = 1 + getattr(model.config, "num_register_tokens", 0)
        return torch.cat([tokens[:, 0], tokens[:, n_other:].mean(1)], dim=1)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, in which batch normalisation keeps the statistics it came with."""
        # Else the features of a spot would depend on the other spots of its batch, and those in
        # training would differ from those in prediction.
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


@dataclass(frozen=True)
class BackboneEncoder:
    """A backbone as an encoder, used on the device where it is."""

    backbone: Backbone
    name: str
    version: str  # Checksum of the weights
    precision: str = "float32"  # On a GPU

    @property
    def source(self) -> str:
        """Where it came from, as `get_encoder` takes it."""
        return str(self.backbone.config["name"])

    @property
    def revision(self) -> str | None:
        """Commit on the hub that the weights came from, where it is known."""
        return self.backbone.config.get("revision")

    @property
    def preparation(self) -> dict[str, Any]:
        """What is done to a patch before it meets the weights."""
        return {name: list(self.backbone.config[name]) for name in ("mean", "std")}

    @property
    def fields(self) -> tuple[Field, ...]:
        """The one window it looks at."""
        return (Field(self.backbone.config["um"], self.backbone.pixels),)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """``f0``, ``f1`` and so on."""
        return tuple(f"f{i}" for i in range(self.backbone.n_features))

    def encode(self, patches: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Features, float32 ``[n_spots, n_features]``, of patches that go through all at once."""
        side = self.backbone.pixels
        good = [p.dtype == np.uint8 and p.shape[1:] == (side, side, 3) for p in patches]
        if good != [True]:
            raise InputError(
                f"{self.name}: expected one array of uint8 patches [n_spots, {side}, {side}, 3]"
            )
        was_training = self.backbone.training
        if was_training:  # both walk through all modules
            self.backbone.eval()
        device = self.backbone.mean.device
        with torch.inference_mode(), self._autocast(device):
            features = self.backbone(torch.as_tensor(patches[0]).to(device))
        if was_training:
            self.backbone.train()
        return np.asarray(features.cpu())

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if device.type == "cpu" or self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, PRECISIONS[self.precision])


def place(encoder: Encoder, device: str | torch.device, precision: str = "float32") -> Encoder:
    """Copy an image network to a device, as torch names it; other encoders are given back."""
    if precision not in PRECISIONS:
        raise InputError(f"no precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no GPU {device}: torch sees {torch.cuda.device_count()}; use cpu")
    if not isinstance(encoder, BackboneEncoder):
        return encoder
    backbone = encoder.backbone
    if backbone.mean.device != device:
        # So that a large network is not copied on the CPU first.
        moved: dict[int, Any] = {id(b): b.to(device) for b in backbone.buffers()}
        for parameter in backbone.parameters():
            moved[id(parameter)] = nn.Parameter(parameter.to(device), parameter.requires_grad)
        backbone = copy.deepcopy(backbone, moved)
    return replace(encoder, backbone=backbone, precision=precision)


def on_gpu(encoder: Encoder, precision: str | None = None) -> tuple[Encoder, bool]:
    """Put an image network on the first GPU, if there is one; tell whether it is there.

    Without a ``precision`` it is bf16 on a GPU that computes in it, else float32.
    """
    there = torch.cuda.is_available() and isinstance(encoder, BackboneEncoder)
    if precision is None:
        fit = there and torch.cuda.get_device_capability() >= (8, 0)
        precision = "bf16" if fit else "float32"
    placed = place(encoder, "cuda" if there else "cpu", precision)
    if precision != "float32" and not there:
        raise InputError(f"`precision={precision}` is for image networks on a GPU; leave it out")
    return placed, there


def weights_checksum(module: nn.Module) -> str:
    """First 16 digits of the SHA-256 of all parameters and buffers, wherever they are stored."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def has_class_token(model: nn.Module) -> bool:
    """Whether a network of transformers has one."""
    return any(name.endswith("cls_token") for name, _ in model.named_parameters())
