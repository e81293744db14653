"""What a benchmark scores: a row for all there is, with the values of what was predicted."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from strank.cohort.filter import SpotFilter
from strank.cohort.folds import Fold
from strank.cohort.store import read_cohort, read_h5ad, write_h5ad
from strank.errors import InputError
from strank.evaluation.methods import fit_method
from strank.evaluation.protocol import Protocol
from strank.evaluation.scores import SCORES, ceilings
from strank.metrics.correlation import spearman
from strank.metrics.deviance import deviance_explained, score_slope
from strank.neural.recipe import RECIPES
from strank.report.benchmark import data
from strank.studies.benchmark import runner
from strank.studies.benchmark.runner import benchmark

UNFITTED = {"library size", "shuffled", "within section"}
ALWAYS = {"linear, list", "ridge", "centred ridge", *UNFITTED}
ALL = {*ALWAYS, "linear, poisson"}
COLUMNS = [
    *("method", "encoder", "genes", "seed", "fold", "section", "patient", "patient_seen"),
    *("gene", "score", "value"),
]


def assert_known(results: pd.DataFrame) -> None:
    """All but the calibration of depth, which says next to nothing here."""
    unknown = results[results["value"].isna()]
    assert set(zip(unknown["method"], unknown["score"], strict=True)) <= {("library size", "slope")}


def test_there_is_a_row_for_every_method_section_gene_and_score(bench, done):
    results = bench.results(done)
    assert list(results) == COLUMNS
    expected = set()
    for size, fold in (("3", "A"), ("3", "B"), ("3", "C"), ("all", "A"), ("all", "B")):
        kept = read_h5ad(done / f"predictions/mine/{size}/{fold}/ridge.h5ad")
        for name in kept.obs["section"].unique():
            assert name[0] == fold
            expected |= {
                (method, size, fold, name, gene, score)
                for method in ALL
                for gene in kept.var_names
                for score in SCORES
            }
    rows = results[["method", "genes", "fold", "section", "gene", "score"]]
    found = set(rows.itertuples(index=False, name=None))
    assert found >= expected
    assert len(found) == len(results)
    # The sections of all folds, and all genes where all were asked for.
    assert len(found - expected) == len(ALL) * 6 * len(SCORES)
    assert results["seed"].eq(0).all()
    assert not results["patient_seen"].any()
    assert_known(results)


def test_values_are_those_of_the_predictions_that_are_kept(bench, done):
    results = bench.results(done).query("genes == '3' and section == 'A2'")
    sections = read_cohort(bench.cohort)
    adata = sections["A2"]
    spots = {"section": np.zeros(30), "library_size": adata.obs["library_size"].to_numpy()}
    for method, file in (("ridge", "ridge"), ("linear, list", "linear%2C%20list")):
        kept = read_h5ad(done / f"predictions/mine/3/A/{file}.h5ad")
        scores = np.asarray(kept[kept.obs["section"] == "A2"].X)
        counts = sparse.csr_matrix(adata[:, kept.var_names].X.toarray())
        slope = kept.var["slope"].to_numpy() if "slope" in kept.var else None
        assert (slope is None) == (method == "linear, list")
        expected = {
            "scc": spearman(scores, counts, **spots)[0],
            "deviance": deviance_explained(scores, counts, **spots, slope=slope)[0],
        }
        ours = results[results["method"] == method].pivot_table(
            "value", "gene", "score", observed=True
        )
        for score, values in expected.items():
            np.testing.assert_allclose(ours.loc[kept.var_names, score], values, rtol=1e-9)
    # Of library size, the slope is that of the training sections, too.
    train = [sections[name] for name in ("B1", "C1")]
    depths = np.concatenate([a.obs["library_size"] for a in train])
    slope = score_slope(
        np.tile(np.log(depths)[:, None], 3),
        sparse.vstack([a[:, kept.var_names].X for a in train]),
        section=np.repeat([0, 1], 30),
        library_size=depths,
    )
    depth = np.tile(np.log(spots["library_size"])[:, None], 3)
    ours = results.query("method == 'library size' and score == 'deviance'").set_index("gene")
    np.testing.assert_allclose(
        ours.loc[kept.var_names, "value"],
        deviance_explained(depth, counts, **spots, slope=slope)[0],
        rtol=1e-9,
    )
    genes = pd.read_parquet(done / "genes")
    rows = genes.query("genes == '3' and section == 'A2'").reset_index(drop=True)
    expected = ceilings(adata, pd.Index(rows["gene"].astype(str)))
    for column in ("gene", "mean_counts", "n_matched", "ceiling_scc", "ceiling_depth_matched"):
        assert rows[column].tolist() == expected[column].tolist()
    assert set(rows["fold"]) == {"A"}


def test_a_cell_whose_input_is_at_fault_is_told_of_and_the_others_go_on(bench, tmp_path):
    folds = (Fold("one", ("A1",), ("C1",)), Fold("two", ("A1", "B1"), ("C1",)))
    protocol = Protocol("given", folds=folds, n_genes=(3, 50))
    grid = replace(bench.small, losses=("list", "rank"), n_genes=(3, 50))
    facts = bench.run(tmp_path, protocol, grid)
    assert json.loads((tmp_path / "benchmark.json").read_text())["failed"] == facts["failed"]
    assert len(facts["failed"]) == 4 * 2 + 1
    few = [text for text in facts["failed"] if ", 50 genes, " in text]
    assert all("50 genes asked for; choose between 1 and the 6 that vary" in text for text in few)
    [alone] = set(facts["failed"]) - set(few)
    assert alone.startswith(
        "linear, rank, mine, 3 genes, one: there is only section A1, and a netwo"
    )
    results = bench.results(tmp_path)
    assert set(results["genes"]) == {"3"}
    assert set(results.query("method == 'linear, rank'")["fold"]) == {"two"}
    assert set(results.query("method == 'ridge'")["fold"]) == {"one", "two"}
    # A section that two folds test counts once, with the mean of both.
    summary = pd.read_csv(tmp_path / "summary.csv").set_index(["method", "score"])
    both = results.query("method == 'ridge' and score == 'scc'").groupby("gene", observed=True)
    assert summary.loc[("ridge", "scc"), "mean"] == pytest.approx(both["value"].mean().mean())
    assert summary["n_sections"].eq(1).all()
    assert summary.loc[("ridge", "scc"), "fraction_of_ceiling"] > 0.5


def test_leaks_and_what_is_left_out_are_told(bench, tmp_path):
    protocol = Protocol("leak", folds="section", panel_from="all", n_genes=(2,))
    protocol = replace(protocol, target_depth="panel", headline="scc")
    grid = replace(bench.small, losses=("rank",), n_genes=(2,), most_stepwise=1)
    facts = bench.run(tmp_path, protocol, grid)
    warnings = " ".join(facts["warnings"])
    assert "fold A1, A2: patient A stands on both sides of the split" in warnings
    assert "the genes are chosen on all sections" in warnings
    assert "sorted by scc: deep spots" in warnings
    assert facts["notes"][1] == (
        "linear, rank: trained step by step, so not at more than 1 genes, nor at `all`"
    )
    results = bench.results(tmp_path)
    assert "linear, rank" not in set(results["method"])
    # Of two genes whose sum the target divides by, one falls as the other rises.
    depth = results.query("method == 'library size' and score == 'scc'")
    sums = depth.groupby("section", observed=True)["value"].agg(["sum", "std"])
    np.testing.assert_allclose(sums["sum"], 0, atol=1e-12)
    assert sums["std"].min() > 0
    seen = results.groupby("section", observed=True)["patient_seen"].agg(set)
    assert seen.to_dict() == {"A1": {True}, "A2": {True}, "B1": {False}, "C1": {False}}
    summary = pd.read_csv(tmp_path / "summary.csv")
    kinds = summary.groupby("patient_seen")["n_sections"].agg(set)
    assert kinds.tolist() == [{2}] * 2
    # Ceilings are of a target that the depth of all genes divides.
    of_ceiling = summary.set_index("score")["fraction_of_ceiling"]
    assert of_ceiling[["scc", "pearson"]].isna().all()
    assert of_ceiling["depth_matched"].notna().all()
    assert (tmp_path / "summary.md").read_text().count("| seen ") == 5


def test_a_protocol_of_named_sections(bench, tmp_path, monkeypatch):
    """As the paper's tasks: a filter, validation, the published recipe; the rest is not read."""
    monkeypatch.setitem(RECIPES, "published", replace(RECIPES["published"], max_epochs=3))
    cohort = bench.write(tmp_path / "cohort")
    write_h5ad(bench.section("D1"), cohort / "D1.h5ad")
    sparse_spots = bench.section("A2")
    sparse_spots.X = sparse.csr_matrix(sparse_spots.X.toarray() * (np.arange(30) > 1)[:, None])
    bench.write_section(cohort, sparse_spots)
    fold = Fold("task", ("B1", "C1"), ("A2",), validation=("A1",))
    losses = ("mse", "poisson", "nb", "rank", "pair", "pcc", "list")
    protocol = Protocol("task", "", (fold,), filter=SpotFilter(2, 1, 3), panel_from="all")
    protocol = replace(protocol, n_genes=(3,), methods=losses, recipes=("published",))
    fitted = {}

    def watched(method, train, panel, **how):
        fitted[method.name] = (set(train), how["validation"], [a.n_obs for a in train.values()])
        return fit_method(method, train, panel, **how)

    monkeypatch.setattr(runner, "fit_method", watched)
    result = benchmark(cohort, tmp_path / "out", protocol=protocol, encoders=["mine"])
    facts = result.facts
    names = {f"linear, {loss}, published" for loss in losses}
    assert set(fitted) == names | ALWAYS - UNFITTED
    assert all(of == ({"A1", "B1", "C1"}, ("A1",), [30] * 3) for of in fitted.values())
    # Patient A is known: nothing is asked of the section by itself.
    found = set(bench.results(tmp_path / "out")["method"])
    assert found == names | ALWAYS - {"within section"}
    assert facts["failed"] == []
    assert facts["folds"] == {"task": {"train": ["B1", "C1"], "validation": ["A1"], "test": ["A2"]}}
    assert {name: of["n_spots"] for name, of in facts["sections"].items()} == {
        **dict.fromkeys(("A1", "B1", "C1"), 30),
        "A2": 28,
    }
    told = " ".join(facts["warnings"])
    assert "fold task: validation section A1 is of patient A, who is tested" in told
    assert "fold task: patient A stands on both sides of the split" in told
    # After them, methods whose scores disagree.
    assert facts["notes"][1:3] == [
        "; ".join(f"linear, {loss}, published" for loss in losses)
        + ": stopped by validation sections, on which all other methods train",
        "the filter leaves of A2 28 of 30 spots, 6 of 6 genes",
    ]
    assert result.summary["patient_seen"].all()
    # What is kept of the observed is what was predicted.
    notes = list[str]()
    [shown] = data.test_sections(data.open_benchmark(tmp_path / "out"), cohort, notes)
    assert notes == []
    assert list(shown.observed.obs_names) == list(sparse_spots.obs_names[2:])
    # Recipes that are asked for, and folds that name no validation.
    free = Protocol("free", first_fold_only=True, n_genes=(3,), recipes=("default",))
    how = {"encoders": ["mine"], "losses": ["list"], "recipes": ["published"]}
    facts = benchmark(bench.cohort, tmp_path / "free", protocol=free, **how).facts
    assert facts["methods"][3:] == ["linear, list, published"]
    assert facts["notes"][2] == (
        "fold A: no validation sections are named, so those of one training patient, or one "
        "section of fewer than three patients, are drawn by the seed"
    )
    assert facts["failed"] == []


def test_a_section_that_the_cohort_lacks_or_the_filter_empties_is_named(bench, tmp_path):
    fold = Fold("task", ("B1", "C1"), ("A2",), validation=("Z1",))
    protocol = Protocol("task", folds=(fold,), n_genes=(3,))
    with pytest.raises(InputError, match=r"cohort: no section Z1; there are A1, A2, B1, C1"):
        bench.run(tmp_path / "out", protocol, bench.small)
    fold = replace(fold, validation=("A1",))
    protocol = replace(protocol, folds=(fold,), filter=SpotFilter(7, 1, 1))
    with pytest.raises(InputError, match=r"section A1: nothing is left: 0 of 30 spots have at lea"):
        bench.run(tmp_path / "out", protocol, bench.small)
    assert not (tmp_path / "out").exists()


def test_a_gene_that_a_test_section_lacks_is_not_scored_there(bench, tmp_path):
    cohort = bench.write(tmp_path / "cohort")
    fewer = bench.section("C1")[:, [0, 1, 2, 4, 5]].copy()
    bench.write_section(cohort, fewer)
    folds = (Fold("A", ("B1", "C1"), ("A1",)), Fold("C", ("A1", "B1"), ("C1",)))
    protocol = Protocol("given", folds=folds, n_genes=(None,))
    bench.run(tmp_path / "out", protocol, replace(bench.small, n_genes=(None,)), cohort=cohort)
    results = bench.results(tmp_path / "out")
    lost = results.query("section == 'C1' and gene == 'G3'")
    assert len(lost) == len(SCORES) * len(ALWAYS)
    assert lost["value"].isna().all()
    assert_known(results.drop(lost.index))
    # Where it is not measured in training, it is in no panel.
    assert set(results.query("fold == 'A'")["gene"]) == set(fewer.var_names)
    summary = pd.read_csv(tmp_path / "out/summary.csv").set_index(["method", "score"])
    assert summary.loc[("ridge", "scc"), ["n_sections", "n_genes"]].tolist() == [2, 5]


def test_seeds_of_networks_are_rows_and_their_mean_is_shown(bench, tmp_path):
    protocol = Protocol("one", folds=(Fold("C", ("A1", "B1"), ("C1",)),), n_genes=(3,))
    bench.run(tmp_path, protocol, replace(bench.small, losses=("rank",), seeds=2))
    results = bench.results(tmp_path)
    trained = results.query("method == 'linear, rank' and score == 'lift'").set_index("gene")
    seeds = [trained.query(f"seed == {seed}")["value"] for seed in (0, 1)]
    assert len(trained) == 2 * 3
    assert not np.allclose(*seeds)
    assert set(results.query("method != 'linear, rank'")["seed"]) == {0}
    summary = pd.read_csv(tmp_path / "summary.csv").set_index(["method", "score"])
    assert summary.loc[("linear, rank", "lift"), "mean"] == pytest.approx(
        trained["value"].mean(), rel=1e-5
    )
    assert summary["seeds"].groupby("method").agg(set).to_dict() == {
        method: {2 if method == "linear, rank" else 1} for method in {*ALWAYS, "linear, rank"}
    }
