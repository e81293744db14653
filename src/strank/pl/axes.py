"""Axes to draw on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """Take axes as they are, or make a figure of so many inches, which a notebook shows."""
    if ax is not None:
        return ax
    # Only here: it knows of screens, which axes that are given need not.
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def add_legend(ax: Axes, drawn: Mapping[str, Artist], **legend: Any) -> None:
    """Name what was drawn, whatever the characters of the names."""
    # matplotlib leaves out what begins with "_", and reads "$" as mathematics.
    numbers = [str(number) for number in range(len(drawn))]
    made = ax.legend(list(drawn.values()), numbers, frameon=False, fontsize=8, **legend)
    for text, name in zip(made.get_texts(), drawn, strict=True):
        text.set(text=name, parse_math=False)
