"""How wrong scores may be: against other libraries, what was simulated, and on new patients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from anndata import AnnData
from safetensors.torch import save_file
from scipy import sparse
from scipy.special import logsumexp

from strank.cohort.training_set import TrainingData
from strank.errors import InputError
from strank.evaluation.fold_change import contrast
from strank.files import read_json, sha256, write_json
from strank.fitting.exact import ExactOptions, solve_list
from strank.fitting.method import fit
from strank.io.exports import check_geojson_size, write_geojson
from strank.model.rank_model import RankModel
from strank.model.uncertainty import Fitted, Uncertainty, change_interval, fit_uncertainty
from strank.pl.layers import map_layers
from strank.report.maps import draw_maps

N_SPOTS, N_FEATURES, N_GENES = 200, 12, 30


def simulated(seed, n_patients, shared, *, strength=0.6, n_genes=N_GENES, noise=0.2):
    """Patients whose weights have so much of their variance in common; of each, its own scores."""
    rng = np.random.default_rng(seed)
    size = (1 + np.arange(N_FEATURES)) ** -0.5
    size /= np.sqrt((size**2).sum())
    common, rates = rng.normal(size=(N_FEATURES, n_genes)), np.exp(rng.uniform(0, 3, n_genes))
    parts = []
    for _ in range(n_patients):
        own = rng.normal(size=common.shape)
        features = rng.normal(size=(N_SPOTS, N_FEATURES)) * size
        scores = strength * features @ (np.sqrt(shared) * common + np.sqrt(1 - shared) * own)
        depth = np.exp(rng.normal(0, 0.4, N_SPOTS))
        extra = rng.gamma(1 / noise, noise, scores.shape) if noise else 1.0
        counts = rng.poisson(rates * depth[:, None] * np.exp(scores) * extra)
        parts.append((features, counts, depth, scores))
    return parts


def training(parts):
    features, counts, depth, _ = (np.concatenate(part) for part in zip(*parts, strict=True))
    patient = np.repeat([f"P{number}" for number in range(len(parts))], N_SPOTS)
    counts = sparse.csr_matrix(counts, dtype=np.float64)
    return TrainingData(features, counts, depth, patient, np.zeros((len(depth), 2)), patient)


def fitted(data, penalty=None):
    solved = solve_list(data, ExactOptions(penalty))
    penalty = np.broadcast_to(solved.table["penalty"], data.counts.shape[1])
    return Fitted(solved.weight / solved.scale[:, None], solved.scale, penalty, solved.refit)


def variance_of(difference, unsure, which):
    """Variance of the difference of scores that a difference of features makes."""
    values = getattr(unsure, which).numpy()
    return (unsure.along(difference[None])[0] ** 2) @ values


def test_what_counts_leave_open_is_what_statsmodels_says():
    data = training(simulated(0, 2, 1.0, noise=0))
    data = replace(data, group=np.full(len(data.group), "P"))
    unsure = fit_uncertainty(data, fitted(data, penalty=1e-6))
    assert unsure.between.isnan().all()
    level = pd.get_dummies(data.section).to_numpy(float)
    design = np.column_stack([data.features, level])
    for gene in (0, 7, 20):
        counts = data.counts[:, gene].toarray().ravel()
        family = sm.families.Poisson()
        theirs = sm.GLM(counts, design, family=family, offset=np.log(data.library_size)).fit()
        covariance = theirs.cov_params()[:N_FEATURES, :N_FEATURES]
        for difference in (np.eye(N_FEATURES)[0], np.ones(N_FEATURES), data.features[3]):
            wanted = difference @ covariance @ difference
            got = variance_of(difference, unsure, "within")[gene]
            # The dispersion is 1 here, or a little more by chance.
            assert 0.8 < got / wanted < 1.4


def test_counts_that_vary_more_than_poisson_leave_more_open():
    found = []
    for noise in (0.0, 0.5):
        data = training(simulated(0, 1, 1.0, noise=noise, strength=0.1))
        found.append(fit_uncertainty(data, fitted(data, penalty=30.0)).within.mean(0).numpy())
        total = data.gene_counts
    assert (found[1] > found[0])[total > 500].mean() > 0.9


def test_a_large_penalty_leaves_weights_no_room():
    data = training(simulated(0, 1, 1.0, noise=0, strength=0.05))
    within = fit_uncertainty(data, fitted(data, penalty=1e7)).within
    # Of about 1 is the variance of a standardised feature, and the penalty's that of a weight.
    assert within.mean() == pytest.approx(1e-7, rel=0.3)


@pytest.mark.parametrize("strength", [0.3, 0.9])
def test_what_differs_between_patients_is_found_in_size_and_direction(strength):
    found = {0: [], N_FEATURES - 1: []}
    for seed in range(4):
        data = training(simulated(seed, 4, 0.0, strength=strength))
        zero = np.zeros((N_FEATURES, N_GENES))
        given = Fitted(zero, data.features.std(0), np.full(N_GENES, 1e6), lambda _, w=zero: w)
        unsure = fit_uncertainty(data, given)
        for feature, ratios in found.items():
            # By a unit of a feature, scores differ by weights of variance strength².
            step = np.eye(N_FEATURES)[feature]
            ratios.append(variance_of(step, unsure, "between").mean() / strength**2)
    assert all(0.7 < np.mean(ratios) < 1.5 for ratios in found.values())


def test_patients_that_agree_differ_by_little():
    data = training(simulated(0, 5, 1.0))
    unsure = fit_uncertainty(data, fitted(data))
    apart = training(simulated(0, 5, 0.0))
    assert unsure.between.mean() < 0.15 * fit_uncertainty(apart, fitted(apart)).between.mean()


def coverage(n_train, shared, seed):
    """Share of genes and regions of new patients whose true change is in the 90 % interval."""
    parts = simulated(seed, n_train + 2, shared)
    data = training(parts[:n_train])
    of_fit = fitted(data)
    unsure, held = fit_uncertainty(data, of_fit), {"all": [], "within": []}
    variances = {"all": unsure.variance, "within": unsure.within.T.numpy()}
    for features, _, _, truth in parts[n_train:]:
        scores, places = features @ of_fit.weight, unsure.along(features - features.mean(0))
        for region in (features[:, 0] > 0, features[:, 3] > 0, places[:, 1] > 0):
            regions = region, ~region
            off = change(truth, regions) - change(scores, regions)
            for name, variance in variances.items():
                _, low, high = change_interval(scores, places, variance, regions, seed=0)
                held[name].append((low <= off) & (off <= high))
    return {name: np.mean(values) for name, values in held.items()}


def change(scores, regions):
    inside, outside = (logsumexp(scores[r], axis=0) - np.log(r.sum()) for r in regions)
    return inside - outside


@pytest.mark.parametrize(("n_train", "shared"), [(2, 0.0), (2, 1.0), (3, 0.4), (6, 0.0), (6, 1.0)])
def test_intervals_of_changes_hold_on_new_patients(n_train, shared):
    runs = pd.DataFrame([coverage(n_train, shared, seed) for seed in range(2)]).mean()
    assert 0.8 < runs["all"] < 0.98
    # What the counts leave open is only part of it.
    assert runs["within"] < runs["all"] - (0.2 if shared < 1 else 0)


def test_what_lies_along_no_axis_counts_too():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(150, 10)) * 0.5 / 150**0.5
    parts = []
    for _ in range(4):
        features, depth = rng.normal(size=(120, 150)), rng.lognormal(0, 0.3, 120)
        own = rng.normal(size=weights.shape) * 0.5 / 150**0.5
        scores = features @ (weights + own)
        parts.append((features, rng.poisson(3 * depth[:, None] * np.exp(scores)), depth, scores))
    group = np.repeat(["A", "B", "C"], 120)
    features, counts, depth, _ = (np.concatenate(v) for v in zip(*parts[:3], strict=True))
    counts = sparse.csr_matrix(counts, dtype=float)
    data = TrainingData(features, counts, depth, group, np.zeros((360, 2)), group)
    of_fit = fitted(data)
    unsure, (new, _, _, truth) = fit_uncertainty(data, of_fit), parts[3]
    # 30 axes, for 120 spots a patient, have a fifth of what varies.
    assert unsure.axes.shape == (150, 30)
    places = unsure.within_sections(new, np.zeros(120))
    se = np.sqrt(places**2 @ unsure.variance.T)
    off = new @ of_fit.weight - truth
    held = np.abs(off - off.mean(0)) < 1.645 * se
    assert 0.8 < held.mean() < 0.98
    alone = np.sqrt(places[:, :-1] ** 2 @ unsure.variance[:, :-1].T)
    assert (np.abs(off - off.mean(0)) < 1.645 * alone).mean() < 0.7


def test_features_that_do_not_vary_tell_nothing():
    data = training(simulated(0, 3, 0.5))
    data = replace(data, features=np.ones_like(data.features))
    unsure = fit_uncertainty(data, fitted(data, penalty=100.0))
    assert np.isfinite(unsure.variance).all()
    assert (unsure.within_sections(data.features, data.section) == 0).all()


def test_units_and_sections_that_are_deeper_change_nothing():
    data = training(simulated(3, 3, 0.5))
    unit = np.linspace(0.5, 20, N_FEATURES)
    other = replace(data, features=data.features * unit + 3.0, library_size=data.library_size * 7.0)
    one, two = (fit_uncertainty(each, fitted(each, penalty=100.0)) for each in (data, other))
    places = data.features[:5]
    for which in ("within", "between"):
        values = [
            unsure.along(features) ** 2 @ getattr(unsure, which).numpy()
            for unsure, features in ((one, places), (two, places * unit))
        ]
        np.testing.assert_allclose(*values, rtol=2e-3)


def test_a_model_keeps_it_and_predictions_carry_it(cohort, tmp_path):
    model = fit(cohort, encoder="mine", n_genes=3)
    unsure = model.uncertainty
    assert isinstance(unsure, Uncertainty)
    assert "each left out" in model.provenance["uncertainty"]
    model.save(tmp_path / "model")
    again = RankModel.load(tmp_path / "model")
    one = next(iter(cohort.values()))
    predicted = again.predict(one)
    places = predicted.obsm["score_axes"]
    np.testing.assert_allclose(places[:, :-1].mean(0), 0, atol=1e-5)
    by_hand = np.sqrt((places[0] ** 2 * predicted.varm["score_variance"][1]).sum())
    assert predicted.layers["se"][0, 1] == pytest.approx(by_hand, rel=1e-5)
    np.testing.assert_array_equal(predicted.layers["se"], model.predict(one).layers["se"])
    assert "Standard errors tell" in again.card()


@pytest.mark.parametrize(
    ("aim", "patients", "told"),
    [
        ("new-patients", "AAA", "within-patient uncertainty only"),
        ("known-patients", "AAA", "differs between 3 sections"),
        ("new-patients", "ABB", "differs between 2 patients"),
        ("new-patients", "A", "within-section uncertainty only"),
    ],
)
def test_it_says_what_it_covers(cohort, aim, patients, told):
    few = {name: cohort[name] for name, _ in zip(cohort, patients, strict=False)}
    for patient, section in zip(patients, few.values(), strict=True):
        section.obs["patient"] = patient
    model = fit(few, encoder="mine", n_genes=3, aim=aim)
    assert told in model.provenance["uncertainty"]
    assert model.uncertainty.between.isnan().all() == (len(few) == 1)
    assert np.isfinite(model.predict(next(iter(few.values()))).layers["se"]).all()


def test_genes_without_counts_have_what_others_have():
    data = training(simulated(0, 3, 0.5))
    counts = data.counts.toarray()
    counts[:, 0] = 0
    counts[data.group == "P1", 1] = 0
    data = replace(data, counts=sparse.csr_matrix(counts))
    unsure = fit_uncertainty(data, fitted(data, penalty=100.0))
    assert np.isfinite(unsure.variance).all()
    ratio = unsure.between[:, 0] / unsure.between[:, 2:].mean(1)
    assert (ratio > 0.3).all()
    assert (ratio < 3).all()


def test_other_fits_do_not_claim_to_know(cohort):
    for loss in ("pair", "mse"):
        model = fit(cohort, encoder="mine", n_genes=3, loss=loss)
        assert model.uncertainty is None
        assert "uncertainty" not in model.provenance
        assert "se" not in model.predict(next(iter(cohort.values()))).layers


def test_a_damaged_file_is_refused(cohort, tmp_path):
    model = fit(cohort, encoder="mine", n_genes=3)
    model.save(tmp_path / "model")
    path, facts = tmp_path / "model" / "uncertainty.safetensors", tmp_path / "model" / "model.json"
    for broken in (
        replace(model.uncertainty, within=-model.uncertainty.within),
        replace(model.uncertainty, axes=model.uncertainty.axes[1:]),
        replace(model.uncertainty, between=model.uncertainty.between[:, :1]),
    ):
        save_file({k: v.contiguous() for k, v in vars(broken).items()}, path)
        stored = read_json(facts)
        stored["uncertainty"]["sha256"] = sha256(path)
        write_json(facts, stored)
        with pytest.raises(InputError, match=r"uncertainty.safetensors: not of this encoder"):
            RankModel.load(tmp_path / "model")


@pytest.fixture
def unsure_tiles():
    """Tiles of two regions whose places differ along the first of two axes, by 1."""
    n = 200
    left = np.arange(n) < n // 2
    places = np.zeros((n, 2), np.float32)
    places[:, 0] = np.where(left, 0.5, -0.5)
    x = np.where(left, 0, 4000) + np.tile(np.linspace(0, 3000, n // 2), 2)
    variance = np.array([[0.09, 4.0], [0.0, 0.0]], np.float32)
    return AnnData(
        np.column_stack([np.where(left, 0.4, -0.4), np.where(left, 0.1, -0.1)]),
        var=pd.DataFrame(index=["ERBB2", "VWF"]),
        obs=pd.DataFrame({"region": np.where(left, "a", "b")}, index=map(str, range(n))),
        obsm={"spatial": np.column_stack([x, x]), "score_axes": places},
        varm={"score_variance": variance},
        layers={"se": np.sqrt(places**2 @ variance.T)},
        uns={
            "strank": {"um_per_pixel": 1.0, "stride_um": 30.0},
            "strank_model": '{"uncertainty": "within-patient uncertainty only: counts"}',
        },
    )


def test_contrasts_carry_intervals_of_the_model(unsure_tiles):
    found = contrast(unsure_tiles, "region")
    table = found.table.set_index("gene")
    # By hand: places differ by 1, so that the variance of the change is 0.09, and normal.
    assert table.loc["ERBB2", "se"] == pytest.approx(0.3, rel=0.1)
    ends = table.loc["ERBB2", ["model_low", "model_high"]].to_numpy(float)
    np.testing.assert_allclose(ends - 0.8, [-1.645 * 0.3, 1.645 * 0.3], atol=0.08)
    assert table.loc["VWF", ["se", "model_low"]].tolist() == pytest.approx([0.0, 0.2])
    told = found.facts["caveats"][0]
    assert "model_high does (90 %): within-patient uncertainty only" in told
    del unsure_tiles.obsm["score_axes"]
    assert "se" not in contrast(unsure_tiles, "region").table


def test_maps_and_geojson_show_it(unsure_tiles, tmp_path):
    layer = map_layers(unsure_tiles)[-1]
    assert layer.title == "standard error"
    assert layer.label.endswith("; within-patient uncertainty only")
    image = np.zeros((300, 300, 3), np.uint8)
    figure = draw_maps(image, 30.0, 1.0, map_layers(unsure_tiles), "ERBB2")
    marks = figure.axes[2].collections[0]
    assert marks.get_clim()[0] == 0
    np.testing.assert_allclose(marks.get_array(), 0.15, rtol=1e-5)
    write_geojson(unsure_tiles, tmp_path / "tiles.geojson", genes=["ERBB2"])
    first = read_json(tmp_path / "tiles.geojson")["features"][0]["properties"]["measurements"]
    assert first == {"ERBB2": 0.4, "ERBB2 se": 0.15}
    with pytest.raises(InputError, match=r"300,000 tiles may have 5 genes"):
        check_geojson_size(300_000, 100, errors=True)


def test_of_many_spots_some_do():
    """Places of two large regions are alike but for a step: as of all spots, so of some."""
    rng, n = np.random.default_rng(0), 10_000
    inside, places = np.arange(n) < n // 2, rng.normal(size=(n, 4)).astype(np.float32)
    places[:, 3] = 0
    places[inside, 0] += 0.5
    variance = np.tile(np.array([0.04, 0.01, 0.01, 1.0], np.float32), (40, 1))
    scores = np.zeros((n, 40))
    se, low, high = change_interval(scores, places, variance, (inside, ~inside), seed=0)
    # By hand: the step by its weight; the rest of the means differs by chance only.
    assert se.mean() == pytest.approx(0.5 * 0.2, rel=0.04)
    assert (high - low).mean() == pytest.approx(2 * 1.645 * 0.1, rel=0.05)
