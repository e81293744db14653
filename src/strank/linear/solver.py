r"""Minimise the penalised list objective for all genes at once.

For each gene :math:`g`, independently,

.. math::
    F_g(w) = -\sum_i c_{ig}\, x_i^\top w + \sum_s T_{sg} \log \sum_{i \in s} l_i e^{x_i^\top w}
    + \tfrac{\lambda_g}{2} \lVert w \rVert^2 .

The method is nonlinear conjugate gradients (Polak-Ribière+) in the eigenbasis of the within-section
covariance of the features, which all genes share. In that basis a diagonal preconditioner is close
to the inverse Hessian of most genes, and directions in which no section varies drop out. An
iteration costs two products of the features with one column a gene still active. The few genes
that this does not serve (their optimum lies where counts crowd on few spots) are finished by
Newton's method, each with its own Hessian. The step along a direction is found by damped Newton
steps that cannot overshoot (the objective is generalised self-concordant: Sun and Tran-Dinh, Math.
Program. 178, 2019), so there is no backtracking.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import torch
from torch import Tensor

from strank.functional.segments import segment_max, segment_sum
from strank.linear.problem import ListProblem

__all__ = ["Solution", "Status", "minimise"]

# Where a shared preconditioner serves, fewer iterations than this are needed.
_NEWTON_AFTER = 60
_LINE_STEPS = 8
_LINE_TOLERANCE = 0.1
_NEGLIGIBLE_VARIANCE = 1e-10


class Status(IntEnum):
    """How the fit of a gene ended."""

    CONVERGED = 0
    MAX_ITERATIONS = 1
    NO_COUNTS = 2

    @property
    def advice(self) -> str:
        """What it means, and what to do."""
        return {
            Status.CONVERGED: "converged to the tolerance",
            Status.MAX_ITERATIONS: "stopped before the tolerance: raise max_iterations or penalty",
            Status.NO_COUNTS: "no counts in any section: scores are constant; leave the gene out",
        }[self]


@dataclass(frozen=True)
class Solution:
    r"""What `minimise` returns, one entry a gene.

    Attributes
    ----------
    weights
        ``[n_features, n_genes]``.
    objective
        :math:`F_g`, in nats, ``[n_genes]``.
    gradient
        Euclidean norm of the gradient divided by the gene's counts, ``[n_genes]``.
    excess
        Bound on :math:`F_g(w) - \min F_g`, in nats: :math:`\lVert \nabla F_g \rVert^2 / 2\lambda_g`
        by strong convexity; ``inf`` without a penalty.
    iterations
        ``[n_genes]``.
    status
        `Status` codes, ``[n_genes]``.
    """

    weights: Tensor
    objective: Tensor
    gradient: Tensor
    excess: Tensor
    iterations: Tensor
    status: Tensor

    @property
    def message(self) -> str:
        """How many genes ended how, with advice.

        Examples
        --------
        >>> none = torch.zeros(2)
        >>> Solution(none, none, none, none, none, torch.tensor([0, 0])).message
        '2 genes: converged to the tolerance'
        """
        codes, counts = torch.unique(self.status, return_counts=True)
        return "; ".join(
            f"{count} genes: {Status(code).advice}"
            for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
        )


def minimise(
    problem: ListProblem,
    penalty: Tensor | float,
    *,
    start: Tensor | None = None,
    tolerance: float = 1e-6,
    max_iterations: int = 500,
) -> Solution:
    r"""Find the weights of every gene.

    Parameters
    ----------
    problem
        Features, offsets and the sums of counts.
    penalty
        :math:`\lambda`, in counts, one value or ``[n_genes]``, not negative. At 0, features that
        do not vary within any section get weight 0 (the solution of least norm).
    start
        Weights to start from, ``[n_features, n_genes]``; 0 if ``None``.
    tolerance
        A gene is converged when the norm of its gradient is at most this share of its counts. For
        standardised features that is how far, in standard deviations, the mean features that the
        scores predict still are from those that the counts have.
    max_iterations
        After so many, a gene ends as `Status.MAX_ITERATIONS`.

    Returns
    -------
    Solution
        On the device and in the precision of the features.

    Raises
    ------
    ValueError
        For a negative penalty.
    """
    penalty = torch.as_tensor(penalty).to(problem.xtc).expand(problem.xtc.shape[1])
    if (penalty < 0).any():
        raise ValueError("penalty must not be negative")
    basis, variances = _within_section_basis(problem)
    rotated = replace(problem, features=problem.features @ basis, xtc=basis.T @ problem.xtc)
    first = torch.zeros_like(rotated.xtc) if start is None else basis.T @ start
    weights, iterations = _iterate(rotated, penalty, variances, first, tolerance, max_iterations)
    return _solution(problem, penalty, basis @ weights, iterations, tolerance)


def _solution(
    problem: ListProblem, penalty: Tensor, weights: Tensor, iterations: Tensor, tolerance: float
) -> Solution:
    """Measure the end point afresh, so that nothing is claimed on accumulated sums."""
    gradient = _gradient(problem, penalty, weights, problem.features @ weights)
    counts = problem.gene_totals
    norm = gradient.norm(dim=0) / counts.clamp(min=1)
    status = torch.full_like(iterations, Status.MAX_ITERATIONS)
    # The last gradient was computed in the rotated basis, with rounding of its own.
    status[norm <= 1.01 * tolerance] = Status.CONVERGED
    status[counts == 0] = Status.NO_COUNTS
    return Solution(
        weights=weights,
        objective=problem.loss(weights) + 0.5 * penalty * (weights**2).sum(0),
        gradient=norm,
        excess=torch.where(penalty > 0, (gradient**2).sum(0) / (2 * penalty), torch.inf),
        iterations=iterations,
        status=status,
    )


def _within_section_basis(problem: ListProblem) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of the features' covariance within sections.

    Depth-weighted, and averaged over sections as an average gene's counts are; directions in
    which no section varies are left out.
    """
    depth = problem.offset.exp()
    share = depth / segment_sum(depth, problem.section, problem.n_sections)[problem.section]
    mean = segment_sum(share[:, None] * problem.features, problem.section, problem.n_sections)
    part = (problem.totals / problem.gene_totals.clamp(min=1)).mean(1)
    weight = (share * (part / part.sum().clamp(min=1e-30))[problem.section]).sqrt()
    centred = weight[:, None] * (problem.features - mean[problem.section])
    variances, vectors = torch.linalg.eigh(centred.T @ centred)
    kept = variances > variances[-1].clamp(min=0) * _NEGLIGIBLE_VARIANCE
    return vectors[:, kept], variances[kept]


def _gradient(problem: ListProblem, penalty: Tensor, weights: Tensor, scores: Tensor) -> Tensor:
    expected = problem.shares(scores) * problem.totals[problem.section]
    return penalty * weights - problem.xtc + problem.features.T @ expected


def _iterate(
    problem: ListProblem,
    penalty: Tensor,
    variances: Tensor,
    start: Tensor,
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor]:
    """Run until every gene is converged; converged genes leave the work."""
    result = start.clone()
    iterations = torch.zeros(start.shape[1], dtype=torch.long, device=start.device)
    active = torch.nonzero(problem.gene_totals > 0).squeeze(1)
    result[:, problem.gene_totals == 0] = 0
    part, lam = problem.genes(active), penalty[active]
    inverse = 1 / (part.gene_totals * variances[:, None] + lam)
    weights = result[:, active]
    scores = part.features @ weights
    direction: Tensor | None = None
    gradient: Tensor | None = None
    for iteration in range(max_iterations):
        previous, gradient = gradient, _gradient(part, lam, weights, scores)
        going = gradient.norm(dim=0) > tolerance * part.gene_totals
        result[:, active], iterations[active] = weights, iteration
        if not going.any():
            break
        if not going.all():
            active, lam, part = active[going], lam[going], part.genes(going)
            weights, scores, gradient = weights[:, going], scores[:, going], gradient[:, going]
            inverse = inverse[:, going]
            if direction is not None and previous is not None:
                direction, previous = direction[:, going], previous[:, going]
        if iteration < _NEWTON_AFTER:
            direction = _conjugate_direction(gradient, previous, direction, inverse)
        else:
            direction = _newton_direction(part, lam, scores, gradient)
        slope = part.features @ direction
        step = _line_search(part, lam, weights, scores, direction, slope)
        weights = weights + step * direction
        scores = scores + step * slope
    else:
        result[:, active], iterations[active] = weights, max_iterations
    return result, iterations


def _conjugate_direction(
    gradient: Tensor, previous: Tensor | None, direction: Tensor | None, inverse: Tensor
) -> Tensor:
    """Polak-Ribière+, preconditioned; steepest descent where that would not descend."""
    steepest = -inverse * gradient
    if previous is None or direction is None:
        return steepest
    change = -(steepest * (gradient - previous)).sum(0)
    beta = (change / (inverse * previous * previous).sum(0)).clamp(min=0)
    conjugate = steepest + beta * direction
    return torch.where((conjugate * gradient).sum(0) < 0, conjugate, steepest)


def _newton_direction(
    problem: ListProblem, penalty: Tensor, scores: Tensor, gradient: Tensor
) -> Tensor:
    """Solve with the Hessian of each gene; one at a time, since there are few of them."""
    share = problem.shares(scores)
    expected = share * problem.totals[problem.section]
    direction = torch.empty_like(gradient)
    for g in range(gradient.shape[1]):
        mean = segment_sum(
            share[:, g, None] * problem.features, problem.section, problem.n_sections
        )
        centred = problem.features - mean[problem.section]
        hessian = centred.T @ (expected[:, g, None] * centred)
        hessian.diagonal().add_(penalty[g])
        # Without a penalty the Hessian can vanish in directions that the data have used up.
        values, vectors = torch.linalg.eigh(hessian)
        limits = torch.finfo(values.dtype)
        floor = (values[-1] * limits.eps * len(values)).clamp(min=limits.tiny)
        direction[:, g] = -vectors @ ((vectors.T @ gradient[:, g]) / values.clamp(min=floor))
    return direction


def _line_search(
    problem: ListProblem,
    penalty: Tensor,
    weights: Tensor,
    scores: Tensor,
    direction: Tensor,
    slope: Tensor,
) -> Tensor:
    r"""Step length per gene, by Newton steps damped with :math:`\log(1 + \rho) / \rho`.

    :math:`\rho` is the step times the range of the slope within a section, which bounds how fast
    the curvature can change along the line.
    """
    section, n = problem.section, problem.n_sections
    extent = (segment_max(slope, section, n) + segment_max(-slope, section, n)).amax(0)
    linear = (direction * (penalty * weights - problem.xtc)).sum(0)
    quadratic = (penalty * direction * direction).sum(0)
    step = torch.zeros_like(linear)
    goal = torch.full_like(linear, -torch.inf)
    for _ in range(_LINE_STEPS):
        share = problem.shares(scores + step * slope)
        mean = segment_sum(share * slope, section, n)
        square = segment_sum(share * slope * slope, section, n)
        rise = linear + step * quadratic + (problem.totals * mean).sum(0)
        bend = quadratic + (problem.totals * (square - mean * mean).clamp(min=0)).sum(0)
        if step.eq(0).all():
            goal = _LINE_TOLERANCE * rise.abs()
        elif (rise.abs() <= goal).all():
            break
        newton = -rise / bend.clamp(min=torch.finfo(bend.dtype).tiny)
        reach = (extent * newton.abs()).clamp(min=1e-12)
        step = step + newton * torch.log1p(reach) / reach
    return step
