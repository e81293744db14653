"""What all fits of the same spots share: blocks of genes, and the memory and threads they take."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from math import ceil
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from threadpoolctl import ThreadpoolController
from torch import Tensor

from strank.errors import InputError
from strank.linear.data import TILE, Data, Rows
from strank.linear.geometry import Geometry, measure, units_of
from strank.linear.objective import (
    Likelihood,
    ListLikelihood,
    NegativeBinomialLikelihood,
    PairLikelihood,
    Problem,
)
from strank.linear.solver import STEPS_KEPT
from strank.units import each
from strank.where import Where

_Item = TypeVar("_Item")
_T = TypeVar("_T")

_OBJECTIVES = ("list", "pair", "nb")
# More genes at a time bring nothing: the products are as fast as they get.
_MOST_GENES = {"cpu": 1024, "cuda": 8192}
# Fewer are not worth a thread.
_FEWEST_GENES = 128
# Two copies of the features may take this part of the memory each; a block of rows, that.
_COPY, _READ = 0.3, 0.02
# Genes that a worker fits at a time: of fewer each pays more for what they share, of more some
# workers wait for others.
_SENT_GENES = 256
# Rotating the features pays when at least a gene is fitted for so many spots: in about 15
# evaluations, turning weights and gradients instead takes as long.
_SPOTS_PER_GENE = 60
# Multiplications in a product of features and weights. Below it threads cost more than they bring,
# and on a busy machine they wait for each other: 50 genes x 730 spots took 0.4 s with one thread,
# and 40 s with two that had to share the cores with other programs.
_WORTH_THREADS = 100_000_000


class TooLittleMemory(ValueError):
    """Less than a single gene needs."""

    def __init__(self, given: float, told: str, needed: float) -> None:
        super().__init__(f"`max_memory={given:g}` GiB is {told} needs {needed:.2g} GiB")
        self.told, self.needed = told, needed


@dataclass(frozen=True)
class Block:
    """Counts of genes that are fitted together, summed once for all fits of them."""

    genes: slice  #: columns, among those of all
    counts: Any  #: ``[n_spots, n_genes]``, of which sections are read
    xtc: Tensor  #: features summed over counts, ``[n_groups, n_features, n_genes]``
    totals: Tensor  #: ``[n_sections, n_genes]``
    expressed: Tensor  #: spots of a section with any count, ``[n_sections, n_genes]``
    likelihood: Likelihood  #: of all sections


class Design:
    """All that fits of the same spots share: features are measured once, whatever is left out.

    ``max_memory``, in GiB, is beside the features as given, the counts and the result.
    """

    def __init__(
        self,
        data: Data,
        objective: str = "list",
        n_partners: int | None = None,
        *,
        seed: int = 0,
        max_memory: float = 4.0,
        dask: str | None = None,
        standardize: bool = True,
    ) -> None:
        if objective not in _OBJECTIVES:
            raise ValueError(f"objective must be one of {_OBJECTIVES}; got {objective!r}")
        if n_partners is not None and n_partners < 1:
            raise ValueError(f"n_partners must be at least 1, or None; got {n_partners}")
        if dask is not None and str(getattr(data.features, "device", "cpu")) != "cpu":
            raise ValueError("dask is for features in memory or on disk; X is on a GPU")
        self.data, self.objective, self.n_partners, self.seed = data, objective, n_partners, seed
        self.max_memory, self.dask, self.standardize = max_memory, dask, standardize
        self._genes = np.arange(data.counts.shape[1])
        # Of a negative binomial, until it is given: without any it is a list.
        self.dispersion = np.zeros(self.n_genes)
        self._budget = max_memory * 2**30
        self._geometry: dict[int | None, Geometry] = {}
        raw = self._stored_rows()
        self._unit = units_of(raw, standardize=standardize)
        if (self._unit != 1).any():
            raw = replace(raw, unit=self._unit)
        offset = torch.as_tensor(data.offset).to(raw.device)
        self.offset = [offset[raw.of(s)] for s in range(raw.n_sections)]
        self.moments = measure(raw, offset, data.group.tolist(), self._section_weight())
        self.rows = self._copied(replace(raw, centre=self.geometry(None).centre))
        self._n_threads = self._threads()
        self._room = self._genes_at_once()

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self._genes)

    @property
    def n_groups(self) -> int:
        """Number of groups that can be left out."""
        return len(self.moments)

    def _with(self, **changed: Any) -> Design:
        other = object.__new__(Design)
        other.__dict__.update(self.__dict__ | changed)
        return other

    def __getstate__(self) -> dict[str, Any]:
        """Pickle what workers need: no features besides the rows, axes but not what tells them."""
        groups = range(self.n_groups if self.n_groups > 1 else 0)
        geometry = {left_out: self.geometry(left_out) for left_out in (None, *groups)}
        state = self.__dict__ | {"_geometry": geometry, "moments": [None] * self.n_groups}
        return state | {"data": replace(self.data, features=None)}

    def geometry(self, left_out: int | None) -> Geometry:
        """Scale and axes of all groups but one."""
        if left_out not in self._geometry:
            kept = (m for g, m in enumerate(self.moments) if g != left_out)
            self._geometry[left_out] = Geometry.of(kept, self._unit, standardize=self.standardize)
        return self._geometry[left_out]

    def with_prior(self, roots: Mapping[int | None, Tensor]) -> Design:
        """Return the same with a prior of the weights along the axes, by what is left out."""
        return self._with(
            _geometry={g: self.geometry(g).with_prior(root) for g, root in roots.items()}
        )

    def with_dispersion(self, dispersion: ArrayLike) -> Design:
        """Return the same with dispersions of a negative binomial, one value or one a gene."""
        if self.objective != "nb":
            raise ValueError(f"dispersion is of objective 'nb'; {self.objective} has none")
        given = np.asarray(dispersion, dtype=np.float64)
        if given.shape not in ((), (self.n_genes,)):
            raise ValueError(
                f"dispersion must be one value, or one for each of {self.n_genes} genes; got shape "
                f"{given.shape}"
            )
        if not (np.isfinite(given).all() and (given >= 0).all()):
            raise ValueError("dispersion must not be negative, and must be finite")
        return self._with(dispersion=np.broadcast_to(given, self.n_genes))

    def of_genes(self, index: NDArray[np.intp]) -> Design:
        """Return the same with some of the genes."""
        return self._with(
            _genes=self._genes[index],
            dispersion=self.dispersion[index],
            gene_counts=self.gene_counts[index],
        )

    def each_block(
        self, work: Callable[[Block], _T], advance: Callable[[int], object] | None = None
    ) -> Iterator[_T]:
        """Do the work for all genes, in blocks that fit into memory; yields results in order."""
        n_genes = self.n_genes
        at_once = self._room if self.dask is None else min(self._room, _SENT_GENES)
        # Blocks of one size, and the same number for every thread.
        rounds = ceil(n_genes / (self._n_threads * at_once))
        width = ceil(n_genes / (self._n_threads * rounds))
        blocks = [slice(start, min(start + width, n_genes)) for start in range(0, n_genes, width)]
        # Genes are cut out of columns, and spots of rows.
        whole = len(blocks) == 1 and n_genes == self.data.counts.shape[1]
        call = partial(_of_block, self, work, whole)
        if self.dask is None or len(blocks) == 1:
            results = in_parallel(call, blocks, self._n_threads)
        else:
            results = on_workers(call, blocks, self.dask)
        for genes, result in zip(blocks, results, strict=True):
            yield result
            if advance is not None:
                advance(genes.stop - genes.start)

    def block(self, genes: slice, counts: Any) -> Block:
        """Sum up the counts of some genes, out of those of all, section by section."""
        index, rows = self._genes[genes], replace(self.rows, dtype=torch.float64)
        counts, shape = _genes_of(counts, index), (rows.n_sections, len(index))
        totals = torch.zeros(shape, dtype=torch.float64, device=rows.device)
        expressed = totals.clone()
        xtc = totals.new_zeros(self.n_groups, rows.n_features, len(index))
        for s, group in enumerate(self.data.group.tolist()):
            tile = dense(counts, rows, s)
            totals[s], expressed[s] = tile.sum(0), (tile > 0).sum(0)
            if rows.size(s) > 1:
                xtc[group] += rows.sums(rows.of(s), tile)
        likelihood = self._likelihood(genes, counts, totals)
        return Block(genes, counts, xtc, totals, expressed, likelihood)

    def training(
        self, block: Block, penalty: Tensor | float, left_out: int | None = None
    ) -> Problem:
        """State the problem of a block of genes, on all groups but one."""
        groups = [g for g in range(self.n_groups) if g != left_out]
        sections, geometry, rows = self._sections(groups), self.geometry(left_out), self.rows
        xtc = geometry.basis.T @ block.xtc[groups].sum(0)
        xtc *= not block.likelihood.has_counts
        counts = block.totals[sections].sum(0)
        pays = rows.wide or rows.bounds[-1] <= _SPOTS_PER_GENE * len(counts)
        rotated = rows.centre is None and pays
        if rotated:
            # Where there are few axes, in float64: it costs nothing.
            precise = torch.float64 if rows.wide else rows.dtype
            source = rows.source.to(precise) @ geometry.basis.to(precise)
            rows = replace(rows, source=source)
        return Problem(
            rows=rows,
            geometry=geometry,
            rotated=rotated,
            tiles=rows.tiles(sections),
            likelihood=block.likelihood,
            xtc=xtc,
            counts=counts,
            penalty=torch.as_tensor(penalty).to(xtc).expand(len(counts)),
            room=self._room,
        )

    def held_out(self, block: Block, training: Problem, left_out: int) -> Problem:
        """State the list likelihood of the group left out, along the axes of those in training."""
        sections = self._sections([left_out])
        return replace(
            training,
            tiles=training.rows.tiles(sections),
            likelihood=ListLikelihood(self.offset, block.totals),
            xtc=training.geometry.basis.T @ block.xtc[left_out],
            counts=block.totals[sections].sum(0),
            penalty=torch.zeros_like(training.penalty),
        )

    def _sections(self, groups: list[int]) -> list[int]:
        """Sections of some groups; one of a single spot has nothing to compare."""
        every = enumerate(self.data.group.tolist())
        return [s for s, group in every if group in groups and self.rows.size(s) > 1]

    def _likelihood(self, genes: slice, counts: Any, totals: Tensor) -> Likelihood:
        if self.objective == "list":
            return ListLikelihood(self.offset, totals)
        tiles = [dense(counts, self.rows, s) for s in range(self.rows.n_sections)]
        if self.objective == "nb":
            dispersion = torch.as_tensor(self.dispersion[genes].copy()).to(totals)
            return NegativeBinomialLikelihood(self.offset, totals, tiles, dispersion)
        return PairLikelihood.of(
            self.offset,
            tiles,
            n_partners=self.n_partners,
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _section_weight(self) -> list[float]:
        """Part of the counts that a section has of the average gene."""
        counts, bounds = self.data.counts, self.data.bounds
        rows = (slice(*pair) for pair in pairwise(bounds))
        # Sparse matrices of float32 would sum in it.
        totals = np.stack([np.ones(r.stop - r.start) @ counts[r] for r in rows])
        self.gene_counts = totals.sum(0)
        weight = totals @ (1 / np.maximum(self.gene_counts, 1.0))
        return (weight if weight.any() else np.ones_like(weight)).tolist()

    def _stored_rows(self) -> Rows:
        source = self.data.features
        # Features of half precision are stored so; products in it would lose the gradient.
        single = str(source.dtype).removeprefix("torch.") in ("float16", "bfloat16", "float32")
        dtype = torch.float32 if single else torch.float64
        block = max(1, int(_READ * self._budget) // (dtype.itemsize * source.shape[1]))
        return Rows(source, self.data.bounds, block=block, dtype=dtype)

    def _copied(self, rows: Rows) -> Rows:
        """Copy the features if they fit into memory; else they are read whenever needed."""
        if rows.n_bytes > _COPY * self._budget:
            return rows
        shape = rows.bounds[-1], rows.n_features
        source = torch.empty(shape, dtype=rows.dtype, device=rows.device)
        for block, features in rows.each_block(slice(0, shape[0])):
            source[block] = features
        return replace(rows, source=source, unit=None, centre=None)

    def _threads(self) -> int:
        """Give every thread a block of genes, if there are enough of both, and memory."""
        threads, rows = torch.get_num_threads(), self.rows
        # Each has a rotated copy of the features.
        copies = (1 + threads) * rows.n_bytes
        alone = rows.device.type != "cpu" or rows.centre is not None or self.dask is not None
        if alone or copies > 2 * _COPY * self._budget:
            return 1
        return max(1, min(threads, self.n_genes // _FEWEST_GENES))

    def _genes_at_once(self) -> int:
        """How many genes fit into the memory that copies of the features leave."""
        rows, n_groups = self.rows, self.n_groups
        n, p = rows.bounds[-1], rows.n_features
        longest = max(min(TILE, n), *(rows.size(s) for s in range(rows.n_sections)))
        n_axes = min(n, p)
        # Moments, axes and prior of each group that can be left out.
        held = (4 * n_groups + 6) * p * n_axes * 8
        # Copies of the features; or a block of them as it is read, and those of the last two.
        read = 16 * min(rows.block, longest) * p
        held += read if rows.centre is not None else (1 + self._n_threads) * rows.n_bytes
        # Numbers of 8 bytes that a gene needs: of the solver and its history, of its sums, and of
        # one section.
        numbers = n_axes * (2 * STEPS_KEPT + 18) + p * (n_groups + 3) + 6 * longest
        if self.objective != "list":
            numbers += n + 8 * longest
        width = int((self._budget - held) // (8 * numbers * self._n_threads))
        if width < 1:
            told = f"too little for {p} features and {longest} spots at once: a single gene"
            raise TooLittleMemory(self.max_memory, told, (held + 8 * numbers) / 2**30)
        return min(width, _MOST_GENES.get(rows.device.type, 8192))


def _of_block(design: Design, work: Callable[[Block], _T], whole: bool, genes: slice) -> _T:
    stored = design.data.counts if whole else design.data.by_gene
    return work(design.block(genes, stored))


@dataclass(frozen=True)
class _GenesOnDisk:
    """Some genes of all; those of a section are read whenever they are asked for."""

    counts: Any
    index: NDArray[np.intp]

    def __getitem__(self, spots: slice) -> sparse.csr_matrix:
        return self.counts[spots, self.index]


def _genes_of(counts: Any, index: NDArray[np.intp]) -> Any:
    """Cut genes out of all; those side by side by a slice, which is faster."""
    if not sparse.issparse(counts):
        return _GenesOnDisk(counts, index)
    beside = len(index) > 0 and index[-1] - index[0] == len(index) - 1
    genes = slice(int(index[0]), int(index[-1]) + 1) if beside else index
    return counts[:, genes].tocsr()


def dense(counts: Any, rows: Rows, section: int) -> Tensor:
    """Make the counts of a section dense, on the device of the rows."""
    return torch.as_tensor(np.asarray(counts[rows.of(section)].todense())).to(rows.device).double()


def few_threads(n_spots: int, n_features: int, n_genes: int) -> AbstractContextManager[object]:
    """Limit a small problem to one thread; the limit ends with the context.

    >>> before = torch.get_num_threads()
    >>> with few_threads(100, 20, 10):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    small = n_spots * n_features * n_genes < _WORTH_THREADS
    return _controller().limit(limits=1) if small else nullcontext()


@cache
def _controller() -> ThreadpoolController:
    """Find the libraries that have threads, which takes 5 ms."""
    return ThreadpoolController()


def in_parallel(
    work: Callable[[_Item], _T], items: Iterable[_Item], n_threads: int
) -> Iterator[_T]:
    """Yield the results of items in their order, each item on one thread.

    Threads that share a matrix product wait for each other at every one of them; threads with work
    of their own do not.

    >>> list(in_parallel(lambda x: x * x, [1, 2, 3], 2))
    [1, 4, 9]
    """
    if n_threads == 1:
        yield from map(work, items)
        return
    before, alone = torch.get_num_threads(), partial(torch.set_num_threads, 1)
    alone()
    try:
        with ThreadPoolExecutor(n_threads, initializer=alone) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(before)


# A fit turns to workers several times.
_say_once = cache(lambda text: print(text, file=sys.stderr))


def on_workers(work: Callable[[slice], _T], blocks: Iterable[slice], dask: str) -> Iterator[_T]:
    """Yield the results of blocks of genes in their order, each from a worker of Dask."""

    def lost(numbered: tuple[int, slice], _: str) -> Any:
        genes = numbered[1]
        raise InputError(
            f"workers were lost at a block of {genes.stop - genes.start} genes more than once "
            "(killed, or out of memory); start workers with more memory, or lower `max_memory`"
        )

    waiting: dict[int, _T] = {}
    expected, where = 0, Where(dask=dask)
    found = each(partial(_numbered, work), enumerate(blocks), where, say=_say_once, lost=lost)
    try:
        for number, result in found:
            waiting[number] = result
            while expected in waiting:
                yield waiting.pop(expected)
                expected += 1
    except OSError as error:
        raise InputError(
            f"{error.filename}: not within reach of a worker of Dask ({error.strerror}); put "
            "features on a disk that all workers see"
        ) from error


def _numbered(work: Callable[[slice], _T], numbered: tuple[int, slice]) -> tuple[int, _T]:
    number, genes = numbered
    return number, work(genes)
