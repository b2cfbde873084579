"""Channel shuffles in blocked layout: Concat, Reshape, Transpose, Reshape and Split as one permutation of channels.

Every vector of an output is put together from the few vectors of the inputs that hold its channels, in registers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from nestc.graph.region import Op, Region
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered, physical_shape
from nestc.kernels.operands import Operands
from nestc.kernels.ops.attributes import axis_of, integers
from nestc.tensor.build import Builder, constant, load
from nestc.tensor.ir import Expr, Shuffle

ANCHOR = "ChannelShuffle"
"""Anchor of a region that only permutes channels (`targets.cpu.shuffle` makes them)."""

_DTYPES = frozenset({"float32", "int32", "int8", "uint8"})
_OPS = frozenset({"Concat", "Reshape", "Transpose", "Split"})

Picked = tuple[int, int] | None
"""A lane of a source vector: which source, which lane. None: zero."""


def permutation(region: Region) -> dict[str, np.ndarray] | None:
    """The channels of each output, counted through all inputs of the region one after the other.

    None if the region does more than to permute the channels (axis 1) of tensors of one size.
    """
    if not region.inputs:
        return None
    first = region.types[region.inputs[0]].shape
    if len(first) < 3 or prod(first) == 0:
        return None
    values: dict[str, np.ndarray] = {}
    start = 0
    for name in region.inputs:
        shape = region.types[name].shape
        if len(shape) != len(first) or (shape[0], *shape[2:]) != (first[0], *first[2:]):
            return None
        values[name] = np.arange(start, start + shape[1]).reshape(1, -1)
        start += shape[1]
    for op in region.ops:
        if op.op_type not in _OPS or not _permuted(op, region, values, first):
            return None
    ends = [region.types[name].shape for name in region.outputs]
    if any(len(shape) != len(first) or (shape[0], *shape[2:]) != (first[0], *first[2:]) for shape in ends):
        return None
    return {name: values[name].reshape(-1) for name in region.outputs}


def _permuted(op: Op, region: Region, values: dict[str, np.ndarray], like: Sequence[int]) -> bool:
    """Do to the channels what the operator does; False if it does more. Spatial axes stay last, the batch first."""
    spatial = len(like) - 2
    shapes = [region.types[name].shape for name in op.outputs]
    if any(shape[0] != like[0] or tuple(shape[-spatial:]) != tuple(like[2:]) for shape in shapes):
        return False
    rank = len(region.types[op.inputs[0]].shape)
    inner = rank - spatial  # batch and the axes that channels are split in
    if op.op_type == "Reshape":
        values[op.outputs[0]] = values[op.inputs[0]].reshape(1, *shapes[0][1:-spatial])
        return True
    if op.op_type == "Transpose":
        order = integers(op, "perm")
        if order is None or order[0] != 0 or order[inner:] != tuple(range(inner, rank)):
            return False
        values[op.outputs[0]] = values[op.inputs[0]].transpose(order[:inner])
        return True
    axis = axis_of(op, rank)
    if not 0 < axis < inner:
        return False
    if op.op_type == "Concat":
        values[op.outputs[0]] = np.concatenate([values[name] for name in op.inputs], axis)
        return True
    places = np.cumsum([shape[axis] for shape in shapes])[:-1]
    values.update(zip(op.outputs, np.split(values[op.inputs[0]], places, axis), strict=True))
    return True


class ShuffleFamily:
    """Regions that permute channels. Values are in blocks of channels."""

    name = "shuffle"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        if region.anchor != ANCHOR:
            return "it is no shuffle of channels"
        if any(region.types[name].dtype not in _DTYPES for name in region.inputs):
            return "its elements are none of those that vectors are put together of"
        return None if permutation(region) is not None else "it does more than permute channels"

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything in blocks."""
        return dict.fromkeys((*region.inputs, *region.outputs), Layout(machine.lanes("float32")))

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel, parallel over rows; the blocks of the outputs are written one after the other, row by row."""
        picked = permutation(region)
        assert picked is not None
        block = layouts.get(region.inputs[0], PLAIN).block
        operands = Operands(Builder("shuffle"), region, layouts)
        places = [(name, channel) for name in region.inputs for channel in range(region.types[name].shape[1])]
        k = operands.builder
        shape = region.types[region.inputs[0]].shape
        *outer, columns = shape[2:]
        rows = prod(outer)

        views = {
            name: operands.view(name, (shape[0], blocks, rows, columns, block))
            for name in (*region.inputs, *region.outputs)
            if (blocks := physical_shape(region.types[name], layouts[name])[1])
        }
        with k.parallel("row", shape[0], rows) as (n, row):
            for name, channels in picked.items():
                for start in range(0, len(channels), block):
                    wanted = [places[channel] for channel in channels[start : start + block]]
                    sources = list(dict.fromkeys((source, channel // block) for source, channel in wanted))
                    lanes: list[Picked] = [(sources.index((s, c // block)), c % block) for s, c in wanted]
                    lanes += [None] * (block - len(lanes))
                    with k.loop("column", columns) as column:
                        vectors: list[Expr] = [
                            load(views[source], n, number, row, column, 0, lanes=block) for source, number in sources
                        ]
                        k.store(views[name], (n, start // block, row, column, 0), _together(vectors, lanes))
        return Lowered((operands.launch(),))


def _together(vectors: Sequence[Expr], lanes: Sequence[Picked]) -> Expr:
    """A vector of lanes picked from several."""
    count = len(lanes)
    parts: list[tuple[Expr, list[int | None]]] = []
    for number, vector in enumerate(vectors):
        parts.append((vector, [each[1] if each is not None and each[0] == number else None for each in lanes]))
    if None in lanes:
        zero = constant(0, vectors[0].dtype, count)
        parts.append((zero, [place if each is None else None for place, each in enumerate(lanes)]))
    while len(parts) > 1:
        joined: list[tuple[Expr, list[int | None]]] = []
        for (a, of_a), (b, of_b) in zip(parts[::2], parts[1::2], strict=False):
            # Lanes of neither are free; the one that is there already costs least.
            both = [x if x is not None else count + y if y is not None else lane
                    for lane, (x, y) in enumerate(zip(of_a, of_b, strict=True))]  # fmt: skip
            left = [lane if x is not None or y is not None else None
                    for lane, (x, y) in enumerate(zip(of_a, of_b, strict=True))]  # fmt: skip
            joined.append((Shuffle(a, b, tuple(both)), left))
        parts = joined + (parts[-1:] if len(parts) % 2 else [])
    vector, of = parts[0]
    if all(pick == lane for lane, pick in enumerate(of)):
        return vector
    return Shuffle(vector, vector, tuple(lane if pick is None else pick for lane, pick in enumerate(of)))


SHUFFLE = ShuffleFamily()
