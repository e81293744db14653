"""What is questionable about a protocol, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from strank.cohort.splits import Fold
from strank.errors import some

__all__ = ["of_folds", "of_genes", "of_scores", "shared_patients"]


def shared_patients(patients: Iterable[str]) -> str:
    """Say what patients with sections in training and test mean for the score."""
    return (
        f"patient {some(patients)} stands on both sides of the split: the score says how well "
        "further sections of that patient are predicted, not a new patient"
    )


def of_folds(folds: Sequence[Fold], patients: Mapping[str, str]) -> list[str]:
    """Tell of patients on both sides, a single split, and few patients to test on.

    Examples
    --------
    >>> of_folds([Fold("1", ("A1",), ("A2",), ("A",))], {"A1": "A", "A2": "A"})[2]
    'only patient A is tested: that says little about other patients'
    """
    told = []
    if shared := [fold for fold in folds if fold.shared_patients]:
        both = sorted({patient for fold in shared for patient in fold.shared_patients})
        told.append(f"fold {some(fold.name for fold in shared)}: {shared_patients(both)}")
    if len(folds) == 1:
        told.append(
            f"a single split (test on {some(folds[0].test)}): how much the score depends on which "
            "sections are held out is not known"
        )
    tested = sorted({patients[name] for fold in folds for name in fold.test})
    if len(tested) < 3:
        told.append(
            f"only patient {some(tested)} {'is' if len(tested) == 1 else 'are'} tested: that says "
            "little about other patients"
        )
    return told


def of_genes(panel: str | tuple[str, ...], panel_from: str) -> list[str]:
    """Tell of genes in which test sections had a say, or may have had."""
    if panel_from == "all":
        return [
            "the genes are chosen on all sections, those of the test included: genes that stand "
            "out in the test sections are favoured"
        ]
    if not isinstance(panel, str):
        return ["the genes are given: whether test sections had a say in them is not known"]
    return []


def of_scores(headline: str, target_depth: str) -> list[str]:
    """Tell of scores that predicting depth raises, and of a target that hangs on the panel."""
    told = []
    if target_depth == "panel":
        told.append(
            "the target divides by the total over the panel, not over all measured genes: that of "
            "a gene depends on which others are in the panel"
        )
    if headline == "pearson_counts":
        told.append(
            "sorted by pearson_counts: log1p(counts) contains the depth of a spot, so that "
            "methods gain by predicting depth"
        )
    if headline in ("scc", "pearson"):
        told.append(
            f"sorted by {headline}: deep spots see a sparse gene more often, so that "
            "methods gain by predicting depth"
        )
    return told
