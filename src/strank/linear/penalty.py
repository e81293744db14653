"""Choosing the penalty by leaving whole groups of sections out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from strank.linear.calibration import Choose, LeftOut, left_out_of, lowest, temperature
from strank.linear.design import Block, Design
from strank.linear.solver import descend

PENALTIES: tuple[float, ...] = tuple(float(p) for p in np.logspace(5, 0.5, 10))

# Where nothing can be left out; about what is chosen on real sections of some 10,000 counts a spot.
DEFAULT_PENALTY = 300.0

# Held-out likelihood is flat where the path is compared, so its points need no more.
_PATH_TOLERANCE = 1e-4
_PATH_ITERATIONS = 500
# A gene has passed its best where penalties down to a tenth of it, two or more, are worse. Looked
# for from the second such stretch on, since losses of two patients rise and fall again at first.
_PASSED, _CANDIDATES = 10.0, 2


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
    left_out = _walk(design, penalties, choose, advance or (lambda _: None))
    return _chosen(penalties[: left_out.loss.shape[1]], left_out, choose)[0]


def best_of(
    choices: Sequence[PenaltyChoice], choose: Choose
) -> tuple[PenaltyChoice, NDArray[np.intp]]:
    """Choose among the penalties of several fits; also returns whose each gene's is."""
    left_out = reduce(LeftOut.beside, (choice.left_out for choice in choices))
    penalties = [choice.penalties for choice in choices]
    choice, best = _chosen(np.concatenate(penalties), left_out, choose)
    return choice, np.repeat(np.arange(len(choices)), list(map(len, penalties)))[best]


def _chosen(
    penalties: NDArray[np.float64], left_out: LeftOut, choose: Choose
) -> tuple[PenaltyChoice, NDArray[np.intp]]:
    best, held = choose(left_out.total), temperature(left_out, choose)
    return PenaltyChoice(penalties[best], penalties, left_out, held), best


def best_for_all(losses: NDArray[np.float64]) -> NDArray[np.intp]:
    """Choose the candidate of lowest loss for all genes together."""
    return np.full(losses.shape[1], losses.sum(1).argmin())


def _walk(
    design: Design,
    penalties: NDArray[np.float64],
    choose: Choose,
    advance: Callable[[int], object],
) -> LeftOut:
    """Leave every group out along the path, as far down as what is best may lie.

    What is best of all groups, and of all but each, must have been passed. A gene leaves the path
    by itself if it chooses for itself, else all genes together.
    """
    n, marks, going = len(penalties), _marks(penalties), np.arange(design.n_genes)
    table = np.full((3, design.n_groups, n, design.n_genes), np.inf)
    table[1:], start = np.nan, 0
    for last in sorted({*marks[2:], n - 1}):
        some, leg = design.of_genes(going), slice(start, last + 1)
        parts = []
        for part in some.each_block(partial(_left_out, some, penalties[leg])):
            parts.append(part)
            advance(part[0, 0].size)
        table[:, :, leg, going] = np.concatenate(parts, axis=-1)
        start, found = last + 1, LeftOut(*table[:, :, : last + 1])
        passed = max((mark for mark in marks if mark < last), default=0)
        late = _may_be_later(found, choose, passed)[going]
        stay = late if choose is lowest else np.full(len(going), late.any())
        advance((len(going) - stay.sum()) * (n - start))
        going = going[stay]
        if not len(going):
            break
    return found


def _may_be_later(found: LeftOut, choose: Choose, passed: int) -> NDArray[np.bool_]:
    """Tell for which genes a later candidate may be best, of all groups or of all but any.

    Their best lies beyond what has been passed, or the loss falls again at the end.
    """
    losses = [found.total, *found.without_each]
    return np.any([(choose(of) > passed) | (choose(of[-2:]) > 0) for of in losses], axis=0)


def _marks(penalties: NDArray[np.float64]) -> list[int]:
    """Find candidates of which each shows that those up to the one before have been passed.

    >>> _marks(np.array(PENALTIES))
    [0, 2, 4, 6, 8]
    """
    marks = [0]
    for number, penalty in enumerate(penalties):
        far = penalties[marks[-1]] >= (1 - 1e-9) * _PASSED * penalty
        if far and number >= marks[-1] + _CANDIDATES:
            marks.append(number)
    return marks


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
    curvature = training.told.clamp(min=1) * training.geometry.variances[:, None]
    for before, penalty in pairwise([penalties[0], *penalties]):
        problem = replace(training, penalty=torch.full_like(training.penalty, penalty))
        # Where the fit before would have its optimum if counts told the same of any weights.
        axes = axes * ((curvature + before) / (curvature + penalty))
        axes = descend(
            problem, axes, tolerance=_PATH_TOLERANCE, max_iterations=_PATH_ITERATIONS
        ).axes
        found.append(left_out_of(test, axes))
    return torch.stack(found, 1)
