"""The plain list loss that docs/losses.md gives to compilers and function transforms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from strank.functional import (
    list_loss,
    margin_ranking_loss,
    mse_loss,
    negative_binomial_loss,
    pair_loss,
    pearson_loss,
    poisson_loss,
)

DOCS = Path(__file__).parents[2] / "docs/losses.md"


@pytest.fixture(scope="module")
def plain():
    """The function, out of the documentation."""
    text = DOCS.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(import torch\n\n\ndef plain_.*?)```", text, re.DOTALL)
    namespace: dict = {}
    exec(code, namespace)
    return namespace["plain_list_loss"]


@pytest.fixture
def data():
    torch.manual_seed(0)
    scores = torch.randn(9, 3, dtype=torch.float64)
    counts = torch.poisson(torch.full((9, 3), 4.0)).double()
    section = torch.tensor([2, 0, 0, 1, 2, 1, 0, 2, 1])
    return scores, counts, section, torch.rand(9).double() * 3


def ours(scores, counts, section, offset):
    return list_loss(scores, counts, section=section, offset=offset)


def test_it_is_the_list_loss(plain, data):
    scores, *rest = data
    torch.testing.assert_close(plain(scores, *rest, 3), ours(scores, *rest))
    mine = scores.clone().requires_grad_()
    (expected,) = torch.autograd.grad(ours(mine, *rest), mine)
    torch.testing.assert_close(torch.func.grad(plain)(scores, *rest, 3), expected)
    large = scores + 1000 * rest[1][:, None]
    torch.testing.assert_close(plain(large, *rest, 3), ours(large, *rest))


def test_it_is_one_graph(plain, data):
    whole = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(*data, 3), ours(*data))


def test_what_is_said_of_the_others(data):
    scores, counts, section, offset = data

    def of(loss, **options):
        return lambda x: loss(x, counts, section=section, offset=offset, **options)

    others = [of(loss) for loss in (margin_ranking_loss, mse_loss, pearson_loss, poisson_loss)]
    for loss in (*others, of(negative_binomial_loss, dispersion=torch.tensor(0.5))):
        mine = scores.clone().requires_grad_()
        torch.manual_seed(1)
        (expected,) = torch.autograd.grad(loss(mine), mine)
        torch.manual_seed(1)
        torch.testing.assert_close(torch.func.grad(loss)(scores), expected)
    for loss in (list_loss, pair_loss):
        with pytest.raises(RuntimeError, match=r"autograd\.Function"):
            torch.func.grad(of(loss))(scores)
    if torch.__version__.startswith("2.6."):
        pytest.skip("PyTorch 2.6 does not compile around what it cannot compile of these")
    broken = torch.compile(of(list_loss), backend="eager")
    torch.testing.assert_close(broken(scores), of(list_loss)(scores))
