"""Forward and backward of the list and pair losses against what users write.

    python benchmarks/losses.py
    python benchmarks/losses.py --quick     # small batches only

The loop is what research code does: a mask for each section, log_softmax, times the counts,
concatenated. The scatter is what a good user of PyTorch writes, without any check of arguments, and
"compiled" is torch.compile of it (a C++ compiler is needed). Counts are 0 for 92 % of the elements;
"csr" is the list loss with them in CSR. Values and gradients are compared before anything is timed.

Goals: never slower than the scatter, at most 1.3 times its compiled form; at most 3 score-sized
arrays of memory; CSR counts not densified.

Memory is the peak of what the kernel had to give the process (VmHWM, reset before the loss) above
what the inputs held, forward and backward: it sees temporaries inside torch too, which torch does
not count on a CPU. Linux only.

Measured where other programs took more than both cores: processor time of one thread, lower
quartile in turn; float32, torch 2.15, AMD EPYC, AVX-512, 1 MB of L2 a core. "before" is the list
loss of commit 43c839e. The goal of 1.3 is not met at the largest size, where the compiled form
needs fewer passes over memory that the other programs fill, too.

    spots sections genes order    before  list  scatter compiled (milliseconds)
      256        8    50 mixed      0.37  0.22     0.22     0.29
      256        8    50 in turn    0.42  0.24     0.23     0.33
      512        1   250 mixed      0.86  0.45     0.80     0.60
      512        1   250 in turn    0.93  0.49     0.86     0.63
     1024        4   250 mixed      1.52  1.05     1.90     0.88
     1024        4   250 in turn    1.25  0.82     1.31     0.81
     4096       64  1000 mixed     20.82 18.69    41.82    10.10
     4096       64  1000 in turn   20.16 11.99    39.20     7.16

The table printed is of wall time, the least of 5 to 500 repeats.
"""

from __future__ import annotations

import argparse
import functools
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

SIZES = [
    (256, 8, 50),
    (512, 1, 250),
    (1024, 4, 250),
    (256, 64, 1000),
    (4096, 8, 50),
    (4096, 64, 1000),
    (4096, 8, 1000),
    (4096, 64, 15_000),
]
# Repeats add up to so many elements; between 5 and 500 of them.
ELEMENTS = 100_000_000


class Inputs(NamedTuple):
    scores: Tensor
    counts: Tensor
    section: Tensor
    offset: Tensor


Contestant = Callable[[Inputs], Tensor]


def make_inputs(n_spots: int, n_sections: int, n_genes: int, *, mixed: bool = True) -> Inputs:
    """Counts of which 8 % are not 0; sections of unequal size, their spots mixed or in turn."""
    torch.manual_seed(0)
    scores = torch.randn(n_spots, n_genes)
    # Row by row: a score-sized temporary here would count as peak memory later.
    counts = torch.empty(n_spots, n_genes)
    for row in counts:
        row.copy_(torch.poisson(torch.full((n_genes,), 0.083)))
    section = torch.randint(n_sections, (n_spots,))
    section = section if mixed else section.sort().values
    return Inputs(scores.requires_grad_(), counts, section, torch.randn(n_spots))


def loop_list(inputs: Inputs) -> Tensor:
    scores, counts, section, offset = inputs
    losses = []
    for label in section.unique():
        mask = section == label
        log_share = torch.log_softmax(scores[mask] + offset[mask, None], 0)
        losses.append(-counts[mask] * log_share)
    return torch.cat(losses).mean()


def scatter(scores: Tensor, counts: Tensor, section: Tensor, offset: Tensor, n: int) -> Tensor:
    logits = scores + offset[:, None]
    index = section[:, None].expand_as(logits)
    shift = torch.full((n, scores.shape[1]), -torch.inf)
    shift = shift.scatter_reduce(0, index, logits.detach(), "amax")
    logits = logits - shift.index_select(0, section)
    norm = torch.zeros(n, scores.shape[1]).index_add(0, section, logits.exp())
    return -(counts * (logits - norm.log().index_select(0, section))).mean()


def scatter_list(inputs: Inputs) -> Tensor:
    return scatter(*inputs, int(inputs.section.max()) + 1)


@functools.cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(scatter, dynamic=False)


def compiled_list(inputs: Inputs) -> Tensor:
    return compiled()(*inputs, int(inputs.section.max()) + 1)


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
    "scatter": scatter_list,
    "compiled": compiled_list,
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
        (loop_list, scatter_list, inputs),
        (loop_list, compiled_list, inputs),
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


def compare(size: tuple[int, int, int], threads: int, *, mixed: bool) -> None:
    torch.set_num_threads(threads)
    # Else what was compiled for one number of threads, or many sizes, would be in the way.
    torch.compiler.reset()
    inputs = make_inputs(*size, mixed=mixed)
    stored = inputs._replace(counts=inputs.counts.to_sparse_csr())
    check_agreement(inputs, stored)
    contestants = {
        name: (contestant, stored if name == "csr" else inputs)
        for name, contestant in CONTESTANTS.items()
    }
    ms = race(contestants, min(max(ELEMENTS // inputs.scores.numel(), 5), 500))
    row = "{:5} {:8} {:6}".format(*size) + f" {'mixed' if mixed else 'in turn':8}{threads:3} "
    row += " ".join(f"{value:9.2f}" for value in ms.values()) + "  "
    for other in ("loop list", "scatter", "compiled"):
        row += f"{ms[other] / ms['list']:6.2f}"
    print(row + f"{ms['loop pair'] / ms['pair']:6.2f}", flush=True)


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
    print(f"{'milliseconds':>43}{'times list and pair':>81}")
    print(f"spots sections  genes order   threads {names}    loop scat. comp. pair")
    for size in SIZES[:4] if options.quick else SIZES:
        for threads, mixed in itertools.product((1, 2), (True, False)):
            compare(size, threads, mixed=mixed)
    measure_memory(SIZES[-1 if not options.quick else 5])


if __name__ == "__main__":
    main()
