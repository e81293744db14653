"""From a slide to scores on a grid of tiles over its tissue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray

from strank.encoders.backbone import BackboneEncoder
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.embedding import embed_spots
from strank.encoders.load import get_encoder
from strank.encoders.tiles import check_scale
from strank.errors import InputError
from strank.model.novelty import novelty_of, warning_of
from strank.model.rank_model import RankModel
from strank.slides.slide import Slide
from strank.slides.tissue import tile_centres

# Features of all tiles stand in memory at once, since a head may subtract their mean; this many
# bytes of them, were the whole slide tissue.
_MOST_BYTES = 8 * 2**30


def grid_facts(slide: Slide, model: RankModel, *, stride_um: float | None = None) -> dict[str, Any]:
    """State what a grid of tiles hangs on; it becomes ``uns["strank"]``.

    Parameters
    ----------
    slide, model, stride_um
        As in `tile_grid`.

    Returns
    -------
    dict
        ``image``, ``um_per_pixel``, ``tile_um`` (side of the area that must hold tissue) and
        ``stride_um``.

    Raises
    ------
    InputError
        For a stride below a pixel, or one that lays more tiles than memory could hold.
    """
    diameter = float(model.provenance["spot_diameter_um"])
    # A head that looks at neighbours expects them as far away as in training.
    around = getattr(model.head, "n_neighbours", 0) > 0
    usual = float(model.provenance["spot_pitch_um"]) if around else diameter
    stride = usual if stride_um is None else stride_um
    if stride_um is not None and not slide.um_per_pixel <= stride < float("inf"):
        raise InputError(
            f"`stride_um` must be at least a pixel of {slide.path} ({slide.um_per_pixel:g} µm); "
            f"got {stride:g}"
        )
    width, height = slide.size
    positions = width * height * (slide.um_per_pixel / stride) ** 2
    n_bytes = 4 * positions * int(model.encoder["n_features"])
    if n_bytes > _MOST_BYTES:
        raise InputError(
            f"`stride_um={stride:g}`: up to {positions:,.0f} tiles on {slide.path}, whose features "
            f"would take {n_bytes / 2**30:.0f} GiB; "
            f"{np.ceil(10 * stride * (n_bytes / _MOST_BYTES) ** 0.5) / 10:g} µm is possible there"
        )
    return {
        "image": str(slide.path.resolve()),
        "um_per_pixel": slide.um_per_pixel,
        "tile_um": diameter,
        "stride_um": stride,
    }


def tile_grid(
    slide: Slide,
    model: RankModel,
    *,
    stride_um: float | None = None,
    encoder: Encoder | None = None,
) -> AnnData:
    """Lay tiles of the model's spot size over the tissue.

    Parameters
    ----------
    slide
        The image and its µm per pixel.
    model
        Gives the size of a spot.
    stride_um
        Distance between tiles; if ``None`` a spot's diameter, or for a head that looks at
        neighbours the distance of spots in training. With a smaller one tiles overlap, and the map
        is denser: each score is still of the window around its own centre.
    encoder
        From `encoder_of`, if it was made before.

    Returns
    -------
    AnnData
        No counts; centres in pixels of the image in ``obsm["spatial"]``, `grid_facts` in
        ``uns["strank"]``.

    Raises
    ------
    InputError
        If there is no tissue, for a stride out of its range, and for a slide whose pixels are far
        too coarse for the model's encoder.
    """
    check_scale(slide, encoder or encoder_of(model))
    facts = grid_facts(slide, model, stride_um=stride_um)
    centres = tile_centres(slide, stride_um=facts["stride_um"], tile_um=facts["tile_um"])
    return AnnData(
        obs=pd.DataFrame(
            {"section": pd.Categorical([slide.path.stem] * len(centres))},
            index=pd.Index([f"tile{i}" for i in range(len(centres))]),
        ),
        obsm={"spatial": centres},
        uns={"strank": facts},
    )


def predict_slide(
    slide: Slide,
    model: RankModel,
    tiles: AnnData,
    *,
    encoder: Encoder | None = None,
    advance: Callable[[int], object] | None = None,
) -> AnnData:
    """Embed tiles of a slide and score them.

    Parameters
    ----------
    slide
        The image and its µm per pixel.
    model
        A trained model whose encoder this strank has.
    tiles
        Positions in ``obsm["spatial"]``, from `tile_grid`.
    encoder
        From `encoder_of`, if it was made before.
    advance
        Called with the number of tiles done, for a progress bar.

    Returns
    -------
    AnnData
        As `RankModel.predict`, with ``obsm["spatial"]`` in pixels of the image. For a model that
        knows how far its training features spread, ``obs["novelty"]`` is how far a tile lies
        outside (above 1), and ``uns["strank_novelty"]`` has the share of such tiles and a warning
        (empty for none).

    Raises
    ------
    InputError
        If the encoder is unknown or of another version.
    """
    encoder = encoder or encoder_of(model)
    features = embed_spots(slide, np.asarray(tiles.obsm["spatial"]), encoder, advance=advance)
    spots = tiles.copy()
    spots.obsm[encoder.name] = features
    spots.uns[encoder.name] = encoder_facts(encoder)
    predictions = model.predict(spots)
    _add_novelty(predictions, model, features)
    return predictions


def encoder_of(
    model: RankModel, *, name: str | None = None, weights: Path | None = None
) -> Encoder:
    """Make the encoder that a model's features come from: its own, or one of the catalogue.

    Parameters
    ----------
    model
        A trained model.
    name
        The encoder, where it is a ``module:callable`` of the user's: code that a model's file
        names is not run.
    weights
        File with the weights, where they are not to come from the hub.

    Raises
    ------
    InputError
        If it is unknown or of another version.
    """
    if model.backbone is not None:
        facts = model.encoder
        return BackboneEncoder(model.backbone, facts["name"], facts["version"])
    stored = model.encoder.get("source", model.encoder["name"])
    encoder = get_encoder(name or stored, weights=weights, own=name is not None)
    model.check_encoder(encoder_facts(encoder))
    return encoder


def _add_novelty(predictions: AnnData, model: RankModel, features: NDArray[np.float32]) -> None:
    if model.novelty is None:
        return
    far = novelty_of(features, model.novelty)
    predictions.obs["novelty"] = far
    predictions.uns["strank_novelty"] = {
        "share": float((far > 1).mean()),
        "warning": warning_of(far) or "",
    }
