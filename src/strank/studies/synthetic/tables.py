"""Tables of the study: mean SCC with its spread over seeds, beside the paper's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from strank.simulate.curves import CurveDesign
from strank.studies.synthetic.objectives import LIST_SIZES, PAPER


@dataclass(frozen=True)
class Scores:
    """SCC of every fit of the study, one a row."""

    table: pd.DataFrame

    def of(
        self,
        objective: str,
        sampling: str,
        *,
        study: str = "table1",
        head: str = "mlp",
        selection: str = "counts",
    ) -> pd.Series:
        """SCC by function and seed."""
        table = self.table
        rows = table[
            (table["study"] == study)
            & (table["objective"] == objective)
            & (table["sampling"] == sampling)
            & (table["head"] == head)
            & (table["selection"] == (selection if head == "mlp" else "none"))
        ]
        return rows.set_index(["function", "seed"])["scc"].sort_index()


def _summary(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean over functions, then mean and standard deviation over seeds."""
    per_seed = table.groupby([*by, "seed"], sort=False, dropna=False)["scc"].mean()
    groups = per_seed.groupby(by, sort=False, dropna=False)
    return groups.agg(scc="mean", sd="std", seeds="size").reset_index()


def table1(scores: Scores) -> pd.DataFrame:
    """Every objective in both samplings, beside the paper's table 1."""
    rows = scores.table[scores.table["study"] == "table1"]
    table = _summary(rows, ["sampling", "objective", "head", "selection"])
    return table.assign(paper=_paper(table).where(table["head"] == "mlp"))


def table3(scores: Scores) -> pd.DataFrame:
    """List sizes N_k, beside the paper's table 3; lists of 128 and more are whole sections."""
    rows = scores.table[scores.table["study"] == "table3"]
    whole = scores.table.query("study == 'table1' and objective == 'list' and head == 'mlp'")
    largest = max(LIST_SIZES)
    rows = pd.concat([rows, *(whole.assign(objective=f"list_{size * largest}") for size in (2, 4))])
    table = _summary(rows, ["sampling", "objective", "selection"])
    table["paper"] = _paper(table)
    sizes = table.pop("objective").str.removeprefix("list_").astype(int)
    table.insert(1, "n_k", sizes)
    return table.sort_values(["sampling", "selection", "n_k"], ascending=[False, True, True])


def sweep_table(scores: Scores) -> pd.DataFrame:
    """Tabulate what changes with scale, bias, dispersion, sample size, sparsity and depth."""
    rows = scores.table[(scores.table["study"] == "sweep") & (scores.table["selection"] != "truth")]
    base = rows[rows["factor"] == "base"]
    parts = []
    for factor in rows["factor"].unique():
        if factor != "base":
            parts.append(rows[rows["factor"] == factor])
            default = getattr(CurveDesign(), factor)
            if default is not None:
                parts.append(base.assign(factor=factor, value=float(default)))
    table = _summary(
        pd.concat(parts), ["factor", "value", "corrected", "sampling", "objective", "head"]
    )
    return table.sort_values(["factor", "value"], kind="stable")


def _paper(table: pd.DataFrame) -> pd.Series:
    found = [
        PAPER[sampling].get(objective, np.nan)
        for sampling, objective in zip(table["sampling"], table["objective"], strict=True)
    ]
    return pd.Series(found, index=table.index)
