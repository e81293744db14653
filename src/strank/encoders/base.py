"""What an encoder is, and the catalogue of them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from strank.errors import InputError

__all__ = ["ENCODERS", "Encoder", "Field", "encoder_facts", "get_encoder"]

ENCODERS: dict[str, str] = {"morphology": "strank.encoders.morphology:Morphology"}


@dataclass(frozen=True)
class Field:
    """A square window around a spot.

    Attributes
    ----------
    um
        Its side, in µm.
    pixels
        Side of the array it is resampled to.
    """

    um: float
    pixels: int


class Encoder(Protocol):
    """Turns the windows around spots into features; deterministic, spot by spot."""

    @property
    def name(self) -> str:
        """Name in the catalogue and in ``obsm``."""

    @property
    def version(self) -> str:
        """Changes whenever the same patch would give other features."""

    @property
    def fields(self) -> tuple[Field, ...]:
        """The windows it looks at, all centred on the spot; the first is the spot's own."""

    @property
    def feature_names(self) -> tuple[str, ...]:
        """One name a feature, unique."""

    def encode(self, patches: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Features ``[n_spots, n_features]`` of one RGB array ``[n_spots, px, px, 3]`` a field."""


def get_encoder(name: str) -> Encoder:
    """Make the encoder of that name; an :class:`InputError` lists the choices for an unknown one.

    Names such as ``timm:resnet18`` and ``hf:owner/name`` are those of
    `strank.encoders.hub.load_encoder`.

    Examples
    --------
    >>> get_encoder("morphologie")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: no encoder 'morphologie'; did you mean 'morphology'? choose one of ...
    """
    if ":" in name:
        from strank.encoders.hub import load_encoder

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


def encoder_facts(encoder: Encoder) -> dict[str, Any]:
    """List what must agree between the features a model was trained on and those it gets."""
    facts = {
        "name": encoder.name,
        "version": encoder.version,
        "fields": [asdict(field) for field in encoder.fields],
        "n_features": len(encoder.feature_names),
    }
    source = getattr(encoder, "source", encoder.name)
    return facts if source == encoder.name else {**facts, "source": source}
