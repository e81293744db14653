"""Neighbours against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strank.neural.data import find_neighbours


@st.composite
def tissues(draw):
    """Spots on a small grid, so that distances tie and places coincide, of up to three sections."""
    n_spots = draw(st.integers(1, 25))
    place = st.tuples(st.integers(0, 4), st.integers(0, 4))
    positions = draw(st.lists(place, min_size=n_spots, max_size=n_spots))
    section = draw(st.lists(st.sampled_from(["A1", "B 2", ""]), min_size=n_spots, max_size=n_spots))
    return np.array(positions) * 100.0, np.array(section)


def distances(positions):
    return np.hypot(*(positions[:, None] - positions[None]).T)


@settings(deadline=None)
@given(tissue=tissues(), n_neighbours=st.integers(0, 8))
def test_neighbours_are_the_nearest_of_the_section_by_brute_force(tissue, n_neighbours):
    positions, section = tissue
    found, far = find_neighbours(positions, section, n_neighbours), distances(positions)
    assert found.rows.shape == found.distance.shape == (len(section), 1 + n_neighbours)
    for spot, (rows, distance) in enumerate(zip(found.rows, found.distance, strict=True)):
        mates = np.flatnonzero(section == section[spot])
        reach = min(1 + n_neighbours, len(mates))
        # Fewer spots than neighbours: the rest is none.
        assert (rows[reach:] == -1).all()
        assert (distance[reach:] == 0).all()
        rows, distance = rows[:reach], distance[:reach]
        assert len(set(rows.tolist())) == reach
        assert set(rows.tolist()) <= set(mates.tolist())
        assert rows[0] == spot
        # Which of equally near spots is taken is free: the distances say whether these are nearest.
        np.testing.assert_allclose(distance, np.sort(far[spot, mates])[:reach], rtol=1e-6)
        np.testing.assert_allclose(distance, far[spot, rows], rtol=1e-6)


def test_of_places_without_ties_the_order_is_that_of_the_distance():
    positions = np.random.default_rng(0).uniform(0, 1000, size=(40, 2))
    section = np.arange(40) % 2
    found = find_neighbours(positions, section, 5)
    far = np.where(section[:, None] == section, distances(positions), np.inf)
    np.testing.assert_array_equal(found.rows, np.argsort(far, axis=1)[:, :6])


def test_a_spot_comes_first_even_among_many_at_its_place():
    """More coincident spots than neighbours: a search by distance alone may miss the spot."""
    found = find_neighbours(np.zeros((30, 2)), np.zeros(30), 3)
    np.testing.assert_array_equal(found.rows[:, 0], np.arange(30))
    assert all(len(set(rows.tolist())) == 4 for rows in found.rows)
    assert (found.rows >= 0).all()
    assert (found.distance == 0).all()


def test_sections_at_the_same_places_do_not_see_each_other():
    positions = np.tile(np.random.default_rng(0).uniform(0, 500, size=(10, 2)), (2, 1))
    section = np.repeat([7, 2], 10)
    found = find_neighbours(positions, section, 4)
    assert (section[found.rows] == section[:, None]).all()
    np.testing.assert_array_equal(found.rows[10:], found.rows[:10] + 10)
    np.testing.assert_array_equal(found.distance[10:], found.distance[:10])


@settings(deadline=None)
@given(tissue=tissues(), n_neighbours=st.integers(0, 8), data=st.data())
def test_places_point_at_the_right_rows(tissue, n_neighbours, data):
    positions, section = tissue
    found = find_neighbours(positions, section, n_neighbours)
    some = st.lists(st.integers(0, len(section) - 1), max_size=12)
    spots = np.array(data.draw(some), dtype=int)
    needed, (places, distance) = found.of(spots)
    looked_at = found.rows[spots]
    assert needed.tolist() == sorted(set(looked_at[looked_at >= 0].tolist()))
    assert places.shape == looked_at.shape
    for place, row in zip(places.flatten().tolist(), looked_at.flatten().tolist(), strict=True):
        assert (place == -1) if row == -1 else (place >= 0 and needed[place] == row)
    np.testing.assert_array_equal(distance.numpy(), found.distance[spots])


@pytest.mark.parametrize("spots", [[], [2]])
def test_places_are_what_a_head_takes(spots):
    found = find_neighbours(np.zeros((3, 2)), np.array([0, 0, 1]), 2)
    needed, (places, distance) = found.of(np.array(spots, dtype=int))
    assert needed.tolist() == spots
    assert places.dtype == torch.int64
    assert distance.dtype == torch.float32
    assert places.tolist() == [[0, -1, -1]] * len(spots)
