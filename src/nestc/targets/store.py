"""The tuning store: what searches found, kept between runs."""

from __future__ import annotations

from pathlib import Path

from nestc.cache import TextStore, tuning_path

_ENTRIES = 100_000  # kept; a network has some 30 layers of different geometry


def store_path() -> Path:
    """Where the store lies: a file beside the other caches of nestc, in the user's cache folder."""
    return tuning_path()


class TuningStore(TextStore):
    """Short texts by key, in the user's tuning store or the file given; see `TextStore`."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path or store_path(), _ENTRIES)
