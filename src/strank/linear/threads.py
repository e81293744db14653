"""How many threads matrices are worth, and work that is divided among threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController

_Item = TypeVar("_Item")
_T = TypeVar("_T")

# Multiplications in a product of features and weights. Below it threads cost more than they bring,
# and on a busy machine they wait for each other: 50 genes x 730 spots took 0.4 s with one thread,
# and 40 s with two that had to share the cores with other programs.
_WORTH_THREADS = 100_000_000


def few_threads(n_spots: int, n_features: int, n_genes: int) -> AbstractContextManager[object]:
    """Limit a small problem to one thread; the limit ends with the context.

    >>> before = torch.get_num_threads()
    >>> with few_threads(100, 20, 10):
    ...     torch.get_num_threads()
    1
    >>> torch.get_num_threads() == before
    True
    """
    small = n_spots * n_features * n_genes < _WORTH_THREADS
    return _controller().limit(limits=1) if small else nullcontext()


@cache
def _controller() -> ThreadpoolController:
    """Find the libraries that have threads, which takes 5 ms."""
    return ThreadpoolController()


def in_parallel(
    work: Callable[[_Item], _T], items: Iterable[_Item], n_threads: int
) -> Iterator[_T]:
    """Yield the results of items in their order, each item on one thread.

    Threads that share a matrix product wait for each other at every one of them; threads with work
    of their own do not.

    >>> list(in_parallel(lambda x: x * x, [1, 2, 3], 2))
    [1, 4, 9]
    """
    if n_threads == 1:
        yield from map(work, items)
        return
    before, alone = torch.get_num_threads(), partial(torch.set_num_threads, 1)
    alone()
    try:
        with ThreadPoolExecutor(n_threads, initializer=alone) as pool:
            yield from pool.map(work, items)
    finally:
        torch.set_num_threads(before)
