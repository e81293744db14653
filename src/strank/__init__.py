"""Learn relative gene expression from pathology images.

Importing this package loads nothing heavy: each name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from strank.version import __version__

if TYPE_CHECKING:
    from strank.cohort.store import read_cohort
    from strank.evaluation.held_out import cross_validate, evaluate
    from strank.fitting.exact import fit_model
    from strank.fitting.finetune import finetune_model
    from strank.fitting.networks import train_model
    from strank.linear.regressor import STRankRegressor, STRankRegressorCV
    from strank.losses import (
        ListSTRankLoss,
        MarginRankingLoss,
        MSELoss,
        NegativeBinomialLoss,
        PairSTRankLoss,
        PearsonLoss,
        PoissonLoss,
    )
    from strank.model.rank_model import RankModel

_HOMES = {
    "ListSTRankLoss": "strank.losses",
    "PairSTRankLoss": "strank.losses",
    "MSELoss": "strank.losses",
    "MarginRankingLoss": "strank.losses",
    "NegativeBinomialLoss": "strank.losses",
    "PearsonLoss": "strank.losses",
    "PoissonLoss": "strank.losses",
    "RankModel": "strank.model.rank_model",
    "STRankRegressor": "strank.linear.regressor",
    "STRankRegressorCV": "strank.linear.regressor",
    "cross_validate": "strank.evaluation.held_out",
    "evaluate": "strank.evaluation.held_out",
    "finetune_model": "strank.fitting.finetune",
    "fit_model": "strank.fitting.exact",
    "read_cohort": "strank.cohort.store",
    "train_model": "strank.fitting.networks",
}

__all__ = [
    "ListSTRankLoss",
    "MSELoss",
    "MarginRankingLoss",
    "NegativeBinomialLoss",
    "PairSTRankLoss",
    "PearsonLoss",
    "PoissonLoss",
    "RankModel",
    "STRankRegressor",
    "STRankRegressorCV",
    "__version__",
    "cross_validate",
    "evaluate",
    "finetune_model",
    "fit_model",
    "read_cohort",
    "train_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'strank' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
