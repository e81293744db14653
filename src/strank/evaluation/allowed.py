"""What the fields of a protocol may be, and how that is said."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from strank.cohort.panel import PanelRule
from strank.cohort.splits import Fold, FoldUnit
from strank.errors import InputError

__all__ = ["HEADLINES", "Depth", "PanelFrom", "check_fields"]

HEADLINES = (
    "depth_matched",
    "lift",
    "lift_relative",
    "deviance",
    "scc",
    "pearson",
    "pearson_counts",
)

PanelFrom = Literal["training", "all"]
Depth = Literal["all", "panel"]


def check_fields(values: Mapping[str, Any]) -> None:
    """Refuse a value that is not allowed, and say what is.

    Examples
    --------
    >>> check_fields({"seed": -1})
    Traceback (most recent call last):
    ...
    strank.errors.InputError: seed is -1; it must be a number of at least 0
    """
    for key, value in values.items():
        allowed, what = _ALLOWED[key]
        if not allowed(value):
            raise InputError(f"{key} is {reprlib.repr(value)}; it must be {what}")


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, "one of " + ", ".join(choices)


def _is_number(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _are_names(value: Any) -> bool:
    named = isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)
    return named and len(set(value)) == len(value)


def _are_folds(value: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(fold, Fold)
        and isinstance(fold.name, str)
        and _are_names(fold.train)
        and _are_names(fold.test)
        for fold in value
    )


_TEXT = (lambda value: isinstance(value, str), "text")
_UNITS, _RULES = get_args(FoldUnit), get_args(PanelRule)

_ALLOWED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "name": _TEXT,
    "description": _TEXT,
    "folds": (
        lambda value: value in _UNITS or _is_number(value, 2) or _are_folds(value),
        f"{' or '.join(_UNITS)}, a number of at least 2, or tables [[folds]] with name (text), "
        "train and test (lists of sections, each once)",
    ),
    "first_fold_only": (lambda value: isinstance(value, bool), "true or false"),
    "panel": (
        lambda value: value in _RULES or (_are_names(value) and len(value) > 0),
        f"one of {', '.join(_RULES)}, or a list of genes, each once",
    ),
    "panel_from": _one_of(*get_args(PanelFrom)),
    "n_genes": (
        lambda value: (
            isinstance(value, tuple)
            and len(set(value)) == len(value) > 0
            and all(size is None or _is_number(size, 1) for size in value)
        ),
        'a list of sizes, each once: numbers of at least 1, or "all"',
    ),
    "target_depth": _one_of(*get_args(Depth)),
    "methods": (_are_names, "a list of methods, each once"),
    "headline": _one_of(*HEADLINES),
    "seed": (lambda value: _is_number(value, 0), "a number of at least 0"),
}
