"""Deviance explained against the multinomial of scipy, slopes against other optimisers."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax
from scipy.stats import multinomial
from statsmodels.discrete.conditional_models import ConditionalPoisson

from strank.functional.listwise import list_loss
from strank.metrics.deviance import (
    calibration_slope,
    deviance_explained,
    list_gain,
    score_slope,
    slope_error,
)

seeds = given(seed=st.integers(0, 2**31))
quick = settings(deadline=None, max_examples=30)


def some_spots(seed, n_spots=24, n_genes=4):
    """Two sections, with a spot without counts; counts that follow the scores somewhat."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n_spots, n_genes))
    library_size = np.ceil(rng.lognormal(3, 1, size=n_spots))
    library_size[rng.integers(n_spots)] = 0
    rate = library_size[:, None] * np.exp(0.4 * scores) * np.array([0.01, 0.1, 1, 10])
    section = np.resize(["b", "a", "a"], n_spots)
    return scores, rng.poisson(rate), {"section": section, "library_size": library_size}


def one_section(counts, library_size):
    spots = {"section": np.zeros(len(counts)), "library_size": np.asarray(library_size)}
    return np.asarray(counts), spots


def log_likelihood(counts, share):
    return multinomial.logpmf(counts, counts.sum(), share)


@pytest.mark.filterwarnings("error")
@quick
@seeds
def test_gain_and_deviance_are_those_of_the_multinomial(seed):
    scores, counts, spots = some_spots(seed)
    gain = list_gain(scores, counts, **spots)
    explained = deviance_explained(scores, counts, **spots)
    for s, name in enumerate("ab"):
        rows = (spots["section"] == name) & (spots["library_size"] > 0)
        depth = spots["library_size"][rows]
        for g, (r, c) in enumerate(zip(scores[rows].T, counts[rows].T, strict=True)):
            null = log_likelihood(c, depth / depth.sum())
            expected = log_likelihood(c, softmax(np.log(depth) + r)) - null
            np.testing.assert_allclose(gain[s, g], expected, atol=1e-9)
            if c.any():
                full = log_likelihood(c, c / c.sum()) - null
                np.testing.assert_allclose(explained[s, g], expected / full, rtol=1e-7, atol=1e-9)
            else:
                assert np.isnan(explained[s, g])


@quick
@seeds
def test_gain_is_what_the_list_loss_falls_by(seed):
    scores, counts, spots = some_spots(seed)
    section = np.unique(spots["section"], return_inverse=True)[1]
    with np.errstate(divide="ignore"):
        offset = torch.tensor(np.log(spots["library_size"]))

    def loss(r):
        batch = {"section": torch.tensor(section), "offset": offset, "reduction": "none"}
        return list_loss(torch.tensor(r), torch.tensor(counts).double(), **batch).numpy()

    fall = loss(np.zeros_like(scores)) - loss(scores)
    expected = [fall[section == s].sum(0) for s in (0, 1)]
    np.testing.assert_allclose(list_gain(scores, counts, **spots), expected, atol=1e-9)


@quick
@seeds
def test_shares_as_observed_explain_everything_and_nothing_explains_more(seed):
    scores, counts, spots = some_spots(seed)
    counts += spots["library_size"][:, None] > 0
    observed = np.log(np.maximum(counts, 1) / np.maximum(spots["library_size"], 1)[:, None])
    np.testing.assert_allclose(deviance_explained(observed, counts, **spots), 1)
    assert (deviance_explained(scores, counts, **spots) < 1).all()
    nothing = deviance_explained(np.full_like(scores, 0.1), counts, **spots)
    np.testing.assert_allclose(nothing, 0, atol=1e-12)


def test_nothing_to_explain_is_undefined():
    depth = np.round(np.random.default_rng(0).lognormal(8, 1, size=187))
    as_expected = depth * 1000
    counts, spots = one_section(np.stack([as_expected, 0 * depth], axis=1), depth)
    scores = np.random.default_rng(1).normal(size=counts.shape)
    assert np.isnan(deviance_explained(scores, counts, **spots)).all()
    counts, spots = one_section([[5]], [9])
    assert np.isnan(deviance_explained(np.ones((1, 1)), counts, **spots))
    assert list_gain(np.ones((1, 1)), counts, **spots) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.filterwarnings("error")
def test_scores_of_any_size_keep_their_digits(dtype):
    counts, spots = one_section([[1], [3]], [100, 100])
    for size in (1e-4, 1.0, 1e4):
        scores = np.array([[size], [-size]], dtype=dtype)
        # Of four counts, one lies where the scores say, three are 2 x size below.
        difference = 2 * scores[0, 0].astype(np.float64)
        expected = 4 * np.log(2) - 4 * np.logaddexp(0, -difference) - 3 * difference
        np.testing.assert_allclose(list_gain(scores, counts, **spots), expected, rtol=1e-9)
    scores = np.array([[1e8 + 1], [1e8 + 0.5]])
    expected = list_gain(scores - 1e8, counts, **spots)
    np.testing.assert_allclose(list_gain(scores, counts, **spots), expected, rtol=1e-12)


@quick
@seeds
def test_slope_is_a_factor_of_each_genes_scores(seed):
    scores, counts, spots = some_spots(seed)
    slope = np.array([-1.0, 0.0, 0.5, 3.0])
    for score in (deviance_explained, list_gain, calibration_slope):
        got = score(scores, counts, slope=slope, **spots)
        np.testing.assert_allclose(got, score(scores * slope, counts, **spots), atol=1e-9)


def wild_scores(kind, n, rng):
    """Scores of a distribution on which plain Newton steps run to and fro, or that is awkward."""
    scores = {
        "normal": rng.normal(size=n),
        "one far away": np.append(rng.normal(size=n - 1) * 0.01, rng.choice([-5, 5])),
        "heavy tails": rng.standard_t(1.2, size=n),
        "two values": np.append(rng.random(n - 2) < 0.03, [0, 1]).astype(float),
        "exponential": np.exp(2 * rng.normal(size=n)),
        "large": 1e6 + 1e4 * rng.normal(size=n),
    }
    return scores[kind]


@pytest.mark.parametrize(
    "kind", ["normal", "one far away", "heavy tails", "two values", "exponential", "large"]
)
@pytest.mark.filterwarnings("error")
def test_slope_has_the_highest_likelihood(kind):
    """No worse than scipy's bounded search, whose bounds are the 15 standard deviations."""
    rng = np.random.default_rng(1)
    n, totals = 90, np.tile([1, 3, 30, 3000, 300_000], 8)
    scores = np.stack([wild_scores(kind, n, rng) for _ in totals], axis=1)
    unit = (scores - scores.mean(0)) / scores.std(0)
    depth = np.ceil(rng.lognormal(8, 1, size=n))
    share = softmax(np.log(depth)[:, None] + rng.normal(size=len(totals)) * unit.clip(-9, 9), 0)
    counts = rng.multinomial(totals, share.T).T
    _, spots = one_section(counts, depth)
    found = score_slope(scores, counts, **spots) * scores.std(0)
    assert (np.abs(found) <= 15 + 1e-9).all()
    for b, r, c in zip(found, unit.T, counts.T, strict=True):

        def loss(slope, r=r, c=c):
            return c.sum() * logsumexp(slope * r + np.log(depth)) - slope * (c * r).sum()

        best = minimize_scalar(loss, bounds=(-15, 15), options={"xatol": 1e-10}).fun
        assert loss(b) <= min(best, loss(-15), loss(15)) + 1e-7 * c.sum()


def test_calibration_is_the_slope_of_each_section_alone():
    scores, counts, spots = some_spots(5, n_spots=60)
    found = calibration_slope(scores, counts, **spots)
    for values, name in zip(found, np.unique(spots["section"]), strict=True):
        rows = spots["section"] == name
        alone = score_slope(scores[rows], counts[rows], **{k: v[rows] for k, v in spots.items()})
        known = np.isfinite(values)
        np.testing.assert_allclose(values[known], alone[known])
        assert known[2:].all()
    # What is twice as strong has half the slope; the best slope has slope 1.
    stronger, known = calibration_slope(2 * scores, counts, **spots), np.isfinite(found)
    np.testing.assert_allclose(stronger[known], found[known] / 2)
    section = {**spots, "section": np.zeros(len(counts))}
    best = score_slope(scores, counts, **section)
    slopes = calibration_slope(scores, counts, slope=best, **section)[0, 2:]
    np.testing.assert_allclose(slopes, 1, atol=1e-6)


def test_calibration_is_undefined_where_nothing_tells_a_slope():
    scores = np.arange(3.0)[:, None] * [1, 0, 1, 1, 0.5, 0.49]
    counts = np.array([[1, 1, 0, 0, 9, 9], [2, 2, 0, 0, 6, 6], [5, 3, 0, 9, 9, 9]])
    _, spots = one_section(counts, [10, 10, 10])
    # Of no spread; without counts; with all counts in the highest spot. Of 24 counts and scores of
    # variance 1/6 the standard error is 1/2, of less spread it is more.
    found = calibration_slope(scores, counts, **spots)[0]
    assert np.isnan(found).tolist() == [0, 1, 1, 1, 0, 1]


@pytest.mark.filterwarnings("ignore:.*divide by zero", "ignore:.*groups were dropped")
def test_slope_over_sections_is_that_of_conditional_poisson_regression():
    scores, counts, spots = some_spots(5, n_spots=60)
    seen = spots["library_size"] > 0
    got = score_slope(scores, counts, **spots)
    for g in range(1, 4):
        fit = ConditionalPoisson(
            counts[seen, g],
            scores[seen, g : g + 1],
            groups=spots["section"][seen],
            offset=np.log(spots["library_size"][seen]),
        ).fit()
        np.testing.assert_allclose(got[g], fit.params[0], rtol=1e-3, atol=1e-4)


def test_its_error_is_the_sandwich_of_statsmodels():
    scores, counts, spots = some_spots(5, n_spots=60)
    spots = {"section": np.zeros(60), "library_size": np.maximum(spots["library_size"], 1)}
    slope = calibration_slope(scores, counts, **spots)
    got = slope_error(slope, scores, counts, **spots)
    for g in np.flatnonzero(np.isfinite(slope[0])):
        design, family = sm.add_constant(scores[:, g]), sm.families.Poisson()
        fit = sm.GLM(counts[:, g], design, family, offset=np.log(spots["library_size"]))
        robust = fit.fit(cov_type="HC0")
        assert got[0, g] == pytest.approx(robust.bse[1], rel=1e-4)
    assert np.isfinite(got).sum() >= 2
    np.testing.assert_array_equal(np.isnan(got), np.isnan(slope))


def test_intervals_of_slopes_hold_for_counts_that_vary_more_than_poisson():
    rng, held = np.random.default_rng(0), []
    for _ in range(20):
        scores, depth = rng.normal(size=(300, 20)) * 0.5, rng.lognormal(0, 0.4, 300)
        noise = rng.gamma(2, 0.5, scores.shape)
        counts = rng.poisson(5 * depth[:, None] * np.exp(0.7 * scores) * noise)
        spots = {"section": np.zeros(300), "library_size": depth}
        slope = calibration_slope(scores, counts, **spots)
        held.append(np.abs(slope - 0.7) < 1.96 * slope_error(slope, scores, counts, **spots))
    assert 0.9 < np.mean(held) < 0.97


@quick
@seeds
def test_slope_turns_with_the_scores(seed):
    scores, counts, spots = some_spots(seed)
    counts[1:4] += 1
    level = np.where(spots["section"] == "a", 100.0, -7.0)[:, None]
    slope = score_slope(scores, counts, **spots)
    for factor in (-1, 1e-3, 1e4):
        got = score_slope(level + factor * scores, counts, **spots)
        np.testing.assert_allclose(got * factor, slope, rtol=1e-5, atol=1e-6)
    rescaled = list_gain(scores, counts, slope=slope, **spots).sum(0)
    assert (rescaled >= list_gain(scores, counts, **spots).sum(0) - 1e-9).all()
    assert (rescaled >= -1e-9).all()


@pytest.mark.filterwarnings("error")
def test_slope_is_zero_where_there_is_nothing_to_fit():
    n = 187
    section = np.repeat([0, 1], [100, 87])
    scores = np.stack([np.full(n, 0.1), section * 0.7 + 0.1, np.arange(n) / n], axis=1)
    counts = np.ones((n, 3)) * [3, 3, 0]
    got = score_slope(scores, counts, section=section, library_size=np.full(n, 1234.5))
    np.testing.assert_array_equal(got, 0)


@pytest.mark.filterwarnings("error")
def test_slope_is_bounded_where_all_counts_lie_in_the_highest_spot():
    counts, spots = one_section([[0], [0], [8], [0]], [10, 20, 10, 5])
    scores = np.array([[0.0], [1.0], [1.01], [-1.0]])
    for turned, sign in ((scores, 1), (-scores, -1)):
        slope = score_slope(turned, counts, **spots) * scores.std()
        np.testing.assert_allclose(slope, 15 * sign)
