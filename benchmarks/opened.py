"""How many of strank's files a reader opens to follow a command: those whose functions run.

    python benchmarks/opened.py ../shared/data/her2st
    python benchmarks/opened.py ../shared/data/her2st --only benchmark --verbose

Runs the workflow on real sections, each command in a process of its own, and counts the modules of
the package in which at least one function runs, in any thread. What a module does while it is
imported does not count, nor do lambdas and comprehensions; a function that is called then does.
Two epochs and ten genes run the same functions as a hundred. Exits with 1 if a command opens more
files than its goal.
"""

from __future__ import annotations

import argparse
import io
import os
import runpy
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from inspect import CO_NEWLOCALS
from multiprocessing import get_context
from pathlib import Path
from types import FrameType

# In the order in which each finds what the ones before have made, with the most files it may open.
COMMANDS = {
    "import": (13, "import st DATA -o cohort"),
    "embed": (18, "embed cohort --encoder morphology"),
    "exact fit": (25, "fit cohort -o model"),
    "network fit": (27, "fit cohort -o network --head mlp --epochs 2"),
    "evaluate": (32, "evaluate cohort --folds section --genes 10 -o evaluation"),
    "benchmark": (35, "benchmark cohort --losses list,mse --genes 10 --jobs 1 -o benchmark"),
    "predict": (25, "predict cohort/C5.h5ad --model model -o scores"),
}
# What others need, so that they run even where they are not asked for.
FIRST = "import", "embed", "exact fit"


def files_opened(package: str, arguments: list[str]) -> set[str]:
    """Run a command in this process; the files of the package whose functions ran."""
    opened = set()

    def see(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        # The body of a class has no locals of its own; "<module>", "<lambda>" and "<genexpr>" are
        # no functions that somebody wrote with a name.
        if code.co_flags & CO_NEWLOCALS and not code.co_name.startswith("<"):
            opened.add(code.co_filename)

    sys.argv = ["strank", *arguments]
    told = io.StringIO()
    # Told of calls only, and for no line of what is called, since `see` returns nothing.
    threading.settrace(see)
    sys.settrace(see)
    try:
        with redirect_stdout(told), redirect_stderr(told):
            runpy.run_module("strank", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)}:\n{told.getvalue()}") from None
    finally:
        sys.settrace(None)
        threading.settrace(None)
    return {name.removeprefix(package) for name in opened if name.startswith(package)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of her2st")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("-v", "--verbose", action="store_true", help="list the files")
    options = parser.parse_args()

    data = str(options.data.resolve())
    package = find_spec("strank").submodule_search_locations[0] + os.sep
    exceeded = False
    # `spawn`: what an earlier command has imported must not be there.
    alone = {"mp_context": get_context("spawn"), "max_tasks_per_child": 1}
    with (
        tempfile.TemporaryDirectory() as scratch,
        chdir(scratch),
        ProcessPoolExecutor(1, **alone) as pool,
    ):
        for name, (goal, command) in COMMANDS.items():
            if name not in (*options.only, *FIRST):
                continue
            arguments = [data if word == "DATA" else word for word in command.split()]
            opened = pool.submit(files_opened, package, arguments).result()
            if name in options.only:
                exceeded |= len(opened) > goal
                print(f"{name:12} {len(opened):3} files, goal {goal:3}", flush=True)
                if options.verbose:
                    print(*(f"    {file}" for file in sorted(opened)), sep="\n", flush=True)
    sys.exit(exceeded)


if __name__ == "__main__":
    main()
