"""exp, log, tanh, erf and sigmoid as polynomials: their error over the whole range of float32, and the special values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from nestc.kernels.api import CpuMachine
from nestc.kernels.compute import nodes
from nestc.tensor import interp
from nestc.tensor.build import Builder, load
from nestc.tensor.ir import Binary, Buffer, Const, Expr, Fma, Kernel, Load, Store, Unary, statements
from nestc.tensor.math import ERRORS, exp_below, expand, gelu_tanh, sigmoid, swish
from nestc.tensor.rewrite import binary, map_statements, transform
from nestc.tensor.verify import verify

MACHINE = CpuMachine("test", "", "", "", 32, 16, True, 32 << 10, 512 << 10, 32 << 20)
_erf = np.vectorize(math.erf, otypes=[np.float64])
REFERENCE: dict[str, Callable[[np.ndarray], np.ndarray]] = {"exp": np.exp, "log": np.log, "tanh": np.tanh, "erf": _erf}


def kernel(op: str, n: int, dtype: str = "float32", lanes: int = 0) -> Kernel:
    """out = op(in) for n elements, as one vector of n lanes or as a loop."""
    k = Builder(op)
    x, y = k.param("x", dtype, (n,)), k.param("y", dtype, (n,))
    if lanes:
        k.store(y, (0,), Unary(op, load(x, 0, lanes=n)))
    else:
        with k.loop("i", n) as i:
            k.store(y, (i,), Unary(op, load(x, i)))
    return k.finish()


def two_roundings(k: Kernel) -> Kernel:
    """The kernel as a machine without fused multiply-add runs it."""

    def split(e: Expr) -> Expr | None:
        return Binary("add", Binary("mul", e.a, e.b), e.c) if isinstance(e, Fma) else None

    memo: dict[Expr, Expr] = {}
    return dataclasses.replace(k, body=map_statements(k.body, lambda e: transform(e, split, memo)))


def evaluate(k: Kernel, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    interp.run(k, {"x": x, "y": y})
    return y


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("op", sorted(REFERENCE))
def test_error_over_all_of_float32(op: str, fused: bool) -> None:
    bits = np.arange(0, 1 << 32, 139119 if op == "erf" else 19973, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate([bits.view(np.float32), np.linspace(-10, 10, 20001, dtype=np.float32)])
    k = expand(kernel(op, x.size, lanes=x.size), MACHINE)
    verify(k)
    y = evaluate(k if fused else two_roundings(k), x)
    with np.errstate(all="ignore"):
        exact = REFERENCE[op](x.astype(np.float64))
        rounded = exact.astype(np.float32)
    assert np.array_equal(np.isnan(y), np.isnan(rounded))
    assert np.array_equal(y[np.isinf(rounded)], rounded[np.isinf(rounded)])
    normal = np.isfinite(rounded) & (np.abs(rounded) >= 2.0**-126)
    assert np.max(np.abs(y[normal] - exact[normal]) / np.abs(exact[normal])) <= ERRORS[op]
    denormal = np.abs(rounded) < 2.0**-126
    assert np.max(np.abs(y[denormal] - exact[denormal])) <= 1.01 * 2.0**-149


@pytest.mark.parametrize(
    ("op", "x", "expected"),
    [
        ("exp", 0.0, 1.0),
        ("exp", -0.0, 1.0),
        ("exp", math.inf, math.inf),
        ("exp", -math.inf, 0.0),
        ("exp", math.nan, math.nan),
        ("exp", 88.5, 2.7230878e38),
        ("exp", 88.8, math.inf),
        ("exp", -103.0, 1.4e-45),
        ("exp", -200.0, 0.0),
        ("log", 1.0, 0.0),
        ("log", 0.0, -math.inf),
        ("log", -0.0, -math.inf),
        ("log", -1.0, math.nan),
        ("log", -math.inf, math.nan),
        ("log", math.inf, math.inf),
        ("log", math.nan, math.nan),
        ("log", 1.4e-45, -103.27893),
        ("tanh", 0.0, 0.0),
        ("tanh", -0.0, -0.0),
        ("tanh", math.inf, 1.0),
        ("tanh", -math.inf, -1.0),
        ("tanh", math.nan, math.nan),
        ("tanh", 1.4e-45, 1.4e-45),
        ("erf", 0.0, 0.0),
        ("erf", -0.0, -0.0),
        ("erf", math.inf, 1.0),
        ("erf", -math.inf, -1.0),
        ("erf", math.nan, math.nan),
    ],
)
def test_special_values(op: str, x: float, expected: float) -> None:
    y = evaluate(expand(kernel(op, 1), MACHINE), np.array([x], np.float32))[0]
    np.testing.assert_allclose(y, np.float32(expected), rtol=3e-7)
    assert math.copysign(1.0, y) == math.copysign(1.0, expected) or math.isnan(expected)


def test_exponential_that_is_not_denormal_or_infinite() -> None:
    x = np.concatenate([np.linspace(-90, 88, 50001), [-np.inf, -1e30, -0.0, np.nan]]).astype(np.float32)
    k = Builder("exp_below")
    source, out = k.param("x", "float32", x.shape), k.param("y", "float32", x.shape)
    k.store(out, (0,), exp_below(load(source, 0, lanes=x.size)))
    y = evaluate(k.finish(), x)
    exact = np.exp(x.astype(np.float64))
    kept = x >= -87.33
    assert np.max(np.abs(y[kept] / exact[kept] - 1)) <= ERRORS["exp"]
    assert np.all(y[x < -87.33] == 0)
    assert np.isnan(y[-1])


def activation(function: Callable[[Expr], Expr], x: np.ndarray, fused: bool = True) -> np.ndarray:
    """function(x) by the interpreter, as one vector."""
    k = Builder("activation")
    source, out = k.param("x", str(x.dtype), x.shape), k.param("y", str(x.dtype), x.shape)
    k.store(out, (0,), function(load(source, 0, lanes=x.size)))
    made = k.finish()
    verify(made)
    return evaluate(made if fused else two_roundings(made), x)


@pytest.mark.parametrize(("fused", "far", "near"), [(True, 1.0, 2.3e-7), (False, 14.0, 7e-7)])
@pytest.mark.parametrize("name", ["sigmoid", "swish"])
def test_error_of_the_logistic_function(name: str, fused: bool, far: float, near: float) -> None:
    bits = np.arange(0, 1 << 32, 19973, dtype=np.uint64).astype(np.uint32)
    x = np.concatenate([bits.view(np.float32), np.linspace(-90, 90, 90001, dtype=np.float32)])
    y = activation(sigmoid if name == "sigmoid" else swish, x, fused)
    with np.errstate(all="ignore"):
        wide = x.astype(np.float64)
        exact = 1 / (1 + np.exp(-wide)) * (1 if name == "sigmoid" else wide)
        normal = (np.abs(exact) >= 2.0**-126) & (x > -88.3) & np.isfinite(exact)
        error = np.abs(y - exact) / np.abs(exact)
    assert np.array_equal(np.isnan(y), np.isnan(exact))
    assert np.max(error[normal]) <= ERRORS[name] * far
    assert np.max(error[normal & (x > -15)]) <= near
    assert np.max(np.abs(y[x < -88.3])) <= 100 * 2.0**-126
    tiny = np.abs(x) < 2.0**-100
    np.testing.assert_allclose(y[tiny], exact[tiny], rtol=6e-8, atol=2.0**-149)


def test_special_values_of_the_logistic_function() -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3e38, -3e38, -1000.0], np.float32)
    np.testing.assert_array_equal(activation(sigmoid, x), np.array([0.5, 0.5, 1, 0, np.nan, 1, 0, 0], np.float32))
    y = activation(swish, x)
    np.testing.assert_array_equal(y, np.array([0, 0, np.inf, np.nan, np.nan, 3e38, 0, 0], np.float32))
    assert np.signbit(y).tolist()[:3] == [False, True, False]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 2e-7), (np.float64, 1e-15)])
def test_gelu_through_tanh_is_a_swish(dtype: type, tolerance: float) -> None:
    x = np.linspace(-12, 12, 20001).astype(dtype)
    wide = x.astype(np.float64)
    exact = 0.5 * wide * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
    np.testing.assert_allclose(activation(gelu_tanh, x), exact, rtol=tolerance, atol=tolerance)


def test_the_logistic_function_of_other_dtypes_is_the_plain_one() -> None:
    x = np.linspace(-700, 700, 1401)
    np.testing.assert_allclose(activation(sigmoid, x), 1 / (1 + np.exp(-x)), rtol=1e-15)
    np.testing.assert_allclose(activation(swish, x), x / (1 + np.exp(-x)), rtol=1e-15)


def test_shared_operands_are_expanded_once() -> None:
    k = Builder("deep")
    x, y = k.param("x", "float32", (1,)), k.param("y", "float32", (1,))
    value: Expr = load(x, 0)
    for op in ("tanh", "exp", "erf", "tanh", "exp"):
        value = Unary(op, value)
    k.store(y, (0,), Binary("add", value, Unary("neg", value)))
    expanded = expand(k.finish(), MACHINE)
    seen: set[int] = set()

    def count(e: Expr) -> None:
        if id(e) not in seen:
            seen.add(id(e))
            for child in e.children():
                count(child)

    for s in statements(expanded.body):
        assert isinstance(s, Store)
        count(s.value)
    assert len(seen) < 400


@pytest.mark.parametrize(("dtype", "vector_bytes"), [("float64", 32), ("float32", 4)])
def test_what_is_left_to_the_c_library(dtype: str, vector_bytes: int) -> None:
    before = kernel("exp", 4, dtype)
    assert expand(before, dataclasses.replace(MACHINE, vector_bytes=vector_bytes)).body == before.body


@pytest.mark.parametrize(("exponent", "products"), [(1.0, 0), (2.0, 1), (3.0, 2)])
def test_small_powers_are_products(exponent: float, products: int) -> None:
    x = Load(Buffer("x", "float32", (4,)), (Const(0, "int64"),))
    power = binary("pow", x, Const(exponent))
    assert sum(isinstance(node, Binary) and node.op == "mul" for node in nodes(power)) == products
    assert not any(isinstance(node, Binary) and node.op == "pow" for node in nodes(power))
    kept = binary("pow", x, Const(2.5))
    assert isinstance(kept, Binary) and kept.op == "pow"
