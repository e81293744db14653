"""Legacy Spatial Transcriptomics (ST) folders, as published with her2st.

Layout: ``images/<section>.jpg``, ``counts/<section>.tsv.gz`` (spots ``<x>x<y>`` in rows, genes in
columns) and ``spots/<section>_selection.tsv`` (``x y new_x new_y pixel_x pixel_y selected``).
"""

from __future__ import annotations

import csv
import io
import re
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.cohort.arrays import (
    ST_1K,
    ST_2K,
    VISIUM,
    Lattice,
    Printed,
    assumed_width,
    choose_array,
    measure_grid,
)
from strank.cohort.contract import check_counts, whole_counts
from strank.cohort.genes import name_genes
from strank.cohort.names import clean_name
from strank.doors import unpacked
from strank.errors import InputError, said_by, some
from strank.files import sha256
from strank.io.sections import (
    Patients,
    build_section,
    choose_section,
    patient_of,
)
from strank.io.tables import (
    check_numbers,
    check_unique,
    most_rows,
    read_table,
    rows_at_once,
    table_parts,
)
from strank.slides.slide import IMAGE_SUFFIXES, open_slide

_COLUMNS = ["x", "y", "pixel_x", "pixel_y"]
_PATTERN = r"^[A-Za-z]+"
_SPOT = re.compile(r"\d+x\d+")


def read_st(
    path: Path | str,
    *,
    section: str | None = None,
    patient: str | None = None,
    patients: Patients = None,
    patient_pattern: str = _PATTERN,
    gene_id: bool = False,
    pitch_um: float | None = None,
) -> AnnData:
    """Read a section of legacy Spatial Transcriptomics into the data contract.

    Spots that stand in only one of the two tables, or that the selection marks as outside the
    tissue, are dropped; ``uns["strank"]["provenance"]`` says how many. µm per pixel is measured by
    the grid of spots: of a 1k array (33 x 35, every position used) 200 µm a step, of a 2k array
    (every other position, like the fields of one colour on a chessboard) 100 µm a step.

    Parameters
    ----------
    path
        Folder with ``images/``, ``counts/`` and ``spots/``, one file each a section.
    section
        Which; `find_st` lists them. ``None`` for the only one.
    patient, patients, gene_id
        As in `read_visium`.
    patient_pattern
        Where neither says it: a regular expression searched in the section's name, of which the
        first group, or else the whole match, is the patient. By default the leading letters.
    pitch_um
        Between the centres of neighbouring spots, where the array is another one, or too few spots
        tell it.

    Returns
    -------
    AnnData
        ``X`` the raw counts ``[n_spots, n_genes]``, ``obsm["spatial"]`` the centres in pixels of
        the image.

    Raises
    ------
    InputError
        For anything in the files that cannot be used, named by file, spot and gene.

    Examples
    --------
    >>> import strank
    >>> strank.io.read_st("her2st", section="C3")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: her2st: no such folder
    """
    path = Path(path)
    section, (image, counts_file, spots_file) = choose_section(path, _find(path), section)
    known = patient or patients is not None
    who = patient_of(section, patient, patients) if known else _patient(section, patient_pattern)
    counts, spot_names, genes = _read_counts(counts_file)
    spots = _read_spots(spots_file)
    selected = spots[spots["selected"] != 0] if "selected" in spots else spots
    if selected.empty:
        raise InputError(f"section {section}: no spot of {spots_file.name} is selected")
    common = selected.index[selected.index.isin(spot_names)]
    if common.empty:
        raise InputError(
            f"section {section}: no spot stands in both {counts_file.name} and "
            f"{spots_file.name} (e.g. {some(spot_names, 2)}; {some(selected.index, 2)})"
        )
    grid = measure_grid(spots[["x", "y"]], spots[["pixel_x", "pixel_y"]], name=str(spots_file))
    array, doubts = _array_of(grid, pitch_um, spots_file)
    kept = selected.loc[common].rename(columns={"x": "array_x", "y": "array_y"})
    kept = kept.rename(columns={"pixel_x": "x", "pixel_y": "y"})
    return build_section(
        counts[spot_names.get_indexer(common)],
        spots=kept[["array_x", "array_y", "x", "y"]],
        genes=name_genes(genes, None, gene_id=gene_id, name=str(counts_file)),
        section=section,
        patient=who,
        slide=open_slide(image, array.step_um / grid.step_px),
        technology=array.technology,
        spot_diameter_um=array.diameter_um,
        spot_pitch_um=array.pitch_um,
        provenance={
            "reader": "st",
            "counts_file": str(counts_file.resolve()),
            "counts_sha256": sha256(counts_file),
            "spots_file": str(spots_file.resolve()),
            "array": array.told,
            "notes": [*doubts, *assumed_width(array)],
            "dropped_spots": {
                "in counts only": int((~spot_names.isin(spots.index)).sum()),
                "in selection only": int((~spots.index.isin(spot_names)).sum()),
                "not selected": len(spots) - len(selected),
            },
        },
    )


def find_st(path: Path | str) -> list[str]:
    """Name the sections of an ST folder, sorted.

    Parameters
    ----------
    path
        As in `read_st`.

    Raises
    ------
    InputError
        For an absent folder, or a section that lacks one of its three files.

    Examples
    --------
    >>> import strank
    >>> strank.io.find_st("her2st")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: her2st: no such folder
    """
    return list(_find(Path(path)))


def _find(folder: Path) -> dict[str, list[Path]]:
    """Image, counts and spots of each section, sorted by name."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    images = {p.stem: p for p in _files(folder / "images") if p.suffix.lower() in IMAGE_SUFFIXES}
    kinds = {
        "images": images,
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
    return {name: [files[name] for files in kinds.values()] for name in names}


def _array_of(grid: Lattice, pitch_um: float | None, spots_file: Path) -> tuple[Printed, list[str]]:
    """Take the array that a user says or that the positions tell."""
    array, doubts = choose_array(grid, pitch_um, (ST_1K, ST_2K, VISIUM))
    if array is None:
        raise InputError(
            f"{spots_file}: neither a 1k array of ST (33 x 35) nor a 2k array (every other "
            f"position): {grid.told}; give the distance of neighbouring spots in µm with `pitch_um`"
        )
    return array, doubts


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))


def _by_suffix(folder: Path, pattern: str) -> dict[str, Path]:
    return {re.sub(pattern, "", p.name): p for p in _files(folder) if re.search(pattern, p.name)}


def _patient(section: str, pattern: str) -> str:
    told = f"`patient_pattern={pattern}`"
    try:
        match = re.search(pattern, section)
    except re.error as error:
        raise InputError(f"{told} is not a regular expression: {error}") from error
    found = clean_name(match.group(1 if match.re.groups else 0)) if match else ""
    if not found:
        raise InputError(f"section {section}: {told} finds no patient in its name")
    return found


def _read_counts(path: Path) -> tuple[sparse.csr_matrix, pd.Index, pd.Index]:
    """Read counts, spot names and genes; refuse duplicates and what is not a count."""
    # pandas would rename a duplicated gene silently, so the header is read by itself.
    genes = pd.Index(_header(path)[1:])
    check_unique(genes, f"{path}: gene")
    try:
        spots, parts = _plain_parts(path, len(genes))
    except (ValueError, OSError, EOFError):
        spots, parts = _any_parts(path, genes)
    check_unique(spots, f"{path}: spot")
    counts = whole_counts(sparse.csr_matrix(sparse.vstack(parts)))
    check_counts(counts, spots=spots, genes=genes, name=str(path))
    return counts, spots, genes


def _plain_parts(path: Path, n_genes: int) -> tuple[pd.Index, list[sparse.csr_matrix]]:
    """Read a table of numbers alone, in half the time of pandas; a ValueError for any other."""
    names, parts = list[str](), list[sparse.csr_matrix]()
    with unpacked(path) as file:
        lines = io.TextIOWrapper(file, "utf-8")
        next(lines, None)
        while batch := list(islice(lines, rows_at_once(n_genes))):
            fields = [line.partition("\t") for line in batch]
            names += [name for name, *_ in fields]
            # Others pandas may read in another way.
            if not all(_SPOT.fullmatch(name) for name, *_ in fields):
                raise ValueError("not the names of spots")
            numbers = (rest for *_, rest in fields)
            values = np.loadtxt(numbers, delimiter="\t", comments=None, ndmin=2)
            parts.append(sparse.csr_matrix(values))
            if values.shape != (len(batch), n_genes) or np.isnan(parts[-1].data).any():
                raise ValueError("gaps in the table")
            if len(names) > most_rows(path):
                raise ValueError("more rows than the file can hold")
    if not parts:
        raise ValueError("no rows")
    return pd.Index(names), parts


def _any_parts(path: Path, genes: pd.Index) -> tuple[pd.Index, list[sparse.csr_matrix]]:
    """Read a table as pandas does, and tell by spot and gene what is no number."""
    names, parts = [], []
    # A dtype for one column would take pandas a while for each of the others.
    options: dict[str, Any] = {"sep": "\t", "index_col": 0, "header": None}
    for part in table_parts(path, len(genes), skiprows=1, **options):
        if part.shape[1] != len(genes):
            raise InputError(
                f"{path}: {len(genes)} genes in the header, {part.shape[1]} columns below"
            )
        names.append(part.index.astype(str))
        parts.append(sparse.csr_matrix(_numeric(part.set_axis(genes, axis=1), path)))
    if not parts:
        raise InputError(f"{path}: empty or damaged table (no spots)")
    return names[0].append(names[1:]), parts


def _header(path: Path) -> list[str]:
    try:
        with unpacked(path) as file:
            return next(csv.reader(io.TextIOWrapper(file, "utf-8", newline=""), delimiter="\t"))
    except (StopIteration, OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: empty or damaged table ({said_by(error)})") from error


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
    spots = read_table(path, _COLUMNS, sep="\t")
    # As an editor counts, under the header.
    spots.index = pd.RangeIndex(2, 2 + len(spots))
    check_numbers(spots, _COLUMNS, f"{path}: row")
    x, y = (np.rint(spots[axis]).astype(int).astype(str) for axis in ("x", "y"))
    spots.index = pd.Index(x + "x" + y)
    check_unique(spots.index, f"{path}: spot")
    return spots
