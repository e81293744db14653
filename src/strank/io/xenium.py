"""Xenium bundles: single cells, or their counts pooled into pseudo-spots, on an H&E image.

Read are ``experiment.xenium``, ``cells.parquet`` (or ``.csv.gz``) and ``cell_feature_matrix.h5``
(or its folder). The H&E image is taken after the run, and brought to the morphology (DAPI) image
by Xenium Explorer, which exports a 3 x 3 matrix, ``*_he_imagealignment.csv``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
from anndata import AnnData
from pydantic import BaseModel, ConfigDict, Field

from strank.doors import checked, shown_key
from strank.errors import InputError
from strank.files import read_json
from strank.io.cells import Cells, align, cells_section, check_bin, check_centres
from strank.io.sections import Patients, run_of
from strank.io.tables import decoded, read_table
from strank.io.tenx import needed_file, read_matrix

_WHAT = "the output folder of a Xenium run"
_EXPERIMENT = ("experiment.xenium",)
_CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
_MATRICES = tuple(f"cell_feature_matrix{suffix}" for suffix in (".h5", "", ".tar.gz"))


class _Experiment(BaseModel):
    """What ``experiment.xenium`` says, as far as it is used."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    pixel_size: Annotated[float, Field(gt=0, le=1e6)]


def read_xenium(
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
    """Read cells, or pseudo-spots made of them, into the data contract.

    A pseudo-spot is a square that sums the counts of the cells whose centres lie in it; transcripts
    outside cells do not count. What lies beyond the H&E image is dropped, and
    ``uns["strank"]["provenance"]`` says how much.

    Parameters
    ----------
    path
        The output folder (bundle) of the instrument.
    image
        The H&E image, at full resolution.
    section, patient, patients, um_per_pixel_override, gene_id
        As in `read_visium`.
    um_per_pixel
        Of the image, if it is to be checked against the alignment, which gives it.
    bin_um
        Side of a pseudo-spot in µm; single cells if ``None``, whose diameter and pitch then are the
        median distance of a cell's centre to the nearest other one.
    alignment
        Matrix from pixels of the H&E image to pixels of the morphology image, as Xenium Explorer
        exports it; if ``None``, the file that 10x Genomics puts beside the image:
        ``<name>_he_imagealignment.csv`` for ``<name>_he_image.ome.tif``.

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
    >>> strank.io.read_xenium("bundle", image="he.ome.tif", patient="P1", bin_um=100)
    Traceback (most recent call last):
    ...
    strank.errors.InputError: bundle: no experiment.xenium; give the output folder of a Xenium run
    """
    bundle = Path(path)
    section, patient, image = run_of(bundle, section, patient, patients, image)
    check_bin(bin_um)
    pixel_um, about = _read_experiment(needed_file(bundle, _EXPERIMENT, _WHAT))
    aligned = align(
        image,
        _alignment_of(image) if alignment is None else Path(alignment),
        pixel_um,
        um_per_pixel=um_per_pixel,
        override=um_per_pixel_override,
    )
    matrix_file, cells_file = (needed_file(bundle, names, _WHAT) for names in (_MATRICES, _CELLS))
    cells = Cells(
        read_matrix(matrix_file),
        _read_cells(cells_file),
        np.diag([1 / pixel_um, 1 / pixel_um, 1]),
        matrix_file,
        cells_file,
    )
    return cells_section(
        cells,
        aligned,
        bin_um=bin_um,
        gene_id=gene_id,
        provenance={"reader": "xenium", **about},
        section=section,
        patient=patient,
        technology="Xenium",
    )


def _alignment_of(image: Path) -> Path:
    found = image.with_name(f"{image.name.removesuffix('.ome.tif')}alignment.csv")
    if not found.is_file():
        raise InputError(
            f"{image}: no alignment to the Xenium run given, nor {found.name} beside it; export it "
            "from Xenium Explorer and give `alignment=FILE`. For an image that is already in "
            "pixels of the morphology image, FILE holds the lines 1,0,0 and 0,1,0 and 0,0,1"
        )
    return found


def _read_experiment(path: Path) -> tuple[float, dict[str, str]]:
    """µm per pixel of the morphology image, and what is worth keeping of the run."""
    found = read_json(path)
    if not isinstance(found, dict) or "pixel_size" not in found:
        raise InputError(f"{path}: lacks pixel_size, the µm per pixel of the morphology image")
    pixel_um = checked(_Experiment, found, str(path)).pixel_size
    about = {"software": "analysis_sw_version", "panel": "panel_name", "region": "region_name"}
    return pixel_um, {name: shown_key(found[key]) for name, key in about.items() if key in found}


def _read_cells(path: Path) -> pd.DataFrame:
    """Centres in µm of the run, columns ``x_um y_um``, indexed by cell."""
    columns = ["cell_id", "x_centroid", "y_centroid"]
    cells = read_table(path, columns)[columns]
    # Numbers, bytes or text, by the version of the software.
    return check_centres(cells.set_index(decoded(cells.pop("cell_id"))), path)
