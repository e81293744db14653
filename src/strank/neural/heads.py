"""Heads: from features to scores; and a head together with its encoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

# Distances are in these units, so that a learned weight of them is about 1.
_UM = 100.0

# Features are standardised; further out than this is something that training has not seen.
_FAR = 8.0

# Patches of a section that is only scored.
_AT_ONCE = 256


class Traits(NamedTuple):
    """What a head is to be given, and what it is made of again; a user's module may say nothing."""

    #: Whether features are to come centred within their section: a shift of all of them, such as of
    #: the stain, cancels in a linear head, but not in others.
    centred: bool
    #: How many neighbours the head looks at besides the spot itself.
    n_neighbours: int
    #: Arguments beyond the first two.
    options: Mapping[str, Any]

    @classmethod
    def of(cls, head: nn.Module) -> Self:
        """Traits of any module; the rest is as for a head of a spot's own features."""
        return cls(
            bool(getattr(head, "centred", False)),
            int(getattr(head, "n_neighbours", 0)),
            getattr(head, "options", {}),
        )


class LinearHead(nn.Module):
    """Standardise features and map them linearly to scores: what is fitted exactly.

    Examples
    --------
    >>> LinearHead(3, 2)(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    centred = False
    n_neighbours = 0
    centre: Tensor
    scale: Tensor

    def __init__(self, n_features: int, n_genes: int) -> None:
        super().__init__()
        self.options: dict[str, Any] = {}
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.weight = nn.Parameter(torch.zeros(n_features, n_genes))

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``[n_spots, n_genes]`` of features ``[n_spots, n_features]``."""
        return (features - self.centre) / self.scale @ self.weight


class Head(nn.Module):
    """What the heads here share: standardised features and a readout."""

    #: How many neighbours the head looks at besides the spot itself.
    n_neighbours: int = 0

    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        n_features: int,
        n_genes: int,
        *,
        width: int,
        rank: int | None,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        # As they are stored with a model.
        self.options = dict(options)
        self.centred = bool(options["centred"])
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.level = nn.Parameter(torch.zeros(n_genes))
        last = nn.Linear(width if rank is None else rank, n_genes, bias=False)
        # Scores start near 0, where no spot differs from another; at 0 not all losses have a slope.
        last.weight.data.mul_(0.1)
        self.readout = last if rank is None else nn.Sequential(nn.Linear(width, rank), last)

    def standardised(self, features: Tensor) -> Tensor:
        """Features in units of their spread over the training spots."""
        return (features - self.centre) / self.scale

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores ``[n_spots, n_genes]`` of ``[n_spots, width]``."""
        scores: Tensor = self.readout(hidden)
        return scores + self.level


class LinearNetwork(Head):
    """The linear head as a network is trained, with a level; made as the other heads are.

    Examples
    --------
    >>> LinearNetwork(3, 2)(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, n_features: int, n_genes: int, *, rank: int | None = None, centred: bool = False
    ) -> None:
        options = {"rank": rank, "centred": centred}
        super().__init__(n_features, n_genes, width=n_features, rank=rank, options=options)

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``[n_spots, n_genes]`` of features ``[n_spots, n_features]``."""
        return self.scores(self.standardised(features))


class MLPHead(Head):
    """Layers of a fixed width over the features of a spot.

    Examples
    --------
    >>> MLPHead(3, 2)(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        n_features: int,
        n_genes: int,
        *,
        width: int = 128,
        depth: int = 1,
        dropout: float = 0.5,
        input_dropout: float = 0.2,
        rank: int | None = None,
        centred: bool = True,
    ) -> None:
        options: dict[str, Any] = {"width": width, "depth": depth, "dropout": dropout}
        options |= {"input_dropout": input_dropout, "rank": rank, "centred": centred}
        last = width if depth else n_features
        super().__init__(n_features, n_genes, width=last, rank=rank, options=options)
        self.layers = _layers(n_features, width, depth, dropout, input_dropout)

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``[n_spots, n_genes]`` of features ``[n_spots, n_features]``."""
        return self.scores(self.layers(self.standardised(features)))


class ContextHead(Head):
    """A spot attends to its neighbours; layers as in `MLPHead` over its features and their mean.

    A neighbour weighs by its distance, which is all that is seen of its place: turning or mirroring
    the section changes nothing.

    Examples
    --------
    Two spots that see each other:

    >>> head = ContextHead(3, 2, n_neighbours=1)
    >>> neighbours, distance = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.0, 200.0]] * 2)
    >>> head(torch.ones(2, 3), neighbours, distance).shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        n_features: int,
        n_genes: int,
        *,
        n_neighbours: int = 8,
        n_heads: int = 1,
        width: int = 128,
        depth: int = 1,
        dropout: float = 0.5,
        input_dropout: float = 0.2,
        rank: int | None = None,
        centred: bool = True,
    ) -> None:
        options: dict[str, Any] = {"n_neighbours": n_neighbours, "n_heads": n_heads}
        options |= {"width": width, "depth": depth, "dropout": dropout}
        options |= {"input_dropout": input_dropout, "rank": rank, "centred": centred}
        seen = (1 + n_heads) * n_features
        last = width if depth else seen
        super().__init__(n_features, n_genes, width=last, rank=rank, options=options)
        self.n_neighbours, self.n_heads = n_neighbours, n_heads
        self.nearness = nn.Parameter(torch.zeros(n_heads))
        self.layers = _layers(seen, width, depth, dropout, input_dropout)

    def forward(self, features: Tensor, neighbours: Tensor, distance: Tensor) -> Tensor:
        """Scores of spots among the rows that are looked at.

        ``neighbours`` are rows of features, ``[n_spots, 1 + n_neighbours]``, the spot itself first,
        -1 for none; ``distance`` in µm, same shape.
        """
        rows = self.standardised(features)
        own, around = neighbours[:, 0], neighbours[:, 1:]
        weights = self._weights(around, distance[:, 1:])
        means = torch.einsum("shk,skf->shf", weights, rows[around.clamp(min=0)])
        return self.scores(self.layers(torch.cat([rows[own], means.flatten(1)], 1)))

    def _weights(self, around: Tensor, distance: Tensor) -> Tensor:
        """Weights of the neighbours, ``[n_spots, n_heads, n_neighbours]``; 0 if there is none."""
        logits = -softplus(self.nearness)[:, None] * (distance / _UM)[:, None]
        absent = (around < 0)[:, None]
        logits = logits.masked_fill(absent, torch.finfo(logits.dtype).min)
        return logits.softmax(-1).masked_fill(absent, 0.0)


class MeanHead(nn.Module):
    """Mean of the scores of several heads, such as of those trained on different folds.

    Examples
    --------
    >>> members = [{"kind": "mlp", "options": {"width": 8}}] * 2
    >>> MeanHead(3, 2, members=members)(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, n_features: int, n_genes: int, *, members: Sequence[Mapping[str, Any]]
    ) -> None:
        super().__init__()
        self._take([HEADS[m["kind"]](n_features, n_genes, **m["options"]) for m in members])

    @classmethod
    def of(cls, heads: Sequence[nn.Module]) -> Self:
        """Take trained heads together."""
        mean = cls.__new__(cls)
        nn.Module.__init__(mean)
        mean._take(heads)
        return mean

    def _take(self, heads: Sequence[nn.Module]) -> None:
        self.heads = nn.ModuleList(heads)
        self.n_neighbours = max(Traits.of(head).n_neighbours for head in heads)
        self.centred = any(Traits.of(head).centred for head in heads)
        self.options = {"members": [stored_head(head) for head in heads]}

    def forward(self, features: Tensor, *around: Tensor) -> Tensor:
        """Mean scores; the arguments are those of the heads."""
        return torch.stack([self._scores(head, features, *around) for head in self.heads]).mean(0)

    def _scores(self, head: nn.Module, features: Tensor, *around: Tensor) -> Tensor:
        if around and not Traits.of(head).n_neighbours:
            return head(features)[around[0][:, 0]]
        return head(features, *around)


#: Kinds of heads. One is made as ``head(n_features, n_genes, **options)``, and has those `Traits`
#: that it needs as attributes; add your own class to save models with it.
HEADS: dict[str, Callable[..., nn.Module]] = {
    "linear": LinearHead,
    "linear-network": LinearNetwork,
    "mlp": MLPHead,
    "context": ContextHead,
    "mean": MeanHead,
}


def stored_head(head: nn.Module) -> dict[str, Any]:
    """Return what a head is made of again: kind (``None`` if it is not known) and options."""
    kind = next((kind for kind, make in HEADS.items() if type(head) is make), None)
    return {"kind": kind, "options": Traits.of(head).options}


def _layers(
    n_features: int, width: int, depth: int, dropout: float, input_dropout: float
) -> nn.Module:
    """Hidden layers, or nothing; what is far out in the features is brought nearer before."""
    if depth == 0:
        return nn.Identity()
    layers: list[nn.Module] = [nn.Hardtanh(-_FAR, _FAR), nn.Dropout(input_dropout)]
    for n_in in [n_features] + [width] * (depth - 1):
        layers += [nn.Linear(n_in, width), nn.LayerNorm(width), nn.GELU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class Network(nn.Module):
    """From features or patches to scores.

    With ``micro_batch``, patches go through the image network in parts, and a part's activations
    are computed again when its gradient is taken. The loss still sees all the scores of a batch
    at once, so loss and gradient are those of the whole batch, for any objective, in the memory of
    a part and at the price of a second forward pass.

    Examples
    --------
    >>> Network(nn.Linear(3, 2))(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, head: nn.Module, backbone: nn.Module | None = None, micro_batch: int | None = None
    ) -> None:
        super().__init__()
        self.head, self.backbone, self.micro_batch = head, backbone, micro_batch

    def forward(self, inputs: Tensor, *around: Tensor) -> Tensor:
        """Scores ``[n_spots, n_genes]``; the arguments are those of `strank.neural.data`."""
        scores: Tensor = self.head(self.features(inputs), *around)
        return scores

    def features(self, inputs: Tensor) -> Tensor:
        """Features of patches, or of what are features already."""
        if self.backbone is None:
            return inputs
        learns = torch.is_grad_enabled()
        parts = inputs.split(self.micro_batch or (max(1, len(inputs)) if learns else _AT_ONCE))
        if len(parts) == 1 or not learns:
            return torch.cat([self.backbone(part) for part in parts])
        return torch.cat([checkpoint(self.backbone, part, use_reentrant=False) for part in parts])
