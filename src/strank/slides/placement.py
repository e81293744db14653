"""Whether spots and an image belong together: its scale, its size, and the tissue on it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from strank.cohort.names import clean_name
from strank.errors import InputError, some
from strank.slides.scale import Stated
from strank.slides.slide import Slide, check_override, open_slide
from strank.slides.tissue import FLUORESCENCE, TissueMask, find_tissue, is_dark_field

# Swapped positions are better by this share, and with a third of the misses.
_LEAST_SHARE, _CLEARLY_MORE, _MISSES = 0.5, 0.15, 3
# With less glass, or more tissue, spots stand on tissue wherever they are put.
_LEAST_GLASS, _MOST_TISSUE = 0.02, 0.9
# Share of the tissue within the outline of many spots below which positions may be of a smaller
# image.
_LEAST_COVERED, _MANY = 0.2, 50


def open_measured(
    path: Path, measured: float, given: float | None = None, override: bool = False
) -> Slide:
    """Open an image whose µm per pixel the platform's files measure; what is given must agree."""
    check_override(given, override)
    slide = open_slide(path, measured if given is None else given)
    embedded = slide.source.stated.um_per_pixel
    told, who = (embedded, "the image says") if given is None else (given, "`um_per_pixel` says")
    if override:
        return slide
    if told is not None and Stated(measured, measured).contradicts(told):
        raise InputError(
            f"{path}: {who} {told:g} µm per pixel, but the positions make it {measured:.4g}; is it "
            f"the image that they are pixels of? If so, give `um_per_pixel={measured:.4g}`"
            + ", or add `um_per_pixel_override=True` if yours is meant"
            * (given is not None)
        )
    return slide


def image_of(image: Path, section: str) -> Path:
    """Take an image or, of a folder, the one that is called like a section."""
    if not image.is_dir():
        return image
    found = sorted(p for p in image.iterdir() if clean_name(p.stem) == section and p.is_file())
    if len(found) != 1:
        raise InputError(
            f"{image}: {'no' if not found else 'more than one'} image called {section}; name one "
            "image by the section"
        )
    return found[0]


def is_inside(spots: pd.DataFrame, slide: Slide) -> pd.Series:
    """Which spots lie within the image."""
    width, height = slide.size
    return spots["x"].between(0, width, "left") & spots["y"].between(0, height, "left")


def check_inside(spots: pd.DataFrame, slide: Slide, section: str) -> None:
    """Refuse spots that lie outside the image."""
    outside = ~is_inside(spots, slide)
    if outside.any():
        width, height = slide.size
        swapped = is_inside(spots.rename(columns={"x": "y", "y": "x"}), slide)
        first = spots[outside].iloc[0]
        raise InputError(
            f"section {section}: spot {some(spots.index[outside])} lies outside {slide.path.name} "
            f"({first['x']:.0f}, {first['y']:.0f}; the image is {width} x {height})"
            + "; with x and y swapped all lie inside"
            * bool(swapped.all())
        )


def check_on_tissue(slide: Slide, centres: NDArray[np.float64], *, name: str) -> list[str]:
    """Refuse spots most of which stand on glass, or that stand better with x and y swapped.

    Say where that cannot be judged, in sentences for the user.
    """
    unjudged = "whether the spots stand where they belong cannot be judged; look at a map of them"
    if is_dark_field(slide):
        return [f"{FLUORESCENCE}; {unjudged}, and import with the H&E image if there is one"]
    tissue = find_tissue(slide)
    if tissue.clear < _LEAST_GLASS or tissue.mask.mean() > _MOST_TISSUE:
        return [*tissue.notes, f"{slide.path.name} has hardly any glass, so {unjudged}"]
    shares = [_share(tissue, order * slide.um_per_pixel) for order in (centres, centres[:, ::-1])]
    better = shares[1] > shares[0] + _CLEARLY_MORE
    if better and (1 - shares[0]) > _MISSES * (1 - shares[1]):
        raise InputError(
            f"section {name}: {shares[0]:.0%} of the spots stand on the tissue of "
            f"{slide.path.name}, and {shares[1]:.0%} would with x and y swapped; swap them"
        )
    if shares[0] < _LEAST_SHARE:
        first, last = centres.min(0), centres.max(0)
        raise InputError(
            f"section {name}: only {shares[0]:.0%} of the spots stand on the tissue of "
            f"{slide.path.name} (x {first[0]:.0f} to {last[0]:.0f}, y {first[1]:.0f} to "
            f"{last[1]:.0f}; the image is {slide.size[0]} x {slide.size[1]}); is it the image that "
            f"the positions are pixels of, at {slide.um_per_pixel:g} µm per pixel?"
        )
    return [*tissue.notes, *_doubts(tissue, centres * slide.um_per_pixel)]


def _share(tissue: TissueMask, positions_um: NDArray[np.float64]) -> float:
    """Share of positions (x, y) on tissue; outside the image is glass."""
    mask = tissue.mask
    column, row = np.floor(positions_um / tissue.um_per_pixel).astype(int).T
    inside = (row >= 0) & (row < mask.shape[0]) & (column >= 0) & (column < mask.shape[1])
    return float(mask[row[inside], column[inside]].sum() / len(positions_um))


def _doubts(tissue: TissueMask, positions_um: NDArray[np.float64]) -> list[str]:
    outline = cv2.convexHull((positions_um / tissue.um_per_pixel).astype(np.float32))
    inside = cv2.fillConvexPoly(
        np.zeros(tissue.mask.shape, np.uint8), np.round(outline).astype(np.int32), 1
    )
    covered = float((tissue.mask & (inside > 0)).sum() / tissue.mask.sum())
    if covered >= _LEAST_COVERED or len(positions_um) < _MANY:
        return []
    return [
        f"the spots lie around {covered:.0%} of the tissue on the image; if it does not hold other "
        "tissue as well, their positions may be pixels of a smaller image"
    ]
