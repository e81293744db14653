"""The linear head as a module, so that every head loads and predicts alike."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from strank.linear.regressor import STRankRegressor

__all__ = ["LinearHead"]


class LinearHead(nn.Module):
    """Standardise features and map them linearly to scores.

    Parameters
    ----------
    n_features, n_genes
        Width of the input and of the output.

    Examples
    --------
    >>> LinearHead(3, 2)(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    centre: Tensor
    scale: Tensor

    def __init__(self, n_features: int, n_genes: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.weight = nn.Parameter(torch.zeros(n_features, n_genes))

    @classmethod
    def from_regressor(cls, regressor: STRankRegressor) -> Self:
        """Take over a fitted regressor, in float32."""
        head = cls(regressor.coef_.shape[1], regressor.coef_.shape[0])
        weight = regressor.coef_.T * regressor.scale_[:, None]
        fitted = {"centre": regressor.centre_, "scale": regressor.scale_, "weight": weight}
        head.load_state_dict({name: torch.as_tensor(values) for name, values in fitted.items()})
        return head

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``[n_spots, n_genes]`` of features ``[n_spots, n_features]``."""
        return (features - self.centre) / self.scale @ self.weight
