"""What the two benchmarks of a task found, beside what the paper says: a row a task and method."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from strank.files import markdown_table, read_written, write_table, write_utf8
from strank.fitting.method import Method
from strank.studies.benchmark.grid import Grid
from strank.studies.benchmark.tables import summarise_benchmark

# Of the leak-free benchmark, each with its interval.
LEAK_FREE = ("depth_matched", "lift", "deviance", "slope")
MEAN = "mean"
IMPOSSIBLE = "not possible: one patient"


@dataclass(frozen=True)
class Reproduction:
    """What was found of an experiment of the paper."""

    #: A row a task (or number of genes, or N_k) and method, with the paper's number beside ours.
    table: pd.DataFrame
    #: As in ``reproduction.json``.
    facts: dict[str, Any]
    #: Where to read it all, if there is a page.
    page: Path | None = None


def as_published(paper: Mapping[str, float], recipe: str) -> dict[str, float]:
    """SCC that the paper prints for each loss, by the method that is to come to it."""
    return {Method("linear", loss, recipe).name: scc for loss, scc in paper.items()}


def read_published(folder: Path) -> pd.DataFrame:
    """SCC of every method on the paper's split: mean over seeds, and their standard deviation."""
    scc = pd.read_parquet(folder / "results", columns=["method", "seed", "scc"])
    by_seed = scc.astype({"method": "str"}).groupby(["method", "seed"])["scc"].mean()
    return by_seed.groupby("method").agg(scc="mean", scc_sd="std", seeds="size").reset_index()


def read_leak_free(folder: Path) -> pd.DataFrame:
    """Scores of every method without the leaks of the published split, with intervals."""
    summary = read_written(folder / "summary.csv")
    if len(set(summary["patient_seen"])) > 1:
        # Sections were held out; what of their patients was seen, the warnings say.
        summary = summarise_benchmark(folder, apart=False)
    columns: dict[str, pd.Series] = {}
    for score in LEAK_FREE:
        rows = summary[summary["score"] == score].set_index("method")
        columns |= {score: rows["mean"], f"{score}_low": rows["low"], f"{score}_high": rows["high"]}
    return pd.DataFrame(columns).rename_axis("method").reset_index()


def task_table(
    name: str,
    scc: Mapping[str, float],
    published: pd.DataFrame,
    leak_free: pd.DataFrame | None,
    grid: Grid,
) -> pd.DataFrame:
    """Put both beside the paper's number, the paper's methods first."""
    paper = pd.Series(as_published(scc, str(grid.recipes[0])), name="paper", dtype=float)
    table = published.set_index("method")
    if leak_free is None:
        table["leak_free"] = IMPOSSIBLE
    else:
        table = table.join(leak_free.set_index("method"), how="outer")
    order = list(dict.fromkeys((*paper.index, *(m.name for m in grid.methods), *table.index)))
    table = table.join(paper, how="outer").loc[[name for name in order if name in table.index]]
    table = table.rename_axis("method").reset_index().assign(task=name)
    scores = [f"{score}{end}" for score in LEAK_FREE for end in ("", "_low", "_high")]
    columns = ["task", "method", "paper", "scc", "scc_sd", "seeds", *scores, "leak_free"]
    return table.reindex(columns=columns)


def with_mean(table: pd.DataFrame) -> pd.DataFrame:
    """Add the mean over tasks, the paper's last column, of what all of them have."""
    numbers = ["paper", "scc", *LEAK_FREE]
    methods = table.groupby("method", sort=False)
    mean = methods[numbers].mean().where(methods[numbers].count() == table["task"].nunique())
    rows = mean.assign(seeds=methods["seeds"].first(), task=MEAN).reset_index()
    rows = rows.reindex(columns=table.columns)
    return pd.DataFrame([*table.to_dict("records"), *rows.to_dict("records")])


def write_beside_paper(folder: Path, table: pd.DataFrame, remark: str) -> None:
    """Write ``table.csv`` and, for people, ``table.md``."""
    shown = shown_table(table)
    shown = shown.map(lambda text: html.escape(text, quote=False).replace("|", r"\|"))
    text = f"{remark}\n\n" * bool(remark)
    text += markdown_table(shown.columns, shown.to_numpy()) + "\n"
    write_table(folder / "table.csv", table, float_format="%.6g")
    write_utf8(folder / "table.md", text)


def shown_table(table: pd.DataFrame) -> pd.DataFrame:
    """Make text of all numbers, as they stand in a paper."""
    rows = []
    for row in table.to_dict("records"):
        first = table.columns[0]
        shown = {first: row[first], "method": row["method"], "paper": number(row["paper"])}
        shown["SCC, as published"] = spread(row)
        for score in LEAK_FREE:
            shown[f"leak-free {score.replace('_', '-')}"] = interval(row, score)
        rows.append(shown)
    return pd.DataFrame(rows)


def number(value: float) -> str:
    """Three digits, or nothing."""
    return f"{value:.3f}" if value == value else ""


def spread(row: Mapping) -> str:
    """Mean over seeds, and their standard deviation where there are several."""
    sd = row["scc_sd"]
    return number(row["scc"]) + (f" ± {sd:.3f}" if sd == sd else "")


def interval(row: Mapping, score: str) -> str:
    """Write a leak-free score with its interval, or why there is none."""
    if isinstance(row["leak_free"], str):
        return row["leak_free"]
    low, high = row[f"{score}_low"], row[f"{score}_high"]
    return number(row[score]) + (f" [{low:.3f}, {high:.3f}]" if low == low else "")
