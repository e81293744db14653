"""What is no cohort, panel or head is refused in words."""

from __future__ import annotations

from functools import partial

import pytest
from torch import nn

import strank
from strank.errors import InputError

fit = partial(strank.fit, encoder="mine", n_genes=3)


@pytest.mark.parametrize("verb", [fit, strank.cross_validate])
@pytest.mark.parametrize(
    ("given", "message"), [(["C2"], "got str"), (None, r"mapping of names, as `strank\.read_")]
)
def test_sections_come_as_objects(verb, given, message):
    with pytest.raises(InputError, match=message):
        verb(given)


def test_a_fit_takes_a_folder_and_an_evaluation_objects():
    with pytest.raises(InputError, match=r"^cohort: no such folder"):
        fit("cohort")
    with pytest.raises(InputError, match=r"mapping of names, as `strank\.read_"):
        strank.cross_validate("cohort")
    with pytest.raises(InputError, match="no sections are given"):
        fit({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_genes": "50"}, "`n_genes` is a whole number; got '50'"),
        ({"n_genes": 5.5}, "`n_genes` is a whole number; got 5.5"),
        ({"genes": "g1"}, "`genes` is a list of names; got 'g1'"),
        ({"genes": []}, "`genes` is a list of names"),
        ({"genes": ["GENE", "GENE"]}, "`genes` names GENE twice|no gene GENE"),
        ({"head": None}, "`head` is a name, or what makes a module .*; got NoneType"),
        ({"head": nn.Linear(2, 3)}, "`head` is a name, or what makes a module .*; got Linear"),
        ({"head": "mlp", "validation": "C2"}, "`validation` is a list of sections; got 'C2'"),
        ({"head": "mlp", "validation": 1}, "`validation` is a list of sections; got 1"),
        ({"head": "mlp", "validation": []}, r"`validation` is a list of sections; got \[\]"),
        ({"head": "mlp", "resume": True}, "`resume` goes on from the checkpoints in a `folder`"),
        ({"finetune": "loar"}, "no mode 'loar'"),
        ({"recipe": "publishd"}, r"choose one of default, published, .*did you mean published"),
    ],
)
def test_options_of_another_kind(cohort, options, message):
    with pytest.raises(InputError, match=message):
        fit(cohort, **options)


@pytest.mark.parametrize("how", [{}, {"recipe": "published", "validation": ["C1"]}])
@pytest.mark.parametrize("section", ["A1", "C1"])
def test_features_that_are_not_finite(cohort, section, how):
    cohort[section].obsm["mine"][3, 1] = float("nan")
    with pytest.raises(InputError, match=f"section {section}: mine features of spot 3x3 are not"):
        fit(cohort, **how)


@pytest.mark.parametrize("options", [{"losses": "list"}, {"heads": "mlp"}, {"n_genes": 50}])
def test_what_is_combined_comes_as_lists(tmp_path, options):
    (name,) = options
    with pytest.raises(InputError, match=f"`{name}` is a list"):
        strank.benchmark(tmp_path, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
