"""Progress bars, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["progress"]


@contextmanager
def progress(
    description: str, total: int, *, hidden: bool = False
) -> Iterator[Callable[[int], object]]:
    """Show a progress bar with the time left; yields what advances it.

    Examples
    --------
    >>> with progress("Genes", 3, hidden=True) as advance:
    ...     _ = advance(3)
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)
