"""A block of genes on a training set: what the solver is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import sparse
from torch import Tensor

from strank.linear.geometry import Geometry
from strank.linear.objective import Likelihood, ListLikelihood, Problem, Sums, tiles
from strank.linear.rows import Rows

__all__ = ["Block", "Fold"]


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
