"""Products summed over axes, of any dtype and rank: matrix products, Einsum, and their quantized forms.

These are correct for everything ONNX allows; float32 products that matter for speed have a family of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nestc.graph.region import Op
from nestc.kernels.compute import Body
from nestc.kernels.elementwise import dequantize, quantize
from nestc.kernels.ops.attributes import integer, number, refused, text
from nestc.kernels.ops.reduction import combine, work_dtype
from nestc.kernels.small import decode
from nestc.tensor import index as ix
from nestc.tensor.build import binary, constant
from nestc.tensor.ir import Binary, Expr, Unary, Var
from nestc.tensor.rewrite import cast, select

Axes = tuple[Var, ...]


def _operands(left: tuple[int, ...], right: tuple[int, ...], axes: Axes, k: Expr) -> tuple[list[Expr], list[Expr]]:
    """Indices of both operands of a matrix product at output index `axes` and inner index `k`, as numpy.matmul."""
    batch, rest = list(axes), list(axes)
    column = rest.pop() if len(right) > 1 else None
    row = rest.pop() if len(left) > 1 else None
    batch = rest

    def prefix(shape: tuple[int, ...]) -> list[Expr]:
        outer = shape[:-2]
        own = batch[len(batch) - len(outer) :] if outer else []
        return [ix.const(0) if n == 1 else i for n, i in zip(outer, own)]

    a = [*prefix(left), row, k] if row is not None else [k]
    b = [*prefix(right), k, column] if column is not None else [k]
    return a, b


def _matmul(body: Body, op: Op) -> None:
    left, right = op.inputs[:2]
    a_shape, b_shape = body.shape(left), body.shape(right)
    dtype = body.dtype(op.outputs[0])
    work = work_dtype(dtype)

    def value(axes: Axes, inner: Axes) -> Expr:
        a, b = _operands(a_shape, b_shape, axes, inner[0])
        return binary("mul", cast(body.read(left, a), work), cast(body.read(right, b), work))

    body.combine(op.outputs[0], (a_shape[-1],), "add", value, lambda total: cast(total, dtype))


def _gemm(body: Body, op: Op) -> None:
    a, b, c = op.inputs[0], op.inputs[1], op.input(2)
    turn_a, turn_b = integer(op, "transA", 0), integer(op, "transB", 0)
    alpha, beta = number(op, "alpha", 1.0), number(op, "beta", 1.0)
    dtype = body.dtype(op.outputs[0])
    work = work_dtype(dtype)
    depth = body.shape(a)[0 if turn_a else 1]
    product = body.temporary(work, body.shape(op.outputs[0]))

    def value(axes: Axes, inner: Axes) -> Expr:
        (m, n), k = axes, inner[0]
        x = cast(body.read(a, (k, m) if turn_a else (m, k)), work)
        return binary("mul", x, cast(body.read(b, (n, k) if turn_b else (k, n)), work))

    body.combine(product, (depth,), "add", value)

    def scaled(x: Expr, factor: float) -> Expr:
        if factor == 1.0:
            return x
        if "float" in work:
            return Binary("mul", x, constant(factor, work))
        return cast(Binary("mul", cast(x, "float64"), constant(factor, "float64")), work)

    def final(axes: Axes) -> Expr:
        result = scaled(body.read(product, axes), alpha)
        if c:
            shape = body.shape(c)
            own = [ix.const(0) if n == 1 else i for n, i in zip(shape, axes[2 - len(shape) :])]
            result = binary("add", result, scaled(cast(body.read(c, own), work), beta))
        return cast(result, dtype)

    body.map(op.outputs[0], final)


def along(body: Body, name: str, index: Sequence[Expr], axis: int) -> Expr:
    """A scale or zero point: one for all, one for each place along `axis`, or broadcast to the whole index."""
    shape = body.shape(name)
    if len(shape) == 1 and shape[0] > 1:
        return body.read(name, (index[axis],))
    own = list(index)[len(index) - len(shape) :] if shape else []
    return body.read(name, [ix.const(0) if n == 1 else i for n, i in zip(shape, own)])


def shifted(body: Body, name: str, zero: str, index: Sequence[Expr], zero_axis: int, mask: Expr | None = None) -> Expr:
    """An integer operand less its zero point, as int32; 0 where `mask` does not hold."""
    x = cast(body.read(name, index, mask), "int32")
    if not zero:
        return x
    offset = cast(along(body, zero, index, zero_axis), "int32")
    result = Binary("sub", x, offset)
    if mask is None:
        return result
    return select(mask, result, constant(0, "int32"))


def _matmul_integer(body: Body, op: Op) -> None:
    left, right = op.inputs[:2]
    a_shape, b_shape = body.shape(left), body.shape(right)

    def value(axes: Axes, inner: Axes) -> Expr:
        a, b = _operands(a_shape, b_shape, axes, inner[0])
        x = shifted(body, left, op.input(2), a, max(0, len(a) - 2))
        return Binary("mul", x, shifted(body, right, op.input(3), b, len(b) - 1))

    body.combine(op.outputs[0], (a_shape[-1],), "add", value)


def _qlinear_matmul(body: Body, op: Op) -> None:
    left, a_scale, a_zero, right, b_scale, b_zero, y_scale, y_zero = op.inputs
    a_shape, b_shape = body.shape(left), body.shape(right)
    out = op.outputs[0]
    total = body.temporary("int32", body.shape(out))

    def value(axes: Axes, inner: Axes) -> Expr:
        a, b = _operands(a_shape, b_shape, axes, inner[0])
        x = shifted(body, left, a_zero, a, max(0, len(a) - 2))
        return Binary("mul", x, shifted(body, right, b_zero, b, len(b) - 1))

    body.combine(total, (a_shape[-1],), "add", value)

    def final(axes: Axes) -> Expr:
        row = max(0, len(axes) - 2)
        scale = Binary(
            "mul",
            cast(along(body, a_scale, axes, row), "float32"),
            cast(along(body, b_scale, axes, len(axes) - 1), "float32"),
        )
        real = Binary("mul", cast(body.read(total, axes), "float32"), scale)
        y = cast(along(body, y_scale, axes, row), "float32")
        return quantize(real, y, along(body, y_zero, axes, row) if y_zero else None, body.dtype(out))

    body.map(out, final)


def _einsum(body: Body, op: Op) -> None:
    equation = text(op, "equation", "").replace(" ", "")
    out = op.outputs[0]
    terms, result = _parse(equation, [len(body.shape(n)) for n in op.inputs], op)
    extents: dict[str, int] = {}
    for term, name in zip(terms, op.inputs):
        for label, n in zip(term, body.shape(name)):
            extents[label] = max(extents.get(label, 1), n) if n else 0
    inner = [label for label in extents if label not in result]
    dtype = body.dtype(out)
    work = work_dtype(dtype)

    def value(axes: Axes, reduced: Axes) -> Expr:
        places: dict[str, Expr] = {**dict(zip(result, axes)), **dict(zip(inner, reduced))}
        product: Expr | None = None
        for term, name in zip(terms, op.inputs):
            index = [ix.const(0) if n == 1 else places[label] for label, n in zip(term, body.shape(name))]
            x = cast(body.read(name, index), work)
            product = x if product is None else binary("mul", product, x)
        assert product is not None
        return product

    body.combine(out, [extents[label] for label in inner], "add", value, lambda total: cast(total, dtype))


def _parse(equation: str, ranks: Sequence[int], op: Op) -> tuple[list[list[str]], list[str]]:
    """Labels of every operand's axes and of the result's; the axes of an ellipsis are called ``.0``, ``.1`` ..."""
    left, arrow, right = equation.partition("->")
    texts = left.split(",")
    if len(texts) != len(ranks):
        raise refused(op, f"equation {equation!r} is for {len(texts)} operands")
    terms: list[list[str]] = []
    widest = 0
    for term, rank in zip(texts, ranks):
        before, dots, after = term.partition("...")
        hidden = rank - len(before) - len(after) if dots else 0
        widest = max(widest, hidden)
        terms.append([*before, *(f".{d}" for d in range(-hidden, 0)), *after])
    dotted = [f".{d}" for d in range(-widest, 0)]
    if arrow:
        before, dots, after = right.partition("...")
        return terms, [*before, *(dotted if dots else []), *after]
    letters = [label for term in terms for label in term if not label.startswith(".")]
    return terms, [*dotted, *sorted(label for label in set(letters) if letters.count(label) == 1)]


def _dynamic_quantize(body: Body, op: Op) -> None:
    """Scale and zero point from the smallest and largest value, both extended to include 0."""
    source = op.inputs[0]
    y, scale, zero = op.outputs
    over = tuple(range(len(body.shape(source))))
    low, high = body.temporary("float32", ()), body.temporary("float32", ())
    nothing = constant(0, "float32")
    combine(body, low, source, over, False, "min", lambda x: x, lambda t: Binary("min", t, nothing))
    combine(body, high, source, over, False, "max", lambda x: x, lambda t: Binary("max", t, nothing))
    span = Binary("sub", body.read(high, ()), body.read(low, ()))
    body.map(scale, lambda axes: Binary("div", span, constant(255, "float32")))

    def offset(axes: Axes) -> Expr:
        exact = Binary("div", Unary("neg", body.read(low, ())), body.read(scale, ()))
        rounded = Unary("rint", exact)
        return cast(Binary("min", Binary("max", rounded, nothing), constant(255, "float32")), "uint8")

    body.map(zero, offset)
    body.map(y, lambda axes: quantize(body.read(source, axes), body.read(scale, ()), body.read(zero, ()), "uint8"))


def _blocked_quantization(body: Body, op: Op) -> None:
    """QuantizeLinear and DequantizeLinear with one scale for each block of `block_size` elements along an axis."""
    source, scale, zero, out = op.inputs[0], op.inputs[1], op.input(2), op.outputs[0]
    size = integer(op, "block_size", 0)
    rank = len(body.shape(source))
    axis = integer(op, "axis", 1) % max(1, rank)
    dtype = body.dtype(out)
    if not size:
        raise refused(op, "this form")

    def value(axes: Axes) -> Expr:
        own = [ix.floordiv(i, size) if d == axis else i for d, i in enumerate(axes)]
        x, s = (
            decode(body.read(source, axes), body.type(source).dtype),
            decode(body.read(scale, own), body.type(scale).dtype),
        )
        z = decode(body.read(zero, own), body.type(zero).dtype) if zero else None
        if op.op_type == "DequantizeLinear":
            return cast(dequantize(x, cast(s, work_dtype(s.dtype)), z), dtype)
        work = "float64" if "float64" in (x.dtype, s.dtype) else "float32"
        return quantize(cast(x, work), cast(s, work), z, body.type(out).dtype)

    body.map(out, value)


RULES: Mapping[str, Callable[[Body, Op], None]] = {
    "DequantizeLinear": _blocked_quantization,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "MatMulInteger": _matmul_integer,
    "QLinearMatMul": _qlinear_matmul,
    "QuantizeLinear": _blocked_quantization,
}
