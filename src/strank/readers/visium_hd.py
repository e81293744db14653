"""Visium HD as Space Ranger writes it: square bins of 2, 8 and 16 µm, and others made from 2 µm.

Layout: ``binned_outputs/square_<size>um/`` with ``filtered_feature_bc_matrix.h5`` and, in
``spatial/``, ``tissue_positions.parquet`` and ``scalefactors_json.json``. The full-resolution image
is not part of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank.errors import InputError, some
from strank.files import read_json, sha256
from strank.readers.genes import name_genes
from strank.readers.pool import join_points, pool_points
from strank.readers.sections import Origin, build_section, open_measured
from strank.readers.tenx import read_matrix

__all__ = ["read_visium_hd"]

_FINEST_UM = 2.0
_COLUMNS = {"pxl_col_in_fullres": "x", "pxl_row_in_fullres": "y"}
_ARRAY = ["array_row", "array_col"]


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
    bins = _read_positions(positions_file)
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


def _read_positions(path: Path) -> pd.DataFrame:
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
