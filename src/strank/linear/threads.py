"""How many threads small matrices are worth."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

from threadpoolctl import ThreadpoolController

__all__ = ["few_threads"]

# Multiplications in a product of features and weights. Below it threads cost more than they bring,
# and on a busy machine they wait for each other: 50 genes x 730 spots took 0.4 s with one thread,
# and 40 s with two that had to share the cores with other programs.
_WORTH_THREADS = 300_000_000


def few_threads(n_spots: int, n_features: int, n_genes: int) -> AbstractContextManager[object]:
    """Limit a small problem to one thread; the limit ends with the context.

    Examples
    --------
    >>> import torch
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
