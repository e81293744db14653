r"""Minimise the penalised objective of a block of genes.

The method is limited-memory BFGS (Liu and Nocedal, Math. Program. 45, 1989) along the principal
axes of the features within sections, which all genes share. Along them the Hessian of most genes
is close to diagonal: counts times variance plus penalty is where the approximation of the Hessian
starts from. A step of all genes costs one evaluation (two products of the features with a column
a gene); a gene whose step went too far takes a shorter one, found from the slopes at both ends,
while the others go on. Slopes decide, since differences of the objective drown in rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor
from torch.linalg import vecdot

from strank.linear.objective import Problem, evaluate

__all__ = ["HISTORY", "Optimum", "descend", "minimise"]

# Past steps that are remembered. More help the few genes far from the shared curvature, which are
# those that go on after so many iterations; they take the memory that the others have left.
HISTORY, _LONGEST_HISTORY = 6, 100
_HARD_AFTER = 60
_OVERSHOOT = 0.7
_SHORTEST_STEP = 1e-8
# Gradients relative to counts that float32 products still resolve.
_FLOAT32_TOLERANCE = 1e-5
# Selecting columns copies them: only when it saves this part of the work.
_WORTH_SELECTING = 0.15


@dataclass
class Optimum:
    """Where a block of genes has got to, one column a gene.

    Attributes
    ----------
    axes
        Weights along the axes, ``[n_axes, n_genes]``.
    objective
        ``[n_genes]``.
    gradient
        ``[n_axes, n_genes]``.
    iterations
        Evaluations, ``[n_genes]``.
    """

    axes: Tensor
    objective: Tensor
    gradient: Tensor
    iterations: Tensor

    @classmethod
    def at(cls, problem: Problem, axes: Tensor) -> Self:
        """Evaluate a starting point."""
        iterations = torch.zeros(axes.shape[1], dtype=torch.long, device=axes.device)
        return cls(axes, *evaluate(problem, axes), iterations)

    def error(self, problem: Problem) -> Tensor:
        """Norm of the gradient divided by the gene's counts, ``[n_genes]``."""
        return self.gradient.norm(dim=0) / problem.counts.clamp(min=1)

    def genes(self, index: Tensor) -> Self:
        """Keep some of the genes."""
        return type(self)(*(getattr(self, f.name)[..., index] for f in fields(self)))

    def put(self, index: Tensor, part: Optimum) -> None:
        """Write back what became of some of the genes."""
        for field in fields(part):
            getattr(self, field.name)[..., index] = getattr(part, field.name)


def minimise(
    problem: Problem,
    start: Tensor | None = None,
    *,
    tolerance: float = 1e-5,
    max_iterations: int = 500,
) -> Optimum:
    """Find the weights of every gene, with gradients that are measured in float64.

    Features in float32 are taken as far as float32 resolves; from there, genes that are not at
    the tolerance go on in float64.

    Parameters
    ----------
    problem
        Objective of a block of genes.
    start
        Weights along the axes to start from, ``[n_axes, n_genes]``; 0 if ``None``.
    tolerance
        A gene is done when the norm of its gradient is at most this share of its counts.
    max_iterations
        Most evaluations a gene.
    """
    start = torch.zeros_like(problem.xtc) if start is None else start
    spent = torch.zeros_like(problem.counts, dtype=torch.long)
    if problem.rows.dtype != torch.float64:
        rough = max(tolerance, _FLOAT32_TOLERANCE)
        found = descend(problem, start, tolerance=rough, max_iterations=max_iterations)
        start, spent = found.axes, found.iterations
        problem = replace(problem, rows=problem.rows.in_precision(torch.float64))
    found = descend(problem, start, tolerance=tolerance, max_iterations=max_iterations)
    found.iterations += spent
    return found


def descend(problem: Problem, start: Tensor, *, tolerance: float, max_iterations: int) -> Optimum:
    """Run until every gene is at the tolerance or cannot get nearer in the precision of the rows.

    Genes that are done leave the work.
    """
    result = Optimum.at(problem, start)
    active = torch.nonzero(result.error(problem) > tolerance).squeeze(1)
    if not len(active):
        return result
    problem, now = problem.genes(active), result.genes(active)
    search = _Search.begin(problem, now)
    for _ in range(max_iterations):
        search.step(problem, now)
        going = (now.error(problem) > tolerance) & (search.length > _SHORTEST_STEP)
        if not going.any():
            break
        if (~going).sum() >= _WORTH_SELECTING * len(going):
            result.put(active, now)
            active, problem, now = active[going], problem.genes(going), now.genes(going)
            search = search.genes(going)
    result.put(active, now)
    return result


@dataclass
class _Search:
    """Directions, steps and what past steps told of the curvature, one column a gene."""

    inverse: Tensor
    direction: Tensor
    slope: Tensor
    length: Tensor
    steps: list[Tensor]
    changes: list[Tensor]
    curvatures: list[Tensor]
    iteration: int = 0

    @classmethod
    def begin(cls, problem: Problem, now: Optimum) -> Self:
        information = problem.likelihood.information * problem.counts
        inverse = 1 / (information * problem.variances[:, None] + problem.penalty)
        direction = -inverse * now.gradient
        slope = vecdot(direction, now.gradient, dim=0)
        return cls(inverse, direction, slope, torch.ones_like(slope), [], [], [])

    def genes(self, index: Tensor) -> Self:
        return replace(
            self,
            inverse=self.inverse[:, index],
            direction=self.direction[:, index],
            slope=self.slope[index],
            length=self.length[index],
            steps=[step[:, index] for step in self.steps],
            changes=[change[:, index] for change in self.changes],
            curvatures=[curvature[index] for curvature in self.curvatures],
        )

    def step(self, problem: Problem, now: Optimum) -> None:
        """Try the step of every gene; take it where it did not go too far."""
        tried = now.axes + self.length * self.direction
        objective, gradient = evaluate(problem, tried)
        now.iterations += 1
        self.iteration += 1
        slope = vecdot(self.direction, gradient, dim=0)
        rounding = 100 * torch.finfo(problem.rows.dtype).eps * problem.counts
        taken = (slope <= -_OVERSHOOT * self.slope) & (objective <= now.objective + rounding)
        shorter = (self.slope / (self.slope - slope)).nan_to_num(0).clamp(0.1, 0.5)
        change = torch.where(taken, gradient - now.gradient, 0)
        self._remember((tried - now.axes) * taken, change, problem.room)
        now.axes = torch.where(taken, tried, now.axes)
        now.objective = torch.where(taken, objective, now.objective)
        now.gradient = torch.where(taken, gradient, now.gradient)
        direction = self._newton(now.gradient)
        self.direction = torch.where(taken, direction, self.direction)
        self.slope = vecdot(self.direction, now.gradient, dim=0)
        self.length = torch.where(taken, 1.0, self.length * shorter)

    def _remember(self, step: Tensor, change: Tensor, room: int) -> None:
        curvature = vecdot(step, change, dim=0)
        self.steps.append(step)
        self.changes.append(change)
        # A step that was not taken, or that rounding has left without curvature, tells nothing.
        self.curvatures.append(torch.where(curvature > 0, 1 / curvature, 0.0))
        longest = HISTORY
        if self.iteration > _HARD_AFTER:
            longest = max(HISTORY, min(_LONGEST_HISTORY, HISTORY * room // len(curvature)))
        if len(self.steps) > longest:
            for memory in (self.steps, self.changes, self.curvatures):
                memory.pop(0)

    def _newton(self, gradient: Tensor) -> Tensor:
        """Two-loop recursion; the diagonal is scaled to the curvature of the last step."""
        memory = list(zip(self.steps, self.changes, self.curvatures, strict=True))
        result, shares = -gradient, []
        for step, change, curvature in reversed(memory):
            shares.append(curvature * vecdot(step, result, dim=0))
            result.addcmul_(shares[-1], change, value=-1)
        change, curvature = self.changes[-1], self.curvatures[-1]
        seen = curvature * vecdot(change * self.inverse, change, dim=0)
        result *= self.inverse * torch.where(seen > 0, 1 / seen, 1.0)
        for (step, change, curvature), share in zip(memory, reversed(shares), strict=True):
            result.addcmul_(share - curvature * vecdot(change, result, dim=0), step)
        return result
