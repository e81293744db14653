"""One function over many units, slides, sections or cells, on the engine that is asked for.

Each unit ends in whole files of its own, so engines need know no more of it than when it is done.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import AbstractContextManager, chdir, contextmanager
from dataclasses import dataclass, field
from errno import ENOSPC
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from pickle import PicklingError
from typing import Any, Generic, TypeVar

from strank.errors import InputError, said_by, some
from strank.extras import explain_absence, need
from strank.processes import follow, starting
from strank.progress import Say
from strank.storage import Claim
from strank.version import __version__
from strank.where import Where

Argument = TypeVar("Argument")
Result = TypeVar("Result")
# Given the unit whose process was lost, and what is to be said of it.
Lost = Callable[[Argument, str], Result]
# Yields the results of units, and calls with each whose process was lost.
_Run = Callable[[Iterable[Argument], Callable[[Argument], object]], Iterator[Result]]

# How often a unit is started by itself whose process was lost when it was under way.
_TRIES = 2
# Seconds in which a scheduler answers.
_ANSWER = 10
_LOST = (
    "the process at it was lost more than once (killed, or out of memory); use fewer `jobs`, or "
    "workers with more memory"
)
# How many threads the libraries of a process start.
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
# What a worker of Dask does at a time.
_one_at_a_time = threading.Lock()
_claims: list[Claim] = []


def each(
    work: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    where: Where,
    *,
    say: Say | None = None,
    lost: Lost[Argument, Result] | None = None,
    all_threads: bool = False,
) -> Iterator[Result]:
    """Yield the result of every argument as it is done, in no order; what is raised ends all.

    ``work`` travels once to a process and stays there, so it may hold a model. A unit works with
    one thread, but for ``all_threads`` of this process where it runs here. One whose process was
    lost is started again; if that does not help, ``lost`` makes its result.

    >>> sorted(each(abs, [-1, 2], Where()))
    [1, 2]
    """
    if where.dask is not None:
        yield from _insisting(_on_dask(work, where.dask, say or _say), arguments, lost or _raise)
    elif where.jobs > 1:
        yield from _insisting(_in_processes(work, where.jobs), arguments, lost or _raise)
    else:
        for argument in arguments:
            yield work(argument) if all_threads else _here(work, argument)


@dataclass(frozen=True)
class Outcome(Generic[Result]):
    """What became of a unit: its result, or why there is none; what was said of it meanwhile."""

    unit: Any
    result: Result | None = None
    error: str = ""
    said: tuple[str, ...] = ()
    seconds: float = 0.0
    host: str = field(default_factory=socket.gethostname)

    @classmethod
    def of(cls, unit: Any, error: Exception, **about: Any) -> Outcome[Any]:
        """Say in one line what went wrong."""
        told = " ".join((reason_of(error) or str(error)).split())
        if reason_of(error) is None:
            at = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} in {Path(at.filename).name}, line {at.lineno}"
            told = place + (f": {told}" if told else "")
        return cls(unit, error=told, **about)


def reason_of(error: Exception) -> str | None:
    """Say an error in words that a user can act on; ``None`` for a bug."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return explain_absence(error)
    if not isinstance(error, OSError):
        return None
    if error.errno == ENOSPC or "No space left" in str(error):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}the disk is full; free some space, what was finished is kept"
    return None if error.filename is None else f"{error.filename}: {error.strerror}"


def outcomes(
    work: Callable[[Argument, Say], Result],
    arguments: Iterable[Argument],
    where: Where,
    *,
    say: Say | None = None,
    all_threads: bool = False,
) -> Iterator[Outcome[Result]]:
    """Yield what became of every unit: whatever fails, a full disk or a bug, the others go on.

    ``work`` is also given what it may say; ``say`` is told of the engine.
    """

    def lost(argument: Argument, told: str) -> Outcome[Result]:
        return Outcome(argument, error=told)

    run = partial(_outcome, work)
    yield from each(run, arguments, where, say=say, lost=lost, all_threads=all_threads)


def _outcome(work: Callable[[Argument, Say], Result], argument: Argument) -> Outcome[Result]:
    start, said = time.perf_counter(), list[str]()

    def about() -> dict[str, Any]:
        return {"said": tuple(said), "seconds": round(time.perf_counter() - start, 1)}

    try:
        return Outcome(argument, work(argument, said.append), **about())
    # A bug, or memory that is short, must not end a night's work any more than a bad file.
    except Exception as error:
        return Outcome.of(argument, error, **about())


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _raise(argument: Any, told: str) -> Any:
    raise InputError(f"{argument}: {told}")


def _here(work: Callable[[Argument], Result], argument: Argument) -> Result:
    import torch  # noqa: F401, not by the unit, which would find one thread only

    return _with_one_thread(work, argument)


def _with_one_thread(work: Callable[[Argument], Result], argument: Argument) -> Result:
    """Work with one, since threads would wait for each other; leave the process as it was."""
    from threadpoolctl import threadpool_limits

    # Imported later, in a process of its own, it finds OMP_NUM_THREADS=1.
    torch: Any = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 1
    if torch:
        torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return work(argument)
    finally:
        if torch:
            torch.set_num_threads(before)


def _insisting(
    engine: AbstractContextManager[_Run[Argument, Result]],
    arguments: Iterable[Argument],
    lost: Lost[Argument, Result],
) -> Iterator[Result]:
    """Run units; those whose process was lost once more, and each alone.

    What is under way beside a unit may be lost with it, so only then it shows which is at fault.
    """
    suspects: list[Argument] = []
    with engine as run:
        yield from run(arguments, suspects.append)
        for argument in suspects:
            for _ in range(_TRIES):
                again: list[Argument] = []
                yield from run([argument], again.append)
                if not again:
                    break
            else:
                yield lost(argument, _LOST)


def _packed(work: Callable[..., Any]) -> bytes:
    """Pickle what travels to other processes."""
    import cloudpickle

    try:
        return cloudpickle.dumps(work)
    except (TypeError, PicklingError) as error:
        raise InputError(
            f"what is to be done cannot be sent to other processes ({said_by(error)}); give arrays "
            "or paths of files"
        ) from error


# Processes of this machine.


@contextmanager
def _in_processes(
    work: Callable[[Argument], Result], jobs: int
) -> Iterator[_Run[Argument, Result]]:
    # Once for all units, since it may hold a network.
    with tempfile.TemporaryDirectory(prefix="strank-") as place:
        Path(place, "work").write_bytes(_packed(work))
        # Processes are kept from call to call, and would stay where the first call was.
        yield partial(_pool, partial(_in_process, Path(place, "work"), os.getcwd()), jobs)


def _pool(
    call: Callable[[Argument], Result],
    jobs: int,
    arguments: Iterable[Argument],
    lost: Callable[[Argument], object],
) -> Iterator[Result]:
    """Call in processes, as many units at a time, so that it is known which are under way."""
    from joblib.externals.loky import get_reusable_executor
    from joblib.externals.loky.process_executor import BrokenProcessPool

    how: dict[str, Any] = {"initializer": _begin, "initargs": (os.getpid(), _gpus())}
    how |= {"env": dict.fromkeys(_THREADS, "1"), "timeout": 300}
    left, under_way = iter(arguments), dict[Future, Argument]()
    pool: Any = None
    try:
        while True:
            for argument in islice(left, jobs - len(under_way)):
                with starting():
                    pool = get_reusable_executor(jobs, **how)
                    future = _submit(pool, call, argument)
                under_way[future] = argument
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                argument = under_way.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    lost(argument)
                else:
                    yield result
    finally:
        if under_way:
            pool.shutdown(kill_workers=True)


def _submit(pool: Any, call: Callable[[Argument], Result], argument: Argument) -> Future:
    from joblib.externals.loky.process_executor import BrokenProcessPool

    try:
        return pool.submit(call, argument)
    except BrokenProcessPool as error:
        # Found out between two units.
        lost = Future[Any]()
        lost.set_exception(error)
        return lost


@lru_cache(maxsize=1)
def _read(path: Path) -> Any:
    import pickle

    return pickle.loads(path.read_bytes())


def _in_process(work: Path, folder: str, argument: Any) -> Any:
    with chdir(folder):
        return _with_one_thread(_read(work), argument)


def _gpus() -> tuple[str, ...]:
    """Name the GPUs of this machine that may be used."""
    import torch

    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return tuple(filter(None, os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    return tuple(map(str, range(torch.cuda.device_count())))


def _begin(parent: int, gpus: Sequence[str]) -> None:
    """Begin a process: it ends with its parent, and sees one of several GPUs."""
    follow(parent)
    if len(gpus) < 2:
        return
    # The lowest number that no other process of the same parent has, nor one that was killed.
    place = Path(tempfile.gettempdir(), f"strank-gpus-{parent}")
    place.mkdir(exist_ok=True)
    for number in count():
        if claim := Claim.take(place / str(number), wait=False):
            _claims.append(claim)
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
            return


# Workers of Dask.


@contextmanager
def _on_dask(
    work: Callable[[Argument], Result], scheduler: str, say: Say
) -> Iterator[_Run[Argument, Result]]:
    import cloudpickle

    with _client(scheduler, say) as client:
        # Not with each unit; and known to the scheduler, since a worker that has it may be lost.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sending large graph")
            shared = client.submit(cloudpickle.loads, _packed(work), pure=False)
        yield partial(_submitted, client, partial(_on_worker, _versions(), os.getcwd(), shared))


def _submitted(
    client: Any,
    call: Any,
    arguments: Iterable[Argument],
    lost: Callable[[Argument], object],
) -> Iterator[Any]:
    from distributed import KilledWorker, as_completed

    futures = {client.submit(call.func, *call.args, a, pure=False): a for a in arguments}
    try:
        for future in as_completed(list(futures), loop=client.loop):
            argument = futures.pop(future)
            try:
                result = future.result()
            except KilledWorker:
                lost(argument)
            except CancelledError as error:
                raise InputError(
                    "Dask's scheduler was lost; what was finished is kept, run again"
                ) from error
            else:
                yield result
    finally:
        client.cancel(list(futures))


@contextmanager
def _client(scheduler: str, say: Say) -> Iterator[Any]:
    """Turn to a scheduler whose workers have the versions that are here."""
    need("distributed")
    from distributed import Client

    is_file = scheduler.endswith(".json")
    if is_file and not Path(scheduler).is_file():
        raise InputError(f"{scheduler}: no such file; `dask scheduler --scheduler-file` writes it")
    given = {"scheduler_file": scheduler} if is_file else {"address": scheduler}
    try:
        client = Client(**given, timeout=_ANSWER, set_as_default=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"`dask={scheduler}`: no scheduler answers there; see that `dask scheduler` runs, and "
            "that this machine reaches it"
        ) from error
    with client:
        found = client.run(_versions, on_error="return")
        for name, versions in found.items():
            _check_versions(versions, name, _versions())
        if client.dashboard_link:
            say(f"Dask has {len(found)} workers; watch them at {client.dashboard_link}")
        yield client


@lru_cache
def _versions() -> dict[str, str]:
    """Versions on which results depend."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {"strank": __version__, "python": python} | {m: version(m) for m in ("numpy", "torch")}


def _check_versions(there: Any, worker: str, here: dict[str, str]) -> None:
    if not isinstance(there, dict):
        raise InputError(f"Dask's worker {worker} has no strank ({said_by(there)}); install it")
    if different := [name for name in here if there[name] != here[name]]:
        told = some(f"{name} {there[name]} (here {here[name]})" for name in different)
        raise InputError(f"Dask's worker {worker} has {told}; start workers with the same versions")


def _on_worker(
    versions: dict[str, str], folder: str, work: Callable[[Argument], Result], argument: Argument
) -> Result:
    # Workers may come late, after those that were looked at.
    _check_versions(_versions(), socket.gethostname(), versions)
    # Units hold a process's folder, threads and random numbers.
    with _one_at_a_time:
        try:
            os.chdir(folder)
        except OSError as error:
            raise InputError(
                f"{folder}: not there on Dask's worker {socket.gethostname()}; workers need the "
                "same disk"
            ) from error
        return _with_one_thread(work, argument)
