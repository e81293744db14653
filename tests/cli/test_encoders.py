"""``strank encoders``: the table, for people and for machines."""

from __future__ import annotations

import json
import subprocess
import sys

from typer.testing import CliRunner

from strank.cli import app
from strank.encoders.catalogue import CATALOGUE


def _run(*arguments: str):
    result = CliRunner().invoke(app, ["encoders", *arguments], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_table_names_licence_gate_and_source():
    lines = {line.split("│")[1].strip(): line for line in _run().splitlines() if "│" in line}
    assert set(lines) == {"morphology", *CATALOGUE}
    for part in ("1536", "0.500", "224", "CC-BY-NC-ND-4.0", "yes", "MahmoodLab/UNI2-h"):
        assert part in lines["uni2-h"]


def test_json_has_everything():
    rows = {row["name"]: row for row in json.loads(_run("--json"))["encoders"]}
    assert rows["conch"]["gated"] is True
    assert rows["conch"]["citation"].startswith("Lu et al. 2024")
    assert (rows["h-optimus-0"]["precision"], rows["h-optimus-0"]["licence"]) == (
        "fp16",
        "Apache 2.0",
    )


def test_listing_needs_no_torch():
    code = (
        "import sys; from strank.cli.embed import encoders; encoders(False);"
        "heavy = {'torch', 'timm', 'transformers', 'lazyslide_models'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
