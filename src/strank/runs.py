"""A run over many units: records lie beside results, so that its shares come together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from strank.errors import InputError, some
from strank.files import read_facts, write_json
from strank.storage import Claim
from strank.units import Outcome, Where
from strank.version import __version__

_RUN, _RECORD = "run.json", "record.json"
MISSING = "not done: no record of this run; start its share again"


@dataclass(frozen=True)
class Records:
    """What a run in a folder is made from, and what became of each unit, in a folder of its own."""

    folder: Path
    facts: dict[str, Any]  # on which results depend
    units: dict[str, dict[str, Any]]  # what is known of each beforehand

    def begin(self, where: Where) -> None:
        """Keep it for other shares and for who collects them; refuse shares of another run."""
        shares = None if where.share is None else where.share[1]
        content = {"shards": shares, "facts": self.facts, "units": self.units}
        path = self.folder / _RUN
        self.folder.mkdir(parents=True, exist_ok=True)
        # Of shares that begin at once, one writes.
        claim = Claim.take(path, wait=True)
        try:
            before = read_facts(path) if path.is_file() and shares else {}
            if before.get("shards"):
                _check_same(path, before, content)
            else:
                write_json(path, content)
        finally:
            if claim is not None:
                claim.release()

    @classmethod
    def of(cls, folder: Path) -> Records:
        """Read what was begun there."""
        path = folder / _RUN
        if not path.is_file():
            raise InputError(f"{folder}: no run of units to collect ({_RUN} is not there)")
        content = read_facts(path)
        try:
            return cls(folder, dict(content["facts"]), dict(content["units"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not as a run writes it; run again") from error

    def keep(self, name: str, outcome: Outcome[dict[str, Any]]) -> None:
        """Keep what became of a unit: its facts, or its error, and what was said of it."""
        record: dict[str, Any] = {
            "state": "failed" if outcome.error else "done",
            "error": outcome.error,
            "result": outcome.result,
            "said": list(outcome.said),
            "seconds": outcome.seconds,
            "host": outcome.host,
            "strank_version": __version__,
            "run": _digest(self.facts),
        }
        # On a full disk the record is missing, and so it is told by who collects.
        with suppress(InputError):
            write_json(self.folder / name / _RECORD, record)

    def read(self) -> dict[str, dict[str, Any]]:
        """Read the records of all units; of one without a record of this run say so."""
        return {name: self._record(name) for name in self.units}

    def _record(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        with suppress(InputError):
            found = read_facts(self.folder / name / _RECORD)
        if found.get("run") == _digest(self.facts):
            return found
        return {"state": "missing", "error": MISSING, "result": None, "seconds": 0.0}


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _check_same(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    different = [
        "number of shards" if key == "shards" else key for key in now if before.get(key) != now[key]
    ]
    if "facts" in different:
        known = before.get("facts") or {}
        facts = now["facts"]
        different.remove("facts")
        different += [name for name in facts if known.get(name) != facts[name]]
    if different:
        raise InputError(
            f"{path.parent}: shards of another {some(different)} (there are {before['shards']}); "
            f"give all shards the same, or remove {path} and begin anew"
        )
