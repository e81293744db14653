"""Spots to train on, given out batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_all_start_methods
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from strank.neural.batches import SectionBatches
from strank.neural.neighbours import Neighbours

__all__ = ["Augment", "SpotBatch", "Spots", "section_loader", "training_loader"]


#: Maps patches, their rows and the epoch to other patches.
Augment = Callable[[Tensor, NDArray[np.int64], int], Tensor]


class SpotBatch(NamedTuple):
    """What a training step gets.

    Attributes
    ----------
    inputs
        What the network takes: features ``[n_rows, n_features]`` or patches
        ``[n_rows, px, px, 3]``, and for a head with context the rows of each spot's neighbours
        among them, and their distances; see `strank.neural.heads.ContextHead`.
    counts
        ``[n_spots, n_genes]``.
    section, offset
        Code of the section and log library size, ``[n_spots]``.
    """

    inputs: tuple[Tensor, ...]
    counts: Tensor
    section: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Spots(Dataset[SpotBatch]):
    """Spots of several sections.

    Attributes
    ----------
    inputs
        ``[n_spots, ...]``: features or patches; an array in memory, or a memmap.
    counts
        CSR, or an array, of which batches are cut faster, ``[n_spots, n_genes]``.
    section, offset
        Code of the section and log library size, ``[n_spots]``.
    neighbours
        Of every spot in its section, for heads that look at them.
    augment
        Of training batches; ``None`` for none.
    """

    inputs: Any
    counts: sparse.csr_matrix | NDArray[np.float32]
    section: NDArray[np.int64]
    offset: NDArray[np.float32]
    neighbours: Neighbours | None = None
    augment: Augment | None = None

    def __len__(self) -> int:
        return len(self.section)

    def __getitem__(self, key: tuple[int, NDArray[np.int64]]) -> SpotBatch:
        """Gather the spots of some rows, as they are in an epoch."""
        epoch, rows = key
        needed, around = rows, cast(tuple[Tensor, ...], ())
        if self.neighbours is not None:
            needed, around = self.neighbours.of(rows)
        inputs = torch.from_numpy(np.asarray(self.inputs.take(needed, 0)))
        if self.augment is not None:
            inputs = self.augment(inputs, needed, epoch)
        counts: Any = self.counts
        dense = counts[rows].toarray() if sparse.issparse(counts) else counts.take(rows, 0)
        return SpotBatch(
            (inputs, *around),
            torch.from_numpy(dense),
            torch.from_numpy(self.section[rows]),
            torch.from_numpy(self.offset[rows]),
        )


def training_loader(
    spots: Spots, batches: SectionBatches, *, workers: int = 0
) -> Iterable[SpotBatch]:
    """Load the batches of an epoch; ``workers`` processes read, or this one if 0."""
    return _loader(spots, batches, workers)


def section_loader(
    spots: Spots, sections: Sequence[int], *, workers: int = 0
) -> Iterable[SpotBatch]:
    """Load whole sections as they are, one a batch."""
    keys = [(0, np.flatnonzero(spots.section == section)) for section in sections]
    return _loader(replace(spots, augment=None), keys, workers)


@dataclass(frozen=True)
class _Here:
    """Batches read where they are needed, without what a `DataLoader` does around it."""

    spots: Spots
    keys: Iterable[tuple[int, NDArray[np.int64]]]

    def __iter__(self) -> Iterator[SpotBatch]:
        return (self.spots[key] for key in self.keys)


def _as_it_is(batch: Any) -> Any:
    return batch


def _loader(spots: Spots, keys: Any, workers: int) -> Iterable[SpotBatch]:
    if workers == 0:
        return _Here(spots, keys)
    return DataLoader(
        spots,
        sampler=keys,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        # Other processes than forks would get a copy of what is mapped from disk.
        multiprocessing_context="fork" if "fork" in get_all_start_methods() else None,
        persistent_workers=True,
        # Of its own, lest it draw from torch's, whose draws must be those of the epoch.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
