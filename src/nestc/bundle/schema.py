"""The manifest of a bundle as plain records, and a reader that checks every field and names the wrong one."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from nestc.errors import BundleError

FORMAT = "nestc-bundle"
VERSION = 2
"""Raised when an older nestc could not run a bundle written by this one (2: devices, fallbacks); see `upgraded`."""

WEIGHTS = "weights.safetensors"
MANIFEST = "manifest.json"
GRAPH = "graph.onnx"
"""Entries of the archive; others are in ``partitions/<folder>/``."""

Kind = Literal["measured", "modelled", "estimated"]
"""How a time is known: by a clock, from a device's simulator, or assumed."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, element type (``float32``, ``bool`` ...) and shape of a value; None is a size known only at run time."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None


class WeightSpec(NamedTuple):
    """A constant of a partition; it is stored flat, padded with zeros to whole 64 bytes, under ``<folder>/<name>``."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DeviceSpec:
    """What the runtime knows of a device: with whom it shares its cores, how it is reached, and what it draws.

    Devices of one ``resource`` never run at the same time. Each launch of a partition on a modelled device takes
    ``launch_seconds``; a tensor on its way to or from the host's memory ``latency_seconds`` and its bytes over
    ``bytes_per_second`` (0: nothing is copied), and ``joules_per_byte``. ``kind`` is how these figures of the link are
    known. ``watts`` while it runs, 0 where unknown.
    """

    name: str
    resource: str
    launch_seconds: float = 0.0
    latency_seconds: float = 0.0
    bytes_per_second: float = 0.0
    joules_per_byte: float = 0.0
    kind: Kind = "measured"
    watts: float = 0.0

    def seconds(self, nbytes: int) -> float:
        """Time of a tensor on its way to or from the host's memory."""
        return self.latency_seconds + (nbytes / self.bytes_per_second if self.bytes_per_second else 0.0)


class ArtifactSpec(NamedTuple):
    """An artifact beside a partition's own: its blobs are in ``partitions/<folder>/``."""

    kind: str
    folder: str
    files: tuple[str, ...]
    weights: tuple[WeightSpec, ...]
    metadata: Mapping[str, Any]


class PartitionSpec(NamedTuple):
    """A compiled partition: who runs it, the values at its border, and its blobs (in ``partitions/<folder>/``).

    ``fallback`` is the same partition compiled for the CPU, for when its device fails.
    """

    name: str
    device: str
    kind: str
    folder: str
    inputs: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    regions: tuple[str, ...]
    files: tuple[str, ...]
    weights: tuple[WeightSpec, ...]
    metadata: Mapping[str, Any]
    fallback: ArtifactSpec | None


class Entry(NamedTuple):
    """A file of the zip archive with its size and the SHA-256 of its contents (hexadecimal)."""

    path: str
    bytes: int
    sha256: str


class Manifest(NamedTuple):
    """``manifest.json``. Partitions are in execution order; ``info`` is free (plan, predictions ...).

    ``devices`` describes those whose links or resources are not the default's (see `Bundle`).
    """

    format: str
    version: int
    producer: str
    name: str
    threads: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    partitions: tuple[PartitionSpec, ...]
    entries: tuple[Entry, ...]
    info: Mapping[str, Any]
    devices: tuple[DeviceSpec, ...]


def upgraded(manifest: object) -> object:
    """The JSON of a manifest of any version that can be read, with what version 1 did not have: nothing of it."""
    if not isinstance(manifest, dict):
        return manifest
    fields = cast("dict[str, object]", manifest)
    partitions = fields.get("partitions")
    if fields.get("version") != 1 or not isinstance(partitions, list):
        return fields
    parts = [
        {**cast("dict[str, object]", part), "fallback": None} if isinstance(part, dict) else part
        for part in cast("list[object]", partitions)
    ]
    return {**fields, "partitions": parts, "devices": []}


def to_json(value: Any) -> Any:
    """A record (or a tuple or mapping of them) as JSON values."""
    if _is_record(type(value)):
        return {name: to_json(getattr(value, name)) for name in _hints(type(value))}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, tuple | list):
        return [to_json(item) for item in cast("tuple[Any, ...]", value)]
    return value


T = TypeVar("T")


def from_json(kind: type[T], value: object, where: str = "manifest.json") -> T:
    """Read a record from JSON values. Raises BundleError naming the field that is missing, unknown or wrong."""
    return cast(T, _read(kind, value, where))


def _read(kind: Any, value: object, where: str) -> Any:
    if kind is Any:
        return value
    if _is_record(kind):
        return _read_fields(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _read(inner, value, where)
    if origin is Literal:
        if value not in arguments:
            raise BundleError(f"{where} must be one of {', '.join(map(repr, arguments))}, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where} must be a list, not {_named(value)}")
        items = cast("list[object]", value)
        return tuple(_read(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(items))
    if origin is not None:  # Mapping[str, Any]
        if not isinstance(value, dict):
            raise BundleError(f"{where} must be an object, not {_named(value)}")
        return cast("dict[str, Any]", value)
    if kind is float:
        return _read_float(value, where)
    if type(value) is not kind:  # `isinstance` would take True for an integer
        wanted = {str: "a string", int: "a whole number"}[kind]
        raise BundleError(f"{where} must be {wanted}, not {_named(value)}")
    if kind is int and cast(int, value) < 0:
        raise BundleError(f"{where} must not be negative, but is {value}")
    return value


def _read_float(value: object, where: str) -> float:
    if type(value) is not int and type(value) is not float:
        raise BundleError(f"{where} must be a number, not {_named(value)}")
    if not 0 <= value < math.inf:
        raise BundleError(f"{where} must be a number that is not negative, but is {value}")
    return float(value)


def _read_fields(kind: type[Any], value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise BundleError(f"{where} must be an object, not {_named(value)}")
    given = cast("dict[str, object]", value)
    hints = _hints(kind)
    missing = next((name for name in hints if name not in given), None)
    if missing is not None:
        raise BundleError(f"{where} has no field {missing!r}")
    unknown = next((name for name in given if name not in hints), None)
    if unknown is not None:
        raise BundleError(f"{where} has the unknown field {unknown!r}")
    return kind(**{name: _read(hint, given[name], f"{where}: {name}") for name, hint in hints.items()})


def _is_record(kind: Any) -> bool:
    """Whether a type has named fields: a dataclass, or a named tuple, which takes a fifth of the time to define."""
    return dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")


@cache
def _hints(kind: type[Any]) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _named(value: object) -> str:
    names: dict[type, str] = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")
