"""How many patches a second `strank embed` makes, and what the time goes to.

    strank import st her2st -o cohort
    python benchmarks/embedding.py cohort
    python benchmarks/embedding.py --tiles 20000     # an image network against itself, bare

The first reads, encodes and embeds a cohort by the built-in encoder: a patch is one field of one
spot. The second needs a GPU to mean anything: ViT-L/16 with random weights in bf16, on tiles of a
slide that is made for it, against the same network in a loop over one batch that lies on the GPU.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyvips
import timm
import torch
from numpy.typing import NDArray

from strank.cohort.store import read_cohort
from strank.encoders.backbone import Backbone, BackboneEncoder, place
from strank.encoders.base import Encoder
from strank.encoders.registry import get_encoder
from strank.encoders.tiles import TileBatch, embed_spots, read_batches
from strank.slides.slide import Slide, open_slide, slide_of

Seconds = dict[str, float]


@contextmanager
def clock() -> Iterator[Seconds]:
    """Wall and processor time of what is inside, without what other programs take."""
    found: Seconds = {}
    start, cpu = time.perf_counter(), time.process_time()
    yield found
    found |= {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu}


def race_cohort(folder: Path, encoder: Encoder, batch_size: int, repeats: int) -> None:
    n_cores = os.cpu_count() or 1
    works = [
        (slide_of(section), np.asarray(section.obsm["spatial"]))
        for section in read_cohort(folder).values()
    ]
    n_patches = len(encoder.fields) * sum(len(centres) for _, centres in works)
    print(f"{n_patches} patches of {len(works)} sections, {n_cores} cores, batches {batch_size}")
    for slide, centres in works:
        embed_spots(slide, centres[:1], encoder)  # opened and decoded
    for _ in range(repeats):
        patches = []
        with clock() as reading:
            for slide, centres in works:
                patches += read_batches(batches_of(slide, centres, batch_size), encoder.fields)
        with clock() as encoding:
            for of_fields in patches:
                encoder.encode(of_fields)
        del patches
        with clock() as both:
            for slide, centres in works:
                embed_spots(slide, centres, encoder, batch_size=batch_size)
        share = reading["cpu"] / (reading["cpu"] + encoding["cpu"])
        alone = encoding["wall"] / both["wall"]
        print(
            f"embed {n_patches / both['wall']:5.0f} patches/s "
            f"({n_cores * n_patches / both['cpu']:5.0f} if it had {n_cores} cores to itself); "
            f"read alone {n_patches / reading['wall']:5.0f}, "
            f"encode alone {n_patches / encoding['wall']:5.0f}; reading takes {share:.0%} of the "
            f"processor time; encoding alone would take {alone:.0%} of the time"
        )


def batches_of(slide: Slide, centres: NDArray, size: int) -> list[TileBatch]:
    return [
        TileBatch(slide, centres[start : start + size]) for start in range(0, len(centres), size)
    ]


def made_slide(folder: Path, side: int = 20_000) -> Slide:
    """A tiled pyramid of JPEGs, as scanners write them, of noise in the colours of tissue."""
    path = folder / "slide.tif"
    noise = pyvips.Image.gaussnoise(side, side, sigma=40).gaussblur(2)
    image = (noise * [3, 5, 3] + [190, 130, 180]).cast("uchar").copy(interpretation="srgb")
    image.tiffsave(str(path), tile=True, pyramid=True, compression="jpeg", bigtiff=True)
    return open_slide(path, 0.5)


def network(name: str) -> BackboneEncoder:
    config = {"library": "timm", "name": name, "mean": [0.5] * 3, "std": [0.5] * 3}
    model = timm.create_model(name, num_classes=0)
    return BackboneEncoder(Backbone(model, config | {"pixels": 224, "um": 112.0}), "made", "1")


def bare_speed(encoder: BackboneEncoder, batch_size: int, n_batches: int) -> Seconds:
    """Tiles a second of the network alone: weights in float32 under autocast, and all in bf16."""
    device = encoder.backbone.mean.device
    images = torch.randn(batch_size, 3, 224, 224, device=device)
    cast = torch.autocast(device.type, torch.bfloat16)
    model = encoder.backbone.model

    def autocast() -> None:
        with cast:
            model(images)

    with torch.inference_mode():
        speed = {"autocast": _speed(autocast, batch_size, n_batches)}
        half = network(encoder.source).backbone.model.to(device, torch.bfloat16)
        images = images.to(torch.bfloat16)
        return speed | {"bf16": _speed(lambda: half(images), batch_size, n_batches)}


def _speed(forward: Callable[[], object], batch_size: int, n_batches: int) -> float:
    forward()
    _wait()
    start = time.perf_counter()
    for _ in range(n_batches):
        forward()
    _wait()
    return batch_size * n_batches / (time.perf_counter() - start)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def race_network(name: str, n_tiles: int, batch_size: int, workers: list[int]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = place(network(name), device, "bf16")
    bare = bare_speed(encoder, batch_size, max(1, n_tiles // batch_size // 2))
    print(f"{name} on {device}, batches of {batch_size}; bare forward pass in tiles/s:", end=" ")
    print(", ".join(f"{how} {speed:.0f}" for how, speed in bare.items()))
    with tempfile.TemporaryDirectory() as folder:
        slide = made_slide(Path(folder))
        centres = np.random.default_rng(0).uniform(200, 19_800, (n_tiles, 2))
        for n_workers in workers:
            done: list[float] = []
            advance = partial(_note_time, done)
            how = {"batch_size": batch_size, "workers": n_workers, "advance": advance}
            with clock() as whole:
                embed_spots(slide, centres, encoder, **how)
            # Without the start of the workers and of the GPU: from the first batch that is done.
            speed = (n_tiles - batch_size) / (done[-1] - done[0])
            ratios = ", ".join(f"{speed / of:.2f} of {how}" for how, of in bare.items())
            print(
                f"embed, {n_workers:2} workers: {speed:6.0f} tiles/s ({ratios}); "
                f"{n_tiles / whole['wall']:6.0f} with the start"
            )


def _note_time(done: list[float], _: int) -> None:
    done.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cohort", type=Path, nargs="?", help="from strank import")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiles", type=int, help="of the slide for an image network")
    parser.add_argument("--network", default="vit_large_patch16_224", help="of timm")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 4, 8])
    options = parser.parse_args()
    if options.cohort:
        encoder = get_encoder("morphology")
        race_cohort(options.cohort, encoder, options.batch_size, options.repeats)
    if options.tiles:
        race_network(options.network, options.tiles, options.batch_size, options.workers)


if __name__ == "__main__":
    main()
