"""Learning curves of a training."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from strank.errors import InputError
from strank.files import atomic_path

__all__ = ["draw_learning_curves"]

_HELD_OUT = "held_out/"
_NAMES = {
    "list_gain": "held-out log-likelihood above library\nsize alone, nats a gene and section",
    "spearman": "held-out Spearman correlation\nwith log1p(CP10k), mean of genes",
}


def draw_learning_curves(folder: Path) -> Path:
    """Draw ``learning.png``: loss and held-out score by epoch, one line a network.

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
    InputError
        If there is no history.
    """
    histories = {
        unquote(path.parent.name.removeprefix("without-")): pd.read_csv(path)
        for path in sorted(folder.glob("*/history.csv"))
    }
    if not histories:
        raise InputError(f"{folder}: no history.csv of a network there")
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, score = figure.subplots(1, 2)
    for number, history in enumerate(histories.values()):
        _draw(loss, score, history, f"C{number % 10}")
    monitor = _monitor(next(iter(histories.values()))).removeprefix(_HELD_OUT)
    # The first epochs are far below, and would press the rest together.
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
    with atomic_path(folder / "learning.png") as part:
        FigureCanvasAgg(figure).print_figure(part, dpi=150)
    return folder / "learning.png"


def _draw(loss: Axes, score: Axes, history: pd.DataFrame, colour: str) -> None:
    epoch, held_out = history["epoch"], history[_monitor(history)]
    best = int(np.argmax(held_out))
    loss.plot(epoch, history["train/loss"], color=colour)
    score.plot(epoch, held_out, color=colour)
    score.plot(epoch[best], held_out[best], "o", color=colour)


def _monitor(history: pd.DataFrame) -> str:
    return next(column for column in history.columns if column.startswith(_HELD_OUT))
