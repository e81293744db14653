"""MERSCOPE regions: single cells, or their counts pooled into pseudo-spots, on an H&E image.

Read are ``cell_by_gene.csv``, ``cell_metadata.csv`` and
``images/micron_to_mosaic_pixel_transform.csv``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.io.cells import (
    Cells,
    align,
    cells_section,
    check_bin,
    check_centres,
    needed_alignment,
    read_transform,
)
from strank.io.sections import Patients, run_of
from strank.io.tables import read_counts_table, read_table
from strank.io.tenx import needed_file, without_controls

_WHAT = "the folder of a MERSCOPE region"
_COUNTS, _CELLS, _TRANSFORM = (
    (f"{name}.csv", f"{name}.csv.gz")
    for name in ("cell_by_gene", "cell_metadata", "micron_to_mosaic_pixel_transform")
)
_CENTRE = ["center_x", "center_y"]
_CONTROLS = {"blank": "^blank"}


def read_merscope(
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
    """Read cells of a MERSCOPE region, or pseudo-spots made of them, into the data contract.

    Parameters
    ----------
    path
        Folder of the region (``region_0``).
    image, section, patient, patients, um_per_pixel, um_per_pixel_override, gene_id, bin_um
        As in `read_xenium`.
    alignment
        Matrix from pixels of the H&E image to pixels of the region's mosaic images
        (``images/mosaic_DAPI_z3.tif``), 3 lines of 3 numbers.

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
    >>> strank.io.read_merscope("region_0", image="he.tif", alignment="he.csv", patient="P1")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: region_0: no cell_by_gene.csv or cell_by_gene.csv.gz; give the fol...
    """
    region = Path(path)
    section, patient, image = run_of(region, section, patient, patients, image)
    check_bin(bin_um)
    counts_file, cells_file = (needed_file(region, names, _WHAT) for names in (_COUNTS, _CELLS))
    to_pixels = read_transform(needed_file(region / "images", _TRANSFORM, _WHAT))
    aligned = align(
        image,
        needed_alignment(image, alignment, "pixels of the region's mosaic images"),
        1 / float(np.sqrt(abs(np.linalg.det(to_pixels[:2, :2])))),
        um_per_pixel=um_per_pixel,
        override=um_per_pixel_override,
    )
    names, counts, genes = read_counts_table(counts_file)
    matrix = without_controls(counts, pd.Index(names.iloc[:, 0]), genes, _CONTROLS)
    return cells_section(
        Cells(matrix, _read_centres(cells_file), to_pixels, counts_file, cells_file),
        aligned,
        bin_um=bin_um,
        gene_id=gene_id,
        provenance={"reader": "merscope"},
        section=section,
        patient=patient,
        technology="MERSCOPE",
    )


def _read_centres(path: Path) -> pd.DataFrame:
    # EntityID names the cells, or the first column without a title; 19 digits and more.
    cells = read_table(path, _CENTRE, dtype={0: str, "EntityID": str})
    names = cells.get("EntityID", cells.iloc[:, 0])
    return check_centres(cells[_CENTRE].set_axis(pd.Index(names)), path)
