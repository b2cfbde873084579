"""Elements chosen by data: the Gather family and Compress with a known condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from nestc.graph.region import Op
from nestc.kernels.compute import Body, clamped
from nestc.kernels.ops.attributes import axis_of, integer
from nestc.tensor import index as ix
from nestc.tensor.ir import Expr, Var
from nestc.tensor.rewrite import cast

Axes = tuple[Var, ...]


def _gather(body: Body, op: Op) -> None:
    data, indices = op.inputs[:2]
    shape = body.shape(data)
    axis = axis_of(op, len(shape))
    count = len(body.shape(indices))

    def value(axes: Axes) -> Expr:
        place = axes[axis : axis + count]
        at = clamped(cast(body.read(indices, place), "int64"), shape[axis])
        return body.read(data, (*axes[:axis], at, *axes[axis + count :]))

    body.map(op.outputs[0], value)


def _gather_elements(body: Body, op: Op) -> None:
    data, indices = op.inputs[:2]
    shape = body.shape(data)
    axis = axis_of(op, len(shape))

    def value(axes: Axes) -> Expr:
        at = clamped(cast(body.read(indices, axes), "int64"), shape[axis])
        return body.read(data, [at if d == axis else i for d, i in enumerate(axes)])

    body.map(op.outputs[0], value)


def _gather_nd(body: Body, op: Op) -> None:
    data, indices = op.inputs[:2]
    shape, index_shape = body.shape(data), body.shape(indices)
    batch = integer(op, "batch_dims", 0)
    depth = index_shape[-1]
    prefix = len(index_shape) - 1

    def value(axes: Axes) -> Expr:
        chosen = [
            clamped(cast(body.read(indices, (*axes[:prefix], ix.const(k))), "int64"), shape[batch + k])
            for k in range(depth)
        ]
        return body.read(data, (*axes[:batch], *chosen, *axes[prefix:]))

    body.map(op.outputs[0], value)


def _compress(body: Body, op: Op) -> None:
    shape = body.shape(op.inputs[0])
    chosen = np.flatnonzero(body.constant(op, 1).reshape(-1)).astype(np.int64)
    name = body.literal(chosen)
    if op.attributes.get("axis") is None:
        body.map(
            op.outputs[0],
            lambda axes: body.read(
                op.inputs[0], ix.unflatten(clamped(body.read(name, axes), int(np.prod(shape))), shape)
            ),
        )
        return
    axis = axis_of(op, len(shape))

    def value(axes: Axes) -> Expr:
        at = clamped(body.read(name, (axes[axis],)), shape[axis])
        return body.read(op.inputs[0], [at if d == axis else i for d, i in enumerate(axes)])

    body.map(op.outputs[0], value)


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "Compress": _compress,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
}
