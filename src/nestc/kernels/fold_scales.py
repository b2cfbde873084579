"""Arithmetic between 8-bit integers with the scales folded together: x * a + y * b + c, rounded once to an integer.

DequantizeLinear, additions, constant factors, Relu and Clip, then QuantizeLinear are a piecewise linear function of the
integers. Its coefficients are multiplied out in float64 and rounded once to float32, so a result may differ from
the literal definition where that lies within a few units of the last place of a tie; exact ties of powers of two agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import numpy as np

from nestc.kernels.elementwise import integer_range
from nestc.tensor.ir import Binary, Cast, Const, Expr, Fma, Load, Unary
from nestc.tensor.rewrite import rebuild

_BYTES = ("int8", "uint8")
_SAFE = float(1 << 30)
"""Values up to here may be rounded to int32 and moved by a zero point."""


def folded(e: Expr, exact: bool = False) -> Expr:
    """`e` (scalar lanes) as a folded quantization to 8 bits; anything else is left as it is.

    With `exact` the quotient is what the definition says, and only how it becomes a byte changes.
    """
    found = _quantization(e, exact)
    return e if found is None else found


def _quantization(e: Expr, exact: bool) -> Expr | None:
    """The pattern of `elementwise.quantize` with constant scale and zero point, folded."""
    if not isinstance(e, Cast) or e.dtype not in _BYTES or e.x.dtype != "float32":
        return None
    low, high = integer_range(e.dtype)
    y: Expr | None = _operand(e.x, "min", high)
    y = None if y is None else _operand(y, "max", low)
    if y is None:
        return None
    zero = 0
    if isinstance(y, Binary) and y.op == "add":
        point = _number(y.b)
        if point is None:
            return None
        y, zero = y.a, int(point)
    if not (isinstance(y, Unary) and y.op == "rint" and isinstance(y.x, Binary) and y.x.op == "div"):
        return None
    scale = _number(y.x.b)
    if scale is None or not scale > 0:
        return None
    if exact:
        value, least, most = _quotient(y.x, scale), low - zero, high - zero
    else:
        value, least, most = _unclamped(scaled(y.x.a, 1.0 / scale), low - zero, high - zero)
    lowest, highest = interval(value)
    if lowest < -_SAFE:  # NaN as well becomes the lowest
        value = Binary("max", value, Const(-_SAFE, "float32"))
    if highest > _SAFE:
        value = Binary("min", value, Const(_SAFE, "float32"))
    whole = isinstance(value, Cast) and value.x.dtype == "int32"  # equal scales: nothing to round
    rounded: Expr = value.x if isinstance(value, Cast) and whole else Cast(Unary("rint", value), "int32")
    if zero:
        rounded = Binary("add", rounded, Const(zero, "int32"))
    # Machines narrow with saturation to the whole range, and clamp many bytes at once.
    result: Expr = Cast(Binary("min", Binary("max", rounded, Const(low, "int32")), Const(high, "int32")), e.dtype)
    if least + zero > low:
        result = Binary("max", result, Const(least + zero, e.dtype))
    if most + zero < high:
        result = Binary("min", result, Const(most + zero, e.dtype))
    return result


def _quotient(e: Binary, scale: float) -> Expr:
    """A division by a constant; by a power of two it is a multiplication."""
    exact = np.frexp(scale)[0] == 0.5 and 2.0**-100 < scale < 2.0**100
    return Binary("mul", e.a, Const(1.0 / scale, "float32")) if exact else e


def _unclamped(value: Expr, low: int, high: int) -> tuple[Expr, int, int]:
    """A value without the clamps around it, and [low, high] narrowed to what they leave of it after rounding.

    Rounding is monotone, so a clamp before it is a clamp to the rounded bound after it.
    """
    while isinstance(value, Binary) and value.op in ("max", "min"):
        bound = _number(value.a)
        if bound is None or bound != bound:
            break
        limit = int(np.rint(np.float32(min(max(bound, low), high))))
        low, high = (limit, high) if value.op == "max" else (low, limit)
        value = value.b
    return value, low, high


def _operand(e: Expr, op: str, bound: int) -> Expr | None:
    """x of ``op(x, bound)``."""
    if isinstance(e, Binary) and e.op == op and _number(e.b) == bound:
        return e.a
    return None


def _number(e: Expr) -> float | None:
    """The value of a constant, also of one that is converted."""
    if isinstance(e, Cast):
        return _number(e.x)
    return float(e.value) if isinstance(e, Const) else None


@dataclass
class _Sum:
    """``offset + sum of terms[x] * x``."""

    offset: float = 0.0
    terms: dict[Expr, float] = field(default_factory=dict)

    def add(self, x: Expr, factor: float) -> None:
        """One more term."""
        self.terms[x] = self.terms.get(x, 0.0) + factor


def scaled(e: Expr, factor: float) -> Expr:
    """``e * factor`` for a float32 expression and a positive factor, as few operations as it takes."""
    total = _Sum()
    _collect(e, factor, total)
    terms = [(x, k) for x, k in total.terms.items() if k]
    value: Expr = Const(total.offset, "float32")
    for i, (x, k) in enumerate(terms):
        if k == 1.0:
            value = x if i == 0 and not total.offset else Binary("add", x, value)
        elif i == 0 and not total.offset:
            value = Binary("mul", x, Const(k, "float32"))
        else:
            value = Fma(x, Const(k, "float32"), value)
    return value


def _collect(e: Expr, factor: float, total: _Sum) -> None:
    """Add ``e * factor`` to a sum."""
    number = _number(e)
    if number is not None:
        total.offset += number * factor
        return
    if isinstance(e, Binary) and e.op in ("add", "sub"):
        _collect(e.a, factor, total)
        _collect(e.b, factor if e.op == "add" else -factor, total)
        return
    if isinstance(e, Binary) and e.op in ("mul", "div"):
        a, b = _number(e.a), _number(e.b)
        if b is not None and (e.op == "mul" or b):
            _collect(e.a, factor * b if e.op == "mul" else factor / b, total)
            return
        if a is not None and e.op == "mul":
            _collect(e.b, factor * a, total)
            return
    if isinstance(e, Unary) and e.op == "neg":
        _collect(e.x, -factor, total)
        return
    if isinstance(e, Binary) and e.op in ("max", "min") and factor > 0:
        a, b = _number(e.a), _number(e.b)
        bound, x = (a, e.b) if a is not None else (b, e.a)
        if bound is not None:
            inner = scaled(x, factor)
            total.add(Binary(e.op, Const(bound * factor, "float32"), inner), 1.0)
            return
    if isinstance(e, Cast) and e.dtype == "float32" and e.x.dtype == "int32":
        _collect_integer(e.x, factor, total)
        return
    total.add(_inside(e), factor)


def _collect_integer(e: Expr, factor: float, total: _Sum) -> None:
    """Add ``float32(e) * factor`` for an int32 expression: the zero point of a DequantizeLinear joins the offset."""
    if isinstance(e, Binary) and e.op == "sub":
        zero = _number(e.b)
        if zero is not None and isinstance(e.a, Cast) and e.a.x.dtype in _BYTES:
            total.offset -= zero * factor
            total.add(Cast(e.a, "float32"), factor)
            return
    total.add(Cast(e, "float32"), factor)


def _inside(e: Expr) -> Expr:
    """A node that is no sum, with the sums below it multiplied out."""
    if isinstance(e, (Load, Const)) or e.dtype != "float32" or isinstance(e, Cast):
        return e
    return rebuild(e, tuple(scaled(x, 1.0) if x.dtype == "float32" else x for x in e.children()))


def interval(e: Expr) -> tuple[float, float]:
    """Bounds of a float32 value made by `scaled`; infinite where nothing is known."""
    number = _number(e)
    if number is not None:
        return number, number
    if isinstance(e, Cast) and isinstance(e.x, Cast) and e.x.x.dtype in _BYTES:
        low, high = integer_range(e.x.x.dtype)
        return float(low), float(high)
    if isinstance(e, Fma):
        return _sum(_product(interval(e.a), interval(e.b)), interval(e.c))
    if isinstance(e, Binary):
        a, b = interval(e.a), interval(e.b)
        if e.op == "add":
            return _sum(a, b)
        if e.op == "mul":
            return _product(a, b)
        if e.op in ("min", "max"):
            pick = min if e.op == "min" else max
            return pick(a[0], b[0]), pick(a[1], b[1])
    return -inf, inf


def _sum(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    return a[0] + b[0], a[1] + b[1]


def _product(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    if inf in (abs(x) for x in (*a, *b)):
        return -inf, inf
    products = [x * y for x in a for y in b]
    return min(products), max(products)
