"""What a command imports of what is heavy or optional; and what the core does without extras."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from strank import embed, fit, read_cohort
from strank.errors import InputError
from strank.io import find_st, read_st, write_sections

HEAVY = ("anndata", "pandas", "scipy", "sklearn", "torch")
# What AnnData imports where it is installed.
WITH_ANNDATA = ("dask", "xarray")
DRAWING = ("PIL", "matplotlib")
IMAGES = ("cv2", "openslide", "pyvips", "tifffile")
OTHERS = ("geopandas", "huggingface_hub", "lightning", "peft", "plotly", "scanpy", "shapely")
OTHERS += ("spatialdata", "tabulate", "timm", "torchmetrics", "torchvision", "transformers")
OPTIONAL = (*WITH_ANNDATA, *DRAWING, *IMAGES, *OTHERS)

CORE = {*HEAVY, *WITH_ANNDATA}
# In one process, one after the other: what a command may import those behind it may, too.
MAY_IMPORT: dict[str, set[str]] = {
    "--help": set(),
    "embed --help": set(),
    "encoders": set(),
    "embed cohort": set(),
    "model show model": set(),
    "fit cohort -o fitted --genes 3 --sections A1": CORE,
    "benchmark cohort -o benchmark --genes 3 --losses list,mse --jobs 1": CORE,
    "evaluate cohort --model fitted -o evaluated": CORE | {*DRAWING},
    "evaluate cohort --folds patient --genes 3 -o folds": CORE | {*DRAWING},
    "predict cohort/B1.h5ad --model fitted -o scores": CORE | {*DRAWING, *IMAGES},
}
ON_THE_CORE = [command for command in MAY_IMPORT if not command.startswith("predict")]

# Absent is what is not found; others ask `sys.modules` for it, where it must not stand as None.
_WITHOUT = """
import json, sys
from importlib.machinery import PathFinder
absent = json.loads(sys.argv[1])

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        gone = name.partition(".")[0] in absent
        return None if gone else super().find_spec(name, path, target)

sys.meta_path = [Core if finder is PathFinder else finder for finder in sys.meta_path]
"""
_RUN = """
import contextlib, io
from strank.cli import app
commands, watched = map(json.loads, sys.argv[2:])
found = {}
for command in commands:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            app(command.split())
        except SystemExit as end:
            code = end.code
    names = [name for name in watched if sys.modules.get(name) is not None]
    found[command] = [code, names, said.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture
def place(st_folder: Path, tmp_path: Path) -> Path:
    """A cohort with features, and a model."""
    sections = (read_st(st_folder, section=name) for name in find_st(st_folder))
    write_sections(sections, tmp_path / "cohort")
    embed(tmp_path / "cohort")
    cohort = read_cohort(tmp_path / "cohort", encoder="morphology")
    fit(cohort, n_genes=3).save(tmp_path / "model")
    return tmp_path


def python(code: str, absent: Iterable[str], *given: Iterable[str], cwd: Path) -> str:
    """Run code in a process of its own, where some packages are absent."""
    arguments = [json.dumps(list(names)) for names in (absent, *given)]
    command = [sys.executable, "-c", _WITHOUT + code, *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(place: Path, commands: Iterable[str], absent: Iterable[str] = ()) -> dict[str, list]:
    """Run commands: of each what it imported and what it said."""
    found = json.loads(python(_RUN, absent, commands, (*HEAVY, *OPTIONAL), cwd=place))
    assert [(command, said) for command, (code, _, said) in found.items() if code] == []
    return {command: [names, " ".join(said.split())] for command, (_, names, said) in found.items()}


def test_a_command_imports_what_it_needs(place: Path):
    found = run(place, MAY_IMPORT)
    assert "0 sections embedded, 2 were done before" in found["embed cohort"][1]
    too_much = {
        command: sorted({*names} - MAY_IMPORT[command]) for command, (names, _) in found.items()
    }
    assert {command: names for command, names in too_much.items() if names} == {}
    # What is looked for is really found where it is.
    last, _ = found[list(MAY_IMPORT)[-1]]
    assert {*HEAVY, *DRAWING, "cv2"} <= {*last}


def test_the_core_needs_no_extras(place: Path):
    found = run(place, ON_THE_CORE, (*OPTIONAL, "tensorboard"))
    told = "is drawn: pip install 'strank[plots]' (matplotlib is absent)"
    assert told in found[ON_THE_CORE[-1]][1]
    assert (place / "benchmark/summary.tex").is_file()


def test_the_synthetic_study_is_of_the_core(tmp_path: Path):
    code = "from strank.reproduce import synthetic; print(synthetic.__name__)"
    assert python(code, OPTIONAL, cwd=tmp_path) == "synthetic\n"


_PUBLIC = """
import json
import numpy as np
import strank
from anndata import AnnData
from strank.errors import InputError
from strank.evaluation.regions import find_regions, outlines

def told(of):
    try:
        of()
    except InputError as error:
        return str(error)

found = {
    f"{place.__name__}.{name}": told(lambda: getattr(place, name))
    for place in (strank, strank.io, strank.encoders)
    for name in place.__all__
}
regions, _ = find_regions(AnnData(np.zeros((3, 1))), ["a", "b", "a"])
found["column"] = regions["a"].tolist()
found["polygons"] = told(lambda: outlines("absent.geojson"))
found["encoder"] = told(lambda: strank.encoders.get_encoder("timm:resnet18"))
found["hub"] = told(lambda: strank.RankModel.from_pretrained("me/model"))
found["embed"] = told(lambda: strank.embed("absent", encoder="hf:a/b"))
print(json.dumps(found))
"""


def test_python_says_which_extra_a_name_needs(tmp_path: Path):
    found = json.loads(python(_PUBLIC, OPTIONAL, cwd=tmp_path))
    assert found.pop("column") == [True, False, True]
    assert found["strank.fit"] is found["strank.contrast"] is found["strank.embed"] is None
    images = "this needs cv2, openslide, pyvips, tifffile: pip install 'strank[images]'"
    assert found["strank.predict"] == images
    assert found["strank.io.read_visium"] == images
    assert found["polygons"] == "this needs shapely: pip install 'strank[plots]'"
    assert "this needs timm" in found["encoder"]
    assert "huggingface_hub: pip install 'strank[hub]'" in found["hub"]
    network = "this needs cv2, pyvips, transformers: pip install 'strank[encoders,images]'"
    assert found["embed"] == network


@pytest.mark.parametrize(
    ("options", "absent", "told"),
    [
        ({"head": "mlp"}, ["lightning"], "needs lightning: pip install 'strank[neural]'"),
        (
            {"encoder": "timm:resnet18", "finetune": "lora"},
            ["lightning", "cv2", "timm", "peft"],
            "needs lightning, cv2, timm, peft: "
            "pip install 'strank[encoders,finetune,images,neural]'",
        ),
        (
            {"encoder": "hf:a/b", "finetune": "full"},
            ["transformers", "timm", "peft"],
            "needs transformers: pip install 'strank[encoders]'",
        ),
    ],
)
def test_python_says_at_once_all_that_is_absent(cohort, monkeypatch, options, absent, told):
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError) as error:
        fit(cohort, **{"encoder": "mine", "n_genes": 3} | options)
    assert told in str(error.value)
