"""How far expression differs between two regions of a section, and how surely."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import false_discovery_control

from strank.errors import InputError, some
from strank.evaluation.blocks import BLOCK_UM, Rates, likeness, log_ratio
from strank.evaluation.regions import Regions

__all__ = ["Contrast", "agreement", "contrast_observed", "contrast_predicted"]

# From here on, 95 % intervals of simulated tissue cover less than 90 %.
_ALIKE = 0.25
_FEW_BLOCKS = 5.0


@dataclass(frozen=True)
class Contrast:
    """Log fold changes between two regions.

    Attributes
    ----------
    table
        One row a gene.
    blocks
        Region to how many blocks of tissue it is worth; see `strank.evaluation.blocks.LogRatio`.
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
    `strank.evaluation.blocks.log_ratio`. The interval covers where in the tissue one looked, not
    the error of the model. It is too narrow if tissue varies over distances longer than a third of
    a block, and too sure if the regions were found from the scores themselves.

    Parameters
    ----------
    predictions
        ``X`` = scores (natural log), ``obsm["spatial"]`` in pixels,
        ``uns["strank"]["um_per_pixel"]``; as `strank.model.RankModel.predict` makes it.
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
        "its intervals are too narrow; raise --block if the regions are large enough",
    )


def _few(blocks: Mapping[str, float], what: str) -> tuple[str, ...]:
    return tuple(
        f"region {name!r}: its {what} are worth {number:.1f} blocks only; the intervals are rough"
        for name, number in blocks.items()
        if number < _FEW_BLOCKS
    )
