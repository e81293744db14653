"""Heads that are trained by gradient steps: features to scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["HEADS", "ContextHead", "Head", "MLPHead", "MeanHead", "kind_of"]

_UM = 100.0
_DISTANCE_WIDTH = 16


class Head(nn.Module):
    """What the heads here share: standardised features and a readout.

    Parameters
    ----------
    n_features, n_genes
        Width of the input and of the output.
    width
        Of what the readout gets.
    rank
        Of the readout, for many genes; full if ``None``.
    options
        Arguments beyond the first two, as they are stored with a model. ``centred`` says that
        features are to come centred within their section: a shift of all of them, such as of the
        stain, cancels in a linear head, but not in these.
    """

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
        self.options = dict(options)
        self.centred = bool(options["centred"])
        self.register_buffer("centre", torch.zeros(n_features))
        self.register_buffer("scale", torch.ones(n_features))
        self.level = nn.Parameter(torch.zeros(n_genes))
        last = nn.Linear(width if rank is None else rank, n_genes, bias=False)
        self.readout = last if rank is None else nn.Sequential(nn.Linear(width, rank), last)

    def standardised(self, features: Tensor) -> Tensor:
        """Features in units of their spread over the training spots."""
        return (features - self.centre) / self.scale

    def scores(self, hidden: Tensor) -> Tensor:
        """Scores ``[n_spots, n_genes]`` of ``[n_spots, width]``."""
        scores: Tensor = self.readout(hidden)
        return scores + self.level


class MLPHead(Head):
    """Layers of a fixed width over the features of a spot; linear if there is none.

    Parameters
    ----------
    n_features, n_genes
        Width of the input and of the output.
    width, depth
        Of the hidden layers, and how many.
    dropout
        Share of the hidden units that are left out at a training step.
    norm
        Whether hidden layers are normalised (LayerNorm).
    rank, centred
        As in `Head`.

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
        depth: int = 2,
        dropout: float = 0.2,
        norm: bool = True,
        rank: int | None = None,
        centred: bool = True,
    ) -> None:
        options: dict[str, Any] = {"width": width, "depth": depth, "dropout": dropout}
        options |= {"norm": norm, "rank": rank, "centred": centred}
        last = width if depth else n_features
        super().__init__(n_features, n_genes, width=last, rank=rank, options=options)
        widths = [n_features] + [width] * depth
        self.layers = nn.Sequential(*(_layer(a, b, dropout, norm) for a, b in pairwise(widths)))

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``[n_spots, n_genes]`` of features ``[n_spots, n_features]``."""
        return self.scores(self.layers(self.standardised(features)))


class ContextHead(Head):
    """A spot attends to its neighbours in the section, then a layer as in `MLPHead`.

    What the head sees of a neighbour's place is its distance, so turning or mirroring the section
    changes nothing.

    Parameters
    ----------
    n_features, n_genes
        Width of the input and of the output.
    n_neighbours
        How many of the nearest spots, besides the spot itself.
    width, n_heads
        Of the attention.
    dropout, rank, centred
        As in `MLPHead`.

    Examples
    --------
    Two spots that see each other:

    >>> head = ContextHead(3, 2, n_neighbours=1, width=8, n_heads=2)
    >>> neighbours, distance = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.0, 200.0]] * 2)
    >>> head(torch.ones(2, 3), neighbours, distance).shape
    torch.Size([2, 2])
    """

    def __init__(
        self,
        n_features: int,
        n_genes: int,
        *,
        n_neighbours: int = 18,
        width: int = 64,
        n_heads: int = 4,
        dropout: float = 0.2,
        rank: int | None = None,
        centred: bool = True,
    ) -> None:
        options: dict[str, Any] = {"n_neighbours": n_neighbours, "width": width, "n_heads": n_heads}
        options |= {"dropout": dropout, "rank": rank, "centred": centred}
        super().__init__(n_features, n_genes, width=width, rank=rank, options=options)
        self.n_neighbours, self.n_heads = n_neighbours, n_heads
        self.embed = _layer(n_features, width, dropout, norm=True)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.nearness = nn.Sequential(
            nn.Linear(1, _DISTANCE_WIDTH), nn.GELU(), nn.Linear(_DISTANCE_WIDTH, n_heads)
        )
        self.attended = nn.Linear(width, width)
        self.layer = nn.Sequential(nn.LayerNorm(width), _layer(width, width, dropout, norm=False))

    def forward(self, features: Tensor, neighbours: Tensor, distance: Tensor) -> Tensor:
        """Scores of spots among their neighbours.

        Parameters
        ----------
        features
            Of all spots that are looked at, ``[n_rows, n_features]``.
        neighbours
            Rows of each spot's neighbours, the spot itself first, -1 for none,
            ``[n_spots, 1 + n_neighbours]``.
        distance
            In µm, same shape.
        """
        tokens = self.embed(self.standardised(features))
        spots = tokens[neighbours[:, 0]]
        spots = spots + self.attended(self._attend(spots, tokens, neighbours, distance))
        return self.scores(spots + self.layer(spots))

    def _attend(
        self, spots: Tensor, tokens: Tensor, neighbours: Tensor, distance: Tensor
    ) -> Tensor:
        """Mean over neighbours ``[n_spots, width]``, weighted by likeness and nearness."""
        n_spots = len(neighbours)
        per_head = n_spots, -1, self.n_heads, spots.shape[1] // self.n_heads
        query = self.query(spots).view(per_head)
        key, value = self.key_value(tokens)[neighbours.clamp(min=0)].chunk(2, dim=-1)
        bias = self.nearness(distance[..., None].to(spots.dtype) / _UM)
        bias = bias.masked_fill((neighbours < 0)[..., None], -torch.inf)
        mean = scaled_dot_product_attention(
            query.transpose(1, 2),
            key.reshape(per_head).transpose(1, 2),
            value.reshape(per_head).transpose(1, 2),
            attn_mask=bias.permute(0, 2, 1)[:, :, None],
        )
        return mean.reshape(n_spots, -1)


class MeanHead(nn.Module):
    """Mean of the scores of several heads of one kind, such as of those trained on different folds.

    Parameters
    ----------
    n_features, n_genes
        Width of the input and of the output.
    kind
        One of `HEADS`.
    n_heads
        How many.
    member
        Their options.

    Examples
    --------
    >>> MeanHead(3, 2, kind="mlp", n_heads=4, member={"width": 8})(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    def __init__(
        self, n_features: int, n_genes: int, *, kind: str, n_heads: int, member: Mapping[str, Any]
    ) -> None:
        super().__init__()
        make = HEADS[kind]
        self._take([make(n_features, n_genes, **member) for _ in range(n_heads)])

    @classmethod
    def of(cls, heads: Sequence[nn.Module]) -> Self:
        """Take trained heads together, which are of one class with the same options."""
        mean = cls.__new__(cls)
        nn.Module.__init__(mean)
        mean._take(heads)
        return mean

    def _take(self, heads: Sequence[nn.Module]) -> None:
        first = heads[0]
        self.heads = nn.ModuleList(heads)
        self.n_neighbours = int(getattr(first, "n_neighbours", 0))
        self.centred = bool(getattr(first, "centred", False))
        self.options = {
            "kind": kind_of(first, HEADS),
            "n_heads": len(heads),
            "member": getattr(first, "options", {}),
        }

    def forward(self, features: Tensor, *around: Tensor) -> Tensor:
        """Mean scores; the arguments are those of the heads."""
        return torch.stack([head(features, *around) for head in self.heads]).mean(0)


#: Heads by name. One is made as ``head(n_features, n_genes, **options)``, and has those ``options``
#: as an attribute, if there are any; add your own class to save models with it.
HEADS: dict[str, Callable[..., nn.Module]] = {"mlp": MLPHead, "context": ContextHead}


def kind_of(head: nn.Module, known: Mapping[str, Callable[..., nn.Module]]) -> str | None:
    """Name of a head among those known, if it is."""
    return next((kind for kind, make in known.items() if type(head) is make), None)


def _layer(n_in: int, n_out: int, dropout: float, norm: bool) -> nn.Module:
    parts = [nn.Linear(n_in, n_out), *([nn.LayerNorm(n_out)] if norm else []), nn.GELU()]
    return nn.Sequential(*parts, nn.Dropout(dropout))
