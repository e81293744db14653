"""Training of networks: against plain Lightning for the same recipe, and where the time goes.

    python benchmarks/training.py recipe DATA        # a cohort folder with features, or nothing
    python benchmarks/training.py recipe --paper     # simulated, as many as the paper's HER2ST
    python benchmarks/training.py pipeline DATA      # also processes, compile

Set OMP_NUM_THREADS=1 where other programs use the cores. The last section is held out. Spots,
heads and objective are made as `strank.fitting.networks.fit_networks` makes them.

recipe: the published one (linear layer on raw features, AdamW 5e-5, 256 of any spots, list loss
over a section's spots in the batch, loss of the validation section every epoch), by
`neural.training.train`, and by Lightning as one writes it without us and the paper's code does: a
TensorDataset, a loop over the sections of the batch, ``self.log``, EarlyStopping, ModelCheckpoint
(best and last), CSVLogger. Both start at the same weights and see the same batches, so their curves
must be the same: "difference" is the largest in any epoch, beside the largest value. Plain code
writes a checkpoint every epoch, strank every half minute; "no checkpoints" leaves that out, "none
of the four" also the log of every step, the bar, and gathering spot by spot, while strank keeps its
bar and checkpoints. Sides take turns; seconds are the median, all of a run, and "x" is what a side
takes of strank's; "CPU x", of processor time, is disturbed
less by other programs. Short runs are mostly starting, so there x is smaller.

pipeline: "wait" is what a training step waits for its batch, shuffling of the epoch included, after
the first epoch; linear head by the published recipe, others by strank's. "disk" is a memmap in the
page cache; strank reads only patches from there. Patches are turned, mirrored and stained anew, and
go through a transformer of 0.3 million weights, all trained; a larger one takes longer for a step
and waits as long. Workers begin with the epoch, so with them nearly all is its first batch.

processes: one process and two that share every batch, with the same seed and no dropout. "run" is
the training, "wall" the command; "difference" is the largest of a layer's weights, or of a column
of the history, beside the largest of them.

compile: milliseconds a training step, median after the second epoch; "first s" is what the steps
before took. "of eager" is what a step takes of an eager one in float32.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import training_sides as by
import typer
from safetensors.torch import load_file
from training_sides import LOSS, SCORE, SEED, fit, recipe_of, silent, spots_of, start, steps_of

from strank.encoders.load import backbone_from_config
from strank.losses import ListSTRankLoss
from strank.neural.augment import Augmentation
from strank.neural.checkpoints import BEST, HISTORY
from strank.neural.finetune import freeze_unused, prepare
from strank.neural.heads import MLPHead, Network
from strank.neural.recipe import RECIPES, Machine

MODES = ("eager", "compiled", "eager"), ("32-true", "32-true", "bf16-mixed")
app = typer.Typer(add_completion=False, help=__doc__.partition("\n")[0])
Data = Annotated[Path | None, typer.Argument(help="Cohort folder; simulated features if absent.")]


def show(name: str, table: pd.DataFrame) -> None:
    digits = {c: "{:.1e}".format for c in table if "difference" in c}
    text = table.to_string(index=False, formatters=digits, float_format="{:.3g}".format)
    print(f"\n{name}\n{text}\n", flush=True)


def aim(what: str, met: bool) -> None:
    print(f"{what}: {'met' if met else 'MISSED'}")


def difference(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> float:
    """The largest, beside the largest value, lest one near 0 decides."""
    one, other = np.asarray(a[key]), np.asarray(b[key])
    return float(np.abs(one - other).max() / np.abs(other).max())


@app.command()
def recipe(data: Data = None, epochs: int = 200, turns: int = 3, paper: bool = False) -> None:
    """The published recipe by strank and by plain Lightning code."""
    plan = by.simulated(*by.HER2ST) if paper else by.plan_of(data)
    spots, how = spots_of(plan, "linear"), recipe_of("linear", epochs)
    with tempfile.TemporaryDirectory() as scratch:

        def side(kind: str) -> pd.DataFrame:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            if kind != "strank":
                return by.plain(plan, spots, how, folder, kind)
            return fit(plan, spots, start(plan, spots, "linear"), how, folder=folder)

        spent: dict[str, list[tuple[float, float]]] = {"strank": []} | {n: [] for n in by.PLAIN}
        curves = {}
        for name in list(spent) * turns:
            wall, cpu = time.perf_counter(), time.process_time()
            with silent():
                curves[name] = side(name)
            spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = []
    for name, seconds in spent.items():
        wall, cpu = np.median(seconds, axis=0)
        x = np.array(seconds) / np.array(spent["strank"])
        row = {"side": name, "seconds": wall, "CPU s": cpu, "ms an epoch": 1000 * wall / epochs}
        row |= {"x": np.median(x[:, 0]), "least x": x[:, 0].min(), "most x": x[:, 0].max()}
        row["CPU x"] = np.median(x[:, 1])
        for label, key in (("loss", LOSS), ("score", SCORE)):
            row[f"difference, {label}"] = difference(curves[name], curves["strank"], key)
        rows.append(row)
    table = pd.DataFrame(rows)
    print(f"{len(by.training_rows(plan))} training spots, {epochs} epochs, {turns} turns")
    show("recipe", table)
    aim(f"plain code takes {table['x'][1]:.1f} times as long; aim 3", table["x"][1] >= 3)
    worst = table.filter(like="difference").iloc[1].max()
    aim(f"same curves, largest relative difference {worst:.1e}; aim 1e-4", worst < 1e-4)


def on_disk(array: np.ndarray, folder: str) -> np.ndarray:
    path = Path(folder) / "inputs.npy"
    np.save(path, array)
    return np.load(path, mmap_mode="r")


def waiting(training: Callable[[], Any], **row: Any) -> dict[str, Any]:
    """What a step waits, on average; the first epoch warms up."""
    mean = steps_of(training).query("epoch > 0").mean()
    row |= {**mean[["step ms", "wait ms"]], "wait %": 100 * mean["wait ms"] / mean["step ms"]}
    typer.echo(row, err=True)
    return row


@app.command()
def pipeline(data: Data = None, epochs: int = 50) -> None:
    """How much of a training step is waiting for its batch."""
    rows = []
    for plan, n in ((by.plan_of(data), epochs), (by.simulated(*by.LARGER), 4)):
        for name in ("linear", "mlp", "context"):
            spots, how = spots_of(plan, name), recipe_of(name, n)
            about = {"spots": len(spots), "width": spots.inputs.shape[1], "network": name}
            with tempfile.TemporaryDirectory() as scratch:
                disk = replace(spots, inputs=on_disk(spots.inputs, scratch))
                for place, where in (("memory", spots), ("disk", disk)):
                    run = partial(fit, plan, where, start(plan, spots, name), how)
                    rows.append(waiting(run, **about, workers=0, inputs=place))
    for patch_pixels in (8, 16):
        rows += [_patches(patch_pixels, workers) for workers in (0, 2)]
    table = pd.DataFrame(rows)
    show("pipeline", table)
    for place, most in (("memory", 10), ("disk", 20)):
        worst = table[table["inputs"] == place]["wait %"].max()
        aim(f"{place}: at most {worst:.1f} % of a step; aim {most} %", worst < most)


def _patches(patch_pixels: int, workers: int) -> dict[str, Any]:
    """Train an image network on all its weights; with smaller tokens a step is longer."""
    plan, pixels = by.simulated(2_000, 1, 50, 5), 64
    how = replace(RECIPES["finetune"], max_epochs=3, patience=by.NEVER)
    shape = len(plan.section), pixels, pixels, 3
    patches = np.random.default_rng(SEED).integers(0, 256, shape, np.uint8)
    torch.manual_seed(SEED)
    arguments = {"img_size": pixels, "patch_size": patch_pixels}
    architecture = {"architecture": "test_vit", "model_args": arguments, "pretrained_cfg": {}}
    config = {"library": "timm", "name": "test_vit", "architecture": architecture}
    config |= {"mean": [0.7, 0.55, 0.6], "std": [0.2, 0.25, 0.15], "pixels": pixels, "um": 112.0}
    backbone = prepare(backbone_from_config(config), "full")
    freeze_unused(backbone)
    head = MLPHead(backbone.n_features, len(plan.panel), centred=False)
    made = Network(head, backbone), ListSTRankLoss(reduction=how.reduction, distributed=True)
    about = {"spots": shape[0], "width": f"{pixels} px", "workers": workers, "inputs": "disk"}
    about["network"] = f"ViT, {(pixels // patch_pixels) ** 2} tokens"
    with tempfile.TemporaryDirectory() as scratch:
        kept = {"inputs": on_disk(patches, scratch), "augment": Augmentation(shape[0], SEED)}
        spots, machine = replace(spots_of(plan, "linear"), **kept), Machine("cpu", workers=workers)
        return waiting(partial(fit, plan, spots, made, how, machine=machine), **about)


@app.command(hidden=True)
def worker(folder: Path, size: str, devices: int, epochs: int, data: Data = None) -> None:
    """One of the processes that train together."""
    plan = by.simulated(*by.LARGE) if size == "large" else by.plan_of(data)
    spots, machine = spots_of(plan, "steady"), Machine("cpu", devices)
    made = start(plan, spots, "steady")
    began = time.perf_counter()
    fit(plan, spots, made, recipe_of("steady", epochs), machine=machine, folder=folder)
    if int(os.environ.get("RANK", "0")) == 0:
        (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - began))


@app.command()
def processes(data: Data = None, epochs: int = 50, turns: int = 2) -> None:
    """One process against two, on a cohort and on a larger simulated one."""
    rows = []
    for size, n in (("small", epochs), ("large", max(3, epochs // 5))):
        found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
        for _ in range(turns):
            for devices, runs in found.items():
                runs.append(_launch(size, devices, n, data))
        row: dict[str, Any] = {"cohort": size, "epochs": n}
        for what in ("run", "wall"):
            for d, runs in found.items():
                row[f"{what}, {d}"] = float(np.median([r[what] for r in runs]))
        row["x run"] = row["run, 2"] / row["run, 1"]
        for what in ("weights", "history"):
            one, two = (found[d][-1][what] for d in (1, 2))
            row[f"difference, {what}"] = max(difference(two, one, key) for key in one)
        rows.append(row)
    table = pd.DataFrame(rows)
    show("processes", table)
    worst = table.filter(like="difference").to_numpy().max()
    aim(f"two processes differ by {worst:.1e}; aim 1e-3", worst < 1e-3)


def _launch(size: str, devices: int, epochs: int, data: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        many = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        command = [sys.executable, *(many if devices > 1 else []), __file__, "worker", scratch]
        command += [size, str(devices), str(epochs), *([str(data)] if data else [])]
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wall, folder = time.perf_counter() - began, Path(scratch)
        run, stored = json.loads((folder / "seconds.json").read_text()), load_file(folder / BEST)
        # The list loss does not depend on levels, which stay 0.
        weights = {key: value for key, value in stored.items() if not key.endswith("level")}
        history = pd.read_csv(folder / HISTORY).drop(columns="epoch")
        return {"wall": wall, "run": run, "weights": weights, "history": history}


@app.command("compile")
def compiled(data: Data = None, epochs: int = 8) -> None:
    """Eager, compiled, and in bfloat16, on the CPU."""
    plan, rows = by.plan_of(data, by.LARGE), []
    for name in ("mlp", "context"):
        spots, how = spots_of(plan, name), recipe_of(name, epochs)
        for mode, precision in zip(*MODES, strict=True):
            machine = Machine("cpu", precision=precision, compile=mode == "compiled")
            # What was compiled before counts towards the limit beyond which torch runs eagerly.
            torch.compiler.reset()
            made = start(plan, spots, name)
            steps = steps_of(partial(fit, plan, spots, made, how, machine=machine))
            first = steps["epoch"] < 2
            row = {"spots": len(spots), "network": name, "precision": precision, "mode": mode}
            spent = {"step ms": steps[~first].median(), "first s": steps[first].sum() / 1000}
            rows.append(row | {key: value["step ms"] for key, value in spent.items()})
    table = pd.DataFrame(rows)
    base = table.groupby("network")["step ms"].transform("first")
    table.insert(5, "of eager", table["step ms"] / base)
    show("compile", table)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    app()
