"""How a network is trained: optimiser, batches, when it stops, on what machine; which weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from strank.errors import InputError, no_such
from strank.functional.batch import Reduction
from strank.neural.data import BatchPlan

Monitor = Literal["list_gain", "spearman", "loss"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "64-true"]


@dataclass(frozen=True)
class Recipe:
    """AdamW, and when it stops.

    Examples
    --------
    >>> short = Recipe(max_epochs=20, networks=1)  # strank.fit(..., head="mlp", recipe=short)
    >>> short.schedule
    'cosine'
    """

    learning_rate: float = 1e-3
    weight_decay: float = 10.0  #: of matrices, not of levels and norms
    schedule: Schedule = "cosine"  #: falls to 0 over max_epochs
    reduction: Reduction = "per_gene"
    batches: BatchPlan = field(default_factory=partial(BatchPlan, sections=8, spots=512))
    max_epochs: int = 200
    patience: int = 50  #: epochs in which the score of the held-out sections has not risen
    #: That score, as nats a gene and section above library size alone, the rank correlation with
    #: log1p(CP10k), or the objective's own loss, the less the better; if None, one of the first
    #: two, by whether the objective's scores are log rates.
    monitor: Monitor | None = None
    clip: float | None = 1.0  #: largest norm of the gradient
    networks: int = 5  #: at most so many, each stopped by other sections; their scores are averaged
    #: The published losses, depth of the panel, raw features, torch's first weights, decay of all
    #: that is trained; with the entropy term that the published code adds to the pair loss.
    published: bool = False
    pair_entropy: bool = True
    list_size: int | None = None  #: for the list loss, random lists of so many spots of a section


# Nishimura et al., NeurIPS 2025, by their code; AdamW's other defaults are PyTorch's.
_PUBLISHED = Recipe(
    learning_rate=5e-5,
    weight_decay=1e-2,
    schedule="constant",
    reduction="mean",
    batches=BatchPlan(sections=None, spots=256),
    max_epochs=1000,
    patience=30,
    monitor="loss",
    clip=None,
    networks=1,
    published=True,
)

#: By name; `dataclasses.replace` changes one.
RECIPES: Mapping[str, Recipe] = {
    "default": Recipe(),
    "published": _PUBLISHED,
    "published-no-entropy": replace(_PUBLISHED, pair_entropy=False),
    # About as far as that, in a twentieth of the epochs.
    "published-quick": replace(_PUBLISHED, learning_rate=1e-3, max_epochs=50, patience=10),
    # For a first look.
    "quick": Recipe(max_epochs=40, patience=10, networks=1),
    # Below what would forget the pretraining; an epoch costs much more here.
    "finetune": Recipe(
        learning_rate=1e-4,
        weight_decay=1e-2,
        batches=BatchPlan(sections=4, spots=128),
        max_epochs=50,
        patience=10,
        networks=1,
    ),
}


@dataclass(frozen=True)
class Machine:
    """What a network is trained on.

    Examples
    --------
    >>> Machine(accelerator="cpu", workers=2).devices
    1
    """

    #: As in Lightning's `Trainer`; several devices share every batch.
    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Precision = "32-true"  #: losses are computed in float32
    workers: int = 0  #: processes that read inputs; 0 reads in the training process
    compile: bool = False
    wandb: str | None = None  #: project of Weights & Biases to log to


@dataclass(frozen=True)
class Finetune:
    """How an image network is trained together with the head.

    Examples
    --------
    >>> Finetune(mode="last-2", micro_batch=16).augment
    True
    """

    mode: str = "lora"  #: full, last-K, lora or frozen
    lora_rank: int = 8
    augment: bool = True  #: patches are turned, mirrored and stained anew at every epoch
    micro_batch: int | None = None  #: patches at a time; the loss sees all scores of the batch
    recompute: bool = False  #: blocks compute their activations again in the backward pass

    def __post_init__(self) -> None:
        last_blocks(self.mode)


def last_blocks(mode: str) -> int:
    """How many of the last blocks are trained by their number; refuse an unknown mode."""
    last = re.fullmatch(r"last-([1-9]\d*)", mode)
    if last is None and mode not in ("frozen", "full", "lora"):
        raise InputError(
            f"no mode {mode!r}; choose one of frozen, last-K (K = 1, 2, ... blocks), lora, full"
        )
    return int(last[1]) if last else 0


def get_recipe(name: str) -> Recipe:
    """Look a recipe up; an :class:`InputError` lists the choices for an unknown name.

    Examples
    --------
    >>> get_recipe("published").learning_rate
    5e-05
    """
    if name not in RECIPES:
        raise no_such("recipe", name, RECIPES)
    return RECIPES[name]
