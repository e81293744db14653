"""Fits of a cohort that is several times as large as the memory they may take.

    python benchmarks/beyond.py FOLDER [--quick]

Simulates a cohort in FOLDER (features of low rank with noise, Poisson counts), and fits panels of
it twice, each in a process of its own: with all in memory (`read_cohort`), and from the folder with
a `max_memory` of a sixth of the cohort or less. The latter is enforced: the process may have no
more private memory than it has after all imports and a fit of a few spots, and the budget
(RLIMIT_DATA; of a control group one would need to be root). Prints seconds of the wall clock and of
the processor, the peak of resident memory above that start, and by how much the results differ.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.cohort.contract import SectionInfo, make_section, spots_checksum
from strank.cohort.folder import features_path
from strank.cohort.store import read_cohort, write_h5ad
from strank.fitting.method import fit
from strank.model.rank_model import RankModel

RANK, SIGNAL, EXPRESSED = 20, 0.5, 0.2


class Size(NamedTuple):
    sections: int
    spots: int  # of a section
    features: int
    genes: int
    panels: tuple[int, ...]
    budget: float  # GiB
    patients: int = 2


FULL = Size(96, 1000, 512, 6000, (50, 1000), 0.2)
QUICK = Size(24, 400, 128, 2000, (50, 200), 0.08)


def simulate(folder: Path, size: Size) -> int:
    """Write the cohort, a section at a time; the bytes of features and counts in memory."""
    rng, n_bytes = np.random.default_rng(0), 0
    loadings = rng.normal(size=(RANK, size.features)).astype(np.float32)
    slopes = SIGNAL * rng.normal(size=(RANK, size.genes)) / RANK**0.5
    level = np.log(EXPRESSED) + rng.normal(size=size.genes)
    n = size.spots
    for number in range(size.sections):
        name, patient = f"S{number:03}", f"P{number % size.patients}"
        axes = rng.exponential(size=(n, RANK)) - 1
        features = (axes @ loadings + rng.normal(size=(n, size.features))).astype(np.float32)
        depth = rng.normal(0, 0.4, size=(n, 1))
        counts = sparse.csr_matrix(
            rng.poisson(np.exp(axes @ slopes + level + depth)), dtype=np.float32
        )
        places = {"x": np.arange(n) % 40 * 50.0, "y": np.arange(n) // 40 * 50.0}
        section = make_section(
            counts,
            spots=pd.DataFrame(places, index=[f"{i}" for i in range(n)]),
            genes=pd.Index([f"G{i:05}" for i in range(size.genes)]),
            section=name,
            patient=patient,
            info=SectionInfo("/none", "0" * 64, 4.0, 100.0, 200.0, "ST", {"reader": "simulated"}),
        )
        write_h5ad(section, folder / f"{name}.h5ad", compression=None)
        facts = {"name": "mine", "version": "1", "fields": []}
        uns = {"encoder": json.dumps(facts), "spots_sha256": spots_checksum(section)}
        held = AnnData(features, obs=section.obs[[]], uns=uns)
        write_h5ad(held, features_path(folder, "mine", name), compression=None)
        n_bytes += features.nbytes + counts.data.nbytes + counts.indices.nbytes
    return n_bytes


def of_status(name: str) -> int:
    """Read a number of bytes that the kernel knows of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def fit_one(folder: Path, n_genes: int, budget: float, out: Path) -> dict[str, float]:
    """Fit in this process; from the folder within a budget, or all in memory if it is 0."""
    some = read_cohort(folder, sections=["S000", "S001", "S002", "S003"], encoder="mine")
    fit(some, encoder="mine", n_genes=3)  # all that is imported late, is imported
    del some
    held, start = of_status("VmRSS"), of_status("VmHWM")
    if budget:
        most = of_status("VmData") + int(budget * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    wall, cpu = time.perf_counter(), time.process_time()
    if budget:
        model = fit(folder, encoder="mine", n_genes=n_genes, max_memory=budget)
    else:
        cohort = read_cohort(folder, encoder="mine")
        model = fit(cohort, encoder="mine", n_genes=n_genes, max_memory=64.0)
    found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found |= {"start": held, "peak": of_status("VmHWM") - held, "before": start - held}
    model.save(out)
    return found


def run(folder: Path, n_genes: int, budget: float) -> tuple[dict[str, float], RankModel]:
    """Fit in a process of its own."""
    out = folder / f"model-{n_genes}-{budget:g}"
    command = [sys.executable, __file__, str(folder), "--one", str(n_genes), str(budget), str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]), RankModel.load(out)


def differences(one: RankModel, other: RankModel) -> str:
    """By how much two models differ."""
    assert list(one.panel.index) == list(other.panel.index)
    assert one.provenance["sections"] == other.provenance["sections"]
    weights: Any = [m.head.state_dict()["weight"] for m in (one, other)]
    far = float((weights[0] - weights[1]).norm() / weights[1].norm())
    same = (one.panel["penalty"] == other.panel["penalty"]).mean()
    size = np.abs(one.panel["temperature"] / other.panel["temperature"] - 1).max()
    within = (one.uncertainty.within / other.uncertainty.within - 1).abs().max()  # type: ignore[union-attr]
    return (
        f"weights {far:.1e} of their norm, {same:.1%} of the penalties the same, temperatures "
        f"{size:.1e}, variances {float(within):.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", nargs=3)
    given = parser.parse_args()
    if given.one:
        n_genes, budget, out = given.one
        print(json.dumps(fit_one(given.folder, int(n_genes), float(budget), Path(out))))
        return
    size = QUICK if given.quick else FULL
    n_bytes = simulate(given.folder, size)
    told = f"{size.sections} sections x {size.spots:,} spots, {size.features} features, "
    print(f"{told}{size.genes:,} genes: {n_bytes / 2**30:.2f} GiB of features and counts")
    print(f"budget {size.budget} GiB, {n_bytes / 2**30 / size.budget:.1f} times less")
    print("| genes | where | wall, s | processor, s | peak above the start, GiB |")
    print("|---|---|---|---|---|")
    for n_genes in size.panels:
        whole, expected = run(given.folder, n_genes, 0)
        part, model = run(given.folder, n_genes, size.budget)
        for where, found in {"in memory": whole, "from disk": part}.items():
            times = f"{found['wall']:.1f} | {found['cpu']:.1f}"
            print(f"| {n_genes} | {where} | {times} | {found['peak'] / 2**30:.3f} |", flush=True)
        print(f"{n_genes} genes, differences: {differences(model, expected)}", flush=True)


if __name__ == "__main__":
    main()
