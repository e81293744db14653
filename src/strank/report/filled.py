"""Pages that share a style: a template of this package, filled with values that are escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from strank.files import write_utf8


def write_filled(path: Path, template: str, **values: Any) -> Path:
    """Write a page; what the values hold is text, never markup."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("strank.report"), autoescape=True, trim_blocks=True
    )
    write_utf8(path, environment.get_template(template).render(values))
    return path
