"""Training by Lightning: against plain code for the same recipe, and where the time goes.

    python benchmarks/training.py recipe DATA -o OUT     # DATA: a cohort folder with features
    python benchmarks/training.py pipeline DATA -o OUT
    python benchmarks/training.py processes DATA -o OUT
    python benchmarks/training.py compile DATA -o OUT
    python benchmarks/training.py recipe                 # simulated features, no data

Set OMP_NUM_THREADS=1 where other programs use the cores. The last section is held out.

recipe: the paper's (linear head, AdamW 5e-5, 256 of any spots, list loss over a section's spots in
the batch, held-out section scored every epoch), by `strank.neural.run.train` and by Lightning as
one writes it without us: a dataset that gives one spot at a time, a loop over the sections of the
batch, ``self.log``, EarlyStopping, ModelCheckpoint (best and last), CSVLogger. Both start at the
same weights and see the same batches, so their curves must be the same: "difference" is the largest
of loss and held-out score in any epoch, beside the largest value. The other rows leave parts of it
out. Sides take turns; seconds are the median of the turns, all of a run, and "x" is what it takes
of ours. "CPU x" is that of processor time, which other programs disturb less.

pipeline: "load" is what a training step (from one batch to the next) waits for its batch, within
the run and, "alone", for the loader without a run. "disk" is a memmap in the page cache, "cold" one
that is not, in its first epoch.

processes: one process and two that share every batch, with the same seed and no dropout. "run" is
the training, "wall" the command. "difference" is the largest of the weights of a layer, beside the
largest of them (levels left out: no gradient of the list loss holds them), and of the history.

compile: milliseconds a training step, median after the second epoch; "first s" is
everything before. "of eager" is what a step takes of an eager one in float32.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
import typer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from strank import read_cohort
from strank.linear.geometry import centre_within
from strank.losses import ListSTRankLoss
from strank.neural.batches import SectionBatches
from strank.neural.heads import ContextHead, Head, MLPHead
from strank.neural.keep import BEST, HISTORY
from strank.neural.neighbours import find_neighbours
from strank.neural.network import Network
from strank.neural.recipe import RECIPES, Machine, Recipe
from strank.neural.run import Run, train
from strank.neural.spots import SpotBatch, Spots, training_loader
from strank.neural.step import Names
from strank.training_set import panel_of, training_data

HEADS: dict[str, Callable[..., Head]] = {
    "linear": partial(MLPHead, depth=0, centred=False),
    "mlp": MLPHead,
    "context": ContextHead,
}
SEED, NEVER = 0, 10**9
LOSS, SCORE = "train/loss", "held_out/list_gain"

app = typer.Typer(add_completion=False, help=__doc__.partition("\n")[0])
Data = Annotated[Path | None, typer.Argument(help="Cohort folder; simulated features if absent.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Folder of the table.")]
Epochs = Annotated[int, typer.Option(min=3)]
Encoder = Annotated[str, typer.Option(help="Whose features, of a cohort.")]


@dataclass(frozen=True)
class Tissue:
    """Spots without neighbours, features as they are; the last section is held out."""

    spots: Spots
    positions: np.ndarray
    names: Names

    @property
    def held_out(self) -> int:
        return len(self.names.sections) - 1

    @property
    def rows(self) -> np.ndarray:
        return np.flatnonzero(self.spots.section != self.held_out)

    def ready_for(self, head: Head) -> Spots:
        spots = self.spots
        if head.centred:
            centred = centre_within(spots.inputs, spots.section).astype(np.float32)
            spots = replace(spots, inputs=centred)
        if head.n_neighbours:
            near = find_neighbours(self.positions, spots.section, head.n_neighbours)
            spots = replace(spots, neighbours=near)
        return spots


def load(folder: Path, encoder: str) -> Tissue:
    cohort = read_cohort(folder, encoder=encoder)
    panel = panel_of(cohort, 50, None)[0]
    data = training_data(cohort, panel, encoder)
    sections, codes = np.unique(data.section, return_inverse=True)
    depth = np.log(data.library_size).astype(np.float32)
    counts = data.counts.astype(np.float32).toarray()
    spots = Spots(data.features.astype(np.float32), counts, codes, depth)
    return Tissue(spots, data.positions, Names(tuple(sections), tuple(panel)))


def simulated(n_spots: int, n_features: int, n_genes: int, n_sections: int) -> Tissue:
    """Log rates linear in features without any structure; spots on a square grid."""
    rng = np.random.default_rng(SEED)
    features = rng.standard_normal((n_spots, n_features), dtype=np.float32)
    weights = rng.standard_normal((n_features, n_genes), dtype=np.float32) / n_features**0.5
    depth = rng.normal(8, 0.5, n_spots).astype(np.float32)
    rate = np.exp(0.3 * features @ weights + depth[:, None]) * rng.uniform(1e-4, 1e-3, n_genes)
    counts = rng.poisson(rate).astype(np.float32)
    section = np.sort(np.arange(n_spots) % n_sections)
    side = int(np.ceil((n_spots / n_sections) ** 0.5))
    positions = 100.0 * np.stack(np.divmod(np.arange(n_spots), side), 1)
    names = Names(*(tuple(map(str, range(n))) for n in (n_sections, n_genes)))
    return Tissue(Spots(features, counts, section, depth), positions, names)


SMALL, LARGE = (1015, 182, 50, 5), (50_000, 1024, 50, 10)
# Spots and sections of the paper's HER2ST.
HER2ST = (13_620, 182, 50, 36)


def small(data: Path | None, encoder: str) -> Tissue:
    return load(data, encoder) if data else simulated(*SMALL)


def make_network(tissue: Tissue, spots: Spots, name: str, *, dropout: bool = True) -> Network:
    torch.manual_seed(SEED)
    head = HEADS[name](spots.inputs.shape[1], spots.counts.shape[1])
    if not dropout:
        for part in head.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
    some = torch.from_numpy(spots.inputs[tissue.rows[:20_000]])
    head.centre.copy_(some.mean(0))
    head.scale.copy_(some.std(0).clamp(min=1e-6))
    return Network(head)


def recipe_of(name: str, epochs: int) -> Recipe:
    paper = replace(RECIPES["paper"], max_epochs=epochs, patience=NEVER)
    return paper if name == "linear" else replace(paper, learning_rate=1e-3, clip=1.0)


def fit(
    tissue: Tissue,
    network: Network,
    spots: Spots,
    recipe: Recipe,
    machine: Machine | None = None,
    folder: Path | None = None,
) -> pd.DataFrame:
    machine = machine or Machine(accelerator="cpu")
    run = Run(recipe, machine, SEED, (tissue.held_out,), folder, title="benchmark")
    loss = ListSTRankLoss(distributed=True)
    return train(network, loss, spots, tissue.names, run).history


@contextmanager
def silent() -> Iterator[None]:
    """Bars and advice go nowhere, at the least price for who writes them."""
    with ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(nowhere))
        stack.enter_context(redirect_stderr(nowhere))
        yield


def show(name: str, table: pd.DataFrame, out: Path | None) -> None:
    digits = {c: "{:.1e}".format for c in table if "difference" in c}
    text = table.to_string(index=False, formatters=digits, float_format="{:.3g}".format)
    print(f"\n{name}\n{text}\n", flush=True)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        table.to_csv(out / f"{name}.csv", index=False)


def note(what: object) -> None:
    print(what, file=sys.stderr, flush=True)


def aim(what: str, met: bool) -> None:
    print(f"{what}: {'met' if met else 'MISSED'}")


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Beside the largest value, lest one near 0 decides."""
    return float(np.abs(a - b).max() / np.abs(b).max())


# --- recipe: code that one would write without us ---


@dataclass
class Lighter:
    """What of the plain code is left out."""

    checkpoint: bool = True
    log_steps: bool = True
    bar: bool = True
    one_spot_a_time: bool = True


PLAIN = {
    "plain": Lighter(),
    "no checkpoints": Lighter(checkpoint=False),
    "no log of steps": Lighter(log_steps=False),
    "no bar": Lighter(bar=False),
    "batch gathered at once": Lighter(one_spot_a_time=False),
    "none of the four": Lighter(False, False, False, False),
}


class PlainSpots(Dataset):
    def __init__(self, spots: Spots, rows: np.ndarray, centre: Tensor, scale: Tensor) -> None:
        self.features = (torch.from_numpy(spots.inputs[rows]) - centre) / scale
        self.counts = torch.from_numpy(spots.counts[rows])
        self.section = torch.from_numpy(spots.section[rows])
        self.depth = torch.from_numpy(spots.offset[rows])

    def __len__(self) -> int:
        return len(self.section)

    def __getitem__(self, i: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.features[i], self.counts[i], self.section[i], self.depth[i]


class Replay:
    """The batches that `train` sees, as places among the training spots."""

    def __init__(self, section: np.ndarray, recipe: Recipe) -> None:
        rows = np.arange(len(section))
        self.batches = SectionBatches(section, rows, recipe.batches, seed=SEED)
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        self.batches.set_epoch(self.epoch)
        self.epoch += 1
        for _, rows in self.batches:
            yield rows.tolist()


class PlainModule(pl.LightningModule):
    def __init__(self, head: nn.Linear, learning_rate: float, log_steps: bool) -> None:
        super().__init__()
        self.head, self.learning_rate, self.log_steps = head, learning_rate, log_steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), self.learning_rate)

    def training_step(self, batch: Any, _: int) -> Tensor:
        features, counts, section, depth = batch
        scores = self.head(features)
        losses = []
        for label in section.unique():
            mask = section == label
            log_share = torch.log_softmax(scores[mask] + depth[mask, None], 0)
            losses.append(-counts[mask] * log_share)
        loss = torch.cat(losses).mean()
        # Every batch weighs the same, so that the curves can be compared.
        self.log(
            LOSS, loss, on_step=self.log_steps, on_epoch=True, prog_bar=self.log_steps, batch_size=1
        )
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        features, counts, _section, depth = batch
        scores = self.head(features)
        with_model = torch.log_softmax(scores + depth[:, None], 0)
        without = torch.log_softmax(depth, 0)[:, None]
        gain = (counts * (with_model - without)).sum() / counts.shape[1]
        self.log(SCORE, gain, prog_bar=True, batch_size=1)


class Curve(pl.Callback):
    """Only to compare; a dictionary an epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        found = trainer.callback_metrics
        loss = found[f"{LOSS}_epoch"] if f"{LOSS}_epoch" in found else found[LOSS]
        self.rows.append({LOSS: float(loss), SCORE: float(found[SCORE])})


def plain(
    tissue: Tissue, network: Network, recipe: Recipe, folder: Path, lighter: Lighter
) -> pd.DataFrame:
    ours = network.head
    head = nn.Linear(ours.readout.in_features, ours.readout.out_features)
    head.weight.data.copy_(ours.readout.weight)
    head.bias.data.copy_(ours.level)
    held = np.flatnonzero(tissue.spots.section == tissue.held_out)
    train_set, held_set = (
        PlainSpots(tissue.spots, rows, ours.centre, ours.scale) for rows in (tissue.rows, held)
    )
    batches = Replay(tissue.spots.section[tissue.rows], recipe)
    how = (
        {"batch_sampler": batches}
        if lighter.one_spot_a_time
        else {"sampler": batches, "batch_size": None}
    )
    curve = Curve()
    callbacks = [curve, EarlyStopping(SCORE, mode="max", patience=recipe.patience)]
    if lighter.checkpoint:
        callbacks.append(ModelCheckpoint(folder, monitor=SCORE, mode="max", save_last=True))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=recipe.max_epochs,
        callbacks=callbacks,
        logger=CSVLogger(folder),
        enable_checkpointing=lighter.checkpoint,
        enable_progress_bar=lighter.bar,
    )
    trainer.fit(
        PlainModule(head, recipe.learning_rate, lighter.log_steps),
        DataLoader(train_set, **how),
        DataLoader(held_set, batch_size=len(held_set)),
    )
    return pd.DataFrame(curve.rows)


def in_turns(sides: Mapping[str, Callable[[], Any]], turns: int) -> tuple[dict, dict]:
    """Wall and processor seconds, ``[n_turns, 2]``, and what the last turn gave."""
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    given = {}
    for turn in range(turns):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            with silent():
                given[name] = side()
            spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
            note(f"turn {turn + 1}: {name} {spent[name][-1][0]:.2f} s")
    return {name: np.array(values) for name, values in spent.items()}, given


@app.command()
def recipe(
    data: Data = None,
    out: Out = None,
    epochs: Epochs = 200,
    turns: int = 3,
    quick: Annotated[bool, typer.Option("--quick", help="The two sides only.")] = False,
    paper: Annotated[
        bool, typer.Option("--paper", help="Simulated features, as many as the paper's HER2ST.")
    ] = False,
    encoder: Encoder = "morphology",
) -> None:
    """The paper's recipe by strank and by plain Lightning code."""
    tissue = simulated(*HER2ST) if paper else small(data, encoder)
    how = recipe_of("linear", epochs)
    with tempfile.TemporaryDirectory() as scratch:

        def ours() -> pd.DataFrame:
            network = make_network(tissue, tissue.spots, "linear", dropout=False)
            folder = Path(tempfile.mkdtemp(dir=scratch))
            return fit(tissue, network, tissue.spots, how, folder=folder)

        def theirs(lighter: Lighter) -> pd.DataFrame:
            network = make_network(tissue, tissue.spots, "linear", dropout=False)
            return plain(tissue, network, how, Path(tempfile.mkdtemp(dir=scratch)), lighter)

        variants = dict(list(PLAIN.items())[:1]) if quick else PLAIN
        sides = {"strank": ours} | {n: partial(theirs, kind) for n, kind in variants.items()}
        seconds, curves = in_turns(sides, turns)
    rows = []
    for name, spent in seconds.items():
        wall, cpu = np.median(spent, axis=0)
        ratios = spent / seconds["strank"]
        row = {"side": name, "seconds": wall, "CPU s": cpu, "ms an epoch": 1000 * wall / epochs}
        row |= {"x": np.median(ratios[:, 0]), "CPU x": np.median(ratios[:, 1])}
        row |= {"least x": ratios[:, 0].min(), "most x": ratios[:, 0].max()}
        for column, label in ((LOSS, "loss"), (SCORE, "score")):
            a, b = (curves[n][column].to_numpy() for n in (name, "strank"))
            row[f"difference, {label}"] = largest_difference(a, b)
        rows.append(row)
    table = pd.DataFrame(rows)
    print(f"{len(tissue.rows)} training spots, {epochs} epochs, {turns} turns")
    show("recipe", table, out)
    aim(f"plain code takes {table['x'][1]:.1f} times as long; aim 5", table["x"][1] >= 5)
    worst = table.filter(like="difference").iloc[1].max()
    aim(f"same curves, largest relative difference {worst:.1e}; aim 1e-4", worst < 1e-4)


# --- pipeline ---


@dataclass(frozen=True)
class Timed(Spots):
    """Spots that note when they are asked for: section of the first, epoch, start, end."""

    clock: list[tuple[int, int, float, float]] = field(default_factory=list)

    def __getitem__(self, key: tuple[int, np.ndarray]) -> SpotBatch:
        start = time.perf_counter()
        batch = super().__getitem__(key)
        first = int(self.section[key[1][0]]) if len(key[1]) else -1
        # A training batch may begin with any section but the one that is held out.
        self.clock.append((first, key[0], start, time.perf_counter()))
        return batch

    @classmethod
    def of(cls, spots: Spots) -> Timed:
        return cls(**{name: getattr(spots, name) for name in Spots.__dataclass_fields__})

    def steps(self, held_out: int) -> pd.DataFrame:
        """Of training batches, but an epoch's last: milliseconds to load, and to the next."""
        table = pd.DataFrame(self.clock, columns=["section", "epoch", "start", "end"])
        after = table.shift(-1)
        within = (after["epoch"] == table["epoch"]) & (after["section"] != held_out)
        table["load"] = 1000 * (table["end"] - table["start"])
        table["step"] = 1000 * (after["start"] - table["start"])
        return table[within & (table["section"] != held_out)]


def evict(features: np.ndarray) -> None:
    """Have the kernel forget what it read of the file."""
    features._mmap.madvise(mmap.MADV_DONTNEED)  # what a process maps is kept
    with open(features.filename, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def on_disk(spots: Spots, folder: Path) -> Spots:
    path = folder / "features.npy"
    np.save(path, spots.inputs)
    os.sync()
    return replace(spots, inputs=np.load(path, mmap_mode="r"))


def share_of_loading(tissue: Tissue, name: str, spots: Spots, epochs: int, cold: bool) -> dict:
    network = make_network(tissue, spots, name)
    how = recipe_of(name, epochs)
    batches = SectionBatches(spots.section, tissue.rows, how.batches, seed=SEED)
    loader = training_loader(spots, batches)
    if cold:
        evict(spots.inputs)
    alone = []
    for epoch in range(1 if cold else max(2, epochs // 2)):
        batches.set_epoch(epoch)
        start = time.perf_counter()
        for _ in loader:
            pass
        alone.append(1000 * (time.perf_counter() - start) / len(batches))
    timed = Timed.of(spots)
    if cold:
        evict(spots.inputs)
    with silent():
        fit(tissue, network, timed, how)
    steps = timed.steps(tissue.held_out)
    steps = steps[steps["epoch"] == 0] if cold else steps[steps["epoch"] > 0]
    load, step = steps["load"].sum(), steps["step"].sum()
    row = {"step ms": step / len(steps), "load ms": load / len(steps), "load %": 100 * load / step}
    alone_ms = float(np.median(alone))
    return row | {"alone ms": alone_ms, "alone %": 100 * alone_ms / row["step ms"]}


@app.command()
def pipeline(
    data: Data = None,
    out: Out = None,
    epochs: Annotated[int, typer.Option(min=3, help="Of the small cohort.")] = 50,
    n_spots: Annotated[int, typer.Option(help="Of the large one.")] = LARGE[0],
    encoder: Encoder = "morphology",
) -> None:
    """How much of a training step is waiting for its batch."""
    sizes = {"small": (small(data, encoder), epochs), "large": (simulated(n_spots, *LARGE[1:]), 3)}
    rows = []
    for size, (tissue, n) in sizes.items():
        for name, make in HEADS.items():
            like = make(*(x.shape[1] for x in (tissue.spots.inputs, tissue.spots.counts)))
            spots = tissue.ready_for(like)
            with tempfile.TemporaryDirectory(dir=out and out.parent) as scratch:
                disk = on_disk(spots, Path(scratch))
                for place, where in (("memory", spots), ("disk", disk), ("cold", disk)):
                    row = {"cohort": size, "spots": len(spots), "head": name, "features": place}
                    row |= share_of_loading(tissue, name, where, n, place == "cold")
                    rows.append(row)
                    note(row)
    table = pd.DataFrame(rows)
    show("pipeline", table, out)
    for place, most in (("memory", 10), ("disk", 20)):
        worst = table[table["features"] == place]["load %"].max()
        aim(f"{place}: at most {worst:.1f} % of a step; aim {most} %", worst < most)


# --- processes ---


@app.command(hidden=True)
def worker(folder: Path, size: str, devices: int, epochs: int, data: Data = None) -> None:
    """One of the processes that train together."""
    tissue = simulated(10_000, 1024, 50, 5) if size == "large" else small(data, "morphology")
    spots = tissue.ready_for(MLPHead(1, 1))
    network = make_network(tissue, spots, "mlp", dropout=False)
    machine = Machine(accelerator="cpu", devices=devices)
    start = time.perf_counter()
    fit(tissue, network, spots, recipe_of("mlp", epochs), machine, folder)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - start))


@app.command()
def processes(data: Data = None, out: Out = None, epochs: Epochs = 50, turns: int = 2) -> None:
    """One process against two."""
    rows = []
    for size, n in (("small", epochs), ("large", max(3, epochs // 10))):
        found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        for _ in range(turns):
            for devices, runs in found.items():
                runs.append(_launch(size, devices, n, data))
        one, two = (found[d][-1] for d in (1, 2))
        median = {
            f"{what}, {d}": float(np.median([r[what] for r in runs]))
            for what in ("run", "wall")
            for d, runs in found.items()
        }
        weights = [
            largest_difference(two["best"][k], w)
            for k, w in one["best"].items()
            if not k.endswith("level")
        ]
        history = [
            largest_difference(two["history"][c].to_numpy(), one["history"][c].to_numpy())
            for c in (LOSS, SCORE)
        ]
        rows.append(
            {"cohort": size, "epochs": n, **median, "x run": median["run, 2"] / median["run, 1"]}
            | {"difference, weights": max(weights), "difference, history": max(history)}
        )
    table = pd.DataFrame(rows)
    show("processes", table, out)
    worst = table.filter(like="difference").to_numpy().max()
    aim(f"two processes differ by {worst:.1e}; aim 1e-3", worst < 1e-3)


def _launch(size: str, devices: int, epochs: int, data: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        command = [sys.executable, *(many if devices > 1 else []), __file__, "worker", scratch]
        command += [size, str(devices), str(epochs), *([str(data)] if data else [])]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        wall, folder = time.perf_counter() - start, Path(scratch)
        return {
            "wall": wall,
            "run": json.loads((folder / "seconds.json").read_text()),
            "best": {k: v.numpy() for k, v in load_file(folder / BEST).items()},
            "history": pd.read_csv(folder / HISTORY),
        }


# --- compile ---


@app.command("compile")
def compiled(
    data: Data = None,
    out: Out = None,
    epochs: Epochs = 20,
    encoder: Encoder = "morphology",
) -> None:
    """Eager and compiled, float32 and bfloat16, on the CPU."""
    sizes = {"small": (small(data, encoder), epochs), "large": (simulated(10_000, *LARGE[1:]), 4)}
    rows = []
    for size, (tissue, n) in sizes.items():
        for name in ("mlp", "context"):
            like = HEADS[name](*(x.shape[1] for x in (tissue.spots.inputs, tissue.spots.counts)))
            spots = tissue.ready_for(like)
            for kind in (False, True):
                for precision in ("32-true", "bf16-mixed"):
                    machine = Machine(accelerator="cpu", precision=precision, compile=kind)
                    row = {"cohort": size, "head": name}
                    row |= {"mode": "compiled" if kind else "eager", "precision": precision}
                    rows.append(row | _step_ms(tissue, name, spots, n, machine))
                    note(rows[-1])
    table = pd.DataFrame(rows)
    base = table.groupby(["cohort", "head"])["step ms"].transform("first")
    table.insert(5, "of eager", table["step ms"] / base)
    show("compile", table, out)


def _step_ms(tissue: Tissue, name: str, spots: Spots, epochs: int, machine: Machine) -> dict:
    timed, network = Timed.of(spots), make_network(tissue, spots, name)
    # What was compiled before counts towards the limit beyond which torch runs eagerly.
    torch.compiler.reset()
    start = time.perf_counter()
    with silent():
        history = fit(tissue, network, timed, recipe_of(name, epochs), machine)
    steps = timed.steps(tissue.held_out)
    later = steps[steps["epoch"] > 1]
    row = {"step ms": later["step"].median(), "first s": later["start"].iloc[0] - start}
    return row | {"best score": history[SCORE].max()}


if __name__ == "__main__":
    for part in ("pytorch", "fabric"):
        logging.getLogger(f"lightning.{part}").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.")
    app()
