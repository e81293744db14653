"""Losses as modules, for use in any PyTorch model; each is a thin shell over its function."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from strank.functional.losses import Reduction, list_loss, pair_loss

__all__ = ["ListSTRankLoss", "PairSTRankLoss"]


class ListSTRankLoss(nn.Module):
    """Module of `strank.functional.losses.list_loss`: one list a section.

    Parameters
    ----------
    reduction
        ``"mean"`` over elements, ``"sum"`` or ``"none"``.

    Examples
    --------
    A plain PyTorch loop around someone else's model:

    >>> model = torch.nn.Linear(3, 2)
    >>> optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> features, section = torch.rand(8, 3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    >>> counts = torch.poisson(torch.full((8, 2), 5.0))
    >>> library_size = torch.full((8,), 1000.0)
    >>> loss = ListSTRankLoss()
    >>> for _ in range(3):
    ...     optimiser.zero_grad()
    ...     value = loss(model(features), counts, section=section, offset=library_size.log())
    ...     value.backward()
    ...     optimiser.step()
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(
        self,
        scores: Tensor,
        counts: Tensor,
        *,
        section: Tensor,
        offset: Tensor | None = None,
        where: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return ``list_loss`` of these scores; see there for shapes."""
        return list_loss(
            scores,
            counts,
            section=section,
            offset=offset,
            where=where,
            weight=weight,
            reduction=self.reduction,
        )


class PairSTRankLoss(nn.Module):
    """Module of `strank.functional.losses.pair_loss`: random partners within the section.

    Parameters
    ----------
    n_partners
        Partners drawn for every spot at each call.
    reduction
        ``"mean"`` over terms, ``"sum"`` or ``"none"``.
    seed
        Seed of the draw; ``None`` follows torch's default generator.

    Examples
    --------
    >>> loss = PairSTRankLoss(seed=0)
    >>> loss(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), section=torch.tensor([0, 0]))
    tensor(1.3863)
    """

    def __init__(
        self, n_partners: int = 1, reduction: Reduction = "mean", seed: int | None = None
    ) -> None:
        super().__init__()
        self.n_partners = n_partners
        self.reduction = reduction
        self.seed = seed
        self._generator: torch.Generator | None = None

    def forward(
        self,
        scores: Tensor,
        counts: Tensor,
        *,
        section: Tensor,
        offset: Tensor | None = None,
        where: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return ``pair_loss`` of these scores with fresh partners; see there for shapes."""
        if self.seed is not None and self._generator is None:
            self._generator = torch.Generator(section.device).manual_seed(self.seed)
        return pair_loss(
            scores,
            counts,
            section=section,
            offset=offset,
            where=where,
            weight=weight,
            reduction=self.reduction,
            n_partners=self.n_partners,
            generator=self._generator,
        )
