"""What the page of a benchmark shows: tables, genes, maps, calibration."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
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
from strank.errors import InputError, said_by, some
from strank.evaluation.results import Group, cells_of
from strank.evaluation.scores import SCORES
from strank.files import read_facts, read_written
from strank.hdf5_guard import check_hdf5
from strank.metrics.correlation import log1p_cp10k
from strank.metrics.significance import false_discovery_rate
from strank.slides.slide import MASK_UM, slide_of, thumbnail
from strank.storage import check_seal

# Bytes of the values by gene of all tables, and how many genes a table has in any case.
_BUDGET = 200_000_000
_LEAST_GENES = 50
# Of a map, that are read together.
GENES = 64
_FACTS = ("protocol", "sections", "encoders", "genes", "reference")
_PATIENTS = {"true": "known", "false": "new"}
_SEEN = {"known": True, "new": False, "all": None}
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

    Where all would be too many, some genes are taken, evenly over their mean counts. Base64 of
    float32: ``values`` ``[n_methods, n_scores, n_genes]``, ``mean_counts`` and ``ceilings``.
    """
    summary = benchmark.summary
    groups = summary.groupby(["encoder", "genes"], sort=False)
    cells = summary["method"].nunique() * (summary["score"].nunique() + 2)
    n_tables = max(len(summary[["encoder", "genes", "patients"]].drop_duplicates()), 1)
    most = max(int(_BUDGET / (4 * cells * n_tables)), _LEAST_GENES)
    for (encoder, genes), rows in groups:
        facts = Group(benchmark.folder, encoder, genes, None).facts(["gene", "mean_counts"])
        by_counts = facts.groupby("gene", observed=True)["mean_counts"].mean()
        names = by_counts.sort_values(ascending=False).index.astype(str)
        if len(names) > most:
            names = names[np.linspace(0, len(names) - 1, most).round().astype(int)]
        for kind in rows["patients"].unique():
            yield _of_group(Group(benchmark.folder, encoder, genes, _SEEN[kind]), kind, names)


def _of_group(group: Group, kind: str, names: pd.Index) -> dict[str, Any]:
    ceilings = ["ceiling_scc", "ceiling_pearson", "ceiling_depth_matched"]
    facts = group.facts(["section", "gene", "mean_counts", *ceilings])
    about = facts.groupby("gene", observed=True)[["mean_counts", *ceilings]].mean()
    shown, n_genes = names[names.isin(about.index)], len(about)
    about = about.reindex(shown).astype(np.float32)
    return {
        **{"encoder": group.encoder, "genes": group.genes, "patients": kind},
        **{"names": shown.tolist(), "n_genes": n_genes},
        "n_sections": int(facts["section"].nunique()),
        **_by_gene(group, shown, cells_of(facts)),
        "mean_counts": encoded(about["mean_counts"].to_numpy()),
        "ceilings": {c.removeprefix("ceiling_"): encoded(about[c].to_numpy()) for c in ceilings},
    }


def _by_gene(group: Group, names: pd.Index, cells: pd.MultiIndex) -> dict[str, Any]:
    """Means over sections, folds and seeds, one method in memory at a time."""
    table = np.full((len(group.methods), len(SCORES) + 1, len(names)), np.nan, dtype=np.float32)
    at = SCORES.index("p_value")
    for means, method in zip(table, group.methods, strict=True):
        rows = group.scores(method, ["gene", *SCORES])
        found = rows.groupby("gene", observed=True)[list(SCORES)].mean().reindex(names)
        means[:-1] = found.to_numpy().T
    for means, (_, p) in zip(table, group.combined_p_values(cells), strict=True):
        listed = pd.Series(p, cells.levels[1])[names].to_numpy()
        means[at], means[-1] = listed, false_discovery_rate(listed)
    scores = [*SCORES, "q_value"]
    return {"methods": group.methods, "scores": scores, "values": encoded(table)}


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
    """Go through the test sections with predictions, those of one section in memory at a time.

    Notes of what is missing are added to ``notes``.
    """
    for paths in prediction_files(benchmark):
        first = read_h5ad(paths[0], backed="r")
        kept, log_rates = _methods(paths, first)
        sections = first.obs["section"].astype(str).to_numpy()
        shared = _about(paths[0])["shared_patients"]
        for name in dict.fromkeys(sections):
            rows = np.flatnonzero(sections == name)
            yield TestSection(
                name=name,
                fold=unquote(paths[0].parent.name),
                patients="known" if _patient(benchmark, name) in shared else "new",
                genes=first.var_names,
                positions=np.asarray(first.obsm["spatial"], dtype=np.float64)[rows],
                scores={key: _rows_of(path, rows) for key, path in kept.items()},
                log_rates=log_rates,
                observed=None
                if cohort is None
                else _observed(benchmark, cohort, name, first.obs_names[rows], notes),
            )
        first.file.close()


def _methods(
    paths: list[Path], first: AnnData
) -> tuple[dict[tuple[str, str], Path], set[tuple[str, str]]]:
    """Of each encoder and method the file of its first seed; and which of them are log rates."""
    kept: dict[tuple[str, str], Path] = {}
    log_rates = set()
    for about, path in sorted(((_about(path), path) for path in paths), key=lambda f: f[0]["seed"]):
        check_seal(path)
        found = read_h5ad(path, backed="r")
        if not (found.var_names.equals(first.var_names) and found.shape == first.shape):
            raise InputError(f"{path}: other spots or genes than in {paths[0].name}")
        key = about["encoder"], about["method"]
        kept.setdefault(key, path)
        # Other scores have a slope that makes them log rates.
        if "slope" not in found.var:
            log_rates.add(key)
        found.file.close()
    return kept, log_rates


def _rows_of(path: Path, rows: NDArray[np.intp]) -> NDArray[np.float32]:
    """Read what lies between the first and the last of some rows, which is theirs."""
    with h5py.File(path) as file:
        between = file["X"][rows[0] : rows[-1] + 1]
    return np.asarray(between[rows - rows[0]], dtype=np.float32)


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
    """Gather what is the same for all genes of a section: places of spots, image, depth.

    Notes of what is missing are added to ``notes``.
    """
    observed = section.observed
    picture = None if observed is None else _picture(observed, notes)
    scale = 1.0 if observed is None else section_info(observed).um_per_pixel
    corner = section.positions.min(0) - _MARGIN_UM if picture is None else picture.pop("corner")
    return {
        "xy": ((section.positions - corner) * scale).round().astype(int).T.tolist(),
        "unit": "px" if observed is None else "µm",
        "diameter": _diameter(section),
        "image": picture,
        "observed": observed is not None,
        "depth": None if observed is None else _bytes(_log_depth(observed)),
        "predicted": [{"encoder": encoder, "method": method} for encoder, method in section.scores],
    }


def map_values(section: TestSection) -> Iterator[dict[str, Any]]:
    """Observed and predicted values as one byte a spot and gene, of some genes at a time.

    All values are about the mean of the gene in the section. A byte is 127 at that mean and 0 or
    254 at the gene's ``limits``; 255 is no value.
    """
    observed = None if section.observed is None else _target(section.observed, section.genes)
    for start in range(0, len(section.genes), GENES):
        genes = slice(start, start + GENES)
        yield {
            "observed": None if observed is None else _bytes(observed[:, genes]),
            "predicted": [_bytes(values[:, genes]) for values in section.scores.values()],
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
