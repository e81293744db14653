"""The objectives as the code published with the paper has them, where they differ from ours.

Nishimura et al., NeurIPS 2025, arXiv 2512.06612; ``docs/reproducing.md`` says where text and code
differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from strank.functional.batch import Reduction
from strank.functional.pairwise import margin_ranking_loss, pair_loss, permuted_pairs
from strank.losses import SectionLoss
from strank.neural.heads import LinearNetwork

N_PERMUTATIONS = 32
# Pairs of spots times genes that are held at once.
_COMPARISONS = 2**20
# Of a spot without counts in the panel, where the published code divides by 0: so little depth that
# it has no say in a likelihood; its target for other losses is 0.
_NO_DEPTH = 1e-5


def panel_total(counts: Any) -> NDArray[np.float64]:
    """Total of every spot over the panel, which is the depth of targets: ``[n_spots]``."""
    return np.maximum(counts @ np.ones(counts.shape[1]), _NO_DEPTH)


def panel_mean(counts: Any) -> NDArray[np.float64]:
    """Mean over the panel, the exposure of the Poisson and negative binomial likelihoods."""
    return panel_total(counts) / counts.shape[1]


def panel_mean_above_zero(counts: Any) -> NDArray[np.float64]:
    """Mean over the panel and a little, the exposure of the list and pair likelihoods."""
    return panel_mean(counts) + 1e-6


def permuted_pair_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor,
    offset: Tensor,
    entropy: bool = True,
    **how: Any,
) -> Tensor:
    """Pairs by permutation, and the mean entropy of their shares, which the paper leaves out."""
    pairs = permuted_pairs(section)
    loss = pair_loss(scores, counts, section=section, offset=offset, pairs=pairs, **how)
    return loss + share_entropy(scores + offset[:, None], pairs) if entropy else loss


def share_entropy(logits: Tensor, pairs: Tensor) -> Tensor:
    """Mean of -p log p over both spots of every pair, p their shares by the logits."""
    first, second = pairs.unbind(1)
    log_odds = logits[first] - logits[second]
    share = log_odds.sigmoid()
    return (share * softplus(-log_odds) + (1 - share) * softplus(log_odds)).mean() / 2


def permuted_rank_loss(scores: Tensor, counts: Tensor, *, section: Tensor, **how: Any) -> Tensor:
    """Margin 0, ties as if the second were higher; a spot may meet itself, which costs nothing."""
    pairs = permuted_pairs(section, N_PERMUTATIONS)
    loss: Callable[..., Tensor] = partial(
        margin_ranking_loss, section=section, pairs=pairs, margin=0.0, ties="second", **how
    )
    width, n_genes = max(1, _COMPARISONS // max(len(pairs), 1)), scores.shape[1]
    is_mean = how.get("reduction", "mean") == "mean"
    if n_genes <= width or not is_mean or not (how.get("where") is how.get("weight") is None):
        return loss(scores, counts)
    # The mean over genes, some at a time; they are compared again for their gradient.
    blocks = zip(scores.split(width, 1), counts.split(width, 1), strict=True)
    parts = [
        checkpoint(loss, *block, use_reentrant=False, preserve_rng_state=False) * block[0].shape[1]
        for block in blocks
    ]
    return torch.stack(parts).sum() / n_genes


class PermutedPairLoss(SectionLoss):
    """Module of `permuted_pair_loss`."""

    function = staticmethod(permuted_pair_loss)
    options = ("entropy",)

    def __init__(self, reduction: Reduction = "mean", *, entropy: bool = True) -> None:
        super().__init__(reduction)
        self.entropy = entropy


class PermutedRankLoss(SectionLoss):
    """Module of `permuted_rank_loss`."""

    function = staticmethod(permuted_rank_loss)


def torch_start(n_features: int, n_genes: int) -> LinearNetwork:
    """Make a linear layer on features as they are, with torch's own first weights."""
    start, head = nn.Linear(n_features, n_genes), LinearNetwork(n_features, n_genes)
    with torch.no_grad():
        cast(nn.Linear, head.readout).weight.copy_(start.weight)
        head.level.copy_(start.bias)
    return head
