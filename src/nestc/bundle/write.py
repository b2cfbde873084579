"""Write a bundle: a zip archive of stored entries, in which every tensor starts at a multiple of 64 bytes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from nestc.bundle.artifact import Artifact
from nestc.bundle.bundle import Bundle, BundlePartition
from nestc.bundle.dtypes import SAFETENSORS
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
    to_json,
)
from nestc.errors import BundleError

ALIGNMENT = 64

# zip: local header of 30 bytes, then name and extra fields (PKWARE APPNOTE 4.3.7, 4.5); 0xD935 is the extra field that
# Android's zipalign pads with; sizes of 4 GB and more need the 20 bytes of a zip64 field.
_LOCAL_HEADER, _ZIP64_FIELD, _PADDING_ID = 30, 20, 0xD935
_ZIP64_FROM = 1 << 31
_PIECE = 1 << 24


def write(path: str | os.PathLike[str], bundle: Bundle) -> None:
    """Write `bundle` to `path`; the file appears there only when it is complete.

    Raises BundleError if it cannot be written (folder, permission, disk), and leaves nothing behind then.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        try:
            with open(temporary, "xb") as file:
                _write_archive(file, bundle)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BundleError(f"cannot write the bundle {target}: {error.strerror or error}") from error


def _write_archive(file: io.BufferedWriter, bundle: Bundle) -> None:
    entries: list[Entry] = []
    specs = [_partition_spec(number, partition) for number, partition in enumerate(bundle.partitions)]
    artifacts = list(_artifacts(specs, bundle.partitions))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:

        def store(path: str, size: int, pieces: Iterable[bytes | memoryview]) -> None:
            entries.append(_store(archive, file.tell(), path, size, pieces))

        store(GRAPH, len(bundle.graph), [bundle.graph])
        for folder, artifact in artifacts:
            for name, blob in artifact.files.items():
                store(f"partitions/{folder}/{name}", len(blob), [blob])
        header, arrays = _safetensors(artifacts)
        store(WEIGHTS, len(header) + sum(_padded(array.nbytes) for array in arrays), _weight_pieces(header, arrays))
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            producer="nestc",
            name=bundle.name,
            threads=bundle.threads,
            inputs=bundle.inputs,
            outputs=bundle.outputs,
            partitions=tuple(specs),
            entries=tuple(entries),
            info=bundle.info,
            devices=bundle.devices,
        )
        text = json.dumps(to_json(manifest), allow_nan=False, separators=(",", ":")).encode()
        _store(archive, file.tell(), MANIFEST, len(text), [text])


def _store(archive: zipfile.ZipFile, begin: int, path: str, size: int, pieces: Iterable[bytes | memoryview]) -> Entry:
    """Append one stored entry whose data is aligned. `begin` is where its header will stand in the file."""
    large = size >= _ZIP64_FROM
    info = zipfile.ZipInfo(path)  # the default date, so that equal bundles are equal files
    info.external_attr = 0o644 << 16
    data = begin + _LOCAL_HEADER + len(path.encode()) + (_ZIP64_FIELD if large else 0) + 4
    padding = -data % ALIGNMENT
    info.extra = struct.pack("<HH", _PADDING_ID, padding) + bytes(padding)
    digest = hashlib.sha256()
    with archive.open(info, "w", force_zip64=large) as stream:
        for piece in pieces:
            digest.update(piece)
            stream.write(piece)
    return Entry(path, size, digest.hexdigest())


def _partition_spec(number: int, partition: BundlePartition) -> PartitionSpec:
    folder = f"{number}-{re.sub('[^A-Za-z0-9_.-]', '_', partition.name)}"
    own, fallback = _artifact_spec(folder, partition.artifact), partition.fallback
    return PartitionSpec(
        name=partition.name,
        device=partition.device,
        kind=own.kind,
        folder=folder,
        inputs=partition.inputs,
        outputs=partition.outputs,
        regions=partition.regions,
        files=own.files,
        weights=own.weights,
        metadata=own.metadata,
        fallback=None if fallback is None else _artifact_spec(f"{folder}.fallback", fallback),
    )


def _artifact_spec(folder: str, artifact: Artifact) -> ArtifactSpec:
    return ArtifactSpec(
        kind=artifact.kind,
        folder=folder,
        files=tuple(artifact.files),
        weights=tuple(WeightSpec(name, array.dtype.name, array.shape) for name, array in artifact.weights.items()),
        metadata=artifact.metadata,
    )


def _artifacts(specs: Iterable[PartitionSpec], partitions: Iterable[BundlePartition]) -> Iterator[tuple[str, Artifact]]:
    """Every artifact, also those for when a device fails, with its folder, in file order."""
    for spec, partition in zip(specs, partitions, strict=True):
        yield spec.folder, partition.artifact
        if spec.fallback is not None and partition.fallback is not None:
            yield spec.fallback.folder, partition.fallback


def _safetensors(artifacts: Iterable[tuple[str, Artifact]]) -> tuple[bytes, list[np.ndarray]]:
    """Header of the safetensors file, padded so that data starts aligned, and the arrays in file order.

    The format wants tensors without gaps, so the padding of a tensor belongs to it: each is flat and rounded up.
    """
    fields: dict[str, dict[str, object]] = {}
    arrays: list[np.ndarray] = []
    offset = 0
    for folder, artifact in artifacts:
        for name, array in artifact.weights.items():
            if array.dtype.hasobject:
                raise BundleError(f"weight {name!r} of partition {folder} holds Python objects, which have no bytes")
            end = offset + _padded(array.nbytes)
            known = SAFETENSORS.get(array.dtype.name)
            count = (end - offset) // array.dtype.itemsize if known else end - offset
            fields[f"{folder}/{name}"] = {
                "dtype": known or "U8",
                "shape": [count],
                "data_offsets": [offset, end],
            }
            arrays.append(array)
            offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text, arrays


def _weight_pieces(header: bytes, arrays: Iterable[np.ndarray]) -> Iterator[bytes | memoryview]:
    yield header
    for array in arrays:
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        for begin in range(0, len(data), _PIECE):
            yield data[begin : begin + _PIECE]
        yield bytes(_padded(len(data)) - len(data))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _sync_folder(folder: Path) -> None:
    """Make the new name itself durable, on systems where a folder can be synchronised."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
