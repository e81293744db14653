"""What a fit ends with: weights, how far they are from the optimum, and how each gene ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strank.linear.design import Block, Design, dense
from strank.linear.objective import Problem
from strank.linear.solver import Optimum, minimise

# Without a penalty, spots without counts that keep less than this part of their share of the
# depth are on their way to minus infinity.
_VANISHING = 1e-3


class Status(IntEnum):
    """How the fit of a gene ended."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    NO_COUNTS = 2
    ONE_SECTION = 3
    ONE_SPOT = 4
    NO_OPTIMUM = 5
    NOTHING_VARIES = 6

    @property
    def converged(self) -> bool:
        """Whether the optimum was reached to the tolerance."""
        return self in (Status.CONVERGED, Status.ONE_SECTION, Status.ONE_SPOT)

    @property
    def advice(self) -> str:
        """What it means, and what to do."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "converged to the tolerance",
    Status.MAX_ITERATIONS: "stopped before the tolerance (of gradient, or of the distance to the "
    "optimum): raise max_iterations, penalty or tolerance",
    Status.NO_COUNTS: "no counts in any section: scores are constant; leave the gene out",
    Status.ONE_SECTION: "converged, with counts in one section only: nothing shows that the scores "
    "hold in another",
    Status.ONE_SPOT: "converged, with all counts of a section in one of its spots: a single spot "
    "decides",
    Status.NO_OPTIMUM: "no finite optimum: the scores of spots without counts can fall for ever; "
    "give a penalty",
    Status.NOTHING_VARIES: "counts only where no feature varies (sections of one spot): scores are "
    "constant; leave the gene out",
}


@dataclass(frozen=True)
class Solution:
    r"""The weights of all genes, and what is known about them; one entry a gene.

    Attributes
    ----------
    weights
        Of the features as given, ``[n_features, n_genes]``.
    objective
        :math:`F_g` in nats, without terms that do not depend on the weights, ``[n_genes]``.
    gradient
        Norm of the gradient for standardised features, divided by what the gene's counts tell,
        ``[n_genes]``; measured in float64.
    excess
        Bound on :math:`F_g(w) - \min F_g`, in nats: :math:`\lVert \nabla F_g \rVert^2 /
        2\lambda_g`, by strong convexity. It is also the duality gap at the expected counts.
        ``inf`` without a penalty. Gradient and bounds are in the metric of the penalty: that of
        standardised features, or of the prior of the weights.
    distance
        Bound on the distance of the weights (of standardised features) from the optimum:
        :math:`\lVert \nabla F_g \rVert / \lambda_g`; ``inf`` without a penalty.
    relative_distance
        This bound divided by the norm of these weights. True distances were a third of it and
        less, most by far less.
    iterations
        Evaluations of the gradient, ``[n_genes]``.
    status
        `Status` codes, ``[n_genes]``.
    """

    weights: NDArray[np.float64]
    objective: NDArray[np.float64]
    gradient: NDArray[np.float64]
    excess: NDArray[np.float64]
    distance: NDArray[np.float64]
    relative_distance: NDArray[np.float64]
    iterations: NDArray[np.int64]
    status: NDArray[np.int64]

    def where(self, mine: NDArray[np.bool_], other: Solution) -> Solution:
        """Put together the solutions of the genes in a mask (these), and of all others.

        Examples
        --------
        >>> one, two = (Solution(*[np.array([x])] * 8) for x in (1.0, 2.0))
        >>> one.where(np.array([False, True]), two).objective
        array([2., 1.])
        """
        values = {}
        for field in fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            values[field.name] = np.empty((*a.shape[:-1], len(mine)), dtype=a.dtype)
            values[field.name][..., mine], values[field.name][..., ~mine] = a, b
        return Solution(**values)

    @property
    def converged(self) -> NDArray[np.bool_]:
        """Whether each gene is at its optimum, to the tolerance."""
        return np.isin(self.status, [code for code in Status if code.converged])

    @property
    def message(self) -> str:
        """How many genes ended how, with advice, and how near the optimum the converged ones are.

        Examples
        --------
        >>> none = np.zeros(2)
        >>> far = np.array([0.002, 0.0004])
        >>> Solution(none, none, none, none, none, far, none, np.array([0, 0])).message
        '2 genes: converged to the tolerance; weights of the converged are off by at most 0.2 %'
        """
        codes, counts = np.unique(self.status, return_counts=True)
        told = [
            f"{count} genes: {Status(code).advice}"
            for code, count in zip(codes, counts, strict=True)
        ]
        far = self.relative_distance[self.converged].max(initial=0.0)
        if self.converged.any():
            told.append(
                f"weights of the converged are off by at most {100 * far:.1g} %"
                if np.isfinite(far)
                else "without a penalty nothing bounds how far weights are from the optimum"
            )
        return "; ".join(told)


def fit_genes(
    design: Design,
    penalty: NDArray[np.float64],
    *,
    tolerance: float,
    max_iterations: int,
    advance: Callable[[int], object] | None = None,
) -> Solution:
    """Find the optimum of every gene on all sections, with a penalty ``[n_genes]`` in counts."""
    if not (np.isfinite(penalty).all() and (penalty >= 0).all()):
        raise ValueError("penalty must not be negative, and must be finite")

    def fit(block: Block) -> Solution:
        problem = design.training(block, torch.as_tensor(penalty[block.genes].copy()))
        optimum = minimise(problem, tolerance=tolerance, max_iterations=max_iterations)
        return _solution(block, problem, optimum, tolerance)

    parts = list(design.each_block(fit, advance))
    names = [field.name for field in fields(Solution)]
    return Solution(*(np.concatenate([getattr(p, name) for p in parts], axis=-1) for name in names))


def _solution(block: Block, problem: Problem, found: Optimum, tolerance: float) -> Solution:
    norm, penalty = found.gradient.norm(dim=0), problem.penalty
    values = {
        # Without a penalty, features that vary in no section get weight 0: no axis has them.
        "weights": problem.geometry.basis @ found.axes * problem.geometry.unit[:, None],
        "objective": found.objective,
        "gradient": found.error(problem),
        # The penalty makes the objective strongly convex, by lambda: that bounds both.
        "excess": torch.where(penalty > 0, norm**2 / (2 * penalty), torch.inf),
        "distance": torch.where(penalty > 0, norm / penalty, torch.inf),
        "relative_distance": found.distance(problem),
        "iterations": found.iterations,
        "status": _status(block, problem, found, tolerance),
    }
    return Solution(**{name: tensor.cpu().numpy() for name, tensor in values.items()})


def _status(block: Block, problem: Problem, found: Optimum, tolerance: float) -> Tensor:
    """Name how each gene ended; the more serious word has the last say."""
    totals, expressed = block.totals, block.expressed
    sections = [s for tile in problem.tiles for s in tile]
    informative = totals[sections] > 0
    status = torch.full_like(found.iterations, Status.CONVERGED)
    status[informative.sum(0) == 1] = Status.ONE_SECTION
    status[(expressed[sections] <= 1).all(0)] = Status.ONE_SPOT
    status[_runs_away(block, problem, found)] = Status.NO_OPTIMUM
    status[found.missed(problem, tolerance)] = Status.MAX_ITERATIONS
    status[(problem.counts == 0) | (len(problem.xtc) == 0)] = Status.NOTHING_VARIES
    status[totals.sum(0) == 0] = Status.NO_COUNTS
    return status


def _runs_away(block: Block, problem: Problem, found: Optimum) -> Tensor:
    """Find genes without a penalty whose counts are separable from the spots without counts.

    Scores of those spots fall for ever, so little is ``left`` of their ``share`` of the depth.
    """
    free = torch.nonzero((problem.penalty == 0) & (problem.counts > 0)).squeeze(1)
    result = torch.zeros_like(problem.counts, dtype=torch.bool)
    if not len(free):
        return result
    rows, part = problem.rows, problem.genes(free)
    left, share = torch.zeros(2, len(free), dtype=torch.float64, device=rows.device)
    weights = problem.row_weights(found.axes[:, free])
    for s in (s for tile in problem.tiles for s in tile):
        without = dense(block.counts, rows, s)[:, free] == 0
        scores = rows.times(rows.of(s), weights)
        for total, expected in ((left, scores), (share, torch.zeros_like(scores))):
            part.likelihood.section(s, expected)
            total += (expected * without).sum(0)
    result[free] = (share > 0) & (left <= _VANISHING * share)
    return result
