"""What the study says in plain words: every statement is computed from the scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from strank.simulate.curves import CurveDesign
from strank.studies.synthetic.objectives import (
    LIST_SIZES,
    OBJECTIVES,
    PAPER,
    POINTWISE,
    PUBLISHED_CENTRE,
)

_SEVEN = ("mse", "poisson", "nb", "rank", "pair", "pcc", "list")


def findings(scores: Scores) -> list[str]:
    """State where we agree with the paper, where not, and why, each with its numbers.

    Parameters
    ----------
    scores
        SCC of every fit.

    Returns
    -------
    list of str
        A paragraph each.
    """
    return [
        *(_order(scores, sampling) for sampling in PAPER),
        _published_rank(scores),
        _pearson(scores),
        _exact(scores),
        *_window(scores),
        _list_size(scores),
        _selection(scores),
        *_sweeps(scores),
    ]


def _title(name: str) -> str:
    return OBJECTIVES[name].title


def _means(scores: Scores, sampling: str) -> pd.Series:
    table = table1(scores).query("head == 'mlp' and selection == 'counts'")
    return table[table["sampling"] == sampling].set_index("objective")["scc"]


def _order(scores: Scores, sampling: str) -> str:
    ours = _means(scores, sampling)
    paper = pd.Series(PAPER[sampling])[list(_SEVEN)]
    order = ours[list(_SEVEN)].sort_values(ascending=False)
    tau = stats.kendalltau(order, paper[order.index]).statistic
    best = scores.of("list", sampling)
    rest = {name: scores.difference(best, scores.of(name, sampling)) for name in _SEVEN[:-1]}
    beaten = [name for name, difference in rest.items() if difference.low > 0]
    pointwise = max(POINTWISE, key=lambda name: ours[name])
    return (
        f"Order, {sampling}: ours is "
        + ", ".join(f"{_title(name)} {scc:.3f}" for name, scc in order.items())
        + f"; the paper's is {', '.join(_title(n) for n in paper.sort_values().index[::-1])} "
        f"(Kendall's tau {tau:.2f}). ListSTRank is clearly ahead of "
        f"{len(beaten)} of the six others; over PairSTRank by {rest['pair']}, over the best "
        f"pointwise objective, {_title(pointwise)}, by {rest[pointwise]}."
        + _against_paper(ours["list"], paper["list"], "ListSTRank")
        + _against_paper(ours["pair"], paper["pair"], "PairSTRank")
    )


def _against_paper(ours: float, paper: float, name: str) -> str:
    verb = "reaches" if ours >= paper else "misses"
    return f" {name} {verb} the paper's {paper:.3f} with {ours:.3f}."


def _published_rank(scores: Scores) -> str:
    parts = []
    for sampling in PAPER:
        ours = _means(scores, sampling)
        margin = scores.of("rank_margin", sampling)
        parts.append(
            f"{sampling} {ours['rank']:.3f} (paper {PAPER[sampling]['rank']:.3f}); with margin 1 "
            f"and ties left out {ours['rank_margin']:.3f}, and ListSTRank is "
            + _verdict(scores.difference(scores.of("list", sampling), margin))
        )
    return (
        "Margin ranking: " + "; ".join(parts) + ". The published loss has margin 0, so constant "
        "scores are an optimum of it, and it takes a tie as a wish for the second spot to be "
        "higher: what it scores depends on where training stops."
    )


def _verdict(difference: Difference) -> str:
    """Say who is ahead, if that can be said."""
    if not difference.clear:
        return f"not clearly ahead or behind, {difference}"
    return f"{'ahead' if difference.mean > 0 else 'behind'}, {difference}"


def _pearson(scores: Scores) -> str:
    parts = []
    for sampling in PAPER:
        section, pooled, best = (
            scores.of(name, sampling) for name in ("pcc_section", "pcc", "list")
        )
        parts.append(
            f"{sampling} {section.mean():.3f}, over the pooled one by "
            f"{scores.difference(section, pooled)}; ListSTRank with {best.mean():.3f} is "
            f"{_verdict(scores.difference(best, section))}"
        )
    return (
        "Pearson per section, which the paper leaves out: "
        + "; ".join(parts)
        + ". The paper's PCC correlates over both tissues at once, so the batch effect is part of "
        "what it fits; its optimum for a linear head is that of MSE." + _bias(scores)
    )


def _bias(scores: Scores) -> str:
    """Say what an additive background does to either."""
    table = sweep_table(scores)
    rows = table[(table["factor"] == "bias") & (table["head"] == "mlp")]
    if rows.empty:
        return ""
    wide = rows.pivot_table("scc", "value", "objective")
    parts = [
        f"bias {value:g}: ListSTRank {row['list']:.3f}, per section {row['pcc_section']:.3f}"
        for value, row in wide.iterrows()
    ]
    return (
        " A correlation ignores an additive bias of a section, which the likelihoods take for "
        "expression (" + "; ".join(parts) + ")."
    )


def _exact(scores: Scores) -> str:
    parts, gaps = [], {}
    for sampling in PAPER:
        exact = {
            name: scores.of(name, sampling, head="spline") for name in ("list", "poisson", "mse")
        }
        best = exact.pop("list")
        gain = scores.difference(best, scores.of("list", sampling))
        gaps[sampling] = min((best - scc).mean() for scc in exact.values())
        parts.append(
            f"{sampling}: ListSTRank {best.mean():.3f}, "
            + ", ".join(f"{_title(name)} {scc.mean():.3f}" for name, scc in exact.items())
            + f"; ListSTRank's optimum over its network by {gain}"
        )
    return (
        "Exact optimum on a cubic spline: "
        + "; ".join(parts)
        + ". The best pointwise optimum is "
        + " and ".join(f"{gap:.3f} below that of ListSTRank ({name})" for name, gap in gaps.items())
        + ". A network's gap to the optimum of its own objective is lost in training; the gap "
        "between the optima is the objective's." + _seconds(scores)
    )


def _seconds(scores: Scores) -> str:
    exact = scores.table.query("study == 'table1' and head == 'spline' and objective == 'list'")
    seconds = exact.groupby("sampling", sort=False)["seconds"].mean()
    return (
        " An exact fit of ListSTRank took "
        + " and ".join(f"{value:.2f} s ({sampling})" for sampling, value in seconds.items())
        + ", basis included, on one core."
    )


def _window(scores: Scores) -> Iterator[str]:
    """Say how much the one window of the published code explains."""
    table = sweep_table(scores)
    published = table[(table["factor"] == "centre") & (table["value"] == PUBLISHED_CENTRE)]
    if published.empty:
        return
    scc = published.set_index(["objective", "head"])["scc"]
    ours = _means(scores, "imbalanced")
    names = ("mse", "poisson", "pcc", "pair", "list")
    yield (
        "The window: the published code draws the second tissue's window with one seed for all "
        f"four curves, centre {PUBLISHED_CENTRE}; ours are random. In that window the networks "
        "have "
        + ", ".join(
            f"{_title(name)} {scc[name, 'mlp']:.3f} (paper {PAPER['imbalanced'][name]:.3f}, our "
            f"windows {ours[name]:.3f})"
            for name in names
        )
        + "; exact optima there: "
        + ", ".join(f"{_title(name)} {scc[name, 'spline']:.3f}" for name in ("mse", "poisson"))
        + ". Networks of this sweep have fewer steps than those of table 1."
    )


def _list_size(scores: Scores) -> str:
    table = table3(scores).query("selection == 'counts'")
    parts = []
    for sampling, rows in table.groupby("sampling", sort=False):
        best, smallest = rows.loc[rows["scc"].idxmax()], rows.iloc[0]
        parts.append(
            f"{sampling}: from {smallest['scc']:.3f} at N_k = {smallest['n_k']} to "
            f"{best['scc']:.3f} at N_k = {best['n_k']} (paper {smallest['paper']:.3f} to "
            f"{rows['paper'].max():.3f})"
        )
    return (
        "List size: "
        + "; ".join(parts)
        + ". A batch of 256 has 128 spots of each tissue, so 128 and 256 are whole sections here."
    )


def _selection(scores: Scores) -> str:
    parts = []
    for sampling in PAPER:
        gain = scores.difference(
            scores.of("list", sampling, selection="truth"), scores.of("list", sampling)
        )
        parts.append(f"{gain.mean:+.4f} {sampling}")
    return (
        "Choosing the checkpoint by the noise-free truth, as the published code does, instead of "
        f"by noisy held-out counts changes ListSTRank by {' and '.join(parts)}."
    )


def _sweeps(scores: Scores) -> Iterator[str]:
    table = sweep_table(scores)
    for factor, rows in table.groupby("factor", sort=False):
        networks = rows[(rows["head"] == "mlp") & rows["corrected"]]
        wide = networks.pivot_table("scc", "value", "objective")
        leads = wide.idxmax(axis=1)
        yield (
            f"Sweep of {factor} (imbalanced): best network by value: "
            + ", ".join(
                f"{value:g} {_title(name)} {wide.loc[value, name]:.3f}"
                for value, name in leads.items()
            )
            + f". ListSTRank is between {wide['list'].min():.3f} and {wide['list'].max():.3f}."
            + _depth(rows)
        )


def _depth(rows: pd.DataFrame) -> str:
    """Say what telling the depth changes for the list objective."""
    if rows["corrected"].all():
        return ""
    chosen = rows[rows["objective"] == "list"].query("value > 0")
    wide = chosen.pivot_table("scc", ["head", "value"], "corrected")
    parts = [
        f"{head} head at {value:g}: {row[True]:.3f} told, {row[False]:.3f} not"
        for (head, value), row in wide.iterrows()
    ]
    return " Depth told to ListSTRank or not: " + "; ".join(parts) + "."


@dataclass(frozen=True)
class Difference:
    """Mean difference of two fits over the same data sets, with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Read as text."""
        return f"{self.mean:+.3f} (95 % interval {self.low:+.3f} to {self.high:+.3f})"

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Scores:
    """SCC of every fit of the study, one a row."""

    table: pd.DataFrame

    def of(
        self,
        objective: str,
        sampling: str,
        *,
        study: str = "table1",
        head: str = "mlp",
        selection: str = "counts",
    ) -> pd.Series:
        """SCC by function and seed."""
        table = self.table
        rows = table[
            (table["study"] == study)
            & (table["objective"] == objective)
            & (table["sampling"] == sampling)
            & (table["head"] == head)
            & (table["selection"] == (selection if head == "mlp" else "none"))
        ]
        return rows.set_index(["function", "seed"])["scc"].sort_index()

    @staticmethod
    def difference(first: pd.Series, second: pd.Series) -> Difference:
        """Compare two fits on the same data sets, by the t distribution."""
        values = (first - second).dropna()
        half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
        return Difference(values.mean(), values.mean() - half, values.mean() + half)


def _summary(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Mean over functions, then mean and standard deviation over seeds."""
    per_seed = table.groupby([*by, "seed"], sort=False, dropna=False)["scc"].mean()
    groups = per_seed.groupby(by, sort=False, dropna=False)
    return groups.agg(scc="mean", sd="std", seeds="size").reset_index()


def table1(scores: Scores) -> pd.DataFrame:
    """Every objective in both samplings, beside the paper's table 1.

    Parameters
    ----------
    scores
        SCC of every fit.

    Returns
    -------
    pandas.DataFrame
        ``sampling``, ``objective``, ``head``, ``selection`` (checkpoint chosen by noisy ``counts``
        or by the ``truth``, as the published code does), ``scc``, its ``sd`` over ``seeds``, and
        ``paper``.
    """
    rows = scores.table[scores.table["study"] == "table1"]
    table = _summary(rows, ["sampling", "objective", "head", "selection"])
    return table.assign(paper=_paper(table).where(table["head"] == "mlp"))


def table3(scores: Scores) -> pd.DataFrame:
    """List sizes N_k, beside the paper's table 3; lists of 128 and more are whole sections.

    Parameters
    ----------
    scores
        SCC of every fit.

    Returns
    -------
    pandas.DataFrame
        ``sampling``, ``n_k``, ``selection``, ``scc``, ``sd``, ``seeds``, ``paper``.
    """
    rows = scores.table[scores.table["study"] == "table3"]
    whole = scores.table.query("study == 'table1' and objective == 'list' and head == 'mlp'")
    largest = max(LIST_SIZES)
    rows = pd.concat([rows, *(whole.assign(objective=f"list_{size * largest}") for size in (2, 4))])
    table = _summary(rows, ["sampling", "objective", "selection"])
    table["paper"] = _paper(table)
    sizes = table.pop("objective").str.removeprefix("list_").astype(int)
    table.insert(1, "n_k", sizes)
    return table.sort_values(["sampling", "selection", "n_k"], ascending=[False, True, True])


def sweep_table(scores: Scores) -> pd.DataFrame:
    """Tabulate what changes with scale, bias, dispersion, sample size, sparsity and depth.

    Parameters
    ----------
    scores
        SCC of every fit.

    Returns
    -------
    pandas.DataFrame
        ``factor``, ``value``, ``corrected`` (whether the depth was told), ``objective``, ``head``,
        ``scc``, ``sd``, ``seeds``; the paper's own setting stands in every sweep that has one.
    """
    rows = scores.table[(scores.table["study"] == "sweep") & (scores.table["selection"] != "truth")]
    base = rows[rows["factor"] == "base"]
    parts = []
    for factor in rows["factor"].unique():
        if factor != "base":
            parts.append(rows[rows["factor"] == factor])
            default = getattr(CurveDesign(), factor)
            if default is not None:
                parts.append(base.assign(factor=factor, value=float(default)))
    table = _summary(
        pd.concat(parts), ["factor", "value", "corrected", "sampling", "objective", "head"]
    )
    return table.sort_values(["factor", "value"], kind="stable")


def _paper(table: pd.DataFrame) -> pd.Series:
    found = [
        PAPER[sampling].get(objective, np.nan)
        for sampling, objective in zip(table["sampling"], table["objective"], strict=True)
    ]
    return pd.Series(found, index=table.index)
