"""How large scores are to be for patients not seen: what is left out says so."""

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import minimize_scalar

from strank import STRankRegressor, STRankRegressorCV
from strank.linear.calibration import LEAST, LeftOut, lowest, shrunken, temperature
from strank.metrics.deviance import (
    calibration_slope,
    deviance_explained,
    list_gain,
    slope_information,
)


def simulated(rng, n_patients, shared, *, n_spots=150, n_features=20, n_genes=30):
    """Draw patients whose weights have so much of their variance in common."""
    size = (1 + np.arange(n_features)) ** -0.5
    weights, found = rng.normal(size=(n_features, n_genes)), []
    rates = np.exp(rng.uniform(0, 3, n_genes))
    for _ in range(n_patients):
        own = rng.normal(size=weights.shape)
        features = rng.normal(size=(n_spots, n_features)) * size / np.sqrt((size**2).sum())
        scores = 0.6 * features @ (np.sqrt(shared) * weights + np.sqrt(1 - shared) * own)
        depth = np.exp(rng.normal(0, 0.5, n_spots))
        noise = rng.gamma(4, 1 / 4, scores.shape)
        counts = rng.poisson(rates * depth[:, None] * np.exp(scores) * noise)
        found.append((features, counts, depth))
    return found


def stacked(patients):
    features, counts, depth = (np.concatenate(part) for part in zip(*patients, strict=True))
    patient = np.repeat(np.arange(len(patients)), len(patients[0][2]))
    return features, sparse.csr_matrix(counts), depth, patient


def on_new(patients, scores):
    _, counts, depth, patient = patients
    spots = {"section": patient, "library_size": depth}
    slope = calibration_slope(scores, counts, **spots)
    return np.nanmedian(slope), np.nanmean(deviance_explained(scores, counts, **spots))


@pytest.mark.parametrize("n_train", [2, 3, 6])
@pytest.mark.parametrize("shared", [0.3, 0.6, 1.0])
def test_scores_of_new_patients_have_the_size_that_they_say(n_train, shared):
    found = []
    for seed in range(3):
        drawn = simulated(np.random.default_rng(seed), n_train + 3, shared)
        features, counts, depth, patient = stacked(drawn[:n_train])
        how = {"shared": "mostly"} if n_train == 2 else {}
        model = STRankRegressorCV(**how)
        model.fit(features, counts, section=patient, offset=np.log(depth))
        new = stacked(drawn[n_train:])
        scores = model.predict(new[0])
        plain = STRankRegressor().fit(features, counts, section=patient, offset=np.log(depth))
        ways = scores * model.choice_.temperature, scores, plain.predict(new[0])
        found.append([on_new(new, way) for way in ways])
    (slope, deviance), alone, plain = np.mean(found, axis=0)
    assert 0.8 < slope < 1.25
    assert deviance > 0
    # Two patients say so little of the size that caution costs something.
    assert deviance > alone[1] - (0.005 if n_train > 2 else 0.015)
    if shared < 1:
        assert plain[0] < slope - 0.1
        assert plain[1] < deviance


def test_where_patients_share_nothing_next_to_nothing_is_said():
    deviance, sizes = [], []
    for seed in range(4):
        drawn = simulated(np.random.default_rng(seed), 6, 0.0)
        features, counts, depth, patient = stacked(drawn[:4])
        model = STRankRegressorCV().fit(features, counts, section=patient, offset=np.log(depth))
        new = stacked(drawn[4:])
        scores = model.predict(new[0])
        sizes.append(np.median(model.choice_.temperature))
        deviance.append(
            [on_new(new, way)[1] for way in (scores * model.choice_.temperature, scores)]
        )
    calibrated, alone = np.mean(deviance, axis=0)
    assert calibrated > -0.005
    assert calibrated > alone + 0.003
    assert np.mean(sizes) < 0.5


def test_the_slope_of_what_is_left_out_is_that_of_its_lowest_loss():
    features, counts, depth, patient = stacked(simulated(np.random.default_rng(1), 3, 0.7))
    model = STRankRegressorCV(penalties=[1000.0, 100.0], tolerance=1e-8)
    model.fit(features, counts, section=patient, offset=np.log(depth))
    left_out = model.choice_.left_out
    for group in range(3):
        own = patient == group
        spots = {"section": patient[own], "library_size": depth[own]}
        for number, penalty in enumerate((1000.0, 100.0)):
            # What is left out has no say in the scale either.
            part = STRankRegressor(penalty).fit(
                features[~own], counts[~own], section=patient[~own], offset=np.log(depth[~own])
            )
            scores = part.predict(features[own])
            information = slope_information(scores, counts[own], **spots)
            np.testing.assert_allclose(left_out.information[group, number], information, rtol=0.3)
            for gene in (0, 7, 21):

                def loss(factor, gene=gene, scores=scores, own=own, spots=spots):
                    of_gene = factor * scores[:, [gene]], counts[own][:, [gene]]
                    return -list_gain(*of_gene, **spots)[0, 0]

                best = minimize_scalar(loss, bounds=(-1, 3), method="bounded").x
                assert left_out.slope[group, number, gene] == pytest.approx(best, abs=0.02)


def test_a_group_has_no_say_in_the_candidate_of_its_own_slope():
    """Of two candidates each group likes another one, for which its own slope is 1."""
    loss = np.array([[[0.0], [1.0]], [[1.5], [0.0]]])
    slope = np.array([[[1.0], [0.2]], [[0.2], [1.0]]])
    left_out = LeftOut(loss, slope, np.full_like(loss, 1e9))
    np.testing.assert_allclose(temperature(left_out, lowest), [0.2], atol=1e-6)


def test_by_hand():
    """Two groups, two genes, equal weight: means .6 and .8 of genes, .7 of all.

    Noise of a mean: a quarter of twice the squares of ±.1, thus .01 (and 1/200 of counts); genes
    differ by .01 less that, so not at all; squared errors of .7 are .01 / 2 over genes, and .01
    over groups (.6 and .8), of which two count: .7 - .02 / .7.
    """
    slope, information = np.array([[0.5, 0.7], [0.7, 0.9]]), np.full((2, 2), 100.0)
    np.testing.assert_allclose(shrunken(slope, information), 0.7 - 0.02 / 0.7)


def test_a_gene_that_differs_for_sure_has_a_factor_of_its_own():
    slope = np.tile([0.2, 0.9, 0.9, 0.9], (4, 1)) + 0.01 * np.array([[1], [-1], [1], [-1]])
    found = shrunken(slope, np.full(slope.shape, 1e6))
    np.testing.assert_allclose(found - found[1], [-0.7, 0, 0, 0], atol=0.01)
    sparse_gene = np.full(slope.shape, 1e6)
    sparse_gene[:, 0] = 1e-3
    np.testing.assert_allclose(shrunken(slope, sparse_gene), 0.9, atol=0.02)


@pytest.mark.parametrize("slope", [0.0, -0.5])
def test_of_what_does_not_hold_the_order_stays(slope):
    found = shrunken(np.full((3, 5), slope), np.ones((3, 5)))
    np.testing.assert_array_equal(found, LEAST)
    np.testing.assert_array_equal(shrunken(np.zeros((2, 3)), np.zeros((2, 3))), 1.0)


def test_two_patients_that_share_nothing_are_hardly_believed():
    found = []
    for seed in range(4):
        drawn = simulated(np.random.default_rng(seed), 5, 0.0)
        features, counts, depth, patient = stacked(drawn[:2])
        new = stacked(drawn[2:])
        ways = []
        for shared in ("mostly", False):
            model = STRankRegressorCV(shared=shared)
            model.fit(features, counts, section=patient, offset=np.log(depth))
            scores = model.predict(new[0]) * model.choice_.temperature
            ways.append(on_new(new, scores)[1])
            losses = model.choice_.held_out
            best = (losses + 10 * losses.mean(1, keepdims=True) if shared else losses).argmin(0)
            np.testing.assert_array_equal(model.penalty_, model.choice_.penalties[best])
        found.append(ways)
    alike, alone = np.mean(found, axis=0)
    assert alike > -0.01
    assert alone < alike - 0.002
