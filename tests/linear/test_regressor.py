from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from strank import STRankRegressor, STRankRegressorCV


@pytest.fixture
def spots():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 4)) * [1, 10, 100, 0.1] + [0, 5, 0, 0]
    section = np.repeat(["a", "b", "c"], 40)
    slopes = np.array([[0.5, 0.0], [0.0, 0.0], [0.002, 0.0], [1.0, 0.0]])
    depth = rng.lognormal(4, 0.5, 120)
    counts = rng.poisson(0.2 * depth[:, None] * np.exp(X @ slopes))
    X[section == "b"] += 50
    return {"X": X, "counts": counts, "section": section, "offset": np.log(depth)}


def fit(model, spots, **changes):
    arguments = spots | changes
    return model.fit(arguments.pop("X"), arguments.pop("counts"), **arguments)


def test_units_of_features_do_not_matter(spots):
    one = fit(STRankRegressor(10.0, tolerance=1e-9), spots)
    scaled = spots["X"] * [1000, 1e-3, 1, 7] + [3, -8, 0, 1e4]
    other = fit(STRankRegressor(10.0, tolerance=1e-9), spots, X=scaled)
    np.testing.assert_allclose(one.predict(spots["X"]), other.predict(scaled), atol=1e-6)


def test_a_penalty_weighs_as_much_for_every_gene(spots):
    """A gene and its tenfold copy at tenfold penalty have the same optimum: units of counts."""
    counts = np.column_stack([spots["counts"][:, 0], 10 * spots["counts"][:, 0]])
    model = fit(STRankRegressor([20.0, 200.0], tolerance=1e-9), spots, counts=counts)
    np.testing.assert_allclose(model.coef_[0], model.coef_[1], rtol=1e-5)


def test_scaling_a_sections_counts_leaves_its_optimum():
    rng = np.random.default_rng(1)
    X, counts = rng.normal(size=(40, 2)), rng.poisson(9, size=(40, 3))
    one = STRankRegressor(0.0, tolerance=1e-9).fit(X, counts)
    many = STRankRegressor(0.0, tolerance=1e-9).fit(X, counts * 7, offset=np.full(40, 3.0))
    np.testing.assert_allclose(one.coef_, many.coef_, atol=1e-7)


def test_sparse_and_dense_counts_agree(spots):
    dense = fit(STRankRegressor(), spots)
    for form in (sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array):
        np.testing.assert_array_equal(
            fit(STRankRegressor(), spots, counts=form(spots["counts"])).coef_, dense.coef_
        )


def test_score_is_the_deviance_explained(spots):
    model = fit(STRankRegressor(1.0), spots)
    options = {k: spots[k] for k in ("section", "offset")}
    scores, expected = model.predict(spots["X"]), []
    for g in range(2):
        deviance = {"model": 0.0, "none": 0.0}
        for s in "abc":
            rows = spots["section"] == s
            c, o = spots["counts"][rows, g], spots["offset"][rows]
            for name, r in {"model": scores[rows, g], "none": 0.0}.items():
                p = np.exp(r + o) / np.exp(r + o).sum()
                seen = c > 0
                deviance[name] += (c[seen] * np.log(c[seen] / c.sum() / p[seen])).sum()
        expected.append(1 - deviance["model"] / deviance["none"])
    got = model.score(spots["X"], spots["counts"], **options)
    assert got == pytest.approx(np.mean(expected), rel=1e-9)


def test_cv_chooses_by_held_out_likelihood(spots):
    model = fit(STRankRegressorCV(penalties=[1.0, 100.0, 1e5]), spots)
    assert model.penalty_[0] < 1e5
    assert model.penalty_[1] == 1e5
    # The held-out likelihood of one penalty, from fits made by hand.
    held_out = 0.0
    for s in "abc":
        rows = spots["section"] != s
        inner = STRankRegressor(100.0).fit(
            spots["X"][rows],
            spots["counts"][rows],
            section=spots["section"][rows],
            offset=spots["offset"][rows],
        )
        r = inner.predict(spots["X"][~rows])[:, 0]
        c, o = spots["counts"][~rows, 0], spots["offset"][~rows]
        held_out += c.sum() * np.log(np.exp(r + o).sum()) - c @ r
    column = model.choice_.held_out[list(model.choice_.penalties).index(100.0), 0]
    assert column == pytest.approx(held_out, rel=1e-6)


def test_cv_leaves_whole_groups_out(spots):
    group = np.where(spots["section"] == "a", "one", "two")
    model = fit(STRankRegressorCV(), spots, group=group)
    assert model.converged_.all()
    with pytest.raises(ValueError, match="a section stands in two groups"):
        fit(STRankRegressorCV(), spots, group=np.arange(120) % 2)
    with pytest.raises(ValueError, match="at least two sections"):
        fit(STRankRegressorCV(), spots, section=np.zeros(120))


def test_lives_in_scikit_learn(spots):
    model = clone(STRankRegressor(penalty=5.0))
    assert model.get_params()["penalty"] == 5.0
    assert clone(STRankRegressorCV(tolerance=1e-4)).get_params()["tolerance"] == 1e-4
    pipeline = make_pipeline(FunctionTransformer(), model)
    pipeline.fit(spots["X"], spots["counts"], strankregressor__section=spots["section"])
    assert pipeline.predict(spots["X"]).shape == (120, 2)


def test_threads_are_given_back(spots):
    before = torch.get_num_threads()
    fit(STRankRegressorCV(), spots)
    assert torch.get_num_threads() == before


def test_errors_name_the_argument(spots):
    for change, message in [
        ({"counts": spots["counts"][:9]}, "y has 9 rows, but X has 120"),
        ({"section": spots["section"][:9]}, "section has 9 rows"),
        ({"offset": spots["offset"][:9]}, "offset has 9 rows"),
        ({"counts": -spots["counts"]}, "y must not be negative"),
        ({"offset": np.full(120, -np.inf)}, "offset must be finite"),
        ({"X": spots["X"] * np.nan}, "NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(STRankRegressor(), spots, **change)
