"""Two of us, one output: the second is told at once, and touches nothing."""

import pytest
from typer.testing import CliRunner

from strank.cli import app
from strank.files import claimed

# Of what is not there, so that nothing can have been computed.
COMMANDS = {
    "fit": ["fit", "nowhere"],
    "network": ["fit", "nowhere", "--head", "mlp"],
    "benchmark": ["benchmark", "nowhere"],
    "predict": ["predict", "slide.png", "--model", "nowhere"],
    "several": ["predict", "a.png", "b.png", "--model", "nowhere"],
    "evaluate": ["evaluate", "nowhere", "--folds", "section"],
    "contrast": ["contrast", "nowhere.h5ad", "--groups", "nowhere.geojson"],
    "pull": ["model", "pull", "nowhere"],
    "hest-benchmark": ["hest-benchmark", "nowhere", "--embeddings", "nowhere"],
    "synthetic": ["reproduce", "synthetic"],
    "demo": ["demo"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_second_is_told_in_one_line(name, tmp_path):
    out = tmp_path / "out"
    with claimed(out):
        result = CliRunner().invoke(app, [*COMMANDS[name], "-o", str(out)])
        assert result.exit_code == 2
        told = f"Error: {out}: another run is writing there; wait for it, or choose another -o\n"
        assert result.stderr == told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_cannot_be_is_told_before_the_work(name, tmp_path):
    (tmp_path / "file").write_text("thesis")
    result = CliRunner().invoke(app, [*COMMANDS[name], "-o", str(tmp_path / "file" / "out")])
    assert result.exit_code == 2
    assert "file: cannot write there" in result.stderr
    assert (tmp_path / "file").read_text() == "thesis"
