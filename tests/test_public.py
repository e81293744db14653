"""The public face: each name once, documented, what it should be, and nothing heavy until used."""

from __future__ import annotations

import ast
import doctest
import inspect
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest

import strank

NAMESPACES = ("encoders", "functional", "io", "losses", "metrics", "pl", "report", "reproduce")
VERBS = (
    "benchmark",
    "contrast",
    "cross_validate",
    "embed",
    "evaluate",
    "fit",
    "hest_benchmark",
    "predict",
    "read_cohort",
)


def public(module) -> dict[str, object]:
    names = [name for name in module.__all__ if not name.startswith("__")]
    return {name: getattr(module, name) for name in names}


def everything() -> list[str]:
    found = pkgutil.walk_packages(strank.__path__, "strank.")
    return [module.name for module in found if module.name != "strank.__main__"]


HANDED_ON = [
    (module.__name__, name)
    for module in (strank, *(import_module(f"strank.{name}") for name in NAMESPACES))
    for name in public(module)
    if (module.__name__, name) not in {("strank", namespace) for namespace in NAMESPACES}
]


def test_every_public_name_is_what_it_should_be_after_all_has_been_imported():
    for name in everything():
        import_module(name)
    for name in NAMESPACES:
        assert inspect.ismodule(getattr(strank, name))
    for name in VERBS:
        assert inspect.isfunction(getattr(strank, name)), name
    for home, name in HANDED_ON:
        found = getattr(import_module(home), name)
        assert not inspect.ismodule(found), f"{home}.{name} is a module"


def test_no_public_name_stands_in_two_namespaces():
    names = [name for _, name in HANDED_ON]
    assert sorted(names) == sorted(set(names))


def test_no_module_bears_the_name_of_a_public_name_beside_it():
    beside = {f"{home}.{name}" for home, name in HANDED_ON}
    assert not beside & set(everything())


@pytest.mark.parametrize(("home", "name"), HANDED_ON)
def test_every_public_name_has_a_docstring_with_an_example(home: str, name: str):
    thing = getattr(import_module(home), name)
    if not callable(thing):
        return
    assert doctest.DocTestParser().get_examples(inspect.getdoc(thing) or ""), f"{home}.{name}"


# Nobody makes these: the examples of what returns them show them.
RETURNED = {
    *("encoders.embedding.Embedded", "evaluation.fold_change.Contrast"),
    *("evaluation.held_out.Evaluation", "io.hest_bench.HestTask", "metrics.ceiling.Ceiling"),
    *("report.benchmark.Report", "slides.slide.Slide", "studies.synthetic.study.StudyResult"),
    *("studies.benchmark.runner.BenchmarkResult", "studies.hest_benchmark.HestBenchmarkResult"),
    "studies.reproduce.tables.Reproduction",
}


def test_whatever_the_reference_lists_has_an_example_that_runs():
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    for name in set(re.findall(r"^   ([\w.]+)$", page, re.M)) - RETURNED:
        import_module(f"strank.{name}".rpartition(".")[0])
        thing = attrgetter(name)(strank)
        if callable(thing):
            examples = doctest.DocTestParser().get_examples(inspect.getdoc(thing) or "")
            assert any(doctest.SKIP not in example.options for example in examples), name


def test_the_reference_lists_every_public_name_and_none_that_is_not():
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    listed = re.findall(r"^   ([\w.]+)$", page, re.M)
    names = {f"{home}.{name}".removeprefix("strank.") for home, name in HANDED_ON}
    assert sorted(listed) == sorted(set(listed))
    assert names <= set(listed)
    for name in listed:
        import_module(f"strank.{name}".rpartition(".")[0])
        attrgetter(name)(strank)


def test_every_page_stands_in_the_contents():
    docs = Path(__file__).parents[1] / "docs"
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in docs.rglob("*.md")}
    contents = re.findall(
        r"^```\{toctree\}\n(.*?)^```", (docs / "index.md").read_text(), re.M | re.S
    )
    listed = [line for block in contents for line in block.split("\n") if line and line[0] != ":"]
    assert sorted(listed) == sorted(pages - {"index"})


def used_in(code: str) -> set[str]:
    """Names of strank that a block of code imports, or calls by their full name."""
    found = set(re.findall(r"\bstrank(?:\.[A-Za-z]\w*)+", code))
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "strank":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_pages_use_names_that_there_are():
    """Tutorials are run by `make docs` only, so a name that moved would be missed here."""
    root, used = Path(__file__).parents[1], set()
    of_python = re.compile(r"^```(?:python|\{code-cell\})\n(?::tags:.*\n)?(.*?)^```", re.M | re.S)
    for page in (root / "README.md", *(root / "docs").rglob("*.md")):
        for code in of_python.findall(page.read_text()):
            used |= used_in(code)
    assert len(used) > 30
    for name in used:
        pkgutil.resolve_name(name)


def test_importing_strank_imports_nothing_heavy():
    heavy = ("torch", "anndata", "numpy", "pandas", "scipy", "sklearn", "matplotlib")
    code = f"import sys, strank; dir(strank); print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
