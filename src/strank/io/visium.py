"""Visium and Visium HD."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.errors import InputError, some
from strank.files import read_json, sha256
from strank.io.sections import Origin, build_section, name_genes, open_measured
from strank.io.st import pixels_per_pitch
from strank.io.tenx import find_file, join_points, pool_points, read_matrix

_NUMBERS = ["in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
_FINEST_UM = 2.0
_COLUMNS = {"pxl_col_in_fullres": "x", "pxl_row_in_fullres": "y"}
_ARRAY = ["array_row", "array_col"]


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


def read_visium_hd(
    outs: Path,
    *,
    origin: Origin,
    image: Path,
    bin_um: float,
    um_per_pixel: float | None = None,
    gene_id: bool = False,
) -> AnnData:
    """Read bins of one size into the data contract.

    A size that Space Ranger has written is taken as it is. Another one is pooled from the bins of
    2 µm, on squares that start where Space Ranger's own do, at the edge of the capture area.

    Parameters
    ----------
    outs
        Space Ranger's ``outs``, or a folder that holds ``outs``, ``binned_outputs`` or the bins.
    origin
        Names of section and patient.
    image
        The full-resolution image that Space Ranger was given.
    bin_um
        Side of a bin in µm, a multiple of 2.
    um_per_pixel
        Of the image, if it is to be checked against what Space Ranger has measured.
    gene_id
        Name genes by id.

    Raises
    ------
    InputError
        For anything in the files that cannot be used, a size that bins of 2 µm do not make, and an
        image of another scale than Space Ranger's.
    """
    folder, pooled = _find_bins(outs, bin_um)
    counts_file = folder / "filtered_feature_bc_matrix.h5"
    positions_file = folder / "spatial" / "tissue_positions.parquet"
    slide = open_measured(image, _um_per_pixel(folder / "spatial"), um_per_pixel)
    matrix = read_matrix(counts_file)
    bins = _read_bin_positions(positions_file)
    counts, bins, dropped = join_points(matrix, bins, name=str(positions_file))
    if pooled:
        counts, bins = _pool_bins(counts, bins, bin_um)
    return build_section(
        counts,
        spots=bins,
        genes=name_genes(matrix.symbols, matrix.ids, gene_id=gene_id, name=str(counts_file)),
        origin=origin,
        slide=slide,
        technology="Visium HD",
        spot_diameter_um=float(bin_um),
        spot_pitch_um=float(bin_um),
        provenance={
            "reader": "visium-hd",
            "counts_file": str(counts_file.resolve()),
            "counts_sha256": sha256(counts_file),
            "positions_file": str(positions_file.resolve()),
            "dropped_spots": dropped,
            "dropped_features": matrix.dropped_features,
        },
    )


def _find_bins(outs: Path, bin_um: float) -> tuple[Path, bool]:
    """Folder of the bins to read, and whether they are to be pooled."""
    bases = [outs / "outs" / "binned_outputs", outs / "binned_outputs", outs]
    base = next((base for base in bases if any(base.glob("square_*um"))), None)
    if base is None:
        raise InputError(f"{outs}: no binned_outputs/square_*um there; it is not of Visium HD")
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


def _um_per_pixel(spatial: Path) -> float:
    path = spatial / "scalefactors_json.json"
    found = read_json(path).get("microns_per_pixel")
    if not found:
        raise InputError(f"{path}: lacks microns_per_pixel; it is not of Visium HD")
    return float(found)


def _read_bin_positions(path: Path) -> pd.DataFrame:
    """Bins under tissue: columns ``array_row array_col x y``, indexed by barcode."""
    try:
        # Of 11 million bins of 2 µm, only those under tissue are made into Python objects.
        table = pd.read_parquet(
            path, columns=["barcode", *_ARRAY, *_COLUMNS], filters=[("in_tissue", "==", 1)]
        )
    except (ValueError, OSError) as error:  # pyarrow's errors are ValueErrors
        raise InputError(f"{path}: not a readable table of positions ({error})") from error
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
