"""Networks on the features of a cohort: trained in turns, and averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from numpy.typing import NDArray
from torch import Tensor, nn

from strank.cohort.contract import FLOAT32_COUNTS
from strank.cohort.folds import Aim
from strank.cohort.rows import StackedRows
from strank.cohort.scratch import SpotCountsOnDisk
from strank.cohort.training_set import (
    Survey,
    TrainingData,
    panel_of,
    same_encoder,
    taking_turns,
    training_data,
    training_sections,
)
from strank.encoders.backbone import Backbone
from strank.errors import InputError, some
from strank.files import claim_folder, claims
from strank.fitting.exact import ExactOptions, fit_exact, solve_list
from strank.fitting.objectives import DepthOf, Objective
from strank.fitting.published import torch_start
from strank.functional.groups import centre_within, deal, rows_of
from strank.losses import SectionLoss
from strank.model.novelty import fit_novelty
from strank.model.rank_model import RankModel
from strank.neural.data import Augment, Spots, find_neighbours
from strank.neural.heads import Head, MeanHead, Network, Traits, stored_head
from strank.neural.recipe import Machine, Recipe
from strank.neural.training import Run, SpotNames, Trained, is_first_process, train_ensemble
from strank.version import __version__

MakeHead = Callable[[int, int], nn.Module]
# Counts that may be dense: a quarter of a GiB, or an eighth of the memory if that is less.
_FEW_COUNTS = 2**26
# Spots at a time, of features on disk; and those that tell the level of genes.
_ROWS, _LEVEL_SPOTS = 8192, 65536


@dataclass(frozen=True)
class TrainingPlan:
    """Spots, panel, and which sections stop which network."""

    data: TrainingData
    panel: pd.Index
    sections: tuple[str, ...]
    section: NDArray[np.int64]  #: of every spot, by its place in `sections`
    turns: list[tuple[int, ...]]  #: sections that each network does not see
    provenance: dict[str, Any]
    encoder: dict[str, Any]  #: what the features come from; empty without
    max_memory: float = np.inf

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
        validation: Sequence[str] | None,
        seed: int,
        aim: Aim = "new-patients",
        about: Mapping[str, Any],
        depth: DepthOf | None = None,
        max_memory: float = np.inf,
    ) -> TrainingPlan:
        """Choose panel and turns; without an encoder no features, with a depth no library size."""
        survey = Survey.of(cohort, encoder, sums=genes is None)
        panel, panel_choice = panel_of(survey, n_genes, genes, union=union)
        groups = taking_turns(survey.known, aim)
        room: dict[str, Any] = {"max_memory": max_memory, "scratch": SpotCountsOnDisk}
        data = training_data(cohort, panel, encoder, groups, **room)
        _check_exact(data, panel)
        if depth is not None:
            data = replace(data, library_size=depth(data.counts))
        names, codes = np.unique(data.section, return_inverse=True)
        sections = tuple(names.tolist())
        provenance = {
            "strank_version": __version__,
            **about,
            "panel_choice": panel_choice,
            "seed": seed,
            "aim": aim,
            "recipe": asdict(recipe),
            **training_sections(survey),
        }
        turns = _turns(data.group, codes, sections, validation, recipe.networks, seed)
        if validation is not None:
            _check_counted(data, turns[0], codes, sections)
        facts = {} if encoder is None else same_encoder(survey.encoders, encoder)
        return cls(data, panel, sections, codes, turns, provenance, facts, max_memory)

    @property
    def names(self) -> SpotNames:
        """SpotNames of sections and genes."""
        return SpotNames(self.sections, tuple(self.panel))

    def claim(
        self,
        folder: Path | str | None,
        head: nn.Module,
        encoder: Mapping[str, Any],
        *,
        resume: bool,
    ) -> Path | None:
        """Start, or go on, in a folder."""
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
        reach, few = Traits.of(head).n_neighbours, min(_FEW_COUNTS, self.max_memory * 2**25)
        counts = self.data.counts.astype(np.float32, copy=False)
        return Spots(
            inputs,
            counts.toarray() if np.prod(counts.shape) < few else counts,
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
            {"validation": [self.sections[code] for code in turn], **result.summary}
            for turn, (_, result) in zip(self.turns, trained, strict=True)
        ]
        return RankModel(
            head=head,
            panel=pd.DataFrame({"counts": self.data.gene_counts}, index=self.panel),
            encoder=encoder,
            provenance=self.provenance | {"networks": networks},
            backbone=backbone,
        )


def _turns(
    group: NDArray,
    section: NDArray[np.int64],
    names: Sequence[str],
    validation: Sequence[str] | None,
    n_networks: int,
    seed: int,
) -> list[tuple[int, ...]]:
    """Choose the sections that each network does not see; a single one's are drawn."""
    if len(names) < 2:
        raise InputError(
            f"there is only section {names[0]}, and a network needs another to know when to stop: "
            "give two or more, or fit the linear head exactly"
        )
    if validation is not None:
        wanted = sorted(set(validation))
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


def _check_exact(data: TrainingData, panel: pd.Index) -> None:
    """Refuse counts that float32, in which networks are trained, does not hold."""
    sections = rows_of(data.section)  # a copy of all would be by genes
    largest = np.max([data.counts[rows].max(0).toarray()[0] for rows in sections], axis=0)
    if (huge := largest >= FLOAT32_COUNTS).any():
        raise InputError(
            f"a network's losses are of float32, in which counts are exact below {FLOAT32_COUNTS}; "
            f"gene {some(panel[huge])} has more: leave it out, or fit the linear head exactly"
        )


def _check_counted(
    data: TrainingData, turn: Sequence[int], section: NDArray[np.int64], names: Sequence[str]
) -> None:
    """Refuse a section that says nothing of when to stop: the first epoch would seem the best."""
    for code in turn:
        if data.counts[section == code].sum() == 0:
            raise InputError(f"section {names[code]} cannot stop a network: no count in the panel")


def depth_of(objective: Objective, recipe: Recipe, method: Mapping[str, Any]) -> DepthOf | None:
    """Choose what takes the place of library size, if anything does."""
    if not method["library_size"]:
        return lambda counts: np.ones(counts.shape[0])
    return objective.published.depth if recipe.published and objective.published else None


# First weights are drawn from torch's generator, which is the user's.
@torch.random.fork_rng()
@claims("folder")
def fit_networks(
    cohort: Mapping[str, AnnData],
    make: MakeHead,
    objective: Objective,
    recipe: Recipe,
    *,
    method: Mapping[str, Any],
    with_linear: bool = False,
    encoder: str,
    n_genes: int | None,
    genes: Sequence[str] | None,
    aim: Aim,
    union: bool,
    validation: Sequence[str] | None,
    seed: int,
    machine: Machine | None,
    folder: Path | str | None,
    resume: bool,
    verbose: bool,
    max_memory: float,
) -> RankModel:
    """Train a head on features, one network a turn; the scores are the mean of theirs.

    With the linear head, the mean of that and of the exact linear head by the list likelihood.
    """
    recipe = replace(recipe, monitor=recipe.monitor or objective.monitor)
    plan = TrainingPlan.of(
        cohort,
        recipe,
        encoder=encoder,
        n_genes=n_genes,
        genes=genes,
        union=union,
        validation=validation,
        seed=seed,
        aim=aim,
        about={"method": dict(method)},
        depth=depth_of(objective, recipe, method),
        max_memory=max_memory,
    )
    facts = plan.encoder
    like = make(facts["n_features"], len(plan.panel))
    spots = plan.spots(_inputs(plan, centred=Traits.of(like).centred), like)
    folder = plan.claim(folder, like, facts, resume=resume)
    title = "Network" if verbose else None
    run = Run(recipe, machine or Machine(), seed, folder=folder, resume=resume, title=title)
    start = partial(_start, spots, make, objective, recipe)
    trained = train_ensemble(start, spots, plan.names, plan.turns, run)
    heads = [network.head for network, _ in trained]
    mean = heads[0] if len(heads) == 1 else MeanHead.of(heads)
    if with_linear:
        options = ExactOptions(max_memory=max_memory, verbose=verbose)
        how: dict[str, Any] = {"method": method, "encoder": encoder, "aim": aim, "union": union}
        panel = list(plan.panel)
        exact = fit_exact(cohort, solve_list, options, n_genes=None, genes=panel, **how)
        mean = MeanHead.of([mean, exact.head])
    novelty = fit_novelty(plan.data.features, plan.data.group)
    return replace(plan.model(mean.eval(), trained, facts), novelty=novelty)


def _start(
    spots: Spots,
    make: MakeHead,
    objective: Objective,
    recipe: Recipe,
    rows: NDArray[np.int64],
) -> tuple[Network, SectionLoss]:
    units = _units(spots.inputs, rows)
    head, loss = start_head(make, objective, recipe, units, spots, rows)
    return Network(head), loss


def _inputs(plan: TrainingPlan, *, centred: bool) -> Any:
    """Take the features as networks have them; those on disk stay there."""
    features = plan.data.features
    if isinstance(features, StackedRows):
        return features.as_float32(centred=centred)
    features = centre_within(features, plan.section) if centred else features
    return features.astype(np.float32)


def _units(features: Any, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of some rows, ``[n_features]``; block by block from disk."""
    if isinstance(features, np.ndarray):
        return mean_and_spread(torch.from_numpy(features[rows]))
    blocks = np.array_split(np.sort(rows), 1 + len(rows) // _ROWS)
    mean = sum(features[block].sum(0, dtype=np.float64) for block in blocks) / len(rows)
    squares = sum(np.square(features[block] - mean).sum(0) for block in blocks)
    spread = np.sqrt(squares / max(len(rows) - 1, 1))
    return torch.from_numpy(mean).float(), torch.from_numpy(spread).float()


def mean_and_spread(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of features."""
    return features.mean(0), spread_of(features)


def start_head(
    make: MakeHead,
    objective: Objective,
    recipe: Recipe,
    units: tuple[Tensor, Tensor],
    spots: Spots,
    rows: NDArray[np.int64],
) -> tuple[nn.Module, SectionLoss]:
    """Make a head in the units of features, and at the level of some spots, with its loss."""
    (mean, spread), n_genes = units, spots.counts.shape[1]
    if recipe.published:
        return _start_as_published(objective, recipe, len(mean), n_genes)
    loss = objective.module(n_genes, recipe.reduction, **_lists(recipe))
    head = make(len(mean), n_genes)
    if isinstance(head, Head):
        head.centre.copy_(mean)
        head.scale.copy_(torch.where(spread > 0, spread, 1.0))
        # Where the objective does not know a level, there is nothing to train.
        head.level.requires_grad_(objective.start_level is not None)
        if objective.start_level is not None:
            sample = rows[:: -(-len(rows) // _LEVEL_SPOTS)]
            level = objective.start_level(spots.counts[sample], spots.offset[sample])
            head.level.data.copy_(level)
    return head, loss


def spread_of(features: Tensor) -> Tensor:
    """Compute the standard deviation of features whose squares float32 may not hold.

    >>> spread_of(torch.tensor([[1e30], [3e30], [5e30]]))
    tensor([2.0000e+30])
    """
    # A product with a power of two is exact.
    exponent = torch.frexp(features.abs().amax(0)).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ldexp(features, -exponent).std(0), exponent)


def _lists(recipe: Recipe) -> dict[str, int]:
    # Other losses than the list have none, which `fit` refuses.
    return {} if recipe.list_size is None else {"list_size": recipe.list_size}


def _start_as_published(
    objective: Objective, recipe: Recipe, n_features: int, n_genes: int
) -> tuple[nn.Module, SectionLoss]:
    assert objective.published is not None  # what `Method` refuses
    options: dict[str, Any] = _lists(recipe)
    if objective.name == "pair" and not recipe.pair_entropy:
        options["entropy"] = False
    return torch_start(n_features, n_genes), objective.published.module(n_genes, **options)
