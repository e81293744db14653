"""Batches of windows, read while the batch before is encoded."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, get_worker_info

from strank.encoders.base import Encoder, Field
from strank.errors import InputError
from strank.processes import follow, starting
from strank.progress import Advance, Say
from strank.slides.slide import Slide, read_field

# Windows magnified more than this hold nothing that an encoder could see.
_MOST_MAGNIFICATION = 10
# More processes bring nothing: so many feed one GPU.
_MOST_WORKERS = 8


def usual_workers(on_gpu: bool) -> int:
    """How many processes read tiles: some for an encoder on a GPU, none for one on the CPU."""
    return min(_MOST_WORKERS, os.cpu_count() or 1) if on_gpu else 0


class TileBatch(NamedTuple):
    """Spots of a slide that are read and encoded together."""

    slide: Slide
    centres: NDArray[np.float64]  # (x, y) in pixels of the slide, [n_spots, 2]


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
    batch_size: int = 64,
    workers: int = 0,
    advance: Advance | None = None,
    say: Say | None = None,
) -> NDArray[np.float32]:
    """Features at any positions ``[n_spots, 2]`` of a slide, ``float32`` ``[n_spots, n_features]``.

    ``centres`` are (x, y) in pixels of the image; the other arguments are those of `embed`.
    """
    # Besides the features, memory holds the patches of three batches, and of two more a worker.
    check_scale(slide, encoder)
    out = np.empty((len(centres), len(encoder.feature_names)), np.float32)
    starts = range(0, len(centres), batch_size)
    batches = (TileBatch(slide, centres[start : start + batch_size]) for start in starts)
    features = encode_batches(batches, encoder, workers=workers, say=say)
    for start, rows in zip(starts, features, strict=True):
        out[start : start + len(rows)] = rows
        if advance is not None:
            advance(len(rows))
    return out


def encode_batches(
    batches: Iterable[TileBatch], encoder: Encoder, *, workers: int = 0, say: Say | None = None
) -> Generator[NDArray[np.float32], None, None]:
    """Features of batches, ``[n_spots, n_features]``; while one is encoded the next is read.

    Batches are taken a few ahead of what is yielded. ``workers`` processes read, 0 for threads of
    this one. ``say`` is told once if a batch did not fit into the GPU's memory.
    """
    encode = _InParts(encoder, say)
    before: Future[NDArray[np.float32]] | None = None
    with ThreadPoolExecutor(1) as pool:
        for patches in read_batches(batches, encoder.fields, workers=workers):
            now = pool.submit(encode, patches)
            if before is not None:
                yield before.result()
            before = now
        if before is not None:
            yield before.result()


def read_batches(
    batches: Iterable[TileBatch], fields: tuple[Field, ...], *, workers: int = 0
) -> Iterator[list[NDArray[np.uint8]]]:
    """Windows of batches, one array ``[n_spots, px, px, 3]`` a field."""
    processes: dict[str, Any] = {}
    if workers:
        # Neither libvips nor CUDA outlives a fork.
        processes = {"multiprocessing_context": "spawn", "prefetch_factor": 2}
        processes["pin_memory"] = torch.cuda.is_available()
        processes["worker_init_fn"] = partial(follow, os.getpid())
    loader = DataLoader(
        _Windows(fields),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        generator=torch.Generator(),  # else it draws from the global one
        **processes,
    )
    try:
        with starting():
            read = iter(loader)
        for windows in read:
            if isinstance(windows, InputError):
                raise windows
            yield [of_field.numpy() for of_field in windows]
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(
            f"a process that reads tiles was killed ({error}); is memory or /dev/shm full? "
            "Use fewer `workers`, 0 for none"
        ) from error


class _Windows(Dataset):
    """Reads a batch, here or in a worker."""

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self.fields = fields
        self._open: Slide | None = None

    def __getitem__(self, batch: TileBatch) -> list[NDArray[np.uint8]] | InputError:
        slide = batch.slide if get_worker_info() is None else self._kept(batch.slide)
        try:
            return [read_field(slide, batch.centres, um=f.um, pixels=f.pixels) for f in self.fields]
        except InputError as error:
            # Raised in a worker its message would be a traceback.
            return error

    def _kept(self, slide: Slide) -> Slide:
        """Go on with a slide whose pixels are decoded, and not with its copy that came along."""
        kept = self._open
        if kept is None or (kept.path, kept.um_per_pixel) != (slide.path, slide.um_per_pixel):
            kept = self._open = slide
        return kept


class _InParts:
    """Encodes a batch at once, or in parts as large as the GPU's memory was found to allow."""

    def __init__(self, encoder: Encoder, say: Say | None) -> None:
        self.encoder = encoder
        self.n_features = len(encoder.feature_names)
        self.say = say
        self.most: int | None = None

    def __call__(self, patches: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
        n_spots = len(patches[0])
        size = min(self.most or n_spots, n_spots)
        while (features := self._try(patches, size)) is None:
            if size == 1:
                raise InputError(
                    f"{self.encoder.name}: the GPU has no memory for a single tile; free it, or "
                    "hide it (CUDA_VISIBLE_DEVICES=) to compute on the CPU"
                )
            size //= 2
            torch.cuda.empty_cache()
        if size < n_spots and self.most is None and self.say is not None:
            self.say(f"out of GPU memory with {n_spots} tiles at once; going on with {size}")
        if size < n_spots:
            self.most = size
        if features.shape != (n_spots, self.n_features):
            raise InputError(
                f"{self.encoder.name}: gives features {list(features.shape)}, but "
                f"[{n_spots} spots, {self.n_features} feature_names] are needed"
            )
        return features

    def _try(self, patches: list[NDArray[np.uint8]], size: int) -> NDArray[np.float32] | None:
        starts = range(0, len(patches[0]), size)
        try:
            parts = [self.encoder.encode([p[i : i + size] for p in patches]) for i in starts]
        except torch.cuda.OutOfMemoryError:
            return None
        return np.concatenate(parts) if len(parts) > 1 else parts[0]
