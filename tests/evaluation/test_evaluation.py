from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from strank import cross_validate, evaluate, fit
from strank.cohort.training_set import training_data
from strank.errors import InputError
from strank.evaluation.scores import score_section, summarise
from strank.fitting.exact import ExactOptions, solve_ridge
from strank.metrics.deviance import deviance_explained, score_slope

METHODS = {"linear, list", "ridge", "centred ridge", "within section"}
METHODS |= {"library size", "shuffled"}


def log1p_cp10k(adata):
    return np.log1p(adata.X.toarray() / adata.obs["library_size"].to_numpy()[:, None] * 1e4)


def test_scores_agree_with_scipy_gene_by_gene(cohort):
    train = {n: cohort[n] for n in ("A1", "A2", "B1")}
    model = fit(train, encoder="mine", n_genes=5)
    result = evaluate(model, {"C1": cohort["C1"]}, train=train)
    predicted = model.predict(cohort["C1"])
    target = pd.DataFrame(log1p_cp10k(cohort["C1"]), columns=cohort["C1"].var_names)
    rows = result.scores[result.scores["method"] == "linear, list"].set_index("gene")
    for k, gene in enumerate(model.panel.index):
        expected = spearmanr(predicted.X[:, k], target[gene]).statistic
        assert rows.loc[gene, "scc"] == pytest.approx(expected)
    assert set(result.scores["method"]) == METHODS
    assert result.warnings == ()


def test_known_signal_is_found(cohort):
    summary = cross_validate(cohort, by="patient", encoder="mine", n_genes=6).summary
    mean = summary[summary["section"] == "mean"].set_index("method")["scc"]
    assert mean["linear, list"] > 0.4


def test_summary_counts_what_it_leaves_out(section_of):
    adata = section_of()
    dense = adata.X.toarray()
    dense[:, 1] = 0
    adata.X = type(adata.X)(dense)
    panel = pd.Index(["G0", "G1", "G2", "ABSENT"])
    rng = np.random.default_rng(0)
    varied = rng.normal(size=(30, 4))
    flat = varied.copy()
    flat[:, 2] = 1.0
    table = score_section({"one": varied, "two": flat}, adata, panel).set_index(["method", "gene"])
    assert table.loc[("one", "G1"), "note"] == "constant counts"
    assert table.loc[("one", "ABSENT"), "note"] == "not measured"
    assert table.loc[("two", "G2"), ["note", "scc"]].tolist() == ["constant scores", 0.0]
    assert np.isnan(table.loc[("two", "G1"), "scc"])
    summary = summarise(table.reset_index()).set_index(["method", "section"])
    two = summary.loc[("two", "A1")]
    # Both methods are means over the same two genes.
    assert summary.loc[("one", "A1"), "genes"] == two["genes"] == 2
    assert two["scc"] == pytest.approx(table.loc[("two", "G0"), "scc"] / 2)
    assert (two["constant_counts"], two["not_measured"], two["constant_scores"]) == (1, 1, 1)


def test_each_section_weighs_the_same():
    table = pd.DataFrame(
        {"method": "m", "section": ["a"] * 3 + ["b"], "scc": [0.0, 0.0, 0.0, 1.0], "note": ""}
    )
    table = table.assign(depth_matched=table["scc"], lift=-table["scc"], deviance=table["scc"])
    table["slope"] = [9.0, 1.0, np.nan, 0.5]
    means = summarise(table).iloc[-1]
    scores = ["scc", "depth_matched", "lift", "deviance"]
    assert means[scores].tolist() == [0.5, 0.5, -0.5, 0.5]
    # Of slopes, the median of the genes.
    assert means["slope"] == 2.75


@pytest.mark.parametrize("centred", [False, True])
def test_ridge_is_scikit_learns_with_the_best_of_the_same_folds(cohort, centred):
    panel = pd.Index(["G0", "G1", "G2"])
    data = training_data(cohort, panel, "mine")
    target = {n: log1p_cp10k(a[:, panel]) for n, a in cohort.items()}
    features = {n: a.obsm["mine"].astype(float) for n, a in cohort.items()}
    if centred:
        target = {n: t - t.mean(0) for n, t in target.items()}
        features = {n: f - f.mean(0) for n, f in features.items()}

    def fit(alpha, names):
        x, y = (np.concatenate([v[n] for n in names]) for v in (features, target))
        scaler = StandardScaler().fit(x)
        ridge = Ridge(alpha=alpha).fit(scaler.transform(x), y)
        return lambda n: ridge.predict(scaler.transform(features[n]))

    # log1p_cp10k above divides by the counts of the panel's sections' own library size.
    library = {n: a.obs["library_size"].to_numpy() for n, a in cohort.items()}
    assert all((library[n] > 0).all() for n in cohort)
    errors = {}
    for alpha in np.logspace(-1, 5, 13):
        errors[alpha] = sum(
            ((fit(alpha, [m for m in cohort if m != n])(n) - target[n]) ** 2).mean() for n in cohort
        )
    best = fit(min(errors, key=errors.get), list(cohort))
    predict = solve_ridge(data, ExactOptions(), centred=centred).predict
    np.testing.assert_allclose(predict(cohort["A1"].obsm["mine"]), best("A1"), atol=1e-6)


def test_centring_removes_a_batch_shift(cohort):
    """Targets and features of a section shifted: only the plain ridge notices."""
    panel = pd.Index(["G0", "G1"])
    data = training_data(cohort, panel, "mine")
    expected = solve_ridge(data, ExactOptions(), centred=True).predict(cohort["A1"].obsm["mine"])
    data.features[data.section == "B1"] += 7
    again = solve_ridge(data, ExactOptions(), centred=True).predict
    np.testing.assert_allclose(again(cohort["A1"].obsm["mine"] + 3), expected, atol=1e-4)


def test_slopes_of_scores_that_are_no_log_rates_come_from_training(cohort):
    """Deviance by hand; and what other sections are tested, or their counts, does not matter."""
    train = {name: cohort[name] for name in ("A1", "B1")}
    model = fit(train, encoder="mine", n_genes=4)
    panel = model.panel.index
    scores = evaluate(model, {"C1": cohort["C1"]}, train=train).scores

    data = training_data(train, panel, "mine")
    ridge = solve_ridge(data, ExactOptions()).predict
    depth = np.tile(np.log(data.library_size)[:, None], 4)
    new, spots = cohort["C1"], {"section": data.section, "library_size": data.library_size}
    of_new = {"section": np.zeros(30), "library_size": new.obs["library_size"].to_numpy()}
    for method, known, predicted in (
        ("ridge", ridge(data.features), ridge(new.obsm["mine"])),
        ("library size", depth, np.tile(np.log(of_new["library_size"])[:, None], 4)),
    ):
        slope = score_slope(known, data.counts, **spots)
        expected = deviance_explained(predicted, new[:, panel].X, slope=slope, **of_new)[0]
        found = scores[scores["method"] == method].set_index("gene").loc[panel, "deviance"]
        np.testing.assert_allclose(found, expected, rtol=1e-6)

    other = cohort["A2"].copy()
    other.X = other.X[::-1].copy()
    other.obs["library_size"] = other.obs["library_size"].to_numpy()[::-1]
    both = evaluate(model, {"A2": other, "C1": new}, train=train).scores
    again = both[both["section"] == "C1"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, scores)


def test_patients_on_both_sides_are_told(cohort):
    result = cross_validate(cohort, by="section", encoder="mine", n_genes=3)
    told = [w for w in result.warnings if "both sides" in w]
    assert [w.split(":")[0] for w in told] == ["fold A1", "fold A2"]
    assert not [
        w
        for w in cross_validate(cohort, by="patient", encoder="mine", n_genes=3).warnings
        if "both sides" in w
    ]


def test_training_sections_are_told_and_needed(cohort):
    train = {n: cohort[n] for n in ("A1", "B1")}
    model = fit(train, encoder="mine", n_genes=3)
    both = evaluate(model, {"A1": cohort["A1"], "A2": cohort["A2"]}, train=train)
    assert "trained on A1: the score there is no test" in both.warnings[0]
    assert "patient A stands on both sides" in both.warnings[1]
    with pytest.raises(InputError, match=r"B1 is not among those given: .* `train`"):
        evaluate(model, {"C1": cohort["C1"]}, train={"A1": cohort["A1"]})
    changed = cohort["B1"].copy()
    changed.X = changed.X * 2
    changed.obs["library_size"] *= 2
    with pytest.raises(InputError, match="section B1 has other counts"):
        evaluate(model, {"C1": cohort["C1"]}, train={**train, "B1": changed})


def test_a_fold_that_trains_on_one_section_says_so(cohort):
    two = {n: cohort[n] for n in ("A1", "B1")}
    result = cross_validate(two, by="patient", encoder="mine", n_genes=3)
    assert sum("trained on one section" in w for w in result.warnings) == 2


def test_tables_on_disk(cohort, tmp_path):
    result = cross_validate(cohort, by="patient", encoder="mine", n_genes=3)
    result.write(tmp_path / "out")
    scores = pd.read_csv(tmp_path / "out/scores.csv", keep_default_na=False)
    assert len(scores) == 4 * 3 * len(METHODS)
    facts = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert facts["protocol"] == "leave one patient out"
    assert facts["folds"][0]["sections"]["B1"]["counts_sha256"]
    changes = pd.read_csv(tmp_path / "out/calibration.csv")
    pd.testing.assert_frame_equal(changes, result.calibration, check_dtype=False)
    # Every count of every section is in one of the parts of tissue, but for parts of few counts.
    panels = {tuple(scores.loc[scores["section"] == name, "gene"].unique()) for name in cohort}
    assert set(changes["method"]) == set(METHODS)
    total = sum(section[:, list(genes)].X.sum() for section in cohort.values() for genes in panels)
    kept = changes.groupby("method")["counts"].sum()
    assert len(panels) > 1 or (kept > 0.9 * total).all()
    assert (kept <= total).all()
    flat = changes[changes["method"] == "shuffled"]
    strong = changes[changes["method"] == "linear, list"]
    assert np.ptp(np.log(flat["observed"])) < np.ptp(np.log(strong["observed"]))
    summary = pd.read_csv(tmp_path / "out/summary.csv")
    assert summary["section"].tolist()[-3:] == ["mean"] * 3


def test_genes_that_training_sections_lack(cohort):
    """Everything is fitted where a gene is measured, and scored where it is measured."""
    lacking = {**cohort, "A1": cohort["A1"][:, ["G0", "G1", "G2"]].copy()}
    train = {name: lacking[name] for name in ("A1", "A2", "B1")}
    model = fit(train, encoder="mine", genes=["G1", "G5"], union=True)
    scores = evaluate(model, {"C1": lacking["C1"]}, train=train).scores.set_index("method")
    assert scores["note"].eq("").all()
    few = {name: lacking[name] for name in ("A2", "B1")}
    alone = evaluate(
        fit(few, encoder="mine", genes=["G5"]), {"C1": lacking["C1"]}, train=few
    ).scores.set_index("method")
    for method in ("ridge", "centred ridge"):
        both = scores.loc[method].set_index("gene")
        assert both.loc["G5", "scc"] == pytest.approx(alone.loc[method, "scc"])
    assert scores.loc["linear, list", "scc"].min() > 0.3
