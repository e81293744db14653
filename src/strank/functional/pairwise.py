"""Losses that compare two spots of a section at a time, and which spots those are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn.functional import softplus

from strank.functional.batch import (
    GeneTotals,
    LossBatch,
    Reduction,
    check_batch,
    factor_of,
    gene_factor,
    masked,
    reduce_loss,
)
from strank.functional.segments import (
    WITHOUT_FLOAT64,
    gene_blocks,
    in_float64,
    section_codes,
    within_section_rank,
)

Ties = Literal["none", "second"]
# Relative difference of two rates below which they are the same: float32 offsets round.
_SAME_RATE = 2e-6


def sample_pairs(
    section: Tensor, n_partners: int = 1, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw partners from the other spots of a spot's section: rows ``[n_pairs, 2]``.

    Uniformly and with replacement. The only spot of a section is left out.
    """
    codes, n_sections = section_codes(section)
    order, rank, size = within_section_rank(codes, n_sections)
    start = torch.cumsum(size, 0) - size
    first = torch.repeat_interleave((size[codes] > 1) * n_partners)
    codes = codes[first]
    n = size[codes]
    # A step of 1 .. n-1 around the section never returns to the spot itself.
    dtype = torch.float32 if codes.device.type in WITHOUT_FLOAT64 else torch.float64
    draw = torch.rand(len(first), generator=generator, device=codes.device, dtype=dtype)
    # A float32 just below 1 may round to the end.
    step = 1 + torch.minimum((draw * (n - 1)).long(), n - 2)
    second = order[start[codes] + (rank[first] + step) % n]
    return torch.stack([first, second], 1)


def all_pairs(section: Tensor) -> Tensor:
    """Every pair of spots of a section, once: rows ``[n_pairs, 2]``, half its square in number."""
    codes, n_sections = section_codes(section)
    order, rank, size = within_section_rank(codes, n_sections)
    later = size[codes] - 1 - rank
    first = torch.repeat_interleave(later)
    before = torch.cumsum(later, 0) - later
    step = torch.arange(len(first), device=codes.device) - before[first]
    start = torch.cumsum(size, 0) - size
    second = order[start[codes[first]] + rank[first] + 1 + step]
    return torch.stack([first, second], 1)


def permuted_pairs(section: Tensor, n_permutations: int = 1) -> Tensor:
    """Pair the spots of a section by random permutations, as published: rows ``[n_pairs, 2]``.

    In each, every spot stands once on either side, and may meet itself.
    """
    codes, _ = section_codes(section)
    first = codes.argsort(stable=True).expand(n_permutations, -1)
    codes = in_float64(codes)
    draw = torch.rand(first.shape, device=codes.device, dtype=codes.dtype)
    second = (codes + draw).argsort(1).to(first.device)
    return torch.stack([first, second], -1).flatten(0, 1)


def choose_pairs(
    section: Tensor,
    pairs: Tensor | None,
    n_partners: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Check the pairs given, or draw them as `pair_loss` says."""
    if pairs is None:
        if n_partners is None:
            return all_pairs(section)
        if n_partners < 1:
            raise ValueError(f"n_partners must be at least 1, or None for all; got {n_partners}")
        return sample_pairs(section, n_partners, generator=generator)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be [n_pairs, 2]; got {list(pairs.shape)}")
    if pairs.numel() and not (pairs.min() >= 0 and pairs.max() < len(section)):
        raise ValueError(f"pairs must be rows between 0 and {len(section) - 1}")
    if (section[pairs[:, 0]] != section[pairs[:, 1]]).any():
        raise ValueError("pairs: both spots of a pair must be of the same section")
    return pairs


def pair_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor | ArrayLike,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    pairs: Tensor | None = None,
    n_partners: int | None = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Binomial negative log-likelihood of how two spots share their counts (PairSTRank).

    Definition (Nishimura et al., NeurIPS 2025, arXiv 2512.06612):

    .. math::
        L_{ijg} = -c_{ig} \log p_{ijg} - c_{jg} \log (1 - p_{ijg}), \qquad
        p_{ijg} = \frac{l_i e^{r_{ig}}}{l_i e^{r_{ig}} + l_j e^{r_{jg}}}

    With :math:`k` partners for each of the :math:`n_s` spots of a section, a pair is drawn from
    both its ends, so the expected sum over a section is :math:`2k / (n_s - 1)` times the sum over
    all its pairs. For large differences of the logits it approaches a hinge loss weighted by
    counts. A sum or mean is computed in blocks, gradient included, and can be differentiated once.

    Parameters
    ----------
    scores, counts, section, offset, where
        As in `list_loss`, counts dense; a pair with an element left out by ``where`` contributes
        0.
    weight
        Weight of each gene, ``[n_genes]``.
    reduction
        ``"none"`` returns the two terms of every pair, ``[n_pairs, 2, n_genes]``, ``"sum"``
        their sum, ``"mean"`` the sum divided by the number of terms that take part, ``"per_count"``
        by their counts (a spot's as often as it is compared); ``"per_gene"`` divides every gene
        by its own counts and averages over genes.
    pairs
        Row indices of the pairs to compare, ``[n_pairs, 2]``; both spots of a pair must be of
        one section. ``None`` draws them.
    n_partners
        How many other spots of its section each spot is compared with, drawn uniformly with
        replacement; ``None`` for all pairs, each once. Ignored
        if ``pairs`` are given.
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
    >>> pair_loss(
    ...     torch.zeros(2, 1), counts, section=section, n_partners=None, reduction="sum"
    ... )
    tensor(2.7726)
    """
    batch = check_batch(scores, counts, section=section, offset=offset, where=where)
    pairs = choose_pairs(batch.section, pairs, n_partners, generator)
    of_gene = 1.0 if weight is None else _gene_weight(weight, batch.scores)
    if reduction == "none":
        return _each_pair(batch, pairs) * of_gene
    factor = gene_factor(
        scores.shape[1],
        reduction,
        elements=2 * _compared(batch, pairs),
        counts=lambda: _compared_counts(batch, pairs),
    )
    return _PairTotals.of(batch.learned_offset_added(), of_gene * factor, pairs)


def margin_ranking_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor | ArrayLike,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    pairs: Tensor | None = None,
    n_partners: int | None = 1,
    generator: torch.Generator | None = None,
    margin: float = 1.0,
    ties: Ties = "none",
) -> Tensor:
    r"""Hinge loss on the order of two spots' rates :math:`c / l`, whatever their counts.

    Definition:

    .. math:: L_{ijg} = \max(0,\; m - y_{ijg} (r_{ig} - r_{jg})), \qquad
        y_{ijg} = \operatorname{sign}(c_{ig} / l_i - c_{jg} / l_j)

    Parameters
    ----------
    scores, counts, section, offset, where, pairs, n_partners, generator
        As in `pair_loss`. The offset enters the order of the rates, not the scores.
    weight
        Weight of each gene, ``[n_genes]``.
    reduction
        ``"none"`` returns ``[n_pairs, n_genes]``; ``"mean"`` divides by the number of comparisons
        that take part, ``"per_gene"`` does so for every gene and averages over genes.
    margin
        m, not negative. With 0, equal scores for all spots are an optimum.
    ties
        Equal rates are no comparison (``"none"``), or ask that the second spot be higher
        (``"second"``): with ``margin=0`` that is the published loss.

    Returns
    -------
    Tensor
        A scalar, or ``[n_pairs, n_genes]``.

    Raises
    ------
    ValueError
        As `pair_loss`, and for a negative margin, unknown ties, or ``reduction="per_count"``.

    Examples
    --------
    >>> counts, section = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])
    >>> scores = torch.tensor([[0.0], [0.4]])
    >>> margin_ranking_loss(scores, counts, section=section, n_partners=None)
    tensor(0.6000)
    """
    if not margin >= 0:
        raise ValueError(f"margin must not be negative; got {margin}")
    if ties not in get_args(Ties):
        raise ValueError(f"ties must be one of {get_args(Ties)}; got {ties!r}")
    batch = check_batch(scores, counts, section=section, offset=offset, where=where)
    pairs = choose_pairs(batch.section, pairs, n_partners, generator)
    first, second = pairs.unbind(1)
    order = _order(_rates(batch)).to(batch.scores)
    above, below = order.index_select(0, first), order.index_select(0, second)
    difference = batch.scores.index_select(0, first) - batch.scores.index_select(0, second)
    part = _both(batch, pairs)
    if ties == "second":
        preference = (above > below).to(difference.dtype).mul_(2).sub_(1)
    else:
        preference = (above - below).sign_()
        part = preference != 0 if part is None else part & (preference != 0)
    loss = masked((margin - preference * difference).clamp(min=0), part)
    if weight is not None:
        loss = loss * _gene_weight(weight, batch.scores)
    elements = len(pairs) if part is None else part.sum(0).to(loss.dtype)
    return reduce_loss(loss, reduction, elements=elements)


def _gene_weight(weight: Tensor, scores: Tensor) -> Tensor:
    if weight.shape != scores.shape[1:]:
        raise ValueError(
            f"weight must be [n_genes] = [{scores.shape[1]}] here; got {list(weight.shape)}"
        )
    return weight.to(scores)


def _each_pair(batch: LossBatch, pairs: Tensor) -> Tensor:
    """Follow the definition in plain autograd: both terms of every pair."""
    first, second = pairs.unbind(1)
    logits = masked(batch.logits, batch.where)
    difference = logits.index_select(0, first) - logits.index_select(0, second)
    # -log p is softplus of minus the difference of logits.
    log_odds = torch.stack([-difference, difference], 1)
    counts = masked(batch.counts, batch.where)[pairs]
    if (both := _both(batch, pairs)) is not None:
        counts = masked(counts, both[:, None])
    return counts * softplus(log_odds)


class _PairTotals(GeneTotals):
    """The definition; its gradient is computed on the way, in blocks."""

    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, factor: Tensor | float, batch: LossBatch, pairs: Tensor
    ) -> Tensor:
        gradient = torch.empty_like(scores) if ctx.needs_input_grad[0] else None
        loss = scores.new_zeros(scores.shape[1])
        for genes in gene_blocks(scores):
            block = batch.of_genes(genes)
            block = replace(block, scores=block.logits.contiguous(), offset=None)
            slope = torch.zeros_like(block.scores)
            # No more pairs at a time than spots, so that no temporary outgrows the block.
            for part in pairs.split(max(len(scores), 1)):
                loss[genes] += _pair_block(block, part, slope)
            if gradient is not None:
                torch.mul(slope, factor_of(factor, genes), out=gradient[:, genes])
        return GeneTotals.saved(ctx, loss, factor, gradient)


def _pair_block(block: LossBatch, pairs: Tensor, gradient: Tensor) -> Tensor:
    """Loss per gene of some pairs; adds to the gradient."""
    first, second = pairs.unbind(1)
    difference = block.scores.index_select(0, first)
    difference -= block.scores.index_select(0, second)
    of_first, of_second = (block.counts.index_select(0, spots) for spots in (first, second))
    both = _both(block, pairs)
    difference, of_first, of_second = (masked(v, both) for v in (difference, of_first, of_second))
    # The wrong way round costs the hinge of the other spot's counts; the rest is at most log 2.
    loss = of_second * difference.clamp(min=0)
    loss -= of_first * difference.clamp(max=0)
    total = of_first + of_second
    loss += _log1p(difference.abs().neg_().exp_()).mul_(total)
    slope = difference.sigmoid_().mul_(total).sub_(of_first)
    gradient.index_add_(0, first, slope).index_add_(0, second, slope.neg_())
    return loss.sum(0)


def _log1p(values: Tensor) -> Tensor:
    """Compute log(1 + x) for x >= 0; torch's own is ten times as slow on a CPU."""
    above = 1 + values
    # What adding 1 rounded away (Kahan).
    lost = (above - 1).sub_(values).div_(above)
    return above.log_().sub_(lost)


def _compared(batch: LossBatch, pairs: Tensor) -> Tensor | int:
    """How many pairs take part, per gene, or for all."""
    if (both := _both(batch, pairs)) is None:
        return len(pairs)
    return both.sum(0).to(batch.scores)


def _compared_counts(batch: LossBatch, pairs: Tensor) -> Tensor:
    """Sum the counts of the spots of these pairs, per gene."""
    if (both := _both(batch, pairs)) is None:
        times = torch.bincount(pairs.flatten(), minlength=len(batch.scores))
        return times.to(batch.counts) @ batch.counts
    return masked(batch.counts[pairs].sum(1), both).sum(0)


def _both(batch: LossBatch, pairs: Tensor) -> Tensor | None:
    """Pairs of which both spots take part, ``[n_pairs, n_genes]``; ``None`` for all."""
    if batch.where is None:
        return None
    first, second = pairs.unbind(1)
    where = batch.where.expand_as(batch.scores)
    return where.index_select(0, first) & where.index_select(0, second)


def _order(rates: Tensor) -> Tensor:
    """Give every rate of a gene its place from the lowest; equal ones the same."""
    ordered, spots = rates.sort(0)
    higher = ordered.diff(dim=0, prepend=ordered[:1]) > _SAME_RATE * ordered
    return torch.empty_like(spots).scatter_(0, spots, higher.cumsum(0))


def _rates(batch: LossBatch) -> Tensor:
    """Divide counts by library size; in float64, where equal rates of other depth stay equal."""
    counts = in_float64(masked(batch.counts, batch.where))
    return counts if batch.offset is None else counts * (-in_float64(batch.offset)).exp()
