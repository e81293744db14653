"""From the images of a cohort to a model whose encoder was trained with its head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import nn

from strank.cohort.folds import Aim
from strank.encoders.backbone import Backbone, BackboneEncoder, weights_checksum
from strank.encoders.base import encoder_facts
from strank.encoders.load import load_encoder
from strank.errors import InputError
from strank.files import claims
from strank.fitting.networks import (
    MakeHead,
    TrainingPlan,
    depth_of,
    mean_and_spread,
    start_head,
)
from strank.fitting.objectives import Objective
from strank.losses import SectionLoss
from strank.model.rank_model import RankModel
from strank.neural.augment import Augmentation
from strank.neural.data import Spots
from strank.neural.finetune import (
    checkpoint_activations,
    cut_patches,
    freeze_unused,
    merge,
    prepare,
)
from strank.neural.heads import Network, Traits
from strank.neural.recipe import Finetune, Machine, Recipe
from strank.neural.training import Run, is_first_process, train_ensemble

# Patches that tell the scale of an image network's features.
_MEASURED = 1024


# First weights are drawn from torch's generator, which is the user's.
@torch.random.fork_rng()
@claims("folder")
def fit_finetuned(
    cohort: Mapping[str, AnnData],
    how: Finetune,
    make: MakeHead,
    objective: Objective,
    recipe: Recipe,
    *,
    method: Mapping[str, Any],
    encoder: str,
    n_genes: int | None,
    genes: Sequence[str] | None,
    aim: Aim,
    validation: Sequence[str] | None,
    seed: int,
    machine: Machine | None,
    folder: Path | str | None,
    resume: bool,
    verbose: bool,
) -> RankModel:
    """Train an image network and a head on its features together; a single network.

    Two processes read patches where nothing else is said.
    """
    recipe = replace(recipe, monitor=recipe.monitor or objective.monitor)
    plan = TrainingPlan.of(
        cohort,
        replace(recipe, networks=1),
        encoder=None,
        n_genes=n_genes,
        genes=genes,
        validation=validation,
        seed=seed,
        aim=aim,
        about={"method": dict(method), "finetune": {"encoder": encoder, **asdict(how)}},
        depth=depth_of(objective, recipe, method),
    )
    source = load_encoder(encoder)
    like = make(source.backbone.n_features, len(plan.panel))
    # A batch does not hold whole sections.
    if Traits.of(like).centred:
        raise InputError("a head on an image network cannot have centred features: centred=False")
    with ExitStack() as stack:
        kept = plan.claim(folder, like, encoder_facts(source), resume=resume)
        place = kept or Path(stack.enter_context(TemporaryDirectory()))
        # By torchrun all processes start at once, in the folder that the first of them claims.
        wait = kept is not None and not is_first_process()
        where = plan.data.section, plan.data.positions
        patches = cut_patches(cohort, *where, source.fields[0], place, wait=wait, verbose=verbose)
        augment = Augmentation(len(patches), seed) if how.augment else None
        spots = plan.spots(patches, like, augment)
        title = "Network" if verbose else None
        run = Run(
            recipe, machine or Machine(workers=2), seed, folder=kept, resume=resume, title=title
        )
        start = partial(_start, spots, make, objective, recipe, source, how, seed)
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
    objective: Objective,
    recipe: Recipe,
    source: BackboneEncoder,
    how: Finetune,
    seed: int,
    rows: NDArray[np.int64],
) -> tuple[Network, SectionLoss]:
    measured = torch.from_numpy(spots.inputs.take(rows[:: -(-len(rows) // _MEASURED)], 0))
    with torch.no_grad():
        features = Network(nn.Identity(), source.backbone)(measured)
    units = mean_and_spread(features)
    head, loss = start_head(make, objective, recipe, units, spots, rows)
    backbone = prepare(source.backbone, how.mode, lora_rank=how.lora_rank, seed=seed)
    freeze_unused(backbone)
    if how.recompute:
        checkpoint_activations(backbone)
    return Network(head, backbone, how.micro_batch), loss
