"""Per gene and section: how well each method orders the spots, and what could not be scored."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.functional.metrics import log1p_cp10k, spearman

__all__ = ["score_section", "summarise"]


def score_section(scores: Mapping[str, NDArray], section: AnnData, panel: pd.Index) -> pd.DataFrame:
    """Score the predictions of several methods for one section.

    Parameters
    ----------
    scores
        Method to its scores, ``[n_spots, n_genes]``.
    section
        Counts and library size; it may lack genes of the panel.
    panel
        The genes of the columns.

    Returns
    -------
    pandas.DataFrame
        One row a method and gene: ``method, section, patient, gene, mean_counts, n_spots, scc,
        note``. ``scc`` is NaN where there is nothing to order, and ``note`` says why; a method that
        predicts one value for all spots orders nothing and gets 0.
    """
    measured = panel.isin(section.var_names)
    counts = section[:, panel[measured]].X
    library_size = section.obs["library_size"].to_numpy()
    varies = np.zeros(len(panel), dtype=bool)
    varies[measured] = np.ptp(log1p_cp10k(counts, library_size).toarray(), axis=0) > 0
    mean_counts = np.full(len(panel), np.nan)
    mean_counts[measured] = np.asarray(counts.mean(0)).ravel()
    rows = pd.DataFrame(
        {
            "section": str(section.obs["section"].iloc[0]),
            "patient": str(section.obs["patient"].iloc[0]),
            "gene": panel,
            "mean_counts": mean_counts,
            "n_spots": section.n_obs,
        }
    )
    tables = []
    for method, predicted in scores.items():
        constant = np.ptp(predicted, axis=0) == 0
        scc = np.full(len(panel), np.nan)
        scc[measured] = spearman(
            predicted[:, measured],
            counts,
            section=np.zeros(section.n_obs),
            library_size=library_size,
        )[0]
        note = np.select(
            [~measured, ~varies, constant],
            ["not measured", "constant counts", "constant scores"],
            "",
        )
        scc = np.where(varies & constant, 0.0, scc)
        tables.append(rows.assign(scc=scc, note=note).assign(method=method))
    return pd.concat(tables, ignore_index=True)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean SCC over genes for each section and method, and over sections.

    Parameters
    ----------
    table
        Rows of `score_section`, of one or more sections.

    Returns
    -------
    pandas.DataFrame
        One row a method and section, then one a method over all of them (``section`` =
        ``"mean"``, each section weighing the same): ``scc``, ``genes`` (how many it is the mean
        of), ``constant_counts`` and ``not_measured`` (left out), ``constant_scores`` (counted
        as 0).

    Examples
    --------
    >>> table = pd.DataFrame({"method": "list", "section": "C2", "gene": ["A", "B"],
    ...                       "scc": [0.4, np.nan], "note": ["", "constant counts"]})
    >>> summarise(table)[["section", "scc", "genes", "constant_counts"]].values.tolist()
    [['C2', 0.4, 1, 1], ['mean', 0.4, 1, 1]]
    """
    groups = table.groupby(["method", "section"], sort=False)
    by_section = groups.agg(
        scc=("scc", "mean"),
        genes=("scc", "count"),
        constant_counts=("note", lambda note: int((note == "constant counts").sum())),
        not_measured=("note", lambda note: int((note == "not measured").sum())),
        constant_scores=("note", lambda note: int((note == "constant scores").sum())),
    ).reset_index()
    overall = by_section.groupby("method", sort=False).agg(
        {"scc": "mean"} | dict.fromkeys(by_section.columns[3:], "sum")
    )
    overall = overall.reset_index().assign(section="mean")
    return pd.concat([by_section, overall[by_section.columns]], ignore_index=True)
