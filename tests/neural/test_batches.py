"""Batches: every spot once an epoch, in lists of its section, the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strank.neural.data import BatchPlan, SectionBatches, cut_epoch

# Codes with gaps, in any order; sections of one spot and of many.
CODES = st.lists(st.sampled_from([0, 1, 4, 9]), min_size=1, max_size=60).map(np.array)
SECTION_PLANS = st.builds(
    BatchPlan,
    sections=st.integers(1, 5),
    spots=st.integers(1, 9),
    uniform=st.sampled_from(["spots", "sections"]),
)
PLANS = SECTION_PLANS | st.builds(BatchPlan, sections=st.none(), spots=st.integers(1, 9))
SEEDS = st.integers(0, 2**31)


def cut(section, plan, seed=0):
    return cut_epoch(section, plan, np.random.default_rng(seed))


def batches_of(section, plan, *, rows=None, epoch=0, **options):
    rows = np.arange(len(section)) if rows is None else rows
    sampler = SectionBatches(section, rows, plan, **{"seed": 0} | options)
    sampler.set_epoch(epoch)
    return sampler


def sizes_of(section):
    return np.unique(section, return_counts=True)[1]


def as_lists(sampler):
    return [(epoch, rows.tolist()) for epoch, rows in sampler]


@settings(deadline=None)
@given(section=CODES, plan=PLANS, seed=SEEDS)
def test_every_spot_is_in_exactly_one_batch(section, plan, seed):
    batches = cut(section, plan, seed)
    assert sorted(np.concatenate(batches)) == list(range(len(section)))
    assert all(len(rows) for rows in batches)


@settings(deadline=None)
@given(section=CODES, plan=SECTION_PLANS, seed=SEEDS)
def test_a_batch_has_few_sections_and_few_spots_of_each(section, plan, seed):
    for rows in cut(section, plan, seed):
        sizes = sizes_of(section[rows])
        assert len(sizes) <= plan.sections
        assert sizes.max() <= plan.spots


@settings(deadline=None)
@given(section=CODES, plan=SECTION_PLANS, seed=SEEDS)
def test_a_section_is_cut_into_as_few_lists_as_can_be_or_as_many_as_the_others(section, plan, seed):
    # A batch has one list of a section at most.
    lists = {s: [] for s in np.unique(section)}
    for rows in cut(section, plan, seed):
        for s, size in zip(*np.unique(section[rows], return_counts=True), strict=True):
            lists[s].append(size)
    fewest = {s: -(-np.sum(section == s) // plan.spots) for s in lists}
    for s, sizes in lists.items():
        wanted = fewest[s]
        if plan.uniform == "sections":
            # But not of a single spot, which there would be nothing to compare with.
            wanted = max(wanted, min(max(fewest.values()), np.sum(section == s) // 2))
        assert len(sizes) == wanted
        assert max(sizes) - min(sizes) <= 1


def test_uniform_over_sections_gives_a_small_section_as_many_lists_as_a_large_one():
    section = np.repeat([3, 5], [40, 8])
    plan = BatchPlan(sections=2, spots=10, uniform="sections")
    for rows in cut(section, plan):
        assert np.bincount(section[rows], minlength=6).tolist() == [0, 0, 0, 10, 0, 2]


@settings(deadline=None)
@given(section=CODES, plan=SECTION_PLANS, seed=SEEDS)
def test_batches_are_no_more_than_needed_and_of_about_the_same_number_of_lists(section, plan, seed):
    n_lists = [len(np.unique(section[rows])) for rows in cut(section, plan, seed)]
    of_section = np.zeros(10, int)
    for rows in cut(section, plan, seed):
        of_section[np.unique(section[rows])] += 1
    assert len(n_lists) == max(-(-sum(n_lists) // plan.sections), of_section.max())
    assert max(n_lists) - min(n_lists) <= 1


@settings(deadline=None)
@given(section=CODES, spots=st.integers(1, 9), seed=SEEDS)
def test_without_sections_batches_are_of_any_spots_and_but_the_last_full(section, spots, seed):
    batches = cut(section, BatchPlan(sections=None, spots=spots), seed)
    *full, last = [len(rows) for rows in batches]
    assert full == [spots] * ((len(section) - 1) // spots)
    assert last == len(section) - sum(full) > 0


def test_without_sections_a_batch_mixes_them():
    section = np.repeat([0, 1], 100)
    for rows in cut(section, BatchPlan(sections=None, spots=100)):
        assert 25 < section[rows].sum() < 75


def test_lists_are_drawn_at_random_from_the_whole_section():
    """Not the spots that stand together in the table: 5 lists of 20 of 100 are all spread."""
    for rows in cut(np.zeros(100, int), BatchPlan(sections=1, spots=20)):
        assert rows.min() < 40
        assert rows.max() > 60
        assert np.ptp(np.diff(np.sort(rows))) > 0


def test_sections_meet_in_ever_other_batches():
    section, plan = np.repeat(np.arange(6), 4), BatchPlan(sections=2, spots=4)
    pairs = {
        tuple(np.unique(section[rows])) for seed in range(60) for rows in cut(section, plan, seed)
    }
    assert len(pairs) == 15


@settings(deadline=None)
@given(section=CODES, plan=PLANS, seed=st.integers(0, 99))
def test_an_epoch_has_as_many_batches_as_it_says_in_every_epoch(section, plan, seed):
    sampler = batches_of(section, plan, seed=seed)
    lengths = set()
    for epoch in range(4):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert {number for number, _ in batches} == {epoch}
        assert sorted(np.concatenate([rows for _, rows in batches])) == list(range(len(section)))
        lengths |= {len(sampler), len(batches)}
    assert len(lengths) == 1


@settings(deadline=None)
@given(section=CODES, plan=PLANS, seed=st.integers(0, 99), epoch=st.integers(0, 99))
def test_seed_and_epoch_determine_the_batches(section, plan, seed, epoch):
    sampler = batches_of(section, plan, seed=seed, epoch=epoch)
    again = batches_of(section, plan, seed=seed, epoch=epoch + 1)
    list(again)
    again.set_epoch(epoch)
    assert as_lists(sampler) == as_lists(again) == as_lists(sampler)


@pytest.mark.parametrize("sections", [None, 2])
def test_other_epochs_and_seeds_have_other_batches(sections):
    section, plan = np.repeat([0, 1, 2], 20), BatchPlan(sections=sections, spots=10)
    cuts = set()
    for seed in range(3):
        for epoch in range(3):
            sampler = batches_of(section, plan, seed=seed, epoch=epoch)
            # Not the same batches in another order.
            cuts.add(frozenset(frozenset(rows.tolist()) for _, rows in sampler))
    assert len(cuts) == 9


@settings(deadline=None)
@given(section=CODES, plan=PLANS, epoch=st.integers(0, 9), world=st.integers(2, 6))
def test_processes_share_each_batch_of_one_process(section, plan, epoch, world):
    alone = list(batches_of(section, plan, epoch=epoch))
    shards = [
        list(batches_of(section, plan, epoch=epoch, rank=rank, world=world))
        for rank in range(world)
    ]
    # As many steps on every process, even where a batch has fewer spots than there are processes.
    assert {len(shard) for shard in shards} == {len(alone)}
    for (_, whole), *parts in zip(alone, *shards, strict=True):
        own = [rows for _, rows in parts]
        assert sorted(np.concatenate(own)) == sorted(whole)
        sizes = [len(rows) for rows in own]
        assert max(sizes) - min(sizes) <= 1
    assert {len(batches_of(section, plan, rank=rank, world=world)) for rank in range(world)} == {
        len(alone)
    }


@settings(deadline=None)
@given(section=CODES, plan=PLANS, data=st.data())
def test_only_the_given_rows_are_trained_on(section, plan, data):
    every = st.permutations(range(len(section)))
    n_rows = data.draw(st.integers(1, len(section)))
    rows = np.array(data.draw(every)[:n_rows])
    batches = [batch for _, batch in batches_of(section, plan, rows=rows)]
    assert sorted(np.concatenate(batches)) == sorted(rows)
    if plan.sections is not None:
        for batch in batches:
            assert sizes_of(section[batch]).max() <= plan.spots
