"""Random inputs on which a partition can be run to time it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nestc.bundle.dtypes import numpy_dtype
from nestc.graph.region import Op, TensorType
from nestc.targets.api import Partition

_INDEXED = {"Gather": 1, "GatherElements": 1, "GatherND": 1, "Scatter": 1, "ScatterElements": 1, "ScatterND": 1}
"""Operators that find elements of their first operand by an index, and which operand that is."""

_WHOLE_RANGE = ("int8", "uint8", "int16", "uint16")
"""Quantized numbers; what is wider holds indices, counts and masks."""


class CannotDraw(Exception):
    """No input can be made up; the message says of which value and why."""


def draw(partition: Partition, seed: int = 0) -> tuple[list[np.ndarray], bool]:
    """The inputs of a partition, in its order, and whether any values would do (so that a failure is the device's own).

    Floats are normally distributed; integers of up to 16 bits are over their range; indices are valid ones, other
    integers 1 or 2, and bools either. Raises CannotDraw for sequences, and for sizes known only at run time.
    """
    generator = np.random.default_rng(seed)
    ops = [op for region in partition.regions for op in region.ops]
    drawn: list[np.ndarray] = []
    sure = True
    for name in partition.inputs:
        type_ = partition.types[name]
        if any(size < 0 for size in type_.shape):
            raise CannotDraw(f"the size of value {name!r} is known only at run time")
        limit = _limit(name, ops, partition)
        drawn.append(_array(type_, limit, generator, name))
        sure = sure and (limit is not None or _any_value(type_.dtype))
    return drawn, sure


def _any_value(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat")) or dtype in _WHOLE_RANGE or dtype == "bool"


def _array(type_: TensorType, limit: int | None, generator: np.random.Generator, name: str) -> np.ndarray:
    dtype, shape = type_.dtype, type_.shape
    try:
        kind = numpy_dtype(dtype)
    except ValueError:
        raise CannotDraw(f"value {name!r} is a {dtype}, which has no random values") from None
    if dtype == "string":
        return np.full(shape, "", object)
    if dtype == "bool":
        return generator.integers(0, 2, shape).astype(bool)
    if limit is not None:
        return generator.integers(0, limit, shape).astype(kind)
    if dtype in _WHOLE_RANGE:
        limits = np.iinfo(dtype)
        return generator.integers(limits.min, limits.max + 1, shape).astype(kind)
    if dtype.startswith(("int", "uint")):
        return generator.integers(1, 3, shape).astype(kind)  # a divisor may not be 0
    return generator.standard_normal(shape, np.float32).astype(kind)


def _limit(name: str, ops: Sequence[Op], partition: Partition) -> int | None:
    """What a value has to stay below so that it is a valid index; None if it is none.

    Where an index is computed first, only 0 is sure to stay one.
    """
    if partition.types[name].dtype not in ("int32", "int64"):
        return None
    limits = [_size(op, partition) for op in ops if op.op_type in _INDEXED and op.input(_INDEXED[op.op_type]) == name]
    if limits:
        return max(1, min(limits))
    return 1 if any(op.op_type in _INDEXED for op in ops) else None


def _size(op: Op, partition: Partition) -> int:
    """How many elements lie along what an operator indexes; of several axes the fewest."""
    data = partition.types[op.input(0)].shape
    if not op.op_type.endswith("ND"):
        axis = op.attributes.get("axis", 0)
        return data[axis] if isinstance(axis, int) and data else 1
    indices = partition.types[op.input(_INDEXED[op.op_type])].shape
    first = op.attributes.get("batch_dims", 0)
    begin = first if isinstance(first, int) else 0
    return min(data[begin : begin + (indices[-1] if indices else 1)], default=1)
