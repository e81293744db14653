"""Files of maps over the tissue."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from anndata import AnnData
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from numpy.typing import NDArray

from strank.cohort.in_memory import as_sections, name_of
from strank.files import file_names, output_folder
from strank.pl.layers import MapLayer, map_layers
from strank.pl.tissue import BANNER, Ground, colour, draw_marks, draw_scale, warning_on
from strank.progress import Advance
from strank.slides.slide import Slide, open_slide, picture_um, thumbnail
from strank.slides.tissue import find_tissue
from strank.storage import new_file

_DPI, _COMPRESSION = 130, 3
# Inches of a panel's width, without its colour bar.
_SIDE = 4.6
# Numbers beside a colour bar that take as much room as any: those of a gene are of its own.
_WIDE = -0.75, 0.75


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
    >>> import pandas as pd
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
    small, scale = thumbnail(slide, picture_um(slide))
    paths, drawings = [], {}
    for gene, name in file_names(genes).items():
        path = folder / f"{name}.png"
        shown = [layer for layer in layers if gene in layer.genes]
        if len(shown) not in drawings:
            image, told = (small, scale / slide.um_per_pixel), warning_on(predictions)
            drawings[len(shown)] = _Drawing.of(image, slide.um_per_pixel, shown, told)
        drawing = drawings[len(shown)]
        drawing.show(gene)
        with new_file(path) as file:
            # Not `savefig`, which draws twice.
            drawing.canvas.print_png(file, pil_kwargs={"compress_level": _COMPRESSION})
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
    draw_scale(ax, tissue.um_per_pixel)
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
    drawing = _Drawing.of((image, shrink), um_per_pixel, layers)
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
        image: tuple[NDArray[np.uint8], float],
        um_per_pixel: float,
        layers: list[MapLayer],
        warning: str = "",
    ) -> _Drawing:
        ground = Ground.of(image, um_per_pixel, layers)
        # Without pyplot no global state is touched.
        size = _SIDE + 5.4 * len(layers), _SIDE * ground.aspect + 0.8 + 0.5 * bool(warning)
        engine = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08)
        figure = Figure(figsize=size, layout=engine, dpi=_DPI)
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(layers) + 1, squeeze=False)[0]
        for ax in axes:
            ground.show(ax)
        axes[0].set_title("H&E")
        draw_scale(axes[0], um_per_pixel)
        marks = []
        for ax, layer in zip(axes[1:], layers, strict=True):
            marks.append(draw_marks(ax, layer, um_per_pixel))
            ax.set_title(layer.heading)
            figure.colorbar(marks[-1], ax=ax, label=layer.label, fraction=0.05, pad=0.03)
        # A place for it is found with that of all else.
        title = figure.suptitle("gene", parse_math=False, fontweight="bold")
        if warning:
            told = textwrap.fill(warning, int(11 * size[0]))
            figure.supxlabel(told, parse_math=False, fontsize="medium", bbox=BANNER)
        for mark in marks:
            mark.set_clim(*_WIDE)
        # Where things are is found once, which costs as much as to draw them.
        engine.execute(figure)
        figure.set_layout_engine("none")
        return cls(figure, canvas, title, layers, marks)

    def show(self, gene: str) -> None:
        """Colour the marks by a gene."""
        for marks, layer in zip(self.marks, self.layers, strict=True):
            colour(marks, layer, gene)
        self.title.set_text(gene)
