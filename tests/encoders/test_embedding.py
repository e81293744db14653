"""Embedding a cohort: beside the counts, once, whole or absent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np
import pytest
import torch
from PIL import Image

from strank.cohort.folder import count_spots, features_path
from strank.cohort.store import read_cohort, read_h5ad
from strank.encoders.base import Field, encoder_facts
from strank.encoders.embedding import embed
from strank.encoders.tiles import embed_spots
from strank.errors import InputError
from strank.io import find_st, read_st, write_sections
from strank.slides.slide import Slide


@dataclass
class Means:
    """Mean colour of two fields."""

    name: str = "means"
    version: str = "1"
    fields: tuple[Field, ...] = (Field(100, 8), Field(400, 8))
    feature_names: tuple[str, ...] = tuple(f"{f}.{c}" for f in "ab" for c in "rgb")
    calls: int = 0

    def encode(self, patches):
        self.calls += 1
        return np.concatenate([p.mean((1, 2)) for p in patches], 1).astype(np.float32)


@pytest.fixture
def folder(st_folder, tmp_path):
    write_sections(
        (read_st(st_folder, section=name) for name in find_st(st_folder)), tmp_path / "cohort"
    )
    return tmp_path / "cohort"


def test_features_are_those_of_the_image_at_the_spot(folder, st_folder):
    embed(folder, Means())
    adata = read_cohort(folder, encoder="means")["A1"]
    pixels = np.asarray(Image.open(st_folder / "images/A1.jpg"))
    i = list(adata.obs_names).index("5x4")
    x, y = adata.obsm["spatial"][i].astype(int)
    # 100 µm are 22 whole px at 4.44 µm per pixel.
    expected = pixels[y - 11 : y + 11, x - 11 : x + 11].mean((0, 1))
    np.testing.assert_allclose(adata.obsm["means"][i, :3], expected, atol=0.6)


def test_spots_are_counted_without_their_counts(folder):
    assert count_spots(folder) == 50


def test_counts_are_not_rewritten_and_nothing_is_done_twice(folder):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("*.h5ad")}
    advanced = []
    first = embed(folder, Means(), advance=advanced.append)
    assert [entry.done_before for entry in first] == [False, False]
    assert sum(advanced) == 50
    again = Means()
    second = embed(folder, again)
    assert [entry.done_before for entry in second] == [True, True]
    assert again.calls == 0
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("*.h5ad")}


def test_what_changed_is_done_again_and_said(folder, st_folder):
    def outcome(version, **options):
        said = []
        done = embed(folder, Means(version=version), say=said.append, **options)
        return [entry.done_before for entry in done], said

    assert outcome("1") == ([False, False], [])
    assert outcome("1") == ([True, True], [])
    done, said = outcome("2")
    assert done == [False, False]
    assert said == [
        f"section {name}: embedded again, because the encoder changed: version was 1, now 2"
        for name in ("A1", "B1")
    ]
    features_path(folder, "means", "A1").write_bytes(b"damaged")
    done, said = outcome("2")
    assert done == [False, True]
    assert "A1.h5ad is damaged" in said[0]
    section = read_h5ad(folder / "B1.h5ad")
    section.obsm["spatial"] += 1
    section.write_h5ad(folder / "B1.h5ad")
    done, said = outcome("2")
    assert done == [True, False]
    assert said == ["section B1: embedded again, because its spots or its image changed"]
    Image.new("RGB", (300, 280)).save(st_folder / "images/B1.jpg")
    assert outcome("2")[0] == [True, True]  # the image is not needed
    for _ in range(2):  # and nothing of the wrong image is kept
        with pytest.raises(InputError, match=r"B1.jpg: the image changed since the import"):
            outcome("3")


def test_half_precision_is_stored_if_asked_for_and_read_as_single(folder):
    embed(folder, Means())
    single = read_cohort(folder, encoder="means")["A1"].obsm["means"]
    said = []
    embed(folder, Means(), dtype="float16", say=said.append)
    assert "its features are stored as float32, not float16" in said[0]
    assert read_h5ad(features_path(folder, "means", "A1")).X.dtype == np.float16
    half = read_cohort(folder, encoder="means")["A1"].obsm["means"]
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, single.astype(np.float16))
    # Whoever does not ask takes what there is.
    assert all(entry.done_before for entry in embed(folder, Means()))
    with pytest.raises(InputError, match=r"dtype 'int8': choose one of float32, float16"):
        embed(folder, Means(), dtype="int8")


@dataclass
class Huge(Means):
    value: float = 1e5

    def encode(self, patches):
        features = super().encode(patches)
        features[:, 0] = self.value
        return features


def test_features_that_are_not_finite_are_refused(folder):
    for value, dtype in ((1e5, "float16"), (np.nan, "float32")):
        told = rf"A1: means features of spot 3x2, .* are not finite as {dtype}"
        with pytest.raises(InputError, match=told):
            embed(folder, Huge(value=value), dtype=dtype)
    assert not features_path(folder, "means", "A1").exists()
    embed(folder, Huge(value=1e5))


def test_weights_are_for_an_encoder_that_is_named(folder):
    with pytest.raises(InputError, match="`weights` are for an encoder that is given by its name"):
        embed(folder, Means(), weights="w.pt")
    with pytest.raises(InputError, match="`weights` is for image networks, which 'morphology'"):
        embed(folder, weights="w.pt")
    with pytest.raises(InputError, match="`precision=bf16` is for image networks on a GPU"):
        embed(folder, Means(), precision="bf16")


def test_features_of_another_shape_are_refused(folder):
    encoder = Means(feature_names=("r", "g"))
    told = r"means: gives features \[25, 6\], but \[25 spots, 2 feature_names\] are needed"
    with pytest.raises(InputError, match=told):
        embed(folder, encoder)


def test_what_is_known_of_the_weights_stands_beside_the_features(folder):
    encoder = Means()
    encoder.revision, encoder.precision = "0123abcd", "bf16"
    embed(folder, encoder)
    uns = read_h5ad(features_path(folder, "means", "A1")).uns
    assert (uns["revision"], uns["precision"]) == ("0123abcd", "bf16")
    facts = json.loads(uns["encoder"])
    assert facts == encoder_facts(encoder)
    assert {"name", "version", "preprocessing"} <= facts.keys()
    # The same weights of another commit, on another machine, give the same features.
    assert all(entry.done_before for entry in embed(folder, Means()))


def test_embedding_leaves_the_global_generator_alone(folder):
    before = torch.random.get_rng_state()
    embed(folder, Means())
    assert torch.equal(torch.random.get_rng_state(), before)


@dataclass
class Crowded(Means):
    """As on a GPU that has memory for so many spots."""

    most: int = 4
    sizes: list[int] = field(default_factory=list)

    def encode(self, patches):
        if len(patches[0]) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(patches[0]))
        return super().encode(patches)


def test_out_of_memory_halves_the_batch_and_is_said_once(folder):
    embed(folder, Means())
    expected = read_cohort(folder, encoder="means")["B1"].obsm["means"]
    said, encoder = [], Crowded(version="2")
    embed(folder, encoder, batch_size=16, say=lambda line: said.append(line))
    assert [line for line in said if "memory" in line] == [
        "out of GPU memory with 16 tiles at once; going on with 4"
    ]
    assert encoder.sizes == 2 * [4, 4, 4, 4, 4, 4, 1]
    again = read_cohort(folder, encoder="means")["B1"].obsm["means"]
    np.testing.assert_array_equal(again, expected)
    with pytest.raises(InputError, match=r"means: the GPU has no memory for a single tile"):
        embed(folder, Crowded(version="3", most=0))


@pytest.mark.slow
def test_workers_and_batches_change_nothing(folder):
    embed(folder, Means())
    expected = {n: a.obsm["means"] for n, a in read_cohort(folder, encoder="means").items()}
    embed(folder, Means(version="2"), batch_size=4, workers=2)
    for name, adata in read_cohort(folder, encoder="means").items():
        np.testing.assert_array_equal(adata.obsm["means"], expected[name])


def test_what_a_worker_finds_is_one_clear_error(folder, st_folder):
    image = st_folder / "images/A1.jpg"
    image.write_bytes(image.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"A1.jpg: damaged or truncated image") as error:
        embed(folder, Means(), workers=1)
    assert "Traceback" not in str(error.value)


DEADLY = """
import os, signal

class Deadly:
    sizes, um_per_pixel = ((300, 300),), None
    def read(self, *window):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_worker_is_explained(tmp_path, monkeypatch):
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    slide = Slide(import_module("deadly").Deadly(), 4.0, tmp_path / "A1.jpg")
    told = r"a process that reads tiles was killed .* Use fewer `workers`, 0 for none"
    with pytest.raises(InputError, match=told):
        embed_spots(slide, np.full((3, 2), 150.0), Means(), workers=1)


def test_an_absent_image_is_named(folder, st_folder):
    (st_folder / "images/A1.jpg").unlink()
    with pytest.raises(InputError, match=r"A1.jpg: no such image"):
        embed(folder, Means())
