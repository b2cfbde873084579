"""Elementwise operators as scalar expressions: out[i] = f(a[i], b[i], ...), with ONNX's semantics to the letter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from math import sqrt

from nestc.errors import UnsupportedOp
from nestc.graph.region import Op, Region
from nestc.kernels.small import INTEGERS as NARROW
from nestc.kernels.small import SMALL, decode, encode, storage
from nestc.tensor import index as ix
from nestc.tensor import math
from nestc.tensor.build import constant
from nestc.tensor.ir import Binary, Bitcast, Cast, Const, Expr, Fma, Select, Unary
from nestc.tensor.rewrite import binary, cast, select

HALVES = frozenset({"float16", "bfloat16"})
FLOATS = HALVES | {"float32", "float64"}
INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})
DTYPES = FLOATS | INTEGERS | {"bool"}
"""Element types that generated code handles; arithmetic on `HALVES` is done in float32, once an ONNX operator."""

STORED = DTYPES | SMALL
"""With the element types of 8 bits and fewer, which can be moved, converted, quantized and dequantized."""


def integer_range(dtype: str) -> tuple[int, int]:
    """Smallest and largest value of an integer dtype."""
    bits = int(dtype.lstrip("uint"))
    return (0, (1 << bits) - 1) if dtype.startswith("u") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _number(op: Op, name: str, default: float) -> float:
    value = op.attributes.get(name)
    return float(value) if isinstance(value, (int, float)) else default


def _like(value: float, x: Expr) -> Expr:
    return constant(value, x.dtype)


def _b(op: str, a: Expr, b: Expr) -> Expr:
    return binary(op, a, b)


def softplus(x: Expr) -> Expr:
    """log(1 + e ** x), written so that nothing overflows."""
    tail = Unary("log", Binary("add", _like(1, x), math.exp_below(Unary("neg", Unary("abs", x)))))
    return Binary("add", Binary("max", _like(0, x), x), tail)


# -- functions of one value; x is float32, float64, an integer or bool


def _relu(op: Op, x: Expr) -> Expr:
    return _b("max", _like(0, x), x)


def _sign(op: Op, x: Expr) -> Expr:
    zero = _like(0, x)
    if x.dtype.startswith("u"):
        return Select(_b("gt", x, zero), _like(1, x), x)
    return Select(Binary("gt", x, zero), _like(1, x), Select(Binary("lt", x, zero), _like(-1, x), x))


def _abs(op: Op, x: Expr) -> Expr:
    return x if x.dtype.startswith("u") else Unary("abs", x)


def _leaky_relu(op: Op, x: Expr) -> Expr:
    return Select(Binary("lt", x, _like(0, x)), Binary("mul", x, _like(_number(op, "alpha", 0.01), x)), x)


def _elu(op: Op, x: Expr) -> Expr:
    below = Binary("mul", _like(_number(op, "alpha", 1.0), x), Binary("sub", math.exp_below(x), _like(1, x)))
    return Select(Binary("lt", x, _like(0, x)), below, x)


def _selu(op: Op, x: Expr) -> Expr:
    alpha = _like(_number(op, "alpha", 1.67326319217681884765625), x)
    gamma = _like(_number(op, "gamma", 1.05070102214813232421875), x)
    below = Binary("sub", Binary("mul", alpha, math.exp_below(x)), alpha)
    return Binary("mul", gamma, Select(Binary("le", x, _like(0, x)), below, x))


def _celu(op: Op, x: Expr) -> Expr:
    alpha = _like(_number(op, "alpha", 1.0), x)
    below = Binary("mul", alpha, Binary("sub", Unary("exp", Binary("div", x, alpha)), _like(1, x)))
    return Binary("add", Binary("max", _like(0, x), x), Binary("min", _like(0, x), below))


def _hard_sigmoid(op: Op, x: Expr) -> Expr:
    line = Fma(x, _like(_number(op, "alpha", 0.2), x), _like(_number(op, "beta", 0.5), x))
    return Binary("max", _like(0, x), Binary("min", _like(1, x), line))


def _hard_swish(op: Op, x: Expr) -> Expr:
    line = Fma(x, _like(1 / 6, x), _like(0.5, x))
    return Binary("mul", x, Binary("max", _like(0, x), Binary("min", _like(1, x), line)))


def _swish(op: Op, x: Expr) -> Expr:
    alpha = _number(op, "alpha", 1.0)
    return math.swish(x, None if alpha == 1.0 else Binary("mul", x, _like(alpha, x)))


def _mish(op: Op, x: Expr) -> Expr:
    """x * tanh(softplus(x)) with one exponential: tanh(log(1 + e)) = (e * e + 2 * e) / (e * e + 2 * e + 2)."""
    e = math.exp_below(Binary("min", _like(20.0, x), x))  # beyond 20 the quotient is 1 in float32 and float64 alike
    n = Binary("mul", e, Binary("add", e, _like(2, x)))
    return Binary("mul", x, Binary("div", n, Binary("add", n, _like(2, x))))


def _gelu(op: Op, x: Expr) -> Expr:
    if op.attributes.get("approximate", "none") in ("tanh", b"tanh"):
        return math.gelu_tanh(x)
    erf = Unary("erf", Binary("mul", x, _like(sqrt(0.5), x)))
    return Binary("mul", Binary("mul", _like(0.5, x), x), Binary("add", _like(1, x), erf))


def _softsign(op: Op, x: Expr) -> Expr:
    return Binary("div", x, Binary("add", _like(1, x), Unary("abs", x)))


def _thresholded_relu(op: Op, x: Expr) -> Expr:
    keep = Binary("gt", x, _like(_number(op, "alpha", 1.0), x))
    return Select(keep, x, Select(Unary("isnan", x), x, _like(0, x)))


def _shrink(op: Op, x: Expr) -> Expr:
    if x.dtype in INTEGERS:
        return Cast(_shrink(op, Cast(x, "float64")), x.dtype)
    bias, limit = _like(_number(op, "bias", 0.0), x), _number(op, "lambd", 0.5)
    middle = Select(Binary("gt", x, _like(limit, x)), Binary("sub", x, bias), _like(0, x))
    return Select(Binary("lt", x, _like(-limit, x)), Binary("add", x, bias), middle)


def _is_inf(op: Op, x: Expr) -> Expr:
    positive = Binary("eq", x, _like(float("inf"), x)) if _number(op, "detect_positive", 1) else Const(False, "bool")
    negative = Binary("eq", x, _like(float("-inf"), x)) if _number(op, "detect_negative", 1) else Const(False, "bool")
    return binary("or", positive, negative)


def _plain(name: str) -> Callable[[Op, Expr], Expr]:
    return lambda op, x: Unary(name, x)


def _function(f: Callable[[Expr], Expr]) -> Callable[[Op, Expr], Expr]:
    return lambda op, x: f(x)


_UNARY: Mapping[str, Callable[[Op, Expr], Expr]] = {
    "Abs": _abs,
    "Acos": _plain("acos"),
    "Acosh": _plain("acosh"),
    "Asin": _plain("asin"),
    "Asinh": _plain("asinh"),
    "Atan": _plain("atan"),
    "Atanh": _plain("atanh"),
    "BitwiseNot": _plain("bitnot"),
    "Ceil": _plain("ceil"),
    "Celu": _celu,
    "Cos": _plain("cos"),
    "Cosh": _plain("cosh"),
    "Elu": _elu,
    "Erf": _plain("erf"),
    "Exp": _plain("exp"),
    "Floor": _plain("floor"),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "IsInf": _is_inf,
    "IsNaN": _plain("isnan"),
    "LeakyRelu": _leaky_relu,
    "Log": _plain("log"),
    "Mish": _mish,
    "Neg": _plain("neg"),
    "Not": _plain("not"),
    "Reciprocal": _function(lambda x: Binary("div", _like(1, x), x)),
    "Relu": _relu,
    "Round": _plain("rint"),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _function(math.sigmoid),
    "Sign": _sign,
    "Sin": _plain("sin"),
    "Sinh": _plain("sinh"),
    "Softplus": _function(softplus),
    "Softsign": _softsign,
    "Sqrt": _plain("sqrt"),
    "Swish": _swish,
    "Tan": _plain("tan"),
    "Tanh": _plain("tanh"),
    "ThresholdedRelu": _thresholded_relu,
}


# -- functions of two values of one type


def maximum(a: Expr, b: Expr) -> Expr:
    """The larger; NaN if one of them is."""
    return _extreme("max", a, b)


def minimum(a: Expr, b: Expr) -> Expr:
    """The smaller; NaN if one of them is."""
    return _extreme("min", a, b)


def _extreme(op: str, a: Expr, b: Expr) -> Expr:
    if "float" not in a.dtype:
        return binary(op, a, b)
    if isinstance(b, Const):
        a, b = b, a
    if isinstance(a, Const) and a.value == a.value:
        return Binary(op, a, b)
    return Select(Unary("isnan", a), a, Binary(op, a, b))


def _shift(op: Op, a: Expr, b: Expr) -> Expr:
    """Shifts by a negative amount or by the width and more give what sign extension alone leaves: 0, or -1."""
    bits = int(a.dtype.lstrip("uint"))
    left = op.attributes.get("direction") in ("LEFT", b"LEFT")
    inside = Binary("lt", b, _like(bits, b))
    if not b.dtype.startswith("u"):
        inside = Binary("and", inside, Binary("ge", b, _like(0, b)))
    if left:
        return Select(inside, Binary("shl", a, Select(inside, b, _like(0, b))), _like(0, a))
    if a.dtype.startswith("u"):
        return Select(inside, Binary("shr", a, Select(inside, b, _like(0, b))), _like(0, a))
    return Binary("shr", a, Select(inside, b, _like(bits - 1, b)))


def _mod(op: Op, a: Expr, b: Expr) -> Expr:
    return _b("rem" if _number(op, "fmod", 0) else "mod", a, b)


def _prelu(op: Op, x: Expr, slope: Expr) -> Expr:
    return x if x.dtype.startswith("u") else Select(Binary("lt", x, _like(0, x)), Binary("mul", x, slope), x)


def _infix(name: str) -> Callable[[Op, Expr, Expr], Expr]:
    return lambda op, a, b: binary(name, a, b)


_BINARY: Mapping[str, Callable[[Op, Expr, Expr], Expr]] = {
    "Add": _infix("add"),
    "And": _infix("and"),
    "BitShift": _shift,
    "BitwiseAnd": _infix("and"),
    "BitwiseOr": _infix("or"),
    "BitwiseXor": _infix("xor"),
    "Div": _infix("div"),
    "Equal": _infix("eq"),
    "Greater": _infix("gt"),
    "GreaterOrEqual": _infix("ge"),
    "Less": _infix("lt"),
    "LessOrEqual": _infix("le"),
    "Mod": _mod,
    "Mul": _infix("mul"),
    "Or": _infix("or"),
    "PRelu": _prelu,
    "Sub": _infix("sub"),
    "Xor": _infix("xor"),
}


# -- operators with types or operands of their own


def _variadic(op: Op, arguments: list[Expr], dtype: str) -> Expr:
    if op.op_type == "Max":
        return reduce(maximum, arguments)
    if op.op_type == "Min":
        return reduce(minimum, arguments)
    total = reduce(lambda a, b: binary("add", a, b), arguments)
    return total if op.op_type == "Sum" else Binary("div", total, _like(len(arguments), total))


def _pow(a: Expr, b: Expr) -> Expr:
    """a ** b in the type of `a`; through float64 for integers or a float64 exponent, as ONNX Runtime does."""
    if isinstance(b, Const) and b.value in (1, 2, 3):
        power = a
        for _ in range(int(b.value) - 1):
            power = binary("mul", power, a)
        return power
    work = a.dtype if a.dtype in ("float32", "float64") and b.dtype != "float64" else "float64"
    x, y = cast(a, work), cast(b, work)
    if isinstance(b, Const) and b.value == 0.5:
        infinity = _like(float("inf"), x)  # pow(-inf, 0.5) is inf
        root = Select(Binary("eq", Unary("abs", x), infinity), infinity, Unary("sqrt", x))
        return cast(root, a.dtype)
    return cast(Binary("pow", x, y), a.dtype)


def _clip(x: Expr, low: Expr | None, high: Expr | None) -> Expr:
    if low is not None:
        x = binary("max", low, x)
    return x if high is None else binary("min", high, x)


def convert(x: Expr, dtype: str, saturate: bool = True, mode: str = "up") -> Expr:
    """ONNX Cast of a decoded value; `saturate` and `mode` (``round_mode``) matter for the small floats."""
    if dtype in SMALL:
        return encode(cast(x, "float32") if x.dtype == "float64" or x.dtype in HALVES else x, dtype, saturate, mode)
    if HALVES & {x.dtype, dtype} and "bool" in (x.dtype, dtype):
        return cast(cast(x, "float32"), dtype)
    return cast(x, dtype)


def quantize(x: Expr, scale: Expr, zero: Expr | None, dtype: str, saturate: bool = True) -> Expr:
    """saturate(round(x / scale) + zero) as `dtype`, rounding half to even; x and scale are both float32 or float64."""
    y: Expr = Binary("div", x, scale)
    if dtype in SMALL and dtype not in NARROW:
        return encode(cast(y, "float32"), dtype, saturate)
    y = Unary("rint", y)
    if zero is not None:
        y = Binary("add", y, cast(zero, x.dtype))
    if dtype in NARROW:
        high = (1 << NARROW[dtype]) - 1
        low, high = (0, high) if dtype.startswith("u") else (-(high // 2) - 1, high // 2)
    else:
        low, high = integer_range(dtype)
    limited = Binary("min", Binary("max", y, _like(low, y)), _like(high, y))
    return encode(Cast(limited, "int32"), dtype) if dtype in NARROW else Cast(limited, dtype)


def dequantize(x: Expr, scale: Expr, zero: Expr | None) -> Expr:
    """(x - zero) * scale in the dtype of `scale`; a floating x has no zero point."""
    if "float" in x.dtype:
        return Binary("mul", cast(x, scale.dtype), scale)
    y = cast(x, "int32")
    if zero is not None:
        y = Binary("sub", y, cast(zero, "int32"))
    return Binary("mul", Cast(y, scale.dtype), scale)


_SPECIAL = frozenset(
    "Cast CastLike Clip DequantizeLinear Dropout Identity Max Mean Min Pow QuantizeLinear Sum Where BitCast".split()
)
ELEMENTWISE = frozenset(_UNARY) | frozenset(_BINARY) | _SPECIAL
"""Operators of ONNX's own domain that `apply_elementwise` knows."""


_ANY_TYPE = frozenset("BitCast Cast CastLike DequantizeLinear Dropout Identity QuantizeLinear Where".split())
"""Operators that also take the types of `STORED`."""


def is_elementwise(op: Op) -> bool:
    """Whether each element of the (only) output is a function of the elements at `operand_index` of the inputs."""
    if op.domain not in ("", "ai.onnx") or op.op_type not in ELEMENTWISE:
        return False
    if op.op_type == "Dropout":
        return not op.output(1) and not op.input(2)
    if op.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return not op.attributes.get("block_size")
    return True


def elementwise_refusal(op: Op, region: Region) -> str | None:
    """Why an elementwise operator has no generated code, in words; None if it has."""
    if not is_elementwise(op):
        return f"{op.op_type} (node {op.name!r}) is not elementwise"
    accepted = STORED if op.op_type in _ANY_TYPE else DTYPES
    for name in (*op.inputs, *op.outputs):
        if name and region.types[name].dtype not in accepted:
            return f"{op.op_type} (node {op.name!r}) works on {region.types[name].dtype}"
    return None


def operand_index(op: Op, position: int, index: tuple[Expr, ...], region: Region) -> tuple[Expr, ...] | None:
    """Where operand `position` is read for the output's element at logical `index`; None if it is not needed.

    Numpy's broadcasting, except for per-axis scales and zero points, which follow their axis.
    """
    name = op.input(position)
    if not name or (position and op.op_type in ("CastLike", "Dropout")):
        return None
    shape = region.types[name].shape
    if position and op.op_type in ("QuantizeLinear", "DequantizeLinear") and len(shape) == 1:
        axis = int(_number(op, "axis", 1)) % max(1, len(index))
        return (ix.const(0),) if shape[0] == 1 else (index[axis],)
    own = index[len(index) - len(shape) :] if shape else ()
    return tuple(ix.const(0) if n == 1 else i for n, i in zip(shape, own))


def apply_elementwise(op: Op, arguments: list[Expr | None], region: Region) -> Expr:
    """The operator's output for one element, given one element of each input (None where absent or not needed).

    Arguments and result have the dtypes of the region's values. Raises UnsupportedOp for an operator or a dtype that
    has no generated code.
    """
    refusal = elementwise_refusal(op, region)
    if refusal:
        raise UnsupportedOp(f"region {region.name}: {refusal}")
    dtype = region.types[op.outputs[0]].dtype
    given = [x for x in arguments if x is not None]
    if op.op_type in ("Identity", "Dropout"):
        return given[0]
    sources = [None if not name else region.types[name].dtype for name in op.inputs]
    if op.op_type in ("Cast", "CastLike"):
        if dtype == sources[0]:
            return given[0]
        saturate, mode = bool(_number(op, "saturate", 1)), op.attributes.get("round_mode", "up")
        return convert(decode(given[0], sources[0] or ""), dtype, saturate, str(mode))
    if op.op_type == "BitCast":
        # A bool is one byte in memory, 0 or 1.
        bits = cast(given[0], "uint8") if given[0].dtype == "bool" else given[0]
        return bits if bits.dtype == dtype else cast(bits, dtype) if dtype == "bool" else Bitcast(bits, dtype)
    if op.op_type == "Where":
        return select(*given)
    values = [None if x is None else decode(x, source or "") for x, source in zip(arguments, sources)]
    wide = [None if x is None else cast(x, "float32") if x.dtype in HALVES else x for x in values]
    result = _compute(op, wide, "float32" if dtype in HALVES else dtype)
    return cast(result, storage(dtype))


def _compute(op: Op, arguments: list[Expr | None], dtype: str) -> Expr:
    given = [x for x in arguments if x is not None]
    first = given[0]
    if op.op_type in _UNARY:
        return _UNARY[op.op_type](op, first)
    if op.op_type in _BINARY:
        return _BINARY[op.op_type](op, first, given[1])
    if op.op_type in ("Max", "Min", "Sum", "Mean"):
        return _variadic(op, given, dtype)
    if op.op_type == "Pow":
        return _pow(first, given[1])
    if op.op_type == "Clip":
        low, high = ((*arguments[1:], None, None))[:2]
        return _clip(first, low, high)
    zero = arguments[2] if len(arguments) > 2 else None
    if op.op_type == "QuantizeLinear":
        work = "float64" if "float64" in (first.dtype, given[1].dtype) else "float32"
        saturate = bool(_number(op, "saturate", 1))
        return quantize(cast(first, work), cast(given[1], work), zero, dtype, saturate)
    return dequantize(first, given[1], zero)
