"""Weights of image networks: read without running anything, and fitted without anything left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from strank.errors import InputError, some

# What checkpoints are commonly wrapped in: dictionaries, and prefixes of all names.
_LAYERS = ("state_dict", "model", "teacher", "module")
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")

# What a network may take for what it computes and does not store, such as indices of positions.
_MOST_BYTES = 2**29

# What it may have besides the weights of a file, by resizing positions or a new classifier.
_TIMES, _SOME = 2, 2**24

_Module = TypeVar("_Module", bound=nn.Module)


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


def filled(make: Callable[[], _Module], path: Path) -> _Module:
    """Make a module and fill it with the tensors of a file, which must be exactly its own.

    It is made without memory and compared with the file first, so that what a description asks for
    costs no more than the file's own size.
    """
    module = _imagined(make)
    found = load_file(path)
    state = module.state_dict(keep_vars=True)
    # Parts that are used twice have several names, of which a file has one.
    first = {id(value): name for name, value in reversed(state.items()) if name in found}
    alias = {name: first.get(id(value), name) for name, value in state.items()}
    _compare(path, found, {name: value for name, value in state.items() if alias[name] == name})
    if {name for name, _ in module.named_buffers()} - state.keys():
        # It computes what it does not store.
        module = make()
    # Not as it lies in the file, which may change.
    kept = {name: value.clone() for name, value in found.items()}
    module.load_state_dict({name: kept[alias[name]] for name in state}, assign=True)
    # Some keep what they made of the weights before until they are trained.
    return module.train().eval()


def _compare(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    match_weights(found, wanted, source=str(path), name="the network that is described")
    for name, value in wanted.items():
        if found[name].dtype != value.dtype:
            raise InputError(f"{path}: {name} is {found[name].dtype} and not {value.dtype}")
        if not found[name].isfinite().all():
            raise InputError(f"{path}: {name} has values that are not finite")


def check_size(make: Callable[[], nn.Module], weights: Mapping[str, Tensor], source: str) -> None:
    """Refuse a description of a network that asks for far more than the weights that there are."""
    asked = sum(value.numel() for value in _imagined(make).state_dict().values())
    there = sum(value.numel() for value in weights.values())
    if asked > _TIMES * there + _SOME:
        raise InputError(
            f"{source}: not the weights of what its config.json describes: they are {there:,} "
            f"numbers, and it asks for {asked:,}"
        )


def _imagined(make: Callable[[], _Module]) -> _Module:
    """Make a module without memory, and refuse one that would compute too much."""
    try:
        with torch.device("meta"):
            module = make()
    except (RuntimeError, OverflowError) as error:
        # Sizes that no integer holds.
        raise InputError(f"a network that cannot be built ({error})") from error
    stored = module.state_dict().keys()
    computed = sum(b.nbytes for name, b in module.named_buffers() if name not in stored)
    if computed > _MOST_BYTES:
        raise InputError(f"a network that computes {computed:,} bytes besides its weights")
    return module
