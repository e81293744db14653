"""Losses for anyone's PyTorch model: each a thin shell over its function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from strank.functional.batch import Reduction
from strank.functional.listwise import list_loss, pearson_loss
from strank.functional.pairwise import Ties, margin_ranking_loss, pair_loss
from strank.functional.pointwise import mse_loss, negative_binomial_loss, poisson_loss

__all__ = [
    "ListSTRankLoss",
    "MSELoss",
    "MarginRankingLoss",
    "NegativeBinomialLoss",
    "PairSTRankLoss",
    "PearsonLoss",
    "PoissonLoss",
    "SectionLoss",
]


class SectionLoss(nn.Module):
    """What all losses share: the call.

    Parameters
    ----------
    reduction
        ``"mean"``, ``"per_count"``, ``"per_gene"``, ``"sum"`` or ``"none"``: what each divides by
        is said in `strank.functional.list_loss`.

    Examples
    --------
    >>> isinstance(ListSTRankLoss(), SectionLoss)
    True
    """

    function: ClassVar[Callable[..., Tensor]]
    #: Attributes that the function takes besides the shared arguments.
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(
        self,
        scores: Tensor,
        counts: Tensor,
        *,
        section: Tensor | ArrayLike,
        offset: Tensor | None = None,
        where: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of these scores; the function says what the arguments are.

        Parameters
        ----------
        scores, counts
            ``[n_spots, n_genes]``.
        section
            Section labels, ``[n_spots]``: integers in a tensor, or words.
        offset
            Log library size, ``[n_spots]``.
        where
            What takes part, broadcastable to ``scores``.
        weight
            Of each gene, ``[n_genes]``.
        """
        return type(self).function(
            scores,
            counts,
            section=section,
            offset=offset,
            where=where,
            weight=weight,
            reduction=self.reduction,
            **{name: getattr(self, name) for name in self.options},
            **self._drawing(scores.device),
        )

    def _drawing(self, device: torch.device) -> dict[str, Any]:
        return {}


class _Seeded(SectionLoss):
    """A loss that draws at random, from a stream of its own if it has a seed."""

    def __init__(self, reduction: Reduction = "mean", seed: int | None = None) -> None:
        super().__init__(reduction)
        self.seed = seed
        self._generator: torch.Generator | None = None

    def _drawing(self, device: torch.device) -> dict[str, Any]:
        if self.seed is not None and (
            self._generator is None or self._generator.device.type != device.type
        ):
            self._generator = torch.Generator(device).manual_seed(self.seed)
        return {"generator": self._generator}


class ListSTRankLoss(_Seeded):
    """Module of `strank.functional.list_loss`: one list a section.

    Parameters
    ----------
    list_size
        N_k: random lists of at most so many spots instead, anew at each call.
    reduction
        As in `SectionLoss`.
    seed
        Seed of the lists; ``None`` follows torch's default generator.
    distributed
        Whether a section's spots may lie on several processes, as under DDP: the loss is then that
        of whole sections, equal to one process's with all the spots.

    Examples
    --------
    A plain PyTorch loop around someone else's model:

    >>> model = torch.nn.Linear(3, 2)
    >>> optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    >>> features, section = torch.rand(8, 3), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    >>> counts = torch.poisson(torch.full((8, 2), 5.0))
    >>> library_size = torch.full((8,), 1000.0)
    >>> loss = ListSTRankLoss()
    >>> for _ in range(3):
    ...     optimiser.zero_grad()
    ...     value = loss(model(features), counts, section=section, offset=library_size.log())
    ...     value.backward()
    ...     optimiser.step()
    """

    function = staticmethod(list_loss)
    options = ("list_size", "distributed")

    def __init__(
        self,
        list_size: int | None = None,
        reduction: Reduction = "mean",
        seed: int | None = None,
        distributed: bool = False,
    ) -> None:
        super().__init__(reduction, seed)
        self.list_size = list_size
        self.distributed = distributed


class PairSTRankLoss(_Seeded):
    """Module of `strank.functional.pair_loss`: random partners within the section.

    Parameters
    ----------
    n_partners
        Partners drawn for every spot at each call; ``None`` for all pairs.
    reduction
        As in `SectionLoss`.
    seed
        Seed of the draw; ``None`` follows torch's default generator.

    Examples
    --------
    >>> loss = PairSTRankLoss(seed=0)
    >>> loss(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), section=torch.tensor([0, 0]))
    tensor(1.3863)
    """

    function = staticmethod(pair_loss)
    options: ClassVar[tuple[str, ...]] = ("n_partners",)

    def __init__(
        self,
        n_partners: int | None = 1,
        reduction: Reduction = "mean",
        seed: int | None = None,
    ) -> None:
        super().__init__(reduction, seed)
        self.n_partners = n_partners


class MarginRankingLoss(PairSTRankLoss):
    """Module of `strank.functional.margin_ranking_loss`: order only, counts do not weigh.

    Parameters
    ----------
    margin
        Score difference that a right order must reach; with 0, constant scores are an optimum.
    ties
        What equal rates ask for: ``"none"``, or ``"second"`` as published.
    n_partners, reduction, seed
        As in `PairSTRankLoss`.

    Examples
    --------
    >>> loss = MarginRankingLoss(seed=0)
    >>> loss(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), section=torch.tensor([0, 0]))
    tensor(1.)
    """

    function = staticmethod(margin_ranking_loss)
    options = ("n_partners", "margin", "ties")

    def __init__(
        self,
        margin: float = 1.0,
        ties: Ties = "none",
        n_partners: int | None = 1,
        reduction: Reduction = "mean",
        seed: int | None = None,
    ) -> None:
        super().__init__(n_partners, reduction, seed)
        self.margin = margin
        self.ties = ties


class PearsonLoss(SectionLoss):
    """Module of `strank.functional.pearson_loss`: minus the correlation in each section.

    Parameters
    ----------
    pooled
        Correlate over all sections at once, as published.
    reduction
        As in `SectionLoss`.

    Examples
    --------
    >>> loss = PearsonLoss()
    >>> loss(torch.tensor([[0.0], [1]]), torch.tensor([[1.0], [3]]), section=torch.tensor([0, 0]))
    tensor(-1.)
    """

    function = staticmethod(pearson_loss)
    options = ("pooled",)

    def __init__(self, pooled: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.pooled = pooled


class MSELoss(SectionLoss):
    """Module of `strank.functional.mse_loss`: squared error to log1p(CP10k).

    Parameters
    ----------
    reduction
        As in `SectionLoss`.

    Examples
    --------
    >>> MSELoss()(torch.ones(2, 1), torch.zeros(2, 1), section=torch.tensor([0, 0]))
    tensor(1.)
    """

    function = staticmethod(mse_loss)


class PoissonLoss(SectionLoss):
    """Module of `strank.functional.poisson_loss`.

    Parameters
    ----------
    free_level
        Whether every section and gene has a level of its own.
    reduction
        As in `SectionLoss`.

    Examples
    --------
    >>> PoissonLoss()(torch.zeros(2, 1), torch.zeros(2, 1), section=torch.tensor([0, 0]))
    tensor(1.)
    """

    function = staticmethod(poisson_loss)
    options: ClassVar[tuple[str, ...]] = ("free_level",)

    def __init__(self, free_level: bool = False, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        self.free_level = free_level


class NegativeBinomialLoss(PoissonLoss):
    """Module of `strank.functional.negative_binomial_loss`; learns the dispersions.

    Parameters
    ----------
    n_genes
        One dispersion a gene, 1 at first. Give `parameters()` to the optimiser too.
    free_level, reduction
        As in `PoissonLoss`.

    Examples
    --------
    >>> loss = NegativeBinomialLoss(1)
    >>> value = loss(torch.zeros(2, 1), torch.zeros(2, 1), section=torch.tensor([0, 0]))
    >>> value.backward()
    >>> value.detach(), loss.log_dispersion.grad
    (tensor(0.6931), tensor([-0.1931]))
    """

    function = staticmethod(negative_binomial_loss)
    options = ("free_level", "dispersion")

    def __init__(
        self, n_genes: int, free_level: bool = False, reduction: Reduction = "mean"
    ) -> None:
        super().__init__(free_level, reduction)
        self.log_dispersion = nn.Parameter(torch.zeros(n_genes))

    @property
    def dispersion(self) -> Tensor:
        """Of each gene, ``[n_genes]``."""
        return self.log_dispersion.exp()
