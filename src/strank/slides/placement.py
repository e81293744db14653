"""Whether spots lie on the tissue of their image."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from strank.errors import InputError
from strank.slides.slide import Slide
from strank.slides.tissue import FLUORESCENCE, TissueMask, find_tissue, is_dark_field

# Swapped positions are better by this share, and with a third of the misses.
_LEAST_SHARE, _CLEARLY_MORE, _MISSES = 0.5, 0.15, 3
# With less glass, or more tissue, spots stand on tissue wherever they are put.
_LEAST_GLASS, _MOST_TISSUE = 0.02, 0.9
# Share of the tissue within the outline of many spots below which positions may be of a smaller
# image.
_LEAST_COVERED, _MANY = 0.2, 50


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
