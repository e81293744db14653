from __future__ import annotations

import tracemalloc

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from strank.io.tenx import pool_points


@st.composite
def points(draw):
    n = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    counts = sparse.csr_matrix(rng.poisson(0.7, size=(n, 4)).astype(np.float32))
    # Multiples of a quarter: some points lie on the edges of squares.
    return counts, rng.integers(-400, 400, size=(n, 2)) / 4


def same(a, b) -> None:
    np.testing.assert_array_equal(a.counts.toarray(), b.counts.toarray())
    np.testing.assert_array_equal(a.squares, b.squares)


@given(points(), st.sampled_from([2.0, 7.5, 55.0]))
def test_pooling_agrees_with_groupby(data, size):
    counts, positions = data
    pooled = pool_points(counts, positions, size)
    groups = pd.DataFrame(counts.toarray()).groupby(list((positions // size).T[::-1]))
    np.testing.assert_array_equal(pooled.counts.toarray(), groups.sum().to_numpy())
    np.testing.assert_array_equal(pooled.n_points, groups.size())
    np.testing.assert_array_equal(pooled.squares, np.array(list(groups.groups))[:, ::-1])
    np.testing.assert_array_equal(pooled.counts.sum(0), counts.sum(0))


@given(points(), st.randoms(use_true_random=False))
def test_order_of_the_points_does_not_matter(data, random):
    counts, positions = data
    order = np.array(random.sample(range(len(positions)), len(positions)))
    same(pool_points(counts, positions, 8), pool_points(counts[order], positions[order], 8))


@given(points(), st.sampled_from([2, 3]))
def test_pooling_twice_is_pooling_once(data, times):
    fine = pool_points(*data, 4)
    same(pool_points(fine.counts, 4.0 * fine.squares + 2, 4 * times), pool_points(*data, 4 * times))


@pytest.mark.parametrize(
    ("count", "dtype"),
    [(200, np.uint8), (2**15 - 1, np.int16), (2**24 - 1, np.float32), (2**31 - 1, np.int32)],
)
def test_sums_that_the_type_of_the_counts_does_not_hold(count, dtype):
    pooled = pool_points(sparse.csr_matrix(np.full((3, 1), count, dtype)), np.ones((3, 2)), 8)
    assert pooled.counts.toarray().tolist() == [[3 * count]]


@pytest.mark.parametrize("size", [2.0, 8.0])
def test_nothing_is_made_dense(size):
    """90,000 bins of 18,000 genes: 6.5 GB dense, and 0.4 GB as dense squares of 8 µm."""
    rng = np.random.default_rng(0)
    n, genes, stored = 300, 18_000, 500_000
    rows, columns = rng.integers(0, n * n, stored), rng.integers(0, genes, stored)
    counts = sparse.csr_matrix((np.ones(stored, np.float32), (rows, columns)), (n * n, genes))
    positions = 2.0 * np.stack(np.divmod(np.arange(n * n), n), axis=1) + 1
    tracemalloc.start()
    pooled = pool_points(counts, positions, size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert pooled.counts.sum() == stored
    assert peak < 40e6
