"""Blocks of tissue: how surely a log mean rate is known when spots near one another are alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.stats import t

from strank.errors import InputError

__all__ = ["BLOCK_UM", "N_DRAWS", "LogRatio", "Rates", "likeness", "log_ratio"]

Array = NDArray[np.float64]

# Predictions of a breast cancer section are alike (correlation above 1/e) up to 0.3 mm; blocks
# three times as wide keep most of that inside.
BLOCK_UM = 1000.0
# Places of the grid along each side, and draws with each.
_SHIFTS = 4
_DRAWS = 64
N_DRAWS = _SHIFTS**2 * _DRAWS
_LEAST_BLOCKS = 2.0
_SAMPLE = 2000


@dataclass(frozen=True)
class Rates:
    """What the mean rate of some spots is made of: ``sum(amount) / sum(exposure) + floor``.

    Attributes
    ----------
    amount
        Rates or counts, ``[n_spots, n_genes]``.
    exposure
        1 or library size, ``[n_spots]``; above 0 in every region.
    positions_um
        ``[n_spots, 2]``.
    floor
        Added to every mean rate.
    """

    amount: Array | sparse.csr_matrix
    exposure: Array
    positions_um: Array
    floor: float = 0.0

    def of(self, spots: NDArray) -> Rates:
        """Those of some spots."""
        return Rates(self.amount[spots], self.exposure[spots], self.positions_um[spots], self.floor)


@dataclass(frozen=True)
class LogRatio:
    """Log ratio of the mean rates of two regions, each array ``[n_genes]``.

    Attributes
    ----------
    change
        First region over the second, natural log.
    low, high
        95 % interval.
    p
        Two-sided.
    blocks
        Region to how many blocks it is worth: by shares of unequal size, so slivers hardly count.
    """

    change: Array
    low: Array
    high: Array
    p: Array
    blocks: dict[str, float]


def log_ratio(
    rates: Rates, regions: Mapping[str, NDArray[np.bool_]], *, block_um: float, seed: int
) -> LogRatio:
    """Compare the mean rates of two regions; blocks of tissue are resampled within each.

    The interval is the change ± Student's t times the bootstrap's standard error: with the few
    blocks that a region has, percentiles of the draws are too narrow. The grid of blocks is laid in
    16 places, since where it begins must not decide.

    Parameters
    ----------
    rates
        Of all spots.
    regions
        Two names, each with the spots that lie there, ``[n_spots]``.
    block_um
        Side of a block.
    seed
        Of the resampling.

    Raises
    ------
    InputError
        If a region has no spots, or spans hardly more than a block.
    """
    means, variances, blocks = {}, {}, {}
    # By name: which region is called first has no part in the draws.
    for number, name in enumerate(sorted(regions)):
        part = rates.of(np.flatnonzero(regions[name]))
        if not len(part.exposure):
            raise InputError(f"region {name!r} has no spot")
        rng = np.random.default_rng([seed, number])
        means[name] = np.asarray(part.amount.sum(0)).ravel() / part.exposure.sum() + part.floor
        variances[name], blocks[name] = _resample(part, block_um, rng)
        if blocks[name] < _LEAST_BLOCKS:
            raise InputError(
                f"region {name!r} is worth {blocks[name]:.1f} blocks of {block_um:g} µm, and what "
                "varies between blocks needs 2 or more: draw a larger region, or lower --block"
            )
    a, b = regions
    change, variance = np.log(means[a]) - np.log(means[b]), variances[a] + variances[b]
    with np.errstate(invalid="ignore", divide="ignore"):
        # Welch and Satterthwaite: the region that varies more decides.
        shares = [variances[name] ** 2 / (blocks[name] - 1) for name in (a, b)]
        freedom = variance**2 / (shares[0] + shares[1])
        margin = t.ppf(0.975, freedom) * np.sqrt(variance)
        p = 2 * t.sf(np.abs(change) / np.sqrt(variance), freedom)
    constant = variance == 0
    margin[constant], p[constant] = 0.0, change[constant] == 0
    return LogRatio(change, change - margin, change + margin, p, {a: blocks[a], b: blocks[b]})


def _resample(rates: Rates, block_um: float, rng: np.random.Generator) -> tuple[Array, float]:
    """Variance of the log mean rate over draws of blocks, and how many blocks there are."""
    shifts = np.arange(_SHIFTS) / _SHIFTS
    variances, crowding = [], []
    for shift in product(shifts, shifts):
        cells = np.floor(rates.positions_um / block_um + shift)
        _, block = np.unique(cells, axis=0, return_inverse=True)
        ones = np.ones(len(block)), (block.ravel(), np.arange(len(block)))
        of_block = sparse.csr_matrix(ones)
        exposure, amount = of_block @ rates.exposure, of_block @ rates.amount
        amount = amount.toarray() if sparse.issparse(amount) else amount
        n_blocks = len(exposure)
        drawn = rng.multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), size=_DRAWS)
        means = drawn @ amount / (drawn @ exposure)[:, None] + rates.floor
        variances.append(np.log(means).var(0, ddof=1))
        crowding.append(((exposure / exposure.sum()) ** 2).sum())
    one_of = float(np.mean(crowding))
    # Deviations from the region's own mean are too small, by one block of those there are.
    return np.mean(variances, axis=0) / max(1 - one_of, 1e-9), 1 / one_of


def likeness(scores: Array, positions: Array, distance: float) -> float:
    """Correlation of the scores of spots about so far apart, mean over genes; 0 if no spots are.

    Examples
    --------
    >>> x = np.arange(40.0)
    >>> likeness(np.sin(x)[:, None], np.column_stack([x, 0 * x]), np.pi) < -0.7
    True
    """
    step = len(scores) // _SAMPLE + 1
    scores, positions = scores[::step], positions[::step]
    near = cKDTree(positions).query_pairs(4 / 3 * distance, output_type="ndarray")
    apart = np.hypot(*(positions[near[:, 0]] - positions[near[:, 1]]).T)
    first, second = near[apart > 2 / 3 * distance].T
    scale = scores.std(0)
    varies = scale > 0
    if not len(first) or not varies.any():
        return 0.0
    deviation = (scores[:, varies] - scores[:, varies].mean(0)) / scale[varies]
    pairs = sparse.csr_matrix((np.ones(len(first)), (first, second)), shape=(len(scores),) * 2)
    return float((deviation * (pairs @ deviation)).sum() / len(first) / varies.sum())
