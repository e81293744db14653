"""Choosing the penalty by leaving whole groups of sections out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strank.linear.design import Block, Design
from strank.linear.objective import evaluate
from strank.linear.solver import descend

__all__ = ["DEFAULT_PENALTY", "PENALTIES", "PenaltyChoice", "choose_penalty"]

PENALTIES: tuple[float, ...] = tuple(float(p) for p in np.logspace(5, 0.5, 10))

# Where nothing can be left out; about what is chosen on real sections of some 10,000 counts a spot.
DEFAULT_PENALTY = 300.0

# Held-out likelihood is flat where the path is compared, so its points need no more.
_PATH_TOLERANCE = 1e-4
_PATH_ITERATIONS = 500


@dataclass(frozen=True)
class PenaltyChoice:
    """What `choose_penalty` returns.

    Attributes
    ----------
    penalty
        The chosen one of each gene, ``[n_genes]``.
    penalties
        Those compared, ``[n_penalties]``, largest first.
    held_out
        Negative log-likelihood of the held-out groups, in nats, ``[n_penalties, n_genes]``.
    """

    penalty: NDArray[np.float64]
    penalties: NDArray[np.float64]
    held_out: NDArray[np.float64]


def choose_penalty(
    design: Design,
    penalties: NDArray[np.float64],
    *,
    shared: bool = False,
    advance: Callable[[int], object] = lambda n_genes: None,
) -> PenaltyChoice:
    """Choose the penalties of highest list likelihood on groups left out in turn.

    Scale and axes come from the training groups alone. Along the path every fit starts from the
    one before.

    Parameters
    ----------
    design
        Spots in at least two groups (sections or patients).
    penalties
        Candidates, in counts.
    shared
        One penalty for all genes, by the sum of their held-out likelihoods; else each its own.
    advance
        Called with the number of genes done since the last call.

    Returns
    -------
    PenaltyChoice
        A gene without counts, or for which no penalty is better than another, gets the largest.

    Raises
    ------
    ValueError
        If there is only one group, or no candidate that is not negative and finite.
    """
    if len(design.moments) < 2:
        raise ValueError("choosing a penalty needs at least two sections; give the penalty instead")
    penalties = np.sort(np.asarray(penalties, dtype=np.float64).ravel())[::-1].copy()
    if not (len(penalties) and np.isfinite(penalties).all() and penalties[-1] >= 0):
        raise ValueError("penalties must not be negative, and must be finite")
    parts = []
    for part in design.each_block(partial(_held_out, design, penalties)):
        parts.append(part)
        advance(part.shape[1])
    held_out = np.concatenate(parts, axis=1)
    best = np.full(design.n_genes, held_out.sum(1).argmin()) if shared else held_out.argmin(0)
    return PenaltyChoice(penalties[best], penalties, held_out)


def _held_out(design: Design, penalties: NDArray[np.float64], block: Block) -> NDArray[np.float64]:
    """Loss of all groups, each left out in its turn, ``[n_penalties, n_genes]``."""
    paths = [_path(design, block, penalties, group) for group in range(len(design.moments))]
    return torch.stack(paths).sum(0).cpu().numpy()


def _path(design: Design, block: Block, penalties: NDArray[np.float64], left_out: int) -> Tensor:
    """Held-out loss at each penalty, ``[n_penalties, n_genes]``."""
    fold = design.fold(left_out, block.genes.stop - block.genes.start)
    test = fold.held_out(block, design.offset)
    problem = fold.training(block, penalties[0])
    axes, losses = torch.zeros_like(test.xtc), []
    for penalty in penalties.tolist():
        problem = replace(problem, penalty=torch.full_like(problem.counts, penalty))
        axes = descend(
            problem, axes, tolerance=_PATH_TOLERANCE, max_iterations=_PATH_ITERATIONS
        ).axes
        losses.append(evaluate(test, axes)[0])
    return torch.stack(losses)
