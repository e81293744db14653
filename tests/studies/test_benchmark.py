"""The benchmark: every cell once, however often it is stopped; tables that can be recomputed."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from joblib import parallel_config
from scipy import sparse, stats

from strank.cohort.contract import SectionInfo, make_section, spots_checksum
from strank.cohort.splits import Fold
from strank.cohort.store import features_path, read_cohort, read_h5ad, write_h5ad
from strank.errors import InputError
from strank.evaluation.folds import Protocol, get_protocol
from strank.evaluation.scores import SCORES, ceilings
from strank.evaluation.significance import combine_sections
from strank.functional.deviance import deviance_explained, score_slope
from strank.functional.metrics import spearman
from strank.studies.benchmark import runner
from strank.studies.benchmark.cells import Cell, Task
from strank.studies.benchmark.runner import LOSSES, Grid, run_benchmark
from strank.studies.benchmark.tables import summarise_benchmark, write_tables

PATIENTS = {"A1": "A", "A2": "A", "B1": "B", "C1": "C"}
METHODS = ["linear, list", "ridge", "centred ridge", "linear, poisson"]
ALL = {*METHODS, "library size", "shuffled"}
COLUMNS = [
    *("method", "encoder", "genes", "seed", "fold", "section", "patient", "patient_seen"),
    *("gene", "score", "value"),
]
BY_PATIENT = Protocol("patients", n_genes=(3, None))
GRID = Grid(losses=("list", "poisson"), encoders=("mine",), n_genes=(3, None))
SMALL = replace(GRID, losses=("list",), n_genes=(3,))


def section(name: str, patient: str, *, n_genes: int = 6) -> AnnData:
    rng = np.random.default_rng([*name.encode()])
    features = rng.normal(size=(30, 3)).astype(np.float32)
    slopes = np.random.default_rng(9).normal(size=(3, n_genes)) * 0.5
    depth = rng.lognormal(0, 0.3, size=(30, 1))
    adata = make_section(
        sparse.csr_matrix(rng.poisson(depth * 10 * np.exp(features @ slopes))),
        spots=pd.DataFrame(
            rng.uniform(0, 500, size=(30, 2)), columns=["x", "y"], index=map(str, range(30))
        ),
        genes=pd.Index([f"G{i}" for i in range(n_genes)]),
        section=name,
        patient=patient,
        info=SectionInfo("/none.png", "0" * 64, 0.7, 100.0, 200.0, "ST", {"reader": "test"}),
    )
    adata.obsm["mine"] = features
    return adata


def write_section(folder: Path, adata: AnnData, version: str = "1") -> None:
    """As `strank import` and `strank embed` leave it."""
    adata, name = adata.copy(), adata.obs["section"].iloc[0]
    features = AnnData(adata.obsm.pop("mine"), obs=adata.obs[[]])
    facts = {"name": "mine", "version": version, "fields": [], "n_features": 3}
    features.uns = {"encoder": json.dumps(facts), "spots_sha256": spots_checksum(adata)}
    write_h5ad(adata, folder / f"{name}.h5ad")
    write_h5ad(features, features_path(folder, "mine", name))


def write_cohort(folder: Path, names: str = "A1 A2 B1 C1") -> Path:
    for name in names.split():
        write_section(folder, section(name, PATIENTS[name]))
    return folder


@contextmanager
def silent(title: str, total: int) -> Iterator:
    yield lambda n: None


def run(cohort: Path, out: Path, protocol: Protocol = BY_PATIENT, grid: Grid = GRID, **options):
    return run_benchmark(cohort, protocol, grid, out, progress=silent, **options)


def results_of(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "results.parquet")


def files(out: Path) -> dict[str, int]:
    """Everything in a folder, and when it was written."""
    found = [path for path in out.rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in found}


def counted(monkeypatch, *, stop_after: int = 10**6) -> list[Cell]:
    """Watch which cells are run; and stop as Ctrl-C does."""
    cells: list[Cell] = []
    real = runner.run_cell

    def run_cell(cell: Cell, *arguments) -> float:
        if len(cells) == stop_after:
            raise KeyboardInterrupt
        cells.append(cell)
        return real(cell, *arguments)

    monkeypatch.setattr(runner, "run_cell", run_cell)
    return cells


def assert_same_results(one: Path, other: Path) -> None:
    pd.testing.assert_frame_equal(results_of(one), results_of(other), check_exact=True)
    for name in ("summary.csv", "summary.md", "summary.tex", "protocol.toml"):
        assert (one / name).read_text() == (other / name).read_text()
    genes = (pd.read_parquet(out / "genes.parquet") for out in (one, other))
    pd.testing.assert_frame_equal(*genes, check_exact=True)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("benchmark") / "cohort")


@pytest.fixture(scope="module")
def done(cohort) -> Path:
    out = cohort.parent / "out"
    run(cohort, out)
    return out


def test_grid():
    grid = Grid(heads=("linear", "mlp", "mlp"), losses=(*LOSSES, "hest-ridge", "mse"), seeds=3)
    assert len(grid.methods) == len(set(grid.methods)) == 2 * 8 + 2
    assert grid.methods[:3] == ["linear, list", "ridge", "centred ridge"]
    assert grid.n_genes == (50,)
    tasks = [Task("mine", size, Fold("A", ("B1",), ("A1",))) for size in (50, 1000, 1001, None)]
    cells = grid.cells(tasks)
    seeds = {(cell.task.genes, cell.method): [] for cell in cells}
    for cell in cells:
        seeds[cell.task.genes, cell.method].append(cell.seed)
    assert seeds["50", "linear, pair"] == [0]
    assert sorted(seeds["1000", "mlp, list"]) == sorted(seeds["50", "linear, nb"]) == [0, 1, 2]
    assert {m for size, m in seeds if size == "all"} == {m for size, m in seeds if size == "1001"}
    assert {m for size, m in seeds if size == "all"} == {
        *("linear, list", "linear, pair", "linear, poisson"),
        *("ridge", "centred ridge", "hest-ridge"),
    }
    # The longest first, so that no core is left waiting at the end.
    sizes = [cell.task.n_genes or 10**6 for cell in cells]
    assert sizes == sorted(sizes, reverse=True)
    assert len({cell.path(Path()) for cell in cells}) == len(cells)


def test_there_is_a_row_for_every_method_section_gene_and_score(cohort, done):
    results = results_of(done)
    assert list(results) == COLUMNS
    expected = set()
    for size, fold in (("3", "A"), ("3", "B"), ("3", "C"), ("all", "A"), ("all", "B")):
        kept = read_h5ad(done / f"predictions/mine/{size}/{fold}/ridge.h5ad")
        for name in kept.obs["section"].unique():
            assert PATIENTS[name] == fold
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
    assert results["value"].notna().all()
    text = pd.read_csv(done / "results.csv.gz", dtype={"genes": str})
    pd.testing.assert_frame_equal(text, results.astype(text.dtypes), check_exact=False, rtol=1e-5)


def test_values_are_those_of_the_predictions_that_are_kept(cohort, done):
    results = results_of(done).query("genes == '3' and section == 'A2'")
    sections = read_cohort(cohort)
    adata = sections["A2"]
    for method, file in (("ridge", "ridge"), ("linear, list", "linear%2C%20list")):
        kept = read_h5ad(done / f"predictions/mine/3/A/{file}.h5ad")
        scores = np.asarray(kept[kept.obs["section"] == "A2"].X)
        spots = {"section": np.zeros(30), "library_size": adata.obs["library_size"].to_numpy()}
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
    counts, depths = (
        sparse.vstack([a[:, kept.var_names].X for a in train]),
        np.concatenate([a.obs["library_size"] for a in train]),
    )
    slope = score_slope(
        np.tile(np.log(depths)[:, None], 3),
        counts,
        section=np.repeat([0, 1], 30),
        library_size=depths,
    )
    depth = np.tile(np.log(spots["library_size"])[:, None], 3)
    counts = sparse.csr_matrix(adata[:, kept.var_names].X.toarray())
    ours = results.query("method == 'library size' and score == 'deviance'").set_index("gene")
    np.testing.assert_allclose(
        ours.loc[kept.var_names, "value"],
        deviance_explained(depth, counts, **spots, slope=slope)[0],
        rtol=1e-9,
    )
    genes = pd.read_parquet(done / "genes.parquet")
    rows = genes.query("genes == '3' and section == 'A2'").reset_index(drop=True)
    expected = ceilings(adata, pd.Index(rows["gene"].astype(str)))
    for column in ("gene", "mean_counts", "n_matched", "ceiling_scc", "ceiling_depth_matched"):
        assert rows[column].tolist() == expected[column].tolist()
    assert set(rows["fold"]) == {"A"}


def test_what_the_folder_says(cohort, done):
    about = json.loads((done / "benchmark.json").read_text())
    assert about["protocol"]["sha256"] == BY_PATIENT.sha256
    assert get_protocol(done / "protocol.toml").sha256 == BY_PATIENT.sha256
    assert about["methods"] == METHODS
    assert about["reference"] == METHODS[0]
    assert (about["genes"], about["encoders"], about["seeds"]) == (["3", "all"], ["mine"], 1)
    assert about["folds"]["A"] == {"train": ["B1", "C1"], "test": ["A1", "A2"]}
    assert {name: entry["patient"] for name, entry in about["sections"].items()} == PATIENTS
    assert about["features"]["mine"]["version"] == "1"
    assert about["warnings"] == about["failed"] == []
    assert "linear, mse is ridge" in about["notes"][0]
    assert about["seconds"] > 0
    assert set(files(done)) == {
        *("benchmark.json", "protocol.toml", "results.parquet", "genes.parquet"),
        *("results.csv.gz", "summary.csv", "summary.md", "summary.tex"),
        *(
            str(Cell(Task("mine", size, Fold(fold, (), ())), method).path(Path()))
            for size in (3, None)
            for fold in "ABC"
            for method in METHODS
        ),
    }


def test_a_run_that_was_stopped_goes_on(cohort, done, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        first = counted(patch, stop_after=7)
        with pytest.raises(KeyboardInterrupt):
            run(cohort, out)
    before = files(out)
    assert sorted(before)[:1] == ["benchmark.json"]
    assert sum(name.endswith(".h5ad") for name in before) == 7
    assert not any("part" in name or name.startswith("results") for name in before)
    with monkeypatch.context() as patch:
        second = counted(patch)
        run(cohort, out)
    assert len(second) == 24 - 7
    assert not set(first) & set(second)
    after = files(out)
    assert {n for n in before if before[n] != after[n]} == {"benchmark.json", "protocol.toml"}
    assert_same_results(out, done)


def test_what_is_done_is_not_done_again(cohort, done, monkeypatch):
    """But what was removed is; what a killed process left of a file is not in the way."""
    before, results = files(done), results_of(done)
    about = json.loads((done / "benchmark.json").read_text())
    gone = done / "predictions/mine/3/B/ridge.h5ad"
    gone.unlink()
    rest = gone.with_name(".ridge.0123abcd.part.h5ad")
    rest.write_bytes(b"half a file")
    cells, told = counted(monkeypatch), []

    @contextmanager
    def watched(title: str, total: int) -> Iterator:
        told.append((title, total))
        yield lambda n: told.append(n)

    run_benchmark(cohort, BY_PATIENT, GRID, done, progress=watched)
    rest.unlink()
    assert told == [("Fitting", 1), 1, ("Scoring", 6), *[1] * 6]
    assert [(c.method, c.task.fold.name, c.task.genes) for c in cells] == [("ridge", "B", "3")]
    pd.testing.assert_frame_equal(results_of(done), results, check_exact=True)
    after = files(done)
    changed = {n for n in before if before[n] != after[n] and n.startswith("predictions")}
    assert changed == {str(gone.relative_to(done))}
    assert json.loads((done / "benchmark.json").read_text())["seconds"] > about["seconds"]


def test_more_may_be_asked_later(cohort, tmp_path, monkeypatch):
    protocol = Protocol("first", first_fold_only=True, n_genes=(3,))
    run(cohort, tmp_path, protocol, SMALL)
    cells = counted(monkeypatch)
    run(cohort, tmp_path, protocol, replace(SMALL, losses=("list", "hest-ridge")))
    assert {cell.method for cell in cells} == {"hest-ridge"}
    assert set(results_of(tmp_path)["method"]) == (ALL | {"hest-ridge"}) - {"linear, poisson"}


@pytest.mark.parametrize("kind", ["threading", pytest.param("loky", marks=pytest.mark.slow)])
def test_several_at_once_find_what_one_finds(cohort, done, tmp_path, kind):
    with parallel_config(kind):
        run(cohort, tmp_path, grid=SMALL, jobs=2)
    for path in tmp_path.rglob("predictions/**/*.h5ad"):
        mine, theirs = read_h5ad(path), read_h5ad(done / path.relative_to(tmp_path))
        np.testing.assert_array_equal(mine.X, theirs.X)
    expected = results_of(done).query("genes == '3' and method != 'linear, poisson'")
    for name, values in results_of(tmp_path).items():
        assert values.tolist() == expected[name].tolist()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(cohort, done, tmp_path, monkeypatch):
    script = (
        "import sys; from pathlib import Path; from functools import partial\n"
        "from strank.evaluation.folds import Protocol\n"
        "from strank.progress import progress\n"
        "from strank.studies.benchmark.runner import Grid, run_benchmark\n"
        "grid = Grid(('list', 'poisson'), encoders=('mine',), n_genes=(3, None))\n"
        "run_benchmark(Path(sys.argv[1]), Protocol('patients', n_genes=(3, None)), grid, "
        "Path(sys.argv[2]), jobs=2, progress=partial(progress, hidden=True))\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, cohort, tmp_path], start_new_session=True
    )
    while child.poll() is None and len(list(tmp_path.rglob("[!.]*.h5ad"))) < 3:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    # Its processes notice that they are alone, and end.
    kept = -1
    while kept < (kept := len(list(tmp_path.rglob("[!.]*.h5ad")))):
        time.sleep(2)
    before = files(tmp_path)
    assert 3 <= kept < 24
    cells = counted(monkeypatch)
    run(cohort, tmp_path)
    assert len(cells) == 24 - kept
    after = files(tmp_path)
    assert all(after[n] == before[n] for n in before if n.startswith("predictions"))
    assert_same_results(tmp_path, done)


def test_a_folder_of_something_else_is_refused(cohort, done, tmp_path, monkeypatch):
    before = files(done)

    def refuse(folder: Path, protocol: Protocol = BY_PATIENT) -> str:
        with pytest.raises(InputError) as error:
            run(folder, done, protocol)
        assert str(error.value).endswith("; choose another -o, or remove it")
        return str(error.value).split(": ")[1].split(";")[0]

    assert refuse(cohort, replace(BY_PATIENT, seed=1)) == "results of another protocol"
    other = write_cohort(tmp_path / "fewer", "A1 B1 C1")
    assert refuse(other) == "results of another cohort"
    write_section(other, section("A2", "A"), version="2")
    with pytest.raises(InputError, match="section A2 has other mine features than the rest"):
        run(other, done)
    for name in ("A1", "B1", "C1"):
        write_section(other, section(name, PATIENTS[name]), version="2")
    assert refuse(other) == "results of another version of the features"
    changed = section("A1", "A")
    changed.X[3, 3] += 1
    changed.obs.loc["3", "library_size"] += 1
    write_cohort(other)
    write_section(other, changed)
    assert refuse(other, replace(BY_PATIENT, folds="section")) == (
        "results of another protocol, cohort"
    )
    monkeypatch.setattr(runner, "__version__", "9")
    assert refuse(cohort) == "results of another version of strank"
    assert files(done) == before


def test_names_and_places_are_for_people(cohort, done, tmp_path, monkeypatch):
    cells, out = counted(monkeypatch), tmp_path / "out"
    shutil.copytree(done, out)
    renamed = replace(BY_PATIENT, name="mine", description="for people")
    run(write_cohort(tmp_path / "moved"), out, renamed, SMALL)
    assert not cells
    assert json.loads((out / "benchmark.json").read_text())["protocol"]["name"] == "mine"


def test_a_cell_whose_input_is_at_fault_is_told_of_and_the_others_go_on(cohort, tmp_path):
    folds = (Fold("one", ("A1",), ("C1",)), Fold("two", ("A1", "B1"), ("C1",)))
    protocol = Protocol("given", folds=folds, n_genes=(3, 50))
    grid = replace(SMALL, losses=("list", "nb"), n_genes=(3, 50))
    facts = run(cohort, tmp_path, protocol, grid)
    assert json.loads((tmp_path / "benchmark.json").read_text())["failed"] == facts["failed"]
    assert len(facts["failed"]) == 4 * 2 + 1
    few = [text for text in facts["failed"] if ", 50 genes, " in text]
    assert all("50 genes asked for; choose between 1 and the 6 that vary" in text for text in few)
    [alone] = set(facts["failed"]) - set(few)
    assert alone.startswith("linear, nb, mine, 3 genes, one: there is only section A1, and a netwo")
    results = results_of(tmp_path)
    assert set(results["genes"]) == {"3"}
    assert set(results.query("method == 'linear, nb'")["fold"]) == {"two"}
    assert set(results.query("method == 'ridge'")["fold"]) == {"one", "two"}
    # A section that two folds test counts once, with the mean of both.
    summary = pd.read_csv(tmp_path / "summary.csv").set_index(["method", "score"])
    both = results.query("method == 'ridge' and score == 'scc'").groupby("gene", observed=True)
    assert summary.loc[("ridge", "scc"), "mean"] == pytest.approx(both["value"].mean().mean())
    assert summary["n_sections"].eq(1).all()
    assert summary.loc[("ridge", "scc"), "fraction_of_ceiling"] > 0.5


def test_where_nothing_can_be_done(cohort, tmp_path):
    with pytest.raises(InputError, match=r"nothing could be fitted: .*50 genes asked for"):
        run(cohort, tmp_path, replace(BY_PATIENT, n_genes=(50,)), replace(SMALL, n_genes=(50,)))
    assert set(files(tmp_path)) == {"benchmark.json", "protocol.toml"}


def test_leaks_and_what_is_left_out_are_told(cohort, tmp_path):
    protocol = Protocol("leak", folds="section", panel_from="all", n_genes=(2,))
    protocol = replace(protocol, target_depth="panel", headline="scc")
    grid = replace(SMALL, losses=("nb",), n_genes=(2,), most_stepwise=1)
    facts = run(cohort, tmp_path, protocol, grid)
    warnings = " ".join(facts["warnings"])
    assert "fold A1, A2: patient A stands on both sides of the split" in warnings
    assert "the genes are chosen on all sections" in warnings
    assert "sorted by scc: deep spots" in warnings
    assert facts["notes"][1] == (
        "linear, nb: trained step by step, so not at more than 1 genes, nor at `all`"
    )
    results = results_of(tmp_path)
    assert "linear, nb" not in set(results["method"])
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


def test_a_gene_that_a_test_section_lacks_is_not_scored_there(tmp_path):
    cohort = write_cohort(tmp_path / "cohort")
    fewer = section("C1", "C")[:, [0, 1, 2, 4, 5]].copy()
    write_section(cohort, fewer)
    folds = (Fold("A", ("B1", "C1"), ("A1",)), Fold("C", ("A1", "B1"), ("C1",)))
    protocol = Protocol("given", folds=folds, n_genes=(None,))
    run(cohort, tmp_path / "out", protocol, replace(SMALL, n_genes=(None,)))
    results = results_of(tmp_path / "out")
    lost = results.query("section == 'C1' and gene == 'G3'")
    assert len(lost) == len(SCORES) * 5
    assert lost["value"].isna().all()
    assert results.drop(lost.index)["value"].notna().all()
    # Where it is not measured in training, it is in no panel.
    assert set(results.query("fold == 'A'")["gene"]) == set(fewer.var_names)
    summary = pd.read_csv(tmp_path / "out/summary.csv").set_index(["method", "score"])
    assert summary.loc[("ridge", "scc"), ["n_sections", "n_genes"]].tolist() == [2, 5]


def test_seeds_of_networks_are_rows_and_their_mean_is_shown(cohort, tmp_path):
    protocol = Protocol("one", folds=(Fold("C", ("A1", "B1"), ("C1",)),), n_genes=(3,))
    run(cohort, tmp_path, protocol, replace(SMALL, losses=("nb",), seeds=2))
    results = results_of(tmp_path)
    trained = results.query("method == 'linear, nb' and score == 'lift'").set_index("gene")
    seeds = [trained.query(f"seed == {seed}")["value"] for seed in (0, 1)]
    assert len(trained) == 2 * 3
    assert not np.allclose(*seeds)
    assert set(results.query("method != 'linear, nb'")["seed"]) == {0}
    summary = pd.read_csv(tmp_path / "summary.csv").set_index(["method", "score"])
    assert summary.loc[("linear, nb", "lift"), "mean"] == pytest.approx(
        trained["value"].mean(), rel=1e-5
    )
    assert summary["seeds"].groupby("method").agg(set).to_dict() == {
        method: {2 if method == "linear, nb" else 1}
        for method in ("linear, nb", "library size", "shuffled", *METHODS[:3])
    }


def table_of(values: dict[tuple, float], **columns) -> pd.DataFrame:
    """Results in the form of a benchmark, of (method, seed, section, gene, score)."""
    names = ["method", "seed", "section", "gene", "score"]
    table = pd.Series(values).rename_axis(names).rename("value").reset_index()
    return table.assign(encoder="mine", genes="2", patient_seen=False, **columns)


def test_summary_by_hand():
    """Two seeds, two sections, two genes, one value missing."""
    found = summarise_benchmark(
        table_of(
            {
                ("linear, list", 0, "S", "A", "scc"): 0.5,
                ("linear, list", 0, "S", "B", "scc"): 0.7,
                ("linear, list", 0, "T", "A", "scc"): 0.3,
                ("linear, list", 0, "T", "B", "scc"): np.nan,
                ("mlp, list", 0, "S", "A", "scc"): 0.4,
                ("mlp, list", 1, "S", "A", "scc"): 0.6,
                ("mlp, list", 0, "S", "B", "scc"): 0.3,
                ("mlp, list", 1, "S", "B", "scc"): 0.1,
                ("mlp, list", 0, "T", "A", "scc"): 0.0,
                ("mlp, list", 1, "T", "A", "scc"): 0.2,
            }
        ),
        pd.DataFrame(
            {
                **{"encoder": "mine", "genes": "2"},
                **{"section": ["S", "S", "T", "T"], "gene": ["A", "B", "A", "B"]},
                # Of a ceiling that is mostly noise, no fraction is taken.
                "ceiling_scc": [1.0, 0.04, 0.5, 0.9],
                "ceiling_pearson": 1.0,
                "ceiling_depth_matched": 1.0,
            }
        ),
    ).set_index("method")
    means = found["mean"]
    assert means["linear, list"] == pytest.approx((0.6 + 0.3) / 2)
    assert means["mlp, list"] == pytest.approx(((0.5 + 0.2) / 2 + 0.1) / 2)
    assert found.loc["mlp, list", "difference"] == pytest.approx(((0 - 0.5) / 2 - 0.2) / 2)
    assert np.isnan(found.loc["linear, list", "difference"])
    assert found.loc["linear, list", "fraction_of_ceiling"] == pytest.approx(0.8 / 1.5)
    assert found.loc["mlp, list", "fraction_of_ceiling"] == pytest.approx(0.6 / 1.5)
    assert found[["n_sections", "n_genes"]].to_numpy().tolist() == [[2, 2], [2, 2]]
    assert found["seeds"].tolist() == [1, 2]


def test_summary_of_a_run_by_pandas(done):
    results, genes = results_of(done), pd.read_parquet(done / "genes.parquet")
    summary = pd.read_csv(done / "summary.csv", dtype={"genes": str})
    keys = ["encoder", "genes", "patient_seen", "method", "score"]
    assert not summary.duplicated(keys).any()
    assert len(summary) == 2 * len(ALL) * len(SCORES)
    summary = summary.set_index(keys).sort_index()
    rows = results[results["score"] != "p_value"].astype({"method": str, "score": str})
    by_section = rows.groupby([*keys, "section"], observed=True)["value"].mean()
    expected = by_section.groupby(keys, observed=True).mean()
    np.testing.assert_allclose(summary["mean"][expected.index], expected, rtol=1e-4)
    wide = rows.pivot_table("value", ["genes", "score", "section", "gene"], "method", observed=True)
    paired = wide.sub(wide["linear, list"], axis=0)
    for by in (["genes", "score", "section"], ["genes", "score"]):
        paired = paired.groupby(by, observed=True).mean()
    known = summary[summary["difference"].notna()]
    assert len(known) == 2 * (len(ALL) - 1) * (len(SCORES) - 1)
    for (_, size, _, method, score), row in known.iterrows():
        assert row["difference"] == pytest.approx(
            paired.loc[(size, score), method], rel=1e-5, abs=1e-9
        )
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    ceiling = genes.set_index(["genes", "section", "gene"])["ceiling_scc"].rename("ceiling")
    scc = rows[(rows["score"] == "scc") & (rows["method"] == "ridge")]
    both = scc.merge(ceiling.reset_index(), on=["genes", "section", "gene"])
    both = both[both["ceiling"] > 0.05].groupby("genes", observed=True)[["value", "ceiling"]].sum()
    for size, fraction in (both["value"] / both["ceiling"]).items():
        ours = summary.loc[("mine", size, False, "ridge", "scc"), "fraction_of_ceiling"]
        assert ours == pytest.approx(fraction, rel=1e-5)
    p = results[results["score"] == "p_value"].astype({"method": str})
    for (size, method), mine in p.groupby(["genes", "method"], observed=True):
        wide = mine.pivot_table("value", "section", "gene", observed=True)
        q = stats.false_discovery_control(combine_sections(wide.to_numpy()))
        row = summary.loc[("mine", size, False, method, "predicted")]
        assert row["mean"] == pytest.approx((q < 0.05).mean())
        assert row["n_genes"] == len(q)
    assert summary.loc[("mine", "all", False, "linear, list", "predicted"), "mean"] > 0.9
    assert summary.loc[("mine", "all", False, "shuffled", "predicted"), "mean"] < 0.4


def test_p_values_are_combined_as_scipy_does():
    p = np.random.default_rng(0).uniform(0.002, 0.99, size=(4, 6))
    p[1, 2], p[:3, 3], p[:, 4] = np.nan, np.nan, np.nan
    p[:, 5] = [0.001, 1.0, 0.2, 0.4]
    found = combine_sections(p)
    # What came from 999 draws says no more than that it is above 0.999.
    p[1, 5] = 0.999
    for gene in (0, 1, 2, 3, 5):
        known = p[np.isfinite(p[:, gene]), gene]
        expected = stats.combine_pvalues(known, method="stouffer").pvalue
        assert found[gene] == pytest.approx(expected, rel=1e-9)
    assert np.isnan(found[4])


def test_a_gene_that_a_method_does_not_order_is_not_predicted():
    """Scores that are constant have no p-value: left out, a method with one gene had 100 %."""
    p = {("all", 0): [1e-3] * 4, ("some", 0): [1e-3, np.nan, np.nan, np.nan]}
    # The first seed of this one could not be trained.
    p |= {("late", 1): [1e-3, 0.5, 0.9, np.nan], ("late", 2): [0.9] * 4}
    values = {
        (method, seed, "S", gene, score): value if score == "p_value" else 0.1
        for (method, seed), column in p.items()
        for gene, value in zip("ABCD", column, strict=True)
        for score in ("p_value", "depth_matched")
    }
    # Of a gene that nobody has a p-value of, nothing is said.
    values |= {(m, s, "S", "E", "p_value"): np.nan for m, s in p}
    ceiling = {f"ceiling_{name}": 1.0 for name in ("scc", "pearson", "depth_matched")}
    genes = pd.DataFrame({"encoder": "mine", "genes": "2", "section": "S", "gene": list("ABCDE")})
    summary = summarise_benchmark(table_of(values), genes.assign(**ceiling))
    predicted = summary[summary["score"] == "predicted"].set_index("method")
    assert predicted["mean"].to_dict() == {"all": 1.0, "some": 0.25, "late": 0.25}
    assert predicted["n_genes"].tolist() == [4] * 3


EVIL = r"50% a&b_c|d<i>#{e}$\f"


@pytest.fixture
def shown(done) -> pd.DataFrame:
    """A summary whose encoder, and one method, have names that mean something to Markdown."""
    summary = pd.read_csv(done / "summary.csv", dtype={"genes": str})
    more = summary.assign(encoder=EVIL, genes="1000").query("genes == '1000'")
    table = pd.concat([summary, more.drop_duplicates(["method", "score"])])
    return table.replace({"method": {"linear, poisson": "timm:a_b|c, list"}})


def test_markdown_has_as_many_cells_in_every_line(shown, tmp_path):
    write_tables(tmp_path, shown, "scc")
    lines = (tmp_path / "summary.md").read_text().splitlines()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert len(lines) == 2 + 3 * len(ALL)
    assert {len(row) for row in rows} == {13}
    cells = [[cell.strip().replace(r"\|", "|") for cell in row] for row in rows]
    assert cells[0][:5] == ["encoder", "genes", "patient", "method", "scc"]
    assert cells[0][10:] == ["scc, against linear, list", "of ceiling", "genes predicted"]
    body = cells[2:]
    assert "<" not in (tmp_path / "summary.md").read_text()
    # By encoder, then by the size of the panel, then by the headline.
    escaped = EVIL.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    sizes = [*["1000"] * 6, *["3"] * 6, *["all"] * 6]
    assert [row[:2] for row in body] == [
        [escaped if size == "1000" else "mine", size] for size in sizes
    ]
    assert "timm:a_b|c, list" in [row[3] for row in body]
    for start in (0, 6, 12):
        means = [float(row[4].split()[0]) for row in body[start : start + 6]]
        assert means == sorted(means, reverse=True)
    for row in body:
        assert all(re.fullmatch(r"-?\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]", c) for c in row[4:10])
        is_reference = row[3] == "linear, list"
        assert (row[10] == "") == is_reference
        assert is_reference or re.fullmatch(r"[+-]\d\.\d{3} \[-?\d\.\d{3}, -?\d\.\d{3}\]", row[10])
        assert re.fullmatch(r"-?\d+%", row[11])


def test_latex_has_as_many_cells_in_every_line(shown, tmp_path):
    write_tables(tmp_path, shown, "depth_matched")
    text = (tmp_path / "summary.tex").read_text()
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 1 + 3 * len(ALL)
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {12}
    evil = r"50\% a\&b\_c\textbar{}d\textless{}i\textgreater{}\#\{e\}\$\textbackslash f & 1000 &"
    assert sum(row.startswith(evil) for row in rows) == len(ALL)
    assert r"depth\_matched, against linear, list" in rows[0]
    assert not re.search(r"[|<>]|(?<!\\)[%#$_]", text)


def test_a_table_keeps_its_last_zeros(shown, tmp_path):
    """Numbers without an interval would be read as such, and lose them."""
    ends = ["low", "high", "difference_low", "difference_high"]
    write_tables(tmp_path, shown.assign(mean=0.3, **dict.fromkeys(ends, np.nan)), "lift")
    row = (tmp_path / "summary.md").read_text().splitlines()[-1]
    assert row.count(" 0.300 ") == 6
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / "summary.csv")[["mean", "low"]],
        shown.assign(mean=0.3, low=np.nan)[["mean", "low"]].reset_index(drop=True),
    )
