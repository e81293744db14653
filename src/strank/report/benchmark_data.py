"""The tables of a benchmark, cut down to what one page can hold."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from strank.errors import InputError, some
from strank.evaluation.significance import combine_table, false_discovery_rate
from strank.files import read_json

__all__ = ["Benchmark", "encoded", "gene_tables", "leaderboard", "open_benchmark"]

# Bytes of the values by gene on a page, and how many genes one table may have.
_BUDGET = 4_000_000
_LEAST_GENES, _MOST_GENES = 50, 2_000
_FACTS = ("protocol", "sections", "encoders", "genes", "reference")
_PATIENTS = {"true": "known", "false": "new"}
_BOARD = (
    *("encoder", "genes", "patients", "method", "score", "n_sections", "n_genes"),
    *("mean", "low", "high", "difference", "difference_low", "difference_high"),
    "fraction_of_ceiling",
)


@dataclass(frozen=True)
class Benchmark:
    """A folder that ``strank benchmark`` wrote.

    Attributes
    ----------
    folder
        Where it is.
    facts
        Content of ``benchmark.json``.
    summary
        ``summary.csv``, with ``patients`` (``"known"``, ``"new"`` or ``"all"``) in place of
        ``patient_seen``.
    """

    folder: Path
    facts: dict[str, Any]
    summary: pd.DataFrame


def open_benchmark(folder: Path) -> Benchmark:
    """Open a folder of ``strank benchmark``.

    Raises
    ------
    InputError
        If it is none, or not whole.
    """
    if not (folder / "benchmark.json").is_file():
        raise InputError(f"{folder}: no benchmark.json there; make it with `strank benchmark`")
    facts = read_json(folder / "benchmark.json")
    missing = [key for key in _FACTS if key not in facts]
    if missing:
        raise InputError(f"{folder}/benchmark.json lacks {some(missing)}; run the benchmark again")
    path = folder / "summary.csv"
    if not path.is_file():
        raise InputError(f"{path}: no such file; let `strank benchmark` come to its end first")
    try:
        summary = pd.read_csv(path, dtype={"genes": str}, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error
    seen = summary.get("patient_seen", pd.Series("all", index=summary.index))
    summary["patients"] = seen.astype(str).str.lower().map(_PATIENTS).fillna("all")
    missing = [column for column in _BOARD if column not in summary]
    if missing:
        raise InputError(f"{path} lacks columns {some(missing)}; run the benchmark again")
    return Benchmark(folder, facts, summary)


def leaderboard(benchmark: Benchmark) -> dict[str, list[Any]]:
    """Columns of the summary as JSON takes them."""
    text, numbers = _BOARD[:5], _BOARD[5:]
    table = benchmark.summary
    return {name: table[name].astype(str).tolist() for name in text} | {
        name: [float(f"{v:.5g}") if np.isfinite(v) else None for v in table[name].astype(float)]
        for name in numbers
    }


def encoded(values: NDArray) -> str:
    """Numbers as base64 of their little-endian bytes.

    Examples
    --------
    >>> encoded(np.array([1.0, 2.0], dtype=np.float32))
    'AACAPwAAAEA='
    """
    return b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def gene_tables(benchmark: Benchmark) -> Iterator[dict[str, Any]]:
    """Means over sections and seeds of every score, by gene: one table a panel and encoder.

    Of a panel with too many genes some are taken, evenly over their mean counts.

    Yields
    ------
    dict
        ``encoder``, ``genes``, ``patients``, ``names``, ``n_genes`` (before some were taken),
        ``n_sections``, ``methods``, ``scores``, and as base64 of float32 ``values``
        ``[n_methods, n_scores, n_genes]``, ``mean_counts``, and ``ceilings`` by score.
    """
    summary = benchmark.summary
    groups = summary.groupby(["encoder", "genes"], sort=False)
    cells = summary["method"].nunique() * (summary["score"].nunique() + 2)
    n_tables = max(len(summary[["encoder", "genes", "patients"]].drop_duplicates()), 1)
    most = int(np.clip(_BUDGET / (4 * cells * n_tables), _LEAST_GENES, _MOST_GENES))
    for (encoder, genes), rows in groups:
        yield from _of_panel(benchmark.folder, encoder, genes, rows["patients"].unique(), most)


def _of_panel(
    folder: Path, encoder: str, genes: str, patients: Iterable[str], most: int
) -> Iterator[dict[str, Any]]:
    where = [("encoder", "==", encoder), ("genes", "==", genes)]
    ceilings = ["ceiling_scc", "ceiling_pearson", "ceiling_depth_matched"]
    facts = _read(
        folder / "genes.parquet", ["fold", "section", "gene", "mean_counts", *ceilings], where
    ).astype({"fold": str, "section": str, "gene": str})
    by_counts = facts.groupby("gene")["mean_counts"].mean().sort_values(ascending=False).index
    names = by_counts[np.unique(np.linspace(0, len(by_counts) - 1, most).round().astype(int))]
    results = _read(
        folder / "results.parquet",
        ["method", "seed", "fold", "section", "patient_seen", "gene", "score", "value"],
        [*where, ("gene", "in", list(names))],
    ).astype(dict.fromkeys(("method", "fold", "section", "gene", "score"), str))
    for kind in patients:
        rows = results if kind == "all" else results[results["patient_seen"] == (kind == "known")]
        if rows.empty:
            continue
        tested = rows[["fold", "section"]].drop_duplicates()
        about = facts.merge(tested).groupby("gene")[["mean_counts", *ceilings]].mean()
        shown = names[names.isin(about.index)]
        n_genes, about = len(about), about.reindex(shown).astype(np.float32)
        yield {
            **{"encoder": encoder, "genes": genes, "patients": kind},
            **{"names": shown.tolist(), "n_genes": n_genes},
            "n_sections": int(tested["section"].nunique()),
            **_by_gene(rows, shown),
            "mean_counts": encoded(about["mean_counts"].to_numpy()),
            "ceilings": {
                c.removeprefix("ceiling_"): encoded(about[c].to_numpy()) for c in ceilings
            },
        }


def _by_gene(rows: pd.DataFrame, names: pd.Index) -> dict[str, Any]:
    methods, scores = (rows[column].unique().tolist() for column in ("method", "score"))
    means = rows.groupby(["method", "score", "gene"], sort=False)["value"].mean()
    cells = pd.MultiIndex.from_product([methods, scores, names])
    table = means.reindex(cells).to_numpy(np.float64).reshape(len(methods), len(scores), -1)
    if "p_value" in scores:
        p = combine_table(rows[rows["score"] == "p_value"]).reindex(methods, columns=names)
        q = np.stack([false_discovery_rate(row) for row in p.to_numpy()])
        table[:, scores.index("p_value")] = p
        table, scores = np.concatenate([table, q[:, None]], axis=1), [*scores, "q_value"]
    return {"methods": methods, "scores": scores, "values": encoded(table.astype(np.float32))}


def _read(path: Path, columns: list[str], where: list[tuple[str, str, Any]]) -> pd.DataFrame:
    try:
        return pq.read_table(path, columns=columns, filters=where).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: not a readable table of a benchmark ({error}); run the benchmark again"
        ) from error
