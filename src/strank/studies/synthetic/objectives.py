"""The objectives that the study compares, its list sizes, and the paper's numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sklearn.base import BaseEstimator
from sklearn.linear_model import LinearRegression, PoissonRegressor

from strank.fitting.objectives import OBJECTIVES
from strank.losses import SectionLoss

# In the order of its tables.
COMPARED = (
    *("mse", "poisson", "nb"),
    *("rank-published", "rank", "pair", "pcc", "section-pcc", "list"),
)
POINTWISE = ("mse", "poisson", "nb")

#: N_k of the ablation. A batch of 256 holds 128 spots a tissue: larger lists are whole sections.
LIST_SIZES = (2, 4, 8, 16, 32, 64)
#: Name to size: ListSTRank on random lists of so many spots.
LISTS = {f"list_{size}": size for size in LIST_SIZES}

#: Centre of the window that the published code draws with its one seed, 42.
PUBLISHED_CENTRE = 0.3745

_PARTNERS = 32


def make_loss(name: str, n_columns: int, seed: int) -> SectionLoss:
    """Make the loss of as many independent networks as there are columns."""
    if name in LISTS:
        return OBJECTIVES["list"].module(n_columns, "sum", seed=seed, list_size=LISTS[name])
    # As many as the published one has, so that only margin and ties differ.
    options = {"n_partners": _PARTNERS} if name == "rank" else {}
    return OBJECTIVES[name].module(n_columns, "sum", seed=seed, **options)


class Exact(NamedTuple):
    """Estimator whose optimum on a spline basis is that of an objective."""

    make: Callable[[], BaseEstimator]
    #: Whether it is fitted to counts, not to log1p of them.
    on_counts: bool = False


#: Where scikit-learn has one; the list objective has ours. Least squares maximises the pooled
#: Pearson correlation too: to a linear head MSE and PCC are one.
EXACT = {
    "mse": Exact(LinearRegression),
    "poisson": Exact(
        lambda: PoissonRegressor(alpha=1e-9, solver="newton-cholesky"), on_counts=True
    ),
}

#: SCC of the paper's tables 1 and 3 (arXiv 2512.06612), by sampling.
PAPER: dict[str, dict[str, float]] = {
    "uniform": {
        "mse": 0.748,
        "poisson": 0.777,
        "nb": 0.788,
        "rank-published": 0.835,
        "pair": 0.907,
        "pcc": 0.858,
        "list": 0.945,
    },
    "imbalanced": {
        "mse": 0.583,
        "poisson": 0.603,
        "nb": 0.601,
        "rank-published": 0.738,
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
