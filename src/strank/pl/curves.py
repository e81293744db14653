"""Curves: whether sizes are right, and how networks learned."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from strank.errors import InputError
from strank.files import read_written
from strank.pl.axes import add_legend, axes_or_new

_VALIDATION = "validation/"
_TRAINING = "train/loss"
# Axes are cut where the whole is so many times as high as all but a tenth of the epochs.
_PRESSED = 2
_NAMES = {
    "loss": "validation loss",
    "list_gain": "held-out log-likelihood above library\nsize alone, nats a gene and section",
    "spearman": "held-out Spearman correlation\nwith log1p(CP10k), mean of genes",
}


def calibration(table: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw observed against predicted fold changes, a line a method.

    Parameters
    ----------
    table
        ``calibration`` of an evaluation: ``method``, ``predicted``, ``observed`` and ``counts``.
    ax
        Where to; a new figure if ``None``.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Examples
    --------
    >>> import strank
    >>> table = pd.DataFrame({"method": "list", "predicted": [0.5, 2.0], "observed": [0.8, 1.3]})
    >>> strank.pl.calibration(table.assign(counts=[100, 300])).get_ylabel()
    'observed'
    """
    ax = axes_or_new(ax, 5.6, 5.2)
    ax.axline((0, 0), slope=1, color="0.5", linewidth=0.8, linestyle="--")
    drawn = {}
    for number, (method, line) in enumerate(table.groupby("method", sort=False)):
        line = line.sort_values("predicted")
        sizes = 4 + 60 * line["counts"] / max(table["counts"].max(), 1)
        places, colour = np.log(line[["predicted", "observed"]].to_numpy(float)).T, f"C{number}"
        ax.plot(places[0], places[1], color=colour, linewidth=1)
        drawn[str(method)] = ax.scatter(places[0], places[1], sizes, colour, linewidth=0)
    ax.set(xlabel="predicted log fold change of a tenth of a section", ylabel="observed")
    ax.set_title("on the dashed line sizes are right; flatter, they are too large", fontsize=9)
    add_legend(ax, drawn)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def learning(folder: Path | str, *, training: bool = False, ax: Axes | None = None) -> Axes:
    """Draw the held-out score by epoch, one line a network, its best epoch marked.

    Parameters
    ----------
    folder
        Of a training: each network's ``history.csv`` lies in a folder of its own.
    training
        The training loss instead.
    ax
        Where to; a new figure if ``None``.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Raises
    ------
    strank.errors.InputError
        If there is no history.

    Examples
    --------
    >>> import tempfile
    >>> import strank
    >>> folder = Path(tempfile.mkdtemp())
    >>> (folder / "without-A").mkdir()
    >>> history = pd.DataFrame({"epoch": [0, 1], "train/loss": [2.0, 1.0]})
    >>> history = history.assign(**{"validation/spearman": [0.1, 0.3]})
    >>> history.to_csv(folder / "without-A" / "history.csv")
    >>> strank.pl.learning(folder, training=True).get_ylabel()
    'training loss (mean of the epoch)'
    """
    folder = Path(folder)
    histories = {
        unquote(path.parent.name.removeprefix("without-")): read_written(path)
        for path in sorted(folder.glob("*/history.csv"))
    }
    if not histories:
        raise InputError(f"{folder}: no history.csv of a network there")
    ax = axes_or_new(ax, 5.2, 4.2)
    column = _TRAINING if training else _monitor(next(iter(histories.values())))
    drawn = {}
    for number, (name, history) in enumerate(histories.items()):
        colour = f"C{number % 10}"
        [drawn[name]] = ax.plot(history["epoch"], history[column], color=colour)
        if not training:
            _mark_best(ax, history["epoch"], history[column], colour)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    monitor = column.removeprefix(_VALIDATION)
    label = "training loss (mean of the epoch)" if training else _NAMES.get(monitor, monitor)
    ax.set(xlabel="epoch", ylabel=label)
    if not training:
        _leave_first(ax, [history[column] for history in histories.values()])
        add_legend(ax, drawn, title="stopped by")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _mark_best(ax: Axes, epoch: pd.Series, values: pd.Series, colour: str) -> None:
    best = int(np.argmin(values) if _lower_is_better(values) else np.argmax(values))
    ax.plot(epoch[best], values[best], "o", color=colour)


def _leave_first(ax: Axes, curves: list[pd.Series]) -> None:
    """Leave out what presses the rest together, as first epochs may, and say so."""
    lower = _lower_is_better(curves[0])
    low = min(float(curve.quantile(0 if lower else 0.1, "higher")) for curve in curves)
    high = max(float(curve.quantile(0.9 if lower else 1, "lower")) for curve in curves)
    every = max(curve.max() for curve in curves) - min(curve.min() for curve in curves)
    if every > _PRESSED * (high - low):
        margin = (high - low) / 20
        ax.set_ylim(None if lower else low - margin, high + margin if lower else None)
        ax.set_title("epochs beyond the axis are not shown", fontsize=9)


def _lower_is_better(values: pd.Series) -> bool:
    return str(values.name).endswith("/loss")


def _monitor(history: pd.DataFrame) -> str:
    return next(column for column in history.columns if column.startswith(_VALIDATION))
