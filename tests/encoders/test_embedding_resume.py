"""Embedding that ends before its time: killed, out of disk, or beside another run."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import anndata
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from strank.cohort.folder import features_path
from strank.cohort.store import read_cohort, write_h5ad
from strank.encoders.base import Field
from strank.encoders.embedding import embed
from strank.errors import InputError
from strank.files import claimed
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
    assert "A1.h5ad" in files(folder)
    rest, advanced = Means(), []
    done = embed(folder, rest, batch_size=4, advance=advanced.append)
    assert [entry.done_before for entry in done] == [True, False]
    assert sum(rest.n_spots) == N_SPOTS
    assert sum(advanced) == 2 * N_SPOTS
    check(folder, expected)
    again = Means()
    embed(folder, again)
    assert again.n_spots == []


@pytest.fixture
def disk_full():
    """Let files grow to so many bytes only."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_no_half_written_file_is_believed(folder, expected, disk_full):
    disk_full(102_000)  # features of a section are 100 kB, but its .h5ad is more
    told = r"means/A1.h5ad: cannot be written \(File too large\); make room .*; 1 more of 2"
    with pytest.raises(InputError, match=told):
        embed(folder, Means(), batch_size=4)
    assert files(folder) == []
    disk_full(resource.RLIM_INFINITY)
    embed(folder, Means(), batch_size=4)
    check(folder, expected)


@pytest.mark.parametrize("bad", ["A1", "B1"])
def test_what_fails_in_a_section_does_not_stop_the_others(folder, expected, bad):
    """Whether it is found when the section is opened, or when it is encoded."""

    def fail():
        # A1 has the batches 1 to 7; B1 is read ahead when those of A1 are encoded.
        if (len(encoder.n_spots) >= 7) == (bad == "B1"):
            raise KeyError(bad)

    encoder, advanced = Means(), []
    encoder.before = fail if bad == "B1" else lambda: None
    if bad == "A1":
        path = folder / "A1.h5ad"
        section = anndata.read_h5ad(path)
        section.uns["strank"]["image_sha256"] = "0" * 64
        whole = path.read_bytes()
        write_h5ad(section, path)
    told = "the image changed since the import" if bad == "A1" else "KeyError in .*: 'B1'"
    with pytest.raises(InputError, match=told):
        embed(folder, encoder, batch_size=4, advance=advanced.append)
    [good] = {"A1", "B1"} - {bad}
    assert [file for file in files(folder) if not file.startswith(".")] == [f"{good}.h5ad"]
    assert N_SPOTS <= sum(advanced) <= 2 * N_SPOTS
    if bad == "A1":
        path.write_bytes(whole)
    embed(folder, Means(), batch_size=4)
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


def test_a_second_run_is_refused(folder, expected):
    with claimed(folder / "features/means"), pytest.raises(InputError, match="another run is wr"):
        embed(folder, Means())
    embed(folder, Means(), batch_size=4)
    check(folder, expected)


def test_shards_embed_side_by_side_but_no_two_of_a_number(folder, expected):
    said = []
    with claimed(folder / "features/means", shard="1/2"):
        for shard in ("1/2", None):
            with pytest.raises(InputError, match="another run is writing"):
                embed(folder, Means(), shard=shard)
        said += embed(folder, Means(), batch_size=4, shard="2/2")
    said += embed(folder, Means(), batch_size=4, shard="1/2")
    assert [entry.section for entry in said] == ["B1", "A1"]
    check(folder, expected)
    assert not list((folder / "features").glob(".*"))


def test_a_run_that_was_stopped_claims_nothing(folder, expected):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        embed(folder, Means(before=stop))
    # The traceback still holds all of its objects.
    assert stopped.tb is not None
    assert not list((folder / "features").glob(".*"))
    embed(folder, Means())
    check(folder, expected)
