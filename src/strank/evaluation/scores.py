"""Per gene and section: every score of every method, and what could not be scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import quantile_test, ttest_1samp

from strank.cohort.contract import places
from strank.metrics.ceiling import noise_ceiling
from strank.metrics.correlation import log1p_cp10k, target_of, unit_columns, unit_ranks
from strank.metrics.depth import ThinnedRanks, deep_enough, lift, thinned_ranks
from strank.metrics.deviance import calibration_slope, deviance_explained, slope_error
from strank.metrics.significance import SpatialNull

# What counts are divided by: all genes or, as in the STRank paper, the panel, which makes the
# target sum to a constant.
Depth = Literal["all", "panel"]

SCORES = (
    *("scc", "pearson", "pearson_counts"),
    *("depth_matched", "lift", "lift_relative", "deviance", "slope", "p_value"),
)

# Of the slope of each gene: 95 %, with spots taken for independent.
INTERVAL = ("slope_low", "slope_high")
_COLUMNS = (*SCORES, *INTERVAL)
_ENDS = np.array([-1.96, 1.96])
# What is told of methods whose mean scores are of different signs, and from how far on.
_TOLD, _NOTHING = (
    {"depth_matched": "depth-matched SCC", "lift": "lift", "deviance": "deviance"},
    0.002,
)

# Rows that know nothing of the image, of which nothing is to be told.
_NO_IMAGE = ("library size", "shuffled")

# Genes at a time: a dozen arrays of spots x genes are dense for so many.
_GENES = 512


def score_section(
    scores: Mapping[str, NDArray],
    section: AnnData,
    panel: pd.Index,
    *,
    slopes: Mapping[str, NDArray] | None = None,
    depth: Depth = "all",
    seed: int = 0,
    significance: bool = False,
) -> pd.DataFrame:
    """Score the predictions of several methods for one section.

    ``scores`` are ``[n_spots, n_genes]`` of each method; ``slopes``, ``[n_genes]``, of those that
    are no log rates. A row a method and gene: ``method, section, patient, gene, mean_counts,
    n_spots``, then `SCORES`, `INTERVAL`, and ``note``. A score is NaN where there is nothing to
    order, and ``note`` says why; a method that predicts one value for all spots orders nothing and
    gets 0.
    """
    measured = panel.isin(section.var_names)
    counts = sparse.csc_matrix(section[:, panel[measured]].X, dtype=np.float64)
    library_size = section.obs["library_size"].to_numpy()
    # Counts per 10,000 of the panel alone, as in the STRank paper, sum to a constant.
    target_depth = library_size if depth == "all" else np.asarray(counts.sum(1)).ravel()
    null = None
    if significance:
        null = SpatialNull.of(places(section)[deep_enough(library_size)[1]])
    slopes = slopes or {}
    values = {method: np.full((len(panel), len(_COLUMNS)), np.nan) for method in scores}
    varies = np.zeros(len(panel), dtype=bool)
    columns = np.flatnonzero(measured)
    for start in range(0, len(columns), _GENES):
        genes, block = columns[start : start + _GENES], counts[:, start : start + _GENES].tocsr()
        targets = _Targets.of(block, library_size, target_depth, _rng(seed, start))
        varies[genes] = targets.varies
        for method, predicted in scores.items():
            slope = slopes[method][genes] if method in slopes else None
            of_genes = np.asarray(predicted)[:, genes]
            # Every method sees the same draws, of the thinning and of the null.
            values[method][genes] = targets.score(of_genes, slope, null, _rng(seed, 1))
    facts = _gene_facts(section, panel)
    tables = []
    for method, predicted in scores.items():
        constant = varies & (np.ptp(predicted, axis=0) == 0)
        note = np.select([~measured, ~varies, constant], _NOTES, "")
        # There is nothing to order: not even the scores that a gene without variation would get.
        found = np.where(varies[:, None], values[method], np.nan)
        found = np.where(constant[:, None] & np.isnan(found) & _ORDERED, 0.0, found)
        table = facts.assign(**dict(zip(_COLUMNS, found.T, strict=True)), note=note)
        tables.append(table.assign(method=method))
    return pd.concat(tables, ignore_index=True)


_NOTES = ["not measured", "constant counts", "constant scores"]
# A p-value or slope of scores without order is not 0 but undefined.
_ORDERED = np.array([name not in ("slope", "p_value", *INTERVAL) for name in _COLUMNS])


def _gene_facts(section: AnnData, panel: pd.Index) -> pd.DataFrame:
    """``section, patient, gene, mean_counts, n_spots`` of every gene of a panel."""
    measured = panel.isin(section.var_names)
    mean_counts = np.full(len(panel), np.nan)
    # Counts are float32, in which the sum of many spots is no longer exact.
    counts = section[:, panel[measured]].X.astype(np.float64)
    mean_counts[measured] = np.asarray(counts.mean(0)).ravel()
    return pd.DataFrame(
        {
            "section": str(section.obs["section"].iloc[0]),
            "patient": str(section.obs["patient"].iloc[0]),
            "gene": panel,
            "mean_counts": mean_counts,
            "n_spots": section.n_obs,
        }
    )


def ceilings(section: AnnData, panel: pd.Index, *, seed: int = 0) -> pd.DataFrame:
    """`_gene_facts`, with ceilings, and how many spots are deep enough and a pattern is worth."""
    measured, library_size = panel.isin(section.var_names), section.obs["library_size"].to_numpy()
    counts, one = section[:, panel[measured]].X, np.zeros(section.n_obs)
    found = noise_ceiling(counts, section=one, library_size=library_size, seed=seed)
    table = _gene_facts(section, panel)
    thinned = thinned_ranks(sparse.csr_matrix(counts), library_size, n_draws=3, rng=_rng(seed, 2))
    null = SpatialNull.of(places(section)[thinned.kept])
    table["n_matched"] = int(thinned.kept.sum())
    table.loc[measured, "independent_spots"] = null.independent_spots(thinned.ranks)
    for name, values in zip(("scc", "pearson", "depth_matched"), found, strict=True):
        table[f"ceiling_{name}"] = np.nan
        table.loc[measured, f"ceiling_{name}"] = values[0]
    return table


@dataclass(frozen=True)
class _Targets:
    """What the scores of a block of genes are compared with; computed once for all methods."""

    counts: sparse.csr_matrix
    spots: dict[str, Any]  # of one section
    varies: NDArray[np.bool_]
    ranks: NDArray
    cp10k: NDArray
    log_counts: NDArray
    best_lift: NDArray
    thinned: ThinnedRanks

    @classmethod
    def of(
        cls,
        counts: sparse.csr_matrix,
        library_size: NDArray,
        target_depth: NDArray,
        rng: np.random.Generator,
    ) -> _Targets:
        spots: dict[str, Any] = {"section": np.zeros(len(library_size))}
        spots["library_size"] = library_size
        target = log1p_cp10k(counts, target_depth).toarray()
        shares = counts.toarray() / np.maximum(library_size, 1)[:, None]
        return cls(
            counts,
            spots,
            np.ptp(target, axis=0) > 0,
            unit_ranks(target),
            unit_columns(target),
            unit_columns(target_of(counts, library_size, "log1p_counts").toarray()),
            lift(shares, counts, **spots)[0],
            thinned_ranks(counts, library_size, rng=rng),
        )

    def score(
        self,
        scores: NDArray,
        slope: NDArray | None,
        null: SpatialNull | None,
        rng: np.random.Generator,
    ) -> NDArray[np.float64]:
        """Every score and its interval, ``[n_genes, n_columns]``; no p-values without a null."""
        unit, ranks = unit_columns(scores), unit_ranks(scores[self.thinned.kept])
        matched = (ranks * self.thinned.ranks).sum(0)
        gini = lift(scores, self.counts, **self.spots)[0]
        sized = {"slope": slope, **self.spots}
        # Of scores that are no log rates, those that their slope makes.
        rates = scores if slope is None else scores * slope
        best = calibration_slope(rates, self.counts, **self.spots)
        ends = best + _ENDS[:, None] * slope_error(best, rates, self.counts, **self.spots)
        found = {
            "scc": (unit_ranks(scores) * self.ranks).sum(0),
            "pearson": (unit * self.cp10k).sum(0),
            "pearson_counts": (unit * self.log_counts).sum(0),
            "depth_matched": matched,
            "lift": gini,
            "lift_relative": gini / np.where(self.best_lift > 0, self.best_lift, np.nan),
            "deviance": deviance_explained(scores, self.counts, **sized)[0],
            "slope": best[0],
            **dict(zip(INTERVAL, ends, strict=True)),
            "p_value": np.full(scores.shape[1], np.nan),
        }
        if null is not None:
            found["p_value"] = null.p_values(ranks, self.thinned.ranks, rng=rng)
        return np.stack([found[name] for name in _COLUMNS], axis=1)


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over genes of each section and method, then over sections (``section`` = ``"mean"``).

    Of ``slope`` the median over the genes of which it is known, since one can be of any size, and a
    95 % interval of it: over genes in a section, over sections (three or more) of all. ``genes``
    have a score; those with ``constant_counts`` and ``not_measured`` are left out,
    ``constant_scores`` count as 0. Every section weighs the same.
    """
    means = ["scc", "depth_matched", "lift", "deviance"]
    groups = table.groupby(["method", "section"], sort=False)
    by_section = groups.agg(
        **{name: (name, "mean") for name in means},
        slope=("slope", "median"),
        slope_low=("slope", lambda values: _of_median(values)[0]),
        slope_high=("slope", lambda values: _of_median(values)[1]),
        genes=("scc", "count"),
        constant_counts=("note", lambda note: int((note == "constant counts").sum())),
        not_measured=("note", lambda note: int((note == "not measured").sum())),
        constant_scores=("note", lambda note: int((note == "constant scores").sum())),
    ).reset_index()
    averaged = [*means, "slope", *INTERVAL]
    summed = ["genes", "constant_counts", "not_measured", "constant_scores"]
    overall = by_section.groupby("method", sort=False).agg(
        dict.fromkeys(averaged, "mean") | dict.fromkeys(summed, "sum")
    )
    of_slope = by_section.groupby("method", sort=False)["slope"]
    for number, name in enumerate(INTERVAL):
        overall[name] = of_slope.agg(lambda values, n=number: _of_mean(values)[n])
    overall = overall.reset_index().assign(section="mean")
    return pd.concat([by_section, overall[by_section.columns]], ignore_index=True)


def _of_median(values: pd.Series) -> tuple[float, float]:
    """Find the 95 % interval of a median, whatever the distribution (order statistics)."""
    known = np.sort(values.dropna())
    if len(known) < 2:
        return np.nan, np.nan
    low, high = (known[int(rank)] if rank >= 0 else np.nan for rank in _about_median(len(known)))
    return low, high


@lru_cache
def _about_median(n: int) -> tuple[float, float]:
    """Find the ranks between which the median lies, of so many values; NaN of too few."""
    found = quantile_test(np.arange(n), p=0.5).confidence_interval()
    return float(found.low), float(found.high)


def _of_mean(values: pd.Series) -> tuple[float, float]:
    """Find the 95 % interval of a mean over sections, by Student's t; none of fewer than three."""
    known = values.dropna()
    if len(known) < 3:
        return np.nan, np.nan
    found = ttest_1samp(known, 0).confidence_interval()
    return float(found.low), float(found.high)


def disagreements(summary: pd.DataFrame) -> list[str]:
    """Say of which methods depth-matched SCC, lift and deviance are of different signs.

    Order and size are not the same: scores that order spots well may be far too large.

    >>> means = {"depth_matched": [0.08, 0.2], "lift": [0.03, 0.1], "deviance": [-0.37, 0.1]}
    >>> table = pd.DataFrame({"method": ["A", "B"], "section": "mean", "slope": [0.11, 1], **means})
    >>> disagreements(table)
    ['A: scores disagree (depth-matched SCC +0.080, lift +0.030, deviance -0.370; slope 0.11): its \
order tells something, the size of its differences is worse than none']
    """
    told = []
    means = summary[(summary["section"] == "mean") & ~summary["method"].isin(_NO_IMAGE)]
    for row in means.to_dict("records"):
        values = {score: row[score] for score in _TOLD if np.isfinite(row[score])}
        signs = {int(np.sign(value)) for value in values.values() if abs(value) > _NOTHING}
        if len(signs) < 2:
            continue
        shown = ", ".join(f"{_TOLD[score]} {value:+.3f}" for score, value in values.items())
        shown += f"; slope {row['slope']:.2f}"
        ordered = row["depth_matched"] > _NOTHING and row["lift"] > _NOTHING
        meaning = (
            "its order tells something, the size of its differences is worse than none"
            if ordered
            else "what they say of it holds for one of them only"
        )
        told.append(f"{row['method']}: scores disagree ({shown}): {meaning}")
    return told
