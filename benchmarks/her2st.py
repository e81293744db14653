"""The whole way on the five real sections of her2st, in numbers.

    python benchmarks/her2st.py ../shared/data/her2st

Imports, embeds with the built-in features, times the fit of 50 genes on four sections with the
choice of the penalties, and scores every section by the model trained on the other four. Nothing
is chosen on a scored section by the code; the built-in features, though, were developed looking at
these five sections (see benchmarks/morphology.py), so the scores flatter them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from strank import cross_validate, fit, read_cohort
from strank.encoders.embedding import embed
from strank.io import find_st, read_st, write_sections


def prepare(data: Path, cohort: Path) -> None:
    write_sections((read_st(data, section=name) for name in find_st(data)), cohort)
    start = time.perf_counter()
    done = embed(cohort)
    seconds = time.perf_counter() - start
    spots = sum(entry.n_spots for entry in done if not entry.done_before)
    print(f"embed: {spots} spots, {3 * spots / seconds:.0f} patches of 224 px a second")


def time_fit(train: dict, n_genes: int, repeats: int = 5) -> None:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        model = fit(train, n_genes=n_genes)
        seconds.append(time.perf_counter() - start)
    low, high = min(seconds), max(seconds)
    print(f"fit: {n_genes} genes, {list(train)}, penalties chosen: {low:.2f} to {high:.2f} s")
    print(f"     {model.provenance['solver']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--cohort", type=Path, help="keep the cohort there")
    parser.add_argument("--genes", type=int, default=50)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as scratch:
        folder = options.cohort or Path(scratch) / "cohort"
        prepare(options.data, folder)
        cohort = read_cohort(folder, encoder="morphology")
    time_fit({name: cohort[name] for name in ("C2", "C3", "C4", "C5")}, options.genes)
    summary = cross_validate(cohort, by="section", n_genes=options.genes).summary
    table = summary.pivot_table("scc", "section", "method", sort=False)
    table.loc["mean of C2 to C5"] = table.loc[["C2", "C3", "C4", "C5"]].mean()
    print(table.drop(index="mean").round(3).to_string())


if __name__ == "__main__":
    main()
