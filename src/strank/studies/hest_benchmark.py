"""HEST-Benchmark: every variant of its protocol, over all tasks, to one leaderboard."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy
import sklearn

from strank.errors import InputError, no_such, some
from strank.files import (
    check_output,
    claim_folder,
    claims,
    markdown_table,
    read_json,
    read_written,
    safe_name,
    sha256,
    write_json,
    write_table,
    write_utf8,
)
from strank.io.hest_bench import (
    PANEL,
    find_embeddings,
    find_hest_tasks,
    read_hest_task,
    sample_files,
)
from strank.progress import progress
from strank.shown import as_html, as_text, few_names
from strank.storage import is_whole
from strank.studies.hest_task import OURS, RIDGE, RIDGE_CV, HestFeatures, run_task
from strank.units import each
from strank.version import __version__
from strank.where import Where

CAVEATS = (
    "The benchmark chose its genes on all samples, those of the test included.",
    "Its target, log1p(counts), contains the depth of a spot: ridge learns it, `linear, list` "
    "leaves it out, and scc, on log1p(CP10k), takes most of it out. Rows with `library size` know "
    "the depth of the test spots; `library size` alone knows nothing else.",
    "Its Pearson pools the spots of all test samples, so levels of sections count, which "
    "`linear, list` leaves open; `-per-sample` and scc compare within sections only.",
)
_KEYS = ["task", "encoder", "features", "method", "fold", "gene", "score", "value"]


@dataclass(frozen=True)
class HestVariant:
    """A protocol of HEST-Benchmark; it decides which features, ridge and score are shown."""

    name: str
    features: HestFeatures  # 256 principal components, or all
    cross_validated: bool  # alpha: chosen by leaving training samples out, or by formula
    pooled: bool  # Pearson over all spots of the test samples, or within each and then the mean
    about: str  # What differs, and what HEST's own code does

    @property
    def ridge(self) -> str:
        """The ridge that belongs to it."""
        return RIDGE_CV if self.cross_validated else RIDGE

    @property
    def score(self) -> str:
        """Its column of the results."""
        return "pearson" if self.pooled else "pearson_within"


VARIANTS = {
    variant.name: variant
    for variant in (
        HestVariant(
            *("hest", "pca", False, True),
            "README and code: 256 components, alpha = 100 / (components x genes), pooled Pearson",
        ),
        HestVariant(
            *("hest-cv", "pca", True, True),
            "alpha by leaving samples out; HEST's code takes an alpha and ignores it (issue 140)",
        ),
        HestVariant(
            *("hest-per-sample", "pca", False, False),
            "Pearson within each test sample, then the mean; HEST's code pools them (issue 127)",
        ),
        HestVariant(
            *("hest-cv-per-sample", "pca", True, False), "as hest-cv, Pearson as hest-per-sample"
        ),
        HestVariant(
            *("hest-a13", "all", False, True),
            "Table A13: no components, features as stored, alpha = 100 / (features x genes); "
            "HEST's code with dimreduce: null",
        ),
        HestVariant(
            *("hest-a13-cv", "all", True, True), "as hest-a13, alpha by leaving samples out"
        ),
        HestVariant(
            *("hest-a13-per-sample", "all", False, False),
            "as hest-a13, Pearson within each test sample, then the mean",
        ),
        HestVariant(
            *("hest-a13-cv-per-sample", "all", True, False),
            "as hest-a13-cv, Pearson as hest-a13-per-sample",
        ),
    )
}


@dataclass(frozen=True)
class HestBenchmarkResult:
    """What `hest_benchmark` found."""

    #: task, encoder, features (``"pca"`` or ``"all"``), method, fold, gene, score and value.
    results: pd.DataFrame
    #: Versions, parameters, protocols, caveats, notes, and what failed, in words.
    facts: dict[str, Any]

    @property
    def _shown(self) -> tuple[str, dict[str, str], dict[str, pd.DataFrame]]:
        board = self.leaderboard.set_index(["protocol", "encoder", "method"])
        tasks = [name for name in board if name not in ("mean", "scc")]
        facts = {"tasks": few_names(tasks, 10)}
        return "HEST-Benchmark", facts, {"": board[["mean", "scc", *tasks]]}

    def __repr__(self) -> str:
        return as_text(*self._shown)

    def _repr_html_(self) -> str:
        return as_html(*self._shown)

    @property
    def summary(self) -> pd.DataFrame:
        """Mean over genes, a row a task, encoder, features, method and fold; then over folds."""
        keys = _KEYS[:4]
        folds = self.results.pivot_table(
            "value", [*keys, "fold"], "score", sort=False, dropna=False, observed=True
        ).dropna(how="all")
        over = folds.groupby(keys, sort=False)
        # Like the benchmark's, the deviation is that of the folds as they are (ddof 0).
        tables = {"mean": over.mean(), "std": over.std(ddof=0)}
        rows = [table.reset_index().assign(fold=name) for name, table in tables.items()]
        return pd.concat([folds.reset_index(), *rows], ignore_index=True).rename_axis(columns=None)

    @property
    def leaderboard(self) -> pd.DataFrame:
        """A row a protocol, encoder and method: its score in every task, and their mean.

        The last column is the mean of scc, which knows little of depth. A mean is of all tasks.
        """
        summary, tables = self.summary, []
        tasks = summary["task"].unique()
        for variant in (VARIANTS[name] for name in self.facts["protocols"]):
            rows = summary[
                (summary["fold"] == "mean")
                & (summary["features"] == variant.features)
                & summary["method"].isin((variant.ridge, *OURS))
            ]
            if rows.empty:
                continue
            scores = [variant.score, "scc"]
            # Columns that are undefined stay, pairs of encoder and method that are not there go.
            wide = rows.pivot_table(scores, ["encoder", "method"], "task", sort=False, dropna=False)
            wide = wide.dropna(how="all")
            table = wide[variant.score].reindex(columns=tasks)
            table["mean"] = table.mean(axis=1, skipna=False)
            table["scc"] = wide["scc"].reindex(columns=tasks).mean(axis=1, skipna=False)
            table = table.sort_values("mean", ascending=False, kind="stable").reset_index()
            table.insert(0, "protocol", variant.name)
            tables.append(table)
        return pd.concat(tables, ignore_index=True).rename_axis(columns=None)


_Done = tuple[pd.DataFrame, dict[str, Any]]


@dataclass(frozen=True)
class _Cell:
    """A task with the embeddings of one encoder, and which features are made of them."""

    task: str
    encoder: str
    features: HestFeatures
    folder: Path
    embeddings: Path
    kept: Path | None  # Folder of what was found

    def checksums(self) -> dict[str, str]:
        """Of all that is read; paths are not compared, so folders may move."""
        files = sample_files(self.folder, self.embeddings)
        paths = [self.folder / PANEL, *sorted((self.folder / "splits").glob("*.csv"))]
        sums = {path.name: sha256(path) for path in paths}
        for sample, of_sample in files.items():
            sums |= {f"{sample} {what}": sha256(path) for what, path in of_sample.items()}
        return sums

    def read(self, sums: Mapping[str, str]) -> _Done | None:
        """Read what was found before, of these very files."""
        if self.kept is None or not is_whole(self.kept / f"{self.features}.csv"):
            return None
        try:
            facts = read_json(self.kept / f"{self.features}.json")
        except InputError:
            return None
        if facts["sha256"] != sums:
            return None
        table = read_written(
            self.kept / f"{self.features}.csv",
            sealed=True,
            dtype=dict.fromkeys(_KEYS[:-1], str),
            keep_default_na=False,
            na_values={"value": [""]},
            float_precision="round_trip",
        )
        return table, facts

    def write(self, done: _Done) -> None:
        """Keep results; the facts come last, and so mark them as whole."""
        if self.kept is not None:
            write_table(self.kept / f"{self.features}.csv", done[0], seal=True)
            write_json(self.kept / f"{self.features}.json", done[1], seal=True)


def _run(options: Mapping[str, int], cell: _Cell) -> tuple[_Cell, _Done | str, bool]:
    """Do it, unless it is done before; if the input is at fault, say so, and let others go on."""
    try:
        sums = cell.checksums()
        if before := cell.read(sums):
            return cell, before, True
        task = read_hest_task(cell.folder, cell.embeddings)
        results, facts = run_task(task, cell.features, **options)
    except InputError as error:
        return cell, f"{cell.task}, {cell.encoder}: {error}", False
    about = {"task": cell.task, "encoder": cell.encoder, "features": cell.features}
    paths = {"folder": str(cell.folder), "embeddings": str(cell.embeddings)}
    facts = {**about, **paths, **facts, "sha256": sums}
    return cell, (results.assign(**about)[_KEYS], facts), False


@claims("output")
def hest_benchmark(
    data: Path | str,
    embeddings: Path | str,
    output: Path | str | None = None,
    *,
    protocols: Sequence[str] = ("hest", "hest-a13"),
    tasks: Sequence[str] | None = None,
    encoders: Sequence[str] | None = None,
    n_components: int = 256,
    seed: int = 1,
    jobs: int = 1,
    dask: str | None = None,
    verbose: bool = False,
) -> HestBenchmarkResult:
    """Run HEST-Benchmark's tasks: its ridge by every variant of its protocol, and ours beside it.

    Parameters
    ----------
    data
        ``bench_data``, or one of its tasks: ``splits/``, ``adata/`` and ``var_50genes.json``.
    embeddings
        ``ST_data_emb``, as HEST's code writes it: ``<task>/<encoder>/<sample>.h5`` (datasets
        ``embeddings`` and ``barcodes``). Of one task also its folder, or that of one encoder.
    output
        Folder of ``leaderboard.csv`` and ``.md``, ``summary.csv``, ``results.csv`` and what was
        found of every task; nothing is written if ``None``. A run that was stopped goes on, and
        what is done is not repeated while its files are the same.
    protocols
        What the leaderboard shows: ``"hest"``, ``"hest-a13"`` (no principal components), each also
        with ``-cv`` (alpha by leaving training samples out), ``-per-sample`` (Pearson within test
        samples), or ``-cv-per-sample``; or ``["all"]``.
    tasks, encoders
        Which; all that there are if ``None``.
    n_components, seed
        Of the PCA; the benchmark's if not given.
    jobs, dask
        Processes, one thread each; or the workers of a scheduler of Dask, its address or ``.json``.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    HestBenchmarkResult
        ``leaderboard``, ``summary``, ``results`` and ``facts``; ``facts["failed"]`` lists tasks
        that could not be done, with sample and file.

    Raises
    ------
    InputError
        If nothing could be done, and for an unknown protocol, task or encoder.

    Examples
    --------
    >>> hest_benchmark("bench_data", "ST_data_emb", "out", tasks=["IDC"])
    Traceback (most recent call last):
    ...
    strank.errors.InputError: bench_data: neither a task (splits/, adata/, var_50genes.json) ...
    """
    chosen = _chosen("protocol", VARIANTS, None if list(protocols) == ["all"] else protocols)
    kinds = dict.fromkeys(VARIANTS[name].features for name in chosen)
    out = None if output is None else Path(output)
    cells = _cells(Path(data), Path(embeddings), out, tasks, encoders, kinds)
    options = {"n_components": n_components, "seed": seed}
    claim = partial(_claim, out, {"strank_version": __version__, **options})
    if out is not None:
        check_output(out)
        if out.exists():
            claim()
    found: dict[_Cell, _Done | str] = {}
    with progress("Tasks", len(cells), hidden=not verbose) as advance:
        for cell, result, before in each(partial(_run, options), cells, Where(jobs, dask)):
            if not (before or isinstance(result, str)):
                claim()
                cell.write(result)
            found[cell] = result
            advance(1)
    in_order = [found[cell] for cell in cells]
    done = [result for result in in_order if not isinstance(result, str)]
    failed = list(dict.fromkeys(result for result in in_order if isinstance(result, str)))
    if not done:
        what = "nothing could be done: " if len(failed) > 1 else ""
        raise InputError(what + some(failed, 20))
    modules = {"numpy": np, "scipy": scipy, "scikit-learn": sklearn}
    about = {
        "versions": {name: module.__version__ for name, module in modules.items()},
        "protocols": {name: VARIANTS[name].about for name in chosen},
        "caveats": list(CAVEATS),
        "notes": _notes([facts for _, facts in done]),
        "failed": failed,
    }
    results = pd.concat([table for table, _ in done], ignore_index=True)
    benchmark = HestBenchmarkResult(results, {**options, **about})
    if out is not None:
        claim(about)
        _write(out, benchmark)
    return benchmark


def _chosen(what: str, known: Collection[str], asked: Sequence[str] | None) -> list[str]:
    for name in asked or ():
        if name not in known:
            raise no_such(what, name, known)
    return list(dict.fromkeys(asked or known))


def _cells(
    data: Path,
    embeddings: Path,
    out: Path | None,
    tasks: Sequence[str] | None,
    encoders: Sequence[str] | None,
    kinds: Collection[HestFeatures],
) -> list[_Cell]:
    folders = find_hest_tasks(data)
    chosen = _chosen("task", folders, tasks)
    found = find_embeddings(embeddings, chosen)
    known = list(dict.fromkeys(name for of_task in found.values() for name in of_task))
    return [
        _Cell(
            *(task, encoder, features, folders[task]),
            # What is not there is said of this task, when it is its turn.
            found[task].get(encoder, embeddings / task / encoder),
            None if out is None else out / "tasks" / safe_name(task) / safe_name(encoder),
        )
        for task in chosen
        for encoder in _chosen("encoder", known, encoders)
        for features in kinds
    ]


def _claim(out: Path | None, facts: Mapping[str, Any], about: dict[str, Any] | None = None) -> None:
    told = dict.fromkeys(("versions", "protocols", "caveats", "notes", "failed")) | (about or {})
    if out is not None:
        claim_folder(out, facts, kind="hest-benchmark", about=told)


def _notes(done: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what limits the results, once, and of which tasks."""
    where: dict[str, list[str]] = {}
    for facts in done:
        for text in facts["warnings"]:
            where.setdefault(text, []).append(f"{facts['task']}, {facts['encoder']}")
    return [f"{some(dict.fromkeys(names), 3)}: {text}" for text, names in where.items()]


def _write(out: Path, result: HestBenchmarkResult) -> None:
    board = result.leaderboard
    tables = {"results": result.results, "summary": result.summary, "leaderboard": board}
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table)
    shown = board.map(lambda value: f"{value:.4f}" if isinstance(value, float) else str(value))
    write_utf8(out / "leaderboard.md", markdown_table(board.columns, shown.to_numpy()) + "\n")
