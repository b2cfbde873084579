"""Read a bundle: check its structure and hashes, and map its weights from the file without copying them."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Mapping
from typing import cast

import numpy as np

from nestc.bundle.archive import stored
from nestc.bundle.artifact import Artifact
from nestc.bundle.bundle import Bundle, BundlePartition
from nestc.bundle.dtypes import numpy_dtype
from nestc.bundle.schema import (
    FORMAT,
    GRAPH,
    MANIFEST,
    VERSION,
    WEIGHTS,
    ArtifactSpec,
    Entry,
    Manifest,
    PartitionSpec,
    WeightSpec,
    from_json,
    upgraded,
)
from nestc.errors import BundleError


def read(path: str | os.PathLike[str]) -> Bundle:
    """Read the bundle at `path`. Its weights are read-only views of the mapped file, which must not change meanwhile.

    Raises BundleError if it is not a bundle, is cut or altered, or was written by a newer nestc.
    """
    source = os.fspath(path)
    try:
        with open(source, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b"")
    except OSError as error:
        raise BundleError(f"cannot read the bundle {source}: {error.strerror or error}") from error
    contents = _contents(source, view)
    try:
        return _bundle(contents)
    except BundleError as error:
        raise BundleError(f"the bundle {source} is damaged: {error}") from error


def _contents(source: str, view: memoryview) -> dict[str, memoryview]:
    """The data of every entry, after the manifest has been found to be one that this version reads."""
    try:
        entries = stored(view)
    except ValueError as error:
        if bytes(view[:4]) != b"PK\x03\x04":
            raise BundleError(f"{source} is not a nestc bundle") from error
        raise BundleError(f"the bundle {source} is cut or damaged: {error}") from error
    if MANIFEST not in entries:
        raise BundleError(f"{source} is a zip archive without {MANIFEST}, not a nestc bundle")
    if not entries[MANIFEST].whole:
        raise BundleError(f"the bundle {source} is cut or damaged: the checksum of {MANIFEST} is wrong")
    _check_version(source, bytes(entries[MANIFEST].data))
    return {name: entry.data for name, entry in entries.items()}


def _check_version(source: str, text: bytes) -> None:
    """Look at format and version first: another version may have another schema."""
    try:
        value: object = json.loads(text)
    except ValueError as error:
        raise BundleError(f"the bundle {source} is damaged: {MANIFEST} is not JSON ({error})") from error
    fields = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    if fields.get("format") != FORMAT:
        raise BundleError(f"{source} is not a nestc bundle: {MANIFEST} does not say that it is a {FORMAT!r}")
    version = fields.get("version")
    if type(version) is not int or version < 1:
        raise BundleError(f"the bundle {source} is damaged: {MANIFEST} gives the version {version!r}")
    if version > VERSION:
        raise BundleError(
            f"the bundle {source} is of version {version}, but this nestc reads up to {VERSION}; update nestc"
        )


def _bundle(contents: Mapping[str, memoryview]) -> Bundle:
    manifest = from_json(Manifest, upgraded(json.loads(bytes(contents[MANIFEST]))))
    entries = {entry.path: entry for entry in manifest.entries}
    differing = sorted({*entries, MANIFEST} ^ set(contents))
    if differing:
        raise BundleError(f"{MANIFEST} and the archive do not agree about {', '.join(differing)}")
    for entry in manifest.entries:
        _check_entry(entry, contents[entry.path])
    tensors = _tensors(contents[WEIGHTS]) if WEIGHTS in contents else {}
    return Bundle(
        name=manifest.name,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        partitions=tuple(_partition(spec, contents, tensors) for spec in manifest.partitions),
        graph=bytes(contents[GRAPH]) if GRAPH in contents else b"",
        threads=manifest.threads,
        info=manifest.info,
        devices=manifest.devices,
    )


def _check_entry(entry: Entry, data: memoryview) -> None:
    if len(data) != entry.bytes:
        raise BundleError(f"{entry.path} has {len(data)} bytes, not {entry.bytes}")
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise BundleError(f"{entry.path} was altered (its SHA-256 is not the one in {MANIFEST})")


def _partition(
    spec: PartitionSpec, contents: Mapping[str, memoryview], tensors: Mapping[str, memoryview]
) -> BundlePartition:
    artifact = _artifact(spec.name, spec, contents, tensors)
    fallback = spec.fallback and _artifact(f"{spec.name} (fallback)", spec.fallback, contents, tensors)
    return BundlePartition(spec.name, spec.device, spec.inputs, spec.outputs, artifact, spec.regions, fallback)


def _artifact(
    name: str,
    spec: PartitionSpec | ArtifactSpec,
    contents: Mapping[str, memoryview],
    tensors: Mapping[str, memoryview],
) -> Artifact:
    files: dict[str, bytes] = {}
    for file in spec.files:
        path = f"partitions/{spec.folder}/{file}"
        if path not in contents:
            raise BundleError(f"partition {name} has no file {file!r}")
        files[file] = bytes(contents[path])
    weights = {
        weight.name: _weight(name, weight, tensors.get(f"{spec.folder}/{weight.name}")) for weight in spec.weights
    }
    return Artifact(spec.kind, files, weights, spec.metadata)


def _weight(partition: str, weight: WeightSpec, data: memoryview | None) -> np.ndarray:
    if data is None:
        raise BundleError(f"partition {partition} has no weight {weight.name!r}")
    try:
        dtype = numpy_dtype(weight.dtype)
        count = int(np.prod(weight.shape, dtype=np.int64))
        flat = np.frombuffer(data, dtype, count) if count else np.empty(0, dtype)
    except ValueError as error:
        raise BundleError(f"weight {weight.name!r} of partition {partition}: {error}") from error
    return flat.reshape(weight.shape)


def _tensors(data: memoryview) -> dict[str, memoryview]:
    """The bytes of every tensor of a safetensors file, by name."""
    if len(data) < 8:
        raise BundleError(f"{WEIGHTS} has no header")
    (length,) = struct.unpack("<Q", data[:8])
    try:
        header: dict[str, dict[str, list[int]]] = json.loads(bytes(data[8 : 8 + length]))
        body = data[8 + length :]
        spans = {name: item["data_offsets"] for name, item in header.items() if name != "__metadata__"}
        return {name: body[begin:end] for name, (begin, end) in spans.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{WEIGHTS} has a header that cannot be read: {error}") from error
