"""Folds: which sections train and which test, and whether a patient stands on both sides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from anndata import AnnData

from strank.errors import InputError

__all__ = ["Fold", "FoldUnit", "make_folds", "patients_of"]

FoldUnit = Literal["section", "patient"]


@dataclass(frozen=True)
class Fold:
    """One division of the sections.

    Attributes
    ----------
    name
        The section or patient that is held out.
    train, test
        Names of sections.
    shared_patients
        Patients with sections on both sides: then the score says nothing about a new patient.
    """

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    shared_patients: tuple[str, ...]


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
    unit = {section: section if by == "section" else patients[section] for section in patients}
    names = sorted(set(unit.values()))
    if len(names) < 2:
        raise InputError(
            f"folds by {by} need at least two of them; this cohort has {len(names)} "
            f"({len(patients)} section{'s' if len(patients) != 1 else ''})"
        )
    return [_fold(name, unit, patients) for name in names]


def _fold(name: str, unit: Mapping[str, str], patients: Mapping[str, str]) -> Fold:
    train = tuple(sorted(s for s in unit if unit[s] != name))
    test = tuple(sorted(s for s in unit if unit[s] == name))
    shared = {patients[s] for s in train} & {patients[s] for s in test}
    return Fold(name, train, test, tuple(sorted(shared)))


def patients_of(cohort: Mapping[str, AnnData]) -> dict[str, str]:
    """Patient of each section of a cohort."""
    return {name: str(adata.obs["patient"].iloc[0]) for name, adata in cohort.items()}
