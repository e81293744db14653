"""Changed inputs of every kind are refused in a line, or read right; thousands by `make fuzz`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz.py")
# Half a minute to make, which the readers of its files do not need.
SLOW = {"mlp"}


def run(*arguments: str) -> list:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux, for its memory of processes")
    alone = os.environ | {"OMP_NUM_THREADS": "1", "VIPS_CONCURRENCY": "1"}
    command = [sys.executable, "-W", "ignore", str(FUZZ), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found, done.stderr[-3000:]
    return found


def kinds() -> list[str]:
    listed = subprocess.run(
        [sys.executable, str(FUZZ), "--list"], capture_output=True, text=True, check=True
    )
    return listed.stdout.split()


def test_some_inputs_of_every_kind():
    names = [name for name in kinds() if name not in SLOW]
    *wrong, _ = found = run("--n", "8", "--seed", "1", "--kinds", ",".join(names))
    totals = [line for line in found if isinstance(line, dict)]
    assert [line for line in wrong if isinstance(line, list)] == []
    assert {total["kind"]: total["n"] for total in totals} == dict.fromkeys(names, 8)
    # Neither is all of it refused, nor is the change passed over.
    assert sum(total.get("accepted", 0) for total in totals) > 20
    assert sum(total.get("refused", 0) for total in totals) > 100


@pytest.mark.slow
def test_what_goes_wrong_is_told():
    """Inputs of kinds that crash, hang, take memory, raise, and lie about what they read."""
    found = run(
        "--kinds", "broken", "--n", "20", "--seed", "2", "--patience", "2", "--gigabytes", "0.2"
    )
    told = {line[3] for line in found if isinstance(line, list)}
    assert told == {"crash", "hang", "memory", "traceback", "nameless"}
