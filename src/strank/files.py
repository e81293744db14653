"""Files that are whole or absent: atomic writes, checksums, output folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from strank.errors import InputError

__all__ = [
    "atomic_path",
    "output_folder",
    "read_json",
    "safe_name",
    "sha256",
    "write_json",
    "writing",
]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file or folder to; move it there on success.

    Readers see the old content or the new, never a part. After an error nothing is left. A folder
    that takes the place of an older one is the exception: the old one goes just before.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with atomic_path(target) as part:
    ...     _ = part.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    # The suffix stays, since many writers choose the format by it.
    part = path.with_name(f".{path.stem}.{uuid4().hex[:8]}.part{path.suffix}")
    try:
        yield part
        if part.is_dir() and path.is_dir():
            shutil.rmtree(path)
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain why a file could not be written: a full disk most of all."""
    try:
        yield
    # Of HDF5, which raises the second kind when it closes a file, only the number can be read.
    except (OSError, RuntimeError) as error:
        number = re.search(r"errno = (\d+)", str(error))
        if number is not None:
            reason = os.strerror(int(number[1]))
        elif isinstance(error, OSError):
            reason = error.strerror or str(error)
        else:
            raise
        raise InputError(
            f"{path}: cannot be written ({reason}); make room there and run again: what is done is "
            "kept"
        ) from error


def output_folder(path: Path) -> Path:
    """Make a folder for results; an :class:`InputError` if that or writing there is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{path}: cannot write there ({error.strerror}); choose another -o"
        ) from error
    return path


def safe_name(name: str) -> str:
    """Turn any name from data into a file name: letters, digits and ``_.-~``, the rest as %XX.

    Examples
    --------
    >>> safe_name("HLA-A"), safe_name("../x"), safe_name("")
    ('HLA-A', '%2E%2E%2Fx', '%')
    """
    quoted = quote(name, safe="")
    return quoted.replace(".", "%2E") if quoted.startswith(".") else quoted or "%"


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, readable and in a stable order."""
    with atomic_path(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; an :class:`InputError` that names the file if it is absent or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
