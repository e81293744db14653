"""Run the study cell by cell, and turn what came out into tables, figures and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from joblib import Parallel, cpu_count, delayed, parallel_config

from strank.errors import InputError
from strank.files import atomic_path, output_folder, read_json, write_json
from strank.simulate.curves import CurveDesign
from strank.studies.synthetic.cells import Cell, CellResult, Recipe, run_cell
from strank.studies.synthetic.objectives import LIST_SIZES, OBJECTIVES, PUBLISHED_CENTRE
from strank.studies.synthetic.page import write_page
from strank.studies.synthetic.tables import Scores, findings, sweep_table, table1, table3
from strank.version import __version__

__all__ = ["StudyResult", "plan", "run_study"]

_MOST_JOBS = 8
_SAMPLINGS = ("uniform", "imbalanced")
_EXACT = ("list", "mse", "poisson")
_SWEPT = ("mse", "poisson", "rank_margin", "pcc", "pcc_section", "pair", "list")
# The middle of every sweep is the paper's own setting, run once.
_SWEEPS: dict[str, tuple[float, ...]] = {
    "centre": (0.1, PUBLISHED_CENTRE, 0.6, 0.9),
    "scale": (1, 3, 30),
    "bias": (0, 3, 30),
    "size": (1, 10, 1000),
    "n_spots": (500, 5000),
    "kept": (0.01, 0.03, 0.1, 0.3),
    "depth_spread": (0.5, 1.0),
}
_QUICK = Recipe(steps=300, learning_rate=3e-3, checks=2)
_SWEEP = Recipe(steps=1000, checks=3)


@dataclass(frozen=True)
class StudyResult:
    """What the study found.

    Attributes
    ----------
    table1, table3, sweeps
        Mean SCC beside the paper's.
    findings
        In plain words.
    page
        Where to read it all.
    """

    table1: pd.DataFrame
    table3: pd.DataFrame
    sweeps: pd.DataFrame
    findings: list[str]
    page: Path


def plan(*, quick: bool = False, n_seeds: int = 3) -> list[Cell]:
    """List the cells of the study.

    Parameters
    ----------
    quick
        Table 1 with few steps, two list sizes and one sweep.
    n_seeds
        Data sets of each function; sweeps have two at most.

    Examples
    --------
    >>> len(plan()), len(plan(quick=True))
    (28, 5)
    """
    recipe = _QUICK if quick else Recipe()
    common: dict[str, Any] = {"n_seeds": n_seeds, "recipe": recipe}
    designs = [CurveDesign(sampling) for sampling in _SAMPLINGS]
    sizes = (2, 16) if quick else LIST_SIZES
    lists = tuple(f"list_{size}" for size in sizes)
    cells = [Cell("table1", design, tuple(OBJECTIVES), _EXACT, **common) for design in designs]
    cells += [Cell("table3", design, lists, **common) for design in designs]
    sweep = {"n_seeds": min(n_seeds, 2), "recipe": _QUICK if quick else _SWEEP}
    sweeps = {"kept": (0.1,)} if quick else {"base": (1.0,)} | _SWEEPS
    for factor, values in sweeps.items():
        for value in values:
            cells += _sweep_cells(factor, value, sweep)
    return cells


def _sweep_cells(factor: str, value: float, options: dict[str, Any]) -> list[Cell]:
    """Cells of one value; depth with and without correction."""
    design = CurveDesign("imbalanced")
    if factor != "base":
        changed: dict[str, Any] = {factor: int(value) if factor == "n_spots" else value}
        design = dataclasses.replace(design, **changed)
    told = (True, False) if factor == "depth_spread" else (True,)
    exact = _EXACT if factor == "centre" else ("list",)
    return [
        Cell("sweep", design, _SWEPT, exact, factor, value, corrected, **options)
        for corrected in told
    ]


def run_study(
    folder: Path,
    *,
    quick: bool = False,
    n_seeds: int = 3,
    seed: int = 0,
    progress: Callable[[int], Callable[[int], object]] = lambda _: lambda _: None,
) -> StudyResult:
    """Run what is missing in the folder, then write tables, figures, text and page.

    Parameters
    ----------
    folder
        Holds one file a finished cell: a stopped study continues.
    quick
        A short look instead of the study.
    n_seeds
        Data sets of each function, at least 2.
    seed
        Of data, first weights and batches.
    progress
        Called with the work left, in thousand steps; returns what advances it.

    Raises
    ------
    InputError
        For fewer than two seeds, and a folder that holds a study of other settings or anything
        else.
    """
    if n_seeds < 2:
        raise InputError(f"--seeds must be at least 2, or there is no spread; got {n_seeds}")
    cells = plan(quick=quick, n_seeds=n_seeds)
    _claim(folder, {"version": __version__, "seed": seed, "seeds": n_seeds, "quick": quick}, cells)
    left = [cell for cell in cells if not _path(folder, cell).exists()]
    advance = progress(sum(cell.work for cell in left))
    for cell, result in _run(left, seed):
        if cell.study == "table1":
            _write_csv(_path(folder, cell, "curves"), result.curves)
        # Written last: where it is, the cell is done.
        _write_csv(_path(folder, cell), result.scores)
        advance(cell.work)
    return _write_results(folder, cells)


def _run(cells: list[Cell], seed: int) -> Iterator[tuple[Cell, CellResult]]:
    """Run cells side by side, one core each, longest first; up to 2 GB of memory each."""

    def work(cell: Cell) -> tuple[Cell, CellResult]:
        return cell, run_cell(cell, seed=seed)

    ordered = sorted(cells, key=lambda cell: -cell.work)
    # Threads inside a cell would wait for each other wherever the cores are shared.
    with parallel_config(backend="loky", inner_max_num_threads=1):
        jobs = min(cpu_count(), _MOST_JOBS, max(len(cells), 1))
        parallel = Parallel(n_jobs=jobs, return_as="generator_unordered")
        yield from parallel(delayed(work)(cell) for cell in ordered)


def _write_results(folder: Path, cells: list[Cell]) -> StudyResult:
    scores = Scores(pd.concat([pd.read_csv(_path(folder, cell)) for cell in cells]))
    result = StudyResult(
        table1(scores),
        table3(scores),
        sweep_table(scores),
        findings(scores),
        folder / "index.html",
    )
    for name in ("table1", "table3", "sweeps"):
        _write_csv(folder / f"{name}.csv", getattr(result, name))
    with atomic_path(folder / "findings.txt") as part:
        part.write_text("\n\n".join(result.findings) + "\n")
    curves = {
        cell.design.sampling: pd.read_csv(_path(folder, cell, "curves"))
        for cell in cells
        if cell.study == "table1"
    }
    write_page(
        folder,
        {name: getattr(result, name) for name in ("table1", "table3", "sweeps")},
        curves,
        result.findings,
        read_json(folder / "study.json"),
    )
    return result


def _path(folder: Path, cell: Cell, kind: str = "scores") -> Path:
    return folder / "cells" / f"{cell.name}-{kind}.csv"


def _write_csv(path: Path, table: pd.DataFrame) -> None:
    with atomic_path(path) as part:
        table.to_csv(part, index=False, float_format="%.6g")


def _claim(folder: Path, settings: dict[str, Any], cells: list[Cell]) -> None:
    """Make the folder this study's, or make sure that it is."""
    settings |= {"cells": [dataclasses.asdict(cell) | {"name": cell.name} for cell in cells]}
    about = folder / "study.json"
    if folder.exists() and any(folder.iterdir()):
        if not about.exists():
            raise InputError(f"{folder}: not empty, and not a study; choose another -o")
        found = read_json(about)
        different = [name for name in settings if found.get(name) != _as_json(settings[name])]
        if different:
            raise InputError(
                f"{folder}: holds a study with other {', '.join(different)}; choose another -o"
            )
    output_folder(folder / "cells")
    write_json(about, _as_json(settings))


def _as_json(values: Any) -> Any:
    """Turn into what reading it back gives: NaN is null, tuples are lists."""
    if isinstance(values, dict):
        return {name: _as_json(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_as_json(value) for value in values]
    return None if isinstance(values, float) and values != values else values
