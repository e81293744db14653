"""The table of all losses: each with its plain definition and the laws it obeys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import lgamma, log, log1p
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from strank.functional.listwise import list_loss, pearson_loss
from strank.functional.pairwise import margin_ranking_loss, pair_loss
from strank.functional.pointwise import mse_loss, negative_binomial_loss, poisson_loss

Vector = NDArray[np.float64]

# The definitions: one gene, spot by spot, without torch. They get scores, counts, section and
# offset of the spots that take part, and give the elements of the loss; NaN is no element.


def mates(section: Vector, i: int) -> list[int]:
    return [j for j in range(len(section)) if section[j] == section[i]]


def plain_list(r, c, section, offset):
    def log_total(i):
        return np.logaddexp.reduce([r[j] + offset[j] for j in mates(section, i)])

    return [-c[i] * (r[i] + offset[i] - log_total(i)) for i in range(len(r))]


def each_pair(section):
    return [(i, j) for i in range(len(section)) for j in mates(section, i) if i < j]


def both_ways(section):
    return [(i, j) for i in range(len(section)) for j in mates(section, i) if i != j]


def plain_pair(r, c, section, offset, *, pairs=each_pair):
    terms = []
    for i, j in pairs(section):
        a, b = r[i] + offset[i], r[j] + offset[j]
        terms += [-c[i] * (a - np.logaddexp(a, b)), -c[j] * (b - np.logaddexp(a, b))]
    return terms


def plain_margin(r, c, section, offset, *, pairs=each_pair, margin=1.0, ties=np.nan):
    terms = []
    for i, j in pairs(section):
        first, second = c[i] / np.exp(offset[i]), c[j] / np.exp(offset[j])
        sign = 1 if first > second else -1 if first < second else ties
        terms.append(max(margin - sign * (r[i] - r[j]), 0.0))
    return terms


def target(c, offset):
    """Counts per 10k where there is a library size, as in `mse_loss`."""
    return log1p(c * 1e4 / np.exp(offset))


def plain_pearson(r, c, section, offset):
    values = []
    for label in sorted(set(section)):
        rows = [i for i in range(len(r)) if section[i] == label]
        y = np.array([target(c[i], offset[i]) for i in rows])
        x = np.array([r[i] for i in rows])
        x, y = x - x.mean(), y - y.mean()
        norm = ((x**2).sum() * (y**2).sum()) ** 0.5
        values.append(-(x * y).sum() / norm if norm > 0 else np.nan)
    return values


def plain_pooled(r, c, section, offset):
    return plain_pearson(r, c, np.zeros_like(section), offset)


def plain_mse(r, c, section, offset):
    return [(r[i] - target(c[i], offset[i])) ** 2 for i in range(len(r))]


def plain_poisson(r, c, section, offset):
    return [np.exp(r[i] + offset[i]) - c[i] * (r[i] + offset[i]) for i in range(len(r))]


def plain_poisson_free(r, c, section, offset):
    values = []
    for i in range(len(r)):
        rows = mates(section, i)
        total = sum(c[j] for j in rows)
        log_share = r[i] + offset[i] - np.logaddexp.reduce([r[j] + offset[j] for j in rows])
        log_rate = log_share + log(total) if total else 0.0
        values.append(np.exp(log_rate) - c[i] * log_rate if total else 0.0)
    return values


def nb_term(c, log_rate, phi):
    log_odds = log_rate + log(phi)
    log_success = -np.logaddexp(0, -log_odds)
    log_failure = -np.logaddexp(0, log_odds)
    coefficient = lgamma(c + 1 / phi) - lgamma(1 / phi) - lgamma(c + 1)
    return -coefficient - c * log_success - log_failure / phi


def plain_nb(r, c, section, offset, *, phi):
    return [nb_term(c[i], r[i] + offset[i], phi) for i in range(len(r))]


def plain_nb_free(r, c, section, offset, *, phi):
    values = []
    for i in range(len(r)):
        rows = mates(section, i)
        counts, logits = np.array([(c[j], r[j] + offset[j]) for j in rows]).T

        def slope(level, counts=counts, logits=logits):
            chance = np.exp(-np.logaddexp(0, -(logits + level + log(phi))))
            return (counts - (counts + 1 / phi) * chance).sum()

        if not counts.any():
            values.append(0.0)
            continue
        level = brentq(slope, -max(logits) - 50, -min(logits) + 50, xtol=1e-14)
        values.append(nb_term(c[i], r[i] + offset[i] + level, phi))
    return values


@dataclass(frozen=True)
class Loss:
    """One row: a loss with its options, its definition and the laws that hold for it.

    The laws: "level-free" (a constant added to a section's scores changes nothing), "likelihood"
    (made of counts, has a mean per count), "element weight", "alone is zero" and "absent is zero"
    (a single spot, an absent gene), "bounded" (scores of 1e4 do not overflow), "stepwise" (no
    gradient of an offset).
    """

    name: str
    function: Callable[..., Tensor]
    plain: Callable[..., list[float]]
    laws: str
    options: dict[str, Any] = field(default_factory=dict)
    phi: tuple[float, ...] | None = None
    pairs: Callable[..., list[tuple[int, int]]] | None = None
    given: bool = False

    def __str__(self) -> str:
        return self.name

    def obeys(self, law: str) -> bool:
        return law in self.laws.split(", ")

    def __call__(self, batch: dict[str, Tensor], **changes: Any) -> Tensor:
        arguments = {"reduction": "sum"} | self.options | batch | changes
        if self.given and "pairs" not in arguments:
            pairs = self.pairs(arguments["section"].tolist())
            arguments["pairs"] = torch.tensor(pairs).long().reshape(-1, 2)
        return self.function(arguments.pop("scores"), arguments.pop("counts"), **arguments)

    def elements(self, batch: dict[str, Tensor], where: Tensor | None = None) -> list[Vector]:
        """Elements of every gene by the plain definition; NaN is none."""
        scores, counts, section, offset = (
            batch[name].double().numpy() for name in ("scores", "counts", "section", "offset")
        )
        offset = np.broadcast_to(offset if offset.ndim == 2 else offset[:, None], scores.shape)
        part = np.ones(scores.shape, bool) if where is None else where.expand(scores.shape).numpy()
        genes = []
        for g in range(scores.shape[1]):
            k = part[:, g]
            extra = {} if self.phi is None else {"phi": self.phi[g]}
            values = self.plain(scores[k, g], counts[k, g], section[k], offset[k, g], **extra)
            genes.append(np.array(values, dtype=float))
        return genes

    def total(self, batch: dict[str, Tensor], where: Tensor | None = None) -> float:
        return sum(np.nansum(gene) for gene in self.elements(batch, where))

    def counts_of(self, batch: dict[str, Tensor], where: Tensor | None = None) -> Vector:
        """Counts that enter each gene, those of pairs as often as they are compared."""
        counts, section = batch["counts"].numpy(), batch["section"].numpy()
        part = np.ones(counts.shape, bool) if where is None else where.expand(counts.shape).numpy()
        sums = []
        for c, k in zip(counts.T, part.T, strict=True):
            if self.pairs is None:
                sums.append(c[k].sum())
            else:
                sums.append(sum(c[k][i] + c[k][j] for i, j in self.pairs(section[k])))
        return np.array(sums)


PHI = (0.5, 0.1, 2.0, 1.0)
FREE = "level-free, likelihood, absent is zero, bounded"
LIST = FREE + ", alone is zero, element weight"
PAIR = FREE + ", alone is zero"
ORDER = "level-free, alone is zero, bounded, stepwise"

TABLE = [
    Loss("list", list_loss, plain_list, LIST),
    # As long as the largest section: whatever the draw, whole sections.
    Loss("list_of_whole_sections", list_loss, plain_list, LIST, {"list_size": 10}),
    Loss("pair_all", pair_loss, plain_pair, PAIR, {"n_partners": None}, pairs=each_pair),
    Loss(
        "pair_given",
        pair_loss,
        lambda *a: plain_pair(*a, pairs=both_ways),
        PAIR,
        pairs=both_ways,
        given=True,
    ),
    Loss(
        "margin_all",
        margin_ranking_loss,
        plain_margin,
        ORDER + ", absent is zero",
        {"n_partners": None},
        pairs=each_pair,
    ),
    Loss(
        "margin_published",
        margin_ranking_loss,
        lambda *a: plain_margin(*a, pairs=both_ways, margin=0.0, ties=-1),
        ORDER,
        {"margin": 0.0, "ties": "second"},
        pairs=both_ways,
        given=True,
    ),
    Loss(
        "pearson",
        pearson_loss,
        plain_pearson,
        "level-free, alone is zero, absent is zero, bounded",
    ),
    Loss("pearson_pooled", pearson_loss, plain_pooled, "bounded", {"pooled": True}),
    Loss("mse", mse_loss, plain_mse, "element weight, bounded"),
    Loss("poisson", poisson_loss, plain_poisson, "likelihood, element weight"),
    Loss(
        "poisson_free",
        poisson_loss,
        plain_poisson_free,
        FREE,
        {"free_level": True},
    ),
    Loss(
        "nb",
        negative_binomial_loss,
        plain_nb,
        "likelihood, element weight, bounded",
        {"dispersion": 0.5},
        phi=(0.5,) * 4,
    ),
    Loss(
        "nb_per_gene",
        negative_binomial_loss,
        plain_nb,
        "likelihood, element weight, bounded",
        {"dispersion": torch.tensor(PHI, dtype=torch.float64)},
        phi=PHI,
    ),
    Loss(
        "nb_free",
        negative_binomial_loss,
        plain_nb_free,
        FREE,
        {"dispersion": torch.tensor(PHI, dtype=torch.float64), "free_level": True},
        phi=PHI,
    ),
]


def losses(law: str | None = None, *, but: str | None = None) -> Any:
    """Make a fixture of the rows that obey a law, or of those that do not."""
    rows = [
        row
        for row in TABLE
        if (law is None or row.obeys(law)) and (but is None or not row.obeys(but))
    ]

    @pytest.fixture(params=rows, ids=str, scope="session")
    def row(request: pytest.FixtureRequest) -> Loss:
        return request.param

    return row


loss = losses()
level_free_loss = losses("level-free")
level_bound_loss = losses(but="level-free")
likelihood = losses("likelihood")
no_likelihood = losses(but="likelihood")
element_weighted_loss = losses("element weight")
gene_weighted_loss = losses(but="element weight")
bounded_loss = losses("bounded")
smooth_loss = losses(but="stepwise")
alone_is_zero_loss = losses("alone is zero")
absent_is_zero_loss = losses("absent is zero")
row_named = pytest.fixture(scope="session")(lambda: {row.name: row for row in TABLE})


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Nine spots of four sections of 4, 3, 1 and 1, four genes; gene 2 absent from one section."""
    generator = torch.Generator().manual_seed(3)
    section = torch.tensor([5, 2, 5, 2, 2, 5, 8, 5, -1])
    counts = torch.poisson(torch.full((9, 4), 3.0, dtype=torch.float64), generator=generator)
    counts[section == 2, 2] = 0
    return {
        "scores": torch.randn(9, 4, generator=generator, dtype=torch.float64),
        "counts": counts,
        "section": section,
        "offset": torch.randn(9, generator=generator, dtype=torch.float64),
    }
