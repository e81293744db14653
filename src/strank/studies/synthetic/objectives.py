"""The objectives that the study compares, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sklearn.base import BaseEstimator
from sklearn.linear_model import LinearRegression, PoissonRegressor

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

#: N_k of the ablation. A batch of 256 holds 128 spots a tissue: larger lists are whole sections.
LIST_SIZES = (2, 4, 8, 16, 32, 64)

#: Centre of the window that the published code draws with its one seed, 42.
PUBLISHED_CENTRE = 0.3745

_PARTNERS = 32


@dataclass(frozen=True)
class Objective:
    """An objective."""

    title: str  # For tables and figures
    # Number of columns and a seed, to the loss of as many independent networks
    loss: Callable[[int, int], SectionLoss]
    # Estimator whose optimum on a spline basis is that of this objective, if scikit-learn has one;
    # the list objective has ours
    exact: Callable[[], BaseEstimator] | None = None
    on_counts: bool = False  # Whether that estimator is fitted to counts, not to log1p of them


def list_of(size: int) -> Objective:
    """ListSTRank on random lists of so many spots."""
    return Objective(f"N_k = {size}", lambda _, seed: ListSTRankLoss(size, "sum", seed))


# Least squares maximises the pooled Pearson correlation too: to a linear head MSE and PCC are one.
OBJECTIVES = {
    "mse": Objective("MSE", lambda n, seed: MSELoss("sum"), LinearRegression),
    "poisson": Objective(
        "Poisson",
        lambda n, seed: PoissonLoss(reduction="sum"),
        lambda: PoissonRegressor(alpha=1e-9, solver="newton-cholesky"),
        on_counts=True,
    ),
    "nb": Objective("NB", lambda n, seed: NegativeBinomialLoss(n, reduction="sum")),
    "rank": Objective(
        "Rank (published)",
        lambda n, seed: MarginRankingLoss(0.0, "second", _PARTNERS, "sum", seed),
    ),
    "rank_margin": Objective(
        "Rank (margin 1)", lambda n, seed: MarginRankingLoss(1.0, "none", _PARTNERS, "sum", seed)
    ),
    "pair": Objective("PairSTRank", lambda n, seed: PairSTRankLoss(1, "sum", seed)),
    "pcc": Objective("PCC (published)", lambda n, seed: PearsonLoss(True, "sum")),
    "pcc_section": Objective("PCC per section", lambda n, seed: PearsonLoss(False, "sum")),
    "list": Objective("ListSTRank", lambda n, seed: ListSTRankLoss(None, "sum", seed)),
}

POINTWISE = ("mse", "poisson", "nb")

#: SCC of the paper's tables 1 and 3 (arXiv 2512.06612), by sampling.
PAPER: dict[str, dict[str, float]] = {
    "uniform": {
        "mse": 0.748,
        "poisson": 0.777,
        "nb": 0.788,
        "rank": 0.835,
        "pair": 0.907,
        "pcc": 0.858,
        "list": 0.945,
    },
    "imbalanced": {
        "mse": 0.583,
        "poisson": 0.603,
        "nb": 0.601,
        "rank": 0.738,
        "pair": 0.818,
        "pcc": 0.56,
        "list": 0.828,
    },
}
for _sampling, _row in {
    "uniform": (0.907, 0.938, 0.958, 0.943, 0.938, 0.926, 0.941, 0.945),
    "imbalanced": (0.818, 0.837, 0.839, 0.833, 0.818, 0.827, 0.845, 0.828),
}.items():
    PAPER[_sampling] |= {f"list_{2 ** (k + 1)}": scc for k, scc in enumerate(_row)}
