"""From the features of a cohort to a model with a neural head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from strank.errors import InputError
from strank.fit import fit_model
from strank.linear.geometry import centre_within
from strank.linear.head import LinearHead
from strank.losses import SectionLoss
from strank.model import RankModel
from strank.neural.ensemble import train_ensemble
from strank.neural.heads import Head, MeanHead, MLPHead
from strank.neural.network import Network
from strank.neural.objectives import MakeLoss, loss_maker, monitored, start_level
from strank.neural.recipe import Machine, Recipe, get_recipe
from strank.neural.run import Run
from strank.neural.spots import Spots
from strank.novelty import fit_novelty
from strank.plan import MakeHead, TrainingPlan, head_maker, method_name
from strank.training_set import encoder_facts_of

__all__ = ["start_head", "train_model"]

_WITH_LINEAR = "+linear"
# In their likelihood a section without counts of a gene has no say.
_UNION_LOSSES = ("list", "pair")


# First weights are drawn from torch's generator, which is the user's.
@torch.random.fork_rng()
def train_model(
    cohort: Mapping[str, AnnData],
    *,
    head: str | MakeHead = "mlp",
    loss: str = "list",
    recipe: str | Recipe = "default",
    encoder: str = "morphology",
    n_genes: int | None = 50,
    genes: Sequence[str] | None = None,
    union: bool = False,
    held_out: Sequence[str] | None = None,
    seed: int = 0,
    machine: Machine | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    verbose: bool = False,
) -> RankModel:
    """Train a head on features, by any objective.

    A network is stopped by sections that it does not see. The patients (or sections, where there
    are fewer than three patients) take turns at that, each for a network of its own, and the model
    gives the mean of their scores: so every section is trained on, too.

    Parameters
    ----------
    cohort
        Training sections with features, at least two, from `read_cohort(..., encoder=...)`.
    head
        ``"mlp"``, ``"context"``, ``"linear"``, or what makes a module from the number of features
        and of genes, such as ``functools.partial(MLPHead, width=64)``. With ``"mlp+linear"`` or
        ``"context+linear"`` the scores are the mean of the networks' and of the exact linear
        head's, by `strank.fit.fit_model` on the same sections.
    loss
        ``"list"``, ``"pair"``, ``"rank"``, ``"section-pcc"`` (Pearson within sections), ``"pcc"``
        (over all spots of a batch, as published), ``"mse"``, ``"poisson"`` or ``"nb"``.
    recipe
        ``"default"``, ``"paper"``, or a `strank.neural.recipe.Recipe`.
    encoder
        Whose features.
    n_genes, genes, union
        Size of the panel, the panel, and whether a gene may be measured in some sections only, as
        in `strank.fit.fit_model`; such genes need the list or pair objective.
    held_out
        Sections for a single network not to see, rather than networks that take turns.
    seed
        Of first weights, batches, dropout and pairs: on one machine, the same model.
    machine
        Devices, precision and so on; one device if ``None``.
    folder
        For checkpoints, logs and learning curves; ``None`` for none of them.
    resume
        Go on from the checkpoints in ``folder``.
    verbose
        Whether to show progress, on stderr.

    Returns
    -------
    RankModel
        ``provenance["networks"]`` has best epoch and score on the held-out sections of each.

    Raises
    ------
    InputError
        For features that are absent or not the same in all sections, a panel that is not measured,
        an unknown head, loss, recipe or section, ``union`` with another objective,
        fewer than two sections, a folder of another training, and a loss that is not finite.
    """
    recipe = monitored(get_recipe(recipe) if isinstance(recipe, str) else recipe, loss)
    if union and loss not in _UNION_LOSSES:
        raise InputError(
            f"{loss} cannot tell a gene that a section does not measure from one without counts: "
            "leave union out, or use the list or pair objective"
        )
    with_linear = isinstance(head, str) and head.endswith(_WITH_LINEAR)
    make = head_maker(head.removesuffix(_WITH_LINEAR) if isinstance(head, str) else head)
    facts = encoder_facts_of(cohort, encoder)
    make_loss = loss_maker(loss, recipe.reduction)
    plan = TrainingPlan.of(
        cohort,
        recipe,
        encoder=encoder,
        n_genes=n_genes,
        genes=genes,
        union=union,
        held_out=held_out,
        seed=seed,
        about={"method": method_name(head, loss)},
    )
    features, like = plan.data.features, make(facts["n_features"], len(plan.panel))
    if getattr(like, "centred", False):
        features = centre_within(features, plan.section)
    spots = plan.spots(features.astype(np.float32), like)
    folder = plan.claim(folder, like, facts, resume=resume)
    title = "Network" if verbose else None
    run = Run(recipe, machine or Machine(), seed, folder=folder, resume=resume, title=title)
    start = partial(_start, spots, make, make_loss)
    trained = train_ensemble(start, spots, plan.names, plan.turns, run)
    heads = [network.head for network, _ in trained]
    mean = heads[0] if len(heads) == 1 else MeanHead.of(heads)
    if with_linear:
        panel = {"genes": list(plan.panel), "union": union}
        exact = fit_model(cohort, encoder=encoder, **panel, verbose=verbose)  # type: ignore[arg-type]
        mean = MeanHead.of([mean, _as_network(cast(LinearHead, exact.head))])
    novelty = fit_novelty(plan.data.features, plan.data.group)
    return replace(plan.model(mean.eval(), trained, facts), novelty=novelty)


def _as_network(linear: LinearHead) -> MLPHead:
    """Return the same linear head as a network without hidden layers."""
    network = MLPHead(*linear.weight.shape, depth=0, centred=False)
    network.centre.copy_(linear.centre)
    network.scale.copy_(linear.scale)
    cast(nn.Linear, network.readout).weight.data.copy_(linear.weight.T)
    return network


def _start(
    spots: Spots, make: MakeHead, make_loss: MakeLoss, rows: NDArray[np.int64]
) -> tuple[Network, SectionLoss]:
    features = torch.from_numpy(spots.inputs[rows])
    head, loss = start_head(make, make_loss, features, spots.counts[rows], spots.offset[rows])
    return Network(head), loss


def start_head(
    make: MakeHead,
    make_loss: MakeLoss,
    features: Tensor,
    counts: sparse.csr_matrix | NDArray[np.float32],
    offset: NDArray[np.float32],
) -> tuple[nn.Module, SectionLoss]:
    """Make a head in the units of some features, and at the level of some counts.

    Parameters
    ----------
    make, make_loss
        The head and the objective.
    features
        Of spots that are trained on, ``[n, n_features]``.
    counts, offset
        Of all spots that are trained on.
    """
    loss, head = make_loss(counts.shape[1]), make(features.shape[1], counts.shape[1])
    if isinstance(head, Head):
        spread = features.std(0)
        head.centre.copy_(features.mean(0))
        head.scale.copy_(torch.where(spread > 0, spread, 1.0))
        level = start_level(loss, counts, offset)
        # Where the objective does not know a level, there is nothing to train.
        head.level.requires_grad_(level is not None)
        if level is not None:
            head.level.data.copy_(level)
    return head, loss
