"""Embedding that ends before its time: killed, out of disk, or beside another run."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strank.cohort.folder import features_path
from strank.cohort.store import read_cohort
from strank.encoders.base import Field
from strank.encoders.embedding import embed
from strank.encoders.run import Part
from strank.errors import InputError
from strank.io import find_st, read_st, write_sections

N_SPOTS, N_FEATURES = 25, 1000


@dataclass
class Means:
    """Mean colour, many times over; does something before every batch."""

    before: object = lambda: None
    name: str = "means"
    version: str = "1"
    fields: tuple[Field, ...] = (Field(100, 8),)
    feature_names: tuple[str, ...] = tuple(f"f{i}" for i in range(N_FEATURES))
    n_spots: list[int] = field(default_factory=list)

    def encode(self, patches):
        self.before()
        self.n_spots.append(len(patches[0]))
        colour = patches[0].mean((1, 2)).astype(np.float32)
        return np.tile(colour, N_FEATURES // 3 + 1)[:, :N_FEATURES]


@pytest.fixture
def folder(st_folder, tmp_path):
    write_sections(
        (read_st(st_folder, section=name) for name in find_st(st_folder)), tmp_path / "cohort"
    )
    return tmp_path / "cohort"


@pytest.fixture
def expected(folder):
    embed(folder, Means(name="whole"), batch_size=4)
    return {name: adata.obsm["whole"] for name, adata in features(folder, "whole").items()}


def features(folder, encoder="means"):
    return read_cohort(folder, encoder=encoder)


def files(folder):
    return sorted(path.name for path in (folder / "features/means").iterdir())


def check(folder, expected):
    """Features are bitwise those of a run that nothing stopped, and nothing else is left."""
    for name, adata in features(folder).items():
        assert adata.obsm["means"].tobytes() == expected[name].tobytes()
    assert files(folder) == ["A1.h5ad", "B1.h5ad"]


def test_what_a_killed_run_finished_is_not_encoded_again(folder, expected, tmp_path):
    # Batches of 4: 7 a section. The twelfth is the fifth of B1.
    script = f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_embedding_resume import Means
        from strank.encoders.embedding import embed
        encoder = Means()
        def die():
            if len(encoder.n_spots) == 11:
                os.kill(os.getpid(), signal.SIGKILL)
        encoder.before = die
        embed(Path({str(folder)!r}), encoder, batch_size=4)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert killed.returncode == -signal.SIGKILL
    assert {"A1.h5ad", ".B1.part"} <= set(files(folder))
    rest, advanced = Means(), []
    done = embed(folder, rest, batch_size=4, advance=advanced.append)
    assert [entry.done_before for entry in done] == [True, False]
    # The last two before the end may have been encoded but not yet written.
    assert N_SPOTS - 16 <= sum(rest.n_spots) <= N_SPOTS - 8
    assert sum(advanced) == 2 * N_SPOTS
    check(folder, expected)
    again = Means()
    embed(folder, again)
    assert again.n_spots == []


def test_a_part_of_another_encoder_is_not_believed(folder, expected):
    def stop():
        if sum(encoder.n_spots) >= 12:
            raise KeyboardInterrupt

    for changed in ({"version": "0"}, {"dtype": "float16"}):
        encoder = Means(before=stop, version=changed.get("version", "1"))
        with pytest.raises(KeyboardInterrupt):
            embed(folder, encoder, batch_size=4, dtype=changed.get("dtype"))
        assert ".A1.part" in files(folder)
    rest = Means()
    embed(folder, rest, batch_size=4)
    assert sum(rest.n_spots) == 2 * N_SPOTS
    check(folder, expected)


def test_batches_are_those_of_a_run_that_nothing_stopped(folder, expected):
    def stop():
        if len(encoder.n_spots) == 4:
            raise KeyboardInterrupt

    encoder, rest = Means(before=stop), Means()
    with pytest.raises(KeyboardInterrupt):
        embed(folder, encoder, batch_size=4)
    # The first two or three batches of 4 were kept: of 5 they are one or two.
    embed(folder, rest, batch_size=5)
    assert set(rest.n_spots) == {5}
    assert sum(rest.n_spots) < 2 * N_SPOTS
    check(folder, expected)


@given(done=st.integers(0, 20), torn=st.lists(st.integers(0, 59), max_size=5))
@settings(max_examples=60, deadline=None)
def test_rows_from_the_first_that_did_not_reach_the_disk_are_done_again(
    tmp_path_factory, done, torn
):
    rows = np.arange(60, dtype=np.float32).reshape(20, 3) + 0.5
    path = tmp_path_factory.mktemp("part") / "C2.part"

    def part():
        return Part(path, {"encoder": "mine"}, (20, 3), "float32")

    begun = part()
    for start in range(0, done, 5):
        begun.add(rows[start : min(start + 5, done)])
    stored = bytearray(path.read_bytes())
    start = len(stored) - rows.nbytes - 4 * len(rows)
    for value in torn:  # what was never written is as it was at first; what is damaged, is not
        wrong = np.float32(np.nan) if value % 2 else rows.flat[value] + 1
        stored[start + 4 * value : start + 4 * value + 4] = wrong.tobytes()
    path.write_bytes(bytes(stored))
    again = part()
    assert again.n_done == min([done, *(value // 3 for value in torn)])
    assert (again.features[: again.n_done] == rows[: again.n_done]).all()
    again.add(rows[again.n_done :])
    assert (part().features == rows).all()
    assert part().n_done == 20


@given(cut=st.integers(0, 600), tail=st.binary(max_size=40))
@settings(max_examples=60, deadline=None)
def test_a_part_of_another_length_is_begun_anew(tmp_path_factory, cut, tail):
    path = tmp_path_factory.mktemp("part") / "C2.part"
    Part(path, {"encoder": "mine"}, (20, 3), "float32").add(np.ones((7, 3)))
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + tail)
    again = Part(path, {"encoder": "mine"}, (20, 3), "float32")
    same = len(whole[:cut] + tail) == len(whole)
    assert again.n_done == 7 if path.read_bytes() == whole else again.n_done <= 7 * same
    assert (again.features[: again.n_done] == 1).all()
    again.add(np.full((20 - again.n_done, 3), 2.0))
    rest = Part(path, {"encoder": "mine"}, (20, 3), "float32")
    assert rest.n_done == 20
    assert (rest.features[7:] == 2).all()


@pytest.fixture
def disk_full():
    """Let files grow to so many bytes only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Features of a section are 100 kB: the first limit has no room for them, which is found before the
# first is encoded; the second has none for the rest of an .h5ad.
@pytest.mark.parametrize(("room", "name"), [(50_000, ".A1.part"), (102_000, "A1.h5ad")])
def test_a_full_disk_is_said_and_no_half_written_file_is_believed(
    folder, expected, disk_full, room, name
):
    disk_full(room)
    told = rf"means/{name}: cannot be written \(File too large\); make room there and run again"
    first, rest = Means(), Means()
    with pytest.raises(InputError, match=told):
        embed(folder, first, batch_size=4)
    assert not [file for file in files(folder) if "h5ad" in file]
    disk_full(resource.RLIM_INFINITY)
    embed(folder, rest, batch_size=4)
    # Nothing that was kept is encoded again; of the second section no more than two batches.
    assert 2 * N_SPOTS <= sum(first.n_spots + rest.n_spots) <= 2 * N_SPOTS + 8
    assert sum(rest.n_spots) == N_SPOTS * (2 if name == ".A1.part" else 1)
    check(folder, expected)


@given(place=st.floats(0, 1), bit=st.integers(0, 7))
@settings(max_examples=8, deadline=None, suppress_health_check=[*HealthCheck])
def test_a_flipped_bit_in_features_is_refused_and_they_are_made_anew(folder, expected, place, bit):
    embed(folder, Means(), batch_size=4)
    path = features_path(folder, "means", "A1")
    content, said = bytearray(path.read_bytes()), []
    # The seal itself is no feature.
    content[int(place * (len(content) - 81))] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"means/A1\.h5ad: damaged .*; make it again"):
        features(folder)
    embed(folder, Means(), batch_size=4, say=said.append)
    assert said == [f"section A1: embedded again, because {path} is damaged"]
    check(folder, expected)


def test_a_second_run_takes_what_the_first_has_not_and_waits(folder, expected):
    at_work, may_go_on = threading.Event(), threading.Event()

    def hold():
        at_work.set()
        assert may_go_on.wait(60)

    first, second, said = Means(before=hold), Means(), []
    results = {}

    def run():
        results["first"] = embed(folder, first, batch_size=4)

    def say(line):
        said.append(line)
        may_go_on.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert at_work.wait(60)
        results["second"] = embed(folder, second, batch_size=4, say=say)
    finally:
        may_go_on.set()
        thread.join()
    assert [entry.done_before for entry in results["first"]] == [False, True]
    assert [entry.done_before for entry in results["second"]] == [True, False]
    assert sum(first.n_spots) == sum(second.n_spots) == N_SPOTS
    assert said == [f"section A1: another run is at it; waiting ({lock_of(folder, 'A1')})"]
    check(folder, expected)


def lock_of(folder, name):
    return features_path(folder, "means", name).with_name(f".{name}.h5ad.lock")


def test_a_run_that_was_stopped_claims_nothing(folder, expected):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        embed(folder, Means(before=stop))
    # The traceback still holds all of its objects.
    assert stopped.tb is not None
    assert not lock_of(folder, "A1").exists()
    embed(folder, Means())
    check(folder, expected)
