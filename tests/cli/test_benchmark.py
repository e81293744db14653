"""``strank benchmark`` as a user types it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse
from typer.testing import CliRunner

from strank.cli import app
from strank.cohort.contract import SectionInfo, make_section, spots_checksum
from strank.cohort.folder import features_path
from strank.cohort.store import write_h5ad
from strank.neural.recipe import RECIPES

FILES = {
    *("benchmark.json", "protocol.toml", "results", "genes"),
    *("summary.csv", "summary.md", "summary.tex", "predictions"),
}


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["benchmark", *(str(a) for a in arguments)])
    assert result.exit_code == code, result.output
    return result


def refuse(*arguments: object) -> str:
    told = run(*arguments, code=2)
    assert told.stdout == ""
    assert "Traceback" not in told.stderr
    [error] = [line for line in told.stderr.splitlines() if line.startswith("Error: ")]
    return error.removeprefix("Error: ")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Two sections of one patient and one of another, with features of two encoders."""
    folder = tmp_path_factory.mktemp("cohort")
    slopes = np.random.default_rng(9).normal(size=(3, 6)) * 0.5
    for number, name in enumerate(["A1", "A2", "B1"]):
        rng = np.random.default_rng(number)
        features = rng.normal(size=(30, 3)).astype(np.float32)
        adata = make_section(
            sparse.csr_matrix(rng.poisson(10 * np.exp(features @ slopes))),
            spots=pd.DataFrame(
                rng.uniform(0, 500, (30, 2)), columns=["x", "y"], index=map(str, range(30))
            ),
            genes=pd.Index([f"G{i}" for i in range(6)]),
            section=name,
            patient=name[0],
            info=SectionInfo("/none.png", "0" * 64, 0.7, 100.0, 200.0, "ST", {"reader": "test"}),
        )
        write_h5ad(adata, folder / f"{name}.h5ad")
        for encoder, values in {"morphology": features, "noise": rng.normal(size=(30, 2))}.items():
            stored = AnnData(values.astype(np.float32), obs=pd.DataFrame(index=adata.obs_names))
            facts = {"name": encoder, "version": "1", "fields": [], "n_features": values.shape[1]}
            stored.uns = {"encoder": json.dumps(facts), "spots_sha256": spots_checksum(adata)}
            write_h5ad(stored, features_path(folder, encoder, name))
    return folder


@pytest.fixture(scope="module")
def done(cohort, tmp_path_factory) -> tuple[Path, list[object], str]:
    """A folder of results, the command that made it, and what it said."""
    out = tmp_path_factory.mktemp("results") / "out"
    command = [cohort, "-o", out, "--losses", "list,hest-ridge", "--genes", "3,all,3"]
    command += ["--protocol", "section", "--encoders", "morphology,noise", "--jobs", 1]
    told = run(*command)
    return out, command, told.stdout + told.stderr


def test_tables_notes_and_files(done):
    out, _, told = done
    assert {path.name for path in out.iterdir()} == FILES
    for encoder in ("morphology", "noise"):
        for size in ("3", "all"):
            assert f"{encoder}, {size} genes, a patient of the training" in told
            assert f"{encoder}, {size} genes, new patients" in told
    assert "Note: fold A1, A2: patient A stands on both sides" in told
    assert "Note: linear, mse is ridge" in told
    assert "Note: within section: strips of a section, each predicted by linear, list of" in told
    assert "Protocol section, SHA-256 " in told
    assert f"strank report {out} makes a page of them." in told
    results = pd.read_parquet(out / "results").astype({"genes": str})
    assert set(results["genes"]) == {"3", "all"}
    assert set(results["method"]) == {
        *("linear, list", "ridge", "centred ridge", "hest-ridge", "library size", "shuffled"),
        "within section",
    }
    summary = pd.read_csv(out / "summary.csv").query("genes == 'all' and score == 'scc'")
    means = summary.groupby(["encoder", "method"])["mean"].mean()
    assert means["morphology", "linear, list"] > 0.6
    assert abs(means["noise", "linear, list"]) < 0.3


def test_a_second_run_has_nothing_to_fit_and_says_the_same(done):
    out, command, first = done
    made = [*out.rglob("predictions/**/*.h5ad"), *out.rglob("part.parquet")]
    kept = {path: path.stat().st_mtime_ns for path in made}
    assert len(kept) == 2 * 2 * 3 * 4 + 2 * 2 * 2 * 3
    tables = {name: (out / name).read_bytes() for name in ("summary.csv", "summary.tex")}
    again = run(*command)
    assert "0/0" in again.stderr
    assert again.stdout in first
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert {name: (out / name).read_bytes() for name in tables} == tables


def test_json_on_stdout_is_all_there_is(done):
    out, command, _ = done
    told = json.loads(run(*command, "--json").stdout)
    assert told["outputs"] == [str(out)]
    assert told["failed"] == []
    assert told["genes"] == ["3", "all"]
    assert told["protocol"]["name"] == "section"
    assert any("stands on both sides" in text for text in told["warnings"])
    summary = pd.read_csv(out / "summary.csv", dtype={"genes": str})
    found = pd.DataFrame(told["summary"]).astype({"genes": str})
    assert found[["method", "score"]].equals(summary[["method", "score"]])
    np.testing.assert_allclose(found["mean"].astype(float), summary["mean"])
    # What is undefined is null.
    assert all(row["difference"] is None for row in told["summary"] if "list" in row["method"])


def test_a_cell_that_cannot_be_done_is_told_of(cohort, tmp_path):
    """The tables of the others are written, and the end says that some are not."""
    command = [cohort, "-o", tmp_path, "--losses", "list", "--genes", "3,7", "--jobs", 1]
    told = run(*command, code=1)
    assert told.stderr.endswith("Error: 6 fits not done; run again to try them\n")
    lines = [line for line in told.stderr.splitlines() if line.startswith("Note: not done: ")]
    assert len(lines) == 2 * 3
    assert "ridge, morphology, 7 genes, A: 7 genes asked for; choose between 1 and" in told.stderr
    assert set(pd.read_parquet(tmp_path / "results")["genes"].astype(str)) == {"3"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--protocol", "cv5"],
            "no protocol 'cv5'; choose one of strank, section, hest, paper-IDC, ",
        ),
        (["--losses", "list,l1"], "no loss 'l1'; choose one of list, pair"),
        (["--losses", ","], "no name in ','; separate names by commas"),
        (["--heads", "tree"], "no head 'tree'; choose one of linear, mlp, context"),
        (["--recipes", "usual,publishd"], "no recipe 'publishd'; choose one of default, published"),
        (["--genes", "x"], "--genes: 'x' is neither a number of genes nor `all`"),
        (["--genes", "3,0"], "--genes: '0' is neither a number of genes nor `all`"),
        (["--encoders", "uni"], "no uni features; run `strank embed"),
        (["--genes", "7"], "nothing could be fitted: "),
    ],
)
def test_bad_input_is_one_line(cohort, tmp_path, options, message):
    assert message in refuse(cohort, "-o", tmp_path / "out", "--jobs", 1, *options)
    assert not list(tmp_path.rglob("results*"))
    assert not list(tmp_path.rglob("*.parquet"))


def test_bad_folders(cohort, done, tmp_path):
    out, command, _ = done
    assert refuse(*command, "--protocol", "strank") == (
        f"{out}: benchmark of another protocol_sha256; choose another -o, or remove it"
    )
    assert "no such folder; make a cohort" in refuse(tmp_path / "none", "-o", tmp_path / "out")
    single = tmp_path / "single"
    for path in ("B1.h5ad", "features/morphology/B1.h5ad"):
        (single / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(cohort / path, single / path)
    for protocol, unit in {"strank": "patient", "section": "section"}.items():
        error = refuse(single, "-o", tmp_path / "out", "--protocol", protocol)
        assert error == f"folds by {unit} need at least two of them; this cohort has 1 (1 section)"


def test_a_protocol_of_ones_own(cohort, tmp_path):
    """Its sizes and methods are taken where none are typed; and the copy in the folder works."""
    text = 'methods = ["hest-ridge"]\nn_genes = [2]\nheadline = "lift"\nfirst_fold_only = true\n'
    (tmp_path / "mine.toml").write_text(text)
    told = run(cohort, "-o", tmp_path / "out", "--protocol", tmp_path / "mine.toml", "--jobs", 1)
    assert "Protocol mine, SHA-256" in told.stdout
    assert "Note: a single split" in told.stderr
    results = pd.read_parquet(tmp_path / "out/results").astype({"genes": str})
    assert set(results["genes"]) == {"2"}
    assert "hest-ridge" in set(results["method"])
    header = (tmp_path / "out/summary.md").read_text().splitlines()[0]
    assert "lift, against linear, list" in header
    copy = tmp_path / "out/protocol.toml"
    again = run(cohort, "-o", tmp_path / "out", "--protocol", copy, "--jobs", 1)
    assert "0/0" in again.stderr
    copy.write_text(copy.read_text().replace('"lift"', '"lifts"'))
    error = refuse(cohort, "-o", tmp_path / "out", "--protocol", copy)
    assert error.startswith(f"{copy}: headline is 'lifts'; it must be one of depth_matched, lift")


def test_the_published_recipe_and_no_library_size(cohort, tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "published", replace(RECIPES["published"], max_epochs=2))
    task = tmp_path / "task.toml"
    task.write_text(
        'methods = ["list", "mse"]\nrecipes = ["published"]\nn_genes = [2]\n[[folds]]\n'
        'name = "one"\ntrain = ["B1"]\nvalidation = ["A2"]\ntest = ["A1"]\n'
    )
    command = [cohort, "-o", tmp_path / "out", "--protocol", task, "--jobs", 1]
    told = run(*command, "--no-library-size")
    assert "Note: fold one: validation section A2 is of patient A, who is tested" in told.stderr
    assert "; linear, mse, published; " in told.stderr
    assert ": stopped by validation sections, on which all other methods train" in told.stderr
    methods = {"linear, list, published", "linear, mse, published", "linear, list, no library size"}
    methods.add("linear, list, published, no library size")
    always = {"linear, list", "ridge", "centred ridge", "library size", "shuffled"}
    results = pd.read_parquet(tmp_path / "out/results").astype({"genes": str})
    assert set(results["method"]) == methods | always
    # What is typed comes before what the protocol says.
    told = json.loads(run(*command, "--recipes", "usual", "--losses", "list", "--json").stdout)
    assert told["methods"] == ["linear, list", "ridge", "centred ridge"]
    error = refuse(*command, "--losses", "section-pcc")
    assert error.startswith("the published recipe is not for linear, section-pcc, but for --heads ")


def test_help_has_examples():
    text = run("--help").output
    assert "Example: strank benchmark strank-demo/cohort" in text
    assert "strank report" in text
