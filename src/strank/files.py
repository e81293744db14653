"""Files that are whole or absent: atomic writes, checksums, output folders."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

from strank.errors import InputError, some

# What Windows takes for a device, with any suffix.
_PORTS = {f"{port}{n}" for port in ("COM", "LPT") for n in range(10)}
_DEVICES = _PORTS | {"CON", "PRN", "AUX", "NUL"}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a path beside ``path`` to write a file or folder to; move it there on success."""
    # Readers see the old content or the new, never a part; after an error nothing is left. Only of
    # a folder that takes the place of an older one is the old one gone a moment before.
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
    """Make a folder for results, if that and writing there are possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".{uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{path}: cannot write there ({error.strerror}); choose another `folder`"
        ) from error
    return path


def check_output(path: Path) -> None:
    """Refuse a folder where results cannot be written, before the work; leave no trace of it."""
    # Where it would be made is looked at, not made and removed: another process may be using it.
    output_folder(next(folder for folder in (path, *path.parents) if folder.exists()))


def check_room(folder: Path, n_bytes: int) -> None:
    """Refuse a folder on whose disk there is no room for so many bytes more."""
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if n_bytes > free:
        raise InputError(
            f"{folder}: {n_bytes / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free; make "
            "room there, or choose another `folder`"
        )


def claim_folder(
    folder: Path,
    facts: Mapping[str, Any],
    *,
    kind: str,
    resume: bool | None = None,
    growing: Mapping[str, Mapping[str, Any]] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Make a folder that of a run of these facts, kept in ``{kind}.json``, or go on with that run.

    ``resume``: go on only (True), begin anew where one of the kind was (False), or what there is to
    do (None). Of ``growing`` facts later runs may add names, and must agree on those there are.
    What is told ``about`` the run is not compared.
    """
    path = folder / f"{kind}.json"
    ours, empty = path.is_file(), not folder.exists() or not any(folder.iterdir())
    if resume and not ours:
        raise InputError(f"{folder}: no {kind} to resume; start anew, or choose another `folder`")
    if not (ours or empty):
        raise InputError(f"{folder}: exists and is not a {kind}; choose another `folder`")
    if ours and resume is False:
        shutil.rmtree(folder)
        ours = False
    now, more = _as_read_back(facts), _as_read_back(growing or {})
    before = read_json(path) if ours else {}
    grown = {name: part | before.get(name, {}) for name, part in more.items()}
    same = {name: before.get(name) == value for name, value in now.items()}
    same |= {name: grown[name] | part == grown[name] for name, part in more.items()}
    told = _as_read_back(about or {})
    same = {name: False for name in before if name not in told} | same
    if before and (different := [name for name, equal in same.items() if not equal]):
        raise InputError(
            f"{folder}: {kind} of another {some(different)}; choose another `folder`, or remove it"
        )
    output_folder(folder)
    write_json(path, now | grown | told)


def _as_read_back(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Make lists of tuples, and a word of NaN, which JSON has not."""
    read: dict[str, Any] = json.loads(json.dumps(dict(facts)), parse_constant=str)
    return read


def safe_name(name: str) -> str:
    """Turn any name from data into a file name: letters, digits and ``_.-~``, the rest as %XX.

    >>> safe_name("HLA-A"), safe_name("../x"), safe_name("")
    ('HLA-A', '%2E%2E%2Fx', '%')
    """
    quoted = quote(name, safe="")
    if quoted.partition(".")[0].upper() in _DEVICES:
        quoted = f"%{ord(quoted[0]):02X}{quoted[1:]}"
    return quoted.replace(".", "%2E") if quoted.startswith(".") else quoted or "%"


def file_names(names: Iterable[str]) -> dict[str, str]:
    """Name files after things, apart even where capitals are not told apart (Windows, macOS).

    >>> file_names(["C1orf1", "C1ORF1", "ERBB2"])
    {'C1orf1': 'C1orf1', 'C1ORF1': 'C1ORF1~2', 'ERBB2': 'ERBB2'}
    """
    named, taken = dict[str, str](), Counter[str]()
    for name in dict.fromkeys(names):
        safe = safe_name(name)
        taken[safe.casefold()] += 1
        n = taken[safe.casefold()]
        named[name] = f"{safe}~{n}" if n > 1 else safe
    return named


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, readable and in a stable order."""
    with atomic_path(path) as part:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON; of a file that is absent or damaged say so."""
    try:
        # From bytes, the encoding is found: UTF-8, 16 or 32, with a byte order mark or without.
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a readable JSON file: packed, or text that is neither UTF-8 nor UTF-16; "
            "unpack it, or save it as UTF-8"
        ) from error
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
