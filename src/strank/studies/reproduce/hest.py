"""Table 2 of the paper: seven losses on seven tasks of HEST, and what is better beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from strank.cohort.folder import count_spots
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.embedding import embed
from strank.errors import InputError
from strank.evaluation.paper_tasks import PAPER_TASKS, PaperTask
from strank.evaluation.protocol import PRESETS
from strank.files import claim_folder, claims, read_json, write_json
from strank.fitting.method import Method
from strank.progress import progress
from strank.studies.benchmark.grid import Grid
from strank.studies.reproduce.benches import Bench, compare
from strank.studies.reproduce.page import write_hest_page
from strank.studies.reproduce.tables import Reproduction, with_mean, write_beside_paper
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
from strank.where import Where

# Of a task with more patients; for a first look the first of so many.
_FOLDS, _FOLDS_QUICK = 5, 3
_NETWORKS = ("mlp", "mlp+linear")
_QUICK = (
    "A first look, not the study: one seed, few epochs, one network, and without leaks one split "
    "by patient."
)


@claims("output")
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
    dask: str | None = None,
    say: Callable[[str], object] = lambda _: None,
    verbose: bool = False,
) -> Reproduction:
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
    jobs, dask
        Processes, one thread each; or the workers of a scheduler of Dask, its address or ``.json``.
    say
        Called with what a user wants to know.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    Reproduction
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
    table = compare(benches, about["tasks"], Where(jobs, dask), bar)
    table = with_mean(table) if len(wanted) > 1 else table
    told = read_json(output / "reproduction.json") | about
    write_json(output / "reproduction.json", told, seal=True)
    write_beside_paper(output, table, _QUICK if quick else "")
    return Reproduction(table, told, write_hest_page(output, table, told))


def _benches(
    task: PaperTask, about: Mapping[str, Any], output: Path, encoder: str, facts: Mapping[str, Any]
) -> list[Bench]:
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
    bench = Bench(
        name=task.name,
        what=f"task {task.name}",
        part="published",
        protocol=published,
        grid=grid,
        cohort=output / task.name / "cohort",
        folder=output / task.name,
        patients=about["patients"],
        paper=task.scc,
    )
    found = [bench]
    n_patients = len(set(about["patients"].values()))
    if n_patients > 1:
        most = _FOLDS_QUICK if quick else _FOLDS
        leak_free = replace(
            PRESETS["strank"],
            folds=most if n_patients > most else "patient",
            first_fold_only=quick,
            filter=published.filter,
        )
        once = replace(grid, seeds=1)
        found.append(replace(bench, part="leak-free", protocol=leak_free, grid=once))
    return found
