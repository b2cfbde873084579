"""Concat, Flatten, Pad, Slice and Split as products with ones, and views that lie alike in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nestc.graph.kinds import VIEWS
from nestc.graph.region import Op, Region
from nestc.targets.vta.layers_sum import Sum
from nestc.targets.vta.layers_values import Refused, Source, Term, identity

_MOST_FLATTENED = 1 << 16
"""Elements times places of a map that is flattened; its weights take 16 to 32 times as many bytes."""


def concatenated(op: Op, sources: Sequence[Source], shape: tuple[int, ...]) -> Sum:
    """A Concat along the channels: each source goes to its own output channels, with its own scale."""
    axis = op.attributes.get("axis", 1)
    assert isinstance(axis, int)
    if axis % len(shape) != 1:
        raise Refused("Concat is not along the channels")
    terms: list[Term] = []
    first = 0
    for source in sources:
        terms.append(identity(source, shape[1], first))
        first += source.map.channels
    return Sum(shape, None, tuple(terms))


def flattened(op: Op, x: Source, shape: tuple[int, ...]) -> Sum:
    """A map [1, c, h, w] as a matrix of one row, in ONNX's order: element (c * h + y) * w + x.

    VTA's layout has another order, so that each element is a product with 1 at a place of its own. The weights for it
    grow with the square of the places; a large map is refused.
    """
    places = x.map.height * x.map.width
    if shape != (1, x.map.channels * places) or x.map.batch != 1 or len(x.shape) == 2:
        raise Refused(elsewhere(op))
    if shape[1] * places > _MOST_FLATTENED:
        raise Refused(f"{elsewhere(op)}, and {shape[1]} elements are too many to be moved one by one")
    outs = np.arange(shape[1])
    weights = np.zeros((shape[1], 1, places), np.int8)
    weights[outs, 0, outs % places] = 1
    taps = tuple((y, column) for y in range(x.map.height) for column in range(x.map.width))
    exponents = np.full(shape[1], x.exponent, np.int64)
    return Sum(shape, None, (Term(x.map, (1, 1), taps, outs, (outs // places)[:, None], weights, exponents),))


def elsewhere(op: Op) -> str:
    """The reason why a view is not free."""
    return f"{op.op_type} gives a shape that lies differently in VTA's layout of channel blocks"


def moved(op: Op, x: Source, region: Region) -> tuple[Sum, ...]:
    """The results of a Pad with zeros, a Slice or a Split."""
    if op.op_type == "Pad":
        return (_padded(op, x, region),)
    if op.op_type == "Slice":
        return (_sliced(op, x, region),)
    axis = op.attributes.get("axis", 0)
    assert isinstance(axis, int)
    results: list[Sum] = []
    first = 0
    for name in op.outputs:
        shape = region.types[name].shape
        count = shape[axis % len(shape)]
        results.append(_part(x, shape, axis % len(shape), first, 1))
        first += count
    return tuple(results)


def _padded(op: Op, x: Source, region: Region) -> Sum:
    shape = region.types[op.outputs[0]].shape
    pads, value, axes = (region.constant(op.input(i)) for i in (1, 2, 3))
    mode = op.attributes.get("mode", "constant")
    if mode != "constant" or (value is not None and bool(np.any(value))) or (op.input(2) and value is None):
        raise Refused("Pad writes something other than zeros")
    if pads is None:
        raise Refused("Pad has sizes that are computed when the model runs")
    rank = len(x.shape)
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes.reshape(-1)]
    before = [0] * rank
    for place, axis in enumerate(chosen):
        before[axis] = int(pads[place])
    spatial = [0] * (4 - rank) + before[2:] if rank > 2 else [0, before[0]]
    if before[0] and rank > 2:
        raise Refused("Pad is along the batch")
    # Negative pads cut off.
    return _shifted(x, shape, max(before[1], 0), max(-before[1], 0), (-spatial[0], -spatial[1]), (1, 1))


def _sliced(op: Op, x: Source, region: Region) -> Sum:
    starts, ends, axes, steps = (region.constant(op.input(i)) for i in range(1, 5))
    if starts is None or ends is None:
        raise Refused("Slice has bounds that are computed when the model runs")
    rank = len(x.shape)
    chosen = list(range(starts.size)) if axes is None else [int(axis) % rank for axis in axes.reshape(-1)]
    value = x
    result: Sum | None = None
    shape = list(x.shape)
    if len(chosen) > 1:
        raise Refused("Slice is along more than one axis")
    for place, axis in enumerate(chosen):
        step = 1 if steps is None else int(steps.reshape(-1)[place])
        if step < 1:
            raise Refused("Slice runs backwards")
        first, last, _ = slice(int(starts.reshape(-1)[place]), int(ends.reshape(-1)[place])).indices(shape[axis])
        shape[axis] = len(range(first, last, step))
        result = _part(value, tuple(shape), axis, first, step)
    assert result is not None
    return result


def _part(x: Source, shape: tuple[int, ...], axis: int, first: int, step: int) -> Sum:
    """Every `step`-th slice along an axis from `first` on."""
    if axis == 1:
        lanes = np.arange(shape[1])
        weights = np.ones((len(lanes), 1, 1), np.int64)
        exponents = np.full(len(lanes), x.exponent, np.int64)
        ins = (lanes * step + first)[:, None]
        return Sum(shape, None, (Term(x.map, (1, 1), ((0, 0),), lanes, ins, weights, exponents),))
    if axis == 0 and len(shape) > 2:
        raise Refused("a part of the batch is taken")
    start, stride = [0, 0], [1, 1]
    place = 1 if axis == 0 or len(shape) == 3 else axis - 2
    start[place], stride[place] = first, step
    return _shifted(x, shape, 0, 0, (start[0], start[1]), (stride[0], stride[1]))


def _shifted(
    x: Source, shape: tuple[int, ...], first_out: int, first_in: int, tap: tuple[int, int], strides: tuple[int, int]
) -> Sum:
    """Output channel first_out + i and place p is input channel first_in + i at p * strides + tap."""
    count = min(x.map.channels - first_in, shape[1] - first_out)
    lanes = np.arange(count)
    exponents = np.full(shape[1], x.exponent, np.int64)
    weights = np.ones((count, 1, 1), np.int64)
    term = Term(x.map, strides, (tap,), lanes + first_out, (lanes + first_in)[:, None], weights, exponents)
    return Sum(shape, None, (term,))


def is_alias(region: Region) -> bool:
    """Whether a region only gives an int8 value a shape that lies alike in VTA's layout.

    Batch and channels stay what they are and the places of a channel stay in row-major order; a matrix of one row is a
    map of one place.
    """
    if any(op.domain or op.op_type not in VIEWS for op in region.ops):
        return False
    before, after = region.types[region.inputs[0]], region.types[region.outputs[0]]
    if before.dtype != "int8" or after.dtype != "int8":
        return False
    if before.shape == after.shape:
        return len(before.shape) in (2, 3, 4)
    if not all(len(t.shape) in (2, 3, 4) for t in (before, after)):
        return False
    if min(len(before.shape), len(after.shape)) == 2:
        return all(t.shape[0] == 1 and int(np.prod(t.shape[1:])) == t.shape[1] for t in (before, after)) and (
            before.shape[1] == after.shape[1]
        )
    return before.shape[:2] == after.shape[:2]
