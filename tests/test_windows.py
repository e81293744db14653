"""What Windows lacks, taken away here: forks, POSIX modules, and UTF-8 as the usual encoding."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import strank
from strank.files import safe_name

HOUSE = Path(strank.__file__).parent

# Other packages ask which platform it is, so they are imported before anything is taken away.
_LACKING = """
import importlib, os, sys
from pathlib import Path
names = {names!r}
for name in names:
    importlib.import_module(name)
for name in ("register_at_fork", "fork", "sched_getaffinity", "getuid", "uname", "O_NOFOLLOW"):
    vars(os).pop(name, None)
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in [name for name in sys.modules if name.partition(".")[0] == "strank"]:
    del sys.modules[name]
for name in names:
    importlib.import_module(name)
{then}
"""


def on_windows(names: list[str], then: str, **options: object) -> str:
    """Import modules and run code in a process without what Windows lacks."""
    narrow = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    process = subprocess.run(
        [sys.executable, "-c", _LACKING.format(names=names, then=then)],
        env=os.environ | narrow | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=False,
        **options,
    )
    assert process.returncode == 0, process.stderr.decode("cp1252")
    return process.stdout.decode("cp1252")


def modules() -> list[str]:
    paths = (path.relative_to(HOUSE.parent).with_suffix("") for path in HOUSE.rglob("*.py"))
    names = {".".join(path.parts).removesuffix(".__init__") for path in paths}
    return sorted(names - {"strank.__main__"})


def test_every_module_is_imported(tmp_path):
    then = """
import numpy as np
from PIL import Image
from strank.slides.slide import open_slide, thumbnail
Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save("slide.png")
print(thumbnail(open_slide(Path("slide.png"), 1.0), 2.0)[0].shape)
"""
    assert on_windows(modules(), then, cwd=tmp_path).strip() == "(20, 25, 3)"


def test_names_of_any_alphabet_are_written_and_shown(tmp_path):
    names = ["Müller", "Παπαδόπουλος", "患者一", "🧬"]
    (tmp_path / "names.json").write_text(json.dumps(names, ensure_ascii=False), encoding="utf-8")
    then = """
from strank.cli.console import finish
from strank.files import read_json, write_json
write_json(Path("again.json"), read_json(Path("names.json")))
finish({"names": read_json(Path("again.json"))}, as_json=True, lines=[])
import strank.cli
strank.cli.app = lambda: finish({}, as_json=False, lines=read_json(Path("again.json")))
strank.cli.main()
"""
    told = on_windows(["strank.cli", "strank.files"], then, cwd=tmp_path)
    again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
    found, end = json.JSONDecoder().raw_decode(told)
    assert found["names"] == again == names
    assert told[end:].split()[0] == "Müller"


def test_text_is_read_and_written_as_utf_8():
    """Where no encoding is named it is the machine's: files would not be read elsewhere."""
    unsaid = [
        f"{path.relative_to(HOUSE)}:{call.lineno}"
        for path in HOUSE.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and _is_text_of_any_encoding(call)
    ]
    assert not unsaid


def _is_text_of_any_encoding(call: ast.Call) -> bool:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    words = {a.value for a in call.args if isinstance(a, ast.Constant)}
    named = "utf-8" in words or any(k.arg == "encoding" for k in call.keywords)
    if name == "open":
        # Others that are called so (slides, archives) take no such mode.
        return bool(words & {"r", "w", "a", "x", "r+", "rt", "wt"}) and not named
    return name in ("read_text", "write_text") and not named


@pytest.mark.parametrize("name", ["con", "NUL", "aux.h5ad", "Com1", "lpt9.x.y"])
def test_no_file_is_called_as_a_device(name):
    assert safe_name(name) == f"%{ord(name[0]):02X}{name[1:]}"


@pytest.mark.parametrize("name", ["control", "CON1", "COM", "com10", "X.con", "a:b|c?", 'a"<b>*\\'])
def test_other_names_have_no_letter_that_windows_refuses(name):
    assert not set(safe_name(name)) & set('<>:"/\\|?*')
    assert safe_name(name)[0] == name[0]
