"""A content-addressed store of byte strings on disk, of bounded size, for what is faster read than made again."""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import time
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from nestc.cache import cache_folder

LIMIT = 2 << 30
"""Bytes that the store of a user may hold before what was used longest ago is removed."""

_KEPT = 0.8  # of the limit that is left then, so that this is rare
_MARK = b"nestc blob 1\n\0\0\0"
_HEADER = 64  # bytes: the mark, the SHA-256 of the rest, zeros; so the content begins aligned for any vector
_ABANDONED = 3600.0  # seconds after which a temporary file is taken for one that its process did not finish
_LOOK_AGAIN = 32 << 20  # bytes that a process writes between two looks at the size of the store


class BlobStore:
    """Byte strings by key (hexadecimal digits), in one file each, below `folder`.

    Any number of processes and threads may use one folder. It only saves time: what is not there, was cut or altered is
    None; a folder that cannot be written, or a full disk, is no error.
    """

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self._written: int | None = None  # since the last look at the size of the store; None: no look yet

    def get(self, key: str) -> bytes | None:
        """What was put under `key`, or None. That it is asked for counts as use."""
        found = self.view(key)
        return None if found is None else bytes(found)

    def view(self, key: str) -> memoryview | None:
        """The same as the mapped file, for large contents; it stays what it is when the store loses or replaces it."""
        path = self.path(key)
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size < _HEADER:
                    return None
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            if bytes(data[:_HEADER]) != _header(hashlib.sha256(data[_HEADER:]).digest()):
                return None
            os.utime(path)
        except OSError:
            return None
        return data[_HEADER:]

    def put(self, key: str, content: bytes | memoryview) -> None:
        """Keep `content` under `key`; the file appears when it is complete."""
        path = self.path(key)
        if len(content) > self.limit // 2:
            return  # it would take the place of nearly all else
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_header(hashlib.sha256(content).digest()))
                    file.write(content)
                os.replace(temporary, path)
            except OSError:
                os.unlink(temporary)
                raise
            self._count(len(content))
        except OSError:
            return

    def path(self, key: str) -> Path:
        """The file of a key."""
        return self.folder / key[:2] / key

    def _count(self, size: int) -> None:
        """Look at the size of the store at the first write of this process, and now and then."""
        self._written = None if self._written is None else self._written + size
        if self._written is None or self._written > min(_LOOK_AGAIN, self.limit // 8):
            self._written = 0
            self.trim()

    def trim(self) -> None:
        """Remove what was used longest ago if the store has become too large, and what processes left unfinished."""
        files: list[tuple[float, int, str]] = []
        now = time.time()
        for folder in _entries(self.folder):
            for entry in _entries(folder.path):
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # another process was faster
                if not entry.name.endswith(".tmp"):
                    files.append((status.st_mtime, status.st_size, entry.path))
                elif now - status.st_mtime > _ABANDONED:
                    _remove(entry.path)
        total = sum(size for _, size, _ in files)
        if total <= self.limit:
            return
        for _, size, path in sorted(files):
            _remove(path)
            total -= size
            if total <= self.limit * _KEPT:
                return


def user_store() -> BlobStore:
    """The store of this user: kernels, compiled programs and bundles together, so that one bound holds for all."""
    folder = cache_folder() / "blobs"
    return _stores.setdefault(folder, BlobStore(folder))


_stores: dict[Path, BlobStore] = {}


def key_of(*parts: str | bytes) -> str:
    """A key of a sequence of texts and bytes, other for every other sequence."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(f"{type(part).__name__} {len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


@cache
def code_digest(*parts: str) -> str:
    """A digest of the source files of parts of nestc (folders or modules, e.g. ``tensor``, ``kernels/api.py``).

    A key of something that they make contains it, so that no other version of them finds it.
    """
    root = Path(__file__).resolve().parent
    digest = hashlib.sha256()
    for part in parts:
        place = root / part
        for file in [place] if place.is_file() else sorted(place.rglob("*.py")):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()} {len(content)} ".encode())
            digest.update(content)
    return digest.hexdigest()


def _header(digest: bytes) -> bytes:
    return (_MARK + digest).ljust(_HEADER, b"\0")


def _entries(folder: Path | str) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
