"""What the probe compares: the ridge of HEST-Benchmark, a ridge within sections, the exact list.

They see the benchmark's features: standardised, and reduced to 256 principal components, on the
training samples.

- ``hest-ridge``: the benchmark's own, call by call: ``Ridge(solver="lsqr", alpha=100 /
  (components x genes), fit_intercept=False)``, target log1p(counts).
- ``ridge, within sections``: the same target and components, centred within each section; the
  penalty chosen by leaving training sections out.
- ``linear, list``: `STRankRegressorCV` on the same components in their own units, as ridge has
  them; at 0 in the mean of each section.
- ``library size``: its logarithm, and no image. ``linear, list + library size``: the sum of both.
  They know the depth of the test spots, which the benchmark's target contains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
import sklearn
from numpy.typing import NDArray
from scipy import sparse
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, LeaveOneGroupOut

from strank.cohort.folds import Fold
from strank.errors import InputError
from strank.files import atomic_path, output_folder, sha256, write_json
from strank.fitting.exact import ALPHAS, hest_alpha, hest_components, hest_ridge
from strank.functional.groups import centre_within
from strank.io.hest_bench import HestTask
from strank.linear.regressor import STRankRegressor, STRankRegressorCV
from strank.metrics.correlation import correlation, log1p_cp10k, rank_correlation
from strank.version import __version__

CAVEATS = (
    "The benchmark chose its genes on all samples, those of the test included.",
    "Its target, log1p(counts), contains the depth of a spot: ridge learns it, `linear, list` "
    "leaves it out, and scc, on log1p(CP10k), takes most of it out. Rows with `library size` know "
    "the depth of the test spots; `library size` alone knows nothing else.",
    "Its Pearson pools the spots of all test samples, so levels of sections count, which "
    "`linear, list` leaves open; `pearson_within` and `scc` compare within sections only.",
)
_KEYS = ["method", "fold", "gene", "score", "value"]


@dataclass(frozen=True)
class ProbeSpots:
    """ProbeSpots of several samples in one: ``[n_spots, ...]`` in each."""

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
        """log1p of counts per 10,000, the target of `spearman`."""
        return log1p_cp10k(self.counts, self.library_size).toarray()


def stack(task: HestTask, names: Sequence[str]) -> ProbeSpots:
    """Put the spots of some samples of a task into one, in the order of the names."""
    samples = [task.samples[name] for name in names]
    return ProbeSpots(
        np.concatenate([sample.features for sample in samples]),
        sparse.vstack([sample.counts for sample in samples], "csr"),
        np.concatenate([sample.library_size for sample in samples]),
        np.repeat(names, [len(sample.features) for sample in samples]),
    )


@dataclass(frozen=True)
class Predictions:
    """What `predict_methods` returns."""

    scores: dict[str, NDArray]  # Method to its scores of the test spots, [n_spots, n_genes]
    facts: dict[str, Any]  # Penalties and numbers of spots
    warnings: list[str]  # What must be said of the fits


def predict_methods(
    train: ProbeSpots, test: ProbeSpots, *, n_components: int = 256, seed: int = 1
) -> Predictions:
    """Fit every method on training spots and predict the test spots."""
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
        "hest-ridge": ridge.reshape(shape),
        "ridge, within sections": within.predict(centre_within(outer, test.section)).reshape(shape),
        "linear, list": scores,
        "linear, list + library size": scores + depth,
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


def _fit_within(components: NDArray, train: ProbeSpots) -> tuple[Any, float]:
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


def _fit_list(features: NDArray, train: ProbeSpots) -> STRankRegressor:
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
            f"of {regressor.penalty_[0]:g} counts"
        )
    if n_empty := facts["n_train_without_counts"]:
        noted.append(
            f"`linear, list` is fitted without {n_empty} training spots that have no counts"
        )
    if not regressor.converged_.all():
        noted.append(f"`linear, list`: {regressor.solution_.message}")
    return noted


@dataclass(frozen=True)
class ProbeResult:
    """Scores of all methods."""

    # method, fold, gene, score, value. The scores: pearson with log1p(counts) over all test spots
    # of the fold, as in the benchmark; pearson_within, the same within each test section, mean over
    # them; scc, Spearman with log1p(CP10k), likewise. NaN where counts do not vary; a method that
    # predicts one value for all spots gets 0
    results: pd.DataFrame
    facts: Mapping[str, Any]  # What produced them: versions, parameters, folds, checksums, caveats
    warnings: tuple[str, ...]  # What limits what they say, in words

    @property
    def summary(self) -> pd.DataFrame:
        """Mean over genes, a row a method and fold; then ``mean`` and ``std`` over folds."""
        folds = self.results.pivot_table(
            "value", ["method", "fold"], "score", sort=False, dropna=False, observed=True
        )
        over = folds.groupby("method", sort=False)
        # Like the benchmark's, the deviation is that of the folds as they are (ddof 0).
        tables = {"mean": over.mean(), "std": over.std(ddof=0)}
        rows = [table.reset_index().assign(fold=name) for name, table in tables.items()]
        return pd.concat([folds.reset_index(), *rows], ignore_index=True).rename_axis(columns=None)

    def write(self, folder: Path | str) -> None:
        """Write ``results.csv``, ``summary.csv`` and ``probe.json``."""
        folder = output_folder(Path(folder))
        for name, table in {"results.csv": self.results, "summary.csv": self.summary}.items():
            with atomic_path(folder / name) as part:
                table.to_csv(part, index=False)
        write_json(folder / "probe.json", {**self.facts, "warnings": list(self.warnings)})


def run_probe(
    task: HestTask,
    *,
    n_components: int = 256,
    seed: int = 1,
    advance: Callable[[int], object] | None = None,
) -> ProbeResult:
    """Fit and score every method on every fold."""
    for fold in task.folds:
        _check_fold(task, fold, n_components)
    tables, facts = [], []
    warnings = [
        f"sample {name}: {sample.n_unmatched} embeddings have no counts and are left out"
        for name, sample in task.samples.items()
        if sample.n_unmatched
    ]
    for fold in task.folds:
        train, test = stack(task, fold.train), stack(task, fold.test)
        predictions = predict_methods(train, test, n_components=n_components, seed=seed)
        warnings += [f"fold {fold.name}: {what}" for what in predictions.warnings]
        about = {"fold": fold.name, "train": fold.train, "test": fold.test}
        facts.append(about | predictions.facts)
        for method, predicted in predictions.scores.items():
            scores = pd.DataFrame(_scores(predicted, test)).assign(gene=task.panel)
            long = scores.melt("gene", var_name="score")
            tables.append(long.assign(method=method, fold=fold.name)[_KEYS])
        if advance is not None:
            advance(1)
    results = pd.concat(tables, ignore_index=True)
    parameters = {"n_components": n_components, "seed": seed, "panel": task.panel}
    return ProbeResult(
        results,
        {**_provenance(task), **parameters, "folds": facts, "caveats": CAVEATS},
        (*warnings, *_undefined(results)),
    )


def _check_fold(task: HestTask, fold: Fold, n_components: int) -> None:
    train = [task.samples[name] for name in fold.train]
    spots, width = sum(len(sample.features) for sample in train), train[0].features.shape[1]
    if min(spots, width) < n_components:
        raise InputError(
            f"fold {fold.name}: {n_components} principal components need as many training spots "
            f"and features, and there are {spots} and {width}; choose fewer components"
        )
    if not any(sample.library_size.any() for sample in train):
        raise InputError(f"fold {fold.name}: no training spot has any count")


def _scores(predicted: NDArray, test: ProbeSpots) -> dict[str, NDArray[np.float64]]:
    rows = [test.section == label for label in np.unique(test.section)]
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
    of_ridge = results[results["method"] == "hest-ridge"]
    missing = of_ridge["value"].isna().groupby(of_ridge["score"], sort=False)
    return [
        f"{n} of {len(of_ridge) // len(missing)} gene-fold pairs have no {score}, since the test "
        "counts do not vary: left out of the means (the benchmark's own mean would be NaN)"
        for score, n in missing.sum().items()
        if n
    ]


def _provenance(task: HestTask) -> dict[str, Any]:
    modules = {"numpy": np, "scipy": scipy, "scikit-learn": sklearn}
    return {
        "strank_version": __version__,
        "versions": {name: module.__version__ for name, module in modules.items()},
        "task": str(task.folder),
        "samples": {
            name: {
                "n_spots": len(sample.features),
                "n_unmatched": sample.n_unmatched,
                **{f"{what}_file": str(path) for what, path in sample.files.items()},
                **{f"{what}_sha256": sha256(path) for what, path in sample.files.items()},
            }
            for name, sample in task.samples.items()
        },
    }
