"""Choosing the penalty by leaving whole groups of sections out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from strank.linear.problem import ListProblem
from strank.linear.scaling import Scaling
from strank.linear.solver import minimise

__all__ = [
    "DEFAULT_PENALTY",
    "PENALTIES",
    "Data",
    "PenaltyChoice",
    "choose_penalty",
    "penalty_path",
]

PENALTIES: tuple[float, ...] = tuple(float(p) for p in np.logspace(5, 0.5, 10))

# Where nothing can be left out; about what is chosen on real sections of some 10,000 counts a spot.
DEFAULT_PENALTY = 300.0

# Held-out likelihood is flat where the path is compared, so its points need no more.
_PATH_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Data:
    """Spots to fit on.

    Attributes
    ----------
    features
        ``[n_spots, n_features]``, not scaled.
    counts
        CSR, ``[n_spots, n_genes]``.
    section
        Codes ``0 .. n_sections - 1``, ``[n_spots]``.
    offset
        Log library size, ``[n_spots]``.
    """

    features: NDArray[np.float64]
    counts: sparse.csr_matrix
    section: NDArray[np.int64]
    offset: NDArray[np.float64]

    def take(self, rows: NDArray[np.bool_]) -> Data:
        """Return some of the spots, sections relabelled without gaps."""
        _, codes = np.unique(self.section[rows], return_inverse=True)
        return Data(self.features[rows], self.counts[rows], codes, self.offset[rows])

    def problem(self, scaling: Scaling) -> ListProblem:
        """Set up the objective on standardised features, in float64."""
        return ListProblem.from_counts(
            torch.as_tensor(scaling.apply(self.features)),
            self.counts,
            section=torch.as_tensor(self.section),
            n_sections=int(self.section.max()) + 1,
            offset=torch.as_tensor(self.offset),
        )


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


def penalty_path(problem: ListProblem, penalties: NDArray[np.float64]) -> Iterator[Tensor]:
    """Yield the weights at each penalty, each fit started from the one before."""
    weights: Tensor | None = None
    for penalty in penalties:
        weights = minimise(
            problem, float(penalty), start=weights, tolerance=_PATH_TOLERANCE
        ).weights
        yield weights


def choose_penalty(
    data: Data, group: NDArray[np.int64], penalties: NDArray[np.float64]
) -> PenaltyChoice:
    """Choose for each gene the penalty of highest likelihood on groups left out in turn.

    Parameters
    ----------
    data
        Spots, with unscaled features: each fit standardises on its own training part.
    group
        What is left out together (a section or a patient), ``[n_spots]``; at least two groups,
        each made of whole sections.
    penalties
        Candidates, in counts.

    Returns
    -------
    PenaltyChoice
        A gene without counts, or for which no penalty is better than another, gets the largest.

    Raises
    ------
    ValueError
        If there is only one group.
    """
    groups = np.unique(group)
    if len(groups) < 2:
        raise ValueError("choosing a penalty needs at least two sections; give the penalty instead")
    penalties = np.sort(np.asarray(penalties, dtype=np.float64))[::-1].copy()
    held_out = torch.zeros(len(penalties), data.counts.shape[1], dtype=torch.float64)
    for left_out in groups:
        inner, outer = data.take(group != left_out), data.take(group == left_out)
        scaling = Scaling.fit(inner.features, inner.section)
        test = outer.problem(scaling)
        for k, weights in enumerate(penalty_path(inner.problem(scaling), penalties)):
            held_out[k] += test.loss(weights)
    best = held_out.argmin(0).numpy()
    return PenaltyChoice(penalties[best], penalties, held_out.numpy())
