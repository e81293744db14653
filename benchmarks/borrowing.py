"""Does borrowing strength between genes help? `STRankRegressorCV(borrow=True)` against without.

    python benchmarks/borrowing.py --cohort FOLDER       # the five sections of her2st, embedded
    python benchmarks/borrowing.py --cohort FOLDER --genes 600 --repeats 3 -o borrowing.csv

real: each section predicted from the other four, for genes drawn at random in strata of counts a
spot. simulated: true scores over the real features and depths of the first four sections, scored on
the fifth; `shared` genes follow four programs, `alone` share nothing, `none` has no signal; `noisy`
adds gamma noise and effects that differ between sections.

A gain is the list log-likelihood of the held-out section above that of library size alone, in nats
a gene and section; the difference is with borrowing minus without, its interval a bootstrap over
genes (which knows nothing of how few the sections are). r is the correlation with the true scores.
"""

from __future__ import annotations

import argparse
from functools import reduce
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from strank import STRankRegressorCV, read_cohort
from strank.cohort.training_set import TrainingData, training_data
from strank.metrics.deviance import list_gain

STRATA = {"< 0.1": (0.01, 0.1), "0.1 to 0.5": (0.1, 0.5), "0.5 to 2": (0.5, 2), "> 2": (2, np.inf)}
# Kind, standard deviation of the true scores, gamma noise, scores that differ between sections.
SIMULATED = {
    "shared": ("shared", 0.3, 0.0, 0.0),
    "shared, noisy": ("shared", 0.3, 0.5, 0.2),
    "alone": ("alone", 0.3, 0.0, 0.0),
    "none": ("none", 0.0, 0.0, 0.0),
}


def load(folder: Path, n_genes: int, seed: int) -> tuple[TrainingData, np.ndarray]:
    """Draw as many genes from every stratum; also the stratum of each."""
    cohort = read_cohort(folder, encoder="morphology")
    genes = reduce(
        lambda a, b: a.intersection(b, sort=False), [a.var_names for a in cohort.values()]
    )
    data = training_data(cohort, genes, "morphology")
    rate = np.asarray(data.counts.mean(0)).ravel()
    rng, picked, stratum = np.random.default_rng(seed), [], []
    for k, (low, high) in enumerate(STRATA.values()):
        among = np.flatnonzero((rate >= low) & (rate < high))
        some = rng.choice(among, min(len(among), n_genes // len(STRATA)), replace=False)
        picked, stratum = [*picked, *some], [*stratum, *[k] * len(some)]
    counts = data.counts[:, picked].astype(np.float64)
    return TrainingData(**{**vars(data), "counts": counts}), np.array(stratum)


def gain(scores: np.ndarray, counts: sparse.csr_matrix, library_size: np.ndarray) -> np.ndarray:
    """Log-likelihood of one section above that of library size alone, in nats a gene."""
    section = np.zeros(len(scores))
    return list_gain(scores, counts, section=section, library_size=library_size)[0]


def both(data: TrainingData, counts: sparse.csr_matrix, test: np.ndarray) -> list[np.ndarray]:
    """Scores of the test spots without and with borrowing."""
    train = ~test
    fitted = []
    for borrow in (False, True):
        model = STRankRegressorCV(borrow=borrow)
        model.fit(
            data.features[train],
            counts[train],
            section=data.section[train],
            offset=np.log(data.library_size[train]),
        )
        fitted.append(model.predict(data.features[test]))
    return fitted


def truth(kind: str, spread: float, features: np.ndarray, n: int, rng: np.random.Generator):
    """Scores of standard deviation ``spread`` (median), ``[n_spots, n_genes]``."""

    def unit(scores: np.ndarray) -> np.ndarray:
        return (scores - scores.mean(0)) / scores.std(0)

    def sparse_weights(width: int, many: int) -> np.ndarray:
        order = rng.random((features.shape[1], width)).argsort(0)
        return rng.normal(size=order.shape) * (order < many)

    if kind == "none":
        return np.zeros((len(features), n))
    own = unit(features @ sparse_weights(n, 3))
    if kind == "alone":
        scores = unit(features @ rng.normal(size=(features.shape[1], n)))
    else:
        programs = unit(features @ sparse_weights(4, 12))
        scores = unit(np.sqrt(0.7) * unit(programs @ rng.laplace(size=(4, n))) + np.sqrt(0.3) * own)
    return scores * spread * np.exp(0.5 * rng.normal(size=n))


def simulate(data: TrainingData, case: tuple, rng: np.random.Generator):
    """Draw counts of the observed means for true scores."""
    kind, spread, noise, between = case
    n = data.counts.shape[1]
    features = (data.features - data.features.mean(0)) / (data.features.std(0) + 1e-9)
    scores = truth(kind, spread, features, n, rng)
    counts = np.zeros(scores.shape)
    for name in np.unique(data.section):
        rows = data.section == name
        here = scores[rows] + truth("shared", between, features[rows], n, rng) * (between > 0)
        rate = data.library_size[rows, None] * np.exp(here)
        rate *= np.asarray(data.counts[rows].sum(0)) / rate.sum(0)
        counts[rows] = rng.poisson(rate * (rng.gamma(1 / noise, noise, rate.shape) if noise else 1))
    return sparse.csr_matrix(counts), scores


def compare(parts: list[np.ndarray], stratum: np.ndarray, seed: int = 0) -> list[dict]:
    """Rows of the table, from gains ``[n_sections or n_repeats, 2, n_genes]``."""
    gains, rows = np.stack(parts), []
    rng = np.random.default_rng(seed)
    for k, name in enumerate(STRATA):
        mine = gains[:, :, stratum == k].mean(0)
        difference = mine[1] - mine[0]
        draws = rng.choice(difference, (2000, len(difference))).mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
        rows.append(
            {"counts a spot": name, "without": mine[0].mean(), "with": mine[1].mean()}
            | {"difference": difference.mean(), "low": low, "high": high}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cohort", type=Path, required=True)
    parser.add_argument("--genes", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=2, help="of each simulation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", type=Path)
    options = parser.parse_args()

    data, stratum = load(options.cohort, options.genes, options.seed)
    parts: dict[str, list] = {"real: C2 to C5": [], "real: B4": []}
    for name in np.unique(data.section):
        test = data.section == name
        observed, depth = data.counts[test], data.library_size[test]
        gains = [gain(scores, observed, depth) for scores in both(data, data.counts, test)]
        parts["real: B4" if name == "B4" else "real: C2 to C5"].append(np.stack(gains))
    rows = [{"data": k} | row for k, gains in parts.items() for row in compare(gains, stratum)]

    test = data.section == np.unique(data.section)[-1]
    for case, facts in SIMULATED.items():
        gains, r = [], []
        for repeat in range(options.repeats):
            rng = np.random.default_rng([options.seed, repeat])
            counts, true = simulate(data, facts, rng)
            fitted = both(data, counts, test)
            observed, depth = counts[test], data.library_size[test]
            gains.append(np.stack([gain(scores, observed, depth) for scores in fitted]))
            r.append(
                [
                    [
                        np.corrcoef(a, b)[0, 1] if a.std() and b.std() else 0.0
                        for a, b in zip(true[test].T, scores.T, strict=True)
                    ]
                    for scores in fitted
                ]
            )
        table = compare(gains, stratum)
        for k, row in enumerate(table):
            without, given = np.mean(r, axis=0)[:, stratum == k].mean(1)
            rows.append({"data": f"simulated: {case}"} | row | {"r without": without, "r": given})
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.2f", na_rep=""))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
