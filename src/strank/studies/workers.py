"""Work divided among processes, one thread each, since threads would wait for each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import chdir
from typing import TypeVar

import torch
from joblib import Parallel, delayed
from threadpoolctl import threadpool_limits

from strank.processes import follow, starting

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def each(
    work: Callable[[Argument], Result], arguments: Iterable[Argument], jobs: int
) -> Iterator[Result]:
    """Yield the result of every argument as it is done, in no order.

    Examples
    --------
    >>> sorted(each(abs, [-1, 2], jobs=1))
    [1, 2]
    """
    # Processes are kept from call to call, and would stay where the first call was.
    folder = os.getcwd()
    calls = (delayed(_alone)(work, argument, folder) for argument in arguments)
    following = {"initializer": follow, "initargs": (os.getpid(),)}
    with starting():
        results = Parallel(jobs, return_as="generator_unordered", **following)(calls)
    yield from results


def _alone(work: Callable[[Argument], Result], argument: Argument, folder: str) -> Result:
    """Work with one thread; with one job this is the user's own process, left as it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with chdir(folder), threadpool_limits(1):
            return work(argument)
    finally:
        torch.set_num_threads(before)
