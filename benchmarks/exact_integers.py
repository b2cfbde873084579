"""What a graph of QuantizeLinear and DequantizeLinear with power-of-two scales computes, in exact arithmetic.

An independent reference for integer devices: it reads nothing but the ONNX file and shares no code with a target.
Every value between two roundings is a rational number ``integers * 2**exponents / divisor``; QuantizeLinear is the only
place that rounds, halves upwards (ONNX rounds halves to even), and saturates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Integers = NDArray[np.int64]

EXACT = 2**53
"""Integers up to here are exact in float64, in which products are summed since numpy is fast there."""


@dataclass(frozen=True)
class Number:
    """``integers * 2**exponents / divisor``; the exponents broadcast against the integers."""

    integers: Integers
    exponents: Integers
    divisor: int = 1


class ExactGraph:
    """Evaluates values of a quantized model by name, from values that are given."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes = {name: node for node in model.graph.node for name in node.output}
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def run(self, wanted: Iterable[str], given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The integer values called `wanted`, from the integer values `given`, at which evaluation stops.

        Raises ValueError for an operator that this reference does not know, and for arithmetic that leaves int64.
        """
        known: dict[str, np.ndarray | Number] = dict(given)
        for name in wanted:
            self._evaluate(name, known)
        return {name: np.asarray(known[name]) for name in wanted}

    def _evaluate(self, wanted: str, known: dict[str, np.ndarray | Number]) -> None:
        pending = [wanted]  # not by recursion: graphs are deep
        while pending:
            name = pending[-1]
            if not name or name in known:
                pending.pop()
                continue
            if name in self._constants:
                known[name] = numpy_helper.to_array(self._constants[name])
                continue
            node = self._nodes.get(name)
            if node is None:
                raise ValueError(f"value {name!r} is neither computed nor given")
            missing = [each for each in node.input if each and each not in known]
            if missing:
                pending += missing
                continue
            known.update(zip(node.output, _compute(node, [known.get(each) for each in node.input]), strict=False))


Value = np.ndarray | Number
Operand = Value | None


def _compute(node: onnx.NodeProto, operands: Sequence[Operand]) -> list[Value]:
    attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    if node.op_type not in _OPERATORS:
        raise ValueError(f"{node.op_type} (node {node.name!r}) has no exact reference")
    result = _OPERATORS[node.op_type](attributes, *operands)
    if isinstance(result, list):
        return result
    assert result is not None
    return [result]


def dequantize(attributes: Mapping[str, object], x: Operand, scale: Operand, zero: Operand = None) -> Number:
    """(x - zero) * scale, for scales that are powers of two."""
    assert isinstance(x, np.ndarray) and isinstance(scale, np.ndarray)
    mantissa, exponent = np.frexp(scale.astype(np.float64))
    if np.any(mantissa != 0.5):
        raise ValueError("a scale is no power of two")
    exponents = _along(exponent.astype(np.int64) - 1, x.ndim, int(str(attributes.get("axis", 1))))
    integers = x.astype(np.int64)
    if zero is not None:
        assert isinstance(zero, np.ndarray)
        integers = integers - _along(zero.astype(np.int64), x.ndim, int(str(attributes.get("axis", 1))))
    return Number(integers, exponents)


def quantize(attributes: Mapping[str, object], x: Operand, scale: Operand, zero: Operand = None) -> np.ndarray:
    """saturate(floor(x / scale + 1 / 2) + zero)."""
    x = _number(x)
    unit = dequantize(attributes, np.ones((), np.int8), scale)
    point = np.zeros((), np.uint8) if zero is None else np.asarray(zero)
    limits = np.iinfo(point.dtype)
    powers = x.exponents - unit.exponents
    # floor(a / b + 1 / 2) = floor((2 a + b) / 2 b); beyond 2**60 below the unit, only the sign could matter.
    numerators = _shifted(x.integers, np.maximum(powers, 0) + 1)
    divisors = _shifted(np.asarray(x.divisor, np.int64), np.clip(-powers, 0, 60 - x.divisor.bit_length()))
    _check(numerators)
    rounded = np.floor_divide(numerators + divisors, 2 * divisors)
    return np.clip(rounded + point.astype(np.int64), limits.min, limits.max).astype(point.dtype)


def _conv(attributes: Mapping[str, object], x: Operand, weight: Operand, bias: Operand = None) -> Number:
    source, weights = _number(x), _number(weight)
    w = weights.integers
    rank = w.ndim - 2
    groups = int(str(attributes.get("group", 1)))
    if attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ValueError("auto_pad has no exact reference")
    strides, dilations, pads = (
        _ints(attributes, name, (default,) * (count * rank))
        for name, default, count in (("strides", 1, 1), ("dilations", 1, 1), ("pads", 0, 2))
    )
    padded = np.pad(source.integers, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    reach = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilations, strict=True)]
    out = [(n - r) // s + 1 for n, r, s in zip(padded.shape[2:], reach, strides, strict=True)]
    batch, channels = padded.shape[:2]
    places = math.prod(out)
    largest = np.abs(w).reshape(w.shape[0], -1).sum(1).max() * np.abs(padded).max(initial=0)
    if largest >= EXACT:
        raise ValueError("sums of a convolution leave what float64 holds exactly")
    total = np.zeros((batch, groups, w.shape[0] // groups, places))
    wide = w.reshape(groups, w.shape[0] // groups, w.shape[1], *w.shape[2:]).astype(np.float64)
    for tap in np.ndindex(*w.shape[2:]):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilations, out, strides, strict=True)
        )
        part = padded[(slice(None), slice(None), *window)].reshape(batch, groups, channels // groups, places)
        kernel = wide[(slice(None), slice(None), slice(None), *tap)]
        if kernel.shape[1:] == (1, 1):
            total += kernel * part
        else:
            total += kernel @ part.astype(np.float64)
    exponents = source.exponents + _along(weights.exponents.reshape(-1), rank + 2, 1)
    result = Number(total.astype(np.int64).reshape(batch, w.shape[0], *out), exponents, source.divisor)
    return result if bias is None else _add(attributes, result, _column(_number(bias), rank + 2))


def _gemm(attributes: Mapping[str, object], a: Operand, b: Operand, bias: Operand = None) -> Number:
    if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0 or attributes.get("transA", 0):
        raise ValueError("a Gemm with alpha, beta or transA has no exact reference")
    left, right = _number(a), _number(b)
    flipped = bool(attributes.get("transB", 0))
    weights = right.integers.T if flipped else right.integers
    exponents = np.asarray(right.exponents.T if flipped else right.exponents)
    if exponents.ndim and exponents.shape[0] != 1:
        raise ValueError("a product sums over elements of different scales")
    result = Number(_product(left.integers, weights), left.exponents + exponents, left.divisor)
    return result if bias is None else _add(attributes, result, _number(bias))


def _matmul(attributes: Mapping[str, object], a: Operand, b: Operand) -> Number:
    return _gemm({}, a, b)


def _product(left: Integers, right: Integers) -> Integers:
    if np.abs(right).sum(0).max(initial=0) * np.abs(left).max(initial=0) >= EXACT:
        raise ValueError("sums of a product leave what float64 holds exactly")
    return (left.astype(np.float64) @ right.astype(np.float64)).astype(np.int64)


def _add(attributes: Mapping[str, object], a: Operand, b: Operand) -> Number:
    left, right = _aligned(_number(a), _number(b))
    return Number(_check(left.integers + right.integers), left.exponents, left.divisor)


def _sub(attributes: Mapping[str, object], a: Operand, b: Operand) -> Number:
    number = _number(b)
    return _add(attributes, a, Number(-number.integers, number.exponents, number.divisor))


def _mul(attributes: Mapping[str, object], a: Operand, b: Operand) -> Number:
    left, right = _number(a), _number(b)
    product = left.integers.astype(np.float64) * right.integers
    if np.abs(product).max(initial=0) >= EXACT:
        raise ValueError("a product leaves what float64 holds exactly")
    return Number(product.astype(np.int64), left.exponents + right.exponents, left.divisor * right.divisor)


def _relu(attributes: Mapping[str, object], x: Operand) -> Number | np.ndarray:
    if isinstance(x, np.ndarray) and x.dtype.kind in "iu":
        return np.maximum(x, 0).astype(x.dtype)
    number = _number(x)
    return Number(np.maximum(number.integers, 0), number.exponents, number.divisor)


def _extreme(choose: Callable[[Integers, Integers], Integers]) -> Callable[..., Number]:
    def compute(attributes: Mapping[str, object], *operands: Operand) -> Number:
        result = _number(operands[0])
        for more in operands[1:]:
            left, right = _aligned(result, _number(more))
            result = Number(choose(left.integers, right.integers), left.exponents, left.divisor)
        return result

    return compute


def _clip(attributes: Mapping[str, object], x: Operand, low: Operand = None, high: Operand = None) -> Operand:
    if isinstance(x, np.ndarray) and x.dtype.kind in "iu":
        return np.clip(x, low, high).astype(x.dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    for bound, limit in ((low, np.maximum), (high, np.minimum)):
        x = x if bound is None else _extreme(limit)(attributes, x, bound)
    return x


def _max_pool(attributes: Mapping[str, object], x: Operand) -> np.ndarray | Number:
    whole = x.integers if isinstance(x, Number) else x
    assert whole is not None
    least = np.iinfo(np.int64).min
    windows = _windows(attributes, whole.astype(np.int64), least)
    largest = next(windows)[0]
    for window, _ in windows:
        largest = np.maximum(largest, window)
    return Number(largest, x.exponents, x.divisor) if isinstance(x, Number) else largest.astype(whole.dtype)


def _average_pool(attributes: Mapping[str, object], x: Operand) -> Number:
    number = _number(x)
    inside = np.ones(number.integers.shape[2:], np.int64)[None, None]
    if attributes.get("count_include_pad", 0):
        raise ValueError("an AveragePool that counts padding has no exact reference")
    total = sum(window for window, _ in _windows(attributes, number.integers, 0))
    counts = np.unique(np.asarray(sum(window for window, _ in _windows(attributes, inside, 0))))
    if counts.size != 1:
        raise ValueError("an AveragePool whose windows differ in size has no exact reference")
    return Number(np.asarray(total), number.exponents, number.divisor * int(counts[0]))


def _global_average(attributes: Mapping[str, object], x: Operand) -> Number:
    number = _number(x)
    axes = tuple(range(2, number.integers.ndim))
    count = math.prod(number.integers.shape[2:])
    return Number(number.integers.sum(axes, keepdims=True), number.exponents, number.divisor * count)


def _windows(attributes: Mapping[str, object], x: Integers, fill: int) -> Iterator[tuple[Integers, tuple[int, ...]]]:
    """The elements that each place of a pooling window meets, one tap after the other."""
    kernel = _ints(attributes, "kernel_shape", ())
    rank = len(kernel)
    strides, dilations = _ints(attributes, "strides", (1,) * rank), _ints(attributes, "dilations", (1,) * rank)
    pads = _ints(attributes, "pads", (0,) * (2 * rank))
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    spans = [n + a + b - r for n, a, b, r in zip(x.shape[2:], pads[:rank], pads[rank:], reach, strict=True)]
    rounding: Callable[[float], int] = math.ceil if attributes.get("ceil_mode", 0) else math.floor
    out = [rounding(span / s) + 1 for span, s in zip(spans, strides, strict=True)]
    # With ceil_mode no window begins in the padding behind the input.
    out = [
        count - ((count - 1) * s >= n + before)
        for count, s, n, before in zip(out, strides, x.shape[2:], pads[:rank], strict=True)
    ]
    needed = [(n - 1) * s + r for n, s, r in zip(out, strides, reach, strict=True)]
    ends = [max(0, need - n - before) for need, n, before in zip(needed, x.shape[2:], pads[:rank], strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], ends, strict=True)], constant_values=fill)
    for tap in np.ndindex(*kernel):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilations, out, strides, strict=True)
        )
        yield padded[(slice(None), slice(None), *window)], tap


def _concat(attributes: Mapping[str, object], *operands: Operand) -> Operand:
    axis = int(str(attributes["axis"]))
    if all(isinstance(each, np.ndarray) and each.dtype.kind in "iu" for each in operands):
        return np.concatenate([np.asarray(each) for each in operands], axis)
    numbers = [_number(each) for each in operands]
    if any(each.divisor != 1 for each in numbers):
        raise ValueError("a Concat of means has no exact reference")
    exponents = [np.broadcast_to(each.exponents, each.integers.shape) for each in numbers]
    return Number(np.concatenate([each.integers for each in numbers], axis), np.concatenate(exponents, axis))


def _moved(move: Callable[..., np.ndarray]) -> Callable[..., Operand]:
    """An operator that only moves elements, for integers and for numbers."""

    def compute(attributes: Mapping[str, object], x: Operand, *operands: Operand) -> Operand:
        if not isinstance(x, Number):
            return move(attributes, x, *operands)
        exponents = np.broadcast_to(x.exponents, x.integers.shape)
        return Number(move(attributes, x.integers, *operands), move(attributes, exponents, *operands), x.divisor)

    return compute


def _flatten(attributes: Mapping[str, object], x: np.ndarray) -> np.ndarray:
    axis = int(str(attributes.get("axis", 1)))
    return x.reshape(math.prod(x.shape[:axis]), -1)


def _reshape(attributes: Mapping[str, object], x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return x.reshape([x.shape[i] if size == 0 else int(size) for i, size in enumerate(shape)])


def _transpose(attributes: Mapping[str, object], x: np.ndarray) -> np.ndarray:
    return x.transpose(_ints(attributes, "perm", tuple(reversed(range(x.ndim)))))


def _squeeze(attributes: Mapping[str, object], x: np.ndarray, axes: np.ndarray | None = None) -> np.ndarray:
    return np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes))


def _unsqueeze(attributes: Mapping[str, object], x: np.ndarray, axes: np.ndarray) -> np.ndarray:
    return np.expand_dims(x, tuple(int(axis) for axis in axes))


def _split(attributes: Mapping[str, object], x: Operand, sizes: Operand = None) -> list[Value]:
    axis = int(str(attributes.get("axis", 0)))
    assert isinstance(sizes, np.ndarray)
    places = np.cumsum(sizes)[:-1]
    if isinstance(x, np.ndarray):
        return list(np.split(x, places, axis))
    number = _number(x)
    exponents = np.split(np.broadcast_to(number.exponents, number.integers.shape), places, axis)
    parts = np.split(number.integers, places, axis)
    return [Number(part, exponent, number.divisor) for part, exponent in zip(parts, exponents, strict=True)]


def _pad(attributes: Mapping[str, object], x: np.ndarray, pads: np.ndarray, value: Operand = None) -> np.ndarray:
    if value is not None and np.any(np.asarray(value)):
        raise ValueError("padding with other numbers than 0 has no exact reference")
    half = len(pads) // 2
    return np.pad(x, list(zip(map(int, pads[:half]), map(int, pads[half:]), strict=True)))


def _slice(attributes: Mapping[str, object], x: np.ndarray, *bounds: np.ndarray) -> np.ndarray:
    starts, ends = bounds[:2]
    axes = bounds[2] if len(bounds) > 2 else np.arange(len(starts))
    steps = bounds[3] if len(bounds) > 3 else np.ones(len(starts), np.int64)
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(index)]


_OPERATORS: Mapping[str, Callable[..., Operand | list[Value]]] = {
    "Add": _add,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "DequantizeLinear": dequantize,
    "Flatten": _moved(_flatten),
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "Identity": _moved(lambda attributes, x: x),
    "MatMul": _matmul,
    "Max": _extreme(np.maximum),
    "MaxPool": _max_pool,
    "Min": _extreme(np.minimum),
    "Mul": _mul,
    "Pad": _moved(_pad),
    "QuantizeLinear": quantize,
    "Relu": _relu,
    "Reshape": _moved(_reshape),
    "Slice": _moved(_slice),
    "Split": _split,
    "Squeeze": _moved(_squeeze),
    "Sub": _sub,
    "Transpose": _moved(_transpose),
    "Unsqueeze": _moved(_unsqueeze),
}


def _number(value: Operand) -> Number:
    """An operand as a number; float constants are taken as what they are, exactly."""
    if isinstance(value, Number):
        return value
    if value is None or value.dtype.kind != "f":
        raise ValueError("a real number is expected where integers stand")
    if not np.isfinite(value).all():
        # An open bound: far beyond everything that integers of 8 bits stand for.
        value = np.clip(value, -(2.0**30), 2.0**30)
    mantissa, exponent = np.frexp(value.astype(np.float64))
    whole, unit = np.ldexp(mantissa, 24).astype(np.int64), exponent.astype(np.int64) - 24  # 24 bits: float32
    if np.any(np.ldexp(whole.astype(np.float64), unit) != value):
        raise ValueError("a constant has more than the 24 bits of float32")
    # As few bits as it takes, so that aligning leaves room.
    while np.any(even := (whole % 2 == 0) & (whole != 0)):
        whole, unit = np.where(even, whole // 2, whole), np.where(even, unit + 1, unit)
    return Number(whole, np.where(whole == 0, 0, unit))


def _aligned(left: Number, right: Number) -> tuple[Number, Number]:
    """Both in the same units."""
    a, b = (
        _check(each.integers * (other.divisor // math.gcd(left.divisor, right.divisor)))
        for each, other in ((left, right), (right, left))
    )
    divisor = math.lcm(left.divisor, right.divisor)
    e, f = np.broadcast_arrays(left.exponents, right.exponents)
    # A zero has no unit of its own.
    exponents = np.minimum(e, f)
    return (
        Number(_shifted(a, left.exponents - exponents), exponents, divisor),
        Number(_shifted(b, right.exponents - exponents), exponents, divisor),
    )


def _shifted(integers: Integers, powers: Integers) -> Integers:
    """``integers * 2**powers`` for powers of 0 and more. Raises ValueError where that leaves 61 bits."""
    integers, powers = np.broadcast_arrays(integers, powers)
    powers = np.where(integers == 0, 0, powers)
    if np.any(np.log2(np.maximum(np.abs(integers), 1).astype(np.float64)) + powers > 61):
        raise ValueError("exact arithmetic would need more than 64 bits")
    return np.left_shift(integers, powers)


def _check(integers: Integers) -> Integers:
    if np.any(np.abs(integers) > 2**61):
        raise ValueError("exact arithmetic would need more than 64 bits")
    return integers


def _along(values: np.ndarray, rank: int, axis: int) -> np.ndarray:
    """One number a slice along an axis, or one for all, so that it broadcasts."""
    if values.ndim == 0 or values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _column(bias: Number, rank: int) -> Number:
    shape = (-1,) + (1,) * (rank - 2)
    exponents = bias.exponents.reshape(shape) if bias.exponents.ndim else bias.exponents
    return Number(bias.integers.reshape(shape), exponents, bias.divisor)


def _ints(attributes: Mapping[str, object], name: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = attributes.get(name)
    return default if found is None else tuple(int(each) for each in found)  # pyright: ignore[reportGeneralTypeIssues, reportUnknownVariableType, reportUnknownArgumentType]
