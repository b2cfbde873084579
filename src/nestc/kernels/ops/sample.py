"""Operators that read an image at computed places: GridSample, AffineGrid, RoiAlign and DeformConv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from nestc.graph.region import Op
from nestc.kernels.compute import Body
from nestc.kernels.ops.attributes import integer, integers, number, refused, text
from nestc.kernels.ops.reduction import work_dtype
from nestc.tensor import index as ix
from nestc.tensor.build import binary, constant
from nestc.tensor.ir import Binary, Expr, Select, Unary, Var
from nestc.tensor.rewrite import cast

Axes = tuple[Var, ...]


def _k(value: float, like: Expr) -> Expr:
    return constant(value, like.dtype)


def _limit(x: Expr, low: float, high: float) -> Expr:
    """`x` within bounds; NaN becomes `low`, so that the conversion to an index is defined."""
    return Binary("min", Binary("max", x, _k(low, x)), _k(high, x))


def _place(x: Expr, extent: int) -> Expr:
    """A whole floating number as an index that is certainly inside."""
    at = cast(_limit(x, 0, extent - 1), "int64")
    return binary("min", binary("max", at, ix.const(0)), ix.const(extent - 1))


def _inside(x: Expr, extent: int) -> Expr:
    return Binary("and", Binary("ge", x, _k(0, x)), Binary("le", x, _k(extent - 1, x)))


def _reflected(x: Expr, low: float, high: float) -> Expr:
    """`x` mirrored at both bounds as often as it takes."""
    span = high - low
    if span <= 0:
        return _k(low, x)
    phase = Binary("mod", Binary("sub", x, _k(low, x)), _k(2 * span, x))
    folded = Select(Binary("le", phase, _k(span, x)), phase, Binary("sub", _k(2 * span, x), phase))
    return Binary("add", folded, _k(low, x))


def _cubic(t: Expr) -> list[Expr]:
    """Weights of four neighbours by cubic convolution with a = -0.75 (R. Keys, 1981)."""
    a = -0.75

    def near(x: Expr) -> Expr:
        inner = Binary("sub", Binary("mul", _k(a + 2, x), x), _k(a + 3, x))
        return Binary("add", Binary("mul", Binary("mul", inner, x), x), _k(1, x))

    def far(x: Expr) -> Expr:
        inner = Binary("sub", Binary("mul", _k(a, x), x), _k(5 * a, x))
        inner = Binary("add", Binary("mul", inner, x), _k(8 * a, x))
        return Binary("sub", Binary("mul", inner, x), _k(4 * a, x))

    one = _k(1, t)
    back = Binary("sub", one, t)
    return [far(Binary("add", t, one)), near(t), near(back), far(Binary("add", back, one))]


def _grid_sample(body: Body, op: Op) -> None:
    source, grid, out = op.inputs[0], op.inputs[1], op.outputs[0]
    spatial = body.shape(source)[2:]
    rank = len(spatial)
    mode = text(op, "mode", "linear").replace("bilinear", "linear").replace("bicubic", "cubic")
    padding = text(op, "padding_mode", "zeros")
    align = integer(op, "align_corners", 0)
    dtype = body.dtype(out)
    work = work_dtype(body.dtype(grid))

    def value(axes: Axes) -> Expr:
        n, c, *places = axes
        taps: list[list[tuple[Expr, Expr | None]]] = []  # per dimension: (place, weight)
        for d, extent in enumerate(spatial):
            # The grid's last axis counts x first, so it runs against the order of the dimensions.
            g = cast(body.read(grid, (n, *places, ix.const(rank - 1 - d))), work)
            one = _k(1, g)
            if align:
                x = Binary("mul", Binary("div", Binary("add", g, one), _k(2, g)), _k(extent - 1, g))
                low, high = 0.0, extent - 1.0
            else:
                scaled = Binary("mul", Binary("add", g, one), _k(extent, g))
                x = Binary("div", Binary("sub", scaled, one), _k(2, g))
                low, high = -0.5, extent - 0.5
            if mode == "nearest":
                x = Unary("rint", x)
            if padding == "border":
                x = _limit(x, 0, extent - 1)
            elif padding == "reflection":
                x = _reflected(x, low, high)
            # Far outside, the place must still be a number that an index can hold.
            x = _limit(x, -4.0, extent + 4.0)
            if mode == "nearest":
                taps.append([(Unary("rint", x), None)])
                continue
            base = Unary("floor", x)
            t = Binary("sub", x, base)
            if mode == "linear":
                taps.append([(base, Binary("sub", one, t)), (Binary("add", base, one), t)])
            else:
                steps = [Binary("add", base, _k(s, x)) for s in (-1, 0, 1, 2)]
                taps.append(list(zip(steps, _cubic(t))))

        def pixel(where: Sequence[Expr]) -> Expr:
            index: list[Expr] = []
            mask: Expr | None = None
            for d, x in enumerate(where):
                extent = spatial[d]
                if padding == "reflection":
                    x = _reflected(x, 0 if align else -0.5, extent - 1 if align else extent - 0.5)
                elif padding == "zeros":
                    ok = _inside(x, extent)
                    mask = ok if mask is None else Binary("and", mask, ok)
                index.append(_place(x, extent))
            found = cast(body.read(source, (n, c, *index)), work)
            return found if mask is None else Select(mask, found, _k(0, found))

        total: Expr | None = None
        for combination in product(*taps):
            term = pixel([p for p, _ in combination])
            for _, weight in combination:
                term = term if weight is None else Binary("mul", term, weight)
            total = term if total is None else Binary("add", total, term)
        assert total is not None
        return cast(total, dtype)

    if mode == "cubic" and rank > 2:
        raise refused(op, "cubic mode in more than two dimensions")
    body.map(out, value)


def _affine_grid(body: Body, op: Op) -> None:
    theta, out = op.inputs[0], op.outputs[0]
    shape = body.shape(out)
    spatial = shape[1:-1]
    rank = len(spatial)
    align = integer(op, "align_corners", 0)
    dtype = body.dtype(out)
    work = work_dtype(dtype)

    def value(axes: Axes) -> Expr:
        n, *places, row = axes
        total = cast(body.read(theta, (n, row, ix.const(rank))), work)
        for d, (i, extent) in enumerate(zip(places, spatial)):
            x = cast(i, work)
            if align:
                x = Binary("sub", Binary("mul", x, _k(2 / max(1, extent - 1), x)), _k(1, x))
            else:
                x = Binary(
                    "sub", Binary("div", Binary("add", Binary("mul", x, _k(2, x)), _k(1, x)), _k(extent, x)), _k(1, x)
                )
            factor = cast(body.read(theta, (n, row, ix.const(rank - 1 - d))), work)
            total = Binary("add", total, Binary("mul", factor, x))
        return cast(total, dtype)

    body.map(out, value)


def _bilinear(
    body: Body, source: str, prefix: Sequence[Expr], y: Expr, x: Expr, work: str, combine_max: bool = False
) -> Expr:
    """The value at a place inside the image, which must be limited to it; or the largest weighted corner."""
    height, width = body.shape(source)[-2:]
    y0, x0 = Unary("floor", y), Unary("floor", x)
    ty, tx = Binary("sub", y, y0), Binary("sub", x, x0)
    result: Expr | None = None
    for dy, dx in product((0, 1), (0, 1)):
        wy = ty if dy else Binary("sub", _k(1, ty), ty)
        wx = tx if dx else Binary("sub", _k(1, tx), tx)
        row, column = _place(Binary("add", y0, _k(dy, y0)), height), _place(Binary("add", x0, _k(dx, x0)), width)
        corner = Binary("mul", Binary("mul", wy, wx), cast(body.read(source, (*prefix, row, column)), work))
        result = corner if result is None else Binary("max" if combine_max else "add", result, corner)
    assert result is not None
    return result


def _roi_align(body: Body, op: Op) -> None:
    source, rois, batches, out = op.inputs[0], op.inputs[1], op.inputs[2], op.outputs[0]
    height, width = body.shape(source)[2:]
    rows, columns = body.shape(out)[2:]
    samples = integer(op, "sampling_ratio", 0)
    if samples <= 0:
        raise refused(op, "the number of samples depends on the regions (sampling_ratio 0)")
    half = text(op, "coordinate_transformation_mode", "half_pixel") == "half_pixel"
    largest = text(op, "mode", "avg") == "max"
    scale = number(op, "spatial_scale", 1.0)
    dtype = body.dtype(out)
    work = work_dtype(dtype)

    def value(axes: Axes, taps: Axes) -> Expr:
        r, c, ph, pw = axes

        def coordinate(low: int, high: int, bins: int, place: Expr, tap: Expr, extent: int) -> tuple[Expr, Expr]:
            """Where a sample lies along one dimension, and whether it counts."""
            start, stop = (
                Binary("sub", Binary("mul", cast(body.read(rois, (r, ix.const(k))), work), constant(scale, work)),
                       constant(0.5 if half else 0.0, work))
                for k in (low, high)
            )  # fmt: skip
            size = Binary("sub", stop, start)
            if not half:
                size = Binary("max", size, _k(1, size))
            step = Binary("div", size, _k(bins, size))
            inner = Binary("mul", Binary("add", cast(tap, work), constant(0.5, work)), _k(1 / samples, size))
            at = Binary("add", start, Binary("mul", step, Binary("add", cast(place, work), inner)))
            counts = Binary("and", Binary("ge", at, _k(-1, at)), Binary("le", at, _k(extent, at)))
            return _limit(at, 0, extent - 1), counts

        y, ok_y = coordinate(1, 3, rows, ph, taps[0], height)
        x, ok_x = coordinate(0, 2, columns, pw, taps[1], width)
        at = cast(body.read(batches, (r,)), "int64")
        image = binary("min", binary("max", at, ix.const(0)), ix.const(body.shape(source)[0] - 1))
        found = _bilinear(body, source, (image, c), y, x, work, largest)
        return Select(Binary("and", ok_y, ok_x), found, _k(0, found))

    count = samples * samples
    body.combine(
        out,
        (samples, samples),
        "max" if largest else "add",
        value,
        lambda t: cast(t if largest else Binary("div", t, _k(count, t)), dtype),
    )


def _deform_conv(body: Body, op: Op) -> None:
    source, weight, offset, out = op.inputs[0], op.inputs[1], op.inputs[2], op.outputs[0]
    bias, mask = op.input(3), op.input(4)
    shape, filters = body.shape(source), body.shape(weight)
    if len(shape) != 4:
        raise refused(op, "only two-dimensional images")
    kernel = filters[2:]
    strides, dilations = integers(op, "strides") or (1, 1), integers(op, "dilations") or (1, 1)
    pads = integers(op, "pads") or (0, 0, 0, 0)
    group, offset_group = integer(op, "group", 1), integer(op, "offset_group", 1)
    dtype = body.dtype(out)
    work = work_dtype(dtype)
    each, per_offset = filters[0] // group, shape[1] // offset_group
    taps_count = kernel[0] * kernel[1]
    plain = body.temporary(work, body.shape(out))

    def value(axes: Axes, reduced: Axes) -> Expr:
        n, m, oh, ow = axes
        c, kh, kw = reduced
        channel = ix.add(ix.mul(ix.floordiv(m, each), filters[1]), c)
        part = ix.floordiv(channel, per_offset)
        tap = ix.add(ix.mul(kh, kernel[1]), kw)
        places: list[Expr] = []
        inside: Expr | None = None
        for d, (o, t) in enumerate(((oh, kh), (ow, kw))):
            at = ix.add(ix.mul(o, strides[d]), ix.mul(t, dilations[d]), -pads[d])
            row = ix.add(ix.mul(part, 2 * taps_count), ix.mul(tap, 2), d)
            x = Binary("add", cast(at, work), cast(body.read(offset, (n, row, oh, ow)), work))
            extent = shape[2 + d]
            ok = Binary("and", Binary("gt", x, _k(-1, x)), Binary("lt", x, _k(extent, x)))
            inside = ok if inside is None else Binary("and", inside, ok)
            places.append(_limit(x, -1, extent))
        total: Expr | None = None
        floors = [Unary("floor", x) for x in places]
        for step in product((0, 1), (0, 1)):
            term: Expr | None = None
            index: list[Expr] = []
            for d in (0, 1):
                t = Binary("sub", places[d], floors[d])
                w = t if step[d] else Binary("sub", _k(1, t), t)
                at = Binary("add", floors[d], _k(step[d], t))
                w = Select(_inside(at, shape[2 + d]), w, _k(0, w))
                term = w if term is None else Binary("mul", term, w)
                index.append(_place(at, shape[2 + d]))
            assert term is not None
            term = Binary("mul", term, cast(body.read(source, (n, channel, *index)), work))
            total = term if total is None else Binary("add", total, term)
        assert total is not None and inside is not None
        result: Expr = Select(inside, total, _k(0, total))
        if mask:
            row = ix.add(ix.mul(part, taps_count), tap)
            result = Binary("mul", result, cast(body.read(mask, (n, row, oh, ow)), work))
        return Binary("mul", result, cast(body.read(weight, (m, c, kh, kw)), work))

    body.combine(plain, filters[1:], "add", value)

    def final(axes: Axes) -> Expr:
        total = body.read(plain, axes)
        if bias:
            total = Binary("add", total, cast(body.read(bias, (axes[1],)), work))
        return cast(total, dtype)

    body.map(out, final)


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "AffineGrid": _affine_grid,
    "DeformConv": _deform_conv,
    "GridSample": _grid_sample,
    "RoiAlign": _roi_align,
}
