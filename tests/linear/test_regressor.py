from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from sklearn import config_context
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.model_selection import GroupKFold, LeaveOneGroupOut, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from strank import STRankRegressor, STRankRegressorCV
from strank.functional.groups import deal
from strank.linear.data import gather
from strank.linear.design import Design
from strank.linear.exact import Status


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


@pytest.mark.parametrize("genes_at_a_time", [256, 1])
def test_score_is_the_deviance_explained(spots, genes_at_a_time, monkeypatch):
    monkeypatch.setattr("strank.linear.regressor._GENES", genes_at_a_time)
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


@pytest.mark.parametrize("shared", [False, True])
def test_where_no_penalty_is_better_it_is_the_largest(spots, shared):
    """What is known of a gene without counts, or with counts in one section only, is nothing."""
    counts = spots["counts"].copy()
    counts[:, 0] = 0
    counts[spots["section"] != "b", 1] = 0
    model = STRankRegressorCV(penalties=[1.0, 1e4, 100.0], shared=shared)
    fit(model, spots, counts=counts[:, :1])
    assert model.penalty_.tolist() == [1e4]
    alone = fit(STRankRegressorCV(penalties=[1.0, 1e4, 100.0]), spots, counts=counts)
    np.testing.assert_array_equal(np.ptp(alone.choice_.held_out, axis=0), 0)
    assert alone.penalty_.tolist() == [1e4, 1e4]


def test_cv_leaves_whole_groups_out(spots):
    group = np.where(spots["section"] == "a", "one", "two")
    model = fit(STRankRegressorCV(), spots, group=group)
    assert model.converged_.all()
    with pytest.raises(ValueError, match="a section stands in two groups"):
        fit(STRankRegressorCV(), spots, group=np.arange(120) % 2)
    with pytest.raises(ValueError, match="at least two sections"):
        fit(STRankRegressorCV(), spots, section=np.zeros(120))


class _Sectioned(STRankRegressorCV):
    """Scikit-learn's checks know of no sections, and one has nothing to leave out."""

    def fit(self, X, y, *, section=None, offset=None, group=None):
        if section is None and np.asarray(X).ndim == 2:
            section = np.arange(np.asarray(X).shape[0]) % 3
        return super().fit(X, y, section=section, offset=offset, group=group)


_EXCEPTIONS = {"check_regressor_multioutput": "gives targets below 0; counts are not"}


def _exceptions(estimator):
    more = {"check_fit2d_1sample": "one spot is one section: there is nothing to leave out"}
    return _EXCEPTIONS | (more if isinstance(estimator, STRankRegressorCV) else {})


# Their targets are no counts, and sections are given by our `fit` only.
@pytest.mark.filterwarnings("ignore:y holds", "ignore:score without")
@parametrize_with_checks(
    [*(STRankRegressor(objective=name) for name in ("list", "pair", "nb")), _Sectioned()],
    expected_failed_checks=_exceptions,
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def test_lives_in_scikit_learn(spots):
    model = clone(STRankRegressor(penalty=5.0))
    assert model.get_params()["penalty"] == 5.0
    assert clone(STRankRegressorCV(tolerance=1e-4)).get_params()["tolerance"] == 1e-4
    pipeline = make_pipeline(StandardScaler(), PCA(3), model)
    pipeline.fit(spots["X"], spots["counts"], strankregressor__section=spots["section"])
    assert pipeline.predict(spots["X"]).shape == (120, 2)


def test_sections_and_offsets_are_routed_through_cross_validation(spots):
    """Each fold is fitted and scored with the sections and offsets of its own rows."""
    with config_context(enable_metadata_routing=True):
        request = {"section": True, "offset": True}
        model = STRankRegressor(10.0).set_fit_request(**request).set_score_request(**request)
        params = {name: spots[name] for name in ("section", "offset")}
        routed = make_pipeline(StandardScaler(), model).fit(spots["X"], spots["counts"], **params)
        assert (
            routed[-1].coef_ == fit(model, spots | {"X": routed[0].transform(spots["X"])}).coef_
        ).all()
        # Scikit-learn 1.9's Pipeline.score refuses a step that takes no sample_weight.
        result = cross_validate(
            model,
            spots["X"],
            spots["counts"],
            cv=GroupKFold(3),
            params=params | {"groups": spots["section"]},
            return_indices=True,
        )
    for test, score in zip(result["indices"]["test"], result["test_score"], strict=True):
        train = np.setdiff1d(np.arange(120), test)
        by_hand = fit(STRankRegressor(10.0), {k: v[train] for k, v in spots.items()})
        options = {name: values[test] for name, values in params.items()}
        expected = by_hand.score(spots["X"][test], spots["counts"][test], **options)
        assert score == pytest.approx(expected, rel=1e-4)


def test_data_frames_come_back_as_data_frames(spots):
    names = [f"spot{i}" for i in range(120)]
    X = pd.DataFrame(spots["X"], index=names, columns=["nuclei", "pink", "blue", "edge"])
    counts = pd.DataFrame(spots["counts"], index=names, columns=["ERBB2", "GAPDH"])
    model = fit(STRankRegressor(10.0), spots, X=X, counts=counts)
    plain = fit(STRankRegressor(10.0), spots)
    scores = model.predict(X)
    assert list(scores.index) == names
    assert list(scores.columns) == ["ERBB2", "GAPDH"]
    np.testing.assert_array_equal(scores.to_numpy(), plain.predict(spots["X"]))
    table = model.to_pandas()
    assert table.loc["ERBB2", "edge"] == plain.coef_[0, 3]
    assert table.index.name == "gene"
    alone = fit(STRankRegressor(10.0), spots, X=X, counts=counts["ERBB2"])
    assert alone.predict(X).name == "ERBB2"
    assert alone.to_pandas().index.tolist() == ["ERBB2"]
    with pytest.raises(ValueError, match="feature names"):
        model.predict(X.rename(columns={"pink": "red"}))


def test_one_penalty_for_all_genes_if_asked(spots):
    penalties = [1.0, 100.0, 1e5]
    own = fit(STRankRegressorCV(penalties), spots)
    shared = fit(STRankRegressorCV(penalties, shared=True), spots)
    np.testing.assert_allclose(shared.choice_.held_out, own.choice_.held_out)
    best = shared.choice_.penalties[own.choice_.held_out.sum(1).argmin()]
    assert (shared.penalty_ == best).all()
    assert len(set(own.penalty_)) == 2


def test_a_fold_is_the_fit_of_its_training_sections(spots):
    """Shared moments, minus what is left out, are the moments of what is left."""
    named = _named(spots)
    data = gather(*(named[k] for k in ("X", "y", "section", "offset", "section")))
    design = Design(data)
    for left_out in range(3):
        rows = data.section != left_out
        alone = STRankRegressor().fit(
            data.features[rows], data.counts[rows], section=data.section[rows]
        )
        geometry = design.geometry(left_out)
        np.testing.assert_allclose(geometry.scale, alone.scale_, rtol=1e-10)
        np.testing.assert_allclose(geometry.centre, alone.centre_, rtol=1e-10)


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


def test_score_without_what_fit_had_warns(spots):
    had = {name: spots[name] for name in ("section", "offset")}
    model = fit(STRankRegressor(10.0), spots)
    for absent in ("section and offset", "offset", "section"):
        given = had.keys() - set(absent.split())
        with pytest.warns(UserWarning, match=f"score without the {absent} that fit had"):
            model.score(spots["X"], spots["counts"], **{name: had[name] for name in given})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.score(spots["X"], spots["counts"], **had)
        plain = STRankRegressor(10.0).fit(spots["X"], spots["counts"])
        plain.score(spots["X"], spots["counts"])


@pytest.mark.parametrize("kind", [STRankRegressor, STRankRegressorCV])
def test_cross_validation_without_routing_warns_and_names_the_way(spots, kind):
    folds = {"cv": LeaveOneGroupOut(), "groups": np.arange(120) % 2}
    params = {name: spots[name] for name in ("section", "offset")}
    with pytest.warns(UserWarning, match="fit had.*enable_metadata_routing=True") as told:
        cross_val_score(kind(), spots["X"], spots["counts"], **folds, params=params)
    assert "set_score_request(section=True, offset=True)" in str(told[0].message)


def _on_10k(counts):
    return counts / (counts.sum(1, keepdims=True) + 1) * 1e4


@pytest.mark.parametrize(
    ("form", "told"),
    [
        (lambda y: y > 1, "True and False"),
        (lambda y: sparse.csr_matrix(y > 1), "True and False"),
        (lambda y: pd.DataFrame(y > 1), "True and False"),
        (lambda y: (y > 1).tolist(), "True and False"),
        (lambda y: y.astype(int).astype(str), "text"),
        (lambda y: y.astype(int).astype(str).astype(object), "text"),
        (lambda y: pd.DataFrame(y.astype(int)).astype({0: str}), "text"),
    ],
)
def test_what_only_becomes_numbers_warns(spots, form, told):
    with pytest.warns(UserWarning, match=f"y holds {told}, which is no count"):
        fit(STRankRegressor(), spots, counts=form(np.asarray(spots["counts"])))


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, pd.DataFrame])
@pytest.mark.parametrize(
    "change", [lambda y: np.log1p(_on_10k(y)), _on_10k, lambda y: y + 0.5, lambda y: y / 3]
)
def test_what_is_no_count_warns(spots, change, form):
    odd = form(change(spots["counts"]))
    with pytest.warns(UserWarning, match="which is no count: raw counts are expected"):
        model = fit(STRankRegressor(), spots, counts=odd)
    with pytest.warns(UserWarning, match="which is no count"):
        model.score(spots["X"], odd, section=spots["section"], offset=spots["offset"])


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.astype(np.float32),
        lambda y: y * (1 + 1e-7),
        lambda y: y + 2e-7,
        lambda y: y * 0,
        lambda y: sparse.csr_matrix(y),
    ],
)
def test_whole_numbers_within_rounding_are_counts(spots, change):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(STRankRegressor(), spots, counts=change(spots["counts"]))


@pytest.mark.parametrize("kind", [STRankRegressor, STRankRegressorCV])
@pytest.mark.parametrize("name", ["section", "offset", "group"])
@pytest.mark.parametrize("of", [lambda v: v[:, None], lambda v: pd.DataFrame({"one": v})])
def test_a_column_gets_a_sentence(spots, kind, name, of):
    if name == "group" and kind is STRankRegressor:
        pytest.skip("has no groups")
    message = rf"`{name}` must be \[n_spots\].*got \[120, 1\]; flatten it: np.ravel\({name}\)"
    values = of(spots["section" if name == "group" else name])
    with pytest.raises(ValueError, match=message):
        fit(kind(), spots, **{name: values})
    with pytest.raises(ValueError, match=r"`offset` must be .* got \[120, 2\]$"):
        fit(kind(), spots, offset=np.ones((120, 2)))


@pytest.mark.parametrize("kind", [STRankRegressor, STRankRegressorCV])
@pytest.mark.parametrize("form", [list, tuple, pd.Series, pd.Categorical, pd.array])
def test_sections_and_groups_are_words_in_any_form(spots, kind, form):
    number = np.unique(spots["section"], return_inverse=True)[1]
    expected = fit(kind(), spots, section=number).coef_
    words = spots["section"].tolist()
    assert np.array_equal(fit(kind(), spots, section=form(words)).coef_, expected)
    group = {"group": form(words)} if kind is STRankRegressorCV else {}
    assert np.array_equal(fit(kind(), spots, section=number, **group).coef_, expected)
    for name in ("section", *group):
        for missing in (None, np.nan):
            lacks = form([*words[:7], missing, *words[8:]])
            with pytest.raises(ValueError, match=f"^{name}: missing label in row 7$"):
                fit(kind(), spots, **{"section": number} | {name: lacks})


@pytest.mark.parametrize("depth", [1.0, 30.0, 1e3, 1e6])
def test_library_sizes_without_logarithm_get_a_sentence(spots, depth):
    sizes = np.round(depth * np.linspace(30, 60, 120))
    for kind in (STRankRegressor, STRankRegressorCV):
        with pytest.raises(ValueError, match=r"`offset` is from .* natural logarithm"):
            fit(kind(), spots, offset=sizes)
    fit(STRankRegressor(), spots, offset=np.log(sizes))
    with pytest.raises(ValueError, match="natural logarithm"):
        fit(STRankRegressor(), spots).score(
            spots["X"], spots["counts"], section=spots["section"], offset=sizes
        )


def test_the_scale_ignores_what_differs_between_sections():
    rng = np.random.default_rng(0)
    within = rng.normal(size=(50, 2)) * [1, 3]
    section = np.arange(50) % 5
    shifted = within + 100 * rng.normal(size=(5, 2))[section]
    plain = within - np.stack([within[section == s].mean(0) for s in range(5)])[section]
    model = STRankRegressor().fit(shifted, np.ones(50), section=section)
    np.testing.assert_allclose(model.scale_, plain.std(0))
    constant = STRankRegressor().fit(np.full((4, 1), 0.1), np.ones(4))
    assert constant.scale_.tolist() == [1.0]
    assert constant.solution_.status.tolist() == [Status.NOTHING_VARIES]


def test_all_principal_components_change_nothing_unless_they_are_scaled(spots):
    """A rotation keeps the norm of the weights; scaling what it gives does not."""
    X = spots["X"] / STRankRegressor().fit(**_named(spots)).scale_
    plain = fit(STRankRegressor(10.0, tolerance=1e-9), spots, X=X).predict(X)
    components = PCA().fit_transform(X)
    rotated = STRankRegressor(10.0, tolerance=1e-9, standardize=False)
    np.testing.assert_allclose(
        fit(rotated, spots, X=components).predict(components), plain, atol=1e-6
    )
    assert rotated.scale_.tolist() == [1.0] * 4
    scaled = fit(STRankRegressor(10.0, tolerance=1e-9), spots, X=components).predict(components)
    assert np.abs(scaled - plain).max() > 1e-3


def _named(spots):
    return {"y" if name == "counts" else name: values for name, values in spots.items()}


def test_penalties_for_other_genes_are_refused(spots):
    with pytest.raises(ValueError, match=r"one for each of 2 genes; got shape \(3,\)"):
        fit(STRankRegressor([1.0, 2.0, 3.0]), spots)


def test_many_groups_are_left_out_in_parts(spots):
    section = np.arange(120) // 5
    every = fit(STRankRegressorCV([10.0], max_folds=24), spots, section=section)
    parts = fit(STRankRegressorCV([10.0], max_folds=4), spots, section=section)
    fold = deal(section, 4)
    assert np.bincount(fold).tolist() == [30] * 4
    by_hand = fit(STRankRegressorCV([10.0]), spots, section=section, group=fold)
    np.testing.assert_allclose(parts.choice_.held_out, by_hand.choice_.held_out)
    assert (every.choice_.held_out != parts.choice_.held_out).all()
    with pytest.raises(ValueError, match="max_folds must be at least 2"):
        fit(STRankRegressorCV(max_folds=1), spots)
