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

Least of 3 (large) to 200 (small) repeats in float32; torch 2.15, AMD EPYC, 2 cores, AVX-512, 1 MB
of L2 a core. Others used the machine: in some rows of two threads the second core was taken, which
costs strank, of many short operations, more than the loop. Where both cores are taken, torch waits
time slices of 4 ms whenever it divides work between threads: one index_add of 252 x 50 took 72 ms,
not 0.03, and the losses of 256 spots 160 ms, the loop 4. One thread is then the faster by far.

                                     milliseconds                                  times the loop
    spots sections genes threads loop list      list       csr loop pair      pair   list  csr pair
      256        8    50       1      0.59      0.41      0.49      0.73      0.61    1.4  1.2  1.2
      256        8    50       2      0.61      0.49      0.57      0.80      0.71    1.2  1.1  1.1
      256        8  1000       1      1.97      1.21      1.62      3.28      2.23    1.6  1.2  1.5
      256        8  1000       2      1.77      0.90      1.25      2.95      1.55    2.0  1.4  1.9
      256        8 15000       1     30.42     17.20     22.41     52.93     28.42    1.8  1.4  1.9
      256        8 15000       2     24.68     11.34     14.03     43.70     18.74    2.2  1.8  2.3
      256       64    50       1      2.99      0.46      0.52      3.61      0.68    6.5  5.7  5.3
      256       64    50       2      2.99      0.47      0.54      3.62      0.67    6.4  5.6  5.4
      256       64  1000       1      6.87      1.34      1.73      8.51      2.26    5.1  4.0  3.8
      256       64  1000       2      5.91      1.08      1.36      7.50      1.61    5.5  4.3  4.6
      256       64 15000       1    100.68     19.87     25.02    116.12     28.70    5.1  4.0  4.0
      256       64 15000       2     58.76     21.02     23.02     86.53     22.22    2.8  2.6  3.9
     4096        8    50       1      2.37      1.31      1.59      3.40      2.73    1.8  1.5  1.2
     4096        8    50       2      3.48      1.96      1.99      5.30      3.04    1.8  1.7  1.7
     4096        8  1000       1     41.39     21.29     25.60     65.90     36.58    1.9  1.6  1.8
     4096        8  1000       2     30.59     26.14     25.87     53.14     29.28    1.2  1.2  1.8
     4096        8 15000       1   1529.92    389.52    457.19   3071.66    635.74    3.9  3.3  4.8
     4096        8 15000       2    976.92    507.13    293.59   1977.51    411.63    1.9  3.3  4.8
     4096       64    50       1      8.10      1.51      1.67      8.98      2.83    5.4  4.9  3.2
     4096       64    50       2      7.14      1.18      1.37      7.98      2.21    6.1  5.2  3.6
     4096       64  1000       1    117.77     21.20     26.36    142.44     36.06    5.6  4.5  4.0
     4096       64  1000       2     90.39     14.75     16.61     99.57     22.36    6.1  5.4  4.5
     4096       64 15000       1   7278.87    338.74    381.70   9218.95    529.14   21.5 19.1 17.4
     4096       64 15000       2   4694.13    202.07    220.86   6667.61    309.03   23.2 21.3 21.6

Peak memory at 4,096 spots, 64 sections and 15,000 genes, in score-sized arrays, of which one is
the gradient that stays: list 2.04 and csr 2.22 (loop 6.31), pair 2.04 (loop 10.75).
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
# Repeats add up to so many elements; between 3 and 100 of them.
ELEMENTS = 20_000_000


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
    repeats = min(max(ELEMENTS // inputs.scores.numel(), 3), 100)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        ms = race(contestants, repeats)
        row = "{:5} {:8} {:5}".format(*size) + f" {threads:7} "
        row += " ".join(f"{value:9.2f}" for value in ms.values()) + "  "
        for name, loop in [("list", "loop list"), ("csr", "loop list"), ("pair", "loop pair")]:
            row += f"{ms[loop] / ms[name]:5.1f}"
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
    print(f"{'milliseconds':>45}{'times the loop':>48}")
    print(f"spots sections genes threads {names}   list  csr pair")
    genes = (50, 1000) if options.quick else (50, 1000, 15_000)
    for n_spots, n_sections, n_genes in itertools.product((256, 4096), (8, 64), genes):
        if not options.quick or n_spots * n_genes < 1_000_000:
            compare((n_spots, n_sections, n_genes))
    measure_memory((4096, 64, 1000) if options.quick else LARGEST)


if __name__ == "__main__":
    main()
