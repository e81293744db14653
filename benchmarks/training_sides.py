"""What races in training.py: a cohort, its training by strank, and by Lightning without us."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from scipy import sparse
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from strank import read_cohort
from strank.cohort.training_set import TrainingData
from strank.fitting.networks import TrainingPlan, mean_and_spread, start_head
from strank.fitting.objectives import OBJECTIVES
from strank.functional.groups import centre_within
from strank.losses import SectionLoss
from strank.neural.data import SectionBatches, Spots, training_loader
from strank.neural.heads import ContextHead, Head, LinearNetwork, MLPHead, Network
from strank.neural.recipe import RECIPES, Machine, Recipe
from strank.neural.training import Run, train

HEADS: dict[str, Callable[..., Head]] = {
    "linear": LinearNetwork,
    "mlp": MLPHead,
    "context": ContextHead,
    "steady": partial(MLPHead, dropout=0.0, input_dropout=0.0),
}
# Spots, features, genes and sections; of the paper's HER2ST, the spots and sections.
SMALL, HER2ST = (1015, 182, 50, 5), (13_620, 182, 50, 36)
LARGE, LARGER = (10_000, 1024, 50, 5), (50_000, 1024, 50, 10)
PLAIN = "plain", "no checkpoints", "none of the four"
SEED, NEVER = 0, 10**9
LOSS, SCORE = "train/loss", "validation/loss"


def plan_of(data: Path | None, size: tuple[int, int, int, int] = SMALL) -> TrainingPlan:
    if data is None:
        return simulated(*size)
    cohort = read_cohort(data, encoder="morphology")
    what = {"encoder": "morphology", "n_genes": 50, "genes": None, "validation": [max(cohort)]}
    return TrainingPlan.of(cohort, RECIPES["published"], **what, seed=SEED, about={})


def simulated(n_spots: int, n_features: int, n_genes: int, n_sections: int) -> TrainingPlan:
    """Log rates linear in features without any structure; spots on a square grid."""
    rng = np.random.default_rng(SEED)
    features = rng.standard_normal((n_spots, n_features), dtype=np.float32)
    weights = rng.standard_normal((n_features, n_genes), dtype=np.float32) / n_features**0.5
    library_size = np.exp(rng.normal(8, 0.5, n_spots))
    share = np.exp(0.3 * features @ weights) * rng.uniform(1e-4, 1e-3, n_genes)
    counts = sparse.csr_matrix(rng.poisson(share * library_size[:, None]))
    code = np.sort(np.arange(n_spots) % n_sections)
    side = int(np.ceil((n_spots / n_sections) ** 0.5))
    positions = 100.0 * np.stack(np.divmod(np.arange(n_spots), side), 1)
    data = TrainingData(features, counts, library_size, code, positions, code)
    names = tuple(map(str, range(n_sections))), pd.Index(range(n_genes)).map(str)
    return TrainingPlan(data, names[1], names[0], code, [(n_sections - 1,)], {}, {})


def training_rows(plan: TrainingPlan) -> np.ndarray:
    return np.flatnonzero(~np.isin(plan.section, plan.turns[0]))


def spots_of(plan: TrainingPlan, name: str) -> Spots:
    """Features and neighbours as `strank.fit` gives them to such a head."""
    features = plan.data.features
    like = HEADS[name](features.shape[1], len(plan.panel))
    if like.centred:
        features = centre_within(features, plan.section)
    if name == "linear":
        depth = OBJECTIVES["list"].published.depth(plan.data.counts)
        plan = replace(plan, data=replace(plan.data, library_size=depth))
    return plan.spots(features.astype(np.float32), like)


def recipe_of(name: str, epochs: int) -> Recipe:
    """The published one for the linear head, strank's own for the others."""
    own = RECIPES["published" if name == "linear" else "default"]
    return replace(own, max_epochs=epochs, patience=NEVER)


def start(plan: TrainingPlan, spots: Spots, name: str) -> tuple[Network, SectionLoss]:
    """Make network and objective, always the same."""
    torch.manual_seed(SEED)
    rows = training_rows(plan)
    features = torch.from_numpy(spots.inputs[rows])
    counts, offset = spots.counts[rows], spots.offset[rows]
    head, loss = start_head(
        HEADS[name],
        OBJECTIVES["list"],
        recipe_of(name, 1),
        mean_and_spread(features),
        counts,
        offset,
    )
    return Network(head), loss


def fit(
    plan: TrainingPlan, spots: Spots, made: tuple[Network, SectionLoss], recipe: Recipe, **how: Any
) -> pd.DataFrame:
    how = {"machine": Machine("cpu"), "validation": plan.turns[0], "title": "benchmark", **how}
    return train(*made, spots, plan.names, Run(recipe, seed=SEED, **how)).history


@contextmanager
def silent() -> Iterator[None]:
    """Bars and advice go nowhere, at the least price for who writes them."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@dataclass
class Watched:
    """A loader that notes epoch and milliseconds of a step: waiting for the batch, and all."""

    loader: Any
    steps: list[tuple[int, float, float]]
    epoch: int = -1

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        asked = time.perf_counter()
        for batch in self.loader:
            given = time.perf_counter()
            yield batch
            ended = time.perf_counter()
            self.steps.append((self.epoch, 1000 * (given - asked), 1000 * (ended - asked)))
            asked = ended


def steps_of(training: Callable[[], Any]) -> pd.DataFrame:
    steps: list[tuple[int, float, float]] = []

    def watched(*given: Any, **how: Any) -> Watched:
        return Watched(training_loader(*given, **how), steps)

    with silent(), patch("strank.neural.training.training_loader", watched):
        training()
    return pd.DataFrame(steps, columns=["epoch", "wait ms", "step ms"])


class Replay(SectionBatches):
    """The batches that `train` sees."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        self.epoch += 1
        return (rows.tolist() for _, rows in batches)


class PlainModule(pl.LightningModule):
    def __init__(self, head: nn.Linear, learning_rate: float, log_steps: bool) -> None:
        super().__init__()
        self.head, self.learning_rate, self.log_steps = head, learning_rate, log_steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), self.learning_rate)

    def loss_of(self, batch: Any) -> Tensor:
        features, counts, section, depth = batch
        scores = self.head(features)
        losses = []
        for label in section.unique():
            mask = section == label
            log_share = torch.log_softmax(scores[mask] + depth[mask, None], 0)
            losses.append(-counts[mask] * log_share)
        return torch.cat(losses).mean()

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = self.loss_of(batch)
        # Every batch weighs the same, so that the curves can be compared.
        how = {"on_step": self.log_steps, "prog_bar": self.log_steps, "on_epoch": True}
        self.log(LOSS, loss, batch_size=1, **how)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log(SCORE, self.loss_of(batch), prog_bar=True, batch_size=len(batch[0]))


def plain(
    plan: TrainingPlan, spots: Spots, recipe: Recipe, folder: Path, kind: str
) -> pd.DataFrame:
    """Train by Lightning as one writes it, or without some of it; kinds as in `PLAIN`."""
    checkpoints, rest = kind == PLAIN[0], kind != PLAIN[-1]
    ours = start(plan, spots, "linear")[0].head
    head = nn.Linear(ours.readout.in_features, ours.readout.out_features)
    head.weight.data.copy_(ours.readout.weight)
    head.bias.data.copy_(ours.level)
    features = torch.from_numpy(spots.inputs)
    others = map(torch.from_numpy, (spots.counts, spots.section, spots.offset))
    everything, rows = TensorDataset(features, *others), training_rows(plan)
    trained = TensorDataset(*everything[rows])
    scored = TensorDataset(*everything[np.isin(spots.section, plan.turns[0])])
    batches = Replay(spots.section[rows], np.arange(len(rows)), recipe.batches, seed=SEED)
    one_by_one, at_once = {"batch_sampler": batches}, {"sampler": batches, "batch_size": None}
    logger = CSVLogger(folder)
    callbacks = [EarlyStopping(SCORE, mode="min", patience=recipe.patience)]
    if checkpoints:
        callbacks.append(ModelCheckpoint(folder, monitor=SCORE, mode="min", save_last=True))
    shown = {"enable_checkpointing": checkpoints, "enable_progress_bar": rest}
    shown |= {"logger": logger, "callbacks": callbacks}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=recipe.max_epochs, **shown)
    module = PlainModule(head, recipe.learning_rate, rest)
    loader = DataLoader(trained, **(one_by_one if rest else at_once))
    trainer.fit(module, loader, DataLoader(scored, batch_size=recipe.batches.spots))
    # Steps and scores have rows of their own.
    history = pd.read_csv(Path(logger.log_dir) / "metrics.csv").groupby("epoch").last()
    return history.rename(columns={f"{LOSS}_epoch": LOSS})
