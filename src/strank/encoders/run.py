"""A run over the sections of a cohort: resumed, and shared by processes."""

from __future__ import annotations

import json
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import DTypeLike, NDArray

from strank.cohort.contract import section_info, spots_checksum
from strank.cohort.folder import features_path
from strank.cohort.store import read_section, write_h5ad
from strank.encoders.backbone import on_gpu
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.stored import lacks, part_of
from strank.encoders.tiles import TileBatch, check_scale, encode_batches, usual_workers
from strank.errors import InputError, some
from strank.files import sha256
from strank.progress import Advance, Say
from strank.slides.slide import Slide, slide_of
from strank.storage import Claim, writing


def embed_sections(
    folder: Path,
    encoder: Encoder,
    todo: list[str],
    *,
    dtype: str | None,
    precision: str | None,
    batch_size: int,
    workers: int | None,
    advance: Advance,
    say: Say,
) -> set[str]:
    """Embed sections, or wait for those who do; which of them this run completed."""
    encoder, there = on_gpu(encoder, precision)
    workers = usual_workers(there) if workers is None else workers
    with _Run(folder, encoder, dtype, batch_size, advance, say, todo) as run:
        # Nobody waits while others may wait for what it has not finished.
        for wait in (False, True):
            if run.todo:
                encoded = encode_batches(run.batches(wait=wait), encoder, workers=workers, say=say)
                with closing(encoded):
                    for rows in encoded:
                        run.add(rows)
    return run.embedded


class Part:
    """Features of a section under way: those of the first ``n_done`` spots outlive the process.

    The file is a line of JSON, what they belong to, all rows, and a checksum of each; a row whose
    checksum is another is not known yet. A file of other facts or length is begun anew.
    """

    def __init__(
        self, path: Path, belongs_to: dict[str, Any], shape: tuple[int, int], dtype: DTypeLike
    ) -> None:
        self.path = path
        self.features: NDArray = np.full(shape, np.nan, dtype)
        self.n_done = 0
        facts = belongs_to | {"dtype": self.features.dtype.name, "shape": shape}
        header = (json.dumps(facts) + "\n").encode()
        self._start, self._sums = len(header), len(header) + self.features.nbytes
        if path.is_file() and path.stat().st_size == self._sums + 4 * len(self.features):
            with path.open("rb") as file:
                if file.read(len(header)) == header:
                    self.features = np.fromfile(file, dtype, shape[0] * shape[1]).reshape(shape)
                    known = np.fromfile(file, np.uint32) == _row_sums(self.features, 0)
                    self.n_done = len(known) if known.all() else int(known.argmin())
                    return
        # Written, not mapped: where a disk is full, a write to a mapped file kills the process.
        with writing(path), path.open("wb") as file:
            file.write(header)
            file.write(self.features.data)
            file.write(np.zeros(len(self.features), np.uint32).data)

    def add(self, rows: NDArray) -> None:
        """Keep the features of the next spots."""
        first, self.n_done = self.n_done, self.n_done + len(rows)
        self.features[first : self.n_done] = rows
        with writing(self.path), self.path.open("r+b") as file:
            file.seek(self._start + first * self.features[:1].nbytes)
            file.write(self.features[first : self.n_done].data)
            file.seek(self._sums + 4 * first)
            file.write(_row_sums(self.features[first : self.n_done], first).data)


def _row_sums(rows: NDArray, first: int) -> NDArray[np.uint32]:
    """Checksum of every row and its place."""
    sums = [zlib.crc32(row.data, first + i + 1) for i, row in enumerate(rows)]
    return np.array(sums, np.uint32)


@dataclass
class _Work:
    """A section that is being embedded."""

    section: AnnData
    slide: Slide
    image_sha256: Future[str]
    path: Path
    part: Part
    lock: Claim


@dataclass
class _Run:
    """A run over a cohort: which sections it has claimed, and how far they are."""

    folder: Path
    encoder: Encoder
    dtype: str | None
    batch_size: int
    advance: Advance
    say: Say
    todo: list[str]  # sections that lack features
    embedded: set[str] = field(default_factory=set)  # those that this run completed
    _under_way: deque[_Work] = field(default_factory=deque)
    _claims: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._under_way.clear()
        self._claims.close()

    def batches(self, *, wait: bool) -> Iterator[TileBatch]:
        """Claim what is to be done, section by section, and yield what each still lacks.

        With ``wait`` for other processes nothing remains to be done; else it may.
        """
        names, self.todo = self.todo, []
        with ThreadPoolExecutor(1) as hashing:
            for name in names:
                work = self._take(name, hashing, wait=wait)
                if work is not None:
                    self._under_way.append(work)
                    centres = np.asarray(work.section.obsm["spatial"])
                    for start in range(work.part.n_done, len(centres), self.batch_size):
                        stop = start + self.batch_size
                        yield TileBatch(work.slide, centres[start:stop])

    def add(self, rows: NDArray[np.float32]) -> None:
        """Keep the features of the next batch, and write the section that they complete."""
        work = self._under_way[0]
        with np.errstate(over="ignore"):
            rows = rows.astype(work.part.features.dtype)
        wrong = ~np.isfinite(rows).all(1)
        if wrong.any():
            spots = work.section.obs_names[work.part.n_done :][: len(rows)][wrong]
            raise InputError(
                f"section {work.path.stem}: {self.encoder.name} features of spot {some(spots)} "
                f"are not finite as {rows.dtype}"
            )
        work.part.add(rows)
        self.advance(len(rows))
        if work.part.n_done == work.section.n_obs:
            self._finish(self._under_way.popleft())

    def _take(self, name: str, hashing: ThreadPoolExecutor, *, wait: bool) -> _Work | None:
        path = features_path(self.folder, self.encoder.name, name)
        lock = self._claim(path, wait=wait)
        if lock is None:
            self.todo.append(name)
            return None
        section = read_section(self.folder / f"{name}.h5ad")
        if lacks(path, self.encoder, spots_checksum(section), self.dtype) is None:
            self.advance(section.n_obs)
            lock.release()
            return None
        slide = slide_of(section)
        check_scale(slide, self.encoder)
        stat = slide.path.stat()
        belongs_to = _facts(section, self.encoder) | {"image": [stat.st_size, stat.st_mtime_ns]}
        shape = section.n_obs, len(self.encoder.feature_names)
        part = Part(part_of(path), belongs_to, shape, self.dtype or "float32")
        work = _Work(section, slide, hashing.submit(sha256, slide.path), path, part, lock)
        if part.n_done < section.n_obs:
            # Batches are those of a run that nothing stopped: a network may round by their size.
            part.n_done -= part.n_done % self.batch_size
        self.advance(part.n_done)
        if part.n_done == section.n_obs:
            self._finish(work)
            return None
        return work

    def _claim(self, path: Path, *, wait: bool) -> Claim | None:
        """Have a section's features to itself."""
        if wait:
            self.say(f"section {path.stem}: another run is at it; waiting ({Claim.place(path)})")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            claim = Claim.take(path, wait=wait)
        if claim is not None:
            self._claims.callback(claim.release)
        return claim

    def _finish(self, work: _Work) -> None:
        section, info = work.section, section_info(work.section)
        if work.image_sha256.result() != info.image_sha256:
            work.part.path.unlink()
            raise InputError(f"{info.image}: the image changed since the import; import again")
        features = AnnData(
            X=work.part.features,
            obs=pd.DataFrame(index=section.obs_names),
            var=pd.DataFrame(index=pd.Index(self.encoder.feature_names)),
            uns=_facts(section, self.encoder) | _known(self.encoder),
        )
        # Not compressed: features hardly shrink, and a GPU would wait for it.
        write_h5ad(features, work.path, compression=None)
        work.part.path.unlink()
        work.lock.release()
        self.embedded.add(work.path.stem)


def _facts(section: AnnData, encoder: Encoder) -> dict[str, Any]:
    facts = json.dumps(encoder_facts(encoder))
    return {"encoder": facts, "spots_sha256": spots_checksum(section)}


def _known(encoder: Encoder) -> dict[str, str]:
    """List what is worth knowing of an encoder, but makes no other features."""
    known = {name: getattr(encoder, name, None) for name in ("revision", "precision")}
    return {name: str(value) for name, value in known.items() if value is not None}
