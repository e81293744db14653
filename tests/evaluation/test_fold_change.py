"""Contrasts of regions: by hand, what must not matter, and how often the interval holds."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.ndimage import gaussian_filter
from scipy.stats import t
from shapely.geometry import box, mapping

from strank.errors import InputError
from strank.evaluation.fold_change import (
    Rates,
    agreement,
    contrast,
    contrast_observed,
    contrast_predicted,
    likeness,
    log_ratio,
)

CHANGES = ["predicted", "low", "high"]


def tiles(scores: np.ndarray, positions: np.ndarray) -> AnnData:
    """Predictions at positions in µm, with pixels of 0.5 µm."""
    genes = pd.DataFrame(index=[f"G{i}" for i in range(scores.shape[1])])
    strank = {"um_per_pixel": 0.5, "image": "A1.jpg"}
    return AnnData(scores, var=genes, obsm={"spatial": positions * 2}, uns={"strank": strank})


def grid(rows: int, columns: int, pitch: float) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns] * pitch
    return np.column_stack([x.ravel(), y.ravel()]).astype(float)


def halves(positions: np.ndarray) -> dict[str, np.ndarray]:
    left = positions[:, 0] < np.median(positions[:, 0])
    return {"left": left, "right": ~left}


def random_tiles(seed: int = 0, n_genes: int = 5):
    rng = np.random.default_rng(seed)
    positions = grid(12, 24, 200.0)
    return tiles(rng.normal(size=(len(positions), n_genes)), positions), halves(positions)


def test_the_change_is_the_log_ratio_of_mean_rates():
    scores = np.log([[1.0], [3.0], [2.0], [6.0], [9.0]])
    positions = np.array([[0, 0], [9000, 0], [0, 9000], [20_000, 0], [20_000, 9000]], float)
    regions = {"a": np.array([1, 1, 0, 0, 0], bool), "b": np.array([0, 0, 1, 1, 1], bool)}
    row = contrast_predicted(tiles(scores, positions), regions).table.iloc[0]
    assert row["predicted"] == pytest.approx(np.log(2) - np.log(17 / 3))
    assert row[["a", "b", "spots_a", "spots_b"]].tolist() == ["a", "b", 2, 3]


@pytest.mark.parametrize("rows", [2, 6])
def test_the_interval_is_that_of_independent_blocks(rows):
    """Blocks of nine equal tiles: Welch's interval of log means, by the delta method."""
    rng = np.random.default_rng(0)
    corners, n = grid(rows, 2 * rows, 4000.0), rows**2
    positions = (corners[:, None] + grid(3, 3, 10.0)).reshape(-1, 2)
    of_block = rng.normal(size=(len(corners), 40)) * 0.1
    regions = halves(positions)
    found = contrast_predicted(tiles(np.repeat(of_block, 9, axis=0), positions), regions)
    assert found.blocks == pytest.approx({"left": n, "right": n})
    table = found.table.set_index("gene").sort_index(key=lambda names: names.str[1:].astype(int))
    rates = [np.exp(of_block[regions[name][::9]]) for name in regions]
    variances = np.array([rate.var(0, ddof=1) / n / rate.mean(0) ** 2 for rate in rates])
    freedom = variances.sum(0) ** 2 / (variances**2 / (n - 1)).sum(0)
    expected = t.ppf(0.975, freedom) * np.sqrt(variances.sum(0))
    np.testing.assert_allclose((table["high"] - table["low"]) / 2, expected, rtol=0.1)
    p = 2 * t.sf(np.abs(table["predicted"]) / np.sqrt(variances.sum(0)), freedom)
    np.testing.assert_allclose(table["p"], p, atol=0.05)
    assert ((table["p"] < 0.05) == ((table["low"] > 0) | (table["high"] < 0))).all()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_neither_order_nor_level_matters_and_swapping_flips_the_sign(seed):
    predictions, regions = random_tiles(seed)
    table = contrast_predicted(predictions, regions).table.set_index("gene")
    swapped = contrast_predicted(predictions, {k: regions[k] for k in ("right", "left")}).table
    swapped = swapped.set_index("gene").loc[table.index]
    for name, other in (("predicted", "predicted"), ("low", "high"), ("high", "low")):
        assert (swapped[name] == -table[other]).all()
    assert (swapped[["p", "q"]] == table[["p", "q"]]).all(axis=None)
    order = np.random.default_rng(seed).permutation(predictions.n_obs)
    shuffled = contrast_predicted(
        predictions[order].copy(), {name: inside[order] for name, inside in regions.items()}
    )
    predictions.X = predictions.X + np.arange(5) * 300.0
    shifted = contrast_predicted(predictions, regions)
    for other in (shuffled, shifted):
        other = other.table.set_index("gene").loc[table.index]
        np.testing.assert_allclose(other[CHANGES], table[CHANGES], atol=1e-9)


def test_the_draws_follow_the_seed():
    predictions, regions = random_tiles()
    one, same, other = (contrast_predicted(predictions, regions, seed=s).table for s in (1, 1, 2))
    pd.testing.assert_frame_equal(one, same)
    assert (one["low"] != other["low"]).all()


def fields(rng: np.random.Generator, side: int, length: float, n_genes: int) -> np.ndarray:
    """Log rates on a square of tiles 100 µm apart, alike by 1/e at a length in µm, and noise."""
    sigma = length / 200
    pad = int(4 * sigma) + 1
    white = rng.standard_normal((n_genes, side + 2 * pad, side + 2 * pad))
    smooth = gaussian_filter(white, (0, sigma, sigma))[:, pad:-pad, pad:-pad]
    smooth *= np.sqrt(4 * np.pi) * sigma
    return (0.7 * smooth + 0.3 * rng.standard_normal(smooth.shape)).reshape(n_genes, -1).T


def coverage(sides: tuple[int, int], length: float, *, block_um=1000.0, repeats=1, n_genes=400):
    """Share of intervals that hold the truth: both regions have one distribution, so it is 0."""
    rng, held = np.random.default_rng(7), []
    for repeat in range(repeats):
        log_rates = [fields(rng, side, length, n_genes) for side in sides]
        corners = rng.uniform(0, 1000, (2, 2)) + np.array([[0, 0], [50_000, 0]])
        positions = [grid(n, n, 100.0) + c for n, c in zip(sides, corners, strict=True)]
        first = np.arange(sides[0] ** 2 + sides[1] ** 2) < sides[0] ** 2
        rates = Rates(
            np.exp(np.concatenate(log_rates)), np.ones(len(first)), np.concatenate(positions)
        )
        found = log_ratio(rates, {"a": first, "b": ~first}, block_um=block_um, seed=repeat)
        held.append((found.low <= 0) & (found.high >= 0))
    return float(np.mean(held))


def test_the_interval_holds_for_tissue_that_is_alike_nearby_and_single_tiles_do_not():
    assert 0.9 <= coverage((20, 20), 250) <= 0.98
    assert coverage((20, 20), 250, block_um=100) < 0.5


@pytest.mark.parametrize("sides", [(12, 12), (16, 30), (25, 25), (40, 40)])
@pytest.mark.parametrize("length", [200, 300])
def test_the_interval_holds_for_regions_of_any_size(sides, length):
    assert 0.89 <= coverage(sides, length, repeats=6) <= 0.995


def test_observed_intervals_hold_for_counts():
    """Depth varies too; half of the genes are sparse."""
    rng, held = np.random.default_rng(3), []
    positions = np.concatenate([grid(20, 20, 100.0), grid(20, 20, 100.0) + np.array([50_000, 0])])
    log_rates = np.concatenate([fields(rng, 20, 250, 200) for _ in "ab"])
    depth = rng.lognormal(0, 0.5, (len(positions), 1))
    counts = rng.poisson(depth * np.exp(log_rates) * np.repeat([5, 0.05], 100))
    found = contrast_observed(section(counts, positions), halves(positions), names(200)).table
    held = (found["observed_low"] <= 0) & (found["observed_high"] >= 0)
    assert held[:100].mean() >= 0.88
    assert 0.9 <= held[100:].mean() <= 1


def names(n: int) -> pd.Index:
    return pd.Index([f"G{i}" for i in range(n)])


def section(counts: np.ndarray, positions: np.ndarray, depth: np.ndarray | None = None) -> AnnData:
    adata = tiles(counts.astype(float), positions)
    adata.X = sparse.csr_matrix(adata.X)
    adata.obs["library_size"] = counts.sum(1) if depth is None else depth
    return adata


def test_observed_changes_by_hand():
    positions = np.array([[0, 0], [9000, 0], [20_000, 0], [30_000, 0], [30_000, 1]], float)
    counts = np.array([[4, 0, 0], [2, 3, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0]])
    depth = np.array([20, 20, 30, 30, 0])
    regions = {"a": np.arange(5) < 2, "b": np.arange(5) >= 2}
    genes = pd.Index(["G1", "ABSENT", "G0", "G2"])
    found = contrast_observed(section(counts, positions, depth), regions, genes)
    table = found.table.set_index("gene")
    assert table.index.tolist() == genes.tolist()
    expected = np.log(6 / 40 + 0.01) - np.log(3 / 60 + 0.01)
    assert table.loc["G0", "observed"] == pytest.approx(expected)
    # A gene that one region lacks has a finite change.
    assert table.loc["G1", "observed"] == pytest.approx(np.log(3 / 40 + 0.01) - np.log(0.01))
    assert np.isfinite(table.loc["G1", ["observed_low", "observed_high"]].astype(float)).all()
    assert table.loc[["G2", "ABSENT"], ["observed", "observed_p"]].isna().all(axis=None)
    assert table.loc["G0", ["counts_a", "counts_b"]].tolist() == [6, 3]
    # The spot without depth is none.
    assert table.loc["G0", ["observed_spots_a", "observed_spots_b"]].tolist() == [2, 2]


def test_predicted_and_observed_agree_where_the_model_is_right():
    rng = np.random.default_rng(0)
    positions = grid(30, 30, 200.0)
    regions = halves(positions)
    effect = np.linspace(-1, 1, 8)
    log_rates = np.where(regions["left"][:, None], effect, 0) + rng.normal(0, 0.2, (900, 8))
    counts = rng.poisson(100 * np.exp(log_rates))
    predicted = contrast_predicted(tiles(log_rates, positions), regions).table
    adata = section(counts, positions, np.full(900, 10_000))
    both = predicted.merge(contrast_observed(adata, regions, names(8)).table, on="gene")
    assert both["predicted"].is_monotonic_decreasing
    np.testing.assert_allclose(both["predicted"], effect[::-1], atol=0.05)
    np.testing.assert_allclose(both["observed"], effect[::-1], atol=0.05)
    assert agreement(both)["pearson"] > 0.99
    assert agreement(both)["same_direction"] == 1


def test_a_gene_with_constant_scores_has_no_change():
    predictions, regions = random_tiles()
    predictions.X[:, 0] = 0.0
    row = contrast_predicted(predictions, regions).table.set_index("gene").loc["G0"]
    assert row[[*CHANGES, "p", "q"]].tolist() == [0, 0, 0, 1, 1]


def test_what_limits_the_intervals_is_told():
    positions = grid(20, 40, 100.0)
    smooth = np.sin(positions[:, :1] / 800) + np.cos(positions[:, 1:] / 900)
    told = contrast_predicted(tiles(smooth, positions), halves(positions)).warnings
    assert sum("its tiles are worth" in warning for warning in told) == 0
    assert sum("still correlate by" in warning for warning in told) == 2
    noise = np.random.default_rng(0).normal(size=(800, 3))
    assert contrast_predicted(tiles(noise, positions), halves(positions)).warnings == ()
    [few, _] = contrast_predicted(
        tiles(noise, positions), halves(positions), block_um=1500
    ).warnings
    assert few.startswith("region 'left': its tiles are worth ")


def test_likeness_is_the_correlation_at_a_distance():
    rng = np.random.default_rng(0)
    values, positions = fields(rng, 50, 300, 60), grid(50, 50, 100.0)
    # Of the variance 0.58, noise makes 0.09.
    expected = 0.49 / 0.58 * np.exp(-((300 / 300) ** 2))
    assert likeness(values, positions, 300) == pytest.approx(expected, abs=0.06)
    assert likeness(values, positions, 2000) == pytest.approx(0, abs=0.06)
    assert likeness(values, positions, 20) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda adata, regions: regions["left"].fill(False), "region 'left' has no spot"),
        (
            lambda adata, regions: regions.update(left=regions["left"] & (np.arange(288) < 3)),
            r"region 'left' is worth 1\.\d blocks of 1000 µm.*lower `block_um`",
        ),
        (lambda adata, regions: adata.X.__setitem__((0, 1), np.nan), "scores of G1 are not finite"),
        (lambda adata, regions: adata.uns.pop("strank"), r'uns\["strank"\]\["um_per_pixel"\]'),
        (lambda adata, regions: adata.obsm.pop("spatial"), r'obsm\["spatial"\]'),
        (lambda adata, regions: setattr(adata, "var_names", list("AABCD")), "named twice: A"),
    ],
)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_what_cannot_be_contrasted_is_refused(change, message):
    predictions, regions = random_tiles()
    change(predictions, regions)
    with pytest.raises(InputError, match=message):
        contrast_predicted(predictions, regions)


def test_what_the_verb_takes():
    predictions, regions = random_tiles()
    where = np.where(regions["left"], "left", "right")
    predictions.obs["half"] = where
    by_label = contrast(predictions, where, seed=3)
    direct = contrast_predicted(predictions, regions, seed=3).table
    pd.testing.assert_frame_equal(by_label.table, direct)
    assert by_label.facts["parameters"]["groups"] == "labels"
    assert by_label.facts["inputs"] == {}
    by_column = contrast(predictions, "half", seed=3, between=("left", "right"))
    pd.testing.assert_frame_equal(by_column.table, direct)
    assert [len(found.facts["caveats"]) for found in (by_label, by_column)] == [2, 2]
    assert "predictions was not written by strank" in by_label.warnings[0]
    swapped = contrast(predictions, list(where), between="right,left", seed=3)
    np.testing.assert_allclose(swapped.table["predicted"], -direct["predicted"][::-1])
    few = pd.Series(where).where(np.arange(len(where)) % 7 > 0)
    assert contrast(predictions, few).table["spots_a"][0] < regions["left"].sum()


@pytest.mark.parametrize("twin", ["LEFT", "Left", "left "])
def test_regions_that_may_be_one_are_pointed_out(twin):
    predictions, regions = random_tiles()
    where = np.where(regions["left"], "left", "right").astype(object)
    told = contrast(predictions, where).warnings
    assert not [text for text in told if "are taken for different ones" in text]
    where[np.flatnonzero(regions["left"])[::9]] = twin
    found = contrast(predictions, where, between=("left", "right"))
    told = [text for text in found.warnings if "are taken for different ones" in text]
    expected = f"regions {twin!r} and 'left' are taken for different ones; if they are one, give"
    assert told == [f"`groups`: {expected} all of them one name"] * (twin.strip() != "left")


def test_labels_and_counts():
    predictions, regions = random_tiles()
    where = np.where(regions["left"], "left", "right")
    observed = section(
        np.random.default_rng(0).poisson(9, (len(where), 5)), predictions.obsm["spatial"] / 2
    )
    observed.uns["strank"]["image"] = "A1.jpg"
    with pytest.raises(InputError, match="`groups` has labels of the predictions only"):
        contrast(predictions, where, observed)
    with pytest.raises(InputError, match=r"`groups` has 3 labels for 288 spots"):
        contrast(predictions, ["a", "b", "a"])
    with pytest.raises(InputError, match="`block_um` must be positive"):
        contrast(predictions, where, block_um=0)
    predictions.obs["half"] = observed.obs["half"] = where
    found = contrast(predictions, "half", observed)
    assert not [text for text in found.warnings if text.startswith("counts")]
    assert found.facts["agreement"]["genes"] == 5
    assert set(found.facts["blocks"]) == {"predicted", "observed"}


def test_what_is_not_known_of_the_image_of_the_counts_is_said(tmp_path):
    """The scale is that of the predictions, since places are compared; another is refused."""
    predictions, regions = random_tiles()
    where = np.where(regions["left"], "left", "right")
    counts = np.random.default_rng(0).poisson(9, (len(where), 5))
    observed = section(counts, predictions.obsm["spatial"] / 2)
    observed.uns["strank"] |= {"image": "A1.jpg", "um_per_pixel": 0.5}
    for adata in (predictions, observed):
        adata.obs["half"] = where
    known = contrast(predictions, "half", observed)

    observed.uns["strank"] |= {"image": "", "um_per_pixel": float("nan")}
    found = contrast(predictions, "half", observed)
    told = "counts: µm per pixel is not known; that of the predictions, 0.5, is taken"
    assert [text for text in found.warnings if text.startswith("counts")] == [told]
    pd.testing.assert_frame_equal(found.table, known.table)
    assert np.isnan(observed.uns["strank"]["um_per_pixel"])

    middle = float(np.median(predictions.obsm["spatial"][:, 0])) - 1
    sides = {"left": box(-1, -1, middle, 1e5), "right": box(middle, -1, 1e5, 1e5)}
    features = [
        {"type": "Feature", "geometry": mapping(side), "properties": {"name": name}}
        for name, side in sides.items()
    ]
    file = tmp_path / "halves.geojson"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    found = contrast(predictions, file, observed)
    pixels = "counts: the image is not named; places are taken to be pixels of the same image"
    assert [text for text in found.warnings if text.startswith("counts")] == [pixels, told]
    pd.testing.assert_frame_equal(found.table, known.table)

    observed.uns["strank"]["um_per_pixel"] = 0.51
    contrast(predictions, file, observed)
    observed.uns["strank"]["um_per_pixel"] = 0.53
    with pytest.raises(InputError, match=r"an image without name \(0.53 µm per pixel\), but"):
        contrast(predictions, file, observed)
