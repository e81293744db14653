"""Folds: which sections train and which test, and whether a patient stands on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from anndata import AnnData

from strank.errors import InputError, some

FoldUnit = Literal["section", "patient"]


@dataclass(frozen=True)
class Fold:
    """One division of the sections.

    Attributes
    ----------
    name
        The section or patient that is held out, or a number.
    train, test
        Names of sections.
    shared_patients
        Patients with sections on both sides: then the score says nothing about a new patient.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    shared_patients: tuple[str, ...] = ()


def make_folds(patients: Mapping[str, str], by: FoldUnit = "patient") -> list[Fold]:
    """Hold out every section, or every patient, once.

    Parameters
    ----------
    patients
        Patient of each section.
    by
        What is held out as a whole.

    Raises
    ------
    InputError
        If there are fewer than two of them.

    Examples
    --------
    >>> [fold.test for fold in make_folds({"B4": "B", "C2": "C", "C3": "C"})]
    [('B4',), ('C2', 'C3')]
    >>> make_folds({"B4": "B", "C2": "C", "C3": "C"}, by="section")[1].shared_patients
    ('C',)
    """
    if by not in get_args(FoldUnit):
        raise InputError(f"folds: {by!r} is unknown; choose one of {', '.join(get_args(FoldUnit))}")
    unit = dict(patients) if by == "patient" else {section: section for section in patients}
    names = sorted(set(unit.values()))
    if len(names) < 2:
        raise InputError(
            f"folds by {by} need at least two of them; this cohort has {len(names)} "
            f"({len(patients)} section{'s' if len(patients) != 1 else ''})"
        )
    return _folds(names, unit, patients)


def k_folds(patients: Mapping[str, str], k: int, *, seed: int = 0) -> list[Fold]:
    """Hold out every patient once, several at a time, in folds of about as many sections.

    Parameters
    ----------
    patients
        Patient of each section.
    k
        How many folds, named ``"1"`` to ``"k"``.
    seed
        Of the order in which patients with as many sections are dealt out.

    Raises
    ------
    InputError
        If ``k`` is less than 2, or there are fewer patients.

    Examples
    --------
    >>> patients = {"A1": "A", "A2": "A", "B1": "B", "C1": "C"}
    >>> sorted(fold.test for fold in k_folds(patients, 2))
    [('A1', 'A2'), ('B1', 'C1')]
    """
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
    """Take folds as they are given; what they do not name stays out.

    Parameters
    ----------
    folds
        With names, and sections to train and to test on.
    patients
        Patient of each section of the cohort.

    Returns
    -------
    list of Fold
        With sections in alphabetical order, and the patients that stand on both sides.

    Raises
    ------
    InputError
        For an empty side, a section on both sides, or one that the cohort lacks; it names fold and
        section. Also if there are no folds, or two of one name.

    Examples
    --------
    >>> given = Fold("0", train=("C3", "B4"), test=("C2",))
    >>> fixed_folds([given], {"B4": "B", "C2": "C", "C3": "C"})
    [Fold(name='0', train=('B4', 'C3'), test=('C2',), shared_patients=('C',))]
    """
    twice = [name for name, times in Counter(fold.name for fold in folds).items() if times > 1]
    if twice or not folds:
        raise InputError(f"two folds are named {some(twice)}" if twice else "no folds are given")
    return [_fixed(fold, patients) for fold in folds]


def _fixed(fold: Fold, patients: Mapping[str, str]) -> Fold:
    train, test = set(fold.train), set(fold.test)
    if not train or not test:
        side = "test on" if train else "train on"
        raise InputError(f"fold {fold.name}: no sections to {side}; name some")
    if both := sorted(train & test):
        raise InputError(
            f"fold {fold.name}: section {some(both)} stands in training and in test; take it out "
            "of one"
        )
    if absent := sorted((train | test) - set(patients)):
        raise InputError(
            f"fold {fold.name}: the cohort has no section {some(absent)}; there are "
            f"{some(sorted(patients))}"
        )
    return _fold(fold.name, test, {section: patients[section] for section in train | test})


def _folds(
    names: Sequence[str], unit: Mapping[str, str], patients: Mapping[str, str]
) -> list[Fold]:
    return [_fold(name, {s for s in unit if unit[s] == name}, patients) for name in names]


def _fold(name: str, test: Collection[str], patients: Mapping[str, str]) -> Fold:
    train = set(patients).difference(test)
    shared = {patients[s] for s in train} & {patients[s] for s in test}
    return Fold(name, *(tuple(sorted(sections)) for sections in (train, test, shared)))


def patients_of(cohort: Mapping[str, AnnData]) -> dict[str, str]:
    """Patient of each section of a cohort."""
    return {name: str(adata.obs["patient"].iloc[0]) for name, adata in cohort.items()}
