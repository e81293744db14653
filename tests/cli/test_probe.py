"""``strank hest-probe`` as a user types it."""

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
    return ["hest-probe", tmp_path / "task", *options]


def test_the_table_and_the_files(command, tmp_path):
    told = run(*command)
    assert "library size" in told.stdout
    assert "chose its genes on all samples" in told.stdout
    assert "Note: fold 0: trained on one sample" in told.stderr
    results = pd.read_csv(tmp_path / "out/results.csv")
    assert results.columns.tolist() == ["method", "fold", "gene", "score", "value"]
    assert len(results) == 5 * 2 * 2 * 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("probe.json", "results.csv", "summary.csv")
    ]


def test_json_on_stdout_is_all_there_is(command, tmp_path):
    told = json.loads(run(*command, "--json").stdout)
    means = {row["method"]: row for row in told["summary"] if row["fold"] == "mean"}
    assert means["linear, list"]["scc"] > 0.3
    assert len(told["caveats"]) == 3
    assert told["output"] == str(tmp_path / "out")


def test_bad_input_is_one_line_and_nothing_is_written(command, tmp_path):
    (tmp_path / "emb/Y.h5").unlink()
    told = run(*command, code=2)
    assert told.stdout == ""
    [error] = [line for line in told.stderr.splitlines() if line.startswith("Error: ")]
    assert error.endswith("emb/Y.h5: no such file; sample Y has no embeddings")
    assert not (tmp_path / "out").exists()


def test_more_components_than_there_can_be(command, tmp_path):
    told = run(*command[:-1], 6, code=2)
    assert "fold 0: 6 principal components need as many training spots" in told.stderr
    assert not (tmp_path / "out").exists()


def test_help_has_an_example():
    assert "Example: strank hest-probe" in run("hest-probe", "--help").output
