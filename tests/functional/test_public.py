"""The law of the losses (DESIGN, 5.1), walked through what `strank.functional` hands on."""

from __future__ import annotations

import subprocess
import sys
from inspect import Parameter, signature

import pytest
import torch

from strank import functional, losses

LAW = ["scores", "counts", "section", "offset", "where", "weight", "reduction"]
each_loss = pytest.mark.parametrize("name", functional.__all__)


@each_loss
def test_two_positional_tensors_and_the_rest_by_keyword_in_one_order(name):
    function = getattr(functional, name)
    parameters = list(signature(function).parameters.values())
    assert name == function.__name__
    assert name.endswith("_loss")
    assert [p.name for p in parameters][: len(LAW)] == LAW
    assert [p.kind for p in parameters[:2]] == [Parameter.POSITIONAL_OR_KEYWORD] * 2
    assert {p.kind for p in parameters[2:]} == {Parameter.KEYWORD_ONLY}
    defaults = {p.name: p.default for p in parameters[2:]}
    assert defaults.pop("section") is Parameter.empty
    assert defaults["reduction"] == "mean"
    assert Parameter.empty not in defaults.values()


@each_loss
def test_one_tensor_whose_sum_is_that_of_the_unreduced(name):
    loss = getattr(functional, name)
    options = {"n_partners": None} if "n_partners" in signature(loss).parameters else {}
    scores = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    counts, section = torch.arange(15.0).reshape(5, 3).double(), torch.tensor([0, 0, 0, 1, 1])
    each = loss(scores, counts, section=section, reduction="none", **options)
    total = loss(scores, counts, section=section, reduction="sum", **options)
    torch.testing.assert_close(each.sum(), total)
    assert total.shape == ()


@each_loss
def test_definition_and_divisor_are_written_down_and_an_example_runs(name):
    text = getattr(functional, name).__doc__
    assert "Definition" in text
    assert ".. math::" in text
    assert '"mean"' in text
    assert f">>> {name}(" in text or f"= {name}(" in text


def test_every_function_has_its_module():
    shells = {getattr(losses, name) for name in losses.__all__} - {losses.SectionLoss}
    assert {shell.function.__name__ for shell in shells} == set(functional.__all__)


def test_the_room_is_entered_without_torch():
    code = "import sys, strank.functional, strank.metrics; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
