"""Which spots of a section stand around a spot, and how far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

__all__ = ["Neighbours", "find_neighbours"]


@dataclass(frozen=True)
class Neighbours:
    """Rows and distances of the nearest spots of the same section, the spot itself first.

    Attributes
    ----------
    rows
        ``[n_spots, 1 + n_neighbours]``; -1 where a section has fewer spots.
    distance
        In µm, same shape; 0 where there is none.
    """

    rows: NDArray[np.int64]
    distance: NDArray[np.float32]

    def of(self, spots: NDArray[np.int64]) -> tuple[NDArray[np.int64], tuple[Tensor, Tensor]]:
        """Return the rows that some spots look at, once each, and where among them they look.

        Returns
        -------
        rows
            ``[n_rows]``, ascending.
        neighbours, distance
            ``[n_spots, 1 + n_neighbours]``: places in ``rows``, -1 for none, and µm.

        Examples
        --------
        >>> line = find_neighbours(np.c_[np.arange(4.0), np.zeros(4)], np.zeros(4, int), 1)
        >>> line.of(np.array([3]))
        (array([2, 3]), (tensor([[1, 0]]), tensor([[0., 1.]])))
        """
        looked_at = self.rows[spots]
        absent = looked_at < 0
        needed = np.unique(looked_at[~absent])
        places = np.searchsorted(needed, looked_at)
        places[absent] = -1
        return needed, (torch.from_numpy(places), torch.from_numpy(self.distance[spots]))


def find_neighbours(
    positions: NDArray[np.float64], section: NDArray, n_neighbours: int
) -> Neighbours:
    """Find the nearest spots of the same section.

    Parameters
    ----------
    positions
        Spot centres in µm, ``[n_spots, 2]``.
    section
        Labels of any kind, ``[n_spots]``.
    n_neighbours
        How many besides the spot itself.
    """
    shape = len(positions), 1 + n_neighbours
    rows, distance = np.full(shape, -1), np.zeros(shape, np.float32)
    for label in np.unique(section):
        own = np.flatnonzero(section == label)
        reach = min(n_neighbours + 1, len(own))
        far, near = cKDTree(positions[own]).query(positions[own], k=reach)
        far, near = far.reshape(len(own), reach), near.reshape(len(own), reach)
        # Of spots at the same place, another may come first.
        first = np.argmax(near == np.arange(len(own))[:, None], axis=1)
        line = np.arange(len(own))
        near[line, first], near[:, 0] = near[:, 0].copy(), line
        rows[own, :reach], distance[own, :reach] = own[near], far
    return Neighbours(rows, distance)
