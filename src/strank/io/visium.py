"""Visium and Visium HD."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.cohort.arrays import (
    ST_2K,
    VISIUM,
    Lattice,
    Printed,
    assumed_width,
    choose_array,
    hd_barcodes,
    measure_grid,
)
from strank.cohort.genes import name_genes
from strank.errors import InputError, some
from strank.files import read_json
from strank.io.sections import (
    Patients,
    build_section,
    patient_of,
    run_of,
    section_name,
)
from strank.io.tables import check_columns, check_numbers, check_unique, read_table
from strank.io.tenx import (
    TenxMatrix,
    find_file,
    find_matrix,
    join_points,
    matrix_checksum,
    one_sample,
    pool_points,
    read_matrix,
    warn_unplaced,
)
from strank.slides.placement import open_measured

_NUMBERS = ["in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_FINEST_UM = 2.0
_COLUMNS = {"pxl_col_in_fullres": "x", "pxl_row_in_fullres": "y"}
_ARRAY = ["array_row", "array_col"]
_MOST_FACTOR = 1e9
_AS_TEXT: dict[str, Any] = {"header": None, "dtype": str, "keep_default_na": False}


def read_visium(
    path: Path | str,
    *,
    image: Path | str | None = None,
    section: str | None = None,
    patient: str | None = None,
    patients: Patients = None,
    um_per_pixel: float | None = None,
    um_per_pixel_override: bool = False,
    gene_id: bool = False,
    raw: bool = False,
    pitch_um: float | None = None,
) -> AnnData:
    """Read a run of Space Ranger (1.x to 4.x, with or without CytAssist) into the data contract.

    Spots under tissue that both the matrix and the positions hold are kept;
    ``uns["strank"]["provenance"]`` says how many others there were.

    Parameters
    ----------
    path
        ``outs``, or the folder that holds it; prefixes as files of GEO have them do not matter.
    image
        The full-resolution image that Space Ranger was given; its output holds reduced ones only.
    section
        Name; ``None`` for the folder's (``S1/outs`` is section S1). Of the output of
        `spaceranger aggr`, the ``library_id`` of a sample.
    patient
        Who the section came from.
    patients
        Table of sections and patients instead: a CSV file with columns ``section,patient``, or a
        mapping.
    um_per_pixel
        Of the image, if it is to be checked against the grid of spots, which measures it.
    um_per_pixel_override
        Take ``um_per_pixel`` even where the files say another scale (by more than 5 %), which is
        refused otherwise.
    gene_id
        Name genes by Ensembl id instead of symbol.
    raw
        Take the counts from ``raw_feature_bc_matrix``.
    pitch_um
        Between the centres of neighbouring spots, of arrays in Space Ranger's layout that are not
        Visium's: DBiT-seq and AtlasXomics have square grids, with twice the width of a channel.

    Returns
    -------
    AnnData
        ``X`` the raw counts ``[n_spots, n_genes]``, ``obsm["spatial"]`` the centres in pixels of
        the image.

    Raises
    ------
    InputError
        For anything in the files that cannot be used, named by file, spot and gene; without the
        full-resolution image, or if its µm per pixel contradicts the grid.

    Examples
    --------
    >>> import strank
    >>> strank.io.read_visium("S1/outs", image="S1.tif", patient="P1")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: S1/outs: no such folder
    """
    path = Path(path)
    section = section_name(path, section)
    patient = patient_of(section, patient, patients)
    image = _full_image(section, image)
    matrix_file, positions_file = _find(path, "raw" if raw else "filtered")
    matrix, positions, notes = _read_sample(matrix_file, positions_file, section)
    counts, barcodes, symbols, ids, dropped_features = matrix
    if hd_barcodes(barcodes) is not None:
        raise InputError(f"{matrix_file}: bins of Visium HD ({barcodes[0]}); use visium-hd")
    held, tissue = positions.index.isin(barcodes), positions["in_tissue"] == 1
    spots = positions[held & tissue]
    if spots.empty:
        raise InputError(
            f"section {section}: no spot under tissue stands in both {matrix_file.name} and "
            f"{positions_file.name} (e.g. {some(barcodes, 2)}; {some(positions.index, 2)})"
        )
    # Spots outside the tissue, too: the wider the grid, the better it is measured.
    pixels = positions[["pixel_x", "pixel_y"]]
    grid = measure_grid(positions[_ARRAY[::-1]], pixels, name=str(positions_file))
    array, doubts = _array_of(grid, pitch_um, positions_file)
    slide = open_measured(image, array.step_um / grid.step_px, um_per_pixel, um_per_pixel_override)
    array = _with_width(array, positions_file.parent, slide.um_per_pixel)
    return build_section(
        counts[barcodes.get_indexer(spots.index)],
        spots=spots.rename(columns={"pixel_x": "x", "pixel_y": "y"}).drop(columns="in_tissue"),
        genes=name_genes(symbols, ids, gene_id=gene_id, name=str(matrix_file)),
        section=section,
        patient=patient,
        slide=slide,
        technology=array.technology,
        spot_diameter_um=array.diameter_um,
        spot_pitch_um=array.pitch_um,
        provenance={
            "reader": "visium",
            "counts_file": str(matrix_file.resolve()),
            "counts_sha256": matrix_checksum(matrix_file),
            "spots_file": str(positions_file.resolve()),
            "array": array.told,
            "dropped_spots": {
                "in counts only": int((~barcodes.isin(positions.index)).sum()),
                "in positions only": int((tissue & ~held).sum()),
                "not in tissue": int((held & ~tissue).sum()),
            },
            "notes": [*notes, *doubts, *assumed_width(array)],
            "dropped_features": dropped_features,
        },
    )


def _array_of(
    grid: Lattice, pitch_um: float | None, positions_file: Path
) -> tuple[Printed, list[str]]:
    """Take the array that a user says or that the positions tell."""
    array, doubts = choose_array(grid, pitch_um, (VISIUM, ST_2K))
    if array is None:
        what = "a square grid" if grid.staggered is False else "not the array of Visium"
        raise InputError(
            f"{positions_file}: {what} ({grid.told}), and a Visium slide uses every other of 78 x "
            "128 or 128 x 224 positions; give the distance between the centres of neighbouring "
            "spots in µm with `pitch_um` (DBiT-seq, AtlasXomics: twice the width of a channel)"
        )
    return array, doubts


def _with_width(array: Printed, spatial: Path, um_per_pixel: float) -> Printed:
    """Take the width of spots of an array that is not known from the scale factors."""
    file = find_file(spatial, "scalefactors_json.json")
    if file is None or array.diameter_um != array.pitch_um:
        return array
    wide = um_per_pixel * _scale_factor(file, "spot_diameter_fullres")
    return array._replace(diameter_um=wide) if 0 < wide <= array.pitch_um else array


def _full_image(section: str, image: Path | str | None) -> Path:
    if image is None or re.search(r"tissue_(hi|low)res_image", Path(image).name):
        what = "Space Ranger's output holds" if image is None else f"{image} is"
        raise InputError(
            f"section {section}: {what} only a reduced image; give the full-resolution image that "
            "Space Ranger was run with: `image=FILE`"
        )
    return Path(image)


def _find(folder: Path, kind: str) -> tuple[Path, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    outs = folder / "outs" if (folder / "outs").is_dir() else folder
    is_hd = any((outs / name).is_dir() for name in ("binned_outputs", "segmented_outputs"))
    hint = "; for Visium HD use visium-hd" * is_hd
    matrix = find_matrix(outs, f"{kind}_feature_bc_matrix", hint)
    tables = ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv")
    names = [n for table in tables for n in (table, f"{table}.gz")]
    positions = find_file(outs / "spatial", *names) or find_file(outs, *names)
    if positions is None:
        raise InputError(
            f"{outs}: no spatial/tissue_positions.csv or tissue_positions_list.csv there; if there "
            "is a *spatial.tar.gz, unpack it"
        )
    return matrix, positions


def _read_positions(path: Path) -> pd.DataFrame:
    """Indexed by barcode: ``in_tissue, array_row, array_col, pixel_y, pixel_x``."""
    table = read_table(path, [], **({} if path.suffix == ".parquet" else _AS_TEXT))
    if path.suffix != ".parquet":
        # By content, since files of version 1 were given headers, too.
        first = table.iloc[0].str.strip().str.casefold()
        titled = int(first.iloc[0] == "barcode")
        head = first if titled else ["barcode", *_NUMBERS]
        table = table[titled:].rename(columns=dict(enumerate(head)))
    check_columns(table, ["barcode", *_NUMBERS], path)
    table = table.set_index("barcode")[_NUMBERS]
    table["in_tissue"] = table["in_tissue"].replace({"True": "1", "False": "0"})
    check_unique(table.index, f"{path}: barcode")
    check_numbers(table, _NUMBERS, f"{path}: barcode")
    # pandas' own parser is a last digit off, now and then.
    return table.astype(float).set_axis([*_NUMBERS[:3], "pixel_y", "pixel_x"], axis=1)


def _read_sample(
    matrix_file: Path, positions_file: Path, section: str
) -> tuple[TenxMatrix, pd.DataFrame, list[str]]:
    """Read counts, positions that are named as they are, and what is to be told of them."""
    matrix, positions, notes = one_sample(
        read_matrix(matrix_file),
        _read_positions(positions_file),
        section=section,
        file=matrix_file,
    )
    positions = _match_suffixes(positions, matrix.barcodes)
    n_placed = int(matrix.barcodes.isin(positions.index).sum())
    unplaced = warn_unplaced(len(matrix.barcodes), n_placed, positions_file.name)
    return matrix, positions, notes + unplaced


def _match_suffixes(positions: pd.DataFrame, barcodes: pd.Index) -> pd.DataFrame:
    """Name spots as the matrix does, where the two differ by the suffix ``-1`` only."""
    bare, wanted = (n.str.replace(r"-\d+$", "", regex=True) for n in (positions.index, barcodes))
    if positions.index.isin(barcodes).any() or not (bare.is_unique and wanted.is_unique):
        return positions
    at = wanted.get_indexer(bare)
    return positions.set_axis(pd.Index(np.where(at >= 0, barcodes[at], positions.index)), axis=0)


def read_visium_hd(
    path: Path | str,
    *,
    image: Path | str | None = None,
    section: str | None = None,
    patient: str | None = None,
    patients: Patients = None,
    um_per_pixel: float | None = None,
    um_per_pixel_override: bool = False,
    gene_id: bool = False,
    bin_um: float = 16.0,
) -> AnnData:
    """Read bins of one size of a Visium HD run into the data contract.

    A size that Space Ranger has written is taken as it is. Another one is pooled from the bins of
    2 µm, on squares that start where Space Ranger's own do, at the edge of the capture area.

    Parameters
    ----------
    path
        Space Ranger's ``outs``, or a folder that holds ``outs``, ``binned_outputs`` or the bins.
    image, section, patient, patients, um_per_pixel_override, gene_id
        As in `read_visium`.
    um_per_pixel
        Of the image, if it is to be checked against what Space Ranger has measured.
    bin_um
        Side of a bin in µm, a multiple of 2.

    Returns
    -------
    AnnData
        ``X`` the raw counts ``[n_bins, n_genes]``, ``obsm["spatial"]`` the centres in pixels of
        the image.

    Raises
    ------
    InputError
        For anything in the files that cannot be used, a size that bins of 2 µm do not make, and an
        image of another scale than Space Ranger's.

    Examples
    --------
    >>> import strank
    >>> strank.io.read_visium_hd("S1/outs", image="S1.tif", patient="P1", bin_um=48)
    Traceback (most recent call last):
    ...
    strank.errors.InputError: S1/outs: no binned_outputs/square_*um there; it is not of Visium HD
    """
    path = Path(path)
    section, patient, image = run_of(path, section, patient, patients, image)
    folder, pooled = _find_bins(path, bin_um)
    counts_file = find_matrix(folder, "filtered_feature_bc_matrix")
    positions_file = folder / "spatial" / "tissue_positions.parquet"
    slide = open_measured(
        image, hd_um_per_pixel(folder / "spatial"), um_per_pixel, um_per_pixel_override
    )
    matrix = read_matrix(counts_file)
    bins = _read_bin_positions(positions_file)
    counts, bins, joined = join_points(matrix, bins, name=str(positions_file))
    if pooled:
        counts, bins = _pool_bins(counts, bins, bin_um)
    return build_section(
        counts,
        spots=bins,
        genes=name_genes(matrix.symbols, matrix.ids, gene_id=gene_id, name=str(counts_file)),
        section=section,
        patient=patient,
        slide=slide,
        technology="Visium HD",
        spot_diameter_um=float(bin_um),
        spot_pitch_um=float(bin_um),
        provenance={
            "reader": "visium-hd",
            "counts_file": str(counts_file.resolve()),
            "counts_sha256": matrix_checksum(counts_file),
            "positions_file": str(positions_file.resolve()),
            **joined,
            "dropped_features": matrix.dropped_features,
        },
    )


def _find_bins(outs: Path, bin_um: float) -> tuple[Path, bool]:
    """Folder of the bins to read, and whether they are to be pooled."""
    bases = [outs / "outs" / "binned_outputs", outs / "binned_outputs", outs]
    base = next((base for base in bases if any(base.glob("square_*um"))), None)
    if base is None:
        segmented = "segmented_outputs", "*cell_segmentations.geojson"
        cells = any(any(f.glob(name)) for f in (outs, outs / "outs") for name in segmented)
        why = "there are cells only: `strank import visium-hd --cells`, or read_visium_hd_cells"
        raise InputError(
            f"{outs}: no binned_outputs/square_*um there; "
            + (why if cells else "it is not of Visium HD")
        )
    wanted, finest = (base / f"square_{size:03.0f}um" for size in (bin_um, _FINEST_UM))
    if bin_um < _FINEST_UM or bin_um % _FINEST_UM:
        raise InputError(f"{base}: bins of {bin_um:g} µm cannot be made; give a multiple of 2")
    if wanted.is_dir():
        return wanted, False
    if not finest.is_dir():
        present = some(sorted(path.name for path in base.glob("square_*um")))
        raise InputError(
            f"{base}: has {present}, but neither {wanted.name} nor {finest.name} to make it from"
        )
    return finest, True


def hd_um_per_pixel(spatial: Path) -> float:
    """Read what Space Ranger has measured of the full-resolution image."""
    path = spatial / "scalefactors_json.json"
    found = _scale_factor(path, "microns_per_pixel")
    if not found > 0:
        raise InputError(f"{path}: lacks microns_per_pixel; it is not of Visium HD")
    return found


def _scale_factor(path: Path, name: str) -> float:
    """Read a number of Space Ranger's, 0 where it is absent or none."""
    factors = read_json(path)
    found = factors.get(name) if isinstance(factors, dict) else None
    # JSON has whole numbers that no float holds.
    if isinstance(found, int | float) and 0 <= found < _MOST_FACTOR:
        return float(found)
    return 0.0


def _read_bin_positions(path: Path) -> pd.DataFrame:
    """Bins under tissue: columns ``array_row array_col x y``, indexed by barcode."""
    # Of 11 million bins of 2 µm, only those under tissue are made into Python objects.
    columns = ["barcode", *_ARRAY, *_COLUMNS]
    table = read_table(path, columns, columns=columns, filters=[("in_tissue", "==", 1)])
    numbers = [*_ARRAY, *_COLUMNS]
    check_numbers(table.set_index("barcode"), numbers, f"{path}: barcode")
    table[numbers] = table[numbers].apply(pd.to_numeric)
    return table.set_index("barcode").rename_axis(None).rename(columns=_COLUMNS)


def _pool_bins(
    counts: sparse.csr_matrix, bins: pd.DataFrame, size_um: float
) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    array_um = (bins[_ARRAY[::-1]].to_numpy(np.float64) + 0.5) * _FINEST_UM
    pooled = pool_points(counts, array_um, size_um)
    # The middle of the bins that are there is not the middle of a square at the tissue's edge.
    pixels = bins[["x", "y"]].to_numpy(np.float64)
    fit, *_ = np.linalg.lstsq(np.column_stack([array_um, np.ones(len(bins))]), pixels)
    centres = np.column_stack([(pooled.squares + 0.5) * size_um, np.ones(len(pooled.squares))])
    column, row = pooled.squares.T
    names = [f"s_{size_um:03.0f}um_{r:05}_{c:05}-1" for c, r in pooled.squares]
    spots = pd.DataFrame(centres @ fit, index=pd.Index(names), columns=["x", "y"])
    return pooled.counts, spots.assign(array_row=row, array_col=column, n_bins=pooled.n_points)
