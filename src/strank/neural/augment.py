"""Random turns, mirrors and stains of patches, in which the spot stays in the centre."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strank.encoders.morphology.stain import HEMATOXYLIN_EOSIN, TISSUE_DENSITY, unmixing_matrix
from strank.errors import InputError

#: Numbers a patch's augmentation is made of: symmetry; scale and shift of hematoxylin, of eosin.
N_DRAWS = 5
#: Either stain is multiplied by up to 1 ± this, after Tellez et al. (2019), whose densities have
#: another unit ...
STAIN_SCALE = 0.2
#: ... and shifted by up to ± this, in optical density.
STAIN_SHIFT = 0.05

_N_SYMMETRIES = 8


def draw(n_spots: int, seed: int, epoch: int) -> Tensor:
    """Draw the augmentation of every spot of a training set for an epoch.

    A spot's row depends on its place in the training set only, so batches, workers and processes
    change nothing.

    Examples
    --------
    >>> draw(3, seed=0, epoch=1).equal(draw(9, seed=0, epoch=1)[:3])
    True
    """
    numbers = np.random.default_rng((seed, epoch)).random((n_spots, N_DRAWS), dtype=np.float32)
    return torch.from_numpy(numbers)


def augment(patches: Tensor, draws: Tensor) -> Tensor:
    """Turn, mirror and stain patches anew, each by its own draws.

    A patch goes through one of the eight symmetries of the square, all about its centre, where the
    spot is. Then amounts of hematoxylin and eosin are scaled and shifted [1]_; what neither
    explains stays. The shift fades out from tissue to white, so that empty glass stays white.

    References
    ----------
    .. [1] Tellez et al. (2019), Quantifying the effects of data augmentation and stain color
       normalization in convolutional neural networks for computational pathology, Medical Image
       Analysis 58, 101544.

    Examples
    --------
    >>> patches = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    >>> augment(patches, draw(1, seed=0, epoch=0)).equal(patches)
    True
    """
    _check(patches, draws)
    return _stained(_turned(patches, draws[:, 0]), draws[:, 1:])


class Augmentation:
    """Augments rows of a training set; a `strank.neural.data.Augment`."""

    def __init__(self, n_spots: int, seed: int) -> None:
        self.n_spots, self.seed = n_spots, seed
        self._drawn: tuple[int, Tensor] | None = None

    def __call__(self, patches: Tensor, rows: NDArray[np.int64], epoch: int) -> Tensor:
        """Augment the patches of some rows as they are in an epoch."""
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, draw(self.n_spots, self.seed, epoch)
        return augment(patches, self._drawn[1][rows])


def _check(patches: Tensor, draws: Tensor) -> None:
    shape = tuple(patches.shape)
    if patches.dtype != torch.uint8 or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
        raise InputError(
            f"expected uint8 patches [n, pixels, pixels, 3]; got {patches.dtype} {list(shape)}"
        )
    if tuple(draws.shape) != (shape[0], N_DRAWS):
        raise InputError(
            f"expected draws [{shape[0]}, {N_DRAWS}], a row a patch; got {list(draws.shape)}"
        )


def _turned(patches: Tensor, draws: Tensor) -> Tensor:
    which = (draws * _N_SYMMETRIES).long()
    out = torch.empty_like(patches)
    for symmetry in range(_N_SYMMETRIES):
        rows = which == symmetry
        turned = torch.rot90(patches[rows], symmetry % 4, (1, 2))
        out[rows] = turned.flip(2) if symmetry >= 4 else turned
    return out


def _stained(patches: Tensor, draws: Tensor) -> Tensor:
    """Both stains are linear in density, so scales and shifts are one 3 x 3 map a patch."""
    unmix, stains = (matrix.to(patches.device) for matrix in _matrices())
    scale, shift = (2 * draws - 1).view(-1, 2, 2).unbind(2)
    # Sums and no matrix products, whose rounding may depend on how many patches there are.
    more = ((unmix * (STAIN_SCALE * scale)[:, None, :])[..., None] * stains).sum(2)
    offset = ((STAIN_SHIFT * shift)[..., None] * stains).sum(1)
    density = torch.log10(256 / (patches.flatten(1, 2) + 1.0))
    tissue = (density.mean(2, keepdim=True) / TISSUE_DENSITY).clamp(max=1)
    moved = [density[..., [k]] * more[:, [k]] for k in range(3)]
    density = density + (moved[0] + moved[1] + moved[2]) + tissue * offset[:, None, :]
    levels = (256 * 10**-density - 1).round().clamp(0, 255)
    return levels.to(torch.uint8).view_as(patches)


def _matrices() -> tuple[Tensor, Tensor]:
    """Return ``[3, 2]`` from density to stains and ``[2, 3]`` from stains to density."""
    stains = np.asarray(HEMATOXYLIN_EOSIN)
    stains = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    unmix = unmixing_matrix()[:2].T
    return torch.tensor(unmix, dtype=torch.float32), torch.tensor(stains, dtype=torch.float32)
