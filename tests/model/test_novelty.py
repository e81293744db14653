"""Features that lie far from the training's: rates without a difference, and what must be seen."""

from __future__ import annotations

import cv2
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.covariance import LedoitWolf

from strank.encoders.morphology.encoder import Morphology
from strank.model.novelty import fit_novelty, novelty_of, warning_of
from strank.simulate.cohort import simulate_cohort
from strank.simulate.tissue import TissueDesign

N_PATIENTS, N_SPOTS = 6, 200


def correlated(rng, n_spots, n_features=20, shift=0.3):
    """Spots of a patient: common correlations, and a patient's own shift."""
    mixing = np.random.default_rng(5).normal(size=(n_features, n_features))
    values = rng.normal(size=(n_spots, n_features)) + shift * rng.normal(size=n_features)
    return values @ mixing


def patients(seed, n_features=20, shift=0.3):
    rng = np.random.default_rng(seed)
    drawn = [correlated(rng, N_SPOTS, n_features, shift) for _ in range(N_PATIENTS + 1)]
    group = np.repeat(np.arange(N_PATIENTS), N_SPOTS)
    return np.concatenate(drawn[:-1]), group, drawn[-1]


@pytest.mark.parametrize("n_features", [3, 20, 400])
def test_one_percent_of_new_patients_like_those_lies_beyond(n_features):
    beyond = []
    for seed in range(5):
        features, group, new = patients(seed, n_features, shift=0.0)
        beyond.append(np.mean(novelty_of(new, fit_novelty(features, group)) > 1))
    assert 0.002 < np.mean(beyond) < 0.03


def test_shifts_between_patients_are_allowed_for():
    warned = []
    for seed in range(10):
        features, group, new = patients(seed)
        usual = fit_novelty(features, group)
        warned.append(warning_of(novelty_of(new, usual)))
        assert warning_of(novelty_of(new + 5 * features.std(0), usual)).startswith("100 % of")
    assert sum(text is not None for text in warned) <= 1


def test_distances_are_those_of_scikit_learn_and_the_threshold_is_that_of_chi():
    features, group, new = patients(0, shift=0.0)
    mean, scale = features.mean(0), features.std(0)
    estimate = LedoitWolf().fit((features - mean) / scale)
    theirs = np.sqrt(estimate.mahalanobis((new - mean) / scale))
    ratio = theirs / novelty_of(new, fit_novelty(features, group))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-3)
    assert ratio[0] == pytest.approx(stats.chi(20).ppf(0.99), rel=0.1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.floats(1e-2, 1e3), st.floats(-50, 50))
def test_units_and_the_order_of_spots_do_not_enter(seed, unit, zero):
    features, group, new = patients(seed)
    expected = novelty_of(new, fit_novelty(features, group))
    order = np.random.default_rng(seed).permutation(len(features))
    other = fit_novelty((features * unit + zero)[order], group[order])
    np.testing.assert_allclose(novelty_of(new * unit + zero, other), expected, rtol=0.02)


def test_one_odd_patient_in_training_does_not_blind():
    features, group, new = patients(1)
    features[group == 0] += 8 * features.std(0)
    distances = novelty_of(np.vstack([new, new - 8 * new.std(0)]), fit_novelty(features, group))
    assert np.mean(distances[:N_SPOTS] > 1) < 0.1
    assert warning_of(distances[N_SPOTS:]) is not None


@pytest.mark.parametrize("group", [["A"] * 40, ["A", "B"] * 20, np.arange(40)])
def test_few_groups_many_groups_and_constant_features(group):
    features = np.random.default_rng(0).normal(size=(40, 5))
    features[:, 2] = 7.0
    usual = fit_novelty(features, group)
    assert np.median(novelty_of(features, usual)) < 1
    changed = features.copy()
    changed[:, 2] = 9.0
    assert novelty_of(changed, usual).min() > 1
    nothing = fit_novelty(np.ones((40, 5)), group)
    assert np.isfinite(novelty_of(features, nothing)).all()


def test_wide_features_and_many_spots_are_bounded():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(12_000, 8)) @ rng.normal(size=(8, 500))
    features += 0.1 * rng.normal(size=features.shape)
    usual = fit_novelty(features, np.arange(12_000) // 1_000)
    assert usual.whitening.shape == (500, 384)
    assert np.mean(novelty_of(features, usual) > 1) < 0.03
    assert novelty_of(features[:1] * 5, usual) > 1


def test_the_warning_says_how_many_and_why():
    assert warning_of(np.repeat([0.5, 2.0], [76, 24])) is None
    text = warning_of(np.repeat([0.5, 2.0], [37, 63]))
    assert text.startswith("63 % of the tiles look unlike anything in training (expected 1 %); do")
    assert "µm per pixel" in text


# What a user may do wrong, to patches of 224 px.
WRONG = {
    "inverted": lambda patch: 255 - patch,
    "blurred": lambda patch: cv2.GaussianBlur(patch, (0, 0), 5),
    "other stain": lambda patch: patch[..., ::-1],
    "half the scale": lambda patch: cv2.resize(patch[56:168, 56:168], (224, 224)),
}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Patches of five simulated patients, ``[patient][field]``."""
    folder = tmp_path_factory.mktemp("sim") / "st"
    names = simulate_cohort(
        folder, n_patients=5, n_sections=1, n_genes=21, seed=1, tissue=TissueDesign(side_um=2200)
    )
    patches = []
    for name in names:
        image = cv2.imread(str(folder / "images" / f"{name}.jpg"))[..., ::-1]
        spots = pd.read_csv(folder / "spots" / f"{name}_selection.tsv", sep="\t")
        patches.append((image, spots[["pixel_x", "pixel_y"]].to_numpy()))
    return patches


def cut(image, centres, um):
    half = round(um / TissueDesign().um_per_pixel / 2)
    padded = np.pad(image, ((half, half), (half, half), (0, 0)), constant_values=255)
    windows = [padded[y : y + 2 * half, x : x + 2 * half] for x, y in centres.round().astype(int)]
    return np.stack([cv2.resize(w, (224, 224), interpolation=cv2.INTER_AREA) for w in windows])


@pytest.mark.slow
def test_wrong_images_warn_and_a_new_patient_does_not(simulated):
    encoder = Morphology()
    patches = [[cut(image, xy, f.um) for f in encoder.fields] for image, xy in simulated]
    features = [encoder.encode(fields) for fields in patches]
    group = np.repeat(np.arange(4), [len(part) for part in features[:4]])
    usual = fit_novelty(np.concatenate(features[:4]), group)
    assert warning_of(novelty_of(features[4], usual)) is None
    for name, change in WRONG.items():
        wrong = [np.stack([change(patch) for patch in field[:20]]) for field in patches[4]]
        assert warning_of(novelty_of(encoder.encode(wrong), usual)) is not None, name
