"""Processes end together: by SIGTERM as by Ctrl-C, and children with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import resource_tracker

# Seconds: between a child's looks for its parent; until one that was told to end begins with that;
# and until it has ended, which is less than what SLURM gives.
_LOOK, _HEARD, _GRACE = 0.5, 8.0, 20.0
_FIRST = "STRANK_FIRST_PROCESS"
_ENDING = (signal.SIGINT, signal.SIGTERM)
_told: list[int] = []
_followed: set[int] = set()


def heed_signals(last_words: Callable[[int], object]) -> None:
    """Let SIGTERM (of SLURM, of `kill`) end this process as Ctrl-C does, and both in some seconds.

    For a command, whose process is its own. The words are said where it cannot say any itself.
    """
    heard, told = os.pipe()
    if sys.platform != "win32":
        os.set_blocking(told, False)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_insist, args=(heard, last_words), daemon=True).start()
    sys.unraisablehook = _lost
    for number in _ENDING:
        signal.signal(number, _stop)


def told_to_end() -> int | None:
    """Which signal told this process to end, if one did."""
    return _told[0] if _told else None


def _stop(number: int, _: object) -> None:
    _told.append(number)
    # Who asks once more does not want to wait for what is to be tidied up.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Not SIG_IGN, of which Python complains for a signal that has come already.
    signal.signal(signal.SIGTERM, _ignore)
    # Those that work for this one are not waited for, nor (torch) missed.
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, _ignore)
    _end_children()
    raise KeyboardInterrupt


def _lost(error: sys.UnraisableHookArgs) -> None:
    """Raise an end again that came where Python lets nothing through, as in a ``__del__``."""
    if _told and error.exc_type is KeyboardInterrupt and sys.platform != "win32":
        signal.signal(signal.SIGTERM, _raise)
        again = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
        again.daemon = True
        again.start()  # not at once: this is such a place, too
    else:
        sys.__unraisablehook__(error)


def _raise(_: int, __: object) -> None:
    signal.signal(signal.SIGTERM, _ignore)
    raise KeyboardInterrupt


def _ignore(_: int, __: object) -> None:
    pass


def _end_children() -> None:
    for child in multiprocessing.active_children():
        child.kill()


def _insist(heard: int, last_words: Callable[[int], object]) -> None:
    """End a process that a signal does not: one that waits for another, or computes on."""
    # Known here at once; Python's own handler waits until the main thread comes back from C.
    while (number := os.read(heard, 1)[0]) not in _ENDING:
        pass
    time.sleep(_HEARD)
    if _told:
        time.sleep(_GRACE - _HEARD)
    else:
        last_words(number)
        _end_children()
    os._exit(128 + number)


def follow(parent: int, _worker: int = 0) -> None:
    """End this process when its parent has ended, however that came; Ctrl-C is the parent's.

    On Windows, where a parent's number outlives it, torch looks after those that read for it.
    """
    if parent in (os.getpid(), *_followed):
        return
    _followed.add(parent)
    # A fork has its parent's: what it is told is not for the parent.
    with suppress(ValueError):  # not the main thread
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        threading.Thread(target=_look_for, args=(parent,), daemon=True).start()


def heed_parent() -> None:
    """Give a child time to end without a word, where its parent has: an error may come of that."""
    if _followed:
        time.sleep(2 * _LOOK)


def _look_for(parent: int) -> None:
    # Not the kernel's own way (Linux), which ends a child with the thread that started it.
    while os.getppid() == parent:
        time.sleep(_LOOK)
    os._exit(1)


@contextmanager
def starting() -> Iterator[None]:
    """Let processes that are started meanwhile not hear Ctrl-C, which a terminal tells to all."""
    if sys.platform == "win32":
        yield
        return
    # It would be started with the first of them, and let Ctrl-C through.
    resource_tracker.ensure_running()
    with _unheard():
        yield


@contextmanager
def _unheard() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def leading() -> Iterator[None]:
    """Let those that are started meanwhile, the other processes of a training, know whom to follow.

    They run the same program from its beginning.
    """
    os.environ[_FIRST] = str(os.getpid())
    try:
        with nullcontext() if sys.platform == "win32" else _unheard():
            yield
    finally:
        os.environ.pop(_FIRST, None)


def follow_first() -> bool:
    """Follow the process that started this one for a training, if one did."""
    first = os.environ.pop(_FIRST, None)
    if first is None:
        return False
    follow(int(first))
    with suppress(ValueError):
        # Told all at once, by SLURM, the first ends, and so do all; else it would be found missing.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return True
