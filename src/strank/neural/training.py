"""A training run: step, loop, score, logs; and several runs, each stopped by other sections."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers.tensorboard import TensorBoardLogger
from lightning.fabric.utilities.rank_zero import rank_zero_only
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from strank.errors import InputError, some
from strank.files import safe_name
from strank.functional.distributed import all_summed, n_processes
from strank.functional.listwise import section_list_gain
from strank.losses import ListSTRankLoss, SectionLoss
from strank.metrics.correlation import spearman
from strank.neural.checkpoints import Keep, best_epoch
from strank.neural.data import (
    SectionBatches,
    SpotBatch,
    Spots,
    cut_in_order,
    training_loader,
    validation_loader,
)
from strank.neural.heads import Network
from strank.neural.recipe import Machine, Monitor, Recipe
from strank.processes import follow_first, leading
from strank.progress import progress

_LONGEST = 100
Make = Callable[[NDArray[np.int64]], tuple[Network, SectionLoss]]


@dataclass(frozen=True)
class SpotNames:
    """SpotNames of sections (by code) and genes (by column)."""

    sections: tuple[str, ...]
    genes: tuple[str, ...]


class Step(nn.Module):
    """A network and its objective: what is trained, the objective's own parameters included."""

    def __init__(self, network: nn.Module, loss: SectionLoss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: SpotBatch) -> tuple[Tensor, Tensor]:
        """Loss and scores of a batch; averaged over processes, the loss of all their spots."""
        scores = self.network(*batch.inputs)
        loss: Tensor = self.loss(scores, batch.counts, section=batch.section, offset=batch.offset)
        if n_processes() > 1 and not isinstance(self.loss, ListSTRankLoss):
            # A mean over this process's spots weighs as much as they are.
            n_spots = torch.tensor(float(len(batch.section)), device=loss.device)
            loss = loss * n_spots * n_processes() / all_summed(n_spots)
        return loss, scores.detach()


def not_finite(batch: SpotBatch, scores: Tensor, names: SpotNames, where: str) -> str:
    """Say which section and gene make a loss that is not finite."""
    wrong, what = ~scores.isfinite(), "its scores are not finite"
    if not wrong.any():
        wrong, what = scores.abs() == scores.abs().max(), "its scores are the largest"
    sections = batch.section[wrong.any(1)].unique().tolist()
    genes = wrong.any(0).nonzero().flatten().tolist()
    return (
        f"the loss is not finite in {where}: section {some([names.sections[s] for s in sections])},"
        f" gene {some([names.genes[g] for g in genes])} ({what}); lower the learning rate, or clip "
        "the gradient"
    )


def score_validation(scores: Tensor, batch: SpotBatch, monitor: Monitor) -> float:
    """Score one whole section, mean over genes: `section_list_gain`, or the rank correlation.

    Examples
    --------
    >>> counts, section = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0])
    >>> batch = SpotBatch((), counts, section, torch.zeros(2))
    >>> score_validation(torch.zeros(2, 1), batch, "list_gain")
    0.0
    >>> round(score_validation(counts.log(), batch, "list_gain"), 4)
    0.5232
    """
    counts, offset = batch.counts, batch.offset
    if monitor == "spearman":
        arrays = scores.cpu().numpy(), counts.cpu().numpy()
        library_size = offset.exp().cpu().numpy()
        each = spearman(*arrays, section=np.zeros(len(scores)), library_size=library_size)
        return float(np.nan_to_num(each).mean())
    return float(section_list_gain(scores, counts, offset).mean())


def is_first_process() -> bool:
    """Whether this process writes and speaks for all; known before they meet."""
    return not getattr(rank_zero_only, "rank", 0)


@contextmanager
def logged(folder: Path | None, wandb: str | None) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yield what logs an epoch, on the first process: to TensorBoard, where it is installed."""
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


@dataclass(frozen=True)
class Run:
    """One run."""

    recipe: Recipe
    machine: Machine = field(default_factory=Machine)
    seed: int = 0  # of batches, dropout, pairs and augmentation
    validation: tuple[int, ...] = ()  # sections that choose the best epoch
    folder: Path | None = None  # for checkpoints and logs
    resume: bool = False  # go on from the folder's last checkpoint, or take what was done
    title: str | None = None  # of a progress bar

    @property
    def score(self) -> Monitor:
        """Score of the validation sections."""
        return self.recipe.monitor or "list_gain"

    @property
    def monitor(self) -> str:
        """Its column in the history."""
        return f"validation/{self.score}"


@dataclass(frozen=True)
class Trained:
    """What came of a run; its network has the best weights."""

    history: pd.DataFrame  # one row an epoch: loss, and score of the validation sections
    monitor: str  # the score's column

    @property
    def summary(self) -> dict[str, float | int]:
        """Epochs, the best of them (from 0), and its score."""
        best = best_epoch(self.history[self.monitor].tolist(), self.monitor)
        score = float(self.history[self.monitor][best])
        return {"epochs": len(self.history), "best_epoch": best, self.monitor: score}


def make_fabric(machine: Machine) -> Fabric:
    """Choose devices and precision, and start the other processes, if there are to be any."""
    try:
        fabric = Fabric(
            accelerator=machine.accelerator,
            devices=machine.devices,
            num_nodes=machine.nodes,
            strategy="ddp" if machine.devices * machine.nodes > 1 else "auto",
            precision=machine.precision,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(f"cannot train on {machine.accelerator}: {error}") from error
    follow_first()
    with leading():
        fabric.launch()
    # Lightning sets it at import. Optimisers look for a GPU at every step, and where there is none,
    # looking that way takes a fifth of a small step.
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    return fabric


def train(
    network: nn.Module,
    loss: SectionLoss,
    spots: Spots,
    names: SpotNames,
    run: Run,
    fabric: Fabric | None = None,
) -> Trained:
    """Train a network in place, and give it the weights of its best epoch."""
    keep = Keep(run.monitor, run.folder)
    ended = run.resume and keep.read()
    if not ended:
        with torch.random.fork_rng():
            _Loop(fabric or make_fabric(run.machine), network, loss, spots, run, keep).go(names)
    if is_first_process():
        keep.show(there=ended)
    network.cpu().load_state_dict(keep.best_weights)
    network.eval()
    return Trained(pd.DataFrame(keep.history), run.monitor)


class _Loop:
    """Epochs of a run, on what Lightning's Fabric has set up."""

    def __init__(
        self,
        fabric: Fabric,
        network: nn.Module,
        loss: SectionLoss,
        spots: Spots,
        run: Run,
        keep: Keep,
    ) -> None:
        self.fabric, self.run, self.keep, self.network = fabric, run, keep, network
        place = fabric.global_rank, fabric.world_size
        rows = np.flatnonzero(~np.isin(spots.section, run.validation))
        self.batches = SectionBatches(
            spots.section, rows, run.recipe.batches, seed=run.seed, rank=place[0], world=place[1]
        )
        workers = run.machine.workers
        self.training = training_loader(spots, self.batches, workers=workers)
        own = run.validation[place[0] :: place[1]]
        # A score is of a section, a loss of a batch.
        parts = [np.flatnonzero(spots.section == section) for section in own]
        if run.score == "loss":
            parts = cut_in_order(np.concatenate(parts), run.recipe.batches)
        self.validation = validation_loader(spots, parts, workers=workers)
        self.bare = Step(network, loss).to(fabric.device)
        optimiser = _optimiser(self.bare, run)
        self.schedule = _schedule(optimiser, run.recipe, len(self.batches))
        self.parts: dict[str, Any] = {"step": self.bare, "optimiser": optimiser}
        if self.schedule is not None:
            self.parts["schedule"] = self.schedule
        if run.resume:
            keep.read(**self.parts)
        if run.machine.compile:
            network.compile()
        self.step, self.optimiser = fabric.setup(self.bare, optimiser)

    def go(self, names: SpotNames) -> None:
        """Train until the score does not rise any more, or the epochs are over."""
        recipe, first = self.run.recipe, len(self.keep.history)
        hidden = self.run.title is None or not is_first_process()
        total = recipe.max_epochs * len(self.batches)
        shown = progress(self.run.title or "", total, hidden=hidden)
        with shown as advance, logged(self.run.folder, self.run.machine.wandb) as log:
            advance(first * len(self.batches))
            for epoch in range(first, recipe.max_epochs):
                if self._is_over(epoch):
                    break
                row = {"epoch": epoch, "train/loss": self._epoch(epoch, names, advance)}
                row[self.run.monitor] = self._score()
                self.keep.remember(row, self.network)
                log(row)
                if self.keep.due and is_first_process():
                    self.keep.write(**self.parts)
        if is_first_process():
            self.keep.write(finished=True, **self.parts)

    def _is_over(self, epoch: int) -> bool:
        return bool(self.keep.history) and epoch > self.keep.best_epoch + self.run.recipe.patience

    def _epoch(self, epoch: int, names: SpotNames, advance: Callable[[int], object]) -> float:
        """Train an epoch; return its mean loss."""
        _seed(self.run.seed, epoch, self.fabric)
        self.batches.set_epoch(epoch)
        self.bare.train()
        losses = []
        for number, loaded in enumerate(self.training):
            batch = self._here(loaded)
            loss, scores = self.step(batch)
            if not loss.isfinite():
                where = f"epoch {epoch}, batch {number}"
                raise InputError(not_finite(batch, scores, names, where))
            self.fabric.backward(loss)
            if self.run.recipe.clip is not None:
                self.fabric.clip_gradients(self.step, self.optimiser, max_norm=self.run.recipe.clip)
            self.optimiser.step()
            self.optimiser.zero_grad()
            if self.schedule is not None:
                self.schedule.step()
            losses.append(loss.detach())
            advance(1)
        mean = torch.stack(losses).mean()
        return float(all_summed(mean) / n_processes() if n_processes() > 1 else mean)

    def _here(self, batch: SpotBatch) -> SpotBatch:
        """Bring a batch to the device; on a CPU Fabric would look through it for nothing."""
        moved = batch if self.fabric.device.type == "cpu" else self.fabric.to_device(batch)
        return cast(SpotBatch, moved)

    @torch.no_grad()
    def _score(self) -> float:
        """Mean score of the validation sections, which may lie on several processes."""
        self.bare.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for loaded in self.validation:
            batch = self._here(loaded)
            if self.run.score == "loss":
                # A batch weighs as many as its spots, as where Lightning logs it.
                n_spots = len(batch.section)
                loss = float(self.bare(batch)[0])
                total += torch.tensor([loss * n_spots, n_spots], dtype=torch.float64)
                continue
            scores = self.network(*batch.inputs).float()
            total += torch.tensor([score_validation(scores, batch, self.run.score), 1.0])
        if n_processes() > 1:
            total = all_summed(total.to(self.fabric.device)).cpu()
        return float(total[0] / total[1])


def _optimiser(step: nn.Module, run: Run) -> torch.optim.AdamW:
    trained, recipe = [p for p in step.parameters() if p.requires_grad], run.recipe
    groups: list[dict[str, Any]] = [{"params": trained}]
    if not recipe.published:
        groups = [
            {"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
    # Gradients that were scaled for half precision are not clipped in a fused optimiser.
    fused = run.machine.precision != "16-mixed"
    return torch.optim.AdamW(
        groups, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused
    )


def _schedule(
    optimiser: torch.optim.Optimizer, recipe: Recipe, batches: int
) -> CosineAnnealingLR | None:
    if recipe.schedule == "constant":
        return None
    return CosineAnnealingLR(optimiser, recipe.max_epochs * batches)


def _seed(seed: int, epoch: int, fabric: Fabric) -> None:
    """Seed dropout, pairs and lists by the epoch: a resumed run draws what it would have."""
    words = np.random.SeedSequence([seed, epoch, fabric.global_rank])
    number = int(words.generate_state(1, np.uint64)[0])
    # torch.manual_seed looks for devices of all kinds, which takes as long as a small step.
    torch.default_generator.manual_seed(number)
    if fabric.device.type == "cuda":
        torch.cuda.manual_seed(number)


def train_ensemble(
    make: Make, spots: Spots, names: SpotNames, turns: Sequence[tuple[int, ...]], run: Run
) -> list[tuple[Network, Trained]]:
    """Train one network for every turn, from what makes it for the rows that it is trained on."""
    trained, fabric = [], make_fabric(run.machine)
    for number, validation in enumerate(turns):
        without = [names.sections[code] for code in validation]
        seed = int(np.random.SeedSequence([run.seed, number]).generate_state(1)[0])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network, loss = make(np.flatnonzero(~np.isin(spots.section, validation)))
        own = replace(
            run,
            seed=seed,
            validation=validation,
            folder=run.folder and run.folder / _folder_name(without),
            title=run.title
            and f"{run.title} {number + 1} of {len(turns)}, without {some(without)}",
        )
        trained.append((network, train(network, loss, spots, names, own, fabric)))
    return trained


def _folder_name(sections: Sequence[str]) -> str:
    name = f"without-{safe_name('+'.join(sections))}"
    if len(name) <= _LONGEST:
        return name
    # No file system takes hundreds of names in one.
    return f"{name[:_LONGEST]}~{sha256(name.encode()).hexdigest()[:8]}"
