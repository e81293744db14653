from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.neighbors import radius_neighbors_graph as neighbours_within

from strank.cohort.panel import morans_i


def double_sum(x, weight):
    z = x - x.mean()
    pairs = sum(weight[i, j] * z[i] * z[j] for i in range(len(x)) for j in range(len(x)))
    return len(x) / weight.sum() * pairs / (z * z).sum()


def grid(n):
    return np.stack(np.meshgrid(np.arange(n), np.arange(n)), -1).reshape(-1, 2).astype(float)


def test_it_is_the_double_sum_for_any_weights():
    rng = np.random.default_rng(0)
    values = rng.poisson(0.7, size=(12, 9)).astype(float)
    # Neither symmetric nor 0 and 1.
    weight = rng.uniform(size=(12, 12)) * (rng.uniform(size=(12, 12)) < 0.4)
    np.fill_diagonal(weight, 0)
    expected = [double_sum(x, weight) for x in values.T]
    np.testing.assert_allclose(morans_i(values, sparse.csr_matrix(weight)), expected, atol=1e-12)
    found = morans_i(sparse.csr_matrix(values), sparse.csr_matrix(weight))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.floats(-50, 50), st.floats(0.1, 100), st.integers(0, 99))
def test_level_and_scale_do_not_matter(level, scale, seed):
    rng = np.random.default_rng(seed)
    values, neighbours = rng.normal(size=(25, 4)), neighbours_within(grid(5), 1.5)
    np.testing.assert_allclose(
        morans_i(level + scale * values, neighbours), morans_i(values, neighbours), atol=1e-8
    )


def test_without_a_pattern_its_mean_is_known():
    values = np.random.default_rng(0).normal(size=(36, 20_000))
    found = morans_i(values, neighbours_within(grid(6), 1.5))
    assert found.mean() == pytest.approx(-1 / 35, abs=4 * found.std() / np.sqrt(20_000))


@pytest.mark.parametrize("constant", [0.0, 3.0, 0.1, 1e5 / 3])
def test_undefined_is_nan(constant):
    values = np.c_[np.full(9, constant), np.arange(9.0)]
    assert np.isnan(morans_i(values, neighbours_within(grid(3), 1.5))).tolist() == [True, False]
    assert np.isnan(morans_i(values, neighbours_within(grid(3), 0.5))).all()
    assert morans_i(np.empty((9, 0)), neighbours_within(grid(3), 1.5)).shape == (0,)


def test_neighbours_of_square_and_hexagonal_grids():
    square = neighbours_within(200 * grid(5), 300).toarray()
    np.testing.assert_array_equal(square, square.T)
    assert (square[12].sum(), square[0].sum(), np.trace(square)) == (8, 3, 0)
    rows = grid(5) * [100, 100 * np.sqrt(3) / 2]
    rows[:, 0] += 50 * (grid(5)[:, 1] % 2)
    assert neighbours_within(rows, 150)[12].sum() == 6
    # Spots at one place are neighbours, but none of itself.
    assert neighbours_within(np.zeros((3, 2)), 1).sum() == 6
    assert neighbours_within(np.zeros((1, 2)), 1).shape == (1, 1)
