"""Forward and backward of the list and pair losses against a Python loop over sections.

    python benchmarks/losses.py
    python benchmarks/losses.py --quick     # small batches only

TABLE
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import re
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from strank.functional.listwise import list_loss
from strank.functional.pairwise import pair_loss

LARGEST = (4096, 64, 15_000)
# Repeats are so many elements; between 3 and 200.
ELEMENTS = 40_000_000


class Inputs(NamedTuple):
    scores: Tensor
    counts: Tensor
    section: Tensor
    offset: Tensor


Contestant = Callable[[Inputs], Tensor]


def make_inputs(n_spots: int, n_sections: int, n_genes: int) -> Inputs:
    """Counts of which 8 % are not 0; sections of unequal size, their spots in any order."""
    torch.manual_seed(0)
    scores = torch.randn(n_spots, n_genes)
    # Row by row: a score-sized temporary here would count as peak memory later.
    counts = torch.empty(n_spots, n_genes)
    for row in counts:
        row.copy_(torch.poisson(torch.full((n_genes,), 0.083)))
    section = torch.randint(n_sections, (n_spots,))
    return Inputs(scores.requires_grad_(), counts, section, torch.randn(n_spots))


def loop_list(inputs: Inputs) -> Tensor:
    scores, counts, section, offset = inputs
    losses = []
    for label in section.unique():
        mask = section == label
        log_share = torch.log_softmax(scores[mask] + offset[mask, None], 0)
        losses.append(-counts[mask] * log_share)
    return torch.cat(losses).mean()


def draw_partners(section: Tensor) -> list[tuple[Tensor, Tensor]]:
    draws = []
    for label in section.unique():
        own = (section == label).nonzero()[:, 0]
        draws.append((own, own[torch.randperm(len(own))]))
    return draws


def loop_pair(inputs: Inputs, draws: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    scores, counts, section, offset = inputs
    losses = []
    for own, partner in draws or draw_partners(section):
        pairs = torch.stack([own, partner])
        log_share = torch.log_softmax(scores[pairs] + offset[pairs][..., None], 0)
        losses.append((-counts[pairs] * log_share).flatten(0, 1))
    return torch.cat(losses).mean()


def strank_list(inputs: Inputs) -> Tensor:
    scores, counts, section, offset = inputs
    return list_loss(scores, counts, section=section, offset=offset)


def strank_pair(inputs: Inputs, pairs: Tensor | None = None) -> Tensor:
    scores, counts, section, offset = inputs
    return pair_loss(scores, counts, section=section, offset=offset, pairs=pairs)


CONTESTANTS: dict[str, Contestant] = {
    "loop list": loop_list,
    "list": strank_list,
    "csr": strank_list,
    "loop pair": loop_pair,
    "pair": strank_pair,
}


def backward(contestant: Contestant, inputs: Inputs) -> Tensor:
    inputs.scores.grad = None
    loss = contestant(inputs)
    loss.backward()
    return loss.detach()


def check_agreement(inputs: Inputs, stored: Inputs) -> None:
    """Same value and gradient, the pair losses on the same draw."""
    draws = draw_partners(inputs.section)
    pairs = torch.cat([torch.stack(draw, 1) for draw in draws])
    for plain, fused, arguments in [
        (loop_list, strank_list, inputs),
        (loop_list, strank_list, stored),
        (lambda i: loop_pair(i, draws), lambda i: strank_pair(i, pairs), inputs),
    ]:
        expected = backward(plain, inputs), inputs.scores.grad
        got = backward(fused, arguments), arguments.scores.grad
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=0)
        largest = float(expected[1].abs().max())
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5 * largest)
        del expected, got
    inputs.scores.grad = stored.scores.grad = None


def race(contestants: dict[str, tuple[Contestant, Inputs]], repeats: int) -> dict[str, float]:
    """Least milliseconds of each, taken in turns so that a busy machine slows all alike."""
    best = dict.fromkeys(contestants, math.inf)
    for _ in range(repeats):
        for name, (contestant, inputs) in contestants.items():
            start = time.perf_counter()
            backward(contestant, inputs)
            best[name] = min(best[name], 1000 * (time.perf_counter() - start))
            inputs.scores.grad = None
    return best


def compare(size: tuple[int, int, int]) -> None:
    inputs = make_inputs(*size)
    stored = inputs._replace(counts=inputs.counts.to_sparse_csr())
    check_agreement(inputs, stored)
    contestants = {
        name: (contestant, stored if name == "csr" else inputs)
        for name, contestant in CONTESTANTS.items()
    }
    repeats = min(max(ELEMENTS // inputs.scores.numel(), 3), 200)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ms = race(contestants, repeats)
        row = "{:5} {:8} {:6}".format(*size) + f" {threads:7}  "
        row += " ".join(f"{value:9.2f}" for value in ms.values()) + "  "
        for name, loop in [("list", "loop list"), ("csr", "loop list"), ("pair", "loop pair")]:
            row += f" {ms[loop] / ms[name]:5.1f}"
        print(row, flush=True)


def resident(field: str) -> int:
    """Bytes of memory this process holds (``VmRSS``) or has held at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def peak_memory(name: str, size: tuple[int, int, int]) -> float:
    """Peak beyond the inputs, in arrays of the size of the scores."""
    contestant = CONTESTANTS[name]
    torch.set_num_threads(1)
    # What torch loads on first use is no memory of the loss.
    backward(contestant, make_inputs(64, 2, 10))
    inputs = make_inputs(*size)
    if name == "csr":
        inputs = inputs._replace(counts=inputs.counts.to_sparse_csr())
    # The kernel lowers the peak it remembers, VmHWM, to what is held now.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    backward(contestant, inputs)
    return (resident("VmHWM") - before) / (4 * inputs.scores.numel())


def measure_memory(size: tuple[int, int, int]) -> None:
    """Each contestant in a process of its own, so that none finds memory another one left."""
    context = multiprocessing.get_context("spawn")
    print("\npeak memory at {} spots, {} sections, {} genes, in score-sized arrays".format(*size))
    for name in CONTESTANTS:
        with ProcessPoolExecutor(1, context) as pool:
            print(f"  {name:10} {pool.submit(peak_memory, name, size).result():5.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small batches only")
    options = parser.parse_args()

    names = " ".join(f"{name:>9}" for name in CONTESTANTS)
    print(f"{'milliseconds':>60}{'times the loop':>40}")
    print(f"spots sections  genes threads  {names}    list   csr  pair")
    genes = (50, 1000) if options.quick else (50, 1000, 15_000)
    for n_spots, n_sections, n_genes in itertools.product((256, 4096), (8, 64), genes):
        if not options.quick or n_spots * n_genes < 1_000_000:
            compare((n_spots, n_sections, n_genes))
    measure_memory((4096, 64, 1000) if options.quick else LARGEST)


if __name__ == "__main__":
    main()
