"""``strank hest download`` as a user types it, against a hub on localhost."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from strank.cli import app


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["hest", "download", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def hub(hub_server):
    hub_server.repos["MahmoodLab/hest-bench"] = {"IDC/var_50genes.json": b"{}", "PRAD/a": b"a"}
    hub_server.repos["MahmoodLab/hest"] = {"st/TENX99.h5ad": b"x", "HEST_v1_3_0.csv": b"id\n"}
    return hub_server


def test_tasks_and_samples(hub, tmp_path):
    told = run("--task", "IDC,PRAD", "-o", tmp_path / "b").stdout
    assert f"Next: strank import hest-bench {tmp_path / 'b/IDC'} -o cohort" in told
    assert (tmp_path / "b/PRAD/a").read_bytes() == b"a"
    told = run("--id", "TENX99", "-o", tmp_path / "h", "--revision", "v1", "--json").stdout
    assert json.loads(told)["folders"] == [str(tmp_path / "h")]
    assert (tmp_path / "h/st/TENX99.h5ad").read_bytes() == b"x"


def test_refusals_are_one_line(hub, tmp_path):
    for options, told in {
        (): "give either --task or --id",
        ("--task", "IDC", "--id", "TENX99"): "give either --task or --id",
        ("--task", "BRCA"): "no task BRCA; there are IDC, PRAD",
        ("--task", "IDC", "--revision", "v2"): "no such revision (404)",
    }.items():
        result = run(*options, "-o", tmp_path / "b", code=2)
        assert f"Error: {told}" in result.stderr.replace("MahmoodLab/hest-bench: ", "")
        assert result.stdout == ""
    hub.fail["/resolve/"] = 403, {"X-Error-Code": "GatedRepo"}
    told = run("--task", "IDC", "-o", tmp_path / "b", code=2).stderr
    assert "accept its licence at https://huggingface.co/datasets/MahmoodLab/hest-bench" in told
    assert "hf_" not in told
