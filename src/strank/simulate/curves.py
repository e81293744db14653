r"""Counts along a curve: the paper's synthetic data, with known truth.

A position x in [0, 1] stands for what an image shows, and μ(x) for the relative expression there::

    μ(x)  = a sin(c x) + b sin(d x) + a + b
    m_i   = l_i (α μ(x_i) + β),    log l_i = σ (√2 sin(3π x_i) + ε_i) / √2,    ε_i ~ N(0, 1)
    c_i   ~ Binomial(NB(mean m_i, variance m_i + m_i² / r), p)

The first tissue has (α, β) = (1, 0), the second has a scale and a bias of its own: a batch effect.
Half of the variance of log depth is noise, half follows the position.

Reference: Nishimura et al., NeurIPS 2025, arXiv 2512.06612, section 4.1. The paper has σ = 0 and
p = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from strank.simulate.counts import negative_binomial

_Array = NDArray[np.float64]

#: (a, b, c, d) of the paper's four functions.
FUNCTIONS = ((0.2, 0.3, 25, 7), (0.25, 0.25, 3, 50), (0.25, 0.25, 15, 32), (0.25, 0.25, 20, 23))

# Half the width of the window.
_WINDOW = 0.1


@dataclass(frozen=True)
class CurveDesign:
    """What the counts are like; the module gives the equations."""

    sampling: str = "uniform"  # or "imbalanced": the second tissue only from a window
    centre: float | None = None  # of the window; random if None
    scale: float = 10.0  # α and β of the second tissue
    bias: float = 10.0
    size: float = 100.0  # r, the inverse dispersion
    n_spots: int = 50_000  # in each tissue
    kept: float = 1.0  # p, the share of counts that binomial thinning keeps
    depth_spread: float = 0.0  # σ


class CurveCounts(NamedTuple):
    """What is drawn, ``[n_spots]`` each."""

    x: _Array
    counts: NDArray[np.int64]
    offset: _Array  # log depth
    tissue: NDArray[np.int64]  # 0 or 1


def curve(function: int, x: _Array) -> _Array:
    """Compute the noise-free relative expression, between 0 and 1, of one of `FUNCTIONS`."""
    a, b, c, d = FUNCTIONS[function]
    return np.asarray(a * np.sin(c * x) + b * np.sin(d * x) + a + b)


def draw_tissue(
    function: int,
    x: _Array,
    *,
    design: CurveDesign,
    rng: np.random.Generator,
    second: bool = False,
) -> CurveCounts:
    """Draw the counts of spots at given positions of the first tissue, or the second."""
    wave = np.sqrt(2) * np.sin(3 * np.pi * x)
    offset = design.depth_spread * (wave + rng.standard_normal(len(x))) / np.sqrt(2)
    scale, bias = (design.scale, design.bias) if second else (1.0, 0.0)
    # a + b is the sum of amplitudes only to rounding, and a mean must not be negative.
    mean = np.exp(offset) * (scale * curve(function, x).clip(min=0) + bias)
    counts = rng.binomial(negative_binomial(mean, 1 / design.size, rng=rng), design.kept)
    return CurveCounts(x, counts, offset, np.full(len(x), int(second)))


def draw_curves(function: int, *, design: CurveDesign, rng: np.random.Generator) -> CurveCounts:
    """Draw both tissues, each with random positions of its own, the first tissue first."""
    if design.sampling not in ("uniform", "imbalanced"):
        raise ValueError(f"sampling must be uniform or imbalanced; got {design.sampling!r}")
    low, high = 0.0, 1.0
    if design.sampling == "imbalanced":
        # Drawn in any case: designs of one seed share what is drawn next.
        drawn = rng.uniform()
        centre = drawn if design.centre is None else design.centre
        low, high = max(0.0, centre - _WINDOW), min(1.0, centre + _WINDOW)
    tissues = [
        draw_tissue(function, x, design=design, rng=rng, second=second)
        for second, x in (
            (False, rng.uniform(0, 1, design.n_spots)),
            (True, rng.uniform(low, high, design.n_spots)),
        )
    ]
    return CurveCounts(*(np.concatenate(parts) for parts in zip(*tissues, strict=True)))
