"""What keeps the house in order: a file is one meaning, a function one step, a name one thing."""

from __future__ import annotations

import ast
import importlib
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

import strank

HOUSE = Path(strank.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION = 560, 60


def test_no_file_is_longer_than_a_meaning():
    long = {
        str(path.relative_to(HOUSE)): n
        for path in FILES
        if (n := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert not long


def own_lines(function: ast.FunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    docs = function.body[0] if ast.get_docstring(function) else None
    of_docs = docs.end_lineno - docs.lineno + 1 if docs else 0
    return function.end_lineno - function.lineno + 1 - of_docs


def test_no_function_is_longer_than_a_screen():
    long = {
        f"{path.relative_to(HOUSE)}:{node.name}": n
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and (n := own_lines(node)) > LONGEST_FUNCTION
    }
    assert not long


def top_level_names(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {t.id for t in targets if isinstance(t, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_name_means_one_thing():
    homes = defaultdict(list)
    for path in FILES:
        # A command bears the name of what it calls.
        if path.parent.name != "cli":
            for name in top_level_names(path):
                homes[name].append(str(path.relative_to(HOUSE)))
    assert not {name: found for name, found in homes.items() if len(found) > 1}


def test_no_module_imports_itself_by_others():
    """Imports inside functions count, too."""
    graph = grimp.build_graph("strank", cache_dir=None)
    imports = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    # Raises CycleError, with the circle.
    TopologicalSorter(imports).prepare()


def test_benchmarks_import_what_there_is():
    """They are not run by the tests, so a name that moved would be missed."""
    found = 0
    for path in sorted((Path(__file__).parents[1] / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("strank"):
                module = importlib.import_module(str(node.module))
                absent = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not absent, (path.name, node.module, absent)
                found += 1
    assert found > 30
