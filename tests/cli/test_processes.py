"""A command that is told to end, or killed, ends with all that works for it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="processes are found in /proc, which only Linux has"
)
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL
# Nobody waits for so long, but on a machine that many share.
LONG = 120

# A command that has a child do the work, and one that C does not let go of.
COMMANDS = """
import ctypes, os, sys, time
from multiprocessing import get_context
from strank import processes
from strank.cli import app, main

def work(folder, parent):
    processes.follow(parent)
    open(f"{folder}/child", "x").close()
    time.sleep(600)

@app.command("wait")
def wait(folder: str) -> None:
    with processes.starting():
        get_context("spawn").Process(target=work, args=(folder, os.getpid())).start()
    try:
        time.sleep(600)
    finally:
        open(f"{folder}/tidied", "x").close()

@app.command("hang")
def hang(folder: str) -> None:
    lock, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
    libc.pthread_mutex_lock(lock)
    open(f"{folder}/child", "x").close()
    libc.pthread_mutex_lock(lock)

@app.command("missed")
def missed(folder: str) -> None:
    open(f"{folder}/child", "x").close()
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        raise RuntimeError("a child was killed")

class Slow:
    def __init__(self, folder):
        self.folder = folder
    def __del__(self):
        open(f"{self.folder}/child", "x").close()
        time.sleep(600)

@app.command("lost")
def lost(folder: str) -> None:
    Slow(folder)
    time.sleep(600)

if __name__ == "__main__":
    processes._HEARD = 1.0
    main()
"""


class Started:
    """A command with all its processes, which a mark in their environment tells."""

    def __init__(self, *command: object) -> None:
        self.mark = uuid.uuid4().hex.encode()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        self.main = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env={**environment, "STRANK_TEST": self.mark.decode()},
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        for number in self.alive():
            os.kill(number, KILL)
        self.main.communicate()

    def alive(self) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = self.mark in (folder / "environ").read_bytes()
                if marked and b"State:\tZ" not in (folder / "status").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                pass
        return found

    def until(self, begun: Callable[[], bool]) -> None:
        end = time.monotonic() + LONG
        while not begun():
            assert self.main.poll() is None, self.main.stderr.read()
            assert time.monotonic() < end, "it did not begin"
            time.sleep(0.05)

    def tell(self, number: int, *, all_of_them: bool) -> str:
        """Tell it to end, as a terminal (all of them) or `kill` does; what it said."""
        (os.killpg if all_of_them else os.kill)(self.main.pid, number)
        _, said = self.main.communicate(timeout=LONG)
        end = time.monotonic() + LONG / 4
        while self.alive() and time.monotonic() < end:
            time.sleep(0.05)
        assert self.alive() == []
        return said


def code_of(number: int) -> int:
    return -number if number == KILL else 128 + number


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "commands.py"
    path.write_text(COMMANDS)
    return path


TOLD = [(TERM, False), (TERM, True), (INT, False), (INT, True), (KILL, False)]


@pytest.mark.parametrize(("number", "all_of_them"), TOLD)
def test_children_end_with_their_command_which_says_so_in_one_line(
    script, tmp_path, number, all_of_them
):
    with Started(script, "wait", tmp_path) as started:
        started.until((tmp_path / "child").exists)
        said = started.tell(number, all_of_them=all_of_them)
        assert started.main.returncode == code_of(number)
    assert (tmp_path / "tidied").exists() == (number != KILL)
    if number != KILL:
        by = {TERM: "SIGTERM", INT: "Ctrl-C"}[number]
        assert said == f"Error: stopped by {by}; what was finished is kept\n"


@pytest.mark.parametrize("number", [TERM, INT])
def test_what_does_not_come_back_from_c_ends_too(script, tmp_path, number):
    with Started(script, "hang", tmp_path) as started:
        started.until((tmp_path / "child").exists)
        said = started.tell(number, all_of_them=False)
        assert started.main.returncode == code_of(number)
    assert said.count("Error: stopped by ") == said.count("\n") == 1


@pytest.mark.parametrize("command", ["missed", "lost"])
def test_an_end_that_is_taken_for_something_else_is_the_end(script, tmp_path, command):
    with Started(script, command, tmp_path) as started:
        started.until((tmp_path / "child").exists)
        said = started.tell(TERM, all_of_them=False)
        assert started.main.returncode == code_of(TERM)
    assert said == "Error: stopped by SIGTERM; what was finished is kept\n"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Four small sections without features, and with them."""
    pytest.importorskip("cv2")
    from strank.encoders.embedding import embed
    from strank.io import find_st, read_st, write_sections
    from strank.simulate import TissueDesign, simulate_cohort

    root = tmp_path_factory.mktemp("cohort")
    small = TissueDesign(side_um=1500, um_per_pixel=1.2)
    simulate_cohort(root / "st", n_patients=4, n_sections=1, n_genes=24, seed=3, tissue=small)
    sections = [read_st(root / "st", section=name) for name in find_st(root / "st")]
    write_sections(sections, root / "bare")
    shutil.copytree(root / "bare", root / "cohort")
    embed(root / "cohort")
    return root


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def embedding(root: Path, work: Path) -> tuple[list, str, str]:
    shutil.copytree(root / "bare", work / "cohort", dirs_exist_ok=True)
    command = ["embed", work / "cohort", "--workers", 2]
    return command, "cohort/features/*/*.h5ad", "cohort/features/*/*.h5ad"


def comparing(root: Path, work: Path) -> tuple[list, str, str]:
    command = ["benchmark", root / "cohort", "-o", work / "out", "--jobs", 2, "--genes", 12]
    return command, "out/**/*.h5ad", "out/summary.csv"


def training(root: Path, work: Path) -> tuple[list, str, str]:
    command = ["fit", root / "cohort", "-o", work / "out", "--head", "linear", "--epochs", 400]
    command += ["--recipe", "default", "--devices", 2, "--genes", 4]
    return command, "out.training/*/*", "out/head.safetensors"


# Of the ordinary tests; all by `make torture`.
_SOME = {(embedding, TERM, False)}
_LATER = pytest.mark.skipif(not os.environ.get("TORTURE"), reason="many minutes: make torture")
ENDS = [
    pytest.param(*case, marks=[pytest.mark.slow, *([] if case in _SOME else [_LATER])])
    for case in ((work, *told) for work in (embedding, comparing, training) for told in TOLD)
]


@pytest.mark.parametrize(("work", "number", "all_of_them"), ENDS)
def test_a_command_ends_with_its_processes_and_a_second_run_comes_to_the_same(
    cohort, tmp_path, work, number, all_of_them
):
    pytest.importorskip("lightning")
    (tmp_path / "killed").mkdir()
    command, begun, made = work(cohort, tmp_path / "killed")
    with Started("-m", "strank", *command) as started:
        started.until(lambda: any((tmp_path / "killed").glob(begun)))
        assert len(started.alive()) > 1
        said = started.tell(number, all_of_them=all_of_them)
        assert started.main.returncode == code_of(number)
        assert "Traceback" not in said
        assert said.count("Error: ") == (number != KILL)
    if number != KILL:
        return
    (tmp_path / "whole").mkdir()
    found = []
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        again, _, _ = work(cohort, folder)
        subprocess.run([sys.executable, "-m", "strank", *map(str, again)], check=True)
        found.append(contents(folder, made))
        left = [path for path in folder.rglob(".*") if "claim" not in path.name]
        assert left == []
    assert found[0] == found[1] != {}
