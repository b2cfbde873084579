"""Index arithmetic: sums of terms kept in linear form, floordiv and mod simplified by intervals when built."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod

from nestc.tensor.ir import Binary, Bitcast, Buffer, Cast, Const, Expr, Fma, Load, Ramp, Select, Unary, Var

# (constant, {atom: coefficient}): an atom is anything that is not a sum or a product with a constant.
Linear = tuple[int, dict[Expr, int]]

_LIMITS = {
    "bool": (0, 1),
    "int8": (-(1 << 7), (1 << 7) - 1),
    "uint8": (0, (1 << 8) - 1),
    "int16": (-(1 << 15), (1 << 15) - 1),
    "uint16": (0, (1 << 16) - 1),
    "int32": (-(1 << 31), (1 << 31) - 1),
    "uint32": (0, (1 << 32) - 1),
}
_WIDE = (-(1 << 63), (1 << 63) - 1)


def const(value: int) -> Const:
    """An index constant."""
    return _CONSTANTS.get(value) or Const(int(value), "int64")


_CONSTANTS = {value: Const(value, "int64") for value in range(-256, 4097)}
"""The ones that occur again and again."""


def linear(e: Expr) -> Linear:
    """`e` as a constant plus a sum of coefficient times atom. The result is shared: do not change it."""
    if isinstance(e, Const):
        return int(e.value), {}
    cached: Linear | None = e.__dict__.get("_linear")
    if cached is not None:
        return cached
    result = e.__dict__["_linear"] = _linear(e)
    return result


def _linear(e: Expr) -> Linear:
    if isinstance(e, Binary) and e.op in ("add", "sub") and e.lanes == 1:
        (c, terms), (d, more) = linear(e.a), linear(e.b)
        sign = 1 if e.op == "add" else -1
        return _merged(c + sign * d, terms, more, sign)
    if isinstance(e, Binary) and e.op == "mul" and e.lanes == 1:
        for x, k in ((e.a, e.b), (e.b, e.a)):
            if isinstance(k, Const):
                c, terms = linear(x)
                factor = int(k.value)
                return c * factor, {t: v * factor for t, v in terms.items()} if factor else {}
    return 0, {e: 1}


def _merged(c: int, terms: Mapping[Expr, int], more: Mapping[Expr, int], factor: int) -> Linear:
    result = dict(terms)
    for term, coefficient in more.items():
        value = result.get(term, 0) + factor * coefficient
        if value:
            result[term] = value
        else:
            result.pop(term, None)
    return _rejoin(c, result)


def _rejoin(constant: int, terms: dict[Expr, int]) -> Linear:
    """k * (x // k) + x % k becomes x (and so for multiples of both)."""
    for mod_term in [term for term in terms if isinstance(term, Binary) and term.op == "mod"]:
        coefficient = terms.get(mod_term)
        if coefficient is None or not isinstance(mod_term.b, Const):
            continue
        k = int(mod_term.b.value)
        quotient = _quotient(mod_term, k)
        if terms.get(quotient) != coefficient * k:
            continue
        del terms[mod_term], terms[quotient]
        c, inner = linear(mod_term.a)
        constant += c * coefficient
        for term, value in inner.items():
            total = terms.get(term, 0) + value * coefficient
            if total:
                terms[term] = total
            else:
                terms.pop(term, None)
    return constant, terms


def _quotient(mod_term: Binary, k: int) -> Expr:
    """x // k for x % k."""
    known: Expr | None = mod_term.__dict__.get("_quotient")
    if known is None:
        known = mod_term.__dict__["_quotient"] = floordiv(mod_term.a, k)
    return known


def build(c: int, terms: Mapping[Expr, int]) -> Expr:
    """The expression of a linear form."""
    result: Expr | None = None
    for term, coefficient in terms.items():
        part = term if coefficient == 1 else Binary("mul", term, const(coefficient))
        result = part if result is None else Binary("add", result, part)
    if result is None:
        return const(c)
    if c:
        result = Binary("add", result, const(c))
    if "_linear" not in result.__dict__:
        result.__dict__["_linear"] = c, dict(terms)
    return result


def add(*values: Expr | int) -> Expr:
    """Sum of index expressions."""
    c, terms = 0, {}
    for value in values:
        if isinstance(value, int):
            c += value
            continue
        d, more = linear(value)
        c, terms = _merged(c + d, terms, more, 1)
    return build(c, terms)


def sub(a: Expr | int, b: Expr | int) -> Expr:
    """Difference of index expressions."""
    return add(a, mul(b, -1))


def mul(a: Expr | int, factor: int) -> Expr:
    """An index expression times a constant."""
    if isinstance(a, int):
        return const(a * factor)
    if factor == 0:
        return const(0)
    c, terms = linear(a)
    return build(c * factor, {t: v * factor for t, v in terms.items()})


def floordiv(a: Expr | int, k: int) -> Expr:
    """a // k, rounded towards minus infinity, k > 0."""
    if isinstance(a, int):
        return const(a // k)
    if k == 1:
        return a
    c, terms = linear(a)
    quotient, rest = _split(terms, k)
    q, r = divmod(c, k)
    if not rest:
        return build(q, quotient)
    remainder = build(r, rest)
    low, high = bounds(remainder)
    if low // k == high // k:
        return build(q + low // k, quotient)
    if isinstance(remainder, Binary) and remainder.op == "floordiv" and isinstance(remainder.b, Const):
        inner = floordiv(remainder.a, int(remainder.b.value) * k)
    else:
        inner = Binary("floordiv", remainder, const(k))
    d, more = linear(inner)
    return build(*_merged(q + d, quotient, more, 1))


def _split(terms: Mapping[Expr, int], k: int) -> tuple[dict[Expr, int], dict[Expr, int]]:
    """Terms as k * quotient + rest, coefficients of the rest below k in size; the same for floordiv and mod, so that
    `_rejoin` recognises the two halves."""
    quotient = {t: int(v / k) for t, v in terms.items()}
    rest = {t: v - k * quotient[t] for t, v in terms.items()}
    return {t: q for t, q in quotient.items() if q}, {t: r for t, r in rest.items() if r}


def mod(a: Expr | int, k: int) -> Expr:
    """a % k with the sign of k, k > 0."""
    if isinstance(a, int):
        return const(a % k)
    if k == 1:
        return const(0)
    c, terms = linear(a)
    _, rest = _split(terms, k)
    remainder = build(c % k, rest)
    low, high = bounds(remainder)
    if low // k == high // k:
        return add(remainder, -(low // k) * k)
    return Binary("mod", remainder, const(k))


def flatten(index: tuple[Expr, ...], shape: tuple[int, ...]) -> Expr:
    """Row-major position of `index` in an array of `shape`."""
    return build(*position(index, shape))


def position(index: tuple[Expr, ...], shape: tuple[int, ...]) -> Linear:
    """The same in linear form. Do not change it."""
    c, terms = 0, {}
    for i, stride in zip(index, _strides(shape)):
        d, more = linear(i)
        c += d * stride
        if more and stride:
            c, terms = _merged(c, terms, more, stride)
    return c, terms


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one index of each dimension to the next."""
    return tuple(prod(shape[d + 1 :]) for d in range(len(shape)))


def unflatten(position: Expr, shape: tuple[int, ...]) -> tuple[Expr, ...]:
    """Row-major index in `shape` of a position."""
    result: list[Expr] = []
    for d, extent in enumerate(shape):
        inner = max(1, prod(shape[d + 1 :]))
        part = floordiv(position, inner)
        result.append(part if d == 0 else mod(part, max(1, extent)))
    return tuple(result)


def bounds(e: Expr) -> tuple[int, int]:
    """Smallest and largest value that the int64 (or bool) expression `e` can take, by interval arithmetic."""
    if isinstance(e, Const):
        return int(e.value), int(e.value)
    cached: tuple[int, int] | None = e.__dict__.get("_bounds")
    if cached is None:
        cached = e.__dict__["_bounds"] = _bounds(e)
    return cached


def _bounds(e: Expr) -> tuple[int, int]:
    if isinstance(e, Var):
        return 0, max(0, e.extent - 1)
    if isinstance(e, Ramp):
        low, high = bounds(e.base)
        last = (e.lanes - 1) * e.stride
        return low + min(0, last), high + max(0, last)
    if isinstance(e, Binary):
        return _binary_bounds(e)
    if isinstance(e, Select):
        (a, b), (c, d) = bounds(e.a), bounds(e.b)
        return min(a, c), max(b, d)
    if isinstance(e, Cast) and e.dtype == "int64" and e.x.dtype in _LIMITS:
        return bounds(e.x)
    if isinstance(e, (Bitcast, Load, Unary, Fma, Cast)):
        return _LIMITS.get(e.dtype, _WIDE)
    children = e.children()
    return bounds(children[0]) if len(children) == 1 else _WIDE


def _binary_bounds(e: Binary) -> tuple[int, int]:
    (a, b), (c, d) = bounds(e.a), bounds(e.b)
    if e.op == "add":
        return a + c, b + d
    if e.op == "sub":
        return a - d, b - c
    if e.op == "mul":
        products = (a * c, a * d, b * c, b * d)
        return min(products), max(products)
    if e.op == "floordiv" and c == d and c > 0:
        return a // c, b // c
    if e.op == "mod" and c == d and c > 0:
        return (a % c, b % c) if a // c == b // c else (0, c - 1)
    if e.op == "min":
        return min(a, c), min(b, d)
    if e.op == "max":
        return max(a, c), max(b, d)
    return _LIMITS.get(e.dtype, _WIDE)


def coefficient(e: Expr, var: Var) -> int | None:
    """How much `e` grows when `var` grows by one; None if that is not a constant."""
    if e == var:
        return 1
    if not depends(e, var):
        return 0
    total = 0
    for term, value in linear(e)[1].items():
        if term == var:
            total += value
        elif depends(term, var):
            return None
    return total


def depends(e: Expr, var: Var) -> bool:
    """Whether `var` occurs in `e`."""
    return var in variables(e)


def variables(e: Expr) -> frozenset[Var]:
    """All loop variables that occur in `e`."""
    cached: frozenset[Var] | None = e.__dict__.get("_variables")
    if cached is None:
        cached = frozenset({e}) if isinstance(e, Var) else frozenset().union(*[variables(c) for c in e.children()])
        e.__dict__["_variables"] = cached
    return cached


def in_bounds(index: tuple[Expr, ...], buffer: Buffer, lanes: int = 1) -> str | None:
    """None if every index stays inside the buffer, else a sentence; `lanes` extend along the last dimension."""
    for d, (i, extent) in enumerate(zip(index, buffer.shape)):
        low, high = bounds(i)
        if d == len(buffer.shape) - 1 and i.lanes == 1:
            high += lanes - 1
        if low < 0 or high >= extent:
            return f"index {d} of {buffer.name} runs over [{low}, {high}], outside its extent {extent}"
    return None
