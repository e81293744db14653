r"""The exact fit of all genes, for given penalties.

For each gene :math:`g`, independently,

.. math::
    F_g(w) = -\sum_i c_{ig}\, x_i^\top w + \sum_s T_{sg} \log \sum_{i \in s} l_i e^{x_i^\top w}
    + \tfrac{\lambda_g}{2} \lVert w \rVert^2 .
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strank.linear.design import Design
from strank.linear.fold import Block
from strank.linear.objective import Problem, dense
from strank.linear.solution import Solution, Status
from strank.linear.solver import Optimum, minimise

__all__ = ["fit_genes"]

# Without a penalty, spots without counts that keep less than this part of their share of the
# depth are on their way to minus infinity.
_VANISHING = 1e-3


def fit_genes(
    design: Design,
    penalty: NDArray[np.float64],
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 500,
    advance: Callable[[int], object] = lambda n_genes: None,
) -> Solution:
    r"""Find the optimum of every gene on all sections.

    Parameters
    ----------
    design
        Spots, objective and memory.
    penalty
        :math:`\lambda_g` in counts, ``[n_genes]``, not negative. At 0, features that do not vary
        within any section get weight 0.
    tolerance
        A gene is converged when the norm of its gradient is at most this share of its counts:
        how far, in standard deviations, the mean features that the scores predict still are from
        those that the counts have.
    max_iterations
        Most evaluations a gene, in each precision.
    advance
        Called with the number of genes done since the last call.

    Returns
    -------
    Solution
        Gradients and bounds in it are measured in float64, whatever the precision of the features.

    Raises
    ------
    ValueError
        For a penalty that is negative or not finite.
    """
    if not (np.isfinite(penalty).all() and (penalty >= 0).all()):
        raise ValueError("penalty must not be negative, and must be finite")

    def fit(block: Block) -> Solution:
        fold = design.fold(None, block.genes.stop - block.genes.start)
        problem = fold.training(block, torch.as_tensor(penalty[block.genes].copy()))
        optimum = minimise(problem, tolerance=tolerance, max_iterations=max_iterations)
        return _solution(design, block, problem, optimum, tolerance)

    parts = []
    for part in design.each_block(fit):
        parts.append(part)
        advance(len(part.status))
    return Solution(
        *(
            np.concatenate([getattr(part, name) for part in parts], axis=-1)
            for name in Solution.__dataclass_fields__
        )
    )


def _solution(
    design: Design, block: Block, problem: Problem, found: Optimum, tolerance: float
) -> Solution:
    norm = found.gradient.norm(dim=0)
    values = {
        "weights": design.geometry(None).basis @ found.axes,
        "objective": found.objective,
        "gradient": found.error(problem),
        "excess": torch.where(problem.penalty > 0, norm**2 / (2 * problem.penalty), torch.inf),
        "distance": torch.where(problem.penalty > 0, norm / problem.penalty, torch.inf),
        "iterations": found.iterations,
        "status": _status(block, problem, found, tolerance),
    }
    return Solution(**{name: tensor.cpu().numpy() for name, tensor in values.items()})


def _status(block: Block, problem: Problem, found: Optimum, tolerance: float) -> Tensor:
    """Name how each gene ended; the more serious word has the last say."""
    totals, expressed = block.sums.totals, block.sums.expressed
    sections = [s for tile in problem.tiles for s in tile]
    informative = totals[sections] > 0
    status = torch.full_like(found.iterations, Status.CONVERGED)
    status[informative.sum(0) == 1] = Status.ONE_SECTION
    status[(expressed[sections] <= 1).all(0)] = Status.ONE_SPOT
    status[_runs_away(block, problem, found)] = Status.NO_OPTIMUM
    status[found.error(problem) > tolerance] = Status.MAX_ITERATIONS
    status[(problem.counts == 0) | (len(problem.variances) == 0)] = Status.NOTHING_VARIES
    status[totals.sum(0) == 0] = Status.NO_COUNTS
    return status


def _runs_away(block: Block, problem: Problem, found: Optimum) -> Tensor:
    """Find genes without a penalty whose counts are separable from the spots without counts."""
    free = torch.nonzero((problem.penalty == 0) & (problem.counts > 0)).squeeze(1)
    result = torch.zeros_like(problem.counts, dtype=torch.bool)
    if not len(free):
        return result
    rows, part = problem.rows, problem.genes(free)
    axes = found.axes[:, free]
    left, share = torch.zeros(2, len(free), dtype=torch.float64, device=rows.device)
    weights = (axes if problem.basis is None else problem.basis @ axes).to(rows.dtype)
    for s in (s for tile in problem.tiles for s in tile):
        without = dense(block.counts, rows, s)[:, free] == 0
        scores = rows.times(rows.of(s), weights)
        for total, expected in ((left, scores), (share, torch.zeros_like(scores))):
            part.likelihood.section(s, expected)
            total += (expected * without).sum(0)
    result[free] = (share > 0) & (left <= _VANISHING * share)
    return result
