"""HDF5 from elsewhere is walked through by another process first, since HDF5 may crash or hang.

A file that strank wrote and that is as it was written needs none; what was found is remembered.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from strank.errors import InputError
from strank.hdf5_walk import NO_HDF5, REFUSED
from strank.storage import check_seal

# What a file may ask for: so many times its size, since counts pack well, and what small ones may.
_TIMES, _SMALL = 100, 2**26
# Seconds of computing for any file, and bytes a second; of waiting for a disk besides.
_SECONDS, _BYTES_A_SECOND, _WAITS = 5.0, 2e6, 24.0
_SCRIPT = Path(__file__).with_name("hdf5_walk.py")

_passed: set[tuple[str, int, int]] = set()


def check_hdf5(path: Path, *, sealed: bool | None = None) -> None:
    """Refuse an HDF5 file of elsewhere that crashes, hangs, or asks for far more than it holds.

    ``sealed``: whether it has a seal that was found whole; ``None`` to look. A file that is no HDF5
    passes: whoever opens it says so.
    """
    try:
        known = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    key = str(path.resolve()), known.st_size, known.st_mtime_ns
    if key in _passed:
        return
    if not (check_seal(path) if sealed is None else sealed):
        _walk(path, known.st_size)
    _passed.add(key)


def _walk(path: Path, size: int) -> None:
    most = _SMALL + _TIMES * size
    seconds = _SECONDS + size / _BYTES_A_SECOND
    code, said = run_walk(path, most, seconds)
    if code == REFUSED:
        raise InputError(f"{path}: {said}; write the file again")
    slow = {-getattr(signal, name, 0) for name in ("SIGXCPU", "SIGKILL")}
    if code in slow:
        raise InputError(
            f"{path}: damaged (reading it does not end, or takes all memory); copy or write it "
            "again"
        )
    # Windows has no signals, but codes that no program ends with by itself.
    if code < 0 or code > 255:
        raise InputError(f"{path}: damaged (HDF5 crashes when it reads it); copy or write it again")


def run_walk(path: Path, most: int, seconds: float) -> tuple[int, str]:
    """Walk through a file in a process of its own; its exit code, and what it said."""
    import h5py
    import numpy

    places = dict.fromkeys(str(Path(str(m.__file__)).parents[1]) for m in (h5py, numpy))
    given = [str(_SCRIPT), str(path.absolute()), str(most), str(seconds), *places]
    # Without what else is installed, which may be slow to find; if h5py needs that, with it.
    for flags in (["-I", "-S"], ["-I"]):
        try:
            done = subprocess.run(
                [sys.executable, *flags, *given],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                timeout=_WAITS * seconds,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
        except subprocess.TimeoutExpired:
            return -getattr(signal, "SIGKILL", 9), ""
        if done.returncode != NO_HDF5:
            return done.returncode, done.stdout.decode("utf-8", "replace")
    raise RuntimeError(f"{sys.executable} cannot import h5py, which this process has")
