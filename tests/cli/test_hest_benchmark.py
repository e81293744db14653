"""``strank hest-benchmark`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from strank.cli import app


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def command(tmp_path: Path) -> list[object]:
    for part in ("task/splits", "task/adata", "emb"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "task/var_50genes.json").write_text('{"genes": ["B", "A"]}')
    for k, names in enumerate(("XY", "YX")):
        for part, name in zip(("train", "test"), names, strict=True):
            text = f"sample_id,patches_path,expr_path\n{name},patches/{name}.h5,adata/{name}.h5ad\n"
            (tmp_path / f"task/splits/{part}_{k}.csv").write_text(text)
    rng = np.random.default_rng(0)
    spots = [f"s{i}" for i in range(40)]
    for name in "XY":
        features = rng.normal(size=(40, 5)).astype(np.float32)
        counts = rng.poisson(5 * np.exp(features[:, :3])).astype(np.float32)
        adata = anndata.AnnData(
            counts, obs=pd.DataFrame(index=spots), var=pd.DataFrame(index=["A", "B", "C"])
        )
        adata.write_h5ad(tmp_path / f"task/adata/{name}.h5ad")
        with h5py.File(tmp_path / f"emb/{name}.h5", "w") as file:
            file["embeddings"], file["barcodes"] = features, np.array(spots, dtype="S")[:, None]
    options = ["--embeddings", tmp_path / "emb", "-o", tmp_path / "out", "--components", 4]
    return ["hest-benchmark", tmp_path / "task", *options, "--jobs", 1]


def test_the_table_and_the_files(command, tmp_path):
    told = run(*command)
    assert "library size" in told.stdout
    assert "hest: README and code: 256 components" in told.stdout
    assert "hest-a13: Table A13" in told.stdout
    assert "chose its genes on all samples" in told.stdout
    assert "Note: task, emb: fold 0: trained on one sample" in told.stderr
    results = pd.read_csv(tmp_path / "out/results.csv")
    keys = ["task", "encoder", "features", "method", "fold", "gene", "score", "value"]
    assert results.columns.tolist() == keys
    assert len(results) == 2 * 6 * 2 * 2 * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("hest-benchmark.json", "leaderboard.csv", "leaderboard.md"),
        *("results.csv", "summary.csv", "tasks"),
    ]


def test_protocols_are_chosen(command):
    told = json.loads(run(*command, "--protocol", "hest-cv,hest-a13-per-sample", "--json").stdout)
    assert list(told["protocols"]) == ["hest-cv", "hest-a13-per-sample"]
    assert {row["protocol"] for row in told["leaderboard"]} == {*told["protocols"]}
    assert "no protocol 'conch'" in run(*command, "--protocol", "conch", code=2).stderr


def test_what_failed_is_in_the_exit_code_and_the_rest_is_there(command, tmp_path):
    """Of two encoders one lacks a sample."""
    (tmp_path / "both").mkdir()
    (tmp_path / "emb").rename(tmp_path / "both/emb")
    (tmp_path / "both/half").mkdir()
    (tmp_path / "both/half/X.h5").write_bytes((tmp_path / "both/emb/X.h5").read_bytes())
    command[3] = tmp_path / "both"
    told = run(*command, "--json", code=1)
    assert {row["encoder"] for row in json.loads(told.stdout)["leaderboard"]} == {"emb"}
    [error] = [line for line in told.stderr.splitlines() if line.startswith("Error: ")]
    assert error.startswith("Error: 1 tasks not done: task, half: ")
    assert error.endswith("half/Y.h5: no such file; sample Y has no embeddings")


def test_json_on_stdout_is_all_there_is(command, tmp_path):
    told = json.loads(run(*command, "--json").stdout)
    means = {row["method"]: row for row in told["summary"] if row["fold"] == "mean"}
    assert means["linear, list"]["scc"] > 0.3
    assert {row["protocol"] for row in told["leaderboard"]} == {"hest", "hest-a13"}
    assert len(told["caveats"]) == 3
    assert told["outputs"] == [str(tmp_path / "out")]


def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path):
    (tmp_path / "emb/Y.h5").unlink()
    told = run(*command, code=2)
    assert told.stdout == ""
    [error] = [line for line in told.stderr.splitlines() if line.startswith("Error: ")]
    assert error.endswith("emb/Y.h5: no such file; sample Y has no embeddings")
    assert not (tmp_path / "out").exists()


def test_more_components_than_there_can_be(command, tmp_path):
    told = run(*command, "--components", 6, "--protocol", "hest", code=2)
    assert "fold 0: 6 principal components need as many training spots" in told.stderr
    assert "choose fewer (--components)" in told.stderr
    assert not (tmp_path / "out").exists()


def test_help_has_an_example():
    assert "Example: strank hest-benchmark" in run("hest-benchmark", "--help").output
