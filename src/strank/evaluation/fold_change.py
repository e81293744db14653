"""Fold changes of two regions, with intervals over blocks of tissue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control, t

from strank.errors import InputError, some
from strank.evaluation.regions import Regions

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
# From here on, 95 % intervals of simulated tissue cover less than 90 %.
_ALIKE = 0.25

_FEW_BLOCKS = 5.0


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
                "varies between blocks needs 2 or more: draw a larger region, or lower `block_um`"
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


@dataclass(frozen=True)
class Contrast:
    """Log fold changes between two regions.

    Attributes
    ----------
    table
        One row a gene.
    blocks
        Region to how many blocks of tissue it is worth; see `LogRatio`.
    warnings
        What limits what the table says, in words.
    """

    table: pd.DataFrame
    blocks: dict[str, float]
    warnings: tuple[str, ...]


def contrast_predicted(
    predictions: AnnData, regions: Regions, *, block_um: float = BLOCK_UM, seed: int = 0
) -> Contrast:
    r"""Predicted log fold change of every gene between two regions, with an interval.

    For the first region :math:`A` and the second :math:`B` it is

    .. math:: \log \frac{1}{|A|} \sum_{i \in A} e^{r_i} - \log \frac{1}{|B|} \sum_{i \in B} e^{r_i}

    since scores :math:`r` are log rates, and the observed counterpart, counts pooled over depth, is
    a ratio of mean rates. (A difference of mean scores is a ratio of geometric means, for which
    counts with zeros have no counterpart.) A constant added to the scores of a gene changes
    nothing.

    Tiles near one another are alike, so blocks of tissue are resampled, not tiles; see
    `log_ratio`. The interval covers where in the tissue one looked, not
    the error of the model. It is too narrow if tissue varies over distances longer than a third of
    a block, and too sure if the regions were found from the scores themselves.

    Parameters
    ----------
    predictions
        ``X`` = scores (natural log), ``obsm["spatial"]`` in pixels,
        ``uns["strank"]["um_per_pixel"]``; as `strank.model.rank_model.RankModel.predict` makes it.
    regions
        Two names, each with the spots that lie there, ``[n_spots]``; none in both.
    block_um
        Side of a block.
    seed
        Of the resampling.

    Returns
    -------
    Contrast
        A row a gene, from highest in ``a`` to highest in ``b``: ``gene``, ``predicted`` (above 0:
        higher in ``a``), ``low, high`` (95 %), ``p``, ``q`` (false discovery rate of Benjamini and
        Hochberg), ``a, b`` (the regions), ``spots_a, spots_b``.

    Raises
    ------
    InputError
        If a region has no spots, or spans hardly more than a block; for scores that are not finite
        or have no positions.

    Examples
    --------
    >>> x, y = np.meshgrid(np.arange(0, 6000, 500.0), np.arange(0, 3000, 500.0))
    >>> tiles = AnnData(
    ...     np.where(x < 3000, 1.0, 0.0).reshape(-1, 1),
    ...     var=pd.DataFrame(index=["ERBB2"]),
    ...     obsm={"spatial": np.column_stack([x.ravel(), y.ravel()])},
    ...     uns={"strank": {"um_per_pixel": 1.0}},
    ... )
    >>> left = x.ravel() < 3000
    >>> table = contrast_predicted(tiles, {"left": left, "right": ~left}).table
    >>> table["predicted"].round(6).tolist()
    [1.0]
    """
    positions, scores = _positions_um(predictions, "predictions"), _scores(predictions)
    # Any shift of a gene cancels; without this one large scores would overflow.
    rates = np.exp(scores - scores.max(0, initial=-np.inf))
    ratio = log_ratio(
        Rates(rates, np.ones(len(rates)), positions), regions, block_um=block_um, seed=seed
    )
    (a, of_a), (b, of_b) = regions.items()
    table = pd.DataFrame(
        {
            "gene": predictions.var_names,
            "predicted": ratio.change,
            "low": ratio.low,
            "high": ratio.high,
            "p": ratio.p,
            "q": false_discovery_control(ratio.p) if len(ratio.p) else ratio.p,
        }
    ).assign(a=a, b=b, spots_a=of_a.sum(), spots_b=of_b.sum())
    table = table.sort_values("predicted", ascending=False, kind="stable", ignore_index=True)
    warnings = _few(ratio.blocks, "tiles")
    for name, inside in regions.items():
        warnings += _dependent(name, scores[inside], positions[inside], block_um)
    return Contrast(table, ratio.blocks, warnings)


def contrast_observed(
    section: AnnData,
    regions: Regions,
    genes: pd.Index,
    *,
    block_um: float = BLOCK_UM,
    seed: int = 0,
) -> Contrast:
    r"""Observed log fold change between two regions, with an interval as for the predicted one.

    .. math:: \log \Big( \frac{\sum_A c_i}{\sum_A l_i} + \frac{1}{l} \Big)
              - \log \Big( \frac{\sum_B c_i}{\sum_B l_i} + \frac{1}{l} \Big)

    with counts :math:`c_i`, library sizes :math:`l_i`, and the depth :math:`l` of both regions
    together: as if one count more had been spread evenly over that depth. So a gene that one region
    lacks has a finite change, pulled towards 0.

    Parameters
    ----------
    section
        Counts and library sizes; see `strank.cohort.contract`.
    regions
        Two names, each with the spots of the section that lie there; none in both.
    genes
        Which genes.
    block_um, seed
        As in `contrast_predicted`.

    Returns
    -------
    Contrast
        A row a gene, in their order: ``gene, observed, observed_low, observed_high, observed_p,
        counts_a, counts_b, observed_spots_a, observed_spots_b``. NaN for a gene that is not
        measured; its change is NaN too if it has no counts in either region.

    Raises
    ------
    InputError
        If a region has no spots with counts, or spans hardly more than a block.
    """
    measured = genes[genes.isin(section.var_names)]
    counts = sparse.csr_matrix(section[:, measured].X, dtype=np.float64, copy=True)
    depth = section.obs["library_size"].to_numpy(np.float64)
    # A spot without counts says nothing, and a block of such would have no rate.
    regions = {name: inside & (depth > 0) for name, inside in regions.items()}
    total = sum(float(depth[inside].sum()) for inside in regions.values())
    rates = Rates(counts, depth, _positions_um(section, "counts"), 1 / max(total, 1.0))
    try:
        ratio = log_ratio(rates, regions, block_um=block_um, seed=seed)
    except InputError as error:
        raise InputError(f"spots with counts: {error}") from error
    (_, of_a), (_, of_b) = regions.items()
    counts_a, counts_b = (np.asarray(counts[inside].sum(0)).ravel() for inside in (of_a, of_b))
    changes = {
        "observed": ratio.change,
        "observed_low": ratio.low,
        "observed_high": ratio.high,
        "observed_p": ratio.p,
    }
    seen = counts_a + counts_b > 0
    table = (
        pd.DataFrame({name: np.where(seen, found, np.nan) for name, found in changes.items()})
        .assign(counts_a=counts_a, counts_b=counts_b)
        .set_axis(measured)
        .reindex(genes)
        .assign(observed_spots_a=of_a.sum(), observed_spots_b=of_b.sum())
    )
    table = table.rename_axis("gene").reset_index()
    return Contrast(table, ratio.blocks, _few(ratio.blocks, "spots with counts"))


def agreement(table: pd.DataFrame) -> dict[str, float | None]:
    """Summarise how observed and predicted changes agree over genes.

    Parameters
    ----------
    table
        With the columns ``predicted`` and ``observed``.

    Returns
    -------
    dict
        ``genes`` (with an observed change), ``pearson``, ``same_direction`` (a share); ``None``
        where undefined.

    Examples
    --------
    >>> agreement(pd.DataFrame({"predicted": [1.0, -1.0, 2.0], "observed": [2.0, -2.0, np.nan]}))
    {'genes': 2, 'pearson': 1.0, 'same_direction': 1.0}
    """
    both = table[["predicted", "observed"]].dropna()
    pearson = both["predicted"].corr(both["observed"]) if len(both) > 1 else np.nan
    same = (np.sign(both["predicted"]) == np.sign(both["observed"])).mean()
    shares = {"pearson": pearson, "same_direction": same}
    return {"genes": len(both)} | {
        name: round(float(value), 6) if np.isfinite(value) else None
        for name, value in shares.items()
    }


def _scores(predictions: AnnData) -> NDArray[np.float64]:
    names = predictions.var_names
    if not names.is_unique:
        raise InputError(f"predictions: genes named twice: {some(names[names.duplicated()])}")
    scores = predictions.X.toarray() if sparse.issparse(predictions.X) else predictions.X
    scores = np.asarray(scores, dtype=np.float64)
    finite = np.isfinite(scores).all(0)
    if not finite.all():
        raise InputError(f"predictions: scores of {some(names[~finite])} are not finite")
    return scores


def _positions_um(spots: AnnData, what: str) -> NDArray[np.float64]:
    if "spatial" not in spots.obsm or "um_per_pixel" not in spots.uns.get("strank", {}):
        raise InputError(
            f'{what}: obsm["spatial"] (pixels of the full image) and uns["strank"]["um_per_pixel"] '
            "are needed; `strank predict` writes both"
        )
    um_per_pixel = float(spots.uns["strank"]["um_per_pixel"])
    return np.asarray(spots.obsm["spatial"], dtype=np.float64) * um_per_pixel


def _dependent(name: str, scores: NDArray, positions: NDArray, block_um: float) -> tuple[str, ...]:
    """Warn of blocks that are too small for what varies in a region."""
    alike = likeness(scores, positions, block_um / 3)
    if alike < _ALIKE:
        return ()
    return (
        f"region {name!r}: scores {block_um / 3:.0f} µm apart still correlate by {alike:.2f}, so "
        "its intervals are too narrow; raise `block_um` if the regions are large enough",
    )


def _few(blocks: Mapping[str, float], what: str) -> tuple[str, ...]:
    return tuple(
        f"region {name!r}: its {what} are worth {number:.1f} blocks only; the intervals are rough"
        for name, number in blocks.items()
        if number < _FEW_BLOCKS
    )
