r"""The likelihoods of a section's counts, and the penalised objective of a linear head.

Each likelihood is a function of the scores of one section, for a block of genes at once: the
normaliser :math:`A(r)` in :math:`-\sum_i c_i r_i + A(r)`, and its gradient, the counts expected.
Observed counts enter the linear part only through :math:`X^\top c`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from strank.linear.data import Data, Rows

# Spots of small sections that are multiplied together.
TILE = 1024

# Genes at a time: counts and scores of a section are dense for so many.
_GENES = 256


class Likelihood(Protocol):
    """What the solver needs of the counts of a block of genes."""

    @property
    def information(self) -> float:
        """Curvature relative to a list of the same counts."""

    def section(self, section: int, scores: Tensor) -> Tensor:
        """Normaliser ``[n_genes]`` (float64); turns the scores into expected counts in place."""

    def genes(self, index: Tensor) -> Self:
        """Keep some of the genes."""


@dataclass(frozen=True)
class ListLikelihood:
    r"""Multinomial: :math:`A_s = T_s \log \sum_{i \in s} l_i e^{r_i}`.

    Attributes
    ----------
    offset
        Log library size, by section.
    totals
        Counts of a gene in a section :math:`T_s`, ``[n_sections, n_genes]``.
    """

    offset: Sequence[Tensor]
    totals: Tensor
    information = 1.0

    def section(self, section: int, scores: Tensor) -> Tensor:
        """Return the normaliser of a section; its scores become expected counts."""
        scores += self.offset[section].to(scores.dtype)[:, None]
        largest = scores.amax(0)
        scores.sub_(largest).exp_()
        total, counts = scores.sum(0, dtype=torch.float64), self.totals[section]
        scores *= (counts / total).to(scores.dtype)
        return counts * (total.log() + largest)

    def genes(self, index: Tensor) -> Self:
        """Keep some of the genes."""
        return replace(self, totals=self.totals[:, index])


@dataclass(frozen=True)
class PairLikelihood:
    r"""Binomial of pairs of spots, every spot in the same number :math:`m_s` of pairs.

    .. math:: A_s = \frac{1}{m_s} \sum_{(i,j)} (c_i + c_j) \log (l_i e^{r_i} + l_j e^{r_j})

    so a count weighs as much as in a list. Pairs are the spots of a circle and those some places
    further; with all shifts up to half of the circle these are all pairs of the section.

    Attributes
    ----------
    offset
        Log library size, by section.
    counts
        ``[n_spots of it, n_genes]``, by section.
    circle
        Order of the spots, by section.
    shifts
        Places between the spots of a pair, by section.
    """

    offset: Sequence[Tensor]
    counts: Sequence[Tensor]
    circle: Sequence[Tensor]
    shifts: Sequence[Sequence[int]]
    # Where two spots have the same rate, a pair tells half of what a list tells of a count.
    information = 0.5

    @classmethod
    def of(
        cls,
        offset: Sequence[Tensor],
        counts: Sequence[Tensor],
        *,
        n_partners: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Take all pairs, or draw about ``n_partners`` for each spot (all where fewer are left).

        Circle and shifts are drawn at random, so every pair of a section is equally likely, and
        every spot is in the same number of pairs.
        """
        circle, shifts = [], []
        for tile in counts:
            n = len(tile)
            every = torch.arange(1, n // 2 + 1)
            order = torch.arange(n)
            if n_partners is not None and n_partners < n - 1:
                order = torch.randperm(n, generator=generator)
                drawn = torch.randperm((n - 1) // 2, generator=generator)
                every = 1 + drawn[: (n_partners + 1) // 2]
            circle.append(order.to(tile.device))
            shifts.append(every.tolist())
        return cls(offset, counts, circle, shifts)

    def section(self, section: int, scores: Tensor) -> Tensor:
        """Return the normaliser of a section; its scores become expected counts."""
        order, n = self.circle[section], len(scores)
        logits = (scores + self.offset[section].to(scores.dtype)[:, None])[order]
        counts = self.counts[section].to(scores.dtype)[order]
        value = counts.new_zeros(counts.shape[1], dtype=torch.float64)
        expected, compared = torch.zeros_like(logits), 0.0
        for shift in self.shifts[section]:
            # Half of the way around, a circle of even length has every pair twice.
            weight = 0.5 if 2 * shift == n else 1.0
            compared += 2 * weight
            difference = logits - logits.roll(-shift, 0)
            pooled = (counts + counts.roll(-shift, 0)).mul_(weight)
            first = difference.sigmoid().mul_(pooled)
            expected += first
            expected += (pooled - first).roll(shift, 0)
            # log(e^a + e^b) = b + max(a - b, 0) + log(1 + e^-|a - b|)
            excess = difference.clamp(min=0).add_(difference.abs_().neg_().exp_().add_(1).log_())
            value += excess.add_(logits.roll(-shift, 0)).mul_(pooled).sum(0, dtype=torch.float64)
        scores[order] = expected / compared
        return value / compared

    def genes(self, index: Tensor) -> Self:
        """Keep some of the genes."""
        return replace(self, counts=[counts[:, index] for counts in self.counts])


@dataclass(frozen=True)
class Sums:
    """What is known of the counts of a block of genes, by group and by section.

    Attributes
    ----------
    xtc
        Features summed over counts, ``[n_groups, n_features, n_genes]``; sections of one spot,
        which say nothing about the order of spots, are left out.
    totals
        Counts of a gene in a section, ``[n_sections, n_genes]``.
    expressed
        Spots of a section with any count of the gene, ``[n_sections, n_genes]``.
    """

    xtc: Tensor
    totals: Tensor
    expressed: Tensor

    @classmethod
    def of(cls, rows: Rows, counts: sparse.csr_matrix, group: Sequence[int]) -> Sums:
        """Read rows and counts of some genes once; counts become dense section by section."""
        rows, n_genes = rows.in_precision(torch.float64), counts.shape[1]
        zeros = torch.zeros(rows.n_sections, n_genes, dtype=torch.float64, device=rows.device)
        xtc = zeros.new_zeros(max(group) + 1, rows.n_features, n_genes)
        sums = cls(xtc, zeros, zeros.clone())
        for s in range(rows.n_sections):
            tile = dense(counts, rows, s)
            sums.totals[s], sums.expressed[s] = tile.sum(0), (tile > 0).sum(0)
            if rows.size(s) > 1:
                xtc[group[s]] += rows.sums(rows.of(s), tile)
        return sums


def dense(counts: sparse.csr_matrix, rows: Rows, section: int) -> Tensor:
    """Make the counts of a section dense, on the device of the rows."""
    return torch.as_tensor(np.asarray(counts[rows.of(section)].todense())).to(rows.device).double()


@dataclass(frozen=True)
class Problem:
    r"""The penalised objective of some genes, as a function of weights along the axes.

    .. math:: F_g(u) = -(X^\top c_g)^\top B u + \sum_s A_{sg}(X_s B u)
        + \tfrac{\lambda_g}{2} \lVert u \rVert^2

    Attributes
    ----------
    rows
        Features.
    basis
        :math:`B`, ``[n_features, n_axes]``; ``None`` if the features are rotated already.
    tiles
        Sections that take part; those of a tile lie side by side, and are multiplied together.
    likelihood
        Of the counts.
    xtc
        :math:`B^\top X^\top c` over these sections, ``[n_axes, n_genes]``.
    counts
        Of each gene in these sections, ``[n_genes]``.
    penalty
        :math:`\lambda_g`, ``[n_genes]``.
    variances
        Of the features along the axes within sections, ``[n_axes]``.
    room
        For how many genes there is memory.
    """

    rows: Rows
    basis: Tensor | None
    tiles: Sequence[range]
    likelihood: Likelihood
    xtc: Tensor
    counts: Tensor
    penalty: Tensor
    variances: Tensor
    room: int

    def genes(self, index: Tensor) -> Problem:
        """Keep some of the genes."""
        return replace(
            self,
            likelihood=self.likelihood.genes(index),
            xtc=self.xtc[:, index],
            counts=self.counts[index],
            penalty=self.penalty[index],
        )


def tiles(rows: Rows, sections: Sequence[int]) -> list[range]:
    """Put sections side by side together, as long as they are small.

    Examples
    --------
    >>> tiles(Rows(np.zeros((5000, 1)), (0, 600, 900, 1500, 5000)), [0, 1, 2, 3])
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    found: list[range] = []
    for s in sections:
        joined = range(found[-1].start, s + 1) if found and found[-1].stop == s else range(s, s + 1)
        if found and joined.start < s and rows.bounds[s + 1] - rows.bounds[joined.start] <= TILE:
            found[-1] = joined
        else:
            found.append(range(s, s + 1))
    return found


def evaluate(problem: Problem, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Objective ``[n_genes]`` and its gradient at weights along the axes, in float64.

    Two products of the features with one column a gene, in the precision of the rows; sums over
    tiles are in float64.
    """
    rows, basis = problem.rows, problem.basis
    weights = (axes if basis is None else basis @ axes).to(rows.dtype)
    value = (axes * (0.5 * problem.penalty * axes - problem.xtc)).sum(0)
    gradient = torch.zeros(weights.shape, dtype=torch.float64, device=weights.device)
    for tile in problem.tiles:
        first, spots = rows.bounds[tile.start], rows.of(tile)
        scores = rows.times(spots, weights)
        for s in tile:
            part = rows.of(s)
            value += problem.likelihood.section(s, scores[part.start - first : part.stop - first])
        gradient += rows.sums(spots, scores)
    gradient = gradient if basis is None else basis.T @ gradient
    return value, gradient.add_(problem.penalty * axes).sub_(problem.xtc)


def deviance_explained(rows: Rows, data: Data, weights: Tensor) -> NDArray[np.float64]:
    r"""Share of the list deviance that linear scores explain, ``[n_genes]``.

    .. math:: 1 - \frac{L(r) - L^*}{L(0) - L^*}

    with the list loss :math:`L` of the scores, of no scores (library size alone), and of the
    shares as they were observed. NaN where the counts of a gene are shared by library size.

    Parameters
    ----------
    rows
        Features, centred as for the weights.
    data
        Counts, sections and offsets.
    weights
        ``[n_features, n_genes]``.
    """
    by_gene, parts = data.counts.tocsc(), []
    offset = torch.as_tensor(data.offset).to(rows.device)
    for start in range(0, weights.shape[1], _GENES):
        genes = slice(start, start + _GENES)
        counts = by_gene[:, genes].tocsr()
        model, none = torch.zeros(2, counts.shape[1], dtype=torch.float64, device=rows.device)
        for s in range(rows.n_sections):
            scores = rows.times(rows.of(s), weights[:, genes])
            of_model, of_none = _losses(scores, dense(counts, rows, s), offset[rows.of(s)])
            model += of_model
            none += of_none
        parts.append(torch.where(none > 1e-9, 1 - model / none, torch.nan).cpu().numpy())
    return np.concatenate(parts)


def _losses(scores: Tensor, counts: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """List loss of a section above that of the observed shares: of the scores, and of none."""
    total = counts.sum(0)
    observed = torch.xlogy(counts, counts).sum(0) - torch.xlogy(total, total) - offset @ counts
    model = total * (scores + offset[:, None]).logsumexp(0) - (scores * counts).sum(0)
    return model + observed, total * offset.logsumexp(0) + observed
