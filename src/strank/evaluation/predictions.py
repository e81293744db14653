"""What a model, its baselines and no image at all predict for some sections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse

from strank.cohort.panel import counts_of
from strank.evaluation.baselines import BASELINES, Predict, depth_scores, without_image
from strank.functional.deviance import score_slope
from strank.model import RankModel
from strank.neural.objectives import LOG_RATES
from strank.training_set import TrainingData, training_data

__all__ = ["Predicted", "has_log_rates", "predict_all", "training_slope"]


@dataclass(frozen=True)
class Predicted:
    """Predictions of several methods.

    Attributes
    ----------
    sections
        Section, then method, to scores ``[n_spots, n_genes]``.
    slopes
        Of methods whose scores are no log rates, as in `score_section`.
    """

    sections: dict[str, dict[str, NDArray]]
    slopes: dict[str, NDArray]


def predict_all(
    model: RankModel, cohort: Mapping[str, AnnData], *, train: Mapping[str, AnnData]
) -> Predicted:
    """Predict every section by the model and by what stands beside it.

    Parameters
    ----------
    model
        A trained model.
    cohort, train
        As in `evaluate`.

    Returns
    -------
    Predicted
        Of the model, of the baselines fitted on its training sections, and of no image
        (`without_image`).
    """
    encoder = model.encoder["name"]
    baselines = {
        method: _fit_where_measured(fit, train, model.panel.index, encoder)
        for method, fit in BASELINES.items()
    }
    methods: dict[str, Callable[[AnnData], NDArray]] = {
        model.method: lambda adata: np.asarray(model.predict(adata).X)
    } | {name: partial(_by_features, predict, encoder) for name, predict in baselines.items()}
    slopes = {
        name: training_slope(predict, train, model.panel.index)
        for name, predict in methods.items()
        if not has_log_rates(name)
    }
    depth = partial(depth_scores, len(model.panel))
    slopes["library size"] = training_slope(depth, train, model.panel.index)
    sections = {}
    for name, adata in cohort.items():
        found = {method: predict(adata) for method, predict in methods.items()}
        rest = without_image(found[model.method], adata.obs["library_size"].to_numpy())
        sections[name] = found | rest
    return Predicted(sections, slopes)


def training_slope(
    predict: Callable[[AnnData], NDArray], train: Mapping[str, AnnData], panel: pd.Index
) -> NDArray[np.float64]:
    """Find the slopes that turn a method's scores of its training sections into log rates.

    Parameters
    ----------
    predict
        A section to its scores.
    train
        Training sections.
    panel
        Genes of the scores.
    """
    return score_slope(
        np.concatenate([predict(adata) for adata in train.values()]),
        sparse.vstack([counts_of(adata, panel) for adata in train.values()]),
        section=np.repeat(list(train), [adata.n_obs for adata in train.values()]),
        library_size=np.concatenate([adata.obs["library_size"] for adata in train.values()]),
    )


def _fit_where_measured(
    fit: Callable[[TrainingData], Predict],
    train: Mapping[str, AnnData],
    panel: pd.Index,
    encoder: str,
) -> Predict:
    """Fit genes on the sections that measure them: those with the same sections together."""
    measured = np.stack([panel.isin(adata.var_names) for adata in train.values()])
    patterns, of_gene = np.unique(measured, axis=1, return_inverse=True)
    fitted = []
    for number, pattern in enumerate(patterns.T):
        sections = {name: train[name] for name in np.array(list(train))[pattern]}
        genes = of_gene == number
        fitted.append((genes, fit(training_data(sections, panel[genes], encoder))))

    def predict(features: NDArray) -> NDArray[np.float64]:
        scores = np.empty((len(features), len(panel)))
        for genes, part in fitted:
            scores[:, genes] = part(features)
        return scores

    return predict


def has_log_rates(method: str) -> bool:
    """Whether a method's objective makes its scores log rates.

    Examples
    --------
    >>> has_log_rates("mlp, list"), has_log_rates("mlp, mse"), has_log_rates("ridge")
    (True, False, False)
    """
    return method.rpartition(", ")[2] in LOG_RATES


def _by_features(
    predict: Callable[[NDArray], NDArray], encoder: str, adata: AnnData
) -> NDArray[np.float64]:
    return predict(adata.obsm[encoder])
