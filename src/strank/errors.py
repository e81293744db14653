"""The one exception that means: the input is at fault, and this is what to do about it."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used; the message names it and says what to do.

    The command line prints the message and exits with code 2, without a traceback. An argument of
    the function stands between backquotes, `um_per_pixel` or `um_per_pixel=0.5`: the command line
    shows its option there.
    """


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
