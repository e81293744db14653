"""What is published beside the code agrees with it, and the source archive is whole."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

from strank.version import __version__

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOL = PYPROJECT["project"], PYPROJECT["tool"]
URLS = PROJECT["urls"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> tarfile.TarFile:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    return tarfile.open(folder / f"strank-{__version__}.tar.gz")


def test_the_source_archive_has_what_its_makefile_and_pages_need(archive):
    names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "LICENSE", "CITATION.cff", "CHANGELOG.md", "SECURITY.md"} <= names
    assert {
        "docs/conf.py",
        "docs/demo-map.jpg",
        "src/strank/py.typed",
        "tests/conftest.py",
    } <= names
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("docs/_build")]


def test_no_link_of_the_description_is_relative(archive):
    metadata = archive.extractfile(f"strank-{__version__}/PKG-INFO").read().decode()
    links = re.findall(r"\]\(([^)]+)\)", metadata)
    assert len(links) == len(re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()))
    assert all(link.startswith(("https://", "#")) for link in links)
    assert f"]({URLS['Repository']}/blob/main/CITATION.cff)" in metadata


def test_every_file_says_the_same_version_and_address():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["repository-code"] == URLS["Repository"]
    assert citation["url"] == URLS["Documentation"]
    recipe = (ROOT / "recipe" / "meta.yaml").read_text()
    assert f'version = "{__version__}"' in recipe
    assert f"home: {URLS['Repository']}\n" in recipe
    leads = TOOL["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    owner = URLS["Repository"].removeprefix("https://github.com/")
    assert leads[0]["replacement"] == f"](https://raw.githubusercontent.com/{owner}/main/\\1)"
    assert leads[1]["replacement"] == f"]({URLS['Repository']}/blob/main/\\1)"


def test_the_recipe_needs_what_the_core_needs():
    needed = {f"- {name.replace('torch>', 'pytorch>')}" for name in PROJECT["dependencies"]}
    recipe = (ROOT / "recipe" / "meta.yaml").read_text()
    run = recipe.partition("  run:\n")[2].partition("\n\n")[0]
    listed = {line.strip().replace(" >=", ">=") for line in run.splitlines()}
    assert listed - {"- python>=3.11"} == needed


def test_workflows_are_yaml_and_run_on_every_python_that_is_promised():
    flows = {path.name: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/**/*.yml")}
    assert {"bug.yml", "docs.yml", "test.yml", "wish.yml"} <= set(flows)
    yaml.safe_load((ROOT / ".readthedocs.yaml").read_text())
    promised = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"]))
    assert flows["test.yml"]["jobs"]["test"]["strategy"]["matrix"]["python"] == promised
