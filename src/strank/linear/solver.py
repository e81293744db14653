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

from strank.linear.objective import Problem, value_and_gradient

# Past steps that are remembered. More help the few genes far from the shared curvature, which are
# those that go on after so many iterations; they take the memory that the others have left.
STEPS_KEPT, _MOST_STEPS_KEPT = 6, 100
_HARD_AFTER = 60
# A step went too far where the objective rises at its end by more than this part of the slope at
# which it fell at the start.
_OVERSHOOT = 0.7
# A gene whose steps are shorter is as near as rounding lets it come.
_SHORTEST_STEP = 1e-8
# Gradients relative to counts that float32 products still resolve.
_FLOAT32_TOLERANCE = 1e-5
# How far from the optimum the weights may be, relative to their norm, in units of the tolerance;
# and at least, since rounding of gradients leaves no less.
_FAR, _LEAST_FAR = 1000.0, 1e-6
# Weights of less norm are as good as none: scores hardly differ.
_LEAST_NORM = 1e-3
# Selecting columns copies them: only when it saves this part of the work.
_WORTH_SELECTING = 0.15


@dataclass
class Optimum:
    """Where a block of genes has got to, one column a gene."""

    axes: Tensor  #: weights along the axes, ``[n_axes, n_genes]``
    objective: Tensor  #: ``[n_genes]``
    gradient: Tensor  #: ``[n_axes, n_genes]``
    iterations: Tensor  #: evaluations, ``[n_genes]``

    @classmethod
    def at(cls, problem: Problem, axes: Tensor) -> Self:
        """Evaluate a starting point."""
        iterations = torch.zeros(axes.shape[1], dtype=torch.long, device=axes.device)
        return cls(axes, *value_and_gradient(problem, axes), iterations)

    def error(self, problem: Problem) -> Tensor:
        """Norm of the gradient divided by what the gene's counts tell, ``[n_genes]``."""
        return self.gradient.norm(dim=0) / problem.told.clamp(min=1)

    def distance(self, problem: Problem) -> Tensor:
        """Bound on the distance to the optimum relative to the weights, ``[n_genes]``.

        The penalty makes the objective strongly convex; ``inf`` without one.
        """
        bound = self.gradient.norm(dim=0) / problem.penalty
        bound = torch.where(problem.penalty > 0, bound, torch.inf)
        return bound / self.axes.norm(dim=0).clamp(min=_LEAST_NORM)

    def missed(self, problem: Problem, tolerance: float) -> Tensor:
        """Which genes are not at the tolerance, in gradient or in distance, ``[n_genes]``."""
        far = (problem.penalty > 0) & (self.distance(problem) > max(_FAR * tolerance, _LEAST_FAR))
        return (self.error(problem) > tolerance) | far

    def genes(self, index: Tensor) -> Self:
        """Keep some of the genes."""
        return type(self)(*(getattr(self, f.name)[..., index] for f in fields(self)))

    def put(self, index: Tensor, part: Optimum) -> None:
        """Write back what became of some of the genes."""
        for field in fields(part):
            getattr(self, field.name)[..., index] = getattr(part, field.name)


def minimise(problem: Problem, *, tolerance: float, max_iterations: int) -> Optimum:
    """Find the weights of every gene, with gradients that are measured in float64."""
    start = torch.zeros_like(problem.xtc)
    spent = torch.zeros_like(problem.counts, dtype=torch.long)
    if problem.rows.dtype != torch.float64:
        # Products in float32 take half of the time, as far as float32 resolves; the last part of
        # the way, or only the proof that there is none left, is in float64.
        rough = max(tolerance, _FLOAT32_TOLERANCE)
        found = descend(problem, start, tolerance=rough, max_iterations=max_iterations)
        start, spent = found.axes, found.iterations
        problem = replace(problem, rows=replace(problem.rows, dtype=torch.float64))
    found = descend(problem, start, tolerance=tolerance, max_iterations=max_iterations, near=True)
    found.iterations += spent
    return found


def descend(
    problem: Problem, start: Tensor, *, tolerance: float, max_iterations: int, near: bool = False
) -> Optimum:
    """Run until every gene is at the tolerance, or as near as the precision of the rows lets it.

    A gene is at the tolerance when the norm of its gradient is at most this share of what its
    counts tell; ``near``, its weights must be near the optimum too.
    """
    missed = Optimum.missed if near else lambda now, of, least: now.error(of) > least
    result = Optimum.at(problem, start)
    active = torch.nonzero(missed(result, problem, tolerance)).squeeze(1)
    if not len(active):
        return result
    problem, now = problem.genes(active), result.genes(active)
    search = _Search.begin(problem, now)
    for _ in range(max_iterations):
        search.step(problem, now)
        going = missed(now, problem, tolerance) & (search.length > _SHORTEST_STEP)
        if not going.any():
            break
        # Genes that are done leave the work.
        if (~going).sum() >= _WORTH_SELECTING * len(going):
            result.put(active[~going], now.genes(~going))
            active, problem, now = active[going], problem.genes(going), now.genes(going)
            search.keep(going)
    result.put(active, now)
    return result


@dataclass
class _Search:
    """Directions, steps and what past steps told of the curvature, one column a gene."""

    inverse: Tensor  #: of the diagonal of the Hessian, as it starts, ``[n_axes, n_genes]``
    direction: Tensor  #: ``[n_axes, n_genes]``
    slope: Tensor  #: of the objective along it, ``[n_genes]``
    length: Tensor  #: of the next step, in units of the direction, ``[n_genes]``
    steps: list[Tensor]  #: past ones, ``[n_axes, n_genes]`` each
    changes: list[Tensor]  #: of the gradient in these steps
    curvatures: list[Tensor]  #: 1 / (step @ change), ``[n_genes]`` each
    iteration: int = 0

    @classmethod
    def begin(cls, problem: Problem, now: Optimum) -> Self:
        inverse = 1 / (problem.told * problem.geometry.variances[:, None] + problem.penalty)
        direction = -inverse * now.gradient
        slope = vecdot(direction, now.gradient, dim=0)
        return cls(inverse, direction, slope, torch.ones_like(slope), [], [], [])

    def keep(self, index: Tensor) -> None:
        """Keep some of the genes; one after the other, so that nothing is there twice."""
        for name in ("inverse", "direction", "slope", "length"):
            setattr(self, name, getattr(self, name)[..., index])
        for memory in (self.steps, self.changes, self.curvatures):
            for place, past in enumerate(memory):
                memory[place] = past[..., index]

    def step(self, problem: Problem, now: Optimum) -> None:
        """Try the step of every gene; take it where it did not go too far."""
        tried = now.axes + self.length * self.direction
        objective, gradient = value_and_gradient(problem, tried)
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
        longest = STEPS_KEPT
        if self.iteration > _HARD_AFTER:
            longest = max(STEPS_KEPT, min(_MOST_STEPS_KEPT, STEPS_KEPT * room // len(curvature)))
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
