"""The law of the scores (DESIGN, 5.1), walked through what `strank.metrics` hands on."""

from __future__ import annotations

from inspect import Parameter, signature

import numpy as np
import pytest

from strank import metrics

# Of tables of scores, not of predictions; and of counts alone.
OF_TABLES = {"combine_sections", "false_discovery_rate", "mean_intervals"}
CEILING = "noise_ceiling"
each_score = pytest.mark.parametrize("name", sorted({*metrics.__all__} - OF_TABLES))
N_GENES = 4


@pytest.fixture(scope="module")
def spots():
    """Sections "b" of 20 spots, "a" of 30 and "c" of one; gene 2 has no counts in "a"."""
    rng = np.random.default_rng(0)
    section = rng.permutation(np.repeat(["b", "a", "c"], [20, 30, 1]))
    library_size = rng.integers(500, 900, len(section))
    counts = rng.poisson(library_size[:, None] / 100, size=(len(section), N_GENES))
    counts[section == "a", 2] = 0
    scores = rng.normal(size=counts.shape)
    positions = rng.uniform(size=(len(section), 2))
    return scores, counts, {"section": section, "library_size": library_size}, positions


def values_of(name, scores, counts, arrays, positions):
    """What a score gives, as a list of tables."""
    if name == CEILING:
        return list(metrics.noise_ceiling(counts, **arrays))
    more = {"positions": positions} if name == "p_values" else {}
    return [getattr(metrics, name)(scores, counts, **arrays, **more)]


def rows(keep, scores, counts, arrays, positions):
    return scores[keep], counts[keep], {k: v[keep] for k, v in arrays.items()}, positions[keep]


@each_score
def test_arrays_first_and_the_rest_by_keyword_in_one_order(name):
    parameters = list(signature(getattr(metrics, name)).parameters.values())
    arrays = ["counts"] if name == CEILING else ["scores", "counts"]
    law = [*arrays, "section", "library_size"]
    assert [p.name for p in parameters][: len(law)] == law
    assert {p.kind for p in parameters[: len(arrays)]} == {Parameter.POSITIONAL_OR_KEYWORD}
    assert {p.kind for p in parameters[len(arrays) :]} == {Parameter.KEYWORD_ONLY}
    needed = {p.name for p in parameters if p.default is Parameter.empty}
    assert needed == {*law, *(["positions"] if name == "p_values" else [])}


@each_score
def test_sections_come_in_sorted_order(name, spots):
    section = spots[2]["section"]
    tables = values_of(name, *spots)
    # The first section's draws are the first: alone it has the same.
    first = values_of(name, *rows(section == "a", *spots))
    for table, alone in zip(tables, first, strict=True):
        assert table.shape == (3, N_GENES)
        np.testing.assert_allclose(table[0], alone[0], rtol=1e-12, equal_nan=True)
        assert not np.allclose(table[1], table[0], equal_nan=True)


@each_score
def test_what_is_undefined_is_nan(name, spots):
    """A gene without counts, and where there is but one spot; elsewhere all is finite."""
    for table in values_of(name, *spots):
        if name == "list_gain":
            np.testing.assert_array_equal(table[[0, 2, 2, 2, 2], [2, 0, 1, 2, 3]], 0)
            assert np.isfinite(table).all()
            continue
        assert np.isnan(table[0]).tolist() == [False, False, True, False]
        assert np.isfinite(table[1]).all()
        # A single spot is in no order, so that it has no lift either: neither above nor below.
        assert np.isnan(table[2]).all() or (name == "lift" and (table[2] == 0).all())


@each_score
def test_the_docstring_has_all_of_numpydoc(name):
    text = getattr(metrics, name).__doc__
    for part in ("Parameters\n", "Returns\n", "Examples\n", "n_sections, n_genes", ">>> "):
        assert part in text, part


@pytest.mark.parametrize("name", sorted(OF_TABLES))
def test_nan_does_not_count_in_tables(name):
    table = np.random.default_rng(0).uniform(0.01, 0.99, size=(3, 7))
    holed = table.copy()
    holed[1, 4] = np.nan
    if name == "mean_intervals":
        rest = [np.nanmean(row) for row in holed]
        assert metrics.mean_intervals(holed[None]).mean == pytest.approx(np.mean(rest))
    elif name == "combine_sections":
        found = metrics.combine_sections(holed)
        np.testing.assert_array_equal(found[4:5], metrics.combine_sections(table[[0, 2], 4:5]))
        assert found.shape == (7,)
    else:
        found = metrics.false_discovery_rate(holed[1])
        expected = metrics.false_discovery_rate(np.delete(table[1], 4))
        assert np.isnan(found[4])
        np.testing.assert_array_equal(np.delete(found, 4), expected)
