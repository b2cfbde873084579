"""What a measured choice of kernels depends on, as text: the region's structure, the machine, and our own code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np

from nestc import __version__
from nestc.blobs import code_digest
from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine

_FEW = 16
"""Integers of so many elements or fewer may be sizes, axes or places, which decide what is computed."""

_NO_PART = ("name", "triple", "features", "l3_bytes")
"""Of a machine: what changes no choice, but differs between virtual machines on the same processor. Features that
kernels are chosen by are fields of their own."""


def region_key(region: Region) -> str:
    """A hash of operators, attributes, types, how values connect and which of them are constant.

    Names do not count, nor do the values of weights: layers of one geometry share what is known. Only few integers
    count by their contents, such as where a Slice begins.
    """
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers)) if name else -1

    inputs = [number(name) for name in region.inputs]
    ops = [
        [
            f"{op.domain}::{op.op_type}",
            {key: _plain(value) for key, value in sorted(op.attributes.items()) if value is not None},
            [number(name) for name in op.inputs],
            [number(name) for name in op.outputs],
        ]
        for op in region.ops
    ]
    types = sorted((number(name), type_.dtype, type_.shape) for name, type_ in region.types.items() if name in numbers)
    constants = sorted((number(name), _contents(region, name)) for name in region.constants if name in numbers)
    outputs = [number(name) for name in region.outputs]
    return _digest([region.anchor, inputs, ops, types, constants, outputs])


def machine_key(machine: CpuMachine) -> str:
    """A readable name of a kind of machine, and a hash of what kernels are chosen by."""
    known = {key: value for key, value in dataclasses.asdict(machine).items() if key not in _NO_PART}
    return f"{machine.cpu}-{_digest(known)[:12]}"


@lru_cache(maxsize=1)
def code_version() -> str:
    """The version of nestc and a digest of the code that makes kernels as fast as they are."""
    return f"{__version__}-{code_digest('kernels', 'codegen', 'tensor')[:12]}"


def _contents(region: Region, name: str) -> Any:
    type_ = region.types[name]
    if type_.dtype not in ("int32", "int64") or np.prod(type_.shape) > _FEW:
        return "parameter"
    return _plain(region.constants[name]())


def _plain(value: object) -> Any:
    """A value as JSON has it, the same in every process."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, np.generic | np.ndarray):
        array = np.asarray(value)
        return [str(array.dtype), list(array.shape), [str(item) for item in array.reshape(-1)]]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in sorted(cast("Mapping[Any, Any]", value).items(), key=str)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return type(value).__qualname__


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
