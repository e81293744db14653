"""Features of spots, sections and cohorts: resumed, and shared by processes."""

from __future__ import annotations

import json
import os
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
from strank.cohort.store import features_path, read_h5ad, read_section, section_names, write_h5ad
from strank.encoders.backbone import on_gpu
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.registry import get_encoder
from strank.encoders.tiles import TileBatch, check_scale, encode_batches
from strank.errors import InputError, some
from strank.files import sha256
from strank.progress import Advance, Say
from strank.slides.slide import Slide, slide_of
from strank.storage import Claim, check_seal, tidy, writing

_DTYPES = ("float32", "float16")
# More processes bring nothing: so many feed one GPU.
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Embedded:
    """What `embed` did for a section; ``done_before`` if its features were there already."""

    section: str
    n_spots: int
    done_before: bool


def embed(
    cohort: Path | str,
    encoder: str | Encoder = "morphology",
    *,
    weights: Path | str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    advance: Advance | None = None,
    say: Say | None = None,
) -> list[Embedded]:
    """Turn the image around every spot of a cohort into features, kept beside the counts.

    Features lie in ``features/<encoder>/<section>.h5ad``; `strank.read_cohort` puts them into
    ``obsm[<encoder>]``. A section counts as done when its features come from the same encoder (all
    its facts), the same image and the same spots. A run that was killed goes on after the last
    batch that it finished. Several processes may work on one cohort, one a GPU say: each takes
    sections that no other has, and at the end waits for the others.

    Parameters
    ----------
    cohort
        Folder of the cohort.
    encoder
        A name, as `strank.encoders.get_encoder` takes it, or an encoder of your own. An image
        network runs on the first GPU, if there is one.
    weights
        File with the weights of a network of the catalogue, in place of those on the hub.
    dtype
        How features are stored, ``"float32"`` or ``"float16"``; if ``None`` as they are, and new
        ones in ``float32``.
    precision
        What a GPU computes in, ``"bf16"``, ``"fp16"`` or ``"float32"``; if ``None`` bf16 where it
        can.
    batch_size
        Spots that are read and encoded at a time; one batch is read while another is encoded.
        Features are the same, of an image network but for the rounding of float32.
    workers
        Processes that read tiles; 0 for threads of this process, faster for an encoder on the CPU.
        If ``None``, up to 8 for one on a GPU, and 0 else. Features are the same.
    advance
        Called with the number of spots done, for a progress bar.
    say
        Called with what a user wants to know, such as why a section is embedded again.

    Returns
    -------
    list[Embedded]
        For each section its name, its number of spots and whether it was done before.

    Raises
    ------
    InputError
        For an unknown encoder, dtype or precision, a section or image that cannot be read, an image
        that changed since the import or whose pixels are far too coarse, features that are not
        finite, or a full disk.

    Examples
    --------
    >>> import tempfile
    >>> from strank.io import read_st, write_sections
    >>> from strank.simulate import TissueDesign, simulate_cohort
    >>> folder = Path(tempfile.mkdtemp())
    >>> small = TissueDesign(side_um=600)
    >>> _ = simulate_cohort(folder / "st", n_patients=1, n_sections=1, tissue=small)
    >>> _ = write_sections([read_st(folder / "st", pitch_um=200)], folder / "cohort")
    >>> embed(folder / "cohort")
    [Embedded(section='A1', n_spots=..., done_before=False)]
    >>> embed(folder / "cohort")
    [Embedded(section='A1', n_spots=..., done_before=True)]
    """
    if isinstance(encoder, str):
        encoder = get_encoder(encoder, weights=None if weights is None else Path(weights))
    elif weights is not None:
        raise InputError("`weights` are for an encoder that is given by its name")
    encoder, there = on_gpu(encoder, precision)
    if workers is None:
        workers = min(_MOST_WORKERS, os.cpu_count() or 1) if there else 0
    run = _Run(Path(cohort), encoder, dtype, batch_size, advance or _ignore, say or _ignore)
    n_spots = {name: run.look(name) for name in section_names(run.folder)}
    # At once and before all else, so that it does not count as speed.
    run.advance(sum(n for name, n in n_spots.items() if name not in run.todo))
    with run:
        # Nobody waits while others may wait for what it has not finished.
        for wait in (False, True):
            if run.todo:
                batches = run.batches(wait=wait)
                encoded = encode_batches(batches, encoder, workers=workers, say=say)
                with closing(encoded):
                    for rows in encoded:
                        run.add(rows)
    return [Embedded(name, n, name not in run.embedded) for name, n in n_spots.items()]


def embed_spots(
    slide: Slide,
    centres: NDArray[np.float64],
    encoder: Encoder,
    *,
    batch_size: int = 64,
    workers: int = 0,
    advance: Advance | None = None,
    say: Say | None = None,
) -> NDArray[np.float32]:
    """Features at any positions ``[n_spots, 2]`` of a slide, ``float32`` ``[n_spots, n_features]``.

    ``centres`` are (x, y) in pixels of the image; the other arguments are those of `embed`.
    """
    # Besides the features, memory holds the patches of three batches, and of two more a worker.
    check_scale(slide, encoder)
    out = np.empty((len(centres), len(encoder.feature_names)), np.float32)
    starts = range(0, len(centres), batch_size)
    batches = (TileBatch(slide, centres[start : start + batch_size]) for start in starts)
    features = encode_batches(batches, encoder, workers=workers, say=say)
    for start, rows in zip(starts, features, strict=True):
        out[start : start + len(rows)] = rows
        if advance is not None:
            advance(len(rows))
    return out


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
    todo: list[str] = field(default_factory=list)  # sections that lack features
    embedded: set[str] = field(default_factory=set)  # those that this run completed
    _under_way: deque[_Work] = field(default_factory=deque)
    _claims: ExitStack = field(default_factory=ExitStack)

    def __post_init__(self) -> None:
        if self.dtype not in (None, *_DTYPES):
            raise InputError(f"dtype {self.dtype!r}: choose one of {', '.join(_DTYPES)}")

    def __enter__(self) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self._under_way.clear()
        self._claims.close()

    def look(self, name: str) -> int:
        """Count the spots of a section, and put it on the list if it lacks features."""
        section = read_h5ad(self.folder / f"{name}.h5ad", backed="r")
        lacks = self._lacks(name, section)
        section.file.close()
        if lacks is not None:
            self.todo.append(name)
        else:
            self._sweep(features_path(self.folder, self.encoder.name, name))
        if lacks:
            self.say(f"section {name}: embedded again, because {lacks}")
        return int(section.n_obs)

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
        if self._lacks(name, section) is None:
            self.advance(section.n_obs)
            lock.release()
            return None
        slide = slide_of(section)
        check_scale(slide, self.encoder)
        stat = slide.path.stat()
        belongs_to = _facts(section, self.encoder) | {"image": [stat.st_size, stat.st_mtime_ns]}
        shape = section.n_obs, len(self.encoder.feature_names)
        part = Part(_beside(path, "part"), belongs_to, shape, self.dtype or "float32")
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

    def _sweep(self, path: Path) -> None:
        """Remove what a run has left that was killed when the features were written."""
        tidy(path)
        part = _beside(path, "part")
        if part.exists() or Claim.place(path).exists():
            claim = Claim.take(path, wait=False)
            if claim is not None:
                part.unlink(missing_ok=True)
                claim.release()

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

    def _lacks(self, name: str, section: AnnData) -> str | None:
        """Say why a section's features are not what they should be; ``None`` if they are.

        Empty if there are none.
        """
        path = features_path(self.folder, self.encoder.name, name)
        if not path.is_file():
            return ""
        try:
            check_seal(path)
            stored = read_h5ad(path, backed="r")
            uns, dtype = dict(stored.uns), stored.X.dtype
            stored.file.close()
            facts, now = json.loads(uns["encoder"]), encoder_facts(self.encoder)
            same_spots = uns["spots_sha256"] == spots_checksum(section)
        except (InputError, KeyError, ValueError):
            return f"{path} is damaged"
        changed = [key for key in now | facts if facts.get(key) != now.get(key)]
        if changed:
            was = ", ".join(f"{key} was {facts.get(key)}, now {now.get(key)}" for key in changed)
            return f"the encoder changed: {was}"
        if not same_spots:
            return "its spots or its image changed"
        if self.dtype not in (None, dtype):
            return f"its features are stored as {dtype}, not {self.dtype}"
        return None


def _facts(section: AnnData, encoder: Encoder) -> dict[str, Any]:
    facts = json.dumps(encoder_facts(encoder))
    return {"encoder": facts, "spots_sha256": spots_checksum(section)}


def _known(encoder: Encoder) -> dict[str, str]:
    """List what is worth knowing of an encoder, but makes no other features."""
    known = {name: getattr(encoder, name, None) for name in ("revision", "precision")}
    return {name: str(value) for name, value in known.items() if value is not None}


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.stem}.{suffix}")


def _ignore(_: object) -> None:
    pass
