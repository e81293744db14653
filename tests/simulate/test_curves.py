"""The synthetic curves: moments by hand, and what a design changes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from strank.simulate.curves import FUNCTIONS, CurveDesign, curve, draw_curves, draw_tissue

N = 200_000


def draw(x: float, *, second: bool = False, **design) -> np.ndarray:
    rng = np.random.default_rng(0)
    return draw_tissue(
        1, np.full(N, x), design=CurveDesign(**design), rng=rng, second=second
    ).counts


def test_a_curve_is_the_papers_formula():
    a, b, c, d = FUNCTIONS[2]
    assert curve(2, np.array([0.3]))[0] == a * np.sin(c * 0.3) + b * np.sin(d * 0.3) + a + b


@pytest.mark.parametrize("function", range(4))
def test_curves_stay_between_0_and_1(function):
    values = curve(function, np.linspace(0, 1, 10_000))
    assert values.min() > -1e-12
    assert 0.9 < values.max() <= 1


@pytest.mark.parametrize("second", [False, True])
def test_counts_have_mean_and_variance_of_the_negative_binomial(second):
    counts = draw(0.2, second=second, size=5.0)
    mean = curve(1, np.array(0.2)) * (10 if second else 1) + (10 if second else 0)
    variance = mean + mean**2 / 5
    # 5 standard errors: chance below 1e-6 each.
    assert abs(counts.mean() - mean) < 5 * np.sqrt(variance / N)
    assert counts.var() == pytest.approx(variance, rel=0.05)


def test_scale_and_bias_are_of_the_second_tissue_only():
    first, second = (
        draw(0.2, second=second, scale=30.0, bias=2.0).mean() for second in (False, True)
    )
    rate = float(curve(1, np.array(0.2)))
    assert first == pytest.approx(rate, rel=0.02)
    assert second == pytest.approx(30 * rate + 2, rel=0.02)


def test_thinning_keeps_a_share_of_the_counts():
    counts = draw(0.2, second=True, kept=0.1, size=5.0)
    mean = 0.1 * (10 * curve(1, np.array(0.2)) + 10)
    assert counts.mean() == pytest.approx(mean, rel=0.01)
    # Thinning a negative binomial leaves its dispersion as it was.
    assert counts.var() == pytest.approx(mean + mean**2 / 5, rel=0.05)


def test_depth_multiplies_the_mean_and_is_half_position():
    design = CurveDesign(depth_spread=1.0)
    drawn = draw_tissue(1, np.full(N, 1 / 6), design=design, rng=np.random.default_rng(0))
    assert drawn.offset.mean() == pytest.approx(1.0, abs=0.01)
    assert drawn.offset.var() == pytest.approx(0.5, rel=0.02)
    rate = drawn.counts.sum() / np.exp(drawn.offset).sum()
    assert rate == pytest.approx(float(curve(1, np.array(1 / 6))), rel=0.02)


def test_imbalanced_shows_the_second_tissue_in_a_window_only():
    design = CurveDesign(sampling="imbalanced", n_spots=2000)
    windows = []
    for seed in range(20):
        drawn = draw_curves(0, design=design, rng=np.random.default_rng(seed))
        first, second = drawn.x[drawn.tissue == 0], drawn.x[drawn.tissue == 1]
        assert len(first) == len(second) == 2000
        assert np.ptp(first) > 0.99
        assert 0.09 < np.ptp(second) <= 0.2
        windows.append(second.mean())
    assert np.ptp(windows) > 0.5


def test_designs_share_positions_for_the_same_seed():
    base = CurveDesign(sampling="imbalanced", n_spots=500)
    other = dataclasses.replace(base, scale=3.0)
    first, second = (
        draw_curves(3, design=design, rng=np.random.default_rng(5)) for design in (base, other)
    )
    assert np.array_equal(first.x, second.x)
    assert not np.array_equal(first.counts, second.counts)


def test_an_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match="sampling must be uniform or imbalanced; got 'even'"):
        draw_curves(0, design=CurveDesign(sampling="even"), rng=np.random.default_rng(0))
