"""Architectures of pathology that neither timm nor transformers has: CONCH and CTransPath."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_HEADS = 8


class _Conch(nn.Module):
    """A transformer whose tokens are pooled by one learnt query, without the projection to text."""

    def __init__(self, trunk: Any, pool: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.attn_pool_contrast = pool
        self.ln_contrast = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(images)
        pooled: Tensor = self.ln_contrast(self.attn_pool_contrast(tokens))
        return pooled

    def set_grad_checkpointing(self, on: bool) -> None:
        self.trunk.set_grad_checkpointing(on)


class _Pool(nn.Module):
    """Of CONCH."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.attn = nn.MultiheadAttention(
            width, _HEADS, kdim=context, vdim=context, batch_first=True
        )
        self.ln_q, self.ln_k = nn.LayerNorm(width), nn.LayerNorm(context)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens, query = self.ln_k(tokens), self.ln_q(self.query).expand(len(tokens), -1, -1)
        pooled: Tensor = self.attn(query, tokens, tokens, need_weights=False)[0]
        return pooled[:, 0]


class _BiasFreePool(nn.Module):
    """Of CONCH v1.5."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.ln_q, self.ln_k = nn.LayerNorm(width), nn.LayerNorm(context)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(context, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.to_q(self.ln_q(self.query)).expand(len(tokens), -1, -1)
        parts = (query, *self.to_kv(self.ln_k(tokens)).chunk(2, dim=-1))
        heads = [part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in parts]
        pooled = functional.scaled_dot_product_attention(*heads)
        out: Tensor = self.to_out(pooled.transpose(1, 2).flatten(2))
        return out[:, 0]


class _ConvStem(nn.Module):
    """Convolutions in place of the patch embedding of timm's Swin transformer."""

    def __init__(
        self, *, img_size: Any, patch_size: int, embed_dim: int, norm_layer: Any, **_: Any
    ) -> None:
        from timm.layers.helpers import to_2tuple

        super().__init__()
        self.grid_size = tuple(side // patch_size for side in to_2tuple(img_size))
        narrow, wide = embed_dim // 8, embed_dim // 4
        self.proj = nn.Sequential(
            nn.Conv2d(3, narrow, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, embed_dim, 1),
        )
        self.norm = norm_layer(embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return tokens


def _conch(img_size: int = 448) -> nn.Module:
    from timm import create_model

    trunk = create_model("vit_base_patch16_224", img_size=img_size, num_classes=0)
    return _Conch(trunk, _Pool(512, 768), 512)


def _conch15() -> nn.Module:
    from timm import create_model

    trunk = create_model("vit_large_patch16_224", img_size=448, init_values=1.0, num_classes=0)
    return _Conch(trunk, _BiasFreePool(768, 1024), 768)


def _ctranspath() -> nn.Module:
    from timm import create_model

    name = "swin_tiny_patch4_window7_224"
    model: nn.Module = create_model(name, embed_layer=_ConvStem, num_classes=0)
    return model


# What builds an architecture, by the name it has in a backbone's config.
TOWERS: dict[str, Callable[..., nn.Module]] = {
    "conch": _conch,
    "conch_v1.5": _conch15,
    "ctranspath": _ctranspath,
}


def fitted(architecture: str, weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring published weights into the names and shapes that the architecture here has."""
    if architecture == "conch":
        named = {name.removeprefix("visual."): value for name, value in weights.items()}
        return {**named, **_resampled(named, model)}
    if architecture == "conch_v1.5" and "trunk.pos_embed" in weights:
        return {**weights, "trunk.pos_embed": _enlarged(weights["trunk.pos_embed"], 28)}
    if architecture == "ctranspath":
        from timm.models.swin_transformer import checkpoint_filter_fn

        found: dict[str, Tensor] = checkpoint_filter_fn(dict(weights), model)
        return found
    return dict(weights)


def _resampled(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Positions for images of another size than in training, as timm makes them at every use."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    key = "trunk.pos_embed"
    side = isqrt(model.state_dict()[key].shape[1] - 1)
    return {key: resample_abs_pos_embed(weights[key], [side, side])} if key in weights else {}


def _enlarged(embedding: Tensor, side: int) -> Tensor:
    """Positions for more patches than in training, as the authors' code makes them at every use."""
    length = embedding.shape[1] - 1
    before = isqrt(length)
    if before == side or before**2 != length:
        return embedding
    grid = embedding[:, 1:].float().reshape(1, before, before, -1).permute(0, 3, 1, 2)
    # The tenth of a patch is theirs, from DINO.
    scale = (side + 0.1) / before
    grid = functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([embedding[:, :1].float(), grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
