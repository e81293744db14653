"""Features of any size that float32 holds have the same scores; others are refused in words."""

from __future__ import annotations

import numpy as np
import pytest

import strank
from strank.errors import InputError
from strank.model.novelty import novelty_of
from strank.neural.recipe import Recipe


def scaled(cohort, factor):
    for section in cohort.values():
        section.obsm["mine"] = section.obsm["mine"].astype(np.float64) * factor
    return cohort


@pytest.mark.parametrize("exponent", [-28, -15, 15, 28])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"loss": "mse"},
        {"loss": "poisson"},
        {"head": "mlp", "recipe": Recipe(max_epochs=2, networks=1)},
    ],
    ids=["list", "ridge", "poisson", "mlp"],
)
def test_scores_are_the_same(cohort, how, exponent):
    def scores(cohort):
        model = strank.fit(cohort, encoder="mine", n_genes=3, **how)
        section = cohort["B1"]
        return model.predict(section).X, novelty_of(section.obsm["mine"], model.novelty)

    expected = scores(cohort)
    got = scores(scaled(cohort, 10.0**exponent))
    np.testing.assert_allclose(got[0], expected[0], atol=1e-3)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-3)


@pytest.mark.parametrize("factor", [1e-200, 1e-33, 1e31, 1e200])
@pytest.mark.parametrize("how", [{}, {"head": "mlp"}])
def test_what_no_model_holds(cohort, how, factor):
    model = strank.fit(cohort, encoder="mine", n_genes=3)
    told = r"mine features reach .*; models hold what reaches 1e-30 to 1e\+30: multiply them"
    with pytest.raises(InputError, match=f"section A1: {told}"):
        strank.fit(scaled(cohort, factor), encoder="mine", n_genes=3, **how)
    with pytest.raises(InputError, match=told):
        model.predict(cohort["A1"])


@pytest.mark.parametrize("how", [{}, {"head": "mlp", "recipe": Recipe(max_epochs=2, networks=1)}])
def test_a_feature_that_is_almost_nothing_is_nothing(cohort, how):
    """As of a network whose units are off: float32 leaves numbers near 1e-40 of them."""
    rng = np.random.default_rng(0)
    for section in cohort.values():
        off = rng.uniform(0, 1e-40, (section.n_obs, 1)).astype(np.float32)
        section.obsm["mine"] = np.hstack([section.obsm["mine"], off])
        del section.uns["mine"]
    model = strank.fit(cohort, encoder="mine", n_genes=3, **how)
    section = cohort["B1"].copy()
    scores = model.predict(section).X
    assert np.isfinite(scores).all()
    section.obsm["mine"][:, 3] = 0
    np.testing.assert_allclose(model.predict(section).X, scores, atol=1e-6)


def test_a_head_that_is_not_finite_is_not_saved(cohort, tmp_path):
    model = strank.fit(cohort, encoder="mine", n_genes=3)
    model.head.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match="a model whose weight is not finite is not saved"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
