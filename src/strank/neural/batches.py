"""Which spots make up a batch: section-aware, finite, and the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

__all__ = ["BatchPlan", "SectionBatches", "cut_epoch"]

Uniform = Literal["spots", "sections"]


@dataclass(frozen=True)
class BatchPlan:
    """How an epoch is cut into batches.

    Attributes
    ----------
    sections
        Sections a batch; ``None`` for any spots, whatever their section, as published.
    spots
        Spots of each section in a batch (N_k) at most; of the batch where ``sections`` is ``None``.
    uniform
        ``"spots"``: lists are of the same size, so a large section has more of them.
        ``"sections"``: every section has the same number of lists, of a size in proportion to its
        own.
    """

    sections: int | None = None
    spots: int = 256
    uniform: Uniform = "spots"


def cut_epoch(
    section: NDArray[np.int64], plan: BatchPlan, rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Cut all spots into batches at random; every spot is in exactly one.

    Parameters
    ----------
    section
        Code of each spot's section, ``[n_spots]``.
    plan
        Sections and spots a batch.
    rng
        Source of randomness.

    Returns
    -------
    list
        Rows of each batch, of about the same number. Lists of a batch are of different sections,
        so there are fewer of them than asked for where one section has most of the spots.

    Examples
    --------
    >>> plan = BatchPlan(sections=2, spots=3)
    >>> batches = cut_epoch(np.repeat([0, 1], 6), plan, np.random.default_rng(0))
    >>> [np.bincount(np.repeat([0, 1], 6)[rows]).tolist() for rows in batches]
    [[3, 3], [3, 3]]
    """
    shuffled = rng.permutation(len(section))
    if plan.sections is None:
        return np.array_split(shuffled, -(-len(section) // plan.spots))
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


class SectionBatches(Sampler[tuple[int, NDArray[np.int64]]]):
    """Sampler of `cut_epoch`: yields the epoch and the rows of a batch.

    Every process of a distributed run cuts the same batches and takes its share of each, so the
    batches are the same however many processes there are.

    Parameters
    ----------
    section
        Code of each spot's section, ``[n_spots]``.
    rows
        The spots to train on.
    plan
        Sections and spots a batch.
    seed
        With the epoch, it determines the batches.
    rank, world
        This process, and how many there are.

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
