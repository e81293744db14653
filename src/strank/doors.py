"""What comes from elsewhere: how deep, large and packed it may be; whether it says what it must.

Limits follow from a file's own size: a small file costs little, and a large one may be read.
"""

from __future__ import annotations

import gzip
import io
import json
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from strank.errors import InputError, said_by

if TYPE_CHECKING:
    from pydantic import BaseModel

    Checked = TypeVar("Checked", bound=BaseModel)

_DEEPEST = 200
_MOST_JSON, _MOST_TOML = 2**31, 2**21
# Text packs well, zeros best: so many bytes of one, and what small files may become.
_TIMES, _SMALL = 100, 2**25
# Of the name and comment in the head of a gzip file.
_LONGEST_HEAD = 2**16
_NAMED, _COMMENTED, _EXTRA = 8, 16, 4


def parse_json(path: Path) -> Any:
    """Read JSON in UTF-8, 16 or 32, with a byte order mark or without; not too deep or large."""
    _check_length(path, _MOST_JSON)
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise _too_deep(path) from None
    _check_depth(path, content)
    return content


def parse_toml(path: Path) -> dict[str, Any]:
    """Read TOML; an :class:`InputError` for what is absent, damaged, too deep or too large."""
    try:
        _check_length(path, _MOST_TOML)
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except RecursionError:
        raise _too_deep(path) from None
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable TOML file ({said_by(error)})") from error
    _check_depth(path, content)
    return content


def _check_length(path: Path, most: int) -> None:
    if (size := path.stat().st_size) > most:
        raise InputError(f"{path}: {size / 1e6:,.0f} MB; at most {most / 1e6:,.0f} MB are read")


def _too_deep(path: Path) -> InputError:
    return InputError(f"{path}: lists within lists more than {_DEEPEST} deep; write it plainly")


def _check_depth(path: Path, content: Any) -> None:
    # By levels and not by calls, which have a limit of their own.
    level: list[Any] = [content]
    for _ in range(_DEEPEST + 1):
        level = [node for node in level if isinstance(node, dict | list)]
        if not level:
            return
        level = [x for node in level for x in (node.values() if isinstance(node, dict) else node)]
    raise _too_deep(path)


def checked(kind: type[Checked], stored: Any, where: str, prefix: str = "") -> Checked:
    """Check what a file says against its schema; the error names the first field that is wrong."""
    from pydantic import ValidationError

    try:
        # What was not stored yet may hold tuples.
        return kind.model_validate(json.loads(json.dumps(stored, default=repr)))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = prefix + ".".join(shown_key(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        problem = {
            "extra_forbidden": "not to be given by a file",
            "missing": "missing",
        }.get(first["type"], said[:1].lower() + said[1:])
        raise InputError(f"{where}: {field or 'content'}: {problem}") from None


def shown_key(part: object) -> str:
    """Show a key of a file, which may be anything, on one short line."""
    text = str(part)
    return text if text.isprintable() and len(text) < 60 else f"{ascii(text)[:56]}..."


@contextmanager
def unpacked(path: Path, *, times: int = _TIMES) -> Iterator[BinaryIO]:
    """Open a file to be read, unpacked if its name ends in ``.gz``, to so many times its size.

    Damage is an `OSError`; more than the size allows an :class:`InputError`.
    """
    if not path.name.endswith(".gz"):
        with path.open("rb") as file:
            yield file
        return
    _check_head(path)
    with gzip.open(path) as packed:
        yield io.BufferedReader(_Unpacked(path, packed, times), 2**17)


class _Unpacked(io.RawIOBase):
    """Bytes of a gzip file, as many as its size allows."""

    def __init__(self, path: Path, packed: Any, times: int) -> None:
        super().__init__()
        self._path, self._packed, self._times = path, packed, times
        self._left = _SMALL + times * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            n_bytes: int = self._packed.readinto(buffer)
        except zlib.error as error:
            raise OSError(f"damaged gzip: {error}") from error
        self._left -= n_bytes
        if self._left < 0:
            raise InputError(
                f"{self._path}: unpacks to more than {self._times} times its size (a decompression "
                "bomb?); unpack it, if it is meant"
            )
        return n_bytes


def _check_head(path: Path) -> None:
    """Refuse a gzip file whose head, a name and a comment, does not end."""
    with path.open("rb") as file:
        head = file.read(_LONGEST_HEAD)
    if len(head) < 10:
        return
    at = 10
    if head[3] & _EXTRA:
        at += 2 + int.from_bytes(head[10:12], "little")
    for flag in (_NAMED, _COMMENTED):
        if head[3] & flag:
            at = head.find(b"\0", at) + 1
            if at == 0:
                raise InputError(f"{path}: a gzip file whose head does not end; pack it again")
