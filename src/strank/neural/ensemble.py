"""Several networks on the same spots, each stopped by sections that it does not see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray

from strank.errors import some
from strank.files import safe_name
from strank.losses import SectionLoss
from strank.neural.network import Network
from strank.neural.run import Run, Trained, make_fabric, train
from strank.neural.spots import Spots
from strank.neural.step import Names

__all__ = ["train_ensemble"]

_LONGEST = 100

Make = Callable[[NDArray[np.int64]], tuple[Network, SectionLoss]]


def train_ensemble(
    make: Make, spots: Spots, names: Names, turns: Sequence[tuple[int, ...]], run: Run
) -> list[tuple[Network, Trained]]:
    """Train one network for every turn.

    Parameters
    ----------
    make
        Makes a network, with first weights drawn from torch's generator, and its objective, for
        the rows that it is trained on.
    spots, names
        As in `strank.neural.run.train`.
    turns
        Codes of the sections that each network does not see.
    run
        How; in its folder every network has one of its own, named by those sections.
    """
    trained, fabric = [], make_fabric(run.machine)
    for number, held_out in enumerate(turns):
        without = [names.sections[code] for code in held_out]
        seed = int(np.random.SeedSequence([run.seed, number]).generate_state(1)[0])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network, loss = make(np.flatnonzero(~np.isin(spots.section, held_out)))
        own = replace(
            run,
            seed=seed,
            held_out=held_out,
            folder=run.folder and run.folder / _folder_name(without),
            title=run.title
            and f"{run.title} {number + 1} of {len(turns)}, without {some(without)}",
        )
        trained.append((network, train(network, loss, spots, names, own, fabric)))
    return trained


def _folder_name(sections: Sequence[str]) -> str:
    name = f"without-{safe_name('+'.join(sections))}"
    if len(name) <= _LONGEST:
        return name
    # No file system takes hundreds of names in one.
    return f"{name[:_LONGEST]}~{sha256(name.encode()).hexdigest()[:8]}"
