"""What stands beside every model: ridge regression, library size alone, and shuffled scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from anndata import AnnData
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from strank.functional.metrics import log1p_cp10k
from strank.linear.geometry import centre_within
from strank.linear.threads import few_threads
from strank.training_set import TrainingData

__all__ = ["BASELINES", "Predict", "depth_scores", "fit_ridge", "without_image"]

ALPHAS = np.logspace(-1, 5, 13)

Predict = Callable[[NDArray[np.float32]], NDArray[np.float64]]


def fit_ridge(data: TrainingData, *, centred: bool) -> Predict:
    """Fit scikit-learn's ridge for all genes; the penalty by leaving the same sections out.

    Parameters
    ----------
    data
        Training spots.
    centred
        Subtract the mean of each section from features and targets, which removes a shift between
        sections; by mean squared error on the held-out sections either way.

    Returns
    -------
    Callable
        Maps features ``[n_spots, n_features]`` of one section to ``[n_spots, n_genes]``.
    """
    features = data.features.astype(np.float64)
    target = log1p_cp10k(data.counts, data.library_size).toarray()
    if centred:
        features, target = (centre_within(v, data.section) for v in (features, target))
    if len(np.unique(data.group)) > 1:
        fold = {"groups": data.group}
        model = GridSearchCV(
            make_pipeline(StandardScaler(), Ridge()),
            {"ridge__alpha": ALPHAS},
            cv=LeaveOneGroupOut(),
            scoring="neg_mean_squared_error",
        )
    else:
        # From one section nothing can be left out.
        fold = {}
        model = make_pipeline(StandardScaler(), Ridge(float(np.median(ALPHAS))))
    with few_threads(len(features), features.shape[1], target.shape[1]):
        model.fit(features, target, **fold)

    def predict(features: NDArray[np.float32]) -> NDArray[np.float64]:
        features = features.astype(np.float64)
        shifted = features - features.mean(0) if centred else features
        return np.asarray(model.predict(shifted)).reshape(len(features), -1)

    return predict


def without_image(scores: NDArray, library_size: NDArray, *, seed: int = 0) -> dict[str, NDArray]:
    """Give the two rows that no model should be below: depth alone, and a model's scores shuffled.

    Parameters
    ----------
    scores
        Of a model for one section, ``[n_spots, n_genes]``.
    library_size
        Of its spots. This is what a model cannot know: a score that depth alone reaches says
        nothing about the image.
    seed
        Of the shuffling, of the spots of each gene by itself.

    Examples
    --------
    >>> rows = without_image(np.array([[1.0], [2.0]]), np.array([1, 10]))
    >>> sorted(rows), rows["library size"].round(2).ravel().tolist()
    (['library size', 'shuffled'], [0.0, 2.3])
    """
    shuffled = np.random.default_rng(seed).permuted(scores, axis=0)
    return {"library size": _depth(scores.shape[1], library_size), "shuffled": shuffled}


def depth_scores(n_genes: int, section: AnnData) -> NDArray[np.float64]:
    """Scores of the row ``library size``: the log of a section's depth, the same for all genes."""
    return _depth(n_genes, section.obs["library_size"].to_numpy())


def _depth(n_genes: int, library_size: NDArray) -> NDArray[np.float64]:
    depth = np.log(np.maximum(library_size, 1.0))[:, None]
    return np.broadcast_to(depth, (len(depth), n_genes))


BASELINES: dict[str, Callable[[TrainingData], Predict]] = {
    "ridge": lambda data: fit_ridge(data, centred=False),
    "centred ridge": lambda data: fit_ridge(data, centred=True),
}
