"""Legacy Spatial Transcriptomics (ST) folders, as published with her2st.

Layout: ``images/<section>.jpg``, ``counts/<section>.tsv.gz`` (spots ``<x>x<y>`` in rows, genes in
columns) and ``spots/<section>_selection.tsv`` (``x y new_x new_y pixel_x pixel_y selected``).
Spots have a diameter of 100 µm and stand on a grid of 200 µm.
"""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.cohort.contract import check_counts
from strank.errors import InputError, some
from strank.files import sha256
from strank.io.sections import Origin, build_section, name_genes, write_sections
from strank.slides.slide import IMAGE_SUFFIXES, open_slide

SPOT_DIAMETER_UM = 100.0

SPOT_PITCH_UM = 200.0

PATIENT_PATTERN = r"^[A-Za-z]+"

_COLUMNS = ["x", "y", "pixel_x", "pixel_y"]


class StFiles(NamedTuple):
    """The three files of a section."""

    section: str
    image: Path
    counts: Path
    spots: Path


def import_st(
    folder: Path,
    cohort: Path,
    *,
    patient_pattern: str = PATIENT_PATTERN,
    advance: Callable[[int], object] | None = None,
) -> dict[str, AnnData]:
    """Read an ST folder and write it as a cohort; nothing is written unless all can be read.

    Parameters
    ----------
    folder
        With ``images/``, ``counts/`` and ``spots/``.
    cohort
        The folder to write to.
    patient_pattern
        As in `read_st_section`.
    advance
        Called with 1 after every section read.

    Returns
    -------
    dict[str, AnnData]
        Section name to section, sorted.

    Raises
    ------
    InputError
        As `find_sections` and `read_st_section`, or if ``cohort`` cannot be written.
    """
    sections = []
    for files in find_sections(folder):
        sections.append(read_st_section(files, patient_pattern=patient_pattern))
        if advance is not None:
            advance(1)
    return write_sections(sections, cohort)


def find_sections(folder: Path) -> list[StFiles]:
    """List the sections of an ST folder, sorted by name.

    Raises
    ------
    InputError
        For an absent folder, or a section that lacks one of its three files.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    kinds = {
        "images": {
            p.stem: p for p in _files(folder / "images") if p.suffix.lower() in IMAGE_SUFFIXES
        },
        "counts": _by_suffix(folder / "counts", r"\.tsv(\.gz)?$"),
        "spots": _by_suffix(folder / "spots", r"_selection\.tsv(\.gz)?$"),
    }
    names = sorted(set().union(*kinds.values()))
    if not names:
        raise InputError(f"{folder}: no sections; it needs images/, counts/*.tsv.gz and spots/")
    for name in names:
        absent = [kind for kind, files in kinds.items() if name not in files]
        if absent:
            present = next(files[name] for files in kinds.values() if name in files)
            raise InputError(
                f"{folder}: section {name} has {present.parent.name}/{present.name} but nothing in "
                f"{' and '.join(absent)}/; add it or take the section out"
            )
    return [StFiles(name, *(files[name] for files in kinds.values())) for name in names]


def read_st_section(files: StFiles, *, patient_pattern: str = PATIENT_PATTERN) -> AnnData:
    """Read one section into the data contract.

    Spots that stand in only one of the two tables, or that the selection marks as outside the
    tissue, are dropped; ``uns["strank"]["provenance"]`` says how many.

    Parameters
    ----------
    files
        What `find_sections` found.
    patient_pattern
        Regular expression searched in the section's name; the first group, or else the whole
        match, is the patient. By default the leading letters.

    Raises
    ------
    InputError
        For anything in the files that cannot be used, named by file, spot and gene.
    """
    origin = Origin(files.section, _patient(files.section, patient_pattern))
    counts, spot_names, genes = _read_counts(files.counts)
    spots = _read_spots(files.spots)
    selected = spots[spots["selected"] != 0] if "selected" in spots else spots
    if selected.empty:
        raise InputError(f"section {files.section}: no spot of {files.spots.name} is selected")
    common = selected.index[selected.index.isin(spot_names)]
    if common.empty:
        raise InputError(
            f"section {files.section}: no spot stands in both {files.counts.name} and "
            f"{files.spots.name} (e.g. {some(spot_names, 2)}; {some(selected.index, 2)})"
        )
    pitch = pixels_per_pitch(spots, name=str(files.spots))
    provenance = {
        "reader": "st",
        "counts_file": str(files.counts.resolve()),
        "counts_sha256": sha256(files.counts),
        "spots_file": str(files.spots.resolve()),
        "dropped_spots": {
            "in counts only": int((~spot_names.isin(spots.index)).sum()),
            "in selection only": int((~spots.index.isin(spot_names)).sum()),
            "not selected": len(spots) - len(selected),
        },
    }
    kept = selected.loc[common].rename(columns={"x": "array_x", "y": "array_y"})
    kept = kept.rename(columns={"pixel_x": "x", "pixel_y": "y"})
    return build_section(
        counts[spot_names.get_indexer(common)],
        spots=kept[["array_x", "array_y", "x", "y"]],
        genes=name_genes(genes, None, name=str(files.counts)),
        origin=origin,
        slide=open_slide(files.image, SPOT_PITCH_UM / pitch),
        technology="ST",
        spot_diameter_um=SPOT_DIAMETER_UM,
        spot_pitch_um=SPOT_PITCH_UM,
        provenance=provenance,
    )


def pixels_per_pitch(spots: pd.DataFrame, *, name: str) -> float:
    """Pixels between neighbouring grid positions, from an affine fit of pixels on array positions.

    The fit uses every spot. The distance to the nearest neighbour would be too short: spots are
    printed with jitter, and the nearest is the one that jitter brought closer.

    Parameters
    ----------
    spots
        Columns ``x y`` (array position) and ``pixel_x pixel_y``.
    name
        File named in an error.

    Examples
    --------
    >>> x, y = np.mgrid[0:3, 0:3].reshape(2, -1)
    >>> spots = pd.DataFrame({"x": x, "y": y, "pixel_x": 50 + 290 * x, "pixel_y": 290 * y})
    >>> round(pixels_per_pitch(spots, name="C2"), 6)
    290.0
    """
    array = np.column_stack([spots[["x", "y"]].to_numpy(np.float64), np.ones(len(spots))])
    fit, _, rank, _ = np.linalg.lstsq(array, spots[["pixel_x", "pixel_y"]].to_numpy(), rcond=None)
    area = abs(np.linalg.det(fit[:2]))
    if rank < 3 or area < 1:
        raise InputError(f"{name}: the spots do not span a grid, so µm per pixel is unknown")
    return float(np.sqrt(area))


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def _by_suffix(folder: Path, pattern: str) -> dict[str, Path]:
    return {re.sub(pattern, "", p.name): p for p in _files(folder) if re.search(pattern, p.name)}


def _patient(section: str, pattern: str) -> str:
    try:
        match = re.search(pattern, section)
    except re.error as error:
        raise InputError(
            f"--patient-pattern {pattern!r} is not a regular expression: {error}"
        ) from error
    found = (match.group(1) if match.re.groups else match.group(0)) if match else None
    if not found:
        raise InputError(
            f"section {section}: --patient-pattern {pattern!r} finds no patient in its name"
        )
    return found


def _read_counts(path: Path) -> tuple[sparse.csr_matrix, pd.Index, pd.Index]:
    """Read counts, spot names and genes; refuse duplicates and what is not a count."""
    # pandas would rename a duplicated gene silently, so the header is read by itself.
    genes = pd.Index(_header(path)[1:])
    try:
        table = pd.read_csv(path, sep="\t", index_col=0, header=None, skiprows=1, low_memory=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error
    spots = table.index.astype(str)
    if table.shape[1] != len(genes):
        raise InputError(
            f"{path}: {len(genes)} genes in the header, {table.shape[1]} columns below"
        )
    for what, index in {"spot": spots, "gene": genes}.items():
        if not index.is_unique:
            raise InputError(
                f"{path}: {what} {some(index[index.duplicated()].unique())} stands twice"
            )
    table.columns = genes
    values = _numeric(table, path)
    check_counts(sparse.csr_matrix(values), spots=spots, genes=genes, name=str(path))
    return sparse.csr_matrix(values), spots, genes


def _header(path: Path) -> list[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", newline="") as file:
            return next(csv.reader(file, delimiter="\t"))
    except (StopIteration, OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: empty or damaged table ({error})") from error


def _numeric(table: pd.DataFrame, path: Path) -> np.ndarray:
    for gene in table.columns[[dtype.kind not in "iuf" for dtype in table.dtypes]]:
        wrong = pd.to_numeric(table[gene], errors="coerce").isna()
        if wrong.any():
            spot = table.index[wrong][0]
            raise InputError(
                f"{path}: spot {spot}, gene {gene}: {table.loc[spot, gene]!r} is not a number"
            )
    values = table.to_numpy(np.float64)
    if np.isnan(values).any():
        row, column = np.argwhere(np.isnan(values))[0]
        raise InputError(f"{path}: spot {table.index[row]}, gene {table.columns[column]}: no value")
    return values


def _read_spots(path: Path) -> pd.DataFrame:
    try:
        spots = pd.read_csv(path, sep="\t")
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error
    absent = [column for column in _COLUMNS if column not in spots]
    if absent:
        raise InputError(f"{path}: lacks column {some(absent)}")
    for column in _COLUMNS:
        wrong = ~np.isfinite(pd.to_numeric(spots[column], errors="coerce"))
        if wrong.any():
            raise InputError(
                f"{path}: row {int(np.flatnonzero(wrong)[0]) + 2}, column {column}: "
                f"{spots[column][wrong].iloc[0]!r} is not a number"
            )
    spots.index = pd.Index(
        spots["x"].astype(int).astype(str) + "x" + spots["y"].astype(int).astype(str)
    )
    if not spots.index.is_unique:
        raise InputError(f"{path}: spot {some(spots.index[spots.index.duplicated()])} stands twice")
    return spots
