"""Patches of all spots, cut once and read from disk as they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from anndata import AnnData
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from strank.cohort.contract import spots_checksum
from strank.encoders.base import Field
from strank.files import atomic_path
from strank.progress import progress
from strank.slides.image import read_field, slide_of

__all__ = ["cut_patches"]

_AT_ONCE = 256


def cut_patches(
    cohort: Mapping[str, AnnData],
    section: NDArray,
    positions: NDArray[np.float64],
    field: Field,
    folder: Path,
    *,
    verbose: bool = False,
) -> NDArray[np.uint8]:
    """Cut the patches of spots into a file, unless it is there, and map it.

    Parameters
    ----------
    cohort
        Sections, whose images are opened one after the other.
    section, positions
        Name of the section, and centre in µm, of every spot, ``[n_spots]`` and ``[n_spots, 2]``.
    field
        Window around a spot.
    folder
        Of the file: 147 KiB a patch of 224 pixels. It is named by what was cut.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    NDArray
        ``uint8``, ``[n_spots, pixels, pixels, 3]``, not in memory.
    """
    known = hashlib.sha256(repr((field, [*cohort])).encode())
    for adata in cohort.values():
        known.update(spots_checksum(adata).encode())
    known.update(positions.tobytes())
    path = folder / f"patches-{known.hexdigest()[:12]}.npy"
    if not path.is_file():
        shape = len(section), field.pixels, field.pixels, 3
        with (
            atomic_path(path) as part,
            progress("Cutting patches", len(section), hidden=not verbose) as advance,
        ):
            patches = open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)
            for name, adata in cohort.items():
                slide, rows = slide_of(adata), np.flatnonzero(section == name)
                for start in range(0, len(rows), _AT_ONCE):
                    some = rows[start : start + _AT_ONCE]
                    centres = positions[some] / slide.um_per_pixel
                    patches[some] = read_field(slide, centres, um=field.um, pixels=field.pixels)
                    advance(len(some))
            patches.flush()
    return np.load(path, mmap_mode="r")
