"""The built-in encoder: what a pathologist would name, measured, without weights or network.

Every feature is in physical units (µm, mm², optical density), is finite for any patch, and stays
the same when the patch is turned by a right angle or mirrored (the shapes of touching nuclei:
nearly the same). Heavy-tailed quantities enter as logs, roots or shares, because a linear head that
extrapolates to another patient follows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.encoders.base import Field
from strank.encoders.morphology.nuclei import describe_nuclei
from strank.encoders.morphology.stain import (
    describe_stains,
    describe_tissue,
    optical_density,
    separate_stains,
)
from strank.encoders.morphology.texture import (
    describe_bands,
    describe_fibres,
    describe_patterns,
    dyadic_scales,
)
from strank.errors import InputError

# What the fields are called in the names of the features.
FIELD_NAMES = ("spot", "nearby", "surroundings")
# Fibres and local patterns are fine structures: they are sought in the smallest scales only.
_N_FIBRE_SCALES = 3
_N_PATTERN_SCALES = 1
_MIN_SCALES = 3
# Spots a thread takes at a time.
_CHUNK = 8


def describe_patch(patch: NDArray[np.uint8], um: float) -> dict[str, float]:
    """All features, by name, of one RGB patch ``[pixels, pixels, 3]`` whose side is ``um`` µm.

    >>> white = np.full((224, 224, 3), 255, np.uint8)
    >>> describe_patch(white, um=150)["tissue.share"]
    0.0
    """
    um_per_pixel = um / patch.shape[0]
    scales = dyadic_scales(um, um_per_pixel)
    density = optical_density(patch)
    stains = separate_stains(density)
    parts = {
        "": describe_stains(stains, density) | describe_tissue(stains, um_per_pixel),
        "bands.": describe_bands(stains, um_per_pixel, scales),
        "fibres.": describe_fibres(stains.density, um_per_pixel, scales[:_N_FIBRE_SCALES]),
        "patterns.": describe_patterns(stains.density, um_per_pixel, scales[:_N_PATTERN_SCALES]),
        "nuclei.": describe_nuclei(stains, density, um_per_pixel),
    }
    return {f"{part}{name}": value for part, of in parts.items() for name, value in of.items()}


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
        return _feature_names(self.fields)

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
        n_spots = len(patches[0])
        features = np.empty((n_spots, len(self.feature_names)), np.float32)

        def describe(first: int) -> None:
            for spot in range(first, min(first + _CHUNK, n_spots)):
                features[spot] = [
                    value
                    for field, of_field in zip(self.fields, patches, strict=True)
                    for value in describe_patch(of_field[spot], field.um).values()
                ]

        # OpenCV and NumPy release the interpreter's lock in what takes the time.
        with _one_thread_each(), ThreadPoolExecutor(self.threads or os.cpu_count()) as pool:
            for _ in pool.map(describe, range(0, n_spots, _CHUNK)):
                pass
        return features


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep OpenCV from starting threads of its own, which would wait for each other."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)


@lru_cache(maxsize=8)
def _feature_names(fields: tuple[Field, ...]) -> tuple[str, ...]:
    white = (np.full((field.pixels, field.pixels, 3), 255, np.uint8) for field in fields)
    return tuple(
        f"{name}.{feature}"
        for name, field, patch in zip(FIELD_NAMES, fields, white, strict=True)
        for feature in describe_patch(patch, field.um)
    )


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
