"""What an encoder is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Encoder", "Field", "encoder_facts", "preprocessing_hash"]

# How `strank.slides.slide.read_field` resamples a window: change it when that changes.
_RESAMPLING = "halved as often as possible, then area where it shrinks, else linear"


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
        """Features ``[n_spots, n_features]`` of one RGB array ``[n_spots, px, px, 3]`` a field.

        The same patches give the same features. What is encoded beside a spot may move the last
        digits of an image network's features, whose kernels take sums in another order for another
        number of spots; it moves nothing else.
        """


def encoder_facts(encoder: Encoder) -> dict[str, Any]:
    """List what must agree between the features a model was trained on and those it gets."""
    facts = {
        "name": encoder.name,
        "version": encoder.version,
        "fields": [asdict(field) for field in encoder.fields],
        "n_features": len(encoder.feature_names),
        "preprocessing": preprocessing_hash(encoder),
    }
    source = getattr(encoder, "source", encoder.name)
    return facts if source == encoder.name else {**facts, "source": source}


def preprocessing_hash(encoder: Encoder) -> str:
    """First 16 digits of the SHA-256 of what happens to an image before an encoder's weights.

    That is its fields, how they are resampled and, of image networks, the ``preparation``: mean
    and standard deviation of the colours. Precision is no part of it: a model is to be used on a
    GPU in bf16 and on a CPU in float32 alike.
    """
    prepared = {
        "fields": [asdict(field) for field in encoder.fields],
        "resampling": _RESAMPLING,
        **getattr(encoder, "preparation", {}),
    }
    return hashlib.sha256(json.dumps(prepared, sort_keys=True).encode()).hexdigest()[:16]
