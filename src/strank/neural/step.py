"""The training step, its error for a loss that is not finite, and the score of a section."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from strank.errors import some
from strank.functional.metrics import spearman
from strank.functional.processes import all_summed, n_processes
from strank.losses import ListSTRankLoss, SectionLoss
from strank.neural.recipe import Monitor
from strank.neural.spots import SpotBatch

__all__ = ["Names", "Step", "not_finite", "score_section"]


@dataclass(frozen=True)
class Names:
    """Names of sections (by code) and genes (by column)."""

    sections: tuple[str, ...]
    genes: tuple[str, ...]


class Step(nn.Module):
    """A network and its objective: what is trained, the objective's own parameters included.

    Parameters
    ----------
    network
        Inputs of a batch to scores, such as `strank.neural.network.Network`.
    loss
        Any objective of `strank.losses`.
    """

    def __init__(self, network: nn.Module, loss: SectionLoss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: SpotBatch) -> tuple[Tensor, Tensor]:
        """Loss and scores of a batch; averaged over processes, the loss of all their spots."""
        scores = self.network(*batch.inputs)
        loss: Tensor = self.loss(scores, batch.counts, section=batch.section, offset=batch.offset)
        if n_processes() > 1 and not isinstance(self.loss, ListSTRankLoss):
            # A mean over this process's spots weighs as much as they are.
            n_spots = torch.tensor(float(len(batch.section)), device=loss.device)
            loss = loss * n_spots * n_processes() / all_summed(n_spots)
        return loss, scores.detach()


def not_finite(batch: SpotBatch, scores: Tensor, names: Names, where: str) -> str:
    """Say which section and gene make a loss that is not finite.

    Parameters
    ----------
    batch, scores
        Spots, and what the network gave.
    names
        Of sections and genes.
    where
        Epoch and batch.
    """
    wrong, what = ~scores.isfinite(), "its scores are not finite"
    if not wrong.any():
        wrong, what = scores.abs() == scores.abs().max(), "its scores are the largest"
    sections = batch.section[wrong.any(1)].unique().tolist()
    genes = wrong.any(0).nonzero().flatten().tolist()
    return (
        f"the loss is not finite in {where}: section {some([names.sections[s] for s in sections])},"
        f" gene {some([names.genes[g] for g in genes])} ({what}); lower the learning rate, or clip "
        "the gradient"
    )


def score_section(scores: Tensor, batch: SpotBatch, monitor: Monitor) -> float:
    r"""Score one section, mean over genes.

    ``"list_gain"`` is the list log-likelihood above that of library size alone,

    .. math:: \sum_i c_{ig} r_{ig} - T_g \log \frac{\sum_i l_i e^{r_{ig}}}{\sum_i l_i}

    in nats; ``"spearman"`` the rank correlation with log1p(CP10k), 0 where there is none.

    Parameters
    ----------
    scores
        ``[n_spots, n_genes]``.
    batch
        The whole section.
    monitor
        Which score.

    Examples
    --------
    >>> counts, section = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])
    >>> batch = SpotBatch((), counts, section, torch.zeros(2))
    >>> score_section(torch.zeros(2, 1), batch, "list_gain")
    0.0
    >>> round(score_section(counts.log(), batch, "list_gain"), 4)
    0.5232
    """
    counts, offset = batch.counts, batch.offset
    if monitor == "spearman":
        arrays = scores.cpu().numpy(), counts.cpu().numpy()
        library_size = offset.exp().cpu().numpy()
        each = spearman(*arrays, section=np.zeros(len(scores)), library_size=library_size)
        return float(np.nan_to_num(each).mean())
    # About their mean, so that the two large terms do not lose the digits of their difference.
    scores, depth = scores - scores.mean(0), offset[:, None]
    rise = torch.logsumexp(scores + depth, 0) - torch.logsumexp(depth, 0)
    gain = (counts * scores).sum(0) - counts.sum(0) * rise
    return float(gain.mean())
