"""One page of Table 2: the paper's numbers, ours, and what is better; it holds all it needs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from strank.files import write_utf8
from strank.studies.reproduce.tables import IMPOSSIBLE, LEAK_FREE, MEAN, interval, number, spread

_OURS, _PAPER = "#D55E00", "#1f2933"
_TITLES = {
    "depth_matched": "Depth-matched SCC",
    "lift": "Lift",
    "deviance": "Deviance explained",
    "slope": "Calibration slope",
}
_MEANINGS = {
    "depth_matched": "Spearman correlation after every spot is thinned to one depth: 0 for a "
    "method that knows only depth.",
    "lift": "Area between the diagonal and the ordered Lorenz curve, with library size as "
    "exposure; neutral to depth, too.",
    "deviance": "Share of the Poisson deviance that the predicted log rates explain; below 0 is "
    "worse than no prediction.",
    "slope": "Slope of the counts on the predicted log rates: 1 is right, below 1 is "
    "overconfident.",
}


def write_hest_page(folder: Path, table: pd.DataFrame, facts: Mapping[str, Any]) -> Path:
    """Write ``index.html``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("strank.studies.reproduce"), autoescape=True
    )
    of_tasks = table[table["task"] != MEAN]
    figure = _draw(of_tasks)
    html = environment.get_template("hest.html").render(
        facts=facts,
        tasks=list(dict.fromkeys(table["task"])),
        published=_cells(table, spread, "scc"),
        paper=_cells(table, lambda row: number(row["paper"]), "paper"),
        leak_free={
            score: _cells(table, partial(interval, score=score), score) for score in LEAK_FREE
        },
        titles=_TITLES,
        meanings=_MEANINGS,
        impossible=IMPOSSIBLE,
        agreement=_agreement(of_tasks),
        figure=_png(figure),
        # At 96 pixels an inch letters are as large as the text's.
        figure_width=round(96 * figure.get_figwidth()),
    )
    write_utf8(folder / "index.html", html)
    return folder / "index.html"


def _cells(
    table: pd.DataFrame, shown: Callable[[Mapping], str], value: str
) -> dict[str, dict[str, tuple[str, bool]]]:
    """Make text of a value, by method, then task; and tell whether it is the best of the task."""
    best = table.groupby("task")[value].transform("max") == table[value]
    if value == "slope":
        best = (
            (table["slope"] - 1)
            .abs()
            .groupby(table["task"])
            .transform("min")
            .eq((table["slope"] - 1).abs())
        )
    cells: dict[str, dict[str, tuple[str, bool]]] = {}
    for row, top in zip(table.to_dict("records"), best, strict=True):
        cells.setdefault(row["method"], {})[row["task"]] = shown(row), bool(top)
    return cells


def _agreement(table: pd.DataFrame) -> str:
    """Say how far our numbers by the published recipe are from the paper's."""
    both = table.dropna(subset=["paper", "scc"])
    if both.empty:
        return "None of the paper's methods could be fitted."
    off = (both["scc"] - both["paper"]).abs()
    worst = both.loc[off.idxmax()]
    return (
        f"Of {len(both)} numbers of the paper, ours are {off.median():.3f} off in the median and "
        f"{off.max():.3f} at most ({worst['method']} on {worst['task']})."
    )


def _draw(table: pd.DataFrame) -> Figure:
    """Draw a panel a task: the paper's SCC, ours with its spread, and our own methods."""
    shown = table[table["scc"].notna() & ~table["method"].isin(["shuffled", "library size"])]
    tasks, methods = list(dict.fromkeys(shown["task"])), list(dict.fromkeys(shown["method"]))
    # Without pyplot no global state is touched.
    width = 1.5 * len(tasks) + 0.08 * max(map(len, methods)) + 0.4
    size = max(width, 5), 0.26 * len(methods) + 1.1
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    place = dict(zip(methods, np.arange(len(methods))[::-1], strict=True))
    axes = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for ax, task in zip(axes, tasks, strict=True):
        rows = shown[shown["task"] == task]
        at = rows["method"].map(place)
        for y in place.values():
            ax.axhline(y, color="0.93", zorder=0)
        sd = rows["scc_sd"].fillna(0)
        ax.errorbar(rows["scc"], at, xerr=sd, fmt="o", color=_OURS, ms=5, label="ours")
        ax.plot(rows["paper"], at, "x", color=_PAPER, ms=6, mew=1.6, label="paper")
        ax.set_title(task, fontsize=10)
        ax.set_yticks(list(place.values()), list(place))
        ax.tick_params(length=0, labelsize=9)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.set_xlabel("SCC")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def _png(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    return base64.b64encode(buffer.getvalue()).decode()
