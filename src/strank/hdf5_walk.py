"""Walk through an HDF5 file, in a process that may crash or hang; run by `strank.hdf5_guard`.

As `python hdf5_walk.py PATH MOST SECONDS PLACE...`, where h5py and NumPy lie in the places. Nothing
of strank is imported, so that it starts in a sixth of a second.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REFUSED, NO_HDF5 = 3, 4
# What reading an object may raise, for the reader itself to explain, if it needs the object.
_OTHERS_TO_TELL: tuple[type[Exception], ...] = (
    *(OSError, ValueError, TypeError, LookupError, RuntimeError),
    *(ArithmeticError, AttributeError, SystemError),
)
_BLOCK = 2**24
# Names that readers ask for, there or not.
_LOOKED_UP = (
    *("X", "obs", "var", "obsm", "varm", "obsp", "varp", "layers", "uns", "raw", "_index"),
    *("__categories", "categories", "codes", "data", "indices", "indptr", "shape", "matrix"),
    *("features", "barcodes", "barcode", "img", "coords", "embeddings", "spatial", "strank"),
)
# A string is an object of Python, whatever its length.
_STRING = 100
# Of HDF5 itself, LZF of h5py, and those of hdf5plugin that others write AnnData with.
_FILTERS = {*range(1, 7), 32000, 32001, 32004, 32008, 32015, 32026}
# For the libraries themselves, and a chunk of any size that can be.
_ROOM = 2**30


class Refused(Exception):
    """What keeps a file from being read."""


def run(path: str, most: int, seconds: float, say: Callable[[str], object]) -> int:
    """Walk through a file within limits; the exit code."""
    limit(most, seconds)
    try:
        walk(path, most)
    except Refused as error:
        say(str(error))
        return REFUSED
    except MemoryError:
        say("asks for more memory than a file of its size can fill")
        return REFUSED
    except _OTHERS_TO_TELL:
        return 1
    return 0


def limit(most: int, seconds: float) -> None:
    """Let this process neither grow nor run without end, where that can be."""
    try:
        import resource
    except ImportError:  # Windows
        return
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
        held = (
            int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            * resource.getpagesize()
        )
        resource.setrlimit(resource.RLIMIT_AS, (held + _ROOM + most, resource.RLIM_INFINITY))
    except (OSError, ValueError):  # macOS
        pass


def walk(path: str, most: int) -> None:
    """Read every group, attribute and dataset once, in blocks; refuse what is no plain data."""
    import h5py

    asked = 0
    with h5py.File(path, "r") as file:
        seen, waiting = set(), [file["/"]]
        while waiting:
            thing = waiting.pop()
            address = h5py.h5o.get_info(thing.id).addr
            if address in seen:
                continue
            seen.add(address)
            _read_attributes(thing)
            if isinstance(thing, h5py.Group):
                waiting += _members(thing)
            elif isinstance(thing, h5py.Dataset) and thing.shape is not None:
                asked += _check_dataset(thing)
                if asked > most:
                    raise Refused(f"asks for {asked / 1e9:.3g} GB of memory, by a small file")
                _read(thing)


def _read_attributes(thing: Any) -> None:
    for name in _tried(list, thing.attrs) or []:
        _tried(thing.attrs.get, name)


def _members(group: Any) -> Iterator[Any]:
    import h5py

    names = _tried(list, group)
    if names is None:
        raise Refused(f"{_shown(group)} is damaged (its members cannot be listed)")
    # By name they are looked up in another way, which is damaged in ways of its own.
    for name in {*names, *_LOOKED_UP}:
        link = _tried(group.get, name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise Refused(f"{_shown(group, name)} lies in another file; copy it into this one")
        # Where a soft link leads is reached by hard ones.
        if isinstance(link, h5py.HardLink):
            member = _tried(group.__getitem__, name)
            if isinstance(member, h5py.Group | h5py.Dataset):
                yield member


def _check_dataset(data: Any) -> int:
    """Refuse a dataset of other files or unknown filters; bytes of memory that it asks for."""
    import h5py

    made = data.id.get_create_plist()
    if made.get_external_count() or made.get_layout() == h5py.h5d.VIRTUAL:
        raise Refused(f"{_shown(data)} lies in another file; copy it into this one")
    for number in range(made.get_nfilters()):
        if (code := made.get_filter(number)[0]) not in _FILTERS:
            raise Refused(f"{_shown(data)} is packed by a filter that is not known ({code})")
    kind = data.id.get_type()
    strings = isinstance(kind, h5py.h5t.TypeStringID) and kind.is_variable_str()
    strings = strings or isinstance(kind, h5py.h5t.TypeVlenID | h5py.h5t.TypeReferenceID)
    return math.prod(data.shape) * max(kind.get_size(), _STRING if strings else 1)


def _read(data: Any) -> None:
    """Read a dataset in blocks of rows, whole chunks of them."""
    if data.shape == () or 0 in data.shape:
        _tried(data.__getitem__, ())
        return
    width = math.prod(data.shape[1:]) * max(data.id.get_type().get_size(), 1)
    rows = max(1, _BLOCK // max(width, 1))
    chunk = data.chunks[0] if data.chunks else 1
    rows = -(-rows // chunk) * chunk
    for first in range(0, data.shape[0], rows):
        # One that cannot be read is enough: the reader stops there.
        if _tried(data.__getitem__, slice(first, first + rows)) is None:
            return


def _tried(read: Callable[..., Any], *given: Any, **options: Any) -> Any:
    """Read something; ``None`` of what cannot be read, but for lack of memory."""
    try:
        return read(*given, **options)
    except _OTHERS_TO_TELL as error:
        if "allocat" in str(error):
            raise MemoryError from error
        return None


def _shown(thing: Any, name: str = "") -> str:
    text = f"{str(thing.name).rstrip('/')}/{name}" if name else str(thing.name)
    return text if text.isprintable() and len(text) < 80 else f"{ascii(text)[:76]}..."


def main() -> int:
    """Walk through the file that is named."""
    path, most, seconds, *places = sys.argv[1:]
    sys.path[:0] = places
    try:
        import h5py  # noqa: F401
    except ImportError:
        return NO_HDF5
    return run(path, int(most), float(seconds), sys.stdout.write)


if __name__ == "__main__":
    sys.exit(main())
