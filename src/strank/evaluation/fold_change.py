"""Fold changes of two regions, with intervals over blocks of tissue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control, t

from strank.cohort.contract import counts_checksum
from strank.cohort.in_memory import as_sections, name_of, um_of_spots
from strank.cohort.names import told_apart
from strank.cohort.store import read_h5ad, read_section
from strank.errors import InputError, some
from strank.evaluation.regions import (
    Groups,
    Regions,
    choose_pair,
    disjoint,
    find_regions,
    on_same_slide,
)
from strank.files import claims, output_folder, sha256, write_json, write_table
from strank.model.uncertainty import change_interval
from strank.version import __version__

_Array = NDArray[np.float64]
# Predictions of a breast cancer section are alike (correlation above 1/e) up to 0.3 mm; blocks
# three times as wide keep most of that inside.
BLOCK_UM = 1000.0

# Places of the grid along each side, and draws with each.
_SHIFTS, _DRAWS = 4, 64
_LEAST_BLOCKS = 2.0
_SAMPLE = 2000
# From here on, 95 % intervals of simulated tissue cover less than 90 %.
_ALIKE = 0.25
_FEW_BLOCKS = 5.0
_COVERS = (
    "The interval and q cover where in the tissue one looked: blocks of tissue were resampled. "
    "They do not cover the error of the model, so a small q says that the predictions differ, not "
    "that expression does"
)
_CIRCULAR = (
    "If the groups were found from these scores (by clustering, say), intervals and q are too sure."
)


@dataclass(frozen=True)
class Contrast:
    """Log fold changes between two regions.

    Attributes
    ----------
    table
        One row a gene, from highest in ``a`` to highest in ``b``: ``gene``; ``predicted``, the log
        ratio of mean rates (natural log; above 0: higher in ``a``); ``low, high`` (95 %); ``p``;
        ``q`` (false discovery rate of Benjamini and Hochberg); ``a, b`` (the regions); ``spots_a,
        spots_b``. Of a model that knows how wrong it may be also ``se``, the standard error of that
        in ``predicted``, and ``model_low, model_high`` (90 %). With counts also ``observed,
        observed_low, observed_high, observed_p, counts_a, counts_b, observed_spots_a,
        observed_spots_b``; NaN where a gene is not measured, or has no counts in either region.
    facts
        What it came from (files with their checksums, parameters, model), the two regions and how
        many ``blocks`` of tissue each is worth, and with counts the ``agreement`` of observed and
        predicted changes.
    warnings
        What limits what the table says, in words.
    """

    table: pd.DataFrame
    facts: dict[str, Any]
    warnings: tuple[str, ...]

    @claims("folder")
    def write(self, folder: Path | str) -> None:
        """Write ``contrast.csv`` and ``contrast.json``."""
        folder = output_folder(Path(folder))
        write_table(folder / "contrast.csv", self.table, float_format="%.6g")
        write_json(folder / "contrast.json", {**self.facts, "warnings": list(self.warnings)})


def contrast(
    predictions: AnnData | Path | str,
    groups: Groups,
    counts: AnnData | Path | str | None = None,
    *,
    between: str | tuple[str, str] | None = None,
    block_um: float = BLOCK_UM,
    seed: int = 0,
) -> Contrast:
    r"""Rank genes by their predicted change between two regions of a section, with intervals.

    The change is the log ratio of the mean predicted rates of the first region and the second.
    Tiles near one another are alike, so blocks of tissue are resampled, not tiles. The interval
    covers where in the tissue one looked, not the error of the model. It is too narrow if tissue
    varies over distances longer than a third of a block, and too sure if the regions were found
    from the scores themselves.

    Parameters
    ----------
    predictions
        Scores of one section, or their file, as `strank.predict` makes them: ``X`` (natural log),
        ``obsm["spatial"]`` in pixels, ``uns["strank"]["um_per_pixel"]``.
    groups
        Where the regions are: a GeoJSON file as QuPath exports it, in pixels of the full image; a
        column of ``obs``; or a label for each tile, ``[n_tiles]`` (none for those that lie in no
        region).
    counts
        The section with its counts, or its ``.h5ad`` of a cohort, for the observed changes: the log
        ratio of the regions' shares of counts, as if one count more had been spread evenly over the
        depth of both, so that it is finite.
    between
        The two regions, ``("Tumor", "Stroma")`` or ``"Tumor,Stroma"``; needed if there are more.
    block_um
        Side of the blocks of tissue, in µm.
    seed
        Of the resampling.

    Raises
    ------
    strank.errors.InputError
        If there are no such regions, one has no spots, or spans hardly more than a block; for
        scores that are not finite, of several sections, or without positions; for counts of another
        image.

    Examples
    --------
    >>> x, y = (axis.ravel() for axis in np.meshgrid(*[np.arange(0, 6000, 500.0)] * 2))
    >>> tiles = AnnData(
    ...     np.where(x < 3000, 1.0, 0.0)[:, None],
    ...     var=pd.DataFrame(index=["ERBB2"]),
    ...     obsm={"spatial": np.column_stack([x, y])},
    ...     uns={"strank": {"um_per_pixel": 1.0}},
    ... )
    >>> found = contrast(tiles, np.where(x < 3000, "left", "right"))
    >>> found.table[["gene", "predicted", "a", "b"]].round(6).values.tolist()
    [['ERBB2', 1.0, 'left', 'right']]
    """
    if not 0 < block_um < float("inf"):
        raise InputError(f"`block_um` must be positive, in µm; got {block_um:g}")
    tiles, name = _read_predictions(predictions)
    if isinstance(counts, AnnData):
        (counts,) = as_sections({name_of(counts): counts}, patients=False).values()
    regions, left_out = find_regions(tiles, groups)
    named = isinstance(groups, (str, Path))
    in_file = named and groups not in tiles.obs
    source = f"`groups={groups}`" if named else "`groups`"
    pair = choose_pair(regions, between, source=source, left_out=left_out)
    chosen, warnings = _chosen(regions, pair, tiles, name)
    if left_out:
        warnings.insert(0, f"{source}: left out {', '.join(left_out)}")
    warnings += [f"{source}: {text}" for text in told_apart("regions", regions)]
    if "strank_model" not in tiles.uns:
        warnings.append(
            f"{name} was not written by strank: X is taken for log relative rates (natural log)"
        )
    predicted = contrast_predicted(tiles, chosen, block_um=block_um, seed=seed)
    table, blocks = predicted.table, {"predicted": predicted.blocks}
    warnings += predicted.warnings
    facts: dict[str, Any] = {
        "change": f"log mean rate in {pair[0]} - log mean rate in {pair[1]}",
        "between": list(pair),
        "blocks": blocks,
        "caveats": [_covers(tiles)] + [_CIRCULAR] * (not in_file),
    }
    if counts is not None:
        section, there, told = _observed_regions(counts, tiles, groups, pair)
        observed = contrast_observed(section, there, tiles.var_names, block_um=block_um, seed=seed)
        table, blocks["observed"] = table.merge(observed.table, on="gene"), observed.blocks
        warnings += [*told, *observed.warnings]
        facts["agreement"] = agreement(table)
    inputs = {"predictions": predictions, "counts": counts, "groups": groups if in_file else None}
    facts |= {
        "strank_version": __version__,
        "inputs": {
            what: {"path": str(path), "sha256": sha256(Path(path))}
            for what, path in inputs.items()
            if isinstance(path, (str, Path))
        },
        "parameters": {
            "groups": str(groups) if named else "labels",
            "n_draws": _SHIFTS**2 * _DRAWS,
            "interval": 0.95,
            "block_um": block_um,
            "seed": seed,
        },
        "model": _model(tiles),
    }
    return Contrast(table, facts, tuple(warnings))


def _read_predictions(given: AnnData | Path | str) -> tuple[AnnData, str]:
    """Read the scores of one section; also how messages call them."""
    if isinstance(given, (str, Path)):
        tiles, name = read_h5ad(Path(given)), str(given)
    else:
        tiles, name = given, "predictions"
    if "library_size" in tiles.obs and "strank_model" not in tiles.uns:
        raise InputError(f"{name}: counts, not predictions; run `strank predict` on them first")
    sections = tiles.obs["section"].unique() if "section" in tiles.obs else []
    if len(sections) > 1:
        raise InputError(
            f"{name}: holds sections {some(sections)}; a contrast is of one, write each to its own "
            "file"
        )
    return tiles, name


def _chosen(
    regions: Regions, pair: tuple[str, str], spots: AnnData, name: str
) -> tuple[Regions, list[str]]:
    """Keep two regions, each with spots of its own."""
    chosen, shared = disjoint(regions, pair)
    for region in pair:
        if not regions[region].any():
            centres = spots.obsm["spatial"]
            (left, top), (right, bottom) = centres.min(0), centres.max(0)
            raise InputError(
                f"{name}: no spot lies in region {region!r}; spots lie at x {left:.0f} to "
                f"{right:.0f}, y {top:.0f} to {bottom:.0f}, in pixels of the full image"
            )
        if not chosen[region].any():
            raise InputError(f"{name}: all spots of region {region!r} lie in the other one too")
    told = f"{name}: {shared} spots lie in both regions, and are left out"
    return chosen, [told] if shared else []


def _observed_regions(
    counts: AnnData | Path | str, tiles: AnnData, groups: Groups, pair: tuple[str, str]
) -> tuple[AnnData, Regions, list[str]]:
    """Read the section with counts, and find the same regions there."""
    if isinstance(counts, (str, Path)):
        section, name = read_section(Path(counts)), str(counts)
    else:
        section, name = counts, "counts"
    if not isinstance(groups, (str, Path)):
        raise InputError(
            f"{name}: `groups` has labels of the predictions only; give regions as GeoJSON, or a "
            "column of obs that both have"
        )
    section, assumed = on_same_slide(name, section, tiles, by_place=groups not in tiles.obs)
    if groups in tiles.obs and groups not in section.obs:
        raise InputError(
            f"{name}: obs has no column {groups}; add it there too, or give regions as GeoJSON"
        )
    regions, _ = find_regions(section, groups)
    absent = [region for region in pair if region not in regions]
    if absent:
        raise InputError(f"{name}: obs[{groups!r}] has no {some(absent)}, as the predictions have")
    chosen, told = _chosen(regions, pair, section, name)
    told += assumed
    lacking = tiles.var_names.difference(section.var_names)
    if len(lacking):
        told.append(f"{name} has no counts of {some(lacking)}: predicted only")
    trained = _model(tiles).get("sections", {}).values()
    if counts_checksum(section) in [known.get("counts_sha256") for known in trained]:
        told.append(f"the model was trained on {name}: its observed changes are no test")
    return section, chosen, told


def _covers(tiles: AnnData) -> str:
    told = _model(tiles).get("uncertainty")
    return f"{_COVERS}; model_low to model_high does (90 %): {told}." if told else f"{_COVERS}."


def _model(tiles: AnnData) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tiles.uns.get("strank_model", "{}"))
    return found


@dataclass(frozen=True)
class Rates:
    """What the mean rate of some spots is made of: ``sum(amount) / sum(exposure) + floor``."""

    #: Rates or counts, ``[n_spots, n_genes]``.
    amount: _Array | sparse.csr_matrix
    #: 1 or library size, ``[n_spots]``; above 0 in every region.
    exposure: _Array
    positions_um: _Array
    floor: float = 0.0

    def of(self, spots: NDArray) -> Rates:
        """Those of some spots."""
        return Rates(self.amount[spots], self.exposure[spots], self.positions_um[spots], self.floor)


@dataclass(frozen=True)
class LogRatio:
    """Log ratio of the mean rates of two regions, first over second, each array ``[n_genes]``."""

    change: _Array
    #: 95 % interval.
    low: _Array
    high: _Array
    #: Two-sided.
    p: _Array
    #: Region to how many blocks it is worth: by shares of unequal size, so slivers hardly count.
    blocks: dict[str, float]


def log_ratio(
    rates: Rates, regions: Mapping[str, NDArray[np.bool_]], *, block_um: float, seed: int
) -> LogRatio:
    """Compare the mean rates of two regions; blocks of tissue are resampled within each.

    The interval is the change ± Student's t times the bootstrap's standard error: with the few
    blocks that a region has, percentiles of the draws are too narrow. The grid of blocks is laid in
    16 places, since where it begins must not decide.
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


def _resample(rates: Rates, block_um: float, rng: np.random.Generator) -> tuple[_Array, float]:
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


def likeness(scores: _Array, positions: _Array, distance: float) -> float:
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
class Changes:
    """Log fold changes between two regions, a row a gene; see `LogRatio` for ``blocks``."""

    table: pd.DataFrame
    blocks: dict[str, float]
    warnings: tuple[str, ...]


def contrast_predicted(
    predictions: AnnData, regions: Regions, *, block_um: float = BLOCK_UM, seed: int = 0
) -> Changes:
    r"""Predicted log fold change of every gene between two regions, with an interval.

    For the first region :math:`A` and the second :math:`B` it is

    .. math:: \log \frac{1}{|A|} \sum_{i \in A} e^{r_i} - \log \frac{1}{|B|} \sum_{i \in B} e^{r_i}

    since scores :math:`r` are log rates, and the observed counterpart, counts pooled over depth, is
    a ratio of mean rates. (A difference of mean scores is a ratio of geometric means, for which
    counts with zeros have no counterpart.) A constant added to the scores of a gene changes
    nothing.
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
    )
    if "score_axes" in predictions.obsm:
        se, low, high = change_interval(
            scores,
            np.asarray(predictions.obsm["score_axes"]),
            np.asarray(predictions.varm["score_variance"]),
            (of_a, of_b),
            seed=seed,
        )
        table = table.assign(se=se, model_low=table["predicted"] + low)
        table["model_high"] = table["predicted"] + high
    table = table.assign(a=a, b=b, spots_a=of_a.sum(), spots_b=of_b.sum())
    table = table.sort_values("predicted", ascending=False, kind="stable", ignore_index=True)
    warnings = _few(ratio.blocks, "tiles")
    for name, inside in regions.items():
        warnings += _dependent(name, scores[inside], positions[inside], block_um)
    return Changes(table, ratio.blocks, warnings)


def contrast_observed(
    section: AnnData,
    regions: Regions,
    genes: pd.Index,
    *,
    block_um: float = BLOCK_UM,
    seed: int = 0,
) -> Changes:
    r"""Observed log fold change between two regions, with an interval as for the predicted one.

    .. math:: \log \Big( \frac{\sum_A c_i}{\sum_A l_i} + \frac{1}{l} \Big)
              - \log \Big( \frac{\sum_B c_i}{\sum_B l_i} + \frac{1}{l} \Big)

    with counts :math:`c_i`, library sizes :math:`l_i`, and the depth :math:`l` of both regions
    together: as if one count more had been spread evenly over that depth. So a gene that one region
    lacks has a finite change, pulled towards 0.

    NaN for a gene that is not measured; its change is NaN too without counts in either region.
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
    return Changes(table, ratio.blocks, _few(ratio.blocks, "spots with counts"))


def agreement(table: pd.DataFrame) -> dict[str, float | None]:
    """Summarise how observed and predicted changes agree over genes; ``None`` where undefined.

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
    found = um_of_spots(spots)
    if not np.isfinite(found).all():
        raise InputError(
            f'{what}: obsm["spatial"] (pixels of the full image) and uns["strank"]["um_per_pixel"] '
            "are needed; `strank predict` writes both"
        )
    return found


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
