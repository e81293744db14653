"""From the scores of all cells to tables for people: means with intervals, and differences."""

from __future__ import annotations

import html
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from strank.evaluation.scores import SCORES, disagreements
from strank.files import markdown_table, write_table, write_utf8
from strank.fitting.method import REFERENCE
from strank.metrics.significance import combine_table, false_discovery_rate, mean_intervals
from strank.storage import new_file

_MEANS = tuple(name for name in SCORES if name != "p_value")
_WITH_CEILING = ("scc", "pearson", "depth_matched")
# Below it, what a perfect model could reach is mostly noise itself.
_LEAST_CEILING = 0.05
_GROUP = ["encoder", "genes", "patient_seen"]
_SHOWN = ("depth_matched", "lift", "deviance", "slope", "scc", "pearson", "pearson_counts")
_FALSE_DISCOVERIES = 0.05
# Scores that fit into 80 columns.
_FIRST = 5
NO_PARQUET = (
    "results.parquet and genes.parquet, of which `strank report` makes its page, are not written: "
    "pip install 'strank[plots]' (pyarrow is absent), and run again"
)
# What LaTeX obeys, or its usual fonts do not have.
_IN_LATEX = {ord(c): f"\\{c}" for c in "&%$#_{}"}
_IN_LATEX |= str.maketrans({"\\": r"\textbackslash ", "^": r"\textasciicircum "})
_IN_LATEX |= str.maketrans({"|": r"\textbar{}", "<": r"\textless{}", ">": r"\textgreater{}"})
_IN_LATEX |= str.maketrans({"~": r"\textasciitilde "})


def summarise_benchmark(results: pd.DataFrame, genes: pd.DataFrame) -> pd.DataFrame:
    """Mean of every score with its interval, and the paired difference to the reference method."""
    parts = [_summarise_group(rows, genes, keys) for keys, rows in _groups(results)]
    return pd.concat(parts, ignore_index=True)


def _groups(results: pd.DataFrame) -> Iterator[tuple[tuple, pd.DataFrame]]:
    yield from results.groupby(_GROUP, sort=False, observed=True)


def _summarise_group(rows: pd.DataFrame, genes: pd.DataFrame, keys: tuple) -> pd.DataFrame:
    means = rows[rows["score"].isin(_MEANS)].pivot_table(
        "value", ["method", "score"], ["section", "gene"], observed=True, dropna=False
    )
    cube, sections = _cube(means)
    methods = means.index.get_level_values("method")
    patients = rows.drop_duplicates("section").set_index("section")["patient"].astype(str)
    patient = patients[sections.unique("section")].to_numpy()
    own = mean_intervals(cube, patient=patient)
    reference = [(REFERENCE.name, score) for score in means.index.get_level_values("score")]
    at = means.index.get_indexer(reference)
    against = mean_intervals(
        np.where((at >= 0)[:, None, None], cube - cube[at], np.nan), patient=patient
    )
    table = pd.DataFrame(dict(zip(_GROUP, keys, strict=True)), index=means.index)
    table = table.assign(**own._asdict())
    for name, values in against._asdict().items():
        column = "difference" if name == "mean" else f"difference_{name}"
        table[column] = np.where(methods == REFERENCE.name, np.nan, values)
    table["fraction_of_ceiling"] = _fractions(means, cube, genes, keys, sections)
    known = np.isfinite(cube)
    table["n_sections"], table["n_genes"] = known.any(2).sum(1), known.any(1).sum(1)
    table = pd.concat([table.reset_index(), _predicted(rows, keys)], ignore_index=True)
    seeds = rows.groupby("method", observed=True)["seed"].nunique()
    return table.assign(seeds=table["method"].map(seeds).astype(int))


def _cube(means: pd.DataFrame) -> tuple[NDArray, pd.MultiIndex]:
    """``[n_tables, n_sections, n_genes]``, of a table with columns (section, gene)."""
    levels = [means.columns.unique(name).astype(str) for name in ("section", "gene")]
    columns = pd.MultiIndex.from_product(levels, names=["section", "gene"])
    wide = means.reindex(columns=columns)
    shape = len(wide), *map(len, levels)
    return wide.to_numpy(dtype=np.float64).reshape(shape), columns


def _fractions(
    means: pd.DataFrame, cube: NDArray, genes: pd.DataFrame, keys: tuple, columns: pd.MultiIndex
) -> NDArray[np.float64]:
    """Ratio of mean score to mean ceiling, over the genes that have one worth its name."""
    mine = genes[(genes["encoder"] == keys[0]) & (genes["genes"] == keys[1])]
    # Folds that are given may test a section twice.
    by_gene = mine.groupby(["section", "gene"], observed=True)
    found = np.full(len(cube), np.nan)
    for score in _WITH_CEILING:
        ceiling = by_gene[f"ceiling_{score}"].mean().reindex(columns)
        top = ceiling.to_numpy().reshape(cube.shape[1:])
        rows = means.index.get_level_values("score") == score
        both = np.isfinite(cube[rows]) & (top > _LEAST_CEILING)
        reached = np.where(both, cube[rows], 0).sum((1, 2))
        most = np.where(both, top, 0).sum((1, 2))
        found[rows] = np.divide(reached, most, out=np.full(len(most), np.nan), where=most > 0)
    return found


def _predicted(rows: pd.DataFrame, keys: tuple) -> pd.DataFrame:
    """Share of genes that each method predicts at all."""
    p_values = rows[rows["score"] == "p_value"]
    combined = combine_table(p_values)
    q = np.reshape([false_discovery_rate(p) for p in combined.to_numpy()], combined.shape)
    known = np.isfinite(q).sum(1)
    found = (q < _FALSE_DISCOVERIES).sum(1)
    share = np.divide(found, known, out=np.full(len(q), np.nan), where=known > 0)
    table = pd.DataFrame({"method": combined.index, "score": "predicted", "mean": share})
    table = table.assign(**dict(zip(_GROUP, keys, strict=True)))
    return table.assign(n_sections=p_values["section"].nunique(), n_genes=known)


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


def has_parquet() -> bool:
    """Whether Parquet can be written; who evaluates needs no more than the core."""
    return find_spec("pyarrow") is not None


def write_results(
    out: Path, results: pd.DataFrame, genes: pd.DataFrame, headline: str
) -> pd.DataFrame:
    """Write every score, and the tables for people; returns the summary."""
    order = ["method", "encoder", "genes", "seed", "fold", "section", "patient", "patient_seen"]
    order += ["gene", "score", "value"]
    results = results[order].sort_values(order[:-1], ignore_index=True)
    for name, table in {"results": results, "genes": genes}.items() if has_parquet() else ():
        with new_file(out / f"{name}.parquet") as file:
            table.to_parquet(file, index=False)
    # Without a time stamp the same results are the same bytes.
    packed = {"method": "gzip", "mtime": 0}
    write_table(out / "results.csv.gz", results, float_format="%.6g", compression=packed)
    summary = summarise_benchmark(results, genes)
    write_tables(out, summary, headline)
    return summary


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
