"""Replace exp, log, tanh and erf on float32 by branch-free polynomials, so that they vectorise; float64 stays libm.

Activations that are made of them (`sigmoid`, `swish`, `gelu_tanh`) are functions of their own: an exponential that is
added to one needs neither denormal results nor a factor of its own, and a product with a quotient is one division.
The coefficients are minimax fits for this module (weighted least squares, Lawson's reweighting), rounded to float32.
The largest errors against correctly rounded results, over all float32 inputs, are in `ERRORS`;
tests/tensor/test_math.py measures them. Infinities, NaN, signed zeros and denormal numbers are right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import pi

from nestc.kernels.api import CpuMachine
from nestc.tensor.build import constant
from nestc.tensor.ir import Binary, Bitcast, Cast, Expr, Fma, Kernel, Select, Unary, expressions, statements
from nestc.tensor.rewrite import map_statements, transform

ERRORS = {"exp": 1.2e-7, "log": 1.2e-7, "tanh": 4e-7, "erf": 4e-7, "sigmoid": 4.5e-7, "swish": 4.5e-7}
"""Largest relative error of each function (an ulp is 6e-8 to 1.2e-7); denormal results of exp are within one ulp.

Those of sigmoid and swish are with fused multiply-add, and 2.3e-7 for x > -15 (without it 6e-6, and 7e-7); for x below
-88.3, where sigmoid would be below 2**-127, both are 0.
"""

# Cody and Waite, "Software Manual for the Elementary Functions": ln 2 in two parts; the first has few bits, so that its
# products with an exponent are exact.
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_LOG2_E = 1.4426950408889634
# Adding 1.5 * 2**23 rounds to an integer and leaves it in the low bits of the sum.
_ROUND = 12582912.0
_ROUND_BITS = 0x4B400000
_LN2 = 0.6931471805599453  # as float32 it is wrong by 2e-9: by 2.4e-7 after 127 of them, where sigmoid is 1e-38
_LOG_SMALLEST = -87.33  # e to this power is just above the smallest normal number
# Beyond these, as x of e**-x, the exponent would not fit its 8 bits: 255 (infinity) and 0 are reached inside.
_SIGMOID_LOW, _SIGMOID_HIGH = -89.0, 88.0

# (e**r - 1 - r) / r**2 on |r| <= ln(2) / 2, 3e-9 of e**r.
_EXP = (0.4999999403953552, 0.1666651964187622, 0.041668400168418884, 0.008368851616978645, 0.0013814318226650357)
# e**-r on the same interval, 9.2e-8; exact at 0, so that sigmoid(0) is one half.
_EXP_MINUS = (1.0, -0.99999970771, 0.49999145915, -0.16667640186, 0.04189838887, -0.00829023089)
# (log(1 + f) - f + f**2 / 2) / f**3 on 1 + f in [sqrt(1/2), sqrt(2)], 6e-9 of log(1 + f).
_LOG = (
    0.3333333134651184,
    -0.2500082552433014,
    0.20001249015331268,
    -0.16623148322105408,
    0.14201036095619202,
    -0.13161610066890717,
    0.12767741084098816,
    -0.07638527452945709,
)
# tanh(x) = x P(x**2) / Q(x**2) on |x| <= 9, 2e-8; beyond, tanh rounds to 1.
_TANH_LIMIT = 9.0
_TANH_P = (1.0, 0.13380974531173706, 0.0034955269657075405, 2.0608047634596005e-05, 1.335320654050065e-08)
_TANH_Q = (1.0, 0.46714290976524353, 0.02587675116956234, 0.00032855334575288, 7.77596596890362e-07)
# erf(x) = x P(x**2) / Q(x**2) on |x| <= 3.95, 2e-8; beyond, erf rounds to 1.
_ERF_LIMIT = 3.95
_ERF_P = (
    1.1283791065216064,
    0.19153693318367004,
    0.052873432636260986,
    0.0038075244519859552,
    0.00028466313960962,
    2.025876483457978e-06,
)
_ERF_Q = (
    1.0,
    0.5030778646469116,
    0.11455387622117996,
    0.015053817071020603,
    0.001170552335679531,
    3.7830188375664875e-05,
)


def expand(kernel: Kernel, machine: CpuMachine) -> Kernel:
    """`kernel` with every float32 exp, log, tanh and erf written out, for machines with vectors.

    A machine without vector registers keeps its calls of libm.
    """
    if machine.lanes("float32") == 1 or not _has_functions(kernel):
        return kernel
    # One memo for the whole kernel: equal operands give the identical tree, which keeps comparisons of trees cheap.
    memo: dict[Expr, Expr] = {}
    body = map_statements(kernel.body, lambda e: transform(e, _expand, memo))
    return Kernel(kernel.name, kernel.params, body, kernel.locals, kernel.origin)


def _has_functions(kernel: Kernel) -> bool:
    """Whether one of the functions occurs at all: most kernels have none."""
    seen: set[int] = set()
    waiting: list[Expr] = [e for s in statements(kernel.body) for e in expressions(s)]
    while waiting:
        e = waiting.pop()
        if id(e) in seen:
            continue
        seen.add(id(e))
        if isinstance(e, Unary) and e.op in _FUNCTIONS:
            return True
        waiting.extend(e.children())
    return False


def _expand(e: Expr) -> Expr | None:
    if not isinstance(e, Unary) or e.dtype != "float32":
        return None
    function = _FUNCTIONS.get(e.op)
    return None if function is None else function(e.x)


def exp(x: Expr) -> Expr:
    """e**x = 2**n e**r with n = rint(x / ln 2); 2**n in two factors, so that denormal results are rounded once."""
    # Written with the constant first, min and max hand a NaN on.
    x = Binary("min", _float(89.0, x), Binary("max", _float(-104.0, x), x))
    shifted = Fma(x, _float(_LOG2_E, x), _float(_ROUND, x))
    n = Binary("sub", shifted, _float(_ROUND, x))
    r = Fma(n, _float(-_LN2_LOW, x), Fma(n, _float(-_LN2_HIGH, x), x))
    value = Binary("add", Fma(_polynomial(_EXP, r), Binary("mul", r, r), r), _float(1.0, x))
    power = Binary("sub", Bitcast(shifted, "int32"), _int(_ROUND_BITS, x))
    half = Binary("shr", power, _int(1, x))
    return Binary("mul", Binary("mul", value, _power(half)), _power(Binary("sub", power, half)))


def exp_below(x: Expr) -> Expr:
    """e**x for x <= 88 or NaN: two thirds of the work of `exp`, because what would be denormal is 0.

    Other dtypes than float32 get the plain operation.
    """
    if x.dtype != "float32":
        return Unary("exp", x)
    biased = _ROUND + 127  # the exponent's bias is added on the way, so that the low bits are those of 2**n
    shifted = Fma(x, _float(_LOG2_E, x), _float(biased, x))
    n = Binary("sub", shifted, _float(biased, x))
    r = Fma(n, _float(-_LN2_LOW, x), Fma(n, _float(-_LN2_HIGH, x), x))
    value = Binary("add", Fma(_polynomial(_EXP, r), Binary("mul", r, r), r), _float(1.0, x))
    power = Bitcast(Binary("shl", Bitcast(shifted, "int32"), _int(23, x)), "float32")
    return Select(Binary("lt", x, _float(_LOG_SMALLEST, x)), _float(0.0, x), Binary("mul", value, power))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e**-x): 13 instructions on float32; other dtypes get the plain operations."""
    return Binary("div", constant(1, x.dtype, x.lanes), _one_and_exp_minus(x))


def swish(x: Expr, inner: Expr | None = None) -> Expr:
    """x sigmoid(inner), `inner` being x if it is not given, with one division and no product.

    x = -inf gives NaN, as the product of -inf and 0 does.
    """
    return Binary("div", x, _one_and_exp_minus(x if inner is None else inner))


def _one_and_exp_minus(x: Expr) -> Expr:
    """1 + e**-x = 1 + 2**n e**-r with n = rint(-x / ln 2), r = x + n ln 2; infinity for x < -88.4, 1 for x > 87.7."""
    one = constant(1, x.dtype, x.lanes)
    if x.dtype != "float32":
        return Binary("add", one, Unary("exp", Unary("neg", x)))
    x = Binary("min", _float(_SIGMOID_HIGH, x), Binary("max", _float(_SIGMOID_LOW, x), x))
    biased = _ROUND + 127
    shifted = Fma(x, _float(-_LOG2_E, x), _float(biased, x))
    n = Binary("sub", shifted, _float(biased, x))
    r = Fma(n, _float(_LN2, x), x)
    power = Bitcast(Binary("shl", Bitcast(shifted, "int32"), _int(23, x)), "float32")
    return Fma(_polynomial(_EXP_MINUS, r), power, one)


def gelu_tanh(x: Expr) -> Expr:
    """x (1 + tanh(t)) / 2 = x sigmoid(2 t) with t = sqrt(2 / pi) (x + 0.044715 x**3)."""
    factor = 2 * (2 / pi) ** 0.5
    cubic, linear = (constant(c, x.dtype, x.lanes) for c in (0.044715 * factor, factor))
    return swish(x, Binary("mul", x, Fma(Binary("mul", x, x), cubic, linear)))


def log(x: Expr) -> Expr:
    """log(2**n (1 + f)) = n ln 2 + log(1 + f) with 1 + f in [sqrt(1/2), sqrt(2))."""
    denormal = Binary("lt", x, _float(2.0**-126, x))
    scaled = Select(denormal, Binary("mul", x, _float(2.0**23, x)), x)
    bits = Bitcast(scaled, "int32")
    root_half = 0x3F3504F3
    power = Binary("shr", Binary("sub", bits, _int(root_half, x)), _int(23, x))
    mantissa = Bitcast(Binary("sub", bits, Binary("shl", power, _int(23, x))), "float32")
    f = Binary("sub", mantissa, _float(1.0, x))
    n = Binary("sub", Cast(power, "float32"), Select(denormal, _float(23.0, x), _float(0.0, x)))
    square = Binary("mul", f, f)
    small = Fma(n, _float(_LN2_LOW, x), Binary("mul", Binary("mul", f, square), _polynomial(_LOG, f)))
    value = Fma(n, _float(_LN2_HIGH, x), Binary("add", Fma(square, _float(-0.5, x), small), f))
    infinity = float("inf")
    # x == inf and NaN give themselves: `x < inf` fails for both.
    value = Select(Binary("lt", x, _float(infinity, x)), value, x)
    value = Select(Binary("eq", x, _float(0.0, x)), _float(-infinity, x), value)
    return Select(Binary("lt", x, _float(0.0, x)), _float(float("nan"), x), value)


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent as an odd rational function."""
    return _odd_rational(x, _TANH_LIMIT, _TANH_P, _TANH_Q)


def erf(x: Expr) -> Expr:
    """The error function as an odd rational function."""
    return _odd_rational(x, _ERF_LIMIT, _ERF_P, _ERF_Q)


def _odd_rational(x: Expr, limit: float, p: Sequence[float], q: Sequence[float]) -> Expr:
    """x P(x**2) / Q(x**2) with x limited to +-limit and the result to +-1."""
    x = Binary("min", _float(limit, x), Binary("max", _float(-limit, x), x))
    square = Binary("mul", x, x)
    value = Binary("div", Binary("mul", x, _polynomial(p, square)), _polynomial(q, square))
    return Binary("min", _float(1.0, x), Binary("max", _float(-1.0, x), value))


def _polynomial(coefficients: Sequence[float], x: Expr) -> Expr:
    """Horner's rule; the constant coefficient comes first."""
    result: Expr = _float(coefficients[-1], x)
    for coefficient in reversed(coefficients[:-1]):
        result = Fma(result, x, _float(coefficient, x))
    return result


def _power(n: Expr) -> Expr:
    """2**n as float32, for int32 n in [-126, 127]."""
    return Bitcast(Binary("shl", Binary("add", n, _int(127, n)), _int(23, n)), "float32")


def _float(value: float, like: Expr) -> Expr:
    return constant(value, "float32", like.lanes)


def _int(value: int, like: Expr) -> Expr:
    return constant(value, "int32", like.lanes)


_FUNCTIONS: dict[str, Callable[[Expr], Expr]] = {"exp": exp, "log": log, "tanh": tanh, "erf": erf}
