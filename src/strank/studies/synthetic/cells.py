"""Many small networks trained at once: one batched product does the work of all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import SplineTransformer
from torch import Tensor, nn

from strank.errors import no_such
from strank.linear.regressor import STRankRegressor
from strank.losses import MSELoss, PearsonLoss, SectionLoss
from strank.metrics.correlation import rank_correlation
from strank.simulate.curves import (
    FUNCTIONS,
    CurveCounts,
    CurveDesign,
    curve,
    draw_curves,
    draw_tissue,
)
from strank.studies.synthetic.objectives import EXACT, make_loss

_WIDTH = 128
# Where weights of the first layer start: bends of several per period of the fastest curve.
_SLOPE = 4.0

#: Positions at which fitted curves are kept for the figures.
GRID = np.linspace(0, 1, 400)

_N_HELD_OUT = 10_000
_KNOTS = 30
_PENALTY = 1.0


class CurveNetworks(nn.Module):
    """Independent networks 1-128-128-1 with ReLU, from position to score.

    Positions in [0, 1] are standardised, and the bends of the first layer start spread evenly over
    them: with torch's default start three in four lie outside, and fast curves are learned slowly.

    Examples
    --------
    >>> CurveNetworks(3, torch.Generator().manual_seed(0))(torch.rand(3, 5)).shape
    torch.Size([3, 5])
    """

    def __init__(self, n_networks: int, generator: torch.Generator) -> None:
        super().__init__()

        def uniform(*shape: int, limit: float) -> Tensor:
            return limit * (2 * torch.rand(n_networks, *shape, generator=generator) - 1)

        slope = _SLOPE * torch.randn(n_networks, 1, _WIDTH, generator=generator)
        limit = _WIDTH**-0.5
        self.weights = nn.ParameterList(
            [
                slope,
                uniform(_WIDTH, _WIDTH, limit=limit),
                uniform(_WIDTH, 1, limit=limit),
            ]
        )
        self.biases = nn.ParameterList(
            [
                -slope * uniform(1, _WIDTH, limit=3**0.5),
                uniform(1, _WIDTH, limit=limit),
                uniform(1, 1, limit=limit),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``[n_networks, n_spots]`` of positions of the same shape."""
        hidden = ((x - 0.5) * 12**0.5)[..., None]
        hidden = torch.addcmul(self.biases[0], hidden, self.weights[0]).relu()
        hidden = torch.baddbmm(self.biases[1], hidden, self.weights[1]).relu()
        return torch.baddbmm(self.biases[2], hidden, self.weights[2]).squeeze(-1)


@dataclass(frozen=True)
class CurveSpots:
    """CurveSpots of many data sets, each with two tissues of as many spots."""

    x: Tensor  # Position, counts and log depth, [n_sets, 2, n_spots]
    counts: Tensor
    offset: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw half a batch from each tissue, the same rows of every set: ``[n_sets, size]``."""
        rows = torch.randint(self.x.shape[2], (2, size // 2), generator=generator)
        x, counts, offset = (
            torch.cat([values[:, t].index_select(1, rows[t]) for t in (0, 1)], 1)
            for values in (self.x, self.counts, self.offset)
        )
        return x, counts, offset


@dataclass(frozen=True)
class CurveRecipe:
    """How networks are trained: AdamW with one cycle of the learning rate."""

    steps: int = 2000  # Batches
    batch: int = 256  # CurveSpots a batch, half of them from each tissue
    learning_rate: float = 2e-3  # The largest
    checks: int = 5  # How often, evenly spaced, a checkpoint is looked at


def train_curves(
    spots: CurveSpots,
    losses: Sequence[SectionLoss],
    *,
    recipe: CurveRecipe,
    generator: torch.Generator,
    check: Callable[[CurveNetworks], None],
) -> None:
    """Train a network for every loss and data set, all at once."""
    n_sets = len(spots.x)
    networks = CurveNetworks(len(losses) * n_sets, generator)
    parameters = [*networks.parameters(), *(p for loss in losses for p in loss.parameters())]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1
    )
    section = torch.arange(2).repeat_interleave(recipe.batch // 2)
    due = {round(recipe.steps * (k + 1) / recipe.checks) for k in range(recipe.checks)}
    for step in range(1, recipe.steps + 1):
        x, counts, offset = spots.batch(recipe.batch, generator)
        scores = networks(x.repeat(len(losses), 1)).split(n_sets)
        total = sum(
            loss(of_loss.T, counts.T, section=section, offset=_depth(loss, offset).T)
            for loss, of_loss in zip(losses, scores, strict=True)
        )
        optimiser.zero_grad()
        torch.as_tensor(total).backward()
        optimiser.step()
        schedule.step()
        if step in due:
            with torch.no_grad():
                check(networks)


def _depth(loss: SectionLoss, offset: Tensor) -> Tensor:
    """Log library size: an average spot has 10,000 counts, which is one to a likelihood."""
    return offset + math.log(1e4) if isinstance(loss, (MSELoss, PearsonLoss)) else offset


@dataclass(frozen=True)
class CurveCell:
    """What is varied, and what is trained there."""

    study: str  # "table1", "table3" or "sweep"
    design: CurveDesign  # What the counts are like
    objectives: tuple[str, ...]  # Names; list_8 is ListSTRank on lists of 8
    splines: tuple[str, ...] = ()  # Which of them are fitted on the spline basis too
    factor: str = ""  # What a sweep varies, and its value here
    value: float = float("nan")
    corrected: bool = True  # Whether the objectives are told the depth
    n_seeds: int = 3  # Data sets of each function, each with first weights of its own
    recipe: CurveRecipe = field(default_factory=CurveRecipe)  # How the networks are trained

    @property
    def name(self) -> str:
        """Name of its files."""
        parts = [self.study, self.design.sampling]
        if self.factor:
            parts += [self.factor, f"{self.value:g}"]
        return "-".join(parts if self.corrected else [*parts, "uncorrected"])

    @property
    def work(self) -> int:
        """Thousand steps of single networks."""
        networks = len(self.objectives) * len(FUNCTIONS) * self.n_seeds
        return self.recipe.steps * networks // 1000


class CellResult(NamedTuple):
    """SCC of every fit, one a row, and the fitted curves of the first seed on `GRID`."""

    scores: pd.DataFrame
    curves: pd.DataFrame


def run_curve_cell(cell: CurveCell, *, seed: int) -> CellResult:
    """Draw the data sets of a cell, train every objective on all of them at once, score."""
    sets = [(k, f) for k in range(cell.n_seeds) for f in range(len(FUNCTIONS))]
    drawn = [_DataSet.draw(cell, f, np.random.default_rng([seed, k, f])) for k, f in sets]
    labels = pd.DataFrame(sets, columns=["seed", "function"])
    tables = [_train_networks(cell, drawn, labels, seed=seed)]
    tables += [_fit_splines(name, drawn, labels) for name in cell.splines]
    scores = pd.concat([table.scores for table in tables], ignore_index=True)
    about = {
        "study": cell.study,
        "sampling": cell.design.sampling,
        "factor": cell.factor,
        "value": cell.value,
        "corrected": cell.corrected,
    }
    for place, (name, value) in enumerate(about.items()):
        scores.insert(place, name, value)
    return CellResult(scores, pd.concat([table.curves for table in tables], ignore_index=True))


class _DataSet(NamedTuple):
    """Training spots of a function, and positions held out.

    `noisy` are counts of the first tissue, seen evenly, at the first half of them; `truth` is the
    curve at all.
    """

    train: CurveCounts
    held_out: NDArray[np.float64]
    noisy: NDArray[np.float64]
    truth: NDArray[np.float64]

    @classmethod
    def draw(cls, cell: CurveCell, function: int, rng: np.random.Generator) -> _DataSet:
        train = draw_curves(function, design=cell.design, rng=rng)
        held_out = rng.uniform(0, 1, 2 * _N_HELD_OUT)
        validation = draw_tissue(function, held_out[:_N_HELD_OUT], design=cell.design, rng=rng)
        noisy = validation.counts / np.exp(validation.offset if cell.corrected else 0.0)
        if not cell.corrected:
            train = train._replace(offset=np.zeros_like(train.offset))
        return cls(train, held_out, noisy, curve(function, held_out))


def _train_networks(
    cell: CurveCell, sets: list[_DataSet], labels: pd.DataFrame, *, seed: int
) -> CellResult:
    losses = [make_loss(name, len(sets), seed) for name in cell.objectives]
    checkpoints = _Checkpoints(sets, cell.objectives)
    train_curves(
        _spots(sets),
        losses,
        recipe=cell.recipe,
        generator=torch.Generator().manual_seed(seed),
        check=checkpoints.look,
    )
    return checkpoints.result(labels)


def _spots(sets: list[_DataSet]) -> CurveSpots:
    def tensor(name: str) -> torch.Tensor:
        values = np.stack([getattr(data.train, name).reshape(2, -1) for data in sets])
        return torch.as_tensor(values, dtype=torch.float32)

    return CurveSpots(tensor("x"), tensor("counts"), tensor("offset"))


class _Checkpoints:
    """The best checkpoint of every network: by noisy counts held out, and by the truth there."""

    def __init__(self, sets: list[_DataSet], objectives: tuple[str, ...]) -> None:
        self.objectives = objectives
        self.positions = torch.as_tensor(
            np.stack([np.append(data.held_out, GRID) for data in sets]), dtype=torch.float32
        ).repeat(len(objectives), 1)
        truth = np.stack([data.truth for data in sets], 1)
        self.test_truth = np.tile(truth[_N_HELD_OUT:], len(objectives))
        self.targets = {
            "counts": np.tile(np.stack([data.noisy for data in sets], 1), len(objectives)),
            "truth": np.tile(truth[:_N_HELD_OUT], len(objectives)),
        }
        n_networks = len(self.positions)
        self.best = {by: np.full(n_networks, -np.inf) for by in self.targets}
        self.test = {by: np.zeros(n_networks) for by in self.targets}
        self.curves = np.zeros((n_networks, len(GRID)))

    def look(self, networks: CurveNetworks) -> None:
        """Score the networks as they are now, and keep those better than before."""
        parts = [networks(part) for part in self.positions.split(512, dim=1)]
        scores = torch.cat(parts, 1).numpy().astype(np.float64)
        self._refuse_non_finite(scores)
        validation, test = scores[:, :_N_HELD_OUT].T, scores[:, _N_HELD_OUT : 2 * _N_HELD_OUT].T
        scc = _scc(test, self.test_truth)
        for by, target in self.targets.items():
            now = _scc(validation, target)
            better = now > self.best[by]
            self.best[by][better] = now[better]
            self.test[by][better] = scc[better]
            if by == "counts":
                self.curves[better] = scores[better, 2 * _N_HELD_OUT :]

    def _refuse_non_finite(self, scores: NDArray[np.float64]) -> None:
        finite = np.isfinite(scores).all(1).reshape(len(self.objectives), -1).all(1)
        if not finite.all():
            names = ", ".join(np.array(self.objectives)[~finite])
            raise FloatingPointError(f"training diverged for {names}")

    def result(self, labels: pd.DataFrame) -> CellResult:
        """Give the scores and curves, labelled by seed and function."""
        table = pd.concat([labels.assign(objective=name) for name in self.objectives])
        table = table.reset_index(drop=True)
        scores = pd.concat(
            [table.assign(head="mlp", selection=by, scc=test) for by, test in self.test.items()]
        )
        curves = [
            _curve_table(table.loc[row], "mlp", self.curves[row])
            for row in np.flatnonzero(table["seed"] == 0)
        ]
        return CellResult(scores, pd.concat(curves))


def _curve_table(label: pd.Series, head: str, scores: NDArray[np.float64]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "objective": label["objective"],
            "head": head,
            "function": label["function"],
            "x": GRID,
            "score": scores,
        }
    )


def _scc(scores: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.nan_to_num(rank_correlation(scores, target))


def _fit_splines(name: str, sets: list[_DataSet], labels: pd.DataFrame) -> CellResult:
    rows, curves = [], []
    for (_, label), data in zip(labels.iterrows(), sets, strict=True):
        start = time.perf_counter()
        predict = fit_spline(name, data.train)
        label = label.to_dict() | {"objective": name}
        seconds = time.perf_counter() - start
        test = slice(_N_HELD_OUT, None)
        scc = _scc(predict(data.held_out[test])[:, None], data.truth[test, None])
        fit = {"head": "spline", "selection": "none", "scc": scc[0], "seconds": seconds}
        rows.append(label | fit)
        if label["seed"] == 0:
            curves.append(_curve_table(pd.Series(label), "spline", predict(GRID)))
    return CellResult(pd.DataFrame(rows), pd.concat(curves) if curves else pd.DataFrame())


def fit_spline(
    name: str, data: CurveCounts
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Compute the optimum of an objective for a linear head on cubic B-splines of position.

    Examples
    --------
    >>> design = CurveDesign(n_spots=2000)
    >>> data = draw_curves(0, design=design, rng=np.random.default_rng(0))
    >>> fit_spline("list", data)(np.array([0.1, 0.9])).shape
    (2,)
    """
    basis = SplineTransformer(n_knots=_KNOTS, include_bias=False).fit([[0.0], [1.0]])
    features = basis.transform(data.x[:, None])
    if name == "list":
        model = STRankRegressor(penalty=_PENALTY)
        model.fit(features, data.counts[:, None], section=data.tissue, offset=data.offset)
    else:
        if name not in EXACT:
            raise no_such("exact estimator", name, ("list", *EXACT))
        target = data.counts if EXACT[name].on_counts else np.log1p(data.counts)
        model = EXACT[name].make().fit(features, target)
    return lambda x: model.predict(basis.transform(np.asarray(x)[:, None])).ravel()
