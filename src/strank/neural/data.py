"""Spots to train on: which make up a batch, what they give, and their neighbours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from sys import platform
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from strank.errors import InputError
from strank.processes import follow

Uniform = Literal["spots", "sections"]
#: Maps patches, their rows and the epoch to other patches.
Augment = Callable[[Tensor, NDArray[np.int64], int], Tensor]


@dataclass(frozen=True)
class Neighbours:
    """Rows and distances of the nearest spots of the same section, the spot itself first."""

    rows: NDArray[np.int64]  # [n_spots, 1 + n_neighbours]; -1 where a section has fewer spots
    distance: NDArray[np.float32]  # in µm, same shape; 0 where there is none

    def of(self, spots: NDArray[np.int64]) -> tuple[NDArray[np.int64], tuple[Tensor, Tensor]]:
        """Return the rows that some spots look at, once each, and where among them they look.

        Examples
        --------
        >>> line = find_neighbours(np.c_[np.arange(4.0), np.zeros(4)], np.zeros(4, int), 1)
        >>> line.of(np.array([3]))
        (array([2, 3]), (tensor([[1, 0]]), tensor([[0., 1.]])))
        """
        looked_at = self.rows[spots]
        absent = looked_at < 0
        needed = np.unique(looked_at[~absent])
        places = np.searchsorted(needed, looked_at)
        places[absent] = -1
        return needed, (torch.from_numpy(places), torch.from_numpy(self.distance[spots]))


def find_neighbours(
    positions: NDArray[np.float64], section: NDArray, n_neighbours: int
) -> Neighbours:
    """Find the nearest spots of the same section; positions in µm, ``[n_spots, 2]``."""
    if not np.isfinite(positions).all():
        raise InputError(
            "the model looks at neighbouring spots, and how far away they are is not known; set "
            'adata.uns["strank"] = {"um_per_pixel": ...}, of the pixels of obsm["spatial"]'
        )
    shape = len(positions), 1 + n_neighbours
    rows, distance = np.full(shape, -1), np.zeros(shape, np.float32)
    for label in np.unique(section):
        own = np.flatnonzero(section == label)
        reach = min(n_neighbours + 1, len(own))
        far, near = cKDTree(positions[own]).query(positions[own], k=reach)
        far, near = far.reshape(len(own), reach), near.reshape(len(own), reach)
        # Of spots at the same place, another may come first.
        first = np.argmax(near == np.arange(len(own))[:, None], axis=1)
        line = np.arange(len(own))
        near[line, first], near[:, 0] = near[:, 0].copy(), line
        rows[own, :reach], distance[own, :reach] = own[near], far
    return Neighbours(rows, distance)


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch is cut into batches.

    Examples
    --------
    >>> BatchPlan(sections=4, spots=128).uniform
    'spots'
    """

    #: Sections a batch; None for any spots, whatever their section, as published.
    sections: int | None = None
    #: Of each section (N_k) at most; of the batch where sections is None, but for the last.
    spots: int = 256
    #: With "spots", lists are of the same size, so a large section has more of them; with
    #: "sections", every section has as many lists, of a size in proportion to its own.
    uniform: Uniform = "spots"


def cut_epoch(
    section: NDArray[np.int64], plan: BatchPlan, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Cut all spots into batches of about one size at random; every spot is in exactly one.

    Lists of a batch are of different sections, so there are fewer of them than asked for where one
    section has most of the spots.

    Examples
    --------
    >>> plan = BatchPlan(sections=2, spots=3)
    >>> batches = cut_epoch(np.repeat([0, 1], 6), plan, np.random.default_rng(0))
    >>> [np.bincount(np.repeat([0, 1], 6)[rows]).tolist() for rows in batches]
    [[3, 3], [3, 3]]
    """
    shuffled = rng.permutation(len(section))
    if plan.sections is None:
        return np.split(shuffled, range(plan.spots, len(section), plan.spots))
    by_section = shuffled[np.argsort(section[shuffled], kind="stable")]
    sizes = np.bincount(section)
    sizes = sizes[sizes > 0]
    n_lists = -(-sizes // plan.spots)
    if plan.uniform == "sections":
        # A list of one spot would say nothing.
        n_lists = np.maximum(n_lists, np.minimum(n_lists.max(), sizes // 2))
    of_section = np.split(by_section, np.cumsum(sizes)[:-1])
    lists = [
        part
        for s in rng.permutation(len(sizes))
        for part in np.array_split(of_section[s], n_lists[s])
    ]
    # Dealt out in turn, the lists of a section, which stand together, come into different batches.
    n_batches = max(-(-len(lists) // plan.sections), int(n_lists.max()))
    batches = [np.concatenate(lists[b::n_batches]) for b in range(min(n_batches, len(lists)))]
    return [batches[b] for b in rng.permutation(len(batches))]


def cut_in_order(rows: NDArray[np.int64], plan: BatchPlan) -> list[NDArray[np.int64]]:
    """Cut rows as published for validation; all are one batch where a batch is of sections."""
    if plan.sections is not None:
        return [rows]
    return np.split(rows, range(plan.spots, len(rows), plan.spots))


class SectionBatches(Sampler[tuple[int, NDArray[np.int64]]]):
    """Sampler of `cut_epoch`: yields the epoch and the rows of a batch.

    Every process of a distributed run cuts the same batches and takes its share of each, so the
    batches are the same however many processes there are.

    Examples
    --------
    >>> section, plan = np.zeros(5, int), BatchPlan(spots=3)
    >>> batches = SectionBatches(section, np.arange(5), plan, seed=0, rank=1, world=2)
    >>> [(epoch, len(rows)) for epoch, rows in batches]
    [(0, 1), (0, 1)]
    """

    def __init__(
        self,
        section: NDArray[np.int64],
        rows: NDArray[np.int64],
        plan: BatchPlan,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.section, self.rows, self.plan, self.seed = section[rows], rows, plan, seed
        self.rank, self.world, self.epoch = rank, world, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch; Lightning calls it."""
        self.epoch = epoch

    def _batches(self) -> list[NDArray[np.int64]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        return cut_epoch(self.section, self.plan, rng)

    def __len__(self) -> int:
        """Count the batches of an epoch, which are as many in every one."""
        return len(self._batches())

    def __iter__(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for batch in self._batches():
            yield self.epoch, self.rows[batch[self.rank :: self.world]]


class SpotBatch(NamedTuple):
    """What a training step gets."""

    # Features [n_rows, n_features] or patches [n_rows, px, px, 3]; for a head with context also the
    # rows of each spot's neighbours among them, and their distances.
    inputs: tuple[Tensor, ...]
    counts: Tensor  # [n_spots, n_genes]
    section: Tensor  # its code
    offset: Tensor  # log library size


@dataclass(frozen=True)
class Spots(Dataset[SpotBatch]):
    """Spots of several sections."""

    inputs: Any  # [n_spots, ...]: features or patches; an array in memory, or a memmap
    counts: sparse.csr_matrix | NDArray[np.float32]  # of an array batches are cut faster
    section: NDArray[np.int64]
    offset: NDArray[np.float32]
    neighbours: Neighbours | None = None
    augment: Augment | None = None  # of training batches

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


def validation_loader(
    spots: Spots, batches: Sequence[NDArray[np.int64]], *, workers: int = 0
) -> Iterable[SpotBatch]:
    """Load the rows of every batch as they are."""
    keys = [(0, rows) for rows in batches]
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
        # Other processes than forks get a copy of what is mapped from disk. Windows has no forks,
        # and those of macOS may die in Apple's own libraries.
        multiprocessing_context="fork" if platform == "linux" else "spawn",
        persistent_workers=True,
        worker_init_fn=partial(follow, os.getpid()),
        # Of its own, lest it draw from torch's, whose draws must be those of the epoch.
        generator=torch.Generator(),
        pin_memory=torch.cuda.is_available(),
    )
