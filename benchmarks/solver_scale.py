"""Simulated cohorts of any size for solver.py: cost of an iteration, scaling, and the GPU."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from solver_sides import Side, Task, exact, exact_cv, measure

from strank.linear.data import Rows, gather
from strank.linear.design import Design
from strank.linear.objective import Problem, value_and_gradient
from strank.linear.solver import STEPS_KEPT, Optimum, _Search, minimise

SECTIONS = 10
PENALTY = 300.0
# What the features have in common, and the deviation of the true scores.
RANK, SIGNAL = 20, 0.7
# Elements of a block of scores when counts are drawn; rows of the products that are timed.
_DRAW, _ROWS = 4_000_000, 20_000


def simulate(
    spots: int, features: int, genes: int, *, sections: int = SECTIONS, device: str = "cpu"
) -> Task:
    """Features of low rank and skewed, plus noise; Poisson counts of known weights, 0.1 a spot.

    Scores and counts are drawn block by block; a tenth of the counts is not 0.
    """
    torch.manual_seed(0)
    loadings = torch.randn(RANK, features, device=device)
    weights = torch.randn(features, genes, device=device)
    weights *= SIGNAL / ((loadings @ weights).square().sum(0) + weights.square().sum(0)).sqrt()
    level = 0.1 * torch.randn(genes, device=device).mul(0.7).exp()
    depth = torch.randn(spots, device=device).mul(0.4).exp()
    values = torch.empty(spots, features, device=device)
    parts = []
    for rows in torch.arange(spots).split(max(1, _DRAW // max(genes, features))):
        block = values[rows[0] : rows[-1] + 1]
        block.normal_()
        # Skewed, as features of tissue are: with normal ones 4 evaluations do, not 11.
        common = torch.empty(len(rows), RANK, device=device).exponential_().sub_(1)
        block.addmm_(common, loadings)
        rates = (block @ weights).exp_().mul_(level).mul_(depth[rows[0] : rows[-1] + 1, None])
        parts.append(sparse.csr_matrix(torch.poisson(rates).cpu().numpy()))
    codes = np.arange(spots, dtype=np.int64) * sections // spots
    library_size = 1e4 * depth.double().cpu().numpy()
    held = values if values.is_cuda else values.numpy()
    return Task(held, sparse.vstack(parts, "csr"), codes, library_size, PENALTY)


def prepare(task: Task) -> Problem:
    """All genes of a task as the solver has them, in one block."""
    data = gather(task.features, task.counts, task.section, np.log(task.library_size))
    design = Design(data, max_memory=16.0)
    n_genes = task.counts.shape[1]
    block = design.block(slice(0, n_genes), task.counts)
    assert block.genes == slice(0, n_genes)
    penalty = torch.full((n_genes,), task.penalty, dtype=torch.float64)
    return design.training(block, penalty)


def products(n: int, p: int, g: int, dtype: torch.dtype, device: str = "cpu") -> Callable[[], Any]:
    """Make the two products that no iteration can do without."""
    x = torch.randn(n, p, dtype=dtype, device=device)
    w = torch.randn(p, g, dtype=dtype, device=device)
    e = torch.randn(n, g, dtype=dtype, device=device)
    return lambda: (torch.mm(x, w), torch.mm(x.T, e))


def clock(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def iteration_row(spots: int, features: int, genes: int, dtype: str, repeats: int) -> dict:
    """Median milliseconds, the three taken in turns so that a busy machine slows all alike."""
    task = simulate(spots, features, genes)
    problem = prepare(task.with_features(task.features.astype(dtype)))
    now = Optimum.at(problem, torch.zeros_like(problem.xtc))
    search = _Search.begin(problem, now)
    for _ in range(STEPS_KEPT + 1):
        search.step(problem, now)
    work = {
        "products": products(spots, features, genes, problem.rows.dtype),
        "evaluate": lambda: value_and_gradient(problem, now.axes),
        "step": lambda: search.step(problem, now),
    }
    times = [[clock(each) for each in work.values()] for _ in range(repeats)]
    ms = dict(zip(work, 1e3 * np.median(times, axis=0), strict=True))
    return {
        "spots": spots,
        "features": features,
        "genes": genes,
        "precision": dtype,
        "rotated": problem.rotated,
        "GFLOP/s": 4e-6 * spots * features * genes / ms["products"],
        **{f"{name} ms": value for name, value in ms.items()},
        "evaluate x": ms["evaluate"] / ms["products"],
        "step x": ms["step"] / ms["products"],
    }


def iteration(quick: bool) -> pd.DataFrame:
    spots, widths, genes, repeats = 20_000, (512, 1024), (256, 512, 1024), 7
    if quick:
        spots, widths, genes, repeats = 2_000, (128,), (64, 128), 3
    return pd.DataFrame(
        iteration_row(spots, p, g, dtype, repeats)
        for p in widths
        for g in genes
        for dtype in ("float32", "float64")
    )


def rate(spots: int, features: int, genes: int, threads: int, repeats: int = 3) -> float:
    """FLOP/s of the products in float32, on at most so many rows."""
    spots = min(spots, _ROWS)
    torch.set_num_threads(threads)
    work = products(spots, features, genes, torch.float32)
    return 4 * spots * features * genes / min(clock(work) for _ in range(repeats))


def case(
    panel: str, spots: int, features: int, genes: int, *, threads: int, fresh: bool, **options: Any
) -> dict:
    """One fit of a simulated cohort; ``x`` is what it takes of its products alone."""
    make = functools.partial(simulate, spots, features, genes)
    found = measure(exact, make, threads=threads, fresh=fresh, **options)
    # Both precisions evaluate their starting point as well.
    evaluations = found.facts["evaluations"] + 2
    flops = rate(spots, features, genes, threads)
    floor = 4 * evaluations * spots * features * genes / flops
    return {
        "along": panel,
        "spots": spots,
        "features": features,
        "genes": genes,
        "max_memory": options.get("max_memory", 4.0),
        "seconds": found.seconds,
        "GiB": found.gib,
        "evaluations": evaluations,
        "GFLOP/s": flops / 1e9,
        "products s": floor,
        "x": found.seconds / floor,
        "not converged": found.facts["not converged"],
    }


def scaling(quick: bool, threads: int, seconds: float) -> pd.DataFrame:
    """Fits along each size, then with less and more memory, then as large as the time allows."""
    along: dict[str, Iterable[tuple[int, int, int]]] = {
        "spots": [(n, 256, 100) for n in (2_000, 6_000, 20_000, 60_000, 200_000)],
        "features": [(20_000, p, 100) for p in (64, 128, 256, 512, 1024)],
        "genes": [(20_000, 256, g) for g in (50, 100, 250, 500, 1000, 2000)],
    }
    memory, largest, most = (20_000, 1024, 1000), (1024, 1000), 200_000
    if quick:
        along = {
            "spots": [(n, 64, 20) for n in (1_000, 4_000)],
            "features": [(2_000, p, 20) for p in (32, 128)],
            "genes": [(2_000, 64, g) for g in (20, 80)],
        }
        memory, largest, most = (2_000, 128, 50), (128, 100), 10_000
    how = {"threads": threads, "fresh": not quick}
    rows = [case(panel, *size, **how) for panel, sizes in along.items() for size in sizes]
    # Copies of the features fit into 1 GiB, not into 0.25: then they are read again and again.
    for gib in (0.02, 1.0) if quick else (0.25, 1.0, 4.0):
        rows.append(case("memory", *memory, **how, max_memory=gib))
    each = rows[-1]["seconds"] / memory[0]
    spots = min(most, int(seconds / each) // 1000 * 1000)
    rows.append(case("largest", max(spots, memory[0]), *largest, **how))
    return pd.DataFrame(rows)


def primal(task: Task, form: Side) -> tuple[np.ndarray, dict]:
    """Fit by the covariance of all features, as before there were axes of few spots."""
    with patch.object(Rows, "wide", False):
        return form(task, max_memory=24.0)


def wide(quick: bool, threads: int) -> pd.DataFrame:
    """More features than spots: both forms in turns, beside as few features as spots."""
    sizes = [(100, 10_000, exact), (500, 2_048, exact), (500, 2_048, exact_cv)]
    rows = []
    for spots, features, side in [(60, 300, exact_cv)] if quick else sizes:
        how = {"threads": threads, "fresh": not quick}
        make = functools.partial(simulate, spots, features, 50)
        few = functools.partial(simulate, spots, spots, 50)
        dual, square = measure(side, make, **how), measure(side, few, **how)
        other = measure(primal, make, form=side, **how)
        scale = np.abs(other.weights).max()
        rows.append(
            {
                "side": side.__name__,
                "spots": spots,
                "features": features,
                "square s": square.seconds,
                "seconds": dual.seconds,
                "GiB": dual.gib,
                "primal s": other.seconds,
                "primal GiB": other.gib,
                "times faster": other.seconds / dual.seconds,
                "difference": np.abs(dual.weights - other.weights).max() / scale,
            }
        )
    return pd.DataFrame(rows)


def slopes(table: pd.DataFrame) -> pd.Series:
    """Exponent of each size in the seconds: over all of its range, and of its last step."""
    found = {}
    for size in ("spots", "features", "genes"):
        x, y = (np.log(table.loc[table["along"] == size, name]) for name in (size, "seconds"))
        found[size] = np.polyfit(x, y, 1)[0]
        found[f"{size}, last step"] = np.diff(y)[-1] / np.diff(x)[-1]
    return pd.Series(found, name="slope")


def on_paper(table: pd.DataFrame, spots: int, features: int, genes: int) -> str:
    """What a size would take that was not run, at the rate and ratio of the largest that was.

    Where the features do not fit into the memory given, the ratio is that of the least memory.
    """
    largest, low = (table[table["along"] == along].iloc[0] for along in ("largest", "memory"))
    flop = 4 * largest["evaluations"] * spots * features * genes
    products_s = flop / (1e9 * largest["GFLOP/s"])
    return (
        f"on paper, {spots:,} x {features:,} x {genes:,}: {largest['evaluations']:.0f} evaluations "
        f"x 4 x n x p x g = {flop / 1e12:.1f} TFLOP at {largest['GFLOP/s']:.0f} GFLOP/s = "
        f"{products_s:.0f} s, times {largest['x']:.1f} = {products_s * largest['x']:.0f} s; "
        f"features read again and again, times {low['x']:.1f} = {products_s * low['x']:.0f} s"
    )


def draw(table: pd.DataFrame, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    slope = slopes(table)
    for panel, size in zip(panels, ("spots", "features", "genes"), strict=True):
        part = table[table["along"] == size]
        others = [name for name in ("spots", "features", "genes") if name != size]
        panel.loglog(part[size], part["seconds"], "o-", label="exact solver")
        panel.loglog(part[size], part["products s"], "--", color="grey", label="its products alone")
        fixed = ", ".join(f"{part[name].iloc[0]:,} {name}" for name in others)
        panel.set(xlabel=size, title=f"{fixed}\nslope {slope[size]:.2f}")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("seconds")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def gpu(quick: bool, device: str = "cuda") -> pd.DataFrame:
    """All on the GPU: the whole fit, the solver alone, and the products of as many evaluations.

    The rest of the fit reads and sorts the counts, which are on the CPU.
    """
    spots, features, genes, sections = 100_000, 1024, 5_000, 50
    if quick:
        spots, features, genes, sections = 5_000, 256, 200, 5
    task, gib = simulate(spots, features, genes, sections=sections, device=device), 8.0
    exact(simulate(500, 32, 10, device=device), max_memory=gib)
    cuda = device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds, facts = math.inf, {}
    for _ in range(3):
        start = time.perf_counter()
        facts = exact(task, max_memory=gib)[1]
        seconds = min(seconds, time.perf_counter() - start)
    used = (torch.cuda.max_memory_allocated() - before) / 2**30 if cuda else math.nan
    problem = prepare(task)
    alone = min(
        clock(lambda: minimise(problem, tolerance=1e-5, max_iterations=500)) for _ in range(3)
    )
    work = products(spots, features, genes, torch.float32, device)
    floor = min(clock(work) for _ in range(5)) * (facts["evaluations"] + 2)
    row = {
        "device": torch.cuda.get_device_name() if cuda else device,
        "spots": spots,
        "features": features,
        "genes": genes,
        "seconds": seconds,
        "solver s": alone,
        "GiB": used,
        "evaluations": facts["evaluations"] + 2,
        "products s": floor,
        "x": seconds / floor,
        "solver x": alone / floor,
        "not converged": facts["not converged"],
    }
    return pd.DataFrame([row])
