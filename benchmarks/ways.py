"""What the ways of a user cost: processor time, peak memory, and what the time goes to.

    python benchmarks/ways.py ../shared/data/her2st
    python benchmarks/ways.py ../shared/data/her2st --beside 43c839e --repeats 5

Each command runs in processes of its own, one thread each, and with ``--beside`` in turn with the
same command at another commit, which has its own copies of what it reads. Time is that of the
processor, of all processes of a command together, and the median of the repeats; memory is the
most of any process. What it goes to is of one more run of this tree, each moment counted for the
innermost module of strank that is at work, or for imports.
"""

from __future__ import annotations

import argparse
import compileall
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir, contextmanager
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# In the order in which each finds what the ones before have made; then what each makes anew.
WAYS = {
    "help": ("--help", None),
    "import": ("import st DATA -o cohort", "cohort"),
    "embed": ("embed cohort --encoder morphology", "cohort/features"),
    "embed again": ("embed cohort --encoder morphology", None),
    "fit 1,000 genes": ("fit cohort -o large --genes 1000", "large"),
    "fit 50 genes": ("fit cohort -o model --genes 50", "model"),
    "evaluate": ("evaluate cohort --folds section --genes 50 -o evaluation", "evaluation"),
    "benchmark": ("benchmark cohort --losses list,mse --genes 50 -o benchmark", "benchmark"),
    "predict": ("predict cohort/C5.h5ad --model model -o scores", "scores"),
    "model show": ("model show model", None),
}
# Made once, even where they are not asked for: others read what they make.
_NEEDED = ("import", "embed", "fit 50 genes")
# So that its work is seen.
_IN_ONE_PROCESS = {"benchmark": ["--jobs", "1"]}
_EVERY_S = 0.005
_MIB = 2**20


@contextmanager
def commit(name: str) -> Iterator[Path]:
    """Check a commit out beside this tree for as long as it is needed."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*git, "add", "--quiet", "--detach", f"{folder}/tree", name], check=True)
        try:
            yield Path(folder, "tree", "src")
        finally:
            subprocess.run([*git, "remove", "--force", f"{folder}/tree"], check=True)


def cost(way: str, source: Path, folder: Path, data: str) -> tuple[float, float]:
    """Run a command in a folder; its processor time in seconds, its peak memory in MiB."""
    command, made = WAYS[way]
    if made is not None:
        shutil.rmtree(folder / made, ignore_errors=True)
    arguments = [sys.executable, "-m", "strank", *_arguments(command, data)]
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    with (folder / "said.txt").open("w+") as said:
        child = subprocess.Popen(
            arguments, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise SystemExit(f"{source}: strank {command}:\n{said.read()}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / _MIB


def shares(way: str, folder: Path, data: str) -> list[tuple[str, float]]:
    """Run a command in this process; which share of its processor time each module takes."""
    command, made = WAYS[way]
    spent: Counter[str] = Counter()
    before = time.process_time()

    def see(_: int, frame: FrameType | None) -> None:
        nonlocal before
        # A signal waits for the end of what runs in C, so each stands for the time since the last.
        now = time.process_time()
        spent[_at_work(frame)] += now - before
        before = now

    sys.argv = ["strank", *_arguments(command, data), *_IN_ONE_PROCESS.get(way, [])]
    signal.signal(signal.SIGPROF, see)
    with chdir(folder), open(os.devnull, "w", encoding="utf-8") as nowhere:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        signal.setitimer(signal.ITIMER_PROF, _EVERY_S, _EVERY_S)
        try:
            runpy.run_module("strank", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{' '.join(sys.argv)} ended with {end.code}") from None
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return [(name, part / spent.total()) for name, part in spent.most_common()]


def _at_work(frame: FrameType | None) -> str:
    """Name the innermost module of strank on the stack, unless something is being imported."""
    module = ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "importlib._bootstrap":
            return "imports"
        if not module and name.startswith("strank."):
            module = name.removeprefix("strank.")
        frame = frame.f_back
    return module or "the rest"


def _arguments(command: str, data: str) -> list[str]:
    return [data if word == "DATA" else word for word in command.split()]


def compare(ways: list[str], sides: dict[str, Path], data: str, repeats: int) -> None:
    """Run the ways of each side in turn and print what they cost."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {side: Path(temporary, str(n)) for n, side in enumerate(sides)}
        for side, folder in folders.items():
            folder.mkdir()
            compileall.compile_dir(sides[side], quiet=1)
        for repeat in range(repeats):
            for way in WAYS:
                if way in ways or (way in _NEEDED and not repeat):
                    for side, source in sides.items():
                        used = cost(way, source, folders[side], data)
                        found.setdefault((way, side), []).append(used)
        for way in (way for way in WAYS if way in ways):
            print(_line(way, {side: found[way, side] for side in sides}))
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
                goes_to = apart.submit(shares, way, next(iter(folders.values())), data).result()
            print("    " + ", ".join(f"{name} {part:.0%}" for name, part in goes_to[:5]))


def _line(way: str, used: dict[str, list[tuple[float, float]]]) -> str:
    """Write what a way costs here, and beside another commit."""
    costs = [tuple(map(median, zip(*runs, strict=True))) for runs in used.values()]
    line = f"{way:16s} {costs[0][0]:6.2f} s {costs[0][1]:6.0f} MiB"
    for seconds, memory in costs[1:]:
        line += f"   beside {seconds:6.2f} s {memory:6.0f} MiB: {costs[0][0] / seconds:.2f}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of her2st")
    parser.add_argument("--beside", metavar="COMMIT", help="measure in turn with this commit")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    options = parser.parse_args()
    # Users keep compiled files; without them every run would compile strank anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    here = {"here": Path(__file__).parents[1].resolve() / "src"}
    data = str(options.data.resolve())
    os.environ["OMP_NUM_THREADS"] = "1"
    if options.beside is None:
        compare(options.only, here, data, options.repeats)
        return
    with commit(options.beside) as other:
        compare(options.only, here | {options.beside: other}, data, options.repeats)


if __name__ == "__main__":
    main()
