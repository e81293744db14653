"""Progress bars, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from strank.errors import printable

Advance = Callable[[int], object]
# Makes what shows the progress of so many tiles: a context that yields what advances it.
Bar = Callable[[str, int], AbstractContextManager[Advance | None]]
Say = Callable[[str], object]


def ignore(_: object) -> None:
    """Hear of progress, or of what is said, and do nothing."""


@contextmanager
def progress(
    description: str, total: int, *, unit: str = "", hidden: bool = False
) -> Iterator[Callable[[int], object]]:
    """Show a progress bar with the time left, and so many units a second; yield what advances it.

    >>> with progress("Genes", 3, hidden=True) as advance:
    ...     _ = advance(3)
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Speed(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:.0f} {unit}/s" if unit and speed else "")

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        Speed(),
    )
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=hidden) as bar:
        task = bar.add_task(printable(description), total=total)
        yield lambda n: bar.advance(task, n)
