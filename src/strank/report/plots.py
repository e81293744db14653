"""Files of volcano plots, calibration and learning curves."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from strank.pl.changes import draw_agreement, volcano
from strank.pl.curves import calibration, learning
from strank.storage import new_file


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
    volcano(table, ax=axes[0])
    if with_counts:
        draw_agreement(axes[1], table)
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
    calibration(table, ax=figure.subplots())
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
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for ax, training in zip(figure.subplots(1, 2), (True, False), strict=True):
        learning(folder, training=training, ax=ax)
    with new_file(Path(folder) / "learning.png") as file:
        FigureCanvasAgg(figure).print_figure(file, dpi=150)
    return Path(folder) / "learning.png"
