"""Choosing the penalty by leaving whole groups of sections out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from strank.linear.design import Block, Design
from strank.linear.objective import value_and_gradient
from strank.linear.solver import descend

PENALTIES: tuple[float, ...] = tuple(float(p) for p in np.logspace(5, 0.5, 10))

# Where nothing can be left out; about what is chosen on real sections of some 10,000 counts a spot.
DEFAULT_PENALTY = 300.0

# Held-out likelihood is flat where the path is compared, so its points need no more.
_PATH_TOLERANCE = 1e-4
_PATH_ITERATIONS = 500


@dataclass(frozen=True)
class PenaltyChoice:
    """Penalties compared by what is left out, and the one of each gene."""

    penalty: NDArray[np.float64]  #: chosen, ``[n_genes]``
    penalties: NDArray[np.float64]  #: compared, ``[n_penalties]``, largest first
    #: negative log-likelihood of the held-out groups, in nats, ``[n_penalties, n_genes]``
    held_out: NDArray[np.float64]


def choose_penalty(
    design: Design,
    penalties: ArrayLike,
    *,
    shared: bool = False,
    advance: Callable[[int], object] | None = None,
) -> PenaltyChoice:
    """Choose the penalties of highest list likelihood on groups left out in turn.

    A gene without counts, or for which no penalty is better than another, gets the largest.
    """
    if design.n_groups < 2:
        raise ValueError("choosing a penalty needs at least two sections; give the penalty instead")
    penalties = np.sort(np.asarray(penalties, dtype=np.float64).ravel())[::-1].copy()
    if not (len(penalties) and np.isfinite(penalties).all() and penalties[-1] >= 0):
        raise ValueError("penalties must not be negative, and must be finite")
    work = partial(_held_out, design, penalties)
    held_out = np.concatenate(list(design.each_block(work, advance)), axis=1)
    best = np.full(design.n_genes, held_out.sum(1).argmin()) if shared else held_out.argmin(0)
    return PenaltyChoice(penalties[best], penalties, held_out)


def _held_out(design: Design, penalties: NDArray[np.float64], block: Block) -> NDArray[np.float64]:
    """Loss of all groups, each left out in its turn, ``[n_penalties, n_genes]``."""
    paths = [_path(design, block, penalties, group) for group in range(design.n_groups)]
    return torch.stack(paths).sum(0).cpu().numpy()


def _path(design: Design, block: Block, penalties: NDArray[np.float64], left_out: int) -> Tensor:
    """Loss of a group at each penalty, from the largest down, ``[n_penalties, n_genes]``."""
    # Scale and axes, too, are those of the training groups alone.
    training = design.training(block, penalties[0], left_out)
    test = design.held_out(block, training, left_out)
    axes, losses = torch.zeros_like(test.xtc), []
    for penalty in penalties.tolist():
        problem = replace(training, penalty=torch.full_like(training.penalty, penalty))
        # Every fit starts from the one before, which is near.
        axes = descend(
            problem, axes, tolerance=_PATH_TOLERANCE, max_iterations=_PATH_ITERATIONS
        ).axes
        losses.append(value_and_gradient(test, axes)[0])
    return torch.stack(losses)
