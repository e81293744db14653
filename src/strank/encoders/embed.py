"""From sections and their images to features beside the counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.store import section_names
from strank.encoders.base import Encoder
from strank.encoders.run import Run, check_unchanged, features_of
from strank.encoders.tiles import Batch, Say, check_scale, encode_batches
from strank.files import sha256
from strank.slides.image import Slide, slide_of

__all__ = ["BATCH", "Embedded", "check_scale", "embed_cohort", "embed_section", "embed_spots"]

Advance = Callable[[int], object]

#: Spots that are read and encoded at a time.
BATCH = 64


@dataclass(frozen=True)
class Embedded:
    """What `embed_cohort` did for a section; ``done_before`` if its features were there already."""

    section: str
    n_spots: int
    done_before: bool


def embed_cohort(
    folder: Path,
    encoder: Encoder,
    *,
    dtype: str | None = None,
    batch_size: int = BATCH,
    workers: int = 0,
    advance: Advance | None = None,
    say: Say | None = None,
) -> list[Embedded]:
    """Write the features of every section that lacks them.

    A section counts as done when its features come from the same encoder (all its facts), the same
    image and the same spots. A run that was killed goes on after the last batch that it finished.
    Several processes may work on one cohort, one a GPU say: each takes sections that no other has,
    and at the end waits for the others.

    Parameters
    ----------
    folder
        The cohort.
    encoder
        Which features.
    dtype
        How features are stored, ``"float32"`` or ``"float16"``; if ``None`` as they are, and new
        ones in ``float32``.
    batch_size, workers
        As in `embed_spots`.
    advance
        Called with the number of spots done, for a progress bar.
    say
        Called with what a user wants to know, such as why a section is embedded again.

    Raises
    ------
    InputError
        For an unknown dtype, a section or image that cannot be read, an image that changed since
        the import, features that are not finite, or a full disk.
    """
    run = Run(folder, encoder, dtype, advance or _ignore, say or _ignore)
    n_spots = {name: run.look(name) for name in section_names(folder)}
    # At once and before all else, so that it does not count as speed.
    run.advance(sum(n for name, n in n_spots.items() if name not in run.todo))
    with run:
        # Nobody waits while others may wait for what it has not finished.
        for wait in (False, True):
            if run.todo:
                batches = run.batches(batch_size, wait=wait)
                encoded = encode_batches(batches, encoder, workers=workers, say=say)
                with closing(encoded):
                    for rows in encoded:
                        run.add(rows)
    return [Embedded(name, n, name not in run.embedded) for name, n in n_spots.items()]


def embed_section(section: AnnData, encoder: Encoder, *, advance: Advance | None = None) -> AnnData:
    """Features of a section as an AnnData: ``X`` features, ``obs`` spots, ``var`` their names."""
    slide = slide_of(section)
    check_unchanged(sha256(slide.path), section)
    features = embed_spots(slide, np.asarray(section.obsm["spatial"]), encoder, advance=advance)
    return features_of(section, encoder, features)


def embed_spots(
    slide: Slide,
    centres: NDArray[np.float64],
    encoder: Encoder,
    *,
    batch_size: int = BATCH,
    workers: int = 0,
    advance: Advance | None = None,
    say: Say | None = None,
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
    batch_size
        Spots that are read and encoded at a time; one batch is read while another is encoded.
    workers
        Processes that read, for an encoder on a GPU; 0 for threads of this process, faster for one
        on the CPU. Features are the same.
    advance
        Called with the number of spots done.
    say
        Told if a batch does not fit into the GPU's memory and goes through in parts.

    Returns
    -------
    NDArray
        ``float32``, ``[n_spots, n_features]``. Besides it, memory holds the patches of three
        batches, and of two more a worker.

    Raises
    ------
    InputError
        If the slide's pixels are far too coarse, or cannot be read.
    """
    check_scale(slide, encoder)
    out = np.empty((len(centres), len(encoder.feature_names)), np.float32)
    starts = range(0, len(centres), batch_size)
    batches = (Batch(slide, centres[start : start + batch_size]) for start in starts)
    features = encode_batches(batches, encoder, workers=workers, say=say)
    for start, rows in zip(starts, features, strict=True):
        out[start : start + len(rows)] = rows
        if advance is not None:
            advance(len(rows))
    return out


def _ignore(_: object) -> None:
    pass
