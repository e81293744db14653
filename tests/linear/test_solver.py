"""The optimum, against independent solvers and its own optimality conditions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.optimize import root

from strank.functional.listwise import list_loss
from strank.linear.problem import ListProblem
from strank.linear.solver import Status, minimise


def simulate(n_spots=60, n_features=4, n_genes=5, n_sections=3, seed=0, rate=5.0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_spots, n_features))
    section = np.sort(rng.permutation(np.arange(n_spots) % n_sections))
    depth = rng.lognormal(0, 0.4, n_spots)
    slopes = rng.normal(size=(n_features, n_genes)) * 0.6
    level = rng.normal(size=(n_sections, n_genes))[section]
    counts = rng.poisson(rate * depth[:, None] * np.exp(features @ slopes + level))
    return features, counts, section, np.log(depth)


def problem_of(features, counts, section, offset) -> ListProblem:
    return ListProblem.from_counts(
        torch.as_tensor(features),
        sparse.csr_matrix(counts),
        section=torch.as_tensor(section),
        n_sections=int(section.max()) + 1,
        offset=torch.as_tensor(offset),
    )


def newton(features, counts, section, offset, penalty, steps=200):
    """Damped Newton in float64 for one gene; slow, plain, and nothing of strank in it."""

    def terms(w):
        value, gradient = 0.5 * penalty * w @ w, penalty * w
        hessian = penalty * np.eye(len(w))
        for s in np.unique(section):
            x, c, o = features[section == s], counts[section == s], offset[section == s]
            logits = x @ w + o
            top = logits.max()
            rates = np.exp(logits - top)
            p, total = rates / rates.sum(), c.sum()
            mean = p @ x
            value += total * (np.log(rates.sum()) + top) - c @ (x @ w)
            gradient = gradient + total * mean - c @ x
            hessian = hessian + total * ((x - mean).T * p) @ (x - mean)
        return value, gradient, hessian

    w = np.zeros(features.shape[1])
    for _ in range(steps):
        value, gradient, hessian = terms(w)
        move = np.linalg.lstsq(hessian, -gradient, rcond=None)[0]
        step = 1.0
        while terms(w + step * move)[0] > value + 1e-4 * step * gradient @ move and step > 1e-8:
            step /= 2
        w = w + step * move
        if np.abs(gradient).max() < 1e-11 * max(counts.sum(), 1):
            break
    return w


@pytest.mark.parametrize("penalty", [0.0, 0.5, 30.0, 1e4])
def test_same_optimum_as_damped_newton(penalty):
    data = simulate()
    solution = minimise(problem_of(*data), penalty, tolerance=1e-11)
    features, counts, section, offset = data
    for g in range(counts.shape[1]):
        expected = newton(features, counts[:, g], section, offset, penalty)
        np.testing.assert_allclose(solution.weights[:, g], expected, atol=1e-8)
    assert (solution.status == Status.CONVERGED).all()


def test_same_optimum_as_statsmodels_conditional_poisson():
    from statsmodels.discrete.conditional_models import ConditionalPoisson

    features, counts, section, offset = simulate(n_genes=3)
    solution = minimise(problem_of(features, counts, section, offset), 0.0, tolerance=1e-10)
    for g in range(3):
        model = ConditionalPoisson(counts[:, g], features, groups=section, offset=offset)
        fitted = model.fit(method="bfgs", disp=False)
        # Its optimiser stops near 1e-6; the root of its own score is its optimum.
        optimum = root(model.score, fitted.params, tol=1e-12)
        assert optimum.success
        np.testing.assert_allclose(solution.weights[:, g], optimum.x, atol=1e-6)


def test_objective_is_the_list_loss():
    features, counts, section, offset = simulate()
    problem = problem_of(features, counts, section, offset)
    weights = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = list_loss(
        torch.as_tensor(features) @ weights,
        torch.as_tensor(counts),
        section=torch.as_tensor(section),
        offset=torch.as_tensor(offset),
        reduction="none",
    ).sum(0)
    # The problem drops the constant sum of counts times offset.
    constant = torch.as_tensor(counts.T @ offset)
    torch.testing.assert_close(problem.loss(weights) - constant, each)


def test_recovers_known_slopes():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(4000, 2))
    section = np.arange(4000) % 5
    scale = np.array([0.1, 1, 5, 20, 100])[section]
    counts = rng.poisson(10 * scale * np.exp(features @ [0.7, -0.3]))[:, None]
    solution = minimise(problem_of(features, counts, section, np.zeros(4000)), 1.0)
    # About 1e6 counts: the standard error is near 1e-3; 6 of them.
    np.testing.assert_allclose(solution.weights[:, 0], [0.7, -0.3], atol=6e-3)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), penalty=st.sampled_from([0.1, 10.0, 1000.0]))
def test_invariances(seed, penalty):
    features, counts, section, offset = simulate(n_spots=24, n_genes=3, seed=seed)
    solve = lambda *data: minimise(problem_of(*data), penalty, tolerance=1e-9).weights  # noqa: E731
    expected = solve(features, counts, section, offset)
    rng = np.random.default_rng(seed)
    order = rng.permutation(24)
    permuted = [values[order] for values in (features, counts, section, offset)]
    torch.testing.assert_close(solve(*permuted), expected, atol=1e-6, rtol=1e-5)
    shifted = offset + rng.normal(size=3)[section], features + rng.normal(size=(3, 4))[section]
    torch.testing.assert_close(
        solve(shifted[1], counts, section, shifted[0]), expected, atol=1e-6, rtol=1e-5
    )
    relabelled = np.array([2, 0, 1])[section]
    torch.testing.assert_close(
        solve(features, counts, relabelled, offset), expected, atol=1e-6, rtol=1e-5
    )


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_the_bound_holds(seed):
    data = simulate(n_spots=30, n_genes=3, seed=seed)
    rough = minimise(problem_of(*data), 2.0, max_iterations=2)
    exact = minimise(problem_of(*data), 2.0, tolerance=1e-11)
    excess = rough.objective - exact.objective
    assert (excess >= -1e-9).all()
    assert (excess <= rough.excess + 1e-9).all()


def test_hard_genes_end_with_an_honest_status():
    features, counts, section, offset = simulate(n_genes=4)
    counts[:, 0] = 0
    counts[section != 1, 1] = 0
    counts[:, 2] = 0
    counts[7, 2] = 5
    problem = problem_of(features, counts, section, offset)
    penalised = minimise(problem, 1.0)
    assert penalised.status.tolist() == [Status.NO_COUNTS, *[Status.CONVERGED] * 3]
    assert penalised.weights[:, 0].eq(0).all()
    assert "1 genes: no counts" in penalised.message
    # One spot holds all counts: without a penalty the optimum is at infinity.
    free = minimise(problem, 0.0, tolerance=1e-12, max_iterations=30)
    assert free.status[2] == Status.MAX_ITERATIONS
    assert "raise max_iterations or penalty" in free.message
    assert torch.isfinite(free.weights).all()
    assert free.excess.isinf().all()


def test_more_features_than_spots_collinear_and_constant_features():
    features, counts, section, offset = simulate(n_spots=20, n_features=30)
    features[:, 3] = features[:, 4]
    features[:, 5] = 7.0
    solution = minimise(problem_of(features, counts, section, offset), 1.0, tolerance=1e-10)
    assert (solution.status == Status.CONVERGED).all()
    for g in range(2):
        expected = newton(features, counts[:, g], section, offset, 1.0)
        np.testing.assert_allclose(solution.weights[:, g], expected, atol=1e-7)
    torch.testing.assert_close(solution.weights[3], solution.weights[4])
    assert solution.weights[5].abs().max() < 1e-12


def test_sections_of_one_spot_change_nothing():
    features, counts, section, offset = simulate()
    expected = minimise(problem_of(features, counts, section, offset), 1.0, tolerance=1e-9)
    more = [
        np.concatenate([a, b])
        for a, b in [
            (features, [[9.0, -9, 3, 1]]),
            (counts, [[50, 0, 9, 1, 1000]]),
            (section, [3]),
            (offset, [2.0]),
        ]
    ]
    got = minimise(problem_of(*more), 1.0, tolerance=1e-9)
    torch.testing.assert_close(got.weights, expected.weights, atol=1e-7, rtol=1e-6)


def test_genes_that_the_shared_preconditioner_does_not_serve_converge_too():
    data = simulate(n_spots=400, n_features=60, n_genes=3, rate=50)
    solution = minimise(problem_of(*data), 1.0, tolerance=1e-9)
    assert (solution.status == Status.CONVERGED).all()
    assert solution.iterations.max() > 60
    features, counts, section, offset = data
    expected = newton(features, counts[:, 0], section, offset, 1.0)
    np.testing.assert_allclose(solution.weights[:, 0], expected, atol=1e-7)


def test_start_at_the_optimum_takes_no_step():
    problem = problem_of(*simulate())
    first = minimise(problem, 3.0, tolerance=1e-7)
    again = minimise(problem, 3.0, start=first.weights, tolerance=1.1e-7)
    assert again.iterations.max() == 0


def test_penalties_per_gene_and_a_negative_one():
    problem = problem_of(*simulate())
    penalty = torch.tensor([0.1, 1, 10, 100, 1000.0])
    together = minimise(problem, penalty, tolerance=1e-9).weights
    for g, p in enumerate(penalty.tolist()):
        alone = minimise(problem, p, tolerance=1e-9).weights[:, g]
        torch.testing.assert_close(together[:, g], alone, atol=1e-7, rtol=1e-6)
    with pytest.raises(ValueError, match="penalty must not be negative"):
        minimise(problem, -1.0)
