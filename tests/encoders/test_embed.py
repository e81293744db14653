"""Embedding a cohort: beside the counts, once, whole or absent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from strank.cohort.store import count_spots, features_path, read_cohort
from strank.encoders.base import Field
from strank.encoders.catalogue import get_encoder
from strank.encoders.embed import embed_cohort
from strank.errors import InputError
from strank.readers.st import import_st


@dataclass
class Means:
    """Mean colour of two fields; dies after a number of spots if asked to."""

    name: str = "means"
    version: str = "1"
    fields: tuple[Field, ...] = (Field(100, 8), Field(400, 8))
    feature_names: tuple[str, ...] = tuple(f"{f}.{c}" for f in "ab" for c in "rgb")
    calls: int = 0
    dies_at: int = -1

    def encode(self, patches):
        self.calls += 1
        if self.calls == self.dies_at:
            raise KeyboardInterrupt
        return np.concatenate([p.mean((1, 2)) for p in patches], 1).astype(np.float32)


@pytest.fixture
def folder(st_folder, tmp_path):
    import_st(st_folder, tmp_path / "cohort")
    return tmp_path / "cohort"


def test_features_are_those_of_the_image_at_the_spot(folder, st_folder):
    embed_cohort(folder, Means())
    adata = read_cohort(folder, encoder="means")["A1"]
    pixels = np.asarray(Image.open(st_folder / "images/A1.jpg"))
    i = list(adata.obs_names).index("5x4")
    x, y = adata.obsm["spatial"][i].astype(int)
    # 100 µm are 20 px at 5 µm per pixel.
    expected = pixels[y - 10 : y + 10, x - 10 : x + 10].mean((0, 1))
    np.testing.assert_allclose(adata.obsm["means"][i, :3], expected, atol=0.6)


def test_spots_are_counted_without_their_counts(folder):
    assert count_spots(folder) == 50


def test_counts_are_not_rewritten_and_nothing_is_done_twice(folder):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("*.h5ad")}
    advanced = []
    first = embed_cohort(folder, Means(), advance=advanced.append)
    assert [entry.done_before for entry in first] == [False, False]
    assert sum(advanced) == 50
    again = Means()
    second = embed_cohort(folder, again)
    assert [entry.done_before for entry in second] == [True, True]
    assert again.calls == 0
    assert before == {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("*.h5ad")}


def test_a_killed_run_continues(folder):
    with pytest.raises(KeyboardInterrupt):
        embed_cohort(folder, Means(dies_at=2))
    files = [p.name for p in (folder / "features/means").iterdir()]
    assert files == ["A1.h5ad"]
    rest = Means()
    assert [e.done_before for e in embed_cohort(folder, rest)] == [True, False]
    assert rest.calls == 1


def test_what_changed_is_done_again(folder, st_folder):
    embed_cohort(folder, Means())
    assert not embed_cohort(folder, Means(version="2"))[0].done_before
    features_path(folder, "means", "A1").write_bytes(b"damaged")
    done = embed_cohort(folder, Means(version="2"))
    assert [e.done_before for e in done] == [False, True]
    Image.new("RGB", (300, 280)).save(st_folder / "images/B1.jpg")
    embed_cohort(folder, Means(version="2"))  # done before: the image is not needed
    with pytest.raises(InputError, match=r"B1.jpg: the image changed since the import"):
        embed_cohort(folder, Means(version="3"))


def test_an_absent_image_is_named(folder, st_folder):
    (st_folder / "images/A1.jpg").unlink()
    with pytest.raises(InputError, match=r"A1.jpg: no such image"):
        embed_cohort(folder, Means())


def test_unknown_encoders_suggest_the_nearest():
    with pytest.raises(InputError, match=r"no encoder 'uni'; choose one of morphology"):
        get_encoder("uni")
