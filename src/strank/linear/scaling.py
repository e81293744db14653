"""Standardisation by what varies within sections."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scaling"]


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
    def fit(cls, features: NDArray, section: NDArray[np.int64]) -> Scaling:
        """Estimate from spots ``[n_spots, n_features]`` with section codes from 0.

        Examples
        --------
        >>> features, section = np.array([[0.0], [2], [100], [102]]), np.array([0, 0, 1, 1])
        >>> scaling = Scaling.fit(features, section)
        >>> scaling.centre, scaling.scale
        (array([51.]), array([1.]))
        """
        features = np.asarray(features, dtype=np.float64)
        size = np.bincount(section).clip(min=1)
        total = np.zeros((len(size), features.shape[1]))
        np.add.at(total, section, features)
        within = features - (total / size[:, None])[section]
        scale = np.sqrt((within**2).mean(0))
        negligible = scale <= 1e-9 * np.abs(features).max(0, initial=0)
        return cls(features.mean(0), np.where(negligible, 1.0, scale))

    def apply(self, features: NDArray) -> NDArray[np.float64]:
        """Standardise features ``[n_spots, n_features]``."""
        return (np.asarray(features, dtype=np.float64) - self.centre) / self.scale
