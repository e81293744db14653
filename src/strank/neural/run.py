"""One training run: from spots and a network to weights, a learning curve and checkpoints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file
from torch import nn

from strank.errors import InputError
from strank.files import atomic_path
from strank.losses import SectionLoss
from strank.neural.batches import SectionBatches
from strank.neural.keep import BEST, LAST, Keep, ShowProgress, StartOfEpoch
from strank.neural.module import Names, RankModule
from strank.neural.recipe import Machine, Recipe
from strank.neural.spots import Spots, section_loader, training_loader

__all__ = ["HISTORY", "Run", "Trained", "is_first_process", "train"]

#: One row an epoch; its presence says that a run has ended.
HISTORY = "history.csv"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes
    ----------
    recipe, machine
        How, and on what.
    seed
        Determines batches, dropout, pairs and augmentation.
    held_out
        Codes of the sections that are not trained on, by which the best epoch is chosen.
    folder
        For checkpoints and logs; ``None`` for neither.
    resume
        Whether to go on from the folder's ``last.ckpt``, or take what was done.
    title
        Of a progress bar; ``None`` for none.
    """

    recipe: Recipe
    machine: Machine = field(default_factory=Machine)
    seed: int = 0
    held_out: tuple[int, ...] = ()
    folder: Path | None = None
    resume: bool = False
    title: str | None = None


@dataclass(frozen=True)
class Trained:
    """What came of it; the network has the best weights.

    Attributes
    ----------
    history
        One row an epoch: loss, and score of the held-out sections.
    monitor
        The score's column.
    """

    history: pd.DataFrame
    monitor: str

    @property
    def summary(self) -> dict[str, float | int]:
        """Epochs, the best of them (from 0), and its score."""
        best = int(self.history[self.monitor].idxmax())
        score = float(self.history[self.monitor][best])
        return {"epochs": len(self.history), "best_epoch": best, self.monitor: score}


def train(
    network: nn.Module,
    loss: SectionLoss,
    spots: Spots,
    names: Names,
    run: Run,
) -> Trained:
    """Train a network in place, and give it the weights of its best epoch.

    Parameters
    ----------
    network
        Called with the inputs of a `strank.neural.spots.SpotBatch`; gives scores.
    loss
        The objective.
    spots
        Of the sections to train on and of those held out.
    names
        Of sections and genes, for errors.
    run
        How.

    Raises
    ------
    InputError
        For a loss that is not finite, with batch, section and gene, and for devices that are not
        there.
    """
    done = run.folder and run.folder / HISTORY
    if run.resume and done is not None and done.is_file():
        network.load_state_dict(load_file(done.with_name(BEST)))
        history = pd.read_csv(done)
    else:
        history = _train(network, loss, spots, names, run)
        if done is not None and is_first_process():
            with atomic_path(done) as part:
                history.to_csv(part, index=False)
    network.eval()
    return Trained(history, f"held_out/{run.recipe.monitor}")


def is_first_process() -> bool:
    """Whether this process writes and speaks for all; known before they meet."""
    return not getattr(rank_zero_only, "rank", 0)


def _train(
    network: nn.Module, loss: SectionLoss, spots: Spots, names: Names, run: Run
) -> pd.DataFrame:
    """Train, leave the best weights in the network, and return the history."""
    monitor = f"held_out/{run.recipe.monitor}"
    keep = Keep(monitor, run.folder)
    callbacks = [keep, StartOfEpoch(run.seed)]
    callbacks.append(EarlyStopping(monitor, mode="max", patience=run.recipe.patience))
    if run.title is not None:
        callbacks.append(ShowProgress(run.title))
    module = RankModule(network, loss, run.recipe, names)
    if run.machine.compile:
        network.compile()
    last = run.folder and run.folder / LAST
    with _quiet(), torch.random.fork_rng():
        _trainer(run, callbacks).fit(
            module,
            datamodule=_Loaders(spots, run),
            ckpt_path=last if run.resume and last is not None and last.is_file() else None,
            weights_only=True,
        )
    module.cpu()
    network.load_state_dict(keep.best_weights)
    return pd.DataFrame(keep.history)


class _Loaders(pl.LightningDataModule):
    """The loaders, made when it is known which process this is."""

    def __init__(self, spots: Spots, run: Run) -> None:
        super().__init__()
        self.spots, self.run = spots, run

    @property
    def _place(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> Any:
        run = self.run
        rows = np.flatnonzero(~np.isin(self.spots.section, run.held_out))
        batches = SectionBatches(
            self.spots.section,
            rows,
            run.recipe.batches,
            seed=run.seed,
            rank=self._place[0],
            world=self._place[1],
        )
        return training_loader(self.spots, batches, workers=run.machine.workers)

    def val_dataloader(self) -> Any:
        rank, world = self._place
        # Lightning wants a batch on every process: of a section that does not exist, if need be.
        own = self.run.held_out[rank::world] or (-1,)
        return section_loader(self.spots, own, workers=self.run.machine.workers)


def _trainer(run: Run, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    machine = run.machine
    try:
        return pl.Trainer(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.nodes,
            strategy="ddp" if machine.devices * machine.nodes > 1 else "auto",
            precision=machine.precision,
            max_epochs=run.recipe.max_epochs,
            gradient_clip_val=run.recipe.clip,
            callbacks=list(callbacks),
            logger=_loggers(run),
            num_sanity_val_steps=0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=run.folder,
        )
    except (ValueError, RuntimeError) as error:  # Lightning's MisconfigurationException included
        raise InputError(f"cannot train on {machine.accelerator}: {error}") from error


def _loggers(run: Run) -> list[Logger]:
    loggers: list[Logger] = []
    if run.folder is not None and find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(run.folder, name="", version="tensorboard"))
    if run.machine.wandb is not None:
        if find_spec("wandb") is None:
            raise InputError("Weights & Biases is asked for, but not there: pip install wandb")
        from lightning.pytorch.loggers import WandbLogger

        loggers.append(WandbLogger(project=run.machine.wandb, save_dir=run.folder or "."))
    return loggers


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advertisements and advice to itself; errors pass."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
