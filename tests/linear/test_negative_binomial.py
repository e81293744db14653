"""The negative binomial of a level for each section and gene, and its dispersion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.optimize import brentq, minimize

from strank import STRankRegressor, STRankRegressorCV
from strank.functional.pointwise import negative_binomial_loss
from strank.linear.data import gather
from strank.linear.design import Design
from strank.linear.dispersion import PARTS, by_moments
from strank.linear.exact import Status, fit_genes
from strank.linear.objective import NegativeBinomialLikelihood, value_and_gradient

DISPERSION = np.array([0.01, 0.2, 0.5, 1.0, 3.0])


def simulate(dispersion=DISPERSION, n_spots=90, n_features=4, n_sections=3, seed=0, rate=5.0):
    rng = np.random.default_rng(seed)
    features, dispersion = rng.normal(size=(n_spots, n_features)), np.asarray(dispersion)
    section = np.sort(np.arange(n_spots) % n_sections)
    depth = rng.lognormal(0, 0.6, n_spots)
    slopes = rng.normal(size=(n_features, len(dispersion))) * 0.5
    level = rng.normal(size=(n_sections, len(dispersion)))[section]
    mean = rate * depth[:, None] * np.exp(features @ slopes + level)
    noise = rng.gamma(1 / np.maximum(dispersion, 1e-9), dispersion, mean.shape)
    counts = rng.poisson(mean * np.where(dispersion > 0, noise, 1))
    return (features, counts, section, np.log(depth)), slopes


def design_of(data, dispersion=DISPERSION, **plan) -> Design:
    features, counts, section, offset = data
    design = Design(gather(features, sparse.csr_matrix(counts), section, offset), "nb", **plan)
    return design.with_dispersion(dispersion)


def solve(data, dispersion=DISPERSION, penalty=1.0, **plan):
    design = design_of(data, dispersion, **plan)
    penalty = np.full(design.n_genes, penalty)
    return fit_genes(design, penalty, tolerance=1e-10, max_iterations=500)


def regressor(data, model):
    features, counts, section, offset = data
    return model.fit(features, counts, section=section, offset=offset)


def likelihood_of(counts, offset, dispersion, dtype=torch.float64):
    counts = torch.as_tensor(np.asarray(counts, dtype=float))
    many = torch.full((counts.shape[1],), float(dispersion), dtype=torch.float64)
    offset = torch.as_tensor(offset, dtype=torch.float64)
    return NegativeBinomialLikelihood([offset], counts.sum(0)[None], [counts], many)


def test_same_optimum_as_a_glm_with_a_term_for_every_section():
    """statsmodels, by iteratively reweighted least squares over weights and levels together."""
    from statsmodels.genmod.families import NegativeBinomial
    from statsmodels.genmod.generalized_linear_model import GLM

    data, _ = simulate()
    features, counts, section, offset = data
    solution = solve(data, penalty=0.0)
    assert (solution.status == Status.CONVERGED).all()
    both = np.column_stack([features, np.eye(3)[section]])
    for g, alpha in enumerate(DISPERSION):
        glm = GLM(counts[:, g], both, family=NegativeBinomial(alpha=alpha), offset=offset)
        expected = glm.fit(tol=1e-14, maxiter=300).params[:4]
        np.testing.assert_allclose(solution.weights[:, g], expected, atol=1e-7)


def plain(weights, data, g, phi, penalty):
    """Weights and levels to the penalised objective, as its definition reads."""
    features, counts, section, offset = data
    w, level, c = weights[:4], weights[4:], counts[:, g]
    scores = features @ w + offset + level[section]
    value = (c + 1 / phi) * np.log1p(phi * np.exp(scores)) - c * scores
    means = np.stack([features[section == s].mean(0) for s in range(3)])
    variance = ((features - means[section]) ** 2).mean(0)
    return value.sum() + 0.5 * penalty * (variance * w**2).sum()


@pytest.mark.parametrize("penalty", [0.3, 30.0])
def test_same_optimum_as_lbfgs_of_its_definition(penalty):
    data, _ = simulate()
    found = solve(data, penalty=penalty).weights
    for g, phi in enumerate(DISPERSION):
        options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9}
        expected = minimize(
            plain, np.zeros(7), (data, g, phi, penalty), method="L-BFGS-B", options=options
        )
        np.testing.assert_allclose(found[:, g], expected.x[:4], atol=1e-4)


def problem_of(data):
    design = design_of(data)
    block = design.block(slice(0, 5), design.data.counts)
    return design.training(block, 2.0), design.geometry(None).basis


def test_objective_and_gradient_are_those_of_the_loss():
    """Autograd through the loss, whose level is found in another way."""
    data, _ = simulate()
    problem, basis = problem_of(data)
    weights = torch.as_tensor(np.random.default_rng(1).normal(size=(4, 5)))
    axes = torch.linalg.lstsq(basis, weights).solution
    value, gradient = value_and_gradient(problem, axes)
    value, gradient = value - (axes**2).sum(0), gradient - 2 * axes
    start, _ = value_and_gradient(problem, torch.zeros_like(axes))
    features, counts, section, offset = (torch.as_tensor(each) for each in data)
    free = weights.clone().requires_grad_()
    told = {"section": section, "offset": offset, "dispersion": torch.as_tensor(DISPERSION)}
    told |= {"free_level": True, "reduction": "none"}
    loss = negative_binomial_loss(features @ free, counts, **told).sum(0)
    none = negative_binomial_loss(0 * features @ free, counts, **told).sum(0)
    torch.testing.assert_close(value - start, (loss - none).detach(), atol=1e-8, rtol=0)
    expected = torch.autograd.grad(loss.sum(), free)[0]
    torch.testing.assert_close(basis.T @ expected, gradient, atol=1e-8, rtol=0)


def test_the_gradient_is_that_of_finite_differences():
    problem, _ = problem_of(simulate()[0])
    axes = torch.as_tensor(np.random.default_rng(1).normal(size=(4, 5)))
    gradient = value_and_gradient(problem, axes)[1]
    for axis in range(4):
        step = torch.zeros_like(axes)
        step[axis] = 1e-5
        ends = [value_and_gradient(problem, axes + side * step)[0] for side in (1, -1)]
        torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, gradient[axis], rtol=1e-6, atol=1e-5)


def test_without_dispersion_it_is_the_list():
    data, _ = simulate()
    features, counts, section, offset = data
    given = gather(features, sparse.csr_matrix(counts), section, offset)
    of_list = fit_genes(Design(given), np.full(5, 2.0), tolerance=1e-10, max_iterations=500)
    far = []
    for phi in (0.0, 1e-6, 1e-4, 1e-2):
        found = solve(data, phi, penalty=2.0)
        assert found.converged.all()
        far.append(np.abs(found.weights - of_list.weights).max())
        if phi == 0:
            np.testing.assert_allclose(found.objective, of_list.objective, rtol=1e-12, atol=1e-6)
    assert far[0] < 1e-9
    # In proportion to the dispersion, as long as it is small.
    assert far[1] < 1e-4
    assert far[2] == pytest.approx(100 * far[1], rel=0.1)
    assert far[3] > 10 * far[2]


@pytest.mark.parametrize("seed", range(3))
def test_a_section_has_no_more_than_a_level_of_its_own(seed):
    """Deeper sections, other stains and other names change nothing, the order of spots neither."""
    data, _ = simulate(seed=seed)
    features, counts, section, offset = data
    expected, rng = solve(data).weights, np.random.default_rng(seed)
    order = rng.permutation(90)
    for changed in (
        [values[order] for values in data],
        (features + rng.normal(size=(3, 4))[section], counts, section, offset),
        (features, counts, section, offset + 5 * rng.normal(size=3)[section]),
        (features, counts, np.array([2, 0, 1])[section], offset),
    ):
        np.testing.assert_allclose(solve(changed).weights, expected, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dispersion", [0.0, 1e-6, 0.3, 100.0])
@pytest.mark.parametrize("spread", [0.0, 1.0, 20.0, 1e4])
def test_at_its_level_counts_are_as_far_above_as_below_what_is_expected(spread, dispersion, dtype):
    """Whatever the scores; a gene without counts expects none, and has no likelihood."""
    rng = np.random.default_rng(2)
    counts = rng.negative_binomial(0.5, 0.1, (40, 3))
    counts[:, 2] = 0
    likelihood = likelihood_of(counts, rng.normal(size=40), dispersion)
    scores = torch.as_tensor(spread * rng.normal(size=(40, 3))).to(dtype)
    value = likelihood.section(0, scores)
    assert value.dtype == torch.float64
    assert torch.isfinite(value).all()
    assert value[2] == 0
    assert (scores[:, 2] == 0).all()
    far, rounding = scores.double().abs().sum(0), 1e-5 if dtype == torch.float32 else 1e-9
    assert (far[:2] > 0.01).all()
    assert (scores.double().sum(0).abs() <= rounding * far).all()


def test_hard_genes_end_with_an_honest_status():
    data = simulate()[0]
    counts = data[1]
    counts[:, 0] = 0
    counts[data[2] != 1, 1] = 0
    counts[:, 2] = 0
    counts[np.argmax(data[0][:, 0]), 2] = 5
    expected = [Status.NO_COUNTS, Status.ONE_SECTION, Status.ONE_SPOT, *[Status.CONVERGED] * 2]
    assert solve(data).status.tolist() == expected
    free = solve(data, penalty=0.0)
    assert free.status[2] == Status.NO_OPTIMUM
    assert np.isfinite(free.weights).all()


def test_sections_of_one_spot_change_nothing():
    data = simulate()[0]
    one = [[[9.0, -9, 3, 1]], [[50, 0, 9, 1, 1000]], [3], [2.0]]
    more = [np.concatenate([a, b]) for a, b in zip(data, one, strict=True)]
    expected = solve(data, penalty=0.0).weights
    np.testing.assert_allclose(solve(more, penalty=0.0).weights, expected, atol=1e-7, rtol=1e-6)


def test_blocks_of_genes_and_single_precision_change_nothing():
    many = np.tile(DISPERSION, 8)
    data, _ = simulate(many, n_spots=160, n_features=20, n_sections=4)
    features, *rest = data
    data = features.astype(np.float32).astype(float), *rest
    whole = solve(data, many)
    design = design_of(data, many, max_memory=0.0005)
    assert len(list(design.each_block(lambda block: block.genes))) > 2
    np.testing.assert_allclose(
        solve(data, many, max_memory=0.0005).weights, whole.weights, atol=1e-7
    )
    single = solve((features.astype(np.float32), *rest), many)
    np.testing.assert_allclose(single.weights, whole.weights, atol=1e-6)


def test_moments_are_those_of_their_definition():
    data, _ = simulate()
    features, counts, section, offset = data
    phi, mean = np.zeros(5), np.empty(counts.shape)
    for _ in range(3):
        scores = features @ solve(data, phi, penalty=5.0).weights + offset[:, None]
        for s, g in np.ndindex(3, 5):
            rows, p = section == s, max(phi[g], 1e-12)
            c, r = counts[rows, g], scores[rows, g]
            level = lambda a, c=c, r=r, p=p: ((c - np.exp(r + a)) / (1 + p * np.exp(r + a))).sum()  # noqa: E731
            mean[rows, g] = np.exp(r + brentq(level, -30, 30, xtol=1e-12))
        weight = (1 + phi * mean) ** -2
        phi = (weight * ((counts - mean) ** 2 - mean)).sum(0) / (weight * mean**2).sum(0)
        phi = np.maximum(phi, 0)
    assert phi.max() > 1
    np.testing.assert_allclose(by_moments(design_of(data, 0.0), np.full(5, 5.0)), phi, rtol=1e-3)


def test_moments_find_the_dispersion():
    true = np.array([0.0, 0.03, 0.1, 0.3, 1.0])
    data, _ = simulate(true, n_spots=6000, seed=3, rate=8.0)
    found = by_moments(design_of(data, 0.0), np.full(5, 1.0))
    np.testing.assert_allclose(found, true, rtol=0.1, atol=0.01)
    # Counts nearer to each other than chance would have it show none.
    even = data[0], np.full((6000, 5), 7), data[2], np.zeros(6000)
    assert (by_moments(design_of(even, 0.0), np.full(5, 1.0)) == 0).all()


def test_where_counts_vary_beyond_chance_it_is_nearer_to_the_truth_than_the_list():
    errors = {"list": [], "nb": []}
    for seed in range(4):
        data, slopes = simulate(np.ones(20), n_spots=300, seed=seed, rate=20.0)
        for objective, error in errors.items():
            found = regressor(data, STRankRegressor(1.0, objective=objective))
            error.append(((found.coef_.T - slopes) ** 2).mean())
    # The variance of an estimate without weights over that of the best one: measured .25 to .5.
    assert np.mean(errors["nb"]) < 0.7 * np.mean(errors["list"])


def test_poisson_counts_lose_nothing():
    data, _ = simulate(np.zeros(5), n_spots=300, seed=1)
    of_list = regressor(data, STRankRegressor(1.0)).coef_
    found = regressor(data, STRankRegressor(1.0, objective="nb"))
    np.testing.assert_allclose(found.coef_, of_list, atol=0.02)


@pytest.mark.parametrize("shared", [False, True])
def test_dispersion_and_penalty_are_those_of_the_best_held_out_list(shared):
    data, _ = simulate(np.linspace(0.1, 2, 5), seed=4)
    penalties = [100.0, 10.0, 1.0]
    model = STRankRegressorCV(penalties, objective="nb", shared=shared)
    model = regressor(data, model)
    losses = model.choice_.held_out
    assert losses.shape == (6, 5)
    best = np.full(5, losses.sum(1).argmin()) if shared else losses.argmin(0)
    most = by_moments(design_of(data, 0.0), np.full(5, 300.0))
    np.testing.assert_allclose(model.dispersion_, np.repeat(PARTS, 3)[best] * most)
    np.testing.assert_array_equal(model.penalty_, np.tile(penalties, 2)[best])
    fixed = regressor(data, STRankRegressor(model.penalty_, objective="nb"))
    fixed.set_params(dispersion=model.dispersion_)
    np.testing.assert_allclose(regressor(data, fixed).coef_, model.coef_, atol=1e-4)
    # By hand, of one candidate: fits without a section, and the list loss of that.
    features, counts, section, offset = data
    by_hand = np.zeros(5)
    for s in range(3):
        kept = section != s
        alone = [values[kept] for values in data]
        fit = STRankRegressor(10.0, objective="nb", dispersion=0.5 * most, tolerance=1e-8)
        scores = regressor(alone, fit).predict(features[~kept]) + offset[~kept, None]
        share = np.exp(scores - np.logaddexp.reduce(scores))
        by_hand -= (counts[~kept] * np.log(share)).sum(0)
        by_hand += counts[~kept].T @ offset[~kept]
    # As near as a path needs to be.
    np.testing.assert_allclose(losses[4], by_hand, rtol=3e-4)


def test_errors_name_the_argument():
    data, _ = simulate()
    for options, message in [
        ({"dispersion": 1.0}, "dispersion is of objective 'nb'; list has none"),
        ({"objective": "nb", "dispersion": [1.0, 2.0]}, "one for each of 5 genes; got shape"),
        ({"objective": "nb", "dispersion": -1.0}, "dispersion must not be negative"),
        ({"objective": "nb", "dispersion": np.inf}, "dispersion must not be negative, and must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            regressor(data, STRankRegressor(**options))
    with pytest.raises(ValueError, match="borrow=True is for objective 'list' or 'pair'"):
        regressor(data, STRankRegressorCV(objective="nb", borrow=True))
