"""What an encoder is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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

    Examples
    --------
    >>> Field(um=112.0, pixels=224)
    Field(um=112.0, pixels=224)
    """

    um: float
    pixels: int


class Encoder(Protocol):
    """What turns the windows around spots into features; deterministic, spot by spot.

    Any object with these attributes is one: give it to `strank.embed`, or name what makes it as
    ``module:callable``.

    Examples
    --------
    >>> class Redness:
    ...     name, version = "redness", "1"
    ...     fields, feature_names = (Field(um=55.0, pixels=16),), ("red",)
    ...
    ...     def encode(self, patches):
    ...         return patches[0][..., 0].mean((1, 2), dtype=np.float32)[:, None]
    >>> Redness().encode([np.full((2, 16, 16, 3), 7, np.uint8)])
    array([[7.],
           [7.]], dtype=float32)
    """

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
    """First 16 digits of the SHA-256 of what happens to an image before an encoder's weights."""
    # Precision is no part of it: a model is to be used on a GPU in bf16 and on a CPU in float32.
    prepared = {
        "fields": [asdict(field) for field in encoder.fields],
        "resampling": _RESAMPLING,
        **getattr(encoder, "preparation", {}),
    }
    return hashlib.sha256(json.dumps(prepared, sort_keys=True).encode()).hexdigest()[:16]
