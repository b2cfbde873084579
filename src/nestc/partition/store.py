"""The profile store: what a region takes on a device, measured once and kept in a file that many processes may use."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

from nestc import __version__
from nestc.cache import TextStore, cache_folder
from nestc.partition.problem import Kind

_ENTRIES = 200_000
"""Kept, the newest ones: some 60 MB. A network has some hundreds of different regions a device."""

_FORMAT = 4
"""Raised when the meaning of an entry changes, so that older ones are measured anew."""

ALONE, CHAIN, LAUNCH, COMPARED = "alone", "chain", "launch", "compared"
"""Contexts: a region as a partition of its own, inside a chain of regions, what starting any partition takes, and a
chain that took turns with those of other plans."""


def store_path() -> Path:
    """Where the store lies: a file beside the other caches of nestc, in the user's cache folder."""
    return cache_folder() / "profiles.sqlite"


class Key(NamedTuple):
    """What was timed (`fingerprint.region_hash`), on what (`fingerprint.device_fingerprint`), and in what context."""

    region: str
    device: str
    context: str = ALONE


@dataclass(frozen=True)
class Entry:
    """What a region takes on a device: the median of ``runs`` in seconds, and how that is known.

    ``spread`` is the interquartile range in seconds. ``joules`` are of the device's simulator ("modelled"), or
    ("estimated") its stated power times the seconds, which the store does not hold; None if it states none.
    ``bytes``: constants that it keeps on the device. ``refusal`` says in words why the device does not take the region
    although it was offered; the figures mean nothing then. ``note``: why the time is an estimate. ``at``: when, UTC;
    ``version``: of nestc.
    """

    seconds: float
    kind: Kind = "measured"
    spread: float = 0.0
    runs: int = 0
    joules: float | None = None
    energy_kind: Kind = "estimated"
    bytes: int = 0
    refusal: str | None = None
    note: str = ""
    at: str = ""
    version: str = ""


def stamped(entry: Entry) -> Entry:
    """The entry with today's date and this version of nestc."""
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return dataclasses.replace(entry, at=now, version=__version__)


class ProfileStore:
    """Entries by key. It only saves time: where it cannot be read or written, everything is measured again.

    Any number of processes and threads may read and write; an entry that is no entry is as if it were not there.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._texts = TextStore(path or store_path(), _ENTRIES)

    @property
    def path(self) -> Path:
        """The file."""
        return self._texts.path

    def get(self, key: Key) -> Entry | None:
        """What was measured, or None."""
        text = self._texts.get(_text(key))
        return None if text is None else _read(text)

    def put(self, key: Key, entry: Entry) -> None:
        """Keep an entry, in place of what was there."""
        self.put_all({key: entry})

    def put_all(self, entries: Mapping[Key, Entry]) -> None:
        """Keep several entries: all of them, or none."""
        self._texts.put_all({_text(key): json.dumps(dataclasses.asdict(entry)) for key, entry in entries.items()})


def _text(key: Key) -> str:
    return f"{_FORMAT}|{key.region}|{key.device}|{key.context}"


_FIELDS: Mapping[str, tuple[type, ...]] = {
    "seconds": (float, int),
    "kind": (str,),
    "spread": (float, int),
    "runs": (int,),
    "joules": (float, int, type(None)),
    "energy_kind": (str,),
    "bytes": (int,),
    "refusal": (str, type(None)),
    "note": (str,),
    "at": (str,),
    "version": (str,),
}


def _read(text: str) -> Entry | None:
    """The entry that a text holds, or None if it holds something else."""
    try:
        data: object = json.loads(text)
    except ValueError:
        return None
    if not isinstance(data, dict):
        return None
    given = cast("dict[str, Any]", data)
    if set(given) != set(_FIELDS) or not all(isinstance(given[name], kinds) for name, kinds in _FIELDS.items()):
        return None
    if given["kind"] not in get_args(Kind) or given["energy_kind"] not in get_args(Kind):
        return None
    figures = [given["seconds"], given["spread"], given["runs"], given["bytes"], given["joules"] or 0.0]
    if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
        return None
    return Entry(**given)
