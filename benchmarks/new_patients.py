"""How large scores are on patients not seen, as against what they say: a grid of simulated ones.

``python benchmarks/new_patients.py [REPEATS]``: patients have so much of the variance of a gene's
weights in common (as by ``CountDesign.shared`` in `strank.simulate`, which draws tissue, too); two,
three or six of them train, three others are scored. Beside the calibrated scores stand the same
without calibration, and the fit at the default penalty.
"""

from __future__ import annotations

import sys
import warnings
from functools import partial

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from strank import STRankRegressor, STRankRegressorCV
from strank.metrics.deviance import calibration_slope, deviance_explained

N_SPOTS, N_FEATURES, N_GENES, N_NEW = 200, 40, 50, 3
SHARED = (0.0, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0)


def simulate(
    rng: np.random.Generator, n_patients: int, shared: float, dispersion: float = 0.3
) -> dict[str, NDArray]:
    """Draw one section a patient: features, overdispersed counts, depth."""
    size = (1 + np.arange(N_FEATURES)) ** -0.5
    size /= np.sqrt((size**2).sum())
    common = rng.normal(size=(N_FEATURES, N_GENES))
    rates = np.exp(rng.uniform(np.log(0.3), np.log(20), N_GENES))
    strength = 0.6 * np.exp(rng.normal(0, 0.4, N_GENES))
    parts: dict[str, list[NDArray]] = {"features": [], "counts": [], "depth": [], "scores": []}
    for _ in range(n_patients):
        weights = np.sqrt(shared) * common
        weights = weights + np.sqrt(1 - shared) * rng.normal(size=common.shape)
        features = (rng.normal(size=(N_SPOTS, N_FEATURES)) + rng.normal(size=N_FEATURES)) * size
        scores = features @ weights * strength
        depth = np.exp(rng.normal(0, 0.5, N_SPOTS))
        noise = rng.gamma(1 / dispersion, dispersion, scores.shape) if dispersion else 1.0
        mean = rates * depth[:, None] * np.exp(scores - scores.mean(0)) * noise
        for name, values in {
            "features": features,
            "counts": rng.poisson(mean),
            "depth": depth,
            "scores": scores,
        }.items():
            parts[name].append(values)
    found = {name: np.concatenate(values) for name, values in parts.items()}
    return found | {"patient": np.repeat(np.arange(n_patients), N_SPOTS)}


def one(n_train: int, shared: float, seed: int) -> dict[str, float]:
    """Slope (median) and deviance (mean) over the genes of new patients, three ways."""
    drawn = simulate(np.random.default_rng(seed), n_train + N_NEW, shared)
    seen = drawn["patient"] < n_train
    train, new = ({name: v[rows] for name, v in drawn.items()} for rows in (seen, ~seen))
    data = train["features"], sparse.csr_matrix(train["counts"])
    spots = {"section": train["patient"], "offset": np.log(train["depth"])}
    # As `strank.fit` does it.
    model = STRankRegressorCV(shared="mostly" if n_train == 2 else False).fit(*data, **spots)
    plain = STRankRegressor().fit(*data, **spots)
    scores = model.predict(new["features"])
    ways = {
        "calibrated": scores * model.choice_.temperature,
        "by patient": scores,
        "default penalty": plain.predict(new["features"]),
    }
    about = {"section": new["patient"], "library_size": new["depth"]}
    found = {}
    for name, way in ways.items():
        found[f"{name}: slope"] = np.nanmedian(calibration_slope(way, new["counts"], **about))
        found[f"{name}: deviance"] = np.nanmean(deviance_explained(way, new["counts"], **about))
    return found


def main() -> None:
    """Print a row a number of patients and part that they share; medians and means of repeats."""
    # Where nothing holds, no slope is told.
    warnings.filterwarnings("ignore", "All-NaN slice|Mean of empty", RuntimeWarning)
    repeats, rows = int(sys.argv[1]) if len(sys.argv) > 1 else 8, []
    for n_train in (2, 3, 6):
        for shared in SHARED:
            runs = pd.DataFrame(map(partial(one, n_train, shared), range(repeats)))
            of_slope = runs.columns.str.endswith("slope")
            told = pd.concat([runs.loc[:, of_slope].median(), runs.loc[:, ~of_slope].mean()])
            rows.append({"patients": n_train, "shared": shared, **told[runs.columns]})
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
