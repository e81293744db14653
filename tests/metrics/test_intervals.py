"""Intervals of means over patients, sections and genes: against t tests, and if they cover."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from strank.metrics.significance import mean_intervals

_script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "error_rates.py"))
TABLES, ALIKE = _script["TABLES"], _script["ALIKE"]
# As in the docstring: 94.4 % at least are covered.
STATED = 0.056


def with_gaps(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Means that differ among sections, which have different numbers of genes without a value."""
    rng = np.random.default_rng(seed)
    values = rng.normal(np.arange(shape[1])[:, None], 1.0, size=shape)
    return np.where(rng.random(shape) < np.linspace(0.1, 0.7, shape[1])[:, None], np.nan, values)


def mean_of(table: np.ndarray) -> float:
    """Mean over sections of the mean over genes, of what has a value."""
    return float(np.mean([np.nanmean(row) for row in table if not np.isnan(row).all()]))


def of_t(values: np.ndarray) -> tuple[float, float]:
    return stats.t.interval(0.95, len(values) - 1, values.mean(), stats.sem(values))


def test_where_genes_are_alike_it_is_that_of_a_t_test_over_sections():
    values = np.random.default_rng(1).normal(size=(1, 5, 1)) + np.zeros((1, 5, 30))
    found = mean_intervals(values)
    np.testing.assert_allclose((found.low[0], found.high[0]), of_t(values[0, :, 0]), rtol=1e-9)


def test_where_genes_have_no_nature_of_their_own_it_is_over_sections_too():
    """All that genes vary by differs between sections: mirrored, so that no gene is higher."""
    noise = np.random.default_rng(2).normal(size=(4, 30))
    values = np.concatenate([noise, noise[:, ::-1]], axis=1)
    values = np.concatenate([values, -values])
    values += np.random.default_rng(3).normal(size=(8, 1))
    found = mean_intervals(values[None])
    assert np.abs(values.mean(0) - values.mean()).max() < 1e-12
    np.testing.assert_allclose((found.low[0], found.high[0]), of_t(values.mean(1)), rtol=1e-9)


def test_where_sections_are_alike_it_is_that_of_a_t_test_over_genes():
    values = np.random.default_rng(1).normal(size=(1, 1, 20)) + np.zeros((1, 5, 20))
    for part in (values, values[:, :1]):
        found = mean_intervals(part)
        np.testing.assert_allclose((found.low[0], found.high[0]), of_t(values[0, 0]), rtol=1e-9)


def test_two_parts_by_hand():
    """Mean squares of a table without gaps, as in any book on two-way layouts."""
    table = np.random.default_rng(5).normal(size=(4, 9)) + np.linspace(0, 2, 9)
    table += [[0], [1], [0], [3]]
    rows, columns = table.mean(1), table.mean(0)
    rest = table - rows[:, None] - columns + table.mean()
    both = (rest**2).sum() / (3 * 8) / 36
    of_genes = max(columns.var(ddof=1) / 9 - both, 0)
    t = stats.t(3).ppf(0.975), stats.t(8).ppf(0.975)
    margin = np.sqrt(t[0] ** 2 * rows.var(ddof=1) / 4 + t[1] ** 2 * of_genes)
    found = mean_intervals(table[None])
    assert found.high[0] - found.mean[0] == pytest.approx(margin, rel=1e-9)


def test_sections_of_a_patient_are_one():
    """As many of each: the t test over the patients' means; else wider than that of equal ones."""
    values = np.random.default_rng(6).normal(size=(1, 6, 1)) + np.zeros((1, 6, 30))
    found = mean_intervals(values, patient=np.array(["a", "b", "c", "b", "c", "a"]))
    means = values[0, [[0, 5], [1, 3], [2, 4]], 0].mean(1)
    np.testing.assert_allclose((found.low[0], found.high[0]), of_t(means), rtol=1e-9)
    own = mean_intervals(values)
    for patient in (np.arange(6), np.zeros(6)):
        assert mean_intervals(values, patient=patient).low == own.low
    # A patient that has no value in a table does not count there.
    values[0, 4:] = np.nan
    patient = np.array([1, 1, 1, 1, 2, 2])
    assert mean_intervals(values, patient=patient).low == mean_intervals(values[:, :4]).low


def highest_error(error, n):
    return error + 3.5 * np.sqrt(error * (1 - error) / n)


@pytest.mark.parametrize("n", [400, pytest.param(3_000, marks=pytest.mark.slow)])
def test_intervals_cover_what_is_stated(n):
    """Sections and patients vary more than genes, as much, less, and not at all."""
    missed = {table: 1 - table.covered(n, seed=1) for table in TABLES}
    assert max(missed.values()) < highest_error(STATED, n)
    # Nor are they wider than they need be, but for patients of one section beside one of many.
    equal = [error for table, error in missed.items() if table.sections in ALIKE]
    assert 0.03 < np.mean(equal) < 0.05


def test_a_table_does_not_depend_on_the_others():
    values = with_gaps((1, 4, 9))
    one, more, same = (
        mean_intervals(np.concatenate(tables))
        for tables in ([values], [values, values + 3], [values - values])
    )
    assert (same.mean[0], same.low[0], same.high[0]) == (0, 0, 0)
    assert (more.low[0], more.high[0]) == (one.low[0], one.high[0])
    np.testing.assert_allclose(np.ravel(more)[1::2], np.ravel(one) + 3, rtol=1e-12)


def test_a_pair_is_narrower_than_its_parts():
    """What two methods share, hard genes and hard sections, is no doubt about their difference."""
    rng = np.random.default_rng(0)
    first = rng.normal(0.3, 0.1, (8, 1)) + rng.normal(0, 0.2, (1, 40)) + np.zeros((8, 40))
    second = first + rng.normal(0.05, 0.02, first.shape)
    one, two, difference = np.transpose(mean_intervals(np.stack([first, second, second - first])))
    assert difference[1] > 0
    assert one[2] > two[1]


def test_what_has_no_value_does_not_count():
    values = with_gaps((3, 4, 6))
    values[0], values[1, 2] = np.nan, np.nan
    values[2] = np.nan
    values[2, 1, 3] = 0.25
    found = mean_intervals(values)
    assert np.isnan([found.mean[0], found.low[0], found.high[0]]).all()
    assert found.mean[1] == pytest.approx(mean_of(np.delete(values[1], 2, axis=0)))
    # A single value does not say how it varies.
    assert found.mean[2] == 0.25
    assert np.isnan([found.low[2], found.high[2]]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(0.1, 5))
def test_order_unit_and_origin_are_conventions(seed, origin, unit):
    rng, values = np.random.default_rng(seed), with_gaps((2, 3, 7), seed)
    found = mean_intervals(values)
    shuffled = values[:, rng.permutation(3)][:, :, rng.permutation(7)]
    np.testing.assert_allclose(mean_intervals(shuffled).mean, found.mean, rtol=1e-12)
    changed = np.array(mean_intervals(unit * values + origin))
    np.testing.assert_allclose(changed, unit * np.array(found) + origin, atol=1e-12)
    mirrored = mean_intervals(-values)
    np.testing.assert_allclose([mirrored.low, mirrored.high], [-found.high, -found.low], atol=1e-12)
