"""Many small networks trained at once: one batched product does the work of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from strank.losses import MSELoss, PearsonLoss, SectionLoss

__all__ = ["CurveNetworks", "Recipe", "Spots", "train"]

_WIDTH = 128
# Where weights of the first layer start: bends of several per period of the fastest curve.
_SLOPE = 4.0


class CurveNetworks(nn.Module):
    """Independent networks 1-128-128-1 with ReLU, from position to score.

    Positions in [0, 1] are standardised, and the bends of the first layer start spread evenly over
    them: with torch's default start three in four lie outside, and fast curves are learned slowly.

    Parameters
    ----------
    n_networks
        How many.
    generator
        Source of the first weights.

    Examples
    --------
    >>> CurveNetworks(3, torch.Generator().manual_seed(0))(torch.rand(3, 5)).shape
    torch.Size([3, 5])
    """

    def __init__(self, n_networks: int, generator: torch.Generator) -> None:
        super().__init__()

        def uniform(*shape: int, limit: float) -> Tensor:
            return limit * (2 * torch.rand(n_networks, *shape, generator=generator) - 1)

        slope = _SLOPE * torch.randn(n_networks, 1, _WIDTH, generator=generator)
        limit = _WIDTH**-0.5
        self.weights = nn.ParameterList(
            [
                slope,
                uniform(_WIDTH, _WIDTH, limit=limit),
                uniform(_WIDTH, 1, limit=limit),
            ]
        )
        self.biases = nn.ParameterList(
            [
                -slope * uniform(1, _WIDTH, limit=3**0.5),
                uniform(1, _WIDTH, limit=limit),
                uniform(1, 1, limit=limit),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[n_networks, n_spots]`` of positions of the same shape."""
        hidden = ((x - 0.5) * 12**0.5)[..., None]
        hidden = torch.addcmul(self.biases[0], hidden, self.weights[0]).relu()
        hidden = torch.baddbmm(self.biases[1], hidden, self.weights[1]).relu()
        return torch.baddbmm(self.biases[2], hidden, self.weights[2]).squeeze(-1)


@dataclass(frozen=True)
class Spots:
    """Spots of many data sets, each with two tissues of as many spots.

    Attributes
    ----------
    x, counts, offset
        Position, counts and log depth, ``[n_sets, 2, n_spots]``.
    """

    x: Tensor
    counts: Tensor
    offset: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw half a batch from each tissue, the same rows of every set: ``[n_sets, size]``."""
        rows = torch.randint(self.x.shape[2], (2, size // 2), generator=generator)
        x, counts, offset = (
            torch.cat([values[:, t].index_select(1, rows[t]) for t in (0, 1)], 1)
            for values in (self.x, self.counts, self.offset)
        )
        return x, counts, offset


@dataclass(frozen=True)
class Recipe:
    """How networks are trained: AdamW with one cycle of the learning rate.

    Attributes
    ----------
    steps
        Batches.
    batch
        Spots a batch, half of them from each tissue.
    learning_rate
        The largest.
    checks
        How often, evenly spaced, a checkpoint is looked at.
    """

    steps: int = 2000
    batch: int = 256
    learning_rate: float = 2e-3
    checks: int = 5


def train(
    spots: Spots,
    losses: Sequence[SectionLoss],
    *,
    recipe: Recipe,
    generator: torch.Generator,
    check: Callable[[CurveNetworks], None],
) -> None:
    """Train a network for every loss and data set, all at once.

    Parameters
    ----------
    spots
        The data sets.
    losses
        With ``reduction="sum"``; each sees one column a data set, so that columns are independent.
    recipe
        Steps, batch and learning rate.
    generator
        Source of first weights and batches.
    check
        Called with the networks, in the order of losses, then data sets.
    """
    n_sets = len(spots.x)
    networks = CurveNetworks(len(losses) * n_sets, generator)
    parameters = [*networks.parameters(), *(p for loss in losses for p in loss.parameters())]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    section = torch.arange(2).repeat_interleave(recipe.batch // 2)
    due = {round(recipe.steps * (k + 1) / recipe.checks) for k in range(recipe.checks)}
    for step in range(1, recipe.steps + 1):
        x, counts, offset = spots.batch(recipe.batch, generator)
        scores = networks(x.repeat(len(losses), 1)).split(n_sets)
        total = sum(
            loss(of_loss.T, counts.T, section=section, offset=_depth(loss, offset).T)
            for loss, of_loss in zip(losses, scores, strict=True)
        )
        optimiser.zero_grad()
        torch.as_tensor(total).backward()
        optimiser.step()
        schedule.step()
        if step in due:
            with torch.no_grad():
                check(networks)


def _depth(loss: SectionLoss, offset: Tensor) -> Tensor:
    """Log library size: an average spot has 10,000 counts, which is one to a likelihood."""
    return offset + math.log(1e4) if isinstance(loss, (MSELoss, PearsonLoss)) else offset
