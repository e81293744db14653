"""A task of HEST-Benchmark: its ridge, a ridge within sections, and the exact list.

All see the same features, standardised on the training samples and reduced to 256 principal
components, or all of them:

- ``hest-ridge``: the benchmark's own, call by call: ``Ridge(solver="lsqr", alpha=100 / (features x
  genes), fit_intercept=False)``, target log1p(counts). Without components it gets the features as
  they are stored. ``hest-ridge, cv``: the same, but for alpha.
- ``ridge, within sections``: the same target, centred within each section; alpha is chosen by
  leaving training sections out.
- ``linear, list``: `STRankRegressorCV`; components in their own units, as ridge has them; at 0 in
  the mean of each section.
- ``library size``: its logarithm, and no image. ``linear, list + library size``: the sum of both.
  They know the depth of the test spots, which the benchmark's target contains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from strank.cohort.folds import Fold
from strank.errors import InputError
from strank.fitting.exact import (
    ALPHAS,
    HEST_ALPHAS,
    choose_alpha,
    hest_alpha,
    hest_components,
    hest_ridge,
)
from strank.functional.groups import centre_within, rows_of
from strank.io.hest_bench import HestTask
from strank.linear.regressor import STRankRegressor
from strank.linear.regressor_cv import STRankRegressorCV
from strank.metrics.correlation import correlation, log1p_cp10k, rank_correlation

HestFeatures = Literal["pca", "all"]
RIDGE, RIDGE_CV = "hest-ridge", "hest-ridge, cv"
OURS = ("ridge, within sections", "linear, list", "linear, list + library size", "library size")


@dataclass(frozen=True)
class TaskSpots:
    """Spots of several samples in one: ``[n_spots, ...]`` in each."""

    features: NDArray  # As stored with the samples
    counts: sparse.csr_matrix  # Of the panel, CSR
    library_size: NDArray[np.float64]  # Totals over all measured genes
    section: NDArray  # Names of the samples

    @cached_property
    def log_counts(self) -> NDArray[np.float64]:
        """log1p of raw counts, the benchmark's target."""
        return self.counts.log1p().toarray()

    @cached_property
    def log_cp10k(self) -> NDArray[np.float64]:
        """log1p of counts per 10,000, the target of `scc`."""
        return log1p_cp10k(self.counts, self.library_size).toarray()


def stack(task: HestTask, names: Sequence[str]) -> TaskSpots:
    """Put the spots of some samples of a task into one, in the order of the names."""
    samples = [task.samples[name] for name in names]
    return TaskSpots(
        np.concatenate([sample.features for sample in samples]),
        sparse.vstack([sample.counts for sample in samples], "csr"),
        np.concatenate([sample.library_size for sample in samples]),
        np.repeat(names, [len(sample.features) for sample in samples]),
    )


def predict_methods(
    train: TaskSpots,
    test: TaskSpots,
    *,
    features: HestFeatures = "pca",
    n_components: int = 256,
    seed: int = 1,
) -> tuple[dict[str, NDArray], dict[str, Any], list[str]]:
    """Fit every method: scores of the test spots ``[n_spots, n_genes]``, facts, and warnings."""
    if features == "pca":
        theirs = ours = hest_components(
            train.features, test.features, n_components=n_components, seed=seed
        )
    else:
        scaler = StandardScaler().fit(train.features)
        theirs = train.features, test.features
        ours = scaler.transform(train.features), scaler.transform(test.features)
    (given, asked), (inner, outer) = theirs, ours
    target = train.log_counts
    chosen = choose_alpha(given, target, train.section, HEST_ALPHAS)
    within, within_alpha = _fit_within(inner, train)
    regressor = _fit_list(inner, train)
    scores = centre_within(regressor.predict(outer), test.section)
    # A spot without counts has no logarithm; nothing is below one count.
    depth = np.log(np.maximum(test.library_size, 1))[:, None]
    predictions = {
        RIDGE: hest_ridge(given, target, asked, seed=seed),
        RIDGE_CV: hest_ridge(given, target, asked, alpha=chosen, seed=seed),
        "ridge, within sections": within.predict(centre_within(outer, test.section)).reshape(
            scores.shape
        ),
        "linear, list": scores,
        "linear, list + library size": scores + depth,
        "library size": np.broadcast_to(depth, scores.shape),
    }
    facts: dict[str, Any] = {
        "n_train": len(inner),
        "n_test": len(outer),
        "n_train_without_counts": int((train.library_size == 0).sum()),
        "ridge_alpha": hest_alpha(given.shape[1], target.shape[1]),
        "ridge_cv_alpha": chosen,
        "ridge_within_alpha": within_alpha,
        "list_penalty_chosen": isinstance(regressor, STRankRegressorCV),
        "list_penalty": regressor.penalty_.tolist(),
        "list_genes": regressor.solution_.message,
    }
    return predictions, facts, _warnings(facts, regressor)


def _fit_within(features: NDArray, train: TaskSpots) -> tuple[Ridge, float]:
    x, y = (centre_within(values, train.section) for values in (features, train.log_counts))
    several = len(np.unique(train.section)) > 1
    alpha = choose_alpha(x, y, train.section, ALPHAS) if several else float(np.median(ALPHAS))
    return Ridge(alpha=alpha, fit_intercept=False).fit(x, y), alpha


def _fit_list(features: NDArray, train: TaskSpots) -> STRankRegressor:
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
            "trained on one sample, so no penalty could be chosen: `linear, list` has its default "
            f"of {regressor.penalty_[0]:g} counts; `{RIDGE_CV}` chose by leaving spots out"
        )
    if n_empty := facts["n_train_without_counts"]:
        noted.append(
            f"`linear, list` is fitted without {n_empty} training spots that have no counts"
        )
    if not regressor.converged_.all():
        noted.append(f"`linear, list`: {regressor.solution_.message}")
    return noted


def run_task(
    task: HestTask, features: HestFeatures, *, n_components: int = 256, seed: int = 1
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Fit and score every method on every fold: method, fold, gene, score, value; and facts.

    The scores: pearson with log1p(counts) over all test spots of the fold, as in the benchmark;
    pearson_within, the same within each test section, mean over them; scc, Spearman with
    log1p(CP10k), likewise. NaN where counts do not vary; a method that predicts one value for all
    spots gets 0.
    """
    for fold in task.folds:
        _check_fold(task, fold, n_components if features == "pca" else 0)
    tables, facts = [], []
    warnings = [
        f"sample {name}: {sample.n_unmatched} embeddings have no counts and are left out"
        for name, sample in task.samples.items()
        if sample.n_unmatched
    ]
    for fold in task.folds:
        train, test = stack(task, fold.train), stack(task, fold.test)
        predictions, about, told = predict_methods(
            train, test, features=features, n_components=n_components, seed=seed
        )
        warnings += [f"fold {fold.name}: {what}" for what in told]
        facts.append({"fold": fold.name, "train": fold.train, "test": fold.test} | about)
        for method, predicted in predictions.items():
            scores = pd.DataFrame(_scores(predicted, test)).assign(gene=task.panel)
            tables.append(
                scores.melt("gene", var_name="score").assign(method=method, fold=fold.name)
            )
    results = pd.concat(tables, ignore_index=True)
    facts_of_all = {
        "panel": task.panel,
        "samples": {
            name: {"n_spots": len(sample.features), "n_unmatched": sample.n_unmatched}
            for name, sample in task.samples.items()
        },
        "folds": facts,
        "warnings": [*warnings, *_undefined(results)],
    }
    return results, facts_of_all


def _check_fold(task: HestTask, fold: Fold, n_components: int) -> None:
    train = [task.samples[name] for name in fold.train]
    spots, width = sum(len(sample.features) for sample in train), train[0].features.shape[1]
    if min(spots, width) < n_components:
        raise InputError(
            f"fold {fold.name}: {n_components} principal components need as many training spots "
            f"and features, and there are {spots} and {width}; choose fewer (`n_components`)"
        )
    if not any(sample.library_size.any() for sample in train):
        raise InputError(f"fold {fold.name}: no training spot has any count")


def _scores(predicted: NDArray, test: TaskSpots) -> dict[str, NDArray[np.float64]]:
    rows = rows_of(test.section)
    return {
        "pearson": _scored(correlation, predicted, test.log_counts),
        "pearson_within": _mean(
            [_scored(correlation, predicted[r], test.log_counts[r]) for r in rows]
        ),
        "scc": _mean([_scored(rank_correlation, predicted[r], test.log_cp10k[r]) for r in rows]),
    }


def _scored(
    score: Callable[[NDArray, NDArray], NDArray], predicted: NDArray, target: NDArray
) -> NDArray[np.float64]:
    """Score columns; what predicts one value orders nothing and gets 0, as in `score_section`."""
    constant = (np.ptp(predicted, axis=0) == 0) & (np.ptp(target, axis=0) > 0)
    return np.where(constant, 0.0, score(predicted, target))


def _mean(sections: list[NDArray]) -> NDArray[np.float64]:
    values = np.stack(sections)
    n = np.isfinite(values).sum(0)
    return np.divide(np.nansum(values, axis=0), n, out=np.full(n.shape, np.nan), where=n > 0)


def _undefined(results: pd.DataFrame) -> list[str]:
    of_ridge = results[results["method"] == RIDGE]
    missing = of_ridge["value"].isna().groupby(of_ridge["score"], sort=False)
    return [
        f"{n} of {len(of_ridge) // len(missing)} gene-fold pairs have no {score}, since the test "
        "counts do not vary: left out of the means (the benchmark's own mean would be NaN)"
        for score, n in missing.sum().items()
        if n
    ]
