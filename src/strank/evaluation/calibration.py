"""Whether predicted fold changes are those observed: pooled, part by part of the tissue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

# Spots of about equal depth together; a gene's mean in one of these is what can be compared.
_PARTS = 10

# Predicted log fold changes that are pooled: from a fold of e^-1.5 to e^1.5, closer near 1.
_EDGES = np.array([0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.9, 1.2, 1.5])

_CLASSES = np.concatenate([-_EDGES[:0:-1], _EDGES])
# A log ratio of fewer counts says nothing.
_LEAST_COUNTS = 20.0

# Mean square of log changes that are no changes.
_FLAT = 1e-6


@dataclass(frozen=True)
class ChangeSums:
    """Counts of a section by predicted log fold change: observed, predicted, shared by depth alone.

    Sums of several sections may be added; ``[n_classes]`` each.
    """

    observed: NDArray[np.float64]
    predicted: NDArray[np.float64]
    by_depth: NDArray[np.float64]

    def __add__(self, other: ChangeSums) -> ChangeSums:
        """Pool."""
        return ChangeSums(
            self.observed + other.observed,
            self.predicted + other.predicted,
            self.by_depth + other.by_depth,
        )


def change_sums(
    scores: NDArray, counts: NDArray | sparse.csr_matrix, library_size: NDArray
) -> ChangeSums:
    """Sort the spots of a section by score into parts of equal depth, and pool parts alike.

    A part of a gene's spots is pooled with those, of all genes, whose predicted mean rate is as far
    from their own gene's in the section; every count weighs the same. Scores and counts are
    ``[n_spots, n_genes]``.
    """
    depth = np.asarray(library_size, dtype=np.float64)
    order = np.argsort(scores, axis=0, kind="stable")
    reached = np.cumsum(depth[order], axis=0)
    part = np.minimum((reached - depth[order] / 2) / depth.sum() * _PARTS, _PARTS - 1).astype(int)
    cell = part * scores.shape[1] + np.arange(scores.shape[1])
    observed = np.take_along_axis(sparse.csr_matrix(counts).toarray().astype(float), order, 0)
    centred = scores - scores.max(0)
    rate = np.take_along_axis(np.exp(centred), order, 0) * depth[order]
    total = observed.sum(0)

    def summed(values: NDArray) -> NDArray[np.float64]:
        return _binned(cell, values, _PARTS * scores.shape[1]).reshape(_PARTS, -1)

    by_depth = summed(depth[order]) / depth.sum() * total
    predicted = summed(rate) / rate.sum(0) * total
    used = by_depth > 0
    change = np.log(predicted[used] / by_depth[used])
    classes = np.digitize(change, _CLASSES)
    return ChangeSums(
        *(
            _binned(classes, values[used], len(_CLASSES) + 1)
            for values in (summed(observed), predicted, by_depth)
        )
    )


def calibration_table(sums: Mapping[str, ChangeSums]) -> pd.DataFrame:
    """Tabulate fold changes and counts of each method: ``method, predicted, observed, counts``."""
    parts = [
        pd.DataFrame({k: v for k, v in calibration_line(of_method).items() if k != "slope"}).assign(
            method=method
        )
        for method, of_method in sums.items()
    ]
    columns = ["method", "predicted", "observed", "counts"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _binned(where: NDArray, values: NDArray, n: int) -> NDArray[np.float64]:
    return np.bincount(where.ravel(), values.ravel(), n).astype(np.float64)


def calibration_line(sums: ChangeSums) -> dict[str, Any]:
    """Observed against predicted fold changes, and the slope of their logs through 1.

    A slope of 1 is right, below 1 the predictions are too strong; ``None`` where nothing is
    predicted to change.
    """
    enough = sums.by_depth >= _LEAST_COUNTS
    predicted = sums.predicted[enough] / sums.by_depth[enough]
    observed = np.maximum(sums.observed[enough], 0.5) / sums.by_depth[enough]
    x, y, weight = np.log(predicted), np.log(observed), sums.by_depth[enough]
    spread = float((weight * x**2).sum())
    return {
        "predicted": predicted.round(4).tolist(),
        "observed": observed.round(4).tolist(),
        "counts": sums.observed[enough].round().astype(int).tolist(),
        "slope": float((weight * x * y).sum() / spread) if spread > _FLAT * weight.sum() else None,
    }
