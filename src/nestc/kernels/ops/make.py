"""Values made from indices: ranges, diagonals, triangles, one-hot, windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import pi

import numpy as np

from nestc.graph.region import Op
from nestc.kernels.compute import Body
from nestc.kernels.elementwise import HALVES
from nestc.kernels.ops.attributes import axis_of, integer, refused
from nestc.tensor import index as ix
from nestc.tensor.build import binary, constant
from nestc.tensor.ir import Binary, Expr, Unary, Var
from nestc.tensor.rewrite import cast, select

Axes = tuple[Var, ...]


def _scalar(body: Body, name: str) -> Expr:
    return body.read(name, [ix.const(0)] * len(body.shape(name)))


def _range(body: Body, op: Op) -> None:
    dtype = body.dtype(op.outputs[0])
    work = "float32" if dtype in HALVES else dtype

    def value(axes: Axes) -> Expr:
        start, step = cast(_scalar(body, op.inputs[0]), work), cast(_scalar(body, op.inputs[2]), work)
        return cast(binary("add", start, binary("mul", cast(axes[0], work), step)), dtype)

    body.map(op.outputs[0], value)


def _constant_of_shape(body: Body, op: Op) -> None:
    array = op.attributes.get("value")
    value = np.asarray(array).reshape(-1)[0].item() if isinstance(array, np.ndarray) else 0
    dtype = body.dtype(op.outputs[0])
    work = "float32" if dtype in HALVES else dtype
    body.map(op.outputs[0], lambda axes: cast(constant(value, work), dtype))


def _constant(body: Body, op: Op) -> None:
    """A value that the model states; it is copied, so that the region's output has a place of its own."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        value = op.attributes.get(name)
        if value is not None:
            array = np.asarray(value)
            kind = body.dtype(op.outputs[0])
            stored = array.view(kind) if array.dtype.itemsize == 1 and kind == "uint8" else array.astype(kind)
            literal = body.literal(stored)
            body.map(op.outputs[0], lambda axes, source=literal: body.read(source, axes))
            return
    raise refused(op, "a constant of this kind")


def _eye_like(body: Body, op: Op) -> None:
    dtype = body.dtype(op.outputs[0])
    k = integer(op, "k", 0)

    def value(axes: Axes) -> Expr:
        on = binary("eq", ix.add(axes[0], k), axes[1])
        return select(on, constant(1, dtype), constant(0, dtype))

    body.map(op.outputs[0], value)


def _trilu(body: Body, op: Op) -> None:
    name, dtype = op.inputs[0], body.dtype(op.inputs[0])
    upper = integer(op, "upper", 1)

    def value(axes: Axes) -> Expr:
        row, column = axes[-2], axes[-1]
        k = _scalar(body, op.input(1)) if op.input(1) else ix.const(0)
        edge = ix.add(row, k)
        keep = binary("ge" if upper else "le", column, edge)
        return select(keep, body.read(name, axes), constant(0, dtype))

    body.map(op.outputs[0], value)


def _one_hot(body: Body, op: Op) -> None:
    indices, values = op.inputs[0], op.inputs[2]
    shape = body.shape(op.outputs[0])
    axis = axis_of(op, len(shape), -1)
    depth = shape[axis]

    def value(axes: Axes) -> Expr:
        rest = [i for d, i in enumerate(axes) if d != axis]
        index = body.read(indices, rest)
        # Floating indices are truncated, as ONNX Runtime does.
        index = cast(cast(index, "float32") if index.dtype in HALVES else index, "int64")
        wrapped = select(binary("lt", index, ix.const(0)), binary("add", index, ix.const(depth)), index)
        on = binary("eq", wrapped, axes[axis])
        return select(on, body.read(values, (ix.const(1),)), body.read(values, (ix.const(0),)))

    body.map(op.outputs[0], value)


_WINDOWS = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


def _window(body: Body, op: Op) -> None:
    """a - b cos(2 pi n / N) + c cos(4 pi n / N), the coefficients as the operators' definitions state them."""
    dtype = body.dtype(op.outputs[0])
    work = "float64" if dtype == "float64" else "float32"
    size = body.shape(op.outputs[0])[0]
    span = size if integer(op, "periodic", 1) else max(1, size - 1)
    a, b, c = _WINDOWS[op.op_type]

    def value(axes: Axes) -> Expr:
        angle = Binary("mul", cast(axes[0], work), constant(2 * pi / max(1, span), work))
        result: Expr = Binary("sub", constant(a, work), Binary("mul", constant(b, work), Unary("cos", angle)))
        if c:
            double = Unary("cos", Binary("mul", constant(2, work), angle))
            result = Binary("add", result, Binary("mul", constant(c, work), double))
        return cast(result, dtype)

    body.map(op.outputs[0], value)


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "BlackmanWindow": _window,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "EyeLike": _eye_like,
    "HammingWindow": _window,
    "HannWindow": _window,
    "OneHot": _one_hot,
    "Range": _range,
    "Trilu": _trilu,
}
