"""How a network is trained: optimiser, batches, when it stops, and on what machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from strank.errors import no_such
from strank.functional.batch import Reduction
from strank.neural.data import BatchPlan

Monitor = Literal["list_gain", "spearman"]
Schedule = Literal["constant", "cosine"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "64-true"]


@dataclass(frozen=True)
class Recipe:
    """AdamW, and when it stops.

    Attributes
    ----------
    learning_rate, weight_decay
        Of AdamW; the decay is of matrices, not of levels and norms.
    schedule
        ``"cosine"``: the rate falls to 0 over ``max_epochs``; or ``"constant"``.
    reduction
        What the loss divides by, as in `strank.functional.listwise.list_loss`.
    batches
        Sections and spots a batch.
    max_epochs, patience
        Training ends when the score of the held-out sections has not risen for so many epochs.
    monitor
        That score: ``"list_gain"``, nats a gene and section above library size alone, or
        ``"spearman"`` with log1p(CP10k); if ``None`` the former for an objective whose scores are
        log rates, and the latter for others, whose scores have another scale.
    clip
        Largest norm of the gradient; ``None`` for any.
    networks
        At most so many, each stopped by other sections that it does not see; their scores are
        averaged.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 10.0
    schedule: Schedule = "cosine"
    reduction: Reduction = "per_gene"
    batches: BatchPlan = field(default_factory=partial(BatchPlan, sections=8, spots=512))
    max_epochs: int = 200
    patience: int = 50
    monitor: Monitor | None = None
    clip: float | None = 1.0
    networks: int = 5


RECIPES: Mapping[str, Recipe] = {
    "default": Recipe(),
    # Nishimura et al., NeurIPS 2025; AdamW's other defaults are PyTorch's.
    "paper": Recipe(
        learning_rate=5e-5,
        weight_decay=1e-2,
        schedule="constant",
        reduction="mean",
        batches=BatchPlan(sections=None, spots=256),
        max_epochs=1000,
        patience=30,
        clip=None,
        networks=1,
    ),
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

    Attributes
    ----------
    accelerator, devices, nodes
        As in Lightning's ``Trainer``; with several devices, batches are shared among processes.
    precision
        As there: ``"32-true"``, or mixed. Losses are computed in float32.
    workers
        Processes that read inputs; 0 reads in the training process.
    compile
        Whether ``torch.compile`` makes the network.
    wandb
        Project of Weights & Biases to log to besides; ``None`` for none.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    precision: Precision = "32-true"
    workers: int = 0
    compile: bool = False
    wandb: str | None = None


def get_recipe(name: str) -> Recipe:
    """Look a recipe up; an :class:`InputError` lists the choices for an unknown name.

    Examples
    --------
    >>> get_recipe("paper").learning_rate
    5e-05
    """
    if name not in RECIPES:
        raise no_such("recipe", name, RECIPES)
    return RECIPES[name]
