"""The one exception that means: the input is at fault, and this is what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(ValueError):
    """Input that cannot be used; the message names it and says what to do.

    The command line prints the message and exits with code 2, without a traceback. An argument of
    the function stands between backquotes, `um_per_pixel` or `um_per_pixel=0.5`: the command line
    shows its option there.

    Examples
    --------
    >>> import strank
    >>> try:
    ...     strank.read_cohort("nowhere", encoder="uni")
    ... except strank.errors.InputError as error:
    ...     print(error)
    nowhere: no such folder; make a cohort with `strank import`
    """


def said_by(error: Exception, most: int = 200) -> str:
    r"""Say what another library says of a file, in one short line.

    Examples
    --------
    >>> said_by(OSError("bad tile\nbad tile\nbad end"))
    'bad tile; bad end'
    """
    lines = dict.fromkeys(" ".join(line.split()) for line in str(error).splitlines())
    text = "; ".join(line for line in lines if line) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    r"""Show what a terminal would obey (control characters, marks of direction) as escapes.

    Ends of lines stay.

    Examples
    --------
    >>> print(printable("TP53\x1b[2J"))
    TP53\x1b[2J
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def one_line(text: str, most: int) -> str:
    r"""Put a text on one line; of a long one leave out the middle.

    Its beginning, the file, and its end, what to do, are kept, and of a long path its end.

    Examples
    --------
    >>> one_line("cohort/A1.h5ad: bad\n tile", 40)
    'cohort/A1.h5ad: bad tile'
    >>> one_line("a.png: " + "bad tile, " * 99 + "cut it", 40)
    'a.png: bad tile, b...e, bad tile, cut it'
    """
    words = printable(" ".join(text.split())).split(" ")
    if len(" ".join(words)) > most:
        words = [_without_middle(word, most // 3, before=most // 12) for word in words]
    return _without_middle(" ".join(words), most, before=(most - 3) // 2)


def _without_middle(text: str, most: int, *, before: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[:before]}...{text[before + 3 - most :]}"


def some(names: Iterable[object], most: int = 5) -> str:
    """List the first few names in a message, and how many more there are.

    Examples
    --------
    >>> some(["A", "B", "C"], most=2)
    'A, B and 1 more'
    """
    listed = [str(name) for name in names]
    rest = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {rest} more" if rest > 0 else "")


def per_cent(share: float) -> str:
    """Say a share with two digits, or three.

    Examples
    --------
    >>> per_cent(0.0123), per_cent(0.999)
    ('1.2 %', '100 %')
    """
    return f"{float(f'{100 * share:.2g}'):g} %"


def no_such(what: str, name: object, choices: Iterable[str]) -> InputError:
    """Make the error of an unknown name: it lists the choices, and suggests the nearest.

    Examples
    --------
    >>> no_such("loss", "lst", ["list", "pair"])
    InputError("no loss 'lst'; choose one of list, pair (did you mean list?)")
    """
    known = list(choices)
    near = get_close_matches(str(name), known, n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return InputError(f"no {what} {name!r}; choose one of {', '.join(known)}{hint}")
