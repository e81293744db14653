"""One process of several, started by `test_processes.py`: ``one_process.py FOLDER RANK``.

``FOLDER/given.pt`` says for each number of processes what they are to do together; the first so
many take part. What came of it is written to ``FOLDER/WORLD-RANK.pt``.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from strank.functional.listwise import list_loss
from strank.losses import ListSTRankLoss


def own_part(case: dict[str, Any], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Arguments of the loss with this process's spots."""
    part = {}
    for name, values in case["tensors"].items():
        own = values[case["place"] == rank] if name in case["of_spots"] else values.clone()
        part[name] = own.to(dtype) if own.is_floating_point() else own
    return part


def value_and_gradients(case: dict[str, Any], rank: int, dtype: torch.dtype) -> dict[str, Tensor]:
    part = own_part(case, rank, dtype)
    learned = {name: part[name].requires_grad_() for name in case["learned"]}
    scores, counts = part.pop("scores"), part.pop("counts")
    if case["sparse"]:
        counts = counts.to_sparse_csr()
    loss = list_loss(scores, counts, reduction=case["reduction"], distributed=True, **part)
    loss.backward()
    return {"loss": loss.detach()} | {name: values.grad for name, values in learned.items()}


def refusals(case: dict[str, Any], rank: int) -> list[str]:
    """What the loss says to lists that cannot be whole sections, and to no reduction."""
    part = own_part(case, rank, torch.float64)
    scores, counts = part.pop("scores"), part.pop("counts")
    messages = []
    for options in ({"list_size": 4}, {"reduction": "none"}):
        for loss in (list_loss, None):
            try:
                if loss is None:
                    ListSTRankLoss(distributed=True, **options)(scores, counts, **part)
                else:
                    loss(scores, counts, distributed=True, **options, **part)
            except ValueError as error:
                messages.append(str(error))
    return messages


def train(training: dict[str, Any], rank: int) -> dict[str, Tensor]:
    """A linear model by DDP; every step has its own batch, spread in its own way."""
    n_genes, n_features = training["weight"].shape
    linear = torch.nn.Linear(n_features, n_genes)
    linear.load_state_dict({name: training[name] for name in ("weight", "bias")})
    model, loss = DistributedDataParallel(linear), ListSTRankLoss(distributed=True)
    optimiser = torch.optim.SGD(model.parameters(), lr=training["rate"], momentum=0.9)
    for place in training["places"]:
        here = place == rank
        optimiser.zero_grad()
        scores = model(training["features"][here])
        rest = {name: training[name][here] for name in ("section", "offset")}
        loss(scores, training["counts"][here], **rest).backward()
        optimiser.step()
    return {name: values.detach() for name, values in linear.state_dict().items()}


def together(folder: Path, given: dict[str, Any], rank: int, world: int) -> dict[str, Any]:
    dist.init_process_group(
        "gloo",
        init_method=(folder / f"meeting-{world}").absolute().as_uri(),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    try:
        return {
            "losses": [
                value_and_gradients(case, rank, dtype)
                for case in given["cases"]
                for dtype in given["dtypes"]
            ],
            "refusals": refusals(given["cases"][0], rank),
            "trained": train(given["training"], rank),
        }
    finally:
        dist.destroy_process_group()


def main(folder: Path, rank: int) -> None:
    for world, given in torch.load(folder / "given.pt", weights_only=True).items():
        if rank < world:
            torch.save(together(folder, given, rank, world), folder / f"{world}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
