"""A region: a few ONNX nodes that become one or a few kernels, as plain data that no later stage can edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

AttributeValue: TypeAlias = (
    int | float | str | bytes | np.ndarray | tuple[int, ...] | tuple[float, ...] | tuple[str, ...] | None
)


@dataclass(frozen=True)
class TensorType:
    """Element type (ONNX name in lower case, e.g. ``float32``, ``bfloat16``, ``bool``) and static shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """One ONNX node. ``inputs``/``outputs`` are value names, ``""`` where an optional one is absent."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    domain: str = ""
    name: str = ""

    def input(self, index: int) -> str:
        """Name of input `index`, ``""`` if absent."""
        return self.inputs[index] if index < len(self.inputs) else ""

    def output(self, index: int) -> str:
        """Name of output `index`, ``""`` if absent."""
        return self.outputs[index] if index < len(self.outputs) else ""


@dataclass(frozen=True)
class Region:
    """An anchor operator with its elementwise tail, or a group of elementwise/data-movement operators.

    ``ops`` is in topological order. ``inputs`` are the values that come from outside, constants excluded;
    ``outputs`` are the values used outside. ``types`` covers every value named in the region, constants included.
    ``constants`` gives each constant operand (initializer) as a function that returns the array, so that weights
    are read (or mapped) only when a kernel packs them.
    """

    name: str
    anchor: str | None
    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: Mapping[str, TensorType]
    constants: Mapping[str, Callable[[], np.ndarray]]

    @property
    def origin(self) -> tuple[str, ...]:
        """The ONNX nodes this region computes, as ``op_type:name``."""
        return tuple(f"{op.op_type}:{op.name}" for op in self.ops)

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a constant operand, or None if `name` is absent or not a constant."""
        reader = self.constants.get(name)
        return None if reader is None else reader()
