"""Cells of all platforms: placed on an H&E image, single or pooled into squares.

A platform's file says where cells are in µm, and how µm become pixels of the run's own image. The
H&E image may be another one, which an alignment brings to the run's.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from strank.cohort.contract import as_numbers
from strank.cohort.genes import name_genes
from strank.errors import InputError, said_by, some
from strank.files import sha256
from strank.io.sections import build_section
from strank.io.tables import check_unique
from strank.io.tenx import TenxMatrix, join_points, pool_points
from strank.slides.placement import is_inside, open_measured
from strank.slides.slide import Slide, open_told

# Alignments rotate, mirror and scale; one that stretches is of something else.
_MOST_STRETCH = 1.05
_CENTRE = ["x_um", "y_um"]
_LONGEST_MATRIX = 2**14


class Aligned(NamedTuple):
    """An H&E image, and how it lies on the run's own."""

    slide: Slide
    #: From pixels of the slide to those of the run, ``[3, 3]``.
    to_run: NDArray[np.float64]
    #: Of the run's image.
    pixel_um: float
    #: The file that says so; ``None`` if the image is the run's own.
    file: Path | None


class Cells(NamedTuple):
    """Cells as the files of a platform have them."""

    matrix: TenxMatrix
    #: Columns ``x_um y_um`` of the run, by cell.
    centres: pd.DataFrame
    #: From µm to pixels of the run's image, ``[3, 3]``.
    to_pixels: NDArray[np.float64]
    matrix_file: Path
    cells_file: Path


def align(
    image: Path,
    alignment: Path | None,
    pixel_um: float | None,
    *,
    um_per_pixel: float | None,
    override: bool,
) -> Aligned:
    """Open an image that is aligned to a run; its scale tells the run's, where no file does."""
    to_run = np.eye(3) if alignment is None else read_transform(alignment)
    scale = float(np.sqrt(abs(np.linalg.det(to_run[:2, :2]))))
    if pixel_um is None:
        slide = open_told(image, um_per_pixel, override)
        pixel_um = slide.um_per_pixel / scale
    else:
        slide = open_measured(image, pixel_um * scale, um_per_pixel, override)
    return Aligned(slide, to_run, pixel_um, alignment)


def needed_alignment(image: Path, alignment: Path | str | None, space: str) -> Path:
    """Refuse to go on without an alignment to ``space``."""
    if alignment is None:
        raise InputError(
            f"{image}: no alignment given; it takes pixels of the image to {space}, as 3 lines of "
            "3 numbers: `alignment=FILE`. For an image in those pixels they are 1,0,0 and 0,1,0 "
            "and 0,0,1"
        )
    return Path(alignment)


def read_transform(path: Path) -> NDArray[np.float64]:
    """Read a matrix from pixels of an image, or µm, to pixels of another one, ``[3, 3]``."""
    try:
        # Not by pandas, which crashes at some exponents.
        with path.open(encoding="utf-8-sig") as file:
            lines = file.read(_LONGEST_MATRIX).splitlines()
        rows = [re.split(r"[,;\s]+", line.strip()) for line in lines if line.strip()]
        matrix = np.array(rows, np.float64)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable 3 x 3 matrix ({said_by(error)})") from error
    if (
        matrix.shape != (3, 3)
        or not np.isfinite(matrix).all()
        or not np.allclose(matrix[2], [0, 0, 1])
    ):
        raise InputError(
            f"{path}: not an image alignment; it must be 3 x 3 with the last row 0,0,1 (keypoints, "
            "as Xenium Explorer has them, are another file)"
        )
    scales = np.linalg.svd(matrix[:2, :2], compute_uv=False)
    if not 0 < scales[0] <= _MOST_STRETCH * scales[1]:
        raise InputError(
            f"{path}: the alignment scales one direction by {scales[0]:.4g} and another by "
            f"{scales[1]:.4g}; it must rotate, mirror, scale and shift only"
        )
    return matrix


def check_bin(bin_um: float | None) -> None:
    """Refuse squares of no size, before anything is read."""
    if bin_um is not None and not bin_um > 0:
        raise InputError(f"`bin_um={bin_um:g}`: the size of a pseudo-spot must be positive")


def check_centres(cells: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Refuse cells without a centre; name the columns."""
    numbers = as_numbers(cells, f"{path}: a centre")
    cells = pd.DataFrame(numbers, cells.index, _CENTRE)
    wrong = ~np.isfinite(cells).all(axis=1)
    if wrong.any():
        raise InputError(f"{path}: cell {some(cells.index[wrong])} has no centre")
    return cells


def cells_section(
    cells: Cells,
    aligned: Aligned,
    *,
    bin_um: float | None,
    gene_id: bool,
    provenance: dict[str, Any],
    **named: str,
) -> AnnData:
    """Make a section of cells, or of the squares that they are pooled into.

    What lies beyond the image is dropped, and counted. ``named`` are section, patient, technology.
    """
    matrix, file = cells.matrix, aligned.file
    check_unique(matrix.barcodes, f"{cells.matrix_file}: cell")
    counts, spots, joined = join_points(matrix, cells.centres, name=str(cells.cells_file))
    if bin_um is None:
        distance, _ = cKDTree(spots).query(spots, k=2)
        pitch = float(np.median(distance[:, 1]))
    else:
        pitch = float(bin_um)
        counts, spots = _pool_cells(counts, spots, pitch)
    run = np.column_stack([spots[_CENTRE], np.ones(len(spots))]) @ cells.to_pixels.T
    x, y, _ = np.linalg.inv(aligned.to_run) @ run.T
    spots = spots.assign(x=x, y=y)
    inside = _inside(spots, aligned)
    joined["dropped_spots"] |= {"beyond the image": int((~inside).sum())}
    if file is not None:
        provenance |= {"alignment_file": str(file.resolve()), "alignment_sha256": sha256(file)}
    return build_section(
        counts[inside],
        spots=spots[inside].drop(columns=_CENTRE),
        genes=name_genes(matrix.symbols, matrix.ids, gene_id=gene_id, name=str(cells.matrix_file)),
        slide=aligned.slide,
        spot_diameter_um=pitch,
        spot_pitch_um=pitch,
        provenance={
            **provenance,
            "counts_file": str(cells.matrix_file.resolve()),
            "cells_file": str(cells.cells_file.resolve()),
            **joined,
            "dropped_features": matrix.dropped_features,
        },
        **named,
    )


def _pool_cells(
    counts: sparse.csr_matrix, cells: pd.DataFrame, size_um: float
) -> tuple[sparse.csr_matrix, pd.DataFrame]:
    pooled = pool_points(counts, cells[_CENTRE].to_numpy(), size_um)
    names = pd.Index([f"{x}x{y}" for x, y in pooled.squares])
    spots = pd.DataFrame((pooled.squares + 0.5) * size_um, index=names, columns=_CENTRE)
    return pooled.counts, spots.assign(n_cells=pooled.n_points)


def _inside(spots: pd.DataFrame, aligned: Aligned) -> NDArray[np.bool_]:
    slide, file = aligned.slide, aligned.file
    inside = is_inside(spots, slide)
    if inside.mean() < 0.5:
        (width, height), x, y = slide.size, spots["x"], spots["y"]
        given = "" if file is None else f"with {file.name} "
        what = "image of this run" if file is None else "alignment of this image"
        raise InputError(
            f"{slide.path}: {given}only {inside.mean():.0%} of the cells lie on the image "
            f"(x {x.min():.0f} to {x.max():.0f}, y {y.min():.0f} to {y.max():.0f}; it is "
            f"{width} x {height}); is it the {what}, at full resolution?"
        )
    return inside.to_numpy()
