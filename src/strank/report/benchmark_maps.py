"""Observed and predicted maps of a benchmark's test sections, small enough for one page."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from strank.cohort.contract import counts_checksum, section_info
from strank.cohort.store import read_h5ad, read_section
from strank.errors import InputError
from strank.functional.metrics import log1p_cp10k
from strank.report.benchmark_data import Benchmark, encoded
from strank.slides.image import read_region, slide_of, thumbnail
from strank.slides.pixels import ArrayPixels

__all__ = ["TestSection", "map_of", "prediction_files", "test_sections"]

_THUMBNAIL_UM = 8.0
_MARGIN_UM = 150.0
_MOST_PIXELS = 1_000
_QUALITY = 80


@dataclass(frozen=True)
class TestSection:
    """A test section with all predictions for the smallest panel.

    Attributes
    ----------
    name, fold
        What it is called; a section may be tested in several folds.
    patients
        ``"known"`` if other sections of its patient were trained on, or ``"new"``.
    genes
        The panel of its fold.
    positions
        Spot centres (x, y) in pixels of the full image.
    scores
        Encoder and method to predictions, ``[n_spots, n_genes]``.
    observed
        The section with its counts, or ``None``.
    """

    __test__ = False

    name: str
    fold: str
    patients: str
    genes: pd.Index
    positions: NDArray[np.float64]
    scores: dict[tuple[str, str], NDArray[np.float32]]
    observed: AnnData | None


def test_sections(
    benchmark: Benchmark, cohort: Path | None, notes: list[str]
) -> Iterator[TestSection]:
    """Go through the test sections with predictions, those of one fold in memory at a time.

    Parameters
    ----------
    benchmark
        Where the predictions are.
    cohort
        Folder with the counts, or ``None`` to do without.
    notes
        What is missing is added here, in words.

    Raises
    ------
    InputError
        If predictions of a fold are for different spots or genes.
    """
    for paths in prediction_files(benchmark):
        files = sorted(((_about(path), path) for path in paths), key=lambda f: f[0]["seed"])
        first = read_h5ad(paths[0])
        scores: dict[tuple[str, str], NDArray[np.float32]] = {}
        for about, path in files:
            found = read_h5ad(path)
            if not (found.var_names.equals(first.var_names) and found.shape == first.shape):
                raise InputError(f"{path}: other spots or genes than in {paths[0].name}")
            # Of several seeds the first stands for the method.
            scores.setdefault((about["encoder"], about["method"]), np.asarray(found.X))
        shared = files[0][0]["shared_patients"]
        for name in first.obs["section"].astype(str).unique():
            rows = np.asarray(first.obs["section"] == name)
            positions = np.asarray(first.obsm["spatial"], dtype=np.float64)[rows]
            yield TestSection(
                name=name,
                fold=unquote(paths[0].parent.name),
                patients="known" if _patient(benchmark, name) in shared else "new",
                genes=first.var_names,
                positions=positions,
                scores={key: values[rows] for key, values in scores.items()},
                observed=None if cohort is None else _observed(benchmark, cohort, name, notes),
            )


def prediction_files(benchmark: Benchmark) -> list[list[Path]]:
    """Files of each fold, of all encoders and methods, for the smallest panel that has any."""
    root = benchmark.folder / "predictions"
    for genes in sorted((g for g in map(str, benchmark.facts["genes"]) if g.isdigit()), key=int):
        by_fold: dict[str, list[Path]] = {}
        for path in sorted(root.glob(f"*/{genes}/*/*.h5ad")):
            if not path.name.startswith("."):
                by_fold.setdefault(path.parent.name, []).append(path)
        if by_fold:
            return list(by_fold.values())
    return []


def _about(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        about = read_elem(file["uns/strank_benchmark"])
    about = json.loads(about) if isinstance(about, str) else about
    return {"seed": 0, "shared_patients": (), "encoder": unquote(path.parents[2].name), **about}


def _patient(benchmark: Benchmark, section: str) -> str | None:
    return benchmark.facts["sections"].get(section, {}).get("patient")


def _observed(benchmark: Benchmark, cohort: Path, name: str, notes: list[str]) -> AnnData | None:
    try:
        section = read_section(cohort / f"{name}.h5ad")
    except InputError as error:
        notes.append(f"No observed counts: {error}")
        return None
    expected = benchmark.facts["sections"].get(name, {}).get("counts_sha256")
    if expected not in (None, counts_checksum(section)):
        notes.append(
            f"No observed counts: section {name} in {cohort} has other counts than the benchmark"
        )
        return None
    return section


def map_of(section: TestSection, notes: list[str]) -> dict[str, Any]:
    """Values of a section as one byte a spot and gene, and its image, ready for JSON.

    All values are about the mean of the gene in the section. A byte is 127 at that mean and 0 or
    254 at the gene's ``limits``; 255 is no value.

    Parameters
    ----------
    section
        What to draw.
    notes
        What is missing is added here, in words.
    """
    observed = section.observed
    picture = None if observed is None else _picture(observed, notes)
    scale = 1.0 if observed is None else section_info(observed).um_per_pixel
    corner = section.positions.min(0) - _MARGIN_UM if picture is None else picture.pop("corner")
    return {
        **{"section": section.name, "fold": section.fold, "patients": section.patients},
        "genes": list(section.genes),
        "xy": ((section.positions - corner) * scale).round().astype(int).T.tolist(),
        "unit": "px" if observed is None else "µm",
        "diameter": _diameter(section),
        "image": picture,
        "observed": None if observed is None else _bytes(_target(observed, section.genes)),
        "depth": None if observed is None else _bytes(_log_depth(observed)),
        "predicted": [
            {"encoder": encoder, "method": method, **_bytes(values)}
            for (encoder, method), values in section.scores.items()
        ],
    }


def _diameter(section: TestSection) -> float:
    if section.observed is not None:
        return section_info(section.observed).spot_diameter_um
    # Without the section's facts: half the distance to the next spot.
    nearest = cKDTree(section.positions).query(section.positions, k=2)[0][:, 1]
    return float(np.median(nearest) / 2) if len(nearest) > 1 else 1.0


def _target(section: AnnData, genes: pd.Index) -> NDArray[np.float64]:
    measured = genes.isin(section.var_names)
    values = np.full((section.n_obs, len(genes)), np.nan)
    counts = section[:, genes[measured]].X
    values[:, measured] = log1p_cp10k(counts, section.obs["library_size"]).toarray()
    return values


def _log_depth(section: AnnData) -> NDArray[np.float64]:
    return np.log(np.maximum(section.obs[["library_size"]].to_numpy(np.float64), 1))


def _bytes(values: NDArray) -> dict[str, Any]:
    about_mean = values.astype(np.float64) - values.mean(0)
    limits = np.abs(about_mean).max(0)
    share = np.divide(about_mean, limits, out=np.zeros_like(about_mean), where=limits > 0)
    codes = np.where(np.isfinite(about_mean), np.round(share * 127) + 127, 255).astype(np.uint8)
    return {
        "codes": encoded(np.ascontiguousarray(codes.T)),
        "limits": [float(f"{limit:.4g}") for limit in np.nan_to_num(limits)],
    }


def _picture(section: AnnData, notes: list[str]) -> dict[str, Any] | None:
    """H&E around the spots as JPEG, and where it lies in pixels of the full image."""
    info = section_info(section)
    try:
        slide = slide_of(section)
    except InputError as error:
        notes.append(f"No H&E: {error}")
        return None
    positions, margin = np.asarray(section.obsm["spatial"]), _MARGIN_UM / info.um_per_pixel
    low = np.floor((positions.min(0) - margin).clip(0)).astype(int)
    high = np.ceil(positions.max(0) + margin).astype(int)
    high = np.minimum(high, slide.size)
    part = read_region(slide, *low, *(high - low))
    size = (high - low) * info.um_per_pixel
    cropped = replace(slide, source=ArrayPixels(part))
    small, _ = thumbnail(cropped, max(_THUMBNAIL_UM, float(size.max()) / _MOST_PIXELS))
    file = BytesIO()
    Image.fromarray(small).save(file, "JPEG", quality=_QUALITY)
    content = b64encode(file.getvalue()).decode()
    return {"corner": low, "size": size.round(1).tolist(), "jpeg": content}
