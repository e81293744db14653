"""Devices without float64, as Apple's (MPS): what can be looked at on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from strank.functional import pairwise, pointwise, segments


class Doubles(TorchDispatchMode):
    """Records the operations that make float64."""

    def __init__(self):
        super().__init__()
        self.made = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                self.made.add(str(function))
        return result


def doubles(loss, batch, **options):
    """What makes float64 of float32, forwards and backwards; dispersions are float32, too."""
    section = batch["section"]
    half = {name: values.float() for name, values in batch.items()} | {"section": section}
    for name, value in loss.options.items():
        if isinstance(value, torch.Tensor):
            options[name] = value.float()
    if loss.given:
        options["pairs"] = torch.tensor(loss.pairs(section.tolist()))
    with Doubles() as found:
        half["scores"].requires_grad_()
        loss(half, **options).backward()
        loss(half, reduction="none", **options).sum().backward()
    return found.made


@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr(pairwise, "WITHOUT_FLOAT64", {"cpu"})
    for room in (pairwise, pointwise):
        monkeypatch.setattr(room, "in_float64", lambda values: values.float())


def test_float64_is_made_by_one_function_only(loss, batch, without_float64):
    assert doubles(loss, batch) == set()


def test_so_are_draws_of_pairs(row_named, batch, without_float64):
    for name in ("pair_all", "margin_all"):
        assert doubles(row_named[name], batch, n_partners=2) == set()
    with Doubles() as found:
        pairwise.permuted_pairs(batch["section"])
    assert found.made == set()


def test_the_recorder_sees_what_is_there(row_named, batch):
    for name in ("nb", "margin_all"):
        assert doubles(row_named[name], batch)
    assert doubles(row_named["pair_all"], batch, n_partners=2)


def test_what_needs_float64_goes_to_the_cpu_of_a_device_without():
    apple = SimpleNamespace(device=torch.device("mps"), cpu=lambda: torch.ones(2))
    assert segments.in_float64(apple).dtype == torch.float64


def test_draws_of_float32_never_meet_themselves(monkeypatch):
    """Not even where the draw is the largest float32 below 1, which times n - 1 is n - 1."""
    section = torch.zeros(1000, dtype=torch.int64)
    top = 1 - 2**-24
    monkeypatch.setattr(pairwise, "WITHOUT_FLOAT64", {"cpu"})
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), top, dtype=torch.float32))
    first, second = pairwise.sample_pairs(section).T
    assert (first != second).all()
