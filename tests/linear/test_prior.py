"""Borrowing between genes: what it is, that it helps where it should, and that it peeks nowhere."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from strank import STRankRegressor, STRankRegressorCV
from strank.linear.data import gather
from strank.linear.design import Design
from strank.linear.prior import borrow, estimate_prior, pooled_choice


def simulate(kind: str, seed: int = 0, n_genes: int = 60, level: float = 0.3):
    """Four sections of 60 spots; genes of one program, or of a direction of their own."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(240, 20))
    section = np.repeat(np.arange(4), 60)
    weights = rng.normal(size=(20, n_genes)) / np.sqrt(20)
    if kind == "program":
        weights = np.outer(rng.normal(size=20) / np.sqrt(20), rng.choice([-1.0, 1.0], n_genes))
    scores = 0.8 * features @ weights
    counts = rng.poisson(level * np.exp(scores) * rng.lognormal(0, 1, n_genes))
    return features, counts, section, scores


def correlation(a, b):
    a, b = a - a.mean(0), b - b.mean(0)
    norm = np.linalg.norm(a, axis=0) * np.linalg.norm(b, axis=0)
    return np.divide((a * b).sum(0), norm, out=np.zeros(len(norm)), where=norm > 0).mean()


@cache
def both(kind, seed):
    """Models that borrow and that do not, and how near they come; fitted once for all tests."""
    features, counts, section, scores = simulate(kind, seed)
    train = section < 3
    models = [
        STRankRegressorCV(borrow=borrow).fit(features[train], counts[train], section=section[train])
        for borrow in (False, True)
    ]
    return models, [correlation(m.predict(features[~train]), scores[~train]) for m in models]


def test_genes_of_one_program_are_much_better_known_together():
    outcome = [both("program", seed)[1] for seed in range(3)]
    without, given = np.mean(outcome, axis=0)
    assert given > without + 0.15


def test_genes_that_share_nothing_lose_nothing():
    outcome = [both("own", seed)[1] for seed in range(3)]
    without, given = np.mean(outcome, axis=0)
    assert given > without - 0.02


def of_features(root, geometry):
    """A symmetric root along the axes, for standardised features."""
    axes = geometry.scale[:, None] * geometry.basis
    return (axes @ root @ axes.T).numpy()


def test_the_optimum_is_that_of_transformed_features():
    """A prior covariance R R' is a ridge on features times R."""
    (_, model), _ = both("program", 0)
    features, counts, section, _ = simulate("program", 0)
    train = section < 3
    data = gather(features[train], counts[train], section[train], None, section[train])
    design = Design(data)
    given, _, _ = borrow(design, STRankRegressorCV().penalties)
    # Axes R Q of the prior, at right angles in its metric: R Q Q' R' = R R'.
    root = model.scale_[:, None] * given.geometry(None).basis.numpy()
    transformed = features[train] / model.scale_ @ root
    genes = np.flatnonzero(model.borrows_)
    assert len(genes) > 40
    by_hand = STRankRegressor(model.penalty_[genes], standardize=False, tolerance=1e-9)
    by_hand.fit(transformed, counts[train][:, genes], section=section[train])
    np.testing.assert_allclose(
        by_hand.coef_ @ root.T / model.scale_, model.coef_[genes], atol=2e-4, rtol=1e-3
    )


def test_the_prior_of_a_fold_knows_nothing_of_what_is_left_out():
    features, counts, section, _ = simulate("program")
    changed = counts.copy()
    changed[section == 2] = counts[section == 2][::-1, ::-1]
    roots = []
    for observed in (counts, changed):
        design = Design(gather(features, observed, section, None, section))
        prior = estimate_prior(design, np.full(60, 100.0))
        roots.append({f: of_features(root, design.geometry(f)) for f, root in prior.items()})
    # What the section weighs in the axes of the solver moves rounding, and no more.
    np.testing.assert_allclose(roots[0][2], roots[1][2], atol=1e-3)
    assert np.abs(roots[0][1] - roots[1][1]).max() > 0.05
    covariance = roots[0][None] @ roots[0][None]
    assert np.trace(covariance) == pytest.approx(20)
    assert np.linalg.eigvalsh(covariance).min() >= 0.2 - 1e-9


def test_a_choice_is_pooled_over_genes_of_about_as_many_counts():
    rng = np.random.default_rng(0)
    counts = np.arange(200)
    truth = np.where(counts < 100, -0.1, 0.1)
    losses = np.stack([np.zeros(200), truth + rng.normal(size=200)])
    own, pooled = losses.argmin(0) == 1, pooled_choice(losses, counts) == 1
    right = counts < 100
    assert (pooled == right).mean() > (own == right).mean()
    order = rng.permutation(200)
    np.testing.assert_array_equal(
        pooled_choice(losses[:, order], counts[order]) == 1, pooled[order]
    )


def test_what_cannot_be_borrowed_is_said():
    features, counts, section, _ = simulate("program")
    with pytest.raises(ValueError, match="borrow needs at least 15 genes; got 3"):
        STRankRegressorCV(borrow=True).fit(features, counts[:, :3], section=section)
    with pytest.raises(ValueError, match="leave shared at False"):
        STRankRegressorCV(borrow=True, shared=True).fit(features, counts, section=section)
    empty = STRankRegressorCV(borrow=True).fit(features, 0 * counts, section=section)
    assert (empty.coef_ == 0).all()
