"""From the sections of a cohort to a model with a neural head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import nn

from strank.errors import InputError, some
from strank.linear.geometry import centre_within
from strank.linear.inputs import deal
from strank.losses import SectionLoss
from strank.model import RankModel
from strank.neural.ensemble import train_ensemble
from strank.neural.folder import claim_folder
from strank.neural.heads import HEADS, Head, MeanHead, MLPHead
from strank.neural.module import Names
from strank.neural.neighbours import find_neighbours
from strank.neural.network import Network
from strank.neural.objectives import make_objective, start_level
from strank.neural.recipe import Machine, Recipe, get_recipe
from strank.neural.run import Run, is_first_process
from strank.neural.spots import Spots
from strank.training_set import (
    TrainingData,
    encoder_facts_of,
    panel_of,
    training_data,
    training_sections,
)
from strank.version import __version__

__all__ = ["train_model"]

MakeHead = Callable[[int, int], nn.Module]


def train_model(
    cohort: Mapping[str, AnnData],
    *,
    head: str | MakeHead = "mlp",
    loss: str = "list",
    recipe: str | Recipe = "default",
    encoder: str = "morphology",
    n_genes: int | None = 50,
    genes: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    seed: int = 0,
    machine: Machine | None = None,
    folder: Path | str | None = None,
    resume: bool = False,
    verbose: bool = False,
) -> RankModel:
    """Train a head on features, by any objective.

    A network is stopped by sections that it does not see. By default the patients (or sections,
    where there are fewer than three patients) take turns at that, each for a network of its own,
    and the model gives the mean of their scores: so every section is trained on, too.

    Parameters
    ----------
    cohort
        Training sections with features, from `read_cohort(..., encoder=...)`; at least two.
    head
        ``"mlp"``, ``"context"``, ``"linear"``, or what makes a module from the number of features
        and of genes, such as ``functools.partial(MLPHead, width=64)``.
    loss
        ``"list"``, ``"pair"``, ``"rank"``, ``"pearson"``, ``"mse"``, ``"poisson"`` or ``"nb"``.
    recipe
        ``"default"``, ``"paper"``, or a `strank.neural.recipe.Recipe`.
    encoder
        Whose features.
    n_genes, genes
        Size of the panel, or the panel, as in `strank.fit.fit_model`.
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
        an unknown head, loss, recipe or section, fewer than two sections, a folder of another
        training, and a loss that is not finite.
    """
    recipe = get_recipe(recipe) if isinstance(recipe, str) else recipe
    facts = encoder_facts_of(cohort, encoder)
    panel, panel_choice = panel_of(cohort, n_genes, genes)
    data = training_data(cohort, panel, encoder)
    make = head if callable(head) else _known_head(head)
    names, codes = np.unique(data.section, return_inverse=True)
    turns = _turns(data, names, held_out, recipe, seed)
    spots = _spots(data, codes, make(facts["n_features"], len(panel)))
    provenance = {
        "strank_version": __version__,
        "objective": f"{loss}, {head if isinstance(head, str) else 'own'} head, AdamW",
        "panel_choice": panel_choice,
        "seed": seed,
        "recipe": asdict(recipe),
        **training_sections(cohort),
    }
    if folder is not None:
        folder = Path(folder)
        if is_first_process():
            given = {"genes": list(panel), "held_out": [names[list(t)].tolist() for t in turns]}
            claim_folder(folder, provenance | given, resume=resume)
    trained = train_ensemble(
        partial(_network, spots, make, partial(make_objective, loss)),
        spots,
        Names(tuple(names), tuple(panel)),
        turns,
        Run(
            recipe,
            machine or Machine(),
            seed,
            folder=folder,
            resume=resume,
            title="Network" if verbose else None,
        ),
    )
    heads = [network.head for network, _ in trained]
    return RankModel(
        head=heads[0] if len(heads) == 1 else MeanHead.of(heads).eval(),
        panel=pd.DataFrame({"counts": np.asarray(data.counts.sum(0)).ravel()}, index=panel),
        encoder=facts,
        provenance=provenance
        | {
            "networks": [
                {"held_out": names[list(turn)].tolist(), **result.summary}
                for turn, (_, result) in zip(turns, trained, strict=True)
            ]
        },
    )


def _known_head(name: str) -> MakeHead:
    known: dict[str, MakeHead] = {"linear": partial(MLPHead, depth=0, centred=False), **HEADS}
    if name not in known:
        raise InputError(f"no head {name!r}; choose one of {', '.join(known)}")
    return known[name]


def _turns(
    data: TrainingData,
    names: NDArray,
    held_out: Sequence[str] | None,
    recipe: Recipe,
    seed: int,
) -> list[tuple[int, ...]]:
    """Choose the sections that each network does not see."""
    if len(names) < 2:
        raise InputError(
            f"there is only section {names[0]}, and a network needs another to know when to stop: "
            "give two or more, or fit the linear head exactly"
        )
    if held_out is not None:
        unknown = sorted(set(held_out) - set(names))
        if unknown or not 0 < len(set(held_out)) < len(names):
            raise InputError(
                f"held out: {some(unknown or held_out)}; name some, but not all, of {some(names)}"
            )
        return [tuple(np.searchsorted(names, sorted(set(held_out))).tolist())]
    fold = deal(data.group, recipe.networks if recipe.networks > 1 else len(names))
    codes = np.searchsorted(names, data.section)
    turns = [tuple(np.unique(codes[fold == f]).tolist()) for f in np.unique(fold)]
    if recipe.networks > 1:
        return turns
    return [turns[int(np.random.default_rng(seed).integers(len(turns)))]]


def _spots(data: TrainingData, codes: NDArray[np.int64], like: nn.Module) -> Spots:
    """Gather what a head such as this one is trained on."""
    features = data.features
    if getattr(like, "centred", False):
        features = centre_within(features, codes)
    reach = int(getattr(like, "n_neighbours", 0))
    return Spots(
        features.astype(np.float32),
        data.counts.astype(np.float32),
        codes,
        np.log(data.library_size).astype(np.float32),
        find_neighbours(data.positions, codes, reach) if reach else None,
    )


def _network(
    spots: Spots,
    make: MakeHead,
    objective: Callable[[int], SectionLoss],
    rows: NDArray[np.int64],
) -> tuple[Network, SectionLoss]:
    """Make a network whose features are in units of, and scores at the level of, some spots."""
    features, counts = torch.from_numpy(spots.inputs[rows]), spots.counts[rows]
    head, loss = make(features.shape[1], counts.shape[1]), objective(counts.shape[1])
    if isinstance(head, Head):
        head.centre.copy_(features.mean(0))
        spread = features.std(0)
        head.scale.copy_(torch.where(spread > 0, spread, 1.0))
        level = start_level(loss, counts, spots.offset[rows])
        if level is not None:
            head.level.data.copy_(level)
    return Network(head), loss
