"""Reductions within sections: one value per section and gene, without a Python loop.

A *segment* is the set of rows (spots) that carry the same section code. Every function takes
``section`` as integer codes ``0 .. n_sections - 1``; `section_codes` makes them from any labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Scores a block, on a CPU for each thread: its few temporaries then stay in a core's cache, and
# threads wait for each other seldom. A GPU wants more work at once.
_BLOCK = {"cpu": 2**18, "cuda": 2**25}
# A block for more threads would be large beside the scores.
_MOST_THREADS = 4
# Kinds of device that have no float64: Apple's.
WITHOUT_FLOAT64 = {"mps"}


def in_float64(values: Tensor) -> Tensor:
    """Return values in float64; on the CPU, where their device has none."""
    return (values.cpu() if values.device.type in WITHOUT_FLOAT64 else values).double()


def section_codes(section: Tensor) -> tuple[Tensor, int]:
    """Relabel sections as codes ``0 .. n_sections - 1`` in the order of labels; also count."""
    labels, codes = torch.unique(section, return_inverse=True)
    return codes, len(labels)


def codes_and_sizes(section: Tensor) -> tuple[Tensor, list[int]]:
    """Codes as `section_codes`, and spots of each; labels that are codes need no sorting."""
    if section.numel() and section.dtype in (torch.int64, torch.int32):
        low, high = section.aminmax()
        if low.item() == 0 and high.item() < len(section):
            sizes = torch.bincount(section).tolist()
            if 0 not in sizes:
                return section.long(), sizes
    _, codes, size = torch.unique(section, return_inverse=True, return_counts=True)
    return codes, size.tolist()


def segment_sum(values: Tensor, section: Tensor, n_sections: int) -> Tensor:
    """Sum rows within sections: ``[n_spots, ...]`` to ``[n_sections, ...]``."""
    if n_sections == 1:
        return values.sum(0, keepdim=True)
    return values.new_zeros(n_sections, *values.shape[1:]).index_add_(0, section, values)


def of_rows(values: Tensor, section: Tensor) -> Tensor:
    """Give every row its section's value; that of a single section is left to broadcasting."""
    return values if len(values) == 1 else values.index_select(0, section)


def segment_max(values: Tensor, section: Tensor, n_sections: int) -> Tensor:
    """Largest row value within sections; ``-inf`` for a section without rows."""
    index = section.reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    floor = values.new_full((n_sections, *values.shape[1:]), -torch.inf)
    return floor.scatter_reduce_(0, index, values, "amax")


def segment_shift(values: Tensor, section: Tensor, n_sections: int) -> Tensor:
    """Largest row value within sections, but finite: what is left after subtracting it is <= 0."""
    limit = torch.finfo(values.dtype).max
    return segment_max(values, section, n_sections).clamp_(-limit, limit)


def segment_logsumexp(values: Tensor, section: Tensor, n_sections: int) -> Tensor:
    r"""Stable :math:`\log \sum_{i \in s} e^{v_i}` per section; ``-inf`` where all are ``-inf``."""
    # The shift cancels in value and gradient, so it is kept out of the graph.
    shift = segment_shift(values.detach(), section, n_sections)
    return segment_sum((values - of_rows(shift, section)).exp(), section, n_sections).log() + shift


def segment_log_softmax(values: Tensor, section: Tensor, n_sections: int) -> Tensor:
    r"""Log share of a row in its section: :math:`v_i - \log \sum_{j \in s} e^{v_j}`."""
    return values - of_rows(segment_logsumexp(values, section, n_sections), section)


def within_section_rank(codes: Tensor, n_sections: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by section, place of each row in its section, spots of each section.

    >>> within_section_rank(torch.tensor([1, 0, 1]), 2)
    (tensor([1, 0, 2]), tensor([0, 0, 1]), tensor([1, 2]))
    """
    order = torch.argsort(codes, stable=True)
    size = torch.bincount(codes, minlength=n_sections)
    start = torch.cumsum(size, 0) - size
    place = torch.arange(len(codes), device=codes.device)
    rank = torch.empty_like(order).scatter_(0, order, place - start[codes[order]])
    return order, rank, size


def random_lists(
    section: Tensor, list_size: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Cut sections at random into lists of at most ``list_size`` spots, as equal as can be.

    >>> random_lists(torch.tensor([4, 4, 4, 4, 9]), 2).bincount().tolist()
    [2, 2, 1]
    """
    if list_size < 2:
        raise ValueError(f"list_size must be at least 2; got {list_size}")
    codes, n_sections = section_codes(section)
    shuffled = torch.randperm(len(codes), generator=generator, device=codes.device)
    _, rank, size = within_section_rank(codes[shuffled], n_sections)
    n_lists = (size + list_size - 1) // list_size
    first = torch.cumsum(n_lists, 0) - n_lists
    codes = codes[shuffled]
    label = first[codes] + rank * n_lists[codes] // size[codes]
    return torch.empty_like(label).scatter_(0, shuffled, label)


class SectionBlock(NamedTuple):
    """Whole sections."""

    rows: slice | Tensor
    sections: slice
    section: Tensor  # code of each row, from 0

    def of(self, values: Tensor) -> Tensor:
        """Return its rows."""
        if isinstance(self.rows, slice):
            return values[self.rows]
        return values.index_select(0, self.rows)

    def place(self, array: Tensor, copy: Tensor) -> Tensor:
        """Return where its rows are to be written before `write`: a view, or what `of` copied."""
        return array[self.rows] if isinstance(self.rows, slice) else copy

    def write(self, rows: Tensor, array: Tensor) -> None:
        """Write rows into an array, unless they are a view of it."""
        if not isinstance(self.rows, slice):
            index = self.rows[:, None].expand_as(rows)
            # Copies rows; index_copy_ takes up to twice the time on a CPU.
            array.scatter_reduce_(0, index, rows, "amax", include_self=False)


def section_blocks(section: Tensor, sizes: list[int], scores: Tensor) -> Iterator[SectionBlock]:
    """Cut spots into blocks of whole sections, where one has not too many in small ones."""
    n_spots, n_genes = scores.shape
    most = _block_size(scores)
    if n_spots * n_genes <= most or len(sizes) == 1:
        yield SectionBlock(slice(None), slice(None), section)
        return
    order = None
    if not (section[1:] >= section[:-1]).all():
        section, order = section.sort(stable=True)
    for sections, spots in _runs(sizes, most // n_genes):
        rows = spots if order is None else order[spots]
        yield SectionBlock(rows, sections, section[spots] - sections.start)


def _runs(sizes: list[int], most: int) -> Iterator[tuple[slice, slice]]:
    """Cut into runs of sections of at most so many spots, or of one; also the places of spots."""
    first = start = stop = 0
    for code, spots in enumerate(sizes):
        if code > first and stop + spots - start > most:
            yield slice(first, code), slice(start, stop)
            first, start = code, stop
        stop += spots
    yield slice(first, len(sizes)), slice(start, stop)


def gene_blocks(scores: Tensor) -> Iterator[slice]:
    """Cut the columns of ``[n_spots, n_genes]`` into blocks small enough to stay in the cache."""
    n_spots, n_genes = scores.shape
    width = max(1, _block_size(scores) // max(1, n_spots))
    for start in range(0, n_genes, width):
        yield slice(start, min(start + width, n_genes))


def _block_size(scores: Tensor) -> int:
    size = _BLOCK.get(scores.device.type, 2**25)
    if scores.device.type == "cpu":
        size *= min(torch.get_num_threads(), _MOST_THREADS)
    return size
