"""Xenium bundles: single cells, or their counts pooled into pseudo-spots, on an H&E image.

Read are ``experiment.xenium``, ``cells.parquet`` (or ``.csv.gz``) and ``cell_feature_matrix.h5``
(or its folder). The H&E image is taken after the run, and brought to the morphology (DAPI) image
by Xenium Explorer, which exports a 3 x 3 matrix, ``*_he_imagealignment.csv``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from strank.errors import InputError, some
from strank.files import read_json, sha256
from strank.io.sections import (
    Patients,
    build_section,
    is_inside,
    name_genes,
    needed_image,
    open_measured,
    patient_of,
    section_name,
)
from strank.io.tables import decoded, read_table
from strank.io.tenx import find_file, join_points, pool_points, read_matrix
from strank.slides.slide import Slide

_EXPERIMENT = ("experiment.xenium",)
_CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
_MATRICES = tuple(f"cell_feature_matrix{suffix}" for suffix in (".h5", "", ".tar.gz"))
# Explorer's matrices rotate, mirror and scale; one that stretches is of something else.
_MOST_STRETCH = 1.05


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
    section = section_name(bundle, section)
    patient = patient_of(section, patient, patients)
    image = needed_image(bundle, image)
    if bin_um is not None and not bin_um > 0:
        raise InputError(f"`bin_um={bin_um:g}`: the size of a pseudo-spot must be positive")
    pixel_um, about = _read_experiment(_present(bundle, _EXPERIMENT))
    alignment = _alignment_of(image) if alignment is None else Path(alignment)
    to_morphology = _read_alignment(alignment)
    scale = float(np.sqrt(abs(np.linalg.det(to_morphology[:2, :2]))))
    slide = open_measured(image, pixel_um * scale, um_per_pixel, um_per_pixel_override)
    counts_file, cells_file = _present(bundle, _MATRICES), _present(bundle, _CELLS)
    matrix = read_matrix(counts_file)
    counts, spots, joined = join_points(matrix, _read_cells(cells_file), name=str(cells_file))
    if bin_um is None:
        distance, _ = cKDTree(spots).query(spots, k=2)
        pitch = float(np.median(distance[:, 1]))
    else:
        pitch = float(bin_um)
        counts, spots = _pool_cells(counts, spots, pitch)
    morphology = np.column_stack([spots[["x_um", "y_um"]] / pixel_um, np.ones(len(spots))])
    spots[["x", "y"]] = (morphology @ np.linalg.inv(to_morphology).T)[:, :2]
    inside = _inside(spots, slide, alignment)
    joined["dropped_spots"] |= {"beyond the image": int((~inside).sum())}
    return build_section(
        counts[inside],
        spots=spots[inside].drop(columns=["x_um", "y_um"]),
        genes=name_genes(matrix.symbols, matrix.ids, gene_id=gene_id, name=str(counts_file)),
        section=section,
        patient=patient,
        slide=slide,
        technology="Xenium",
        spot_diameter_um=pitch,
        spot_pitch_um=pitch,
        provenance={
            "reader": "xenium",
            **about,
            "counts_file": str(counts_file.resolve()),
            "cells_file": str(cells_file.resolve()),
            "alignment_file": str(alignment.resolve()),
            "alignment_sha256": sha256(alignment),
            **joined,
            "dropped_features": matrix.dropped_features,
        },
    )


def _read_alignment(path: Path) -> NDArray[np.float64]:
    """Matrix from pixels of the H&E image to pixels of the morphology image, ``[3, 3]``."""
    try:
        matrix = pd.read_csv(path, header=None).to_numpy(np.float64)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable 3 x 3 matrix ({error})") from error
    if matrix.shape != (3, 3) or not np.allclose(matrix[2], [0, 0, 1]):
        raise InputError(
            f"{path}: not an image alignment; it must be 3 x 3 with the last row 0,0,1, as Xenium "
            "Explorer exports it (keypoints are another file)"
        )
    scales = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if not 0 < scales[0] <= _MOST_STRETCH * scales[1]:
        raise InputError(
            f"{path}: the alignment scales one direction by {scales[0]:.4g} and another by "
            f"{scales[1]:.4g}; it must rotate, mirror, scale and shift only"
        )
    return matrix


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
    pixel_um = found.get("pixel_size")
    if not isinstance(pixel_um, int | float) or not pixel_um > 0:
        raise InputError(f"{path}: lacks pixel_size, the µm per pixel of the morphology image")
    about = {"software": "analysis_sw_version", "panel": "panel_name", "region": "region_name"}
    return float(pixel_um), {name: str(found[key]) for name, key in about.items() if key in found}


def _present(bundle: Path, names: tuple[str, ...]) -> Path:
    found = find_file(bundle, *names)
    if found is None:
        raise InputError(
            f"{bundle}: no {' or '.join(names)}; give the output folder of a Xenium run"
        )
    return found


def _read_cells(path: Path) -> pd.DataFrame:
    """Centres in µm of the run, columns ``x_um y_um``, indexed by cell."""
    columns = {"cell_id": "cell", "x_centroid": "x_um", "y_centroid": "y_um"}
    cells = read_table(path, columns)[list(columns)].rename(columns=columns)
    # Numbers, bytes or text, by the version of the software.
    cells = cells.set_index(decoded(cells.pop("cell"))).astype(np.float64)
    wrong = ~np.isfinite(cells).all(axis=1)
    if wrong.any():
        raise InputError(f"{path}: cell {some(cells.index[wrong])} has no centre")
    return cells


def _pool_cells(
    counts: sparse.csr_matrix, cells: pd.DataFrame, size_um: float
) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    pooled = pool_points(counts, cells[["x_um", "y_um"]].to_numpy(), size_um)
    names = pd.Index([f"{x}x{y}" for x, y in pooled.squares])
    spots = pd.DataFrame((pooled.squares + 0.5) * size_um, index=names, columns=["x_um", "y_um"])
    return pooled.counts, spots.assign(n_cells=pooled.n_points)


def _inside(spots: pd.DataFrame, slide: Slide, alignment: Path) -> NDArray[np.bool_]:
    inside = is_inside(spots, slide)
    if inside.mean() < 0.5:
        (width, height), x, y = slide.size, spots["x"], spots["y"]
        raise InputError(
            f"{slide.path}: with {alignment.name} only {inside.mean():.0%} of the cells lie on the "
            f"image (x {x.min():.0f} to {x.max():.0f}, y {y.min():.0f} to {y.max():.0f}; it is "
            f"{width} x {height}); is it the alignment of this image, at full resolution?"
        )
    return inside.to_numpy()
