"""How results show themselves, in a terminal of 80 columns and in a notebook: what matters."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from strank.errors import printable, some

if TYPE_CHECKING:
    import pandas as pd

_WIDTH, _MOST_ROWS, _MOST_NOTES, _LONGEST = 80, 30, 3, 28


def as_text(
    title: str,
    facts: Mapping[str, str],
    tables: Mapping[str, pd.DataFrame] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Show a result in lines of 80 columns; of long tables the first rows.

    >>> print(as_text("Model", {"genes": "2: A, B"}, notes=["few genes"]))
    Model
      genes: 2: A, B
      ! few genes
    """
    lines = [title]
    for name, told in facts.items():
        lines += _wrapped(f"{name}: {told}", "  ", "    ")
    for caption, table in (tables or {}).items():
        short = table.head(_MOST_ROWS).rename(index=_short)
        text = short.to_string(float_format="{:.3f}".format, na_rep="", line_width=_WIDTH)
        lines += [*_wrapped(caption, "", ""), text, *_rest(table)]
    for note in _few(notes):
        lines += _wrapped(note, "  ! ", "    ")
    return printable("\n".join(lines))


def as_html(
    title: str,
    facts: Mapping[str, str],
    tables: Mapping[str, pd.DataFrame] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Show a result in a notebook.

    >>> as_html("Model", {"genes": "<b>"})
    '<div><strong>Model</strong><br>genes: &lt;b&gt;</div>'
    """
    lines = [f"<strong>{escape(title)}</strong>"]
    lines += [escape(f"{name}: {told}") for name, told in facts.items()]
    parts = ["<br>".join(lines)]
    for caption, table in (tables or {}).items():
        rows = table.head(_MOST_ROWS)
        shown = rows.to_html(float_format="{:.3f}".format, na_rep="", border=0, escape=True)
        parts.append("".join(f"<div>{escape(line)}</div>" for line in [caption] if line) + shown)
        parts += [f"<div>{line}</div>" for line in _rest(table)]
    if notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in _few(notes)) + "</ul>")
    return f"<div>{''.join(parts)}</div>"


def few_names(names: Sequence[object], most: int = 5) -> str:
    """Count names and list the first of them.

    >>> few_names(["A", "B", "C"], most=2)
    '3: A, B and 1 more'
    """
    return f"{len(names)}: {some(names, most)}" if len(names) else "none"


def _wrapped(text: str, first: str, then: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=then)


def _short(name: object) -> object:
    text = str(name)
    return name if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _rest(table: pd.DataFrame) -> list[str]:
    return [f"... and {len(table) - _MOST_ROWS} more rows"] * (len(table) > _MOST_ROWS)


def _few(notes: Sequence[str]) -> list[str]:
    rest = len(notes) - _MOST_NOTES
    return [*notes[:_MOST_NOTES], *[f"and {rest} more in `warnings`"] * (rest > 0)]
