"""The cells of a benchmark: one method, fitted on one fold; done once, and kept."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.splits import Fold
from strank.cohort.store import read_cohort, read_h5ad, write_h5ad
from strank.evaluation.baselines import depth_scores, without_image
from strank.evaluation.folds import Protocol
from strank.evaluation.predictions import has_log_rates, training_slope
from strank.evaluation.scores import SCORES, ceilings, score_section
from strank.files import safe_name
from strank.studies.benchmark.methods import fit_method
from strank.version import __version__

__all__ = ["REFERENCE", "Cell", "Task", "run_cell", "score_task"]

# The method whose scores the "shuffled" row shuffles, and that the others are compared with.
REFERENCE = "linear, list"


@dataclass(frozen=True)
class Task:
    """A fold with a panel and an encoder: what all methods do.

    Attributes
    ----------
    encoder
        Whose features.
    n_genes
        Size of the panel; ``None`` for all genes.
    fold
        Which sections train and which test.
    """

    encoder: str
    n_genes: int | None
    fold: Fold

    @property
    def genes(self) -> str:
        """The size in words."""
        return "all" if self.n_genes is None else str(self.n_genes)


@dataclass(frozen=True)
class Cell:
    """A method on a task.

    Attributes
    ----------
    task
        What is to be done.
    method
        From `strank.studies.benchmark.methods.method_of`.
    seed
        Of what is trained step by step.
    """

    task: Task
    method: str
    seed: int = 0

    def path(self, folder: Path) -> Path:
        """Where its predictions are kept."""
        task, seed = self.task, f" {self.seed}" if self.seed else ""
        names = [task.encoder, task.genes, task.fold.name, f"{self.method}{seed}.h5ad"]
        return folder.joinpath("predictions", *(safe_name(name) for name in names))


@cache
def _cohort(folder: Path, encoder: str) -> dict[str, AnnData]:
    return read_cohort(folder, encoder=encoder)


def run_cell(cell: Cell, protocol: Protocol, cohort: Path, out: Path) -> None:
    """Fit a method and keep its predictions of the test sections.

    The file has, besides the predictions, the slope of each gene where scores are no log rates.
    """
    started, task = time.perf_counter(), cell.task
    sections = _cohort(cohort, task.encoder)
    train = {name: sections[name] for name in task.fold.train}
    panel = protocol.choose_panel(sections, task.fold, task.n_genes)
    # A user's own random numbers must not be touched, nor decide anything.
    with torch.random.fork_rng():
        predict = fit_method(cell.method, train, panel, encoder=task.encoder, seed=cell.seed)
        slope = None if has_log_rates(cell.method) else training_slope(predict, train, panel)
        scores = [predict(sections[name]) for name in task.fold.test]
    tests = [sections[name] for name in task.fold.test]
    seconds = time.perf_counter() - started
    about = {"method": cell.method, "seed": cell.seed, "encoder": task.encoder, **asdict(task.fold)}
    about |= {"seconds": seconds, "strank_version": __version__}
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
    task: Task, cells: Sequence[Cell], protocol: Protocol, cohort: Path, out: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score all methods on the test sections of a task.

    Returns
    -------
    results, genes
        Long: ``method, encoder, genes, seed, fold, section, patient, patient_seen, gene, score,
        value``; and a row a section and gene with mean counts and noise ceilings.
    """
    sections = _cohort(cohort, task.encoder)
    kept = {f"{cell.method}#{cell.seed}": read_h5ad(cell.path(out)) for cell in cells}
    panel = next(iter(kept.values())).var_names
    slopes = {k: found.var["slope"].to_numpy() for k, found in kept.items() if "slope" in found.var}
    train = {name: sections[name] for name in task.fold.train}
    slopes["library size#0"] = training_slope(partial(depth_scores, len(panel)), train, panel)
    tables, facts = [], []
    for name in task.fold.test:
        section = sections[name]
        scores = {key: _of(found, name) for key, found in kept.items()}
        reference = scores.get(f"{REFERENCE}#0", next(iter(scores.values())))
        depth = section.obs["library_size"].to_numpy()
        for method, values in without_image(reference, depth, seed=protocol.seed).items():
            scores[f"{method}#0"] = values
        table = score_section(
            scores,
            section,
            panel,
            slopes=slopes,
            depth=protocol.target_depth,
            seed=protocol.seed,
            significance=True,
        )
        seen = str(section.obs["patient"].iloc[0]) in task.fold.shared_patients
        tables.append(table.assign(patient_seen=seen))
        facts.append(ceilings(section, panel, seed=protocol.seed))
        if protocol.target_depth == "panel":
            # Ceilings are of the target that all genes' depth divides.
            facts[-1][["ceiling_scc", "ceiling_pearson"]] = np.nan
    about = {"encoder": task.encoder, "genes": task.genes, "fold": task.fold.name}
    return _long(pd.concat(tables)).assign(**about), pd.concat(facts).assign(**about)


def _of(predictions: AnnData, section: str) -> NDArray:
    return np.asarray(predictions[predictions.obs["section"] == section].X)


def _long(table: pd.DataFrame) -> pd.DataFrame:
    """Turn one column a score into one row a score; text is kept as categories."""
    keys = table.pop("method").str.rpartition("#")
    table = table.assign(method=keys[0], seed=keys[2].astype(int))
    text = ["method", "section", "patient", "gene"]
    table[text] = table[text].astype("category")
    names = ["method", "seed", "section", "patient", "patient_seen", "gene"]
    return table.melt(names, list(SCORES), var_name="score")
