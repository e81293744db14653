"""What is trained: a head, with an image network below it or without."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["Network"]

# Patches of a section that is only scored.
_AT_ONCE = 256


class Network(nn.Module):
    """From features or patches to scores.

    With ``micro_batch``, patches go through the image network in parts, and a part's activations
    are computed again when its gradient is taken. The loss still sees all the scores of a batch
    at once, so loss and gradient are those of the whole batch, for any objective, in the memory of
    a part and at the price of a second forward pass.

    Parameters
    ----------
    head
        Features to scores.
    backbone
        Patches to features; ``None`` where features are given.
    micro_batch
        Patches at a time; all if ``None``.

    Examples
    --------
    >>> Network(nn.Linear(3, 2))(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, head: nn.Module, backbone: nn.Module | None = None, micro_batch: int | None = None
    ) -> None:
        super().__init__()
        self.head, self.backbone, self.micro_batch = head, backbone, micro_batch

    def forward(self, inputs: Tensor, *around: Tensor) -> Tensor:
        """Scores ``[n_spots, n_genes]``; the arguments are those of `strank.neural.spots`."""
        scores: Tensor = self.head(self.features(inputs), *around)
        return scores

    def features(self, inputs: Tensor) -> Tensor:
        """Features of patches, or of what are features already."""
        if self.backbone is None:
            return inputs
        learns = torch.is_grad_enabled()
        parts = inputs.split(self.micro_batch or (max(1, len(inputs)) if learns else _AT_ONCE))
        if len(parts) == 1 or not learns:
            return torch.cat([self.backbone(part) for part in parts])
        return torch.cat([checkpoint(self.backbone, part, use_reentrant=False) for part in parts])
