"""Changes between two regions."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy.optimize import linear_sum_assignment
from sklearn.isotonic import isotonic_regression

from strank.pl.axes import axes_or_new

_SURE = 0.05
_LABELS = 8
# Vermilion and blue keep apart in all common colour deficiencies.
_UP, _DOWN, _UNSURE = "#d55e00", "#0072b2", "#9a9a9a"
_FOLDS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)


def volcano(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw predicted changes against how surely they are none; the largest are named.

    Parameters
    ----------
    table
        Of `strank.contrast`: ``gene``, ``predicted``, ``p``, ``q``, ``a`` and ``b``.
    ax
        Where to; a new figure if ``None``.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Examples
    --------
    >>> import strank
    >>> table = pd.DataFrame({"gene": ["ERBB2", "CD3E"], "predicted": [1.2, -0.3]})
    >>> table = table.assign(p=[1e-4, 0.4], q=[2e-4, 0.4], a="tumour", b="stroma")
    >>> ax = strank.pl.volcano(table)
    >>> ax.get_title(loc="right")
    'coloured: q < 0.05, 1 of 2 genes'
    """
    ax = axes_or_new(ax, 7.5, 5.2)
    table = table.assign(height=_height(table["p"]))
    a, b = (str(table[column].iloc[0]) for column in "ab")
    ax.scatter(table["predicted"], table["height"], c=_colours(table), s=22, linewidth=0)
    ax.axvline(0, color="0.5", linewidth=0.8)
    reach, top = _reach(table["predicted"]), _top(table)
    ax.set(xlim=(-reach, reach), ylim=(-0.03 * top, top))
    ax.set_ylabel("−log₁₀ p (where one looked, not the model's error)")
    sure = (table["q"] < _SURE).sum()
    ax.set_title(f"coloured: q < {_SURE:g}, {sure} of {len(table)} genes", fontsize=9, loc="right")
    label = f"predicted log fold change (natural log)\n← higher in {b}      higher in {a} →"
    ax.set_xlabel(label, parse_math=False)
    _folds(ax, reach)
    _label(ax, table, "height")
    return ax


def draw_agreement(ax: Axes, table: pd.DataFrame) -> None:
    """Draw observed against predicted changes, with their intervals."""
    table = table.dropna(subset=["observed"])
    ends = {"xerr": ("predicted", "low", "high")}
    ends["yerr"] = ("observed", "observed_low", "observed_high")
    bars = {
        side: np.abs(table[[low, high]].to_numpy().T - table[middle].to_numpy())
        for side, (middle, low, high) in ends.items()
    }
    ax.errorbar(
        table["predicted"], table["observed"], fmt="none", ecolor="0.8", elinewidth=0.8, **bars
    )
    ax.scatter(table["predicted"], table["observed"], c=_colours(table), s=22, zorder=3)
    reach, height = _reach(table["predicted"]), 1.15 * _furthest(table["observed"])
    ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle="--", label="equal")
    for line in (ax.axhline, ax.axvline):
        line(0, color="0.5", linewidth=0.8)
    ax.set(xlim=(-reach, reach), ylim=(-height, height), title="with 95 % intervals")
    ax.set(xlabel="predicted log fold change (natural log)", ylabel="observed log fold change")
    ax.legend(frameon=False, loc="lower right")
    _label(ax, table, "observed")


def _label(ax: Axes, table: pd.DataFrame, y: str) -> None:
    """Name the genes that change most, in a column at either edge; no names or lines cross."""
    sure = table[table["q"] < _SURE] if (table["q"] < _SURE).any() else table
    size = sure["predicted"].abs()
    for side, align in ((1, "right"), (-1, "left")):
        chosen = sure[np.sign(sure["predicted"]) == side]
        if chosen.empty:
            continue
        chosen = chosen.loc[size[chosen.index].nlargest(_LABELS).index].sort_values(y)
        edge = side * 0.98 * ax.get_xlim()[1]
        places = _places(chosen[["predicted", y]].to_numpy(), edge, ax)
        for (_, row), height in zip(chosen.iterrows(), places, strict=True):
            ax.annotate(
                row["gene"],
                (row["predicted"], row[y]),
                (edge, height),
                parse_math=False,
                fontsize=8,
                ha=align,
                va="center",
                arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.6},
                annotation_clip=False,
            )


def _places(points: np.ndarray, edge: float, ax: Axes) -> np.ndarray:
    """Find a height at the edge for the name of each point, which ascend by y."""
    heights = _spread(points[:, 1], ax.get_ylim())
    # Of all ways to join points and places the shortest has no crossing, as it is drawn.
    unit = np.array([np.ptp(ax.get_xlim()) / ax.bbox.width, np.ptp(ax.get_ylim()) / ax.bbox.height])
    ends = np.column_stack([np.full(len(heights), edge), heights]) / unit
    lengths = np.linalg.norm((points / unit)[:, None] - ends[None], axis=2)
    return heights[linear_sum_assignment(lengths)[1]]


def _spread(wanted: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Move ascending heights apart by at least a line of text, as little as that allows."""
    gap = 0.045 * (limits[1] - limits[0])
    steps = gap * np.arange(len(wanted))
    lowest, highest = limits[0] + gap, limits[1] - gap - steps[-1]
    return np.asarray(isotonic_regression(wanted - steps, y_min=lowest, y_max=highest)) + steps


def _folds(ax: Axes, reach: float) -> None:
    """Fold changes along the top edge."""
    folds = [fold for fold in _FOLDS if abs(np.log(fold)) < reach]
    top = ax.secondary_xaxis("top")
    names = [f"{fold:g}×" if fold >= 1 else f"1/{1 / fold:g}×" for fold in folds]
    top.set_xticks(np.log(folds), names, fontsize=8)


def _colours(table: pd.DataFrame) -> np.ndarray:
    return np.select(
        [table["q"] >= _SURE, table["predicted"] > 0], [_UNSURE, _UP], default=_DOWN
    ).astype(object)


def _height(p: pd.Series) -> np.ndarray:
    # A p of 0 has no logarithm; it goes to the top.
    return -np.log10(np.maximum(p.to_numpy(), 1e-12))


def _top(table: pd.DataFrame) -> float:
    return 1.08 * max(float(table["height"].max()), 2.0)


def _furthest(values: pd.Series) -> float:
    return max(float(np.abs(values).max()), float(np.log(1.5))) if len(values) else 1.0


def _reach(values: pd.Series) -> float:
    """Half of the width: all points, and names beside them."""
    return 1.5 * _furthest(values)
