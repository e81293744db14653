"""A task of HEST-Benchmark: its linear probe to the digit, and the exact list objective beside it.

`strank.studies.probe_methods` says what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
import sklearn
from numpy.typing import NDArray

from strank.cohort.splits import Fold
from strank.errors import InputError
from strank.files import atomic_path, output_folder, sha256, write_json
from strank.functional.metrics import correlation, rank_correlation
from strank.readers.hest_bench import HestTask
from strank.studies.probe_methods import Spots, predict_methods, stack
from strank.version import __version__

__all__ = ["CAVEATS", "ProbeResult", "run_probe"]

CAVEATS = (
    "The benchmark chose its genes on all samples, those of the test included.",
    "Its target, log1p(counts), contains the depth of a spot: ridge learns it, `list` leaves it "
    "out, and scc, on log1p(CP10k), takes most of it out. Rows with `library size` know the depth "
    "of the test spots; `library size` alone knows nothing else.",
    "Its Pearson pools the spots of all test samples, so levels of sections count, which `list` "
    "leaves open; `pearson_within` and `scc` compare within sections only.",
)

_KEYS = ["method", "fold", "gene", "score", "value"]


@dataclass(frozen=True)
class ProbeResult:
    """Scores of all methods.

    Attributes
    ----------
    results
        ``method, fold, gene, score, value``. The scores: ``pearson`` with log1p(counts) over all
        test spots of the fold, as in the benchmark; ``pearson_within``, the same within each test
        section, mean over them; ``scc``, Spearman with log1p(CP10k), likewise. NaN where counts
        do not vary; a method that predicts one value for all spots gets 0.
    facts
        What produced them: versions, parameters, folds, checksums, caveats.
    warnings
        What limits what they say, in words.
    """

    results: pd.DataFrame
    facts: Mapping[str, Any]
    warnings: tuple[str, ...]

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
    """Fit and score every method on every fold.

    Parameters
    ----------
    task
        From `strank.readers.hest_bench.read_task`.
    n_components
        Of the PCA; 256 in the benchmark.
    seed
        Of the PCA; 1 in the benchmark. All the rest is deterministic.
    advance
        Called with 1 after every fold.

    Raises
    ------
    InputError
        If a fold has too few training spots or features for the PCA, or no counts to train on.
    """
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


def _scores(predicted: NDArray, test: Spots) -> dict[str, NDArray[np.float64]]:
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
    of_ridge = results[results["method"] == "ridge"]
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
