"""Squared error to log1p of counts, solved by scikit-learn: what the field compares with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from strank.cohort.training_set import TrainingData
from strank.errors import InputError
from strank.fitting.exact import ExactFit, ExactOptions
from strank.functional.groups import centre_within
from strank.linear.threads import few_threads
from strank.metrics.correlation import log1p_cp10k

ALPHAS = np.logspace(-1, 5, 13)
_HEST_COMPONENTS = 256


def solve_ridge(data: TrainingData, options: ExactOptions, *, centred: bool = False) -> ExactFit:
    """Fit log1p(CP10k) of all genes; the penalty by leaving the same sections out as the list.

    Centred, the mean of each section is subtracted from features and targets, which removes a
    shift between sections; the penalty is chosen by squared error on held-out sections either way.
    """
    _refuse_options(options)
    features = data.features.astype(np.float64)
    target = log1p_cp10k(data.counts, data.library_size).toarray()
    if centred:
        features, target = (centre_within(v, data.section) for v in (features, target))
    model, fold = make_pipeline(StandardScaler(), Ridge(float(np.median(ALPHAS)))), {}
    if several := len(np.unique(data.group)) > 1:
        fold = {"groups": data.group}
        model = GridSearchCV(
            model, {"ridge__alpha": ALPHAS}, cv=LeaveOneGroupOut(), scoring="neg_mean_squared_error"
        )
    with few_threads(len(features), features.shape[1], target.shape[1]):
        model.fit(features, target, **fold)

    def predict(features: NDArray) -> NDArray[np.float64]:
        features = features.astype(np.float64)
        shifted = features - features.mean(0) if centred else features
        return np.asarray(model.predict(shifted)).reshape(len(features), -1)

    scaler, ridge = model.best_estimator_ if several else model
    return ExactFit(
        weight=np.atleast_2d(ridge.coef_).T,
        centre=scaler.mean_,
        scale=scaler.scale_,
        table={"alpha": np.full(target.shape[1], ridge.alpha)},
        message=f"ridge with alpha {ridge.alpha:g} for all genes",
        choice=None
        if several
        else f"default of alpha {ridge.alpha:g}: one section, nothing to leave out",
        predict=predict,
    )


def solve_hest_ridge(data: TrainingData, options: ExactOptions) -> ExactFit:
    """Fit log1p(counts) as HEST-Benchmark does, on principal components of the features."""
    _refuse_options(options)
    target = data.counts.log1p().toarray()
    n_components = min(_HEST_COMPONENTS, *data.features.shape)
    pipeline = _hest_pipeline(n_components)
    components = _as_torch(pipeline.fit_transform(data.features))
    ridge = _hest_model(n_components, target.shape[1]).fit(components, target)
    scaler, pca = pipeline

    def predict(features: NDArray) -> NDArray[np.float64]:
        scores = ridge.predict(_as_torch(pipeline.transform(features)))
        return scores.reshape(len(features), -1)

    return ExactFit(
        weight=pca.components_.T @ np.atleast_2d(ridge.coef_).T,
        centre=scaler.mean_,
        scale=scaler.scale_,
        table={"alpha": np.full(target.shape[1], ridge.alpha)},
        message=f"ridge on {n_components} principal components",
        choice=f"that of HEST-Benchmark, alpha {ridge.alpha:g}",
        predict=predict,
    )


def _refuse_options(options: ExactOptions) -> None:
    if options.penalty is not None or options.borrow:
        given = "penalty" if options.penalty is not None else "borrow"
        raise InputError(f"`{given}` is for count likelihoods: leave it out for the squared error")


def hest_components(
    train: NDArray, test: NDArray, *, n_components: int = 256, seed: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reduce features as HEST-Benchmark does; of which float type matters to the last digits."""
    pipeline = _hest_pipeline(n_components, seed)
    return _as_torch(pipeline.fit_transform(train)), _as_torch(pipeline.transform(test))


def _hest_pipeline(n_components: int, seed: int = 1) -> Any:
    return make_pipeline(StandardScaler(), PCA(n_components, random_state=seed))


def _as_torch(components: NDArray) -> NDArray[np.float64]:
    # The benchmark hands on torch tensors: rounded to single precision, and read by scikit-learn
    # as double. LSQR stops early enough for either to move the third digit of a correlation.
    return components.astype(np.float32).astype(np.float64)


def hest_ridge(train: NDArray, target: NDArray, test: NDArray, *, seed: int = 1) -> NDArray:
    """Predict ``[n_spots, n_genes]`` from components as HEST-Benchmark does; target log1p."""
    return _hest_model(train.shape[1], target.shape[1], seed).fit(train, target).predict(test)


def _hest_model(n_components: int, n_genes: int, seed: int = 1) -> Ridge:
    return Ridge(
        solver="lsqr",
        alpha=hest_alpha(n_components, n_genes),
        # Handed over as there, but LSQR does not use it.
        random_state=seed,
        fit_intercept=False,
        max_iter=1000,
    )


def hest_alpha(n_components: int, n_genes: int) -> float:
    """Penalty of the benchmark.

    Examples
    --------
    >>> hest_alpha(256, 50)
    0.0078125
    """
    return 100 / (n_components * n_genes)
