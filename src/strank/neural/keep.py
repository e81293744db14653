"""What a run remembers: its learning curve, its best weights, and a checkpoint to go on from."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import Tensor, nn

from strank.files import atomic_path
from strank.progress import progress

__all__ = ["BEST", "LAST", "Keep", "ShowProgress", "StartOfEpoch"]

#: Names of the checkpoints: weights of the network, and all that a run goes on from.
BEST, LAST = "best.safetensors", "last.ckpt"

_SECONDS = 30.0


class Keep(Callback):
    """Keep the history and the best weights, and write checkpoints.

    The weights of small networks are better every few milliseconds, so the best are kept in memory
    and written with the last: at the end, and whenever half a minute has passed.

    Parameters
    ----------
    monitor
        Name of the score, higher is better.
    folder
        Where the checkpoints go; ``None`` for nowhere.
    """

    def __init__(self, monitor: str, folder: Path | None) -> None:
        self.monitor, self.folder = monitor, folder
        self.history: list[dict[str, float]] = []
        self.best_weights: dict[str, Tensor] = {}
        self._written = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the epoch; Lightning runs this after the validation."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        before = max((row[self.monitor] for row in self.history), default=float("-inf"))
        self.history.append({"epoch": trainer.current_epoch, **values})
        if values[self.monitor] > before:
            network: nn.Module = pl_module.get_submodule("network")
            state = network.state_dict()
            self.best_weights = {k: value.detach().cpu().clone() for k, value in state.items()}
        due = time.monotonic() - self._written > _SECONDS
        if self.folder and trainer.strategy.reduce_boolean_decision(due, all=False):
            self._write(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write both checkpoints."""
        if self.folder:
            self._write(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this."""
        return {"history": self.history, "best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.history, self.best_weights = state_dict["history"], state_dict["best_weights"]

    def _write(self, trainer: pl.Trainer) -> None:
        assert self.folder is not None
        # Every process takes part in making a checkpoint; the first one writes it.
        part = self.folder / ".last.part.ckpt"
        trainer.save_checkpoint(part)
        if trainer.is_global_zero:
            part.replace(self.folder / LAST)
            with atomic_path(self.folder / BEST) as part:
                save_file(self.best_weights, part)
        self._written = time.monotonic()


class StartOfEpoch(Callback):
    """Seed dropout, pairs and lists by the epoch, so that a resumed run draws what it would have.

    Parameters
    ----------
    seed
        Of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Seed torch; `strank.neural.run.train` puts its state back in the end."""
        words = [self.seed, trainer.current_epoch, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0]))


class ShowProgress(Callback):
    """Show a progress bar on stderr; the first process does.

    Parameters
    ----------
    title
        What stands before the bar.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._bar = ExitStack()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Find out which process this is."""
        self.hidden = not trainer.is_global_zero

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the bar, from where a resumed run goes on."""
        batches = int(trainer.num_training_batches)
        total = batches * int(trainer.max_epochs or 0)
        self._advance = self._bar.enter_context(progress(self.title, total, hidden=self.hidden))
        self._done, self._shown = trainer.current_epoch * batches, 0.0

    def on_train_batch_end(self, *args: Any) -> None:
        """Count a batch; the bar moves a few times a second."""
        self._done += 1
        if time.monotonic() - self._shown > 0.2:
            self._advance(self._done)
            self._done, self._shown = 0, time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bar, where it has come to."""
        self._advance(self._done)
        self._bar.close()

    def on_exception(self, *args: Any) -> None:
        """Close the bar."""
        self._bar.close()
