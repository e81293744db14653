"""Run the study cell by cell, and turn what came out into tables, figures and a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
from joblib import cpu_count

from strank.errors import InputError
from strank.files import (
    claim_folder,
    claims,
    output_folder,
    read_json,
    read_written,
    write_table,
)
from strank.progress import progress
from strank.simulate.curves import CurveDesign
from strank.storage import is_whole
from strank.studies.synthetic.cells import CellResult, CurveCell, CurveRecipe, run_curve_cell
from strank.studies.synthetic.objectives import COMPARED, LISTS, PUBLISHED_CENTRE
from strank.studies.synthetic.tables import Scores, sweep_table, table1, table3
from strank.units import each
from strank.version import __version__
from strank.where import Where

_MOST_JOBS = 8
_DIGITS = "%.6g"
_SAMPLINGS = ("uniform", "imbalanced")
_EXACT = ("list", "mse", "poisson")
_SWEPT = ("mse", "poisson", "rank", "pcc", "section-pcc", "pair", "list")
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
_QUICK = CurveRecipe(steps=300, learning_rate=3e-3, checks=2)
_SWEEP = CurveRecipe(steps=1000, checks=3)


@dataclass(frozen=True)
class StudyResult:
    """What `synthetic` found."""

    #: Mean SCC against the truth, beside the paper's.
    table1: pd.DataFrame
    #: The same by list size.
    table3: pd.DataFrame
    #: And by scale, bias, dispersion, sample size, sparsity and depth.
    sweeps: pd.DataFrame
    #: Where to read it all; `None` where matplotlib is absent, and nothing can be drawn.
    page: Path | None


def plan(*, quick: bool = False, n_seeds: int = 3) -> list[CurveCell]:
    """List the cells of the study.

    Examples
    --------
    >>> len(plan()), len(plan(quick=True))
    (28, 5)
    """
    cells = _tables(COMPARED, _EXACT, quick=quick, n_seeds=n_seeds)
    sweep = {"n_seeds": min(n_seeds, 2), "recipe": _QUICK if quick else _SWEEP}
    sweeps = {"kept": (0.1,)} if quick else {"base": (1.0,)} | _SWEEPS
    for factor, values in sweeps.items():
        for value in values:
            cells += _sweep_cells(factor, value, sweep)
    return cells


def _tables(
    objectives: tuple[str, ...], exact: tuple[str, ...], *, quick: bool, n_seeds: int
) -> list[CurveCell]:
    recipe = _QUICK if quick else CurveRecipe()
    common: dict[str, Any] = {"n_seeds": n_seeds, "recipe": recipe}
    designs = [CurveDesign(sampling) for sampling in _SAMPLINGS]
    lists = ("list_2", "list_16") if quick else tuple(LISTS)
    cells = [CurveCell("table1", design, objectives, exact, **common) for design in designs]
    return cells + [CurveCell("table3", design, lists, **common) for design in designs]


def list_size_plan(*, quick: bool = False, n_seeds: int = 3) -> list[CurveCell]:
    """List the cells of table 3 alone; its largest lists are whole sections."""
    return _tables(("list",), (), quick=quick, n_seeds=n_seeds)


def _sweep_cells(factor: str, value: float, options: dict[str, Any]) -> list[CurveCell]:
    """Cells of one value; depth with and without correction."""
    design = CurveDesign("imbalanced")
    if factor != "base":
        changed: dict[str, Any] = {factor: int(value) if factor == "n_spots" else value}
        design = dataclasses.replace(design, **changed)
    told = (True, False) if factor == "depth_spread" else (True,)
    exact = _EXACT if factor == "centre" else ("list",)
    return [
        CurveCell("sweep", design, _SWEPT, exact, factor, value, corrected, **options)
        for corrected in told
    ]


@claims("output")
def synthetic(
    output: Path | str,
    *,
    quick: bool = False,
    seeds: int | None = None,
    seed: int = 0,
    jobs: int | None = None,
    dask: str | None = None,
    verbose: bool = False,
) -> StudyResult:
    """Repeat the paper's synthetic study: objectives on curves of known truth.

    Table 1, the list sizes of table 3, and sweeps of scale, bias, dispersion, sample size, sparsity
    and depth, beside the paper's numbers and the exact optimum: about 15 minutes on two cores.

    Parameters
    ----------
    output
        Folder of the study: tables, figures and ``index.html``. One that was stopped goes on.
    quick
        A short look, in about a minute.
    seeds
        Data sets of each function, at least 2; if ``None`` 3, or 2 if quick.
    seed
        Of data, weights and batches.
    jobs
        Processes, one thread and up to 2 GB each; of all cores, up to 8, if ``None``.
    dask
        Scheduler whose workers are used instead, its address or ``.json``.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    StudyResult
        ``table1``, ``table3``, ``sweeps`` and ``page``.

    Raises
    ------
    InputError
        For fewer than two seeds, and a folder of another study.

    Examples
    --------
    >>> synthetic("out", seeds=1)
    Traceback (most recent call last):
    ...
    strank.errors.InputError: `seeds` must be at least 2, or there is no spread; got 1
    """
    n_seeds, folder = check_seeds(seeds, quick), Path(output)
    cells = plan(quick=quick, n_seeds=n_seeds)
    facts = {"version": __version__, "seed": seed, "seeds": n_seeds, "quick": quick}
    facts["cells"] = [dataclasses.asdict(cell) | {"name": cell.name} for cell in cells]
    claim_folder(folder, facts, kind="study")
    usual = min(cpu_count(), _MOST_JOBS) if dask is None else 1
    where = Where(jobs or usual, dask)
    scores = run_cells(folder, cells, seed, where, bar=partial(progress, hidden=not verbose))
    return _write_results(folder, cells, scores)


def check_seeds(seeds: int | None, quick: bool) -> int:
    """How many data sets of each function; a single one is refused."""
    if seeds is not None and seeds < 2:
        raise InputError(f"`seeds` must be at least 2, or there is no spread; got {seeds}")
    return seeds or (2 if quick else 3)


def run_cells(
    folder: Path,
    cells: Sequence[CurveCell],
    seed: int,
    where: Where,
    *,
    bar: Callable[[str, int], Any],
) -> Scores:
    """Run what is missing in the folder, and read all scores."""
    output_folder(folder / "cells")
    left = [cell for cell in cells if not _is_done(folder, cell)]
    with bar("Training (thousand steps)", sum(cell.work for cell in left)) as advance:
        for cell, result in _run(left, seed, where):
            if cell.study == "table1":
                write_table(
                    _path(folder, cell, "curves"), result.curves, seal=True, float_format=_DIGITS
                )
            # Written last: where it is, the cell is done.
            _keep(_path(folder, cell), result.scores)
            advance(cell.work)
    return Scores(pd.concat([read_written(_path(folder, cell), sealed=True) for cell in cells]))


def _run(cells: list[CurveCell], seed: int, where: Where) -> Iterator[tuple[CurveCell, CellResult]]:
    """Run cells side by side, longest first; up to 2 GB of memory each."""
    where = dataclasses.replace(where, jobs=min(where.jobs, max(len(cells), 1)))
    yield from each(partial(_labelled, seed), sorted(cells, key=lambda cell: -cell.work), where)


def _labelled(seed: int, cell: CurveCell) -> tuple[CurveCell, CellResult]:
    return cell, run_curve_cell(cell, seed=seed)


def _write_results(folder: Path, cells: list[CurveCell], scores: Scores) -> StudyResult:
    tables = {"table1": table1(scores), "table3": table3(scores), "sweeps": sweep_table(scores)}
    for name, table in tables.items():
        write_table(folder / f"{name}.csv", table, float_format=_DIGITS)
    return StudyResult(**tables, page=_page(folder, cells, tables))


def _page(folder: Path, cells: list[CurveCell], tables: dict[str, pd.DataFrame]) -> Path | None:
    """Draw what there is, where pictures can be drawn; tables need no more than the core."""
    if find_spec("matplotlib") is None:
        return None
    from strank.studies.synthetic.page import write_page

    curves = {
        cell.design.sampling: read_written(_path(folder, cell, "curves"), sealed=True)
        for cell in cells
        if cell.study == "table1"
    }
    write_page(folder, tables, curves, read_json(folder / "study.json"))
    return folder / "index.html"


def _keep(path: Path, table: pd.DataFrame) -> None:
    write_table(path, table, seal=True, float_format=_DIGITS)


def _is_done(folder: Path, cell: CurveCell) -> bool:
    kinds = ("scores", "curves") if cell.study == "table1" else ("scores",)
    return all(is_whole(_path(folder, cell, kind)) for kind in kinds)


def _path(folder: Path, cell: CurveCell, kind: str = "scores") -> Path:
    return folder / "cells" / f"{cell.name}-{kind}.csv"
