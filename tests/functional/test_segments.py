from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strank.functional.pairwise import all_pairs
from strank.functional.segments import (
    codes_and_sizes,
    random_lists,
    section_codes,
    segment_log_softmax,
    segment_logsumexp,
    segment_max,
    segment_sum,
    within_section_rank,
)


@st.composite
def sections(draw):
    sizes = draw(st.lists(st.integers(1, 20), max_size=4))
    labels = [7 - 3 * label for label, size in enumerate(sizes) for _ in range(size)]
    return torch.tensor(draw(st.permutations(labels))).long()


seeds = st.integers(0, 2**31)


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


def test_log_shares_add_up_to_one():
    generator = torch.Generator().manual_seed(0)
    values = 100 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    section = torch.randint(0, 6, (50,), generator=generator)
    shares = segment_log_softmax(values, section, 6).exp()
    torch.testing.assert_close(segment_sum(shares, section, 6), torch.ones(6, 4).double())


@settings(deadline=None, max_examples=40)
@given(section=sections())
def test_places_in_a_section(section):
    codes, n_sections = section_codes(section)
    order, rank, size = within_section_rank(codes, n_sections)
    for code in range(n_sections):
        rows = (codes == code).nonzero().flatten()
        assert rank[rows].tolist() == list(range(len(rows)))
        assert size[code] == len(rows)
    assert codes[order].tolist() == sorted(codes.tolist())


@settings(deadline=None, max_examples=40)
@given(section=sections())
def test_all_pairs_are_all_pairs_once(section):
    n = len(section)
    expected = [(i, j) for i in range(n) for j in range(i + 1, n) if section[i] == section[j]]
    assert sorted(map(tuple, all_pairs(section).sort(1).values.tolist())) == expected


@settings(deadline=None, max_examples=40)
@given(section=sections(), list_size=st.integers(2, 12), seed=seeds)
def test_random_lists_are_balanced_within_sections(section, list_size, seed):
    lists = random_lists(section, list_size, generator=torch.Generator().manual_seed(seed))
    for label in section.unique():
        sizes = lists[section == label].unique(return_counts=True)[1]
        # As few lists as can be, as equal as can be.
        assert len(sizes) == -(-int(sizes.sum()) // list_size)
        assert sizes.max() <= list_size
        assert sizes.max() - sizes.min() <= 1
    for label in lists.unique():
        assert len(section[lists == label].unique()) == 1


@settings(deadline=None, max_examples=40)
@given(section=sections(), seed=seeds)
def test_random_lists_follow_the_seed(section, seed):
    first, second = (
        random_lists(section, 3, generator=torch.Generator().manual_seed(seed)) for _ in range(2)
    )
    assert first.equal(second)


def test_random_lists_mix_all_spots():
    generator = torch.Generator().manual_seed(0)
    section, together = torch.zeros(6).long(), torch.zeros(6, 6)
    for _ in range(3000):
        lists = random_lists(section, 2, generator=generator)
        together += lists[:, None] == lists
    off_diagonal = together[~torch.eye(6, dtype=torch.bool)]
    # A pair of six shares a list of two with chance 1/5; 5 standard deviations, error below 1e-4.
    assert (off_diagonal - 600).abs().max() < 5 * (3000 * 0.2 * 0.8) ** 0.5


def test_random_lists_refuse_lists_of_one():
    with pytest.raises(ValueError, match="list_size must be at least 2; got 1"):
        random_lists(torch.zeros(3).long(), 1)


@pytest.mark.parametrize(
    "labels", [[0, 2, 1, 0], [0, 0], [5, 5, 9], [-1, 0], [0, 2, 2], [3, 0, 1], [], [10**12, 0]]
)
def test_codes_and_sizes_of_any_labels(labels):
    section = torch.tensor(labels).long()
    codes, sizes = codes_and_sizes(section)
    unique, expected, count = section.unique(return_inverse=True, return_counts=True)
    assert codes.equal(expected)
    assert sizes == count.tolist()
    assert unique[codes].equal(section)
