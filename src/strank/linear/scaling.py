"""Standardisation by what varies within sections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scaling", "centre_within"]


def centre_within(values: NDArray, section: NDArray) -> NDArray[np.float64]:
    """Subtract the mean of its section from every row.

    Parameters
    ----------
    values
        ``[n_spots, ...]``.
    section
        Labels of any kind, ``[n_spots]``.

    Examples
    --------
    >>> centre_within(np.array([[1.0], [3.0], [7.0]]), np.array(["a", "a", "b"])).ravel()
    array([-1.,  1.,  0.])
    """
    centred = np.array(values, dtype=np.float64)
    for label in np.unique(section):
        rows = section == label
        centred[rows] -= centred[rows].mean(0)
    return centred


@dataclass(frozen=True)
class Scaling:
    """Centre and scale of each feature.

    The scale is the pooled standard deviation *within* sections: what differs between sections
    (stain, scanner) cannot help to order the spots of one, and must not set the scale.

    Attributes
    ----------
    centre
        Mean over spots, ``[n_features]``.
    scale
        ``[n_features]``; 1 for a feature that varies in no section.
    """

    centre: NDArray[np.float64]
    scale: NDArray[np.float64]

    @classmethod
    def fit(cls, features: NDArray, section: NDArray) -> Scaling:
        """Estimate from spots ``[n_spots, n_features]`` and their section labels.

        Examples
        --------
        >>> features, section = np.array([[0.0], [2], [100], [102]]), np.array([0, 0, 1, 1])
        >>> scaling = Scaling.fit(features, section)
        >>> scaling.centre, scaling.scale
        (array([51.]), array([1.]))
        """
        features = np.asarray(features, dtype=np.float64)
        scale = np.sqrt((centre_within(features, section) ** 2).mean(0))
        negligible = scale <= 1e-9 * np.abs(features).max(0, initial=0)
        return cls(features.mean(0), np.where(negligible, 1.0, scale))

    def apply(self, features: NDArray) -> NDArray[np.float64]:
        """Standardise features ``[n_spots, n_features]``."""
        return (np.asarray(features, dtype=np.float64) - self.centre) / self.scale
