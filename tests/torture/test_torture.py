"""A fault at any write: the old result or the new one, whole; never a success that is none.

Of every command some of the writes; by `make torture` every single one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

HERE = Path(__file__).parent
ALL = bool(os.environ.get("TORTURE"))
# About how many places of the whole run, in the ordinary tests.
QUICK = {"pull": 2, "fit": 2}
SLOW = ("import", "import-anndata", "embed", "predict", "evaluate", "contrast", "report")
SLOW += ("fit-mlp", "benchmark")


@pytest.fixture(scope="module")
def chamber(tmp_path_factory):
    if not sys.platform.startswith("linux") or which("gcc") is None:
        pytest.skip("needs Linux and gcc, to build what lets writes fail")
    root = tmp_path_factory.mktemp("chamber")
    faults = root / "faults.so"
    build = ["gcc", "-shared", "-fPIC", "-O2", "-o", faults, HERE / "faults.c", "-ldl"]
    subprocess.run(build, check=True)
    script = [sys.executable, HERE / "chamber.py", faults, root]
    alone = os.environ | {"OMP_NUM_THREADS": "1", "VIPS_CONCURRENCY": "1"}
    subprocess.run([*script, "prepare"], check=True, capture_output=True, env=alone)

    def torment(name, places):
        environment = alone | {"LD_PRELOAD": str(faults)}
        command = [*script, name, "0" if ALL else str(places)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        *wrong, told = [json.loads(line) for line in done.stdout.splitlines()]
        print(told)
        assert not wrong
        assert told["tried"] >= places
        return told

    return torment


@pytest.mark.parametrize("name", QUICK)
def test_a_fault_at_some_writes(chamber, name):
    chamber(name, QUICK[name])


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="many minutes: make torture")
@pytest.mark.parametrize("name", SLOW)
def test_a_fault_at_some_writes_of_the_others(chamber, name):
    chamber(name, 4)
