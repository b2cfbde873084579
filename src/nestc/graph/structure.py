"""A region as plain data in which no name counts, and the hash of it: equal where the same is computed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from nestc.graph.region import Region


def structure(region: Region, contents: Callable[[str], Any]) -> list[Any]:
    """``[anchor, inputs, operators, types, constants, outputs]``, with values numbered in the order they are met.

    What values, nodes and the region are called does not count. `contents` says, as JSON has it, what of a constant
    does, by its name. An attribute that is not set counts as absent, and so do types and constants that nothing uses.
    """
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers)) if name else -1

    inputs = [number(name) for name in region.inputs]
    ops = [
        [
            f"{op.domain}::{op.op_type}",
            {key: plain(value) for key, value in sorted(op.attributes.items()) if value is not None},
            [number(name) for name in op.inputs],
            [number(name) for name in op.outputs],
        ]
        for op in region.ops
    ]
    types = sorted((number(name), type_.dtype, type_.shape) for name, type_ in region.types.items() if name in numbers)
    constants = sorted((number(name), contents(name)) for name in region.constants if name in numbers)
    outputs = [number(name) for name in region.outputs]
    return [region.anchor, inputs, ops, types, constants, outputs]


def plain(value: object) -> Any:
    """A value as JSON has it, the same in every process; an array by its hash, and what JSON cannot hold by the name of
    its type."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic | np.ndarray):
        return _array(np.asarray(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in sorted(cast("Mapping[Any, Any]", value).items(), key=str)}
    if isinstance(value, tuple | list):
        return [plain(item) for item in cast("Sequence[Any]", value)]
    return type(value).__qualname__


def _array(array: np.ndarray) -> list[Any]:
    about: list[Any] = ["array", str(array.dtype), list(array.shape)]
    if array.dtype.hasobject:  # strings
        return [*about, [str(item) for item in array.reshape(-1)]]
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return [*about, hashlib.sha256(data.data).hexdigest()]


def digest(value: Any) -> str:
    """32 hexadecimal digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
