"""H&E-like drawing of a simulated section.

Two canvases hold the optical density of hematoxylin and eosin, in hundredths. They are drawn in
the order of the tissue (fibres, cytoplasm, glands, fat, nuclei) and become light by the law of
Beer and Lambert: level_c = glass_c · light(x, y) · 10^-(H h_c + E e_c).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.simulate.regions import ADIPOSE, GLAND, GLASS, IMMUNE, STROMA, TUMOUR
from strank.simulate.tissue import LAYOUT_UM, PlacedNuclei, Tissue, TissueDesign, smooth_field

_Array = NDArray[np.float64]
Canvas = NDArray[np.uint8]

# Ruifrok's hematoxylin; his eosin with some of the blue it absorbs on real slides.
_HEMATOXYLIN = (0.65, 0.70, 0.29)
_EOSIN = (0.10, 0.95, 0.29)
_ANGLES, _VARIANTS = 24, 12
_STRIP = 512


@dataclass(frozen=True)
class Stain:
    """How a patient's slides were stained and scanned."""

    # Optical density of one unit of stain in red, green and blue: unit vectors.
    hematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    strength: tuple[float, float]  # of the two stains
    glass: tuple[float, float, float]  # levels of bare glass, up to 255


class _Cells(NamedTuple):
    """Looks of a kind of nucleus: half axes in µm with their spread, and darkness."""

    long_um: float
    short_um: float
    spread: float
    irregular: float
    density: float
    vesicular: float


_KINDS = {
    TUMOUR: _Cells(5.6, 4.3, 0.18, 0.10, 0.78, 0.35),
    STROMA: _Cells(7.5, 1.7, 0.18, 0.05, 0.75, 0.0),
    GLAND: _Cells(5.0, 3.0, 0.10, 0.04, 0.80, 0.2),
    IMMUNE: _Cells(3.2, 3.0, 0.08, 0.04, 1.05, 0.0),
    ADIPOSE: _Cells(5.0, 1.6, 0.1, 0.04, 0.8, 0.0),
}


def draw_stain(rng: np.random.Generator) -> Stain:
    """Draw a patient's stain: vectors turned by a few degrees, strengths and glass varied."""
    hematoxylin, eosin = (
        np.maximum(np.asarray(vector) + rng.normal(0, 0.045, 3), 0.02)
        for vector in (_HEMATOXYLIN, _EOSIN)
    )
    return Stain(
        hematoxylin=_triple(hematoxylin / np.linalg.norm(hematoxylin)),
        eosin=_triple(eosin / np.linalg.norm(eosin)),
        strength=(float(rng.uniform(0.8, 1.25)), float(rng.uniform(0.75, 1.3))),
        glass=_triple(rng.uniform(236, 248) + rng.uniform(-4, 4, 3)),
    )


def draw_section(
    tissue: Tissue, design: TissueDesign, *, stain: Stain, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw a section: RGB ``[side, side, 3]`` with ``side = round(side_um / um_per_pixel)``."""
    size = round(design.side_um / design.um_per_pixel)
    hematoxylin, eosin = _ground(tissue, design, size, rng)
    _draw_glands(hematoxylin, eosin, tissue.glands / design.um_per_pixel, rng)
    _draw_fat(hematoxylin, eosin, [a / design.um_per_pixel for a in tissue.adipocytes])
    _stamp_nuclei(hematoxylin, tissue.nuclei, design.um_per_pixel, rng)
    for canvas in (hematoxylin, eosin):
        cv2.GaussianBlur(canvas, (0, 0), 0.6 / design.um_per_pixel, dst=canvas)
    return _to_light(hematoxylin, eosin, stain, rng)


def _ground(
    tissue: Tissue, design: TissueDesign, size: int, rng: np.random.Generator
) -> tuple[Canvas, Canvas]:
    """Fibres and cytoplasm, at half the resolution: neither has finer detail."""
    half = size // 2
    labels = tissue.labels

    def grown(field: NDArray) -> NDArray[np.float32]:
        return np.asarray(cv2.resize(field.astype(np.float32), (half, half)))

    def share(mask: NDArray[np.bool_], blur_um: float = 5.0) -> NDArray[np.float32]:
        return grown(cv2.GaussianBlur(mask.astype(np.float32), (0, 0), blur_um / LAYOUT_UM))

    fine, coarse = _fibres(tissue.direction, half, 2 * design.um_per_pixel, rng)
    loose = grown(smooth_field(rng, labels.shape[0], 90))
    grain = cv2.GaussianBlur(rng.standard_normal((half, half), np.float32), (0, 0), 1.2) * 4
    # Bundles with clefts between them: nothing is stained where the coarse fibres are thin.
    body = np.clip(1.05 + 0.42 * coarse - 0.22 * loose, 0.15, 1.7)
    eosin = body * (0.19 + 0.035 * fine) + 0.015 * grain
    hematoxylin = body * (0.055 + 0.012 * fine)
    nest = np.clip(1.5 + 3.0 * grown(tissue.nests), 0, 1) * share(labels == TUMOUR)
    for cover, eosin_there, hematoxylin_there in (
        (nest, 0.20, 0.16),
        (share(labels == IMMUNE, 10), 0.11, 0.16),
        (share(labels == ADIPOSE), 0.14, 0.04),
    ):
        eosin += cover * (eosin_there + 0.03 * grain - eosin)
        hematoxylin += cover * (hematoxylin_there + 0.02 * grain - hematoxylin)
    ragged = grown(smooth_field(rng, labels.shape[0], 5))
    inside = np.clip((share(labels != GLASS, 4) - 0.5 + 0.08 * ragged) * 6 + 0.5, 0, 1)
    thickness = inside * np.exp(0.1 * grown(smooth_field(rng, labels.shape[0], 250)))
    small = _hundredths(hematoxylin * thickness), _hundredths(eosin * thickness)
    first, second = (np.asarray(cv2.resize(c, (size, size)), dtype=np.uint8) for c in small)
    return first, second


def _fibres(
    direction: _Array, size: int, um_per_pixel: float, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Fine and coarse noise smeared along the fibres' direction; each of mean 0, variance 1."""
    wavy = direction + 0.22 * smooth_field(rng, direction.shape[0], 22)
    cosine, sine = (cv2.resize(f(wavy).astype(np.float32), (size, size)) for f in (np.cos, np.sin))
    noise = rng.standard_normal((size, size), np.float32)
    both = cv2.merge([noise, cv2.GaussianBlur(noise, (0, 0), 4.5 / um_per_pixel)])
    row, column = np.indices((size, size), dtype=np.float32)
    # Each pass averages what lies one step up and one step down the stream and doubles the step, so
    # six passes smear over 64 steps.
    step = 0.8
    for _ in range(6):
        up, down = (
            cv2.remap(
                both,
                column + way * cosine,
                row + way * sine,
                cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REFLECT_101,
            )
            for way in (step, -step)
        )
        both = cv2.addWeighted(up, 0.5, down, 0.5, 0)
        step *= 2
    fine, coarse = cv2.split(both)
    return fine / fine.std(), coarse / coarse.std()


def _draw_glands(
    hematoxylin: Canvas, eosin: Canvas, glands: _Array, rng: np.random.Generator
) -> None:
    for outline in glands:
        centre = outline.mean(0)
        lumen = centre + (outline - centre) * rng.uniform(0.36, 0.58)
        secretion = int(rng.uniform(0, 6) if rng.random() < 0.7 else rng.uniform(10, 26))
        _polygon(eosin, outline, 24, edge=32)
        _polygon(hematoxylin, outline, 14, edge=10)
        _polygon(eosin, lumen, secretion, edge=34)
        _polygon(hematoxylin, lumen, 1, edge=12)


def _draw_fat(hematoxylin: Canvas, eosin: Canvas, adipocytes: list[_Array]) -> None:
    for outline in adipocytes:
        _polygon(eosin, outline, 1, edge=16)
        _polygon(hematoxylin, outline, 1, edge=6)


def _polygon(canvas: Canvas, outline: _Array, level: int, *, edge: int) -> None:
    # Four fractional bits: outlines in whole pixels would look cut with scissors.
    corners = [np.round(outline * 16).astype(np.int32)]
    cv2.fillPoly(canvas, corners, level, cv2.LINE_AA, shift=4)
    cv2.polylines(canvas, corners, True, edge, 2, cv2.LINE_AA, shift=4)


def _stamp_nuclei(
    canvas: Canvas, nuclei: PlacedNuclei, um_per_pixel: float, rng: np.random.Generator
) -> None:
    """Put a ready-drawn nucleus at each position; drawing tens of thousands would take seconds."""
    for kind, looks in _KINDS.items():
        stamps = _stamps(looks, um_per_pixel, rng)
        chosen = nuclei.kind == kind
        turn = np.round(nuclei.angle[chosen] / np.pi * _ANGLES).astype(int) % _ANGLES
        which = rng.integers(_VARIANTS, size=turn.size)
        side = stamps.shape[-1]
        left, top = (
            np.round(v[chosen] / um_per_pixel).astype(int) - side // 2 for v in (nuclei.x, nuclei.y)
        )
        fits = (np.minimum(left, top) >= 0) & (np.maximum(left, top) + side <= canvas.shape[0])
        for x, y, a, b in zip(left[fits], top[fits], turn[fits], which[fits], strict=True):
            patch = canvas[y : y + side, x : x + side]
            np.maximum(patch, stamps[a, b], out=patch)


def _stamps(looks: _Cells, um_per_pixel: float, rng: np.random.Generator) -> Canvas:
    """Nuclei of one kind, ``[n_angles, n_variants, side, side]``: uneven outline and chromatin."""
    reach = int(np.ceil(looks.long_um * (1 + 2.5 * looks.spread) / um_per_pixel)) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1] * um_per_pixel
    shape = (_ANGLES, _VARIANTS, 1, 1)
    turn = (np.arange(_ANGLES) * np.pi / _ANGLES)[:, None, None, None]
    size = np.clip(rng.normal(1, looks.spread, shape), 0.6, 1 + 2.5 * looks.spread)
    u = (x * np.cos(turn) + y * np.sin(turn)) / (looks.long_um * size)
    v = (y * np.cos(turn) - x * np.sin(turn)) / (looks.short_um * size)
    around = np.arctan2(v, u)
    radius = np.hypot(u, v)
    for harmonic in (2, 3):
        phase = rng.uniform(0, 2 * np.pi, shape)
        radius = radius * (1 + looks.irregular * np.cos(harmonic * around + phase))
    # The outline is one pixel soft, whatever the nucleus's size.
    cover = np.clip((1 - radius) * looks.short_um / um_per_pixel + 0.5, 0, 1)
    chromatin = rng.standard_normal((*shape[:2], *x.shape))
    for stack in chromatin.reshape(-1, *x.shape):
        stack[:] = cv2.GaussianBlur(stack, (0, 0), 0.8 / um_per_pixel) * 3
    pale = looks.vesicular * np.clip(1.2 - 1.3 * radius**2, 0, 1)
    darkness = rng.normal(1, 0.14, shape) * (1 - pale) + 0.10 * chromatin
    return _hundredths(cover * looks.density * darkness)


def _to_light(
    hematoxylin: Canvas, eosin: Canvas, stain: Stain, rng: np.random.Generator
) -> NDArray[np.uint8]:
    size = hematoxylin.shape[0]
    light = 1 + 0.012 * cv2.resize(
        rng.standard_normal((4, 4)).astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC
    )
    levels = np.arange(256) / 100
    first = stain.strength[0] * np.asarray(stain.hematoxylin)
    second = stain.strength[1] * np.asarray(stain.eosin)
    image = np.empty((size, size, 3), np.uint8)
    for top in range(0, size, _STRIP):
        rows = slice(top, top + _STRIP)
        noise = rng.standard_normal(hematoxylin[rows].shape, np.float32) * 1.6
        for colour, glass in enumerate(stain.glass):
            value = glass * light[rows]
            for canvas, per_unit in ((hematoxylin, first), (eosin, second)):
                passed = 10 ** -(levels * per_unit[colour])
                value *= cv2.LUT(canvas[rows], passed.astype(np.float32))
            image[rows, :, colour] = np.clip(value + noise, 0, 255)
    return image


def _hundredths(density: NDArray) -> Canvas:
    return np.asarray(np.clip(density * 100, 0, 255), dtype=np.uint8)


def _triple(values: _Array) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
