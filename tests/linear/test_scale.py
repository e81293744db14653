"""Features of any size: powers of two change no digit of the fit, others only the last ones."""

from __future__ import annotations

from functools import cache

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from strank import STRankRegressor, STRankRegressorCV

RNG = np.random.default_rng(0)
SECTION = np.repeat(np.arange(3), 20)
X = RNG.normal(size=(60, 5)) * [1, 10, 0.1, 3, 1] + [0, 4, 0, 0, 0]
X[:, 4] = 7.0
COUNTS = RNG.poisson(4 * np.exp(X[:, :2] @ [[0.4, 0.0], [0.0, 0.05]]))
MODELS = {
    "list": STRankRegressor(5.0, tolerance=1e-9),
    "pair": STRankRegressor(5.0, tolerance=1e-9, objective="pair"),
    "chosen": STRankRegressorCV([1.0, 30.0], tolerance=1e-9),
}


def fitted(kind, features, **options):
    return clone(MODELS[kind]).set_params(**options).fit(features, COUNTS, section=SECTION)


@cache
def plain(kind):
    """Fit the features as they are, once for all tests."""
    return fitted(kind, X)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-900, 900), min_size=5, max_size=5))
def test_a_power_of_two_changes_no_digit(exponents):
    factor = np.ldexp(1.0, exponents)
    one = plain("list")
    scores, weights, centre, scale = one.predict(X), one.coef_, one.centre_, one.scale_
    other = fitted("list", X * factor)
    np.testing.assert_array_equal(other.predict(X * factor), scores)
    np.testing.assert_array_equal(other.coef_ * factor, weights)
    np.testing.assert_array_equal(other.centre_, centre * factor)
    # What never varies has no scale.
    np.testing.assert_array_equal(other.scale_[:4], (scale * factor)[:4])
    assert other.scale_[4] == 1


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("exponent", [-280, -200, -15, 15, 200, 280])
def test_any_factor_changes_the_last_digits(kind, exponent):
    factor = 10.0**exponent
    one = plain(kind)
    scores, weights, penalty = one.predict(X), one.coef_, one.penalty_
    other = fitted(kind, X * factor)
    assert other.converged_.all()
    np.testing.assert_array_equal(other.penalty_, penalty)
    np.testing.assert_allclose(other.predict(X * factor), scores, atol=1e-7)
    np.testing.assert_allclose(other.coef_ * factor, weights, atol=1e-7)
    assert other.score(X * factor, COUNTS, section=SECTION) > 0.1


@pytest.mark.parametrize("exponent", [-36, -30, 30, 36])
def test_features_of_float32_as_far_as_it_goes(exponent):
    scores = fitted("list", X.astype(np.float32)).predict(X)
    scaled = (X * 10.0**exponent).astype(np.float32)
    np.testing.assert_allclose(fitted("list", scaled).predict(scaled), scores, atol=1e-4)


def test_features_on_disk(tmp_path):
    scores = plain("list").predict(X)
    with h5py.File(tmp_path / "X.h5", "w") as file:
        stored = file.create_dataset("X", data=X * 1e200)
        for max_memory in (7e-6, 1.0):
            model = fitted("list", stored, max_memory=max_memory)
            np.testing.assert_allclose(model.predict(stored), scores, atol=1e-7)


def test_more_features_than_spots():
    wide = np.tile(X, (1, 20)) + RNG.normal(size=(60, 100))
    scores = fitted("list", wide).predict(wide)
    other = fitted("list", wide * 1e-200).predict(wide * 1e-200)
    np.testing.assert_allclose(other, scores, atol=1e-7)


@pytest.mark.parametrize("factor", [1e-300, 1e298])
def test_what_has_no_weight_in_float64_is_refused(factor):
    with pytest.raises(ValueError, match=r"in feature 4; what can be fitted .* multiply it"):
        fitted("list", X * [1, 1, 1, 1, factor])


def test_own_units_are_kept():
    """Where the penalty is in them, features of another size have another optimum."""
    own = STRankRegressor(5.0, standardize=False)
    weights = own.fit(X, COUNTS, section=SECTION).coef_
    assert np.abs(own.fit(X * 8, COUNTS, section=SECTION).coef_ * 8 - weights).max() > 1e-3
    for factor in (1e-200, 1e200):
        with pytest.raises(ValueError, match=r"X reaches .* in feature 1; what can be fitted"):
            own.fit(X * factor, COUNTS, section=SECTION)
