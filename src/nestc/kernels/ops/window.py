"""Convolutions and pools of any rank and dtype as sums over windows; the common ones have families of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from nestc.graph.region import Op
from nestc.kernels.compute import Body, identity_of
from nestc.kernels.elementwise import quantize
from nestc.kernels.ops.attributes import integer, integers, text
from nestc.kernels.ops.linear import along, shifted
from nestc.kernels.ops.reduction import mean, p_root, powered, work_dtype
from nestc.tensor import index as ix
from nestc.tensor.build import binary, within
from nestc.tensor.ir import Binary, Const, Expr, Select, Unary, Var
from nestc.tensor.rewrite import cast, select

Axes = tuple[Var, ...]


@dataclass(frozen=True)
class Windows:
    """A window for each output place: input place = place * stride + tap * dilation - pad."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def at(self, places: Sequence[Expr], taps: Sequence[Expr], extents: Sequence[int]) -> tuple[list[Expr], Expr]:
        """The input index of a tap, and whether it lies inside the input."""
        index: list[Expr] = []
        mask: Expr = Const(True, "bool")
        for d, (o, t) in enumerate(zip(places, taps)):
            i = ix.add(ix.mul(o, self.strides[d]), ix.mul(t, self.dilations[d]), -self.before[d])
            mask = binary("and", mask, within(i, extents[d]))
            index.append(i)
        return index, mask

    def source(self, places: Sequence[Expr], taps: Sequence[Expr], extents: Sequence[int]) -> tuple[list[Expr], Expr]:
        """The reverse: which window reads the input place `places` with this tap, and whether there is one."""
        index: list[Expr] = []
        mask: Expr = Const(True, "bool")
        for d, (o, t) in enumerate(zip(places, taps)):
            moved = ix.add(o, self.before[d], ix.mul(t, -self.dilations[d]))
            i = ix.floordiv(moved, self.strides[d])
            if self.strides[d] > 1:
                mask = binary("and", mask, binary("eq", ix.mod(moved, self.strides[d]), ix.const(0)))
            mask = binary("and", mask, within(i, extents[d]))
            index.append(i)
        return index, mask


def windows(op: Op, kernel: Sequence[int], extents: Sequence[int], out: Sequence[int]) -> Windows:
    """The windows of a pool or convolution from its attributes; auto_pad is resolved by the shapes."""
    rank = len(kernel)
    strides = integers(op, "strides") or (1,) * rank
    dilations = integers(op, "dilations") or (1,) * rank
    pads = integers(op, "pads") or (0,) * (2 * rank)
    before, after = list(pads[:rank]), list(pads[rank:])
    mode = text(op, "auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        for d in range(rank):
            size = (kernel[d] - 1) * dilations[d] + 1
            total = max(0, (out[d] - 1) * strides[d] + size - extents[d])
            before[d] = total // 2 if mode == "SAME_UPPER" else -(-total // 2)
            after[d] = total - before[d]
    elif mode == "VALID":
        before, after = [0] * rank, [0] * rank
    return Windows(tuple(kernel), strides, dilations, tuple(before), tuple(after))


def _conv(body: Body, op: Op) -> None:
    source, weight, bias, out = op.inputs[0], op.inputs[1], op.input(2), op.outputs[0]
    dtype = body.dtype(out)
    work = work_dtype(dtype)
    final: Callable[[Expr], Expr] = lambda total: cast(total, dtype)  # noqa: E731
    total = out if not bias else body.temporary(work, body.shape(out))

    def value(x: Sequence[Expr], w: Sequence[Expr], mask: Expr) -> Expr:
        return binary("mul", cast(body.read(source, x, mask), work), cast(body.read(weight, w), work))

    _convolve(body, op, source, weight, total, value, final if not bias else None)
    if bias:
        body.map(
            out,
            lambda axes: cast(binary("add", body.read(total, axes), cast(body.read(bias, (axes[1],)), work)), dtype),
        )


def _convolve(
    body: Body,
    op: Op,
    source: str,
    weight: str,
    out: str,
    product: Callable[[Sequence[Expr], Sequence[Expr], Expr], Expr],
    finish: Callable[[Expr], Expr] | None = None,
) -> None:
    """out = sum over channels of the group and taps of product(input index, weight index, inside)."""
    shape, filters = body.shape(source), body.shape(weight)
    group = integer(op, "group", 1)
    view = windows(op, filters[2:], shape[2:], body.shape(out)[2:])
    each = filters[0] // group

    def value(axes: Axes, reduced: Axes) -> Expr:
        n, m, *places = axes
        c, *taps = reduced
        index, mask = view.at(places, taps, shape[2:])
        channel = ix.add(ix.mul(ix.floordiv(m, each), filters[1]), c) if group > 1 else c
        return product((n, channel, *index), (m, c, *taps), mask)

    body.combine(out, filters[1:], "add", value, finish)


def _conv_integer(body: Body, op: Op) -> None:
    source, weight, x_zero, w_zero = op.inputs[0], op.inputs[1], op.input(2), op.input(3)

    def value(x: Sequence[Expr], w: Sequence[Expr], mask: Expr) -> Expr:
        return Binary("mul", shifted(body, source, x_zero, x, 1, mask), shifted(body, weight, w_zero, w, 0))

    _convolve(body, op, source, weight, op.outputs[0], value)


def _qlinear_conv(body: Body, op: Op) -> None:
    source, x_scale, x_zero, weight, w_scale, w_zero, y_scale, y_zero = op.inputs[:8]
    bias, out = op.input(8), op.outputs[0]
    total = body.temporary("int32", body.shape(out))

    def value(x: Sequence[Expr], w: Sequence[Expr], mask: Expr) -> Expr:
        return Binary("mul", shifted(body, source, x_zero, x, 1, mask), shifted(body, weight, w_zero, w, 0))

    _convolve(body, op, source, weight, total, value)

    def final(axes: Axes) -> Expr:
        sum_ = body.read(total, axes)
        if bias:
            sum_ = Binary("add", sum_, body.read(bias, (axes[1],)))
        scale = Binary("mul", along(body, x_scale, axes, 1), along(body, w_scale, axes, 1))
        real = Binary("mul", cast(sum_, "float32"), scale)
        return quantize(real, along(body, y_scale, axes, 1), along(body, y_zero, axes, 1), body.dtype(out))

    body.map(out, final)


def _conv_transpose(body: Body, op: Op) -> None:
    source, weight, bias, out = op.inputs[0], op.inputs[1], op.input(2), op.outputs[0]
    shape, filters, target = body.shape(source), body.shape(weight), body.shape(out)
    dtype = body.dtype(out)
    work = work_dtype(dtype)
    group = integer(op, "group", 1)
    rank = len(shape) - 2
    kernel = filters[2:]
    strides = integers(op, "strides") or (1,) * rank
    dilations = integers(op, "dilations") or (1,) * rank
    pads = integers(op, "pads") or (0,) * (2 * rank)
    before = list(pads[:rank])
    mode = text(op, "auto_pad", "NOTSET")
    if mode != "NOTSET" or integers(op, "output_shape") is not None:
        extra = integers(op, "output_padding") or (0,) * rank
        for d in range(rank):
            total = strides[d] * (shape[2 + d] - 1) + extra[d] + (kernel[d] - 1) * dilations[d] + 1 - target[2 + d]
            # The odd one goes to the end for SAME_UPPER, else to the start.
            before[d] = max(0, total // 2 if mode == "SAME_UPPER" else -(-total // 2))
            before[d] = 0 if mode == "VALID" else before[d]
    view = Windows(tuple(kernel), strides, dilations, tuple(before), (0,) * rank)
    inside = shape[1] // group

    def value(axes: Axes, reduced: Axes) -> Expr:
        n, m, *places = axes
        c, *taps = reduced
        index, mask = view.source(places, taps, shape[2:])
        part, feature = ix.floordiv(m, filters[1]), ix.mod(m, filters[1])
        channel = ix.add(ix.mul(part, inside), c)
        x = cast(body.read(source, (n, channel, *index), mask), work)
        return binary("mul", x, cast(body.read(weight, (channel, feature, *taps)), work))

    if not bias:
        body.combine(out, (inside, *kernel), "add", value, lambda total: cast(total, dtype))
        return
    plain = body.temporary(work, target)
    body.combine(plain, (inside, *kernel), "add", value)
    body.map(
        out,
        lambda axes: cast(binary("add", body.read(plain, axes), cast(body.read(bias, (axes[1],)), work)), dtype),
    )


def _pool_windows(body: Body, op: Op) -> Windows:
    shape = body.shape(op.inputs[0])
    kernel = integers(op, "kernel_shape") or ()
    return windows(op, kernel, shape[2:], body.shape(op.outputs[0])[2:])


def _max_pool(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    view = _pool_windows(body, op)
    work = work_dtype(dtype)
    lowest = identity_of("max", work)

    def value(axes: Axes, taps: Axes) -> Expr:
        index, mask = view.at(axes[2:], taps, shape[2:])
        return select(mask, cast(body.read(source, (*axes[:2], *index), mask), work), lowest)

    body.combine(out, view.kernel, "max", value, lambda total: cast(total, dtype))
    places = op.output(1)
    if not places:
        return
    # The index of the maximum counts over the whole input; the first tap that has the maximum wins.
    spatial = shape[2:]
    order = integer(op, "storage_order", 0)
    area, count = prod(spatial), prod(view.kernel)
    missing = count
    tap = body.temporary("int64", body.shape(out))

    def first(axes: Axes, taps: Axes) -> Expr:
        index, mask = view.at(axes[2:], taps, spatial)
        x = cast(body.read(source, (*axes[:2], *index), mask), work)
        hit = binary("and", mask, Binary("eq", x, cast(body.read(out, axes), work)))
        return Select(hit, ix.flatten(taps, view.kernel), ix.const(missing))

    body.combine(tap, view.kernel, "min", first)

    def position(axes: Axes) -> Expr:
        chosen = binary("min", body.read(tap, axes), ix.const(count - 1))
        chosen = binary("max", chosen, ix.const(0))
        index, _ = view.at(axes[2:], ix.unflatten(chosen, view.kernel), spatial)
        if order:
            flat = ix.flatten(tuple(reversed(index)), tuple(reversed(spatial)))
        else:
            flat = ix.flatten(tuple(index), spatial)
        return ix.add(ix.mul(axes[0], shape[1] * area), ix.mul(axes[1], area), flat)

    body.map(places, position)


def _average_pool(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    view = _pool_windows(body, op)
    work = work_dtype(dtype)
    include = integer(op, "count_include_pad", 0)
    # The number of elements under a window is a product of counts along each axis.
    counts: list[np.ndarray] = []
    for d, n in enumerate(body.shape(out)[2:]):
        taps = np.arange(n)[:, None] * view.strides[d] + np.arange(view.kernel[d]) * view.dilations[d]
        low, high = (0, shape[2 + d] + view.before[d] + view.after[d]) if include else (view.before[d], 0)
        high = high or view.before[d] + shape[2 + d]
        counts.append(((taps >= low) & (taps < high)).sum(1))
    even = all((c == c[0]).all() for c in counts if c.size)
    total = out if even else body.temporary(work, body.shape(out))

    def value(axes: Axes, taps: Axes) -> Expr:
        index, mask = view.at(axes[2:], taps, shape[2:])
        return cast(body.read(source, (*axes[:2], *index), mask), work)

    if even:
        count = prod(int(c[0]) for c in counts if c.size)
        body.combine(out, view.kernel, "add", value, lambda t: cast(mean(t, max(1, count)), dtype))
        return
    body.combine(total, view.kernel, "add", value)
    tables = [body.literal(c.astype(work)) for c in counts]

    def final(axes: Axes) -> Expr:
        divisor: Expr | None = None
        for table, place in zip(tables, axes[2:]):
            n = body.read(table, (place,))
            divisor = n if divisor is None else Binary("mul", divisor, n)
        assert divisor is not None
        return cast(Binary("div", body.read(total, axes), divisor), dtype)

    body.map(out, final)


def _lp_pool(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    view = _pool_windows(body, op)
    work, p = work_dtype(dtype), integer(op, "p", 2)

    def value(axes: Axes, taps: Axes) -> Expr:
        index, mask = view.at(axes[2:], taps, shape[2:])
        return powered(Unary("abs", cast(body.read(source, (*axes[:2], *index), mask), work)), p)

    body.combine(out, view.kernel, "add", value, lambda total: cast(p_root(total, p), dtype))


def _col2im(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    image = [int(v) for v in body.constant(op, 1).reshape(-1)]
    block = tuple(int(v) for v in body.constant(op, 2).reshape(-1))
    rank = len(block)
    strides = integers(op, "strides") or (1,) * rank
    dilations = integers(op, "dilations") or (1,) * rank
    pads = integers(op, "pads") or (0,) * (2 * rank)
    view = Windows(block, strides, dilations, pads[:rank], pads[rank:])
    counts = [
        (image[d] + pads[d] + pads[rank + d] - dilations[d] * (block[d] - 1) - 1) // strides[d] + 1 for d in range(rank)
    ]
    dtype = body.dtype(out)
    work = work_dtype(dtype)

    def value(axes: Axes, taps: Axes) -> Expr:
        n, c, *places = axes
        index, mask = view.source(places, taps, counts)
        row = ix.add(ix.mul(c, prod(block)), ix.flatten(taps, block))
        return cast(body.read(source, (n, row, ix.flatten(tuple(index), tuple(counts))), mask), work)

    body.combine(out, block, "add", value, lambda total: cast(total, dtype))


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "AveragePool": _average_pool,
    "Col2Im": _col2im,
    "Conv": _conv,
    "ConvInteger": _conv_integer,
    "ConvTranspose": _conv_transpose,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
    "QLinearConv": _qlinear_conv,
}
