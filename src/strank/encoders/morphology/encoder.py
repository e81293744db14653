"""The built-in encoder: what a pathologist would name, measured, without weights or network.

Every feature is in physical units (µm, mm², optical density), is finite for any patch, and stays
the same when the patch is turned by a right angle or mirrored (the shapes of touching nuclei:
nearly the same). Heavy-tailed quantities enter as logs, roots or shares, because a linear head that
extrapolates to another patient follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from strank.encoders.base import Field
from strank.encoders.morphology.names import FIELD_NAMES, dyadic_scales, feature_names
from strank.errors import InputError

_MIN_SCALES = 3


@dataclass(frozen=True)
class Morphology:
    """Stain, texture, fibres and nuclei, at the spot, nearby and in its surroundings.

    Parameters
    ----------
    fields
        The spot's window, that of what is nearby, and that of its surroundings.
    threads
        How many patches are described at a time; all cores by default. Does not change the result.

    Raises
    ------
    InputError
        Unless there are three fields, each with pixels fine enough to show three scales of texture
        (at least 48 pixels).

    Examples
    --------
    >>> encoder = Morphology()
    >>> encoder.feature_names[0]
    'spot.hematoxylin.mean'
    >>> white = np.full((3, 224, 224, 3), 255, np.uint8)
    >>> encoder.encode([white, white, white]).shape == (3, len(encoder.feature_names))
    True
    """

    name: ClassVar[str] = "morphology"
    version: ClassVar[str] = "2"

    fields: tuple[Field, ...] = (Field(100.0, 224), Field(250.0, 224), Field(450.0, 224))
    threads: int | None = None

    def __post_init__(self) -> None:
        if len(self.fields) != len(FIELD_NAMES):
            raise InputError(
                f"morphology looks at {len(FIELD_NAMES)} fields ({', '.join(FIELD_NAMES)}); "
                f"{len(self.fields)} given"
            )
        for name, field in zip(FIELD_NAMES, self.fields, strict=True):
            if len(dyadic_scales(field.um, field.um / field.pixels)) < _MIN_SCALES:
                raise InputError(
                    f"field {name!r}: {field.pixels} pixels over {field.um:g} µm are too coarse; "
                    "give it more pixels"
                )

    @property
    def feature_names(self) -> tuple[str, ...]:
        """One unique name a feature, as ``<field>.<part>.<what>``."""
        return feature_names(self.fields)

    def encode(self, patches: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Features of spots.

        Parameters
        ----------
        patches
            For each field one RGB array, uint8 ``[n_spots, pixels, pixels, 3]``; what lies outside
            the image is white.

        Returns
        -------
        NDArray[np.float32]
            ``[n_spots, n_features]``, finite. A row depends on its own patches only.

        Raises
        ------
        InputError
            For arrays that are not what the fields say; the field is named.
        """
        _check_patches(patches, self.fields)
        from strank.encoders.morphology.patch import describe_spots

        return describe_spots(self.fields, patches, self.threads)


def _check_patches(patches: Sequence[NDArray[np.uint8]], fields: tuple[Field, ...]) -> None:
    if len(patches) != len(fields):
        raise InputError(
            f"one array of patches a field is needed ({', '.join(FIELD_NAMES)}); "
            f"{len(patches)} given"
        )
    for name, field, array in zip(FIELD_NAMES, fields, patches, strict=True):
        expected = (field.pixels, field.pixels, 3)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != expected:
            raise InputError(
                f"field {name!r}: expected uint8 patches [n_spots, {field.pixels}, "
                f"{field.pixels}, 3]; got {array.dtype} {list(array.shape)}"
            )
        if len(array) != len(patches[0]):
            raise InputError(
                f"field {name!r}: {len(array)} patches; field {FIELD_NAMES[0]!r} has "
                f"{len(patches[0])}"
            )
