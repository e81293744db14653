"""Whether tiles look like those a model was trained on: a map of the wrong tissue looks fine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from torch import Tensor

from strank.functional.groups import deal

_QUANTILE = 0.99

# Share of a slide's tiles beyond that quantile from which it is spoken of.
_MANY = 0.25

# What bounds the work: spots looked at, axes of wide features, folds; and rows at a time.
_SPOTS, _AXES, _FOLDS, _ROWS = 10_000, 384, 10, 8192


@dataclass(frozen=True)
class Novelty:
    """How far is far, as learned from the training features."""

    mean: Tensor  # Of the training features, [n_features]
    # Takes what differs from it to axes on which length 1 is the threshold, [n_features, k].
    whitening: Tensor


def fit_novelty(features: Any, group: NDArray) -> Novelty:
    r"""Learn which features ``[n_spots, n_features]`` are usual; a group is left out together.

    They may stay on disk: some rows are taken.

    The distance is Mahalanobis', :math:`\sqrt{(x - \mu)^\top \Sigma^{-1} (x - \mu)}`, with the
    covariance of the standardised features shrunken as by Ledoit and Wolf (2004); of more than 384
    features on their first 384 principal axes. The threshold is honest: every group is left out of
    the mean and covariance in turn, and its own 99 % quantile of distances found. The median of the
    groups' quantiles is taken, so that one odd patient does not make the model blind.

    >>> rng = np.random.default_rng(0)
    >>> usual = fit_novelty(rng.normal(size=(400, 3)), np.repeat(["A", "B", "C", "D"], 100))
    >>> novelty_of([[0.0, 0.0, 0.0], [0.0, 50.0, 0.0]], usual) > 1
    array([False,  True])
    """
    # Groups are patients. Where they are sections of one or two, another patient may well lie
    # beyond; of a single group five runs of spots are left out, which lie closer together still.
    n_spots = len(features)
    rows = np.linspace(0, n_spots - 1, min(n_spots, _SPOTS)).astype(int)
    values, group = features[rows].astype(np.float32), np.asarray(group)[rows]
    # By powers of two, which are exact: float32 may not hold the squares.
    exponent = np.frexp(np.abs(values).max(0))[1]
    values = np.ldexp(values, -exponent)
    fold = deal(group, _FOLDS)
    if fold.max() == 0:
        fold = np.arange(len(fold)) * 5 // len(fold)
    mean, scale = values.mean(0), values.std(0)
    scale = np.where(scale > 0, scale, np.ldexp(np.float32(1), -exponent))
    values = (values - mean) / scale
    axes = np.eye(len(mean), dtype=np.float32)
    if len(mean) > _AXES:
        pca = PCA(min(_AXES, len(values)), svd_solver="covariance_eigh")
        axes = pca.fit(values).components_.T
        values = values @ axes
    far = [_quantile(values[fold == left], _usual(values[fold != left])) for left in set(fold)]
    threshold = max(float(np.median(far)), 1.0)
    whitening = torch.as_tensor(axes / scale[:, None]) @ _usual(values).whitening / threshold
    whitening = torch.ldexp(whitening.float(), torch.as_tensor(-exponent)[:, None])
    # Principal axes are drawn through the mean, so it stays the centre.
    return Novelty(torch.as_tensor(np.ldexp(mean, exponent)), whitening)


def novelty_of(features: ArrayLike, novelty: Novelty) -> NDArray[np.float32]:
    """Distance of each spot from what is usual, ``[n_spots]``: 1 is the threshold."""
    parts = torch.as_tensor(np.asarray(features, dtype=np.float32)).split(_ROWS)
    distances = [((part - novelty.mean) @ novelty.whitening).norm(dim=1) for part in parts]
    return np.asarray(torch.cat(distances).numpy())


def warning_of(distances: NDArray) -> str | None:
    """Say that a slide is unlike the training sections, if a quarter of its tiles is.

    >>> warning_of(np.array([0.5, 0.7, 0.9, 0.4]))
    >>> warning_of(np.array([2.5, 3.7, 0.9, 2.2]))
    '75 % of the tiles look unlike anything in training (expected 1 %); do not trust this map: ...'
    """
    share = float(np.mean(distances > 1))
    if share < _MANY:
        return None
    return (
        f"{100 * share:.0f} % of the tiles look unlike anything in training (expected 1 %); do not "
        "trust this map: other organ, stain or scanner, wrong µm per pixel, or a model that has "
        "seen too few patients?"
    )


def _usual(values: NDArray[np.float32]) -> Novelty:
    estimate = LedoitWolf().fit(values)
    variances, axes = np.linalg.eigh(estimate.covariance_)
    # Features that never vary have no variance at all.
    whitening = axes / np.sqrt(np.maximum(variances, 1e-6))
    return Novelty(torch.as_tensor(estimate.location_), torch.as_tensor(whitening))


def _quantile(values: NDArray[np.float32], usual: Novelty) -> float:
    return float(np.quantile(novelty_of(values, usual), _QUANTILE))
