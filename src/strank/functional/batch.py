"""What every loss shares: its arguments, checked, and what its mean divides by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from strank.functional.segments import SectionBlock, codes_and_sizes, section_blocks

# Depths e^25 = 7e10 times as large as others are none: no library has so many molecules.
_MOST_SPREAD = 25.0

Reduction = Literal["mean", "per_count", "per_gene", "sum", "none"]


@dataclass(frozen=True)
class LossBatch:
    """Arguments of a loss after `check_batch`: scores and counts ``[n_spots, n_genes]``."""

    scores: Tensor  # at least float32
    counts: Tensor  # of the same type, dense or CSR
    section: Tensor  # codes 0 .. n_sections - 1
    sizes: list[int]  # spots of each section
    offset: Tensor | None  # finite, [n_spots, 1] or [n_spots, n_genes]
    where: Tensor | None  # what takes part; it and weight can be broadcast to the scores
    weight: Tensor | None

    @property
    def n_sections(self) -> int:
        """How many sections there are."""
        return len(self.sizes)

    @property
    def logits(self) -> Tensor:
        """Scores plus offset: log rates up to a level."""
        return self.scores if self.offset is None else self.scores + self.offset

    def shared_logits(self) -> Tensor:
        """Logits of what has a share, ``-inf`` where left out."""
        return (
            self.logits if self.where is None else torch.where(self.where, self.logits, -torch.inf)
        )

    def weighted_counts(self) -> Tensor:
        """Multiply dense counts by weight, 0 where left out: the list loss is linear in them."""
        counts = masked(self.counts.to_dense() if self.sparse else self.counts, self.where)
        return counts if self.weight is None else counts * self.weight

    @property
    def sparse(self) -> bool:
        """Whether the counts are CSR."""
        return self.counts.layout == torch.sparse_csr

    def learned_offset_added(self) -> LossBatch:
        """Add an offset that needs a gradient to the scores: blocks compute only theirs."""
        if self.offset is None or not self.offset.requires_grad:
            return self
        return replace(self, scores=self.logits, offset=None)

    def gene_weight_apart(self) -> tuple[LossBatch, Tensor | float]:
        """Return the batch without a weight of whole genes, and that weight (else 1)."""
        if self.weight is None or self.weight.dim() == 2:
            return self, 1.0
        return replace(self, weight=None), self.weight.reshape(-1)

    def blocks(self) -> Iterator[tuple[SectionBlock, LossBatch]]:
        """Cut into whole sections; CSR counts stay whole."""
        for block in section_blocks(self.section, self.sizes, self.scores):
            if block.section is self.section:
                yield block, self
                continue

            def rows(values: Tensor, block: SectionBlock = block) -> Tensor:
                each = values.dim() == 2 and len(values) == len(self.scores)
                return block.of(values) if each else values

            part = self._each(rows)
            yield block, replace(part, section=block.section, sizes=self.sizes[block.sections])

    def of_genes(self, genes: slice) -> LossBatch:
        """Return some of the genes; CSR counts stay whole."""
        n_genes = self.scores.shape[1]
        if genes.stop - genes.start == n_genes:
            return self
        return self._each(
            lambda values: columns(values, genes) if values.shape[-1] == n_genes else values
        )

    def _each(self, part: Callable[[Tensor], Tensor]) -> LossBatch:
        return replace(
            self,
            scores=part(self.scores),
            counts=self.counts if self.sparse else part(self.counts),
            offset=None if self.offset is None else part(self.offset),
            where=None if self.where is None else part(self.where),
            weight=None if self.weight is None else part(self.weight),
        )

    def relabelled(self, section: Tensor) -> LossBatch:
        """Return the same spots in other sections."""
        codes, sizes = codes_and_sizes(section)
        return replace(self, section=codes, sizes=sizes)

    def elements(self) -> Tensor | int:
        """How many spots take part, per gene: ``[n_genes]``, or one number for all."""
        if self.where is None:
            return len(self.scores)
        return self.where.expand_as(self.scores).sum(0).to(self.scores.dtype)

    def gene_counts(self) -> Tensor:
        """Sum the counts of the spots that take part, per gene: ``[n_genes]``."""
        if self.sparse:
            return self.scores.new_zeros(self.scores.shape[1]).index_add(
                0, self.counts.col_indices(), self.stored_counts()
            )
        return masked(self.counts, self.where).sum(0)

    def stored_counts(self) -> Tensor:
        """Return the stored values of CSR counts, 0 where left out."""
        values = self.counts.values()
        if self.where is None:
            return values
        return masked(values, self.where.expand_as(self.scores)[self.nonzero()])

    def nonzero(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the stored values of CSR counts."""
        columns = self.counts.col_indices()
        per_row = self.counts.crow_indices().diff()
        return torch.repeat_interleave(per_row, output_size=len(columns)), columns


class GeneTotals(torch.autograd.Function):
    """A loss of every gene times its factor, summed.

    ``forward`` gets scores and factor first, and saves the gradient of both.
    """

    @classmethod
    def of(cls, batch: LossBatch, factor: Tensor | float, *others: Any) -> Tensor:
        """Compute it; the factor is a number or can be broadcast to ``[n_genes]``."""
        if isinstance(factor, Tensor):
            factor = factor.expand(batch.scores.shape[1])
        return cls.apply(batch.scores, factor, batch, *others)

    @staticmethod
    def saved(ctx: Any, totals: Tensor, factor: Tensor | float, gradient: Tensor | None) -> Tensor:
        """Save loss per gene and gradient of scores, factor included; return the loss."""
        ctx.save_for_backward(totals if ctx.needs_input_grad[1] else None, gradient)
        return (totals * factor).sum() if isinstance(factor, Tensor) else totals.sum() * factor

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients of scores and factor; the other inputs have none."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a summed or averaged list or pair loss can be differentiated only once; "
                "take reduction='none' and sum it for second derivatives"
            )
        totals, gradient = ctx.saved_tensors
        # On a GPU it is no use to wait for the number.
        as_it_is = grad_loss.device.type == "cpu" and grad_loss.item() == 1
        if gradient is not None and not as_it_is:
            gradient = gradient * grad_loss
        of_factor = None if totals is None else totals * grad_loss
        return gradient, of_factor, *(None for _ in ctx.needs_input_grad[2:])


def factor_of(factor: Tensor | float, genes: slice | Tensor) -> Tensor | float:
    """Return the factor of some genes."""
    return factor[genes] if isinstance(factor, Tensor) else factor


def columns(values: Tensor, genes: slice) -> Tensor:
    """Return a view of some genes; small batches have one block, and no time for views."""
    return values if genes.stop - genes.start == values.shape[-1] else values[..., genes]


def masked(values: Tensor, where: Tensor | None) -> Tensor:
    """Return values with 0 where left out, whatever stood there."""
    return values if where is None else torch.where(where, values, 0.0)


def check_batch(
    scores: Tensor,
    counts: Tensor,
    *,
    section: Tensor | ArrayLike,
    offset: Tensor | None = None,
    where: Tensor | None = None,
    weight: Tensor | None = None,
    sparse: bool = False,
) -> LossBatch:
    """Check the arguments of a loss, as `list_loss` says; half precision becomes float32."""
    _refuse_other_kinds(scores=scores, counts=counts, offset=offset, where=where, weight=weight)
    if scores.dim() != 2 or scores.shape != counts.shape:
        raise ValueError(
            "scores and counts must both be [n_spots, n_genes]; got "
            f"{list(scores.shape)} and {list(counts.shape)}"
        )
    section = _numbers(section, scores)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if counts.layout != torch.strided and not (sparse and counts.layout == torch.sparse_csr):
        expected = "dense or CSR" if sparse else "dense for this loss: counts.to_dense()"
        raise ValueError(f"counts must be {expected}; got layout {counts.layout}")
    codes, sizes = codes_and_sizes(section)
    if where is not None:
        where = _column("where", where.bool(), scores)
    if weight is not None:
        weight = check_fits("weight", weight.to(scores), scores)
    if offset is not None:
        if offset.dim() == 1 and len(offset) != len(scores):
            raise ValueError(_unfit("offset", offset, scores))
        offset = _column("offset", offset.to(scores), scores)
    batch = LossBatch(scores, counts.to(scores.dtype), codes, sizes, offset, where, weight)
    if offset is not None:
        batch = _usual_offset(batch, offset)
    _refuse_negative(batch)
    return batch


def _refuse_other_kinds(**given: Any) -> None:
    for name, values in given.items():
        if values is not None and not isinstance(values, Tensor):
            raise TypeError(
                f"`{name}` must be a tensor; got {type(values).__name__}: torch.as_tensor({name})"
            )


def _numbers(section: Tensor | ArrayLike, scores: Tensor) -> Tensor:
    """Return a tensor as it is; number other labels in sorted order, where the scores are."""
    labels: Any = section
    if not isinstance(section, Tensor):
        # Who labels by tensors need not wait for pandas and scikit-learn.
        from strank.functional.groups import as_labels, codes_of

        labels = as_labels(section)
    if labels.shape != scores.shape[:1]:
        raise ValueError(f"section must be [n_spots] = [{len(scores)}]; got {list(labels.shape)}")
    if isinstance(section, Tensor):
        return section
    return torch.as_tensor(codes_of("section", labels, in_order=True), device=scores.device)


def check_logarithm(low: float, high: float) -> None:
    """Refuse offsets as far apart as only library sizes are whose logarithm was not taken."""
    if high - low > _MOST_SPREAD:
        raise ValueError(
            f"`offset` is from {low:g} to {high:g}, as library sizes are; it must be their "
            "natural logarithm: log(library_size)"
        )


def _refuse_negative(batch: LossBatch) -> None:
    counts = batch.counts.values() if batch.sparse else batch.counts
    # What is left out may be anything, but masking is slow and seldom needed.
    if not counts.numel() or counts.min().item() >= 0:
        return
    counts = batch.stored_counts() if batch.sparse else masked(counts, batch.where)
    if not counts.min() >= 0:
        raise ValueError("counts must not be negative or NaN")


def _usual_offset(batch: LossBatch, offset: Tensor) -> LossBatch:
    """Check the offset; where it is -inf nothing takes part."""
    if offset.numel():
        low, high = offset.detach().aminmax()
        # Nearly always: then they are finite, too.
        if high.item() - low.item() <= _MOST_SPREAD:
            return batch
    batch = _without_exposure(batch, offset)
    _refuse_library_sizes(batch)
    return batch


def _without_exposure(batch: LossBatch, offset: Tensor) -> LossBatch:
    if offset.isfinite().all():
        return batch
    if masked(offset.isnan() | (offset == torch.inf), batch.where).any():
        raise ValueError("offset must be finite, or -inf for no exposure; got NaN or inf")
    exposed = offset.isfinite()
    if batch.sparse:
        exposed_counts = exposed.expand_as(batch.scores)[batch.nonzero()]
        impossible = (batch.stored_counts() > 0) & ~exposed_counts
    else:
        impossible = ~exposed & (masked(batch.counts, batch.where) > 0)
    if impossible.any():
        raise ValueError("offset is -inf (no exposure) at a spot that has counts")
    where = exposed if batch.where is None else batch.where & exposed
    return replace(batch, offset=torch.where(exposed, offset, 0.0), where=where)


def _refuse_library_sizes(batch: LossBatch) -> None:
    offset, where = batch.offset, batch.where
    if offset is None or offset.requires_grad or not batch.scores.numel():
        return
    # Of the spots of a gene: how genes differ is no matter of depth.
    low, high = offset.amin(0), offset.amax(0)
    if where is not None and (high - low).max() > _MOST_SPREAD:
        # What is left out may be anything, but masking is slow and seldom needed.
        low = torch.where(where, offset, torch.inf).amin(0)
        high = torch.where(where, offset, -torch.inf).amax(0)
    widest = int((high - low).argmax())
    check_logarithm(float(low[widest]), float(high[widest]))


def _column(name: str, values: Tensor, scores: Tensor) -> Tensor:
    """Read ``[n_spots]`` as one value a spot."""
    if values.shape == scores.shape[:1]:
        return values[:, None]
    return check_fits(name, values, scores)


def check_fits(name: str, values: Tensor, scores: Tensor) -> Tensor:
    """Return values that can be broadcast to scores; refuse others."""
    sizes = zip(reversed(values.shape), reversed(scores.shape), strict=False)
    if values.dim() > scores.dim() or not all(size in (1, wanted) for size, wanted in sizes):
        raise ValueError(_unfit(name, values, scores))
    return values


def _unfit(name: str, values: Tensor, scores: Tensor) -> str:
    return f"{name} must fit scores {list(scores.shape)}; got {list(values.shape)}"


def reduce_loss(
    loss: Tensor,
    reduction: Reduction,
    *,
    elements: Tensor | int,
    counts: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Reduce a weighted loss ``[..., n_genes]`` as `gene_factor` says."""
    factor = gene_factor(loss.shape[-1], reduction, elements=elements, counts=counts)
    if reduction == "none":
        return loss
    if not isinstance(factor, Tensor):
        return loss.sum() * factor
    return ((loss.flatten(0, -2).sum(0) if loss.dim() > 1 else loss) * factor).sum()


def gene_factor(
    n_genes: int,
    reduction: Reduction,
    *,
    elements: Tensor | int,
    counts: Callable[[], Tensor] | None = None,
) -> Tensor | float:
    """Return what a gene's loss is multiplied by; only here it is known what means divide by.

    ``elements``, and what ``counts`` returns for a likelihood of counts, are of each gene. Weights
    enter no divisor.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {get_args(Reduction)}; got {reduction!r}")
    if reduction == "per_count" and counts is None:
        raise ValueError("reduction 'per_count' is for likelihoods of counts; use 'mean'")
    if reduction in ("none", "sum"):
        return 1.0
    size = elements if reduction == "mean" or counts is None else counts()
    if isinstance(size, int):
        return 1 / max(size * n_genes, 1)
    if reduction == "per_gene":
        present = size > 0
        return torch.where(present, 1 / _or_one(size), 0.0) / present.sum().clamp(min=1)
    return 1 / _or_one(size.sum())


def _or_one(size: Tensor) -> Tensor:
    return torch.where(size > 0, size, 1.0)
