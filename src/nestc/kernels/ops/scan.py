"""Operators whose elements depend on each other: running sums, sorting and scattering, as kernels with serial loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nestc.graph.region import Op
from nestc.kernels.compute import Body, clamped, identity_of
from nestc.kernels.elementwise import maximum, minimum
from nestc.kernels.ops.attributes import axis_of, integer, integers, refused, text
from nestc.kernels.ops.reduction import work_dtype
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, constant, load
from nestc.tensor.ir import Binary, Expr, Load, Unary
from nestc.tensor.rewrite import cast

_ZERO = ix.const(0)


def _insert(outer: Sequence[Expr], axis: int, i: Expr) -> list[Expr]:
    """The index with `i` put in at `axis`."""
    return [*outer[:axis], i, *outer[axis:]]


def _cumulate(body: Body, op: Op) -> None:
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    if 0 in shape:
        body.alias(out, source)
        return
    axis = int(body.constant(op, 1).reshape(-1)[0]) % max(1, len(shape))
    reverse, exclusive = integer(op, "reverse", 0), integer(op, "exclusive", 0)
    how = "add" if op.op_type == "CumSum" else "mul"
    work = work_dtype(dtype)
    b = Builder(f"{body.region.name}_{op.op_type.lower()}")
    x, y = b.param("x", dtype, shape), b.param("y", dtype, shape)
    rest = [n for d, n in enumerate(shape) if d != axis]
    acc = b.regs("acc", (1,), 1, work)
    here = (_ZERO, _ZERO)

    def row(outer: Sequence[Expr]) -> None:
        b.store(acc, here, identity_of(how, work))
        with b.loop("i", shape[axis]) as i:
            at = _insert(outer, axis, ix.sub(ix.const(shape[axis] - 1), i) if reverse else i)
            if exclusive:
                b.store(y, at, cast(Load(acc, here), dtype))
            b.store(acc, here, binary(how, Load(acc, here), cast(load(x, *at), work)))
            if not exclusive:
                b.store(y, at, cast(Load(acc, here), dtype))

    if rest:
        with b.parallel("p", *rest) as outer:
            row(outer)
    else:
        row(())
    body.kernel(b, {x.name: source}, {y.name: out})


def _top_k(body: Body, op: Op) -> None:
    """Insertion into a sorted list of the k best so far; an element that is no better than the last costs one compare.

    Of equal elements the one with the lower index comes first.
    """
    source, values, indices = op.inputs[0], op.outputs[0], op.output(1)
    shape, dtype = body.shape(source), body.dtype(source)
    axis = axis_of(op, len(shape), -1)
    k = body.shape(values or indices)[axis]
    largest = integer(op, "largest", 1)
    work = work_dtype(dtype)
    if k == 0:
        body.map(values, lambda axes: constant(0, dtype))
        body.map(indices, lambda axes: constant(0, "int64"))
        return
    values = values or body.temporary(dtype, body.shape(indices))
    indices = indices or body.temporary("int64", body.shape(values))
    b = Builder(f"{body.region.name}_topk")
    x = b.param("x", dtype, shape)
    v, n = b.param("values", dtype, body.shape(values)), b.param("indices", "int64", body.shape(values))
    best, place = b.scratch("best", (k,), work), b.scratch("place", (k,), "int64")
    rest = [extent for d, extent in enumerate(shape) if d != axis]

    def better(candidate: Expr, j: Expr) -> Expr:
        free = Binary("lt", load(place, j), _ZERO)
        return Binary("or", free, Binary("gt" if largest else "lt", candidate, load(best, j)))

    def row(outer: Sequence[Expr]) -> None:
        with b.loop("f", k) as j:
            b.store(best, (j,), constant(0, work))
            b.store(place, (j,), ix.const(-1))
        with b.loop("i", shape[axis]) as i:
            candidate = cast(load(x, *_insert(outer, axis, i)), work)
            with b.when(better(candidate, ix.const(k - 1))):
                with b.loop("s", k - 1) as s:
                    j = ix.sub(ix.const(k - 1), s)
                    above = ix.add(j, -1)
                    with b.when(better(candidate, above)):
                        b.store(best, (j,), load(best, above))
                        b.store(place, (j,), load(place, above))
                    with b.otherwise(), b.when(better(candidate, j)):
                        b.store(best, (j,), candidate)
                        b.store(place, (j,), i)
                with b.when(better(candidate, _ZERO)):
                    b.store(best, (_ZERO,), candidate)
                    b.store(place, (_ZERO,), i)
        with b.loop("o", k) as j:
            at = _insert(outer, axis, j)
            b.store(v, at, cast(load(best, j), dtype))
            b.store(n, at, load(place, j))

    if rest:
        with b.parallel("p", *rest) as outer:
            row(outer)
    else:
        row(())
    body.kernel(b, {x.name: source}, {v.name: values, n.name: indices})


def _merged(how: str, old: Expr, new: Expr, op: Op) -> Expr:
    if how == "none":
        return new
    if how in ("add", "mul"):
        if old.dtype == "bool":
            return Binary("or" if how == "add" else "and", old, new)
        return binary(how, old, new)
    if how in ("max", "min"):
        if old.dtype == "bool":
            return Binary("or" if how == "max" else "and", old, new)
        return (maximum if how == "max" else minimum)(old, new)
    raise refused(op, f"reduction {how!r} is unknown")


def _scatter(
    body: Body,
    op: Op,
    data: str,
    updates: str,
    how: str,
    others: Mapping[str, str],
    target: Callable[[Builder, Mapping[str, object], Sequence[Expr]], Sequence[Expr]],
) -> None:
    """Copy `data`, then write every element of `updates` at the index that `target` gives, one after the other."""
    out = op.outputs[0]
    body.alias(out, data)
    shape, dtype = body.shape(updates), body.dtype(out)
    if 0 in shape or 0 in body.shape(out):
        return
    work = work_dtype(dtype)
    b = Builder(f"{body.region.name}_{op.op_type.lower()}")
    params = {name: b.param(name, body.dtype(value), body.shape(value)) for name, value in others.items()}
    u = b.param("updates", dtype, shape)
    y = b.param("out", dtype, body.shape(out))

    def nest(index: list[Expr]) -> None:
        if len(index) < len(shape):
            with b.loop("i", shape[len(index)]) as i:
                nest([*index, i])
            return
        at = target(b, params, index)
        new = load(u, *index)
        if how != "none":
            new = cast(_merged(how, cast(load(y, *at), work), cast(new, work), op), dtype)
        b.store(y, at, new)

    nest([])
    body.kernel(b, {**{params[n].name: v for n, v in others.items()}, u.name: updates}, {y.name: out})


def _scatter_elements(body: Body, op: Op) -> None:
    data, indices, updates = op.inputs[:3]
    shape = body.shape(data)
    axis = axis_of(op, len(shape))

    def target(b: Builder, params: Mapping[str, object], index: Sequence[Expr]) -> list[Expr]:
        at = clamped(cast(load(params["indices"], *index), "int64"), shape[axis])  # type: ignore[arg-type]
        return [at if d == axis else i for d, i in enumerate(index)]

    _scatter(body, op, data, updates, text(op, "reduction", "none"), {"indices": indices}, target)


def _scatter_nd(body: Body, op: Op) -> None:
    data, indices, updates = op.inputs[:3]
    shape, depth = body.shape(data), body.shape(indices)[-1]
    prefix = len(body.shape(indices)) - 1

    def target(b: Builder, params: Mapping[str, object], index: Sequence[Expr]) -> list[Expr]:
        chosen = [
            clamped(load(params["indices"], *index[:prefix], ix.const(d)), shape[d])  # type: ignore[arg-type]
            for d in range(depth)
        ]
        return [*chosen, *index[prefix:]]

    _scatter(body, op, data, updates, text(op, "reduction", "none"), {"indices": indices}, target)


def _tensor_scatter(body: Body, op: Op) -> None:
    data, updates, starts = op.inputs[0], op.inputs[1], op.input(2)
    shape = body.shape(data)
    axis = axis_of(op, len(shape), -2)
    circular = text(op, "mode", "linear") == "circular"

    def target(b: Builder, params: Mapping[str, object], index: Sequence[Expr]) -> list[Expr]:
        at: Expr = index[axis]
        if starts:
            at = binary("add", cast(load(params["starts"], index[0]), "int64"), at)  # type: ignore[arg-type]
        at = binary("mod", at, ix.const(shape[axis])) if circular else clamped(at, shape[axis])
        return [at if d == axis else i for d, i in enumerate(index)]

    _scatter(body, op, data, updates, "none", {"starts": starts} if starts else {}, target)


def _max_unpool(body: Body, op: Op) -> None:
    """Every value goes to the place that its index names within its own (n, c) plane of the pooled input.

    Without an output shape the indices count over the inferred output.
    """
    source, indices, out = op.inputs[0], op.inputs[1], op.outputs[0]
    shape, target_shape = body.shape(source), body.shape(out)
    # The indices count over the tensor that was pooled, whose size is the inferred one whatever output_shape says.
    kernel = integers(op, "kernel_shape") or ()
    strides = integers(op, "strides") or (1,) * len(kernel)
    pads = integers(op, "pads") or (0,) * (2 * len(kernel))
    pooled = (
        *shape[:2],
        *(
            (n - 1) * s + k - pads[d] - pads[d + len(kernel)]
            for d, (n, s, k) in enumerate(zip(shape[2:], strides, kernel))
        ),
    )
    zeros = body.temporary(body.dtype(source), target_shape)
    body.map(zeros, lambda axes: cast(constant(0, "float32"), body.dtype(source)))
    count = 1
    for n in pooled:
        count *= n

    def target(b: Builder, params: Mapping[str, object], index: Sequence[Expr]) -> list[Expr]:
        flat = clamped(load(params["indices"], *index), count)  # type: ignore[arg-type]
        return [binary("min", i, ix.const(n - 1)) for i, n in zip(ix.unflatten(flat, pooled), target_shape)]

    inner = Op(op.op_type, (zeros, indices, source), (out,), {}, name=op.name)
    _scatter(body, inner, zeros, source, "none", {"indices": indices}, target)


def _determinant(body: Body, op: Op) -> None:
    """Gaussian elimination with partial pivoting on a private copy."""
    source, out = op.inputs[0], op.outputs[0]
    shape, dtype = body.shape(source), body.dtype(source)
    work = work_dtype(dtype)
    n = shape[-1]
    b = Builder(f"{body.region.name}_det")
    x, y = b.param("x", dtype, shape), b.param("y", dtype, body.shape(out))
    a = b.scratch("a", (n, n), work)
    state = b.stack("state", (2,), work)  # the product so far, and the pivot's size
    pivot = b.stack("pivot", (1,), "int64")
    one = constant(1, work)

    def matrix(outer: Sequence[Expr]) -> None:
        with b.loop("r", n) as r, b.loop("c", n) as c:
            b.store(a, (r, c), cast(load(x, *outer, r, c), work))
        b.store(state, (_ZERO,), one)
        for k in range(n):
            b.store(pivot, (_ZERO,), ix.const(k))
            b.store(state, (ix.const(1),), Unary("abs", load(a, k, k)))
            with b.loop("s", n - 1 - k) as s:
                row = ix.add(s, k + 1)
                with b.when(Binary("gt", Unary("abs", load(a, row, k)), load(state, 1))):
                    b.store(state, (ix.const(1),), Unary("abs", load(a, row, k)))
                    b.store(pivot, (_ZERO,), row)
            at = clamped(load(pivot, 0), n)
            swapped = Binary("ne", load(pivot, 0), ix.const(k))
            held = b.stack(f"held{k}", (1,), work)
            with b.when(swapped):
                b.store(state, (_ZERO,), Unary("neg", load(state, 0)))
                with b.loop("w", n) as w:
                    b.store(held, (_ZERO,), load(a, k, w))
                    b.store(a, (ix.const(k), w), load(a, at, w))
                    b.store(a, (at, w), load(held, 0))
            b.store(state, (_ZERO,), Binary("mul", load(state, 0), load(a, k, k)))
            with b.when(Binary("ne", load(a, k, k), constant(0, work))), b.loop("e", n - 1 - k) as e:
                row = ix.add(e, k + 1)
                b.store(held, (_ZERO,), Binary("div", load(a, row, k), load(a, k, k)))
                with b.loop("w", n) as w:
                    scaled = Binary("mul", load(held, 0), load(a, k, w))
                    b.store(a, (row, w), Binary("sub", load(a, row, w), scaled))
        b.store(y, outer, cast(load(state, 0), dtype))

    if n > 16:
        raise refused(op, f"determinants of {n} x {n} matrices have no generated code")
    if shape[:-2]:
        with b.parallel("p", *shape[:-2]) as outer:
            matrix(outer)
    else:
        matrix(())
    body.kernel(b, {x.name: source}, {y.name: out})


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "CumProd": _cumulate,
    "CumSum": _cumulate,
    "Det": _determinant,
    "MaxUnpool": _max_unpool,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
}
