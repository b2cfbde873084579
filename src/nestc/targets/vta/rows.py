"""Values of three axes as matrices: what a MatMul reads lies in rows, its last axis as channels, in all of a partition.

A value [n, c, w] is otherwise a map of c channels, as a convolution of one dimension sees it. Both lie differently in
memory, so that whoever touches a value that a MatMul reads or makes has to take it as rows too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from nestc.errors import TargetError
from nestc.graph.region import Region, TensorType

ROWWISE = frozenset("MatMul DequantizeLinear QuantizeLinear Add Sub Mul Relu Clip Max Min Identity".split())
"""Operators that do the same to every row, whatever axes the rows come from."""


def by_rows(region: Region) -> Region | None:
    """The region with values [b, m, k] as matrices [b * m, k]; None if there are none or an operator forbids it."""
    names = rank3(region)
    if not names or any(op.op_type not in ROWWISE or op.domain for op in region.ops):
        return None
    shapes = {name: region.types[name].shape for name in _everything(region) if len(region.types[name].shape) == 3}
    constants = dict(region.constants)
    types: dict[str, TensorType] = dict(region.types)
    rows = {prod(shape[:2]) for name, shape in shapes.items() if name not in constants}
    if len(rows) != 1:
        return None  # a value is repeated along an axis
    for name, shape in shapes.items():
        if name in constants and prod(shape[:2]) != 1:
            return None  # a constant for each row
        flat = (prod(shape[:2]), shape[2])
        types[name] = TensorType(types[name].dtype, flat)
        if name in constants:
            constants[name] = _reshaped(constants[name], flat)
    return replace(region, types=types, constants=constants)


def rank3(region: Region) -> tuple[str, ...]:
    """Values at the region's border that have three axes."""
    return tuple(name for name in (*region.inputs, *region.outputs) if len(region.types[name].shape) == 3)


def row_values(regions: Sequence[Region], asks: Callable[[Region], bool]) -> frozenset[str]:
    """The values of a partition that lie in rows: those of regions that ask for it, and of regions that share them.

    Raises TargetError if a region that cannot take rows shares a value with one that needs them.
    """
    found: set[str] = set()
    waiting: Mapping[str, Region] = {region.name: region for region in regions if rank3(region)}
    because: dict[str, str] = {}
    joined = [region for region in waiting.values() if asks(region)]
    while joined:
        for region in joined:
            names = rank3(region)
            if by_rows(region) is None:
                shared = next(name for name in names if name in found)
                raise TargetError(
                    f"region {region.name} takes value {shared!r} as channels and region {because[shared]} as rows of a"
                    " matrix, and VTA cannot transpose: put one of them on cpu with --plan"
                )
            found.update(names)
            for name in names:
                because.setdefault(name, region.name)
        done = {region.name for region in joined}
        waiting = {name: region for name, region in waiting.items() if name not in done}
        joined = [region for region in waiting.values() if found.intersection(rank3(region))]
    return frozenset(found)


def _everything(region: Region) -> tuple[str, ...]:
    names = (name for op in region.ops for name in (*op.inputs, *op.outputs) if name)
    return tuple(dict.fromkeys((*region.inputs, *names, *region.outputs)))


def _reshaped(read: Callable[[], np.ndarray], shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: read().reshape(shape)
