"""Image networks of timm and transformers as encoders."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from strank.encoders.base import Field
from strank.errors import InputError

__all__ = [
    "FIELD_UM",
    "Backbone",
    "BackboneEncoder",
    "has_class_token",
    "weights_checksum",
]

#: Side of the window around a spot, in µm: 224 pixels of 0.5 µm, as most networks are trained on.
FIELD_UM = 112.0


class Backbone(nn.Module):
    """An image network that takes patches as they are cut and gives pooled features.

    Parameters
    ----------
    model
        Of timm, with its classifier removed, or of transformers.
    config
        JSON-able: ``library`` (``"timm"`` or ``"transformers"``), ``name``, ``architecture`` (what
        rebuilds it without weights), ``mean`` and ``std`` of red, green and blue between 0 and 1,
        ``pixels`` and ``um`` of a patch's side.

    Raises
    ------
    InputError
        If the network does not give one vector ``[n_features]`` a patch.
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
        """Features, float32 ``[n, n_features]``, of RGB patches, uint8 ``[n, pixels, pixels, 3]``.

        Of transformers the class token where there is one, because the pooler that some models put
        on it is often untrained; else what the model pools.
        """
        images = (patches.movedim(-1, 1).float() / 255 - self.mean) / self.std
        if self.config["library"] == "timm":
            return self.model(images).float()
        output = self.model(pixel_values=images)
        if has_class_token(self.model):
            return output.last_hidden_state[:, 0].float()
        return output.pooler_output.flatten(1).float()

    def train(self, mode: bool = True) -> Self:
        """Set training mode, in which batch normalisation keeps the statistics it came with.

        Otherwise the features of a spot would depend on the other spots of its batch, and those in
        training would differ from those in prediction.
        """
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


@dataclass(frozen=True)
class BackboneEncoder:
    """A backbone as an encoder, used on the device where it is; ``version`` is of its weights."""

    backbone: Backbone
    name: str
    version: str

    @property
    def source(self) -> str:
        """Where it came from, as `strank.encoders.hub.load_encoder` takes it."""
        return str(self.backbone.config["name"])

    @property
    def fields(self) -> tuple[Field, ...]:
        """The one window it looks at."""
        return (Field(self.backbone.config["um"], self.backbone.pixels),)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """``f0``, ``f1`` and so on."""
        return tuple(f"f{i}" for i in range(self.backbone.n_features))

    def encode(self, patches: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Features, float32 ``[n_spots, n_features]``, of patches that go through all at once.

        Raises
        ------
        InputError
            For anything but one RGB array, uint8 ``[n_spots, pixels, pixels, 3]``.
        """
        side = self.backbone.pixels
        good = [p.dtype == np.uint8 and p.shape[1:] == (side, side, 3) for p in patches]
        if good != [True]:
            raise InputError(
                f"{self.name}: expected one array of uint8 patches [n_spots, {side}, {side}, 3]"
            )
        was_training = self.backbone.training
        self.backbone.eval()
        with torch.inference_mode():
            features = self.backbone(torch.as_tensor(patches[0]).to(self.backbone.mean.device))
        self.backbone.train(was_training)
        return np.asarray(features.cpu())


def weights_checksum(module: nn.Module) -> str:
    """First 16 digits of the SHA-256 of all parameters and buffers, wherever they are stored.

    Examples
    --------
    >>> weights_checksum(nn.Identity())
    'e3b0c44298fc1c14'
    """
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def has_class_token(model: nn.Module) -> bool:
    """Whether a network of transformers has one."""
    return any(name.endswith("cls_token") for name, _ in model.named_parameters())
