"""Which spots of a section are compared with which."""

from __future__ import annotations

import torch
from torch import Tensor

from strank.functional.segments import section_codes, within_section_rank

__all__ = ["all_pairs", "choose_pairs", "sample_pairs"]


def sample_pairs(
    section: Tensor, n_partners: int = 1, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw partners uniformly from the other spots of a spot's section.

    Parameters
    ----------
    section
        Integer section labels, ``[n_spots]``.
    n_partners
        How many partners each spot gets (drawn with replacement), at least 1.
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
    order, rank, size = within_section_rank(codes, n_sections)
    start = torch.cumsum(size, 0) - size
    first = torch.repeat_interleave((size[codes] > 1) * n_partners)
    codes = codes[first]
    n = size[codes]
    # A step of 1 .. n-1 around the section never returns to the spot itself.
    draw = torch.rand(len(first), generator=generator, device=codes.device, dtype=torch.float64)
    step = 1 + (draw * (n - 1)).long()
    second = order[start[codes] + (rank[first] + step) % n]
    return torch.stack([first, second], 1)


def all_pairs(section: Tensor) -> Tensor:
    """Every pair of spots of a section, once: row indices ``[n_pairs, 2]``.

    Their number grows with the square of a section: 2,000 spots make two million pairs.

    Examples
    --------
    >>> all_pairs(torch.tensor([4, 9, 4, 4])).tolist()
    [[0, 2], [0, 3], [2, 3]]
    """
    codes, n_sections = section_codes(section)
    order, rank, size = within_section_rank(codes, n_sections)
    later = size[codes] - 1 - rank
    first = torch.repeat_interleave(later)
    before = torch.cumsum(later, 0) - later
    step = torch.arange(len(first), device=codes.device) - before[first]
    start = torch.cumsum(size, 0) - size
    second = order[start[codes[first]] + rank[first] + 1 + step]
    return torch.stack([first, second], 1)


def choose_pairs(
    section: Tensor,
    pairs: Tensor | None,
    n_partners: int | None,
    generator: torch.Generator | None,
) -> Tensor:
    """Check the pairs given, or draw them as `strank.functional.pairwise.pair_loss` says."""
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
