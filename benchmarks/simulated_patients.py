"""Whether simulated patients differ as real ones do: what scores are worth on those not seen.

    python benchmarks/simulated_patients.py COHORT [SEEDS]

COHORT is a cohort folder of her2st with features. Simulated cohorts have the size of the demo's
(four patients, two sections each); of each seed, images and features are made once, and counts for
every part of the variance of a gene's effects that patients share. 50 genes, exact list head.

    new          a patient is predicted from all others, penalties chosen by sections left out
    new, fitted  the same as `strank.fit` does it: penalties and sizes by patients left out
    within       beside it, strips of the section itself, each predicted from the rest of it
    known        a section of a patient, of which others are in training
    own          the same, and nothing else is in training: what a patient's own section tells

slope (median of genes), depth-matched SCC and deviance (means) of every section: the median over
all sections and seeds, and the range. Six seeds take 16 minutes of a core, half of it the fits.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank import fit, read_cohort
from strank.cohort.contract import patients_of
from strank.cohort.folds import make_folds
from strank.cohort.store import read_h5ad
from strank.encoders.embedding import embed
from strank.evaluation.methods import within_section
from strank.evaluation.scores import score_section
from strank.io import find_st, read_st, write_sections
from strank.simulate import CountDesign, simulate_cohort
from strank.simulate.counts import draw_counts, draw_genes, draw_patient
from strank.simulate.regions import REGIONS

SHARED = (0.1, 0.2, 0.4, 1.0)
MEASURES = {"slope": "median", "depth_matched": "mean", "deviance": "mean"}
Cohort = Mapping[str, AnnData]


def simulated(folder: Path, seed: int) -> Iterator[tuple[float, dict[str, AnnData]]]:
    """Sections of a seed with counts that differ in what patients share."""
    simulate_cohort(folder / "st", seed=seed)
    made = folder / "st"
    write_sections((read_st(made, section=name) for name in find_st(made)), folder / "cohort")
    embed(folder / "cohort")
    sections = read_cohort(folder / "cohort", encoder="morphology")
    for shared in SHARED:
        yield shared, dict(redrawn(sections, made / "truth", seed, shared))


def redrawn(
    sections: Cohort, truth: Path, seed: int, shared: float
) -> Iterator[tuple[str, AnnData]]:
    design, patients = CountDesign(shared=shared), patients_of(sections)
    genes = draw_genes(210, design=design, rng=np.random.default_rng(seed))
    for number, (name, section) in enumerate(sections.items()):
        own = np.random.default_rng([seed, ord(patients[name])])
        seen = read_h5ad(truth / f"{name}.h5ad")[section.obs_names].obs
        drawn = draw_counts(
            seen[[f"fraction_{region}" for region in REGIONS]].to_numpy(),
            seen["nuclei_per_mm2"].to_numpy(),
            genes=draw_patient(genes, design=design, rng=own),
            design=design,
            rng=np.random.default_rng([seed, 1000, number]),
        )
        found = section[:, genes.table.index].copy()
        found.X = sparse.csr_matrix(drawn.counts, dtype=np.float32)
        found.obs["library_size"] = drawn.counts.sum(1).astype(np.float64)
        yield name, found


def rows(cohort: Cohort) -> Iterator[dict]:
    """A row a section and way of training."""
    patients = patients_of(cohort)
    for fold in make_folds(patients, "patient"):
        for way, aim in {"new": "known-patients", "new, fitted": "new-patients"}.items():
            yield from scored(way, cohort, fold.train, fold.test, aim)
    for fold in make_folds(patients, "section"):
        if fold.shared_patients:
            yield from scored("known", cohort, fold.train, fold.test, "known-patients")
    for one, other in pairwise(cohort):
        if patients[one] == patients[other]:
            yield from scored("own", cohort, [one], [other], "known-patients")


def scored(way: str, cohort: Cohort, train, test, aim) -> Iterator[dict]:
    model = fit({name: cohort[name] for name in train}, aim=aim)
    panel = model.panel.index
    for name in test:
        found = {way: np.asarray(model.predict(cohort[name]).X)}
        if way == "new":
            found["within"] = within_section(cohort[name], panel, "morphology")
        for method, table in score_section(found, cohort[name], panel).groupby("method"):
            row = table[list(MEASURES)].agg(MEASURES).to_dict()
            yield {"way": method, "section": name} | row


def main() -> None:
    warnings.filterwarnings("ignore", "All-NaN slice|Mean of empty", RuntimeWarning)
    found = [
        row | {"data": "her2st"} for row in rows(read_cohort(sys.argv[1], encoder="morphology"))
    ]
    print(pd.DataFrame(found).drop(columns="data").round(3).to_string(index=False), flush=True)
    for seed in range(int(sys.argv[2]) if len(sys.argv) > 2 else 6):
        with tempfile.TemporaryDirectory() as folder:
            for shared, cohort in simulated(Path(folder), seed):
                found += [row | {"data": f"shared {shared:g}"} for row in rows(cohort)]
    told = pd.DataFrame(found).groupby(["data", "way"], sort=False)[list(MEASURES)]
    shown = told.agg(lambda v: f"{v.median():.2f} ({v.min():.2f} to {v.max():.2f})")
    print(shown.reset_index().to_string(index=False))


if __name__ == "__main__":
    main()
