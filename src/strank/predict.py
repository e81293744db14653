"""From a slide to scores on a grid of tiles over its tissue."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from anndata import AnnData

from strank.encoders.backbone import BackboneEncoder
from strank.encoders.base import Encoder, encoder_facts
from strank.encoders.catalogue import get_encoder
from strank.encoders.embed import check_scale, embed_spots
from strank.errors import InputError
from strank.model import RankModel
from strank.slides.image import Slide
from strank.slides.tissue import tile_centres

__all__ = ["encoder_of", "predict_slide", "tile_grid"]


def tile_grid(slide: Slide, model: RankModel, *, stride_um: float | None = None) -> AnnData:
    """Lay tiles of the model's spot size over the tissue.

    Parameters
    ----------
    slide
        The image and its µm per pixel.
    model
        Gives the size of a spot.
    stride_um
        Distance between tiles; if ``None`` a spot's diameter, or for a head that looks at
        neighbours the distance of spots in training.

    Returns
    -------
    AnnData
        No counts; centres in pixels of the image in ``obsm["spatial"]``, the image and its scale
        in ``uns["strank"]``.

    Raises
    ------
    InputError
        If there is no tissue, for a stride that is not positive, and for a slide whose pixels are
        far too coarse for the model's encoder.
    """
    check_scale(slide, encoder_of(model))
    diameter = float(model.provenance["spot_diameter_um"])
    # A head that looks at neighbours expects them as far away as in training.
    around = getattr(model.head, "n_neighbours", 0) > 0
    usual = float(model.provenance["spot_pitch_um"]) if around else diameter
    stride = usual if stride_um is None else stride_um
    if not stride > 0:
        raise InputError(f"--stride must be positive; got {stride}")
    centres = tile_centres(slide, stride_um=stride, tile_um=diameter)
    return AnnData(
        obs=pd.DataFrame(
            {"section": pd.Categorical([slide.path.stem] * len(centres))},
            index=pd.Index([f"tile{i}" for i in range(len(centres))]),
        ),
        obsm={"spatial": centres},
        uns={
            "strank": {
                "image": str(slide.path.resolve()),
                "um_per_pixel": slide.um_per_pixel,
                "tile_um": diameter,
                "stride_um": stride,
            }
        },
    )


def predict_slide(
    slide: Slide,
    model: RankModel,
    tiles: AnnData,
    *,
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
    advance
        Called with the number of tiles done, for a progress bar.

    Returns
    -------
    AnnData
        As `RankModel.predict`, with ``obsm["spatial"]`` in pixels of the image.

    Raises
    ------
    InputError
        If the encoder is unknown or of another version.
    """
    encoder = encoder_of(model)
    features = embed_spots(slide, np.asarray(tiles.obsm["spatial"]), encoder, advance=advance)
    spots = tiles.copy()
    spots.obsm[encoder.name] = features
    spots.uns[encoder.name] = encoder_facts(encoder)
    return model.predict(spots)


def encoder_of(model: RankModel) -> Encoder:
    """Make the encoder that a model's features come from: its own, or one of the catalogue.

    Raises
    ------
    InputError
        If it is unknown or of another version.
    """
    if model.backbone is not None:
        facts = model.encoder
        return BackboneEncoder(model.backbone, facts["name"], facts["version"])
    encoder = get_encoder(model.encoder.get("source", model.encoder["name"]))
    model.check_encoder(encoder_facts(encoder))
    return encoder
