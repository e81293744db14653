"""More features than spots: the same optimum, along as many axes as there are spots."""

from __future__ import annotations

import numpy as np
import pytest

from strank import STRankRegressor, STRankRegressorCV
from strank.linear.data import Rows

MODELS = {
    "one penalty": STRankRegressor(3.0, tolerance=1e-9),
    "own units": STRankRegressor(3.0, tolerance=1e-9, standardize=False),
    "pairs": STRankRegressor(3.0, tolerance=1e-9, objective="pair"),
    "chosen": STRankRegressorCV(tolerance=1e-9),
    "borrowed": STRankRegressorCV(tolerance=1e-9, borrow=True),
}


def simulate(n_spots=48, n_features=90, n_genes=20, n_sections=4, seed=0):
    """Features that share directions, of unlike scale; one constant, one twice, one of one spot."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_spots, 6)) @ rng.normal(size=(6, n_features))
    features = (features + rng.normal(size=features.shape)) * rng.lognormal(0, 2, n_features)
    features[:, 0], features[:, 1] = 7.0, features[:, 2]
    features[:, 3] = np.arange(n_spots) == 5
    section = np.arange(n_spots) * n_sections // n_spots
    counts = rng.poisson(rng.lognormal(1, 1, n_genes) * np.exp(rng.normal(size=(n_spots, n_genes))))
    return features, counts, section, rng.normal(size=n_spots) / 3


def primal(monkeypatch, model, features, counts, **spots):
    """Fit by the covariance of the features, as where there are more spots."""
    with monkeypatch.context() as patch:
        patch.setattr(Rows, "wide", False)
        return model.fit(features, counts, **spots)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_optimum_is_that_of_all_features(monkeypatch, model, dtype):
    features, counts, section, offset = simulate()
    features, spots = features.astype(dtype), {"section": section, "offset": offset}
    expected = primal(monkeypatch, model, features.astype(np.float64), counts, **spots)
    weights, scores = expected.coef_, expected.predict(features)
    penalty, excess = expected.penalty_, expected.solution_.excess
    got = model.fit(features, counts, **spots)
    assert got.converged_.all()
    np.testing.assert_array_equal(got.penalty_, penalty)
    exact = 1e-6 if dtype == np.float64 else 2e-5
    np.testing.assert_allclose(got.predict(features), scores, atol=exact)
    scaled = weights * got.scale_
    np.testing.assert_allclose(got.coef_ * got.scale_, scaled, atol=exact * np.abs(scaled).max())
    assert (got.solution_.excess < np.maximum(10 * excess, 1e-9)).all()
    assert (got.coef_[:, 0] == 0).all()


def test_spots_that_tell_nothing_change_nothing():
    """Sections of one spot have nothing to compare, and make spots more than features."""
    features, counts, section, _ = simulate()
    alone = 4 + np.arange(60)
    model = STRankRegressor(3.0, tolerance=1e-9, standardize=False)
    few = model.fit(features, counts, section=section).coef_
    features, counts = (np.concatenate([v, np.tile(v[:10], (6, 1))]) for v in (features, counts))
    more = model.fit(features, counts, section=np.concatenate([section, alone])).coef_
    np.testing.assert_allclose(more, few, atol=1e-7 * np.abs(few).max())


def test_the_bounds_hold_for_the_weights_of_all_features():
    features, counts, section, offset = simulate()
    spots = {"section": section, "offset": offset}
    rough = STRankRegressor(2.0, max_iterations=3).fit(features, counts, **spots)
    exact = STRankRegressor(2.0, tolerance=1e-11).fit(features, counts, **spots)
    distance = np.linalg.norm((rough.coef_ - exact.coef_) * exact.scale_, axis=1)
    assert (distance > 1e-4).any()
    assert (distance <= rough.solution_.distance + 1e-9).all()
    excess = rough.solution_.objective - exact.solution_.objective
    assert (excess <= rough.solution_.excess + 1e-9).all()


def test_memory_grows_with_spots_and_not_with_the_square_of_features():
    features, counts, section, _ = simulate(n_features=6000)
    model = STRankRegressorCV([10.0, 1000.0], max_memory=0.25)
    assert model.fit(features, counts, section=section).converged_.all()
    with pytest.raises(ValueError, match="too little for 6000 features"):
        STRankRegressor(max_memory=0.002).fit(features, counts, section=section)
