"""Features of tiles over slides, in files of their own: any model of their encoder scores them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.library import add_library
from strank.cohort.store import read_h5ad, write_h5ad
from strank.encoders.backbone import on_gpu
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.embedding import encoder_to_embed
from strank.encoders.run import known_of
from strank.encoders.stored import check_dtype
from strank.encoders.tiles import check_scale, embed_spots, usual_workers
from strank.errors import InputError
from strank.files import check_room, claims, sha256
from strank.progress import Advance, Bar, Say, ignore
from strank.slide_runs import (
    SlideEntry,
    Subject,
    check_done,
    entries_of,
    is_many,
    open_subject,
    run_slides,
)
from strank.slides.slide import Slide, check_override, picture_for
from strank.slides.tissue import find_tissue, share_within, tile_centres, without_ignored
from strank.storage import is_whole
from strank.version import __version__
from strank.where import Where

# Features of all tiles stand in memory at once, since a head may subtract their mean; this many
# bytes of them, were the whole slide tissue.
_MOST_BYTES = 8 * 2**30
FEATURES = "features.h5ad"
GRID_FACTS = ("um_per_pixel", "stride_um", "tile_um")  # of `grid_facts`


def grid_facts(
    slide: Slide, *, tile_um: float, stride_um: float, n_features: int
) -> dict[str, Any]:
    """State what a grid of tiles hangs on; it becomes ``uns["strank"]``."""
    if not slide.um_per_pixel <= stride_um < float("inf"):
        raise InputError(
            f"`stride_um` must be at least a pixel of {slide.path} ({slide.um_per_pixel:g} µm); "
            f"got {stride_um:g}"
        )
    width, height = slide.size
    positions = width * height * (slide.um_per_pixel / stride_um) ** 2
    n_bytes = 4 * positions * n_features
    if n_bytes > _MOST_BYTES:
        raise InputError(
            f"`stride_um={stride_um:g}`: up to {positions:,.0f} tiles on {slide.path}, whose "
            f"features would take {n_bytes / 2**30:.0f} GiB; "
            f"{np.ceil(10 * stride_um * (n_bytes / _MOST_BYTES) ** 0.5) / 10:g} µm is possible "
            "there"
        )
    return {
        "image": str(slide.path.resolve()),
        "um_per_pixel": slide.um_per_pixel,
        # Side of the area that must hold tissue.
        "tile_um": tile_um,
        "stride_um": stride_um,
    }


def lay_tiles(slide: Slide, name: str, facts: Mapping[str, Any]) -> AnnData:
    """Lay tiles over the tissue, as `grid_facts` say: no counts, and no features yet."""
    tissue, tile_um, stride_um = find_tissue(slide), facts["tile_um"], facts["stride_um"]
    centres = tile_centres(tissue, stride_um=stride_um, tile_um=tile_um)
    if not len(centres):
        raise InputError(f"{slide.path}: no tile of {tile_um:g} µm is half full of tissue")
    unseen = share_within(tissue.ignored, tissue.um_per_pixel, centres, tile_um)
    tiles = AnnData(
        obs=pd.DataFrame(
            {"section": pd.Categorical([name] * len(centres)), "ignored": unseen},
            index=pd.Index([f"tile{i}" for i in range(len(centres))]),
        ),
        obsm={"spatial": centres / slide.um_per_pixel},
        uns={"strank": {**facts, "ignored": "; ".join(tissue.notes)}},
    )
    add_library(tiles, name, picture_for(slide, stride_um))
    return tiles


@claims("output")
def embed_slides(
    slides: Subject | Iterable[Subject] | Mapping[str, Subject] | pd.DataFrame,
    output: Path | str,
    encoder: str | Encoder = "morphology",
    *,
    um_per_pixel: float | None = None,
    um_per_pixel_override: bool = False,
    stride_um: float | None = None,
    weights: Path | str | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    jobs: int = 1,
    dask: str | None = None,
    shard: str | None = None,
    advance: Advance | None = None,
    say: Say | None = None,
) -> dict[str, Path]:
    """Find the tissue of slides and turn tiles over it into features, kept for `strank.predict`.

    What an image network sees of a slide takes hours, and a score of it seconds: with
    ``strank.predict(..., features=output)`` any number of models of this encoder score the same
    features. Each file is an AnnData that scanpy opens.

    Parameters
    ----------
    slides
        As `strank.predict` takes them: slides, their files, or a table with a row a slide.
    output
        Folder for ``<name>/features.h5ad``: ``X`` = features ``[n_tiles, n_features]``, the rest as
        `strank.predict` gives it; and ``slides.csv``, which says what became of each slide. What is
        there of the same image, encoder and tiles is not made again.
    encoder
        A name, as `strank.encoders.get_encoder` takes it, or an encoder of your own.
    um_per_pixel
        Size of a pixel of the slides in µm, if the files do not say it.
    um_per_pixel_override
        Take ``um_per_pixel`` even where a file says another scale (by more than 5 %).
    stride_um
        µm between tiles, and side of the area that must be half full of tissue. For the map that
        `strank.predict` draws by itself, a spot's diameter of the model (of a head that looks at
        neighbours the distance of its spots, where tiles at the border may be others); if ``None``,
        the smallest window of the encoder, so that windows lie side by side.
    weights, precision, batch_size, workers
        As in `strank.embed`.
    dtype
        How features are stored, ``"float32"`` (if ``None``) or ``"float16"``.
    jobs, dask, shard
        As in `strank.predict`: elsewhere, or only a share of the slides.
    advance
        Called with the number of tiles done; of slides, where they are embedded elsewhere.
    say
        Called with what a user wants to know, and with what is wrong with a slide that is passed
        over.

    Returns
    -------
    dict[str, Path]
        The file of each slide, by name.

    Raises
    ------
    InputError
        For what `strank.predict` refuses of slides and strides, an unknown encoder or dtype, and
        features that are not finite: after the other slides, as ``slides.csv`` has it.

    See Also
    --------
    strank.embed : features of the spots of a cohort.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> pixels = np.full((300, 300, 3), 240, np.uint8)
    >>> pixels[50:250, 50:250] = np.random.default_rng(0).integers(60, 200, (200, 200, 3))
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.fromarray(pixels).save(folder / "slide.png")
    >>> found = embed_slides([folder / "slide.png"], folder / "tiles", um_per_pixel=2.0)
    >>> read_h5ad(found["slide"]).shape
    (16, 268)
    """
    looking = TileEmbedding(
        encoder_to_embed(encoder, weights),
        stride_um,
        um_per_pixel,
        um_per_pixel_override,
        dtype or "float32",
        precision,
        batch_size,
        workers,
    )
    where, place = Where(jobs, dask, shard), Path(output)
    entries = entries_of(slides if is_many(slides) else [slides], place)
    inside, step = (advance, ignore) if where.is_here else (None, advance or ignore)
    bar = partial(_within, inside)
    done, failed = looking.run(entries, place, where, bar=bar, tell=say or ignore, advance=step)
    check_done(done, failed, place, where)
    return {name: Path(row["features"]) for name, row in done.items()}


@dataclass(frozen=True)
class TileEmbedding:
    """How tiles are embedded, the same for all slides: what travels to processes."""

    encoder: Encoder
    stride_um: float | None
    um_per_pixel: float | None
    override: bool
    dtype: str
    precision: str | None
    batch_size: int
    workers: int | None

    def __post_init__(self) -> None:
        """Refuse what no slide could be embedded with, before any is opened."""
        check_override(self.um_per_pixel, self.override)
        check_dtype(self.dtype)
        if self.stride_um is not None and not 0 < self.stride_um < float("inf"):
            raise InputError(f"`stride_um` must be above 0, in µm; got {self.stride_um:g}")
        for name, value, least in (
            ("batch_size", self.batch_size, 1),
            ("workers", self.workers or 0, 0),
        ):
            if value < least:
                raise InputError(f"`{name}` must be at least {least}; got {value}")
        if self.precision is not None:
            _ = on_gpu(self.encoder, self.precision)

    @property
    def stride(self) -> float:
        """Distance of tiles in µm: as given, or the smallest window of the encoder."""
        if self.stride_um is not None:
            return self.stride_um
        return min(field.um for field in self.encoder.fields)

    @cached_property
    def placed(self) -> tuple[Encoder, bool]:
        """The encoder where it is used, and whether that is a GPU."""
        return on_gpu(self.encoder, self.precision)

    def run(
        self, entries: list[SlideEntry], place: Path, where: Where, *, bar: Bar, **heard: Any
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Embed slides, each into a folder of its own; what is ``heard`` is as `run_slides` has."""
        work = partial(_embed_one, self, place, bar)
        facts = {
            "kind": "features",
            "encoder": encoder_facts(self.encoder),
            "dtype": self.dtype,
            "stride_um": self.stride,
            "um_per_pixel": self.um_per_pixel,
            "strank_version": __version__,
        }
        return run_slides(entries, work, place, where, facts, **heard)


def _within(advance: Advance | None, *_: Any) -> AbstractContextManager[Advance | None]:
    return nullcontext(advance)


def _embed_one(
    how: TileEmbedding, place: Path, bar: Bar, entry: SlideEntry, say: Say
) -> dict[str, Any]:
    """Embed the tiles of a slide, or find them embedded before."""
    path, encoder = place / entry.name / FEATURES, how.placed[0]
    scale = how.um_per_pixel if entry.um_per_pixel is None else entry.um_per_pixel
    slide, _ = open_subject(entry.subject, scale, how.override)
    check_scale(slide, encoder)
    width = len(encoder.feature_names)
    facts = grid_facts(slide, tile_um=how.stride, stride_um=how.stride, n_features=width)
    facts |= {"image_sha256": sha256(slide.path), "strank_version": __version__}
    facts["feature_names_sha256"] = _names_digest(encoder.feature_names)
    known = json.dumps(encoder_facts(encoder))
    tiles = _made_before(path, facts, known, how.dtype)
    before = tiles is not None
    if tiles is None:
        laid = lay_tiles(slide, entry.name, facts)
        check_room(place, laid.n_obs * width * np.dtype(how.dtype).itemsize)
        with bar(f"Embedding tiles of {slide.path.stem}", laid.n_obs) as advance:
            features = _features_at(how, slide, np.asarray(laid.obsm["spatial"]), advance, say)
        names = pd.DataFrame(index=pd.Index(encoder.feature_names))
        about = {**laid.uns, "encoder": known, **known_of(encoder)}
        tiles = AnnData(features, obs=laid.obs, var=names, obsm=dict(laid.obsm), uns=about)
        # Not compressed: features hardly shrink, and a GPU would wait for it.
        write_h5ad(tiles, path, compression=None)
    told = tiles.uns["strank"]["ignored"]
    if told:
        say(f"{entry.file}: {told}")
    found = {"features": str(path), "n_tiles": tiles.n_obs, "warnings": [told] if told else []}
    return found | {"embedded_before": before}


def _names_digest(names: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(map(str, names)).encode()).hexdigest()


def _features_at(
    how: TileEmbedding, slide: Slide, centres: NDArray, advance: Advance | None, say: Say
) -> NDArray:
    encoder, there = how.placed
    features = embed_spots(
        without_ignored(slide),
        centres,
        encoder,
        batch_size=how.batch_size,
        workers=usual_workers(there) if how.workers is None else how.workers,
        advance=advance,
        say=say,
    )
    with np.errstate(over="ignore"):
        features = features.astype(how.dtype, copy=False)
    if not np.isfinite(features).all():
        raise InputError(
            f"{slide.path}: {encoder.name} features are not finite as {how.dtype}; store them as "
            "float32, or look at the encoder"
        )
    return features


def _made_before(path: Path, facts: Mapping[str, Any], encoder: str, dtype: str) -> AnnData | None:
    """Read features of the same image, encoder and tiles."""
    if not is_whole(path):
        return None
    found = read_h5ad(path)
    stored = found.uns.get("strank", {})
    keys = (*GRID_FACTS, "image_sha256", "feature_names_sha256")
    same = all(stored.get(key) == facts[key] for key in keys)
    same &= found.uns.get("encoder") == encoder and found.X.dtype == dtype
    return found if same else None


def kept_tiles(
    folder: Path, name: str, slide: Slide, stride_um: float | None
) -> tuple[AnnData, dict[str, Any]]:
    """Read the tiles of a slide, with features in ``X``, and the facts of what gave these.

    Those of another image, scale or stride are refused.
    """
    path = folder / name / FEATURES
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; embed {slide.path}, called {name}, with `strank embed -o "
            f"{folder}` and the model's encoder, or leave `features` out"
        )
    tiles = read_h5ad(path)
    try:
        facts, encoder = tiles.uns["strank"], dict(json.loads(tiles.uns["encoder"]))
        um_per_pixel, stride, _ = (float(facts[key]) for key in GRID_FACTS)
        image, _ = str(facts["image_sha256"]), str(facts["ignored"])
        tiles.obs["ignored"] = tiles.obs["ignored"].astype(np.float32)
        whole = facts["feature_names_sha256"] == _names_digest(tiles.var_names)
        whole &= isinstance(tiles.X, np.ndarray) and tiles.X.dtype.kind == "f" and tiles.n_obs > 0
        places = np.asarray(tiles.obsm["spatial"], np.float64)
        whole &= places.shape == (tiles.n_obs, 2) and bool((places >= 0).all())
        whole &= bool((places <= slide.size).all())
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(
            f"{path}: no features of tiles of {slide.path}, as `strank embed` writes them of slides"
        )
    if image != sha256(slide.path):
        raise InputError(f"{path}: features of another image than {slide.path}; embed again")
    if um_per_pixel != slide.um_per_pixel:
        raise InputError(
            f"{path}: features at {um_per_pixel:g} µm per pixel, and {slide.path} is at "
            f"{slide.um_per_pixel:g}; embed again, or give the scale that was meant there"
        )
    if stride_um not in (None, stride):
        raise InputError(
            f"{path}: features of tiles every {stride:g} µm, and not {stride_um:g}; embed again, "
            "or leave `stride_um` out"
        )
    return tiles, encoder
