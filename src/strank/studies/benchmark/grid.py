"""What a benchmark combines: tasks, methods and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from strank.cohort.folds import Fold
from strank.errors import InputError, no_such
from strank.evaluation.methods import BASELINES
from strank.files import safe_name
from strank.fitting.method import HEST_RIDGE, OWN_RECIPE, REFERENCE, Method
from strank.fitting.objectives import OBJECTIVES
from strank.neural.recipe import RECIPES

# Of the two ranking losses, the one whose optimum is no constant.
LOSSES = tuple(name for name in OBJECTIVES if name != "rank-published")
# What stands in every table.
_ALWAYS = (REFERENCE, *BASELINES)
# What is combined with no head.
_OTHERS = {method.name: method for method in (*BASELINES, HEST_RIDGE)}


@dataclass(frozen=True)
class Task:
    """A fold with a panel and an encoder: what all methods do."""

    encoder: str  # Whose features
    n_genes: int | None  # Size of the panel; None for all genes
    fold: Fold  # Which sections train and which test

    @property
    def genes(self) -> str:
        """The size in words."""
        return "all" if self.n_genes is None else str(self.n_genes)

    @property
    def names(self) -> dict[str, str]:
        """What its partition of the tables is called by."""
        return {"encoder": self.encoder, "genes": self.genes, "fold": self.fold.name}


@dataclass(frozen=True)
class Cell:
    """A method on a task."""

    task: Task  # What is to be done
    method: Method
    seed: int = 0  # Of what is trained step by step

    def path(self, folder: Path) -> Path:
        """Where its predictions are kept."""
        task, seed = self.task, f" {self.seed}" if self.seed else ""
        names = [task.encoder, task.genes, task.fold.name, f"{self.method.name}{seed}.h5ad"]
        return folder.joinpath("predictions", *(safe_name(name) for name in names))


@dataclass(frozen=True)
class Grid:
    """What is combined; what is named twice counts once."""

    # As in `strank.fitting.method.Method`; of losses also what has no head, such as "hest-ridge"
    losses: Sequence[str] = LOSSES
    heads: Sequence[str] = ("linear",)
    recipes: Sequence[str | None] = (None,)  # None or "usual" for the usual one
    encoders: Sequence[str] = ("morphology",)  # Whose features
    n_genes: Sequence[int | None] = (50,)  # Sizes of the panel; None for all genes
    seeds: int = 1  # Of every method that is trained step by step
    most_stepwise: int = 1000  # Larger panels are left to the methods that are solved exactly
    library_size: bool = True  # If not, what knows it is also fitted without
    also: Sequence[Method] = ()  # Beside what is combined

    def __post_init__(self) -> None:
        for name in ("losses", "heads", "recipes", "encoders", "n_genes", "also"):
            given: Any = getattr(self, name)
            if isinstance(given, str | int):
                raise InputError(f"`{name}` is a list; got {given!r}")
            found = (None if x == "usual" and name == "recipes" else x for x in given)
            object.__setattr__(self, name, tuple(dict.fromkeys(found)))

    @property
    def methods(self) -> list[Method]:
        """All methods, those that stand in every table first; no method twice."""
        if unknown := [loss for loss in self.losses if loss not in (*OBJECTIVES, *_OTHERS)]:
            raise no_such("loss", unknown[0], (*OBJECTIVES, *_OTHERS))
        if OWN_RECIPE in self.recipes:
            raise no_such("recipe", OWN_RECIPE, RECIPES)
        combined = [keys for keys in self._combinations if keys not in self._left_out]
        # Where nothing is left, the first says why.
        named = [
            _OTHERS.get(loss) or Method(head, loss, recipe)
            for head, loss, recipe in combined or self._left_out
        ]
        found = [*_ALWAYS, *named, *self.also]
        if not self.library_size:
            found += [replace(m, library_size=False) for m in found if m.log_rates]
        return list(dict.fromkeys(found))

    @property
    def _combinations(self) -> list[tuple[str, str, str | None]]:
        return list(product(self.heads, self.losses, self.recipes))

    @property
    def _left_out(self) -> list[tuple[str, str, str | None]]:
        """What the published recipe does not train."""
        return [
            (head, loss, recipe)
            for head, loss, recipe in self._combinations
            if loss not in _OTHERS and recipe and recipe in RECIPES and RECIPES[recipe].published
            if not (head == "linear" and OBJECTIVES[loss].published)
        ]

    def cells(self, tasks: Iterable[Task]) -> list[Cell]:
        """All cells of some tasks, the longest first."""
        found = [
            Cell(task, method, seed)
            for task, method in product(tasks, self.methods)
            if method.is_exact or not self._too_large(task.n_genes)
            for seed in range(1 if method.is_exact else self.seeds)
        ]
        return sorted(found, key=lambda cell: _length(cell), reverse=True)

    @property
    def notes(self) -> list[str]:
        """What of it is left out, and how methods are solved, in words."""
        stepwise = [method.name for method in self.methods if not method.is_exact]
        told = ["linear, mse is ridge: squared error to log1p(CP10k), solved exactly"]
        if out := "; ".join(", ".join(map(str, keys)) for keys in self._left_out):
            told.append(f"{out}: nothing that the published recipe trains, so left out")
        if stepwise and any(self._too_large(size) for size in self.n_genes):
            told.append(
                f"{'; '.join(stepwise)}: trained step by step, so not at more than "
                f"{self.most_stepwise} genes, nor at `all`"
            )
        return told

    def _too_large(self, n_genes: int | None) -> bool:
        return n_genes is None or n_genes > self.most_stepwise


def _length(cell: Cell) -> tuple[float, bool]:
    size = cell.task.n_genes or float("inf")
    return size, not cell.method.is_exact
