"""Whether spots stand on the tissue, as they should."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from strank.errors import InputError
from strank.slides.image import Slide, thumbnail
from strank.slides.tissue import MASK_UM, tissue_mask

__all__ = ["check_on_tissue"]

_LEAST_SHARE = 0.5
_CLEARLY_MORE = 0.25
# Range of the optical density of glass; of pale tissue it is at least twice that.
_EVEN_OD = 0.1


def check_on_tissue(slide: Slide, centres: NDArray[np.float64], *, name: str) -> None:
    """Refuse spots of which most stand on glass, or would stand much better with x and y swapped.

    An image without glass, cut out of tissue, cannot tell, and passes: what lies outside its mask
    is pale tissue, and uneven.

    Parameters
    ----------
    slide
        The image.
    centres
        Spots under tissue (x, y), in pixels of the image, ``[n_spots, 2]``.
    name
        Section named in the message.

    Raises
    ------
    InputError
        If less than half of the spots stand on tissue, or a quarter more of them would with x and
        y swapped; also if the image shows no tissue.
    """
    mask, scale = tissue_mask(slide)
    green = thumbnail(slide, MASK_UM)[0][..., 1]
    glass = np.log10(green[~mask] + 1.0)
    if len(glass) and np.ptp(np.quantile(glass, [0.05, 0.95])) > _EVEN_OD:
        return
    shares = [
        _share(mask, order * slide.um_per_pixel / scale) for order in (centres, centres[:, ::-1])
    ]
    if shares[1] > shares[0] + _CLEARLY_MORE:
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


def _share(mask: NDArray[np.bool_], positions: NDArray[np.float64]) -> float:
    """Share of positions (x, y in pixels of the mask) on tissue; outside the mask is glass."""
    column, row = np.floor(positions).astype(int).T
    inside = (row >= 0) & (row < mask.shape[0]) & (column >= 0) & (column < mask.shape[1])
    return float(mask[row[inside], column[inside]].sum() / len(positions))
