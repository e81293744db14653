r"""Losses that compare all the spots of a section at once.

Scores :math:`r_{ig}` are log relative rates. With library sizes :math:`l_i` as exposure, a spot's
share of its list is :math:`p_i = l_i e^{r_i} / \sum_j l_j e^{r_j}`. A constant per section and gene
cancels.

Reference: Nishimura et al., NeurIPS 2025, arXiv 2512.06612.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from strank.functional.batch import (
    GeneTotals,
    LossBatch,
    Reduction,
    check_batch,
    check_fits,
    columns,
    factor_of,
    gene_factor,
    masked,
    reduce_loss,
)
from strank.functional.distributed import PartTotals, all_summed, in_common_sections, n_processes
from strank.functional.pointwise import log1p_rate
from strank.functional.segments import (
    gene_blocks,
    of_rows,
    random_lists,
    segment_log_softmax,
    segment_shift,
    segment_sum,
)

# Sums of e to the logits that are as good as those after a shift: shares are then exact down to
# 1e-25, and no logarithm is so large that the loss would lose digits to it.
_MOST_NORM = 1e13


def list_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor | ArrayLike,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    list_size: int | None = None,
    generator: torch.Generator | None = None,
    distributed: bool = False,
) -> Tensor:
    r"""Multinomial negative log-likelihood of a section's counts over its spots (ListSTRank).

    Definition (Nishimura et al., NeurIPS 2025, arXiv 2512.06612):

    .. math:: L_{ig} = -c_{ig} \log \frac{l_i e^{r_{ig}}}{\sum_{j \in s(i)} l_j e^{r_{jg}}}

    For fixed totals it is, up to a constant, the Poisson likelihood with a free level per section
    and gene (`poisson_loss` with ``free_level=True``). A sum or mean is computed in blocks of
    genes, gradient included: one array of the size of the scores is kept, and it can be
    differentiated once.

    Parameters
    ----------
    scores
        Predicted log relative rates (natural log), ``[n_spots, n_genes]``. Half precision is
        computed and returned in float32.
    counts
        Non-negative raw counts, ``[n_spots, n_genes]``; dense, or a CSR tensor, which is not
        densified unless ``reduction="none"``. They are taken in the type of the scores, and float32
        is exact for whole numbers up to 2^24.
    section
        Section label of each spot, ``[n_spots]``: integers in a tensor, which need not be
        consecutive; or a list, an array or a column of pandas, of words too, which are numbered in
        sorted order at each call.
    offset
        Log library size, ``[n_spots]`` or ``[n_spots, n_genes]``; ``None`` stands for equal
        depth. A spot of offset ``-inf`` takes no share, and must have no counts.
    where
        Elements that take part, boolean, ``[n_spots]`` or broadcastable to ``scores``; the others
        neither take a share nor count.
    weight
        Weight of each gene ``[n_genes]``, or of each element, broadcastable to ``scores``; the
        latter gets no gradient.
    reduction
        ``"none"`` returns ``[n_spots, n_genes]``, ``"sum"`` its sum, ``"mean"`` the sum divided
        by the number of elements that take part, ``"per_count"`` by their counts (nats a count);
        ``"per_gene"`` divides every gene by its own counts and averages over genes. Weights enter
        no divisor.
    list_size
        N_k: sections are cut at random into lists of at most so many spots, anew at each call; a
        list of two is a pair. ``None`` takes whole sections.
    generator
        Source of randomness for ``list_size``; torch's default one if ``None``.
    distributed
        Whether a section's spots may lie on several processes of `torch.distributed`, under the
        same label. The loss is then of whole sections, as if one process had them all: each returns
        its part times the number of processes, so that the average over processes, which
        ``DistributedDataParallel`` takes of gradients, is loss and gradient of one process.
        Every process must call it, even with no spots; CSR counts are densified.

    Returns
    -------
    Tensor
        A scalar, or ``[n_spots, n_genes]``. A section of one spot, and a gene absent from a
        section, contribute exactly 0.

    Raises
    ------
    ValueError
        For tensors whose shapes do not fit, negative counts, counts at a spot whose offset is
        ``-inf`` (an impossible likelihood), lists of fewer than two spots, and ``list_size`` or
        ``reduction="none"`` of sections on several processes.

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
    batch = check_batch(
        scores, counts, section=section, offset=offset, where=where, weight=weight, sparse=True
    )
    if distributed and n_processes() > 1:
        if list_size is not None or reduction == "none":
            raise ValueError("distributed lists are whole sections, and have no reduction 'none'")
        if not isinstance(section, Tensor):
            raise TypeError(
                "`section` of distributed lists must be a tensor of the same numbers on every "
                f"process; got {type(section).__name__}"
            )
        return _distributed(in_common_sections(batch, section), reduction)
    if list_size is not None:
        lists = random_lists(batch.section, list_size, generator=generator)
        batch = batch.relabelled(lists)
    if reduction == "none":
        return _each_share(batch)
    batch, of_gene = batch.learned_offset_added().gene_weight_apart()
    factor = of_gene * gene_factor(
        batch.scores.shape[1], reduction, elements=batch.elements(), counts=batch.gene_counts
    )
    return _ListTotals.of(batch, factor)


def _each_share(batch: LossBatch) -> Tensor:
    """Follow the definition in plain autograd, ``[n_spots, n_genes]``."""
    log_share = segment_log_softmax(batch.shared_logits(), batch.section, batch.n_sections)
    counts = batch.counts.to_dense() if batch.sparse else batch.counts
    loss = -masked(counts, batch.where) * masked(log_share, batch.where)
    return loss if batch.weight is None else loss * batch.weight


def section_list_gain(scores: Tensor, counts: Tensor, offset: Tensor) -> Tensor:
    r"""List log-likelihood of one section above that of library size alone, ``[n_genes]``, in nats.

    .. math:: \sum_i c_{ig} r_{ig} - T_g \log \frac{\sum_i l_i e^{r_{ig}}}{\sum_i l_i}

    >>> counts = torch.tensor([[1.0], [3.0]])
    >>> section_list_gain(counts.log(), counts, torch.zeros(2))
    tensor([0.5232])
    """
    # About their mean, so that the two large terms do not lose the digits of their difference.
    scores, depth = scores - scores.mean(0), offset[:, None]
    rise = torch.logsumexp(scores + depth, 0) - torch.logsumexp(depth, 0)
    return (counts * scores).sum(0) - counts.sum(0) * rise


class _Stored(NamedTuple):
    """CSR counts as coordinates, for what is done once and not block by block."""

    rows: Tensor
    columns: Tensor
    section: Tensor
    values: Tensor
    totals: Tensor
    shift: Tensor  # what was subtracted from the logits, per section and gene

    @classmethod
    def of(cls, batch: LossBatch) -> _Stored:
        rows, columns = batch.nonzero()
        section, values = batch.section[rows], batch.stored_counts()
        if batch.weight is not None:
            values = values * batch.weight.expand_as(batch.scores)[rows, columns]
        totals = batch.scores.new_zeros(batch.n_sections, batch.scores.shape[1])
        totals.index_put_((section, columns), values, accumulate=True)
        return cls(rows, columns, section, values, totals, torch.zeros_like(totals))

    def add_loss(self, batch: LossBatch, loss: Tensor) -> None:
        """Subtract from the loss what the counts contribute."""
        logits = batch.scores[self.rows, self.columns]
        if batch.offset is not None:
            logits += batch.offset.expand_as(batch.scores)[self.rows, self.columns]
        # In the order of the blocks: a spot alone in its section is left with exactly 0.
        logits -= self.shift[self.section, self.columns]
        # A count that weighs nothing may stand at a score that is not finite.
        data = torch.where(self.values == 0, 0.0, self.values * logits)
        loss.index_add_(0, self.columns, data, alpha=-1)

    def add_slope(self, gradient: Tensor, factor: Tensor | float) -> None:
        """Subtract from the gradient what the counts contribute."""
        slope = -self.values * factor_of(factor, self.columns)
        gradient.index_put_((self.rows, self.columns), slope, accumulate=True)


class _ListTotals(GeneTotals):
    """The definition; its gradient is computed on the way, in blocks."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, factor: Tensor | float, batch: LossBatch) -> Tensor:
        stored = _Stored.of(batch) if batch.sparse else None
        gradient = torch.empty_like(scores) if ctx.needs_input_grad[0] else None
        loss = scores.new_zeros(scores.shape[1])
        for block, part in batch.blocks():
            slope = None if gradient is None else block.place(gradient, part.scores)
            for genes in gene_blocks(part.scores):
                piece, own = part.of_genes(genes), (block.sections, genes)
                shares = _Shares.of(piece)
                if stored is None:
                    counts = piece.weighted_counts().contiguous()
                    totals = segment_sum(counts, piece.section, piece.n_sections)
                    of_counts = (masked(shares.logits, piece.where) * counts).sum(0)
                else:
                    stored.shift[own], totals = shares.shift, stored.totals[own]
                    of_counts = torch.zeros_like(totals[0])
                columns(loss, genes).add_((totals * shares.norm.log()).sum(0).sub_(of_counts))
                if slope is not None:
                    share = shares.share.mul_(of_rows(totals / shares.norm, piece.section))
                    share = share.sub_(counts) if stored is None else share
                    torch.mul(share, factor_of(factor, genes), out=columns(slope, genes))
            if gradient is not None and slope is not None:
                block.write(slope, gradient)
        if stored is not None:
            stored.add_loss(batch, loss)
            if gradient is not None:
                stored.add_slope(gradient, factor)
        return GeneTotals.saved(ctx, loss, factor, gradient)


class _Shares(NamedTuple):
    """Logits less a shift per section and gene, e to their power, and its sum in the section."""

    logits: Tensor
    share: Tensor
    norm: Tensor
    shift: Tensor | float

    @classmethod
    def of(cls, block: LossBatch) -> _Shares:
        """Shift so that nothing overflows or vanishes; not at all where nothing would."""
        codes, n = block.section, block.n_sections
        logits = block.shared_logits()
        # A spot alone has a share of exactly 1 if its own logit is subtracted.
        if block.where is None and logits.numel() and 1 not in block.sizes:
            share = logits.exp()
            norm = segment_sum(share, codes, n)
            low, high = norm.aminmax()
            if low.item() > 1 / _MOST_NORM and high.item() < _MOST_NORM:
                return cls(logits, share, norm, 0.0)
        shift = segment_shift(logits, codes, n)
        logits = logits - of_rows(shift, codes)
        share = logits.exp()
        norm = segment_sum(share, codes, n).clamp_(min=torch.finfo(share.dtype).tiny)
        return cls(logits, share, norm, shift)


def _distributed(batch: LossBatch, reduction: Reduction) -> Tensor:
    batch, of_gene = batch.learned_offset_added().gene_weight_apart()
    n_genes, own = batch.scores.shape[1], batch.elements()
    own = own if isinstance(own, Tensor) else batch.scores.new_full((n_genes,), own)
    elements, counts = all_summed(torch.stack([own, batch.gene_counts()]))
    factor = gene_factor(n_genes, reduction, elements=elements, counts=lambda: counts)
    return PartTotals.of(batch, of_gene * factor) * n_processes()


def pearson_loss(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor | ArrayLike,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    pooled: bool = False,
) -> Tensor:
    r"""Minus the Pearson correlation with log1p(counts per 10k), per section and gene.

    Definition:

    .. math:: L_{sg} = -\operatorname{corr}_{i \in s}(r_{ig}, y_{ig}), \qquad
        y_{ig} = \log(1 + 10^4 c_{ig} / l_i)

    Noise counts in full: a gene with few counts pulls as hard as one with many.

    Parameters
    ----------
    scores, counts, section, where
        As in `list_loss`; counts dense.
    offset
        Log library size; ``None`` takes :math:`y = \log(1 + c)`.
    weight
        Weight of each gene ``[n_genes]``, or of each section (in sorted order) and gene.
    reduction
        ``"none"`` returns ``[n_sections, n_genes]``, ``"sum"`` its sum; ``"mean"`` divides by the
        number of sections and genes with a correlation; ``"per_gene"`` takes the mean over
        sections first.
    pooled
        Correlate over all spots as if they were one section: the published "PCC". It rewards
        scores that tell sections apart.

    Returns
    -------
    Tensor
        A scalar, or ``[n_sections, n_genes]`` (``[1, n_genes]`` if pooled). Where scores or counts
        do not vary there is no correlation: exactly 0, without gradient.

    Raises
    ------
    ValueError
        As `list_loss`, and for ``reduction="per_count"``.

    Examples
    --------
    >>> scores, counts = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [9.0]])
    >>> pearson_loss(scores, counts, section=torch.tensor([0, 0]))
    tensor(-1.)
    """
    batch = check_batch(scores, counts, section=section, offset=offset, where=where)
    if pooled:
        batch = batch.relabelled(torch.zeros_like(batch.section))
    part = masked(torch.ones_like(batch.scores), batch.where)
    size = segment_sum(part, batch.section, batch.n_sections).clamp(min=1)

    def within(values: Tensor) -> Tensor:
        return segment_sum(values, batch.section, batch.n_sections)

    def centred(values: Tensor) -> tuple[Tensor, Tensor]:
        """Return deviations from the section's mean, and their sum of squares if they vary."""
        values = masked(values, batch.where)
        mean = (within(values) / size).index_select(0, batch.section)
        deviations = masked(values - mean, batch.where)
        square = within(deviations * deviations)
        # A constant's deviations are rounding errors, which would correlate at random.
        rounding = (16 * torch.finfo(values.dtype).eps) ** 2 * within(values * values)
        return deviations, torch.where(square > rounding, square, 0.0)

    score, score_square = centred(batch.scores)
    target, target_square = centred(log1p_rate(batch.counts, batch.offset))
    square = score_square * target_square
    defined = square > 0
    norm = torch.where(defined, square, 1.0).sqrt()
    loss = torch.where(defined, -within(score * target) / norm, 0.0)
    if weight is not None:
        loss = loss * check_fits("weight", weight.to(loss), loss)
    return reduce_loss(loss, reduction, elements=defined.sum(0).to(loss.dtype))
