"""From the scores of all cells to tables for people: means with intervals, and differences."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from strank.evaluation.results import Group, cells_of, cubes, groups_of
from strank.evaluation.scores import SCORES, disagreements
from strank.files import markdown_table, read_facts, write_table, write_utf8
from strank.fitting.method import REFERENCE
from strank.metrics.significance import (
    as_wide_as_the_tissue,
    false_discovery_rate,
    mean_intervals,
)

# In the order of the summary.
_MEANS = sorted(name for name in SCORES if name != "p_value")
_WITH_CEILING = ("scc", "pearson", "depth_matched")
# Below it, what a perfect model could reach is mostly noise itself.
_LEAST_CEILING = 0.05
_GROUP = ["encoder", "genes", "patient_seen"]
_COLUMNS = ["method", "score", *_GROUP, "mean", "low", "high"]
_COLUMNS += ["difference", "difference_low", "difference_high", "fraction_of_ceiling"]
_COLUMNS += ["n_sections", "n_genes", "seeds"]
_SHOWN = ("depth_matched", "lift", "deviance", "slope", "scc", "pearson", "pearson_counts")
_FALSE_DISCOVERIES = 0.05
# Scores that fit into 80 columns.
_FIRST = 5
# What LaTeX obeys, or its usual fonts do not have.
_IN_LATEX = {ord(c): f"\\{c}" for c in "&%$#_{}"}
_IN_LATEX |= str.maketrans({"\\": r"\textbackslash ", "^": r"\textasciicircum "})
_IN_LATEX |= str.maketrans({"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"})
_IN_LATEX |= str.maketrans({"~": r"\textasciitilde "})


def summarise_benchmark(out: Path, *, apart: bool = True) -> pd.DataFrame:
    """Mean of every score with its interval, and the paired difference to the reference method.

    A function of the benchmark's folder, with one method in memory at a time: about 500 bytes for
    each section times gene (and seed). Known and new patients are groups apart, or one.
    """
    groups = groups_of(out, read_facts(out / "benchmark.json"), apart=apart)
    return pd.concat([_summarise_group(group) for group in groups], ignore_index=True)


def _summarise_group(group: Group) -> pd.DataFrame:
    ceilings = [f"ceiling_{name}" for name in _WITH_CEILING]
    facts = group.facts(["section", "patient", "gene", *ceilings])
    cells = cells_of(facts)
    patients = facts.drop_duplicates("section").set_index("section")["patient"].astype(str)
    patient = patients[cells.levels[0]].to_numpy()
    # Folds that are given may test a section twice.
    tops = cubes(facts, ceilings, cells)
    del facts
    rows, reference = [], dict[str, NDArray]()
    # The reference first: all are compared with it.
    for method in sorted(group.methods, key=lambda name: name != REFERENCE.name):
        found = group.scores(method, ["seed", "section", "gene", *_MEANS])
        seeds, scores = found["seed"].nunique(), cubes(found, _MEANS, cells)
        del found
        for score, values in scores.items():
            ceiling = tops.get(f"ceiling_{score}")
            row = _summarise_score(values, reference.get(score), ceiling, patient)
            rows.append({"method": method, "score": score, "seeds": seeds, **row})
        if method == REFERENCE.name:
            reference = scores
    table = pd.DataFrame(rows).sort_values(["method", "score"])
    predicted = _predicted(group, cells)
    predicted["seeds"] = predicted["method"].map(table.groupby("method")["seeds"].first())
    table = pd.concat([table, predicted], ignore_index=True)
    seen = bool(group.patient_seen)
    table = table.assign(encoder=group.encoder, genes=group.genes, patient_seen=seen)
    return table.reindex(columns=_COLUMNS)


def _summarise_score(
    values: NDArray, reference: NDArray | None, ceiling: NDArray | None, patient: NDArray
) -> dict[str, Any]:
    """Summarise a score of a method, ``[n_sections, n_genes]``, and compare it."""
    own = mean_intervals(values[None], patient=patient)
    found: dict[str, Any] = dict(zip(("mean", "low", "high"), np.concatenate(own), strict=True))
    if reference is not None:
        against = mean_intervals((values - reference)[None], patient=patient)
        names = ("difference", "difference_low", "difference_high")
        found |= zip(names, np.concatenate(against), strict=True)
    found["fraction_of_ceiling"] = np.nan if ceiling is None else _fraction(values, ceiling)
    known = np.isfinite(values)
    return found | {"n_sections": known.any(1).sum(), "n_genes": known.any(0).sum()}


def _fraction(values: NDArray, ceiling: NDArray) -> float:
    """Ratio of mean score to mean ceiling, over the genes that have one worth its name."""
    both = np.isfinite(values) & (ceiling > _LEAST_CEILING)
    most = np.where(both, ceiling, 0).sum()
    return float(np.where(both, values, 0).sum() / most) if most > 0 else np.nan


def _predicted(group: Group, cells: pd.MultiIndex) -> pd.DataFrame:
    """Share of genes that each method predicts at all."""
    rows = []
    for method, p in group.combined_p_values(cells):
        q = false_discovery_rate(p)
        known = int(np.isfinite(q).sum())
        share = (q < _FALSE_DISCOVERIES).sum() / known if known else np.nan
        rows.append({"method": method, "score": "predicted", "mean": share, "n_genes": known})
    return pd.DataFrame(rows).assign(n_sections=len(cells.levels[0]))


def _groups(summary: pd.DataFrame) -> Iterator[tuple[tuple, pd.DataFrame]]:
    yield from summary.groupby(_GROUP, sort=False, observed=True)


def disagreements_of(summary: pd.DataFrame) -> list[str]:
    """Say where order and size of a method's scores are judged differently, group by group."""
    told = []
    for (encoder, genes, seen), rows in _groups(summary):
        means = rows.pivot_table("mean", "method", "score", sort=False, observed=True)
        table = means.reset_index().assign(section="mean")
        patients = "known" if seen else "new"
        told += [
            f"{encoder}, {genes} genes, {patients} patients: {t}" for t in disagreements(table)
        ]
    return told


def write_summary(out: Path, headline: str) -> tuple[pd.DataFrame, list[str]]:
    """Summarise the partitions of a benchmark's folder: the tables for people, and what to note."""
    summary = summarise_benchmark(out)
    write_tables(out, summary, headline)
    groups = groups_of(out, read_facts(out / "benchmark.json"), apart=False)
    spots = [group.facts(["independent_spots"])["independent_spots"] for group in groups]
    told = as_wide_as_the_tissue(pd.concat(spots).to_numpy())
    return summary, [*[told] * bool(told), *disagreements_of(summary)]


def write_tables(folder: Path, summary: pd.DataFrame, headline: str) -> None:
    """Write ``summary.csv``, and for a paper ``summary.md`` and ``summary.tex``."""
    shown = paper_table(summary, headline)
    texts = {
        "summary.md": markdown_table(shown.columns, shown.map(_markdown).to_numpy()) + "\n",
        "summary.tex": latex_table(shown),
    }
    write_table(folder / "summary.csv", summary, float_format="%.6g")
    for name, text in texts.items():
        write_utf8(folder / name, text)


def short_tables(summary: pd.DataFrame, headline: str) -> dict[str, pd.DataFrame]:
    """Give the mean of every score, a row a method and a table a group, best first."""
    scores = [headline, *(name for name in _SHOWN if name != headline)][:_FIRST]
    tables = {}
    for (encoder, genes, seen), rows in _groups(summary):
        means = rows.pivot_table("mean", "method", "score", sort=False, observed=True)
        table = means.reindex(columns=scores).sort_values(headline, ascending=False)
        caption = f"{encoder}, {genes} genes, {'known' if seen else 'new'} patients"
        tables[caption] = table.rename_axis(columns=None)
    return tables


def paper_table(summary: pd.DataFrame, headline: str) -> pd.DataFrame:
    """One row a method: means with intervals, sorted by a score; text."""
    scores = [headline, *(name for name in _SHOWN if name != headline)]
    order = summary[summary["score"] == headline].sort_values("mean", ascending=False)
    rows = []
    for key in order[[*_GROUP, "method"]].itertuples(index=False, name=None):
        mine = summary[(summary[[*_GROUP, "method"]] == key).all(axis=1)].set_index("score")
        encoder, genes, seen, method = key
        row = {"encoder": encoder, "genes": genes, "patient": "seen" if seen else "new"}
        row |= {"method": method} | {name: _cell(mine.loc[name]) for name in scores}
        row[f"{headline}, against {REFERENCE.name}"] = _cell(mine.loc[headline], "difference")
        row["of ceiling"] = _number(mine.loc[headline, "fraction_of_ceiling"], "{:.0%}")
        row["genes predicted"] = _number(mine.loc["predicted", "mean"], "{:.0%}")
        rows.append(row)
    table = pd.DataFrame(rows)
    sizes = pd.to_numeric(table["genes"], errors="coerce").fillna(np.inf)
    order = table.assign(size=sizes).sort_values(["encoder", "size", "patient"], kind="stable")
    return order.drop(columns="size")


def latex_table(table: pd.DataFrame) -> str:
    """Write text as a LaTeX table; pandas' own would import what draws."""
    head, *rows = (
        " & ".join(text.translate(_IN_LATEX) for text in row) + r" \\"
        for row in (table.columns, *table.to_numpy())
    )
    begin = rf"\begin{{tabular}}{{{'l' * table.shape[1]}}}"
    lines = [begin, r"\toprule", head, r"\midrule", *rows, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    return html.escape(text, quote=False).replace("|", r"\|")


def _cell(row: pd.Series, value: str = "mean") -> str:
    low, high = ("low", "high") if value == "mean" else (f"{value}_low", f"{value}_high")
    number = _number(row[value], "{:+.3f}" if value != "mean" else "{:.3f}")
    ends = f" [{_number(row[low])}, {_number(row[high])}]" if np.isfinite(row[low]) else ""
    return number + ends


def _number(value: float, form: str = "{:.3f}") -> str:
    return form.format(value) if np.isfinite(value) else ""
