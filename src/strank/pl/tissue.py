"""Maps over the tissue."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.collections import EllipseCollection
from matplotlib.path import Path as Path2D
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from numpy.typing import NDArray
from PIL import Image

from strank.cohort.in_memory import as_sections, name_of
from strank.cohort.library import visium_library
from strank.errors import InputError, some
from strank.pl.axes import axes_or_new
from strank.pl.layers import (
    MapLayer,
    error_layer,
    novelty_layer,
    observed_layer,
    predicted_layer,
    scale_of,
)
from strank.slides.slide import Slide, open_slide, picture_um, thumbnail

_MARGIN_UM = 150.0
# Pixels of the tissue in a picture, along its longer side.
_FINEST = 900
# In the units of a disc, whose radius is 1.
_SQUARE = Path2D([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)], closed=True)
BANNER = {"facecolor": "#ffd166", "edgecolor": "#b36b00", "boxstyle": "square,pad=0.5"}
_IMAGE_KEYS = ("hires", "lowres")


def map(adata: AnnData, gene: str, *, slide: Slide | None = None, ax: Axes | None = None) -> Axes:
    """Draw a gene over the tissue: scores, or what was observed.

    Tiles are squares as wide as their distance, spots discs. Colours are centred at 0, the mean of
    the section; scores and counts have scales of their own. What looks unlike the training is
    hatched, and the warning of such a slide stands below.

    Parameters
    ----------
    adata
        Scores from `strank.predict` or `RankModel.predict`; or a section with counts, as
        `strank.fit` takes it, of which log1p(CP10k) is drawn, minus its mean.
    gene
        Of its ``var_names``.
    slide
        The slide, if it is open, or no longer where it was. If ``None``, the H&E is the image that
        scanpy and squidpy keep in ``uns["spatial"]``, or else the file that ``uns["strank"]``
        names; if neither is there, the ground is white.
    ax
        Where to, in pixels of the full image; a new figure if ``None``.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Raises
    ------
    strank.errors.InputError
        If there is no such gene, or the size of a pixel is not known.

    Examples
    --------
    >>> import strank
    >>> scores = AnnData(np.array([[1.0], [-1.0]]), var=pd.DataFrame(index=["HLA-A"]))
    >>> scores.obsm["spatial"] = np.array([[100.0, 100.0], [200.0, 200.0]])
    >>> scores.uns["strank"] = {"um_per_pixel": 2.0, "stride_um": 50.0}
    >>> strank.pl.map(scores, "HLA-A").get_title()
    'HLA-A, predicted'
    """
    if gene not in adata.var_names:
        raise InputError(f"no gene {gene}; there is {some(adata.var_names)}")
    if "stride_um" in adata.uns.get("strank", {}) or "strank_model" in adata.uns:
        return _draw(predicted_layer(adata), gene, adata, slide, ax)
    (section,) = as_sections({name_of(adata): adata}, patients=False).values()
    return _draw(observed_layer(section, pd.Index([gene])), gene, section, slide, ax)


def uncertainty(
    scores: AnnData, gene: str, *, slide: Slide | None = None, ax: Axes | None = None
) -> Axes:
    """Draw the standard error of a gene's scores over the tissue.

    Parameters
    ----------
    scores
        From `strank.predict` or `RankModel.predict`, of a model that knows how wrong it may be.
    gene
        Of its panel.
    slide
        As of `strank.pl.map`.
    ax
        Where to, in pixels of the full image; a new figure if ``None``.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Raises
    ------
    strank.errors.InputError
        If there is no such gene, or the scores have no standard errors.

    Examples
    --------
    >>> import strank
    >>> scores = AnnData(np.array([[1.0], [-1.0]]), layers={"se": np.array([[0.2], [0.4]])})
    >>> scores.obsm["spatial"] = np.array([[100.0, 100.0], [200.0, 200.0]])
    >>> scores.uns["strank"] = {"um_per_pixel": 2.0, "stride_um": 50.0}
    >>> strank.pl.uncertainty(scores, "0").get_title()
    '0, standard error'
    """
    if gene not in scores.var_names:
        raise InputError(f"no gene {gene}; there is {some(scores.var_names)}")
    return _draw(error_layer(scores), gene, scores, slide, ax)


def novelty(scores: AnnData, *, slide: Slide | None = None, ax: Axes | None = None) -> Axes:
    """Draw how far tiles lie from what the model was trained on; what is odd is hatched.

    Parameters
    ----------
    scores
        From `strank.predict`, of a model that knows how far its training features spread.
    slide
        As of `strank.pl.map`.
    ax
        Where to, in pixels of the full image; a new figure if ``None``.

    Returns
    -------
    matplotlib.axes.Axes
        What was drawn on.

    Raises
    ------
    strank.errors.InputError
        If the scores have no novelty.

    Examples
    --------
    >>> import strank
    >>> scores = AnnData(np.array([[1.0], [-1.0]]))
    >>> scores.obs["novelty"], scores.obs["odd"] = [0.4, 1.8], [False, True]
    >>> scores.obsm["spatial"] = np.array([[100.0, 100.0], [200.0, 200.0]])
    >>> scores.uns["strank"] = {"um_per_pixel": 2.0, "stride_um": 50.0}
    >>> print(strank.pl.novelty(scores).get_title())
    novelty
    hatched: unlike the training, 50 % of tiles
    """
    return _draw(novelty_layer(scores), "novelty", scores, slide, ax)


def warning_on(scores: AnnData) -> str:
    """Read what a picture of scores must say; empty for nothing."""
    return str(scores.uns.get("strank_novelty", {}).get("warning", ""))


def _draw(layer: MapLayer, gene: str, adata: AnnData, slide: Slide | None, ax: Axes | None) -> Axes:
    um_per_pixel = scale_of(adata)[0]
    ground = Ground.of(_image_of(adata, slide), um_per_pixel, [layer])
    ax = axes_or_new(ax, 6.0, 5.0 * ground.aspect + 0.9)
    ground.show(ax)
    draw_scale(ax, um_per_pixel)
    marks = draw_marks(ax, layer, um_per_pixel)
    colour(marks, layer, gene)
    ax.figure.colorbar(marks, ax=ax, label=layer.label, fraction=0.05, pad=0.03)
    title = layer.heading if layer.title == gene else f"{gene}, {layer.heading}"
    ax.set_title(title, parse_math=False)
    if told := warning_on(adata):
        ax.set_xlabel(textwrap.fill(told, 60), parse_math=False, bbox=BANNER, labelpad=12)
    return ax


def _image_of(adata: AnnData, slide: Slide | None) -> tuple[NDArray[np.uint8], float] | None:
    """Find a small image, and how many pixels of the full one a pixel of it is."""
    if slide is None:
        library = visium_library(adata, name_of(adata))
        for key in _IMAGE_KEYS:
            scale = library.get("scalefactors", {}).get(f"tissue_{key}_scalef")
            if scale is not None and key in library.get("images", {}):
                return _eight_bit(np.asarray(library["images"][key])), 1 / float(scale)
        path = str(adata.uns.get("strank", {}).get("image", ""))
        if not path or not Path(path).exists():
            return None
        slide = open_slide(Path(path), scale_of(adata)[0])
    small, scale = thumbnail(slide, picture_um(slide))
    return small, scale / slide.um_per_pixel


def _eight_bit(image: NDArray) -> NDArray[np.uint8]:
    """Turn an image as scanpy keeps it, of 8 bits or of 0 to 1, into RGB of 8 bits."""
    image = image[..., :3]
    return image if image.dtype == np.uint8 else (255 * image.clip(0, 1)).round().astype(np.uint8)


@dataclass(frozen=True)
class Ground:
    """The H&E below marks, if it is there, and the part of it that they need."""

    image: Image.Image | None
    #: Left, right, bottom and top of the image, and the part in view: pixels of the full image.
    extent: tuple[float, float, float, float]
    width: tuple[float, float]
    height: tuple[float, float]

    @classmethod
    def of(
        cls,
        image: tuple[NDArray[np.uint8], float] | None,
        um_per_pixel: float,
        layers: list[MapLayer],
    ) -> Ground:
        """Cut what holds all marks and a margin out of an image at its shrinkage."""
        places = np.concatenate([layer.positions for layer in layers])
        margin = _MARGIN_UM / um_per_pixel
        low, high = places.min(0) - margin, places.max(0) + margin
        if image is None:
            return cls(None, (0, 0, 0, 0), (low[0], high[0]), (low[1], high[1]))
        pixels, shrink = image
        low = (low / shrink).clip(min=-0.5)
        high = np.minimum(high / shrink, np.array(pixels.shape[1::-1]) - 0.5)
        first, last = low.clip(min=0).astype(int), high.astype(int) + 1
        shown = pixels[first[1] : last[1], first[0] : last[0]]
        # No finer than it is drawn, since it is drawn for every gene.
        part = Image.fromarray(shown)
        part.thumbnail((_FINEST, _FINEST), Image.Resampling.BOX)
        sides = np.array([0, shown.shape[1], shown.shape[0], 0]) - 0.5
        left, right, bottom, top = shrink * (sides + np.repeat(first, 2))
        low, high = shrink * low, shrink * high
        return cls(part, (left, right, bottom, top), (low[0], high[0]), (low[1], high[1]))

    @property
    def aspect(self) -> float:
        """Height by width of what is in view."""
        return float(np.ptp(self.height) / np.ptp(self.width))

    def show(self, ax: Axes) -> None:
        """Draw it, y downwards as in images."""
        if self.image is not None:
            ax.imshow(self.image, extent=self.extent)
        ax.set(xlim=self.width, ylim=self.height[::-1], xticks=[], yticks=[], aspect="equal")


def draw_marks(ax: Axes, layer: MapLayer, um_per_pixel: float) -> EllipseCollection:
    """Draw discs of spots, or squares of tiles, with those unlike the training crossed out."""
    size = layer.diameter_um / um_per_pixel
    # An outline keeps what is near zero in sight, as far as marks have room for it.
    points = 72 * ax.bbox.width / ax.figure.get_dpi()
    width = points * size / abs(np.subtract(*ax.get_xlim()))
    line = {"edgecolors": "0.5", "linewidths": min(0.4, 0.04 * width)}
    unset = np.zeros(len(layer.positions))
    look = {"array": unset, "cmap": layer.colours, "alpha": 0.85, **line}
    marks = _add(ax, layer, layer.positions, size, **look)
    if layer.odd is not None and layer.odd.any():
        crossed = {"facecolors": "none", "edgecolors": "black", "linewidths": 0, "hatch": "////"}
        _add(ax, layer, layer.positions[layer.odd], size, **crossed)
    return marks


def colour(marks: EllipseCollection, layer: MapLayer, gene: str) -> None:
    """Colour marks by a gene."""
    marks.set_array(layer.values(gene))
    marks.set_clim(*layer.limits(gene))


def _add(
    ax: Axes, layer: MapLayer, places: NDArray[np.float64], size: float, **look: Any
) -> EllipseCollection:
    sizes, flat = np.full(len(places), size), np.zeros(len(places))
    at = {"offsets": places, "offset_transform": ax.transData}
    marks = EllipseCollection(sizes, sizes, flat, units="xy", **at, **look)
    if layer.square:
        marks.set_paths([_SQUARE])
    ax.add_collection(marks)
    return marks


def draw_scale(ax: Axes, um_per_pixel: float) -> None:
    """Draw a bar of 1 mm or 200 µm; ``um_per_pixel`` is of the axes' units."""
    width_um = abs(np.subtract(*ax.get_xlim())) * um_per_pixel
    length_um = 1000.0 if width_um > 2500 else 200.0
    name = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    bar = AnchoredSizeBar(
        ax.transData,
        length_um / um_per_pixel,
        name,
        "lower left",
        size_vertical=4 / um_per_pixel,
        borderpad=0.6,
    )
    bar.patch.set(alpha=0.85, linewidth=0)
    ax.add_artist(bar)
