r"""The likelihoods of a section's counts, and the penalised objective of a linear head.

In plain words, for one gene with counts ``c`` and weights ``w`` of the features ``X``::

    value = penalty / 2 * w @ w - c @ (X @ w)
    for s in sections:
        value += c[s].sum() * logsumexp(X[s] @ w + offset[s])

Below, the same for a block of genes at once, along axes in which the problem is nearly diagonal. A
likelihood is a function of the scores of one section: the normaliser :math:`A(r)` in
:math:`-\sum_i c_i r_i + A(r)`, and its gradient, the counts expected. Observed counts enter the
linear part only through :math:`X^\top c`, which is computed once. (Of a negative binomial the two
would cancel to the last digits where counts are large, so that one is of both together.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.linalg import vecdot

from strank.linear.data import Rows
from strank.linear.geometry import Geometry

# Below it a negative binomial is a Poisson distribution to the last digits.
_LEAST_DISPERSION = 1e-12
# Logarithm of rates, beside the largest, that are told apart: products of two do not overflow.
_LOWEST = -60.0
_LEVEL_STEPS = 100


class Likelihood(Protocol):
    """What the solver needs of the counts of a block of genes."""

    @property
    def information(self) -> float | Tensor:
        """Curvature relative to a list of the same counts, of all genes or ``[n_genes]``."""

    @property
    def has_counts(self) -> bool:
        """Whether its sections have the counts there, too, that enter the others linearly."""

    def section(self, section: int, scores: Tensor) -> Tensor:
        """Normaliser ``[n_genes]``, in float64; turns the scores into expected counts in place.

        Where it has the counts there, too: loss, and its gradient.
        """

    def genes(self, index: Tensor) -> Self:
        """Keep some of the genes."""


@dataclass(frozen=True)
class ListLikelihood:
    r"""Multinomial: :math:`A_s = T_s \log \sum_{i \in s} l_i e^{r_i}`."""

    offset: Sequence[Tensor]  #: log library size, by section
    totals: Tensor  #: :math:`T_s`, ``[n_sections, n_genes]``
    information, has_counts = 1.0, False

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
    """

    offset: Sequence[Tensor]  #: log library size, by section
    counts: Sequence[Tensor]  #: ``[n_spots of it, n_genes]``, by section
    circle: Sequence[Tensor]  #: order of the spots, by section
    shifts: Sequence[Sequence[int]]  #: places between the spots of a pair, by section
    # Where two spots have the same rate, a pair tells half of what a list tells of a count.
    information, has_counts = 0.5, False

    @classmethod
    def of(
        cls,
        offset: Sequence[Tensor],
        counts: Sequence[Tensor],
        *,
        n_partners: int | None,
        generator: torch.Generator,
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
class NegativeBinomialLikelihood:
    r"""Negative binomial of variance :math:`\mu + \varphi \mu^2`, at the level of most likelihood.

    .. math:: L_s = \min_a \sum_{i \in s} \left[ (c_i + 1/\varphi) \log(1 + \varphi l_i e^{r_i + a})
        - c_i (r_i + a) \right] - T_s (1 - \log T_s)

    with a level :math:`a` of its own for each section and gene: convex, and as :math:`\varphi`
    goes to 0 that of a list.
    """

    offset: Sequence[Tensor]  #: log library size, by section
    totals: Tensor  #: :math:`T_s`, ``[n_sections, n_genes]``
    counts: Sequence[Tensor]  #: ``[n_spots of it, n_genes]``, by section
    dispersion: Tensor  #: :math:`\varphi`, ``[n_genes]``
    has_counts = True

    @property
    def information(self) -> Tensor:
        """Curvature relative to a list, as if all spots of a section had the same rate."""
        sizes = self.totals.new_tensor([len(counts) for counts in self.counts])
        told = self.totals / (1 + self.dispersion * self.totals / sizes[:, None])
        return told.sum(0) / self.totals.sum(0).clamp(min=1e-300)

    def section(self, section: int, scores: Tensor) -> Tensor:
        """Return the loss of a section; its scores become what it changes by."""
        observed, total = self.counts[section].to(scores.dtype), self.totals[section]
        value = -(observed * scores).sum(0, dtype=torch.float64)
        scores += self.offset[section].to(scores.dtype)[:, None]
        largest, phi = scores.amax(0), self.dispersion.clamp(min=_LEAST_DISPERSION)
        rates = scores.sub_(largest).clamp_(min=_LOWEST).exp_()
        times, scaled = phi.to(scores.dtype), observed * phi.to(scores.dtype)
        inverse = _inverse_level(rates, scaled, phi * total)
        rates /= inverse
        value += (rates.log1p() * (scaled + 1)).sum(0, dtype=torch.float64) / phi
        # (mu - c) / (1 + phi mu): what is expected less what is there would cancel to it.
        torch.div(rates - scaled, (rates + 1) * times, out=scores)
        level = -(inverse * phi).log() - largest
        return value - torch.where(total > 0, total * (level + 1 - total.log()), 0.0)

    def genes(self, index: Tensor) -> Self:
        """Keep some of the genes."""
        counts = [counts[:, index] for counts in self.counts]
        totals, dispersion = self.totals[:, index], self.dispersion[index]
        return replace(self, totals=totals, counts=counts, dispersion=dispersion)


def _inverse_level(rates: Tensor, counts: Tensor, total: Tensor) -> Tensor:
    r"""Solve :math:`\sum_i (1 + c_i) \frac{w_i}{w_i + u} = T` for :math:`u`, all times dispersion.

    The inverse of the left side is concave and rises, nearly straight, in :math:`u`: Newton's
    steps on it come from below after the first, whatever the rates. Without counts it is infinite.
    """
    none = total <= 0
    total = torch.where(none, 1.0, total).to(rates.dtype)
    inverse, weighted = rates.sum(0) / total, rates * (1 + counts)
    near = torch.finfo(rates.dtype).eps ** 0.5
    for _ in range(_LEVEL_STEPS):
        shrunk = (rates + inverse).reciprocal_()
        # Of the left side less the right, and what it falls by as the logarithm of u rises.
        excess = vecdot(rates - counts * inverse, shrunk, dim=0)
        fall = inverse * vecdot(weighted * shrunk, shrunk, dim=0)
        step = torch.where(none, 0.0, ((1 + excess / total) * excess / fall).clamp(min=-0.9))
        inverse = inverse * (1 + step)
        # The next step would be as the square of this one.
        if not (step.abs() > near).any():
            break
    return torch.where(none, torch.inf, inverse)


@dataclass(frozen=True)
class Problem:
    r"""The penalised objective of some genes, as a function of weights along the axes.

    .. math:: F_g(u) = -(X^\top c_g)^\top B u + \sum_s A_{sg}(X_s B u)
        + \tfrac{\lambda_g}{2} \lVert u \rVert^2
    """

    rows: Rows  #: features
    geometry: Geometry  #: :math:`B` is its basis
    rotated: bool  #: whether the rows are along the axes already, :math:`XB`
    tiles: Sequence[range]  #: sections that take part, small ones multiplied together
    likelihood: Likelihood
    xtc: Tensor  #: :math:`B^\top X^\top c` over these sections, ``[n_axes, n_genes]``
    counts: Tensor  #: of each gene in these sections, ``[n_genes]``
    penalty: Tensor  #: :math:`\lambda_g`, ``[n_genes]``
    room: int  #: for how many genes there is memory

    @property
    def told(self) -> Tensor:
        """As many counts of a list as tell what the counts of each gene do, ``[n_genes]``."""
        return self.likelihood.information * self.counts

    def genes(self, index: Tensor) -> Problem:
        """Keep some of the genes."""
        return replace(
            self,
            likelihood=self.likelihood.genes(index),
            xtc=self.xtc[:, index],
            counts=self.counts[index],
            penalty=self.penalty[index],
        )

    def row_weights(self, axes: Tensor) -> Tensor:
        """Weights by which the rows are multiplied, from those along the axes."""
        return (axes if self.rotated else self.geometry.basis @ axes).to(self.rows.dtype)


def value_and_gradient(problem: Problem, axes: Tensor) -> tuple[Tensor, Tensor]:
    """Objective ``[n_genes]`` and its gradient at weights along the axes, in float64.

    Two products of the features with one column a gene, in the precision of the rows; sums over
    sections are in float64.
    """
    rows, weights = problem.rows, problem.row_weights(axes)
    value = (axes * (0.5 * problem.penalty * axes - problem.xtc)).sum(0)
    gradient = torch.zeros(weights.shape, dtype=torch.float64, device=weights.device)
    for tile in problem.tiles:
        first, spots = rows.bounds[tile.start], rows.of(tile)
        scores = rows.times(spots, weights)
        for s in tile:
            part = rows.of(s)
            value += problem.likelihood.section(s, scores[part.start - first : part.stop - first])
        # By now the scores have become what the loss changes by.
        gradient += rows.sums(spots, scores)
    gradient = gradient if problem.rotated else problem.geometry.basis.T @ gradient
    return value, gradient.add_(problem.penalty * axes).sub_(problem.xtc)


def along(
    problem: Problem, axes: Tensor, times: Sequence[float | Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Objective at so many times the weights, and its derivative in that, ``[n_genes]`` each.

    Scores of all are those of the weights, times a number: a single product.
    """
    rows, weights = problem.rows, problem.row_weights(axes)
    linear, square = (axes * problem.xtc).sum(0), problem.penalty * (axes * axes).sum(0)
    found = [(t * (0.5 * t * square - linear), t * square - linear) for t in times]
    for tile in problem.tiles:
        first, spots = rows.bounds[tile.start], rows.of(tile)
        scores = rows.times(spots, weights)
        for s in tile:
            part = scores[rows.of(s).start - first : rows.of(s).stop - first]
            for (value, slope), t in zip(found, times, strict=True):
                changed = part * torch.as_tensor(t).to(part)
                value += problem.likelihood.section(s, changed)
                slope += (changed.mul_(part)).sum(0, dtype=torch.float64)
    return found
