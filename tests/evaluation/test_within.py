"""What a section tells by itself: reached where transfer fails, nothing where there is nothing."""

from __future__ import annotations

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse

from strank import cross_validate, evaluate, fit
from strank.cohort.contract import SectionInfo, make_section
from strank.evaluation import methods
from strank.evaluation.methods import WITHIN, _strips, within_section
from strank.metrics import deviance_explained, lift
from strank.metrics.depth import depth_matched_spearman

N, PANEL = 14, pd.Index([f"G{i}" for i in range(8)])


def section(name: str, weights: np.ndarray, rng: np.random.Generator, rate=20.0, noise=0.2):
    """A square of spots; features follow the place in part, so that strips differ in them."""
    y, x = np.mgrid[:N, : N + 1].reshape(2, -1)
    place = np.column_stack([x / N - 0.5, np.sin(x / 2), np.cos(y / 3)])
    features = place + 0.7 * rng.normal(size=place.shape)
    scores = features @ weights
    depth = rng.lognormal(0, 0.4, (len(x), 1))
    rates = (
        rate * depth * np.exp(scores - scores.mean(0)) * rng.gamma(1 / noise, noise, scores.shape)
    )
    adata = make_section(
        sparse.csr_matrix(rng.poisson(rates)),
        spots=pd.DataFrame({"x": 100.0 * x, "y": 100.0 * y}, index=[f"{i}" for i in range(len(x))]),
        genes=PANEL,
        section=name,
        patient=name[0],
        info=SectionInfo("/none", "0" * 64, 1.0, 55.0, 100.0, "Visium", {"reader": "test"}),
    )
    # So much is measured beside the panel that its own signal is not in the depth.
    adata.obs["library_size"] += rng.poisson(1e4 * rate * depth[:, 0])
    adata.obsm["mine"] = features
    return adata, scores - scores.mean(0)


def of(cohort: dict[str, AnnData], summary: pd.DataFrame, score: str, method: str) -> pd.Series:
    rows = summary[summary["method"] == method].set_index("section")
    return rows.loc[list(cohort), score]


def test_a_patient_in_whom_all_is_reversed_is_reached_within_and_not_by_transfer():
    rng = np.random.default_rng(0)
    weights = 0.5 * rng.normal(size=(3, len(PANEL)))
    signs = {"A1": 1, "B1": 1, "C1": 1, "D1": -1}
    cohort = {name: section(name, sign * weights, rng)[0] for name, sign in signs.items()}
    result = cross_validate(cohort, encoder="mine", n_genes=len(PANEL))
    for score in ("depth_matched", "deviance", "slope"):
        transfer = of(cohort, result.summary, score, "linear, list")
        within = of(cohort, result.summary, score, WITHIN)
        assert transfer["D1"] < -0.05
        assert within.min() > 0.15
    slope = of(cohort, result.summary, "slope", WITHIN)
    assert slope.between(0.8, 1.25).all()
    # With other sections of the patient in training nothing is asked of the section alone.
    known = {name: cohort[name] for name in ("A1", "B1")}
    model = fit(known, encoder="mine", n_genes=3)
    told = evaluate(model, {"A1": cohort["A1"]}, train=known).scores["method"]
    assert WITHIN not in set(told)
    told = evaluate(model, {"A1": cohort["A1"], "C1": cohort["C1"]}, train=known).scores
    assert set(told.loc[told["method"] == WITHIN, "section"]) == {"A1", "C1"}


def test_where_there_is_no_signal_nothing_is_found():
    """Features of strips differ, counts ignore them; twenty sections of eight genes."""
    found = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        adata, _ = section("A1", np.zeros((3, len(PANEL))), rng, rate=2.0)
        scores = within_section(adata, PANEL, "mine")
        about = {
            "section": np.zeros(adata.n_obs),
            "library_size": adata.obs["library_size"].to_numpy(),
        }
        measures = (depth_matched_spearman, lift, deviance_explained)
        found.append([f(scores, adata.X, **about)[0] for f in measures])
    means = np.nanmean(found, axis=(0, 2))
    error = np.nanstd(np.nanmean(found, axis=2), axis=0) / np.sqrt(len(found))
    assert np.all(np.abs(means) < 3.5 * error + 0.002)
    assert np.all(error < 0.01)


def test_strips_are_put_on_one_level():
    """With many counts the scores are the truth, between the strips as within them."""
    rng = np.random.default_rng(1)
    weights = 0.5 * rng.normal(size=(3, len(PANEL)))
    adata, truth = section("A1", weights, rng, rate=2000.0, noise=1e-4)
    strip = _strips(adata.obsm["spatial"], np.ones(adata.n_obs, bool))
    means = pd.DataFrame(truth).groupby(strip).mean()
    assert means.std().mean() > 0.1
    np.testing.assert_allclose(within_section(adata, PANEL, "mine"), truth, atol=0.05)


def test_the_counts_of_a_strip_are_not_in_its_own_scores(monkeypatch):
    """But for penalties and sizes, which the other strips choose; here they are given."""
    monkeypatch.setattr(methods, "PENALTIES", (100.0, 100.0))
    monkeypatch.setattr(methods, "temperature", lambda others, choose: 1.0)
    rng = np.random.default_rng(2)
    adata, _ = section("A1", rng.normal(size=(3, len(PANEL))), rng)
    strip = _strips(adata.obsm["spatial"], np.ones(adata.n_obs, bool))
    before = within_section(adata, PANEL, "mine")
    counts = adata.X.toarray()
    counts[strip == 2] = rng.poisson(500, size=counts[strip == 2].shape)
    adata.X = sparse.csr_matrix(counts)
    adata.obs["library_size"] += 6000.0 * (strip == 2)
    after = within_section(adata, PANEL, "mine")
    np.testing.assert_array_equal(after[strip == 2], before[strip == 2])
    assert np.abs(after[strip == 1] - before[strip == 1]).max() > 0.1


def test_strips_by_hand():
    positions = np.array([[0.0, 9], [7, 0], [1, 8], [6, 1], [2, 2], [5, 3], [3, 4], [4, 5]])
    all_of_them = np.ones(8, bool)
    # Across x or y, whichever is longer; in the order of that side.
    assert _strips(positions * [2, 1], all_of_them).tolist() == [0, 3, 0, 3, 1, 2, 1, 2]
    assert _strips(positions, all_of_them).tolist() == [3, 0, 3, 0, 1, 1, 2, 2]
    # Spots without counts are predicted, too, and have no say in where it is cut.
    some = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    assert _strips(positions, some).tolist() == [3, 0, 2, 1, 1, 1, 1, 2]


def test_what_cannot_be_told_is_0(section_of):
    adata = section_of(n_spots=40)
    adata.obs.loc[adata.obs_names[:3], "library_size"] = 0.0
    adata.X = sparse.csr_matrix(np.where(np.arange(40)[:, None] < 3, 0, adata.X.toarray()))
    scores = within_section(adata, pd.Index(["G1", "ABSENT"]), "mine")
    assert np.all(scores[:, 1] == 0)
    assert np.ptp(scores[:3, 0]) > 0
    assert np.all(within_section(adata[:20], pd.Index(["G1"]), "mine") == 0)
    assert np.all(within_section(adata, pd.Index(["ABSENT"]), "mine") == 0)
