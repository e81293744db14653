"""The tasks of the paper (Nishimura et al., NeurIPS 2025) on HEST, and what its Table 2 says."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from strank.cohort.folds import Fold


@dataclass(frozen=True)
class PaperTask:
    """Samples of a task, by their names in HEST."""

    name: str
    samples: tuple[str, ...]
    validation: str
    test: str
    scc: Mapping[str, float]  # published, of each loss

    @property
    def fold(self) -> Fold:
        """Its only division; what patients there are, a cohort tells."""
        train = tuple(n for n in self.samples if n not in (self.validation, self.test))
        return Fold(self.test, train, (self.test,), validation=(self.validation,))


def _read() -> dict[str, PaperTask]:
    text = files("strank.evaluation").joinpath("paper_tasks.toml").read_text("utf-8")
    tasks = tomllib.loads(text).items()
    return {
        name: PaperTask(name, **task | {"samples": tuple(task["samples"])}) for name, task in tasks
    }


# By name, in the order of the paper's table.
PAPER_TASKS: Mapping[str, PaperTask] = _read()
