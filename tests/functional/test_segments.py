from __future__ import annotations

import torch

from strank.functional.segments import segment_logsumexp, segment_max, segment_sum


def test_segments_equal_a_loop_over_sections():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    section = torch.randint(0, 6, (50,), generator=generator)
    for function, plain in [
        (segment_sum, lambda v: v.sum(0)),
        (segment_max, lambda v: v.amax(0)),
        (segment_logsumexp, lambda v: v.logsumexp(0)),
    ]:
        expected = torch.stack([plain(values[section == s]) for s in range(6)])
        torch.testing.assert_close(function(values, section, 6), expected)


def test_a_section_of_nothing_but_minus_infinity_stays_there():
    values = torch.tensor([[-torch.inf], [0.0]])
    got = segment_logsumexp(values, torch.tensor([0, 1]), 3)
    assert got.flatten().tolist() == [-torch.inf, 0.0, -torch.inf]
