"""One cell of the study: data sets of one design, and every objective trained on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.preprocessing import SplineTransformer

from strank.functional.metrics import rank_correlation
from strank.linear.regressor import STRankRegressor
from strank.simulate.curves import (
    FUNCTIONS,
    CurveCounts,
    CurveDesign,
    curve,
    draw_curves,
    draw_tissue,
)
from strank.studies.synthetic.networks import CurveNetworks, Recipe, Spots, train
from strank.studies.synthetic.objectives import OBJECTIVES, Objective, list_of

__all__ = ["GRID", "Cell", "CellResult", "fit_spline", "run_cell"]

#: Positions at which fitted curves are kept for the figures.
GRID = np.linspace(0, 1, 400)

_N_HELD_OUT = 10_000
_KNOTS = 30
_PENALTY = 1.0


@dataclass(frozen=True)
class Cell:
    """What is varied, and what is trained there.

    Attributes
    ----------
    study
        ``"table1"``, ``"table3"`` or ``"sweep"``.
    design
        What the counts are like.
    objectives
        Names; ``list_8`` is ListSTRank on lists of 8.
    splines
        Which of them are fitted on the spline basis too.
    factor, value
        What a sweep varies, and its value here.
    corrected
        Whether the objectives are told the depth.
    n_seeds
        Data sets of each function, each with first weights of its own.
    recipe
        How the networks are trained.
    """

    study: str
    design: CurveDesign
    objectives: tuple[str, ...]
    splines: tuple[str, ...] = ()
    factor: str = ""
    value: float = float("nan")
    corrected: bool = True
    n_seeds: int = 3
    recipe: Recipe = field(default_factory=Recipe)

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


def run_cell(cell: Cell, *, seed: int) -> CellResult:
    """Draw the data sets of a cell, train every objective on all of them at once, score.

    Parameters
    ----------
    cell
        What to do.
    seed
        Cells of one seed share positions and windows, so that they can be compared in pairs.

    Returns
    -------
    CellResult
        SCC against the noise-free truth at 10,000 uniform positions; 0 for a constant prediction.
    """
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
    def draw(cls, cell: Cell, function: int, rng: np.random.Generator) -> _DataSet:
        train = draw_curves(function, design=cell.design, rng=rng)
        held_out = rng.uniform(0, 1, 2 * _N_HELD_OUT)
        validation = draw_tissue(function, held_out[:_N_HELD_OUT], design=cell.design, rng=rng)
        noisy = validation.counts / np.exp(validation.offset if cell.corrected else 0.0)
        if not cell.corrected:
            train = train._replace(offset=np.zeros_like(train.offset))
        return cls(train, held_out, noisy, curve(function, held_out))


def _train_networks(
    cell: Cell, sets: list[_DataSet], labels: pd.DataFrame, *, seed: int
) -> CellResult:
    losses = [_objective(name).loss(len(sets), seed) for name in cell.objectives]
    checkpoints = _Checkpoints(sets, cell.objectives)
    train(
        _spots(sets),
        losses,
        recipe=cell.recipe,
        generator=torch.Generator().manual_seed(seed),
        check=checkpoints.look,
    )
    return checkpoints.result(labels)


def _objective(name: str) -> Objective:
    return list_of(int(name.removeprefix("list_"))) if "list_" in name else OBJECTIVES[name]


def _spots(sets: list[_DataSet]) -> Spots:
    def tensor(name: str) -> torch.Tensor:
        values = np.stack([getattr(data.train, name).reshape(2, -1) for data in sets])
        return torch.as_tensor(values, dtype=torch.float32)

    return Spots(tensor("x"), tensor("counts"), tensor("offset"))


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

    Parameters
    ----------
    name
        ``"list"``, or an objective for which scikit-learn has an exact estimator.
    data
        Training spots; depth is used by ``"list"`` only.

    Returns
    -------
    Callable
        From positions to scores.

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
        objective = OBJECTIVES[name]
        if objective.exact is None:
            raise ValueError(f"no exact estimator for {name!r}")
        target = data.counts if objective.on_counts else np.log1p(data.counts)
        model = objective.exact().fit(features, target)
    return lambda x: model.predict(basis.transform(np.asarray(x)[:, None])).ravel()
