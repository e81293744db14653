"""How much room a slide of a platform has for spots."""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from strank.cohort.arrays import VISIUM
from strank.errors import InputError

_LARGER = 1.1
# Nothing on a glass slide, 51 x 76 mm at most, is wider; spots are larger than pixels of a scanner.
_WIDEST_MM, _FINEST_UM = 80.0, 1.0
# Of Visium's two slides, the smaller one's rows and columns, and a stray.
_SMALLER = (79, 129)
# Where spots or cells can be, the largest of a technology's slides.
_CAPTURE_MM = {
    "ST": (6.2, 6.6),
    "ST 2k": (6.2, 6.6),
    "Visium": (11.0, 11.0),
    "Visium of 78 x 128 positions": (6.5, 6.7),
    "Visium HD": (11.0, 11.0),
    "Xenium": (10.45, 22.45),
}


def slide_of_array(spots: pd.DataFrame, technology: str) -> str:
    """Say which slide of Visium it is, by ``array_row array_col`` if there are such."""
    names = ["array_row", "array_col"]
    if technology != VISIUM.technology or not set(names) <= set(spots):
        return technology
    span = spots[names].apply(pd.to_numeric, errors="coerce")
    small = bool(((span.max() - span.min()).to_numpy() < _SMALLER).all())
    return f"{technology} of 78 x 128 positions" if small else technology


def check_extent(
    positions_um: NDArray[np.float64], pitch_um: float, technology: str, *, name: str
) -> list[str]:
    """Refuse spots (x, y) that no slide of the technology has room for; return doubts."""
    centred = (positions_um - positions_um.mean(0)) / 1e3
    # However the section lies in its image.
    short, long = sorted(cv2.minAreaRect(centred.astype(np.float32))[1])
    spans = f"the spots span {short:.1f} x {long:.1f} mm"
    most = _CAPTURE_MM.get(technology)
    if most is None and (long > _WIDEST_MM or pitch_um < _FINEST_UM):
        return [f"{spans} and stand {pitch_um:.3g} µm apart; is µm per pixel right?"]
    if most is None:
        return []
    if short > _LARGER * most[0] or long > _LARGER * most[1]:
        raise InputError(
            f"section {name}: {spans}, and the capture area of {technology} has {most[0]:g} x "
            f"{most[1]:g} mm at most; µm per pixel is wrong: check `um_per_pixel`, or `pitch_um` "
            "where it was given"
        )
    return []
