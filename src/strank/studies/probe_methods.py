"""What the probe compares: the ridge of HEST-Benchmark, a ridge within sections, the exact list.

They see the benchmark's features: standardised, and reduced to 256 principal components, on the
training samples.

- ``ridge``: the benchmark's own, call by call: ``Ridge(solver="lsqr", alpha=100 / (components x
  genes), fit_intercept=False)``, target log1p(counts).
- ``ridge, within sections``: the same target and components, centred within each section; the
  penalty chosen by leaving training sections out.
- ``list``: `STRankRegressorCV` on the same components in their own units, as ridge has them; at 0
  in the mean of each section.
- ``library size``: its logarithm, and no image. ``list + library size``: the sum of both. They know
  the depth of the test spots, which the benchmark's target contains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from strank.evaluation.baselines import ALPHAS
from strank.functional.metrics import log1p_cp10k
from strank.linear.geometry import centre_within
from strank.linear.regressor import STRankRegressor
from strank.linear.regressor_cv import STRankRegressorCV
from strank.readers.hest_bench import HestTask

__all__ = [
    "Predictions",
    "Spots",
    "hest_alpha",
    "hest_components",
    "hest_ridge",
    "predict_methods",
    "stack",
]


@dataclass(frozen=True)
class Spots:
    """Spots of several samples in one: ``[n_spots, ...]`` in each.

    Attributes
    ----------
    features
        As stored with the samples.
    counts
        Of the panel, CSR.
    library_size
        Totals over all measured genes.
    section
        Names of the samples.
    """

    features: NDArray
    counts: sparse.csr_matrix
    library_size: NDArray[np.float64]
    section: NDArray

    @cached_property
    def log_counts(self) -> NDArray[np.float64]:
        """log1p of raw counts, the benchmark's target."""
        return self.counts.log1p().toarray()

    @cached_property
    def log_cp10k(self) -> NDArray[np.float64]:
        """log1p of counts per 10,000, the target of `spearman`."""
        return log1p_cp10k(self.counts, self.library_size).toarray()


def stack(task: HestTask, names: Sequence[str]) -> Spots:
    """Put the spots of some samples of a task into one, in the order of the names."""
    samples = [task.samples[name] for name in names]
    return Spots(
        np.concatenate([sample.features for sample in samples]),
        sparse.vstack([sample.counts for sample in samples], "csr"),
        np.concatenate([sample.library_size for sample in samples]),
        np.repeat(names, [len(sample.features) for sample in samples]),
    )


@dataclass(frozen=True)
class Predictions:
    """What `predict_methods` returns.

    Attributes
    ----------
    scores
        Method to its scores of the test spots, ``[n_spots, n_genes]``.
    facts
        Penalties and numbers of spots.
    warnings
        What must be said of the fits.
    """

    scores: dict[str, NDArray]
    facts: dict[str, Any]
    warnings: list[str]


def predict_methods(
    train: Spots, test: Spots, *, n_components: int = 256, seed: int = 1
) -> Predictions:
    """Fit every method on training spots and predict the test spots.

    Parameters
    ----------
    train, test
        Spots.
    n_components, seed
        Of the PCA, as in the benchmark.
    """
    inner, outer = hest_components(
        train.features, test.features, n_components=n_components, seed=seed
    )
    ridge = hest_ridge(inner, train.log_counts, outer, seed=seed)
    within, alpha = _fit_within(inner, train)
    regressor = _fit_list(inner, train)
    scores = centre_within(regressor.predict(outer), test.section)
    # A spot without counts has no logarithm; nothing is below one count.
    depth = np.log(np.maximum(test.library_size, 1))[:, None]
    shape = scores.shape
    predictions = {
        # scikit-learn drops the axis of a single gene.
        "ridge": ridge.reshape(shape),
        "ridge, within sections": within.predict(centre_within(outer, test.section)).reshape(shape),
        "list": scores,
        "list + library size": scores + depth,
        "library size": np.broadcast_to(depth, shape),
    }
    facts: dict[str, Any] = {
        "n_train": len(inner),
        "n_test": len(outer),
        "n_train_without_counts": int((train.library_size == 0).sum()),
        "ridge_alpha": hest_alpha(n_components, shape[1]),
        "ridge_within_alpha": alpha,
        "list_penalty_chosen": isinstance(regressor, STRankRegressorCV),
        "list_penalty": regressor.penalty_.tolist(),
        "list_genes": regressor.solution_.message,
    }
    return Predictions(predictions, facts, _warnings(facts, regressor))


def _fit_within(components: NDArray, train: Spots) -> tuple[Any, float]:
    features = centre_within(components, train.section)
    target = centre_within(train.log_counts, train.section)
    if len(np.unique(train.section)) == 1:
        alpha = float(np.median(ALPHAS))
        return Ridge(alpha=alpha, fit_intercept=False).fit(features, target), alpha
    search = GridSearchCV(
        Ridge(fit_intercept=False),
        {"alpha": ALPHAS},
        cv=LeaveOneGroupOut(),
        scoring="neg_mean_squared_error",
    )
    search.fit(features, target, groups=train.section)
    return search, float(search.best_params_["alpha"])


def _fit_list(features: NDArray, train: Spots) -> STRankRegressor:
    kept = train.library_size > 0
    section = train.section[kept]
    # From one section nothing can be left out: the default penalty.
    kind = STRankRegressorCV if len(np.unique(section)) > 1 else STRankRegressor
    regressor = kind(standardize=False)
    offset = np.log(train.library_size[kept])
    return regressor.fit(features[kept], train.counts[kept], section=section, offset=offset)


def _warnings(facts: Mapping[str, Any], regressor: STRankRegressor) -> list[str]:
    noted = []
    if not facts["list_penalty_chosen"]:
        noted.append(
            "trained on one sample, so no penalty could be chosen: `list` has its default of "
            f"{regressor.penalty_[0]:g} counts"
        )
    if n_empty := facts["n_train_without_counts"]:
        noted.append(f"`list` is fitted without {n_empty} training spots that have no counts")
    if not regressor.converged_.all():
        noted.append(f"`list`: {regressor.solution_.message}")
    return noted


def hest_components(
    train: NDArray, test: NDArray, *, n_components: int = 256, seed: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Reduce features as HEST-Benchmark does, fitted on training spots.

    Parameters
    ----------
    train, test
        Features, ``[n_spots, n_features]``; of which float type matters to the last digits.
    n_components, seed
        Of the PCA.
    """
    pipeline = make_pipeline(StandardScaler(), PCA(n_components, random_state=seed))
    fitted, applied = pipeline.fit_transform(train), pipeline.transform(test)
    # The benchmark hands on torch tensors: rounded to single precision, and read by scikit-learn
    # as double. LSQR stops early enough for either to move the third digit of a correlation.
    return fitted.astype(np.float32).astype(np.float64), applied.astype(np.float32).astype(
        np.float64
    )


def hest_ridge(train: NDArray, target: NDArray, test: NDArray, *, seed: int = 1) -> NDArray:
    """Predict ``[n_spots, n_genes]`` for test spots as HEST-Benchmark does.

    Parameters
    ----------
    train, test
        Components, ``[n_spots, n_components]``.
    target
        log1p(counts) of the training spots, ``[n_spots, n_genes]``.
    seed
        Handed to scikit-learn, whose LSQR does not use it.
    """
    model = Ridge(
        solver="lsqr",
        alpha=hest_alpha(train.shape[1], target.shape[1]),
        random_state=seed,
        fit_intercept=False,
        max_iter=1000,
    )
    return model.fit(train, target).predict(test)


def hest_alpha(n_components: int, n_genes: int) -> float:
    """Compute the benchmark's penalty.

    Examples
    --------
    >>> hest_alpha(256, 50)
    0.0078125
    """
    return 100 / (n_components * n_genes)
