"""Data movement: shapes, permutations, slices, padding, joining and splitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np

from nestc.graph.region import Op, Region
from nestc.kernels.compute import Body
from nestc.kernels.ops.attributes import axis_of, integer, integers, refused, text
from nestc.tensor import index as ix
from nestc.tensor.build import binary, constant, within
from nestc.tensor.ir import Const, Expr, Var
from nestc.tensor.rewrite import cast, select

Axes = tuple[Var, ...]


def _reshape(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape, target = body.shape(source), body.shape(out)

    def value(axes: Axes) -> Expr:
        if 0 in target:
            return constant(0, body.dtype(out))
        return body.read(source, _reindexed(axes, target, shape))

    body.map(out, value)


def _reindexed(axes: tuple[Expr, ...], shape: tuple[int, ...], other: tuple[int, ...]) -> tuple[Expr, ...]:
    """The index in `other` of the element at `axes` of `shape`, both row-major over as many elements."""
    kept = [(a, n) for a, n in zip(axes, shape) if n != 1]
    if [n for _, n in kept] == [n for n in other if n != 1]:
        rest = iter(kept)
        return tuple(ix.const(0) if n == 1 else next(rest)[0] for n in other)
    return ix.unflatten(ix.flatten(axes, shape), other) if other else ()


def _transpose(body: Body, op: Op) -> None:
    rank = len(body.shape(op.inputs[0]))
    perm = integers(op, "perm")
    order = tuple(p % rank for p in perm) if perm is not None else tuple(reversed(range(rank)))
    place = [order.index(d) for d in range(rank)]
    body.map(op.outputs[0], lambda axes: body.read(op.inputs[0], [axes[p] for p in place]))


def _slice(body: Body, op: Op) -> None:
    moves = _ranges(op, body.shape(op.inputs[0]), lambda place: body.constant(op, place))

    def value(axes: Axes) -> Expr:
        place: list[Expr] = []
        for d, i in enumerate(axes):
            start, _, step = moves.get(d, (0, 0, 1))
            place.append(ix.add(start, ix.mul(i, step)) if i.extent else ix.const(0))
        return body.read(op.inputs[0], place)

    body.map(op.outputs[0], value)


def _ranges(op: Op, shape: tuple[int, ...], constant: Callable[[int], np.ndarray]) -> dict[int, tuple[int, int, int]]:
    """First, end and step that a Slice takes of each axis it names; `constant` gives an operand by its place."""
    rank = len(shape)
    starts = [int(v) for v in constant(1).reshape(-1)]
    ends = [int(v) for v in constant(2).reshape(-1)]
    axes_ = [int(v) % rank for v in constant(3).reshape(-1)] if op.input(3) else list(range(len(starts)))
    steps = [int(v) for v in constant(4).reshape(-1)] if op.input(4) else [1] * len(starts)
    return {a: slice(s, e if abs(e) < 1 << 62 else None, k).indices(shape[a])
            for a, s, e, k in zip(axes_, starts, ends, steps)}  # fmt: skip


def taken(op: Op, region: Region) -> tuple[int, int] | None:
    """The axis along which a Split or Slice takes all its outputs, one behind the other, and where the first begins.

    None if it takes anything else, or what it takes is not constant.
    """
    shape = region.types[op.inputs[0]].shape
    if op.op_type == "Split":
        return None if "" in op.outputs else (axis_of(op, len(shape)), 0)
    operands = {place: region.constant(op.input(place)) for place in range(1, 5) if op.input(place)}
    given = {place: array for place, array in operands.items() if array is not None}
    if op.op_type != "Slice" or len(given) < len(operands):
        return None
    ranges = _ranges(op, shape, lambda place: given[place])
    real = {axis: place for axis, place in ranges.items() if place != (0, shape[axis], 1)}
    if any(step != 1 or end <= start for start, end, step in real.values()) or len(real) > 1:
        return None
    return next(((axis, start) for axis, (start, _, _) in real.items()), (0, 0))


def keeps_blocks(op: Op, region: Region, block: int) -> bool:
    """Whether a Concat, Split, Slice or Pad of values in blocks of channels moves whole blocks only.

    Padding that fills the last block may then only come last.
    """
    shape = region.types[op.inputs[0]].shape
    if len(shape) < 3:
        return False
    if op.op_type == "Concat":
        axis = axis_of(op, len(shape))
        return axis > 1 or (axis == 1 and all(region.types[name].shape[1] % block == 0 for name in op.inputs[:-1]))
    if op.op_type == "Pad":
        amounts = region.constant(op.input(1))
        if amounts is None or op.input(3) or text(op, "mode", "constant") != "constant":
            return False
        return not np.any(amounts.reshape(2, -1)[:, :2])
    found = taken(op, region) if op.op_type in ("Split", "Slice") else None
    if found is None or found[0] == 0:
        return False
    axis, begin = found
    if axis > 1:
        return True
    for name in op.outputs:
        end = begin + region.types[name].shape[1]
        if begin % block or (end % block and end != shape[1]):
            return False
        begin = end
    return True


def _concat(body: Body, op: Op) -> None:
    out = op.outputs[0]
    axis = axis_of(op, len(body.shape(out)))
    parts: list[tuple[tuple[int, ...], tuple[int, ...], Callable[[Axes], Expr]]] = []
    start = 0
    for name in op.inputs:
        shape = body.shape(name)
        offset = tuple(start if d == axis else 0 for d in range(len(shape)))
        parts.append((offset, shape, lambda axes, name=name: body.read(name, axes)))
        start += shape[axis]
    body.parts(out, parts)


def _split(body: Body, op: Op) -> None:
    axis = axis_of(op, len(body.shape(op.inputs[0])))
    start = 0
    for name in op.outputs:
        if not name:
            raise refused(op, "an output of Split has no name")

        def value(axes: Axes, start: int = start) -> Expr:
            return body.read(op.inputs[0], [ix.add(i, start) if d == axis else i for d, i in enumerate(axes)])

        body.map(name, value)
        start += body.shape(name)[axis]


def _expand(body: Body, op: Op) -> None:
    shape = body.shape(op.inputs[0])

    def value(axes: Axes) -> Expr:
        own = axes[len(axes) - len(shape) :] if shape else ()
        return body.read(op.inputs[0], [ix.const(0) if n == 1 else i for n, i in zip(shape, own)])

    body.map(op.outputs[0], value)


def _tile(body: Body, op: Op) -> None:
    shape = body.shape(op.inputs[0])
    body.map(
        op.outputs[0],
        lambda axes: body.read(
            op.inputs[0], [i if i.extent == n else ix.mod(i, max(1, n)) for i, n in zip(axes, shape)]
        ),
    )


def _pad(body: Body, op: Op) -> None:
    name, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(name), body.dtype(name)
    rank = len(shape)
    pads = [int(v) for v in body.constant(op, 1).reshape(-1)]
    axes_ = [int(v) % rank for v in body.constant(op, 3).reshape(-1)] if op.input(3) else list(range(rank))
    before = [0] * rank
    for axis, pad in zip(axes_, pads):
        before[axis] = pad
    mode = text(op, "mode", "constant")

    def value(axes: Axes) -> Expr:
        place: list[Expr] = []
        mask: Expr = Const(True, "bool")
        for i, n, pad in zip(axes, shape, before):
            at = ix.add(i, -pad)
            low, high = ix.bounds(at)
            if low >= 0 and high < n:
                place.append(at)
            elif mode == "constant":
                mask = binary("and", mask, within(at, n))
                place.append(at)
            elif mode == "wrap":
                place.append(ix.mod(at, max(1, n)))
            elif mode == "edge":
                place.append(_limited(at, n))
            elif mode == "reflect":
                place.append(_reflected(at, n))
            else:
                raise refused(op, f"mode {mode!r} is unknown")
        inside = body.read(name, place, mask)
        if mode != "constant" or (isinstance(mask, Const) and mask.value):
            return inside
        fill = (
            body.read(op.input(2), [ix.const(0)] * len(body.shape(op.input(2)))) if op.input(2) else constant(0, dtype)
        )
        return select(mask, inside, fill)

    body.map(out, value)


def _limited(at: Expr, extent: int) -> Expr:
    return binary("min", binary("max", at, ix.const(0)), ix.const(extent - 1))


def _reflected(at: Expr, extent: int) -> Expr:
    """Mirrored at the first and the last element, as often as it takes."""
    if extent == 1:
        return ix.const(0)
    period = 2 * (extent - 1)
    phase = ix.mod(at, period)
    return _limited(select(binary("lt", phase, ix.const(extent)), phase, ix.sub(period, phase)), extent)


def _depth_to_space(body: Body, op: Op) -> None:
    block = integer(op, "blocksize", 1)
    depth = body.shape(op.outputs[0])[1]
    columns_first = text(op, "mode", "DCR") == "DCR"

    def value(axes: Axes) -> Expr:
        n, c, h, w = axes
        row, column = ix.mod(h, block), ix.mod(w, block)
        if columns_first:
            channel = ix.add(ix.mul(row, block * depth), ix.mul(column, depth), c)
        else:
            channel = ix.add(ix.mul(c, block * block), ix.mul(row, block), column)
        return body.read(op.inputs[0], (n, channel, ix.floordiv(h, block), ix.floordiv(w, block)))

    body.map(op.outputs[0], value)


def _space_to_depth(body: Body, op: Op) -> None:
    block = integer(op, "blocksize", 1)
    depth = body.shape(op.inputs[0])[1]
    columns_first = text(op, "mode", "DCR") == "DCR"

    def value(axes: Axes) -> Expr:
        n, c, h, w = axes
        if columns_first:
            part, channel = ix.floordiv(c, depth), ix.mod(c, depth)
        else:
            part, channel = ix.mod(c, block * block), ix.floordiv(c, block * block)
        row = ix.add(ix.mul(h, block), ix.floordiv(part, block))
        return body.read(op.inputs[0], (n, channel, row, ix.add(ix.mul(w, block), ix.mod(part, block))))

    body.map(op.outputs[0], value)


def _center_crop_pad(body: Body, op: Op) -> None:
    shape, target = body.shape(op.inputs[0]), body.shape(op.outputs[0])
    dtype = body.dtype(op.outputs[0])

    def value(axes: Axes) -> Expr:
        mask: Expr = Const(True, "bool")
        place: list[Expr] = []
        for i, have, want in zip(axes, shape, target):
            # Cropping starts at floor((have - want) / 2), padding puts floor((want - have) / 2) before.
            at = ix.add(i, (have - want) // 2 if have >= want else -((want - have) // 2))
            mask = binary("and", mask, within(at, have))
            place.append(at)
        return select(mask, body.read(op.inputs[0], place, mask), constant(0, dtype))

    body.map(op.outputs[0], value)


def _reverse_sequence(body: Body, op: Op) -> None:
    batch, time = integer(op, "batch_axis", 1), integer(op, "time_axis", 0)
    extent = body.shape(op.inputs[0])[time]

    def value(axes: Axes) -> Expr:
        length = _index_value(body, op.inputs[1], (axes[batch],))
        mirrored = _limited(ix.sub(ix.add(length, -1), axes[time]), extent)
        at = select(binary("lt", axes[time], length), mirrored, axes[time])
        return body.read(op.inputs[0], [at if d == time else i for d, i in enumerate(axes)])

    body.map(op.outputs[0], value)


def _index_value(body: Body, name: str, index: tuple[Expr, ...]) -> Expr:
    return cast(body.read(name, index), "int64")


def _dropout(body: Body, op: Op) -> None:
    training = op.input(2)
    if training and bool(np.any(body.constant(op, 2))):
        ratio = float(body.constant(op, 1).reshape(-1)[0]) if op.input(1) else 0.5
        if ratio:
            raise refused(op, "training mode draws random numbers")
    body.alias(op.outputs[0], op.inputs[0])
    if op.output(1):
        body.map(op.outputs[1], lambda axes: Const(True, "bool"))


def _identity(body: Body, op: Op) -> None:
    body.alias(op.outputs[0], op.inputs[0])


def _shape(body: Body, op: Op) -> None:
    shape = body.shape(op.inputs[0])
    rank = len(shape)
    start = integer(op, "start", 0)
    end = integer(op, "end", rank)
    kept = shape[slice(start, end)]
    name = body.literal(np.array(kept, np.int64))
    body.map(op.outputs[0], lambda axes: body.read(name, axes))


def _size(body: Body, op: Op) -> None:
    body.map(op.outputs[0], lambda axes: constant(prod(body.shape(op.inputs[0])), "int64"))


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "CenterCropPad": _center_crop_pad,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Dropout": _dropout,
    "Expand": _expand,
    "Flatten": _reshape,
    "Identity": _identity,
    "Pad": _pad,
    "Reshape": _reshape,
    "ReverseSequence": _reverse_sequence,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _reshape,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
