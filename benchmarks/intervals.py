"""How often 90 % intervals of region contrasts hold where a model has not been: two tables.

``python benchmarks/intervals.py [REPEATS] [COHORT]``. First patients as simulated in
``new_patients.py``: two, three or six train, three others are predicted, and of each two regions
are compared, in five ways; ``counts alone`` leaves out what differs between patients. Then, if a
cohort is named, its sections, each left out: four regions of like features against the rest, and
how often the observed change lies in the interval, to which the noise of its counts is added.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import numpy as np
import pandas as pd
from new_patients import N_NEW, SHARED, simulate
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import logsumexp
from sklearn.cluster import KMeans

import strank
from strank.cohort.store import read_cohort
from strank.cohort.training_set import TrainingData
from strank.fitting.exact import ExactOptions, solve_list
from strank.model.uncertainty import Fitted, change_interval, fit_uncertainty


def two_regions(features: NDArray, seed: int) -> Iterator[tuple[str, NDArray]]:
    """Divide spots in several ways, ``[n_spots]`` each."""
    for number in (0, 5):
        yield f"feature {number}", features[:, number] > np.median(features[:, number])
    clusters = KMeans(4, n_init=1, random_state=seed).fit_predict(features)
    yield "two clusters", clusters < 2
    yield "a cluster", clusters == 0
    yield "random", np.random.default_rng(seed).random(len(features)) < 0.5


def change(scores: NDArray, region: NDArray) -> NDArray:
    """Log ratio of mean rates of a region and the rest, ``[n_genes]``."""
    inside, outside = (logsumexp(scores[r], axis=0) - np.log(r.sum()) for r in (region, ~region))
    return np.asarray(inside - outside)


def simulated(n_train: int, shared: float, seed: int) -> dict[str, float]:
    """Share of genes, patients and divisions of which the interval holds the true change."""
    drawn = simulate(np.random.default_rng(seed), n_train + N_NEW, shared)
    seen, patient = drawn["patient"] < n_train, drawn["patient"].astype(str)
    counts = sparse.csr_matrix(drawn["counts"][seen], dtype=np.float64)
    place, own = np.zeros((seen.sum(), 2)), patient[seen]
    data = TrainingData(drawn["features"][seen], counts, drawn["depth"][seen], own, place, own)
    solved = solve_list(data, ExactOptions(alike=n_train == 2))
    weight = solved.weight / solved.scale[:, None]
    unsure = fit_uncertainty(
        data, Fitted(weight, solved.scale, solved.table["penalty"], solved.refit)
    )
    alone = np.asarray(unsure.within.T)
    found: dict[str, list[NDArray]] = {}
    for new in np.unique(patient[~seen]):
        rows = patient == new
        features, truth = drawn["features"][rows], drawn["scores"][rows]
        scores, places = features @ weight, unsure.along(features - features.mean(0))
        for name, region in two_regions(features, seed):
            off = change(truth, region) - change(scores, region)
            for kind, variance in ((name, unsure.variance), ("counts alone", alone)):
                _, low, high = change_interval(
                    scores, places, variance, (region, ~region), seed=seed
                )
                found.setdefault(kind, []).append((low <= off) & (off <= high))
    return {kind: float(np.mean(held)) for kind, held in found.items()}


def real(folder: str) -> pd.DataFrame:
    """Share of genes and regions of each section left out of which the interval holds."""
    cohort = dict(read_cohort(folder, encoder="morphology"))
    rows = []
    for name, test in cohort.items():
        others = {other: section for other, section in cohort.items() if other != name}
        for aim in ("known-patients", "new-patients"):
            patients = {str(s.obs["patient"].iloc[0]) for s in others.values()}
            known = str(test.obs["patient"].iloc[0]) in patients
            model = strank.fit(others, encoder="morphology", n_genes=50, aim=aim)
            predicted = model.predict(test)
            counts = test[:, model.panel.index].X.toarray()
            depth = test.obs["library_size"].to_numpy()
            clusters = KMeans(4, n_init=1, random_state=0).fit_predict(test.obsm["morphology"])
            held, plain = [], []
            for region in (clusters == number for number in range(4)):
                inside, outside = (counts[r].sum(0) + 0.5 for r in (region, ~region))
                observed = np.log(inside / depth[region].sum() * depth[~region].sum() / outside)
                noise = np.sqrt(dispersion(counts, depth) * (1 / inside + 1 / outside))
                scores = np.asarray(predicted.X, dtype=np.float64)
                se, _, _ = change_interval(
                    scores,
                    predicted.obsm["score_axes"],
                    predicted.varm["score_variance"],
                    (region, ~region),
                    seed=0,
                )
                off = np.abs(observed - change(scores, region))
                held.append(off <= 1.645 * np.hypot(se, noise))
                plain.append(off <= 1.645 * noise)
            rows.append(
                {
                    "section": name,
                    "patient": "known" if known else "new",
                    "aim": aim,
                    "covered": np.mean(held),
                    "by noise alone": np.mean(plain),
                }
            )
    return pd.DataFrame(rows)


def dispersion(counts: NDArray, depth: NDArray) -> NDArray:
    """Variance of counts over that of Poisson's law, from neighbours in the list of spots."""
    rate = counts.sum(0) / depth.sum()
    left = (counts - depth[:, None] * rate) / np.sqrt(depth[:, None] * rate + 1e-9)
    return np.maximum((np.diff(left, axis=0) ** 2).mean(0) / 2, 1.0)


def main() -> None:
    """Print both tables."""
    repeats, rows = int(sys.argv[1]) if len(sys.argv) > 1 else 8, []
    for n_train in (2, 3, 6):
        for shared in SHARED:
            runs = pd.DataFrame(map(partial(simulated, n_train, shared), range(repeats)))
            ways = runs.drop(columns="counts alone")
            told = {"mean": ways.mean(axis=None), **runs.mean()}
            rows.append({"patients": n_train, "shared": shared, **told})
    print(pd.DataFrame(rows).round(3).to_string(index=False))
    if len(sys.argv) > 2:
        print(real(sys.argv[2]).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
