"""``strank model show``, ``push`` and ``pull`` as a user types them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from strank import evaluate, fit
from strank.cli import app


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, ["model", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def model(cohort, tmp_path):
    train = {name: cohort[name] for name in ("A1", "B1")}
    trained = fit(train, encoder="mine", n_genes=3)
    trained.save(tmp_path / "model")
    evaluate(trained, {"C1": cohort["C1"]}, train=train).write(tmp_path / "evaluation")
    return tmp_path / "model"


def test_show_prints_the_card(model, tmp_path):
    text = run("show", model).stdout
    assert "What not to use it for" in text
    assert "library_name" not in text
    assert "Not evaluated." in text
    plain = run("show", model, "--markdown", "--evaluation", tmp_path / "evaluation").stdout
    assert plain.startswith("---\nlibrary_name: strank\n")
    assert "| centred ridge |" in plain
    options = ["--json", "--evaluation", tmp_path / "evaluation"]
    told = json.loads(run("show", model, *options).stdout)
    assert told["card"] == plain.removesuffix("\n")
    assert len(told["genes"]) == 3
    assert told["evaluation"][-1]["section"] == "mean"


def test_the_card_of_a_damaged_model_is_not_shown(model):
    weights = model / "head.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "damaged (its checksum is not that in model.json)" in run("show", model, code=2).stderr


def test_push_and_pull(model, tmp_path, hub_server):
    result = run("push", model, "me/model", "--license", "mit")
    assert f"The model is at {hub_server.address}/me/model" in result.stdout
    assert "license: mit" in hub_server.repos["me/model"]["README.md"].decode()
    told = run("pull", "me/model", "-o", tmp_path / "back", "--revision", "v1", "--json").stdout
    assert json.loads(told)["model"] == str(tmp_path / "back")
    assert (tmp_path / "back/model.json").read_bytes() == (model / "model.json").read_bytes()
    result = run("push", model, tmp_path / "there")
    assert "Note: the card names no licence" in result.stderr
    assert (tmp_path / "there/README.md").read_text().startswith("---\n")


def test_refusals_are_one_line(model, tmp_path, hub_server):
    for arguments, told in {
        ("show", tmp_path / "none"): "no such model folder",
        ("show", model, "--evaluation", tmp_path / "none"): "evaluation.json: no such file",
        ("pull", "me/none", "-o", tmp_path / "b"): "me/none: no such model (404)",
        ("push", model, "./x", "--private", "--license", "mit"): "--private does not apply",
        ("push", tmp_path, "me/x", "--license", "mit"): "model.json: no such file",
        ("pull", "./none", "-o", tmp_path / "b", "--revision", "v1"): "which has no --revision",
    }.items():
        result = run(*arguments, code=2)
        assert told in result.stderr
        assert result.stdout == ""
