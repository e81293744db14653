"""Sections spread over processes: loss, gradient and training are those of one process.

Real processes, which meet over a file. Starting them is slow, so that a start does all cases.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from strank.functional.listwise import list_loss
from strank.losses import ListSTRankLoss

SCRIPT = Path(__file__).with_name("one_process.py")
# One start does for both: the first two processes, then all three.
WORLDS = [2, 3]
N_SPOTS, N_GENES, N_STEPS = 15, 5, 6
REDUCTIONS = ["mean", "sum", "per_count", "per_gene"]
# How near, in units of the largest value.
NEAR = {torch.float32: 1e-6, torch.float64: 1e-12}


def spots() -> dict[str, torch.Tensor]:
    """Sections of 6, 5, 3 and 1; gene 1 absent from one, gene 4 from all."""
    generator = torch.Generator().manual_seed(0)
    section = torch.tensor([-7] * 6 + [3] * 5 + [10**12] * 3 + [8])
    section = section[torch.randperm(N_SPOTS, generator=generator)]
    shape = N_SPOTS, N_GENES
    counts = torch.poisson(torch.full(shape, 3.0), generator=generator)
    counts[section == 3, 1] = 0
    counts[:, 4] = 0
    return {
        "scores": torch.randn(shape, generator=generator, dtype=torch.float64),
        "counts": counts.double(),
        "section": section,
        "offset": 7 + torch.randn(N_SPOTS, generator=generator, dtype=torch.float64),
    }


def places(section: torch.Tensor, world: int) -> dict[str, torch.Tensor]:
    """Which process has each spot."""
    turn = torch.arange(N_SPOTS)
    number = torch.unique(section, return_inverse=True)[1]
    return {
        "in turn": turn % world,
        "uneven": (turn - 10).clamp(min=0) % world,
        "whole sections": number % world,
        "a section absent from the last": torch.where(
            number == 0, turn % (world - 1), turn % world
        ),
        "one spot on the last": torch.where(turn == 2, world - 1, turn % (world - 1)),
        "no spots on the first": 1 + turn % (world - 1),
        "no spots on the last": turn % (world - 1),
    }


def variants() -> dict[str, dict[str, Any]]:
    """Changes of the arguments; "sparse" and "learned" say how they are given."""
    generator = torch.Generator().manual_seed(1)
    shape = N_SPOTS, N_GENES
    here = spots()
    some = torch.rand(shape, generator=generator) < 0.6
    by_spot = torch.rand(N_SPOTS, generator=generator) < 0.6
    element_weight = torch.rand(shape, generator=generator).double()
    gene_weight = torch.tensor([1.0, 0.25, 3.0, 0.0, 2.0]).double()
    own_offset = torch.randn(shape, generator=generator).double()
    # No exposure at one spot of a large section, where nothing was counted either.
    dark = int((here["section"] == -7).nonzero()[1])
    offset, counts = here["offset"].clone(), here["counts"].clone()
    offset[dark], counts[dark] = -torch.inf, 0
    large = 1e4 * torch.randint(-1, 2, shape, generator=generator).double()
    return {
        "plain": {},
        "no offset": {"offset": None},
        "offset of each gene": {"offset": own_offset},
        "where by spot": {"where": by_spot},
        "where by element": {"where": some},
        "where without a section": {"where": here["section"] != 3},
        "gene weight": {"weight": gene_weight},
        "learned gene weight": {"weight": gene_weight, "learned": ["weight"]},
        "element weight": {"weight": element_weight},
        "no exposure": {"offset": offset, "counts": counts},
        "CSR": {"sparse": True},
        "CSR with all": {
            "sparse": True,
            "counts": counts,
            "offset": offset,
            "where": some,
            "weight": element_weight,
        },
        "large scores": {"scores": large},
        "learned offset": {"learned": ["offset"]},
        "learned offset of each gene with where": {
            "offset": own_offset,
            "where": some,
            "learned": ["offset"],
        },
    }


def cases(world: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Arguments of the loss by variant and spread, in float64."""
    spreads, turn = places(spots()["section"], world), itertools.cycle(REDUCTIONS)
    # An odd number of spreads: every one of them and every variant has all reductions.
    assert len(spreads) % 2 == 1
    return {
        (variant, spread): case(changes, place) | {"reduction": next(turn)}
        for variant, changes in variants().items()
        for spread, place in spreads.items()
    }


def case(changes: dict[str, Any], place: torch.Tensor) -> dict[str, Any]:
    tensors = spots() | {k: v for k, v in changes.items() if k not in ("sparse", "learned")}
    tensors = {name: values for name, values in tensors.items() if values is not None}
    return {
        "place": place,
        "sparse": changes.get("sparse", False),
        "learned": ["scores", *changes.get("learned", [])],
        "of_spots": [name for name, values in tensors.items() if len(values) == N_SPOTS],
        "tensors": tensors,
    }


def training(world: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(2)
    # At -1 a spot is not in the batch of that step; at the third step one process has none.
    chosen = torch.randint(-1, world, (N_STEPS, N_SPOTS), generator=generator)
    chosen[2] = chosen[2].clamp(max=world - 2)
    floats = {k: v.float() for k, v in spots().items() if k in ("counts", "offset")}
    return floats | {
        "section": spots()["section"],
        "features": torch.randn(N_SPOTS, 3, generator=generator),
        "weight": torch.randn(N_GENES, 3, generator=generator),
        "bias": torch.randn(N_GENES, generator=generator),
        "places": list(chosen),
        "rate": 0.1,
    }


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """Folder of what the processes were given, and of what came of it."""
    folder = tmp_path_factory.mktemp("processes")
    given = {
        world: {
            "cases": list(cases(world).values()),
            "training": training(world),
            "dtypes": list(NEAR),
        }
        for world in WORLDS
    }
    torch.save(given, folder / "given.pt")
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, folder, str(rank)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(max(WORLDS))
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(errors)
    return folder


class Together:
    """What some processes did together."""

    def __init__(self, folder: Path, world: int) -> None:
        self.world, self.cases = world, cases(world)
        self.of_rank = [
            torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)
        ]
        keys = [(*key, dtype) for key in self.cases for dtype in NEAR]
        self.losses = [dict(zip(keys, rank["losses"], strict=True)) for rank in self.of_rank]

    def averaged(self, variant: str, spread: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Loss and gradients as DDP takes them: their mean over processes."""
        of_rank = [losses[variant, spread, dtype] for losses in self.losses]
        one, mean = self.cases[variant, spread], {}
        for name in of_rank[0]:
            parts = [rank[name] for rank in of_rank]
            if name in one["of_spots"]:
                # Each process knows the gradient of its own spots.
                whole = torch.full(one["tensors"][name].shape, torch.nan, dtype=dtype)
                for rank, part in enumerate(parts):
                    whole[one["place"] == rank] = part
                mean[name] = whole / self.world
            else:
                mean[name] = torch.stack(parts).mean(0)
        return mean


@pytest.fixture(scope="module", params=WORLDS)
def together(request, ended) -> Together:
    return Together(ended, request.param)


def on_one_process(one: dict[str, Any], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    arguments = {
        name: values.to(dtype) if values.is_floating_point() else values
        for name, values in one["tensors"].items()
    }
    learned = {name: arguments[name].clone().requires_grad_() for name in one["learned"]}
    loss = list_loss(**arguments | learned, reduction=one["reduction"])
    loss.backward()
    return {"loss": loss.detach()} | {name: values.grad for name, values in learned.items()}


@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("variant", variants())
def test_loss_and_gradient_are_those_of_one_process(together, variant, dtype):
    own = {key: one for key, one in together.cases.items() if key[0] == variant}
    assert {one["reduction"] for one in own.values()} == set(REDUCTIONS)
    for (_, spread), one in own.items():
        expected, got = on_one_process(one, dtype), together.averaged(variant, spread, dtype)
        assert expected.keys() == got.keys()
        assert expected["scores"].any()
        for name, values in expected.items():
            error = (got[name] - values).abs().max() / values.abs().max().clamp(min=1)
            assert error <= NEAR[dtype], f"{name}, {spread}, {one['reduction']}"


def test_every_process_returns_its_part_of_the_loss(together):
    """Only the mean over processes is the loss: none of them has it already."""

    def losses(spread):
        return [rank["plain", spread, torch.float64]["loss"].item() for rank in together.losses]

    assert len(set(losses("in turn"))) == together.world
    assert losses("no spots on the last")[-1] == 0


def test_training_by_ddp_gives_the_weights_of_one_process(together):
    given = training(together.world)
    model = torch.nn.Linear(3, N_GENES)
    model.load_state_dict({name: given[name] for name in ("weight", "bias")})
    optimiser = torch.optim.SGD(model.parameters(), lr=given["rate"], momentum=0.9)
    for place in given["places"]:
        batch = place >= 0
        optimiser.zero_grad()
        rest = {name: given[name][batch] for name in ("section", "offset")}
        list_loss(model(given["features"][batch]), given["counts"][batch], **rest).backward()
        optimiser.step()
    weights = model.state_dict()
    assert (weights["weight"] - given["weight"]).abs().max() > 0.1
    for rank in together.of_rank:
        for name, values in weights.items():
            torch.testing.assert_close(rank["trained"][name], values, rtol=0, atol=1e-6)


def test_parts_of_sections_and_single_elements_are_refused(together):
    message = "distributed lists are whole sections, and have no reduction 'none'"
    for rank in together.of_rank:
        assert rank["refusals"] == [message] * 4


@pytest.mark.parametrize("form", [list, np.asarray])
def test_words_mean_another_number_on_each_process(batch, form, monkeypatch):
    monkeypatch.setattr("strank.functional.listwise.n_processes", lambda: 2)
    batch["section"] = form([*"abbacadab"])
    with pytest.raises(TypeError, match=r"same numbers on every process; got (list|ndarray)"):
        list_loss(batch.pop("scores"), batch.pop("counts"), **batch, distributed=True)


@pytest.mark.parametrize("list_size", [None, 2])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "none"])
def test_without_other_processes_nothing_changes(batch, reduction, list_size):
    def draw(**options):
        generator = torch.Generator().manual_seed(0)
        scores = batch["scores"].clone().requires_grad_()
        loss = list_loss(
            **batch | {"scores": scores},
            reduction=reduction,
            list_size=list_size,
            generator=generator,
            **options,
        )
        return loss.detach(), *torch.autograd.grad(loss.sum(), scores)

    torch.testing.assert_close(draw(distributed=True), draw(), rtol=0, atol=0)


def test_the_module_without_other_processes_is_the_usual_one(batch):
    scores, counts = batch.pop("scores"), batch.pop("counts")
    got = ListSTRankLoss(distributed=True)(scores, counts, **batch)
    assert got.equal(ListSTRankLoss()(scores, counts, **batch))
