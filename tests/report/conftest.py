"""A folder as ``strank benchmark`` writes it, small, and with names that a page must not run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from PIL import Image
from scipy import sparse

from strank.cohort.contract import SectionInfo, counts_checksum, make_section
from strank.cohort.store import write_h5ad
from strank.evaluation.results import write_parts
from strank.evaluation.scores import SCORES as ALL_SCORES
from strank.files import safe_name, write_json

EVIL = "<img src=x onerror=alert(1)>"
GENES = [EVIL, "A&B", "</script><script>alert(2)</script>", *(f"G{i}" for i in range(9))]
PATIENTS = {"A1": "A", "A2": "A", "B1": "B", "C1": "C"}
METHODS = ["linear, list", "mlp, <b>list</b>", "mlp, poisson", "ridge"]
LOG_RATES = ["linear, list", "mlp, poisson"]
SCORES = ["scc", "depth_matched", "lift", "p_value"]
FOLDS = {"A1": "A", "A2": "A", "B1": "B 1", "C1": "C"}
N_SPOTS = 40


@dataclass(frozen=True)
class Written:
    """The folder of a benchmark, that of its cohort, and the tables in memory."""

    folder: Path
    cohort: Path
    results: pd.DataFrame
    genes: pd.DataFrame
    predictions: dict[tuple[str, str, str], AnnData]


def _section(name: str, folder: Path) -> AnnData:
    rng = np.random.default_rng([*name.encode()])
    image = folder / f"{name}.png"
    # Red grows to the right, green downwards.
    down, across = np.mgrid[:600, :700]
    shades = np.stack([across * 255 / 700, down * 255 / 600, np.full_like(down, 90)], axis=-1)
    Image.fromarray(shades.astype(np.uint8)).save(image)
    spots = pd.DataFrame(rng.uniform(60, 540, (N_SPOTS, 2)), columns=["x", "y"])
    spots.index = [f"{i}x{i}" for i in range(N_SPOTS)]
    counts = sparse.csr_matrix(rng.poisson(rng.lognormal(2, 0.5, (N_SPOTS, len(GENES)))))
    info = SectionInfo(str(image), "0" * 64, 2.0, 100.0, 200.0, "ST", {"reader": "test"})
    return make_section(
        counts, spots=spots, genes=pd.Index(GENES), section=name, patient=PATIENTS[name], info=info
    )


def _predictions(sections: dict[str, AnnData], folder: Path) -> dict[tuple[str, str, str], AnnData]:
    rng, made = np.random.default_rng(1), {}
    for encoder in ("mine", "other"):
        for fold in sorted(set(FOLDS.values())):
            tests = [name for name in PATIENTS if FOLDS[name] == fold]
            spots = [f"{name}:{i}x{i}" for name in tests for i in range(N_SPOTS)]
            for method in METHODS:
                adata = AnnData(
                    rng.normal(0, 0.5, (len(tests) * N_SPOTS, 6)).astype(np.float32),
                    obs=pd.DataFrame({"section": np.repeat(tests, N_SPOTS)}, index=spots),
                    # Only scores that are no log rates have one.
                    var=pd.DataFrame(
                        {"slope": 1.0} if method not in LOG_RATES else {}, index=GENES[:6]
                    ),
                    obsm={"spatial": np.concatenate([sections[n].obsm["spatial"] for n in tests])},
                )
                about = {"method": method, "seed": 0, "encoder": encoder, "name": fold}
                about["shared_patients"] = ["C"] if fold == "C" else []
                adata.uns["strank_benchmark"] = json.dumps(about)
                where = folder / "predictions" / safe_name(encoder) / "6" / safe_name(fold)
                write_h5ad(adata, where / f"{safe_name(method)}.h5ad")
                made[encoder, fold, method] = adata
    return made


def _tables() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Results, facts of genes and summary; patient C counts as known."""
    rng = np.random.default_rng(2)
    keys = {
        "method": [*METHODS, "library size", "shuffled"],
        "encoder": ["mine", "other"],
        "genes": ["6", "all"],
        "seed": [0, 1],
        "section": list(PATIENTS),
        "gene": GENES,
        "score": SCORES,
    }
    results = pd.MultiIndex.from_product(keys.values(), names=keys).to_frame(index=False)
    results = results[(results["genes"] == "all") | results["gene"].isin(GENES[:6])]
    # Only what is trained step by step has several seeds.
    results = results[(results["seed"] == 0) | results["method"].str.startswith("mlp")]
    results["fold"] = results["section"].map(FOLDS)
    results["patient"] = results["section"].map(PATIENTS)
    results["patient_seen"] = results["patient"] == "C"
    results["value"] = rng.uniform(0.01, 0.9, len(results))
    results.loc[(results["gene"] == "G3") & (results["score"] == "scc"), "value"] = np.nan
    facts = ["encoder", "genes", "fold", "section", "patient_seen", "gene"]
    genes = results[facts].drop_duplicates()
    genes["mean_counts"] = rng.lognormal(1, 1, len(genes))
    for name in ("scc", "pearson", "depth_matched"):
        genes[f"ceiling_{name}"] = rng.uniform(0.3, 1, len(genes))
    by = ["encoder", "genes", "patient_seen", "method", "score"]
    summary = results[results["score"] != "p_value"].groupby(by)["value"].mean()
    summary = summary.rename("mean").reset_index()
    summary["low"], summary["high"] = summary["mean"] - 0.05, summary["mean"] + 0.04
    reference = summary["method"] == "linear, list"
    for name in ("difference", "difference_low", "difference_high"):
        summary[name] = np.where(reference, np.nan, rng.normal(size=len(summary)))
    summary["fraction_of_ceiling"] = np.where(summary["score"] == "lift", np.nan, 0.4)
    return results, genes, summary.assign(n_sections=3, n_genes=12)


def write_dataset(folder: Path, results: pd.DataFrame, genes: pd.DataFrame) -> None:
    """Results, a row a score, and facts of genes: a partition an encoder, panel and fold."""
    keys = [name for name in results if name not in ("score", "value")]
    wide = results.pivot(index=keys, columns="score", values="value").reset_index()  # noqa: PD010
    wide = wide.reindex(columns=[*keys, *ALL_SCORES]).sort_values(["method", "seed"])
    names = ["encoder", "genes", "fold"]
    of_genes = {found: rows.drop(columns=names) for found, rows in genes.groupby(names)}
    for found, rows in wide.groupby(names):
        task = dict(zip(names, found, strict=True))
        write_parts(folder, task, (rows.drop(columns=names), of_genes[found]), {})


@pytest.fixture(scope="session")
def benchmark_folder(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder, cohort = (tmp_path_factory.mktemp(name) for name in ("benchmark", "cohort"))
    sections = {name: _section(name, cohort) for name in PATIENTS}
    for name, adata in sections.items():
        write_h5ad(adata, cohort / f"{name}.h5ad")
    predictions = _predictions(sections, folder)
    results, genes, summary = _tables()
    write_dataset(folder, results, genes)
    summary.to_csv(folder / "summary.csv", index=False)
    facts = {
        "strank_version": "0.2.0",
        "protocol": {"name": "mine & yours", "folds": "patient", "headline": "depth_matched"},
        "cohort": str(cohort),
        "warnings": ["few patients", "<script>alert(3)</script>"],
        "sections": {
            name: {
                "patient": PATIENTS[name],
                "n_spots": N_SPOTS,
                "counts_sha256": counts_checksum(adata),
                "image": adata.uns["strank"]["image"],
            }
            for name, adata in sections.items()
        },
        **{"encoders": ["mine", "other"], "genes": ["6", "all"], "reference": "linear, list"},
        **{"seeds": 2, "notes": ["a note"], "seconds": 12.3, "command": "strank benchmark"},
    }
    facts["protocol"]["sha256"] = "ab" * 32
    write_json(folder / "benchmark.json", facts)
    return Written(folder, cohort, results, genes, predictions)
