"""Many small slides on every engine: the same bytes, what a unit costs, and what is left of a kill.

python benchmarks/units.py --slides 1000        # half an hour on two cores
python benchmarks/units.py --slides 100 --quick # some minutes: fewer kills
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from strank.encoders.base import encoder_facts
from strank.encoders.registry import get_encoder
from strank.model.rank_model import RankModel
from strank.neural.heads import LinearHead
from strank.units import each
from strank.where import Where

STRANK = [sys.executable, "-m", "strank"]
N_TRIVIAL = 500
# Runs that are disturbed are of so many times fewer slides.
FEW = 20
# Seconds that one takes, about: kills are in that time.
A_SLIDE = 0.3


def make(root: Path, n_slides: int) -> None:
    """Write small slides (0.4 x 0.3 mm), a list of them, and a model."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(n_slides):
        pixels = np.full((150, 200, 3), 240, np.uint8)
        pixels[20:120, 20:170] = rng.integers(60, 200, (100, 150, 3))
        Image.fromarray(pixels).save(root / f"s{number:04}.png")
        rows.append({"path": f"s{number:04}.png", "mpp": 2, "patient": f"P{number % 7}"})
    pd.DataFrame(rows).to_csv(root / "list.csv", index=False)
    pd.DataFrame(rows[: max(20, n_slides // FEW)]).to_csv(root / "few.csv", index=False)
    facts = encoder_facts(get_encoder("morphology"))
    head = LinearHead(facts["n_features"], 1)
    head.weight.data[:] = 0.1
    provenance = {"spot_diameter_um": 100.0, "spot_pitch_um": 200.0}
    panel = pd.DataFrame({"counts": 1.0}, index=pd.Index(["ERBB2"]))
    RankModel(head, panel, facts, provenance).save(root / "model")


def command(root: Path, out: Path, *options: object, of: str = "list.csv") -> list[str]:
    given = ["predict", root / of, "--model", root / "model", "-o", out, *options]
    return [*STRANK, *map(str, given)]


def run(*arguments: str, check: bool = True) -> float:
    start = time.perf_counter()
    subprocess.run(arguments, check=check, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def checksums(out: Path) -> dict[str, str]:
    made = [p for p in out.rglob("*") if p.suffix in (".h5ad", ".png")]
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in made}


def rest(out: Path) -> list[str]:
    """Name what is neither a result nor a record."""
    return [p.name for p in out.rglob(".*")]


class Cluster:
    """A scheduler and two workers, as `dask` starts them."""

    def __init__(self, root: Path) -> None:
        self.file, self.root = root / "scheduler.json", root
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> Cluster:
        self.file.unlink(missing_ok=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": self.root}
        dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
        where = ["--scheduler-file", str(self.file)]
        port = ["--port", "0", "--no-dashboard"]
        self.processes.append(subprocess.Popen([*dask, *where, *port], **quiet))
        while not self.file.exists():
            time.sleep(0.1)
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", *where, "--nthreads", "1"]
        for _ in range(2):
            self.processes.append(subprocess.Popen([*worker, "--no-dashboard"], **quiet))
        time.sleep(3)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()


def children(parent: int) -> list[int]:
    """Find processes below one, that use Python to work: not those that only look after others."""
    told = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in told.splitlines()[1:]]
    below, found = {parent}, []
    for pid, ppid, args in sorted((int(p), int(q), a) for p, q, a in rows):
        if ppid in below:
            below.add(pid)
            if "LokyProcess" in args or ("spawn_main" in args and "tracker" not in args):
                found.append(pid)
    return found


def kills(root: Path, whole: dict[str, str], n_kills: int) -> str:
    """Kill a process at random moments; what one call left, the next completes."""
    rng, hit, bad, late, twice = random.Random(0), 0, 0, 0, 0
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for number in range(n_kills):
        out = root / f"killed{number}"
        started = subprocess.Popen(command(root, out, "--jobs", 2, of="few.csv"), **quiet)
        while not list(out.glob("*/scores.h5ad")) and started.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 0.8 * len(whole) / 3 * A_SLIDE / 2))
        if workers := children(started.pid):
            os.kill(rng.choice(workers), signal.SIGKILL)
            hit += 1
        late += started.wait() != 0
        begun = {p: p.stat().st_mtime_ns for p in out.glob("*/scores.h5ad")}
        run(*command(root, out, of="few.csv"), check=True)
        twice += sum(p.stat().st_mtime_ns != then for p, then in begun.items())
        bad += checksums(out) != whole or bool(rest(out))
    return (
        f"| a worker killed at {n_kills} random moments | – | {hit} met a worker; {late} of the "
        f"calls ended with an error; after the next call {n_kills - bad} of {n_kills} whole, the "
        f"same bytes, {twice} slides made twice |"
    )


def trivial(unit: int) -> int:
    return unit


def cost(where: Where) -> float:
    """Milliseconds a trivial unit; workers are there already."""
    list(each(trivial, range(4), where, say=lambda _: None))
    start = time.perf_counter()
    list(each(trivial, range(N_TRIVIAL), where, say=lambda _: None))
    return 1000 * (time.perf_counter() - start) / N_TRIVIAL


def measured(root: Path, n_slides: int, n_kills: int) -> Iterator[str]:
    whole_time = run(*command(root, root / "whole"))
    whole = checksums(root / "whole")
    assert len(whole) == 3 * n_slides
    told = "| {} | {:.0f} s | {} |"
    yield told.format("one process", whole_time, f"{len(whole)} files")
    seconds = run(*command(root, root / "jobs", "--jobs", 2))
    yield told.format("2 processes", seconds, same(root / "jobs", whole))
    with Cluster(root) as cluster:
        seconds = run(*command(root, root / "dask", "--dask", cluster.file))
        yield told.format("Dask, 2 workers", seconds, same(root / "dask", whole))
        dask = cost(Where(dask=str(cluster.file)))
    shares = [run(*command(root, root / "shards", "--shard", f"{i}/8")) for i in range(1, 9)]
    run(*STRANK, "collect", str(root / "shards"))
    yield told.format("8 shares, one after the other", sum(shares), same(root / "shards", whole))
    engines = {"in this process": Where(), "2 processes": Where(jobs=2)}
    own = {name: cost(where) for name, where in engines.items()} | {"Dask": dask}
    yield from (f"| own cost of a unit, {name} | {ms:.2f} ms | |" for name, ms in own.items())
    names = set(pd.read_csv(root / "few.csv")["path"].map(lambda path: Path(path).stem))
    few = {path: sha for path, sha in whole.items() if Path(path).parts[0] in names}
    yield f"| of {len(names)} slides: | | |"
    yield restarted(root, few)
    yield stopped(root, few)
    yield kills(root, few, n_kills)


def same(out: Path, whole: dict[str, str]) -> str:
    table = pd.read_csv(out / "slides.csv")
    right = checksums(out) == whole and set(table["state"]) == {"done"} and not rest(out)
    return "the same bytes" if right else "OTHER BYTES"


def restarted(root: Path, whole: dict[str, str]) -> str:
    """Restart the scheduler in the middle of a run."""
    out = root / "restarted"
    with Cluster(root) as cluster:
        started = subprocess.Popen(
            command(root, out, "--dask", cluster.file, of="few.csv"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        while not list(out.glob("*/scores.h5ad")) and started.poll() is None:
            time.sleep(0.05)
        cluster.processes[0].kill()
        said = started.communicate()[1]
    error = next((line for line in said.splitlines() if line.startswith("Error: ")), "no error")
    begun = {p: p.stat().st_mtime_ns for p in out.glob("*/scores.h5ad")}
    with Cluster(root) as cluster:
        run(*command(root, out, "--dask", cluster.file, of="few.csv"))
    twice = sum(p.stat().st_mtime_ns != then for p, then in begun.items())
    found = f"“{error}”; {len(begun)} were done, {twice} of them again; then {same(out, whole)}"
    return f"| scheduler killed, and another started | – | {found} |"


def stopped(root: Path, whole: dict[str, str]) -> str:
    """Stop one of two shares, and start it again."""
    out = root / "stopped"
    half = command(root, out, "--shard", "1/2", of="few.csv")
    run(*command(root, out, "--shard", "2/2", of="few.csv"))
    started = subprocess.Popen(half, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    n_before = len(list(out.glob("*/scores.h5ad")))
    while len(list(out.glob("*/scores.h5ad"))) < n_before + 3 and started.poll() is None:
        time.sleep(0.05)
    started.terminate()
    started.wait()
    begun = {p: p.stat().st_mtime_ns for p in out.glob("*/scores.h5ad")}
    told = subprocess.run([*STRANK, "collect", str(out), "--json"], capture_output=True, text=True)
    missing = json.loads(told.stdout)["states"].get("missing", 0)
    run(*half)
    run(*STRANK, "collect", str(out))
    twice = sum(p.stat().st_mtime_ns != then for p, then in begun.items())
    found = f"{missing} missing (code {told.returncode}), {twice} made twice; then"
    return f"| a share stopped, and started again | – | {found} {same(out, whole)} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=1000)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        make(root, given.slides)
        print(f"{given.slides} slides, {os.cpu_count()} cores\n")
        print("| what | time | found |\n|---|---|---|", flush=True)
        for line in measured(root, given.slides, 2 if given.quick else 20):
            print(line, flush=True)


if __name__ == "__main__":
    main()
