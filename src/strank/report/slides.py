"""One page of many slides: what became of each, and how far to trust it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from strank.errors import per_cent
from strank.files import read_written
from strank.report.filled import write_filled
from strank.slide_runs import SLIDES

# Files of a slide's folder, and what they open in.
_KINDS = {
    "scores.h5ad": "scores",
    "scores.geojson": "QuPath",
    "scores.zarr": "SpatialData",
}
_TISSUE = "tissue.png"


def write_slides_page(folder: Path | str) -> Path:
    """Write ``index.html``: a row a slide, with its thumbnail, tiles, odd tissue and links.

    It is made of ``slides.csv`` and of what lies beside it; it opens without a network and links to
    files of the folder only, so that the folder can be moved or sent as it is.

    Parameters
    ----------
    folder
        Where `strank.predict` wrote the scores of several slides.

    Returns
    -------
    Path
        Of the page.

    Examples
    --------
    >>> import tempfile
    >>> import pandas as pd
    >>> from strank.files import write_table
    >>> folder = Path(tempfile.mkdtemp())
    >>> row = {"name": "A1", "slide": "A1.svs", "n_tiles": 900, "odd_share": 0.3}
    >>> row |= {"warnings": "30 % of the tiles ...", "seconds": 8.5, "error": ""}
    >>> write_table(folder / "slides.csv", pd.DataFrame([row]))
    >>> write_slides_page(folder).name
    'index.html'
    """
    folder = Path(folder)
    text = {"name": str, "slide": str, "warnings": str, "error": str}
    # Slides may be called NA.
    table = read_written(
        folder / SLIDES, dtype=text, keep_default_na=False, na_values={"n_tiles": ""}
    )
    rows = [_row(folder, row) for row in table.to_dict("records")]
    failed = sum(bool(row["error"]) for row in rows)
    return write_filled(
        folder / "index.html", "slides.html", rows=rows, table=SLIDES, failed=failed
    )


def _row(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    own = folder / row["name"]
    found = sorted(own.glob("*.png")) if own.is_dir() else []
    maps = [path.name for path in found if path.name != _TISSUE]
    links = [(told, name) for name, told in _KINDS.items() if (own / name).exists()]
    links += [(unquote(name.removesuffix(".png")), name) for name in maps]
    share = row["odd_share"]
    return {
        **row,
        "thumbnail": _link(own, _TISSUE) if (own / _TISSUE).exists() else "",
        "odd": "–" if share == "" else per_cent(float(share)),
        "tiles": "–" if row["n_tiles"] != row["n_tiles"] else f"{int(row['n_tiles']):,}",
        "links": [(told, _link(own, name)) for told, name in links],
    }


def _link(own: Path, name: str) -> str:
    # A name such as `C:x` would be another scheme.
    return f"./{quote(own.name)}/{quote(name)}"
