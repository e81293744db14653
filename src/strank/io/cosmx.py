"""CosMx flat files: single cells, or their counts pooled into pseudo-spots, on an H&E image.

Read are ``*_exprMat_file.csv``, ``*_metadata_file.csv`` and, for the scale,
``*_fov_positions_file.csv``, each packed by gzip or not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.io.cells import Cells, align, cells_section, check_bin, check_centres, needed_alignment
from strank.io.sections import Patients, run_of
from strank.io.tables import check_columns, check_numbers, read_counts_table, read_table
from strank.io.tenx import find_file, needed_file, without_controls

_WHAT = "the folder of a slide's flat files"
_COUNTS, _CELLS, _FIELDS = (
    (f"{name}_file.csv", f"{name}_file.csv.gz") for name in ("exprMat", "metadata", "fov_positions")
)
_KEYS = ["cell_ID", "fov"]
_NO_GENES = [*_KEYS, "cell", "cell_id", "slide_ID"]
_CENTRE = ["CenterX_global_px", "CenterY_global_px"]
_PX, _MM = ["x_global_px", "y_global_px"], ["x_global_mm", "y_global_mm"]
_CONTROLS = {
    "negative probe": "^(?:NegPrb|Negative[0-9])",
    "system control": "^(?:SystemControl|FalseCode)",
}


def read_cosmx(
    path: Path | str,
    *,
    image: Path | str | None = None,
    section: str | None = None,
    patient: str | None = None,
    patients: Patients = None,
    um_per_pixel: float | None = None,
    um_per_pixel_override: bool = False,
    gene_id: bool = False,
    bin_um: float | None = None,
    alignment: Path | str | None = None,
) -> AnnData:
    """Read cells of a CosMx slide, or pseudo-spots made of them, into the data contract.

    Parameters
    ----------
    path
        Folder of the flat files of one slide.
    image, section, patient, patients, um_per_pixel_override, gene_id, bin_um
        As in `read_xenium`.
    um_per_pixel
        Of the image; needed where the image does not say it and the fields of view have no places
        in mm, which older exports lack. Otherwise it is checked.
    alignment
        Matrix from pixels of the H&E image to CosMx's global pixels (``CenterX_global_px``,
        ``CenterY_global_px``, whose y goes up), 3 lines of 3 numbers.

    Returns
    -------
    AnnData
        ``X`` the raw counts ``[n_cells, n_genes]`` (or pseudo-spots), ``obsm["spatial"]`` the
        centres in pixels of the H&E image.

    Raises
    ------
    InputError
        For anything in the files that cannot be used, no alignment, one that contradicts the µm per
        pixel of the image, and one that puts most cells beyond it.

    Examples
    --------
    >>> import strank
    >>> strank.io.read_cosmx("slide", image="he.tif", alignment="he.csv", patient="P1")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: slide: no exprMat_file.csv or exprMat_file.csv.gz; give the fol...
    """
    slide = Path(path)
    section, patient, image = run_of(slide, section, patient, patients, image)
    check_bin(bin_um)
    counts_file, cells_file = (needed_file(slide, names, _WHAT) for names in (_COUNTS, _CELLS))
    aligned = align(
        image,
        needed_alignment(image, alignment, "CosMx's global pixels (CenterX_global_px)"),
        _pixel_um(slide),
        um_per_pixel=um_per_pixel,
        override=um_per_pixel_override,
    )
    keys, counts, genes = read_counts_table(counts_file, _NO_GENES)
    pixel_um = aligned.pixel_um
    cells = Cells(
        # What was counted outside of cells stands there as cell 0, which has no centre.
        without_controls(counts, _named(keys, counts_file), genes, _CONTROLS),
        _read_centres(cells_file) * pixel_um,
        np.diag([1 / pixel_um, 1 / pixel_um, 1]),
        counts_file,
        cells_file,
    )
    return cells_section(
        cells,
        aligned,
        bin_um=bin_um,
        gene_id=gene_id,
        provenance={"reader": "cosmx"},
        section=section,
        patient=patient,
        technology="CosMx",
    )


def _pixel_um(folder: Path) -> float | None:
    """Measure a global pixel by the fields of view, which newer exports place in mm, too."""
    file = find_file(folder, *_FIELDS)
    table = None if file is None else read_table(file, _PX)
    if table is None or not set(_MM) <= set(table):
        return None
    check_numbers(table, [*_PX, *_MM], f"{file}: row")
    pixels, mm = (np.hypot(*table[axes].std().to_numpy()) for axes in (_PX, _MM))
    return float(1e3 * mm / pixels) if pixels > 0 and mm > 0 else None


def _named(keys: pd.DataFrame, path: Path) -> pd.Index:
    # Numbers of cells begin anew in every field of view.
    check_columns(keys, _KEYS, path)
    cell, fov = (keys[key].str.removesuffix(".0") for key in _KEYS)
    return pd.Index(cell + "_" + fov)


def _read_centres(path: Path) -> pd.DataFrame:
    cells = read_table(path, [*_KEYS, *_CENTRE], dtype=dict.fromkeys(_KEYS, str))
    return check_centres(cells[_CENTRE].set_axis(_named(cells, path)), path)
