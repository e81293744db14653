"""The commands as a user types them: what they print, write, and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import pandas as pd
import pytest
from typer.main import get_command
from typer.testing import CliRunner

import strank
from strank.cli import app


def run(*arguments: object, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return result


def refuse(*arguments: object) -> str:
    """Run a command that must end with exit code 2 and one line on stderr."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.output
    return errors[0]


@pytest.fixture
def cohort(st_folder, tmp_path):
    run("import", "st", st_folder, "-o", tmp_path / "cohort")
    run("embed", tmp_path / "cohort")
    return tmp_path / "cohort"


def test_help_shows_the_workflow_in_order_and_every_command_an_example():
    text = run("--help").output
    work = "import", "embed", "fit", "evaluate", "benchmark", "predict", "contrast", "demo"
    positions = [text.index(f"│ {command} ") for command in work]
    assert positions == sorted(positions)
    for command in (["import", "st"], ["embed"], ["fit"], ["evaluate"], ["predict"], ["demo"]):
        assert "Example: strank" in run(*command, "--help").output
    assert run("--version").output == f"strank {strank.__version__}\n"


def commands(group: Any = None, *names: str) -> Iterator[tuple[str, ...]]:
    """All that can be called, with the groups."""
    group = group or get_command(app)
    yield names
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)


def test_flags_take_no_value():
    called = list(commands())
    assert ("import", "visium-hd") in called
    for command in called:
        text = run(*command, "--help").output
        assert "--help" in text
        assert "bool" not in text.lower(), command


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("pre", "predict"), ("import xen", "xenium"), ("fit --fine", "--finetune")],
)
def test_the_shell_completes(typed, offered):
    words = ["strank", *typed.split()]
    environment = {
        "_STRANK_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    told = CliRunner().invoke(app, prog_name="strank", env=environment)
    assert told.stdout.split() == [offered]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from strank.cli import app; from typer.testing import CliRunner;"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0;"
        "import strank; print(strank.__version__);"
        "heavy = {'torch', 'numpy', 'pandas', 'anndata', 'cv2', 'sklearn', 'matplotlib'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_extra_is_named(st_folder, tmp_path):
    code = "import sys; sys.modules['cv2'] = None; from strank.cli import main; main()"
    arguments = ["import", "st", str(st_folder), "-o", str(tmp_path / "cohort")]
    told = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert told.returncode == 2
    assert told.stderr == "Error: this needs cv2: pip install 'strank[images]'\n"
    assert told.stdout == ""


def test_evaluation_needs_no_pictures(cohort, tmp_path):
    code = "import sys; sys.modules['matplotlib'] = None; from strank.cli import main; main()"
    arguments = ["evaluate", str(cohort), "--folds", "section", "--genes", "3", "-o"]
    command = [sys.executable, "-c", code, *arguments, str(tmp_path / "ev")]
    told = subprocess.run(command, capture_output=True, text=True)
    assert told.returncode == 0
    assert "no calibration.png is drawn: pip install 'strank[plots]'" in told.stderr
    assert (tmp_path / "ev/calibration.csv").is_file()
    assert not (tmp_path / "ev/calibration.png").exists()


def test_the_five_steps(cohort, tmp_path):
    assert "0 sections embedded, 2 were done before" in run("embed", cohort).stdout
    run("fit", cohort, "-o", tmp_path / "model", "--genes", 4, "--sections", "A1")
    told = run("evaluate", cohort, "--model", tmp_path / "model", "-o", tmp_path / "ev")
    # Names are broken into lines where the table is wide.
    assert {"centred", "within", "library"} <= set(told.stdout.split())
    assert "Note: within section: strips of a section" in told.stderr
    scores = pd.read_csv(tmp_path / "ev/scores.csv")
    assert scores["section"].unique().tolist() == ["B1"]
    folds = run("evaluate", cohort, "--folds", "section", "--genes", 3, "-o", tmp_path / "ev2")
    assert "leave one section out" in folds.stdout
    run("predict", cohort / "B1.h5ad", "--model", tmp_path / "model", "-o", tmp_path / "p")
    predictions = anndata.read_h5ad(tmp_path / "p/scores.h5ad")
    assert predictions.n_vars == 4
    assert len(list((tmp_path / "p").glob("*.png"))) == 5  # four genes and the tissue


def test_json_on_stdout_is_all_there_is(cohort, st_folder, tmp_path):
    again = json.loads(run("import", "st", st_folder, "-o", tmp_path / "c2", "--json").stdout)
    assert again["sections"][0]["spots"] == 25
    assert json.loads(run("embed", cohort, "--json").stdout)["done_before"] == ["A1", "B1"]
    fitted = run("fit", cohort, "-o", tmp_path / "m", "--genes", 3, "--json").stdout
    assert json.loads(fitted)["n_genes"] == 3
    told = run(
        "evaluate", cohort, "--folds", "patient", "-o", tmp_path / "e", "--json", "--genes", 3
    )
    assert len(json.loads(told.stdout)["summary"]) == 18
    union = json.loads(
        run("fit", cohort, "-o", tmp_path / "u", "--genes", "all", "--union", "--json").stdout
    )
    assert "8 that any section measures; 0 not in all" in union["provenance"]["panel_choice"]
    image = st_folder / "images/A1.jpg"
    options = ["--model", tmp_path / "m", "-o", tmp_path / "p", "--mpp", 4.4, "--json"]
    (slide,) = json.loads(run("predict", image, *options).stdout)["slides"]
    assert slide["n_genes"] == 3


def test_json_says_what_was_noted_and_written(cohort, st_folder, tmp_path, documented):
    assert {name.split()[0] for name in documented} == {names[0] for names in commands() if names}
    told = run(
        "evaluate", cohort, "--folds", "patient", "-o", tmp_path / "e", "--genes", 3, "--json"
    )
    found = json.loads(told.stdout)
    assert found["schema"] == 1
    assert found["strank_version"] == strank.__version__
    assert found["command"] == "evaluate"
    noted = [line for line in told.stderr.splitlines() if line.startswith("Note: ")]
    assert len(noted) > 1
    assert [f"Note: {text}" for text in found["warnings"]] == noted
    assert {*map(Path, found["outputs"])} == {*(tmp_path / "e").iterdir()}
    # What one command noted is no warning of the next.
    again = json.loads(run("import", "st", st_folder, "-o", tmp_path / "c", "--json").stdout)
    assert again["command"] == "import st"
    assert again["warnings"] == []
    assert again["outputs"] == [str(tmp_path / "c" / f"{name}.h5ad") for name in ("A1", "B1")]


def test_import_refuses_and_writes_nothing(st_folder, tmp_path):
    out = tmp_path / "cohort"
    assert "no such folder" in refuse("import", "st", tmp_path / "none", "-o", out)
    (st_folder / "images/B1.jpg").write_bytes((st_folder / "images/B1.jpg").read_bytes()[:5000])
    assert "B1.jpg: damaged or truncated" in refuse("import", "st", st_folder, "-o", out)
    assert not out.exists()
    (st_folder / "counts/B1.tsv.gz").unlink()
    assert "nothing in counts/" in refuse("import", "st", st_folder, "-o", out)


def test_unwritable_outputs_are_refused(cohort, st_folder, tmp_path):
    (tmp_path / "file").touch()
    bad = tmp_path / "file" / "out"
    run("fit", cohort, "-o", tmp_path / "model", "--genes", 3)
    for command in (
        ["import", "st", st_folder],
        ["fit", cohort, "--genes", 3],
        ["evaluate", cohort, "--folds", "section"],
        ["predict", cohort / "A1.h5ad", "--model", tmp_path / "model"],
        ["demo"],
    ):
        assert "file" in refuse(*command, "-o", bad)


def test_other_refusals(cohort, st_folder, tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    run("fit", cohort, "-o", model, "--genes", 3)
    assert "no encoder 'unicorn'" in refuse("embed", cohort, "--encoder", "unicorn")
    options = ["-o", out, "--finetune", "lora", "--union"]
    assert "--union is not for --finetune" in refuse("fit", cohort, *options)
    assert "no section Z1; there are A1, B1" in refuse("fit", cohort, "-o", out, "--sections", "Z1")
    assert "900 genes asked for" in refuse("fit", cohort, "-o", out, "--genes", 900)
    assert "give either --model or --folds" in refuse("evaluate", cohort, "-o", out)
    options = ["-o", out, "--genes", 3]
    assert "are the model's own" in refuse("evaluate", cohort, "--model", model, *options)
    options = ["-o", out, "--train", cohort]
    assert "--train goes with --model" in refuse("evaluate", cohort, "--folds", "patient", *options)
    assert "no folds by 'spot'" in refuse("evaluate", cohort, "--folds", "spot", "-o", out)
    one = refuse("evaluate", cohort, "--folds", "patient", "--sections", "A1", "-o", out)
    assert "folds by patient need at least two of them; this cohort has 1" in one
    assert "trained on all of its sections" in refuse(
        "evaluate", cohort, "--model", model, "-o", out
    )
    assert "no such model folder" in refuse(
        "predict", cohort / "A1.h5ad", "--model", tmp_path / "none", "-o", out
    )
    image = st_folder / "images/A1.jpg"
    assert "the file does not say its µm per pixel" in refuse(
        "predict", image, "--model", model, "-o", out
    )
    options = ["--model", model, "-o", out, "--mpp", 500]
    assert "window of 100 µm is 0 pixels wide" in refuse("predict", image, *options)
    assert "the model has no NOPE" in refuse(
        "predict", cohort / "A1.h5ad", "--model", model, "-o", out, "--genes", "NOPE"
    )
    (model / "head.safetensors").write_bytes(b"")
    assert "damaged" in refuse("predict", cohort / "A1.h5ad", "--model", model, "-o", out)
    assert "no name in ','" in refuse("fit", cohort, "-o", tmp_path / "new", "--sections", ",")
    assert not list(out.glob("*")) if out.exists() else True
