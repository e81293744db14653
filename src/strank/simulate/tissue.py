"""The layout of a simulated section: outline, regions, glands, adipocytes and nuclei.

Regions are where the largest of several smooth Gaussian random fields decides; a patient's
composition shifts the fields. Positions are in µm from the image's upper left corner; maps have
pixels of `LAYOUT_UM`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.spatial import Voronoi, cKDTree

from strank.simulate.regions import ADIPOSE, GLAND, GLASS, IMMUNE, REGIONS, STROMA, TUMOUR

_Array = NDArray[np.float64]

LAYOUT_UM = 4.0

# Immune aggregates are small islands, so they have a threshold instead of a share in the contest.
_COMMON = {TUMOUR: 0.45, STROMA: 0.35, GLAND: 0.25, ADIPOSE: -0.4}
_REGION_UM = 190.0
_AGGREGATE_UM = 65.0
_NEST_UM = 24.0
_GLAND_PITCH_UM = 96.0
_ADIPOCYTE_PITCH_UM = 58.0
_CORNERS = 40
_LEAST_TISSUE = 0.6


@dataclass(frozen=True)
class TissueDesign:
    """Size of a simulated section.

    Attributes
    ----------
    side_um
        Side of the square image, in µm.
    um_per_pixel
        Size of an image pixel, in µm.

    Raises
    ------
    ValueError
        For a section below 600 µm, or pixels that are not of 0.2 to 2 µm.

    Examples
    --------
    >>> TissueDesign(side_um=900).um_per_pixel
    0.8
    """

    side_um: float = 3000.0
    um_per_pixel: float = 0.8

    def __post_init__(self) -> None:
        if not (self.side_um >= 600 and 0.2 <= self.um_per_pixel <= 2):
            raise ValueError(
                "a simulated section needs side_um >= 600 and um_per_pixel from 0.2 to 2; got "
                f"{self.side_um:g} and {self.um_per_pixel:g}"
            )


class PlacedNuclei(NamedTuple):
    """Nuclei of a section, each array ``[n_nuclei]``."""

    x: _Array
    y: _Array
    angle: _Array  # of the long axis, in radians
    kind: NDArray[np.int8]  # index in REGIONS; ADIPOSE is an adipocyte's nucleus


class Tissue(NamedTuple):
    """What there is to draw, and to express genes."""

    labels: NDArray[np.int8]  # index in REGIONS, -1 for glass; this and the next two are [n, n]
    nests: _Array  # above 0: tumour cells, where the label is tumour
    direction: _Array  # of the fibres, in radians
    glands: _Array  # outlines, [n_glands, n_corners, 2]
    adipocytes: list[_Array]  # outlines
    nuclei: PlacedNuclei


def grow_tissue(design: TissueDesign, *, composition: _Array, rng: np.random.Generator) -> Tissue:
    """Lay out a section; ``composition`` shifts the regions: 0 is average, 1 about doubles one."""
    n = round(design.side_um / LAYOUT_UM)
    labels = _regions(n, composition, rng)
    nests = smooth_field(rng, n, _NEST_UM) + 0.4 * smooth_field(rng, n, 90) + 0.35
    turn = rng.uniform(0, np.pi)
    direction = turn + 0.75 * smooth_field(rng, n, 320) + 0.2 * smooth_field(rng, n, 70)
    glands, adipocytes = _glands(labels, rng), _adipocytes(labels, rng)
    nuclei = _nuclei(labels, nests, direction, (glands, adipocytes), rng)
    return Tissue(labels, nests, direction, glands, adipocytes, nuclei)


def smooth_field(rng: np.random.Generator, n: int, sigma_um: float) -> _Array:
    """Gaussian random field ``[n, n]`` with mean 0, variance 1 and a blur of ``sigma_um``."""
    sigma = sigma_um / LAYOUT_UM
    # Drawn coarser than it is returned: a wide blur of fine noise is slow and looks the same.
    step = max(1, int(sigma / 4))
    pad = int(3 * sigma / step) + 1
    coarse = -(-n // step) + 1
    white = rng.standard_normal((coarse + 2 * pad, coarse + 2 * pad))
    blurred = cv2.GaussianBlur(white, (0, 0), sigma / step)[pad:-pad, pad:-pad]
    # A blurred white field has variance 1 / (4 pi sigma^2); exact scaling would tie it to the size.
    field = blurred * np.sqrt(4 * np.pi) * sigma / step
    size = (coarse * step, coarse * step)
    return np.asarray(cv2.resize(field, size, interpolation=cv2.INTER_CUBIC))[:n, :n]


def at(field: NDArray, x: _Array, y: _Array) -> NDArray:
    """Values of a map at positions in µm; positions outside take the nearest pixel's."""
    last = field.shape[0] - 1
    row, column = (np.clip((v / LAYOUT_UM).astype(int), 0, last) for v in (y, x))
    return np.asarray(field[row, column])


def under_spots(labels: NDArray[np.int8], centre: _Array, radius_um: float) -> NDArray[np.int8]:
    """Labels under each spot, ``[n_spots, n_pixels of a spot]``."""
    reach = int(radius_um / LAYOUT_UM)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disc = np.hypot(x, y) * LAYOUT_UM <= radius_um
    column, row = (centre / LAYOUT_UM).astype(int).T
    return np.asarray(labels[row[:, None] + y[disc], column[:, None] + x[disc]])


def on_tissue(labels: NDArray[np.int8], centre: _Array, radius_um: float) -> NDArray[np.bool_]:
    """Whether enough of a spot is covered that an array would keep it."""
    return np.asarray((under_spots(labels, centre, radius_um) != GLASS).mean(1) >= _LEAST_TISSUE)


def _regions(n: int, composition: _Array, rng: np.random.Generator) -> NDArray[np.int8]:
    depth = _depth_of_outline(n, rng)
    contest = np.full((len(REGIONS), n, n), -np.inf)
    for region, common in _COMMON.items():
        field = smooth_field(rng, n, _REGION_UM) + 0.12 * smooth_field(rng, n, 25)
        contest[region] = common + composition[region] + field
    # Fat lies at the rim of a biopsy more often than inside.
    contest[ADIPOSE] += 0.8 * np.exp(-np.maximum(depth, 0) / 0.12) - 0.3
    labels = contest.argmax(0)
    aggregates = smooth_field(rng, n, _AGGREGATE_UM) + 0.15 * smooth_field(rng, n, 15)
    labels[(aggregates > 1.35 - 0.35 * composition[IMMUNE]) & (labels != ADIPOSE)] = IMMUNE
    labels[depth < 0] = GLASS
    return np.asarray(labels, dtype=np.int8)


def _depth_of_outline(n: int, rng: np.random.Generator) -> _Array:
    """Signed depth below the tissue's edge as a share of the half side; one piece, no holes."""
    y, x = np.mgrid[-1 : 1 : n * 1j, -1 : 1 : n * 1j]
    turn = rng.uniform(0, np.pi)
    u, v = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    power = rng.uniform(2.2, 3.5)
    radius = (np.abs(u / 0.9) ** power + np.abs(v / rng.uniform(0.8, 0.9)) ** power) ** (1 / power)
    depth = 1 - radius + 0.07 * smooth_field(rng, n, 160) + 0.008 * smooth_field(rng, n, 14)
    # The knife: a straight edge on one side.
    side, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 0.8)
    depth = np.minimum(depth, reach - x * np.cos(side) - y * np.sin(side))
    depth = np.minimum(depth, 0.97 - np.maximum(np.abs(x), np.abs(y)))
    _, pieces, stats, _ = cv2.connectedComponentsWithStats((depth > 0).astype(np.uint8))
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    return np.asarray(np.where(pieces == largest, depth, np.minimum(depth, -1e-9)))


def _scatter(n: int, spacing_um: float, rng: np.random.Generator) -> _Array:
    """Jittered hexagonal lattice over the image, ``[n_points, 2]``: close, hardly overlapping."""
    side = n * LAYOUT_UM
    rows = np.arange(0, side, spacing_um * np.sqrt(0.75))
    columns = np.arange(0, side, spacing_um)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x = x + (np.arange(len(rows)) % 2 * spacing_um / 2)[:, None]
    points = np.column_stack([x.ravel(), y.ravel()])
    points += rng.uniform(-0.33, 0.33, points.shape) * spacing_um
    return points[(points >= 0).all(1) & (points < side).all(1)]


def _glands(labels: NDArray[np.int8], rng: np.random.Generator) -> _Array:
    """Outlines of glands: circles pressed out of shape by three harmonics."""
    centres = _scatter(labels.shape[0], _GLAND_PITCH_UM, rng)
    # The whole gland must lie in its region, or epithelium would float in fat or on glass.
    deep = cv2.distanceTransform((labels == GLAND).astype(np.uint8), cv2.DIST_L2, 5) * LAYOUT_UM
    centres = centres[at(deep, *centres.T) > 35]
    angle = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    harmonics = np.arange(2, 5)[:, None]
    phase = rng.uniform(0, 2 * np.pi, (len(centres), 3, 1))
    size = rng.uniform(0, [[0.18], [0.1], [0.05]], (len(centres), 3, 1))
    shape = 1 + (size * np.cos(harmonics * angle + phase)).sum(1)
    radius = rng.uniform(27, 45, (len(centres), 1)) * shape
    pairs = cKDTree(centres).query_pairs(130, output_type="ndarray") if len(centres) else []
    first, second = np.asarray(pairs, dtype=int).reshape(-1, 2).T
    distance = np.hypot(*(centres[first] - centres[second]).T)
    apart = np.ones(len(centres), bool)
    apart[second[distance < radius.max(1)[first] + radius.max(1)[second]]] = False
    outlines = centres[:, None] + radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return np.asarray(outlines[apart])


def _adipocytes(labels: NDArray[np.int8], rng: np.random.Generator) -> list[_Array]:
    """Outlines of fat cells: Voronoi cells, shrunk by the membrane and rounded."""
    points = _scatter(labels.shape[0], _ADIPOCYTE_PITCH_UM, rng)
    diagram = Voronoi(points)
    outlines = []
    for point in np.flatnonzero(at(labels, *points.T) == ADIPOSE):
        corners = diagram.regions[diagram.point_region[point]]
        outline = diagram.vertices[corners]
        centre = points[point]
        if -1 in corners or np.abs(outline - centre).max() > _ADIPOCYTE_PITCH_UM:
            continue
        outline = centre + (outline - centre) * (1 - 1.5 / (_ADIPOCYTE_PITCH_UM / 2))
        for _ in range(3):
            following = np.roll(outline, -1, axis=0)
            pair = [0.75 * outline + 0.25 * following, 0.25 * outline + 0.75 * following]
            outline = np.stack(pair, axis=1).reshape(-1, 2)
        outlines.append(outline)
    return outlines


def _nuclei(
    labels: NDArray[np.int8],
    nests: _Array,
    direction: _Array,
    outlines: tuple[_Array, list[_Array]],
    rng: np.random.Generator,
) -> PlacedNuclei:
    n = labels.shape[0]
    glands, adipocytes = outlines
    in_gland = np.zeros((n, n), np.uint8)
    cv2.fillPoly(in_gland, list(np.round(glands / LAYOUT_UM).astype(np.int32)), 1)
    # Cells per area vary within a region too, so that density says more than the region does.
    cellularity = np.exp(0.45 * smooth_field(rng, n, 130))
    infiltrate = cv2.GaussianBlur((labels == IMMUNE).astype(np.float64), (0, 0), 50 / LAYOUT_UM)
    nest = (labels == TUMOUR) & (nests > 0)
    fibrous = ((labels == STROMA) | (labels == GLAND) | (labels == TUMOUR)) & ~nest
    fibrous &= in_gland == 0
    immune = (labels == IMMUNE) & (in_gland == 0)
    chances = {
        TUMOUR: (11.0, nest * 0.72 * cellularity),
        STROMA: (17.0, fibrous * 0.62 * cellularity),
        IMMUNE: (7.6, immune * 0.8 * np.sqrt(cellularity) + fibrous * (0.3 * infiltrate + 0.012)),
    }
    parts = [_gland_nuclei(glands, rng), _fat_nuclei(adipocytes, rng)]
    for kind, (spacing, chance) in chances.items():
        points = _scatter(labels.shape[0], spacing, rng)
        x, y = points[rng.random(len(points)) < at(chance, *points.T)].T
        angle = rng.uniform(0, np.pi, len(x))
        if kind == STROMA:
            angle = at(direction, x, y) + rng.normal(0, 0.2, len(x))
        parts.append(PlacedNuclei(x, y, angle, np.full(len(x), kind, np.int8)))
    return PlacedNuclei(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _gland_nuclei(glands: _Array, rng: np.random.Generator) -> PlacedNuclei:
    """One nucleus about every 6.5 µm along the gland's wall, upright on it."""
    centres = glands.mean(1, keepdims=True)
    wall = centres + (glands - centres) * 0.8
    following = np.roll(wall, -1, axis=1)
    length = np.hypot(*np.moveaxis(following - wall, -1, 0))
    gland, corner = np.nonzero(rng.random(length.shape) < length / 6.5)
    where = wall[gland, corner] + (following - wall)[gland, corner] * rng.uniform(
        0.3, 0.7, (len(gland), 1)
    )
    outward = where - centres[gland, 0]
    where = where + outward * rng.uniform(-0.06, 0.06, (len(gland), 1))
    angle = np.arctan2(outward[:, 1], outward[:, 0]) + rng.normal(0, 0.2, len(gland))
    return PlacedNuclei(where[:, 0], where[:, 1], angle, np.full(len(gland), GLAND, np.int8))


def _fat_nuclei(adipocytes: list[_Array], rng: np.random.Generator) -> PlacedNuclei:
    """Put a flat nucleus on the membrane of about every other fat cell that the section hits."""
    cut = [outline for outline in adipocytes if rng.random() < 0.5]
    corner = rng.integers(0, [len(outline) for outline in cut])
    where = np.array([o[c] for o, c in zip(cut, corner, strict=True)]).reshape(-1, 2)
    before = np.array([o[c - 1] for o, c in zip(cut, corner, strict=True)]).reshape(-1, 2)
    along = where - before
    angle = np.arctan2(along[:, 1], along[:, 0])
    return PlacedNuclei(where[:, 0], where[:, 1], angle, np.full(len(cut), ADIPOSE, np.int8))
