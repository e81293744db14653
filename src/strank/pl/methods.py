"""Methods of an evaluation beside each other."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from strank.errors import InputError, some
from strank.evaluation.held_out import Evaluation
from strank.metrics.significance import Intervals, mean_intervals
from strank.pl.axes import add_legend, axes_or_new

_TITLES = {
    "scc": "SCC: Spearman with log1p(CP10k)",
    "pearson": "Pearson with log1p(CP10k)",
    "depth_matched": "depth-matched SCC",
    "lift": "lift",
    "deviance": "deviance explained",
}
_PLAIN, _MATCHED = "#9a9a9a", "#0072b2"


def scores(evaluation: Evaluation, score: str = "depth_matched", *, ax: Axes | None = None) -> Axes:
    """Draw the mean score of every method with its 95 % interval, the best on top.

    Grey dots are sections. The interval is over patients, so that of two or three is wide, and may
    reach beyond the axis, which has room for the sections; the title says so.

    Parameters
    ----------
    evaluation
        Of `strank.evaluate` or `strank.cross_validate`.
    score
        A column of its ``scores``: ``depth_matched``, ``scc``, ``pearson``, ``lift`` or
        ``deviance``.
    ax
        Where to; a new figure if ``None``.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Raises
    ------
    strank.errors.InputError
        If there is no such score.

    See Also
    --------
    strank.metrics.mean_intervals : What the intervals are over.

    Examples
    --------
    >>> import pandas as pd
    >>> import strank
    >>> from strank.evaluation.held_out import Evaluation
    >>> table = pd.DataFrame({"method": ["list"] * 4 + ["ridge"] * 4, "gene": ["A", "B"] * 4})
    >>> table = table.assign(section=["S1", "S1", "S2", "S2"] * 2, patient="P")
    >>> table["depth_matched"] = [0.4, 0.3, 0.5, 0.4, 0.2, 0.2, 0.3, 0.1]
    >>> ax = strank.pl.scores(Evaluation(table, {}, ()))
    >>> [text.get_text() for text in ax.get_yticklabels()]
    ['ridge', 'list']
    """
    names, sections, found = _intervals(evaluation, score)
    order = np.argsort(np.nan_to_num(found.mean, nan=-np.inf), kind="stable")
    rows = np.arange(len(order))
    ax = axes_or_new(ax, 6.4, 1.2 + 0.35 * len(order))
    ax.axvline(0, color="0.7", linewidth=0.8)
    bars = np.abs(np.stack([found.low, found.high]) - found.mean)[:, order]
    dots = np.repeat(rows, sections.shape[1])
    ax.scatter(sections[order], dots, s=14, color=_PLAIN, zorder=3, linewidth=0)
    low, high = _ends(np.append(sections, 0.0))
    ax.set_xlim(low, high)
    if (found.low < low).any() or (found.high > high).any():
        ax.set_title("intervals reach beyond the axis: few patients", fontsize=9)
    ax.errorbar(found.mean[order], rows, xerr=bars, fmt="o", color=_MATCHED, capsize=3)
    _name_rows(ax, [names[i] for i in order])
    ax.set_xlabel(f"{_TITLES[score]}, mean of genes and sections; 95 % interval")
    return ax


def depth(evaluation: Evaluation, *, ax: Axes | None = None) -> Axes:
    """Draw what is left of every method's SCC once all spots have the same depth.

    Library size alone reaches an SCC, and so does whatever knows of it; thinned to one depth, only
    what says more than that scores above 0.

    Parameters
    ----------
    evaluation
        Of `strank.evaluate` or `strank.cross_validate`.
    ax
        Where to; a new figure if ``None``.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Examples
    --------
    >>> import pandas as pd
    >>> import strank
    >>> from strank.evaluation.held_out import Evaluation
    >>> table = pd.DataFrame({"method": ["list", "library size"], "gene": "A", "section": "S1"})
    >>> table = table.assign(patient="P", scc=[0.4, 0.3], depth_matched=[0.35, 0.0])
    >>> ax = strank.pl.depth(Evaluation(table, {}, ()))
    >>> [text.get_text() for text in ax.get_yticklabels()]
    ['library size', 'list']
    """
    names, _, plain = _intervals(evaluation, "scc")
    matched = _intervals(evaluation, "depth_matched")[2].mean
    order = np.argsort(np.nan_to_num(matched, nan=-np.inf), kind="stable")
    rows = np.arange(len(order))
    ax = axes_or_new(ax, 6.4, 1.2 + 0.35 * len(order))
    ax.axvline(0, color="0.7", linewidth=0.8)
    ax.hlines(rows, plain.mean[order], matched[order], color="0.8", linewidth=2, zorder=1)
    drawn = {
        "SCC": ax.scatter(plain.mean[order], rows, color=_PLAIN),
        "depth-matched SCC": ax.scatter(matched[order], rows, color=_MATCHED),
    }
    _name_rows(ax, [names[i] for i in order])
    ax.set_xlabel("mean of genes and sections")
    add_legend(ax, drawn, loc="lower right")
    return ax


def _intervals(
    evaluation: Evaluation, score: str
) -> tuple[list[str], NDArray[np.float64], Intervals]:
    """Name the methods; their means of every section, and over all with intervals."""
    table = evaluation.scores
    if score not in _TITLES or score not in table:
        known = [name for name in _TITLES if name in table]
        raise InputError(f"no score {score!r}; choose one of {some(known)}")
    methods = list(table["method"].unique())
    patients = table.drop_duplicates("section").set_index("section")["patient"].astype(str)
    genes = table["gene"].unique()
    cube = [
        table[table["method"] == method]
        .pivot_table(score, "section", "gene")
        .reindex(index=patients.index, columns=genes)
        for method in methods
    ]
    values = np.stack(cube).astype(float)
    means = np.stack([part.mean(axis=1).to_numpy() for part in cube])
    return methods, means, mean_intervals(values, patient=patients.to_numpy())


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def _name_rows(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(np.arange(len(names)), names, parse_math=False)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(left=False)
