"""Two benchmarks of every task, as published and without leaks, run under one bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from strank.errors import InputError
from strank.evaluation.protocol import Protocol
from strank.files import read_json, read_written, write_table
from strank.progress import Advance
from strank.storage import is_whole
from strank.studies.benchmark.grid import Grid, Task
from strank.studies.benchmark.runner import run_benchmark
from strank.studies.reproduce.tables import read_leak_free, read_published, task_table
from strank.where import Where

# What a benchmark says of itself that is told here.
_SAID = ("folds", "methods", "seeds", "warnings", "notes", "failed", "seconds")
BenchPart = Literal["published", "leak-free"]


@dataclass(frozen=True)
class Bench:
    """One of the two benchmarks of a task."""

    name: str  # of the task
    what: str  # what errors call it
    part: BenchPart
    protocol: Protocol
    grid: Grid  # one encoder, one size of the panel
    cohort: Path
    folder: Path  # of the task
    patients: Mapping[str, str]
    paper: Mapping[str, float]  # SCC that the paper prints, of each loss

    @property
    def out(self) -> Path:
        """Folder of the benchmark."""
        return self.folder / self.part

    @property
    def table(self) -> Path:
        """Where it is, all is done."""
        return self.folder / f"{self.part}.csv"

    @property
    def work(self) -> int:
        """Count the cells that are not done, and the folds that are to be scored."""
        if is_whole(self.table):
            return 0
        folds = self.protocol.make_folds(self.patients)
        [encoder], [n_genes] = self.grid.encoders, self.grid.n_genes
        cells = self.grid.cells(Task(encoder, n_genes, fold) for fold in folds)
        return len(folds) + sum(not is_whole(cell.path(self.out)) for cell in cells)

    def run(self, where: Where, advance: Advance) -> pd.DataFrame:
        """Run what is not done, and read what was found."""
        if is_whole(self.table):
            return read_written(self.table, sealed=True)
        bar, how = partial(_shared_bar, advance), (self.cohort, self.protocol, self.grid, self.out)
        try:
            facts = run_benchmark(*how, where=where, bar=bar)
        except InputError as error:
            raise InputError(f"{self.what}, {self.part}: {error}") from error
        table = (read_published if self.part == "published" else read_leak_free)(self.out)
        if not facts["failed"]:
            write_table(self.table, table, seal=True)
        return table


@contextmanager
def _shared_bar(advance: Advance, what: str, total: int) -> Iterator[Advance]:
    """Let a benchmark move the bar of all."""
    yield advance if what in ("Fitting", "Scoring") else lambda _: None


def compare(
    benches: Sequence[Bench],
    about: Mapping[str, dict[str, Any]],
    where: Where,
    bar: Callable[[str, int], Any],
) -> pd.DataFrame:
    """Run all benchmarks under one bar; what each of them says of itself is added to the facts."""
    found: dict[tuple[str, str], pd.DataFrame] = {}
    with bar("Fitting and scoring", sum(bench.work for bench in benches)) as advance:
        for bench in benches:
            found[bench.name, bench.part] = bench.run(where, advance)
    for bench in benches:
        said = read_json(bench.out / "benchmark.json")
        about[bench.name][bench.part] = {key: said[key] for key in _SAID}
    tables = []
    for bench in benches:
        if bench.part == "published":
            both = found[bench.name, "published"], found.get((bench.name, "leak-free"))
            tables.append(task_table(bench.name, bench.paper, *both, bench.grid))
    return pd.concat(tables, ignore_index=True)
