"""Folds: which sections train, validate and test, and whether a patient stands on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import numpy as np

from strank.errors import InputError, no_such, some

FoldUnit = Literal["section", "patient"]
# Whose sections scores are for: those of patients that no training section is of, or others.
Aim = Literal["new-patients", "known-patients"]


@dataclass(frozen=True)
class Fold:
    """One division of the sections; ``name`` is the section or patient held out, or a number.

    Examples
    --------
    >>> Fold("A", train=("B1", "C1"), test=("A1", "A2"), validation=("B2",)).development
    ('B1', 'B2', 'C1')
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    # With sections on both sides: then the score says nothing about a new patient.
    shared_patients: tuple[str, ...] = ()
    # They stop a network that named sections stop; to all else they are training sections.
    validation: tuple[str, ...] = ()

    @property
    def aim(self) -> Aim:
        """Whose sections its test sections are."""
        return "known-patients" if self.shared_patients else "new-patients"

    @property
    def development(self) -> tuple[str, ...]:
        """All that is not test, sorted."""
        return tuple(sorted((*self.train, *self.validation)))


def make_folds(patients: Mapping[str, str], by: FoldUnit = "patient") -> list[Fold]:
    """Hold out every section, or every patient, once."""
    if by not in get_args(FoldUnit):
        raise no_such("folds by", by, get_args(FoldUnit))
    unit = dict(patients) if by == "patient" else {section: section for section in patients}
    names = sorted(set(unit.values()))
    if len(names) < 2:
        raise InputError(
            f"folds by {by} need at least two of them; this cohort has {len(names)} "
            f"({len(patients)} section{'s' if len(patients) != 1 else ''})"
        )
    return _folds(names, unit, patients)


def k_folds(patients: Mapping[str, str], k: int, *, seed: int = 0) -> list[Fold]:
    """Hold out every patient once, in folds ``"1"`` to ``"k"`` of about as many sections."""
    sizes = Counter(patients.values())
    if not 2 <= k <= len(sizes):
        raise InputError(
            f"{k} folds by patient: choose at least 2, and at most the {len(sizes)} patients of "
            "this cohort"
        )
    order = np.random.default_rng(seed).permutation(sorted(sizes)).tolist()
    load, fold_of = [0] * k, dict[str, str]()
    # Large patients first: the small ones then even out what is left.
    for patient in sorted(order, key=lambda patient: -sizes[patient]):
        lightest = load.index(min(load))
        load[lightest] += sizes[patient]
        fold_of[patient] = str(lightest + 1)
    unit = {section: fold_of[patient] for section, patient in patients.items()}
    return _folds([str(number + 1) for number in range(k)], unit, patients)


def fixed_folds(folds: Sequence[Fold], patients: Mapping[str, str]) -> list[Fold]:
    """Take folds as they are given, checked and sorted; what they do not name stays out."""
    twice = [name for name, times in Counter(fold.name for fold in folds).items() if times > 1]
    if twice or not folds:
        raise InputError(f"two folds are named {some(twice)}" if twice else "no folds are given")
    return [_fixed(fold, patients) for fold in folds]


def _fixed(fold: Fold, patients: Mapping[str, str]) -> Fold:
    sides = {"training": fold.train, "validation": fold.validation, "test": fold.test}
    for side, verb in {"training": "train on", "test": "test on"}.items():
        if not sides[side]:
            raise InputError(f"fold {fold.name}: no sections to {verb}; name some")
    for one, other in combinations(sides, 2):
        if both := sorted(set(sides[one]) & set(sides[other])):
            raise InputError(
                f"fold {fold.name}: section {some(both)} stands in {one} and in {other}; take it "
                "out of one"
            )
    named = {section for sections in sides.values() for section in sections}
    if absent := sorted(named - set(patients)):
        raise InputError(
            f"fold {fold.name}: the cohort has no section {some(absent)}; there are "
            f"{some(sorted(patients))}"
        )
    patients = {section: patients[section] for section in named}
    return _fold(fold.name, set(fold.test), patients, fold.validation)


def _folds(
    names: Sequence[str], unit: Mapping[str, str], patients: Mapping[str, str]
) -> list[Fold]:
    return [_fold(name, {s for s in unit if unit[s] == name}, patients) for name in names]


def _fold(
    name: str,
    test: Collection[str],
    patients: Mapping[str, str],
    validation: Collection[str] = (),
) -> Fold:
    rest = set(patients).difference(test)
    shared = {patients[s] for s in rest} & {patients[s] for s in test}
    parts = (rest.difference(validation), test, shared, validation)
    return Fold(name, *(tuple(sorted(part)) for part in parts))


def shared_patients(patients: Iterable[str]) -> str:
    """Say what patients with sections in training and test mean for the score."""
    return (
        f"patient {some(patients)} stands on both sides of the split: the score says how well "
        "further sections of that patient are predicted, not a new patient"
    )
