"""What is decided before networks are trained, and the model that is made of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from torch import nn

from strank.encoders.backbone import Backbone
from strank.errors import InputError, some
from strank.linear.inputs import deal
from strank.model import RankModel
from strank.neural.folder import claim_folder
from strank.neural.heads import HEADS, MLPHead, stored_head
from strank.neural.logs import is_first_process
from strank.neural.neighbours import find_neighbours
from strank.neural.network import Network
from strank.neural.recipe import Recipe
from strank.neural.run import Trained
from strank.neural.spots import Augment, Spots
from strank.neural.step import Names
from strank.training_set import TrainingData, panel_of, training_data, training_sections
from strank.version import __version__

__all__ = ["MakeHead", "TrainingPlan", "head_maker", "method_name"]

MakeHead = Callable[[int, int], nn.Module]

# Counts that may be dense: a quarter of a GiB.
_FEW_COUNTS = 2**26


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
            As in `strank.train.train_model`.
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
        """Start, or go on, in a folder; errors as `strank.neural.folder.claim_folder`."""
        if folder is None:
            return None
        if is_first_process():
            given: dict[str, Any] = {
                "genes": list(self.panel),
                "turns": [list(turn) for turn in self.turns],
            }
            given |= {"head": stored_head(head), "encoder": dict(encoder)}
            claim_folder(Path(folder), self.provenance | given, resume=resume)
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
