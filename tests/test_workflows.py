"""What lies in workflows/ runs: Snakemake as it is, SLURM's script with a stand-in for `sbatch`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from strank.cli import app
from strank.simulate import CountDesign, TissueDesign, simulate_cohort

WORKFLOWS = Path(__file__).parents[1] / "workflows"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Make a folder with workflows and small files in the layout of the demo's."""
    folder = tmp_path_factory.mktemp("workflows")
    shutil.copytree(WORKFLOWS, folder / "workflows")
    small = {"tissue": TissueDesign(side_um=1000), "counts": CountDesign(shared=0.8)}
    made = folder / "strank-demo" / "st"
    names = simulate_cohort(made, n_patients=2, n_sections=1, n_genes=30, **small)
    assert names == ["A1", "B1"]
    manifest = folder / "workflows/profiles/test/slides.csv"
    listed = manifest.read_text(encoding="utf-8")
    demo = {f"{patient}1.jpg,0.8,{patient}" for patient in "ABCD"}
    assert {line.rpartition("/")[2] for line in listed.splitlines()[1:]} <= demo, "of the demo"
    manifest.write_text(listed.replace("C1", "A1").replace("D1", "B1"), encoding="utf-8")
    imported = CliRunner().invoke(
        app, ["import", "st", str(made), "-o", str(folder / "strank-demo/cohort")]
    )
    assert imported.exit_code == 0, imported.output
    return folder


@pytest.fixture(scope="module")
def results(work) -> Path:
    """Let Snakemake do all."""
    if (snakemake := shutil.which("snakemake")) is None:
        pytest.skip("needs snakemake, in an environment of its own (as in .ci/run)")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [snakemake, "-s", "workflows/Snakefile"]
    command += ["--workflow-profile", "workflows/profiles/test"]
    ended = subprocess.run(
        command, cwd=work, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    return work / "results"


@pytest.mark.slow
def test_snakemake_goes_from_a_cohort_to_maps_and_an_evaluation(results):
    slides = pd.read_csv(results / "slides/slides.csv")
    assert list(slides["name"]) == ["A1", "B1"]
    assert (slides["state"] == "done").all()
    assert list(slides["patient"]) == ["C", "D"], "of the list, carried along"
    for name in slides["name"]:
        assert (results / "slides" / name / "scores.h5ad").is_file()
    assert "B1" in (results / "slides/index.html").read_text(encoding="utf-8")
    assert "list" in (results / "evaluation/summary.csv").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_array_of_slurm_shares_the_slides_and_collects_them(results, work, monkeypatch):
    stubs = work / "stubs"
    stubs.mkdir()
    for name in ("strank", "sbatch"):
        stub = stubs / name
        call = f"json.dumps([{name!r}, *sys.argv[1:]])"
        lines = (
            f"#!{sys.executable}",
            "import json, sys",
            f"open('calls', 'a').write({call} + chr(10))",
        )
        stub.write_text("\n".join(lines), encoding="utf-8")
        stub.chmod(0o755)
    array = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_JOB_ID": "7"}
    outputs = []
    for task in ("5", "6"):
        given = array | {"SLURM_ARRAY_TASK_ID": task}
        path = f"{stubs}{os.pathsep}{os.environ['PATH']}"
        (work / "calls").unlink(missing_ok=True)
        script = ["bash", "workflows/slurm/predict.sbatch", "workflows/profiles/test/slides.csv"]
        subprocess.run(
            [*script, "results/model", "shared"],
            cwd=work,
            env=os.environ | given | {"PATH": path},
            check=True,
        )
        calls = [json.loads(line) for line in (work / "calls").read_text().splitlines()]
        called = {name: arguments for name, *arguments in calls}
        monkeypatch.chdir(work)
        for variable, value in given.items():
            monkeypatch.setenv(variable, value)
        ran = CliRunner().invoke(app, called["strank"])
        assert ran.exit_code == 0, ran.output
        outputs.append(called.get("sbatch"))
    first, second = outputs
    assert second is None, "one job collects"
    assert first[:2] == ["--dependency=afterany:7", "--wrap"]
    collected = CliRunner().invoke(app, first[2].split()[1:])
    assert collected.exit_code == 0, collected.output
    for name in ("A1", "B1"):
        alike = [work / folder / name / "tissue.png" for folder in ("shared", "results/slides")]
        assert alike[0].read_bytes() == alike[1].read_bytes()


def test_the_module_of_nextflow_gives_options_that_there_are():
    script = (WORKFLOWS / "nextflow/modules/local/strank/predict/main.nf").read_text(
        encoding="utf-8"
    )
    shown = CliRunner().invoke(app, ["predict", "--help"], env={"COLUMNS": "200"}).output
    flags = set(re.findall(r"(?<=\s)--[a-z-]+", script)) | set(re.findall(r'"(--[a-z-]+)', script))
    assert {"--model", "--output", "--mpp"} <= flags
    options = flags - {"--version"}
    assert all(option in shown for option in options), (options, shown)
