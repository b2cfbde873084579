"""Whole compiled models, kept in the user's store: a model that was compiled before becomes its bundle in no time.

What was asked for is the key: the content of the model's file, the options, the machine, what is known of the speed of
its kernels, and the versions of nestc and of the packages that it compiles with. It is looked up before any of them is
imported, which takes longer than all the rest.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import mmap
import os
import sys
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nestc.blobs import code_digest, key_of, user_store
from nestc.cache import tuning_path
from nestc.errors import BundleError

_CLOCK = 10_000_000
"""Nanoseconds by which the time of a file's last change may be before it: file systems round to ticks."""

_PACKAGES = ("numpy", "ml-dtypes", "onnx", "onnx-ir", "onnxscript", "protobuf", "llvmlite")


@dataclass(frozen=True)
class Request:
    """A model file and what it is to be compiled to; ``began`` (nanoseconds) is when its content was read."""

    model: Path
    key: str
    tuning: str
    began: int


def request(model: Path, targets: Iterable[str], options: Mapping[str, Any]) -> Request | None:
    """The request for `model` on `targets` with these `options` (JSON values), or None where nothing is kept.

    Targets other than the CPU may depend on more than can be seen here. Raises OSError if the file cannot be read.
    """
    specs = tuple(targets)
    if any(spec.partition(":")[0] != "cpu" for spec in specs):
        return None
    began = time.time_ns()
    with ThreadPoolExecutor(1) as pool:
        content = pool.submit(_file_digest, model)  # beside the imports below
        machine, tuning = _machine(), _tuning()
        wanted = json.dumps([model.name, specs, options], sort_keys=True)
        key = key_of("bundle", wanted, machine, tuning, _versions(), content.result())
    return Request(model, key, tuning, began)


def fetch(asked: Request, destination: Path) -> dict[str, Any] | None:
    """Write the bundle that was kept for a request, and give what was reported of it; None if there is none.

    The file appears when it is complete. It is not waited for until it is on the disk: what a loss of power takes is
    noticed by its hashes, and made again as fast. Raises BundleError if it cannot be written.
    """
    entry = user_store().get(asked.key)
    if entry is None:
        return None
    told = json.loads(entry)
    try:
        digests = {name: _file_digest(asked.model.parent / name) for name in told["external"]}
    except OSError:
        return None  # compiling says what is wrong with the file
    try:
        return told["report"] if user_store().copy(_bundle_key(asked, digests), destination) else None
    except OSError as error:
        raise BundleError(f"cannot write the bundle {destination}: {error.strerror or error}") from error


def keep(asked: Request, destination: Path, report: Mapping[str, Any]) -> None:
    """Keep the bundle at `destination`, unless the model changed while it was compiled."""
    from nestc.importers.external import external_files

    try:
        files = external_files(asked.model)
        digests = {file.relative_to(asked.model.parent).as_posix(): _file_digest(file) for file in files}
        if any(file.stat().st_mtime_ns > asked.began - _CLOCK for file in (asked.model, *files)):
            return
        with open(destination, "rb") as file:
            bundle = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError:
        return  # it only saves time
    if _tuning() != asked.tuning:
        return
    user_store().put(_bundle_key(asked, digests), bundle)
    told = {"external": sorted(digests), "report": report}
    user_store().put(asked.key, json.dumps(told).encode())


def _bundle_key(asked: Request, external: Mapping[str, str]) -> str:
    """The key of the bundle, once it is known which other files hold weights, and what is in them."""
    return key_of(asked.key, json.dumps(external, sort_keys=True))


def _file_digest(path: Path) -> str:
    """SHA-256 of a file; other threads run meanwhile."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return hashlib.sha256().hexdigest()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return hashlib.sha256(data).hexdigest()


def _machine() -> str:
    """This machine, as the CPU target sees it."""
    from nestc import host

    return f"{host.host_cpu()!r} {host.available_cpus()}"


def _tuning() -> str:
    """What is known of the speed of kernels here, which decides between them."""
    try:
        return _file_digest(tuning_path())
    except OSError:
        return ""


def _versions() -> str:
    """All that compiles, by version; nestc itself by its files, since a checkout changes without a new version."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    return " ".join([sys.version, code_digest(".", "tune/defaults.json"), *packages])
