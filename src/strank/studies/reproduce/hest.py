"""Table 2 of the paper: seven losses on seven tasks of HEST, and what is better beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from strank.cohort.store import count_spots
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.embedding import embed
from strank.errors import InputError
from strank.evaluation.paper_tasks import PAPER_TASKS, PaperTask
from strank.evaluation.protocol import PRESETS, Protocol
from strank.files import atomic_path, claim_folder, read_json, write_json
from strank.fitting.method import Method
from strank.progress import Advance, progress
from strank.studies.benchmark.runner import Grid, Task, run_benchmark
from strank.studies.reproduce.page import write_hest_page
from strank.studies.reproduce.tables import (
    read_leak_free,
    read_published,
    task_table,
    write_hest_tables,
)
from strank.studies.reproduce.task_data import (
    import_task,
    needed_encoder,
    paper_tasks,
    sample_bytes,
    task_facts,
    task_samples,
    unknown_patients,
)
from strank.version import __version__

# What a benchmark says of itself that is told here.
_SAID = ("folds", "methods", "seeds", "warnings", "notes", "failed", "seconds")
# Of a task with more patients; for a first look the first of so many.
_FOLDS, _FOLDS_QUICK = 5, 3
_NETWORKS = ("mlp", "mlp+linear")
_QUICK = (
    "A first look, not the study: one seed, few epochs, one network, and without leaks one split "
    "by patient."
)


@dataclass(frozen=True)
class HestReproduction:
    """What `hest` found."""

    #: A row a task and method: the paper's number, ours, and the leak-free scores with intervals.
    table: pd.DataFrame
    #: As in ``reproduction.json``.
    facts: dict[str, Any]
    #: Where to read it all.
    page: Path


@dataclass(frozen=True)
class _Bench:
    """One of the two benchmarks of a task."""

    task: PaperTask
    part: Literal["published", "leak-free"]
    protocol: Protocol
    grid: Grid
    folder: Path  # of the task

    @property
    def out(self) -> Path:
        return self.folder / self.part

    @property
    def table(self) -> Path:
        """Where it is, all is done."""
        return self.folder / f"{self.part}.csv"

    def work(self, patients: Mapping[str, str]) -> int:
        """Count the cells that are not done, and the folds that are to be scored."""
        if self.table.is_file():
            return 0
        folds = self.protocol.make_folds(patients)
        [encoder], [n_genes] = self.grid.encoders, self.grid.n_genes
        cells = self.grid.cells(Task(encoder, n_genes, fold) for fold in folds)
        return len(folds) + sum(not cell.path(self.out).is_file() for cell in cells)

    def run(self, jobs: int, advance: Advance) -> pd.DataFrame:
        """Run what is not done, and read what was found."""
        if self.table.is_file():
            return pd.read_csv(self.table)
        cohort, bar = self.folder / "cohort", partial(_shared_bar, advance)
        try:
            facts = run_benchmark(cohort, self.protocol, self.grid, self.out, jobs=jobs, bar=bar)
        except InputError as error:
            raise InputError(f"task {self.task.name}, {self.part}: {error}") from error
        table = (read_published if self.part == "published" else read_leak_free)(self.out)
        if not facts["failed"]:
            with atomic_path(self.table) as part:
                table.to_csv(part, index=False)
        return table


@contextmanager
def _shared_bar(advance: Advance, what: str, total: int) -> Iterator[Advance]:
    """Let a benchmark move the bar of all."""
    yield advance if what in ("Fitting", "Scoring") else lambda _: None


def hest(
    output: Path | str,
    data: Path | str | None = None,
    *,
    tasks: Sequence[str] = tuple(PAPER_TASKS),
    encoder: str | Encoder = "conch-224",
    weights: Path | str | None = None,
    seeds: int = 3,
    library_size: bool = True,
    quick: bool = False,
    jobs: int = 1,
    say: Callable[[str], object] = lambda _: None,
    verbose: bool = False,
) -> HestReproduction:
    """Repeat Table 2 of the paper: seven losses on its seven tasks of HEST-1k.

    Samples are downloaded or taken from a folder, filtered, and embedded; the seven losses are
    trained by the published recipe and tested on the published split, beside the exact list, ridge
    and the default networks. Then the same methods are compared without the leaks of that split: by
    patient, genes chosen on training sections, scores that know nothing of depth.

    Parameters
    ----------
    output
        Folder: ``index.html``, ``table.csv``, ``table.md`` and ``reproduction.json``; for each task
        its cohort with features and two benchmarks; and ``hest``, what was downloaded. A run that
        was stopped goes on.
    data
        Folder of HEST-1k: ``st``, ``patches`` or ``wsis``, ``metadata`` and ``HEST_v*.csv``. If
        ``None``, what is needed is downloaded, without the slides.
    tasks
        Some of IDC, PRAD, PAAD, COAD, READ, ccRCC and IDC-L.
    encoder
        Whose features, as in `strank.embed`; the paper's is CONCH on patches of 224 pixels.
    weights
        File with the weights of a network of the catalogue, in place of those on the hub.
    seeds
        How many, on the published split, of what is trained step by step; one without leaks.
    library_size
        If false, every method whose likelihood knows the depth of a spot is fitted without it, too.
    quick
        A first look: one seed, few epochs, one network, and without leaks one split by patient.
    jobs
        Processes, one thread each.
    say
        Called with what a user wants to know.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    HestReproduction
        ``table``, ``facts`` and ``page``.

    Raises
    ------
    InputError
        For a sample that is absent or has other patches than HEST's, fewer genes than the panel has
        after the filter, an encoder whose weights cannot be had, too little room on the disk, and a
        folder of another run.

    Examples
    --------
    >>> hest("out", "hest_data", encoder="morphology")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: hest_data: no st/*.h5ad there and no splits/; it is neither ...
    """
    output, wanted = Path(output), paper_tasks(tasks)
    if seeds < 1:
        raise InputError(f"`seeds` must be at least 1; got {seeds}")
    made = needed_encoder(encoder, weights)
    facts: dict[str, Any] = {"strank_version": __version__, "encoder": encoder_facts(made)}
    facts |= {"seeds": 1 if quick else seeds, "library_size": library_size, "quick": quick}
    bar = partial(progress, hidden=not verbose)
    about: dict[str, Any] = {"unknown_patients": [], "tasks": {}}
    claim = partial(claim_folder, output, facts, kind="reproduction", about=about)
    if data is None:
        claim(growing={"samples": {}})
    samples = task_samples(wanted, None if data is None else Path(data), output)
    claim(growing={"samples": sample_bytes(samples)})
    about["unknown_patients"] = unknown_patients(samples)
    cohorts = [output / task.name / "cohort" for task in wanted]
    with bar("Reading samples", sum(len(task.samples) for task in wanted)) as advance:
        for task, cohort in zip(wanted, cohorts, strict=True):
            import_task(task, samples, cohort, advance, jobs=jobs)
    about["tasks"] = {
        task.name: task_facts(task, samples, cohort)
        for task, cohort in zip(wanted, cohorts, strict=True)
    }
    with bar("Embedding", sum(map(count_spots, cohorts)), unit="spots") as advance:
        for cohort in cohorts:
            embed(cohort, made, advance=advance, say=say)
    benches = [
        bench
        for task in wanted
        for bench in _benches(task, about["tasks"][task.name], output, made.name, facts)
    ]
    table = _compare(benches, about["tasks"], jobs, bar)
    told = read_json(output / "reproduction.json") | about
    write_json(output / "reproduction.json", told)
    write_hest_tables(output, table, _QUICK if quick else "")
    return HestReproduction(table, told, write_hest_page(output, table, told))


def _benches(
    task: PaperTask, about: Mapping[str, Any], output: Path, encoder: str, facts: Mapping[str, Any]
) -> list[_Bench]:
    """List what is to be run for a task; without leaks only where there are two patients."""
    published = PRESETS[f"paper-{task.name}"]
    quick = facts["quick"]
    if quick:
        recipe, also = "published-quick", [Method("mlp", "list", "quick")]
    else:
        [recipe], also = published.recipes, [Method(head, "list") for head in _NETWORKS]
        also.append(Method("linear", "pair", "published-no-entropy"))
    grid = Grid(
        losses=published.methods,
        recipes=(recipe,),
        also=tuple(also),
        library_size=facts["library_size"],
        encoders=(encoder,),
        seeds=facts["seeds"],
    )
    folder = output / task.name
    found = [_Bench(task, "published", published, grid, folder)]
    n_patients = len(set(about["patients"].values()))
    if n_patients > 1:
        most = _FOLDS_QUICK if quick else _FOLDS
        leak_free = replace(
            PRESETS["strank"],
            folds=most if n_patients > most else "patient",
            first_fold_only=quick,
            filter=published.filter,
        )
        found.append(_Bench(task, "leak-free", leak_free, replace(grid, seeds=1), folder))
    return found


def _compare(
    benches: Sequence[_Bench],
    about: Mapping[str, dict[str, Any]],
    jobs: int,
    bar: Callable[[str, int], Any],
) -> pd.DataFrame:
    """Run all benchmarks under one bar; what each of them says of itself is added to the facts."""
    found: dict[tuple[str, str], pd.DataFrame] = {}
    total = sum(bench.work(about[bench.task.name]["patients"]) for bench in benches)
    with bar("Fitting and scoring", total) as advance:
        for bench in benches:
            found[bench.task.name, bench.part] = bench.run(jobs, advance)
    for bench in benches:
        said = read_json(bench.out / "benchmark.json")
        about[bench.task.name][bench.part] = {key: said[key] for key in _SAID}
    return pd.concat(
        [
            task_table(
                bench.task,
                found[bench.task.name, "published"],
                found.get((bench.task.name, "leak-free")),
                bench.grid,
            )
            for bench in benches
            if bench.part == "published"
        ],
        ignore_index=True,
    )
