"""What is written is what was meant, or is not there; of two who write, one waits or is told."""

import io
import os
import random
import stat
import subprocess
import sys
import textwrap
import threading
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from strank import storage
from strank.cohort.store import read_h5ad, write_h5ad
from strank.errors import InputError
from strank.files import (
    claimed,
    claims,
    read_json,
    read_written,
    write_bytes,
    write_json,
    write_table,
    write_utf8,
)
from strank.storage import (
    DamageWarning,
    check_seal,
    is_whole,
    new_file,
    new_folder,
    read_sealed,
    recover,
)

PLACES, PIECES = st.integers(0, 300), st.binary(max_size=60)
WRITES = st.tuples(st.just("write"), PLACES, PIECES)
STEPS = st.one_of(WRITES, WRITES, st.tuples(st.just("truncate"), PLACES, st.just(b"")))


@given(block=st.sampled_from([7, 16, 64]), seal=st.booleans(), steps=st.lists(STEPS, max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_order_of_writes_gives_what_a_file_in_memory_gives(
    tmp_path_factory, block, seal, steps
):
    path, like = tmp_path_factory.mktemp("any") / "file.bin", io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_BLOCK", block)
        with new_file(path, seal=seal) as file:
            for what, place, piece in steps:
                if what == "write":
                    for target in (file, like):
                        target.seek(place)
                        if piece:
                            target.write(piece)
                else:
                    file.truncate(place)
                    like = io.BytesIO(like.getvalue()[:place].ljust(place, b"\0"))
    assert (read_sealed(path) if seal else path.read_bytes()) == like.getvalue()


def write_lines(path):
    write_utf8(path, "new\n" * 500_000)


def write_matrix(path):
    adata = AnnData(np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32))
    write_h5ad(adata, path)


def write_csv(path):
    write_table(path, pd.DataFrame({"gene": ["ERBB2"] * 150_000, "score": 0.5}))


WRITERS = [write_lines, write_matrix, write_csv]


@pytest.mark.parametrize("write", WRITERS)
def test_a_wrong_byte_that_no_error_tells_of_is_found(tmp_path, monkeypatch, write):
    """As by a disk that says yes: one bit of one write is another."""
    path = tmp_path / "file"
    plain, n_writes, wrong = storage._Part._write, [0], [-1]

    def flip(part, view):
        plain(part, view)
        n_writes[0] += 1
        if n_writes[0] == wrong[0]:
            place = part.tell() - 1
            last = os.pread(part.number, 1, place)
            os.pwrite(part.number, bytes([last[0] ^ 1]), place)

    monkeypatch.setattr(storage._Part, "_write", flip)
    write(path)
    total = n_writes[0]
    path.write_text("old")
    for n in range(1, total + 1):
        n_writes[0], wrong[0] = 0, n
        with pytest.raises(InputError, match="what is read back is not what was written"):
            write(path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(28, "No space left")])
def test_an_error_in_any_write_is_said_and_leaves_the_old_file(tmp_path, monkeypatch, write, error):
    path = tmp_path / "file"
    n_writes, plain, failing = [0], storage._Part._write, [-1]

    def count(part, view):
        n_writes[0] += 1
        if n_writes[0] == failing[0]:
            raise error
        plain(part, view)

    monkeypatch.setattr(storage._Part, "_write", count)
    write(path)
    total, whole = n_writes[0], path.read_bytes()
    path.write_text("old")
    for n in range(1, total + 1):
        n_writes[0], failing[0] = 0, n
        with pytest.raises(InputError, match=rf"file: cannot be written \({error.strerror}\)"):
            write(path)
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["file"]
    failing[0] = -1
    write(path)
    assert path.read_bytes() == whole


def test_who_writes_may_close_the_file(tmp_path):
    with new_file(tmp_path / "x") as part, io.TextIOWrapper(part, "utf-8") as text:
        text.write("one")
    with new_file(tmp_path / "y") as part:
        part.write(b"two")
        part.close()
    assert [(tmp_path / name).read_text() for name in "xy"] == ["one", "two"]


def test_an_error_that_the_writer_swallows_is_said(tmp_path, monkeypatch):
    """As HDF5 does, when a file is closed by its destructor."""
    path = tmp_path / "file"

    def fail(part, view):
        raise OSError(5, "Input/output error")

    def write():
        with new_file(path) as file:
            monkeypatch.setattr(storage._Part, "_write", fail)
            with suppress(OSError):
                file.write(b"lost")

    with pytest.raises(InputError, match="Input/output error"):
        write()
    assert not path.exists()


def test_an_error_of_what_is_read_meanwhile_is_not_told_as_one_of_writing(tmp_path):
    def copy():
        with new_file(tmp_path / "copy") as file:
            file.write((tmp_path / "absent").read_bytes())

    with pytest.raises(FileNotFoundError):
        copy()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_colleagues_may_read_what_the_umask_allows(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_bytes(tmp_path / "file", b"x")
        with new_folder(tmp_path / "folder") as part:
            write_bytes(part / "file", b"x")
    finally:
        os.umask(before)
    for name, mode in {"file": 0o666, "folder": 0o777, "folder/file": 0o666}.items():
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode & ~mask


def sealed_bytes(folder):
    write_bytes(folder / "x.ckpt", random.Random(0).randbytes(3000), seal=True)
    return folder / "x.ckpt", read_sealed


def sealed_table(folder):
    write_table(folder / "x.csv", pd.DataFrame({"gene": ["A", "B"], "scc": [0.1, 0.2]}), seal=True)
    return folder / "x.csv", partial(read_written, sealed=True)


def sealed_h5ad(folder):
    adata = AnnData(np.eye(4, dtype=np.float32), uns={"strank": {"image": "x.tif"}})
    write_h5ad(adata, folder / "x.h5ad")
    return folder / "x.h5ad", read_h5ad


def sealed_json(folder):
    write_json(folder / "x.json", {"seed": 0, "genes": ["A", "µ"], "value": 0.1}, seal=True)
    return folder / "x.json", read_json


@pytest.mark.parametrize("make", [sealed_bytes, sealed_table, sealed_h5ad])
def test_a_flipped_bit_anywhere_is_found(tmp_path, make):
    path, read = make(tmp_path)
    read(path)
    assert is_whole(path)
    whole, places = path.read_bytes(), random.Random(1)
    for place in [*places.choices(range(len(whole) - 80), k=60), 0, len(whole) - 81]:
        wrong = bytearray(whole)
        wrong[place] ^= 1 << places.randrange(8)
        path.write_bytes(wrong)
        with pytest.raises(InputError, match=rf"{path.name}: damaged"):
            read(path)
        with pytest.warns(DamageWarning, match=rf"{path.name}: damaged .*; it is made anew"):
            assert not is_whole(path)
    for place in range(len(whole) - 80, len(whole)):  # in the seal itself
        wrong = bytearray(whole)
        wrong[place] ^= 1
        path.write_bytes(wrong)
        with pytest.warns(DamageWarning):
            assert not is_whole(path)
    for cut in (0, 1, 79, 80, 81, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.warns(DamageWarning):
            assert not is_whole(path)


def test_a_flipped_bit_in_sealed_json_changes_nothing_or_is_found(tmp_path):
    path, read = sealed_json(tmp_path)
    meant, whole = read(path), path.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            wrong = bytearray(whole)
            wrong[place] ^= 1 << bit
            path.write_bytes(wrong)
            with suppress(InputError):
                # The name of the seal, or a space.
                found = read(path)
                assert {name: found[name] for name in meant} == meant


def test_scanpy_may_write_to_what_was_sealed(tmp_path):
    path, read = sealed_h5ad(tmp_path)
    with h5py.File(path, "r+") as file:
        file["uns"].create_dataset("mine", data=1)
    assert read(path).uns["mine"] == 1
    check_seal(path)


def fill(path, text):
    with new_folder(path) as part:
        write_utf8(part / "a.txt", text)
        write_utf8(part / "b" / "c.txt", text)


def content(path):
    return {(path / name).read_text() for name in ("a.txt", "b/c.txt")}


@pytest.mark.parametrize("name", ["model", "scores.zarr", "my.old.part", "spaced name"])
def test_a_folder_that_was_half_swapped_is_completed_or_undone(tmp_path, monkeypatch, name):
    path, replace = tmp_path / name, os.replace
    fill(path, "old")
    monkeypatch.setattr(storage, "_exchange", lambda part, path: False)

    class Killed(BaseException):
        pass

    for n in (1, 2, 3):
        moves = []

        def die(source, target, n=n, moves=moves):
            moves.append(target)
            if len([move for move in moves if Path(move).parent == tmp_path]) == n:
                raise Killed
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            # Who is killed does not clean up.
            patch.setattr(storage, "remove", lambda _: None)
            with suppress(Killed):
                fill(path, f"new {n}")
        recover(path)
        assert content(path) == {"old" if n == 1 else f"new {n}"}
        fill(path, "old")
        assert os.listdir(tmp_path) == [name]


def test_an_old_folder_comes_back_where_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    path, replace = tmp_path / "model", os.replace
    fill(path, "old")
    monkeypatch.setattr(storage, "_exchange", lambda part, path: False)

    def fail(source, target):
        if ".part" in str(source) and Path(target) == path:
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(InputError, match="model: cannot be written"):
        fill(path, "new")
    assert content(path) == {"old"}
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets folders change places")
@pytest.mark.parametrize("error", [None, 5, 28])
def test_folders_change_places_at_once(tmp_path, monkeypatch, error):
    """Or not at all: there is no moment without either."""
    path, exchange = tmp_path / "model", storage._exchange
    fill(path, "old")
    held = []

    def watch(part, path):
        held.append(content(path))
        if error is not None:
            raise OSError(error, os.strerror(error))
        done = exchange(part, path)
        held.append(content(path))
        return done

    monkeypatch.setattr(storage, "_exchange", watch)
    monkeypatch.setattr(storage, "_swap", None)
    with nullcontext() if error is None else pytest.raises(InputError, match="cannot be written"):
        fill(path, "new")
    assert held == ([{"old"}, {"new"}] if error is None else [{"old"}])
    assert content(path) == held[-1]
    assert os.listdir(tmp_path) == ["model"]


def test_parts_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    dead = [tmp_path / f".x.{n}.part.csv" for n in ("00000000", "0123abcd")]
    for path in dead:
        path.write_text("half")
    (tmp_path / ".xy.0123abcd.part.csv").write_text("of another")
    with new_file(tmp_path / "x.csv") as one, new_file(tmp_path / "x.csv") as two:
        assert not any(path.exists() for path in dead)
        one.write(b"one")
        two.write(b"two")
    assert (tmp_path / "x.csv").read_text() == "one"
    assert sorted(os.listdir(tmp_path)) == [".xy.0123abcd.part.csv", "x.csv"]


HOLD = """
    import sys
    from pathlib import Path
    from strank.files import claimed
    with claimed(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "out")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_is_told_and_a_killed_first_holds_nothing(tmp_path, holder):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".x.0123abcd.part.csv").write_text("half")

    @claims("output")
    def work(output, n=1):
        return n

    with pytest.raises(InputError, match=r"out: another run is writing there; wait for it"):
        work(out)
    assert work(None, n=2) == 2
    holder.kill()
    holder.wait()
    assert os.listdir(out) == [".x.0123abcd.part.csv"]
    assert work(output=out) == 1
    assert os.listdir(out) == []
    assert os.listdir(tmp_path) == ["out"]


def test_one_of_many_at_once_has_a_claim(tmp_path):
    inside, most, lock = [0], [0], threading.Lock()

    def work():
        for _ in range(200):
            try:
                with claimed(tmp_path / "out"):
                    with lock:
                        inside[0] += 1
                        most[0] = max(most[0], inside[0])
                    with lock:
                        inside[0] -= 1
            except InputError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1
    assert os.listdir(tmp_path) == []


def test_a_claim_leaves_no_trace_and_is_refused_where_nothing_can_be_written(tmp_path):
    with claimed(tmp_path / "a" / "b" / "out"):
        pass
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write there"), claimed(tmp_path / "file" / "out"):
        pass
