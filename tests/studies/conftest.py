"""A small cohort in a folder, and the benchmark of it that several modules look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from anndata import AnnData

from strank.cohort.contract import spots_checksum
from strank.cohort.folder import features_path
from strank.cohort.store import write_h5ad
from strank.evaluation.protocol import Protocol
from strank.evaluation.scores import SCORES
from strank.progress import progress
from strank.studies.benchmark.grid import Grid
from strank.studies.benchmark.runner import run_benchmark
from strank.where import Where

BY_PATIENT = Protocol("patients", n_genes=(3, None))
GRID = Grid(losses=("list", "poisson"), encoders=("mine",), n_genes=(3, None))
SMALL = replace(GRID, losses=("list",), n_genes=(3,))


@dataclass(frozen=True)
class Bench:
    """A cohort, and what is run on it unless a test asks for something else."""

    cohort: Path
    section_of: Callable[..., AnnData]
    protocol: Protocol = BY_PATIENT
    grid: Grid = GRID
    small: Grid = SMALL

    def run(
        self,
        out: Path,
        protocol: Protocol | None = None,
        grid: Grid | None = None,
        *,
        cohort: Path | None = None,
        jobs: int = 1,
        shard: str | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        protocol, grid = protocol or self.protocol, grid or self.grid
        options = {"bar": partial(progress, hidden=True), **options}
        where = Where(jobs, shard=shard)
        return run_benchmark(cohort or self.cohort, protocol, grid, out, where=where, **options)

    def section(self, name: str) -> AnnData:
        return self.section_of(name, patient=name[0])

    def write(self, folder: Path, names: str = "A1 A2 B1 C1", version: str = "1") -> Path:
        for name in names.split():
            self.write_section(folder, self.section(name), version)
        return folder

    @staticmethod
    def write_section(folder: Path, adata: AnnData, version: str = "1") -> None:
        """As `strank import` and `strank embed` leave it."""
        adata, name = adata.copy(), adata.obs["section"].iloc[0]
        features = AnnData(adata.obsm.pop("mine"), obs=adata.obs[[]])
        facts = json.dumps(adata.uns.pop("mine") | {"version": version})
        features.uns = {"encoder": facts, "spots_sha256": spots_checksum(adata)}
        write_h5ad(adata, folder / f"{name}.h5ad")
        write_h5ad(features, features_path(folder, "mine", name))

    @staticmethod
    def results(out: Path) -> pd.DataFrame:
        """Every score in a row of its own."""
        table = pd.read_parquet(out / "results").astype({"genes": str})
        order = ["method", "encoder", "genes", "seed", "fold", "section", "patient", "patient_seen"]
        order += ["gene", "score"]
        rows = table.melt(order[:-1], list(SCORES), var_name="score").astype({"score": "category"})
        return rows.sort_values(order, ignore_index=True)


@pytest.fixture(scope="session")
def bench(tmp_path_factory, section_of) -> Bench:
    bench = Bench(tmp_path_factory.mktemp("benchmark") / "cohort", section_of)
    bench.write(bench.cohort)
    return bench


@pytest.fixture(scope="session")
def done(bench) -> Path:
    """The folder of a whole run; a test that changes it works on a copy."""
    out = bench.cohort.parent / "done"
    bench.run(out)
    return out
