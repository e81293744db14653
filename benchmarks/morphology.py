"""What variants of the built-in features are worth, and how fast they are.

    python benchmarks/morphology.py speed
    python benchmarks/morphology.py variants COHORT DEMO... -o OUT

COHORT is a cohort folder of her2st; every DEMO a folder with st/ (by `strank.simulate`, its truth
included) and cohort/, its import. Features are kept in OUT. Every variant gets the exact list head,
50 genes chosen and penalties found on training sections. her2st: each section is predicted from the
other four, C2..C5 (one patient, whose other sections are in training) and B4 (another patient)
apart. Simulated: each patient is predicted from the others. scc is Spearman with log1p(CP10k),
matched is depth-matched Spearman, r is Pearson with the true log rates; means over genes, sections.

Windows are described by `describe_patch` at 224 px. "n" are windows
whose hematoxylin and eosin were scaled first, so that the 95 % quantiles over the slide's own
tissue are always the same. "around" is the mean of the spot's window over its six nearest spots.

benchmarks/morphology.md keeps the table and what follows from it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import pandas as pd
import typer
from anndata import AnnData
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from strank import fit, read_cohort
from strank.cohort.contract import patients_of
from strank.cohort.store import read_h5ad
from strank.encoders.base import Field
from strank.encoders.morphology.encoder import Morphology
from strank.encoders.morphology.patch import describe_patch
from strank.encoders.morphology.stain import TISSUE_DENSITY, optical_density, unmixing_matrix
from strank.evaluation.scores import score_section
from strank.metrics.correlation import correlation
from strank.slides.slide import Slide, read_field, slide_of, thumbnail

app = typer.Typer(add_completion=False, help=__doc__.partition("\n")[0])

SIDES = {"100": 100.0, "150": 150.0, "250": 250.0, "450": 450.0, "900": 900.0}
VARIANTS = {
    "version 1": ("150", "450"),
    "version 2": ("100", "250", "450"),
    "100 in place of 150": ("100", "450"),
    "with 100": ("100", "150", "450"),
    "with 250": ("150", "250", "450"),
    "with 100 and 250": ("100", "150", "250", "450"),
    "with 900": ("150", "450", "900"),
    "900 in place of 450": ("150", "900"),
    "with around": ("150", "450", "around"),
    "normalised": ("150n", "450n"),
    "normalised, with 900": ("150n", "450n", "900n"),
    "plain and normalised": ("150", "450", "150n", "450n"),
}
# Quantiles of hematoxylin and eosin over tissue that slides are scaled to.
_TARGET, _SHARE, _REFERENCE_UM = np.array([0.75, 0.55]), 0.95, 8.0


# --- features ---


def normaliser(slide: Slide) -> NDArray[np.float64]:
    """Matrix that scales the stains in an optical density of the slide, ``[3, 3]``."""
    density = optical_density(thumbnail(slide, _REFERENCE_UM)[0])
    tissue = density[density.mean(-1) > TISSUE_DENSITY]
    unmix = unmixing_matrix()
    found = np.quantile(tissue @ unmix[:2].T, _SHARE, axis=0)
    scale = np.append(_TARGET / np.maximum(found, 0.05), 1.0)
    return np.linalg.inv(unmix) @ np.diag(scale) @ unmix


def describe(section: AnnData, block: str) -> NDArray[np.float32]:
    """Features of the spots' windows, ``[n_spots, n_features]``."""
    slide, um = slide_of(section), SIDES[block.removesuffix("n")]
    matrix = normaliser(slide).astype(np.float32) if block.endswith("n") else None
    rows = []
    for centres in np.array_split(section.obsm["spatial"], 1 + section.n_obs // 64):
        for patch in read_field(slide, centres, um=um, pixels=224):
            if matrix is not None:
                density = cv2.transform(optical_density(patch), matrix)
                patch = np.clip(256 * 10**-density - 1, 0, 255).round().astype(np.uint8)
            rows.append(list(describe_patch(patch, um).values()))
    return np.array(rows, np.float32)


def features(section: AnnData, block: str, kept: Path) -> NDArray[np.float32]:
    if block == "around":
        tree = cKDTree(section.obsm["spatial"])
        nearest = tree.query(section.obsm["spatial"], 7)[1][:, 1:]
        return features(section, "150", kept)[nearest].mean(1)
    path = kept / f"{section.obs['section'].iloc[0]}-{block}.npy"
    if not path.is_file():
        kept.mkdir(parents=True, exist_ok=True)
        np.save(path, describe(section, block))
    return np.load(path)


# --- scores ---


def score(
    cohort: dict[str, AnnData], blocks: tuple[str, ...], kept: Path, by: dict, truth: Path | None
) -> pd.DataFrame:
    """One row a section: it is left out with all others of its group, ``by`` section."""
    for section in cohort.values():
        section.obsm["x"] = np.hstack([features(section, block, kept) for block in blocks])
    rows = []
    for group in sorted(set(by.values())):
        model = fit({n: a for n, a in cohort.items() if by[n] != group}, encoder="x")
        for name in (name for name in cohort if by[name] == group):
            scores = np.asarray(model.predict(cohort[name]).X)
            table = score_section({"": scores}, cohort[name], model.panel.index)
            row = {"section": name, "scc": table.scc.mean(), "matched": table.depth_matched.mean()}
            if truth is not None:
                true = read_h5ad(truth / f"{name}.h5ad")[cohort[name].obs_names, model.panel.index]
                row["r"] = np.nanmean(correlation(scores, np.asarray(true.X, np.float64)))
            rows.append(row)
    return pd.DataFrame(rows)


@app.command()
def variants(
    cohort: Annotated[Path, typer.Argument(help="Cohort folder of her2st.")],
    simulated: Annotated[list[Path], typer.Argument(metavar="DEMO...", help="Simulated.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="For features and tables.")],
) -> None:
    """Held-out scores of every variant, side by side."""
    data = [("her2st", cohort, None)]
    data += [(demo.name, demo / "cohort", demo / "st" / "truth") for demo in simulated]
    tables = []
    for variant, blocks in VARIANTS.items():
        for name, folder, truth in data:
            sections = read_cohort(folder)
            by = patients_of(sections) if truth else {section: section for section in sections}
            table = score(sections, blocks, out / name, by, truth)
            tables.append(table.assign(variant=variant, data=name))
            typer.echo(f"{variant}, {name}: {table.mean(numeric_only=True).round(4).to_dict()}")
            pd.concat(tables).to_csv(out / "sections.csv", index=False, float_format="%.5f")
    rows = pd.concat(tables)
    rows["of"] = np.where(rows.data != "her2st", "simulated", "C2..C5")
    rows.loc[(rows.data == "her2st") & (rows.section == "B4"), "of"] = "B4"
    wide = rows.pivot_table(["scc", "matched", "r"], "variant", "of", sort=False)
    wide.columns = [f"{of} {measure}" for measure, of in wide.columns]
    typer.echo(wide.round(3).to_string())


# --- speed ---


def blobs(n_spots: int, field: Field, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Dark discs of 8 µm, 4,000 a mm², on pink."""
    patches = np.full((n_spots, field.pixels, field.pixels, 3), (210, 150, 200), np.uint8)
    pixels_per_um = field.pixels / field.um
    for patch in patches:
        for x, y in rng.integers(0, field.pixels, (round(4000e-6 * field.um**2), 2)).tolist():
            cv2.circle(patch, (x, y), round(4 * pixels_per_um), (70, 50, 120), thickness=-1)
    return patches


@app.command()
def speed(n_spots: int = 100, repeats: int = 5) -> None:
    """Spots and patches (224 px) a second, of one thread and of all cores."""
    rng = np.random.default_rng(0)
    patches = [blobs(n_spots, field, rng) for field in Morphology().fields]
    for threads in (1, None):
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            Morphology(threads=threads).encode(patches)
            seconds.append(time.perf_counter() - start)
        rate = n_spots / min(seconds)
        typer.echo(f"{threads or 'all'}: {rate:.0f} spots/s, {rate * len(patches):.0f} patches/s")


if __name__ == "__main__":
    app()
