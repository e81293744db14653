r"""How much of the scores holds for groups that were not seen: what they are multiplied by.

The counts of a group that was left out say how large the score differences of the others should
have been there: :math:`b = \arg\min_b L(b r)` for its list loss :math:`L`. Most genes have too few
counts, and most cohorts too few patients, for a factor of their own, so the factors of genes are
shrunken towards the common one as far as they differ by chance, and that towards 0 as far as it is
itself unsure (James and Stein; the moments are those of DerSimonian and Laird, 1986).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strank.linear.objective import Problem, along

# Of a table of losses ``[n_candidates, n_genes]`` the candidate of each gene.
Choose = Callable[[NDArray[np.float64]], NDArray[np.intp]]

# Where nothing of the scores holds elsewhere: they keep their order, and next to no size.
LEAST = 0.01
# How sure the common factor is to be: of one that is as large as so many squared standard errors
# nothing is left.
_SURE = 2.0
# What the mean loss of all genes weighs beside a gene's own, of two patients.
_ALL = 10.0
_STEPS, _LOWEST, _HIGHEST = 3, -1.0, 3.0


@dataclass(frozen=True)
class LeftOut:
    """What groups left out in turn say of every candidate and gene.

    Each ``[n_groups, n_candidates, n_genes]``. Of a candidate that was not tried for a gene, being
    beyond all that could be its best, the loss is ``inf`` and the rest NaN.
    """

    loss: NDArray[np.float64]  #: list loss of the group, in nats, up to a constant
    slope: NDArray[np.float64]  #: factor of the scores that has the lowest loss
    information: NDArray[np.float64]  #: about the slope, the inverse of a variance

    @property
    def total(self) -> NDArray[np.float64]:
        """Loss of all groups, ``[n_candidates, n_genes]``."""
        return self.loss.sum(0)

    @property
    def without_each(self) -> NDArray[np.float64]:
        """Loss of all groups but each, ``[n_groups, n_candidates, n_genes]``."""
        return np.stack([np.delete(self.loss, g, 0).sum(0) for g in range(len(self.loss))])

    def without(self, group: int) -> LeftOut:
        """Let a group say nothing."""
        return LeftOut(*(np.delete(values, group, axis=0) for values in vars(self).values()))

    def beside(self, other: Self) -> LeftOut:
        """Add the candidates of another."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return LeftOut(*(np.concatenate(pair, axis=1) for pair in pairs))


def left_out_of(problem: Problem, axes: Tensor) -> Tensor:
    """Loss, slope and information of what is left out, ``[3, n_genes]``.

    The slope is the root of a rising function, by secants.
    """
    (_, low), (loss, high) = along(problem, axes, (0.0, 1.0))
    information = (high - low).clamp(min=0)
    before, now = torch.zeros_like(low), torch.ones_like(low)
    rise = low
    for _ in range(_STEPS):
        step = (high * (now - before) / (high - rise)).nan_to_num(0, 0, 0)
        before, rise = now, high
        now = (now - step).clamp(_LOWEST, _HIGHEST)
        ((_, high),) = along(problem, axes, (now,))
    return torch.stack([loss, now, information])


def lowest(losses: NDArray[np.float64]) -> NDArray[np.intp]:
    """Choose the candidate of lowest loss, for each gene by itself."""
    return losses.argmin(0)


def mostly_as_all(losses: NDArray[np.float64]) -> NDArray[np.intp]:
    """Choose for each gene by its own losses and, ten times as much, the mean of all genes.

    Two patients tell of a gene whether one is like the other, and no more: where chance says that
    they are, it would choose small penalties and large scores at once.

    >>> mostly_as_all(np.array([[1.0, 1.0, 1.0], [0.9, 1.2, 1.2]]))
    array([0, 0, 0])
    """
    return np.asarray((losses + _ALL * losses.mean(1, keepdims=True)).argmin(0))


def temperature(left_out: LeftOut, choose: Choose) -> NDArray[np.float64]:
    """Find what the scores of each gene are multiplied by for groups not seen, ``[n_genes]``.

    The candidate at which a group's slope is taken is chosen by the other groups: the best for all
    is, for each, the luckiest one too.

    Examples
    --------
    Two groups of which either has half of what the scores say:

    >>> one = np.ones((2, 1, 3))
    >>> temperature(LeftOut(0 * one, 0.5 * one, 1e6 * one), lowest)
    array([0.5, 0.5, 0.5])
    """
    genes = np.arange(left_out.loss.shape[2])
    picks = np.stack([choose(losses) for losses in left_out.without_each])
    groups = np.arange(len(picks))[:, None]
    slope, information = (v[groups, picks, genes] for v in (left_out.slope, left_out.information))
    return shrunken(slope, information)


def shrunken(slope: NDArray, information: NDArray) -> NDArray[np.float64]:
    """Shrink the slopes of groups, ``[n_groups, n_genes]``, to a factor of each gene.

    >>> shrunken(np.zeros((2, 2)), np.ones((2, 2)))
    array([0.01, 0.01])
    """
    weight = information.sum(0)
    if not weight.any():
        return np.ones_like(weight)
    of_gene, noise = _mean_and_variance(slope, information)
    common = np.average(of_gene, weights=weight)
    # Of what patients differ by, all genes tell; of what counts do, each has its own.
    noise = np.average(noise, weights=weight) + 1 / np.maximum(weight, 1e-300)
    differ = np.average((of_gene - common) ** 2 - noise, weights=weight)
    kept = max(differ, 0.0) / (max(differ, 0.0) + noise)
    of_group = np.average(slope, axis=1, weights=information + 1e-300)
    over_groups = _mean_and_variance(of_group, information.sum(1))[1]
    over_genes = (((weight / weight.sum()) * (of_gene - common)) ** 2).sum()
    unsure = _SURE * max(over_groups, over_genes)
    sure = max(0.0, common - unsure / common) if common > 0 else 0.0
    return np.maximum(sure + kept * (of_gene - common), LEAST)


def _mean_and_variance(values: NDArray, weight: NDArray) -> tuple[NDArray, NDArray]:
    """Weighted mean over groups, and the variance of that as the groups tell it."""
    n_groups = len(values)
    part = weight / np.maximum(weight.sum(0), 1e-300)
    mean = (part * values).sum(0)
    return mean, (part**2 * (values - mean) ** 2).sum(0) * n_groups / max(n_groups - 1, 1)
