"""Change small valid inputs in a thousand ways: each is refused in one line, or read right.

As `python fuzz.py [--n N] [--seed SEED] [--kinds A,B] [--seconds S]`; prints a line of JSON for
each input that went wrong, and at the end one for each kind. Which inputs there are depends on the
seed and their number only. All is imported once; inputs are read in forks of that, many in one,
until one of them crashes, hangs, or is too large.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import os
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd

HERE = Path(__file__).parent
SECONDS, BYTES, LONGEST = 30.0, 2 * 2**30, 300
# Of a fork, which grows with what libraries keep.
_INPUTS = 100
Rng = np.random.Generator

NUMBERS = [0, 1, -1, 2, 255, 256, 65535, 2**31 - 1, -(2**31), 2**32, 2**53 + 1, 2**63 - 1, -(2**63)]
NUMBERS += [10**6, 10**12, 10**19, 10**400]
FLOATS = [0.5, -0.5, 1e-320, 1e-9, 1e9, 1e38, 1e308, -1e308, float("inf"), float("-inf")]
FLOATS += [float("nan")]
WORDS = ["", " ", "nan", "NA", "None", "true", "1e999", "-1", "1.5", "../x", "/etc/passwd", "a\nb"]
WORDS += ["ä", "日本", "\x00", "\x1b[31m", "=1+1", "x" * 5000, '"', "'", ",", "\t", "{}", "[]"]


def nested(depth: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


def odd_value(rng: Rng) -> Any:
    kinds = [NUMBERS, FLOATS, WORDS, [None, True, False, [], {}, [1], {"a": 1}, [[]], [None]]]
    kinds.append([nested(150), list(range(1000)), {"name": {"name": {}}}, ["x", 1], "MERGE"])
    of = kinds[rng.integers(len(kinds))]
    return of[rng.integers(len(of))]


# Bytes


def flip(data: bytearray, rng: Rng) -> None:
    for at in rng.integers(len(data), size=2 ** rng.integers(6)):
        data[at] ^= 1 << int(rng.integers(8))


def truncate(data: bytearray, rng: Rng) -> None:
    del data[int(rng.integers(len(data))) :]


def number(data: bytearray, rng: Rng) -> None:
    """Lengths, offsets, counts."""
    size = int(rng.choice([1, 2, 4, 8]))
    at = int(rng.integers(max(1, len(data) - size)))
    at -= at % size if rng.integers(2) else 0
    value = int(NUMBERS[rng.integers(len(NUMBERS) - 2)]) if rng.integers(3) else int(at * 2)
    data[at : at + size] = (value % 256**size).to_bytes(
        size, "little" if rng.integers(4) else "big"
    )


def overwrite(data: bytearray, rng: Rng) -> None:
    at, n = int(rng.integers(len(data))), int(2 ** rng.integers(10))
    kinds = [b"\0" * n, b"\xff" * n, rng.bytes(n)]
    data[at : at + n] = kinds[rng.integers(3)][: len(data) - at]


def move(data: bytearray, rng: Rng) -> None:
    """A block in the place of another, or put in, or taken out."""
    n = int(2 ** rng.integers(12))
    a, b = (int(x) for x in rng.integers(len(data), size=2))
    block = bytes(data[a : a + n])
    how = rng.integers(3)
    if how == 0:
        data[b : b + len(block)] = block[: len(data) - b]
    elif how == 1:
        data[b:b] = block
    else:
        del data[a : a + n]


BYTE_MUTATORS = [flip, flip, truncate, number, number, number, overwrite, move]


def mutate_bytes(content: bytes, rng: Rng) -> bytes:
    data = bytearray(content)
    for _ in range(int(rng.choice([1, 1, 1, 2, 4]))):
        if data:
            BYTE_MUTATORS[rng.integers(len(BYTE_MUTATORS))](data, rng)
    return bytes(data)


# Formats


def mutate_json(content: bytes, rng: Rng) -> bytes:
    tree = json.loads(content)
    for _ in range(int(rng.choice([1, 1, 2, 5]))):
        if not (places := _places(tree)):
            return json.dumps(odd_value(rng)).encode()
        _change_tree(places, rng)
    if rng.integers(50) == 0:
        return b"[" * int(10 ** rng.integers(2, 6))
    return json.dumps(tree).encode("utf-16" if rng.integers(20) == 0 else "utf-8")


def _places(tree: Any) -> list[tuple[Any, Any]]:
    """Every value in lists and tables: what holds it, and under which key."""
    places: list[tuple[Any, Any]] = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            waiting += [node[key] for key in keys]
    return places


def _change_tree(places: list[tuple[Any, Any]], rng: Rng) -> None:
    node, key = places[rng.integers(len(places))]
    how = rng.integers(5)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[str(odd_value(rng))[:100]] = node[key]
    elif how == 2 and isinstance(node, list):
        node.append(node[key])
    elif how == 3:
        other, name = places[rng.integers(len(places))]
        node[key] = json.loads(json.dumps(other[name]))
    else:
        node[key] = odd_value(rng)


def mutate_text(content: bytes, rng: Rng) -> bytes:
    """Cells of a table, lines, and words of a list."""
    text = content.decode("utf-8", "replace")
    separator = next((s for s in ("\t", ",", " ") if s in text), ",")
    rows = [line.split(separator) for line in text.split("\n")]
    for _ in range(int(rng.choice([1, 1, 2, 8]))):
        row = int(rng.integers(len(rows)))
        if rng.integers(3) == 0:
            row = 0
        at = int(rng.integers(len(rows[row])))
        how = rng.integers(7)
        if how < 3:
            value = odd_value(rng)
            rows[row][at] = str(value) if rng.integers(3) else repr(value)
        elif how == 3:
            rows.insert(int(rng.integers(len(rows))), list(rows[row]))
        elif how == 4:
            del rows[row][at]
        elif how == 5:
            for other in rows:
                if len(other) > at:
                    other[at] = "" if rng.integers(2) else other[at - 1]
        elif len(rows) > 1:
            del rows[row]
    text = "\n".join(separator.join(row) for row in rows)
    return text.encode("utf-8", "replace")


def mutate_gzip(content: bytes, rng: Rng) -> bytes:
    if rng.integers(3) == 0:
        return mutate_bytes(content, rng)
    plain = gzip.decompress(content)
    change = mutate_bytes if plain[257:262] == b"ustar" or rng.integers(3) == 0 else mutate_text
    return gzip.compress(change(plain, rng), 1, mtime=0)


def _objects(file: h5py.File) -> list[Any]:
    found: list[Any] = [file]
    file.visititems(lambda name, thing: found.append(thing))
    return found


def _other_array(values: np.ndarray, rng: Rng) -> Any:
    """Something else in the place of an array."""
    how = rng.integers(9)
    if how == 0:
        return values[: len(values) // 2] if values.ndim else values[None]
    if how == 1:
        return values.reshape(-1)[..., None]
    if how == 2:
        kinds = ["<i1", "<u8", ">i4", "<f2", "<f8", "<c8", "S3", "?", "<i8", "<u2"]
        return values.astype(kinds[rng.integers(len(kinds))])
    if how == 3 and values.dtype.kind in "iuf" and values.size:
        changed = values.copy()
        known = np.iinfo(values.dtype) if values.dtype.kind in "iu" else None
        pool = [x for x in NUMBERS if known is None or known.min <= x <= known.max]
        pool = pool[:-1] + FLOATS if known is None else pool
        changed.reshape(-1)[rng.integers(values.size, size=2)] = pool[rng.integers(len(pool))]
        return changed
    if how == 4:
        return np.empty((0, *values.shape[1:]), values.dtype)
    if how == 5:
        return values.reshape(-1)[0] if values.size else 0
    if how == 6:
        return np.concatenate([values, values]) if values.ndim else values
    if how == 7 and values.ndim:
        return rng.permutation(values)
    value = odd_value(rng)
    simple = isinstance(value, int | float) and abs(value) < 2**63
    return value if simple else str(value).replace("\0", "")


def mutate_hdf5(content: bytes, rng: Rng) -> bytes:
    if rng.integers(3) == 0:
        return mutate_bytes(content, rng)
    held = BytesIO(content)
    with h5py.File(held, "r+") as file:
        for _ in range(int(rng.choice([1, 1, 2]))):
            things = _objects(file)
            thing = things[rng.integers(len(things))]
            if rng.integers(3) == 0 and len(thing.attrs):
                name = list(thing.attrs)[rng.integers(len(thing.attrs))]
                if rng.integers(4) == 0:
                    del thing.attrs[name]
                else:
                    value = odd_value(rng)
                    old = np.asarray(thing.attrs[name])
                    simple = isinstance(value, str | bool | float)
                    thing.attrs[name] = (
                        (value.replace("\0", "") if isinstance(value, str) else value)
                        if simple
                        else _other_array(old, rng)
                    )
                continue
            if thing.name == "/":
                continue
            _replace(file, thing, rng)
    return held.getvalue()


def _replace(file: h5py.File, thing: Any, rng: Rng) -> None:
    name, attributes = thing.name, dict(thing.attrs)
    values = thing[()] if isinstance(thing, h5py.Dataset) else None
    shape = thing.shape if isinstance(thing, h5py.Dataset) else None
    kind = thing.dtype if isinstance(thing, h5py.Dataset) else None
    how = rng.integers(12)
    del file[name]
    if how == 0:
        return
    if how == 1:
        file[name] = h5py.SoftLink(["/", name, "/none", "/X"][rng.integers(4)])
    elif how == 2:
        file[name] = h5py.ExternalLink("mine.h5ad", "/")
    elif how == 3:
        file.create_group(name)
    elif how == 4 and shape:
        sizes = [2**20, 2**31 + 1, 10**6, 10**9, 10**11]
        large = (sizes[rng.integers(len(sizes))], *shape[1:])
        file.create_dataset(name, large, kind, chunks=(1024, *shape[1:]), compression="gzip")
    elif how == 5:
        file[name] = h5py.Empty("f")
    elif values is not None:
        file[name] = _other_array(np.asarray(values), rng)
    else:
        file[name] = 1
    for key, value in attributes.items() if rng.integers(4) else ():
        file[name].attrs[key] = value


def mutate_parquet(content: bytes, rng: Rng) -> bytes:
    if rng.integers(2):
        return mutate_bytes(content, rng)
    table = pd.read_parquet(BytesIO(content))
    for _ in range(int(rng.choice([1, 1, 3]))):
        if not len(table.columns):
            break
        name = table.columns[rng.integers(len(table.columns))]
        how = rng.integers(6)
        if how == 0:
            table = table.drop(columns=name)
        elif how == 1:
            table = table.rename(columns={name: str(odd_value(rng))[:50]})
        elif how == 2:
            table[name] = table[name].astype(str)
        elif how == 3:
            table = table.iloc[rng.integers(len(table), size=len(table))]
        else:
            value = odd_value(rng)
            value = value if isinstance(value, float | str | bool) else None
            column = table[name].astype(object).tolist()
            if column:
                column[rng.integers(len(column))] = value
            kept = all(isinstance(x, str) for x in column if x is not None)
            table[name] = column if kept else pd.to_numeric(pd.Series(column), "coerce").tolist()
    held = BytesIO()
    table.loc[:, ~table.columns.duplicated()].to_parquet(held)
    return held.getvalue()


def mutate_safetensors(content: bytes, rng: Rng) -> bytes:
    if rng.integers(2):
        return mutate_bytes(content, rng)
    (size,) = struct.unpack("<Q", content[:8])
    header = mutate_json(content[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def _mutator(path: Path) -> Any:
    if path.suffix in (".json", ".geojson", ".xenium", ".zattrs", ".zarray", ".zgroup"):
        return mutate_json
    if path.name in (".zattrs", ".zarray", ".zgroup", ".zmetadata"):
        return mutate_json
    return {
        ".csv": mutate_text,
        ".tsv": mutate_text,
        ".toml": mutate_text,
        ".gz": mutate_gzip,
        ".h5": mutate_hdf5,
        ".h5ad": mutate_hdf5,
        ".parquet": mutate_parquet,
        ".safetensors": mutate_safetensors,
    }.get(path.suffix, mutate_bytes)


def changed(path: Path, content: bytes, rng: Rng) -> bytes:
    """One input of the many."""
    change = _mutator(path)
    if rng.integers(4) == 0 or change is mutate_bytes:
        return mutate_bytes(content, rng)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return bytes(change(content, rng))
    except Exception:  # What cannot be written is none.
        return mutate_bytes(content, rng)


# Reading, many in one fork


def _peak() -> int:
    """Bytes of memory that this process had at most, since `_forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return 0


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def outcome(read: Any, folder: Path, out: Path) -> tuple[str, str]:
    """Read one input: "accepted", "refused", or what is wrong with it."""
    from strank.errors import InputError
    from strank.units import reason_of

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder, out)
    except InputError as error:
        told = reason_of(error) or ""
        named = str(folder) in told or str(out) in told or "section " in told
        return "refused" if named else "nameless", told.replace(f"{folder}/", "")[:LONGEST]
    except OSError as error:
        told = reason_of(error)
        return ("refused", told) if told else ("traceback", _where(error))
    except BaseException as error:
        return "traceback", _where(error)
    return "accepted", ""


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/strank/" in f.filename] or frames
    at = [f"{Path(f.filename).name}:{f.lineno}" for f in (own[-1], frames[-1])]
    return f"{type(error).__name__} {' < '.join(at)} {str(error)[:200]!r}"


def _inside_fork(kind: Any, seed_folder: Path, plan: Iterator[int], seed: int, pipe: int) -> None:
    work = Path(tempfile.mkdtemp(prefix="fuzz-", dir=seed_folder.parent))
    folder, out = work / "in", work / "out"
    shutil.copytree(seed_folder, folder)
    files = changeable(kind, seed_folder)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    signal.signal(signal.SIGALRM, _too_long)
    for i in plan:
        rng = np.random.default_rng([seed, i])
        name = files[rng.integers(len(files))]
        original = (seed_folder / name).read_bytes()
        (folder / name).write_bytes(changed(folder / name, original, rng))
        os.write(pipe, (json.dumps([i, str(name), "begun", "", 0]) + "\n").encode())
        _forget_peak()
        before, started = _peak(), time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        what, told = outcome(kind.read, folder, out)
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = _peak() - before
        if grown > BYTES:
            what, told = "memory", f"{grown / 2**30:.1f} GB, {what} {told}"
        if time.monotonic() - started > SECONDS:
            what = "hang"
        line = json.dumps([i, str(name), what, told[:500], round(time.monotonic() - started, 3)])
        os.write(pipe, (line + "\n").encode())
        # What the reader wrote in the input's place (a training), or the changed file.
        shutil.rmtree(folder)
        shutil.copytree(seed_folder, folder)
    shutil.rmtree(work, ignore_errors=True)


def _too_long(*_: object) -> None:
    raise TimeoutError("a hang")


def changeable(kind: Any, folder: Path) -> list[Path]:
    found = {path for pattern in kind.files for path in folder.rglob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder) for path in found)


def fuzz(
    name: str, kind: Any, folder: Path, n: int, seed: int, until: float
) -> Iterator[list[Any]]:
    """Outcomes of inputs: number, file, what, told, seconds."""
    numbers = [seed, zlib.crc32(name.encode())]
    first = int(np.random.default_rng(numbers).integers(2**31))
    i = 0
    while i < n and time.monotonic() < until:
        last: list[Any] | None = None
        for line in _one_fork(kind, folder, range(i, min(n, i + _INPUTS)), first):
            last = line
            if line[2] != "begun":
                i = line[0] + 1
                yield line
        if last is None:
            raise RuntimeError(f"{name}: nothing was read")
        if last[2] in ("begun", "crash", "hang") and last[0] >= i:
            i = last[0] + 1


def _one_fork(kind: Any, folder: Path, plan: range, seed: int) -> Iterator[list[Any]]:
    receiving, sending = os.pipe()
    gc.collect()
    gc.freeze()
    child = os.fork()
    if child == 0:
        os.close(receiving)
        # The libraries talk, too.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            _inside_fork(kind, folder, iter(plan), seed, sending)
        finally:
            os._exit(0)
    os.close(sending)
    held, begun = b"", [plan.start, "", "begun", "", 0]
    hung = False
    while True:
        ready, *_ = select.select([receiving], [], [], 1.5 * SECONDS)
        if not ready:
            hung = True
            os.kill(child, signal.SIGKILL)
            break
        got = os.read(receiving, 65536)
        if not got:
            break
        held += got
        *lines, held = held.split(b"\n")
        for line in lines:
            begun = json.loads(line)
            yield begun
    os.close(receiving)
    _, status = os.waitpid(child, 0)
    for rest in folder.parent.glob("fuzz-*"):
        shutil.rmtree(rest, ignore_errors=True)
    if begun[2] == "begun" and begun[1]:
        code = os.waitstatus_to_exitcode(status)
        yield [begun[0], begun[1], "hang" if hung else "crash", f"exit {code}", 0]


class Walker:
    """Walks through HDF5 files in forks of a small process, ten times as fast as in new ones."""

    def __init__(self) -> None:
        from strank import hdf5_walk

        asked, self._ask = os.pipe()
        self._answers, answer = os.pipe()
        self._n = 0
        if os.fork() == 0:
            os.close(self._ask)
            os.close(self._answers)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            with open(asked) as questions:
                for question in questions:
                    number, *given = json.loads(question)
                    reply = json.dumps([number, *_walk(hdf5_walk.run, *given)])
                    os.write(answer, (reply + "\n").encode())
            os._exit(0)
        os.close(asked)
        os.close(answer)

    def __call__(self, path: Path, most: int, seconds: float) -> tuple[int, str]:
        """Take the place of `hdf5_guard.run_walk`."""
        number = f"{os.getpid()}-{self._n}"
        self._n += 1
        os.write(self._ask, (json.dumps([number, str(path), most, seconds]) + "\n").encode())
        held = b""
        while True:
            held += os.read(self._answers, 65536)
            *lines, held = held.split(b"\n")
            for line in lines:
                # Others were asked for by a fork that has died.
                if (answer := json.loads(line))[0] == number:
                    return answer[1], answer[2]


def _walk(run: Any, path: str, most: int, seconds: float) -> tuple[int, str]:
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        os._exit(run(path, most, seconds, lambda told: os.write(sending, told.encode())))
    os.close(sending)
    with open(receiving, errors="replace") as told:
        said = told.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def read_broken(folder: Path, out: Path) -> None:
    """Whatever can go wrong, by what the input is, to try the fuzzer itself."""
    from strank.errors import InputError

    how = zlib.crc32((folder / "patients.csv").read_bytes()) % 6
    if how == 0:
        os.abort()
    if how == 1:
        # As C code that does not return.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(100)
    if how == 2:
        bytearray(2 * BYTES)
    if how == 3:
        raise KeyError("a bug")
    if how == 4:
        raise InputError("something is wrong")


def prepare(root: Path, names: list[str]) -> dict[str, Path]:
    """Make the seeds in a process of their own, lest this one has threads."""
    sys.path.insert(0, str(HERE))
    import seeds

    child = os.fork()
    if child == 0:
        code = 1
        try:
            for name in names:
                seeds.KINDS[name].make(root / name)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise SystemExit("the seeds could not be made")
    return {name: root / name for name in names}


def import_all(walker: Any) -> None:
    import cv2
    import pyvips
    import spatialdata  # noqa: F401
    import torch

    import strank.cli
    import strank.io
    import strank.model.rank_model  # noqa: F401
    from strank import hdf5_guard

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    pyvips.cache_set_max(0)
    hdf5_guard.run_walk = walker


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--patience", type=float, default=SECONDS, help="of one input")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="for one input")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    import seeds

    globals().update(SECONDS=given.patience, BYTES=int(given.gigabytes * 2**30))
    if given.list:
        print("\n".join(seeds.KINDS))
        return 0
    if "broken" in given.kinds:
        seeds.kind("broken", seeds.make_patients, "*.csv")(read_broken)
    names = [name for name in given.kinds.split(",") if name] or list(seeds.KINDS)
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    root = Path(tempfile.mkdtemp(prefix="strank-fuzz-", dir=place))
    try:
        walker = Walker()
        folders = prepare(root, names)
        import_all(walker)
        n_wrong = 0
        for name in names:
            kind, started = seeds.KINDS[name], time.monotonic()
            counts: Counter[str] = Counter()
            for i, file, what, told, seconds in fuzz(
                name, kind, folders[name], given.n, given.seed, started + given.seconds
            ):
                counts[what] += 1
                if what not in ("accepted", "refused"):
                    n_wrong += 1
                    print(json.dumps([name, i, file, what, told, seconds]), flush=True)
            took = round(time.monotonic() - started, 1)
            total = {"kind": name, "n": counts.total(), "seconds": took, **counts}
            print(json.dumps(total), flush=True)
        return min(n_wrong, 1)
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
