"""Which spots and genes of a section are kept: as scanpy keeps them, in the published order."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from strank.cohort.contract import check_section
from strank.cohort.filter import SpotFilter, filter_spots
from strank.errors import InputError
from strank.io.st import read_st

PUBLISHED = SpotFilter(min_genes=200, max_mito=0.2, min_spots=3)


def by_scanpy(section, keep):
    sc = pytest.importorskip("scanpy")
    adata = section.copy()
    adata.var["mt"] = adata.var_names.str.startswith("MT-")
    sc.pp.calculate_qc_metrics(adata, qc_vars=["mt"], inplace=True, percent_top=None)
    adata = adata[adata.obs["pct_counts_mt"] < 100 * keep.max_mito].copy()
    sc.pp.filter_cells(adata, min_genes=keep.min_genes)
    sc.pp.filter_genes(adata, min_cells=keep.min_spots)
    return adata


def named(section, counts, genes):
    """The section with other counts and genes; its library sizes cover genes that are gone."""
    adata = section[: len(counts), : len(genes)].copy()
    adata.var = pd.DataFrame(index=genes)
    adata.X = sparse.csr_matrix(np.asarray(counts, dtype=np.float32))
    adata.obs["library_size"] = np.asarray(counts).sum(1) + 7.0
    return adata


def test_by_hand(section_of):
    counts = [
        [1, 1, 1, 1],  # a quarter is mitochondrial
        [2, 0, 3, 3],
        [0, 0, 5, 1],
        [0, 0, 9, 0],  # one gene
        [0, 0, 0, 0],
    ]
    section = named(section_of(), counts, ["MT-CO1", "ONCE", "MTOR", "GENE"])
    kept = filter_spots(section, SpotFilter(min_genes=2, max_mito=0.25, min_spots=1))
    # At the bound a spot is left out; ONCE is seen in a spot that goes, MTOR is no MT- gene.
    assert list(kept.obs_names) == ["2x2"]
    assert list(kept.var_names) == ["MTOR", "GENE"]
    kept = filter_spots(section, SpotFilter(min_genes=2, max_mito=1, min_spots=2))
    assert list(kept.obs_names) == ["0x0", "1x1", "2x2"]
    assert list(kept.var_names) == ["MT-CO1", "MTOR", "GENE"]
    assert kept.obs["library_size"].tolist() == [11, 15, 13]
    assert kept.obsm["mine"].shape == (3, 3)
    check_section(kept, name="kept")
    # Nothing happens to what is given, and a mouse has such genes, too.
    assert section.shape == (5, 4)
    mouse = named(section, counts, ["mt-Co1", "Once", "Mtor", "Gene"])
    assert filter_spots(mouse, SpotFilter(2, 0.25, 1)).n_obs == 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.builds(SpotFilter, st.integers(1, 5), st.sampled_from([0.2, 0.25, 0.5]), st.integers(1, 4)),
)
def test_it_keeps_what_scanpy_keeps(section_of, seed, keep):
    counts = np.random.default_rng(seed).poisson(0.7, size=(30, 6))
    genes = ["MT-ND1", "G1", "G2", "MT-CO1", "G4", "MTX1"]
    section = named(section_of(), counts, genes)
    expected = by_scanpy(section, keep)
    if 0 in expected.shape:
        with pytest.raises(InputError, match="section A1: nothing is left: "):
            filter_spots(section, keep)
        return
    kept = filter_spots(section, keep)
    assert list(kept.obs_names) == list(expected.obs_names)
    assert list(kept.var_names) == list(expected.var_names)
    np.testing.assert_array_equal(kept.X.toarray(), expected.X.toarray())


def test_real_tissue_as_scanpy(her2st):
    # Few counts, so that the published filter has something to do there.
    section = read_st(her2st, section="B4")
    kept, expected = filter_spots(section, PUBLISHED), by_scanpy(section, PUBLISHED)
    assert list(kept.obs_names) == list(expected.obs_names)
    assert list(kept.var_names) == list(expected.var_names)
    assert 0 < kept.n_vars < section.n_vars


def test_what_is_refused(section_of):
    section = section_of("B1")
    message = (
        "section B1: nothing is left: 0 of 30 spots have at least 200 genes and less than 20% "
        "mitochondrial counts, and no gene is seen in 3 of them"
    )
    with pytest.raises(InputError, match=message):
        filter_spots(section, PUBLISHED)
    section.var_names = [f"ENSG{number:011d}" for number in range(section.n_vars)]
    with pytest.raises(InputError, match="section B1: genes are named by Ensembl ids"):
        filter_spots(section, SpotFilter(1, 0.2, 1))
    assert filter_spots(section, SpotFilter(1, 1.0, 1)).n_obs == 30
