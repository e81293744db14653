"""Features of sections in memory are those that a cohort's folder would have."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

import strank
from strank.cohort.contract import known_encoder, section_info, spots_checksum
from strank.encoders.base import Field, encoder_facts
from strank.errors import InputError


class Colour:
    """Mean colour around a spot, fast."""

    name, version, feature_names = "colour", "1", ("red", "green", "blue")
    fields = (Field(um=100.0, pixels=16),)

    def encode(self, patches):
        return patches[0].mean((1, 2), dtype=np.float64).astype(np.float32)


@pytest.fixture
def cohort(tmp_path, st_folder) -> dict[str, AnnData]:
    """Sections as a folder has them, embedded there."""
    read = [strank.io.read_st(st_folder, section=s, pitch_um=200) for s in ("A1", "B1")]
    strank.io.write_sections(read, tmp_path / "cohort")
    strank.embed(tmp_path / "cohort", Colour())
    return strank.read_cohort(tmp_path / "cohort", encoder="colour")


@pytest.fixture
def scale(cohort) -> float:
    return section_info(cohort["A1"]).um_per_pixel


def plain(section: AnnData) -> AnnData:
    obs = pd.DataFrame({"patient": section.obs["patient"]}, section.obs_names)
    spots = {"spatial": section.obsm["spatial"]}
    return AnnData(section.X.copy(), obs=obs, var=section.var[[]].copy(), obsm=spots)


@pytest.fixture
def plains(cohort) -> dict[str, AnnData]:
    return {name: plain(section) for name, section in cohort.items()}


def files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize("form", ["folder", "mapping"])
def test_features_are_those_of_a_folder(tmp_path, st_folder, cohort, plains, form, scale):
    images = st_folder / "images"
    given = images if form == "folder" else {name: images / f"{name}.jpg" for name in plains}
    before = files(tmp_path)
    done = strank.embed(plains, Colour(), image=given, um_per_pixel=scale)
    assert [(each.section, each.n_spots) for each in done] == [("A1", 25), ("B1", 25)]
    assert files(tmp_path) == before
    for name, section in cohort.items():
        np.testing.assert_array_equal(plains[name].obsm["colour"], section.obsm["colour"])
        assert known_encoder(plains[name], "colour") == known_encoder(section, "colour")
        assert spots_checksum(plains[name]) == spots_checksum(section)
        assert section_info(plains[name]).image == section_info(section).image
        assert list(plains[name].uns["spatial"]) == [name]
        found, known = (each.uns["spatial"][name] for each in (plains[name], section))
        np.testing.assert_array_equal(found["images"]["hires"], known["images"]["hires"])
        hires = "tissue_hires_scalef"
        assert found["scalefactors"][hires] == pytest.approx(known["scalefactors"][hires])
    how = {"encoder": "colour", "n_genes": 2}
    one, other = strank.fit(plains, **how), strank.fit(cohort, **how)
    np.testing.assert_array_equal(
        one.predict(plains["A1"]).X, other.predict(cohort["A1"]).X, strict=True
    )
    assert one.encoder == other.encoder


def test_sections_in_one_object(st_folder, cohort, plains, scale):
    together = anndata.concat(plains, label="section", index_unique="-")
    strank.embed(together, Colour(), image=st_folder / "images", um_per_pixel=scale)
    expected = np.concatenate([section.obsm["colour"] for section in cohort.values()])
    np.testing.assert_array_equal(together.obsm["colour"], expected)
    # Each knows its own image and scale.
    model = strank.fit(together, encoder="colour", n_genes=2)
    assert model.provenance["sections"]["B1"]["image_sha256"] == (
        section_info(cohort["B1"]).image_sha256
    )
    assert set(together.uns["strank"]) == set(together.uns["spatial"]) == {"A1", "B1"}
    strank.embed(together, Colour())  # where they are is known by now
    np.testing.assert_array_equal(together.obsm["colour"], expected)


def test_parts_of_an_object_are_embedded_by_themselves(st_folder, cohort, plains, scale):
    together = anndata.concat(plains, label="section", index_unique="-")
    parts = {name: together[together.obs["section"] == name] for name in plains}
    strank.embed(parts, Colour(), image=st_folder / "images", um_per_pixel=scale)
    for name, part in parts.items():
        np.testing.assert_array_equal(part.obsm["colour"], cohort[name].obsm["colour"])
    assert "colour" not in together.obsm


def test_from_an_object_to_a_map(st_folder, plains, scale):
    """What is embedded can be predicted densely, too."""
    strank.embed(plains, Colour(), image=st_folder / "images", um_per_pixel=scale)
    model = strank.fit(plains, encoder="colour", n_genes=2)
    tiles = strank.predict(plains["A1"], model, encoder=Colour(), stride_um=50)
    assert tiles.n_obs > plains["A1"].n_obs
    named = strank.predict(plains, model, encoder=Colour(), stride_um=50)
    np.testing.assert_array_equal(named["A1"].X, tiles.X)


def test_parts_of_what_was_embedded_are_predicted_and_files_hold_it(
    st_folder, plains, scale, tmp_path
):
    together = anndata.concat(plains, label="section", index_unique="-")
    strank.embed(together, Colour(), image=st_folder / "images", um_per_pixel=scale)
    model = strank.fit(together, encoder="colour", n_genes=2)
    how = {"encoder": Colour(), "stride_um": 50, "um_per_pixel": scale}
    expected = strank.predict(st_folder / "images" / "B1.jpg", model, **how)
    del how["um_per_pixel"]
    tiles = strank.predict(together[together.obs["section"] == "B1"], model, **how)
    np.testing.assert_array_equal(tiles.X, expected.X)
    with pytest.raises(InputError, match="one object holds sections A1, B1; give a part"):
        strank.predict(together, model, **how)
    together.write_h5ad(tmp_path / "together.h5ad")
    again = anndata.read_h5ad(tmp_path / "together.h5ad")
    other = strank.fit(again, encoder="colour", n_genes=2)
    np.testing.assert_array_equal(other.predict(again).X, model.predict(together).X)


def test_scanpy_says_where_the_image_is(st_folder, cohort, plains, scale):
    adata = plains["A1"]
    file = st_folder / "images/A1.jpg"
    adata.uns["spatial"] = {"V1": {"metadata": {"source_image_path": str(file)}}}
    strank.embed(adata, Colour(), um_per_pixel=scale)
    assert adata.uns["spatial"] == {"V1": {"metadata": {"source_image_path": str(file)}}}
    np.testing.assert_array_equal(adata.obsm["colour"], cohort["A1"].obsm["colour"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "section A1: give its full-resolution H&E image with `image`"),
        ({"image": {"B1": "B1.jpg"}}, "section A1: `image` has none; it has B1"),
        ({"image": "A1.jpg"}, "`image` is one file for 2 sections"),
        ({"image": "{images}"}, "A1.jpg: the file does not say its µm per pixel"),
        ({"image": "{images}", "um_per_pixel": 4.4, "dtype": "float16"}, "`dtype` is of files"),
    ],
)
def test_what_is_lacking_is_named(st_folder, plains, how, message):
    how = {k: st_folder / "images" if v == "{images}" else v for k, v in how.items()}
    with pytest.raises(InputError, match=message):
        strank.embed(plains, Colour(), **how)
    assert all("colour" not in adata.obsm and not adata.uns for adata in plains.values())


def test_spots_that_do_not_belong_to_the_image(st_folder, plains, scale):
    plains["B1"].obsm["spatial"] = plains["B1"].obsm["spatial"] + 1000.0
    with pytest.raises(InputError, match=r"section B1: spot .* lies outside B1.jpg"):
        strank.embed(plains, Colour(), image=st_folder / "images", um_per_pixel=scale)
    assert "colour" not in plains["A1"].obsm


def test_a_scale_that_is_known_is_not_contradicted(st_folder, plains, scale):
    adata = plains["A1"]
    adata.uns["strank"] = {"um_per_pixel": scale}
    given = {"image": st_folder / "images/A1.jpg", "um_per_pixel": 2 * scale}
    with pytest.raises(InputError, match=r"but the positions make it 4\."):
        strank.embed({"A1": adata}, Colour(), **given)
    strank.embed({"A1": adata}, Colour(), **given, um_per_pixel_override=True)
    assert section_info(adata).um_per_pixel == 2 * scale


def test_a_folder_has_its_own_images(tmp_path):
    with pytest.raises(InputError, match="`image` and its scale are of sections in memory"):
        strank.embed(tmp_path, image="A1.jpg")


def test_an_image_that_is_not_known(section_of):
    adata = plain(section_of())
    section = section_of()
    section.obsm["colour"] = section.obsm["mine"]
    section.uns["colour"] = encoder_facts(Colour())
    model = strank.fit({"A1": section}, encoder="colour", n_genes=2)
    with pytest.raises(InputError, match="image of a section is not known"):
        strank.predict(adata, model, encoder=Colour())
