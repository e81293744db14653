from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from strank.functional.metrics import log1p_cp10k, spearman


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_spearman_agrees_with_scipy(seed):
    rng = np.random.default_rng(seed)
    scores, counts = rng.normal(size=(20, 3)).round(1), rng.poisson(2, size=(20, 3))
    section = rng.permutation(np.repeat(["b", "a"], 10))
    library_size = counts.sum(1) + rng.poisson(20, 20)
    got = spearman(scores, counts, section=section, library_size=library_size)
    for s, name in enumerate(["a", "b"]):
        rows = section == name
        for g in range(3):
            target = np.log1p(counts[rows, g] / library_size[rows] * 1e4)
            np.testing.assert_allclose(got[s, g], spearmanr(scores[rows, g], target).statistic)


def test_spearman_is_undefined_for_constants_and_single_spots():
    scores = np.array([[1.0, 2.0, 1.0], [2.0, 2.0, 5.0], [3.0, 4.0, 4.0]])
    counts = np.array([[0, 1, 1], [0, 2, 2], [9, 3, 3]])
    section = np.array([0, 0, 1])
    got = spearman(scores, counts, section=section, library_size=np.full(3, 10))
    np.testing.assert_array_equal(got, [[np.nan, np.nan, 1.0], [np.nan] * 3])


def test_log1p_cp10k_keeps_sparsity_and_survives_empty_spots():
    got = log1p_cp10k(np.array([[1, 0], [0, 0]]), [100, 0])
    assert got.nnz == 1
    np.testing.assert_allclose(got.toarray(), [[np.log1p(100), 0], [0, 0]])
