"""Bad input is one clear error, the same from every loss."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch


def refuses(loss, batch, message, **changes):
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=message):
            loss(batch, reduction=reduction, **changes)


def test_counts_of_another_shape(loss, batch):
    message = r"scores and counts must both be \[n_spots, n_genes\]; got \[9, 4\] and \[9, 3\]"
    refuses(loss, batch, message, counts=batch["counts"][:, :3])


def test_scores_of_one_dimension(loss, batch):
    message = r"scores and counts must both be .* got \[9\] and \[9\]"
    refuses(loss, batch, message, scores=batch["scores"][:, 0], counts=batch["counts"][:, 0])


@pytest.mark.parametrize("shape", [(8,), (9, 1)])
def test_section_of_another_length(loss, batch, shape):
    message = rf"section must be \[n_spots\] = \[9\]; got \[{', '.join(map(str, shape))}\]"
    batch["section"] = torch.zeros(shape).long()
    refuses(loss, batch, message, **({"pairs": torch.tensor([[0, 2]])} if loss.given else {}))


def test_negative_counts(loss, batch):
    counts = batch["counts"].clone()
    counts[3, 2] = -1
    refuses(loss, batch, "counts must not be negative", counts=counts)


def test_counts_without_exposure(loss, batch):
    batch["offset"][0] = -torch.inf
    refuses(loss, batch, r"offset is -inf \(no exposure\) at a spot that has counts")
    where = torch.ones(9, 4, dtype=torch.bool)
    where[1] = False
    refuses(loss, batch, "offset is -inf", where=where)


@pytest.mark.parametrize("name", ["offset", "where"])
@pytest.mark.parametrize("shape", [(8,), (9, 3), (8, 1), (1, 9, 4)])
def test_offset_or_mask_that_does_not_fit(loss, batch, name, shape):
    message = rf"{name} must fit scores \[9, 4\]; got \[{', '.join(map(str, shape))}\]"
    refuses(loss, batch, message, **{name: torch.ones(shape)})


@pytest.mark.parametrize("shape", [(5,), (9, 3), (2, 9, 4)])
def test_weight_that_does_not_fit(loss, batch, shape):
    refuses(loss, batch, r"weight must (fit scores|be)", weight=torch.ones(shape))


@pytest.mark.parametrize("name", ["poisson_free", "nb_free"])
def test_a_level_is_of_a_section_and_so_is_no_weight_of_an_element(row_named, batch, name):
    message = r"weight must be \[n_genes\] with free_level"
    refuses(row_named[name], batch, message, weight=torch.ones(9, 4))


@pytest.mark.parametrize("name", ["pair_all", "margin_all"])
def test_weight_of_a_spot_says_nothing_about_a_pair(row_named, batch, name):
    message = r"weight must be \[n_genes\] = \[4\] here; got \[9, 4\]"
    refuses(row_named[name], batch, message, weight=torch.ones(9, 4))


def test_unknown_reduction(loss, batch):
    with pytest.raises(ValueError, match=r"reduction must be one of .*'per_gene'.* got 'avg'"):
        loss(batch, reduction="avg")


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_sparse_counts_are_for_list_loss(loss, batch, layout):
    counts = batch["counts"].to_sparse(layout=layout)
    if loss.function.__name__ != "list_loss":
        refuses(loss, batch, "counts must be dense for this loss.*got layout", counts=counts)
    elif layout != torch.sparse_csr:
        refuses(loss, batch, rf"counts must be dense or CSR; got layout {layout}", counts=counts)


@pytest.mark.parametrize("size", [1, 0, -3])
def test_lists_of_less_than_two(row_named, batch, size):
    message = rf"list_size must be at least 2; got {size}"
    refuses(row_named["list"], batch, message, list_size=size)


@pytest.mark.parametrize("name", ["pair_all", "margin_all"])
@pytest.mark.parametrize("partners", [0, -1])
def test_no_partner(row_named, batch, name, partners):
    message = rf"n_partners must be at least 1, or None for all; got {partners}"
    refuses(row_named[name], batch, message, n_partners=partners)


@pytest.mark.parametrize("name", ["pair_given", "margin_published"])
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[0, 1]], "pairs: both spots of a pair must be of the same section"),
        ([[0, 9]], "pairs must be rows between 0 and 8"),
        ([[-1, 0]], "pairs must be rows between 0 and 8"),
        ([0, 2], r"pairs must be \[n_pairs, 2\]; got \[2\]"),
        ([[0, 2, 5]], r"pairs must be \[n_pairs, 2\]; got \[1, 3\]"),
    ],
)
def test_pairs_that_cannot_be_compared(row_named, batch, name, pairs, message):
    refuses(row_named[name], batch, message, pairs=torch.tensor(pairs))


@pytest.mark.parametrize("margin", [-1.0, float("nan")])
def test_negative_margin(row_named, batch, margin):
    refuses(row_named["margin_all"], batch, "margin must not be negative; got", margin=margin)


def test_unknown_ties(row_named, batch):
    message = r"ties must be one of \('none', 'second'\); got 'first'"
    refuses(row_named["margin_all"], batch, message, ties="first")


@pytest.mark.parametrize("free_level", [False, True])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), [1.0, 0.0, 1.0, 1.0]])
def test_dispersion_that_is_not_positive(row_named, batch, value, free_level):
    dispersion = torch.tensor(value) if isinstance(value, list) else value
    options = {"dispersion": dispersion, "free_level": free_level}
    refuses(row_named["nb"], batch, "dispersion must be positive", **options)


@pytest.mark.parametrize("shape", [(3,), (9, 1), (2, 9, 4)])
def test_dispersion_that_does_not_fit(row_named, batch, shape):
    refuses(row_named["nb"], batch, "dispersion must be", dispersion=torch.ones(shape))


def test_broken_offsets_are_not_taken_for_no_exposure(loss, batch):
    batch["offset"][0] = np.nan
    refuses(loss, batch, "offset must be", counts=torch.zeros(9, 4))


def as_list(values):
    return values.tolist()


@pytest.mark.parametrize("form", [np.asarray, as_list, pd.DataFrame])
@pytest.mark.parametrize("name", ["scores", "counts", "offset"])
def test_what_is_no_tensor(loss, batch, name, form):
    message = rf"`{name}` must be a tensor; got \w+: torch.as_tensor\({name}\)"
    with pytest.raises(TypeError, match=message):
        loss(batch, **{name: form(batch[name].detach())})


LABELLED = [np.asarray, list, tuple, pd.Series, pd.Categorical, pd.array]


@pytest.mark.parametrize("form", LABELLED)
def test_sections_may_be_words(loss, batch, form):
    """In sorted order, as numbers are: nothing but the names of sections is different."""
    words = [{-1: "a", 2: "b", 5: "c", 8: "d"}[code] for code in batch["section"].tolist()]
    pairs = loss.pairs(batch["section"].tolist()) if loss.given else []
    options = {"pairs": torch.tensor(pairs)} if loss.given else {}
    if form is pd.Series:  # of the spots of one patient, say
        words = dict(zip(range(40, 49), words, strict=True))
    for reduction in ("none", "mean"):
        got = loss(batch | {"section": form(words)}, reduction=reduction, **options)
        assert torch.equal(got, loss(batch, reduction=reduction, **options))


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA])
@pytest.mark.parametrize("form", LABELLED)
def test_sections_that_lack_a_word_or_are_too_few(loss, batch, form, missing):
    options = {"pairs": torch.tensor([[0, 2]])} if loss.given else {}
    if form is np.asarray:  # A list of words and NaN, else, is an array of words for NumPy.
        form = lambda words: np.asarray(words, dtype=object)  # noqa: E731
    batch["section"] = form(["a", "b", missing, *"abbaca"])
    refuses(loss, batch, "section: missing label in row 2", **options)
    batch["section"] = form([*"abbaca"])
    refuses(loss, batch, r"section must be \[n_spots\] = \[9\]; got \[6\]", **options)


def test_a_column_or_a_single_word_is_no_label_of_each_spot(loss, batch):
    options = {"pairs": torch.tensor([[0, 2]])} if loss.given else {}
    batch["section"] = np.full((9, 1), "a")
    refuses(loss, batch, r"section must be \[n_spots\] = \[9\]; got \[9, 1\]", **options)
    batch["section"] = "A1"
    refuses(loss, batch, r"section must be \[n_spots\] = \[9\]; got \[\]", **options)


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("sizes", [np.arange(9) * 10, np.geomspace(90, 9e6, 9), np.eye(9)[0] * 26])
def test_library_sizes_without_logarithm(loss, batch, sizes, column):
    sizes = torch.as_tensor(sizes).to(batch["scores"])
    sizes = sizes[:, None] if column else sizes
    refuses(loss, batch, "`offset` is from .* natural logarithm", offset=sizes)


def test_offsets_of_what_is_left_out_or_of_other_genes_may_be_anything(loss, batch):
    offset = torch.zeros(9, 4).to(batch["scores"])
    offset[1] = 900
    where = torch.ones(9, 4, dtype=torch.bool)
    where[1] = False
    options = {"pairs": torch.tensor([[0, 2]])} if loss.given else {}
    loss(batch, reduction="none", offset=offset, where=where, **options)
    genes = torch.tensor([[0.0, 30.0, 60.0, 90.0]]).to(batch["scores"])
    loss(batch, reduction="none", offset=genes, **options)
