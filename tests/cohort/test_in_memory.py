"""Whatever scanpy, squidpy and SpatialData users hold gives the sections that files would give."""

from __future__ import annotations

import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import strank
from strank.cohort import in_memory
from strank.cohort.contract import positions_um, section_info
from strank.cohort.in_memory import as_sections, um_of_spots
from strank.errors import InputError

N_GENES = 6


@pytest.fixture(autouse=True)
def _untold(monkeypatch):
    monkeypatch.setattr(in_memory, "_told", set())


def plain(section: AnnData) -> AnnData:
    """What a scanpy user has of a section: counts, features, positions, a patient."""
    return AnnData(
        section.X.copy(),
        obs=section.obs[["patient"]].copy(),
        var=pd.DataFrame(index=section.var_names),
        obsm={"mine": section.obsm["mine"], "spatial": section.obsm["spatial"]},
    )


@pytest.fixture
def plains(cohort) -> dict[str, AnnData]:
    return {name: plain(section) for name, section in cohort.items()}


def frozen(adata: AnnData) -> tuple:
    """All that an object holds, to be compared."""
    matrices = [np.asarray(adata.X.todense() if sparse.issparse(adata.X) else adata.X).tobytes()]
    matrices += [np.asarray(values).tobytes() for values in adata.obsm.values()]
    tables = adata.obs.to_csv(), adata.var.to_csv(), list(adata.obsm), list(adata.uns)
    return (*matrices, *tables)


def weights(model) -> list[np.ndarray]:
    return [value.numpy() for value in model.head.state_dict().values()]


def same(one, other) -> bool:
    pairs = zip(weights(one), weights(other), strict=True)
    return list(one.panel.index) == list(other.panel.index) and all(
        np.array_equal(a, b) for a, b in pairs
    )


def test_plain_objects_give_what_the_contract_gives_to_the_bit(cohort, plains):
    before = {name: frozen(adata) for name, adata in plains.items()}
    expected = strank.fit(cohort, encoder="mine", n_genes=3)
    with pytest.warns(UserWarning, match="A1, A2, B1, C1: library_size is the sum over 6 genes"):
        model = strank.fit(plains, encoder="mine", n_genes=3)
    assert same(model, expected)
    assert model.provenance["sections"]["B1"]["patient"] == "B"
    scores = model.predict(plains["B1"])
    np.testing.assert_array_equal(scores.X, expected.predict(cohort["B1"]).X)
    found = strank.cross_validate(plains, by="patient", encoder="mine", n_genes=3)
    there = strank.cross_validate(cohort, by="patient", encoder="mine", n_genes=3)
    # Null distributions of positions do not depend on their unit.
    pd.testing.assert_frame_equal(found.summary, there.summary)
    assert {name: frozen(adata) for name, adata in plains.items()} == before


def test_forms_of_several_sections_are_the_same(plains):
    together = anndata.concat(plains, label="section", index_unique="-")
    listed = [adata.copy() for adata in plains.values()]
    for name, adata in zip(plains, listed, strict=True):
        adata.obs["section"] = name
    expected = strank.fit(plains, encoder="mine", n_genes=3)
    for given in (together, listed, iter(listed)):
        assert same(strank.fit(given, encoder="mine", n_genes=3), expected)
    # As squidpy and SpatialData call it.
    renamed = together.copy()
    renamed.obs = renamed.obs.rename(columns={"section": "library_id"})
    assert same(strank.fit(renamed, encoder="mine", n_genes=3), expected)
    scores = expected.predict(renamed)
    for name, adata in plains.items():
        rows = (renamed.obs["library_id"] == name).to_numpy()
        np.testing.assert_array_equal(scores.X[rows], expected.predict(adata).X)


def test_a_model_is_evaluated_on_plain_objects(cohort, plains):
    found, there = (
        strank.evaluate(
            strank.fit({n: held[n] for n in ("A1", "A2", "B1")}, encoder="mine", n_genes=3),
            {"C1": held["C1"]},
            train=held,
        )
        for held in (plains, cohort)
    )
    pd.testing.assert_frame_equal(found.summary, there.summary)
    assert found.warnings == there.warnings


def test_regions_are_contrasted_without_a_file(cohort, plains):
    model = strank.fit(cohort, encoder="mine", n_genes=3)
    plain, section = plains["A1"], cohort["A1"]
    for adata in (plain, section):
        adata.obs["side"] = np.where(adata.obsm["spatial"][:, 0] < 250, "left", "right")
        adata.obsm["spatial"] = adata.obsm["spatial"] * 10  # several blocks of tissue
    with pytest.raises(InputError, match=r'uns\["strank"\]\["um_per_pixel"\] are needed'):
        strank.contrast(model.predict(plain), "side", plain)
    plain.uns["strank"] = {"um_per_pixel": section_info(section).um_per_pixel}
    del plain.obs["patient"]  # who it is plays no part
    tables = [strank.contrast(model.predict(a), "side", a).table for a in (plain, section)]
    pd.testing.assert_frame_equal(*tables)


def test_positions_of_one_or_several_sections(cohort, plains):
    together = anndata.concat(plains, label="section", index_unique="-")
    scales = {"A1": 0.5, "A2": 1.0, "B1": 2.0}
    together.uns["strank"] = {name: {"um_per_pixel": um} for name, um in scales.items()}
    found = um_of_spots(together)
    for name, adata in plains.items():
        rows = (together.obs["section"] == name).to_numpy()
        expected = adata.obsm["spatial"] * scales.get(name, np.nan)
        np.testing.assert_array_equal(found[rows], expected)
        np.testing.assert_array_equal(um_of_spots(cohort[name]), positions_um(cohort[name]))


def test_as_through_a_cohort_on_disk(tmp_path, st_folder, recwarn):
    sections = [strank.io.read_st(st_folder, section=name, pitch_um=200) for name in ("A1", "B1")]
    strank.io.write_sections(sections, tmp_path / "cohort")
    strank.embed(tmp_path / "cohort")
    cohort = strank.read_cohort(tmp_path / "cohort", encoder="morphology")
    held = {}
    for name, section in cohort.items():
        adata = AnnData(section.X.astype(np.int64).toarray(), obs=section.obs[["patient"]].copy())
        adata.var_names = section.var_names
        adata.obsm["morphology"] = section.obsm["morphology"]
        adata.obsm["spatial"] = section.obsm["spatial"]
        held[name] = adata
    assert same(strank.fit(held, n_genes=3), strank.fit(cohort, n_genes=3))


def test_what_keeps_the_contract_is_handed_on_as_it_is(cohort):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = as_sections(cohort)
    assert all(found[name] is section for name, section in cohort.items())


def test_the_name_in_a_mapping_counts(cohort):
    renamed = as_sections({"X9": cohort["A1"]})["X9"]
    assert set(renamed.obs["section"]) == {"X9"}
    assert set(cohort["A1"].obs["section"]) == {"A1"}
    assert np.shares_memory(renamed.X.data, cohort["A1"].X.data)
    assert section_info(renamed) == section_info(cohort["A1"])


def test_counts_on_disk_are_asked_for(tmp_path, plains):
    plains["A1"].write_h5ad(tmp_path / "A1.h5ad")
    plains["A1"] = anndata.read_h5ad(tmp_path / "A1.h5ad", backed="r")
    with pytest.raises(
        InputError, match=r"section A1: its counts are on disk; .* `.to_memory\(\)`"
    ):
        strank.cross_validate(plains, encoder="mine", n_genes=3)
    plains["A1"].file.close()


def test_counts_stay_shared_and_sparse(plains):
    adata = plains["A1"]
    section = as_sections({"A1": adata})["A1"]
    assert np.shares_memory(section.X.data, adata.X.data)
    assert section.obsm["mine"] is adata.obsm["mine"]
    dense = AnnData(adata.X.toarray().astype(int), obs=adata.obs, var=adata.var, obsm=adata.obsm)
    made = as_sections({"A1": dense})["A1"].X
    assert made.dtype == np.float32
    assert (made != adata.X).nnz == 0
    assert sparse.issparse(made)


def test_it_is_said_once_and_where_the_user_stands(plains):
    with pytest.warns(UserWarning, match="library_size") as told:
        strank.fit(plains, encoder="mine", n_genes=3)
    assert [warning.filename for warning in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strank.cross_validate(plains, encoder="mine", n_genes=3)
        strank.fit({"A1": plains["A1"]}, encoder="mine", n_genes=3)


@pytest.mark.parametrize("how", ["log", "scaled", "shares"])
def test_counts_that_are_not_raw(plains, how):
    raw = plains["A1"].X.copy()
    values = {"log": raw.log1p(), "scaled": raw.toarray() - 10.0, "shares": raw * 0.1}[how]
    plains["A1"].X = values
    what = "is negative" if how == "scaled" else "is not a whole number"
    with pytest.raises(InputError, match=rf"^section A1: X: spot 0x0, gene G0: .* {what}") as error:
        strank.fit(plains, encoder="mine", n_genes=3)
    assert str(error.value).endswith('give raw counts in X or in layers["counts"]')
    plains["A1"].layers["counts"] = raw
    with pytest.warns(UserWarning, match=r"section A1: X is no counts, those in layers"):
        section = as_sections(plains)["A1"]
    assert np.shares_memory(section.X.data, raw.data) or (raw != section.X).nnz == 0


def test_a_section_of_a_cohort_that_was_normalised_is_refused(cohort):
    cohort["B1"].X = cohort["B1"].X.log1p()
    with pytest.raises(InputError, match=r"section B1: X: spot .* is not a whole number"):
        strank.cross_validate(cohort, encoder="mine", n_genes=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.obs.pop("patient"), r'section A1: the patient is not known.*obs\["patient"\]'),
        (lambda a: a.obs.__setitem__("patient", list("AB" * 15)), "names several .A, B.; if these"),
        (lambda a: a.obs.__setitem__("section", list("xy" * 15)), "section A1 holds several"),
        (lambda a: a.obsm.pop("spatial"), r'section A1: lacks obsm\["spatial"\]'),
        (lambda a: a.obsm.pop("mine"), r"section A1 has no features obsm\['mine'\]"),
        (lambda a: setattr(a, "X", None), r"section A1: X is empty; give raw counts"),
        (lambda a: a.X.data.fill(0), "section A1: no spot has any count"),
        (lambda a: a.obs.__setitem__("library_size", 1.0), "library_size.* less than the counts"),
        (lambda a: setattr(a, "var_names", ["G"] * 6), "section A1: gene G stands twice"),
        (lambda a: setattr(a, "obs_names", ["s"] * 30), "section A1: obs_names has duplicates"),
    ],
)
def test_what_is_lacking_is_named(plains, change, message):
    change(plains["A1"])
    with pytest.raises(InputError, match=message):
        strank.fit(plains, encoder="mine", n_genes=3)


@pytest.mark.parametrize("given", ["cohort", Path("cohort"), None, 3, ["A1"], {"A1": 1}, []])
def test_what_is_no_section(given):
    with pytest.raises(InputError, match=r"sections are an AnnData|is needed; got|no sections"):
        as_sections(given)


def test_two_of_one_name_in_a_list(plains):
    for adata in plains.values():
        adata.obs["section"] = "S"
    with pytest.raises(InputError, match="two sections are called S"):
        as_sections(list(plains.values()))


def test_library_size_is_what_scanpy_counted_before_genes_were_cut(plains):
    adata = plains["A1"]
    adata.obs["total_counts"] = np.asarray(adata.X.sum(1)).ravel()
    few = adata[:, :3].copy()
    with pytest.warns(UserWarning, match=r'library_size is obs\["total_counts"\], more than'):
        section = as_sections({"A1": few})["A1"]
    np.testing.assert_array_equal(section.obs["library_size"], adata.obs["total_counts"])
    # Of logarithms it is none.
    few.obs["total_counts"] = np.log1p(few.obs["total_counts"])
    with pytest.warns(UserWarning, match=r"sum over 3 genes; if more were measured and cut away"):
        section = as_sections({"A1": few})["A1"]
    np.testing.assert_array_equal(section.obs["library_size"], few.X.sum(1).A1)
    # Nor of some genes.
    few.obs["total_counts"] = np.maximum(few.X.sum(1).A1 - 1, 0)
    section = as_sections({"A1": few})["A1"]
    np.testing.assert_array_equal(section.obs["library_size"], few.X.sum(1).A1)
    few.obs["library_size"] = 1000
    assert (as_sections({"A1": few})["A1"].obs["library_size"] == 1000).all()


def test_patients_as_cellxgene_calls_them(plains):
    adata = plains["A1"]
    adata.obs = adata.obs.rename(columns={"patient": "donor_id"})
    with pytest.warns(UserWarning, match=r'the patient is that of obs\["donor_id"\]'):
        assert as_sections(plains)["A1"].obs["patient"].unique() == ["A"]


def test_spots_outside_the_tissue_are_left_out_of_fits_and_kept_in_predictions(plains):
    adata = plains["A1"]
    adata.obs["in_tissue"] = [0] * 5 + [1] * 25
    with pytest.warns(UserWarning, match="A1: 5 spots outside the tissue"):
        section = as_sections(plains)["A1"]
    assert list(section.obs_names) == list(adata.obs_names[5:])
    model = strank.fit(plains, encoder="mine", n_genes=3)
    assert model.predict(adata).n_obs == 30


def test_genes_of_one_name_are_told_apart_as_by_the_readers(plains):
    for adata in plains.values():
        adata.var["gene_ids"] = [f"ENSG0000000000{i}" for i in range(N_GENES)]
        adata.var_names = ["TBCE", "TBCE", "A", "B", "C", "D"]
    names = as_sections(plains)["A1"].var_names
    assert list(names[:3]) == ["TBCE_ENSG00000000000", "TBCE_ENSG00000000001", "A"]


def test_the_scale(plains):
    adata = plains["A1"]
    info = section_info(as_sections({"A1": adata})["A1"])
    assert np.isnan([info.um_per_pixel, info.spot_pitch_um, info.spot_diameter_um]).all()
    model = strank.fit(plains, encoder="mine", n_genes=3)
    assert "spot_pitch_um" not in model.provenance
    with pytest.raises(InputError, match=r'um_per_pixel"\] = |how far away they are is not known'):
        strank.fit(plains, encoder="mine", n_genes=3, head="context")
    for each in plains.values():
        each.uns["strank"] = {"um_per_pixel": 0.5}
    info = section_info(as_sections(plains)["A1"])
    assert info.um_per_pixel == 0.5
    assert info.spot_pitch_um > 0


def hexagonal(um_per_pixel: float) -> np.ndarray:
    """Positions of Visium's array, in pixels."""
    row, col = np.mgrid[0:12, 0:24].reshape(2, -1)
    kept = (row + col) % 2 == 0
    row, col = row[kept], col[kept]
    return row, col, np.c_[50.0 * col, 50.0 * 3**0.5 * row] / um_per_pixel


@pytest.mark.parametrize("known", ["array", "width", "stated"])
def test_the_scale_of_visium(known):
    row, col, positions = hexagonal(0.4)
    counts = np.random.default_rng(0).poisson(5, (len(row), N_GENES)).astype(np.float32)
    adata = AnnData(counts, obs=pd.DataFrame({"patient": "P"}, [f"s{i}" for i in range(len(row))]))
    adata.obsm["spatial"] = positions
    if known == "array":
        adata.obs = adata.obs.assign(array_row=row, array_col=col)
    # Space Ranger's is of 65 µm.
    scales = {"width": {"spot_diameter_fullres": 65 / 0.4}, "stated": {"microns_per_pixel": 0.4}}
    adata.uns["spatial"] = {"S1": {"scalefactors": scales.get(known, {})}}
    section = as_sections(adata)["S1"]
    info = section_info(section)
    assert info.um_per_pixel == pytest.approx(0.4, rel=1e-6)
    assert info.spot_pitch_um == pytest.approx(100)
    assert info.technology == ("Visium" if known == "array" else "unknown")


def test_annotated_tissue_is_no_other_section(plains):
    adata = plains["A1"]
    adata.obs["region"] = np.where(np.arange(adata.n_obs) % 2, "tumour", "stroma")
    assert list(as_sections(adata)) == ["section 1"]
    assert list(as_sections({"A1": adata})) == ["A1"]
    adata.uns["spatialdata_attrs"] = {"region_key": "region"}
    assert list(as_sections(adata)) == ["stroma", "tumour"]


def _of_two(adata):
    adata.obs["patient"] = ["Q"] + ["R"] * (adata.n_obs - 1)


def _of_unknown_depth(adata):
    adata.obs["library_size"] = np.where(np.arange(adata.n_obs), adata.obs["library_size"], np.nan)


def _of_too_little_depth(adata):
    adata.obs.iloc[3, adata.obs.columns.get_loc("library_size")] = float(adata.X[3].sum() - 1)


def _nowhere(adata):
    adata.obsm["spatial"] = np.full((adata.n_obs, 2), np.nan)


def _named_alike(adata):
    adata.obs_names = ["s"] * adata.n_obs


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_of_two, "one section of one patient"),
        (_of_unknown_depth, r'obs\["library_size"\] is not finite'),
        (_of_too_little_depth, r'obs\["library_size"\] is less than the counts of spot \S*3$'),
        (_nowhere, r'obsm\["spatial"\] is not finite'),
        (_named_alike, "obs_names has duplicates"),
    ],
)
def test_a_section_that_was_changed_since_it_was_read_is_looked_at(cohort, change, told):
    held = {name: adata.copy() for name, adata in cohort.items()}
    change(held["A1"])
    with pytest.raises(InputError, match=f"section A1: .*{told}"):
        strank.fit(held, encoder="mine", n_genes=3)


def test_names_that_are_the_same_as_text_are_refused(plains):
    with pytest.raises(InputError, match="two sections are called 1;"):
        as_sections({1: plains["A1"], "1": plains["A2"]})


def test_counts_of_half_precision_and_sparse_features(plains):
    adata = plains["A1"]
    adata.X = np.minimum(adata.X.toarray(), 2000).astype(np.float16)
    np.testing.assert_array_equal(as_sections({"A1": adata})["A1"].X.toarray(), adata.X)
    adata.obsm["mine"] = sparse.csr_matrix(adata.obsm["mine"])
    with pytest.raises(InputError, match="section A1: mine features are no array of numbers"):
        strank.fit(plains, encoder="mine", n_genes=3)
