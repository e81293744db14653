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

__all__ = ["FUNCTIONS", "CurveCounts", "CurveDesign", "curve", "draw_curves", "draw_tissue"]

_Array = NDArray[np.float64]

#: (a, b, c, d) of the paper's four functions.
FUNCTIONS = ((0.2, 0.3, 25, 7), (0.25, 0.25, 3, 50), (0.25, 0.25, 15, 32), (0.25, 0.25, 20, 23))

_WINDOW = 0.1


@dataclass(frozen=True)
class CurveDesign:
    """What the counts are like; the module gives the equations.

    Attributes
    ----------
    sampling
        ``"uniform"``, or ``"imbalanced"``: the second tissue only from a window of half-width 0.1.
    centre
        Of the window; random if ``None``.
    scale, bias
        α and β of the second tissue.
    size
        r, the inverse dispersion.
    n_spots
        In each tissue.
    kept
        p, the share of counts that binomial thinning keeps.
    depth_spread
        σ.
    """

    sampling: str = "uniform"
    centre: float | None = None
    scale: float = 10.0
    bias: float = 10.0
    size: float = 100.0
    n_spots: int = 50_000
    kept: float = 1.0
    depth_spread: float = 0.0


class CurveCounts(NamedTuple):
    """Position `x`, `counts`, log depth `offset` and `tissue` (0 or 1) of spots, ``[n_spots]``."""

    x: _Array
    counts: NDArray[np.int64]
    offset: _Array
    tissue: NDArray[np.int64]


def curve(function: int, x: _Array) -> _Array:
    """Compute the noise-free relative expression, between 0 and 1.

    Parameters
    ----------
    function
        Which of `FUNCTIONS`.
    x
        Positions in [0, 1].

    Examples
    --------
    >>> float(curve(0, np.array(0.0)))
    0.5
    """
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
    """Draw the counts of spots at given positions of one tissue.

    Parameters
    ----------
    function
        Which of `FUNCTIONS`.
    x
        Positions, ``[n_spots]``.
    design
        What the counts are like.
    rng
        Source of randomness.
    second
        Whether it is the tissue with scale and bias.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> drawn = draw_tissue(0, np.zeros(100_000), design=CurveDesign(), rng=rng, second=True)
    >>> round(float(drawn.counts.mean()), 1)
    15.0
    """
    wave = np.sqrt(2) * np.sin(3 * np.pi * x)
    offset = design.depth_spread * (wave + rng.standard_normal(len(x))) / np.sqrt(2)
    scale, bias = (design.scale, design.bias) if second else (1.0, 0.0)
    # a + b is the sum of amplitudes only to rounding, and a mean must not be negative.
    mean = np.exp(offset) * (scale * curve(function, x).clip(min=0) + bias)
    counts = rng.binomial(negative_binomial(mean, 1 / design.size, rng=rng), design.kept)
    return CurveCounts(x, counts, offset, np.full(len(x), int(second)))


def draw_curves(function: int, *, design: CurveDesign, rng: np.random.Generator) -> CurveCounts:
    """Draw both tissues, each with random positions of its own, the first tissue first.

    Parameters
    ----------
    function
        Which of `FUNCTIONS`.
    design
        What the counts are like.
    rng
        Source of randomness.

    Raises
    ------
    ValueError
        For an unknown sampling.

    Examples
    --------
    >>> design = CurveDesign(sampling="imbalanced", n_spots=1000)
    >>> drawn = draw_curves(2, design=design, rng=np.random.default_rng(0))
    >>> len(drawn.x), bool(np.ptp(drawn.x[drawn.tissue == 1]) <= 0.2)
    (2000, True)
    """
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
