from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strank.cohort.folds import Fold, fixed_folds, k_folds, make_folds
from strank.errors import InputError

PATIENTS = {"C3": "C", "B4": "B", "C2": "C"}


def test_every_patient_or_section_is_held_out_once():
    by_patient = make_folds(PATIENTS, "patient")
    assert [(f.train, f.test, f.shared_patients) for f in by_patient] == [
        (("C2", "C3"), ("B4",), ()),
        (("B4",), ("C2", "C3"), ()),
    ]
    by_section = make_folds(PATIENTS, "section")
    assert [(f.name, f.shared_patients) for f in by_section] == [
        ("B4", ()),
        ("C2", ("C",)),
        ("C3", ("C",)),
    ]
    with pytest.raises(
        InputError, match=r"folds by patient need at least two .* has 1 \(2 sections"
    ):
        make_folds({"C2": "C", "C3": "C"}, "patient")
    with pytest.raises(InputError, match=r"has 1 \(1 section\)"):
        make_folds({"C2": "C"}, "section")
    with pytest.raises(InputError, match="no folds by 'spot'; choose one of section, patient"):
        make_folds(PATIENTS, "spot")


COHORTS = st.dictionaries(st.integers(0, 99), st.sampled_from("ABCDEFGH"), min_size=2, max_size=30)


@given(COHORTS, st.integers(2, 8), st.integers(0, 9), st.randoms())
def test_k_folds_hold_every_patient_out_whole_and_once(cohort, k, seed, shuffling):
    patients = {f"s{number}": patient for number, patient in cohort.items()}
    sizes = Counter(patients.values())
    if k > len(sizes):
        with pytest.raises(InputError, match=f"{k} folds by patient: .* the {len(sizes)} patients"):
            k_folds(patients, k)
        return
    folds = k_folds(patients, k, seed=seed)
    assert [fold.name for fold in folds] == [str(number + 1) for number in range(k)]
    assert sorted(name for fold in folds for name in fold.test) == sorted(patients)
    for fold in folds:
        assert fold.train
        assert fold.test
        assert set(fold.train) | set(fold.test) == set(patients)
        assert not {patients[s] for s in fold.train} & {patients[s] for s in fold.test}
        assert fold.shared_patients == ()
    # Dealing to the lightest fold, no two differ by more than the largest patient.
    loads = [len(fold.test) for fold in folds]
    assert max(loads) - min(loads) <= max(sizes.values())
    names = list(patients)
    shuffling.shuffle(names)
    assert k_folds({name: patients[name] for name in names}, k, seed=seed) == folds


def test_k_folds_follow_the_seed():
    patients = {f"{patient}1": patient for patient in "ABCDEFGH"}
    drawn = {tuple(fold.test for fold in k_folds(patients, 4, seed=seed)) for seed in range(5)}
    assert len(drawn) > 1
    with pytest.raises(InputError, match="1 folds by patient: choose at least 2, and at most"):
        k_folds(patients, 1)


def test_fixed_folds_are_taken_as_they_are():
    # A fold may have any name, and leave sections out.
    folds = [Fold("train", ("C3",), ("B4",)), Fold("1", ("C3", "B4"), ("C2",))]
    assert fixed_folds(folds, PATIENTS) == [
        Fold("train", ("C3",), ("B4",), ()),
        Fold("1", ("B4", "C3"), ("C2",), ("C",)),
    ]


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ([Fold("x", ("C2", "Z1"), ("B4",))], "fold x: the cohort has no section Z1; .* B4, C2, C3"),
        ([Fold("x", ("C2",), ("Z2",))], "fold x: the cohort has no section Z2"),
        ([Fold("x", ("C2", "B4"), ("B4",))], "fold x: section B4 stands in training and in test"),
        (
            [Fold("x", ("C2",), ("B4",), validation=("C2",))],
            "fold x: section C2 stands in training and in validation; take it out of one",
        ),
        (
            [Fold("x", ("C2",), ("B4",), validation=("B4",))],
            "fold x: section B4 stands in validation and in test",
        ),
        (
            [Fold("x", ("C2",), ("B4",), validation=("Z1",))],
            "fold x: the cohort has no section Z1; there are B4, C2, C3",
        ),
        ([Fold("x", (), ("B4",), validation=("C2",))], "fold x: no sections to train on"),
        ([Fold("x", (), ("B4",))], "fold x: no sections to train on"),
        ([Fold("x", ("B4",), ())], "fold x: no sections to test on"),
        ([Fold("x", ("B4",), ("C2",)), Fold("x", ("C2",), ("B4",))], "two folds are named x"),
        ([], "no folds are given"),
    ],
)
def test_refusals_of_fixed_folds(folds, message):
    with pytest.raises(InputError, match=message):
        fixed_folds(folds, PATIENTS)


def test_validation_is_no_training_but_belongs_to_development():
    patients = PATIENTS | {"D1": "D", "D2": "D"}
    [fold] = fixed_folds([Fold("x", ("D1", "C3"), ("C2",), validation=("B4",))], patients)
    assert fold == Fold("x", ("C3", "D1"), ("C2",), ("C",), ("B4",))
    assert fold.development == ("B4", "C3", "D1")
    # A patient of the test is known, whichever side the other section stands on.
    [fold] = fixed_folds([Fold("x", ("B4",), ("C2",), validation=("C3", "D1"))], patients)
    assert (fold.validation, fold.shared_patients) == (("C3", "D1"), ("C",))
    for folds in (make_folds(patients), k_folds(patients, 2)):
        assert all(fold.validation == () for fold in folds)
        assert all(fold.development == fold.train for fold in folds)
