"""Maps of scores over the tissue."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.path import Path as Path2D
from matplotlib.text import Text
from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar
from numpy.typing import NDArray
from PIL import Image

from strank.cohort.contract import section_info
from strank.cohort.in_memory import as_sections, name_of
from strank.files import file_names, output_folder
from strank.metrics.correlation import log1p_cp10k
from strank.progress import Advance
from strank.slides.slide import Slide, open_slide, picture_um, thumbnail
from strank.slides.tissue import find_tissue
from strank.storage import new_file

_MARGIN_UM = 150.0
_DPI, _COMPRESSION = 130, 3
# Pixels of the tissue in a picture, along its longer side.
_FINEST = 900
# Red and blue keep apart in all common colour deficiencies; the middle is light, like unstained.
_COLOURS = "RdBu_r"
# Inches of a panel's width, without its colour bar.
_SIDE = 4.6
# In the units of a disc, whose radius is 1.
_SQUARE = Path2D([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)], closed=True)
_BANNER = {"facecolor": "#ffd166", "edgecolor": "#b36b00", "boxstyle": "square,pad=0.5"}
_ERROR_COLOURS = "Purples"
# The full colours stand for half as much again, or more.
_LEAST_LIMIT = float(np.log(1.5))


@dataclass(frozen=True)
class MapLayer:
    """Values at positions of a slide."""

    title: str
    #: Of the colour bar.
    label: str
    #: Centres (x, y) in pixels of the full image, ``[n_spots, 2]``.
    positions: NDArray[np.float64]
    #: Size of a mark.
    diameter_um: float
    #: ``[n_spots, n_genes]``; 0 is the middle of the colours, of standard errors their beginning.
    scores: NDArray[np.float64]
    genes: pd.Index
    colours: str = _COLOURS
    #: Whether marks are squares, as wide as their distance, or discs.
    square: bool = False
    #: Spots unlike the training, ``[n_spots]``; they are hatched.
    odd: NDArray[np.bool_] | None = None

    @property
    def heading(self) -> str:
        """What is shown, and what is not to be trusted of it."""
        if self.odd is None or not self.odd.any():
            return self.title
        return f"{self.title}\nhatched: unlike the training, {100 * self.odd.mean():.2g} % of tiles"


def map_layers(predictions: AnnData, section: AnnData | None = None) -> list[MapLayer]:
    """Observed counts of the section if given, predictions on tiles, their errors if known."""
    genes = predictions.var_names
    predicted = MapLayer(
        "predicted",
        _label(predictions),
        np.asarray(predictions.obsm["spatial"]),
        float(predictions.uns["strank"]["stride_um"]),
        np.asarray(predictions.X, dtype=np.float64),
        genes,
        square=True,
        odd=predictions.obs["odd"].to_numpy(bool) if "odd" in predictions.obs else None,
    )
    layers = [predicted]
    if "se" in predictions.layers:
        errors = np.asarray(predictions.layers["se"], dtype=np.float64)
        unsure = replace(predicted, title="standard error", label=_sure(predictions), scores=errors)
        layers.append(replace(unsure, colours=_ERROR_COLOURS))
    return layers if section is None else [_observed(section, genes), *layers]


def _sure(predictions: AnnData) -> str:
    """Say what a standard error is of, and what it leaves out."""
    told = str(json.loads(predictions.uns.get("strank_model", "{}")).get("uncertainty", ""))
    alone = told.partition(" only")[0] + " only" if " only" in told else ""
    return "of the log relative expression" + f"; {alone}" * bool(alone)


def _label(predictions: AnnData) -> str:
    """Say what the colours of a prediction are, as its model knows them for new patients."""
    model = json.loads(predictions.uns.get("strank_model", "{}"))
    if (model.get("calibration") or {"size": True})["size"]:
        return "log relative expression"
    return "score: order only, no fold changes"


def _observed(section: AnnData, genes: pd.Index) -> MapLayer:
    genes = genes[genes.isin(section.var_names)]
    target = log1p_cp10k(section[:, genes].X, section.obs["library_size"]).toarray()
    return MapLayer(
        "observed, on a scale of its own",
        "log1p(CP10k), minus section mean",
        np.asarray(section.obsm["spatial"]),
        section_info(section).spot_diameter_um,
        target - target.mean(0),
        genes,
    )


def write_gene_maps(
    folder: Path | str,
    predictions: AnnData,
    genes: Iterable[str],
    *,
    section: AnnData | None = None,
    slide: Slide | None = None,
    advance: Advance | None = None,
) -> list[Path]:
    """Write a picture of each gene: its scores over the slide, and the observed counts beside them.

    Parameters
    ----------
    folder
        Where to; files are named by the genes, escaped, and told apart by more than capitals.
    predictions
        From `strank.predict`.
    genes
        Which of the panel.
    section
        A section of the same slide, with counts, as `strank.fit` takes it. A gene that it lacks is
        drawn without them.
    slide
        The slide, if it is open, or no longer where the predictions were made.
    advance
        Called with 1 after every picture.

    Returns
    -------
    list of Path
        The PNG files, in the order of the genes.

    Raises
    ------
    strank.errors.InputError
        If the slide cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from PIL import Image
    >>> folder = Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (300, 300), "white").save(folder / "slide.png")
    >>> known = {"image": str(folder / "slide.png"), "um_per_pixel": 2.0, "stride_um": 50.0}
    >>> predictions = AnnData(
    ...     np.array([[1.0], [-1.0]]),
    ...     var=pd.DataFrame(index=["HLA-A"]),
    ...     obsm={"spatial": np.array([[100.0, 100.0], [200.0, 200.0]])},
    ...     uns={"strank": known},
    ... )
    >>> [path.name for path in write_gene_maps(folder, predictions, ["HLA-A"])]
    ['HLA-A.png']
    """
    if section is not None:
        (section,) = as_sections({name_of(section): section}, patients=False).values()
    if slide is None:
        known = predictions.uns["strank"]
        slide = open_slide(Path(known["image"]), float(known["um_per_pixel"]))
    folder, layers = output_folder(Path(folder)), map_layers(predictions, section)
    warning = str(predictions.uns.get("strank_novelty", {}).get("warning", ""))
    small, scale = thumbnail(slide, picture_um(slide))
    paths, drawings = [], {}
    for gene, name in file_names(genes).items():
        path = folder / f"{name}.png"
        shown = [layer for layer in layers if gene in layer.genes]
        if len(shown) not in drawings:
            shrink = scale / slide.um_per_pixel
            of = _Drawing.of(small, shrink, slide.um_per_pixel, shown, warning)
            drawings[len(shown)] = of
        drawing = drawings[len(shown)]
        drawing.show(gene)
        with new_file(path) as file:
            # Not `savefig`, which draws twice.
            drawing.canvas.print_png(file, pil_kwargs={"compress_level": _COMPRESSION})
        # Where things are was found for the first, which costs as much as to draw them.
        drawing.figure.set_layout_engine("none")
        paths.append(path)
        if advance is not None:
            advance(1)
    return paths


def write_tissue_map(folder: Path | str, slide: Slide) -> Path:
    """Write ``tissue.png``: what of a slide was taken for tissue, and what was ignored.

    Parameters
    ----------
    folder
        Where to.
    slide
        An open slide.

    Returns
    -------
    Path
        The PNG file.

    Raises
    ------
    strank.errors.InputError
        If no tissue is found, or the slide cannot be read.

    Examples
    --------
    >>> import tempfile
    >>> from strank.slides.pixels import ArrayPixels
    >>> pixels = np.full((400, 400, 3), 240, np.uint8)
    >>> pixels[100:300, 100:300] = np.random.default_rng(0).integers(60, 200, (200, 200, 3))
    >>> slide = Slide(ArrayPixels(pixels), 2.0, Path("made.png"))
    >>> write_tissue_map(tempfile.mkdtemp(), slide).name
    'tissue.png'
    """
    tissue, path = find_tissue(slide), output_folder(Path(folder)) / "tissue.png"
    height, width = tissue.mask.shape
    figure = Figure(figsize=(6.0, max(2.5, 6.0 * height / width) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    ax.imshow(tissue.image)
    if tissue.ignored.any():
        ax.contourf(tissue.ignored, [0.5, 1.5], colors="none", hatches=["////"])
    ax.contour(tissue.mask, [0.5], colors="#00a000", linewidths=1.0)
    ax.set(xticks=[], yticks=[])
    area = tissue.mask.sum() * (tissue.um_per_pixel / 1000) ** 2
    ax.set_title("\n".join([f"tissue: {area:.3g} mm²", *tissue.notes]), fontsize="medium")
    _scale_bar(ax, tissue.um_per_pixel, width)
    with new_file(path) as file:
        figure.savefig(file, dpi=_DPI)
    return path


def draw_maps(
    image: NDArray[np.uint8],
    shrink: float,
    um_per_pixel: float,
    layers: list[MapLayer],
    gene: str,
) -> Figure:
    """Draw the layers of a gene side by side, each with its colour bar, centred at 0.

    ``shrink`` is pixels of the full image a pixel of the thumbnail ``image``.
    """
    drawing = _Drawing.of(image, shrink, um_per_pixel, layers)
    drawing.show(gene)
    return drawing.figure


@dataclass(frozen=True)
class _Drawing:
    """Tissue and marks, drawn once; genes are shown in turn."""

    figure: Figure
    canvas: FigureCanvasAgg
    title: Text
    layers: list[MapLayer]
    marks: list[EllipseCollection]

    @classmethod
    def of(
        cls,
        image: NDArray[np.uint8],
        shrink: float,
        um_per_pixel: float,
        layers: list[MapLayer],
        warning: str = "",
    ) -> _Drawing:
        height, width = _crop(image.shape[:2], layers, shrink, um_per_pixel)
        aspect = (height[1] - height[0]) / (width[1] - width[0])
        # Without pyplot no global state is touched.
        size = _SIDE + 5.4 * len(layers), _SIDE * aspect + 0.8 + 0.5 * bool(warning)
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(h_pad=0.1), dpi=_DPI)
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(layers) + 1, squeeze=False)[0]
        rows, columns = (slice(int(max(low, 0)), int(high) + 1) for low, high in (height, width))
        # No finer than it is drawn, since it is drawn for every gene.
        part = Image.fromarray(image[rows, columns])
        part.thumbnail((_FINEST, _FINEST), Image.Resampling.BOX)
        shown = image[rows, columns].shape
        sides = np.array([0, shown[1], shown[0], 0]) - 0.5
        left, right, bottom, top = sides + np.repeat([columns.start, rows.start], 2)
        for ax in axes:
            ax.imshow(part, extent=(left, right, bottom, top))
            ax.set(xlim=width, ylim=height[::-1], xticks=[], yticks=[])
        axes[0].set_title("H&E")
        _scale_bar(axes[0], shrink * um_per_pixel, (width[1] - width[0]))
        marks = []
        for ax, layer in zip(axes[1:], layers, strict=True):
            marks.append(_marks(ax, layer, shrink, um_per_pixel))
            ax.set_title(layer.heading)
            figure.colorbar(marks[-1], ax=ax, label=layer.label, fraction=0.05, pad=0.03)
        # A place for it is found with that of all else.
        title = figure.suptitle("gene", parse_math=False, fontweight="bold")
        if warning:
            told = textwrap.fill(warning, int(11 * size[0]))
            figure.supxlabel(told, parse_math=False, fontsize="medium", bbox=_BANNER)
        return cls(figure, canvas, title, layers, marks)

    def show(self, gene: str) -> None:
        """Colour the marks by a gene."""
        for marks, layer in zip(self.marks, self.layers, strict=True):
            values = layer.scores[:, layer.genes.get_loc(gene)]
            # One spot far out must not wash out the rest, and a flat map must look flat.
            limit = max(float(np.quantile(np.abs(values), 0.98)), _LEAST_LIMIT)
            marks.set_array(values)
            marks.set_clim(0 if layer.colours == _ERROR_COLOURS else -limit, limit)
        self.title.set_text(gene)


def _marks(ax: Axes, layer: MapLayer, shrink: float, um_per_pixel: float) -> EllipseCollection:
    """Draw discs of spots, or squares of tiles, with those unlike the training crossed out."""
    size = layer.diameter_um / um_per_pixel / shrink
    places = layer.positions / shrink
    # An outline keeps what is near zero in sight, as far as marks have room for it.
    width = 72 * _SIDE * size / abs(np.subtract(*ax.get_xlim()))
    line = {"edgecolors": "0.5", "linewidths": min(0.4, 0.04 * width)}
    coloured = {"array": np.zeros(len(places)), "cmap": layer.colours, "alpha": 0.85, **line}
    marks = _add(ax, layer, places, size, **coloured)
    if layer.odd is not None and layer.odd.any():
        crossed = {"facecolors": "none", "edgecolors": "black", "linewidths": 0, "hatch": "////"}
        _add(ax, layer, places[layer.odd], size, **crossed)
    return marks


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


def _crop(
    shape: tuple[int, ...], layers: list[MapLayer], shrink: float, um_per_pixel: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Rows and columns of the thumbnail that hold all marks and a margin."""
    positions = np.concatenate([layer.positions for layer in layers]) / shrink
    margin = _MARGIN_UM / um_per_pixel / shrink
    low = (positions.min(0) - margin).clip(min=-0.5)
    high = np.minimum(positions.max(0) + margin, np.array(shape[::-1]) - 0.5)
    return (float(low[1]), float(high[1])), (float(low[0]), float(high[0]))


def _scale_bar(ax: Axes, um: float, width: float) -> None:
    """Draw a bar of 1 mm or 200 µm; ``um`` is the size of a pixel of the thumbnail."""
    length_um = 1000.0 if width * um > 2500 else 200.0
    name = f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} µm"
    bar = AnchoredSizeBar(
        ax.transData, length_um / um, name, "lower left", size_vertical=4 / um, borderpad=0.6
    )
    bar.patch.set(alpha=0.85, linewidth=0)
    ax.add_artist(bar)
