"""A content-addressed store of byte strings on disk, of bounded size, for what is faster read than made again."""

from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO

from nestc.cache import cache_folder

LIMIT = 2 << 30
"""Bytes that the store of a user may hold before what was used longest ago is removed."""

_PIECE = 1 << 24
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
        try:
            data = memoryview(self.path(key).read_bytes())
        except OSError:
            return None
        if not _whole(data):
            return None
        self._used(key)
        return bytes(data[_HEADER:])

    def copy(self, key: str, destination: Path) -> bool:
        """Make `destination` a file with what was put under `key`; False, and no file, if that is not there or damaged.

        The file appears when it is complete. Raises OSError if it cannot be written.
        """
        with ExitStack() as stack:
            try:
                source = stack.enter_context(open(self.path(key), "rb"))
            except OSError:
                return False
            data = stack.enter_context(_mapped(source))
            pool = stack.enter_context(ThreadPoolExecutor(1))
            whole = pool.submit(_whole, data)  # beside the copying, which needs no processor to speak of
            temporary = destination.with_name(f".{destination.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
            try:
                with open(temporary, "xb") as target:
                    _copy(source, target, len(data))
                if not whole.result():
                    return False
                os.replace(temporary, destination)
            finally:
                temporary.unlink(missing_ok=True)
        self._used(key)
        return True

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

    def _used(self, key: str) -> None:
        with suppress(OSError):  # a folder that is only read keeps no order
            os.utime(self.path(key))

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


def _whole(data: memoryview) -> bool:
    """Whether the content of a file of the store is what was put there."""
    return len(data) >= _HEADER and bytes(data[:_HEADER]) == _header(hashlib.sha256(data[_HEADER:]).digest())


@contextmanager
def _mapped(file: IO[bytes]) -> Iterator[memoryview]:
    """A file's bytes; other threads can run while they are read."""
    if not os.fstat(file.fileno()).st_size:
        yield memoryview(b"")
        return
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages, memoryview(pages) as data:
        yield data


def _copy(source: IO[bytes], target: IO[bytes], size: int) -> None:
    """Write all but the header of a file of the store to another file, in the kernel where it has a way."""
    source.seek(_HEADER)
    position = _HEADER
    if hasattr(os, "copy_file_range"):
        with suppress(OSError):  # not between these file systems
            while position < size:
                copied = os.copy_file_range(source.fileno(), target.fileno(), size - position, position)
                if not copied:
                    break
                position += copied
    source.seek(position)
    shutil.copyfileobj(source, target, _PIECE)


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
