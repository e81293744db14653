from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from strank.cohort.contract import positions_um
from strank.cohort.panel import check_genes, choose_panel, panel_counts, shared_genes
from strank.errors import InputError


def log1p_cp10k(adata):
    return np.log1p(adata.X.toarray() / adata.obs["library_size"].to_numpy()[:, None] * 1e4)


def moran(values, adata):
    """By the double sum of the definition; spots within 1.5 x 200 µm are neighbours."""
    place = positions_um(adata)
    weight = np.linalg.norm(place[:, None] - place, axis=2) <= 300
    np.fill_diagonal(weight, 0)
    z = values - values.mean()
    numerator = sum(z[i] * z[j] for i, j in zip(*np.nonzero(weight), strict=True))
    return len(z) / weight.sum() * numerator / (z * z).sum()


def with_counts(adata, dense):
    """Other counts, of the same totals over all genes as far as that can be."""
    adata = adata.copy()
    adata.X = sparse.csr_matrix(dense.astype(np.float32))
    adata.obs["library_size"] = np.maximum(adata.obs["library_size"], dense.sum(1))
    return adata


def test_by_variance(cohort):
    stacked = np.concatenate([log1p_cp10k(a) for a in cohort.values()])
    expected = [f"G{i}" for i in np.argsort(-stacked.var(0))]
    assert list(choose_panel(cohort, 4)) == expected[:4]
    assert list(choose_panel(cohort, None, by="variance")) == expected


def test_by_mean_share(cohort):
    shares = np.concatenate(
        [a.X.toarray() / a.obs["library_size"].to_numpy()[:, None] for a in cohort.values()]
    )
    expected = [f"G{i}" for i in np.argsort(-shares.mean(0))]
    assert list(choose_panel(cohort, None, by="mean")) == expected


def test_by_morans_i(cohort):
    of_sections = [[moran(v, a) for v in log1p_cp10k(a).T] for a in cohort.values()]
    expected = [f"G{i}" for i in np.argsort(-np.mean(of_sections, axis=0))]
    assert list(choose_panel(cohort, None, by="moran")) == expected


def test_by_morans_i_large_sections_weigh_as_much_as_small_ones(section_of):
    """Genes 0 and 1 have a pattern each: one in the large section, one in the two small."""
    sizes = {"A1": 100, "B1": 40, "C1": 40}
    cohort = {name: section_of(name, patient=name, n_spots=n) for name, n in sizes.items()}
    for name, adata in cohort.items():
        adata.obsm["spatial"] = adata.obsm["spatial"] * 3
        left = positions_um(adata)[:, 0] < 525
        counts = np.random.default_rng(1).poisson(150, size=adata.shape)
        counts[:, 0 if name == "A1" else 1] += 100 * left
        cohort[name] = with_counts(adata, counts)
    of_sections = [[moran(v, a) for v in log1p_cp10k(a).T] for a in cohort.values()]
    first, second = np.mean(of_sections, axis=0)[:2]
    assert second > first + 0.1
    # By spots, the large one would decide.
    pooled = np.average(of_sections, axis=0, weights=list(sizes.values()))
    assert pooled[0] > pooled[1] + 0.1
    assert list(choose_panel(cohort, 2, by="moran")) == ["G1", "G0"]


def test_a_pattern_comes_first_by_morans_i_though_it_varies_least(section_of):
    adata = section_of(n_spots=200)
    left = positions_um(adata)[:, 0] < 175
    dense = np.random.default_rng(0).poisson(20, size=adata.shape) * 5
    dense[:, 3] = 100 + 10 * left
    adata = with_counts(adata, dense)
    assert choose_panel({"A1": adata}, None)[-1] == "G3"
    assert choose_panel({"A1": adata}, 1, by="moran") == ["G3"]


def test_genes_that_few_spots_have_are_not_for_morans_i(section_of):
    adata = section_of(n_spots=100)
    dense = adata.X.toarray()
    near = np.argsort(np.linalg.norm(positions_um(adata) - positions_um(adata)[0], axis=1))
    # Side by side, and in fewer than 5 of 100 spots; then one that is in 5.
    dense[:, :2] = 0
    dense[near[:4], 0] = dense[near[:5], 1] = 9
    panel = choose_panel({"A1": with_counts(adata, dense)}, None, by="moran")
    assert "G0" not in panel
    assert "G1" in panel
    with pytest.raises(
        InputError, match="between 1 and the 5 that vary and are seen in 5% of the spots"
    ):
        choose_panel({"A1": with_counts(adata, dense)}, 6, by="moran")


def test_a_section_without_the_gene_counts_as_no_pattern(cohort):
    flat = cohort["B1"].X.toarray()
    flat[:, 2] = 0
    cohort["B1"] = with_counts(cohort["B1"], flat)
    of_sections = [
        [moran(v, a) if v.any() else 0.0 for v in log1p_cp10k(a).T] for a in cohort.values()
    ]
    expected = [f"G{i}" for i in np.argsort(-np.mean(of_sections, axis=0))]
    assert list(choose_panel(cohort, None, by="moran")) == expected


@pytest.mark.parametrize("by", ["variance", "mean", "moran"])
def test_ties_are_alphabetical_and_constant_genes_left_out(section_of, by):
    adata = section_of()
    dense = adata.X.toarray()
    dense[:, [4, 1]] = dense[:, [0]]
    dense[:, 5] = 0
    panel = list(choose_panel({"A1": with_counts(adata, dense)[:, ::-1]}, None, by=by))
    at = panel.index("G0")
    assert panel[at : at + 3] == ["G0", "G1", "G4"]
    assert sorted(panel) == ["G0", "G1", "G2", "G3", "G4"]


def test_refusals(cohort):
    with pytest.raises(InputError, match="'size': choose one of variance, mean, moran"):
        choose_panel(cohort, 3, by="size")
    with pytest.raises(
        InputError, match="99 genes asked for; choose between 1 and the 6 that vary"
    ):
        choose_panel(cohort, 99)
    apart = cohort["A2"].copy()
    apart.obsm["spatial"] = apart.obsm["spatial"] * 1000
    with pytest.raises(InputError, match=r"section A2: no two spots within 1\.5 spot pitches of"):
        choose_panel({**cohort, "A2": apart}, 3, by="moran")
    cohort["B1"] = cohort["B1"][:, ["G1", "G4"]].copy()
    assert list(shared_genes(cohort)) == ["G1", "G4"]
    with pytest.raises(InputError, match="section B1 has no gene G0"):
        check_genes(cohort, ["G0", "G1"])
    cohort["C1"].var_names = list("abcdef")
    with pytest.raises(InputError, match="no gene is measured in all of the sections"):
        shared_genes(cohort)


def test_genes_that_some_sections_lack(cohort):
    """The intersection by default; in a union each gene is judged where it is measured."""
    lacking = {**cohort, "A1": cohort["A1"][:, ["G0", "G1", "G2"]].copy()}
    assert set(choose_panel(lacking, None)) == {"G0", "G1", "G2"}
    assert set(choose_panel(lacking, None, union=True)) == {f"G{i}" for i in range(6)}
    without = {name: adata for name, adata in cohort.items() if name != "A1"}
    for by in ("variance", "mean"):
        alone = [g for g in choose_panel(without, None, by) if g in ("G3", "G4", "G5")]
        among = [g for g in choose_panel(lacking, None, by, union=True) if g in alone]
        assert alone == among
    np.testing.assert_array_equal(
        panel_counts(lacking["A1"], pd.Index(["G5", "G1", "none"])).toarray(),
        np.column_stack([np.zeros(30), cohort["A1"][:, "G1"].X.toarray(), np.zeros(30)]),
    )


@pytest.mark.parametrize("by", ["variance", "mean", "moran"])
def test_in_a_union_absent_is_not_zero(section_of, by):
    sections = [section_of(name, patient=name, n_spots=60) for name in ("A1", "B1")]
    genes = np.array(sections[0].var_names)
    lacking = np.isin(genes, ["G0", "G2", "G4"])

    def order(of_lacking):
        """From the definition, with that for the values of a section that lacks the genes."""
        targets = [log1p_cp10k(adata) for adata in sections]
        shares = [a.X.toarray() / a.obs["library_size"].to_numpy()[:, None] for a in sections]
        patterns = [[[moran(v, a) for v in t.T]] for t, a in zip(targets, sections, strict=True)]
        first, second = {"variance": targets, "mean": shares, "moran": patterns}[by]
        values = np.concatenate([np.where(lacking, of_lacking, first), second])
        found = np.nanvar(values, axis=0) if by == "variance" else np.nanmean(values, axis=0)
        return genes[np.argsort(-found)].tolist()

    cohort = {"A1": sections[0][:, ~lacking].copy(), "B1": sections[1]}
    assert list(choose_panel(cohort, None, by, union=True)) == order(np.nan) != order(0.0)
