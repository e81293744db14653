"""A run over the sections of a cohort: each is whole, or made again."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.contract import section_info, spots_checksum
from strank.cohort.folder import features_path
from strank.cohort.store import read_section, write_h5ad
from strank.encoders.backbone import on_gpu
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.tiles import TileBatch, check_scale, encode_batches, usual_workers
from strank.errors import InputError, some
from strank.files import check_room, sha256
from strank.progress import Advance, Say
from strank.slides.slide import Slide, slide_of
from strank.units import Outcome, outcomes
from strank.where import Where


@dataclass(frozen=True)
class EmbeddingRun:
    """What is the same for all sections."""

    folder: Path
    encoder: Encoder
    dtype: str | None
    precision: str | None
    batch_size: int
    workers: int | None

    @cached_property
    def placed(self) -> tuple[Encoder, bool]:
        """The encoder where it is used, and whether that is a GPU."""
        return on_gpu(self.encoder, self.precision)


def embed_sections(
    run: EmbeddingRun, names: list[str], where: Where, *, advance: Advance, say: Say
) -> Iterator[Outcome[Any]]:
    """Embed sections, wherever that is; what fails in one does not stop the others."""
    if where.is_here:
        yield from _one_after_another(run, names, advance, say)
        return
    for outcome in outcomes(partial(_embed_one, run), names, where, say=say):
        for line in outcome.said:
            say(line)
        advance(outcome.result or 0)
        yield outcome


def _embed_one(run: EmbeddingRun, name: str, say: Say) -> int:
    n_spots = dict[str, int]()
    # Threads read: with processes of its own each section would wait for these to start.
    for _ in _stream(run, [name], n_spots, run.workers or 0, lambda _: None, say):
        pass
    return n_spots[name]


def _one_after_another(
    run: EmbeddingRun, names: list[str], advance: Advance, say: Say
) -> Iterator[Outcome[Any]]:
    there = run.placed[1]
    workers = usual_workers(there) if run.workers is None else run.workers
    rest, alone = list(names), deque[str]()
    while rest or alone:
        now = [alone.popleft()] if alone else rest
        # Spots done of all that were begun, and names of those that are whole.
        begun, whole = dict[str, int](), set[str]()
        failed: Exception | None = None
        try:
            for name in _stream(run, now, begun, workers, advance, say):
                whole.add(name)
                yield Outcome(name)
        except Exception as error:
            failed = error
        if now is rest:
            rest = rest[len(begun) :]
        open_ones = [name for name in begun if name not in whole]
        if failed is not None and len(open_ones) == 1:
            yield Outcome.of(open_ones[0], failed)
        elif failed is not None and not open_ones:
            raise failed
        else:
            # The next section is read ahead, so it may be any of these.
            alone.extend(open_ones)
            advance(-sum(begun[name] for name in open_ones))


@dataclass
class _Work:
    """A section that is being embedded."""

    section: AnnData
    slide: Slide
    image_sha256: Future[str]
    path: Path
    features: NDArray
    n_done: int = 0


def _stream(
    run: EmbeddingRun,
    names: Iterable[str],
    begun: dict[str, int],
    workers: int,
    advance: Advance,
    say: Say,
) -> Iterator[str]:
    """Embed sections, of which the next is read while one is encoded; yield what is written."""
    encoder, _ = run.placed
    under_way = deque[_Work]()

    def batches() -> Iterator[TileBatch]:
        with ThreadPoolExecutor(1) as hashing:
            for name in names:
                begun[name] = 0
                work = _begin(run, name, hashing)
                under_way.append(work)
                centres = np.asarray(work.section.obsm["spatial"])
                for start in range(0, len(centres), run.batch_size):
                    yield TileBatch(work.slide, centres[start : start + run.batch_size])

    with closing(encode_batches(batches(), encoder, workers=workers, say=say)) as encoded:
        for rows in encoded:
            work = under_way[0]
            _add(work, rows, encoder)
            begun[work.path.stem] = work.n_done
            advance(len(rows))
            if work.n_done == len(work.features):
                _finish(under_way.popleft(), encoder)
                yield work.path.stem


def _begin(run: EmbeddingRun, name: str, hashing: ThreadPoolExecutor) -> _Work:
    encoder, _ = run.placed
    path = features_path(run.folder, encoder.name, name)
    section = read_section(run.folder / f"{name}.h5ad")
    slide = slide_of(section)
    check_scale(slide, encoder)
    shape = section.n_obs, len(encoder.feature_names)
    features = np.empty(shape, run.dtype or "float32")
    check_room(path.parent, features.nbytes)
    return _Work(section, slide, hashing.submit(sha256, slide.path), path, features)


def _add(work: _Work, rows: NDArray[np.float32], encoder: Encoder) -> None:
    """Keep the features of the next batch."""
    with np.errstate(over="ignore"):
        rows = rows.astype(work.features.dtype)
    wrong = ~np.isfinite(rows).all(1)
    if wrong.any():
        spots = work.section.obs_names[work.n_done :][: len(rows)][wrong]
        raise InputError(
            f"section {work.path.stem}: {encoder.name} features of spot {some(spots)} "
            f"are not finite as {rows.dtype}"
        )
    work.features[work.n_done : work.n_done + len(rows)] = rows
    work.n_done += len(rows)


def _finish(work: _Work, encoder: Encoder) -> None:
    section, info = work.section, section_info(work.section)
    if work.image_sha256.result() != info.image_sha256:
        raise InputError(f"{info.image}: the image changed since the import; import again")
    features = AnnData(
        X=work.features,
        obs=pd.DataFrame(index=section.obs_names),
        var=pd.DataFrame(index=pd.Index(encoder.feature_names)),
        uns=_facts(section, encoder) | known_of(encoder),
    )
    # Not compressed: features hardly shrink, and a GPU would wait for it.
    write_h5ad(features, work.path, compression=None)


def _facts(section: AnnData, encoder: Encoder) -> dict[str, Any]:
    facts = json.dumps(encoder_facts(encoder))
    return {"encoder": facts, "spots_sha256": spots_checksum(section)}


def known_of(encoder: Encoder) -> dict[str, str]:
    """List what is worth knowing of an encoder, but makes no other features."""
    known = {name: getattr(encoder, name, None) for name in ("revision", "precision")}
    return {name: str(value) for name, value in known.items() if value is not None}
