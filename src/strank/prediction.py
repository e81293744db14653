"""From slides to scores on grids of tiles over their tissue."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.cohort.in_memory import name_of
from strank.cohort.store import read_h5ad, write_h5ad
from strank.encoders.backbone import BackboneEncoder, on_gpu
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.registry import get_encoder
from strank.encoders.tiles import check_scale, embed_spots
from strank.errors import InputError
from strank.files import claims, sha256
from strank.model.novelty import novelty_of, warning_of
from strank.model.rank_model import RankModel
from strank.neural.heads import Traits
from strank.progress import Advance, Bar, Say
from strank.slide_features import FEATURES, GRID_FACTS, grid_facts, kept_tiles, lay_tiles
from strank.slide_runs import (
    SlideEntry,
    Subject,
    check_done,
    entries_of,
    is_many,
    open_subject,
    run_slides,
)
from strank.slides.slide import Slide, check_override
from strank.slides.tissue import FLUORESCENCE, is_dark_field, without_ignored
from strank.storage import is_whole
from strank.version import __version__
from strank.where import Where

_FLUORESCENCE = f"{FLUORESCENCE}; do not use this map: give the H&E image of the section"

# Share of a tile that may be padding or ink.
_CUT = 0.1


@claims("output")
def predict(
    slides: Subject | Iterable[Subject] | Mapping[str, Subject] | pd.DataFrame,
    model: RankModel | Path | str | None = None,
    output: Path | str | None = None,
    *,
    um_per_pixel: float | None = None,
    um_per_pixel_override: bool = False,
    stride_um: float | None = None,
    features: Path | str | None = None,
    encoder: str | Encoder | None = None,
    weights: Path | str | None = None,
    jobs: int = 1,
    dask: str | None = None,
    shard: str | None = None,
    advance: Advance | None = None,
    say: Say | None = None,
) -> Any:
    """Find the tissue of slides and score tiles over it.

    To score the spots of a section that has features, use `RankModel.predict`.

    Parameters
    ----------
    slides
        A whole-slide image, TIFF, JPEG or PNG; an open `Slide`; a section of a cohort, in memory or
        its ``.h5ad``, whose image is then scored. Or several of these: a mapping of names (such as
        a cohort), or a list, which is named by its files; or a table with a row a slide, a ``.csv``
        or a DataFrame: ``path`` (from the folder of the ``.csv``), and if wanted ``name``, ``mpp``
        (of that slide), ``model`` (its folder) and others, which ``slides.csv`` will have, too.
    model
        A trained model, or its folder; ``None`` where the table says it of every slide.
    output
        Folder for ``scores.h5ad``; of several slides, one folder each in it, and ``slides.csv``,
        which says what became of each; ``strank collect`` writes it where shards were run. Files
        there are whole or absent. Where the scores of the
        same image, model folder and stride are there, they are read instead of being made again.
    um_per_pixel
        Size of a pixel of the slides in µm, if the files do not say it.
    um_per_pixel_override
        Take ``um_per_pixel`` even where a file says another scale (by more than 5 %), which is
        refused otherwise.
    stride_um
        µm between tiles; if not given a spot's diameter, or for a head that looks at neighbours the
        distance of spots in training. With a smaller one tiles overlap, and the map is denser: each
        score is still of the window around its own centre.
    features
        Folder of `strank.embed_slides`: tiles lie where they lie there, and are scored by these
        features. No encoder is loaded.
    encoder
        The model's encoder, where it is a ``module:callable`` of your own, or made already.
    weights
        File with the encoder's weights, where they are not to come from the hub.
    jobs, dask, shard
        Where several slides are scored: in so many processes of one thread each, which share the
        GPUs; on the workers of a scheduler of Dask (its address or its ``.json``); only a share of
        them, ``"2/8"``, or ``"slurm"`` for what the array of jobs says. Scores are the same.
    advance
        Called with the number of tiles done; of slides, where they are scored elsewhere.
    say
        Called with what limits the scores, in words, and with what is wrong with a slide that is
        passed over.

    Returns
    -------
    AnnData, or a dict of them by name for several slides
        ``X`` = scores ``[n_tiles, n_genes]`` (natural log, float32, 0 at the mean of a gene),
        ``var`` = the panel, ``obsm["spatial"]`` = centres (x, y) in pixels of the image,
        ``obs["section"]`` = the name of the section or slide (if none is given, of its file);
        ``uns["spatial"]`` = what scanpy and squidpy draw over; ``uns["strank"]`` = image, µm per
        pixel, size and distance of tiles, and what of the image was ``ignored`` as padding or ink,
        in words;
        ``obs["ignored"]`` = its share of a tile, which windows see white. For a model that knows
        how far its training features spread, ``obs["novelty"]`` is how far a tile lies outside
        (above 1), ``obs["odd"]`` whether it does though nothing cuts it, and
        ``uns["strank_novelty"]`` has the share of such tiles and a ``warning`` (empty for none).
        ``uns["strank"]["warnings"]`` is all there is to know.
        Of several slides with ``output``, paths of the files instead, so that any number of slides
        fits into memory.

    Raises
    ------
    strank.errors.InputError
        For a slide that cannot be read, has no tissue, no known scale, or pixels far too coarse for
        the encoder; for a model or encoder that is absent or of another version; for a stride below
        a pixel or one that lays more tiles than memory could hold. With ``output``, whatever is
        wrong with one slide does not stop the others: it is kept in ``slides.csv``, and the error
        comes at the end.

    See Also
    --------
    strank.report.write_gene_maps : pictures of these scores.
    strank.report.write_slides_page : one page of several slides, as the command writes it.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> from strank.neural.heads import LinearHead
    >>> pixels = np.full((300, 300, 3), 240, np.uint8)
    >>> pixels[50:250, 50:250] = np.random.default_rng(0).integers(60, 200, (200, 200, 3))
    >>> file = Path(tempfile.mkdtemp()) / "slide.png"
    >>> Image.fromarray(pixels).save(file)
    >>> encoder = encoder_facts(get_encoder("morphology"))
    >>> panel, spots = pd.DataFrame(index=["ERBB2"]), {"spot_diameter_um": 100.0}
    >>> head = LinearHead(encoder["n_features"], 1)
    >>> model = RankModel(head, panel, encoder, {**spots, "spot_pitch_um": 200.0})
    >>> scores = predict(file, model, um_per_pixel=2.0, stride_um=50)
    >>> scores.shape, scores.uns["strank"]["stride_um"]
    ((64, 1), 50)
    """
    check_override(um_per_pixel, um_per_pixel_override)
    where, tell = Where(jobs, dask, shard), say or (lambda _: None)
    trained = model if model is None or isinstance(model, RankModel) else Path(model)
    scale = (um_per_pixel, um_per_pixel_override)
    kept = None if features is None else Path(features)
    scoring = Scoring(trained, encoder, weights, stride_um, *scale, kept)
    one = None if is_many(slides) else SlideEntry("", slides)
    if where != Where() and (one or output is None):
        raise InputError("`jobs`, `dask` and `shard` are for several slides with an `output`")
    entries = [one] if one else entries_of(slides, output)
    for told in [] if trained is None else scoring.scorer().warnings:
        tell(told)

    def score(entry: SlideEntry, path: Path | None = None) -> AnnData:
        return scoring.score(entry, path, tell, bar=lambda *_: nullcontext(advance))

    if one is not None:
        return score(one, None if output is None else Path(output) / "scores.h5ad")
    if output is None:
        return {entry.name: score(entry) for entry in entries}
    place, step = Path(output), advance or (lambda _: None)
    keep = partial(_keep_scores, scoring, place, None)
    if where.is_here:
        keep, step = partial(_keep_scores, scoring, place, advance), lambda _: None
    done, failed = run_slides(entries, keep, place, where, scoring.facts, tell=tell, advance=step)
    check_done(done, failed, place, where)
    return {name: Path(row["scores"]) for name, row in done.items()}


@dataclass(frozen=True)
class Scoring:
    """How slides are scored, each by the list's model or this one: what travels to processes."""

    model: RankModel | Path | None
    encoder: str | Encoder | None = None
    weights: Path | str | None = None
    stride_um: float | None = None
    um_per_pixel: float | None = None
    override: bool = False
    features: Path | None = None
    _made: dict[Path | None, Scorer] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Leave a model that is read from its folder to be read again."""
        return {**self.__dict__, "_made": {}}

    def scorer(self, model: str | None = None) -> Scorer:
        """Load a model and its encoder, once in a process."""
        given = self.model if model is None else Path(model)
        key = given if isinstance(given, Path) else None
        if key not in self._made:
            if given is None:
                raise InputError("no `model` is given, nor by the list of slides")
            trained = given if isinstance(given, RankModel) else RankModel.load(given)
            self._made.clear()
            self._made[key] = Scorer(trained, self._seen(trained), self.stride_um, key)
        return self._made[key]

    def _seen(self, model: RankModel) -> Encoder | Path:
        """Find what gives features: an encoder, or a folder that has them."""
        if self.features is None:
            return on_gpu(encoder_of(model, encoder=self.encoder, weights=self.weights))[0]
        if self.encoder is not None or self.weights is not None:
            raise InputError("`encoder` and `weights` are not used with `features`: leave them out")
        return self.features

    def open(self, entry: SlideEntry) -> tuple[Slide, AnnData | None, str]:
        """Open a slide at the scale that the list, or the call, says; name it."""
        scale = self.um_per_pixel if entry.um_per_pixel is None else entry.um_per_pixel
        slide, section = open_subject(entry.subject, scale, self.override)
        return slide, section, entry.name or ("" if section is None else name_of(section))

    def score(
        self, entry: SlideEntry, path: Path | None, say: Say, bar: Bar = lambda *_: nullcontext()
    ) -> AnnData:
        """Score a slide, and say what limits its scores."""
        slide, _, name = self.open(entry)
        scorer = self.scorer(entry.model)
        scores, _ = scorer.score(slide, path, name, bar=bar)
        for told in scorer.limits_of(scores):
            say(f"{slide.path}: {told}")
        return scores

    @property
    def facts(self) -> dict[str, Any]:
        """What scores depend on, besides slides."""
        known = None if self.model is None else self.scorer().known.get("model_sha256")
        return {
            "model_sha256": known,
            "stride_um": self.stride_um,
            "um_per_pixel": self.um_per_pixel,
            "features": None if self.features is None else str(self.features),
            "strank_version": __version__,
        }


def _keep_scores(
    scoring: Scoring, place: Path, advance: Advance | None, entry: SlideEntry, say: Say
) -> dict[str, Any]:
    """Score one of several slides into its folder."""
    path = place / entry.name / "scores.h5ad"
    scores = scoring.score(entry, path, say, bar=lambda *_: nullcontext(advance))
    return {"scores": str(path), **trust_of(scores)}


class Scorer:
    """What is the same for all slides: a model, its encoder and the distance of tiles."""

    def __init__(
        self,
        model: RankModel,
        source: Encoder | Path,
        stride_um: float | None = None,
        folder: Path | None = None,
    ) -> None:
        self.model, self.source, self.stride_um = model, source, stride_um
        # A model in memory has no name by which its scores could be known again.
        self.known = {} if folder is None else {"model_sha256": sha256(folder / "model.json")}

    @property
    def warnings(self) -> list[str]:
        """Say what to know of all maps: of this distance of tiles, of sizes that mean nothing."""
        calibration = self.model.provenance.get("calibration") or {"size": True}
        order_only = "" if calibration["size"] else str(calibration["told"])
        return [told for told in (self._near(self.stride_um), order_only) if told]

    def _near(self, stride_um: float | None) -> str:
        if stride_um is None or Traits.of(self.model.head).n_neighbours == 0:
            return ""
        if stride_um == (pitch := _size_of(self.model, "spot_pitch_um")):
            return ""
        kept = isinstance(self.source, Path)
        closer = (
            f"features of tiles every {pitch:g} µm are" if kept else "a map without `stride_um` is"
        )
        return (
            f"the model looks at neighbours, {pitch:g} µm away in training and "
            f"{stride_um:g} µm here: {closer} closer to what was evaluated"
        )

    def limits_of(self, scores: AnnData) -> list[str]:
        """Say what limits the scores of a slide, besides what is to know of all maps."""
        own = [told for told in scores.uns["strank"]["warnings"] if told not in self.warnings]
        return [told for told in (ignored_part(scores), *own) if told]

    def score(
        self,
        slide: Slide,
        path: Path | None = None,
        name: str = "",
        *,
        check: Callable[[int], object] = lambda _: None,
        bar: Bar = lambda *_: nullcontext(),
    ) -> tuple[AnnData, bool]:
        """Score a slide, or read its scores if they are there; and say which.

        ``name`` is that of its section, if it is not called as the file. ``check`` is called with
        the number of tiles before the work, and may refuse it.
        """
        name, source, tiles = name or slide.path.stem, self.source, None
        encoder: dict[str, Any] = {}
        if isinstance(source, Path):
            tiles, encoder = kept_tiles(source, name, slide, self.stride_um)
            self.model.check_encoder(encoder)
            grid = {key: tiles.uns["strank"][key] for key in GRID_FACTS}
            facts = {"image": str(slide.path.resolve()), **grid}
        else:
            check_scale(slide, source)
            facts = grid_of(slide, self.model, self.stride_um)
        if path is not None:
            # That of kept tiles is known to be the slide's.
            image = sha256(slide.path) if tiles is None else tiles.uns["strank"]["image_sha256"]
            facts |= {"image_sha256": image, **self.known, "strank_version": __version__}
            if isinstance(source, Path):
                facts["features_sha256"] = sha256(source / name / FEATURES)
        scores = _before(path, name, facts) if path is not None and self.known else None
        if scores is not None:
            check(scores.n_obs)
            return scores, True
        tiles = lay_tiles(slide, name, facts) if tiles is None else tiles
        check(tiles.n_obs)
        with bar(f"Scoring tiles of {slide.path.stem}", tiles.n_obs) as advance:
            scores = self._scored(slide, tiles, encoder, advance)
        own = (self._near(facts["stride_um"]), novelty_warning(scores))
        told = dict.fromkeys([*self.warnings, *(warning for warning in own if warning)])
        about = {"ignored": tiles.uns["strank"]["ignored"], "warnings": list(told)}
        scores.uns["strank"] = facts | about
        if path is not None:
            write_h5ad(scores, path)
        return scores, False

    def _scored(
        self, slide: Slide, tiles: AnnData, encoder: dict[str, Any], advance: Advance | None
    ) -> AnnData:
        """Score tiles; of kept features the ``encoder`` is what gave them."""
        if not isinstance(self.source, Path):
            clean = without_ignored(slide)
            return predict_slide(clean, self.model, tiles, encoder=self.source, advance=advance)
        features = np.asarray(tiles.X, np.float32)
        scores = score_tiles(slide, self.model, tiles[:, []].copy(), features, encoder)
        if advance is not None:
            advance(tiles.n_obs)
        return scores


def _before(path: Path, name: str, facts: Mapping[str, Any]) -> AnnData | None:
    """Read scores of the same image, model and tiles."""
    if not is_whole(path):
        return None
    found = read_h5ad(path)
    stored = found.uns.get("strank", {})
    # A file that was moved is still the same; one without warnings or picture is of an older one.
    facts = {key: value for key, value in facts.items() if key != "image"}
    older = "warnings" not in stored or "spatial" not in found.uns
    called = set(found.obs.get("section", ())) == {name}
    same = called and not older and all(stored.get(key) == facts[key] for key in facts)
    same &= stored.get("features_sha256") == facts.get("features_sha256")
    return found if same else None


def novelty_warning(scores: AnnData) -> str:
    """Say what to know of a slide unlike those of the training; empty for nothing."""
    return str(scores.uns.get("strank_novelty", {}).get("warning", ""))


def trust_of(scores: AnnData) -> dict[str, Any]:
    """Say how far to trust scores: tiles, the share of odd ones if it is known, all warnings."""
    share = scores.uns.get("strank_novelty", {}).get("share")
    return {
        "n_tiles": scores.n_obs,
        "odd_share": None if share is None else float(share),
        "warnings": [str(told) for told in scores.uns["strank"]["warnings"]],
    }


def ignored_part(scores: AnnData) -> str:
    """Say what of the image was taken for padding or ink; empty for nothing."""
    return str(scores.uns["strank"].get("ignored", ""))


def grid_of(slide: Slide, model: RankModel, stride_um: float | None = None) -> dict[str, Any]:
    """State the grid of tiles that a model asks for; it becomes ``uns["strank"]``."""
    diameter = _size_of(model, "spot_diameter_um")
    # A head that looks at neighbours expects them as far away as in training.
    around = Traits.of(model.head).n_neighbours > 0
    usual = _size_of(model, "spot_pitch_um") if around else diameter
    return grid_facts(
        slide,
        tile_um=diameter,
        stride_um=usual if stride_um is None else stride_um,
        n_features=int(model.encoder["n_features"]),
    )


def _size_of(model: RankModel, what: str) -> float:
    """Size or distance of the spots that a model was trained on, in µm."""
    if what not in model.provenance:
        raise InputError(
            "the model does not know how large spots are: µm per pixel of a section was not known "
            'where it was trained. Set adata.uns["strank"] = {"um_per_pixel": ...} there, or embed '
            "with `strank.embed`, and fit it again"
        )
    return float(model.provenance[what])


def tile_grid(
    slide: Slide,
    model: RankModel,
    *,
    name: str = "",
    stride_um: float | None = None,
    encoder: Encoder | None = None,
) -> AnnData:
    """Lay tiles of the model's spot size over the tissue: no counts, `grid_of` in ``uns``."""
    check_scale(slide, encoder or encoder_of(model))
    return lay_tiles(slide, name or slide.path.stem, grid_of(slide, model, stride_um))


def predict_slide(
    slide: Slide,
    model: RankModel,
    tiles: AnnData,
    *,
    encoder: Encoder | None = None,
    advance: Advance | None = None,
) -> AnnData:
    """Embed and score places of a slide: tiles, or spots, with ``obsm["spatial"]`` in pixels."""
    encoder = encoder or encoder_of(model)
    features = embed_spots(slide, np.asarray(tiles.obsm["spatial"]), encoder, advance=advance)
    return score_tiles(slide, model, tiles, features, encoder_facts(encoder))


def score_tiles(
    slide: Slide,
    model: RankModel,
    tiles: AnnData,
    features: NDArray,
    facts: Mapping[str, Any],
) -> AnnData:
    """Score places of a slide by features, and the facts of what gave these."""
    spots = tiles.copy()
    spots.obsm[facts["name"]] = features
    spots.uns[facts["name"]] = dict(facts)
    predictions = model.predict(spots)
    if model.novelty is not None:
        far = novelty_of(features, model.novelty)
        predictions.obs["novelty"] = far
        # A tile that padding or ink cuts is unlike any, and says nothing of the slide.
        whole = tiles.obs["ignored"].to_numpy() < _CUT if "ignored" in tiles.obs else far >= 0
        predictions.obs["odd"] = (far > 1) & (whole | ~whole.any())
        far = far[whole] if whole.any() else far
        warning = warning_of(far)
        if warning and is_dark_field(slide):
            warning = _FLUORESCENCE
        predictions.uns["strank_novelty"] = {
            "share": float((far > 1).mean()),
            "warning": warning or "",
        }
    elif is_dark_field(slide):
        predictions.uns["strank_novelty"] = {"warning": _FLUORESCENCE}
    return predictions


def encoder_of(
    model: RankModel,
    *,
    encoder: str | Encoder | None = None,
    weights: Path | str | None = None,
) -> Encoder:
    """Make the encoder of a model's features: its own, or one of the catalogue, or the one given.

    Code that a model's file names is not run, so a ``module:callable`` must be given.
    """
    if model.backbone is not None:
        facts = model.encoder
        return BackboneEncoder(model.backbone, facts["name"], facts["version"])
    if encoder is None or isinstance(encoder, str):
        stored = model.encoder.get("source", model.encoder["name"])
        own = encoder is not None
        place = None if weights is None else Path(weights)
        encoder = get_encoder(encoder or stored, weights=place, own=own)
    model.check_encoder(encoder_facts(encoder))
    return encoder
