"""Weights of image networks: read without running anything, and fitted without anything left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from strank.errors import InputError, some

# What checkpoints are commonly wrapped in: dictionaries, and prefixes of all names.
_LAYERS = ("state_dict", "model", "teacher", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read safetensors, or a checkpoint of torch that holds nothing but tensors, on the CPU."""
    if not path.is_file():
        raise InputError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise InputError(
            f"{path}: not a checkpoint that can be read safely: it is damaged, or holds more than "
            "tensors, and nothing else is unpickled; save its state dict as safetensors"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        raise InputError(f"{path}: damaged, or no file of weights ({error!r})") from error
    return _unwrapped(path, found)


def _unwrapped(path: Path, found: Any) -> dict[str, Tensor]:
    while isinstance(found, dict):
        inner = next((found[key] for key in _LAYERS if isinstance(found.get(key), dict)), None)
        if inner is None:
            break
        found = inner
    if not isinstance(found, dict) or not found or not _only_tensors(found):
        raise InputError(f"{path}: holds no state dict; save the network's as safetensors")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): value for name, value in found.items()}
    return found


def _only_tensors(found: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())


def match_weights(
    weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, source: str, name: str
) -> dict[str, Tensor]:
    """Check that weights are exactly those of a network, whose state dict is ``wanted``.

    >>> match_weights({"a": torch.ones(2)}, {"b": torch.ones(2)}, source="x.pt", name="uni")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: x.pt: not the weights of uni: lacks b; has a besides; give ...
    """
    missing, unexpected = sorted(wanted.keys() - weights), sorted(weights.keys() - wanted)
    shaped = [
        f"{key} is {list(weights[key].shape)} and not {list(wanted[key].shape)}"
        for key in wanted.keys() & weights
        if weights[key].shape != wanted[key].shape
    ]
    wrong = [
        *([f"lacks {some(missing)}"] if missing else []),
        *([f"has {some(unexpected)} besides"] if unexpected else []),
        *([some(sorted(shaped), 2)] if shaped else []),
    ]
    if wrong:
        raise InputError(
            f"{source}: not the weights of {name}: {'; '.join(wrong)}; give the file that its "
            "authors offer"
        )
    return {key: weights[key].to(value.dtype) for key, value in wanted.items()}
