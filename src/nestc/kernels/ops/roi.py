"""Pooling over regions of interest, whose borders are data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nestc.graph.region import Op
from nestc.kernels.compute import Body, clamped, identity_of
from nestc.kernels.ops.attributes import integers, number, refused
from nestc.tensor import index as ix
from nestc.tensor.build import constant
from nestc.tensor.ir import Expr, Unary, Var
from nestc.tensor.rewrite import binary, cast, select

Axes = tuple[Var, ...]


def _max_roi_pool(body: Body, op: Op) -> None:
    """The largest element of each of `pooled_shape` cells of each region; 0 for a cell that has no element.

    The whole picture is gone through for each cell, since the borders of a cell are not known when compiling.
    """
    data, rois = op.inputs[:2]
    batch, _, height, width = body.shape(data)
    dtype = body.dtype(data)
    cells = integers(op, "pooled_shape")
    if cells is None or len(cells) != 2:
        raise refused(op, "attribute pooled_shape is not two sizes")
    scale = constant(number(op, "spatial_scale", 1.0), dtype)

    def inside(roi: Expr, axis: int, cell: Expr, place: Expr) -> Expr:
        """Whether `place` is in the cell; axis 0 is x, 1 is y. A roi is (batch, x1, y1, x2, y2), borders included."""
        start, end = (
            _rounded(binary("mul", body.read(rois, (roi, ix.const(column))), scale)) for column in (1 + axis, 3 + axis)
        )
        one = constant(1, dtype)
        size = binary("max", binary("add", binary("sub", end, start), one), one)
        step = binary("div", size, constant(cells[1 - axis], dtype))
        begin = binary("add", Unary("floor", binary("mul", cast(cell, dtype), step)), start)
        stop = binary("add", Unary("ceil", binary("mul", cast(ix.add(cell, 1), dtype), step)), start)
        at = cast(place, dtype)
        return binary("and", binary("ge", at, begin), binary("lt", at, stop))

    def element(axes: Axes, reduced: Axes) -> Expr:
        (roi, channel, row, column), (y, x) = axes, reduced
        picture = clamped(cast(body.read(rois, (roi, ix.const(0))), "int64"), batch)
        chosen = binary("and", inside(roi, 1, row, y), inside(roi, 0, column, x))
        return select(chosen, body.read(data, (picture, channel, y, x)), identity_of("max", dtype))

    def finish(largest: Expr) -> Expr:
        empty = binary("eq", largest, identity_of("max", dtype))
        return select(empty, constant(0, dtype), largest)

    body.combine(op.outputs[0], (height, width), "max", element, finish)


def _rounded(x: Expr) -> Expr:
    """To the nearest whole number, halves away from zero."""
    half, zero = constant(0.5, x.dtype), constant(0, x.dtype)
    up, down = Unary("floor", binary("add", x, half)), Unary("ceil", binary("sub", x, half))
    return select(binary("lt", x, zero), down, up)


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "MaxRoiPool": _max_roi_pool,
}
