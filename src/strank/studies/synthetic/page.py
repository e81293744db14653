"""Figures and page of the synthetic study."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from strank.files import write_utf8
from strank.fitting.objectives import OBJECTIVES
from strank.simulate.curves import FUNCTIONS, curve
from strank.storage import new_file

# Okabe and Ito's colours, which keep apart in all common colour deficiencies.
_COLOURS = {
    "mse": "#56B4E9",
    "poisson": "#0072B2",
    "nb": "#00476B",
    "rank-published": "#F0C94A",
    "rank": "#E69F00",
    "pcc": "#CC79A7",
    "section-pcc": "#7A3E65",
    "pair": "#009E73",
    "list": "#D55E00",
}

_SHOWN = ("mse", "pcc", "pair", "list")

_SWEEPS_CAPTION = (
    "What changes away from the paper's setting. Circles: networks; squares: exact optimum on a "
    "spline; crosses: the objective is not told the depth."
)

_FACTORS = {
    "centre": "centre of the second tissue's window",
    "scale": "scale α of the second tissue",
    "bias": "bias β of the second tissue",
    "size": "inverse dispersion r",
    "n_spots": "spots a tissue",
    "kept": "share of counts kept",
    "depth_spread": "spread of log depth",
}


def write_page(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    curves: Mapping[str, pd.DataFrame],
    about: dict[str, Any],
) -> None:
    """Write the figures and ``index.html``."""
    figures = {
        "table1": (_draw_table(tables["table1"]), "Every objective beside the paper's number."),
        "curves": (_draw_curves(curves), "Fitted curves (one seed) against the truth."),
        "table3": (_draw_list_sizes(tables["table3"]), "ListSTRank on random lists."),
        "sweeps": (_draw_sweeps(tables["sweeps"]), _SWEEPS_CAPTION),
    }
    for name, (figure, _) in figures.items():
        with new_file(folder / f"{name}.png") as file:
            figure.savefig(file, dpi=110)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("strank.studies.synthetic"), autoescape=True
    )
    table = _beside(tables["table1"])
    html = environment.get_template("synthetic.html").render(
        about={name: about[name] for name in ("version", "seed", "seeds", "quick")},
        figures={name: caption for name, (_, caption) in figures.items()},
        table1=table.to_html(na_rep="–", border=0, float_format="{:.3f}".format),
    )
    write_utf8(folder / "index.html", html)


def _beside(table: pd.DataFrame) -> pd.DataFrame:
    """Put the paper, our networks and the exact fits side by side."""
    columns: dict[tuple[str, str], pd.Series] = {}
    for sampling, rows in table.groupby("sampling", sort=False):
        network = rows[(rows["head"] == "mlp") & (rows["selection"] == "counts")]
        by_truth = rows[rows["selection"] == "truth"].set_index("objective")["scc"]
        exact = rows[rows["head"] == "spline"].set_index("objective")["scc"]
        network = network.set_index("objective")
        columns |= {
            (sampling, "paper"): network["paper"],
            (sampling, "network"): network["scc"],
            (sampling, "± sd"): network["sd"],
            (sampling, "chosen by truth"): by_truth,
            (sampling, "exact spline"): exact,
        }
    return pd.DataFrame(columns).loc[[name for name in _COLOURS if name in network.index]]


def _figure(width: float, height: float) -> Figure:
    # Without pyplot no global state is touched.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_table(table: pd.DataFrame) -> Figure:
    """Draw table 1: our mean and standard deviation beside the paper's number."""
    figure = _figure(10, 4)
    samplings = list(table["sampling"].unique())
    for ax, sampling in zip(
        figure.subplots(1, len(samplings), sharey=True), samplings, strict=True
    ):
        rows = table[table["sampling"] == sampling]
        network = rows[rows["selection"] == "counts"].set_index("objective").loc[list(_COLOURS)]
        exact = rows[rows["head"] == "spline"].set_index("objective")["scc"]
        place = np.arange(len(network))[::-1]
        ax.errorbar(
            network["scc"], place, xerr=network["sd"], fmt="o", color="#D55E00", label="network"
        )
        ax.plot(network["paper"], place, "x", color="black", label="paper")
        ax.plot(
            exact,
            [place[list(_COLOURS).index(name)] for name in exact.index],
            "s",
            mfc="none",
            color="#0072B2",
            label="exact spline",
        )
        ax.set_yticks(place, network.index)
        ax.set(title=sampling, xlabel="SCC against the truth", xlim=(None, 1.02))
        ax.grid(axis="x", alpha=0.3)
    ax.legend(loc="lower left")
    return figure


def _draw_curves(curves: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw fitted curves over the truth, a row a sampling, a column a function."""
    figure = _figure(15, 3.4 * len(curves))
    axes = figure.subplots(len(curves), len(FUNCTIONS), sharex=True, sharey=True)
    for row, (sampling, table) in zip(axes, curves.items(), strict=True):
        for function, ax in enumerate(row):
            of_function = table[table["function"] == function]
            x = np.sort(of_function["x"].unique())
            ax.fill_between(x, curve(function, x), color="0.88", label="truth")
            for name in _SHOWN:
                _draw_fit(ax, of_function, name, "mlp")
            _draw_fit(ax, of_function, "list", "spline")
            ax.set_title(f"{sampling}, function {function + 1}")
            ax.set(ylim=(-0.1, 1.2), xlabel="x")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(_SHOWN) + 2
    )
    return figure


def _draw_fit(ax: Axes, table: pd.DataFrame, name: str, head: str) -> None:
    rows = table[(table["objective"] == name) & (table["head"] == head)].sort_values("x")
    x, scores = rows["x"].to_numpy(), rows["score"].to_numpy()
    function = int(rows["function"].iloc[0])
    exact = head == "spline"
    ax.plot(
        x,
        _to_scale(scores, curve(function, x), log=OBJECTIVES[name].log_rates),
        color="black" if exact else _COLOURS[name],
        linestyle=":" if exact else "-",
        linewidth=1.3,
        label=f"{name}, exact spline" if exact else name,
    )


def _to_scale(scores: NDArray, truth: NDArray, *, log: bool) -> NDArray:
    """Map scores onto the truth's scale by least squares: only their shape has a meaning."""
    values = np.exp(scores - scores.max()) if log else scores
    if np.ptp(values) == 0:
        return np.full_like(truth, truth.mean())
    slope, level = np.polyfit(values, truth, 1)
    return max(slope, 0) * values + (level if slope > 0 else truth.mean())


def _draw_list_sizes(table: pd.DataFrame) -> Figure:
    """Draw table 3: SCC by list size, ours and the paper's."""
    figure = _figure(10, 3.4)
    samplings = list(table["sampling"].unique())
    for ax, sampling in zip(figure.subplots(1, len(samplings)), samplings, strict=True):
        rows = table[(table["sampling"] == sampling) & (table["selection"] == "counts")]
        ax.errorbar(rows["n_k"], rows["scc"], rows["sd"], fmt="o-", color="#D55E00", label="ours")
        ax.plot(rows["n_k"], rows["paper"], "x--", color="black", label="paper")
        ax.set_xscale("log", base=2)
        ax.set(title=sampling, xlabel="list size $N_k$", ylabel="SCC against the truth")
        ax.grid(alpha=0.3)
        ax.legend()
    return figure


def _draw_sweeps(table: pd.DataFrame) -> Figure:
    """Draw the sweeps, a panel a factor; crosses: depth not told; squares: exact spline."""
    factors = list(table["factor"].unique())
    n_columns = min(len(factors), 3)
    n_rows = -(-len(factors) // n_columns)
    figure = _figure(max(4.7 * n_columns, 9), 3.6 * n_rows)
    axes = figure.subplots(n_rows, n_columns, squeeze=False, sharey=True).ravel()
    for ax, factor in zip(axes, factors, strict=False):
        of_factor = table[table["factor"] == factor]
        for (name, head), rows in of_factor.groupby(["objective", "head"], sort=False):
            exact = head == "spline"
            colour = _COLOURS[name]
            label = f"{name}, exact spline" if exact else name
            told = rows[rows["corrected"]]
            style = "s:" if exact else "o-"
            ax.plot(told["value"], told["scc"], style, color=colour, label=label, markersize=4)
            untold = rows[~rows["corrected"]]
            ax.plot(untold["value"], untold["scc"], "x--", color=colour, markersize=4)
        if factor != "centre" and (of_factor["value"] > 0).all():
            ax.set_xscale("log")
        elif of_factor["value"].max() > 5:
            ax.set_xscale("symlog", linthresh=1)
        ax.set(xlabel=_FACTORS[factor], ylabel="SCC against the truth")
        ax.grid(alpha=0.3)
    for ax in axes[len(factors) :]:
        ax.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure
