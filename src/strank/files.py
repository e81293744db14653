"""What is written for people and later runs: tables, JSON, and whose an output folder is."""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from urllib.parse import quote

from strank.doors import parse_json
from strank.errors import InputError, said_by, some
from strank.storage import (
    NUMBER,
    Claim,
    new_file,
    read_sealed,
    recover,
    remove,
    remove_rest,
    writing,
)
from strank.where import Where

if TYPE_CHECKING:
    import pandas as pd

# What Windows takes for a device, with any suffix.
_PORTS = {f"{port}{n}" for port in ("COM", "LPT") for n in range(10)}
_DEVICES = _PORTS | {"CON", "PRN", "AUX", "NUL"}
_SEAL = "strank_sha256"
# Kinds of columns.
_TEXT = ("object", "string", "str")
# What a spreadsheet runs, or drops, at the start of a cell; marks of ours may stand before it.
_RUNS = re.compile(r"'*[=+\-@\t\r\n]")
# Of a process among those that share a training.
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


@contextmanager
def claimed(path: Path, *, wait: bool = False, shard: str | None = None) -> Iterator[None]:
    """Have an output to oneself, or refuse it; sweep what killed runs have left of it.

    Other shards of a run may share it. Whether it can be written is known before the work.
    """
    path = path.expanduser().absolute()
    if path.is_file():
        raise InputError(f"{path}: cannot write there (it is a file); choose another `folder`")
    check_output(path if path.is_dir() else path.parent)
    made = [folder for folder in path.parents if not folder.exists()]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside it, since it may be swapped; inside where that cannot be, as a mounted volume.
        beside = os.access(path.parent, os.W_OK) or not path.is_dir()
        place, share = path if beside else path / path.name, Where(shard=shard).share
        taken = [Claim.take(place, wait=wait, shared=share is not None)]
        if share is not None:
            own = place.with_name(f"{place.name}.{share[0]}-of-{share[1]}")
            taken.append(Claim.take(own, wait=wait))
    if None in taken:
        for claim in filter(None, taken):
            claim.release()
        raise InputError(
            f"{path}: another run is writing there; wait for it, or choose another `folder`"
        )
    try:
        # Not beside others, whose locks another machine may not see.
        if share is None:
            recover(path)
            for part in path.rglob(f".*.{NUMBER}.part*"):
                remove_rest(part)
        yield
    finally:
        for claim in filter(None, taken):
            claim.release()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


# What the functions that are at work in this thread have claimed.
_held: ContextVar[frozenset[Path]] = ContextVar("claimed outputs", default=frozenset())


def claims(output: str) -> Callable[[Callable[_Given, _Found]], Callable[_Given, _Found]]:
    """Let a function run only while it has the folder of this argument, if given, to itself.

    What one has, those that it calls have too.
    """

    def decorate(work: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
        signature = inspect.signature(work)

        @wraps(work)
        def alone(*args: _Given.args, **options: _Given.kwargs) -> _Found:
            given = signature.bind(*args, **options).arguments
            path = given.get(output)
            # Of processes that share a training, the first has it for all.
            if path is None or any(os.environ.get(name, "0") != "0" for name in _RANKS):
                return work(*args, **options)
            path = Path(path).expanduser().absolute()
            if path in _held.get():
                return work(*args, **options)
            with claimed(path, shard=given.get("shard")):
                before = _held.set(_held.get() | {path})
                try:
                    return work(*args, **options)
                finally:
                    _held.reset(before)

        return alone

    return decorate


def output_folder(path: Path) -> Path:
    """Make a folder for results, if that and writing there are possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Without a name, where that can be: it goes with the process.
        TemporaryFile(dir=path).close()
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
    ours, empty = path.is_file(), not folder.exists() or not any(folder.glob("[!.]*"))
    if resume and not ours:
        raise InputError(f"{folder}: no {kind} to resume; start anew, or choose another `folder`")
    if not (ours or empty):
        raise InputError(f"{folder}: exists and is not a {kind}; choose another `folder`")
    if ours and resume is False:
        # The facts go last, by those that take their place: a run that is killed here has ours.
        for rest in folder.iterdir():
            if rest != path:
                remove(rest)
        ours = False
    now, more = _as_read_back(facts), _as_read_back(growing or {})
    before = read_facts(path) if ours else {}
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
    write_json(path, now | grown | told, seal=True)


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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


def write_bytes(path: Path, content: bytes | memoryview, *, seal: bool = False) -> None:
    """Write a file that is whole or absent."""
    with new_file(path, seal=seal) as file:
        file.write(content)


def write_utf8(path: Path, text: str) -> None:
    """Write a text, in UTF-8, with the ends of lines that it has."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any, *, seal: bool = False) -> None:
    """Write JSON, readable and in a stable order; with a seal `read_json` knows it again."""
    if seal:
        content = {**content, _SEAL: _checksum(content)}
    write_utf8(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_table(path: Path, table: pd.DataFrame, *, seal: bool = False, **options: Any) -> None:
    """Write a table as CSV, without its index; with options of `pandas.DataFrame.to_csv`.

    A ``'`` goes before text that a spreadsheet would run, ``=1+1``; `read_written` takes it away.
    """
    with new_file(path, seal=seal) as file:
        _to_csv(table, file, **options)


def table_bytes(table: pd.DataFrame) -> bytes:
    """Make what `write_table` writes."""
    file = io.BytesIO()
    _to_csv(table, file)
    return file.getvalue()


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Write text that Markdown leaves as it is as a table, one line a row.

    >>> print(markdown_table(["gene", "lift"], [["ERBB2", "0.30"]]))
    | gene | lift |
    | --- | --- |
    | ERBB2 | 0.30 |
    """
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_written(path: Path, *, sealed: bool = False, **options: Any) -> pd.DataFrame:
    """Read what `write_table` wrote, with a seal if told so; options of `pandas.read_csv`."""
    import pandas as pd

    table = pd.read_csv(io.BytesIO(read_sealed(path)) if sealed else path, **options)
    return _each_text(table, _unmarked)


def _to_csv(table: pd.DataFrame, file: Any, **options: Any) -> None:
    table = _each_text(table, _marked)
    # Python before 3.13 would not quote what only a return divides.
    returns = any("\r" in text for text in _texts(table))
    quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    table.to_csv(file, **({"index": False, "lineterminator": "\n", "quoting": quoting} | options))


def _each_text(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """Change every text in a copy of a table, its titles included."""
    changed = table.copy(deep=False)
    changed.columns = table.columns.map(change)
    if table.index.dtype.name in _TEXT:
        changed.index = table.index.map(change)
    for i, (_, column) in enumerate(table.items()):
        if column.dtype.name == "category":
            changed.isetitem(i, column.cat.rename_categories(change))
        elif column.dtype.name in _TEXT:
            changed.isetitem(i, column.map(change))
    return changed


def _texts(table: pd.DataFrame) -> Iterator[str]:
    parts = [table.columns, table.index if table.index.dtype.name in _TEXT else ()]
    for _, column in table.items():
        if column.dtype.name == "category":
            parts.append(column.cat.categories)
        elif column.dtype.name in _TEXT:
            parts.append(column)
    return (value for part in parts for value in part if isinstance(value, str))


def _marked(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and _RUNS.match(value) else value


def _unmarked(value: Any) -> Any:
    marked = isinstance(value, str) and value.startswith("'") and _RUNS.match(value)
    return value[1:] if marked else value


def read_json(path: Path) -> Any:
    """Read JSON; of a file that is absent or damaged say so."""
    try:
        content = parse_json(path)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not a readable JSON file: packed, or text that is neither UTF-8 nor UTF-16; "
            "unpack it, or save it as UTF-8"
        ) from error
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable JSON file ({said_by(error)})") from error
    if isinstance(content, dict) and content.pop(_SEAL, None) not in (None, _checksum(content)):
        raise InputError(f"{path}: damaged (it is not as it was written); make it again")
    return content


def read_facts(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold named facts."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no named facts (a JSON object); make it again")
    return content
