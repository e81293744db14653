"""Objectives by name, and the level at which scores start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from strank.errors import InputError
from strank.functional.batch import Reduction
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
from strank.neural.recipe import Monitor, Recipe

__all__ = ["LOG_RATES", "OBJECTIVES", "MakeLoss", "loss_maker", "monitored", "start_level"]

LOG_RATES = ("list", "pair", "poisson", "nb")

MakeLoss = Callable[[int], SectionLoss]

OBJECTIVES: dict[str, Callable[..., SectionLoss]] = {
    "list": lambda n_genes, reduction: ListSTRankLoss(reduction=reduction, distributed=True),
    "pair": lambda n_genes, reduction: PairSTRankLoss(reduction=reduction),
    "rank": lambda n_genes, reduction: MarginRankingLoss(reduction=reduction),
    "pcc": lambda n_genes, reduction: PearsonLoss(pooled=True, reduction=reduction),
    "section-pcc": lambda n_genes, reduction: PearsonLoss(reduction=reduction),
    "mse": lambda n_genes, reduction: MSELoss(reduction=reduction),
    "poisson": lambda n_genes, reduction: PoissonLoss(reduction=reduction),
    "nb": lambda n_genes, reduction: NegativeBinomialLoss(n_genes, reduction=reduction),
}


def loss_maker(name: str, reduction: Reduction) -> MakeLoss:
    """Return what makes an objective from the number of genes; an unknown name lists the choices.

    Examples
    --------
    >>> loss_maker("list", "mean")(50)
    ListSTRankLoss()
    """
    if name not in OBJECTIVES:
        raise InputError(f"no loss {name!r}; choose one of {', '.join(OBJECTIVES)}")
    return partial(OBJECTIVES[name], reduction=reduction)


def monitored(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with the score by which a network of that objective is stopped.

    Examples
    --------
    >>> monitored(Recipe(), "mse").monitor
    'spearman'
    """
    usual: Monitor = "list_gain" if name in LOG_RATES else "spearman"
    return replace(recipe, monitor=recipe.monitor or usual)


def start_level(
    loss: SectionLoss, counts: sparse.csr_matrix | NDArray[np.float32], offset: NDArray
) -> Tensor | None:
    """Mean level of every gene, for an objective whose scores have one, ``[n_genes]``.

    From 0, a small learning rate would spend its epochs on the way there.
    """
    if isinstance(loss, MSELoss):
        return torch.as_tensor(log1p_cp10k(counts, np.exp(offset)).mean(0)).float().flatten()
    if isinstance(loss, PoissonLoss):
        total = torch.as_tensor(np.asarray(counts.sum(0)).ravel())
        return (total.clamp(min=0.5) / float(np.exp(offset, dtype=np.float64).sum())).log().float()
    return None
