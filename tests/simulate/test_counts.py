from __future__ import annotations

import numpy as np
import pytest

from strank.simulate.counts import (
    ABUNDANCE,
    GENE_CLASSES,
    CountDesign,
    draw_counts,
    draw_genes,
    draw_patient,
    negative_binomial,
)
from strank.simulate.regions import REGIONS


def spots(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(len(REGIONS), 0.3), n), rng.lognormal(8, 0.7, n)


def draw(n_spots=300, n_genes=42, seed=0, **options):
    design = CountDesign(**options)
    rng = np.random.default_rng(seed)
    genes = draw_genes(n_genes, design=design, rng=rng)
    fractions, nuclei = spots(n_spots, seed)
    return genes, fractions, draw_counts(fractions, nuclei, genes=genes, design=design, rng=rng)


@pytest.mark.parametrize(("mean", "dispersion"), [(0.7, 0.15), (5.0, 0.5), (30.0, 0.15)])
def test_moments_of_the_negative_binomial(mean, dispersion):
    n = 100_000
    drawn = negative_binomial(np.full(n, mean), dispersion, rng=np.random.default_rng(1))
    variance = mean + dispersion * mean**2
    # Five standard errors of either moment: fails for one correct build in a million.
    assert abs(drawn.mean() - mean) < 5 * np.sqrt(variance / n)
    fourth = ((drawn - drawn.mean()) ** 4).mean()
    assert abs(drawn.var() - variance) < 5 * np.sqrt((fourth - variance**2) / n)


def test_counts_of_a_section_have_the_stated_dispersion():
    genes, _, drawn = draw(2000, ambient=(0.0, 0.0), gene_spread=0.0, signal=0.0)
    mean = drawn.depth[:, None] * genes.base
    high = (genes.table["abundance"] == "high").to_numpy()
    excess = ((drawn.counts - mean) ** 2 - mean)[:, high] / mean[:, high] ** 2
    error = excess.std() / np.sqrt(excess.size)
    assert abs(excess.mean() - 0.15) < 5 * error
    assert error < 0.01


def test_every_class_has_every_abundance_and_about_its_counts():
    genes, _, drawn = draw(600, n_genes=420, section_spread=1.0)
    assert genes.table.index.is_unique
    kinds = set(genes.table.itertuples(index=False, name=None))
    assert kinds == {(c, a) for c in GENE_CLASSES for a in ABUNDANCE}
    for level, expected in ABUNDANCE.items():
        mean = drawn.counts[:, genes.table["abundance"] == level].mean()
        assert 0.7 * expected < mean < 1.5 * expected


def test_shares_sum_to_one_and_flat_genes_are_flat():
    genes, _, drawn = draw()
    flat = (genes.table["gene_class"] == "flat").to_numpy()
    assert np.all(drawn.truth[:, flat] == 0)
    assert np.all(np.ptp(drawn.truth[:, ~flat], axis=0) > 0)
    np.testing.assert_allclose(drawn.truth.mean(0), 0, atol=1e-12)


def test_equations_of_the_docstring_by_hand():
    design = CountDesign(ambient=(0.1, 0.1), gene_spread=0.0, marker=(1.0, 1.0), graded=(0.5, 0.5))
    genes = draw_genes(21, design=design, rng=np.random.default_rng(0))
    fractions = np.array([[1.0, 0, 0, 0, 0], [0.25, 0.75, 0, 0, 0]])
    drawn = draw_counts(
        fractions,
        np.array([3000.0, 1000.0]),
        genes=genes,
        design=design,
        rng=np.random.default_rng(0),
    )
    average = np.array([0.33, 0.3, 0.18, 0.09, 0.1])
    q = np.empty((2, 21))
    for i, crowding in enumerate([0.0, np.log(1100 / 3100)]):
        for g, gene_class in enumerate(genes.table["gene_class"]):
            effect = np.exp([float(gene_class == region) for region in REGIONS])
            rate = genes.base[g] * (fractions[i] @ effect) / (average @ effect)
            q[i, g] = rate * (np.exp(0.5 * crowding) if gene_class == "graded" else 1)
    varied = (genes.table["gene_class"] != "flat").to_numpy()
    q[:, varied] *= genes.base[varied].sum() / q[:, varied].sum(1, keepdims=True)
    np.testing.assert_allclose(q.sum(1), 1)
    log_share = np.log(0.9 * q + 0.1 * q.mean(0))
    np.testing.assert_allclose(drawn.truth, log_share - log_share.mean(0), atol=1e-12)


def patients(shared, n=4, n_genes=2100):
    """Effects of genes that are not flat, centred, ``[n_effects, n_genes]``: of all, of each."""
    design, rng = CountDesign(shared=shared), np.random.default_rng(0)
    genes = draw_genes(n_genes, design=design, rng=rng)
    flat = (genes.table["gene_class"] == "flat").to_numpy()
    found = [genes, *(draw_patient(genes, design=design, rng=rng) for _ in range(n))]
    effects = [np.vstack([one.marker, one.graded]) for one in found]
    assert all(np.all(each[:, flat] == 0) for each in effects)
    assert all(one.base is genes.base for one in found)
    return [each[:, ~flat] - each[:, ~flat].mean(1, keepdims=True) for each in effects]


@pytest.mark.parametrize("shared", [0.0, 0.2, 0.7, 1.0])
def test_patients_share_so_much_of_the_variance_of_effects(shared):
    common, *own = patients(shared)
    size = (common**2).sum()
    for one in own:
        # Each is the sum of six effects' squares of 1,800 genes: within about a twentieth.
        assert (one**2).sum() / size == pytest.approx(1, abs=0.1)
        assert (one * common).sum() / size == pytest.approx(np.sqrt(shared), abs=0.07)
    assert (own[0] * own[1]).sum() / size == pytest.approx(shared, abs=0.07)


def test_what_three_patients_tell_is_too_large_for_a_fourth_by_what_they_do_not_share():
    _, *train, new = patients(0.2)
    seen = np.mean(train, axis=0)
    # Of effects b, b' with variance 1 and covariance ρ: cov(mean of three b, b') / var(mean).
    expected = 0.2 / (0.2 + 0.8 / 3)
    assert (seen * new).sum() / (seen**2).sum() == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("region", REGIONS)
def test_a_marker_is_higher_in_its_region(region):
    genes, fractions, drawn = draw(400)
    markers = (genes.table["gene_class"] == region).to_numpy()
    inside = fractions[:, REGIONS.index(region)] > 0.8
    others = fractions[:, REGIONS.index(region)] < 0.1
    assert np.all(drawn.truth[inside][:, markers].min(0) > drawn.truth[others][:, markers].max(0))
    relative = drawn.counts / drawn.counts.sum(1, keepdims=True)
    high = markers & (genes.table["abundance"] == "high").to_numpy()
    assert np.all(relative[inside][:, high].mean(0) > relative[others][:, high].mean(0))


def test_signal_changes_neither_genes_nor_the_scale_of_sections():
    genes, _, null = draw(signal=0.0)
    same, _, _ = draw(signal=1.0)
    assert genes.table.equals(same.table)
    assert np.all(null.truth == 0)


def test_without_signal_depth_ignores_the_tissue():
    _, nuclei = spots(5000)
    _, _, null = draw(5000, signal=0.0)
    _, _, full = draw(5000, signal=1.0)
    # Under independence |r| stays below 5 / sqrt(n) but for one seed in a million.
    limit = 5 / np.sqrt(5000)
    assert abs(np.corrcoef(np.log(null.depth), np.log(nuclei))[0, 1]) < limit
    # With signal depth is related to the tissue in part only.
    assert limit < np.corrcoef(np.log(full.depth), np.log(nuclei))[0, 1] < 0.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": -1.0}, "signal must be at least 0; got -1"),
        ({"signal": float("nan")}, "signal must be at least 0; got nan"),
        ({"dispersion": 0.0}, "dispersion must be above 0; got 0"),
        ({"shared": 1.1}, "shared must be from 0 to 1; got 1.1"),
        ({"shared": float("nan")}, "shared must be from 0 to 1; got nan"),
    ],
)
def test_a_design_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CountDesign(**options)


def test_too_few_genes_are_refused():
    with pytest.raises(ValueError, match="n_genes must be at least 21; got 20"):
        draw_genes(20, design=CountDesign(), rng=np.random.default_rng(0))
