"""Element types of 8 bits and fewer: how they are stored, and their conversion from and to float32 and int32.

Formats as in ONNX's operator Cast: OCP's 8-bit floats (arXiv:2209.05433), their fnuz variants (arXiv:2206.02915), and
the microscaling formats. A 4- or 2-bit value takes a byte of its own in memory, in the low bits, as in ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nestc.tensor.ir import Binary, Bitcast, Cast, Const, Expr, Select, Unary
from nestc.tensor.rewrite import cast


@dataclass(frozen=True)
class SmallFloat:
    """Bits of exponent and mantissa, the bias, the code of the largest finite value, and the codes of NaN and infinity.

    ``nan < 0``: there is no NaN; ``infinity < 0``: no infinity. ``zero_sign``: whether -0 exists.
    """

    exponent: int
    mantissa: int
    bias: int
    largest: int
    nan: int
    infinity: int = -1
    zero_sign: bool = True


FLOATS: Mapping[str, SmallFloat] = {
    "float8e4m3fn": SmallFloat(4, 3, 7, 0x7E, 0x7F),
    "float8e4m3fnuz": SmallFloat(4, 3, 8, 0x7F, 0x80, zero_sign=False),
    "float8e5m2": SmallFloat(5, 2, 15, 0x7B, 0x7E, infinity=0x7C),
    "float8e5m2fnuz": SmallFloat(5, 2, 16, 0x7F, 0x80, zero_sign=False),
    "float4e2m1": SmallFloat(2, 1, 1, 0x7, -1),
}
SCALE = "float8e8m0"
"""A power of two without sign: code c is 2 ** (c - 127), 255 is NaN."""

INTEGERS: Mapping[str, int] = {"int4": 4, "uint4": 4, "int2": 2, "uint2": 2}
"""Bits of the narrow integers."""

SMALL = frozenset(FLOATS) | frozenset(INTEGERS) | {SCALE}


def storage(dtype: str) -> str:
    """The dtype that kernels see in memory."""
    return "uint8" if dtype in SMALL else dtype


def _i(value: int) -> Const:
    return Const(value, "int32")


def _f(value: float) -> Const:
    return Const(float(value), "float32")


def decode(x: Expr, dtype: str) -> Expr:
    """The value of a stored code: float32 for floats, int32 for integers. Other dtypes are passed on as they are."""
    if dtype in INTEGERS:
        wide = cast(x, "int32")
        spare = 32 - INTEGERS[dtype]
        left = Binary("shl", wide, _i(spare))
        if dtype.startswith("int"):
            return Binary("shr", left, _i(spare))
        return Binary("and", wide, _i((1 << INTEGERS[dtype]) - 1))
    if dtype == SCALE:
        code = cast(x, "int32")
        # 2 ** -127 is not a normal float32: half of the smallest one.
        normal = Bitcast(Binary("shl", code, _i(23)), "float32")
        value = Select(Binary("eq", code, _i(0)), _f(2.0**-127), normal)
        return Select(Binary("eq", code, _i(255)), _f(float("nan")), value)
    if dtype not in FLOATS:
        return x
    kind = FLOATS[dtype]
    code = cast(x, "int32")
    bits = kind.exponent + kind.mantissa
    magnitude = Binary("and", code, _i((1 << bits) - 1))
    rebased = Binary("add", Binary("shl", magnitude, _i(23 - kind.mantissa)), _i((127 - kind.bias) << 23))
    tiny = Binary("mul", Cast(magnitude, "float32"), _f(2.0 ** (1 - kind.bias - kind.mantissa)))
    value = Select(Binary("lt", magnitude, _i(1 << kind.mantissa)), tiny, Bitcast(rebased, "float32"))
    if kind.infinity >= 0:
        value = Select(Binary("eq", magnitude, _i(kind.infinity)), _f(float("inf")), value)
    negative = Binary("ne", Binary("and", code, _i(1 << bits)), _i(0))
    value = Select(negative, Unary("neg", value), value)
    if kind.nan >= 0:
        if kind.zero_sign:
            is_nan = Binary("gt", magnitude, _i(max(kind.largest, kind.infinity)))
        else:
            is_nan = Binary("eq", code, _i(kind.nan))
        value = Select(is_nan, _f(float("nan")), value)
    return value


def encode(x: Expr, dtype: str, saturate: bool = True, mode: str = "up") -> Expr:
    """The stored code of a float32 or an integer value, as Cast makes it; `mode` is its ``round_mode``."""
    if dtype in INTEGERS:
        wide = cast(x, "int32")
        return Cast(Binary("and", wide, _i((1 << INTEGERS[dtype]) - 1)), "uint8")
    x = cast(x, "float32")
    if dtype == SCALE:
        return _encode_scale(x, saturate, mode)
    kind = FLOATS[dtype]
    bits = kind.exponent + kind.mantissa
    shift = 23 - kind.mantissa
    raw = Bitcast(x, "int32")
    size = Binary("and", raw, _i(0x7FFFFFFF))
    # Round to nearest even in integers; the exponent takes the carry.
    odd = Binary("and", Binary("shr", size, _i(shift)), _i(1))
    rounded = Binary("shr", Binary("add", size, Binary("add", odd, _i((1 << (shift - 1)) - 1))), _i(shift))
    normal = Binary("sub", rounded, _i((127 - kind.bias) << kind.mantissa))
    smallest = 2.0 ** (1 - kind.bias)
    absolute = Bitcast(size, "float32")
    below = Binary("lt", absolute, _f(smallest))
    safe = Select(below, absolute, _f(0.0))
    tiny = Cast(Unary("rint", Binary("mul", safe, _f(2.0 ** (kind.bias - 1 + kind.mantissa)))), "int32")
    code: Expr = Select(below, tiny, normal)
    if kind.nan < 0 or saturate:
        over = kind.largest
    else:
        over = kind.infinity if kind.infinity >= 0 else kind.nan
    code = Select(Binary("gt", code, _i(kind.largest)), _i(over), code)
    sign = Binary("and", Binary("shr", raw, _i(31 - bits)), _i(1 << bits))
    if not kind.zero_sign:
        sign = Select(Binary("eq", code, _i(0)), _i(0), sign)
    code = Binary("or", code, sign)
    nan = Unary("isnan", x)
    if kind.nan < 0:
        code = Select(nan, _i(1 << bits), code)
    else:
        code = Select(nan, _i(kind.nan) if not kind.zero_sign else Binary("or", _i(kind.nan), sign), code)
    return Cast(Binary("and", code, _i((1 << (bits + 1)) - 1)), "uint8")


def _encode_scale(x: Expr, saturate: bool, mode: str) -> Expr:
    """The exponent of a positive number, rounded up, down, or to the nearest power of two."""
    raw = Binary("and", Bitcast(x, "int32"), _i(0x7FFFFFFF))
    exponent, fraction = Binary("shr", raw, _i(23)), Binary("and", raw, _i(0x7FFFFF))
    if mode == "up":
        more = Binary("gt", fraction, _i(0))
    elif mode == "nearest":
        more = Binary("ge", fraction, _i(0x400000))
    else:
        more = Const(False, "bool")
    # Below 2 ** -126 the exponent field is 0 and stands for 2 ** -127 already.
    code: Expr = Select(Binary("and", more, Binary("gt", exponent, _i(0))), Binary("add", exponent, _i(1)), exponent)
    top = Binary("gt", code, _i(254))
    code = Select(top, _i(254 if saturate else 255), code)
    if not saturate:
        code = Select(Binary("eq", raw, _i(0)), _i(255), code)
    return Cast(Select(Unary("isnan", x), _i(255), code), "uint8")
