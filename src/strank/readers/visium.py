"""Visium: the output of Space Ranger 1.x to 4.x, and the full-resolution image given apart.

Layout: ``outs/filtered_feature_bc_matrix.h5`` (or the folder, or its ``.tar.gz``) and
``outs/spatial/tissue_positions.csv`` (from version 2 on, with a header) or
``tissue_positions_list.csv`` (before, without). Spots have a diameter of 55 µm and stand on a
hexagonal grid of 100 µm, on slides of 6.5 and 11 mm, with or without CytAssist.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.errors import InputError, some
from strank.files import sha256
from strank.readers.genes import name_genes
from strank.readers.sections import Origin, build_section, open_measured
from strank.readers.st import pixels_per_pitch
from strank.readers.tenx import find_file, read_matrix

__all__ = ["VISIUM", "SpotArray", "VisiumRun", "read_visium"]

_NUMBERS = ["in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


@dataclass(frozen=True)
class SpotArray:
    """What is printed on the slide.

    Attributes
    ----------
    technology
        Its name.
    spot_diameter_um, spot_pitch_um
        Diameter of a spot, and distance between the centres of neighbours.
    step_um
        What one more ``array_row`` and one more ``array_col`` mean, in µm.
    """

    technology: str
    spot_diameter_um: float
    spot_pitch_um: float
    step_um: tuple[float, float]


# Neighbours in a row are two columns apart.
VISIUM = SpotArray("Visium", 55.0, 100.0, (50.0 * 3**0.5, 50.0))


@dataclass(frozen=True)
class VisiumRun:
    """One run of Space Ranger.

    Attributes
    ----------
    folder
        ``outs``, or the folder that holds it.
    origin
        Names of section and patient.
    image
        The full-resolution image that Space Ranger was given.
    um_per_pixel
        Of that image, if it is known; the grid of spots measures it, too.
    """

    folder: Path
    origin: Origin
    image: Path | None
    um_per_pixel: float | None = None


def read_visium(
    run: VisiumRun, *, gene_id: bool = False, raw: bool = False, array: SpotArray = VISIUM
) -> AnnData:
    """Read a run into the data contract.

    Spots under tissue that both the matrix and the positions hold are kept;
    ``uns["strank"]["provenance"]`` says how many others there were.

    Parameters
    ----------
    run
        Where it is.
    gene_id
        Name genes by id instead of symbol.
    raw
        Take the counts from ``raw_feature_bc_matrix``.
    array
        The slide, for folders in Space Ranger's layout that another platform filled.

    Raises
    ------
    InputError
        For anything in the files that cannot be used, named by file, spot and gene; without the
        full-resolution image, or if its µm per pixel contradicts the grid.
    """
    image, section = _full_image(run), run.origin.section
    matrix_file, positions_file = _find(run.folder, "raw" if raw else "filtered")
    counts, barcodes, symbols, ids, dropped_features = read_matrix(matrix_file)
    positions = _match_suffixes(_read_positions(positions_file), barcodes)
    held, tissue = positions.index.isin(barcodes), positions["in_tissue"] == 1
    spots = positions[held & tissue]
    if spots.empty:
        raise InputError(
            f"section {section}: no spot under tissue stands in both {matrix_file.name} and "
            f"{positions_file.name} (e.g. {some(barcodes, 2)}; {some(positions.index, 2)})"
        )
    # Spots outside the tissue, too: the wider the grid, the better it is measured.
    grid = positions.rename(columns={"array_row": "y", "array_col": "x"})
    measured = float(np.sqrt(np.prod(array.step_um)))
    measured /= pixels_per_pitch(grid, name=str(positions_file))
    packed = matrix_file if matrix_file.is_file() else next(matrix_file.glob("*matrix.mtx*"))
    return build_section(
        counts[barcodes.get_indexer(spots.index)],
        spots=spots.rename(columns={"pixel_x": "x", "pixel_y": "y"}).drop(columns="in_tissue"),
        genes=name_genes(symbols, ids, gene_id=gene_id, name=str(matrix_file)),
        origin=run.origin,
        slide=open_measured(image, measured, run.um_per_pixel),
        technology=array.technology,
        spot_diameter_um=array.spot_diameter_um,
        spot_pitch_um=array.spot_pitch_um,
        provenance={
            "reader": "visium",
            "counts_file": str(matrix_file.resolve()),
            "counts_sha256": sha256(packed),
            "spots_file": str(positions_file.resolve()),
            "dropped_spots": {
                "in counts only": int((~barcodes.isin(positions.index)).sum()),
                "in positions only": int((tissue & ~held).sum()),
                "not in tissue": int((held & ~tissue).sum()),
            },
            "dropped_features": dropped_features,
        },
    )


def _full_image(run: VisiumRun) -> Path:
    if run.image is None or re.search(r"tissue_(hi|low)res_image", run.image.name):
        what = "Space Ranger's output holds" if run.image is None else f"{run.image} is"
        raise InputError(
            f"section {run.origin.section}: {what} only a reduced image; give the full-resolution "
            "image that Space Ranger was run with: --image FILE"
        )
    return run.image


def _find(folder: Path, kind: str) -> tuple[Path, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    outs = folder / "outs" if (folder / "outs").is_dir() else folder
    name = f"{kind}_feature_bc_matrix"
    matrix = find_file(outs, f"{name}.h5", name, f"{name}.tar.gz")
    if matrix is None:
        hint = "; for Visium HD use visium-hd" * (outs / "binned_outputs").is_dir()
        raise InputError(f"{outs}: no {name}.h5 and no folder {name} there{hint}")
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
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, header=None, dtype=str, keep_default_na=False)
            # By content, since files of version 1 were given headers, too.
            titled = int(table.iloc[0, 0] == "barcode")
            head = table.iloc[0] if titled else ["barcode", *_NUMBERS]
            table = table[titled:].set_axis(pd.Index(head), axis=1)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path}: not a readable table ({error})") from error
    absent = [column for column in ("barcode", *_NUMBERS) if column not in table]
    if absent:
        raise InputError(f"{path}: lacks column {some(absent)}; it has {some(table.columns, 8)}")
    table = table.set_index("barcode")[_NUMBERS]
    if not table.index.is_unique:
        twice = some(table.index[table.index.duplicated()].unique())
        raise InputError(f"{path}: barcode {twice} stands twice")
    for column in _NUMBERS:
        wrong = ~np.isfinite(pd.to_numeric(table[column], errors="coerce").astype(float))
        if wrong.any():
            raise InputError(
                f"{path}: barcode {table.index[wrong][0]}, column {column}: "
                f"{table[column][wrong].iloc[0]!r} is not a number"
            )
    # pandas' own parser is a last digit off, now and then.
    return table.astype(float).set_axis([*_NUMBERS[:3], "pixel_y", "pixel_x"], axis=1)


def _match_suffixes(positions: pd.DataFrame, barcodes: pd.Index) -> pd.DataFrame:
    """Name spots as the matrix does, where the two differ by the suffix ``-1`` only."""
    bare, wanted = (n.str.replace(r"-\d+$", "", regex=True) for n in (positions.index, barcodes))
    if positions.index.isin(barcodes).any() or not (bare.is_unique and wanted.is_unique):
        return positions
    at = wanted.get_indexer(bare)
    return positions.set_axis(pd.Index(np.where(at >= 0, barcodes[at], positions.index)), axis=0)
