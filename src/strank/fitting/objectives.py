"""The objectives by name: what each command means by one is written here once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from strank.errors import no_such
from strank.fitting.exact import (
    Solve,
    solve_list,
    solve_negative_binomial,
    solve_pair,
    solve_poisson,
    solve_ridge,
)
from strank.fitting.published import (
    PermutedPairLoss,
    PermutedRankLoss,
    panel_mean,
    panel_mean_above_zero,
    panel_total,
)
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
from strank.metrics.correlation import log1p_cp10k
from strank.neural.recipe import Monitor

Counts: TypeAlias = sparse.csr_matrix | NDArray[np.float32]
#: Counts of the panel, ``[n_spots, n_genes]``, to the depth of every spot.
DepthOf: TypeAlias = Callable[[Any], NDArray[np.float64]]


def log1p_level(counts: Counts, offset: NDArray) -> Tensor:
    """Mean log1p(CP10k) of every gene, ``[n_genes]``."""
    return torch.as_tensor(log1p_cp10k(counts, np.exp(offset)).mean(0)).float().flatten()


def log_rate_level(counts: Counts, offset: NDArray) -> Tensor:
    """Log of every gene's counts a unit of depth, ``[n_genes]``."""
    total = torch.as_tensor(counts.T @ np.ones(len(offset)))
    return (total.clamp(min=0.5) / float(np.exp(offset, dtype=np.float64).sum())).log().float()


class Published(NamedTuple):
    """An objective by the published recipe."""

    #: As that of an `Objective`.
    module: Callable[..., SectionLoss]
    #: What takes the place of library size.
    depth: DepthOf


@dataclass(frozen=True)
class Objective:
    """What a head is fitted by."""

    name: str
    #: For figures and prose.
    title: str
    #: ``module(n_genes, reduction, *, seed=None, **options)`` makes the loss; a seed is for those
    #: that draw, other options are those of its class in `strank.losses`.
    module: Callable[..., SectionLoss]
    #: Whether scores are log rates; else they have another scale, and need a slope.
    log_rates: bool = False
    #: Solver of a linear head.
    exact: Solve | None = None
    #: Counts and offsets to the level of every gene, where scores have one: from 0, a small
    #: learning rate would spend its epochs on the way there.
    start_level: Callable[[Counts, NDArray], Tensor] | None = None
    #: Whether a section without counts of a gene has no say in it: then it need not measure it.
    unmeasured: bool = False
    published: Published | None = None

    @property
    def monitor(self) -> Monitor:
        """Score of held-out sections that stops a network, on the scale of the scores."""
        return "list_gain" if self.log_rates else "spearman"


def _drawn(make: Callable[..., SectionLoss], **own: Any) -> Callable[..., SectionLoss]:
    """Make the module of a loss that draws at random."""
    return lambda n_genes, reduction="mean", *, seed=None, **options: make(
        reduction=reduction, seed=seed, **own | options
    )


def _plain(make: Callable[..., SectionLoss], **own: Any) -> Callable[..., SectionLoss]:
    """Make the module of a loss without chance."""
    return lambda n_genes, reduction="mean", *, seed=None, **options: make(
        reduction=reduction, **own | options
    )


def _negative_binomial(
    n_genes: int, reduction: Any = "mean", *, seed: int | None = None, **options: Any
) -> SectionLoss:
    return NegativeBinomialLoss(n_genes, reduction=reduction, **options)


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            "list",
            "ListSTRank",
            # Whole sections, wherever their spots lie.
            _drawn(ListSTRankLoss, distributed=True),
            log_rates=True,
            exact=solve_list,
            unmeasured=True,
            published=Published(_plain(ListSTRankLoss), panel_mean_above_zero),
        ),
        Objective(
            "pair",
            "PairSTRank",
            _drawn(PairSTRankLoss),
            log_rates=True,
            exact=solve_pair,
            unmeasured=True,
            published=Published(_plain(PermutedPairLoss), panel_mean_above_zero),
        ),
        Objective(
            "rank",
            "Rank (margin 1)",
            _drawn(MarginRankingLoss),
            published=Published(_plain(PermutedRankLoss), panel_total),
        ),
        # With margin 0, constant scores are an optimum.
        Objective(
            "rank-published",
            "Rank (published)",
            _drawn(MarginRankingLoss, margin=0.0, ties="second", n_partners=32),
        ),
        Objective(
            "pcc",
            "PCC (published)",
            _plain(PearsonLoss, pooled=True),
            published=Published(_plain(PearsonLoss, pooled=True), panel_total),
        ),
        Objective("section-pcc", "PCC per section", _plain(PearsonLoss)),
        Objective(
            "mse",
            "MSE",
            _plain(MSELoss),
            exact=solve_ridge,
            start_level=log1p_level,
            published=Published(_plain(MSELoss), panel_total),
        ),
        Objective(
            "poisson",
            "Poisson",
            _plain(PoissonLoss),
            log_rates=True,
            exact=solve_poisson,
            start_level=log_rate_level,
            published=Published(_plain(PoissonLoss), panel_mean),
        ),
        Objective(
            "nb",
            "NB",
            _negative_binomial,
            log_rates=True,
            exact=solve_negative_binomial,
            start_level=log_rate_level,
            published=Published(_negative_binomial, panel_mean),
        ),
    )
}


def get_objective(name: str) -> Objective:
    """Look an objective up; an unknown name lists the choices.

    Examples
    --------
    >>> get_objective("list").module(50, "sum")
    ListSTRankLoss()
    """
    if name not in OBJECTIVES:
        raise no_such("loss", name, OBJECTIVES)
    return OBJECTIVES[name]
