"""Where units run: slides, sections or cells, all of them or a share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from strank.errors import InputError

_Unit = TypeVar("_Unit")


@dataclass(frozen=True)
class Where:
    """Where units run: in this process, in ``jobs``, on workers of Dask; all, or a share of them.

    ``dask`` is the address of a scheduler or its file; ``shard`` is ``"2/8"``, the second of eight,
    or ``"slurm"``, what the array of jobs says.
    """

    jobs: int = 1
    dask: str | None = None
    shard: str | None = None

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise InputError(f"`jobs` must be at least 1; got {self.jobs}")
        if self.dask is not None and self.jobs > 1:
            raise InputError("`jobs` are processes here, `dask` workers elsewhere: give one")
        _ = self.share

    @property
    def share(self) -> tuple[int, int] | None:
        """Which of how many shares, from 1."""
        if self.shard is None:
            return None
        if self.shard == "slurm":
            return _share_of_array()
        first, _, second = self.shard.partition("/")
        if first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
            return int(first), int(second)
        raise InputError(
            f"`shard={self.shard}`: give its number and how many there are, as in 2/8, or slurm"
        )

    @property
    def is_here(self) -> bool:
        """Whether units run in this process."""
        return self.dask is None and self.jobs == 1

    def mine(self, units: Iterable[_Unit], key: Callable[[_Unit], str] = str) -> list[_Unit]:
        """Choose this share of all units, in their order: which they are depends on keys only.

        >>> Where(shard="2/2").mine(["c", "a", "b"])
        ['b']
        """
        units = list(units)
        if self.share is None:
            return units
        number, n_shares = self.share
        chosen = set(sorted(map(key, units))[number - 1 :: n_shares])
        return [unit for unit in units if key(unit) in chosen]


def _share_of_array() -> tuple[int, int]:
    numbers = []
    for name, default in (("ID", None), ("COUNT", None), ("MIN", "1"), ("STEP", "1")):
        given = os.environ.get(f"SLURM_ARRAY_TASK_{name}", default)
        if given is None or not given.isdecimal():
            raise InputError(
                f"`shard=slurm`: SLURM_ARRAY_TASK_{name} is not set; submit with `sbatch --array=`"
            )
        numbers.append(int(given))
    task, n_tasks, first, step = numbers
    return (task - first) // step + 1, n_tasks
