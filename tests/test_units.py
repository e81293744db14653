from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import cloudpickle
import pytest

from strank import units
from strank.errors import InputError
from strank.units import each, outcomes
from strank.where import Where

# Other processes do not find tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def test_workers_that_are_kept_follow_to_another_folder(tmp_path, monkeypatch):
    """`benchmark("cohort", output="out")` wrote into the folder of the call before."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        places = set(each(Path.absolute, [Path("x"), Path("y")], Where(jobs=2)))
        assert places == {tmp_path / name / "x", tmp_path / name / "y"}


@pytest.fixture(scope="module")
def cluster():
    dask = pytest.importorskip("dask")
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    # As few deaths as show it.
    few = dask.config.set({"distributed.scheduler.allowed-failures": 1})
    with few, distributed.LocalCluster(**options) as cluster:
        yield cluster


def square(folder: Path, n: int) -> tuple[int, int]:
    """Leave a trace of every start; the fourth unit kills its process when it is first started."""
    starts = folder / str(n)
    with starts.open("a") as file:
        file.write(f"{os.getpid()}\n")
    if n == 4 and len(starts.read_text().split()) == 1:
        time.sleep(0.3)  # let others be under way
        os.kill(os.getpid(), signal.SIGKILL)
    return n, n * n


ENGINES = ["jobs", "dask"]


def engine(name: str, request) -> Where:
    if name == "jobs":
        return Where(jobs=2)
    return Where(dask=request.getfixturevalue("cluster").scheduler_address)


@pytest.mark.parametrize("name", ENGINES)
def test_units_of_a_process_that_was_killed_are_started_again(name, request, tmp_path):
    found = list(each(partial(square, tmp_path), range(12), engine(name, request), say=list))
    assert sorted(found) == [(n, n * n) for n in range(12)]
    starts = {n: len((tmp_path / str(n)).read_text().split()) for n in range(12)}
    assert starts[4] == 2
    # Of the others only what was under way beside it.
    assert sum(starts.values()) <= 14


def deadly(n: int) -> int:
    if n == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return n


@pytest.mark.parametrize("name", ENGINES)
def test_a_unit_that_kills_its_processes_is_given_up(name, request, monkeypatch):
    monkeypatch.setattr(units, "_TRIES", 1)
    where = engine(name, request)
    found = list(each(deadly, range(4), where, say=list, lost=lambda n, told: (n, told)))
    [gone] = [result for result in found if isinstance(result, tuple)]
    assert gone[0] == 1
    assert "killed, or out of memory" in gone[1]
    assert sorted(set(found) - {gone}) == [0, 2, 3]


def test_a_process_that_is_lost_is_an_error_where_nobody_asks_for_it():
    with pytest.raises(InputError, match="A1: the process at it was lost more than once"):
        list(units._insisting(nullcontext(lambda a, lost: map(lost, a)), ["A1"], units._raise))


def failing(n: int) -> int:
    raise InputError(f"unit {n} is bad")


@pytest.mark.parametrize("name", ["here", *ENGINES])
def test_an_error_of_a_unit_is_that_of_the_call(name, request):
    where = Where() if name == "here" else engine(name, request)
    with pytest.raises(InputError, match=r"^unit 7 is bad$"):
        list(each(failing, [7], where, say=list))


def writing(n: int, say) -> int:
    say(f"unit {n} begins")
    if n == 1:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/1")
    if n == 2:
        raise ZeroDivisionError("a bug")
    return n


@pytest.mark.parametrize("name", ["here", *ENGINES])
def test_a_full_disk_or_a_bug_of_one_unit_leaves_the_others(name, request):
    where = Where() if name == "here" else engine(name, request)
    found = {outcome.unit: outcome for outcome in outcomes(writing, range(4), where, say=list)}
    assert [found[n].result for n in range(4)] == [0, None, None, 3]
    assert found[1].error == (
        "/scratch/1: the disk is full; free some space, what was finished is kept"
    )
    assert re.fullmatch(r"ZeroDivisionError in .+, line \d+: a bug", found[2].error)
    assert all(outcome.said == (f"unit {n} begins",) for n, outcome in found.items())


def test_shares_are_apart_and_all_there_whatever_the_order():
    names = [f"unit {n}" for n in range(10)]
    shares = [Where(shard=f"{i}/3").mine(names[::-1]) for i in (1, 2, 3)]
    assert sorted(name for share in shares for name in share) == names
    assert [len(share) for share in shares] == [4, 3, 3]
    # What was done already, and is not asked for, changes nothing of the others' shares.
    assert shares[0] == Where(shard="1/3").mine(names)[::-1]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ({"ID": "3", "COUNT": "4", "MIN": "1"}, (3, 4)),
        ({"ID": "0", "COUNT": "4", "MIN": "0"}, (1, 4)),
        ({"ID": "25", "COUNT": "3", "MIN": "5", "STEP": "10"}, (3, 3)),
    ],
)
def test_an_array_of_slurm_says_which_share(monkeypatch, array, expected):
    for name, value in array.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    assert Where(shard="slurm").share == expected


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"shard": "0/3"}, "`shard=0/3`: give its number"),
        ({"shard": "4/3"}, "`shard=4/3`: give its number"),
        ({"shard": "half"}, "`shard=half`: give its number"),
        ({"shard": "slurm"}, "SLURM_ARRAY_TASK_ID is not set"),
        ({"jobs": 0}, "`jobs` must be at least 1"),
        ({"jobs": 2, "dask": "tcp://localhost:1"}, "give one"),
    ],
)
def test_what_is_no_place_is_refused(monkeypatch, given, told):
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(InputError, match=told):
        Where(**given)


def test_a_scheduler_that_does_not_answer(monkeypatch, tmp_path):
    pytest.importorskip("distributed")
    monkeypatch.setattr(units, "_ANSWER", 0.5)
    with pytest.raises(InputError, match=r"`dask=tcp://127.0.0.1:9`: no scheduler answers"):
        list(each(abs, [1], Where(dask="tcp://127.0.0.1:9")))
    with pytest.raises(InputError, match=r"absent.json: no such file"):
        list(each(abs, [1], Where(dask=str(tmp_path / "absent.json"))))


def test_workers_of_other_versions_are_refused(monkeypatch, cluster):
    units._versions.cache_clear()
    monkeypatch.setattr(units, "__version__", "9")
    with pytest.raises(InputError, match=r"worker tcp.* has strank [\d.]+.* \(here 9\); start"):
        list(each(abs, [1], Where(dask=cluster.scheduler_address)))
    units._versions.cache_clear()


def test_a_worker_that_comes_late_is_looked_at():
    others = {**units._versions(), "numpy": "1.0"}
    with pytest.raises(InputError, match=r"numpy .*\(here 1.0\)"):
        units._on_worker(others, os.getcwd(), abs, -1)


def test_processes_share_gpus_evenly(monkeypatch, tmp_path):
    monkeypatch.setattr(units.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(units, "follow", lambda _: None)
    monkeypatch.setattr(units, "_claims", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    gpus, seen = units._gpus(), []
    for _ in range(4):
        units._begin(1, gpus)
        seen.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["4", "7", "4", "7"]
    # One ends, and another takes its place.
    units._claims[1].release()
    units._begin(1, gpus)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
