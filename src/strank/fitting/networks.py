"""From the features of a cohort to a model with a neural head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from strank.cohort.training_set import (
    TrainingData,
    encoder_facts_of,
    panel_of,
    training_data,
    training_sections,
)
from strank.encoders.backbone import Backbone
from strank.errors import InputError, some
from strank.files import claim_folder
from strank.fitting.exact import fit_model
from strank.functional.groups import centre_within, deal
from strank.losses import SectionLoss
from strank.model.novelty import fit_novelty
from strank.model.rank_model import RankModel
from strank.neural.data import Augment, Spots, find_neighbours
from strank.neural.heads import HEADS, Head, LinearHead, MeanHead, MLPHead, Network, stored_head
from strank.neural.recipe import (
    Machine,
    MakeLoss,
    Recipe,
    get_recipe,
    loss_maker,
    monitored,
    start_level,
)
from strank.neural.training import Names, Run, Trained, is_first_process, train_ensemble
from strank.version import __version__

MakeHead = Callable[[int, int], nn.Module]
# Counts that may be dense: a quarter of a GiB.
_FEW_COUNTS = 2**26

_WITH_LINEAR = "+linear"
# In their likelihood a section without counts of a gene has no say.
_UNION_LOSSES = ("list", "pair")


@dataclass(frozen=True)
class TrainingPlan:
    """Spots, panel, and which sections stop which network.

    Attributes
    ----------
    data
        Spots of all sections.
    panel
        Genes.
    sections
        Names of the sections, by code.
    section
        Code of every spot's section, ``[n_spots]``.
    turns
        Codes of the sections that each network does not see.
    provenance
        What the networks are trained on and with.
    """

    data: TrainingData
    panel: pd.Index
    sections: tuple[str, ...]
    section: NDArray[np.int64]
    turns: list[tuple[int, ...]]
    provenance: dict[str, Any]

    @classmethod
    def of(
        cls,
        cohort: Mapping[str, AnnData],
        recipe: Recipe,
        *,
        encoder: str | None,
        n_genes: int | None,
        genes: Sequence[str] | None,
        union: bool = False,
        held_out: Sequence[str] | None,
        seed: int,
        about: Mapping[str, Any],
    ) -> TrainingPlan:
        """Choose panel and turns.

        Parameters
        ----------
        cohort
            Training sections.
        recipe
            How many networks there are to be.
        encoder
            Whose features; ``None`` for none.
        n_genes, genes, union, held_out, seed
            As in `strank.fitting.networks.train_model`.
        about
            What else the provenance says.
        """
        panel, panel_choice = panel_of(cohort, n_genes, genes, union=union)
        data = training_data(cohort, panel, encoder)
        names, codes = np.unique(data.section, return_inverse=True)
        sections = tuple(names.tolist())
        provenance = {
            "strank_version": __version__,
            **about,
            "panel_choice": panel_choice,
            "seed": seed,
            "recipe": asdict(recipe),
            **training_sections(cohort),
        }
        turns = _turns(data.group, codes, sections, held_out, recipe.networks, seed)
        return cls(data, panel, sections, codes, turns, provenance)

    @property
    def names(self) -> Names:
        """Names of sections and genes."""
        return Names(self.sections, tuple(self.panel))

    def claim(
        self,
        folder: Path | str | None,
        head: nn.Module,
        encoder: Mapping[str, Any],
        *,
        resume: bool,
    ) -> Path | None:
        """Start, or go on, in a folder; errors as `strank.files.claim_folder`."""
        if folder is None:
            return None
        if is_first_process():
            given: dict[str, Any] = {
                "genes": list(self.panel),
                "turns": [list(turn) for turn in self.turns],
            }
            given |= {"head": stored_head(head), "encoder": dict(encoder)}
            facts = self.provenance | given
            claim_folder(Path(folder), facts, kind="training", resume=resume)
        return Path(folder)

    def spots(self, inputs: Any, head: nn.Module, augment: Augment | None = None) -> Spots:
        """Gather what a network with such a head is trained on."""
        reach = int(getattr(head, "n_neighbours", 0))
        counts = self.data.counts.astype(np.float32)
        return Spots(
            inputs,
            counts.toarray() if np.prod(counts.shape) < _FEW_COUNTS else counts,
            self.section,
            np.log(self.data.library_size).astype(np.float32),
            find_neighbours(self.data.positions, self.section, reach) if reach else None,
            augment,
        )

    def model(
        self,
        head: nn.Module,
        trained: Sequence[tuple[Network, Trained]],
        encoder: Mapping[str, Any],
        backbone: Backbone | None = None,
    ) -> RankModel:
        """Describe a head that was made of trained networks."""
        networks = [
            {"held_out": [self.sections[code] for code in turn], **result.summary}
            for turn, (_, result) in zip(self.turns, trained, strict=True)
        ]
        counts = np.asarray(self.data.counts.sum(0)).ravel()
        return RankModel(
            head=head,
            panel=pd.DataFrame({"counts": counts}, index=self.panel),
            encoder=encoder,
            provenance=self.provenance | {"networks": networks},
            backbone=backbone,
        )


def head_maker(head: str | MakeHead, **options: Any) -> MakeHead:
    """Return what makes a head from the number of features and of genes.

    Parameters
    ----------
    head
        A name, or such a function already.
    options
        Of a head that is named.

    Raises
    ------
    InputError
        For an unknown name.
    """
    if callable(head):
        return head
    if head == "linear":
        return lambda n_features, n_genes: MLPHead(n_features, n_genes, depth=0, centred=False)
    if head not in HEADS or head == "mean":
        known = ["linear", *(name for name in HEADS if name != "mean")]
        raise InputError(f"no head {head!r}; choose one of {', '.join(known)}")
    return lambda n_features, n_genes: HEADS[head](n_features, n_genes, **options)


def method_name(head: str | MakeHead, loss: str) -> str:
    """Name head and objective in tables.

    Examples
    --------
    >>> method_name("mlp", "list")
    'mlp, list'
    """
    return f"{head if isinstance(head, str) else 'own head'}, {loss}"


def _turns(
    group: NDArray,
    section: NDArray[np.int64],
    names: Sequence[str],
    held_out: Sequence[str] | None,
    n_networks: int,
    seed: int,
) -> list[tuple[int, ...]]:
    """Choose the sections that each network does not see; a single one's are drawn."""
    if len(names) < 2:
        raise InputError(
            f"there is only section {names[0]}, and a network needs another to know when to stop: "
            "give two or more, or fit the linear head exactly"
        )
    if held_out is not None:
        wanted = sorted(set(held_out))
        unknown = sorted(set(wanted) - set(names))
        if unknown or not 0 < len(wanted) < len(names):
            raise InputError(
                f"cannot hold out {some(unknown or wanted)}: name some, but not all, of "
                f"{some(names, 20)}"
            )
        return [tuple(names.index(name) for name in wanted)]
    fold = deal(group, n_networks if n_networks > 1 else len(names))
    turns = [tuple(np.unique(section[fold == f]).tolist()) for f in np.unique(fold)]
    if n_networks > 1:
        return turns
    return [turns[int(np.random.default_rng(seed).integers(len(turns)))]]


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
        head's, by `strank.fitting.exact.fit_model` on the same sections.
    loss
        ``"list"``, ``"pair"``, ``"rank"``, ``"section-pcc"`` (Pearson within sections), ``"pcc"``
        (over all spots of a batch, as published), ``"mse"``, ``"poisson"`` or ``"nb"``.
    recipe
        ``"default"``, ``"paper"``, or a `strank.neural.recipe.Recipe`.
    encoder
        Whose features.
    n_genes, genes, union
        Size of the panel, the panel, and whether a gene may be measured in some sections only, as
        in `strank.fitting.exact.fit_model`; such genes need the list or pair objective.
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
