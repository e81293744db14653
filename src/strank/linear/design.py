"""Training sets of the solver: sections, blocks of genes, and the memory they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from math import ceil
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from strank.linear.data import Data, Rows
from strank.linear.geometry import Geometry, measure
from strank.linear.objective import (
    TILE,
    Likelihood,
    ListLikelihood,
    PairLikelihood,
    Problem,
    Sums,
    dense,
    tiles,
)
from strank.linear.solver import HISTORY
from strank.linear.threads import in_parallel

Objective = Literal["list", "pair"]
Result = TypeVar("Result")
# More genes at a time bring nothing: the products are as fast as they get.
_MOST_GENES = {"cpu": 1024, "cuda": 8192}

# Fewer are not worth a thread.
_FEWEST_GENES = 128

# Two copies of the features may take this part of the memory each; a block of rows, that.
_COPY, _READ = 0.3, 0.02

# Rotating the features pays when at least a gene is fitted for so many spots.
_SPOTS_PER_GENE = 20


@dataclass(frozen=True)
class Block:
    """Genes that are fitted together.

    Attributes
    ----------
    genes
        Columns of the counts.
    counts
        Of these genes, CSR.
    sums
        Their sums over spots.
    likelihood
        Of all sections.
    """

    genes: slice
    counts: sparse.csr_matrix
    sums: Sums
    likelihood: Likelihood


@dataclass(frozen=True)
class Fold:
    """A training set: all groups of sections but one, or all.

    Attributes
    ----------
    rows, basis
        Features, and what turns weights along the axes into weights of them (``None`` where the
        features are rotated).
    geometry
        Of the training groups.
    group
        Of each section.
    left_out
        The group that does not take part, if any.
    room
        For how many genes there is memory.
    """

    rows: Rows
    basis: Tensor | None
    geometry: Geometry
    group: Sequence[int]
    left_out: int | None
    room: int

    def training(self, block: Block, penalty: Tensor | float) -> Problem:
        """Objective of a block of genes on the training groups."""
        groups = [g for g in range(len(block.sums.xtc)) if g != self.left_out]
        return self._problem(block, penalty, groups, block.likelihood)

    def held_out(self, block: Block, offset: Sequence[Tensor]) -> Problem:
        """List likelihood of the group that is left out, without a penalty."""
        groups = [g for g in range(len(block.sums.xtc)) if g == self.left_out]
        return self._problem(block, 0.0, groups, ListLikelihood(offset, block.sums.totals))

    def _problem(
        self, block: Block, penalty: Tensor | float, groups: list[int], likelihood: Likelihood
    ) -> Problem:
        # A section of one spot has nothing to compare; `Sums` leaves it out as well.
        sections = [s for s, g in enumerate(self.group) if g in groups and self.rows.size(s) > 1]
        sums, geometry = block.sums, self.geometry
        xtc = geometry.basis.T @ sums.xtc[groups].sum(0)
        counts = sums.totals[sections].sum(0)
        return Problem(
            rows=self.rows,
            basis=self.basis,
            tiles=tiles(self.rows, sections),
            likelihood=likelihood,
            xtc=xtc,
            counts=counts,
            penalty=torch.as_tensor(penalty).to(xtc).expand(len(counts)),
            variances=geometry.variances,
            room=self.room,
        )


@dataclass(frozen=True)
class Plan:
    """What is minimised, and with how much memory.

    Attributes
    ----------
    objective
        ``"list"`` or ``"pair"``.
    n_partners
        For pairs: with how many others of its section a spot is compared (rounded up to an even
        number); all if ``None``.
    seed
        Of the draw of partners.
    max_memory
        In GiB, beside the features as given, the counts and the result.
    standardize
        Whether the penalty is on weights of standardised features.
    """

    objective: Objective = "list"
    n_partners: int | None = None
    seed: int = 0
    max_memory: float = 4.0
    standardize: bool = True

    def check(self) -> None:
        """Refuse what cannot be minimised."""
        if self.objective not in get_args(Objective):
            raise ValueError(
                f"objective must be one of {get_args(Objective)}; got {self.objective!r}"
            )
        if self.n_partners is not None and self.n_partners < 1:
            raise ValueError(f"n_partners must be at least 1, or None; got {self.n_partners}")


class Design:
    """All that fits of the same spots share: features are measured once, whatever is left out.

    Parameters
    ----------
    data
        Spots.
    plan
        Objective and memory.

    Raises
    ------
    ValueError
        For an unknown objective, features that are not finite, or memory that is too little for
        a single gene.
    """

    def __init__(self, data: Data, plan: Plan) -> None:
        plan.check()
        self.data, self.plan, self.group = data, plan, data.group.tolist()
        self._geometry: dict[int | None, Geometry] = {}
        self._roots: Mapping[int | None, Tensor] = {}
        self._counts = data.counts
        raw = self._stored_rows()
        offset = torch.as_tensor(data.offset).to(raw.device)
        self.offset = [offset[raw.of(s)] for s in range(raw.n_sections)]
        self.moments = measure(raw, offset, self.group, self._section_weight())
        self.rows = self._centred(raw, self.geometry(None).centre)
        self._n_threads = self._threads()
        self._room = self._genes_at_once()

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return int(self._counts.shape[1])

    def geometry(self, left_out: int | None) -> Geometry:
        """Scale and axes of all groups but one."""
        if left_out not in self._geometry:
            kept = (m for g, m in enumerate(self.moments) if g != left_out)
            self._geometry[left_out] = Geometry.of(
                kept, standardize=self.plan.standardize, root=self._roots.get(left_out)
            )
        return self._geometry[left_out]

    def with_prior(self, roots: Mapping[int | None, Tensor]) -> Design:
        """Return the same with a prior of the weights, by what is left out."""
        other = copy(self)
        other._roots, other._geometry = roots, {}
        return other

    def of_genes(self, index: NDArray[np.intp]) -> Design:
        """Return the same with some of the genes."""
        other = copy(self)
        other._counts = self._counts[:, index]
        return other

    def fold(self, left_out: int | None, n_genes: int) -> Fold:
        """Set up the features for fitting so many genes on all groups but one."""
        geometry, rows = self.geometry(left_out), self.rows
        basis: Tensor | None = geometry.basis
        if rows.centre is None and len(self.data.offset) <= _SPOTS_PER_GENE * n_genes:
            rows, basis = rows.of_source(rows.source @ geometry.basis.to(rows.dtype)), None
        return Fold(rows, basis, geometry, self.group, left_out, self._room)

    def each_block(self, work: Callable[[Block], Result]) -> Iterator[Result]:
        """Do the work for all genes, in blocks that fit into memory; yields results in order."""
        n_genes = self.n_genes
        # Blocks of one size, and the same number for every thread.
        rounds = ceil(n_genes / (self._n_threads * self._room))
        width = ceil(n_genes / (self._n_threads * rounds))
        blocks = [slice(start, min(start + width, n_genes)) for start in range(0, n_genes, width)]
        # Genes are cut out of columns, and spots of rows.
        stored = self._counts.tocsc() if len(blocks) > 1 else self._counts
        each = lambda genes: work(self.block(genes, stored))  # noqa: E731
        return in_parallel(each, blocks, self._n_threads)

    def block(self, genes: slice, counts: sparse.spmatrix) -> Block:
        """Sum up the counts of some genes, out of those of all."""
        counts = counts[:, genes].tocsr()
        sums = Sums.of(self.rows, counts, self.group)
        return Block(genes, counts, sums, self._likelihood(counts, sums))

    def _likelihood(self, counts: sparse.csr_matrix, sums: Sums) -> Likelihood:
        if self.plan.objective == "list":
            return ListLikelihood(self.offset, sums.totals)
        return PairLikelihood.of(
            self.offset,
            [dense(counts, self.rows, s) for s in range(self.rows.n_sections)],
            n_partners=self.plan.n_partners,
            generator=torch.Generator().manual_seed(self.plan.seed),
        )

    def _section_weight(self) -> list[float]:
        """Part of the counts that a section has of the average gene."""
        n_sections = len(self.data.bounds) - 1
        codes = self.data.section
        member = sparse.csr_matrix((np.ones(len(codes)), (codes, np.arange(len(codes)))))
        totals = (member @ self._counts).tocsc()
        genes = np.maximum(np.asarray(totals.sum(0)).ravel(), 1.0)
        weight = np.asarray(totals @ (1 / genes)).ravel()
        return (weight if weight.any() else np.ones(n_sections)).tolist()

    def _stored_rows(self) -> Rows:
        source = self.data.features
        single = str(source.dtype).removeprefix("torch.") in ("float16", "bfloat16", "float32")
        block = max(1, int(_READ * self._budget) // (8 * source.shape[1]))
        dtype = torch.float32 if single else torch.float64
        return Rows(source, self.data.bounds, block=block, dtype=dtype)

    def _centred(self, raw: Rows, centre: Tensor) -> Rows:
        """Copy the features if they fit into memory, or centre them whenever they are read."""
        if self._bytes(raw) > _COPY * self._budget:
            return raw.of_source(raw.source, centre=centre)
        blocks = [block for _, block in raw.each_block(slice(0, raw.bounds[-1]))]
        return raw.of_source(torch.cat(blocks).sub_(centre.to(raw.dtype)))

    @property
    def _budget(self) -> float:
        return self.plan.max_memory * 2**30

    @staticmethod
    def _bytes(rows: Rows) -> int:
        return rows.bounds[-1] * rows.n_features * rows.dtype.itemsize

    def _threads(self) -> int:
        """Give every thread a block of genes, if there are enough of both, and memory."""
        threads, rows = torch.get_num_threads(), self.rows
        copies = (1 + threads) * self._bytes(rows)
        alone = rows.device.type != "cpu" or rows.centre is not None
        if alone or copies > 2 * _COPY * self._budget:
            return 1
        return max(1, min(threads, self.n_genes // _FEWEST_GENES))

    def _genes_at_once(self) -> int:
        """How many genes fit into the memory that copies of the features leave."""
        rows, n_groups = self.rows, len(self.moments)
        n, p = len(self.data.offset), rows.n_features
        longest = max(min(TILE, n), *(rows.size(s) for s in range(rows.n_sections)))
        # Moments, axes and prior of each group that can be left out.
        held = (4 * n_groups + 6) * p * p * 8
        if rows.centre is None:
            held += (1 + self._n_threads) * self._bytes(rows)
        # Numbers of 8 bytes that a gene needs: of the solver, whose history is there twice while
        # genes leave it, of its sums, and of one section.
        each = p * (4 * HISTORY + 16) + p * (n_groups + 3) + 6 * longest
        if self.plan.objective == "pair":
            each += n + 8 * longest
        width = int((self._budget - held) // (8 * each * self._n_threads))
        if width < 1:
            needed = (held + 8 * each) / 2**30
            raise ValueError(
                f"max_memory={self.plan.max_memory:g} GiB is too little for {p} features and "
                f"{longest} spots at once: a single gene needs {needed:.2g} GiB"
            )
        return min(width, _MOST_GENES.get(rows.device.type, 8192))
