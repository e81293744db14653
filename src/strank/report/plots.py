"""Volcano plots, calibration and learning curves."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.isotonic import isotonic_regression

from strank.errors import InputError
from strank.files import read_written
from strank.storage import new_file

_SURE = 0.05
_LABELS = 8
# Vermilion and blue keep apart in all common colour deficiencies.
_UP, _DOWN, _UNSURE = "#d55e00", "#0072b2", "#9a9a9a"

_FOLDS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
_VALIDATION = "validation/"
_NAMES = {
    "loss": "validation loss",
    "list_gain": "held-out log-likelihood above library\nsize alone, nats a gene and section",
    "spearman": "held-out Spearman correlation\nwith log1p(CP10k), mean of genes",
}


def draw_contrast(table: pd.DataFrame) -> Figure:
    """Draw change against how surely it is none, and the observed changes if there are any.

    Gene names are shown as text, whatever their characters.
    """
    with_counts = "observed" in table
    figure = Figure(figsize=(13.5 if with_counts else 7.5, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if with_counts else 1, squeeze=False)[0]
    a, b = (str(table[column].iloc[0]) for column in "ab")
    figure.suptitle(f"{a} against {b}", parse_math=False, fontweight="bold")
    table = table.assign(colour=_colours(table), height=_height(table["p"]))
    _volcano(axes[0], table, a, b)
    if with_counts:
        _agreement(axes[1], table)
    return figure


def write_volcano(path: Path | str, table: pd.DataFrame) -> None:
    """Write a picture of the changes between two regions, predicted and, if there are, observed.

    Parameters
    ----------
    path
        The PNG file.
    table
        Of `strank.contrast`.

    Examples
    --------
    >>> import tempfile
    >>> table = pd.DataFrame({"gene": ["ERBB2", "CD3E"], "predicted": [1.2, -0.3]})
    >>> table = table.assign(p=[1e-4, 0.4], q=[2e-4, 0.4], a="tumour", b="stroma")
    >>> file = Path(tempfile.mkdtemp()) / "volcano.png"
    >>> write_volcano(file, table)
    >>> file.exists()
    True
    """
    with new_file(Path(path)) as file:
        draw_contrast(table).savefig(file, dpi=130)


def _volcano(ax: Axes, table: pd.DataFrame, a: str, b: str) -> None:
    ax.scatter(table["predicted"], table["height"], c=table["colour"], s=22, linewidth=0)
    ax.axvline(0, color="0.5", linewidth=0.8)
    reach = _reach(table["predicted"])
    ax.set(xlim=(-reach, reach), ylim=(-0.03 * _top(table), _top(table)))
    ax.set_ylabel("−log₁₀ p (where one looked, not the model's error)")
    sure = (table["q"] < _SURE).sum()
    ax.set_title(f"coloured: q < {_SURE:g}, {sure} of {len(table)} genes", fontsize=9, loc="right")
    label = f"predicted log fold change (natural log)\n← higher in {b}      higher in {a} →"
    ax.set_xlabel(label, parse_math=False)
    _folds(ax, reach)
    _label(ax, table, "height", (-0.03 * _top(table), _top(table)))


def _agreement(ax: Axes, table: pd.DataFrame) -> None:
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
    ax.scatter(table["predicted"], table["observed"], c=table["colour"], s=22, zorder=3)
    reach, height = _reach(table["predicted"]), 1.15 * _furthest(table["observed"])
    ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle="--", label="equal")
    for line in (ax.axhline, ax.axvline):
        line(0, color="0.5", linewidth=0.8)
    ax.set(xlim=(-reach, reach), ylim=(-height, height), title="with 95 % intervals")
    ax.set(xlabel="predicted log fold change (natural log)", ylabel="observed log fold change")
    ax.legend(frameon=False, loc="lower right")
    _label(ax, table, "observed", (-height, height))


def _label(ax: Axes, table: pd.DataFrame, y: str, limits: tuple[float, float]) -> None:
    """Name the genes that change most, in a column at either edge, so that no two names overlap."""
    sure = table[table["q"] < _SURE] if (table["q"] < _SURE).any() else table
    size = sure["predicted"].abs()
    for side, align in ((1, "right"), (-1, "left")):
        chosen = sure[np.sign(sure["predicted"]) == side]
        if chosen.empty:
            continue
        chosen = chosen.loc[size[chosen.index].nlargest(_LABELS).index].sort_values(y)
        heights = _spread(chosen[y].to_numpy(), limits)
        for (_, row), height in zip(chosen.iterrows(), heights, strict=True):
            ax.annotate(
                row["gene"],
                (row["predicted"], row[y]),
                (side * 0.98 * ax.get_xlim()[1], height),
                parse_math=False,
                fontsize=8,
                ha=align,
                va="center",
                arrowprops={"arrowstyle": "-", "color": "0.75", "linewidth": 0.6},
                annotation_clip=False,
            )


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


def write_calibration(path: Path | str, table: pd.DataFrame) -> None:
    """Write a picture of observed against predicted fold changes, a line a method.

    Parameters
    ----------
    path
        The PNG file.
    table
        ``calibration`` of an evaluation.

    Examples
    --------
    >>> import tempfile
    >>> table = pd.DataFrame({"method": "list", "predicted": [0.5, 2.0], "observed": [0.8, 1.3]})
    >>> file = Path(tempfile.mkdtemp()) / "calibration.png"
    >>> write_calibration(file, table.assign(counts=[100, 300]))
    >>> file.exists()
    True
    """
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle="--")
    for number, (method, line) in enumerate(table.groupby("method", sort=False)):
        line = line.sort_values("predicted")
        sizes = 4 + 60 * line["counts"] / max(table["counts"].max(), 1)
        places, colour = np.log(line[["predicted", "observed"]].to_numpy(float)).T, f"C{number}"
        ax.plot(places[0], places[1], color=colour, linewidth=1)
        ax.scatter(places[0], places[1], sizes, colour, linewidth=0, label=str(method))
    ax.set(xlabel="predicted log fold change of a tenth of a section", ylabel="observed")
    ax.set_title("on the dashed line sizes are right; flatter, they are too large", fontsize=9)
    legend = ax.legend(*ax.get_legend_handles_labels(), frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    ax.spines[["top", "right"]].set_visible(False)
    with new_file(Path(path)) as file:
        figure.savefig(file, dpi=130)


def draw_learning_curves(folder: Path | str) -> Path:
    """Draw loss and held-out score by epoch into ``learning.png``, one line a network.

    Parameters
    ----------
    folder
        Of a training: each network's ``history.csv`` lies in a folder of its own.

    Returns
    -------
    Path
        Of the figure.

    Raises
    ------
    strank.errors.InputError
        If there is no history.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "without-A").mkdir()
    >>> history = pd.DataFrame({"epoch": [0, 1], "train/loss": [2.0, 1.0]})
    >>> history = history.assign(**{"validation/spearman": [0.1, 0.3]})
    >>> history.to_csv(folder / "without-A" / "history.csv")
    >>> draw_learning_curves(folder).name
    'learning.png'
    """
    folder = Path(folder)
    histories = {
        unquote(path.parent.name.removeprefix("without-")): read_written(path)
        for path in sorted(folder.glob("*/history.csv"))
    }
    if not histories:
        raise InputError(f"{folder}: no history.csv of a network there")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, score = figure.subplots(1, 2)
    for number, history in enumerate(histories.values()):
        _draw(loss, score, history, f"C{number % 10}")
    monitor = _monitor(next(iter(histories.values()))).removeprefix(_VALIDATION)
    # The first epochs are far below, and would press the rest together.
    if monitor == "loss":
        highest = max(history[_monitor(history)].quantile(0.9) for history in histories.values())
        score.set_ylim(top=float(highest))
    else:
        lowest = min(history[_monitor(history)].quantile(0.1) for history in histories.values())
        score.set_ylim(bottom=float(lowest))
    loss.set(xlabel="epoch", ylabel="training loss (mean of the epoch)")
    score.set(xlabel="epoch", ylabel=_NAMES.get(monitor, monitor))
    names = range(len(histories))
    legend = score.legend(score.lines[::2], names, title="stopped by", frameon=False, fontsize=8)
    for text, name in zip(legend.get_texts(), histories, strict=True):
        text.set(text=name, parse_math=False)
    for axes in (loss, score):
        axes.spines[["top", "right"]].set_visible(False)
    with new_file(folder / "learning.png") as file:
        FigureCanvasAgg(figure).print_figure(file, dpi=150)
    return folder / "learning.png"


def _draw(loss: Axes, score: Axes, history: pd.DataFrame, colour: str) -> None:
    epoch, validation = history["epoch"], history[_monitor(history)]
    lower = _monitor(history).endswith("/loss")
    best = int(np.argmin(validation) if lower else np.argmax(validation))
    loss.plot(epoch, history["train/loss"], color=colour)
    score.plot(epoch, validation, color=colour)
    score.plot(epoch[best], validation[best], "o", color=colour)


def _monitor(history: pd.DataFrame) -> str:
    return next(column for column in history.columns if column.startswith(_VALIDATION))
