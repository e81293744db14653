"""The training step and the score of held-out sections, as a Lightning module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from strank.errors import InputError, some
from strank.functional.listwise import list_loss
from strank.functional.metrics import spearman
from strank.functional.processes import all_summed, n_processes
from strank.losses import ListSTRankLoss, SectionLoss
from strank.neural.recipe import Monitor, Recipe
from strank.neural.spots import SpotBatch

__all__ = ["Names", "RankModule", "score_held_out"]


@dataclass(frozen=True)
class Names:
    """Names of sections (by code) and genes (by column)."""

    sections: tuple[str, ...]
    genes: tuple[str, ...]


class RankModule(pl.LightningModule):
    """Fits a network by an objective; a thin shell over both.

    Parameters
    ----------
    network
        Inputs of a batch to scores, such as `strank.neural.network.Network`.
    loss
        Any objective of `strank.losses`.
    recipe
        Optimiser and monitor.
    names
        For errors.
    """

    def __init__(self, network: nn.Module, loss: SectionLoss, recipe: Recipe, names: Names) -> None:
        super().__init__()
        self.network, self.loss, self.recipe, self.names = network, loss, recipe, names
        self._losses: list[Tensor] = []
        self._held_out = torch.zeros(2, dtype=torch.float64)

    def configure_optimizers(self) -> Any:
        """AdamW over what is trainable, the objective's own parameters included."""
        trained = [p for p in self.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.dim() > 1]},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        # Lightning does not clip where precision is mixed and the optimiser fused.
        fused = "mixed" not in self.trainer.precision
        recipe = self.recipe
        optimiser = torch.optim.AdamW(
            groups, recipe.learning_rate, weight_decay=recipe.weight_decay, fused=fused
        )
        if recipe.schedule == "constant":
            return optimiser
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        return [optimiser], [{"scheduler": schedule, "interval": "step"}]

    def training_step(self, batch: SpotBatch, number: int) -> Tensor:
        """Loss of a batch, the same however many processes share it."""
        scores = self.network(*batch.inputs)
        loss: Tensor = self.loss(scores, batch.counts, section=batch.section, offset=batch.offset)
        if n_processes() > 1 and not isinstance(self.loss, ListSTRankLoss):
            # A mean over this process's spots weighs as much as they are.
            n_spots = torch.tensor(float(len(batch.section)), device=loss.device)
            loss = loss * n_spots * n_processes() / all_summed(n_spots)
        if not loss.isfinite():
            raise InputError(self._not_finite(batch, scores.detach(), number))
        self._losses.append(loss.detach())
        if number + 1 == self.trainer.num_training_batches:
            mean = torch.stack(self._losses).mean()
            self.log("train/loss", mean, on_step=True, sync_dist=n_processes() > 1)
            self._losses.clear()
        return loss

    def validation_step(self, batch: SpotBatch, number: int) -> None:
        """Score a held-out section."""
        if len(batch.section) == 0:
            return
        scores = self.network(*batch.inputs).float()
        value = score_held_out(scores, batch, self.recipe.monitor)
        self._held_out += torch.tensor([value, 1.0], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        """Log the mean score over held-out sections, which may lie on several processes."""
        total = self._held_out
        if n_processes() > 1:
            total = all_summed(total.to(self.device)).cpu()
        self.log(
            f"held_out/{self.recipe.monitor}", float(total[0] / total[1]), rank_zero_only=False
        )
        self._held_out = torch.zeros_like(self._held_out)

    def _not_finite(self, batch: SpotBatch, scores: Tensor, number: int) -> str:
        wrong, what = ~scores.isfinite(), "its scores are not finite"
        if not wrong.any():
            wrong, what = scores.abs() == scores.abs().max(), "its scores are the largest"
        spots, genes = wrong.any(1), wrong.any(0).nonzero().flatten().tolist()
        sections = batch.section[spots].unique().tolist()
        return (
            f"the loss is not finite in epoch {self.current_epoch}, batch {number}: section "
            f"{some([self.names.sections[s] for s in sections])}, gene "
            f"{some([self.names.genes[g] for g in genes])} ({what}); lower the learning rate, or "
            "clip the gradient"
        )


def score_held_out(scores: Tensor, batch: SpotBatch, monitor: Monitor) -> float:
    """Score one section, mean over genes; see `Recipe.monitor`."""
    if monitor == "spearman":
        section = np.zeros(len(scores))
        library_size = batch.offset.exp().cpu().numpy()
        counts = batch.counts.cpu().numpy()
        each = spearman(scores.cpu().numpy(), counts, section=section, library_size=library_size)
        return float(np.nan_to_num(each).mean())
    none, model = (
        list_loss(s, batch.counts, section=batch.section, offset=batch.offset, reduction="sum")
        for s in (torch.zeros_like(scores), scores)
    )
    return float(none - model) / scores.shape[1]
