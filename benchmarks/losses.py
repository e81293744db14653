"""Forward and backward of the list and pair losses against a Python loop over sections.

    python benchmarks/losses.py
    python benchmarks/losses.py --quick     # small batches only

The loop is what research code does: a mask for each section, log_softmax, times the counts,
concatenated. Counts are 0 for 92 % of the elements; "csr" is the list loss with them in CSR.
Values and gradients are compared before anything is timed.

Goals: never slower than the loop, dense or CSR; at least 3 times as fast at 4,096 spots in 64
sections; at most 3 score-sized arrays of memory; CSR counts not densified.

Memory is the peak of what the kernel had to give the process (VmHWM, reset before the loss) above
what the inputs held, forward and backward: it sees temporaries inside torch too, which torch does
not count on a CPU. Linux only.

Least of 3 (large) to 100 (small) repeats in float32; torch 2.15, AMD EPYC, 2 free cores, AVX-512,
1 MB of L2 a core. Where other programs take both cores, torch waits time slices of 4 ms whenever it
divides work between threads: one index_add of 252 x 50 took 72 ms, not 0.03, and the losses of 256
spots 160 ms, the loop 4. One thread is then the faster by far.

                                     milliseconds                                  times the loop
    spots sections genes threads loop list      list       csr loop pair      pair   list  csr pair
      256        8    50       1      0.60      0.41      0.50      0.74      0.64    1.5  1.2  1.2
      256        8    50       2      0.61      0.43      0.52      0.76      0.65    1.4  1.2  1.2
      256        8  1000       1      2.12      1.21      1.62      3.35      2.64    1.8  1.3  1.3
      256        8  1000       2      1.86      0.88      1.27      2.93      1.66    2.1  1.5  1.8
      256        8 15000       1     29.43     16.94     21.44     52.21     30.51    1.7  1.4  1.7
      256        8 15000       2     21.88     11.12     13.65     38.99     18.87    2.0  1.6  2.1
      256       64    50       1      3.08      0.46      0.52      3.70      0.69    6.7  5.9  5.4
      256       64    50       2      3.08      0.47      0.54      3.72      0.70    6.5  5.7  5.3
      256       64  1000       1      6.97      1.28      1.71      8.43      2.29    5.4  4.1  3.7
      256       64  1000       2      5.95      1.01      1.35      7.48      1.68    5.9  4.4  4.5
      256       64 15000       1     95.29     20.07     24.42    140.39     29.93    4.7  3.9  4.7
      256       64 15000       2     66.10     11.88     14.68    102.65     19.91    5.6  4.5  5.2
     4096        8    50       1      2.25      1.21      1.57      3.21      2.48    1.9  1.4  1.3
     4096        8    50       2      2.21      1.21      1.36      3.05      2.00    1.8  1.6  1.5
     4096        8  1000       1     40.24     20.84     25.17     62.91     38.22    1.9  1.6  1.6
     4096        8  1000       2     30.35     13.62     16.53     45.94     24.07    2.2  1.8  1.9
     4096        8 15000       1   1646.92    400.01    466.93   3214.03    729.90    4.1  3.5  4.4
     4096        8 15000       2    993.47    279.44    295.11   1806.88    536.37    3.6  3.4  3.4
     4096       64    50       1      8.16      1.42      1.66      8.88      2.88    5.8  4.9  3.1
     4096       64    50       2      9.27      1.70      1.91     10.66      2.98    5.4  4.8  3.6
     4096       64  1000       1    122.08     21.31     25.78    139.43     40.96    5.7  4.7  3.4
     4096       64  1000       2     81.12     14.28     16.59    103.40     30.44    5.7  4.9  3.4
     4096       64 15000       1   7567.54    320.28    371.28   8769.63    626.03   23.6 20.4 14.0
     4096       64 15000       2   5035.43    215.73    233.28   6189.85    407.52   23.3 21.6 15.2

Peak memory at 4,096 spots, 64 sections and 15,000 genes, in score-sized arrays, of which one is
the gradient that stays: list 2.02 and csr 2.20 (loop 6.27), pair 2.07 (loop 10.72).
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
