"""What a training keeps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import save
from torch import Tensor, nn

from strank.files import table_bytes, write_bytes
from strank.storage import is_whole, new_file, warn_of_damage

#: Weights of the best epoch; all that a run goes on from; one row an epoch, when it has ended.
BEST, LAST, HISTORY = "best.safetensors", "last.ckpt", "history.csv"

_SECONDS = 30.0


def best_epoch(scores: Sequence[float], monitor: str) -> int:
    """Find the first epoch of the best score, the lowest of a loss; -1 of none.

    >>> best_epoch([2.0, 3.0, 3.0], "validation/list_gain"), best_epoch([2.0, 3.0], "x/loss")
    (1, 0)
    """
    best = min if monitor.endswith("/loss") else max
    return list(scores).index(best(scores)) if len(scores) else -1


class Keep:
    """History and best weights of a run, in memory and, now and then, in a folder.

    Small networks are better every few milliseconds, so the best weights are written with the
    last: when half a minute has passed, and at the end.
    """

    def __init__(self, monitor: str, folder: Path | None) -> None:
        self.monitor, self.folder = monitor, folder
        self.history: list[dict[str, float]] = []
        self.best_weights: dict[str, Tensor] = {}
        self.best_epoch = -1
        self._written = time.monotonic()

    def remember(self, row: dict[str, float], network: nn.Module) -> None:
        """Add an epoch, and its weights if it is the best."""
        before = self.history[self.best_epoch : self.best_epoch + 1]
        self.history.append(row)
        if best_epoch([kept[self.monitor] for kept in (*before, row)], self.monitor) == len(before):
            self.best_epoch = len(self.history) - 1
            state = network.state_dict()
            self.best_weights = {k: value.detach().cpu().clone() for k, value in state.items()}

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return self.folder is not None and time.monotonic() - self._written > _SECONDS

    def write(self, *, finished: bool = False, **parts: Any) -> None:
        """Write a checkpoint of what has a ``state_dict``, and beside it the best weights."""
        if self.folder is None:
            return
        content = {name: part.state_dict() for name, part in parts.items()}
        content |= {"history": self.history, "best_weights": self.best_weights}
        with new_file(self.folder / LAST, seal=True) as file:
            torch.save(content | {"finished": finished}, file)
        write_bytes(self.folder / BEST, save(self.best_weights))
        self._written = time.monotonic()

    def read(self, **parts: Any) -> bool:
        """Go on from a checkpoint, if there is one that is whole; whether the run has ended."""
        if self.folder is None or not is_whole(self.folder / LAST):
            return False
        content = torch.load(self.folder / LAST, weights_only=True, map_location="cpu")
        for name, part in parts.items():
            part.load_state_dict(content[name])
        self.history, self.best_weights = content["history"], content["best_weights"]
        self.best_epoch = best_epoch([row[self.monitor] for row in self.history], self.monitor)
        return bool(content["finished"])

    def show(self, *, there: bool) -> None:
        """Write what people look at, and no run believes; say if it was ``there``, and damaged."""
        if self.folder is None:
            return
        history = table_bytes(pd.DataFrame(self.history))
        for name, content in {BEST: save(self.best_weights), HISTORY: history}.items():
            path = self.folder / name
            if path.is_file() and path.read_bytes() == content:
                continue
            if there:
                warn_of_damage(path)
            write_bytes(path, content)
