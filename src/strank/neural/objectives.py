"""Objectives by name, and the level at which scores start."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from strank.errors import InputError
from strank.functional.metrics import log1p_cp10k
from strank.losses import (
    ListSTRankLoss,
    MarginRankingLoss,
    MSELoss,
    NegativeBinomialLoss,
    PairSTRankLoss,
    PearsonLoss,
    PoissonLoss,
    SectionLoss,
)

__all__ = ["OBJECTIVES", "make_objective", "start_level"]

OBJECTIVES: dict[str, Callable[[int], SectionLoss]] = {
    "list": lambda n_genes: ListSTRankLoss(distributed=True),
    "pair": lambda n_genes: PairSTRankLoss(),
    "rank": lambda n_genes: MarginRankingLoss(),
    "pearson": lambda n_genes: PearsonLoss(),
    "mse": lambda n_genes: MSELoss(),
    "poisson": lambda n_genes: PoissonLoss(),
    "nb": NegativeBinomialLoss,
}


def make_objective(name: str, n_genes: int) -> SectionLoss:
    """Make the objective of that name; an :class:`InputError` lists the choices.

    Examples
    --------
    >>> make_objective("list", 50)
    ListSTRankLoss()
    """
    if name not in OBJECTIVES:
        raise InputError(f"no loss {name!r}; choose one of {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name](n_genes)


def start_level(loss: SectionLoss, counts: sparse.csr_matrix, offset: NDArray) -> Tensor | None:
    """Mean level of every gene, for an objective whose scores have one, ``[n_genes]``.

    From 0, a small learning rate would spend its epochs on the way there.
    """
    if isinstance(loss, MSELoss):
        return torch.as_tensor(log1p_cp10k(counts, np.exp(offset)).mean(0)).float().flatten()
    if isinstance(loss, PoissonLoss):
        total = torch.as_tensor(np.asarray(counts.sum(0)).ravel())
        return (total.clamp(min=0.5) / float(np.exp(offset, dtype=np.float64).sum())).log().float()
    return None
