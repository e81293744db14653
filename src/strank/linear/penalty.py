"""Choosing the penalty by leaving whole groups of sections out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from strank.linear.calibration import Choose, LeftOut, left_out_of, lowest, temperature
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
    left_out: LeftOut  #: what each group says of each of them
    #: what the scores of each gene are multiplied by for groups that were not seen, ``[n_genes]``
    temperature: NDArray[np.float64]

    @property
    def held_out(self) -> NDArray[np.float64]:
        """Negative log-likelihood of all groups, in nats, ``[n_penalties, n_genes]``."""
        return self.left_out.total


def choose_penalty(
    design: Design,
    penalties: ArrayLike,
    choose: Choose = lowest,
    *,
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
    work = partial(_left_out, design, penalties)
    parts = list(design.each_block(work, advance))
    left_out = LeftOut(*np.concatenate(parts, axis=-1))
    best = choose(left_out.total)
    return PenaltyChoice(penalties[best], penalties, left_out, temperature(left_out, choose))


def best_of(
    choices: Sequence[PenaltyChoice], choose: Choose
) -> tuple[PenaltyChoice, NDArray[np.intp]]:
    """Choose among the same penalties of several fits; also returns whose each gene's is."""
    left_out = reduce(LeftOut.beside, (choice.left_out for choice in choices))
    penalties, best = np.tile(choices[0].penalties, len(choices)), choose(left_out.total)
    choice = PenaltyChoice(penalties[best], penalties, left_out, temperature(left_out, choose))
    return choice, best // len(choices[0].penalties)


def best_for_all(losses: NDArray[np.float64]) -> NDArray[np.intp]:
    """Choose the candidate of lowest loss for all genes together."""
    return np.full(losses.shape[1], losses.sum(1).argmin())


def _left_out(design: Design, penalties: NDArray[np.float64], block: Block) -> NDArray[np.float64]:
    """Leave every group out; as `LeftOut` has it, ``[3, n_groups, n_penalties, n_genes]``."""
    paths = [_path(design, block, penalties, group) for group in range(design.n_groups)]
    return torch.stack(paths, 1).cpu().numpy()


def _path(design: Design, block: Block, penalties: NDArray[np.float64], left_out: int) -> Tensor:
    """Leave a group out at each penalty, from the largest down, ``[3, n_penalties, n_genes]``."""
    # Scale and axes, too, are those of the training groups alone.
    training = design.training(block, penalties[0], left_out)
    test = design.held_out(block, training, left_out)
    axes, found = torch.zeros_like(test.xtc), []
    start = value_and_gradient(test, axes)[1]
    for penalty in penalties.tolist():
        problem = replace(training, penalty=torch.full_like(training.penalty, penalty))
        # Every fit starts from the one before, which is near.
        axes = descend(
            problem, axes, tolerance=_PATH_TOLERANCE, max_iterations=_PATH_ITERATIONS
        ).axes
        found.append(left_out_of(test, axes, start))
    return torch.stack(found, 1)
