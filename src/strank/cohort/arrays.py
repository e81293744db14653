"""Printed arrays: which there are, how positions tell them, and how large their spots are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import ArrayLike
from scipy.spatial import KDTree

from strank.cohort.contract import as_numbers
from strank.errors import InputError, some

# Fewer spots, or parities that are mixed more than that, tell no array.
_FEWEST, _MOST_MIXED, _LEAST_MIXED = 12, 0.9, 0.75
# Of a step, root mean square: printing is off by a tenth; rows that are shifted by half by more.
_OFF, _NOT_A_GRID = 0.2, 0.5
_CLOSE = 0.05
# Of ``scalefactors``, pixels that a spot spans.
_WIDE = "spot_diameter_fullres"
_BIN = r"s_(\d{3})um_(\d{5})_(\d{5})"
# That Space Ranger writes.
_BINS_UM = (2.0, 8.0, 16.0)


class Printed(NamedTuple):
    """An array; ``step_um`` is what one more ``array_row`` or ``array_col`` means, in the mean."""

    technology: str
    diameter_um: float
    pitch_um: float  # between the centres of neighbours
    step_um: float
    staggered: bool  # every other position is used: row + column of one parity
    stretch: float  # a step along rows, in steps along columns, the longer of the two first
    most: tuple[int, int]  # positions from the first to the last, the fewer first

    @property
    def told(self) -> str:
        """What it is called."""
        used = "every other position used" if self.staggered else "every position used"
        return f"{self.technology}: {used}, spots {self.pitch_um:.4g} µm apart"


_HEXAGONAL = 3**0.5
# Of 78 x 128 (6.5 mm), 128 x 224 (11 mm), 33 x 35 and 66 x 63 positions; a stray, or a frame that
# coordinates of ST may count, takes one more on either side.
VISIUM = Printed("Visium", 55.0, 100.0, 50.0 * 3**0.25, True, _HEXAGONAL, (130, 226))
ST_1K = Printed("ST", 100.0, 200.0, 200.0, False, 1.0, (35, 37))
ST_2K = Printed("ST 2k", 100.0, 100.0 * 2**0.5, 100.0, True, 1.0, (67, 67))
UNKNOWN = Printed("unknown", np.nan, np.nan, np.nan, False, 1.0, (0, 0))


class Lattice(NamedTuple):
    """How the array positions of a section lie in its image."""

    step_px: float  # the mean of both directions
    stretch: float  # the longer step by the shorter
    off: float  # of a step, root mean square
    one_parity: float  # share of the positions whose row + column has the commoner parity
    span: tuple[int, int]  # positions from the first to the last, the fewer first
    n_spots: int

    @property
    def staggered(self) -> bool | None:
        """Whether every other position is used; ``None`` where that cannot be told."""
        if self.n_spots < _FEWEST or self.off > _OFF:
            return None
        if self.one_parity >= _MOST_MIXED:
            return True
        return False if self.one_parity <= _LEAST_MIXED else None

    @property
    def told(self) -> str:
        """What is known of it."""
        return (
            f"{self.n_spots} spots, {self.one_parity:.0%} of one parity of row + column, over "
            f"{self.span[0]} x {self.span[1]} positions, of which one is {self.stretch:.2f} times "
            "as far along one axis as along the other"
        )


def measure_grid(array: ArrayLike, pixels: ArrayLike, *, name: str) -> Lattice:
    """Fit array positions ``[n, 2]``, of rows and columns in any order, to pixels ``[n, 2]``.

    >>> x, y = np.mgrid[0:3, 0:3].reshape(2, -1)
    >>> array, pixels = np.column_stack([x, y]), np.column_stack([50 + 290 * x, 290 * y])
    >>> round(measure_grid(array, pixels, name="C2").step_px, 6)
    290.0
    """
    # An affine fit of every spot. The distance to the nearest neighbour would be too short: spots
    # are printed with jitter, and the nearest is the one that jitter brought closer.
    array, pixels = np.asarray(array, np.float64), np.asarray(pixels, np.float64)
    known = np.column_stack([array, np.ones(len(array))])
    fit, _, rank, _ = np.linalg.lstsq(known, pixels, rcond=None)
    area = abs(np.linalg.det(fit[:2]))
    if rank < 3 or area < 1:
        raise InputError(f"{name}: the spots do not span a grid, so µm per pixel is unknown")
    step = float(np.sqrt(area))
    off = float(np.sqrt(((known @ fit - pixels) ** 2).sum(1).mean())) / step
    sides = np.sort(np.hypot(*fit[:2].T))
    if off > _NOT_A_GRID:
        raise InputError(
            f"{name}: the array positions do not fit to the pixels (off by {off:.1f} steps); are "
            "they of the same section?"
        )
    # Positions that were adjusted to the image are no whole numbers.
    whole = np.rint(array).astype(int)
    odd = float((whole.sum(1) % 2).mean())
    fewer, more = sorted(int(n) + 1 for n in np.ptp(whole, axis=0))
    return Lattice(
        step, float(sides[1] / sides[0]), off, max(odd, 1 - odd), (fewer, more), len(whole)
    )


def hd_barcodes(names: pd.Index) -> pd.DataFrame | None:
    """Read size, row and column of bins of Visium HD by their names, ``None`` for others."""
    if len(names) == 0 or not re.search(_BIN, str(names[0])):
        return None
    found = names.astype(str).str.extract(_BIN).astype(float)
    return None if found.isna().to_numpy().any() else found.set_axis(["um", "row", "col"], axis=1)


def hd_bins(size_um: float) -> Printed:
    """Bins of Visium HD."""
    return Printed("Visium HD", size_um, size_um, size_um, False, 1.0, (6720, 6720))


def find_array(grid: Lattice, *, among: tuple[Printed, ...] = (VISIUM, ST_2K)) -> Printed | None:
    """Tell which array it is, by parity, range and the shape of a step; ``None`` for no such."""
    for array in among:
        alike = grid.stretch / array.stretch
        if (
            grid.staggered is array.staggered
            and 3**-0.25 < alike < 3**0.25
            and _in_range(grid, array)
        ):
            return array
    return None


def _in_range(grid: Lattice, array: Printed) -> bool:
    return all(n <= most for n, most in zip(grid.span, array.most, strict=True))


def choose_array(
    grid: Lattice, pitch_um: float | None, among: tuple[Printed, ...]
) -> tuple[Printed | None, list[str]]:
    """Take what a user says, or what the positions tell, and what is to be said of it."""
    found = find_array(grid, among=among)
    if pitch_um is None:
        return found, []
    array = array_of_pitch(grid, pitch_um)
    if found is None or array.technology == found.technology:
        return array, []
    # Not refused: hexagonal bins of other platforms, and chessboards, come in any size.
    return array, [
        f"`pitch_um={pitch_um:g}` is taken, but positions are as those of {found.told}, which "
        f"would make µm per pixel {found.step_um / array.step_um:.3g} times as large; if it is "
        "such an array, leave `pitch_um` out"
    ]


def array_of_pitch(grid: Lattice, pitch_um: float) -> Printed:
    """Take what a user says of the distance between neighbours; a known array if it is its own."""
    if not 0 < pitch_um < np.inf:
        raise InputError(f"`pitch_um={pitch_um:g}`: the distance between spots must be positive")
    staggered = grid.one_parity > (_LEAST_MIXED + _MOST_MIXED) / 2
    shape = _HEXAGONAL if staggered and grid.stretch > 3**0.25 else 1.0
    # Neighbours are half the diagonal of two steps each apart, or where rows are closer, two steps.
    steps = {_HEXAGONAL: 3**0.25 / 2, 1.0: 2**-0.5}[shape] if staggered else 1.0
    for known in (VISIUM, ST_2K, ST_1K):
        same = (known.staggered, known.stretch) == (staggered, shape)
        if same and abs(pitch_um / known.pitch_um - 1) <= _CLOSE and _in_range(grid, known):
            return known._replace(pitch_um=pitch_um, step_um=pitch_um * steps)
    for um in _BINS_UM * (grid.span[1] > max(VISIUM.most)):
        if not staggered and abs(pitch_um / um - 1) <= _CLOSE:
            return hd_bins(um)._replace(pitch_um=pitch_um, step_um=pitch_um)
    name = "staggered grid" if staggered else "square grid"
    return Printed(name, pitch_um, pitch_um, pitch_um * steps, staggered, shape, grid.span)


def assumed_width(array: Printed) -> list[str]:
    """Say that nothing tells how wide the spots of an array are, if so."""
    if array.diameter_um != array.pitch_um or not array.technology.endswith("grid"):
        return []
    return [
        f"spots are taken to be as wide as they stand apart, {array.pitch_um:g} µm: no scale "
        "factors (spot_diameter_fullres) say less; channels of DBiT-seq are half as wide"
    ]


def lattice_of(spots: pd.DataFrame) -> Lattice | None:
    """Measure spots in pixels ``x y`` by their names or ``array_row array_col``, if those tell."""
    bins = hd_barcodes(spots.index)
    if bins is None:
        bins = spots.reindex(columns=["array_row", "array_col"]).set_axis(["row", "col"], axis=1)
    array = bins[["col", "row"]].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    if not np.isfinite(array).all():
        return None
    try:
        return measure_grid(array, spots[["x", "y"]], name="")
    except InputError:  # a row of spots, or several sections in one
        return None


def positions_twice(spots: pd.DataFrame) -> bool:
    """Whether several spots have one place on the array, as of sections that were put together."""
    names = ["array_row", "array_col"]
    if not set(names) <= set(spots):
        return False
    placed = spots[names].dropna()
    # A column that was filled with one number tells nothing.
    return placed.nunique().min() > 2 and bool(placed.duplicated().any())


def measured_um(spots: pd.DataFrame) -> float | None:
    """Measure µm per pixel by the array of spots in pixels, if it is a known one."""
    grid = lattice_of(spots)
    array = _known_array(grid, spots)
    return array.step_um / grid.step_px if grid and array else None


def _known_array(grid: Lattice | None, spots: pd.DataFrame) -> Printed | None:
    if (bins := hd_barcodes(spots.index)) is not None:
        if len(sizes := bins["um"].unique()) > 1:
            raise InputError(
                f"bins of Visium HD of {some([f'{um:g}' for um in sizes])} µm; keep those of one"
            )
        return hd_bins(float(sizes[0]))
    return find_array(grid) if grid else None


def scanpy_um(spots: pd.DataFrame, scales: Mapping[str, Any]) -> float:
    """Find µm per pixel: by the array, else by ``scalefactors`` as scanpy keeps them, else NaN."""
    if (measured := measured_um(spots)) is not None:
        return measured
    if (stated := _number(scales, "microns_per_pixel")) > 0:
        return stated
    pitch = _pitch(spots)
    # Space Ranger gives the width of a spot of 65 µm, though those of Visium have 55.
    is_visium = abs(pitch / _number(scales, _WIDE) / (VISIUM.pitch_um / 65.0) - 1) < _CLOSE
    return VISIUM.pitch_um / pitch if is_visium else np.nan


def array_of(scales: Mapping[str, Any], spots: pd.DataFrame, um_per_pixel: float) -> Printed:
    """Tell the array, or say what is known of spots that are none."""
    diameter, pitch = spot_size_um(scales, spots, um_per_pixel)
    grid = lattice_of(spots)
    if (array := _known_array(grid, spots)) is not None:
        return array
    if grid is None or grid.staggered is not False:
        return UNKNOWN._replace(diameter_um=diameter, pitch_um=pitch, step_um=pitch)
    pitch = grid.step_px * um_per_pixel
    array = array_of_pitch(grid, pitch)
    known = array.technology != "square grid"
    return array if known else array._replace(diameter_um=min(diameter, pitch))


def spot_size_um(
    scales: Mapping[str, Any], spots: pd.DataFrame, um_per_pixel: float
) -> tuple[float, float]:
    """Diameter (of ``scalefactors`` as scanpy keeps them, or else the pitch) and pitch, in µm."""
    if len(spots) < 2:
        raise InputError("a section of one spot: nothing can be compared within it")
    pitch, wide = _pitch(spots) * um_per_pixel, _number(scales, _WIDE)
    return (wide * um_per_pixel if wide > 0 else pitch), pitch


def _pitch(spots: pd.DataFrame) -> float:
    """Distance of neighbours in pixels; the nearest alone is the one that jitter brought closer."""
    positions = spots[["x", "y"]].to_numpy()
    distances, _ = KDTree(positions).query(positions, k=min(5, len(spots)))
    return float(np.median(distances[:, 1:])) if len(spots) > 1 else np.nan


def _number(scales: Mapping[str, Any], name: str) -> float:
    return float(pd.to_numeric(pd.Series([scales.get(name)]), errors="coerce").iloc[0])


def spots_of(adata: AnnData, name: str) -> pd.DataFrame:
    """Take ``obs``, and ``x`` and ``y`` from ``obsm["spatial"]``."""
    if "spatial" not in adata.obsm:
        raise InputError(
            f'{name}: lacks obsm["spatial"], the positions (x, y) in pixels of the image; it has '
            f"{some(adata.obsm) or 'no obsm'}"
        )
    positions = as_numbers(adata.obsm["spatial"], f'{name}: obsm["spatial"]')
    if positions.ndim != 2 or positions.shape[1] < 2:
        raise InputError(
            f'{name}: obsm["spatial"] has the shape {positions.shape}; it must have x and y'
        )
    wrong = ~np.isfinite(positions[:, :2]).all(1)
    if wrong.any():
        raise InputError(f"{name}: position of spot {some(adata.obs_names[wrong])} is not finite")
    spots = adata.obs.assign(x=positions[:, 0], y=positions[:, 1])
    if positions_twice(spots):
        raise InputError(
            f"{name}: several spots have one place on the array (array_row, array_col): sections "
            f'that were put together; tell them apart in obs["section"]'
        )
    return spots
