"""What the page of a benchmark shows: tables, genes, maps, calibration."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from anndata import AnnData
from anndata.io import read_elem
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from strank.cohort.contract import counts_checksum, section_info
from strank.cohort.store import read_h5ad, read_section
from strank.errors import InputError, said_by, some
from strank.files import read_facts, read_written
from strank.hdf5_guard import check_hdf5
from strank.metrics.correlation import log1p_cp10k
from strank.metrics.significance import combine_table, false_discovery_rate
from strank.slides.slide import MASK_UM, slide_of, thumbnail

# Bytes of the values by gene on a page, and how many genes one table may have.
_BUDGET = 4_000_000

_LEAST_GENES, _MOST_GENES = 50, 2_000
_FACTS = ("protocol", "sections", "encoders", "genes", "reference")
_PATIENTS = {"true": "known", "false": "new"}
_BOARD = (
    *("encoder", "genes", "patients", "method", "score", "n_sections", "n_genes"),
    *("mean", "low", "high", "difference", "difference_low", "difference_high"),
    "fraction_of_ceiling",
)
_MARGIN_UM = 150.0
_MOST_PIXELS = 1_000
_QUALITY = 80


@dataclass(frozen=True)
class Benchmark:
    """A folder that ``strank benchmark`` wrote."""

    folder: Path
    #: Content of ``benchmark.json``.
    facts: dict[str, Any]
    #: ``summary.csv``, with ``patients`` ("known", "new" or "all") in place of ``patient_seen``.
    summary: pd.DataFrame


def open_benchmark(folder: Path) -> Benchmark:
    """Open a folder of ``strank benchmark``; refuse one that is none, or not whole."""
    if not (folder / "benchmark.json").is_file():
        raise InputError(f"{folder}: no benchmark.json there; make it with `strank benchmark`")
    facts = read_facts(folder / "benchmark.json")
    missing = [key for key in _FACTS if key not in facts]
    if missing:
        raise InputError(f"{folder}/benchmark.json lacks {some(missing)}; run the benchmark again")
    path = folder / "summary.csv"
    if not path.is_file():
        raise InputError(f"{path}: no such file; let `strank benchmark` come to its end first")
    try:
        summary = read_written(path, dtype={"genes": str}, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error
    seen = summary.get("patient_seen", pd.Series("all", index=summary.index))
    summary["patients"] = seen.astype(str).str.lower().map(_PATIENTS).fillna("all")
    missing = [column for column in _BOARD if column not in summary]
    if missing:
        raise InputError(f"{path} lacks columns {some(missing)}; run the benchmark again")
    return Benchmark(folder, facts, summary)


def leaderboard(benchmark: Benchmark) -> dict[str, list[Any]]:
    """Columns of the summary as JSON takes them."""
    text, numbers = _BOARD[:5], _BOARD[5:]
    table = benchmark.summary
    return {name: table[name].astype(str).tolist() for name in text} | {
        name: [float(f"{v:.5g}") if np.isfinite(v) else None for v in table[name].astype(float)]
        for name in numbers
    }


def encoded(values: NDArray) -> str:
    """Numbers as base64 of their little-endian bytes."""
    return b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def gene_tables(benchmark: Benchmark) -> Iterator[dict[str, Any]]:
    """Means over sections and seeds of every score, by gene: one table a panel and encoder.

    Of a panel with too many genes some are taken, evenly over their mean counts. Base64 of float32:
    ``values`` ``[n_methods, n_scores, n_genes]``, ``mean_counts`` and ``ceilings``.
    """
    summary = benchmark.summary
    groups = summary.groupby(["encoder", "genes"], sort=False)
    cells = summary["method"].nunique() * (summary["score"].nunique() + 2)
    n_tables = max(len(summary[["encoder", "genes", "patients"]].drop_duplicates()), 1)
    most = int(np.clip(_BUDGET / (4 * cells * n_tables), _LEAST_GENES, _MOST_GENES))
    for (encoder, genes), rows in groups:
        yield from _of_panel(benchmark.folder, encoder, genes, rows["patients"].unique(), most)


def _of_panel(
    folder: Path, encoder: str, genes: str, patients: Iterable[str], most: int
) -> Iterator[dict[str, Any]]:
    where = [("encoder", "==", encoder), ("genes", "==", genes)]
    ceilings = ["ceiling_scc", "ceiling_pearson", "ceiling_depth_matched"]
    facts = _read(
        folder / "genes.parquet", ["fold", "section", "gene", "mean_counts", *ceilings], where
    ).astype({"fold": str, "section": str, "gene": str})
    by_counts = facts.groupby("gene")["mean_counts"].mean().sort_values(ascending=False).index
    names = by_counts[np.unique(np.linspace(0, len(by_counts) - 1, most).round().astype(int))]
    results = _read(
        folder / "results.parquet",
        ["method", "seed", "fold", "section", "patient_seen", "gene", "score", "value"],
        [*where, ("gene", "in", list(names))],
    ).astype(dict.fromkeys(("method", "fold", "section", "gene", "score"), str))
    for kind in patients:
        rows = results if kind == "all" else results[results["patient_seen"] == (kind == "known")]
        if rows.empty:
            continue
        tested = rows[["fold", "section"]].drop_duplicates()
        about = facts.merge(tested).groupby("gene")[["mean_counts", *ceilings]].mean()
        shown = names[names.isin(about.index)]
        n_genes, about = len(about), about.reindex(shown).astype(np.float32)
        yield {
            **{"encoder": encoder, "genes": genes, "patients": kind},
            **{"names": shown.tolist(), "n_genes": n_genes},
            "n_sections": int(tested["section"].nunique()),
            **_by_gene(rows, shown),
            "mean_counts": encoded(about["mean_counts"].to_numpy()),
            "ceilings": {
                c.removeprefix("ceiling_"): encoded(about[c].to_numpy()) for c in ceilings
            },
        }


def _by_gene(rows: pd.DataFrame, names: pd.Index) -> dict[str, Any]:
    methods, scores = (rows[column].unique().tolist() for column in ("method", "score"))
    means = rows.groupby(["method", "score", "gene"], sort=False)["value"].mean()
    cells = pd.MultiIndex.from_product([methods, scores, names])
    table = means.reindex(cells).to_numpy(np.float64).reshape(len(methods), len(scores), -1)
    if "p_value" in scores:
        p = combine_table(rows[rows["score"] == "p_value"]).reindex(methods, columns=names)
        q = np.stack([false_discovery_rate(row) for row in p.to_numpy()])
        table[:, scores.index("p_value")] = p
        table, scores = np.concatenate([table, q[:, None]], axis=1), [*scores, "q_value"]
    return {"methods": methods, "scores": scores, "values": encoded(table.astype(np.float32))}


def _read(path: Path, columns: list[str], where: list[tuple[str, str, Any]]) -> pd.DataFrame:
    try:
        return pq.read_table(path, columns=columns, filters=where).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: not a readable table of a benchmark ({error}); run the benchmark again"
        ) from error


@dataclass(frozen=True)
class TestSection:
    """A test section with all predictions for the smallest panel."""

    __test__ = False

    name: str
    #: A section may be tested in several.
    fold: str
    #: "known" if other sections of its patient were trained on, or "new".
    patients: str
    genes: pd.Index
    #: Spot centres (x, y) in pixels of the full image.
    positions: NDArray[np.float64]
    #: Encoder and method to predictions, ``[n_spots, n_genes]``.
    scores: dict[tuple[str, str], NDArray[np.float32]]
    #: Which of them are log rates.
    log_rates: set[tuple[str, str]]
    observed: AnnData | None


def test_sections(
    benchmark: Benchmark, cohort: Path | None, notes: list[str]
) -> Iterator[TestSection]:
    """Go through the test sections with predictions, those of one fold in memory at a time.

    Notes of what is missing are added to ``notes``.
    """
    for paths in prediction_files(benchmark):
        files = sorted(((_about(path), path) for path in paths), key=lambda f: f[0]["seed"])
        first = read_h5ad(paths[0])
        scores: dict[tuple[str, str], NDArray[np.float32]] = {}
        log_rates = set()
        for about, path in files:
            found = read_h5ad(path)
            if not (found.var_names.equals(first.var_names) and found.shape == first.shape):
                raise InputError(f"{path}: other spots or genes than in {paths[0].name}")
            # Of several seeds the first stands for the method.
            key = about["encoder"], about["method"]
            scores.setdefault(key, np.asarray(found.X))
            # Other scores have a slope that makes them log rates.
            if "slope" not in found.var:
                log_rates.add(key)
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
                log_rates=log_rates,
                observed=None
                if cohort is None
                else _observed(benchmark, cohort, name, first.obs_names[rows], notes),
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
    check_hdf5(path)
    try:
        with h5py.File(path) as file:
            about = read_elem(file["uns/strank_benchmark"])
        about = dict(json.loads(about) if isinstance(about, str) else about)
    except Exception as error:  # h5py and anndata raise many kinds for a damaged file
        raise InputError(f"{path}: not of a benchmark ({said_by(error)}); run it again") from error
    return {"seed": 0, "shared_patients": (), "encoder": unquote(path.parents[2].name), **about}


def _patient(benchmark: Benchmark, section: str) -> str | None:
    return benchmark.facts["sections"].get(section, {}).get("patient")


def _observed(
    benchmark: Benchmark, cohort: Path, name: str, spots: pd.Index, notes: list[str]
) -> AnnData | None:
    """Read a section, at the spots that were predicted: a filter may have left some out."""
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
    return section[(name + ":" + section.obs_names.astype(str)).isin(spots)].copy()


def map_of(section: TestSection, notes: list[str]) -> dict[str, Any]:
    """Values of a section as one byte a spot and gene, and its image, ready for JSON.

    All values are about the mean of the gene in the section. A byte is 127 at that mean and 0 or
    254 at the gene's ``limits``; 255 is no value. Notes of what is missing are added to ``notes``.
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
    low = (positions.min(0) - margin).clip(0)
    high = np.minimum(positions.max(0) + margin, slide.size)
    finest = float((high - low).max()) * info.um_per_pixel / _MOST_PIXELS
    small, _ = thumbnail(slide, max(MASK_UM, finest))
    # Of whole pixels of the small picture.
    size = np.array(small.shape[1::-1])
    shrink = slide.size / size
    first = np.floor(low / shrink).astype(int)
    last = np.minimum(np.ceil(high / shrink).astype(int), size)
    file = BytesIO()
    part = small[first[1] : last[1], first[0] : last[0]]
    Image.fromarray(part).save(file, "JPEG", quality=_QUALITY)
    content = b64encode(file.getvalue()).decode()
    size_um = (last - first) * shrink * info.um_per_pixel
    return {"corner": first * shrink, "size": size_um.round(1).tolist(), "jpeg": content}
