"""The path of penalties ends where it should: choices are those of the whole path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from strank import STRankRegressorCV
from strank.linear import penalty as path
from strank.linear.calibration import LeftOut, lowest, mostly_as_all, temperature
from strank.linear.data import gather
from strank.linear.design import Design
from strank.linear.objective import along, value_and_gradient
from strank.linear.penalty import (
    PENALTIES,
    PenaltyChoice,
    best_for_all,
    best_of,
    choose_penalty,
)
from strank.linear.solver import descend
from strank.metrics.correlation import log1p_cp10k


def patients(seed, n_patients=4, n_spots=300, n_features=40, *, shared=0.6, rates=(-2, 3)):
    """Draw patients that have so much of the variance of their weights in common."""
    rng, n_genes = np.random.default_rng(seed), 30
    size = (1 + np.arange(n_features)) ** -0.5
    weights, found = rng.normal(size=(n_features, n_genes)), []
    level = np.exp(rng.uniform(*rates, n_genes))
    for _ in range(n_patients):
        own = rng.normal(size=weights.shape)
        features = rng.normal(size=(n_spots, n_features)) * size / np.sqrt((size**2).sum())
        scores = 0.6 * features @ (np.sqrt(shared) * weights + np.sqrt(1 - shared) * own)
        noise = rng.gamma(4, 1 / 4, scores.shape)
        found.append((features, rng.poisson(level * np.exp(scores) * noise)))
    return stacked(found)


def two_minima(seed, n_patients=4, n_spots=300):
    """What varies most is of each patient its own: small penalties find what they share."""
    rng, n_genes, found = np.random.default_rng(seed), 30, []
    weights, level = rng.normal(size=(20, n_genes)) / 20**0.5, np.exp(rng.uniform(2, 5, n_genes))
    for _ in range(n_patients):
        strong, weak = rng.normal(size=(n_spots, 1)), rng.normal(size=(n_spots, 20))
        features = np.hstack([strong + 0.3 * rng.normal(size=(n_spots, 10)), strong + 0.3 * weak])
        scores = 0.6 * strong * rng.normal(size=n_genes) + 0.3 * weak @ weights
        found.append((features, rng.poisson(level * np.exp(scores))))
    return stacked(found)


def stacked(found):
    features, counts = (np.concatenate(part) for part in zip(*found, strict=True))
    group = np.repeat(np.arange(len(found)), [len(part) for part, _ in found])
    return features.astype(np.float32), counts, group


# And how many times fewer evaluations genes at least need that choose for themselves.
COHORTS = {
    "several patients": (lambda: patients(0), 1.3),
    "two patients": (lambda: patients(1, 2), 1.5),
    "flat curves": (lambda: patients(2, shared=0.0, rates=(-3, 0)), 2.0),
    "sparse genes": (lambda: patients(3, rates=(-5, -2)), 1.5),
    "many features": (lambda: patients(5, n_spots=150, n_features=200), 2.2),
    # Where small penalties win there is nothing to save, and next to nothing to lose.
    "deep counts": (lambda: patients(4, shared=1.0, rates=(4, 7)), 0.9),
    "two minima": (lambda: two_minima(0), 0.9),
    "two minima, two patients": (lambda: two_minima(1, 2), 0.9),
}


def whole_path(design):
    """Walk the whole path as it was walked before: every fit from the last, nobody leaves it."""
    block, paths, spent = design.block(slice(0, design.n_genes), design.data.counts), [], 0
    for group in range(design.n_groups):
        training = design.training(block, 1.0, group)
        test = design.held_out(block, training, group)
        axes, start, found = torch.zeros_like(test.xtc), value_and_gradient(test, 0 * test.xtc), []
        for penalty in PENALTIES:
            problem = replace(training, penalty=torch.full_like(training.penalty, penalty))
            optimum = descend(problem, axes, tolerance=1e-4, max_iterations=500)
            axes, spent = optimum.axes, spent + int(optimum.iterations.sum())
            found.append(by_secants(test, axes, start[1]))
        paths.append(torch.stack(found, 1))
    return LeftOut(*torch.stack(paths, 1).numpy()), spent


def by_secants(test, axes, start):
    loss, gradient = value_and_gradient(test, axes)
    low, high = (axes * start).sum(0), (axes * gradient).sum(0)
    before, now, rise = torch.zeros_like(low), torch.ones_like(low), low
    information = (high - low).clamp(min=0)
    for _ in range(3):
        step = (high * (now - before) / (high - rise)).nan_to_num(0, 0, 0)
        before, rise, now = now, high, (now - step).clamp(-1.0, 3.0)
        high = (axes * value_and_gradient(test, axes * now)[1]).sum(0)
    return torch.stack([loss, now, information])


def chosen(design, choose, monkeypatch):
    """Choose, and count the evaluations of all fits on the way."""
    spent = []

    def counted(*args, **kwargs):
        optimum = descend(*args, **kwargs)
        spent.append(int(optimum.iterations.sum()))
        return optimum

    monkeypatch.setattr(path, "descend", counted)
    return choose_penalty(design, PENALTIES, choose), sum(spent)


def as_chosen_by(losses, choose):
    """Losses, by group, that the choice of each gene is the lowest of."""
    mean = losses.mean(2, keepdims=True)
    return {lowest: losses, mostly_as_all: losses + 10 * mean, best_for_all: mean + 0 * losses}[
        choose
    ]


def assert_same_but_for_noise(choice, whole, choose):
    """Of all groups, and of all but each; sizes are the same where these are."""
    genes, same = np.arange(whole.loss.shape[2]), np.ones(whole.loss.shape[2], dtype=bool)
    losses = as_chosen_by(whole.loss, choose)
    of_all = np.ones(len(losses), dtype=bool)
    for say in (of_all, *~np.diag(of_all)):
        got, wanted = (choose(of.loss[say].sum(0)) for of in (choice.left_out, whole))
        more = losses[:, got, genes] - losses[:, wanted, genes]
        # Groups do not agree on it, or it is no more than the path's tolerance leaves open.
        noise = 2 * more.std(0, ddof=1) * len(more) ** 0.5 + 0.05
        assert (more[say].sum(0) <= noise).all()
        same &= got == wanted
    assert same.mean() > 0.8
    sizes = choice.temperature, temperature(whole, choose)
    np.testing.assert_allclose(*(size[same] for size in sizes), atol=0.005)
    np.testing.assert_allclose(*(np.median(size) for size in sizes), atol=0.002)


def design_of(features, counts, group, offset=None):
    return Design(gather(features, counts, group, offset, group))


@pytest.mark.parametrize("cohort", COHORTS)
def test_choices_are_those_of_the_whole_path(cohort, monkeypatch):
    draw, fewer = COHORTS[cohort]
    design = design_of(*draw())
    whole, before = whole_path(design)
    for choose in (lowest, mostly_as_all, best_for_all):
        choice, spent = chosen(design, choose, monkeypatch)
        assert_same_but_for_noise(choice, whole, choose)
        assert before > (fewer if choose is lowest else 0.9) * spent


def test_choices_on_real_tissue_are_those_of_the_whole_path(her2st, monkeypatch):
    """Of a patient and two sections of another; features are what other genes say."""
    files = [her2st / f"counts/{name}.tsv.gz" for name in ("B4", "C2", "C3")]
    tables = [pd.read_csv(file, sep="\t", index_col=0) for file in files]
    counts, depth = pd.concat(tables, join="inner").to_numpy(), pd.concat(tables).sum(1)
    levels = log1p_cp10k(counts, depth).toarray()
    order = np.argsort(-levels.var(0), kind="stable")
    section = np.repeat(np.arange(3), [len(table) for table in tables])
    features, panel = levels[:, order[1:1200:6]], counts[:, order[:1200:12]]
    design = design_of(features, panel, section, np.log(depth))
    whole, before = whole_path(design)
    for choose in (lowest, mostly_as_all):
        choice, spent = chosen(design, choose, monkeypatch)
        assert_same_but_for_noise(choice, whole, choose)
        assert before > 2.2 * spent


def told(monkeypatch, table):
    """Let the groups say what is in a table of losses, ``[n_groups, n_penalties, n_genes]``."""
    tried = []

    def losses(design, penalties, block):
        of_gene = block.counts[0].toarray()[0].astype(int)
        at = [PENALTIES.index(penalty) for penalty in penalties]
        tried.extend((number, gene) for number in at for gene in of_gene)
        of = np.asarray(table, dtype=float)[:, at][:, :, of_gene]
        return np.stack([of, np.ones_like(of), np.ones_like(of)])

    monkeypatch.setattr(path, "_left_out", losses)
    n_groups, _, n_genes = np.shape(table)
    # The counts of a gene are its number.
    counts = np.tile(np.arange(n_genes), (2 * n_groups, 1))
    rng = np.random.default_rng(0)
    design = design_of(rng.normal(size=(len(counts), 2)), counts, np.repeat(range(n_groups), 2))
    return design, tried


def rises_from(*lowest_at, dip=()):
    """Losses that are lowest at a place, one a gene; lower again at some, or falling from there."""
    losses = np.abs(np.arange(10)[:, None] - np.array(lowest_at)).astype(float)
    for gene, place, loss in dip:
        losses[place, gene] = loss
    return losses


def test_a_gene_leaves_when_all_but_any_group_have_passed_their_best(monkeypatch):
    alike = rises_from(0, 2, 3, 4, 5, 9)
    one, two = alike.copy(), alike.copy()
    # Of the last two genes one group alone has its best further down; the other outweighs it.
    one, two = (np.hstack([v, 9 * rises_from(1, 2)]) for v in (one, two))
    two[:, -2:] = rises_from(6, 9)
    design, tried = told(monkeypatch, [one, two])
    choice = choose_penalty(design, PENALTIES)
    wanted = [0, 2, 3, 4, 5, 9, 1, 2]
    np.testing.assert_array_equal(choice.penalty, np.array(PENALTIES)[wanted])
    walked = np.bincount([gene for _, gene in tried])
    np.testing.assert_array_equal(walked, [5, 5, 7, 7, 9, 10, 9, 10])
    np.testing.assert_array_equal(np.isfinite(choice.held_out).sum(0), walked)
    assert not np.isnan(choice.held_out).any()
    assert np.isnan(choice.left_out.slope).any()
    assert np.isfinite(choice.temperature).all()


def test_a_gene_stays_for_what_only_all_groups_together_say(monkeypatch):
    """Each group has its best at once, but where they agree is beyond."""
    late = [1.0, 2, 20, 20, 20, 20, 20]
    design, tried = told(monkeypatch, np.array([[0, 9, 9, *late], [9, 0, 9, *late]])[:, :, None])
    assert choose_penalty(design, PENALTIES).penalty == PENALTIES[3]
    assert len(tried) == 7


def test_fits_of_different_lengths_side_by_side():
    def choice(*losses):
        of = np.array(losses)[None, :, None] * np.ones((2, 1, 1))
        return PenaltyChoice(
            np.ones(1), 1.0 + np.arange(len(losses)), LeftOut(of, of, of), of[0, 0]
        )

    for losses, whose, penalty in (([3.0, 2.0], 1, 3.0), ([3.0, 0.0], 0, 2.0)):
        best, of = best_of([choice(*losses), choice(4.0, 5.0, 1.0)], lowest)
        assert (of.tolist(), best.penalty.tolist()) == ([whose], [penalty])
        assert best.penalties.tolist() == [1, 2, 1, 2, 3]


def test_a_gene_whose_loss_falls_again_stays(monkeypatch):
    losses = rises_from(0, 0, 0, dip=[(1, 4, 2.5), (1, 5, 2.0), (1, 6, -1.0), (2, 6, 4.5)])
    design, tried = told(monkeypatch, [losses, losses])
    choice = choose_penalty(design, PENALTIES)
    np.testing.assert_array_equal(choice.penalty, np.array(PENALTIES)[[0, 6, 0]])
    # It has its best at the last place of a stretch, and so goes on; the third had left by then.
    assert np.bincount([gene for _, gene in tried]).tolist() == [5, 9, 5]


@pytest.mark.parametrize("choose", [mostly_as_all, best_for_all], ids=lambda f: f.__name__)
def test_genes_that_choose_together_leave_together(choose, monkeypatch):
    losses = np.hstack([rises_from(0, 0, 1), 100 * rises_from(4)])
    design, tried = told(monkeypatch, [losses, losses])
    choice = choose_penalty(design, PENALTIES, choose)
    assert np.bincount([gene for _, gene in tried]).tolist() == [7] * 4
    np.testing.assert_array_equal(choice.penalties, PENALTIES[:7])
    assert np.isfinite(choice.held_out).all()
    np.testing.assert_array_equal(choice.penalty, np.array(PENALTIES)[choose(2 * losses)])


def test_blocks_of_genes_choose_as_all_together():
    features, counts, group = patients(1, 2)
    choices = []
    for at_once in (1000, 7):
        design = design_of(features, counts, group)
        design._room = at_once
        choices.append([choose_penalty(design, PENALTIES, how) for how in (lowest, mostly_as_all)])
    for one, many in zip(*choices, strict=True):
        np.testing.assert_array_equal(one.penalty, many.penalty)
        np.testing.assert_allclose(one.held_out, many.held_out, rtol=1e-4)
        np.testing.assert_allclose(one.temperature, many.temperature, atol=1e-3)


def test_coarse_fine_and_odd_candidates():
    """A stretch is two candidates and a decade; of few candidates there is none to leave out."""
    assert path._marks(np.array([1e5, 100.0, 1.0])) == [0, 2]
    assert path._marks(np.array([1e5, 1e4, 1e3, 1e2])) == [0, 2]
    assert path._marks(np.logspace(5, 2, 31)) == [0, 10, 20, 30]
    assert path._marks(np.array([10.0, 9.0, 8.0, 0.0])) == [0, 3]
    assert path._marks(np.array([5.0])) == [0]


def test_borrowing_chooses_as_along_the_whole_path(monkeypatch):
    features, counts, group = patients(6, 3, rates=(-4, 0))
    short = STRankRegressorCV(borrow=True).fit(features, counts, section=group)
    monkeypatch.setattr(path, "_marks", lambda penalties: [0])
    whole = STRankRegressorCV(borrow=True).fit(features, counts, section=group)
    assert len(short.choice_.penalties) < len(whole.choice_.penalties) == 20
    np.testing.assert_array_equal(short.penalty_, whole.penalty_)
    np.testing.assert_array_equal(short.borrows_, whole.borrows_)
    assert np.isfinite(short.choice_.temperature).all()


def test_untried_candidates_of_two_fits_side_by_side(monkeypatch):
    features, counts, group = patients(1, 3, rates=(0, 2))
    short = STRankRegressorCV(objective="nb").fit(features, counts, section=group)
    assert np.isinf(short.choice_.held_out).any()
    monkeypatch.setattr(path, "_marks", lambda penalties: [0])
    whole = STRankRegressorCV(objective="nb").fit(features, counts, section=group)
    np.testing.assert_array_equal(short.penalty_, whole.penalty_)
    np.testing.assert_allclose(short.dispersion_, whole.dispersion_)
    np.testing.assert_allclose(short.choice_.temperature, whole.choice_.temperature, atol=1e-3)


def test_the_objective_along_some_weights_is_the_objective():
    features, counts, group = patients(0, 3, 50, 6)
    design = design_of(features.astype(float), counts, group)
    block = design.block(slice(0, 30), design.data.counts)
    problem = design.training(block, 7.0, 1)
    axes = 0.1 * torch.randn(problem.xtc.shape, generator=torch.Generator().manual_seed(0)).double()
    times = (0.0, 1.0, torch.linspace(-1, 2, 30, dtype=torch.float64))
    for (value, slope), t in zip(along(problem, axes, times), times, strict=True):
        expected, gradient = value_and_gradient(problem, axes * t)
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(slope, (axes * gradient).sum(0))
