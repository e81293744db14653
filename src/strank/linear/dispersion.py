r"""How far the counts of a gene vary beyond chance: :math:`\varphi` of a negative binomial.

The counts that a fit expects, :math:`\mu`, tell it by moments,

.. math:: \hat\varphi = \frac{\sum_i w_i ((c_i - \mu_i)^2 - \mu_i)}{\sum_i w_i \mu_i^2}, \qquad
    w_i = (1 + \varphi \mu_i)^{-2}

with the dispersion before in weights and fit, and none at first. It is 0 for Poisson counts, and
too high where the fit leaves out what could be learned. So it is where the search starts: of some
parts of it, groups left out have the choice, by their list likelihood, together with the penalty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from strank.linear.calibration import Choose
from strank.linear.design import Block, Design, dense
from strank.linear.objective import NegativeBinomialLikelihood, Problem
from strank.linear.penalty import DEFAULT_PENALTY, PenaltyChoice, best_of, choose_penalty
from strank.linear.solver import descend

# Parts of what the moments say; with a quarter, or with none, besides, scores were no better.
PARTS = (1.0, 0.5)
# Moments need no more.
_TURNS, _ENOUGH, _MOST = 3, 1e-4, 500


def choose_dispersion(
    design: Design,
    penalties: ArrayLike,
    choose: Choose,
    *,
    advance: Callable[[int], object] | None = None,
) -> tuple[Design, PenaltyChoice]:
    """Choose dispersion and penalty of each gene on groups left out; the design has the former.

    What the moments say is of all groups: a variance tells nothing of where the counts are.
    """
    most = by_moments(design, np.full(design.n_genes, DEFAULT_PENALTY))
    fits = (design.with_dispersion(part * most) for part in PARTS)
    choices = [choose_penalty(fit, penalties, choose, advance=advance) for fit in fits]
    choice, whose = best_of(choices, choose)
    return design.with_dispersion(np.asarray(PARTS)[whose] * most), choice


def by_moments(design: Design, penalty: NDArray[np.float64]) -> NDArray[np.float64]:
    """Dispersions by the moments of fits with this penalty, ``[n_genes]``."""
    return np.concatenate(list(design.each_block(partial(_moments, design, penalty))))


def _moments(design: Design, penalty: NDArray[np.float64], block: Block) -> NDArray[np.float64]:
    """Fit the genes of a block and see how far they vary, in turns; a list is the first fit."""
    problem = design.training(block, torch.as_tensor(penalty[block.genes].copy()))
    likelihood, axes = block.likelihood, torch.zeros_like(problem.xtc)
    assert isinstance(likelihood, NegativeBinomialLikelihood)
    for _ in range(_TURNS):
        axes = descend(problem, axes, tolerance=_ENOUGH, max_iterations=_MOST).axes
        likelihood = replace(likelihood, dispersion=_seen(block, problem, likelihood, axes))
        problem = replace(problem, likelihood=likelihood)
    return likelihood.dispersion.cpu().numpy()


def _seen(
    block: Block, problem: Problem, likelihood: NegativeBinomialLikelihood, axes: Tensor
) -> Tensor:
    """How far the counts are from those expected, beyond chance, ``[n_genes]``."""
    beyond, squares = torch.zeros_like(likelihood.totals[:1]).repeat(2, 1)
    weights, phi = problem.row_weights(axes), likelihood.dispersion
    for s in (s for tile in problem.tiles for s in tile):
        counts = dense(block.counts, problem.rows, s)
        scores = problem.rows.times(problem.rows.of(s), weights)
        likelihood.section(s, scores)
        # (mu - c) / (1 + phi mu) by now: mu from that.
        expected = (counts + scores) / (1 - phi * scores)
        weight = (1 + phi * expected) ** -2
        beyond += (scores**2 - weight * expected).sum(0)
        squares += (weight * expected**2).sum(0)
    return beyond.clamp(min=0) / squares.clamp(min=1e-300)
