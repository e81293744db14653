"""Bootstrap intervals of a mean over sections and genes: against a loop, and whether they cover."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strank.metrics.significance import mean_intervals


def with_gaps(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Means that differ among sections, which have different numbers of genes without a value."""
    rng = np.random.default_rng(seed)
    values = rng.normal(np.arange(shape[1])[:, None], 1.0, size=shape)
    return np.where(rng.random(shape) < np.linspace(0.1, 0.7, shape[1])[:, None], np.nan, values)


def mean_of(table: np.ndarray) -> float:
    """Mean over sections of the mean over genes, of what has a value."""
    return float(np.mean([np.nanmean(row) for row in table if not np.isnan(row).all()]))


def test_against_a_loop_that_draws_rows_and_columns():
    values, rng = with_gaps((2, 5, 14)), np.random.default_rng(1)
    found = mean_intervals(values, n_draws=6000)
    for number, table in enumerate(values):
        drawn = []
        for _ in range(6000):
            rows, columns = rng.integers(5, size=5), rng.integers(14, size=14)
            drawn.append(mean_of(table[rows][:, columns]))
        low, high = np.quantile(drawn, [0.025, 0.975])
        # Two and a half standard errors of the ends of so many draws.
        assert found.low[number] == pytest.approx(low, abs=0.03 * (high - low))
        assert found.high[number] == pytest.approx(high, abs=0.03 * (high - low))
        assert found.mean[number] == pytest.approx(mean_of(table), rel=1e-12)


@pytest.mark.parametrize(("section", "gene", "noise"), [(0.5, 1, 0.5), (1, 1, 1), (0.3, 1, 1)])
def test_intervals_cover_when_sections_and_genes_are_both_random(section, gene, noise):
    """Of ten sections. Over genes alone, 60 % of the second kind would be covered; over sections
    alone, 75 % of the third."""
    rng, n = np.random.default_rng(0), 500
    values = rng.normal(0, section, (n, 10, 1)) + rng.normal(0, gene, (n, 1, 50))
    found = mean_intervals(values + rng.normal(0, noise, (n, 10, 50)), n_draws=1000)
    assert 0.90 <= np.mean((found.low <= 0) & (found.high >= 0)) <= 0.98


def test_all_tables_see_the_same_draws():
    values = with_gaps((1, 4, 9))
    one, more, same = (
        mean_intervals(np.concatenate(tables))
        for tables in ([values], [values, values + 3], [values - values])
    )
    assert (same.mean[0], same.low[0], same.high[0]) == (0, 0, 0)
    assert (more.low[0], more.high[0]) == (one.low[0], one.high[0])
    np.testing.assert_allclose(np.ravel(more)[1::2], np.ravel(one) + 3, rtol=1e-12)
    assert mean_intervals(values, seed=1).low != one.low


def test_a_pair_is_narrower_than_its_parts():
    """What two methods share, hard genes and hard sections, is no doubt about their difference."""
    rng = np.random.default_rng(0)
    first = rng.normal(0.3, 0.1, (8, 1)) + rng.normal(0, 0.2, (1, 40)) + np.zeros((8, 40))
    second = first + rng.normal(0.05, 0.02, first.shape)
    one, two, difference = np.transpose(mean_intervals(np.stack([first, second, second - first])))
    assert difference[1] > 0
    assert one[2] > two[1]


def test_one_section_is_over_genes_only():
    values = np.random.default_rng(0).normal(size=(1, 1, 400))
    found = mean_intervals(values)
    expected = 1.96 * values.std() / 20
    assert found.high[0] - found.mean[0] == pytest.approx(expected, rel=0.1)
    assert found.mean[0] - found.low[0] == pytest.approx(expected, rel=0.1)


def test_what_has_no_value_does_not_count():
    values = with_gaps((3, 4, 6))
    values[0], values[1, 2] = np.nan, np.nan
    values[2] = np.nan
    values[2, 1, 3] = 0.25
    found = mean_intervals(values)
    assert np.isnan([found.mean[0], found.low[0], found.high[0]]).all()
    assert found.mean[1] == pytest.approx(mean_of(np.delete(values[1], 2, axis=0)))
    # Draws that miss the only value have no mean, and the others have just this one.
    assert (found.mean[2], found.low[2], found.high[2]) == (0.25, 0.25, 0.25)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(0.1, 5))
def test_order_unit_and_origin_are_conventions(seed, origin, unit):
    rng, values = np.random.default_rng(seed), with_gaps((2, 3, 7), seed)
    found = mean_intervals(values, n_draws=300)
    shuffled = values[:, rng.permutation(3)][:, :, rng.permutation(7)]
    np.testing.assert_allclose(mean_intervals(shuffled, n_draws=20).mean, found.mean, rtol=1e-12)
    changed = np.array(mean_intervals(unit * values + origin, n_draws=300))
    np.testing.assert_allclose(changed, unit * np.array(found) + origin, atol=1e-12)
    mirrored = mean_intervals(-values, n_draws=300)
    np.testing.assert_allclose([mirrored.low, mirrored.high], [-found.high, -found.low], atol=1e-12)
