"""Tables of a benchmark that are larger than memory: what summary and page need.

Simulated: 200 sections of 50 patients in ten folds, 2,000 genes and 8 methods, every score of each
(3.2 million rows of nine scores), and predictions of a panel of 50 genes for the maps. Partitions
are written as the benchmark writes them, by a process of its own; so are summary and page made, and
the peak is that of the whole process (``ru_maxrss``), imports included.

    python benchmarks/results.py [--quick] [-o FOLDER]

Measured on 2 cores: see `results.md`, which this writes.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

METHODS = ["linear, list", "ridge", "centred ridge", "linear, poisson", "linear, pair"]
NO_IMAGE = ["library size", "shuffled", "within section"]
N_SPOTS, N_FOLDS, N_MAPPED = 1_000, 10, 50


def facts_of(folder: Path, n_sections: int, n_genes: int) -> dict[str, Any]:
    sections = {
        f"S{i:03}": {"patient": f"P{i % 50}", "n_spots": N_SPOTS, "counts_sha256": "0" * 64}
        for i in range(n_sections)
    }
    return {
        "strank_version": "0",
        "protocol": {"name": "simulated", "headline": "depth_matched", "sha256": "0" * 64},
        "sections": sections,
        "encoders": ["simulated"],
        "genes": [str(N_MAPPED), str(n_genes)],
        "reference": METHODS[0],
        **{"methods": METHODS, "seeds": 1, "warnings": [], "notes": [], "failed": []},
    }


def write_scores(folder: Path, facts: dict[str, Any], size: int, fold: int) -> None:
    """Partitions of a task: scores that differ between methods, genes and sections."""
    from strank.evaluation.results import write_parts
    from strank.evaluation.scores import SCORES

    rng = np.random.default_rng([size, fold])
    sections = list(facts["sections"])[fold::N_FOLDS]
    genes = [f"GENE{i}" for i in range(size)]
    keys = {"method": sorted([*METHODS, *NO_IMAGE]), "seed": [0], "section": sections}
    table = pd.MultiIndex.from_product([*keys.values(), genes], names=[*keys, "gene"])
    table = table.to_frame(index=False)
    patient = {name: facts["sections"][name]["patient"] for name in sections}
    table.insert(3, "patient", table["section"].map(patient))
    table.insert(4, "patient_seen", False)
    level = rng.normal(0.2, 0.05, len(table))
    for score in SCORES:
        table[score] = rng.uniform(0, 1, len(table)) if score == "p_value" else level
        table[score] += rng.normal(0, 0.05, len(table)) if score != "p_value" else 0
    about = table[table["method"] == METHODS[0]][["section", "patient", "gene", "patient_seen"]]
    about = about.assign(mean_counts=rng.lognormal(0, 1, len(about)), n_spots=N_SPOTS)
    about = about.assign(n_matched=N_SPOTS, independent_spots=rng.uniform(5, 50, len(about)))
    for name in ("scc", "pearson", "depth_matched"):
        about[f"ceiling_{name}"] = rng.uniform(0.2, 1, len(about))
    task = {"encoder": "simulated", "genes": str(size), "fold": f"F{fold}"}
    write_parts(folder, task, (table, about), {})


def write_predictions(folder: Path, facts: dict[str, Any], fold: int) -> None:
    from anndata import AnnData

    from strank.cohort.store import write_h5ad
    from strank.files import safe_name

    rng = np.random.default_rng(fold)
    sections = np.repeat(list(facts["sections"])[fold::N_FOLDS], N_SPOTS)
    obs = pd.DataFrame({"section": sections}, [f"{s}:{i}" for i, s in enumerate(sections)])
    places = np.stack(np.divmod(np.arange(len(sections)) % N_SPOTS, 32), axis=1) * 100.0
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(N_MAPPED)])
    for method in METHODS:
        about = {"method": method, "seed": 0, "encoder": "simulated", "shared_patients": []}
        values = rng.normal(0, 0.5, (len(sections), N_MAPPED)).astype(np.float32)
        made = AnnData(values, obs=obs, var=var, obsm={"spatial": places})
        made.uns["strank_benchmark"] = json.dumps(about)
        where = folder / "predictions/simulated" / str(N_MAPPED) / f"F{fold}"
        write_h5ad(made, where / f"{safe_name(method)}.h5ad", compression=None)


def generate(folder: Path, n_sections: int, n_genes: int) -> str:
    from strank.files import write_json

    facts = facts_of(folder, n_sections, n_genes)
    write_json(folder / "benchmark.json", facts)
    for fold in range(N_FOLDS):
        write_predictions(folder, facts, fold)
        for size in (N_MAPPED, n_genes):
            write_scores(folder, facts, size, fold)
    return f"{sum(p.stat().st_size for p in folder.rglob('part.parquet')) / 1e6:.0f} MB of Parquet"


def summarise(folder: Path) -> str:
    from strank.studies.benchmark.tables import write_summary

    summary, _ = write_summary(folder, "depth_matched")
    return f"{len(summary)} rows"


def report(folder: Path) -> str:
    from strank.report.benchmark import write_report

    made = write_report(folder)
    files = [path.stat().st_size for path in made.files.iterdir()] if made.files else []
    return f"page of {made.n_bytes / 1e6:.1f} MB, {len(files)} files of {sum(files) / 1e6:.0f} MB"


STEPS = {step.__name__: step for step in (generate, summarise, report)}


def alone(step: str, folder: Path, *sizes: int) -> dict[str, Any]:
    """Do a step in a process of its own: seconds, and its peak."""
    command = [sys.executable, __file__, "--step", step, "-o", str(folder), *map(str, sizes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="40 sections and 200 genes.")
    parser.add_argument("-o", "--output", type=Path, help="Where the simulated folder is kept.")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("sizes", nargs="*", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        start, cpu = time.perf_counter(), time.process_time()
        what = STEPS[given.step](given.output, *given.sizes)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        print(json.dumps({"what": what, "peak": peak, **found}))
        return
    sizes = (40, 200) if given.quick else (200, 2_000)
    with tempfile.TemporaryDirectory() as place:
        folder = given.output or Path(place)
        rows = {step: alone(step, folder, *(sizes if step == "generate" else ())) for step in STEPS}
    lines = [
        f"{sizes[0]} sections × {sizes[1]:,} genes × {len(METHODS + NO_IMAGE)} methods "
        f"({np.prod(sizes) * len(METHODS + NO_IMAGE) / 1e6:.2f} million rows of nine scores), and "
        f"{N_MAPPED} genes with maps of {N_SPOTS:,} spots a section; {platform.machine()}, "
        f"{'quick' if given.quick else 'whole'}",
        "",
        "| step | seconds | CPU s | peak, GiB | |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {step} | {row['seconds']:.1f} | {row['cpu']:.1f} | {row['peak']:.2f} | "
            f"{row['what']} |"
            for step, row in rows.items()
        ),
    ]
    print("\n".join(lines))
    if not given.quick:
        Path(__file__).with_suffix(".md").write_text(
            "# Results beyond memory\n\nBy `python benchmarks/results.py`.\n\n"
            + "\n".join(lines)
            + "\n"
        )
    worst = max(rows[step]["peak"] for step in ("summarise", "report"))
    print(f"\nBelow 2 GB: {'yes' if worst * 2**30 < 2e9 else 'NO'}")


if __name__ == "__main__":
    main()
