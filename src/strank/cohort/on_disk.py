"""Sections that stay on disk: one at a time is read, whenever it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from anndata import AnnData

from strank.cohort.rows import RowsOnDisk


class SectionsOnDisk(Mapping[str, AnnData]):
    """Sections by name, of which none is kept in memory.

    ``features`` has those of a section, once it was read, where they stay in a file of their own.
    """

    def __init__(self, names: list[str], read: Callable[[str], AnnData]) -> None:
        self._names, self._read = names, read
        self.features: dict[str, RowsOnDisk] = {}

    def __getitem__(self, name: str) -> AnnData:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
