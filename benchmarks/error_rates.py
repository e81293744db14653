"""Stated error rates, coverages and biases, each over its grid of settings; the worst is stated.

    python benchmarks/error_rates.py [null ...] [--quick]

Without a name all of them. With ``--quick``, a minute in all, but too few draws to tell a deviation
of a fifth of what is stated. The tests walk the same grids.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from scipy.stats import norm

from strank.metrics.ceiling import Ceiling, noise_ceiling
from strank.metrics.correlation import pearson, spearman, unit_ranks
from strank.metrics.depth import depth_matched_spearman, lift, thinned_ranks
from strank.metrics.significance import SpatialNull, mean_intervals


def hexagonal(rows: int = 14, columns: int = 15) -> NDArray:
    """210 spots one pitch apart, as a legacy ST or Visium section of a small tissue has them."""
    y, x = np.mgrid[:rows, :columns].reshape(2, -1).astype(float)
    return np.c_[x + y % 2 / 2, y * np.sqrt(3) / 2]


def in_irregular(x: NDArray, y: NDArray) -> NDArray:
    """A lobed outline with a hole, about 16 wide."""
    angle = np.arctan2(y - 9.5, x - 9.5)
    outline = 8 + 1.8 * np.sin(2 * angle + 1) + 1.2 * np.cos(3 * angle)
    return (np.hypot(x - 9.5, 1.25 * (y - 9.5)) < outline) & (np.hypot(x - 13, y - 8) > 1.6)


def irregular(side: int = 20) -> NDArray:
    """Part of a square grid: 164 spots one pitch apart for 20."""
    y, x = np.mgrid[0:side, 0:side].reshape(2, -1).astype(float) * 20 / side
    return np.c_[x, y][in_irregular(x, y)] * side / 20


@cache
def to_the_edge(layout: str) -> NDArray:
    """Distance of each spot from where there is no tissue."""
    x, y = np.mgrid[-5:25:0.1, -5:25:0.1].reshape(2, -1)
    box = (x > -0.5) & (x < 15) & (y > -0.5) & (y < 13 * np.sqrt(3) / 2 + 0.5)
    outside = ~(box if layout == "hexagonal" else in_irregular(x, y))
    return cKDTree(np.c_[x, y][outside]).query(LAYOUTS[layout])[0]


LAYOUTS = {"hexagonal": hexagonal(), "irregular": irregular()}


def fields(
    rng: np.random.Generator,
    positions: NDArray,
    length: float,
    n_genes: int,
    kernel: str = "gaussian",
) -> NDArray:
    """Stationary Gaussian fields with a length scale in pitches; 0 for white noise."""
    if length == 0:
        return rng.normal(size=(len(positions), n_genes))
    distance = cdist(positions, positions) / length
    covariance = np.exp(-distance if kernel == "exponential" else -(distance**2) / 2)
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0)) @ rng.normal(size=(len(positions), n_genes))


def trend(layout: str, kind: str) -> NDArray:
    """What falls from the centre to the edge, or along a line: mean 0, standard deviation 1."""
    away, edge = LAYOUTS[layout] - LAYOUTS[layout].mean(0), to_the_edge(layout)
    radius = np.hypot(*away.T)
    kinds = {"radius": radius, "radius²": radius**2, "line": away[:, 0]}
    found = {**kinds, "from the edge": edge, "rim": np.exp(-edge / 1.5)}[kind]
    return (found - found.mean()) / found.std()


class Maps(NamedTuple):
    """Scores and genes that have nothing in common but a trend; lengths relative to the tissue."""

    layout: str
    of_scores: float
    of_counts: float
    mean: float = 1000
    kernel: str = "gaussian"
    trend: str = ""
    strength: float = 0.0

    def draw(self, rng: np.random.Generator, n_genes: int) -> tuple[NDArray, NDArray, NDArray]:
        """Ranks of scores and of thinned counts, and positions, of the spots that are kept."""
        positions = LAYOUTS[self.layout]
        width = np.ptp(positions, axis=0).max()
        maps = [
            fields(rng, positions, length * width, n_genes, self.kernel)
            for length in (self.of_scores, self.of_counts)
        ]
        if self.trend:
            shared = self.strength * trend(self.layout, self.trend)[:, None]
            # As often down as up, in either.
            maps = [m + shared * rng.choice([-1, 1], n_genes) for m in maps]
            maps = [m / np.sqrt(1 + self.strength**2) for m in maps]
        return ranks_of(rng, positions, *maps, mean=self.mean)

    def share_called(self, n_genes: int, seed: int = 0) -> tuple[float, float]:
        """How many are significant at 5 % and at 1 %."""
        rng = np.random.default_rng(seed)
        scores, targets, positions = self.draw(rng, n_genes)
        p = SpatialNull.of(positions).p_values(scores, targets, rng=rng)
        return float((p <= 0.05).mean()), float((p <= 0.01).mean())


def ranks_of(
    rng: np.random.Generator,
    positions: NDArray,
    scores: NDArray,
    log_rate: NDArray,
    *,
    mean: float = 20,
) -> tuple[NDArray, NDArray, NDArray]:
    """Ranks of scores and of thinned counts, and positions, of the spots kept."""
    library_size = rng.lognormal(np.log(5000), 0.65, len(positions)).round()
    counts = rng.poisson(library_size[:, None] / 5000 * mean * np.exp(0.6 * log_rate))
    thinned = thinned_ranks(sparse.csr_matrix(counts), library_size, n_draws=3, rng=rng)
    return unit_ranks(scores[thinned.kept]), thinned.ranks, positions[thinned.kept]


def _unrelated() -> Iterator[Maps]:
    for layout in LAYOUTS:
        for length in (0, 1 / 8, 1 / 4, 1 / 2, 1):
            yield Maps(layout, length, length)
        for pair in ((1, 1), (1 / 4, 1 / 4), (1, 0), (0, 1), (1, 1 / 8), (1 / 8, 1)):
            yield Maps(layout, *pair, mean=20)
        yield Maps(layout, 1, 1, kernel="exponential")
        yield from _with_trends(layout, ("line", "radius", "radius²"))


def _with_trends(layout: str, kinds: tuple[str, ...]) -> Iterator[Maps]:
    for kind in kinds:
        for length, strength in ((1 / 8, 1), (1 / 8, 2), (1 / 4, 1), (1 / 4, 2)):
            yield Maps(layout, length, length, trend=kind, strength=strength)


UNRELATED = tuple(_unrelated())
# Not held: what follows the outline of a tissue is no function of the place that could be removed.
EDGES = tuple(maps for layout in LAYOUTS for maps in _with_trends(layout, ("from the edge", "rim")))


def power(layout: str, length: float, n_genes: int, seed: int = 0) -> tuple[float, float]:
    """How many genes of 20 counts a spot are significant at 5 % and 1 % by their true rates."""
    rng, positions = np.random.default_rng(seed), LAYOUTS[layout]
    log_rate = fields(rng, positions, length * np.ptp(positions, axis=0).max(), n_genes)
    scores, targets, kept = ranks_of(rng, positions, log_rate, log_rate)
    p = SpatialNull.of(kept).p_values(scores, targets, rng=rng)
    return float((p <= 0.05).mean()), float((p <= 0.01).mean())


def null(quick: bool) -> pd.DataFrame:
    """How often unrelated maps are significant, and how often the truth is."""
    n, rows = 1000 if quick else 10_000, []
    for held, grid in ((True, UNRELATED), (False, EDGES)):
        for maps in grid:
            at_5, at_1 = maps.share_called(n)
            rows.append({**maps._asdict(), "held": held, "at 5 %": at_5, "at 1 %": at_1})
    for layout, length in product(LAYOUTS, (1 / 8, 1 / 4, 1 / 2, 1)):
        at_5, at_1 = power(layout, length, n // 4)
        print(f"true rates, {layout}, length {length:g}: {at_5:.1%} and {at_1:.1%}")
    table = pd.DataFrame(rows)
    print(f"worst: {table.groupby('held')[['at 5 %', 'at 1 %']].max()}")
    return table


class Table(NamedTuple):
    """A score's table of sections by genes; standard deviations of what it is the sum of."""

    sections: tuple[int, ...]  # of each patient
    patient: float
    section: float
    gene: float
    noise: float
    missing: float = 0.0

    def covered(self, n_tables: int, seed: int = 0, n_genes: int = 50) -> float:
        """Share of the 95 % intervals that hold the truth, 0."""
        rng, of = np.random.default_rng(seed), np.repeat(range(len(self.sections)), self.sections)
        shape = n_tables, len(of), n_genes
        values = rng.normal(0, self.noise, shape) + rng.normal(0, self.gene, (n_tables, 1, n_genes))
        values += rng.normal(0, self.patient, (n_tables, len(self.sections), 1))[:, of]
        values += rng.normal(0, self.section, (n_tables, len(of), 1))
        values[rng.random(shape) < self.missing] = np.nan
        found = mean_intervals(values, patient=of)
        return float(((found.low <= 0) & (found.high >= 0)).mean())


ALIKE = (*((1,) * n for n in (2, 3, 4, 5, 8, 12)), (2, 2), (2, 2, 2), (2, 2, 2, 2))
UNLIKE = ((3, 2), (4, 1, 1), (3, 1, 1, 1), (6, 1, 1, 1, 1, 1))
# Where sections vary more than genes, as much, less and not at all.
PARTS = (
    *((1, 0, 0.1, 0.1), (1, 0, 1, 1), (0.3, 0.3, 1, 1), (0.1, 0.1, 1, 0.3)),
    *((0, 1, 0.1, 1), (0, 0, 1, 0.2), (0, 0, 0.1, 1)),
)
TABLES = tuple(
    Table(sections, *parts, missing=0.3 * (number % 2))
    for sections in (*ALIKE, *UNLIKE)
    for number, parts in enumerate(PARTS)
)


def intervals(quick: bool) -> pd.DataFrame:
    """How many 95 % intervals of a mean over sections and genes hold the truth."""
    rows = [{**t._asdict(), "covered": t.covered(500 if quick else 5000)} for t in TABLES]
    table = pd.DataFrame(rows)
    print(table.groupby(table["sections"].isin(ALIKE))["covered"].agg(["min", "max", "mean"]))
    return table


class Depths(NamedTuple):
    """Counts of genes without signal, and scores that are the depth of spots."""

    n_spots: int
    spread: float  # standard deviation of log depth
    dispersion: float  # variance of the rates beyond depth, relative to their square
    mean: float  # counts a spot

    @property
    def depth(self) -> NDArray:
        """Library sizes at the quantiles of a lognormal distribution."""
        quantiles = (np.arange(self.n_spots) + 0.5) / self.n_spots
        return np.ceil(5000 * np.exp(self.spread * norm.ppf(quantiles)))

    @property
    def first_order(self) -> float:
        """The bias of lift by the covariance of its numerator and its denominator."""
        share = self.depth / self.depth.sum()
        above_less = 2 * np.cumsum(share) - share - 1
        return float(-self.dispersion * (above_less * share**2).sum())

    def bias(self, n_values: int, seed: int = 0) -> tuple[float, float]:
        """Of lift, with its standard error."""
        rng, depth = np.random.default_rng([seed, self.n_spots]), self.depth
        rate = np.outer(depth / depth.mean() * self.mean, np.ones(n_values // self.n_spots))
        if self.dispersion:
            rate = rate * rng.gamma(1 / self.dispersion, self.dispersion, size=rate.shape)
        counts = rng.poisson(rate)
        scores = np.broadcast_to(np.log(depth)[:, None], counts.shape)
        spots = {"section": np.zeros(self.n_spots), "library_size": depth}
        found = np.nan_to_num(lift(scores, counts, **spots)[0])
        # Without its denominator lift has no bias: what the denominator does is left.
        found = found * (1 - counts.sum(0) / (self.mean * self.n_spots))
        return float(found.mean()), float(found.std() / np.sqrt(len(found)))


DEPTHS = tuple(
    Depths(*keys)
    for keys in product((50, 200, 1000), (0.4, 0.65, 0.9, 1.2), (0, 1, 5), (0.1, 1, 20))
)


def lift_without_signal(quick: bool) -> pd.DataFrame:
    """How far from 0 lift is of genes without signal, where scores are the depth."""
    rows = []
    for of in DEPTHS:
        bias, error = of.bias(400_000 if quick else 4_000_000)
        rows.append({**of._asdict(), "first order": of.first_order, "bias": bias, "error": error})
    table = pd.DataFrame(rows)
    print(table.pivot_table("bias", ["n_spots", "spread"], "dispersion", aggfunc="min"))
    return table


class Rates(NamedTuple):
    """Genes of a section whose rates are known: of a lognormal, or of two values."""

    n_spots: int
    spread: float  # standard deviation of log rate, or the factor between the two values
    share: float = 0.0  # of spots that have the higher value

    def draw(self, rng: np.random.Generator, n_genes: int) -> tuple[NDArray, NDArray]:
        """Library sizes, and rates relative to the mean; ``n_genes`` of each of `MEANS`."""
        shape = self.n_spots, n_genes * len(MEANS)
        if self.share:
            rates = np.where(rng.random(shape) < self.share, self.spread, 1.0)
        else:
            rates = np.exp(self.spread * rng.normal(size=shape))
        depth = rng.lognormal(np.log(5000), 0.65, self.n_spots).round()
        return depth, rates / rates.mean(0) * np.repeat(MEANS, n_genes) / depth.mean()

    def errors(self, n_genes: int, seed: int = 0, n_repeats: int = 10) -> NDArray:
        """Ceilings less what the true rates score: ``[3, n_means, n_genes]``."""
        rng = np.random.default_rng(seed)
        depth, rates = self.draw(rng, n_genes)
        spots = {"section": np.zeros(self.n_spots), "library_size": depth}
        truth = np.zeros((3, rates.shape[1]))
        for _ in range(n_repeats):
            counts = sparse.csr_matrix(rng.poisson(depth[:, None] * rates))
            # Of rates that are all the same the truth orders nothing.
            truth += np.nan_to_num(
                [
                    spearman(rates, counts, **spots)[0],
                    pearson(np.log1p(1e4 * rates), counts, **spots)[0],
                    depth_matched_spearman(rates, counts, **spots, n_draws=2)[0],
                ]
            )
        found = np.stack([values[0] for values in noise_ceiling(counts, **spots, seed=seed)])
        return np.asarray((found - truth / n_repeats).reshape(3, len(MEANS), n_genes))


MEANS = (0.1, 0.3, 1, 3, 10, 50)
KNOWN_RATES = tuple(
    Rates(n_spots, *kind)
    for n_spots in (180, 700)
    for kind in (
        *((0.0,), (0.2,), (0.5,), (1.0,), (1.5,)),
        *product((2, 5, 20), (0.1, 0.3, 0.5)),
    )
)


def ceilings(quick: bool) -> pd.DataFrame:
    """How far the ceiling is from what the true rates score, mean over genes."""
    rows = []
    for of in KNOWN_RATES:
        bias = np.nanmean(of.errors(10 if quick else 120), axis=2).T
        named = [dict(zip(Ceiling._fields, values, strict=True)) for values in bias]
        rows += [{**of._asdict(), "mean": m, **n} for m, n in zip(MEANS, named, strict=True)]
    table = pd.DataFrame(rows)
    kind = np.select([table["share"] > 0, table["spread"] > 0], ["two values", "smooth"], "flat")
    print(table.groupby(kind)[list(Ceiling._fields)].agg(["min", "max", "mean"]).T)
    return table


RATES: dict[str, Callable[[bool], pd.DataFrame]] = {
    "null": null,
    "intervals": intervals,
    "lift": lift_without_signal,
    "ceilings": ceilings,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", nargs="*", choices=[*RATES, []], default=[])
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    for name in given.what or RATES:
        print(f"\n{name}")
        print(RATES[name](given.quick).to_string(float_format="{:.4f}".format), flush=True)


if __name__ == "__main__":
    main()
