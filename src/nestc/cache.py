"""The user's cache folder, and small SQLite files in it that any number of processes may use at once."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

_TUNED = 100_000  # results kept in the tuning store; a network has some 30 layers of different geometry
_WAIT = 5.0  # seconds that a process waits for another one's write
_SCHEMA = (
    "create table if not exists result (key text primary key, value text not null, at integer not null)",
    "create index if not exists result_at on result (at)",
)


def cache_folder() -> Path:
    """Where everything is kept that only saves time; it may be deleted at any moment."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "nestc"


def tuning_path() -> Path:
    """Where the tuning store lies, on whose content it depends what a model is compiled to."""
    return cache_folder() / "tuning.sqlite"


class TextStore:
    """Short texts by key in one file, the newest `entries` of them.

    It only saves time: a folder that cannot be written, or a full disk, is no error. A file that is no database (cut
    short, overwritten) is put aside, with the suffix ``.corrupt``, and begun anew.
    """

    def __init__(self, path: Path, entries: int) -> None:
        self.path = path
        self.entries = entries

    def get(self, key: str) -> str | None:
        """What was put under `key`, or None."""
        try:
            with self._open(write=False) as database:
                row = database.execute("select value from result where key = ?", (key,)).fetchone()
        except sqlite3.DatabaseError as error:
            self._discard_if_corrupt(error)
            return None
        except OSError:
            return None
        return row[0] if row and isinstance(row[0], str) else None

    def starting(self, prefix: str) -> dict[str, str]:
        """Everything whose key starts with `prefix` (printable text), by the whole key."""
        try:
            with self._open(write=False) as database:
                query = "select key, value from result where key >= ? and key < ?"
                rows = database.execute(query, (prefix, prefix + "\U0010ffff")).fetchall()
        except sqlite3.DatabaseError as error:
            self._discard_if_corrupt(error)
            return {}
        except OSError:
            return {}
        return {key: value for key, value in rows if isinstance(key, str) and isinstance(value, str)}

    def put(self, key: str, value: str) -> None:
        """Keep `value` under `key`, in place of what was there."""
        self.put_all({key: value})

    def put_all(self, values: Mapping[str, str]) -> None:
        """Keep several values: all of them, or none."""
        for _ in range(2):
            try:
                self._write(values)
            except sqlite3.DatabaseError as error:
                if self._discard_if_corrupt(error):
                    continue
            except OSError:
                pass  # no folder to write in: the result is found again next time
            return

    def _write(self, values: Mapping[str, str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._open(write=True) as database:
            for statement in _SCHEMA:
                database.execute(statement)
            database.executemany(
                "insert or replace into result values (?, ?, (select coalesce(max(at), 0) + 1 from result))",
                values.items(),
            )
            database.execute("delete from result where at <= (select max(at) from result) - ?", (self.entries,))

    @contextmanager
    def _open(self, *, write: bool) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are kept if nothing is raised; one an operation, so that threads share none."""
        mode = "rwc" if write else "ro"
        address = f"{self.path.absolute().as_uri()}?mode={mode}"
        with closing(sqlite3.connect(address, uri=True, timeout=_WAIT)) as database, database:
            yield database

    def _discard_if_corrupt(self, error: sqlite3.DatabaseError) -> bool:
        """Put a file aside that is no database, or has other tables; whether that was done."""
        if isinstance(error, sqlite3.OperationalError) and not str(error).startswith(
            ("no such column", "table result")
        ):
            return False  # not there, locked, read-only or full: the file may be sound
        try:
            self.path.replace(self.path.with_suffix(".corrupt"))
        except OSError:
            return False
        return True


class TuningStore(TextStore):
    """What searches found, in the user's tuning store or the file given; see `TextStore`."""

    def __init__(self, path: Path | None = None) -> None:
        super().__init__(path or tuning_path(), _TUNED)
