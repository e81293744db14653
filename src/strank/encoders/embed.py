"""From sections and their images to features beside the counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.contract import section_info, spots_checksum
from strank.cohort.store import features_path, read_h5ad, read_section, section_names, write_h5ad
from strank.encoders.base import Encoder, encoder_facts
from strank.errors import InputError
from strank.files import sha256
from strank.slides.image import Slide, read_field, slide_of

__all__ = ["Embedded", "check_scale", "embed_cohort", "embed_section", "embed_spots"]

Advance = Callable[[int], object]

_BATCH = 64
# Windows magnified more than this hold nothing that an encoder could see.
_MOST_MAGNIFICATION = 10


@dataclass(frozen=True)
class Embedded:
    """What `embed_cohort` did for a section; ``done_before`` if its features were there already."""

    section: str
    n_spots: int
    done_before: bool


def embed_cohort(
    folder: Path, encoder: Encoder, *, advance: Advance | None = None
) -> list[Embedded]:
    """Write the features of every section that lacks them.

    A section counts as done when its features come from the same encoder (name, version, fields),
    the same image and the same spots. Files are whole or absent, so a killed run continues.

    Parameters
    ----------
    folder
        The cohort.
    encoder
        Which features.
    advance
        Called with the number of spots done, for a progress bar.

    Raises
    ------
    InputError
        For a section or image that cannot be read, or an image that changed since the import.
    """
    done = []
    for name in section_names(folder):
        section = read_section(folder / f"{name}.h5ad")
        path = features_path(folder, encoder.name, name)
        done_before = path.is_file() and _is_current(path, section, encoder)
        if not done_before:
            write_h5ad(embed_section(section, encoder, advance=advance), path)
        elif advance is not None:
            advance(section.n_obs)
        done.append(Embedded(name, section.n_obs, done_before))
    return done


def embed_section(section: AnnData, encoder: Encoder, *, advance: Advance | None = None) -> AnnData:
    """Features of a section as an AnnData: ``X`` features, ``obs`` spots, ``var`` their names."""
    info = section_info(section)
    slide = slide_of(section)
    if sha256(slide.path) != info.image_sha256:
        raise InputError(f"{info.image}: the image changed since the import; import again")
    features = embed_spots(slide, np.asarray(section.obsm["spatial"]), encoder, advance=advance)
    return AnnData(
        X=features,
        obs=pd.DataFrame(index=section.obs_names),
        var=pd.DataFrame(index=pd.Index(encoder.feature_names)),
        uns={
            "encoder": json.dumps(encoder_facts(encoder)),
            "spots_sha256": spots_checksum(section),
        },
    )


def check_scale(slide: Slide, encoder: Encoder) -> None:
    """Refuse a slide whose pixels are far too coarse for the encoder's windows."""
    for field in encoder.fields:
        pixels = field.um / slide.um_per_pixel
        if pixels * _MOST_MAGNIFICATION < field.pixels:
            raise InputError(
                f"{slide.path}: at {slide.um_per_pixel:g} µm per pixel a window of {field.um:g} µm "
                f"is {pixels:.0f} pixels wide, but {encoder.name} looks at {field.pixels}; is the "
                "µm per pixel right?"
            )


def embed_spots(
    slide: Slide,
    centres: NDArray[np.float64],
    encoder: Encoder,
    *,
    advance: Advance | None = None,
) -> NDArray[np.float32]:
    """Features at any positions of a slide.

    Parameters
    ----------
    slide
        The image.
    centres
        Positions (x, y) in pixels of the image, ``[n_spots, 2]``.
    encoder
        Which features.
    advance
        Called with the number of spots done.

    Returns
    -------
    NDArray
        ``float32``, ``[n_spots, n_features]``. Besides it, memory holds the patches of 64 spots.

    Raises
    ------
    InputError
        If the slide's pixels are far too coarse.
    """
    check_scale(slide, encoder)
    out = np.empty((len(centres), len(encoder.feature_names)), np.float32)
    for start in range(0, len(centres), _BATCH):
        batch = centres[start : start + _BATCH]
        fields = [read_field(slide, batch, um=f.um, pixels=f.pixels) for f in encoder.fields]
        out[start : start + len(batch)] = encoder.encode(fields)
        if advance is not None:
            advance(len(batch))
    return out


def _is_current(path: Path, section: AnnData, encoder: Encoder) -> bool:
    try:
        stored = read_h5ad(path).uns
        return bool(
            json.loads(stored["encoder"]) == encoder_facts(encoder)
            and stored["spots_sha256"] == spots_checksum(section)
        )
    except (InputError, KeyError, ValueError):
        return False
