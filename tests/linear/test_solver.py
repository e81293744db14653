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
from strank.functional.pairwise import all_pairs, pair_loss
from strank.linear.data import gather
from strank.linear.design import Design
from strank.linear.exact import Solution, Status, fit_genes
from strank.linear.objective import value_and_gradient
from strank.linear.solver import descend


def simulate(n_spots=60, n_features=4, n_genes=5, n_sections=3, seed=0, rate=5.0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_spots, n_features))
    section = np.sort(rng.permutation(np.arange(n_spots) % n_sections))
    depth = rng.lognormal(0, 0.4, n_spots)
    slopes = rng.normal(size=(n_features, n_genes)) * 0.6
    level = rng.normal(size=(n_sections, n_genes))[section]
    counts = rng.poisson(rate * depth[:, None] * np.exp(features @ slopes + level))
    return features, counts, section, np.log(depth)


def design_of(features, counts, section, offset, **plan) -> Design:
    counts = sparse.csr_matrix(counts)
    return Design(gather(features, counts, section, offset), **plan)


def solve(data, penalty, *, tolerance=1e-9, max_iterations=500, **plan) -> Solution:
    design = design_of(*data, **plan)
    penalty = np.broadcast_to(np.asarray(penalty, dtype=float), data[1].shape[1])
    return fit_genes(design, penalty, tolerance=tolerance, max_iterations=max_iterations)


def standardised(features, section):
    """Features in units of their standard deviation within sections, which the penalty acts on."""
    means = np.stack([features[section == s].mean(0) for s in range(section.max() + 1)])
    scale = np.sqrt(((features - means[section]) ** 2).mean(0))
    return features / np.where(scale > 0, scale, 1), np.where(scale > 0, scale, 1)


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
    data = features, counts, section, offset = simulate()
    solution = solve(data, penalty, tolerance=1e-11)
    standard, scale = standardised(features, section)
    for g in range(counts.shape[1]):
        expected = newton(standard, counts[:, g], section, offset, penalty) / scale
        np.testing.assert_allclose(solution.weights[:, g], expected, atol=1e-8)
    assert (solution.status == Status.CONVERGED).all()


def test_same_optimum_as_statsmodels_conditional_poisson():
    data = features, counts, section, offset = simulate(n_genes=3)
    solution = solve(data, 0.0, tolerance=1e-10)
    for g in range(3):
        expected = conditional_poisson(counts[:, g], features, section, offset)
        np.testing.assert_allclose(solution.weights[:, g], expected, atol=1e-6)


def test_pairs_have_the_optimum_of_a_binomial_regression():
    """Each pair is a binomial outcome; sections of one size weigh alike."""
    from statsmodels.genmod.families import Binomial
    from statsmodels.genmod.generalized_linear_model import GLM

    data = features, counts, section, offset = simulate(n_spots=36, n_genes=2)
    solution = solve(data, 0.0, objective="pair", tolerance=1e-10)
    pairs = all_pairs(torch.as_tensor(section)).numpy()
    for g in range(2):
        first, second = pairs[counts[pairs, g].sum(1) > 0].T
        model = GLM(
            np.column_stack([counts[first, g], counts[second, g]]),
            features[first] - features[second],
            family=Binomial(),
            offset=offset[first] - offset[second],
        )
        expected = model.fit(tol=1e-14, maxiter=200).params
        np.testing.assert_allclose(solution.weights[:, g], expected, atol=1e-6)


def conditional_poisson(counts, features, group, offset):
    from statsmodels.discrete.conditional_models import ConditionalPoisson

    model = ConditionalPoisson(counts, features, groups=group, offset=offset)
    fitted = model.fit(method="bfgs", disp=False)
    # Its optimiser stops near 1e-6; the root of its own score is its optimum.
    optimum = root(model.score, fitted.params, tol=1e-12)
    assert optimum.success
    return optimum.x


def at_weights(design, weights):
    block = design.block(slice(0, weights.shape[1]), design.data.counts)
    geometry = design.geometry(None)
    problem = design.training(block, 0.0)
    axes = torch.linalg.lstsq(geometry.basis, torch.as_tensor(weights)).solution
    value, gradient = value_and_gradient(problem, axes)
    return value, torch.linalg.lstsq(geometry.basis.T, gradient).solution


@pytest.mark.parametrize("n_spots", [21, 20])
@pytest.mark.parametrize("objective", ["list", "pair"])
def test_objective_and_gradient_are_those_of_the_losses(objective, n_spots):
    """Autograd through the losses, whose own tests hold them against plain definitions."""
    data = features, counts, section, offset = simulate(n_spots=n_spots, n_sections=2)
    weights = np.random.default_rng(0).normal(size=(4, 5))
    value, gradient = at_weights(design_of(*data, objective=objective), weights)
    free = torch.tensor(weights, requires_grad=True)
    for s in range(2):
        rows = section == s
        scores = torch.as_tensor(features[rows]) @ free
        arguments = {
            "section": torch.zeros(rows.sum(), dtype=torch.long),
            "offset": torch.as_tensor(offset[rows]),
        }
        observed = torch.as_tensor(counts[rows])
        if objective == "list":
            loss = list_loss(scores, observed, reduction="none", **arguments).sum(0)
        else:
            loss = pair_loss(scores, observed, reduction="none", n_partners=None, **arguments)
            loss = loss.sum((0, 1)) / (rows.sum() - 1)
        # Linear in the offset, whatever the weights: the solver drops it.
        constant = torch.as_tensor(counts[rows].T @ offset[rows])
        value = value - constant - loss.detach()
        gradient = gradient - torch.autograd.grad(loss.sum(), free)[0]
    torch.testing.assert_close(value, torch.zeros(5).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros(4, 5).double(), atol=1e-8, rtol=0)


def test_all_partners_are_all_pairs_and_few_come_near():
    data = simulate(n_spots=300, n_features=3, rate=30)
    every = solve(data, 1.0, objective="pair").weights
    for many in (99, 500):
        np.testing.assert_array_equal(
            solve(data, 1.0, objective="pair", n_partners=many).weights, every
        )
    few = [solve(data, 1.0, objective="pair", n_partners=n).weights for n in (2, 40)]
    error = [np.abs(weights - every).max() for weights in few]
    assert 0 < error[1] < error[0] < 0.1
    again = solve(data, 1.0, objective="pair", n_partners=2, seed=0).weights
    np.testing.assert_array_equal(again, few[0])
    assert (solve(data, 1.0, objective="pair", n_partners=2, seed=1).weights != few[0]).any()


def test_recovers_known_slopes():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(4000, 2))
    section = np.arange(4000) % 5
    scale = np.array([0.1, 1, 5, 20, 100])[section]
    counts = rng.poisson(10 * scale * np.exp(features @ [0.7, -0.3]))[:, None]
    weights = solve((features, counts, section, np.zeros(4000)), 1.0).weights
    # About 1e6 counts: the standard error is near 1e-3; 6 of them.
    np.testing.assert_allclose(weights[:, 0], [0.7, -0.3], atol=6e-3)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**31),
    penalty=st.sampled_from([0.1, 10.0, 1000.0]),
    objective=st.sampled_from(["list", "pair"]),
)
def test_invariances(seed, penalty, objective):
    features, counts, section, offset = simulate(n_spots=24, n_genes=3, seed=seed)
    expected = solve((features, counts, section, offset), penalty, objective=objective).weights
    rng = np.random.default_rng(seed)
    order = rng.permutation(24)
    permuted = [values[order] for values in (features, counts, section, offset)]
    shifted = features + rng.normal(size=(3, 4))[section]
    deeper = offset + rng.normal(size=3)[section]
    relabelled = np.array([2, 0, 1])[section]
    for changed in (
        permuted,
        (shifted, counts, section, deeper),
        (features, counts, relabelled, offset),
    ):
        got = solve(changed, penalty, objective=objective).weights
        np.testing.assert_allclose(got, expected, atol=1e-6, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_the_bounds_hold(seed):
    data = features, _, section, _ = simulate(n_spots=30, n_genes=3, seed=seed)
    rough = solve(data, 2.0, max_iterations=2)
    exact = solve(data, 2.0, tolerance=1e-11)
    excess = rough.objective - exact.objective
    assert (excess >= -1e-9).all()
    assert (excess <= rough.excess + 1e-9).all()
    scale = standardised(features, section)[1][:, None]
    distance = np.linalg.norm((rough.weights - exact.weights) * scale, axis=0)
    assert (distance <= rough.distance + 1e-9).all()


def few_spots_decide(total, n_spots=120, n_features=24, n_genes=3):
    """Collinear features, and genes whose counts lie mostly in a few spots: curved unlike most."""
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(n_features, n_features)))[0]
    features = rng.normal(size=(n_spots, n_features)) * np.geomspace(1, 0.01, n_features) @ turned
    features /= features.std(0)
    rates = np.exp(1.5 * features @ rng.normal(size=(n_features, n_genes)))
    rates *= np.exp(0.5 * rng.normal(size=rates.shape))
    counts = rng.poisson(total * rates / rates.sum(0))
    return features, counts, np.arange(n_spots) % 3, np.zeros(n_spots)


@pytest.mark.parametrize("total", [1e3, 1e6])
def test_converged_weights_are_near_the_optimum_however_many_counts(total):
    """A gradient of 1e-5 of a million counts leaves more than the weights themselves."""
    data = features, counts, section, offset = few_spots_decide(total)
    penalty = 0.1
    solution = solve(data, penalty, tolerance=1e-5)
    assert solution.converged.all()
    assert (solution.relative_distance <= 0.01).all()
    assert float(solution.message.split(" off by at most ")[1].split(" %")[0]) <= 1
    standard, scale = standardised(features, section)
    expected = [newton(standard, counts[:, g], section, offset, penalty) for g in range(3)]

    def distance(weights):
        """Relative to the norm of the optimum, in the metric of the penalty."""
        off = np.linalg.norm(weights * scale[:, None] - np.transpose(expected), axis=0)
        return off / np.linalg.norm(expected, axis=1)

    assert (distance(solution.weights) <= 1.02 * solution.relative_distance).all()
    design = design_of(*data)
    problem = design.training(design.block(slice(0, 3), design.data.counts), penalty)
    start = torch.zeros_like(problem.xtc)
    stopped = descend(problem, start, tolerance=1e-5, max_iterations=500)
    assert (stopped.error(problem) <= 1e-5).all()
    weights = problem.geometry.basis @ stopped.axes * problem.geometry.unit[:, None]
    assert distance(weights.numpy()).max() > (0.5 if total > 1e5 else 0.003)


def test_what_the_distance_misses_is_not_converged():
    """The gradient is small, but no iteration is left to come nearer."""
    data, beside = few_spots_decide(1e6), 0
    for iterations in range(60, 150, 10):
        found = solve(data, 0.1, tolerance=1e-5, max_iterations=iterations)
        small = found.gradient <= 1e-5
        np.testing.assert_array_equal(found.converged, small & (found.relative_distance <= 0.01))
        if (small & ~found.converged).any():
            beside += 1
            assert "or of the distance to the optimum): raise max_iterations" in found.message
    assert beside


@pytest.mark.parametrize("objective", ["list", "pair"])
@pytest.mark.parametrize("iterations", [0, 1])
def test_the_bounds_are_as_tight_as_the_penalty_is_large(objective, iterations):
    """The curvature is above the penalty by no more than the counts allow."""
    data = features, counts, section, _ = simulate(rate=0.5)
    penalty = 1e4
    rough = solve(data, penalty, objective=objective, max_iterations=iterations)
    exact = solve(data, penalty, objective=objective, tolerance=1e-12)
    scale = standardised(features, section)[1][:, None]
    distance = np.linalg.norm((rough.weights - exact.weights) * scale, axis=0)
    # Counts times variance, which is near 1 for standardised features.
    least = penalty / (penalty + 3 * counts.sum(0))
    assert least.min() > 0.9
    for share in (distance / rough.distance, (rough.objective - exact.objective) / rough.excess):
        assert (share <= 1 + 1e-9).all()
        assert (share >= least).all()


def test_hard_genes_end_with_an_honest_status():
    data = _, counts, section, _ = simulate(n_genes=6)
    counts[:, 0] = 0
    counts[section != 1, 1] = 0
    counts[:, 2] = 0
    counts[np.argmax(data[0][:, 0]), 2] = 5
    penalised = solve(data, 1.0)
    assert penalised.status.tolist() == [
        Status.NO_COUNTS,
        Status.ONE_SECTION,
        Status.ONE_SPOT,
        *[Status.CONVERGED] * 3,
    ]
    assert penalised.converged.tolist() == [False, *[True] * 5]
    assert (penalised.weights[:, 0] == 0).all()
    assert "1 genes: no counts" in penalised.message
    # One spot holds all counts: without a penalty the optimum is at infinity.
    free = solve(data, 0.0, tolerance=1e-5)
    assert free.status[2] == Status.NO_OPTIMUM
    assert not free.converged[2]
    assert free.converged[3:].all()
    assert "give a penalty" in free.message
    assert np.isfinite(free.weights).all()
    assert np.isinf(free.excess).all()
    assert "without a penalty nothing bounds how far" in free.message
    stopped = solve(data, 1.0, max_iterations=1)
    assert stopped.status[3] == Status.MAX_ITERATIONS
    assert "raise max_iterations, penalty or tolerance" in stopped.message


def test_without_a_penalty_many_features_separate_every_gene():
    data = simulate(n_spots=20, n_features=30, rate=0.7)
    solution = solve(data, 0.0, tolerance=1e-5)
    assert (solution.status == Status.NO_OPTIMUM).all()


def test_more_features_than_spots_collinear_and_constant_features():
    data = features, counts, section, offset = simulate(n_spots=20, n_features=30)
    features[:, 3] = features[:, 4]
    features[:, 5] = 7.0
    solution = solve(data, 1.0, tolerance=1e-10)
    assert solution.converged.all()
    standard, scale = standardised(features, section)
    for g in range(2):
        expected = newton(standard, counts[:, g], section, offset, 1.0) / scale
        np.testing.assert_allclose(solution.weights[:, g], expected, atol=1e-7)
    np.testing.assert_allclose(solution.weights[3], solution.weights[4], rtol=1e-6)
    assert np.abs(solution.weights[5]).max() < 1e-12


@pytest.mark.parametrize("objective", ["list", "pair"])
def test_sections_of_one_spot_change_nothing_but_the_scale(objective):
    data = simulate()
    expected = solve(data, 0.0, objective=objective)
    one = [[[9.0, -9, 3, 1]], [[50, 0, 9, 1, 1000]], [3], [2.0]]
    more = [np.concatenate([a, b]) for a, b in zip(data, one, strict=True)]
    got = solve(more, 0.0, objective=objective)
    np.testing.assert_allclose(got.weights, expected.weights, atol=1e-7, rtol=1e-6)


def test_counts_in_a_section_of_one_spot_only_say_nothing():
    features, counts, section, offset = simulate()
    section[section == 2] = 1
    section[-1] = 2
    counts[:-1, 0] = 0
    counts[-1, 0] = 9
    solution = solve((features, counts, section, offset), 1.0)
    assert solution.status[0] == Status.NOTHING_VARIES
    assert (solution.weights[:, 0] == 0).all()


def test_genes_far_from_the_shared_curvature_converge_too():
    data = features, counts, section, offset = simulate(
        n_spots=400, n_features=60, n_genes=3, rate=50
    )
    solution = solve(data, 1.0, tolerance=1e-10)
    assert (solution.status == Status.CONVERGED).all()
    standard, scale = standardised(features, section)
    expected = newton(standard, counts[:, 0], section, offset, 1.0) / scale
    np.testing.assert_allclose(solution.weights[:, 0], expected, atol=1e-7)


def test_penalties_per_gene():
    data = simulate()
    penalty = np.array([0.1, 1, 10, 100, 1000.0])
    together = solve(data, penalty).weights
    for g, p in enumerate(penalty):
        np.testing.assert_allclose(together[:, g], solve(data, p).weights[:, g], rtol=1e-6)


@pytest.mark.parametrize(
    ("penalty", "plan", "message"),
    [
        (-1.0, {}, "penalty must not be negative"),
        (np.nan, {}, "must be finite"),
        (1.0, {"max_memory": 1e-6}, "too little for 4 features and 60 spots at once"),
        (1.0, {"objective": "lists"}, "objective must be one of"),
        (1.0, {"objective": "pair", "n_partners": 0}, "n_partners must be at least 1"),
    ],
)
def test_errors_name_the_argument(penalty, plan, message):
    with pytest.raises(ValueError, match=message):
        solve(simulate(), penalty, **plan)


@pytest.mark.parametrize("objective", ["list", "pair"])
def test_blocks_of_genes_change_nothing(objective):
    """Little memory cuts genes into blocks, and features into rows that are read again."""
    data = simulate(n_spots=160, n_features=20, n_genes=40, n_sections=4)
    whole = solve(data, 3.0, objective=objective)
    little = {"objective": objective, "max_memory": 0.00024}
    design = design_of(*data, **little)
    done: list[int] = []
    assert len(list(design.each_block(lambda block: block.genes, done.append))) > 2
    assert sum(done) == 40
    assert design.rows.block < 40
    parts = solve(data, 3.0, **little)
    np.testing.assert_allclose(parts.weights, whole.weights, atol=1e-7)
    np.testing.assert_array_equal(parts.status, whole.status)


def test_single_precision_reaches_the_same_optimum():
    features, counts, section, offset = simulate(n_spots=300, n_features=20)
    data = features.astype(np.float32).astype(float), counts, section, offset
    double = solve(data, 1.0, tolerance=1e-10)
    single = solve((features.astype(np.float32), *data[1:]), 1.0, tolerance=1e-5)
    assert single.converged.all()
    assert (single.objective - double.objective <= single.excess + 1e-6).all()
    # Beyond what float32 resolves, it goes on in float64.
    finer = solve((features.astype(np.float32), *data[1:]), 1.0, tolerance=1e-8)
    assert finer.converged.all()
    np.testing.assert_allclose(finer.weights, double.weights, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same():
    data = simulate(n_spots=300, n_features=20)
    on_gpu = (torch.as_tensor(data[0], device="cuda"), *data[1:])
    np.testing.assert_allclose(solve(on_gpu, 1.0).weights, solve(data, 1.0).weights, atol=1e-6)


def test_threads_with_blocks_of_their_own_change_nothing():
    data = simulate(n_spots=200, n_features=8, n_genes=300)
    expected, before = solve(data, 3.0), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        blocks = list(design_of(*data).each_block(lambda block: block.genes))
        got = solve(data, 3.0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert blocks == [slice(0, 150), slice(150, 300)]
    np.testing.assert_allclose(got.weights, expected.weights, atol=1e-9)
