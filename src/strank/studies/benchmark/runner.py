"""Cells of a benchmark, fitted, scored and resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.contract import counts_checksum, patients_of, section_info
from strank.cohort.folds import Fold
from strank.cohort.store import read_cohort, read_h5ad, write_h5ad
from strank.cohort.training_set import encoder_facts_of
from strank.errors import InputError, some
from strank.evaluation.methods import (
    WITHIN,
    WITHIN_TOLD,
    depth_scores,
    fit_method,
    is_stopped_by_name,
    training_slope,
    within_section,
    without_image,
)
from strank.evaluation.protocol import Protocol, fold_facts, get_protocol
from strank.evaluation.results import drop_parts, has_parts, write_parts
from strank.evaluation.scores import SCORES, ceilings, score_section
from strank.files import (
    claim_folder,
    claims,
    read_json,
    read_written,
    write_json,
)
from strank.fitting.method import REFERENCE, Method
from strank.progress import Advance, progress
from strank.shown import as_html, as_text, few_names
from strank.storage import is_whole, seal_of
from strank.studies.benchmark.grid import LOSSES, Cell, Grid, Task
from strank.studies.benchmark.tables import short_tables, write_summary
from strank.units import each
from strank.version import __version__
from strank.where import Where


@lru_cache(maxsize=1)
def _cohorts(folder: Path, protocol: Protocol) -> dict[str, dict[str, AnnData]]:
    """Hold what a benchmark has read, by encoder; a process that turns to another lets it go."""
    return {}


def _cohort(folder: Path, encoder: str, protocol: Protocol) -> dict[str, AnnData]:
    held = _cohorts(folder, protocol)
    if encoder not in held:
        sections = read_cohort(folder, sections=protocol.sections, encoder=encoder)
        held[encoder] = protocol.filtered(sections)
    return held[encoder]


@lru_cache(maxsize=64)
def _panel(cohort: Path, protocol: Protocol, task: Task) -> pd.Index:
    """Choose the genes of a task, once for all of its cells that a process runs."""
    sections = _cohort(cohort, task.encoder, protocol)
    return protocol.choose_panel(sections, task.fold, task.n_genes)


def run_cell(cell: Cell, protocol: Protocol, cohort: Path, out: Path) -> None:
    """Fit a method and keep its predictions of the test sections.

    The file has, besides the predictions, the slope of each gene where scores are no log rates.
    """
    task = cell.task
    sections = _cohort(cohort, task.encoder, protocol)
    train = {name: sections[name] for name in task.fold.development}
    panel = _panel(cohort, protocol, task)
    how: dict[str, Any] = {"encoder": task.encoder, "seed": cell.seed}
    how |= {"aim": task.fold.aim, "validation": task.fold.validation}
    # A user's own random numbers must not be touched, nor decide anything.
    with torch.random.fork_rng():
        predict = fit_method(cell.method, train, panel, **how)
        slope = None if cell.method.log_rates else training_slope(predict, train, panel)
        scores = [predict(sections[name]) for name in task.fold.test]
    tests = [sections[name] for name in task.fold.test]
    # No time: the same predictions are the same file, and so are the scores made of them.
    about = {
        "method": cell.method.name,
        "seed": cell.seed,
        "encoder": task.encoder,
        **asdict(task.fold),
        "strank_version": __version__,
    }
    obs = pd.concat([adata.obs[["section", "patient"]].astype(str) for adata in tests])
    # Spots of different sections may have the same name.
    obs.index = (obs["section"] + ":" + obs.index).to_numpy()
    predictions = AnnData(
        X=np.concatenate(scores).astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=panel) if slope is None else pd.DataFrame({"slope": slope}, panel),
        obsm={"spatial": np.concatenate([adata.obsm["spatial"] for adata in tests])},
        uns={"strank_benchmark": json.dumps(about)},
    )
    write_h5ad(predictions, cell.path(out))


def score_task(
    protocol: Protocol, cohort: Path, out: Path, of_task: tuple[Task, Sequence[Cell]]
) -> None:
    """Write the scores of all methods of a task, and facts of its genes, as partitions of tables.

    What is there of these very predictions is left as it is; without any, nothing is kept. The
    tables are all that comes of it, so that it may run in any process that sees the folder.
    """
    task, cells = of_task
    if not cells:
        drop_parts(out, task.names)
        return
    made_of = {f"{cell.method.name} {cell.seed}": seal_of(cell.path(out)) for cell in cells}
    if not has_parts(out, task.names, made_of):
        write_parts(out, task.names, _scored(protocol, cohort, out, task, cells), made_of)


def _scored(
    protocol: Protocol, cohort: Path, out: Path, task: Task, cells: Sequence[Cell]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score all methods of a task: a row a method, section and gene; and facts of every gene."""
    sections = _cohort(cohort, task.encoder, protocol)
    labels = {f"{cell.method.name} {cell.seed}": (cell.method.name, cell.seed) for cell in cells}
    kept = dict(zip(labels, (read_h5ad(cell.path(out)) for cell in cells), strict=True))
    panel = next(iter(kept.values())).var_names
    slopes = {k: found.var["slope"].to_numpy() for k, found in kept.items() if "slope" in found.var}
    train = {name: sections[name] for name in task.fold.development}
    slopes["library size"] = training_slope(partial(depth_scores, len(panel)), train, panel)
    tables, facts = [], []
    for name in task.fold.test:
        section = sections[name]
        scores = {key: _of(found, name) for key, found in kept.items()}
        reference = scores.get(f"{REFERENCE.name} 0", next(iter(scores.values())))
        depth = section.obs["library_size"].to_numpy()
        scores |= without_image(reference, depth, seed=protocol.seed)
        seen = str(section.obs["patient"].iloc[0]) in task.fold.shared_patients
        if not seen:
            scores[WITHIN] = within_section(section, panel, task.encoder)
        table = score_section(
            scores,
            section,
            panel,
            slopes=slopes,
            depth=protocol.target_depth,
            seed=protocol.seed,
            significance=True,
        )
        tables.append(table.assign(patient_seen=seen))
        ceiling = ceilings(section, panel, seed=protocol.seed)
        if protocol.target_depth == "panel":
            # Ceilings are of the target that all genes' depth divides.
            ceiling[["ceiling_scc", "ceiling_pearson"]] = np.nan
        facts.append(ceiling.assign(patient_seen=seen))
    return _sorted(pd.concat(tables), labels), pd.concat(facts)


def _of(predictions: AnnData, section: str) -> NDArray:
    return np.asarray(predictions[predictions.obs["section"] == section].X)


def _sorted(table: pd.DataFrame, labels: Mapping[str, tuple[str, int]]) -> pd.DataFrame:
    """Tell seeds from methods; a method's rows stand together."""
    methods, seeds = zip(*(labels.get(label, (label, 0)) for label in table["method"]), strict=True)
    names = ["method", "seed", "section", "patient", "patient_seen", "gene"]
    table = table.assign(method=methods, seed=seeds)[[*names, *SCORES]]
    return table.sort_values(names, ignore_index=True)


@dataclass(frozen=True)
class BenchmarkResult:
    """What `benchmark` found; its folder has every score of every gene."""

    #: A row an encoder, size of the panel, kind of patient, method and score, with its mean over
    #: genes and sections, the interval, and the paired difference to the reference method.
    summary: pd.DataFrame
    #: As in ``benchmark.json``, with protocol, sections, methods, warnings, notes and what failed.
    facts: dict[str, Any]

    @property
    def _shown(self) -> tuple[str, dict[str, str], dict[str, pd.DataFrame], list[str]]:
        protocol = self.facts["protocol"]
        facts = {"sections": few_names(list(self.facts["sections"]))}
        short = len(self.summary) > 0  # there is none of a share
        tables = short_tables(self.summary, protocol["headline"]) if short else {}
        return f"Benchmark: {protocol['name']}", facts, tables, list(self.facts["warnings"])

    def __repr__(self) -> str:
        return as_text(*self._shown)

    def _repr_html_(self) -> str:
        return as_html(*self._shown)


@claims("output")
def benchmark(
    cohort: Path | str,
    output: Path | str,
    *,
    protocol: Protocol | Path | str = "strank",
    losses: Sequence[str] | None = None,
    heads: Sequence[str] = ("linear",),
    recipes: Sequence[str | None] | None = None,
    encoders: Sequence[str] = ("morphology",),
    n_genes: Sequence[int | None] | None = None,
    library_size: bool = True,
    seeds: int = 1,
    jobs: int = 1,
    dask: str | None = None,
    shard: str | None = None,
    verbose: bool = False,
) -> BenchmarkResult:
    """Compare objectives, heads, encoders and panels on the folds of a protocol.

    Panel, penalties and scaling of every method come from the training sections of a fold. The
    exact list head, ridge and centred ridge stand in every table, and so do library size alone and
    shuffled scores, which know nothing of the image; beside scores of new patients also what the
    exact list head reaches within their own sections.

    Parameters
    ----------
    cohort
        Folder with sections and features of all encoders.
    output
        Folder of the results: ``results`` (every score) and ``genes`` (noise ceilings, independent
        spots), which `pandas.read_parquet` reads as one table each, ``summary.csv``, ``.md`` and
        ``.tex``, ``benchmark.json``, ``protocol.toml`` and the predictions. A run that was stopped
        goes on; more may be asked of it later, and the summary is of what was asked last.
    protocol
        ``"strank"``, ``"section"``, ``"hest"``, a task of the paper on HEST such as
        ``"paper-IDC"``, a ``.toml`` file, a folder of a task of HEST-Benchmark, or a
        `strank.evaluation.protocol.Protocol`.
    losses, heads, recipes
        What is combined, as in `strank.fit`; of losses also ``"hest-ridge"``, and of heads also
        image networks such as ``"timm:resnet18"``, which are trained end to end. Losses and
        recipes are the protocol's if ``None``; or all losses but ``"rank-published"``, by the usual
        recipe (``None`` or ``"usual"`` among others). What the published recipe does not train is
        left out, and ``facts["notes"]`` says so.
    encoders
        Whose features.
    n_genes
        Sizes of the panel; ``None`` in it for all genes. The protocol's if ``None``.
    library_size
        If false, every method whose likelihood knows the depth of a spot is also fitted without
        it, in rows of its own.
    seeds
        How many, of what is trained step by step.
    jobs, dask, shard
        Processes, one thread each; or the workers of a scheduler of Dask, its address or ``.json``.
        Of a share, ``"2/8"`` or ``"slurm"``, only fits are made; a call for all scores them.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    BenchmarkResult
        ``summary`` and ``facts``.

    Raises
    ------
    InputError
        For absent features, an unknown protocol, loss, head or recipe, and a folder of another
        protocol, cohort, version of features or of strank.

    Examples
    --------
    >>> benchmark("nowhere", "out")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: nowhere: ...
    """
    if not isinstance(protocol, Protocol):
        protocol = get_protocol(protocol)
    grid = Grid(
        losses or protocol.methods or LOSSES,
        heads,
        recipes or protocol.recipes or (None,),
        encoders,
        n_genes or protocol.n_genes,
        seeds,
        library_size=library_size,
    )
    bar = partial(progress, hidden=not verbose)
    where = Where(jobs, dask, shard)
    facts = run_benchmark(Path(cohort), protocol, grid, Path(output), where=where, bar=bar)
    if where.share is not None:
        return BenchmarkResult(pd.DataFrame(), facts)
    return BenchmarkResult(read_written(Path(output) / "summary.csv"), facts)


def run_benchmark(
    cohort: Path,
    protocol: Protocol,
    grid: Grid,
    out: Path,
    *,
    where: Where,
    bar: Callable[[str, int], Any],
) -> dict[str, Any]:
    """Run what is not done yet, and write all tables; returns what ``benchmark.json`` says.

    Of a share it fits only, and says of its own what failed.
    """
    started = time.perf_counter()
    facts, tasks = _claim(cohort, protocol, grid, out)
    cells = grid.cells(tasks)
    mine = where.mine(cells, key=lambda cell: str(cell.path(out)))
    left = [cell for cell in mine if not is_whole(cell.path(out))]
    with bar("Fitting", len(left)) as advance:
        fit = partial(_fit, protocol, cohort, out)
        failed = [failure for failure in _each(fit, left, where, advance) if failure]
    if where.share is not None:
        return {**facts, "failed": failed}
    done = [cell for cell in cells if cell.path(out).is_file()]
    if not done:
        raise InputError(f"nothing could be fitted: {failed[0]}")
    by_task = [(task, [cell for cell in done if cell.task == task]) for task in tasks]
    with bar("Scoring", len(by_task)) as advance:
        _each(partial(score_task, protocol, cohort, out), by_task, where, advance)
    with bar("Writing", 1) as advance:
        _, notes = write_summary(out, protocol.headline)
        advance(1)
    facts |= {"failed": failed, "seconds": facts["seconds"] + time.perf_counter() - started}
    facts["notes"] = [*facts["notes"], *notes]
    write_json(out / "benchmark.json", facts, seal=True)
    return facts


def _each(
    work: Callable[[Any], Any], things: Iterable[Any], where: Where, advance: Advance
) -> list:
    found = []
    for result in each(work, things, where):
        found.append(result)
        advance(1)
    return found


def _fit(protocol: Protocol, cohort: Path, out: Path, cell: Cell) -> str | None:
    """Run a cell; if its input is at fault, say so, and let the others go on."""
    try:
        run_cell(cell, protocol, cohort, out)
    except InputError as error:
        task = cell.task
        return f"{cell.method.name}, {task.encoder}, {task.genes} genes, {task.fold.name}: {error}"
    return None


def _claim(
    cohort: Path, protocol: Protocol, grid: Grid, out: Path
) -> tuple[dict[str, Any], list[Task]]:
    """Check that the folder is of this protocol and cohort; write what is known before the run."""
    named = protocol.sections
    sections = {name: read_cohort(cohort, sections=named, encoder=name) for name in grid.encoders}
    first = sections[grid.encoders[0]]
    kept = protocol.filtered(first)
    patients = patients_of(first)
    folds = protocol.make_folds(patients)
    tasks = [Task(*keys) for keys in product(grid.encoders, grid.n_genes, folds)]
    path = out / "benchmark.json"
    before: dict[str, Any] = read_json(path) if path.is_file() else {}
    counts = {name: counts_checksum(adata) for name, adata in first.items()}
    decides = {
        "strank_version": __version__,
        "protocol_sha256": protocol.sha256,
        "counts_sha256": counts,
    }
    features = {name: encoder_facts_of(found, name) for name, found in sections.items()}
    about = {
        "protocol": {**protocol.facts, "sha256": protocol.sha256},
        "cohort": str(cohort.resolve()),
        "sections": {
            name: {
                "patient": patients[name],
                "n_spots": kept[name].n_obs,
                "counts_sha256": counts[name],
                "image": section_info(adata).image,
            }
            for name, adata in first.items()
        },
        "folds": {fold.name: fold_facts(fold) for fold in folds},
        "methods": [method.name for method in grid.methods],
        "encoders": grid.encoders,
        "genes": ["all" if size is None else str(size) for size in grid.n_genes],
        "seeds": grid.seeds,
        "reference": REFERENCE.name,
        "warnings": protocol.warnings(folds, patients),
        "notes": [
            *grid.notes,
            *_stopped(grid.methods, folds),
            *_filtered(first, kept),
            *[WITHIN_TOLD] * any(fold.aim == "new-patients" for fold in folds),
        ],
        "failed": before.get("failed", []),
        "seconds": before.get("seconds", 0.0),
    }
    claim_folder(out, decides, kind="benchmark", growing={"features": features}, about=about)
    protocol.write(out / "protocol.toml")
    return read_json(path), tasks


def _stopped(methods: Iterable[Method], folds: Iterable[Fold]) -> list[str]:
    """Say which sections stop what named sections stop."""
    named = "; ".join(method.name for method in methods if is_stopped_by_name(method))
    if not named:
        return []
    drawn = some(fold.name for fold in folds if not fold.validation)
    told = [f"{named}: stopped by validation sections, on which all other methods train"]
    if drawn:
        told.append(
            f"fold {drawn}: no validation sections are named, so those of one training patient, "
            "or one section of fewer than three patients, are drawn by the seed"
        )
    return told


def _filtered(sections: Mapping[str, AnnData], kept: Mapping[str, AnnData]) -> list[str]:
    """Say what the filter of a protocol leaves of sections from which it takes anything."""
    told = [
        f"{name} {kept[name].n_obs} of {adata.n_obs} spots, {kept[name].n_vars} of {adata.n_vars}"
        for name, adata in sections.items()
        if kept[name].shape != adata.shape
    ]
    return [f"the filter leaves of {'; '.join(told)} genes"] if told else []
