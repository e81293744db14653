"""What races in solver.py: the same genes, features and sections through different programs.

A side takes a `Task` and returns the weights of its features, one column a gene, and what there is
to tell. `measure` runs it in a fresh process and reports the least seconds and the most memory.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import re
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from anndata import AnnData
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import logsumexp, xlogy
from threadpoolctl import threadpool_limits

from strank.cohort.training_set import training_data
from strank.functional.groups import centre_within
from strank.functional.listwise import list_loss
from strank.linear.regressor import STRankRegressor
from strank.linear.regressor_cv import STRankRegressorCV
from strank.metrics.correlation import log1p_cp10k, spearman

# Indicator columns of sections, so large that the penalty of scikit-learn does not reach them:
# with 1e3 coefficients are right to 2e-6, with 1e4 to 2e-8.
INDICATOR = 1e4


@dataclass(frozen=True)
class Task:
    """Spots to fit on, or to score: features standardised, sections as codes in ascending order."""

    features: Any
    counts: sparse.csr_matrix
    section: NDArray[np.int64]
    library_size: NDArray[np.float64]
    penalty: float

    def genes(self, index: NDArray | slice) -> Task:
        return replace(self, counts=self.counts[:, index])

    def with_features(self, features: NDArray) -> Task:
        return replace(self, features=features)

    @property
    def double(self) -> Task:
        return self.with_features(np.asarray(self.features, dtype=np.float64))


class Result(NamedTuple):
    seconds: float
    gib: float
    weights: NDArray
    facts: dict[str, Any]


Side = Callable[..., tuple[NDArray, dict[str, Any]]]


def tasks(
    train: Mapping[str, AnnData], test: Mapping[str, AnnData], panel: Any, penalty: float
) -> list[Task]:
    """Both in the units that the solver gives the features of the training sections."""
    data = [training_data(part, panel, "morphology") for part in (train, test)]
    codes = [np.unique(part.section, return_inverse=True)[1] for part in data]
    centre = data[0].features.mean(0, dtype=np.float64)
    scale = centre_within(data[0].features, codes[0]).std(0)
    scale[scale <= 1e-9 * np.abs(data[0].features).max(0)] = 1
    return [
        Task(
            ((part.features - centre) / scale).astype(np.float32),
            part.counts.astype(np.float64),
            code,
            part.library_size.astype(np.float64),
            penalty,
        )
        for part, code in zip(data, codes, strict=True)
    ]


def exact(task: Task, **options: Any) -> tuple[NDArray, dict]:
    return _fit(STRankRegressor(task.penalty, **options), task)


def exact_cv(task: Task, **options: Any) -> tuple[NDArray, dict]:
    return _fit(STRankRegressorCV(**options), task)


def _fit(model: STRankRegressor, task: Task) -> tuple[NDArray, dict]:
    offset = np.log(task.library_size)
    model.fit(task.features, task.counts, section=task.section, offset=offset)
    facts = {
        "evaluations": float(model.solution_.iterations.mean()),
        "not converged": int((~model.converged_).sum()),
    }
    return model.coef_.T, facts


def published(
    task: Task, *, epochs: int = 1000, patience: int = 30, seed: int = 0
) -> tuple[NDArray, dict]:
    """Minibatches of 256 spots of any section, AdamW at 5e-5 with its default weight decay.

    Stops by the list loss of a tenth of the spots, drawn at random and not trained on.
    """
    torch.manual_seed(seed)
    features, counts, section, offset = _tensors(task)
    spots = torch.randperm(len(features))
    held_out, kept = spots[: len(spots) // 10], spots[len(spots) // 10 :]
    model = torch.nn.Linear(features.shape[1], counts.shape[1])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-5)
    best, since, weights, run = math.inf, 0, model.weight.detach().clone(), 0

    def loss(rows: torch.Tensor) -> torch.Tensor:
        scores = model(features[rows])
        return list_loss(scores, counts[rows], section=section[rows], offset=offset[rows])

    while run < epochs and since <= patience:
        for rows in kept[torch.randperm(len(kept))].split(256):
            optimiser.zero_grad()
            loss(rows).backward()
            optimiser.step()
        with torch.no_grad():
            value = float(loss(held_out))
        run, since = run + 1, since + 1
        if value < best:
            best, since, weights = value, 0, model.weight.detach().clone()
    return weights.T.double().numpy(), {"epochs": run}


def first_order(task: Task, *, epochs: int = 1000, rate: float = 1e-2) -> tuple[NDArray, dict]:
    """Adam at its best: our objective, all spots at once, rates tuned for it and falling to 0."""
    features, counts, section, offset = _tensors(task)
    weights = torch.zeros(features.shape[1], counts.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([weights], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    for _ in range(epochs):
        optimiser.zero_grad()
        loss = list_loss(
            features @ weights, counts, section=section, offset=offset, reduction="sum"
        )
        (loss + 0.5 * task.penalty * weights.square().sum()).backward()
        optimiser.step()
        schedule.step()
    return weights.detach().double().numpy(), {"epochs": epochs}


def _tensors(task: Task) -> tuple[torch.Tensor, ...]:
    counts = torch.as_tensor(task.counts.toarray()).float()
    features, section = torch.as_tensor(task.features).float(), torch.as_tensor(task.section)
    return features, counts, section, torch.as_tensor(task.library_size).log().float()


def poisson(task: Task, *, solver: str, tol: float) -> tuple[NDArray, dict]:
    """One gene at a time, c / l weighted by l, a column a section."""
    from sklearn.linear_model import PoissonRegressor

    size = INDICATOR if task.penalty else 1.0
    sections = size * (task.section[:, None] == np.unique(task.section))
    design = np.hstack([task.features, sections])
    model = PoissonRegressor(
        alpha=task.penalty / task.library_size.sum(),
        solver=solver,
        tol=tol,
        max_iter=10_000,
        fit_intercept=False,
    )
    weights, rounds = [], []
    with warnings.catch_warnings():
        # L-BFGS says so when it cannot get any nearer.
        warnings.simplefilter("ignore")
        for counts in task.counts.toarray().T:
            model.fit(design, counts / task.library_size, sample_weight=task.library_size)
            weights.append(model.coef_[: task.features.shape[1]].copy())
            rounds.append(model.n_iter_)
    return np.array(weights).T, {"iterations": float(np.mean(rounds))}


def conditional(task: Task) -> tuple[NDArray, dict]:
    """One gene at a time, without the Hessian; there is no tolerance to set."""
    from statsmodels.discrete.conditional_models import ConditionalPoisson

    offset, weights = np.log(task.library_size), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for counts in task.counts.toarray().T:
            model = ConditionalPoisson(counts, task.features, groups=task.section, offset=offset)
            found = model.fit(method="bfgs", maxiter=1000, skip_hessian=True)
            weights.append(found.params)
    return np.array(weights).T, {}


def ridge(task: Task, *, alpha: float) -> tuple[NDArray, dict]:
    """All genes at once on log1p(CP10k): another objective."""
    from sklearn.linear_model import Ridge

    target = log1p_cp10k(task.counts, task.library_size).toarray()
    model = Ridge(alpha).fit(task.features, target)
    return model.coef_.T, {}


def losses(task: Task, weights: NDArray) -> NDArray[np.float64]:
    """List loss of each gene in nats, as written in the paper and not as the solver has it."""
    scores, total = task.features.astype(np.float64) @ weights, np.zeros(weights.shape[1])
    for label in np.unique(task.section):
        rows = task.section == label
        counts, depth = task.counts[rows].toarray(), np.log(task.library_size[rows])[:, None]
        log_share = scores[rows] + depth - logsumexp(scores[rows] + depth, axis=0)
        total -= (counts * log_share).sum(0)
    return total


def explained(task: Task, weights: NDArray) -> float:
    """Share of the list deviance, mean over genes."""
    least = np.zeros(weights.shape[1])
    for label in np.unique(task.section):
        counts = task.counts[task.section == label].toarray()
        least -= xlogy(counts, counts / np.maximum(counts.sum(0), 1)).sum(0)
    none, some = losses(task, np.zeros_like(weights)), losses(task, weights)
    told = none - least > 1e-9
    return float(np.mean(1 - (some - least)[told] / (none - least)[told]))


def judge(train: Task, test: Task, weights: NDArray, optimum: NDArray) -> dict[str, float]:
    """How far from the optimum, and what it is worth on the section that was left out."""
    none = np.zeros_like(optimum)
    value, best, start = (
        losses(train, w) + 0.5 * train.penalty * np.square(w).sum(0)
        for w in (weights, optimum, none)
    )
    counts = {"section": test.section, "library_size": test.library_size}
    scores = test.features.astype(np.float64) @ weights
    return {
        "nats": float((value - best).mean()),
        "relative": float((value - best).sum() / np.abs(best).sum()),
        "missed": float(((value - best) / (start - best)).max()),
        "weights": float(np.abs(weights - optimum).max()),
        "list nats": float((losses(train, weights) - losses(train, optimum)).mean()),
        "explained": explained(train, weights),
        "held-out": explained(test, weights),
        "scc": float(np.nanmean(spearman(scores, test.counts, **counts))),
    }


def measure(
    side: Side,
    task: Any,
    *,
    repeats: int = 1,
    threads: int = 1,
    fresh: bool = True,
    **options: Any,
) -> Result:
    """Least seconds, and most memory beyond the task, in a process of its own if ``fresh``.

    ``task`` may be a function that makes it there.
    """
    if not fresh:
        return _measured(side, task, repeats, threads, options)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measured, side, task, repeats, threads, options).result()


def _measured(side: Side, task: Any, repeats: int, threads: int, options: dict) -> Result:
    with threadpool_limits(threads):
        # What is loaded on first use is no memory of the side.
        side(_small(), **options)
        task = task() if callable(task) else task
        # What was freed goes back to the system, and the peak it remembers falls to what is held.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before, seconds = resident("VmRSS"), math.inf
        for _ in range(repeats):
            start = time.perf_counter()
            weights, facts = side(task, **options)
            seconds = min(seconds, time.perf_counter() - start)
        return Result(seconds, (resident("VmHWM") - before) / 2**30, weights, facts)


def _small() -> Task:
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(rng.poisson(5.0, (60, 2)).astype(np.float64))
    return Task(rng.normal(size=(60, 3)), counts, np.repeat([0, 1, 2], 20), np.full(60, 1e3), 10.0)


def resident(field: str) -> int:
    """Bytes of memory this process holds (``VmRSS``) or has held at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found
    return 1024 * int(found[1])
