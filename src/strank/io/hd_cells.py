"""Visium HD by cell: what the segmentation of Space Ranger 4 makes of the bins."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.errors import InputError, said_by
from strank.extras import need
from strank.files import read_json
from strank.io.cells import Cells, align, cells_section, check_bin, check_centres
from strank.io.sections import Patients, run_of, section_name
from strank.io.tenx import find_matrix, read_matrix
from strank.io.visium import hd_um_per_pixel

_FOLDER = "segmented_outputs"
_DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def read_visium_hd_cells(
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
) -> AnnData:
    """Read the cells that Space Ranger 4 has segmented on a Visium HD slide, or squares of them.

    A cell lies at the centroid of its outline. Counts outside cells are none's.

    Parameters
    ----------
    path
        Space Ranger's ``outs``, or a folder that holds ``outs``, or ``segmented_outputs``.
    image, section, patient, patients, um_per_pixel_override, gene_id
        As in `read_visium`.
    um_per_pixel
        Of the image, if it is to be checked against what Space Ranger has measured.
    bin_um
        As in `read_xenium`.

    Returns
    -------
    AnnData
        ``X`` the raw counts ``[n_cells, n_genes]`` (or pseudo-spots), ``obsm["spatial"]`` the
        centres in pixels of the image.

    Raises
    ------
    InputError
        For anything in the files that cannot be used, a run without segmentation, and an image of
        another scale than Space Ranger's.

    Examples
    --------
    >>> import strank
    >>> strank.io.read_visium_hd_cells("S1/outs", image="S1.tif", patient="P1")
    Traceback (most recent call last):
    ...
    strank.errors.InputError: S1/outs: no segmented_outputs there; Space Ranger 4 writes them...
    """
    path = Path(path)
    section = section_name(path.parent if path.name == _FOLDER else path, section)
    section, patient, image = run_of(path, section, patient, patients, image)
    check_bin(bin_um)
    folder = _find_cells(path)
    pixel_um = hd_um_per_pixel(folder / "spatial")
    aligned = align(
        image, None, pixel_um, um_per_pixel=um_per_pixel, override=um_per_pixel_override
    )
    matrix_file = find_matrix(folder, "filtered_feature_cell_matrix")
    outlines = _find_outlines(folder)
    cells = Cells(
        read_matrix(matrix_file),
        _read_centres(outlines) * pixel_um,
        np.diag([1 / pixel_um, 1 / pixel_um, 1]),
        matrix_file,
        outlines,
    )
    return cells_section(
        cells,
        aligned,
        bin_um=bin_um,
        gene_id=gene_id,
        provenance={"reader": "visium-hd-cells"},
        section=section,
        patient=patient,
        technology="Visium HD",
    )


def _find_cells(path: Path) -> Path:
    for folder in (path / "outs" / _FOLDER, path / _FOLDER, path):
        if any(folder.glob("*cell_segmentations.geojson")):
            return folder
    raise InputError(
        f"{path}: no {_FOLDER} there; Space Ranger 4 writes them, unless told not to segment"
    )


def _find_outlines(folder: Path) -> Path:
    # Of the same cells there is a file that tells their clusters.
    found = sorted(folder.glob("*cell_segmentations.geojson"))
    return min(found, key=lambda file: "annotated" in file.name)


def _read_centres(path: Path) -> pd.DataFrame:
    """Read centroids in pixels of the image, called as the matrix calls the cells."""
    need("shapely")
    import shapely
    from shapely.geometry import shape

    content = read_json(path)
    try:
        found = [f for f in content["features"] if f["geometry"] is not None]
        names = pd.Index([f"cellid_{int(f['properties']['cell_id']):09}-1" for f in found])
        outlines = np.array([shape(f["geometry"]) for f in found], object)
        drawn = ~shapely.is_empty(outlines)
        centres = shapely.centroid(outlines[drawn])
        pixels = np.column_stack([shapely.get_x(centres), shapely.get_y(centres)])
    except (*_DAMAGE, shapely.errors.ShapelyError) as error:
        raise InputError(
            f"{path}: not the outlines of cells, a GeoJSON with a cell_id each "
            f"({type(error).__name__}: {said_by(error)})"
        ) from error
    return check_centres(pd.DataFrame(pixels, names[drawn]), path)
