r"""Likelihoods of how a section's counts are shared among its spots.

Scores :math:`r_{ig}` are log relative rates. With library sizes :math:`l_i` as exposure, a spot's
share of its list is :math:`p_i = l_i e^{r_i} / \sum_j l_j e^{r_j}`; the list is a section
(multinomial) or a pair of spots (binomial). A constant per section and gene cancels.

Reference: Nishimura et al., NeurIPS 2025, arXiv 2512.06612.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from strank.functional.segments import section_codes, segment_log_softmax

__all__ = ["Reduction", "list_loss", "pair_loss", "sample_pairs"]

Reduction = Literal["mean", "sum", "none"]


def list_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Multinomial negative log-likelihood of a section's counts over its spots (ListSTRank).

    .. math:: L_{ig} = -c_{ig} \log \frac{l_i e^{r_{ig}}}{\sum_{j \in s(i)} l_j e^{r_{jg}}}

    Parameters
    ----------
    scores
        Predicted log relative rates (natural log), ``[n_spots, n_genes]``. Half precision is
        computed and returned in float32.
    counts
        Non-negative raw counts, ``[n_spots, n_genes]``.
    section
        Integer section label of each spot, ``[n_spots]``; labels need not be consecutive.
    offset
        Log library size, ``[n_spots]`` or ``[n_spots, n_genes]``; ``None`` stands for equal
        depth. A spot of offset ``-inf`` takes no share.
    where
        Elements that take part, boolean, broadcastable to ``scores``; the others neither take a
        share nor count.
    weight
        Weight of each gene ``[n_genes]``, or of each element, broadcastable to ``scores``.
    reduction
        ``"none"`` returns ``[n_spots, n_genes]``, ``"sum"`` its sum, ``"mean"`` the sum divided
        by the number of elements that take part (not by their weight).

    Returns
    -------
    Tensor
        A scalar, or ``[n_spots, n_genes]``. A section of one spot, and a gene absent from a
        section, contribute exactly 0.

    Raises
    ------
    ValueError
        For tensors whose shapes do not fit, and for negative counts or counts at a spot whose
        offset is ``-inf`` (an impossible likelihood).

    See Also
    --------
    pair_loss : the same comparison, two spots at a time.

    Examples
    --------
    Three times the counts at equal depth: at a score difference of log 3 the gradient is 0.

    >>> counts, section = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])
    >>> scores = torch.tensor([[1.0], [3.0]]).log().requires_grad_()
    >>> loss = list_loss(scores, counts, section=section, reduction="sum")
    >>> loss.backward()
    >>> loss.detach(), scores.grad.abs().max() < 1e-6
    (tensor(2.2493), tensor(True))
    """
    logits, counts, where = _inputs(scores, counts, section, offset, where)
    codes, n_sections = section_codes(section)
    log_share = segment_log_softmax(logits, codes, n_sections)
    loss = torch.where(where, -counts * log_share, 0.0)
    return _reduce(loss, where, weight, reduction)


def pair_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    pairs: Tensor | None = None,
    n_partners: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Binomial negative log-likelihood of how two spots share their counts (PairSTRank).

    .. math::
        L_{ijg} = -c_{ig} \log p_{ijg} - c_{jg} \log (1 - p_{ijg}), \qquad
        p_{ijg} = \frac{l_i e^{r_{ig}}}{l_i e^{r_{ig}} + l_j e^{r_{jg}}}

    Parameters
    ----------
    scores, counts, section, offset, where
        As in `list_loss`; a pair with an element left out by ``where`` contributes 0.
    weight
        Weight of each gene, ``[n_genes]``.
    reduction
        ``"none"`` returns the two terms of every pair, ``[n_pairs, 2, n_genes]``, ``"sum"``
        their sum, ``"mean"`` the sum divided by the number of terms that take part.
    pairs
        Row indices of the pairs to compare, ``[n_pairs, 2]``; both spots of a pair must be of
        one section. ``None`` draws them with `sample_pairs`.
    n_partners
        Partners drawn for every spot when ``pairs`` is ``None``.
    generator
        Source of randomness for the draw; torch's default one if ``None``.

    Returns
    -------
    Tensor
        A scalar, or ``[n_pairs, 2, n_genes]``. Sections of one spot have no pair.

    Raises
    ------
    ValueError
        As `list_loss`, and for a pair across sections.

    See Also
    --------
    list_loss : all spots of a section at once; less noisy for the same data.

    Examples
    --------
    >>> counts, section = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])
    >>> pairs = torch.tensor([[0, 1]])
    >>> pair_loss(torch.zeros(2, 1), counts, section=section, pairs=pairs, reduction="sum")
    tensor(2.7726)
    """
    logits, counts, where = _inputs(scores, counts, section, offset, where)
    if pairs is None:
        pairs = sample_pairs(section, n_partners, generator=generator)
    if (section[pairs[:, 0]] != section[pairs[:, 1]]).any():
        raise ValueError("pairs: both spots of a pair must be of the same section")
    both = where[pairs].all(1, keepdim=True).expand(-1, 2, -1)
    # Left-out elements hold -inf; replaced before the difference so that no NaN arises.
    logits = torch.where(both, logits[pairs], 0.0)
    log_share = logsigmoid(logits - logits.flip(1))
    loss = torch.where(both, -counts[pairs] * log_share, 0.0)
    return _reduce(loss, both, weight, reduction)


def sample_pairs(
    section: Tensor, n_partners: int = 1, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw partners uniformly from the other spots of a spot's section.

    Parameters
    ----------
    section
        Integer section labels, ``[n_spots]``.
    n_partners
        How many partners each spot gets (drawn with replacement).
    generator
        Source of randomness, on the device of ``section``.

    Returns
    -------
    Tensor
        Row indices ``[n_pairs, 2]``; a spot is never its own partner, and the only spot of a
        section is left out.

    Examples
    --------
    >>> sample_pairs(torch.tensor([4, 4, 9]))
    tensor([[0, 1],
            [1, 0]])
    """
    codes, n_sections = section_codes(section)
    order = torch.argsort(codes, stable=True)
    size = torch.bincount(codes, minlength=n_sections)
    start = torch.cumsum(size, 0) - size
    first = torch.arange(len(codes), device=codes.device)
    first = first[size[codes] > 1].repeat_interleave(n_partners)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    n, begin = size[codes[first]], start[codes[first]]
    # A step of 1 .. n-1 around the section never returns to the spot itself.
    draw = torch.rand(len(first), generator=generator, device=codes.device, dtype=torch.float64)
    step = 1 + (draw * (n - 1)).long()
    second = order[begin + (rank[first] - begin + step) % n]
    return torch.stack([first, second], 1)


def _inputs(
    scores: Tensor, counts: Tensor, section: Tensor, offset: Tensor | None, where: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Check the arguments; return logits (``-inf`` where left out), counts and the mask."""
    if scores.dim() != 2 or scores.shape != counts.shape:
        raise ValueError(
            "scores and counts must both be [n_spots, n_genes]; got "
            f"{list(scores.shape)} and {list(counts.shape)}"
        )
    if section.shape != scores.shape[:1]:
        raise ValueError(f"section must be [n_spots] = [{len(scores)}]; got {list(section.shape)}")
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    logits, counts = scores, counts.to(scores.dtype)
    where = torch.ones_like(scores, dtype=torch.bool) if where is None else where.expand_as(scores)
    if ((counts < 0) & where).any():
        raise ValueError("counts must not be negative")
    if offset is not None:
        offset = offset[:, None] if offset.dim() == 1 else offset
        exposed = (offset > -torch.inf).expand_as(scores)
        if (where & ~exposed & (counts > 0)).any():
            raise ValueError("offset is -inf (no exposure) at a spot that has counts")
        where = where & exposed
        logits = scores + torch.where(exposed, offset.to(scores.dtype), 0.0)
    return torch.where(where, logits, -torch.inf), counts, where


def _reduce(loss: Tensor, where: Tensor, weight: Tensor | None, reduction: Reduction) -> Tensor:
    """Weight and reduce; the only place that knows what "mean" divides by."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}; got {reduction!r}")
    if weight is not None:
        loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / where.sum().clamp(min=1)
