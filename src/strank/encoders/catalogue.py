"""Encoders by name."""

from __future__ import annotations

import difflib
from importlib import import_module

from strank.encoders.base import Encoder
from strank.encoders.hub import load_encoder
from strank.errors import InputError

__all__ = ["ENCODERS", "get_encoder"]

ENCODERS: dict[str, str] = {"morphology": "strank.encoders.morphology:Morphology"}


def get_encoder(name: str) -> Encoder:
    """Make the encoder of that name; an :class:`InputError` lists the choices for an unknown one.

    Names such as ``timm:resnet18`` and ``hf:owner/name`` are those of
    `load_encoder`.

    Examples
    --------
    >>> get_encoder("morphologie")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: no encoder 'morphologie'; did you mean 'morphology'? choose one of ...
    """
    if ":" in name:
        return load_encoder(name)
    if name not in ENCODERS:
        near = difflib.get_close_matches(name, ENCODERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"no encoder {name!r}; {hint}choose one of {', '.join(ENCODERS)}, timm:NAME, hf:NAME"
        )
    module, _, attribute = ENCODERS[name].partition(":")
    encoder: Encoder = getattr(import_module(module), attribute)()
    return encoder
