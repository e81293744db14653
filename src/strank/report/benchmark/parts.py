"""What a page shows only when it is asked for: in the page itself, or in files beside it.

A page that is opened from a disk may not read other files, but may run scripts: each file calls the
page with its content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from strank.files import write_bytes
from strank.storage import new_folder, remove

# Bytes that a page holds; of more, all parts are files.
_MOST = 20_000_000


class Parts:
    """Parts of a page by name; in memory while they are few, and then on the disk."""

    def __init__(self, new: Callable[[], Path]) -> None:
        self._new = new
        self._folder: Path | None = None
        self._held: dict[str, Any] = {}
        #: Names of files, which change with their content: those of another page are not taken.
        self.files: dict[str, str] = {}
        self.n_bytes = 0

    def add(self, name: str, content: Any) -> str:
        """Keep a part; its name."""
        self._held[name] = content
        if self._folder is None:
            self.n_bytes += len(to_json(content))
            if self.n_bytes > _MOST:
                self._folder, self.n_bytes = self._new(), 0
        if self._folder is not None:
            for part in list(self._held):
                self._write(self._folder, part)
        return name

    def in_page(self, beside: str) -> dict[str, Any]:
        """Give what the page must hold of them."""
        return {"parts": self._held, "files": self.files, "beside": beside}

    def _write(self, folder: Path, name: str) -> None:
        text = f"page.take({to_json(name)}, {to_json(self._held.pop(name))});\n".encode()
        self.files[name] = f"{name}.{hashlib.sha256(text).hexdigest()[:12]}.js"
        self.n_bytes += len(text)
        write_bytes(folder / self.files[name], text)


@contextmanager
def parts_beside(folder: Path) -> Iterator[Parts]:
    """Collect parts; the folder is there afterwards only if a page cannot hold them."""
    with ExitStack() as stack:
        parts = Parts(lambda: stack.enter_context(new_folder(folder)))
        yield parts
    if not parts.files:
        remove(folder)


def to_json(content: Any) -> str:
    """Write JSON that may stand in a script: nothing in it may end the element it stands in."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
