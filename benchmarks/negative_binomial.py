"""The negative binomial of a free level a section beside the list: scores, and seconds of a fit.

    python benchmarks/negative_binomial.py COHORT [--repeats 8] [--seconds]

COHORT is her2st as ``strank import st`` and ``strank embed`` leave it: every section is left out
once (known patients, but for the only one of patient B), and every patient. Then simulated
patients that are all new, three to train on and three to score, whose counts vary beyond chance
as the first column says. Of the list the scores, of the negative binomial what it has more;
means over genes and sections, with the standard error over repeats.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from new_patients import simulate
from numpy.typing import NDArray
from scipy import sparse

from strank import STRankRegressorCV, cross_validate, fit, read_cohort
from strank.cohort.training_set import panel_of, training_data
from strank.metrics import depth_matched_spearman, deviance_explained, lift

SCORES = {
    "deviance": deviance_explained,
    "depth_matched": depth_matched_spearman,
    "lift": lift,
}
LOSSES = ("list", "nb")


def real(cohort: dict) -> None:
    for by in ("section", "patient"):
        found = {}
        for loss in LOSSES:
            made = lambda train, loss=loss, **options: fit(train, loss=loss, **options)  # noqa: E731
            summary = cross_validate(cohort, by=by, fit=made).summary
            own = summary[summary["method"] == f"linear, {loss}"].set_index("section")
            found[loss] = own[list(SCORES)]
        told = {"list": found["list"], "nb, more": found["nb"] - found["list"]}
        print(f"\nleaving one {by} out")
        print(pd.concat(told, axis=1).round(4).to_string())


def _spots_of(cohort: dict) -> dict[str, NDArray]:
    """Spots as `simulate` gives them; 50 genes, by section."""
    data = training_data(cohort, panel_of(cohort, n_genes=50, genes=None)[0], "morphology")
    told = {"features": data.features, "counts": data.counts, "depth": data.library_size}
    return told | {"patient": data.section}


def seconds(data: dict[str, dict[str, NDArray]], repeats: int = 5) -> None:
    """Print the least processor time of each fit, choices included, in turns."""
    for name, spots in data.items():
        least = dict.fromkeys(LOSSES, np.inf)
        for _ in range(repeats):
            for loss in LOSSES:
                start = time.process_time()
                _fitted(spots, loss)
                least[loss] = min(least[loss], time.process_time() - start)
        told = ", ".join(f"{loss} {value:.2f} s" for loss, value in least.items())
        print(f"{name}: {told}, {least['nb'] / least['list']:.1f} times as long")


def simulated(dispersion: float, shared: float, seed: int) -> dict[str, float]:
    drawn = simulate(np.random.default_rng(seed), 6, shared, dispersion)
    train, new = ({k: v[rows] for k, v in drawn.items()} for rows in _halves(drawn["patient"]))
    about = {"section": new["patient"], "library_size": new["depth"]}
    found = {loss: _fitted(train, loss) for loss in LOSSES}
    scores = {
        loss: model.predict(new["features"]) * model.choice_.temperature
        for loss, model in found.items()
    }
    values = {}
    for name, score in SCORES.items():
        of_list, of_nb = (np.nanmean(score(scores[k], new["counts"], **about)) for k in LOSSES)
        values |= {name: of_list, f"{name}, more": of_nb - of_list}
    return values | {"dispersion_": float(np.median(found["nb"].dispersion_))}


def _halves(patient: NDArray) -> tuple[NDArray, NDArray]:
    return patient < 3, patient >= 3


def _fitted(train: dict[str, NDArray], loss: str) -> STRankRegressorCV:
    spots = {"section": train["patient"], "offset": np.log(train["depth"])}
    counts = sparse.csr_matrix(train["counts"])
    return STRankRegressorCV(objective=loss).fit(train["features"], counts, **spots)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cohort", type=Path)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--seconds", action="store_true", help="only these")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "All-NaN slice|Mean of empty", RuntimeWarning)
    cohort = dict(read_cohort(options.cohort, encoder="morphology"))
    seconds(
        {
            "her2st": _spots_of(cohort),
            "simulated, three patients": simulate(np.random.default_rng(0), 3, 0.5),
        }
    )
    if options.seconds:
        return
    real(cohort)
    rows = []
    for dispersion in (0.0, 0.3, 1.0, 3.0):
        for shared in (0.2, 0.5, 1.0):
            seeds = range(options.repeats)
            runs = pd.DataFrame([simulated(dispersion, shared, seed) for seed in seeds])
            error = runs.filter(like="more").sem().add_suffix(" ±")
            rows.append({"dispersion": dispersion, "shared": shared, **runs.mean(), **error})
    print("\nsimulated new patients")
    print(pd.DataFrame(rows).round(4).to_string(index=False))


if __name__ == "__main__":
    main()
