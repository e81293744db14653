"""Agreement with other libraries, up to the constants that they leave in or out."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from scipy import stats
from scipy.special import gammaln
from torch.nn import functional

from strank.functional.listwise import list_loss, pearson_loss
from strank.functional.pairwise import all_pairs, margin_ranking_loss, pair_loss
from strank.functional.pointwise import mse_loss, negative_binomial_loss, poisson_loss

PHI = torch.tensor(0.4, dtype=torch.float64)


@pytest.fixture
def logits(batch):
    return batch["scores"] + batch["offset"][:, None]


def call(loss, batch, **options):
    return loss(
        batch["scores"],
        batch["counts"],
        section=batch["section"],
        offset=batch["offset"],
        **({"reduction": "sum"} | options),
    )


def close(got, expected):
    np.testing.assert_allclose(got.numpy(), np.asarray(expected), rtol=1e-10, atol=1e-12)


def test_list_is_a_multinomial_likelihood(batch, logits):
    total = 0.0
    for label in batch["section"].unique():
        rows = batch["section"] == label
        counts, shares = batch["counts"][rows].numpy(), logits[rows].softmax(0).numpy()
        total -= stats.multinomial.logpmf(counts.T, counts.sum(0), shares.T).sum()
        total += (gammaln(counts.sum(0) + 1) - gammaln(counts + 1).sum(0)).sum()
    close(call(list_loss, batch), total)


def test_list_of_one_section_is_cross_entropy_with_counts_as_targets(batch, logits):
    batch["section"] = torch.zeros(9).long()
    expected = functional.cross_entropy(logits.T, batch["counts"].T, reduction="none")
    close(call(list_loss, batch, reduction="none").sum(0), expected)


def test_pair_is_a_binomial_likelihood(batch, logits):
    i, j = all_pairs(batch["section"]).unbind(1)
    counts, chance = batch["counts"].numpy(), (logits[i] - logits[j]).sigmoid().numpy()
    a, b = counts[i], counts[j]
    coefficient = gammaln(a + b + 1) - gammaln(a + 1) - gammaln(b + 1)
    expected = coefficient - stats.binom.logpmf(a, a + b, chance)
    close(call(pair_loss, batch, n_partners=None, reduction="none").sum(1), expected)


def test_pair_is_binary_cross_entropy(batch, logits):
    i, j = all_pairs(batch["section"]).unbind(1)
    total = batch["counts"][i] + batch["counts"][j]
    share = batch["counts"][i] / total.clamp(min=1)
    expected = functional.binary_cross_entropy_with_logits(
        logits[i] - logits[j], share, weight=total, reduction="sum"
    )
    close(call(pair_loss, batch, n_partners=None), expected)


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0])
def test_margin_ranking_is_that_of_torch(batch, margin):
    i, j = all_pairs(batch["section"]).unbind(1)
    rates = batch["counts"] / batch["offset"].exp()[:, None]
    sign = (rates[i] - rates[j]).sign()
    torch_loss = torch.nn.MarginRankingLoss(margin, reduction="none")
    each = torch_loss(batch["scores"][i], batch["scores"][j], sign)
    options = {"n_partners": None, "margin": margin}
    got = call(margin_ranking_loss, batch, **options, reduction="mean")
    close(got, each[sign != 0].mean())
    published = torch_loss(
        batch["scores"][i], batch["scores"][j], torch.where(sign > 0, 1.0, -1.0)
    ).mean()
    close(call(margin_ranking_loss, batch, **options, ties="second", reduction="mean"), published)


def test_pearson_is_that_of_numpy(batch):
    y = (1e4 * batch["counts"] / batch["offset"].exp()[:, None]).log1p().numpy()
    x = batch["scores"].numpy()
    pooled = [-np.corrcoef(x[:, g], y[:, g])[0, 1] for g in range(4)]
    close(call(pearson_loss, batch, reduction="none", pooled=True)[0], pooled)
    got = call(pearson_loss, batch, reduction="none")
    rows = batch["section"].numpy() == 5
    # Sections in sorted order: -1, 2, 5, 8.
    close(got[2], [-np.corrcoef(x[rows, g], y[rows, g])[0, 1] for g in range(4)])
    assert got[[0, 3]].eq(0).all()


def test_mse_is_that_of_torch(batch):
    target = (1e4 * batch["counts"] / batch["offset"].exp()[:, None]).log1p()
    for reduction in ("mean", "sum", "none"):
        expected = functional.mse_loss(batch["scores"], target, reduction=reduction)
        close(call(mse_loss, batch, reduction=reduction), expected)


def test_poisson_is_that_of_torch_and_scipy(batch, logits):
    each = call(poisson_loss, batch, reduction="none")
    close(
        each,
        functional.poisson_nll_loss(logits, batch["counts"], log_input=True, reduction="none"),
    )
    likelihood = stats.poisson.logpmf(batch["counts"].numpy(), logits.exp().numpy())
    close(each, -likelihood - gammaln(batch["counts"].numpy() + 1))


@pytest.mark.parametrize("phi", [1e-2, 0.4, 1.0, 7.0])
def test_negative_binomial_is_that_of_scipy(batch, logits, phi):
    size, mean = 1 / phi, logits.exp().numpy()
    expected = -stats.nbinom.logpmf(batch["counts"].numpy(), size, size / (size + mean))
    dispersion = torch.tensor(phi, dtype=torch.float64)
    close(call(negative_binomial_loss, batch, reduction="none", dispersion=dispersion), expected)


def test_negative_binomial_of_little_dispersion_is_poisson(batch):
    poisson = call(poisson_loss, batch, reduction="none").numpy()
    poisson = poisson + gammaln(batch["counts"].numpy() + 1)
    got = call(negative_binomial_loss, batch, reduction="none", dispersion=1e-7)
    np.testing.assert_allclose(got.numpy(), poisson, rtol=1e-4, atol=1e-5)


FAMILIES = {
    "poisson": (sm.families.Poisson(), poisson_loss, {}),
    "nb": (sm.families.NegativeBinomial(alpha=0.4), negative_binomial_loss, {"dispersion": PHI}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_free_level_is_an_intercept_of_each_section(batch, logits, family):
    family, loss, options = FAMILIES[family]
    rows = batch["section"] == 5
    for g in range(4):
        counts = batch["counts"][rows, g].numpy()
        fit = sm.GLM(
            counts, np.ones(len(counts)), family=family, offset=logits[rows, g].numpy()
        ).fit(tol=1e-14, maxiter=200)
        # Its likelihood has the constant log c!, which the Poisson loss leaves out.
        constant = 0.0 if options else gammaln(counts + 1).sum()
        got = call(loss, batch, reduction="none", free_level=True, **options)[rows, g].sum()
        assert got.item() == pytest.approx(-fit.llf - constant, rel=1e-10)
