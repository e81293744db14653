"""Fits of what does not fit into memory are those of what does."""

from __future__ import annotations

import gc
import json
import pickle
import weakref
from dataclasses import replace
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from strank import STRankRegressor, fit, read_cohort
from strank.cohort import scratch, store, training_set
from strank.cohort.contract import SectionInfo, make_section, spots_checksum
from strank.cohort.folder import features_path
from strank.cohort.rows import RowsOnDisk, SectionRows, StackedRows
from strank.cohort.scratch import CountsOnDisk
from strank.cohort.store import open_cohort, write_h5ad
from strank.cohort.training_set import training_data
from strank.errors import InputError
from strank.linear import design
from strank.neural import data as neural_data
from strank.neural.recipe import get_recipe

N_SPOTS, N_FEATURES, N_GENES = 250, 60, 6
# Of which features take more than a quarter.
BUDGET = 1.8e6 / 2**30


@pytest.fixture(autouse=True)
def long_reads(monkeypatch):
    """Read more at once than so little memory has room for: it takes less time."""
    monkeypatch.setattr("strank.linear.design._READ", 0.06)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sections of four patients; some spots without counts, a gene that one lacks."""
    place, rng = tmp_path_factory.mktemp("beyond") / "cohort", np.random.default_rng(0)
    slopes = 0.4 * rng.normal(size=(5, 19))
    for number, name in enumerate(f"{p}{s}" for p in "ABCD" for s in "12"):
        axes = rng.normal(size=(N_SPOTS, 5))
        features = axes @ rng.normal(size=(5, N_FEATURES)) + rng.normal(size=(N_SPOTS, N_FEATURES))
        features[:, :5] = axes
        own = slopes + 0.1 * rng.normal(size=slopes.shape)
        counts = rng.poisson(2 * np.exp(axes @ own + rng.normal(size=(N_SPOTS, 1)) / 3))
        counts[rng.permutation(N_SPOTS)[:7]] = 0
        genes = [f"G{i:02}" for i in range(19)]
        spots = pd.DataFrame({"x": np.arange(N_SPOTS) % 25, "y": np.arange(N_SPOTS) // 25})
        spots.index = [f"s{i}" for i in range(N_SPOTS)]
        info = SectionInfo("/none", "0" * 64, 10.0, 10.0, 10.0, "ST", {"reader": "test"})
        keep = rng.permutation(len(genes) - (number == 3))  # in any order
        section = make_section(
            sparse.csr_matrix(counts[:, keep]),
            spots=50.0 * spots,
            genes=pd.Index(genes)[keep],
            section=name,
            patient=name[0],
            info=info,
        )
        write_h5ad(section, place / f"{name}.h5ad")
        facts = {"name": "mine", "version": "1", "fields": [], "n_features": N_FEATURES}
        uns = {"encoder": json.dumps(facts), "spots_sha256": spots_checksum(section)}
        features[3, 7] = 1e-35
        held = AnnData(features.astype(np.float32), obs=section.obs[[]], uns=uns)
        write_h5ad(held, features_path(place, "mine", name), compression=None)
    return place


@pytest.fixture(scope="module")
def in_memory(folder):
    return fit(read_cohort(folder, encoder="mine"), encoder="mine", n_genes=N_GENES)


def assert_same(model, expected, tolerance=2e-3):
    """Compare all that a fit finds; weights by the tolerance of the solver."""
    assert list(model.panel.index) == list(expected.panel.index)
    facts = dict(model.provenance), dict(expected.provenance)
    for name in ("sections", "panel_choice", "penalty_choice", "aim"):
        assert facts[0][name] == facts[1][name], name
    assert model.encoder == expected.encoder
    for name, column in expected.panel.items():
        if name in ("counts", "penalty", "status", "borrows"):
            pd.testing.assert_series_equal(model.panel[name], column)
        elif name != "iterations":
            np.testing.assert_allclose(model.panel[name], column, rtol=tolerance)
    for part in ("head", "novelty", "uncertainty"):
        mine, other = (getattr(m, part) for m in (model, expected))
        mine, other = (v.state_dict() if part == "head" else vars(v) for v in (mine, other))
        assert mine.keys() == other.keys()
        for name, values in other.items():
            size = float(values.abs().max())
            # What groups that are left out ask for is found roughly; axes have no direction.
            tolerance = 0.05 if part == "uncertainty" and tolerance > 1e-9 else tolerance
            pair = (v.abs() if name in ("axes", "lengths") else v for v in (mine[name], values))
            torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance * size)


def test_a_folder_is_the_sections_in_it(folder, in_memory):
    model = fit(folder, encoder="mine", n_genes=N_GENES)
    for name, values in in_memory.head.state_dict().items():
        torch.testing.assert_close(model.head.state_dict()[name], values, rtol=0, atol=0)
    assert_same(model, in_memory, 1e-12)


def test_what_does_not_fit_into_memory_is_fitted_from_disk(folder, in_memory, monkeypatch):
    monkeypatch.setattr(training_set, "_COUNTS", 0.05)
    cohort = open_cohort(folder, "mine")
    data = training_data(cohort, in_memory.panel.index, "mine", list("AABBCCDD"), max_memory=BUDGET)
    assert isinstance(data.features, StackedRows)
    assert isinstance(data.counts, CountsOnDisk)
    assert_same(fit(str(folder), encoder="mine", n_genes=N_GENES, max_memory=BUDGET), in_memory)


def test_sections_in_memory_that_are_too_many_are_not_copied(folder, in_memory, monkeypatch):
    monkeypatch.setattr(StackedRows, "in_memory", None)
    cohort = read_cohort(folder, encoder="mine")
    assert_same(fit(cohort, encoder="mine", n_genes=N_GENES, max_memory=BUDGET), in_memory)


def test_counts_of_objects_may_stay_on_disk(folder, in_memory, tmp_path):
    sections = {}
    for name, adata in read_cohort(folder, encoder="mine").items():
        adata.write_h5ad(tmp_path / f"{name}.h5ad")
        sections[name] = anndata.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
    sections["A1"] = sections["A1"].to_memory()
    assert_same(fit(sections, encoder="mine", n_genes=N_GENES), in_memory, 1e-12)


@pytest.mark.parametrize("how", [{"loss": "pair"}, {"loss": "nb"}, {"borrow": True}])
def test_other_fits_from_disk(folder, how, monkeypatch):
    how |= {
        "encoder": "mine",
        "n_genes": 16 if "borrow" in how else 5,
        "union": how.get("loss") == "pair",
    }
    how |= {} if "borrow" in how else {"penalty": 30.0}
    expected = fit(folder, **how)
    for name in ("_FEATURES", "_COUNTS"):
        monkeypatch.setattr(training_set, name, 0)
    monkeypatch.setattr("strank.linear.design._COPY", 0)
    weights = (model.head.state_dict()["weight"] for model in (fit(folder, **how), expected))
    torch.testing.assert_close(*weights, rtol=0, atol=2e-3)


@pytest.mark.parametrize("loss", ["mse", "poisson"])
def test_what_takes_all_spots_at_once_says_how_much_it_needs(folder, loss):
    with pytest.raises(InputError, match=r"`max_memory=0.001` GiB .* about 0.00\d+ GiB; give more"):
        fit(folder, encoder="mine", n_genes=3, loss=loss, max_memory=0.001)


def test_too_little_memory_says_what_is_needed(folder):
    told = r"`max_memory=0.001` GiB is too little for 60 features .* needs 0.00\d* GiB, and spots"
    with pytest.raises(InputError, match=told):
        fit(folder, encoder="mine", n_genes=3, max_memory=0.001)


def test_one_section_at_a_time_is_in_memory(folder, monkeypatch):
    """Of those that were read before, all is gone when the next one comes."""
    read, there = store.read_section, []

    def watched(path):
        gc.collect()
        assert not [name for name, counts in there if counts() is not None]
        adata = read(path)
        there.append((path.stem, weakref.ref(adata.X)))
        return adata

    monkeypatch.setattr(store, "read_section", watched)
    gc.freeze()  # what was there before has not to be looked through
    try:
        fit(folder, encoder="mine", n_genes=3, penalty=10.0, max_memory=BUDGET)
    finally:
        gc.unfreeze()
    assert len(there) == 16  # looked at once, and read once more for the counts of the panel


def test_rows_come_in_any_order(folder, tmp_path):
    cohort = open_cohort(folder, "mine")
    whole = read_cohort(folder, encoder="mine")
    parts = []
    for number, name in enumerate(cohort):
        kept = None if number % 2 else np.flatnonzero(cohort[name].obs["library_size"] > 0)
        cohort[name]
        parts.append(SectionRows(cohort.features[name], kept, cohort.features[name].tiny))
    stacked = StackedRows(parts)
    expected = np.concatenate(
        [
            whole[name].obsm["mine"][slice(None) if part.kept is None else part.kept]
            for name, part in zip(cohort, parts, strict=True)
        ]
    )
    assert (np.abs(expected) == np.float32(1e-35)).sum() == 8
    expected[np.abs(expected) < 1e-30] = 0
    np.testing.assert_array_equal(stacked.in_memory(), expected)
    packed = tmp_path / "packed.h5ad"
    write_h5ad(AnnData(whole["A1"].obsm["mine"]), packed)
    with h5py.File(packed) as file:
        rows = RowsOnDisk.of(packed, file["X"], tiny=False)
    assert rows.offset is None
    np.testing.assert_array_equal(rows[5:90], whole["A1"].obsm["mine"][5:90])
    rng = np.random.default_rng(0)
    some = [np.arange(240, 800), rng.permutation(len(stacked))[:50], np.arange(0, 1900, 3)]
    for rows in [*some, slice(240, 260), slice(5, 5), np.array([], int)]:
        np.testing.assert_array_equal(stacked[rows], expected[rows])


def test_counts_on_disk_are_the_counts():
    rng = np.random.default_rng(0)
    parts = [sparse.csr_matrix(rng.poisson(0.4, (n, 9)).astype(np.float32)) for n in (5, 1, 8)]
    parts[2] = parts[2].astype(np.float64)
    stored, whole = CountsOnDisk(9), sparse.vstack(parts).toarray()
    for part in parts:
        stored.append(part)
    assert (stored.shape, stored.nnz, stored.dtype) == ((14, 9), np.count_nonzero(whole), float)
    for genes in (slice(None), slice(2, 5), np.array([0, 1, 4, 8]), np.array([3])):
        np.testing.assert_array_equal(stored[:, genes].toarray(), whole[:, genes])
    np.testing.assert_array_equal(stored[np.arange(5, 14)].toarray(), whole[5:])
    kept = np.repeat([True, False, True], (5, 1, 8))
    np.testing.assert_array_equal(stored.of_sections(kept)[:, 1:].toarray(), whole[kept, 1:])
    with pytest.raises(ValueError, match="whole sections"):
        stored[2:5]


@pytest.mark.parametrize("head", ["mlp", "context"])
@pytest.mark.parametrize("loss", ["list", "poisson"])
def test_networks_from_disk(folder, head, loss, monkeypatch):
    recipe = replace(get_recipe("default"), max_epochs=2, networks=1)
    how = {"encoder": "mine", "n_genes": 4, "head": head, "recipe": recipe, "seed": 3, "loss": loss}
    held = []
    get = neural_data.Spots.__getitem__
    monkeypatch.setattr(neural_data.Spots, "__getitem__", lambda *a: held.append(a[0]) or get(*a))
    monkeypatch.setattr(training_set, "_COUNTS", 0.01)
    monkeypatch.setattr("strank.fitting.networks._FEW_COUNTS", 0)
    models = [fit(folder, **how, max_memory=room) for room in (4.0, BUDGET)]
    scores = [model.predict(read_cohort(folder, encoder="mine")["B2"]).X for model in models]
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert np.ptp(scores[0]) > 0.05
    mapped = [isinstance(spots.counts.data, np.memmap) for spots in (held[0], held[-1])]
    assert mapped == [False, True]
    assert not isinstance(held[-1].inputs, np.ndarray)


@pytest.fixture(scope="module")
def dask():
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with distributed.LocalCluster(**options) as cluster:
        yield cluster.scheduler_address


def test_genes_are_fitted_on_workers(folder, in_memory, dask, monkeypatch, tmp_path):
    """They read features from their files, and the counts by their path."""
    monkeypatch.setattr("strank.linear.design._SENT_GENES", 2)
    monkeypatch.setattr(training_set, "_COUNTS", 0.05)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(design.Design, "block", None)
    paths, sent = [], scratch._File.__getstate__
    monkeypatch.setattr(
        scratch._File, "__getstate__", lambda file: paths.append(sent(file)) or paths[-1]
    )
    model = fit(folder, encoder="mine", n_genes=N_GENES, max_memory=BUDGET, dask=dask)
    assert_same(model, in_memory)
    assert {Path(path).parent for path in paths} == {tmp_path}
    assert not list(tmp_path.iterdir())


def test_blocks_come_in_order_and_the_first_that_is_lost_is_told(monkeypatch):
    blocks = [slice(0, 3), slice(3, 6), slice(6, 7)]
    monkeypatch.setattr(design, "each", lambda work, units, *_, **__: map(work, reversed([*units])))
    assert list(design.on_workers(lambda genes: genes.start, blocks, "tcp://x")) == [0, 3, 6]
    monkeypatch.setattr(design, "each", lambda _, units, *__, lost, **___: [lost(next(units), "")])
    with pytest.raises(InputError, match="workers were lost at a block of 3 genes more than once"):
        list(design.on_workers(abs, blocks, "tcp://x"))


def test_what_workers_cannot_have_is_told(dask, tmp_path, monkeypatch):
    monkeypatch.setattr("strank.linear.design._SENT_GENES", 1)
    monkeypatch.setattr("strank.linear.design._COPY", 0)
    X, counts = np.eye(6), np.ones((6, 2))
    with h5py.File(tmp_path / "x.h5", "w") as file:
        file["x"] = X
        with pytest.raises(InputError, match=r"cannot be sent to other processes .*h5py"):
            STRankRegressor(5.0, dask=dask).fit(file["x"], counts)
    path = tmp_path / "gone.bin"
    rows = StackedRows([SectionRows(RowsOnDisk(path, "X", (6, 6), np.dtype("f4"), 0, False))])
    X.astype("f4").tofile(path)
    read = design.Design.__getstate__
    monkeypatch.setattr(design.Design, "__getstate__", lambda d: (path.unlink(), read(d))[1])
    with pytest.raises(InputError, match=r"gone.bin: not within reach of a worker of Dask"):
        STRankRegressor(5.0, dask=dask).fit(rows, counts)


def test_arrays_travel_to_workers(dask, monkeypatch):
    monkeypatch.setattr("strank.linear.design._SENT_GENES", 2)
    rng = np.random.default_rng(0)
    X, section = rng.normal(size=(90, 4)), np.repeat([0, 1, 2], 30)
    counts = rng.poisson(5 * np.exp(X @ rng.normal(size=(4, 8)) / 3))
    here = STRankRegressor(5.0).fit(X, counts, section=section)
    monkeypatch.setattr(design.Design, "block", None)
    there = STRankRegressor(5.0, dask=dask).fit(X, counts, section=section)
    np.testing.assert_allclose(there.coef_, here.coef_, rtol=1e-6, atol=1e-9)


def test_counts_that_workers_cannot_reach(tmp_path):
    stored = CountsOnDisk(2, shared=True)
    stored.append(sparse.csr_matrix(np.eye(2)))
    sent = pickle.dumps(stored)
    there = pickle.loads(sent)
    np.testing.assert_array_equal(there[:, 1:].toarray(), [[0], [1]])
    Path(there._file._path).write_bytes(b"")
    with pytest.raises(InputError, match="counts are not within reach of a worker"):
        there[:, 1:]
    del stored
    with pytest.raises(InputError, match="counts are not within reach of a worker; set TMPDIR"):
        pickle.loads(sent)


@pytest.mark.parametrize("how", [{"loss": "mse"}, {"loss": "poisson"}, {"head": "mlp"}])
def test_what_is_not_fitted_by_genes_takes_no_workers(folder, how):
    with pytest.raises(InputError, match="`dask` is for"):
        fit(folder, encoder="mine", n_genes=3, dask="tcp://nowhere:1", **how)
