"""Sections whose spots lie on several processes of `torch.distributed`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from strank.functional.batch import GeneTotals, LossBatch, masked
from strank.functional.segments import segment_shift, segment_sum

# Fills up the shorter lists of labels; no section may have it.
_NO_LABEL = torch.iinfo(torch.int64).min


def n_processes() -> int:
    """Count the processes that train together; 1 without `torch.distributed`."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_summed(values: Tensor) -> Tensor:
    """Sum over processes, which each of them gets; without gradient."""
    total = values.detach().clone()
    dist.all_reduce(total)
    return total


def in_common_sections(batch: LossBatch, section: Tensor) -> LossBatch:
    """Give sections, labelled as for the loss, codes that mean the same on every process."""
    labels = torch.unique(section.long())
    longest = torch.tensor([len(labels)], device=section.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    padded = labels.new_full((int(longest),), _NO_LABEL)
    padded[: len(labels)] = labels
    gathered = [torch.empty_like(padded) for _ in range(n_processes())]
    dist.all_gather(gathered, padded)
    everywhere = torch.unique(torch.cat(gathered))
    everywhere = everywhere[everywhere != _NO_LABEL]
    codes = torch.searchsorted(everywhere, section.long())
    sizes = torch.bincount(codes, minlength=len(everywhere)).tolist()
    return replace(batch, section=codes, sizes=sizes)


class PartTotals(GeneTotals):
    r"""List loss of every gene from this process's spots, ``[n_genes]``; the parts add up.

    The norm :math:`Z_{sg} = \sum_j l_j e^{r_{jg}}` and the totals :math:`T_{sg}` are of the whole
    section, so the gradient with respect to the scores here,
    :math:`T_{sg} l_i e^{r_{ig}} / Z_{sg} - c_{ig}`, is that of one process with all the spots.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, factor: Tensor | float, batch: LossBatch) -> Tensor:
        """Compute loss and gradient of this process's spots, in two all-reduces."""
        codes, n = batch.section, batch.n_sections
        counts, logits = batch.weighted_counts(), batch.shared_logits()
        shift = segment_shift(logits, codes, n)
        dist.all_reduce(shift, dist.ReduceOp.MAX)
        logits = logits - shift.index_select(0, codes)
        share, totals = logits.exp(), segment_sum(counts, codes, n)
        norm, whole = all_summed(torch.stack([segment_sum(share, codes, n), totals]))
        norm = norm.clamp_(min=torch.finfo(share.dtype).tiny)
        loss = (totals * norm.log()).sum(0) - (counts * masked(logits, batch.where)).sum(0)
        gradient = share.mul_((whole / norm).index_select(0, codes)).sub_(counts).mul_(factor)
        return GeneTotals.saved(ctx, loss, factor, gradient)
