"""Softmax and normalisations of any dtype and axis, each a few reductions and a map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from nestc.graph.region import Op
from nestc.kernels.compute import Body
from nestc.kernels.ops.attributes import axis_of, integer, number
from nestc.kernels.ops.reduction import combine, mean, place, work_dtype
from nestc.tensor import index as ix
from nestc.tensor.build import constant, within
from nestc.tensor.ir import Binary, Expr, Unary, Var
from nestc.tensor.rewrite import cast

Axes = tuple[Var, ...]


def log_sum(body: Body, source: str, over: tuple[int, ...]) -> tuple[str, str]:
    """Names of the maximum over axes `over` (kept as 1) and of sum(exp(x - maximum)), in the work dtype."""
    shape = body.shape(source)
    work = work_dtype(body.dtype(source))
    small = tuple(1 if d in over else n for d, n in enumerate(shape))
    top, total = body.temporary(work, small), body.temporary(work, small)
    combine(body, top, source, over, True, "max", lambda x: x, lambda t: t)

    def value(axes: Axes, reduced: Axes) -> Expr:
        x = cast(body.read(source, place(len(shape), axes, reduced, over, True)), work)
        return Unary("exp", Binary("sub", x, body.read(top, axes)))

    body.combine(total, [shape[a] for a in over], "add", value)
    return top, total


def _softmax(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    axis = axis_of(op, len(shape), -1)
    work = work_dtype(dtype)
    top, total = log_sum(body, source, (axis,))

    def value(axes: Axes) -> Expr:
        own = [ix.const(0) if d == axis else i for d, i in enumerate(axes)]
        below = Binary("sub", cast(body.read(source, axes), work), body.read(top, own))
        if op.op_type == "LogSoftmax":
            return cast(Binary("sub", below, Unary("log", body.read(total, own))), dtype)
        return cast(Binary("div", Unary("exp", below), body.read(total, own)), dtype)

    body.map(out, value)


def _moments(
    body: Body, source: str, over: tuple[int, ...], epsilon: float, centred: bool, work: str
) -> tuple[str | None, str]:
    """Names of the mean over axes `over` (None unless `centred`) and of 1 / sqrt(variance + epsilon)."""
    shape = body.shape(source)
    small = tuple(1 if d in over else n for d, n in enumerate(shape))
    count = prod(shape[a] for a in over)
    average = body.temporary(work, small) if centred else None
    if average is not None:
        combine(body, average, source, over, True, "add", lambda x: cast(x, work), lambda t: mean(t, count))
    inverse = body.temporary(work, small)

    def value(axes: Axes, reduced: Axes) -> Expr:
        x = cast(body.read(source, place(len(shape), axes, reduced, over, True)), work)
        if average is not None:
            x = Binary("sub", x, body.read(average, axes))
        return Binary("mul", x, x)

    def finish(total: Expr) -> Expr:
        root = Unary("sqrt", Binary("add", mean(total, count), constant(epsilon, work)))
        return Binary("div", constant(1, work), root)

    body.combine(inverse, [shape[a] for a in over], "add", value, finish)
    return average, inverse


def _normalize(
    body: Body,
    op: Op,
    over: tuple[int, ...],
    centred: bool,
    scale: Callable[[Sequence[Expr]], Expr | None],
    bias: Callable[[Sequence[Expr]], Expr | None],
) -> tuple[str | None, str]:
    """output = (x - mean) / sqrt(variance + epsilon) * scale + bias, the moments over axes `over`."""
    source, out = op.inputs[0], op.outputs[0]
    dtype = body.dtype(out)
    work = work_dtype(dtype)
    average, inverse = _moments(body, source, over, number(op, "epsilon", 1e-5), centred, work)

    def value(axes: Axes) -> Expr:
        own = [ix.const(0) if d in over else i for d, i in enumerate(axes)]
        x = cast(body.read(source, axes), work)
        if average is not None:
            x = Binary("sub", x, body.read(average, own))
        x = Binary("mul", x, body.read(inverse, own))
        factor, term = scale(axes), bias(axes)
        x = x if factor is None else Binary("mul", x, cast(factor, work))
        return cast(x if term is None else Binary("add", x, cast(term, work)), dtype)

    body.map(out, value)
    return average, inverse


def _trailing(body: Body, name: str, index: Sequence[Expr]) -> Expr | None:
    """An operand that is broadcast to the end of the index; None if it is absent."""
    if not name:
        return None
    shape = body.shape(name)
    own = list(index)[len(index) - len(shape) :] if shape else []
    return body.read(name, [ix.const(0) if n == 1 else i for n, i in zip(shape, own)])


def _layer_normalization(body: Body, op: Op) -> None:
    rank = len(body.shape(op.inputs[0]))
    axis = axis_of(op, rank, -1)
    centred = op.op_type == "LayerNormalization"
    average, inverse = _normalize(
        body,
        op,
        tuple(range(axis, rank)),
        centred,
        lambda axes: _trailing(body, op.input(1), axes),
        lambda axes: _trailing(body, op.input(2), axes) if centred else None,
    )
    for name, source in ((op.output(1), average), (op.output(2), inverse)):
        if name and source is not None:
            dtype = body.dtype(name)
            body.map(name, lambda axes, s=source, t=dtype: cast(body.read(s, axes), t))


def _instance_normalization(body: Body, op: Op) -> None:
    rank = len(body.shape(op.inputs[0]))
    _normalize(
        body,
        op,
        tuple(range(2, rank)),
        True,
        lambda axes: body.read(op.inputs[1], (axes[1],)),
        lambda axes: body.read(op.inputs[2], (axes[1],)),
    )


def _group_normalization(body: Body, op: Op) -> None:
    """The input seen as (n, group, channel of the group, rest), normalised over the last two."""
    source, out = op.inputs[0], op.outputs[0]
    n, channels, *spatial = body.shape(source)
    groups = integer(op, "num_groups", 1)
    each, rest = channels // groups, prod(spatial)
    dtype = body.dtype(source)
    seen, done = body.temporary(dtype, (n, groups, each, rest)), body.temporary(dtype, (n, groups, each, rest))
    shape = body.shape(source)
    body.map(seen, lambda axes: body.read(source, ix.unflatten(ix.flatten(axes, (n, groups, each, rest)), shape)))

    def channel(name: str, axes: Sequence[Expr]) -> Expr:
        count = body.shape(name)[0]
        return body.read(name, (axes[1] if count == groups != channels else ix.add(ix.mul(axes[1], each), axes[2]),))

    inner = Op(op.op_type, (seen, *op.inputs[1:]), (done,), op.attributes, name=op.name)
    scale, bias = op.inputs[1], op.inputs[2]
    _normalize(body, inner, (2, 3), True, lambda axes: channel(scale, axes), lambda axes: channel(bias, axes))
    body.map(out, lambda axes: body.read(done, ix.unflatten(ix.flatten(axes, shape), (n, groups, each, rest))))


def _lrn(body: Body, op: Op) -> None:
    """x / (bias + alpha / size * sum of squares over neighbouring channels) ** beta."""
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    work = work_dtype(dtype)
    size = integer(op, "size", 1)
    alpha, beta, bias = number(op, "alpha", 1e-4), number(op, "beta", 0.75), number(op, "bias", 1.0)
    squares = body.temporary(work, shape)

    def value(axes: Axes, taps: Axes) -> Expr:
        channel = ix.add(axes[1], taps[0], -((size - 1) // 2))
        x = cast(body.read(source, (axes[0], channel, *axes[2:]), within(channel, shape[1])), work)
        return Binary("mul", x, x)

    body.combine(squares, (size,), "add", value)

    def final(axes: Axes) -> Expr:
        scaled = Binary("mul", constant(alpha / size, work), body.read(squares, axes))
        below = Binary("pow", Binary("add", constant(bias, work), scaled), constant(beta, work))
        return cast(Binary("div", cast(body.read(source, axes), work), below), dtype)

    body.map(out, final)


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LogSoftmax": _softmax,
    "RMSNormalization": _layer_normalization,
    "Softmax": _softmax,
}
