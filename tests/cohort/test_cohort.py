from __future__ import annotations

import json
import re
from hashlib import sha256
from itertools import pairwise

import anndata
import h5py
import numpy as np
import pytest
from anndata import AnnData
from scipy import sparse

from strank.cohort.contract import (
    check_section,
    counts_checksum,
    known_encoder,
    spots_checksum,
)
from strank.cohort.folder import digest_of, features_path, n_spots_of, spots_digest
from strank.cohort.store import read_cohort, read_h5ad, write_h5ad
from strank.errors import InputError
from strank.metrics.correlation import target_of


def write(cohort, folder):
    for name, adata in cohort.items():
        plain = adata.copy()
        del plain.obsm["mine"], plain.uns["mine"]
        write_h5ad(plain, folder / f"{name}.h5ad")
        features = AnnData(
            X=adata.obsm["mine"],
            obs=adata.obs[[]],
            uns={"encoder": json.dumps(adata.uns["mine"]), "spots_sha256": spots_checksum(adata)},
        )
        write_h5ad(features, features_path(folder, "mine", name))
    return folder


def test_a_cohort_survives_the_disk(cohort, tmp_path):
    back = read_cohort(write(cohort, tmp_path / "c"), encoder="mine")
    assert list(back) == ["A1", "A2", "B1", "C1"]
    for name, adata in back.items():
        np.testing.assert_array_equal(adata.obsm["mine"], cohort[name].obsm["mine"])
        assert known_encoder(adata, "mine") == cohort[name].uns["mine"]
        adata.write_h5ad(tmp_path / "again.h5ad")
        assert counts_checksum(adata) == counts_checksum(cohort[name])
    assert anndata.concat(back, label="from", index_unique="-").n_obs == 120


@pytest.mark.parametrize("names", ["plain", "of other alphabets", "with a mask"])
def test_what_is_read_without_anndata_is_what_anndata_reads(cohort, tmp_path, names):
    section, path = cohort["A1"], write(cohort, tmp_path) / "A1.h5ad"
    if names == "of other alphabets":
        section.obs_names = [f"Müller-患者-{i}" for i in range(section.n_obs)]
        write_h5ad(section, path)
    if names == "with a mask":  # as AnnData writes names where pandas has a type for text
        section.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            file.move("obs/_index", "names")
            file.move("names", "obs/_index/values")
            file["obs/_index/mask"] = np.zeros(section.n_obs, bool)
            about = {"encoding-type": "nullable-string-array", "encoding-version": "0.1.0"}
            file["obs/_index"].attrs.update(about)
            whole = {"encoding-type": "array", "encoding-version": "0.2.0"}
            file["obs/_index/mask"].attrs.update(whole)
    assert digest_of(path) == spots_checksum(read_h5ad(path))
    assert n_spots_of(path) == section.n_obs


def test_the_digest_is_of_image_scale_names_and_centres():
    """By hand: it is stored with features, which another would make useless."""
    centres = np.array([[1.0, 2.0], [3.0, 4.5]])
    whole = b"ab 0.5\nspot 1\nspot 2" + centres.tobytes()
    assert spots_digest("ab", 0.5, ["spot 1", "spot 2"], centres) == sha256(whole).hexdigest()


def test_a_file_that_does_not_say_what_it_is_made_of_has_no_digest(cohort, tmp_path):
    path = write(cohort, tmp_path) / "A1.h5ad"
    before = digest_of(path)
    changed = cohort["A1"].copy()
    changed.obsm["spatial"] = changed.obsm["spatial"] + 1
    write_h5ad(changed, path)
    assert digest_of(path) not in (None, before)
    del changed.uns["strank"]
    write_h5ad(changed, path)
    assert digest_of(path) is None
    path.write_bytes(b"no HDF5")
    with pytest.raises(InputError, match=r"A1\.h5ad: not a readable"):
        digest_of(path)


def test_refusals_of_a_cohort(cohort, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        read_cohort(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no sections \(\*.h5ad\)"):
        read_cohort(tmp_path / "empty")
    folder = write(cohort, tmp_path / "c")
    with pytest.raises(InputError, match="no section Z9; there are A1, A2, B1, C1"):
        read_cohort(folder, sections=["A1", "Z9"])
    with pytest.raises(
        InputError, match=r"no other features; run `strank embed .*c --encoder other`"
    ):
        read_cohort(folder, encoder="other")
    features_path(folder, "mine", "A1").write_bytes(
        features_path(folder, "mine", "A2").read_bytes()
    )
    with pytest.raises(InputError, match=r"A1.h5ad: features of other spots or another image"):
        read_cohort(folder, encoder="mine")
    (folder / "B1.h5ad").write_bytes(b"no h5")
    with pytest.raises(InputError, match=r"B1.h5ad: not a readable .h5ad file"):
        read_cohort(folder)
    (folder / "B1.h5ad").write_bytes((folder / "C1.h5ad").read_bytes())
    with pytest.raises(InputError, match=r"B1.h5ad: obs\[.section.\] says C1"):
        read_cohort(folder)


@pytest.mark.parametrize(
    # In SciPy's words, which differ from version to version.
    ("part", "values", "message"),
    [
        ("indices", [0, 9, 1, 2], r"X is damaged \([^()]* must be < 6\)"),
        ("indices", [0, -1, 1, 2], r"X is damaged \([^()]* must be >= 0\)"),
        ("indices", [0.0, 1.0, 1.0, 2.0], r"X is damaged \(its indices are no integers\)"),
        ("indptr", [0, 2, 1, 4], r"X is damaged \(ind[^()]* must .*non-decreasing"),
        ("indptr", [0, 2, 4], r"X is damaged \(index pointer size \(?3\)? should be \(?4\)?\)"),
        ("indptr", [0, 2, 3, 900], r"X is damaged \(Last value of index pointer"),
        ("data", [1.0, 2.0, 3.0], r"X is damaged \(indices and data should have the same"),
        ("data", np.array(list("abcd"), "S1"), "X holds .*, not numbers"),
        ("data", np.zeros(4, complex), "X holds complex128, not numbers"),
    ],
)
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
@pytest.mark.parametrize("slot", ["X", "layers/counts", "raw/X"])
def test_matrices_whose_parts_do_not_fit_are_refused(tmp_path, part, values, message, form, slot):
    counts = ([1.0, 2, 3, 4], [0, 2, 1, 2], [0, 2, 3, 4])
    shape = (3, 6) if form is sparse.csr_matrix else (6, 3)
    adata = AnnData(form(counts, shape))
    adata.layers["counts"], adata.raw = adata.X.copy(), adata.copy()
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        del file[slot][part]
        file[slot][part] = values
    where = {"layers/counts": 'layers["counts"]', "raw/X": "raw"}.get(slot, slot)
    # anndata itself refuses some, by slot and type.
    match = rf"a.h5ad: ({re.escape(where)}{message.removeprefix('X')}|not a readable .h5ad file)"
    with pytest.raises(InputError, match=match) as caught:
        read_h5ad(tmp_path / "a.h5ad")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("slot", "value"),
    [
        ("obs/library_size", np.array([b"many"] * 30)),
        ("obs/library_size", np.zeros(30, complex)),
        ("obsm/spatial", np.array([[b"left", b"top"]] * 30)),
        ("uns/strank/um_per_pixel", "half"),
        ("uns/strank/spot_pitch_um", 1j),
        ("X", None),
        ("uns/strank", "mine"),
    ],
)
def test_slots_without_numbers_are_named(cohort, tmp_path, slot, value):
    write(cohort, tmp_path)
    with h5py.File(tmp_path / "A1.h5ad", "r+") as file:
        del file[slot]
        if value is not None:
            file[slot] = value
            file[slot].attrs["encoding-type"] = "string" if isinstance(value, str) else "array"
            file[slot].attrs["encoding-version"] = "0.2.0"
    names = {"X": "no counts", "uns/strank": 'uns["strank"] lacks schema'}
    last = slot.rpartition("/")[2]
    with pytest.raises(InputError, match=rf"A1.h5ad: .*{re.escape(names.get(slot, last))}"):
        read_cohort(tmp_path)


@pytest.mark.parametrize("encoder", [None, "{", 3])
def test_features_that_do_not_say_their_encoder(cohort, tmp_path, encoder):
    path = features_path(write(cohort, tmp_path), "mine", "A1")
    features = anndata.read_h5ad(path)
    if encoder is None:
        del features.uns["encoder"]
    else:
        features.uns["encoder"] = encoder
    write_h5ad(features, path)
    with pytest.raises(InputError, match=r"A1.h5ad: does not say which encoder made it; run"):
        read_cohort(tmp_path, encoder="mine")


def drop(slot, key):
    return lambda a: getattr(a, slot).__delitem__(key)


def put(row, column, value):
    def change(a):
        dense = a.X.toarray()
        dense[row, column] = value
        a.X = sparse.csr_matrix(dense)

    return change


def move(a):
    a.obsm["spatial"] = np.full((a.n_obs, 2), np.nan)


BREACHES = {
    "obs lacks library_size": drop("obs", "library_size"),
    "obsm lacks spatial": drop("obsm", "spatial"),
    "uns lacks strank": drop("uns", "strank"),
    r'uns\["strank"\] lacks um_per_pixel': lambda a: a.uns["strank"].pop("um_per_pixel"),
    "schema version 99": lambda a: a.uns["strank"].update(schema=99),
    "spot 1x1, gene G2: -1 is negative": put(1, 2, -1),
    "spot 0x0, gene G0: 0.5 is not a whole number": put(0, 0, 0.5),
    "spot 0x0, gene G0: nan is not a finite number": put(0, 0, np.nan),
    r'obsm\["spatial"\] is not finite at spot 0x0, .* and 25 more': move,
    r'obs\["library_size"\] is less than the counts of spot 3x3': put(3, 3, 10_000),
    "var_names has duplicates: G0": lambda a: setattr(a, "var_names", ["G0", "G0", *"abcd"]),
    r'obs\["patient"\] says .nan., which is no name': lambda a: setattr(
        a, "obs", a.obs.assign(patient="nan")
    ),
    "one section of one patient": lambda a: setattr(a, "obs", a.obs.assign(section=a.obs_names)),
}


@pytest.mark.parametrize("message", BREACHES)
@pytest.mark.filterwarnings("ignore:Variable names")
def test_breaches_of_the_contract_are_named(section_of, message):
    adata = section_of()
    BREACHES[message](adata)
    with pytest.raises(InputError, match=f"C2: .*{message}"):
        check_section(adata, name="C2")


def test_checksums_follow_the_content(section_of):
    one, other = section_of(), section_of()
    assert counts_checksum(one) == counts_checksum(other)
    assert spots_checksum(one) == spots_checksum(other)
    put(0, 0, 77)(other)
    assert counts_checksum(one) != counts_checksum(other)
    other.obsm["spatial"] = other.obsm["spatial"] + 1
    assert spots_checksum(one) != spots_checksum(other)


def test_counts_that_are_not_sorted_stay_as_they_are(section_of):
    """Sorting a matrix of another type that shares its indices would scramble the counts."""
    adata = section_of()
    dense, starts = adata.X.toarray(), adata.X.indptr
    order = np.concatenate([np.arange(a, b)[::-1] for a, b in pairwise(starts)])
    parts = adata.X.data[order], adata.X.indices[order], starts
    adata.X = sparse.csr_matrix(parts, shape=dense.shape)
    assert counts_checksum(adata) == counts_checksum(section_of())
    target_of(adata.X, adata.obs["library_size"], "log1p_counts")
    np.testing.assert_array_equal(adata.X.toarray(), dense)


def test_bytes_do_not_depend_on_when_python_lets_go(cohort, tmp_path, monkeypatch):
    """In a worker that kept them a little longer, chunks of datasets came in another order."""
    section, held, make = cohort["A1"], [], h5py.Group.create_dataset

    def create_dataset(*args, **options):
        held.append(make(*args, **options))
        return held[-1]

    write_h5ad(section, tmp_path / "let_go.h5ad")
    monkeypatch.setattr(h5py.Group, "create_dataset", create_dataset)
    write_h5ad(section, tmp_path / "held.h5ad")
    assert held
    assert (tmp_path / "held.h5ad").read_bytes() == (tmp_path / "let_go.h5ad").read_bytes()
