"""Run a command again and again, and let its n-th write fail, or the process die there.

As `LD_PRELOAD=faults.so python chamber.py FAULTS.SO FOLDER COMMAND [PLACES]`, at so many places or
at all; prints a line of JSON an event that went wrong, and at the end how many there were. All is
imported once; each run is a fork of that, so that it takes a fraction of a second.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

KILL, HALF, EIO, ENOSPC, FULL, FLIP = range(1, 7)
ACTIONS = {KILL: "kill", HALF: "half", EIO: "EIO", ENOSPC: "ENOSPC", FULL: "full", FLIP: "flip"}
# What can befall an event: a rename, say, a removal, a write.
BEFALL = (KILL, EIO, ENOSPC, FULL), (KILL, EIO), tuple(ACTIONS)
# Logs for people, with times in them, which no run reads.
_LOGS = "tensorboard"
_SECONDS = 120


@dataclass(frozen=True)
class Command:
    """A command, the one that made what it overwrites, and what of its output is one thing."""

    arguments: list[str]
    before: list[list[str]] = field(default_factory=list)
    whole: tuple[str, ...] = ()  # folders that are old or new as one
    grows: bool = False  # What the first run made may be there, or not


def commands(root: Path) -> dict[str, Command]:
    """All commands on a small cohort; what they read lies in `root`, what they write in `work`."""
    st, cohort, model = root / "st", root / "cohort", root / "model"
    work = root / "work"
    genes, section = ["--genes", "4"], str(cohort / "D1.h5ad")
    evaluated = ["evaluate", str(cohort), "-o", str(work / "out"), "--sections", "C1,D1", "--model"]
    predicted = ["predict", section, "-o", str(work / "out"), "--stride", "300"]
    predicted += ["--genes", "STROMA-LOW-1", "--model"]
    network = ["--head", "mlp", "--epochs", "1", "--validation", "D1"]
    fit = ["fit", str(cohort), "-o", str(work / "model")]
    contrasted = ["contrast", str(root / "scores.h5ad"), "--groups", str(root / "regions.geojson")]
    contrasted += ["-o", str(work / "out"), "--block", "200", "--seed"]
    study = ["benchmark", str(cohort), "-o", str(work / "out"), "--losses", "mse", "--jobs", "1"]
    study += ["--protocol", "section"]
    other = str(root / "other")
    given = ["import", "anndata", "--image", str(st / "images" / "A1.jpg"), "--mpp", "1.2"]
    return {
        "import": Command(["import", "st", str(st), "-o", str(work / "cohort")]),
        "import-anndata": Command(
            [*given, str(root / "given.h5ad"), "-o", str(work / "cohort")],
            [[*given, str(root / "less.h5ad"), "-o", str(work / "cohort")]],
        ),
        "embed": Command(["embed", str(work / "cohort")], [["@copy", str(cohort)]], grows=True),
        "fit": Command([*fit, *genes, "--penalty", "100"], [[*fit, "--genes", "6"]], ("model",)),
        "fit-mlp": Command(
            [*fit, *genes, *network],
            [[*fit, "--genes", "6", *network]],
            ("model",),
            grows=True,
        ),
        "predict": Command([*predicted, str(model)], [[*predicted, other]]),
        "evaluate": Command([*evaluated, str(model)], [[*evaluated, other]]),
        "benchmark": Command([*study, "--genes", "4"], grows=True),
        "report": Command(["report", str(work / "out")], [[*study, "--genes", "4"]]),
        "contrast": Command([*contrasted, "1"], [[*contrasted, "0"]]),
        "pull": Command(
            ["model", "pull", str(model), "-o", str(work / "model")],
            [["model", "pull", other, "-o", str(work / "model")]],
            ("model",),
        ),
    }


def prepare(root: Path) -> None:
    """Make what the commands read."""
    from strank.io import find_st, read_st, write_sections
    from strank.simulate.cohort import simulate_cohort
    from strank.simulate.tissue import TissueDesign

    small = TissueDesign(side_um=1500, um_per_pixel=1.2)
    simulate_cohort(root / "st", n_patients=4, n_sections=1, n_genes=24, seed=3, tissue=small)
    sections = [read_st(root / "st", section=name) for name in find_st(root / "st")]
    write_sections(sections, root / "cohort")
    plain = sections[0].copy()
    del plain.uns["strank"]
    plain.write_h5ad(root / "given.h5ad")
    plain[:-5].copy().write_h5ad(root / "less.h5ad")
    made = ["fit", str(root / "cohort"), "--sections", "A1,B1", "-o"]
    predicted = ["predict", str(root / "cohort" / "D1.h5ad"), "--stride", "100"]
    for arguments in (
        ["embed", str(root / "cohort")],
        [*made, str(root / "model"), "--genes", "4"],
        [*made, str(root / "other"), "--genes", "6"],
        [*predicted, "--model", str(root / "model"), "-o", str(root / "p")],
    ):
        _strank(arguments)
    os.rename(root / "p" / "scores.h5ad", root / "scores.h5ad")
    _write_regions(root / "regions.geojson")


def _write_regions(path: Path) -> None:
    """Two halves of a slide."""

    def half(name: str, left: int, right: int) -> dict[str, Any]:
        ring = [[left, 0], [right, 0], [right, 2000], [left, 2000], [left, 0]]
        shape = {"type": "Polygon", "coordinates": [ring]}
        properties = {"classification": {"name": name}}
        return {"type": "Feature", "geometry": shape, "properties": properties}

    features = [half("West", 0, 625), half("East", 626, 1300)]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))


def _strank(arguments: list[str]) -> None:
    if arguments[0] == "@copy":
        shutil.copytree(arguments[1], Path(arguments[1]).parent / "work" / "cohort")
        shutil.rmtree(Path(arguments[1]).parent / "work" / "cohort" / "features")
        return
    from strank.cli import app

    app(arguments, standalone_mode=False)


def fork(root: Path, work: Callable[[], object]) -> tuple[int, str]:
    """Do something in a copy of this process, to its very end; its exit code, and what it said."""
    said = root / "said.txt"
    child = os.fork()
    if child == 0:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        work()
        raise SystemExit(0)
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), said.read_text(errors="replace")
        if time.monotonic() - started > _SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return -99, "hangs"
        time.sleep(0.002)


def run(root: Path, arguments: list[str], arm: Callable[[], object] = lambda: None) -> Any:
    """Run a command as a user does."""

    def work() -> None:
        from strank.cli import main

        sys.argv = ["strank", *arguments]
        arm()
        main()

    return fork(root, work)


def warm(root: Path, arguments: list[str]) -> None:
    """Import what a command imports, here."""
    names = root / "modules.json"

    def work() -> None:
        _strank(arguments)
        found = [n for n, m in sys.modules.items() if getattr(m, "__spec__", None) is not None]
        names.write_text(json.dumps(found))

    fork(root, work)
    for name in json.loads(names.read_text()):
        try:
            importlib.import_module(name)
        except Exception:  # what cannot be imported alone
            continue
    # Forks share what they do not touch.
    gc.collect()
    gc.freeze()
    # Times differ from run to run, and stand in what a benchmark keeps.
    if runner := sys.modules.get("strank.studies.benchmark.runner"):
        runner.time = SimpleNamespace(perf_counter=lambda: 0.0)  # type: ignore[attr-defined]


def state(work: Path, whole: tuple[str, ...] = ()) -> dict[str, str]:
    """Digests of all files, of some folders together; and the names of what is hidden."""
    found: dict[str, str] = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if _LOGS in path.parts or path.is_dir():
            continue
        if any(part.startswith(".") for part in path.relative_to(work).parts):
            found[f"hidden {name}"] = ""
            continue
        unit = next((part for part in whole if name.startswith(f"{part}/")), name)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[unit] = f"{found.get(unit, '')}{name} {digest};"
    return found


def _key(found: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset(found.items())


class Chamber:
    """One command, its states before and after, and one folder in which it is tormented."""

    def __init__(self, root: Path, faults: Path, command: Command) -> None:
        self.root, self.command, self.work = root, command, root / "work"
        self.faults = ctypes.CDLL(str(faults))
        self.faults.faults_count.restype = ctypes.c_long
        self.faults.faults_kind.argtypes = [ctypes.c_long]
        self.before = root / "before"
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for arguments in command.before:
            code, said = fork(root, lambda a=arguments: _strank(a))
            assert code == 0, said
        shutil.rmtree(self.before, ignore_errors=True)
        shutil.copytree(self.work, self.before)
        warm(root, command.arguments)
        self._restore()
        code, said = run(root, command.arguments)
        assert code == 0, said
        self.old, self.new = state(self.before, command.whole), state(self.work, command.whole)
        self._restore()
        code, said = run(root, command.arguments)
        again = state(self.work, command.whole)
        different = [name for name in again if again[name] != self.new.get(name)]
        assert not different, f"runs that nothing disturbed differ: {different}"
        self.kinds = self._count()
        self.n_events, self.n_tried = len(self.kinds), 0
        # States from which a run is known to end well: it depends on nothing else.
        self.known = {_key(self.old), _key(self.new)}

    def places(self, n_places: int) -> range:
        """Choose events, from the first to the last ones; 0 for all."""
        return range(1, self.n_events + 1, -(-self.n_events // n_places) if n_places else 1)

    def torment(self, n_places: int) -> Iterator[dict[str, Any]]:
        """Fail at some events in every way; yield what went wrong."""
        for event in self.places(n_places):
            for action in BEFALL[self.kinds[event - 1]]:
                self.n_tried += 1
                if wrong := self._try(event, action):
                    yield {"event": event, "action": ACTIONS[action], "wrong": wrong}

    def _try(self, event: int, action: int) -> str:
        self._restore()
        code, said = run(self.root, self.command.arguments, lambda: self._arm(event, action))
        found = state(self.work, self.command.whole)
        if wrong := self._judged(code, said, found, action):
            return f"{wrong}; exit {code}: {said[-1500:]}"
        if _key(found) in self.known:
            return ""
        met = _key(found)
        code, said = run(self.root, self.command.arguments)
        if code != 0:
            return f"the next run fails, exit {code}: {said[-1500:]}"
        found = state(self.work, self.command.whole)
        if found != self.new:
            names = {n for n in found | self.new if found.get(n) != self.new.get(n)}
            return f"the next run leaves other files: {sorted(names)}; {said[-300:]}"
        if not any(name.startswith("hidden ") for name in found):
            self.known.add(met)
        return ""

    def _judged(self, code: int, said: str, found: dict[str, str], action: int) -> str:
        """Say what is wrong with a state after a fault: neither old nor new, or a lie."""
        shown = {name: digest for name, digest in found.items() if not name.startswith("hidden ")}
        if not self.command.grows:
            torn = [n for n, d in shown.items() if d not in (self.old.get(n), self.new.get(n))]
            lost = [n for n in self.old if n in self.new and n not in shown]
            # Between two renames; the next run, of any command, completes it.
            lost = [n for n in lost if not (code == -signal.SIGKILL and n in self.command.whole)]
            if torn or lost:
                return f"neither old nor new: {torn + lost}"
        if code == 0 and shown != {n: d for n, d in self.new.items() if not n.startswith("hidden")}:
            names = sorted(n for n in self.new if shown.get(n) != self.new[n])
            return f"success is told, and files are not the new ones: {names}"
        killed = action in (KILL, HALF)
        if code not in (0, 1, 2) and not (killed and code == -signal.SIGKILL):
            return "it crashes"
        return "a traceback" if "Traceback" in said else ""

    def _arm(self, event: int, action: int) -> None:
        self.faults.faults_arm(str(self.work).encode() + b"/", ctypes.c_long(event), action)

    def _count(self) -> list[int]:
        """Name the kinds of the events of an undisturbed run."""
        self._restore()
        counted = self.root / "count.txt"

        def work() -> None:
            self._arm(0, 0)
            _strank(self.command.arguments)
            events = range(1, self.faults.faults_count() + 1)
            counted.write_text(json.dumps([self.faults.faults_kind(event) for event in events]))

        code, said = fork(self.root, work)
        assert code == 0, said
        return list(json.loads(counted.read_text()))

    def _restore(self) -> None:
        shutil.rmtree(self.work)
        shutil.copytree(self.before, self.work)


def main() -> None:
    """Torment one command, or prepare what all of them read."""
    faults, root, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    n_places = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    if name == "prepare":
        prepare(root)
        return
    chamber = Chamber(root, faults, commands(root)[name])
    wrong = 0
    for found in chamber.torment(n_places):
        wrong += 1
        print(json.dumps(found), flush=True)
    told = {"command": name, "events": chamber.n_events, "tried": chamber.n_tried, "wrong": wrong}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
