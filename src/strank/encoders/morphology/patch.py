"""All features of one patch: stain, texture, fibres and nuclei; and of many, side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.encoders.base import Field
from strank.encoders.morphology.names import (
    N_FIBRE_SCALES,
    N_PATTERN_SCALES,
    dyadic_scales,
    feature_names,
    patch_names,
)
from strank.encoders.morphology.nuclei import describe_nuclei
from strank.encoders.morphology.stain import (
    describe_stains,
    describe_tissue,
    optical_density,
    separate_stains,
)
from strank.encoders.morphology.texture import describe_bands, describe_fibres, describe_patterns

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
        "fibres.": describe_fibres(stains.density, um_per_pixel, scales[:N_FIBRE_SCALES]),
        "patterns.": describe_patterns(stains.density, um_per_pixel, scales[:N_PATTERN_SCALES]),
        "nuclei.": describe_nuclei(stains, density, um_per_pixel),
    }
    return {f"{part}{name}": value for part, of in parts.items() for name, value in of.items()}


def describe_spots(
    fields: tuple[Field, ...], patches: Sequence[NDArray[np.uint8]], threads: int | None
) -> NDArray[np.float32]:
    """Features ``[n_spots, n_features]`` of one array of patches a field."""
    features = np.empty((len(patches[0]), len(feature_names(fields))), np.float32)
    names = [tuple(patch_names(field)) for field in fields]

    def describe(first: int) -> None:
        for spot in range(first, min(first + _CHUNK, len(features))):
            found = [describe_patch(p[spot], f.um) for f, p in zip(fields, patches, strict=True)]
            features[spot] = [of[n] for of, own in zip(found, names, strict=True) for n in own]

    # OpenCV and NumPy release the interpreter's lock in what takes the time.
    with _one_thread_each(), ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for _ in pool.map(describe, range(0, len(features), _CHUNK)):
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
