"""Where the learning curve of a run goes besides its folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.fabric.utilities.rank_zero import rank_zero_only

from strank.errors import InputError

__all__ = ["is_first_process", "logged"]


def is_first_process() -> bool:
    """Whether this process writes and speaks for all; known before they meet."""
    return not getattr(rank_zero_only, "rank", 0)


@contextmanager
def logged(folder: Path | None, wandb: str | None) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield what logs an epoch, on the first process.

    Parameters
    ----------
    folder
        For TensorBoard, where it is installed; ``None`` for no logs.
    wandb
        Project of Weights & Biases; ``None`` for none.

    Raises
    ------
    InputError
        If Weights & Biases is asked for and not installed.
    """
    loggers: list[Any] = []
    if is_first_process() and folder is not None and find_spec("tensorboard") is not None:
        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    if is_first_process() and wandb is not None:
        loggers.append(_wandb(folder or Path(), wandb))

    def log(row: dict[str, float]) -> None:
        values = {name: value for name, value in row.items() if name != "epoch"}
        for logger in loggers:
            logger.log_metrics(values, step=int(row["epoch"]))

    try:
        yield log
    finally:
        for logger in loggers:
            logger.finalize("success")
            # Of Weights & Biases: the next network is another run.
            getattr(logger.experiment, "finish", lambda: None)()


def _wandb(folder: Path, project: str) -> Any:
    if find_spec("wandb") is None:
        raise InputError("Weights & Biases is asked for, but not there: pip install wandb")
    from lightning.pytorch.loggers import WandbLogger

    return WandbLogger(project=project, name=folder.name or None, save_dir=folder)
