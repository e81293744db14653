"""Batches of spots: what they hold, whoever loads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import sparse

from strank.neural.augment import Augmentation
from strank.neural.data import (
    BatchPlan,
    SectionBatches,
    Spots,
    find_neighbours,
    training_loader,
    validation_loader,
)

N_SPOTS = 30


def section_loader(spots, sections, **options):
    """Whole sections, one a batch."""
    rows = [np.flatnonzero(spots.section == section) for section in sections]
    return validation_loader(spots, rows, **options)


def make_spots(**changes) -> Spots:
    rng = np.random.default_rng(0)
    return replace(
        Spots(
            inputs=rng.normal(size=(N_SPOTS, 3)).astype(np.float32),
            counts=sparse.csr_matrix(rng.poisson(1, size=(N_SPOTS, 4)).astype(np.float32)),
            section=rng.permutation(np.repeat([0, 2, 5], [15, 10, 5])),
            offset=rng.normal(size=N_SPOTS).astype(np.float32),
        ),
        **changes,
    )


def with_neighbours(spots, n_neighbours=6):
    positions = np.random.default_rng(1).uniform(0, 500, size=(N_SPOTS, 2))
    return replace(spots, neighbours=find_neighbours(positions, spots.section, n_neighbours))


def with_patches(spots, path=None):
    shape = N_SPOTS, 8, 8, 3
    patches = np.random.default_rng(2).integers(0, 256, size=shape, dtype=np.uint8)
    if path is not None:
        np.save(path, patches)
        patches = np.load(path, mmap_mode="r")
    return replace(spots, inputs=patches, augment=Augmentation(N_SPOTS, seed=3))


def batches_of(spots, **options):
    plan = BatchPlan(sections=2, spots=4)
    return SectionBatches(spots.section, np.arange(N_SPOTS), plan, seed=0, **options)


def same(batch, other):
    assert len(batch.inputs) == len(other.inputs)
    pairs = zip((*batch.inputs, *batch[1:]), (*other.inputs, *other[1:]), strict=True)
    return all(a.dtype == b.dtype and a.equal(b) for a, b in pairs)


@pytest.mark.parametrize("rows", [[4, 0, 29, 7], [3], []])
def test_a_batch_is_what_indexing_gives(rows):
    spots, rows = make_spots(), np.array(rows, dtype=int)
    batch = spots[0, rows]
    assert len(spots) == N_SPOTS
    np.testing.assert_array_equal(batch.inputs[0], spots.inputs[rows])
    np.testing.assert_array_equal(batch.counts, spots.counts.toarray()[rows])
    np.testing.assert_array_equal(batch.section, spots.section[rows])
    np.testing.assert_array_equal(batch.offset, spots.offset[rows])
    assert len(batch.inputs) == 1
    assert batch.counts.layout == torch.strided
    kinds = [values.dtype for values in (batch.inputs[0], *batch[1:])]
    assert kinds == [torch.float32, torch.float32, torch.int64, torch.float32]


def test_inputs_on_disk_are_read_and_never_written(tmp_path):
    spots = with_patches(make_spots(), tmp_path / "patches.npy")
    in_memory = replace(spots, inputs=np.array(spots.inputs), augment=None)
    rows = np.array([9, 2, 2, 20])
    batch = replace(spots, augment=None)[0, rows]
    assert isinstance(spots.inputs, np.memmap)
    assert same(batch, in_memory[0, rows])
    # A batch may be changed in place, by an augmentation say: it is not a view of the inputs.
    for held in (spots, in_memory):
        before = np.array(held.inputs)
        replace(held, augment=lambda patches, rows, epoch: patches.zero_())[0, np.arange(N_SPOTS)]
        np.testing.assert_array_equal(held.inputs, before)


def test_with_neighbours_a_batch_holds_all_rows_that_are_looked_at():
    spots = with_neighbours(make_spots())
    rows = np.array([8, 1, 8])
    batch = spots[0, rows]
    inputs, places, distance = batch.inputs
    looked_at = spots.neighbours.rows[rows]
    # The smallest section has 5 spots, so two of the 6 neighbours are none.
    assert (spots.neighbours.rows == -1).any()
    present = looked_at >= 0
    np.testing.assert_array_equal(places.numpy() >= 0, present)
    np.testing.assert_array_equal(inputs[places[present]], spots.inputs[looked_at[present]])
    np.testing.assert_array_equal(distance, spots.neighbours.distance[rows])
    np.testing.assert_array_equal(inputs[places[:, 0]], spots.inputs[rows])
    # What is not an input is of the batch's own spots.
    np.testing.assert_array_equal(batch.counts, spots.counts.toarray()[rows])
    np.testing.assert_array_equal(batch.offset, spots.offset[rows])


def test_the_augmentation_gets_the_rows_of_the_patches_and_the_epoch():
    got = []

    def augment(inputs, rows, epoch):
        got.append((rows, epoch))
        return inputs + torch.from_numpy(rows)[:, None]

    spots = with_neighbours(make_spots(augment=augment))
    batch = spots[7, np.array([8, 1])]
    ((rows, epoch),) = got
    looked_at = spots.neighbours.rows[[8, 1]]
    assert epoch == 7
    assert set(rows) == set(looked_at[looked_at >= 0])
    np.testing.assert_allclose(batch.inputs[0], spots.inputs[rows] + rows[:, None], rtol=1e-6)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_workers_change_nothing(tmp_path, monkeypatch, platform):
    monkeypatch.setattr("strank.neural.data.platform", platform)
    n_workers = 2 if platform == "linux" else 1
    spots = with_neighbours(with_patches(make_spots(), tmp_path / "patches.npy"))
    epochs = {}
    for workers in (0, n_workers):
        batches = batches_of(spots)
        loader = training_loader(spots, batches, workers=workers)
        epochs[workers] = []
        # Workers outlive an epoch, and have to learn of the next.
        for epoch in range(2):
            batches.set_epoch(epoch)
            epochs[workers].append(list(loader))
    for epoch, (alone, together) in enumerate(zip(epochs[0], epochs[n_workers], strict=True)):
        batches = batches_of(spots)
        batches.set_epoch(epoch)
        expected = [spots[key] for key in batches]
        assert len(alone) == len(together) == len(expected)
        for a, b, c in zip(alone, together, expected, strict=True):
            assert same(a, c)
            assert same(b, c)
    first = [torch.cat([batch.section for batch in epoch]).tolist() for epoch in epochs[0]]
    assert first[0] != first[1]


def test_patches_are_augmented_anew_every_epoch_whatever_the_batch():
    spots = with_patches(make_spots())
    first, again, next_epoch = (
        spots[0, np.arange(9)],
        spots[0, np.array([4])],
        spots[1, np.arange(9)],
    )
    assert first.inputs[0][4].equal(again.inputs[0][0])
    assert not first.inputs[0].equal(next_epoch.inputs[0])


def test_sections_are_loaded_whole_as_they_are():
    spots = with_neighbours(with_patches(make_spots()))
    parts = [np.flatnonzero(spots.section == section) for section in (5, 0)]
    loader = validation_loader(spots, parts)
    plain = replace(spots, augment=None)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 2
        for section, batch in zip([5, 0], batches, strict=True):
            rows = np.flatnonzero(spots.section == section)
            assert same(batch, plain[0, rows])
            # Neighbours are of the section, so the section is all there is.
            np.testing.assert_array_equal(batch.inputs[0], spots.inputs[rows])
    assert spots.augment is not None


def test_a_section_that_is_not_there_is_a_batch_of_no_spots():
    (batch,) = validation_loader(with_neighbours(make_spots()), [np.array([], int)])
    assert [len(values) for values in (*batch.inputs, *batch[1:])] == [0] * 6
    assert batch.counts.shape == (0, 4)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_draws_nothing_from_torch_or_numpy(workers):
    spots = with_patches(make_spots())
    torch.manual_seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for _ in training_loader(spots, batches_of(spots), workers=workers):
        pass
    for _ in validation_loader(spots, [np.arange(3), np.arange(5)], workers=workers):
        pass
    assert torch.get_rng_state().equal(before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
