"""Training of an image network: which weights, on which patches."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from anndata import AnnData
from numpy.lib.format import write_array_header_1_0
from numpy.typing import NDArray
from torch import nn

from strank.cohort.contract import spots_checksum
from strank.encoders.backbone import Backbone
from strank.encoders.base import Field
from strank.errors import InputError
from strank.neural.recipe import last_blocks
from strank.progress import progress
from strank.slides.slide import read_field, slide_of
from strank.storage import is_whole, new_file

Module = TypeVar("Module", bound=nn.Module)
_AT_ONCE = 256


def prepare(backbone: Module, mode: str, *, lora_rank: int = 8, seed: int = 0) -> Module:
    """Choose what of a network is trained, in place, by ``requires_grad``.

    ``frozen``: nothing; ``full``: everything; ``last-K``: the last K blocks and what comes after
    them, such as the final norm; ``lora``: adapters of low rank [1]_ beside the linear layers of
    the blocks or, if there are none, beside their convolutions. Adapters start without effect, and
    their output is added unscaled.

    References
    ----------
    .. [1] Hu et al. (2022), LoRA: low-rank adaptation of large language models, ICLR.

    Examples
    --------
    >>> net = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3)))
    >>> [name for name, p in prepare(net, "last-1").named_parameters() if p.requires_grad]
    ['2.0.weight', '2.0.bias', '2.1.weight', '2.1.bias']
    """
    n_last = last_blocks(mode)
    backbone.requires_grad_(mode == "full")
    if n_last:
        _train_last(backbone, n_last)
    elif mode == "lora":
        _add_adapters(backbone, lora_rank, seed)
    return backbone


def freeze_unused(backbone: Backbone) -> None:
    """Leave weights alone that the features do not depend on, such as those of masked patches.

    Processes that share the training would wait for their gradients.
    """
    patch = torch.zeros(1, backbone.pixels, backbone.pixels, 3, dtype=torch.uint8)
    trained = [p for p in backbone.parameters() if p.requires_grad]
    features = backbone(patch).sum()
    gradients = torch.autograd.grad(features, trained, allow_unused=True) if trained else ()
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def merge(backbone: Backbone) -> Backbone:
    """Copy a network, with its adapters folded into the weights they stand beside."""
    plain = copy.deepcopy(backbone)
    if not hasattr(plain, "peft_config"):
        return plain
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(n, m) for n, m in plain.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    del plain.peft_config
    return plain


def checkpoint_activations(backbone: Backbone) -> None:
    """Recompute activations in the backward pass: same gradients, less memory, more time."""
    model: Any = backbone.model
    try:
        if backbone.config["library"] == "timm":
            model.set_grad_checkpointing(True)
        else:
            # Late releases of version 5 renamed it.
            renamed = getattr(model, "activation_checkpointing_enable", None)
            # Re-entrant checkpointing gives no gradients where the input of a block needs none.
            (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except (AttributeError, AssertionError, ValueError) as error:
        raise InputError(
            f"{backbone.config['name']}: cannot recompute activations; train without"
        ) from error


def _train_last(backbone: nn.Module, n_blocks: int) -> None:
    blocks = _blocks(backbone)
    if n_blocks > len(blocks):
        raise InputError(f"last-{n_blocks}: the network has {len(blocks)} blocks")
    # Networks define their parts in the order in which they use them.
    started = False
    for name, parameter in backbone.named_parameters():
        started = started or name.startswith(f"{blocks[-n_blocks]}.")
        parameter.requires_grad_(started)


def _add_adapters(backbone: nn.Module, rank: int, seed: int) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = _layers(backbone, nn.Linear) or _layers(backbone, nn.Conv2d)
    if not targets:
        raise InputError("lora: no linear layers or convolutions in the network's blocks")
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, backbone)


def _layers(backbone: nn.Module, kind: type[nn.Linear | nn.Conv2d]) -> list[str]:
    # A subclass may do something else with its weight, and adapters of grouped convolutions cannot
    # be folded in.
    return [
        f"{block}.{name}"
        for block in _blocks(backbone)
        for name, module in backbone.get_submodule(block).named_modules()
        if type(module) is kind and getattr(module, "groups", 1) == 1
    ]


def _blocks(network: nn.Module) -> list[str]:
    """SpotNames of the innermost modules of several layers each that stand in a row."""
    rows = (nn.Sequential, nn.ModuleList)
    standing = [
        f"{name}.{child}".lstrip(".")
        for name, row in network.named_modules()
        if isinstance(row, rows)
        for child, module in row.named_children()
        if sum(any(True for _ in layer.parameters()) for layer in module.children()) > 1
    ]
    return [name for name in standing if not any(s.startswith(f"{name}.") for s in standing)]


def cut_patches(
    cohort: Mapping[str, AnnData],
    section: NDArray,
    positions: NDArray[np.float64],
    field: Field,
    folder: Path,
    *,
    wait: bool = False,
    verbose: bool = False,
) -> NDArray[np.uint8]:
    """Cut the patches of spots into a file, unless it is there, and map it; or wait for it."""
    # Named by what was cut: 147 KiB a patch of 224 pixels.
    known = hashlib.sha256(repr((field, [*cohort])).encode())
    for adata in cohort.values():
        known.update(spots_checksum(adata).encode())
    known.update(positions.tobytes())
    path = folder / f"patches-{known.hexdigest()[:12]}.npy"
    while wait and not path.is_file():
        time.sleep(0.2)
    if not (wait or is_whole(path)):
        shape = len(section), field.pixels, field.pixels, 3
        with (
            new_file(path, seal=True) as file,
            progress("Cutting patches", len(section), hidden=not verbose) as advance,
        ):
            facts = {"descr": "|u1", "fortran_order": False, "shape": shape}
            write_array_header_1_0(file, facts)
            first, n_bytes = file.tell(), int(np.prod(shape[1:]))
            for name, adata in cohort.items():
                slide, rows = slide_of(adata), np.flatnonzero(section == name)
                for start in range(0, len(rows), _AT_ONCE):
                    some = rows[start : start + _AT_ONCE]
                    centres = positions[some] / slide.um_per_pixel
                    patches = read_field(slide, centres, um=field.um, pixels=field.pixels)
                    # Written, not mapped: a full disk would kill the process.
                    for row, patch in zip(some, patches, strict=True):
                        file.seek(first + int(row) * n_bytes)
                        file.write(patch.tobytes())
                    advance(len(some))
    return np.load(path, mmap_mode="r")
