"""From the images of a cohort to a model whose encoder was trained with its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import nn

from strank.encoders.backbone import Backbone, BackboneEncoder, weights_checksum
from strank.encoders.base import encoder_facts
from strank.encoders.load import load_encoder
from strank.errors import InputError
from strank.fitting.networks import MakeHead, TrainingPlan, head_maker, method_name, start_head
from strank.losses import SectionLoss
from strank.model.rank_model import RankModel
from strank.neural.augment import Augmentation
from strank.neural.data import Spots
from strank.neural.finetune import (
    Finetune,
    checkpoint_activations,
    cut_patches,
    freeze_unused,
    merge,
    prepare,
)
from strank.neural.heads import Network
from strank.neural.recipe import Machine, MakeLoss, Recipe, get_recipe, loss_maker, monitored
from strank.neural.training import Run, train_ensemble

# Patches that tell the scale of an image network's features.
_MEASURED = 1024


# First weights are drawn from torch's generator, which is the user's.
@torch.random.fork_rng()
def finetune_model(
    cohort: Mapping[str, AnnData],
    encoder: str,
    how: Finetune | None = None,
    *,
    head: str | MakeHead = "mlp",
    loss: str = "list",
    recipe: str | Recipe = "finetune",
    n_genes: int | None = 50,
    genes: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    seed: int = 0,
    machine: Machine | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    verbose: bool = False,
) -> RankModel:
    """Train an image network and a head on its features together, by any objective.

    Parameters
    ----------
    cohort
        Training sections with images, at least two.
    encoder
        An image network of `strank.encoders.load.load_backbone`, such as ``"timm:resnet18"``.
    how
        What of it is trained, augmentation and memory; adapters of low rank if ``None``.
    head, loss, n_genes, genes, seed, machine, folder, resume, verbose
        As in `train_model`; two processes read patches if ``machine`` is ``None``.
        Features are not centred within sections here, since a
        batch does not hold whole sections.
    recipe
        ``"finetune"``, or a `strank.neural.recipe.Recipe`. One network is trained.
    held_out
        Sections that stop it, and that it does not see; a patient (or a section, where there are
        fewer than three patients) drawn by the seed if ``None``.

    Returns
    -------
    RankModel
        With the trained network as ``backbone``.

    Raises
    ------
    InputError
        As `train_model`, and for an image or network that cannot be read.
    """
    how = how or Finetune()
    recipe = monitored(get_recipe(recipe) if isinstance(recipe, str) else recipe, loss)
    make, make_loss = head_maker(head, centred=False), loss_maker(loss, recipe.reduction)
    about = {
        "method": method_name(head, loss),
        "finetune": {"encoder": encoder, **asdict(how)},
    }
    plan = TrainingPlan.of(
        cohort,
        replace(recipe, networks=1),
        encoder=None,
        n_genes=n_genes,
        genes=genes,
        held_out=held_out,
        seed=seed,
        about=about,
    )
    source = load_encoder(encoder)
    like = make(source.backbone.n_features, len(plan.panel))
    if getattr(like, "centred", False):
        raise InputError("a head on an image network cannot have centred features: centred=False")
    with ExitStack() as stack:
        kept = plan.claim(folder, like, encoder_facts(source), resume=resume)
        place = kept or Path(stack.enter_context(TemporaryDirectory()))
        patches = cut_patches(
            cohort, plan.data.section, plan.data.positions, source.fields[0], place, verbose=verbose
        )
        augment = Augmentation(len(patches), seed) if how.augment else None
        spots = plan.spots(patches, like, augment)
        title = "Network" if verbose else None
        run = Run(
            recipe, machine or Machine(workers=2), seed, folder=kept, resume=resume, title=title
        )
        start = partial(_start, spots, make, make_loss, source, how, seed)
        trained = train_ensemble(start, spots, plan.names, plan.turns, run)
    (network, _), *_ = trained
    backbone = merge(cast(Backbone, network.backbone))
    version = weights_checksum(backbone)
    name = f"{source.name}-{how.mode}-{version[:8]}"
    facts = encoder_facts(BackboneEncoder(backbone, name, version))
    return plan.model(network.head.eval(), trained, facts, backbone)


def _start(
    spots: Spots,
    make: MakeHead,
    make_loss: MakeLoss,
    source: BackboneEncoder,
    how: Finetune,
    seed: int,
    rows: NDArray[np.int64],
) -> tuple[Network, SectionLoss]:
    measured = torch.from_numpy(spots.inputs.take(rows[:: -(-len(rows) // _MEASURED)], 0))
    with torch.no_grad():
        features = Network(nn.Identity(), source.backbone)(measured)
    counts, offset = spots.counts[rows], spots.offset[rows]
    head, loss = start_head(make, make_loss, features, counts, offset)
    backbone = prepare(source.backbone, how.mode, lora_rank=how.lora_rank, seed=seed)
    freeze_unused(backbone)
    if how.recompute:
        checkpoint_activations(backbone)
    return Network(head, backbone, how.micro_batch), loss
