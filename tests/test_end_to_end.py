"""The whole way through the command line: on simulated tissue, and on real tissue if there."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from glob import glob
from itertools import chain
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from strank import RankModel, read_cohort
from strank.cli import app
from strank.metrics.correlation import rank_correlation
from strank.neural.recipe import RECIPES
from strank.simulate.cohort import simulate_cohort
from strank.simulate.counts import CountDesign
from strank.simulate.tissue import TissueDesign
from strank.studies.demo import DemoResult, class_table, run_demo


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*(str(a) for a in arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def five_steps(source: Path, folder: Path, train: str, test: str, n_genes: int) -> dict:
    cohort, model = folder / "cohort", folder / "model"
    run("import", "st", source, "-o", cohort)
    run("embed", cohort, "--encoder", "morphology")
    run("fit", cohort, "-o", model, "--genes", n_genes, "--sections", train)
    scored = run("evaluate", cohort, "--model", model, "--sections", test, "-o", folder / "ev")
    gene = RankModel.load(model).panel.index[0]
    drawn = run(
        *("predict", cohort / f"{test}.h5ad", "--model", model, "-o", folder / "p"),
        *("--genes", gene, "--stride", 200),
    )
    return {"evaluate": scored, "predict": drawn}


@pytest.fixture(scope="module")
def simulated(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("simulated") / "st"
    # Patients who share what genes mark: a test of the way, which chance must not decide.
    how = {"tissue": SMALL, "counts": CountDesign(shared=1.0)}
    simulate_cohort(folder, n_patients=4, n_sections=1, n_genes=63, seed=3, **how)
    return folder


SMALL = TissueDesign(side_um=2200, um_per_pixel=1.2)


def test_simulated_tissue(simulated, tmp_path):
    result = five_steps(simulated, tmp_path, "A1,B1,C1", "D1", 30)
    section = read_cohort(tmp_path / "cohort", sections=["D1"], encoder="morphology")["D1"]
    model = RankModel.load(tmp_path / "model")
    truth = anndata.read_h5ad(simulated / "truth/D1.h5ad")[section.obs_names, model.panel.index]
    found = rank_correlation(model.predict(section).X, truth.X)
    varied = truth.var["gene_class"] != "flat"
    # Scores of a model that knows nothing have mean 0; with 60 spots and genes that are far from
    # independent the standard deviation of this mean stays below 0.1. 0.3 is three of them.
    assert found[varied].mean() > 0.3
    methods = {row["method"] for row in result["evaluate"]["summary"]}
    beside = {"ridge", "centred ridge", "within section", "library size", "shuffled"}
    assert methods == {"linear, list", *beside}
    (slide,) = result["predict"]["slides"]
    predictions = anndata.read_h5ad(slide["scores"])
    width, height = Image.open(simulated / "images/D1.jpg").size
    assert (predictions.obsm["spatial"] < [width, height]).all()
    assert predictions.uns["strank"]["image"] == str((simulated / "images/D1.jpg").resolve())
    assert predictions.uns["strank"]["um_per_pixel"] == pytest.approx(1.2, rel=0.01)
    with Image.open(slide["maps"][0]) as picture:
        assert picture.width > 1000


# Packages that `make demo` does not install.
NOT_OF_THE_DEMO = [
    "geopandas",
    "huggingface_hub",
    "lightning",
    "numba",
    "peft",
    "plotly",
    "scanpy",
    "shapely",
]


@pytest.fixture(scope="module")
def demo(simulated, tmp_path_factory) -> tuple[Path, DemoResult, list[str]]:
    """The demo on less tissue: its folder, what it returned and what it said."""
    folder, said = tmp_path_factory.mktemp("demo") / "strank-demo", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        for name in NOT_OF_THE_DEMO:
            patch.setitem(sys.modules, name, None)
        patch.setattr(
            "strank.studies.demo.simulate_cohort",
            lambda folder, **_: shutil.copytree(simulated, folder),
        )
        return folder, run_demo(folder, seed=1, n_genes=40, say=said.append), said


def test_the_demo_writes_what_it_says(demo):
    folder, result, said = demo
    assert [line.split(":")[0] for line in said[1:]] == [
        "import",
        "embed",
        "fit",
        "predict",
        "predict",
        "evaluate",
    ]
    table = result.table.set_index("gene class")
    assert {"tumour", "stroma", "all"} <= set(table.index)
    assert table.loc["all", "genes"] == 40
    assert table.loc["all", "linear, list / truth"] > 0.3
    assert all(path.is_file() for path in result.maps)
    page = result.page.read_text()
    links = re.findall(r'(?:href|src)="\./([^"]+)"', page)
    assert {path.relative_to(folder).as_posix() for path in result.maps} <= {*links}
    assert [link for link in links if not (folder / link).exists()] == []
    assert f"<td>{table.loc['all', 'linear, list / truth']:.2f}</td>" in page
    assert f"strank model show {folder}/model --evaluation {folder}/evaluation\n" in page
    pd.testing.assert_frame_equal(
        pd.read_csv(folder / "table.csv"), result.table, atol=1e-4, check_dtype=False
    )


def examples() -> list[tuple[str, ...]]:
    """What `--help` shows of the files that the demo leaves, in the order of the work."""
    found = []
    waiting = [get_command(app)]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        for text in (command.help or "").split("[bold]Example:[/] strank ")[1:]:
            line = re.split(r"\n\s*\n|\n *\(", text)[0]
            if "strank-demo/" in line or line.startswith("report "):
                found.append(tuple(line.split()))
    # A report is of the benchmark before it.
    return sorted(found, key=lambda words: (words[0] == "report", words))


LONG = "benchmark", "network", "published", "evaluation-mlp", "heads", "slides"


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(words, id=" ".join(words), marks=[pytest.mark.slow] * bool({*LONG} & {*words}))
        for words in examples()
    ],
)
def test_the_examples_of_help_run_on_what_the_demo_leaves(demo, words, monkeypatch):
    """Networks are trained for a few epochs: what they learn is not looked at."""
    monkeypatch.chdir(demo[0].parent)
    for name, recipe in RECIPES.items():
        monkeypatch.setitem(RECIPES, name, replace(recipe, max_epochs=3))
    # Of four slides two are several, and the demo has tiles as dense as they are without --stride.
    given = [sorted(glob(word))[-2:] if "*" in word else [word] for word in words]
    if words[0] == "predict" and "--stride" not in words:
        given.append(["--stride", "200"])
    if words[0] == "benchmark":
        given.append(["--jobs", "1"])  # other processes have the epochs of users
    if words[0] == "benchmark" and "--losses" not in words:
        given.append(["--losses", "list,mse"])  # of many, two cost a fifth
    result = CliRunner().invoke(app, list(chain.from_iterable(given)))
    assert result.exit_code == 0, result.output


def test_class_table_by_hand():
    panel = ["a", "b"]
    scores = pd.DataFrame({"method": "linear, list", "gene": panel, "scc": [0.2, 0.4]})
    truth = anndata.AnnData(
        X=np.array([[1.0, 0], [2, 0], [3, 0]]),
        var=pd.DataFrame({"gene_class": ["tumour", "flat"]}, index=panel),
    )
    predicted = np.array([[3.0, 1], [2, 2], [1, 3]])
    table = class_table(scores, {"D1": {"linear, list": predicted}}, {"D1": truth}).set_index(
        "gene class"
    )
    assert table.loc["tumour"].tolist() == pytest.approx([1, 0.2, -1.0])
    assert table.loc["all", "linear, list / counts"] == pytest.approx(0.3)
    assert table.loc["all", "linear, list / truth"] == pytest.approx(-1.0)
    assert np.isnan(table.loc["flat", "linear, list / truth"])


@pytest.mark.slow
def test_real_tissue(her2st, tmp_path):
    result = five_steps(her2st, tmp_path, "C2,C3,C4", "C5", 50)
    summary = pd.DataFrame(result["evaluate"]["summary"]).set_index(["section", "method"])["scc"]
    assert any("patient C stands on both sides" in w for w in result["evaluate"]["warnings"])
    assert summary["C5", "linear, list"] > summary["C5", "centred ridge"]
    folds = run("evaluate", tmp_path / "cohort", "--folds", "section", "-o", tmp_path / "folds")
    scores = pd.DataFrame(folds["summary"]).pivot_table("scc", "section", "method")
    scores = scores.loc[["C2", "C3", "C4", "C5"]].mean()
    assert scores["linear, list"] >= 0.44
    assert scores["linear, list"] - scores["centred ridge"] >= 0.04
    assert result["predict"]["slides"][0]["n_tiles"] > 150
