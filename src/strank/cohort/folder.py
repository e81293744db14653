"""A cohort's folder: its sections, where their features lie, and to which spots those belong.

Read without AnnData, which takes longer to import than what is asked here takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import ArrayLike

from strank.errors import InputError, said_by
from strank.hdf5_guard import check_hdf5


def section_names(folder: Path) -> list[str]:
    """Name the sections of a cohort, sorted; an :class:`InputError` if there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; make a cohort with `strank import`")
    names = sorted(path.stem for path in folder.glob("*.h5ad") if not path.name.startswith("."))
    if not names:
        raise InputError(
            f"{folder}: no sections (*.h5ad) there; make a cohort with `strank import`"
        )
    return names


def features_path(folder: Path, encoder: str, section: str) -> Path:
    """Where the features of a section are kept."""
    return folder / "features" / encoder / f"{section}.h5ad"


def count_spots(folder: Path) -> int:
    """Count the spots of all sections of a cohort."""
    return sum(n_spots_of(folder / f"{name}.h5ad") for name in section_names(folder))


def n_spots_of(path: Path) -> int:
    """Count the spots of one section."""
    with open_h5ad(path) as file:
        return len(_index(file["obs"]))


def digest_of(path: Path) -> str | None:
    """Checksum of a section's spots; ``None`` if the file does not say what it is made of.

    Whoever reads all of such a file says what is wrong with it.
    """
    with open_h5ad(path) as file:
        try:
            return spots_digest(
                text_of(file["uns/strank/image_sha256"]),
                float(file["uns/strank/um_per_pixel"][()]),
                _index(file["obs"]).asstr()[:],
                file["obsm/spatial"][()],
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            return None


def spots_digest(
    image_sha256: str, um_per_pixel: float, names: Iterable[str], centres: ArrayLike
) -> str:
    """SHA-256 of what features depend on: the image, its scale, and where which spot stands."""
    digest = hashlib.sha256(f"{image_sha256} {um_per_pixel:.12g}\n".encode())
    digest.update("\n".join(names).encode())
    digest.update(np.asarray(centres, dtype=np.float64).tobytes())
    return digest.hexdigest()


@contextmanager
def open_h5ad(path: Path, *, sealed: bool | None = None) -> Iterator[h5py.File]:
    """Open an AnnData file; an :class:`InputError` if it is absent or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    check_hdf5(path, sealed=sealed)
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    except Exception as error:  # h5py raises many kinds for a damaged file
        raise InputError(
            f"{path}: not a readable .h5ad file ({said_by(error)}); copy or write it again"
        ) from error


def text_of(stored: h5py.Dataset) -> str:
    """Read a text."""
    return str(stored.asstr()[()])


def _index(table: h5py.Group) -> h5py.Dataset:
    index = table[table.attrs["_index"]]
    # Since pandas 3 names may have a mask, in which nothing is masked.
    return index["values"] if isinstance(index, h5py.Group) else index
