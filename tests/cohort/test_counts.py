"""Counts of any size below 2^53 are exact, from the file to the sums; from there on refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import strank
from strank.cohort.contract import SectionInfo, counts_checksum, make_section, raw_counts
from strank.cohort.panel import panel_counts
from strank.cohort.store import read_section, write_h5ad
from strank.cohort.training_set import training_data
from strank.errors import InputError
from strank.evaluation.scores import score_section
from strank.metrics.depth import thin

HUGE = [2**24 - 1, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**31 + 1, 2**53 - 1]
INFO = SectionInfo("/none/a.jpg", "0" * 64, 0.7, 100.0, 200.0, "ST", {"reader": "test"})


def section_of(counts, name="a"):
    counts = sparse.csr_matrix(counts)
    spots = pd.DataFrame(np.arange(2.0 * counts.shape[0]).reshape(-1, 2), columns=["x", "y"])
    spots.index = [f"s{i}" for i in range(len(spots))]
    genes = pd.Index([f"g{i}" for i in range(counts.shape[1])])
    return make_section(counts, spots=spots, genes=genes, section=name, patient=name, info=INFO)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(HUGE), st.integers(0, 2**53 - 1)), min_size=3))
def test_what_is_stored_is_what_was_counted(tmp_path_factory, values):
    counts = np.array([*values, 1], dtype=np.int64)[:, None]
    path = tmp_path_factory.mktemp("cohort") / "a.h5ad"
    write_h5ad(section_of(counts), path)
    section = read_section(path)
    assert section.X.toarray().astype(np.int64).tolist() == counts.tolist()
    assert section.obs["library_size"].astype(np.int64).tolist() == counts.ravel().tolist()
    assert panel_counts(section, section.var_names).toarray().tolist() == counts.tolist()


@pytest.mark.parametrize("largest", [2**24 - 1, 2**24])
def test_ordinary_counts_are_float32_and_their_sums_exact(largest):
    counts = np.full((5, 3), largest)
    section = section_of(counts)
    assert section.X.dtype == (np.float32 if largest < 2**24 else np.float64)
    assert section.obs["library_size"].tolist() == [3 * largest] * 5
    section.obsm["mine"] = np.ones((5, 1))
    assert (
        training_data({"a": section}, section.var_names, "mine").gene_counts.tolist()
        == [5 * largest] * 3
    )
    other = section.copy()
    other.X = other.X.astype(np.float64)
    assert counts_checksum(section) == counts_checksum(other)


def test_sums_of_float32_do_not_refuse_a_section(tmp_path):
    """Its library size may be less than the sum that float32 rounds."""
    counts = np.ones((2, 6)) * (2**24 - 1)
    counts[:, 1:] = 3
    section = section_of(counts)
    assert section.obs["library_size"].tolist() == [2**24 + 14] * 2
    write_h5ad(section, tmp_path / "a.h5ad")
    read_section(tmp_path / "a.h5ad")


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.float64])
def test_from_2_to_the_53_counts_are_refused(dtype):
    counts = np.array([[1, 2], [3, 2**53]], dtype=dtype)
    spots, genes = pd.Index(["s0", "s1"]), pd.Index(["g0", "g1"])
    told = r"spot s1, gene g1: 9007199254740992 is no count \(from 2\^53 on"
    with pytest.raises(InputError, match=told):
        raw_counts(sparse.csr_matrix(counts), spots=spots, genes=genes, name="file")
    with pytest.raises(InputError, match=told):
        section_of(counts)
    with pytest.raises(ValueError, match=r"y must be below 2\^53"):
        strank.STRankRegressor().fit([[0.0], [1.0]], counts)


@settings(deadline=None)
@given(st.sampled_from(HUGE), st.integers(0, 9))
def test_thinning(count, seed):
    counts = sparse.csr_matrix(np.array([[count], [count], [7]], dtype=np.float64))
    keep = np.array([1.0, 0.5, 1.0])
    kept = thin(counts, keep, np.random.default_rng(seed)).toarray().ravel()
    assert (kept[0], kept[2]) == (count, 7)
    assert abs(kept[1] - count / 2) < 6 * np.sqrt(count / 4)


def test_fit_and_scores_are_those_of_the_counts():
    """Of which float32 would round every one."""
    rng = np.random.default_rng(0)
    sections = {}
    for name in "abc":
        features = rng.normal(size=(30, 2))
        counts = rng.poisson(2**25 * np.exp(0.3 * features))
        sections[name] = section_of(counts, name)
        sections[name].obsm["mine"] = features
    model = strank.fit(sections, encoder="mine", n_genes=2, penalty=1.0)
    total = sum(section.X.toarray().astype(np.int64).sum(0) for section in sections.values())
    assert model.panel.loc[["g0", "g1"], "counts"].astype(np.int64).tolist() == total.tolist()
    scores = {"model": model.predict(sections["a"]).X}
    table = score_section(scores, sections["a"], model.panel.index)
    assert (table["deviance"] > 0.95).all()
    with pytest.raises(InputError, match=r"of float32, .* below 16777216; gene g[01], g[01] has"):
        strank.fit(sections, encoder="mine", n_genes=2, head="mlp")
