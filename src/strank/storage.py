"""The one way in which bytes come to the disk, and are known again: whole, checked, by one run.

A file is written to a part beside it, brought to the disk, read back and compared with what was
meant, and renamed. A folder and an older one change places at once; where the system cannot do
that, by two renames, between which either can be had again. What is read again by later runs ends
with a seal: the checksum of all before.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import re
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from uuid import uuid4

from strank.errors import InputError

fcntl: Any = None
msvcrt: Any = None
with suppress(ImportError):
    import fcntl
with suppress(ImportError):
    import msvcrt

# A part is compared by blocks, since HDF5 and TIFF come back to what they have written.
_BLOCK = 2**16
# Writers of tables and archives write by the line.
_BUFFER = 2**20
# HDF5, and torch, do not mind what stands behind their own end.
_SEAL, _SEALED = b"\nstrank sha256 ", re.compile(rb"\nstrank sha256 ([0-9a-f]{64})\n")
_SEAL_BYTES = len(_SEAL) + 65
# Of a part: its name has it, and so has that of the folder whose place it takes.
NUMBER = "[0-9a-f]" * 8
_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


@contextmanager
def new_file(path: Path, *, seal: bool = False) -> Iterator[BinaryIO]:
    """Yield a file to write to, in any order; on success it becomes ``path``, else it goes.

    An :class:`InputError` if anything of it could not be written, or is read back otherwise, even
    where the writer goes on. Not for HDF5, which may crash when a write fails.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tidy(path)
        part, file = _begin(path, _Part)
        buffered = _Buffered(file, _BUFFER)
    try:
        try:
            yield cast(BinaryIO, buffered)
            buffered.flush()
        except BaseException as error:
            if isinstance(file.error, OSError):
                raise _told(path, file.error) from error
            if file.error is not None and file.error is not error:
                raise file.error from error
            raise
        with writing(path):
            file.finish(seal=seal)
            os.replace(part, path)
        _sync_folder(path.parent)
    finally:
        file.shut()
        with suppress(OSError):
            part.unlink(missing_ok=True)


class _Buffered(io.BufferedRandom):
    """What a text wrapper, say, may close before the end of the file under way."""

    def close(self) -> None:
        self.flush()


class _Part(io.RawIOBase):
    """A file under way: what was meant to be in every block of it, and the first error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.error: BaseException | None = None
        self._file = open(path, "x+b", buffering=0)  # noqa: SIM115
        self._meant: dict[int, tuple[int, int]] = {}  # checksum of so many first bytes of a block
        self._at = self._end = 0

    def readable(self) -> bool:
        return True

    writable = seekable = readable

    # Not `fileno`, by which NumPy would write past it.
    @property
    def number(self) -> int:
        """Of the open file."""
        return self._file.fileno()

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (0, self._at, self._end)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._at)
        n_bytes = self._file.readinto(buffer)
        self._at += n_bytes
        return n_bytes

    def write(self, data: Any) -> int:
        view = memoryview(data)
        n_bytes = view.nbytes
        if n_bytes and not self._file.closed:  # the buffer before it is emptied once more
            with self._remembering():
                self._write(view.cast("B"))
        return n_bytes

    def truncate(self, size: int | None = None) -> int:
        size = self._at if size is None else size
        with self._remembering():
            self._truncate(size)
        return size

    def finish(self, *, seal: bool) -> None:
        """Bring it to the disk, and compare what is read back."""
        if self.error is not None:
            raise self.error
        digest = self._compare()
        if seal:
            self.seek(0, os.SEEK_END)
            self.write(_SEAL + digest.encode() + b"\n")
            os.fsync(self.number)
            self._held((self._end - 1) // _BLOCK)

    def shut(self) -> None:
        """Close it; what is given it may have called `close` before its end."""
        self._file.close()

    def close(self) -> None:
        """Leave it open, to be compared."""

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.error = self.error or error
            raise

    def _write(self, view: memoryview) -> None:
        meant = dict(self._changed(view))
        self._file.seek(self._at)
        left = view
        while left:
            left = left[self._file.write(left) :]
        self._meant |= meant
        self._at += len(view)
        self._end = max(self._end, self._at)

    def _changed(self, view: memoryview) -> Iterator[tuple[int, tuple[int, int]]]:
        start = 0
        while start < len(view):
            block, first = divmod(self._at + start, _BLOCK)
            piece = view[start : start + _BLOCK - first]
            checksum, length = self._meant.get(block, (0, 0))
            if first == length:
                yield block, (zlib.crc32(piece, checksum), first + len(piece))
            else:
                whole = bytearray(self._held(block)[:length]).ljust(first, b"\0")
                whole[first : first + len(piece)] = piece
                yield block, (zlib.crc32(whole), len(whole))
            start += len(piece)

    def _truncate(self, size: int) -> None:
        last, rest = divmod(size, _BLOCK)
        kept = self._held(last)[:rest]
        self._file.truncate(size)
        self._meant = {block: meant for block, meant in self._meant.items() if block < last}
        self._meant[last] = zlib.crc32(kept), len(kept)
        self._end = size

    def _held(self, block: int) -> bytes:
        """Read a block; an error if it is not what was meant, and zeros behind that."""
        checksum, length = self._meant.get(block, (0, 0))
        start = block * _BLOCK
        n_bytes = max(0, min(_BLOCK, self._end - start))
        self._file.seek(start)
        held = self._file.read(n_bytes)
        as_meant = zlib.crc32(held[:length]) == checksum and not held[length:].strip(b"\0")
        if len(held) != n_bytes or not as_meant:
            raise OSError(errno.EIO, "what is read back is not what was written")
        return held

    def _compare(self) -> str:
        os.fsync(self.number)
        # Else it might be read from memory.
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.number, 0, 0, os.POSIX_FADV_DONTNEED)
        if os.fstat(self.number).st_size != self._end:
            raise OSError(errno.EIO, "its length is not what was written")
        digest = hashlib.sha256()
        for block in range(-(-self._end // _BLOCK)):
            digest.update(self._held(block))
        return digest.hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a folder to fill; on success it becomes ``path``, and takes the place of an older one.

    Where that takes two renames, :func:`recover` completes or undoes it between them.
    """
    path = path.resolve()
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        part, lock = _begin(path, _Folder)
    old = _sibling(path, part.name[len(path.stem) + 2 :][:8], "old")
    try:
        yield part
        with writing(path):
            _sync_tree(part)
            if not path.is_dir():
                os.replace(part, path)
            elif not _exchange(part, path):
                _swap(part, path, old)
        _sync_folder(path.parent)
        remove(old)
    finally:
        lock.shut()
        remove(part)


class _Folder:
    """A folder under way, locked where that can be."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self._file = None if sys.platform == "win32" else os.open(path, os.O_RDONLY)

    @property
    def number(self) -> int:
        """Of the open folder; below 0 of none."""
        return -1 if self._file is None else self._file

    def shut(self) -> None:
        """Let go of it."""
        if self._file is not None:
            os.close(self._file)


_Kind = TypeVar("_Kind", _Part, _Folder)


def _begin(path: Path, kind: Callable[[Path], _Kind]) -> tuple[Path, _Kind]:
    """Make a part that others know by its lock to be under way."""
    while True:
        part = _sibling(path, uuid4().hex[:8], "part")
        opened = kind(part)
        if opened.number < 0:
            return part, opened
        _lock(opened.number, wait=True)
        # Before that it may have been taken for a rest.
        if os.fstat(opened.number).st_nlink > 0:
            return part, opened
        opened.shut()


def _sibling(path: Path, number: str, kind: str) -> Path:
    # The suffix stays, since writers of folders may choose the format by it.
    return path.with_name(f".{path.stem}.{number}.{kind}{path.suffix}")


def _siblings(path: Path, kind: str) -> dict[str, Path]:
    pattern = f".{escape(path.stem)}.{NUMBER}.{kind}{escape(path.suffix)}"
    return {found.name[len(path.stem) + 2 :][:8]: found for found in path.parent.glob(pattern)}


def _exchange(part: Path, path: Path) -> bool:
    """Let two folders change places at once; False where the system cannot (Linux can)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, TypeError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(part), here, os.fsencode(path), exchange) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(path))


def _swap(part: Path, path: Path, old: Path) -> None:
    """Let a folder take the place of another in two steps, where it cannot be done in one."""
    os.replace(path, old)
    try:
        os.replace(part, path)
    except OSError:
        if path.is_dir():  # who looked for it meanwhile has completed it
            return
        os.replace(old, path)
        raise


def recover(path: Path) -> None:
    """Complete, or undo, what a run that was killed has left of a folder that it wrote."""
    path = path.resolve()
    for number, old in _siblings(path, "old").items():
        part = _sibling(path, number, "part")
        # The old one was only moved when the new one was whole.
        if not path.exists():
            with suppress(FileNotFoundError):
                os.replace(part if part.is_dir() else old, path)
        remove(old)
    tidy(path)


def tidy(path: Path) -> None:
    """Remove parts of a file or folder that no process is writing any more."""
    for part in _siblings(path, "part").values():
        remove_rest(part)


def remove_rest(part: Path) -> None:
    """Remove a part that no process is writing any more."""
    if sys.platform == "win32":
        # What is open cannot be removed there, and of a folder that is not known.
        with suppress(OSError):
            part.unlink()
        return
    with suppress(OSError):
        file = os.open(part, os.O_RDONLY)
        try:
            if _lock(file, wait=False):
                remove(part)
        finally:
            os.close(file)


def remove(path: Path) -> None:
    """Remove a file or folder as far as that can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    if sys.platform == "win32":
        return
    for where, _, names in os.walk(folder):
        for path in (*(Path(where, name) for name in names), Path(where)):
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return
    # Not every file system can; what was renamed is on the disk, and whole.
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Explain why a file could not be written: a full disk most of all."""
    try:
        yield
    except OSError as error:
        raise _told(path, error) from error


def _told(path: Path, error: OSError) -> InputError:
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        do = "make room there and run again: what is done is kept"
    else:
        do = "see to that, or choose another place, and run again"
    return InputError(f"{path}: cannot be written ({reason}); {do}")


def _lock(file: int, *, wait: bool, shared: bool = False) -> bool:
    """Lock an open file until it is closed, or the process ends; False if another has it."""
    try:
        if fcntl is not None:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(file, kind | (0 if wait else fcntl.LOCK_NB))
        elif msvcrt is not None:
            msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
    except OSError as error:
        if error.errno == errno.EDEADLK and wait:  # Windows tries for ten seconds only
            return _lock(file, wait=wait)
        # A file system without locks has none that another could hold.
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


class Claim:
    """The right to write something, which no two processes have, and which ends with them."""

    def __init__(self, path: Path, file: int) -> None:
        self.path, self._file = path, file

    @staticmethod
    def place(path: Path) -> Path:
        """Where the lock lies."""
        return path.with_name(f".{path.name}.lock")

    @classmethod
    def take(cls, path: Path, *, wait: bool, shared: bool = False) -> Claim | None:
        """Take it, alone or with others; ``None`` if another has it and one does not wait."""
        lock = cls.place(path)
        while True:
            file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
            if not _lock(file, wait=wait, shared=shared):
                os.close(file)
                return None
            # Whoever had it has removed it.
            if os.fstat(file).st_nlink > 0:
                return cls(lock, file)
            os.close(file)

    def release(self) -> None:
        """Give it back."""
        if self._file < 0:
            return
        # Before the release, after which it may be that of another; Windows wants it after. One
        # that others have, too, stays theirs.
        if _lock(self._file, wait=False):
            with suppress(OSError):
                self.path.unlink()
        os.close(self._file)
        self._file = -1
        if sys.platform == "win32":
            with suppress(OSError):
                self.path.unlink()


def read_sealed(path: Path) -> bytes:
    """Read what was written with a seal; an :class:`InputError` if it is not as it was written."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    _check_digest(path, hashlib.sha256(content[:-_SEAL_BYTES]), content[-_SEAL_BYTES:])
    return content[:-_SEAL_BYTES]


def check_seal(path: Path, *, needed: bool = False) -> bool:
    """Refuse a file that has a seal and is not as it was written; whether it has one."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(2**20))
    try:
        with path.open("rb") as file:
            left = max(0, file.seek(0, os.SEEK_END) - _SEAL_BYTES)
            file.seek(left)
            seal = file.read()
            if not needed and _SEALED.fullmatch(seal) is None:
                return False
            file.seek(0)
            while left and (n_bytes := file.readinto(buffer[: min(left, len(buffer))])):
                digest.update(buffer[:n_bytes])
                left -= n_bytes
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    _check_digest(path, digest, seal)
    return True


def seal_of(path: Path) -> str:
    """Give what the seal of a file says, unchecked: the same for the same content."""
    with path.open("rb") as file:
        file.seek(-_SEAL_BYTES, os.SEEK_END)
        return file.read().decode().split()[-1]


def is_whole(path: Path) -> bool:
    """Whether a file with a seal is there, as it was written; a damaged one is named."""
    if not path.is_file():
        return False
    try:
        check_seal(path, needed=True)
    except InputError:
        warn_of_damage(path)
        return False
    return True


class DamageWarning(UserWarning):
    """A file is not as it was written, and is made anew."""


def warn_of_damage(path: Path) -> None:
    """Name a file that is made anew."""
    told = f"{path}: damaged (it is not as it was written); it is made anew"
    warnings.warn(told, DamageWarning, stacklevel=3)


def _check_digest(path: Path, digest: Any, seal: bytes) -> None:
    found = _SEALED.fullmatch(seal)
    if found is None or digest.hexdigest() != found[1].decode():
        raise InputError(f"{path}: damaged (it is not as it was written); make it again")
