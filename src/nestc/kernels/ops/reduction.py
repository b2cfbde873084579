"""Reductions over axes, global pools and the normalisations that are a few of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod

from nestc.graph.region import Op
from nestc.kernels.compute import Body
from nestc.kernels.elementwise import HALVES
from nestc.kernels.ops.attributes import axis_of, integer, integers, number, refused
from nestc.tensor import index as ix
from nestc.tensor.build import constant
from nestc.tensor.ir import Binary, Const, Expr, Select, Unary, Var
from nestc.tensor.rewrite import cast

Axes = tuple[Var, ...]


def work_dtype(dtype: str) -> str:
    """The dtype in which values of `dtype` are combined."""
    return "float32" if dtype in HALVES else dtype


def reduced_axes(body: Body, op: Op, rank: int) -> tuple[int, ...]:
    """The axes that a Reduce operator names, by attribute or by input."""
    named = integers(op, "axes")
    if named is None and op.input(1):
        named = tuple(int(v) for v in body.constant(op, 1).reshape(-1))
    if not named:
        return () if integer(op, "noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(sorted({a % rank for a in named}))


def place(rank: int, axes: Sequence[Expr], reduced: Sequence[Expr], over: Sequence[int], keep: bool) -> list[Expr]:
    """The index in the operand of an output's index and the reduced axes' index."""
    kept = iter(axes)
    inner = dict(zip(over, reduced))
    result: list[Expr] = []
    for d in range(rank):
        if d not in inner:
            result.append(next(kept))
            continue
        if keep:
            next(kept)
        result.append(inner[d])
    return result


def combine(
    body: Body,
    out: str,
    source: str,
    over: Sequence[int],
    keep: bool,
    op: str,
    before: Callable[[Expr], Expr],
    after: Callable[[Expr], Expr],
) -> None:
    """out = after(op over axes `over` of before(source)), in the work dtype of `source`."""
    shape = body.shape(source)
    work, dtype = work_dtype(body.dtype(source)), body.dtype(out)

    def value(axes: Axes, reduced: Axes) -> Expr:
        index = place(len(shape), axes, reduced, over, keep)
        return before(cast(body.read(source, index), work))

    body.combine(out, [shape[a] for a in over], op, value, lambda total: cast(after(total), dtype))


def _same(x: Expr) -> Expr:
    return x


def _square(x: Expr) -> Expr:
    return Binary("mul", x, x)


def _absolute(x: Expr) -> Expr:
    return x if x.dtype.startswith("u") else Unary("abs", x)


def _root(x: Expr) -> Expr:
    if "float" in x.dtype:
        return Unary("sqrt", x)
    return cast(Unary("sqrt", cast(x, "float64")), x.dtype)


def _log(x: Expr) -> Expr:
    if "float" in x.dtype:
        return Unary("log", x)
    return cast(Unary("log", cast(x, "float64")), x.dtype)


_REDUCE: Mapping[str, tuple[str, Callable[[Expr], Expr], Callable[[Expr], Expr]]] = {
    "ReduceSum": ("add", _same, _same),
    "ReduceMean": ("add", _same, _same),
    "ReduceProd": ("mul", _same, _same),
    "ReduceMax": ("max", _same, _same),
    "ReduceMin": ("min", _same, _same),
    "ReduceL1": ("add", _absolute, _same),
    "ReduceL2": ("add", _square, _root),
    "ReduceSumSquare": ("add", _square, _same),
    "ReduceLogSum": ("add", _same, _log),
}


def _reduce(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape = body.shape(source)
    over = reduced_axes(body, op, len(shape))
    keep = bool(integer(op, "keepdims", 1))
    if op.op_type == "ReduceLogSumExp":
        _log_sum_exp(body, source, out, over, keep)
        return
    if not over and integer(op, "noop_with_empty_axes", 0) and op.op_type in ("ReduceSum", "ReduceMean", "ReduceMax"):
        body.alias(out, source)
        return
    how, before, after = _REDUCE[op.op_type]
    if op.op_type == "ReduceMean":
        after = partial(mean, count=prod(shape[a] for a in over))
    combine(body, out, source, over, keep, how, before, after)


def mean(total: Expr, count: int) -> Expr:
    """A sum over `count` elements as their mean; integers truncate."""
    return Binary("div", total, constant(count, total.dtype))


def _log_sum_exp(body: Body, source: str, out: str, over: tuple[int, ...], keep: bool) -> None:
    """log(sum(exp(x - max))) + max, so that nothing overflows; where the maximum is infinite it is the result."""
    shape = body.shape(source)
    dtype = body.dtype(out)
    work = work_dtype(dtype) if "float" in dtype else "float64"
    top = body.temporary(work, body.shape(out))
    combine(body, top, source, over, keep, "max", lambda x: cast(x, work), _same)

    def finite(axes: Sequence[Expr]) -> Expr:
        m = body.read(top, axes)
        return Select(Binary("lt", Unary("abs", m), constant(float("inf"), work)), m, constant(0, work))

    def value(axes: Axes, reduced: Axes) -> Expr:
        x = cast(
            cast(body.read(source, place(len(shape), axes, reduced, over, keep)), work_dtype(body.dtype(source))), work
        )
        return Unary("exp", Binary("sub", x, finite(axes)))

    total = body.temporary(work, body.shape(out))
    body.combine(total, [shape[a] for a in over], "add", value)
    body.map(out, lambda axes: cast(Binary("add", Unary("log", body.read(total, axes)), finite(axes)), dtype))


def _arg(body: Body, op: Op) -> None:
    """The index of the extreme: its value first, then the first (or last) place that has it.

    A NaN is the extreme, as in numpy.
    """
    source, out = op.inputs[0], op.outputs[0]
    shape = body.shape(source)
    axis = axis_of(op, len(shape))
    keep = bool(integer(op, "keepdims", 1))
    last = bool(integer(op, "select_last_index", 0))
    how = "max" if op.op_type == "ArgMax" else "min"
    work = work_dtype(body.dtype(source))
    best = body.temporary(work, body.shape(out))
    combine(body, best, source, (axis,), keep, how, _same, _same)
    missing = -1 if last else shape[axis]

    def value(axes: Axes, reduced: Axes) -> Expr:
        x = cast(body.read(source, place(len(shape), axes, reduced, (axis,), keep)), work)
        m = body.read(best, axes)
        hit: Expr = Binary("eq", x, m)
        if "float" in work:
            hit = Binary("or", hit, Unary("isnan", x))
        return Select(hit, reduced[0], Const(missing, "int64"))

    body.combine(out, (shape[axis],), "max" if last else "min", value)


def _hardmax(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    axis = axis_of(op, len(shape), -1)
    rest = tuple(n for d, n in enumerate(shape) if d != axis)
    first = body.temporary("int64", rest)
    _arg(
        body,
        Op("ArgMax", (source,), (first,), {"axis": axis, "keepdims": 0}, name=op.name),
    )

    def value(axes: Axes) -> Expr:
        chosen = body.read(first, [i for d, i in enumerate(axes) if d != axis])
        one = cast(Select(Binary("eq", chosen, axes[axis]), constant(1, "float32"), constant(0, "float32")), dtype)
        return one

    body.map(out, value)


def _global_pool(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape = body.shape(source)
    over = tuple(range(2, len(shape)))
    count = prod(shape[2:])
    if op.op_type == "GlobalMaxPool":
        combine(body, out, source, over, True, "max", _same, _same)
    elif op.op_type == "GlobalAveragePool":
        combine(body, out, source, over, True, "add", _same, lambda total: mean(total, count))
    else:
        p = integer(op, "p", 2)
        combine(body, out, source, over, True, "add", lambda x: powered(_absolute(x), p), lambda t: p_root(t, p))


def powered(x: Expr, p: int) -> Expr:
    """x ** p for a positive integer p."""
    result = x
    for _ in range(p - 1):
        result = Binary("mul", result, x)
    return result


def p_root(x: Expr, p: int) -> Expr:
    """x ** (1 / p)."""
    return x if p == 1 else Unary("sqrt", x) if p == 2 else Binary("pow", x, constant(1 / p, x.dtype))


def _lp_normalization(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    axis, p = axis_of(op, len(shape), -1), integer(op, "p", 2)
    if p not in (1, 2):
        raise refused(op, f"p is {p}, not 1 or 2")
    work = work_dtype(dtype)
    norm = body.temporary(work, tuple(1 if d == axis else n for d, n in enumerate(shape)))
    combine(body, norm, source, (axis,), True, "add", lambda x: powered(_absolute(x), p), lambda t: p_root(t, p))

    def value(axes: Axes) -> Expr:
        length = body.read(norm, [ix.const(0) if d == axis else i for d, i in enumerate(axes)])
        x = cast(body.read(source, axes), work)
        zero = constant(0, work)
        return cast(Select(Binary("eq", length, zero), zero, Binary("div", x, length)), dtype)

    body.map(out, value)


def _mean_variance(body: Body, op: Op) -> None:
    """(x - mean) / (deviation + 1e-9), the constant as in the operator's function body."""
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    over = tuple(a % len(shape) for a in (integers(op, "axes") or (0, 2, 3)))
    work = work_dtype(dtype)
    small = tuple(1 if d in over else n for d, n in enumerate(shape))
    average, spread = body.temporary(work, small), body.temporary(work, small)
    count = prod(shape[a] for a in over)
    combine(body, average, source, over, True, "add", _same, lambda t: mean(t, count))

    def centred(index: Sequence[Expr]) -> Expr:
        own = [ix.const(0) if d in over else i for d, i in enumerate(index)]
        return Binary("sub", cast(body.read(source, index), work), body.read(average, own))

    def squared(axes: Axes, reduced: Axes) -> Expr:
        x = centred(place(len(shape), axes, reduced, over, True))
        return Binary("mul", x, x)

    body.combine(spread, [shape[a] for a in over], "add", squared, lambda t: Unary("sqrt", mean(t, count)))

    def value(axes: Axes) -> Expr:
        own = [ix.const(0) if d in over else i for d, i in enumerate(axes)]
        below = Binary("add", body.read(spread, own), constant(1e-9, work))
        return cast(Binary("div", centred(axes), below), dtype)

    body.map(out, value)


def _batch_normalization(body: Body, op: Op) -> None:
    if integer(op, "training_mode", 0):
        raise refused(op, "training mode")
    source, scale, bias, average, variance = op.inputs[:5]
    dtype = body.dtype(source)
    work = work_dtype(dtype)
    epsilon = number(op, "epsilon", 1e-5)

    def value(axes: Axes) -> Expr:
        channel = (axes[1] if len(axes) > 1 else ix.const(0),)
        x, s, b, m, v = (
            cast(cast(body.read(n, i), work_dtype(body.dtype(n))), work)
            for n, i in ((source, axes), (scale, channel), (bias, channel), (average, channel), (variance, channel))
        )
        root = Unary("sqrt", Binary("add", v, constant(epsilon, work)))
        return cast(Binary("add", Binary("mul", Binary("div", Binary("sub", x, m), root), s), b), dtype)

    body.map(op.outputs[0], value)


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    **dict.fromkeys((*_REDUCE, "ReduceLogSumExp"), _reduce),
    "ArgMax": _arg,
    "ArgMin": _arg,
    "BatchNormalization": _batch_normalization,
    "GlobalAveragePool": _global_pool,
    "GlobalLpPool": _global_pool,
    "GlobalMaxPool": _global_pool,
    "Hardmax": _hardmax,
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance,
}
