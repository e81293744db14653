"""Which scores know nothing of depth: counts without signal, and counts with a known one.

Means over replicates are held against their standard errors. `Z` of them are exceeded by chance
once in 10,000 runs of a test, whichever of its comparisons it is; seeds are fixed, so that what
passes passes always. A bias of `Z` + 1.3 standard errors is found with a chance of 90%; tests of
neutrality name it as their ``power``, and fail if they have less.
"""

from __future__ import annotations

import runpy
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp
from scipy.stats import norm, rankdata

from strank.metrics.correlation import pearson, spearman
from strank.metrics.depth import depth_matched_spearman, lift
from strank.metrics.deviance import deviance_explained, list_gain, score_slope

_script = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "error_rates.py"))
DEPTHS = _script["DEPTHS"]
MEANS = np.array([0.02, 0.1, 1.0, 5.0, 50.0])
Z = norm.isf(1e-4 / 2 / (6 * len(MEANS)))


def random_step(depth):
    """Return 0 or 1 for each twentieth of the spots, in order of depth, at random."""
    level = np.random.default_rng(11).integers(0, 2, size=20)
    return 1.0 * level[20 * (rankdata(depth, "ordinal").astype(int) - 1) // len(depth)]


FUNCTIONS_OF_DEPTH = {
    "log": np.log,
    "hump": lambda depth: np.abs(np.log(depth / np.median(depth))),
    "random step": random_step,
    # In the order of the logarithm, or in reverse: scores of the order alone need no test of these.
    "minus log": lambda depth: -np.log(depth),
    "rank": lambda depth: rankdata(depth) / len(depth),
    "inverse": lambda depth: 1 / (1 + depth / np.median(depth)),
}
ORDERS = ("log", "hump", "random step")


def lognormal_depths(seed, n_sections=3, n_spots=180):
    """Library sizes of sections as they are: median 5000, standard deviation of the log 0.65."""
    rng = np.random.default_rng(seed)
    return np.ceil(np.exp(np.log(5000) + 0.65 * rng.normal(size=(n_sections, n_spots))))


def her2st_depths(folder):
    """Library sizes of a real section, where a tenth of the spots has next to no counts."""
    counts = pd.read_csv(folder / "counts/C2.tsv.gz", sep="\t", index_col=0)
    return np.tile(counts.to_numpy().sum(1).astype(np.float64), (3, 1))


def no_signal(depth, *, dispersion, seed, n_genes=400):
    """Poisson or gamma-Poisson counts, ``n_genes`` of each mean, that differ by depth alone."""
    rng = np.random.default_rng(seed)
    rate = depth[:, None] / depth.mean() * np.repeat(MEANS, n_genes)
    if dispersion:
        rate = rate * rng.gamma(1 / dispersion, dispersion, size=rate.shape)
    return rng.poisson(rate)


@pytest.fixture(scope="module", params=["lognormal", "her2st"])
def depths(request):
    if request.param == "her2st":
        return her2st_depths(request.getfixturevalue("her2st"))
    return lognormal_depths(0)


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["poisson", "gamma_poisson"])
def dispersion(request):
    return request.param


@pytest.fixture(scope="module")
def sections(depths, dispersion):
    """Depth and counts of each."""
    return [(d, no_signal(d, dispersion=dispersion, seed=[s, 1])) for s, d in enumerate(depths)]


def replicates(score, sections, name, **options):
    """Score a function of depth, ``[n_means, n_replicates]``."""
    found = []
    for depth, counts in sections:
        scores = np.broadcast_to(FUNCTIONS_OF_DEPTH[name](depth)[:, None], counts.shape)
        spots = {"section": np.zeros(len(depth)), "library_size": depth}
        found.append(score(scores, counts, **spots, **options).reshape(len(MEANS), -1))
    return np.concatenate(found, axis=1)


def mean_and_error(values):
    n = np.isfinite(values).sum(1)
    return np.nanmean(values, axis=1), np.nanstd(values, axis=1, ddof=1) / np.sqrt(n)


def assert_mean(values, expected=0.0, *, power=np.inf, allowed=0.0):
    mean, error = mean_and_error(values)
    assert ((Z + 1.3) * error < power).all(), f"too few replicates: {error}"
    assert (np.abs(mean - expected) <= Z * error + allowed).all(), f"{mean} +- {error}"


@pytest.mark.parametrize("name", ORDERS)
def test_depth_matched_spearman_is_neutral(sections, name):
    """For the rarest genes too: most of their draws have no count at all."""
    values = replicates(depth_matched_spearman, sections, name, n_draws=3)
    assert_mean(values, power=0.02)


@pytest.mark.parametrize("name", ORDERS)
def test_lift_is_neutral(sections, dispersion, name):
    """But for what the total in its denominator shares with each count, where that is dispersed."""
    values = replicates(lift, sections, name)
    power = np.array([0.08, 0.04, 0.016, 0.016, 0.016])
    assert_mean(values, power=power, allowed=2 * dispersion / len(sections[0][0]))
    # Without the denominator there is no bias at all.
    totals = [counts.sum(0).reshape(len(MEANS), -1) for _, counts in sections]
    totals = np.concatenate(totals, axis=1) / MEANS[:, None] / len(sections[0][0])
    assert_mean(np.nan_to_num(values) * totals, power=power)


# By number of spots and dispersion, the worst that is stated.
WORST = {(50, 1): 0.026, (50, 5): 0.097, (200, 1): 0.0094, (200, 5): 0.039}
WORST |= {(1000, 1): 0.0024, (1000, 5): 0.0104}


@pytest.mark.parametrize("n_values", [100_000, pytest.param(500_000, marks=pytest.mark.slow)])
def test_lift_of_dispersed_counts_is_shifted_as_stated(n_values):
    """Never beyond the bound, and by no less than half of it."""
    for of in DEPTHS:
        bias, error = of.bias(n_values, seed=1)
        assert of.first_order - 4.5 * error <= bias <= 0.55 * of.first_order + 4.5 * error, of
        assert bias >= -WORST.get((of.n_spots, of.dispersion), 0.0) - 4.5 * error, of


@pytest.mark.parametrize("name", FUNCTIONS_OF_DEPTH)
def test_functions_of_depth_explain_less_than_nothing(sections, name):
    """What they lose is known: how far the mean of exp(r) exceeds exp of the mean of r."""
    gain = replicates(list_gain, sections, name)
    each = gain.shape[1] // len(sections)
    for s, (depth, _) in enumerate(sections):
        r, share = FUNCTIONS_OF_DEPTH[name](depth), depth / depth.sum()
        loss = logsumexp(r, b=share) - share @ r
        assert_mean(gain[:, s * each : (s + 1) * each], -loss * MEANS * len(depth))
    mean, error = mean_and_error(replicates(deviance_explained, sections, name))
    assert (mean <= Z * error).all()
    assert (mean[1:] < -Z * error[1:]).all(), f"{mean} +- {error}"


@pytest.mark.parametrize("name", [*ORDERS, "inverse"])
def test_nor_do_they_explain_anything_with_a_slope_of_other_sections(sections, name):
    *train, test = sections
    scores = np.concatenate([FUNCTIONS_OF_DEPTH[name](depth) for depth, _ in train])
    counts = np.concatenate([counts for _, counts in train])
    slope = score_slope(
        np.broadcast_to(scores[:, None], counts.shape),
        counts,
        section=np.repeat(np.arange(len(train)), len(test[0])),
        library_size=np.concatenate([depth for depth, _ in train]),
    )
    # Rare genes have a dozen counts in all, whose likelihood is not yet symmetric.
    common = slope.reshape(len(MEANS), -1)[2:] * scores.std()
    assert_mean(common, power=0.05, allowed=0.01)
    mean, error = mean_and_error(replicates(deviance_explained, [test], name, slope=slope))
    assert (mean <= Z * error).all()
    assert (np.abs(mean[1:]) < 0.02).all()


def test_correlations_with_the_usual_target_are_not_neutral(sections):
    """Rank and straight line alike; and log1p of raw counts is mostly depth."""
    usual, error = mean_and_error(replicates(spearman, sections, "log"))
    assert (usual - Z * error)[[1, 2]].min() > 0.1
    assert (usual > Z * error)[:-1].all()
    straight, error = mean_and_error(replicates(pearson, sections, "log"))
    assert (straight > Z * error).all()
    assert straight[2] > 0.1
    for score, less in ((spearman, usual), (pearson, straight)):
        more, _ = mean_and_error(replicates(score, sections, "log", target="log1p_counts"))
        assert (more > less).all()
        assert more[-1] > 0.4
        assert (np.diff(more) > 0).all()


EVERY_SCORE = {
    "spearman": spearman,
    "spearman_counts": partial(spearman, target="log1p_counts"),
    "pearson": pearson,
    "depth_matched": partial(depth_matched_spearman, n_draws=3),
    "lift": lift,
    "relative_lift": partial(lift, relative=True),
    "deviance_explained": deviance_explained,
}


@cache
def known_truth(strength, *, n_genes=200):
    """Counts of a section that follow a log rate of a standard deviation, and that log rate."""
    rng = np.random.default_rng(7)
    depth = lognormal_depths(2)[0]
    log_rate = strength * rng.normal(size=(len(depth), n_genes))
    rate = depth[:, None] * np.exp(log_rate)
    rate *= rng.lognormal(0.5, 1, size=n_genes) / rate.mean(0)
    spots = {"section": np.zeros(len(depth)), "library_size": depth}
    return log_rate, rng.poisson(rate), spots


def assert_rises(values):
    """Assert it of the mean over genes, by more than the standard error of a rise explains."""
    mean, error = mean_and_error(np.diff(np.concatenate(values), axis=0))
    assert (mean > Z * error).all(), f"{mean} +- {error}"


@pytest.mark.parametrize("score", EVERY_SCORE.values(), ids=EVERY_SCORE)
def test_the_truth_scores_the_higher_the_more_genes_vary(score):
    values = []
    for strength in (1e-9, 0.25, 0.5, 1.0, 2.0):
        log_rate, counts, spots = known_truth(strength)
        values.append(score(log_rate, counts, **spots))
    assert abs(np.nanmean(values[0])) < 0.03
    assert_rises(values)


@pytest.mark.parametrize("score", EVERY_SCORE.values(), ids=EVERY_SCORE)
def test_the_truth_scores_the_lower_the_more_it_is_blurred(score):
    log_rate, counts, spots = known_truth(1.0)
    noise = np.random.default_rng(8).normal(size=log_rate.shape)
    values = [score(log_rate + blur * noise, counts, **spots) for blur in (4.0, 2.0, 1.0, 0.5, 0)]
    assert_rises(values)
