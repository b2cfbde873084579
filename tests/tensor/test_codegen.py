"""Every operation of Tensor IR: machine code against the interpreter, scalar and in vectors, for every dtype."""

from __future__ import annotations

import numpy as np
import pytest

from nestc.errors import Error
from nestc.kernels.testing import Array, Compiled, host_machine
from nestc.tensor import index as ix
from nestc.tensor import interp
from nestc.tensor.build import Builder, constant, less, load
from nestc.tensor.ir import Binary, Bitcast, Buffer, Cast, Expr, Fma, Kernel, Load, Select, Shuffle, Store, Unary, Var
from nestc.tensor.rewrite import substitute_block
from nestc.tensor.vectorize import vectorize
from nestc.tensor.verify import verify

MACHINE = host_machine()
COUNT = 27
INTS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
FLOATS = ["float32", "float64"]


def samples(dtype: str, seed: int) -> Array:
    """Values with the extremes among them."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(COUNT) > 0.5
    kind = interp.numpy_dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        values = rng.integers(info.min, info.max, COUNT, kind, endpoint=True)
        values[:6] = [0, 1, 7, info.max, info.min, 3]
        return np.roll(values, seed)
    values = (rng.normal(size=COUNT) * 3).astype(np.float32)
    values[:5] = [0.0, -0.0, 1.5, 2.5, -7.0]
    return np.roll(values, seed).astype(kind)


def kernel(expression: Expr, inputs: dict[str, Array], dtype: str, lanes: int) -> Kernel:
    """A kernel that stores `expression` of the inputs' element i to out[i]; the end that fills no vector is scalar."""
    b = Builder("k")
    for name, array in inputs.items():
        b.param(name, str(array.dtype), array.shape)
    out = b.param("out", dtype, (COUNT,))
    i = Var("i", COUNT)
    body = (Store(out, (i,), expression),)
    full = COUNT // lanes if lanes > 1 else 0
    if full:
        with b.loop("v", full) as v:
            b.emit(vectorize(body, i, ix.mul(v, lanes), lanes))
    with b.loop("s", COUNT - full * lanes) as s:
        b.emit(substitute_block(body, {i: ix.add(s, full * lanes)}))
    return b.finish()


def compare(build: object, inputs: dict[str, Array], rtol: float = 0.0) -> None:
    """Run an expression in the interpreter and as machine code, scalar and vectorised."""
    i = Var("i", COUNT)
    operands = [Load(Buffer(n, str(a.dtype), a.shape), (i,)) for n, a in inputs.items()]
    expression: Expr = build(*operands)  # type: ignore[operator]
    for lanes in (1, MACHINE.lanes(expression.dtype if expression.dtype != "bool" else operands[0].dtype)):
        made = kernel(expression, inputs, expression.dtype, lanes)
        verify(made)
        kind = interp.numpy_dtype(expression.dtype)
        want, got = np.zeros(COUNT, kind), np.zeros(COUNT, kind)
        interp.run(made, {**inputs, "out": want})
        Compiled(made, MACHINE)([*inputs.values(), got])
        if rtol:
            np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol)
        else:
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", INTS + FLOATS)
def test_arithmetic(dtype: str) -> None:
    x, y = samples(dtype, 0), samples(dtype, 3)
    ops = ["add", "sub", "mul", "min", "max", "eq", "ne", "lt", "le", "gt", "ge"]
    if dtype in INTS:
        ops += ["and", "or", "xor"]
    for op in ops:
        compare(lambda a, b, op=op: Binary(op, a, b), {"x": x, "y": y})


@pytest.mark.parametrize("dtype", INTS + FLOATS)
def test_division(dtype: str) -> None:
    x, y = samples(dtype, 0), samples(dtype, 3)
    y[y == 0] = 5  # by zero the interpreter is numpy's, the machine's result is only safe
    if dtype.startswith("int"):
        y[y == -1] = 3
    for op in ("div", "rem", "floordiv", "mod"):
        compare(lambda a, b, op=op: Binary(op, a, b), {"x": x, "y": y}, 0.0 if dtype in INTS else 1e-6)


def test_integer_division_cannot_trap() -> None:
    x = np.array([7, -7, -(2**31)] * 9, np.int32)
    y = np.array([0, 0, -1] * 9, np.int32)
    got = np.zeros(COUNT, np.int32)
    for op, want in (("div", [7, -7, -(2**31)]), ("rem", [0, 0, 0])):
        i = Var("i", COUNT)
        a, b = (Load(Buffer(n, "int32", (COUNT,)), (i,)) for n in "xy")
        Compiled(kernel(Binary(op, a, b), {"x": x, "y": y}, "int32", 1), MACHINE)([x, y, got])
        assert got[:3].tolist() == want


@pytest.mark.parametrize("dtype", INTS)
def test_shifts_and_bits(dtype: str) -> None:
    width = np.dtype(dtype).itemsize * 8
    y = (np.arange(COUNT) % width).astype(dtype)
    for op in ("shl", "shr"):
        compare(lambda a, b, op=op: Binary(op, a, b), {"x": samples(dtype, 0), "y": y})
    compare(lambda a: Unary("bitnot", a), {"x": samples(dtype, 1)})


@pytest.mark.parametrize("dtype", FLOATS)
def test_functions(dtype: str) -> None:
    x = samples(dtype, 0)
    for op in "neg abs exp sin cos tan atan sinh cosh tanh asinh erf floor ceil rint trunc isnan".split():
        compare(lambda a, op=op: Unary(op, a), {"x": x}, 2e-6)
    positive = np.abs(x) + np.asarray(0.1, dtype)
    for op in ("sqrt", "log"):
        compare(lambda a, op=op: Unary(op, a), {"x": positive.astype(dtype)}, 2e-6)
    compare(lambda a: Unary("acosh", a), {"x": (positive + 1).astype(dtype)}, 2e-6)
    inside = (np.arange(COUNT) / COUNT * 1.9 - 0.95).astype(dtype)
    for op in ("asin", "acos", "atanh"):
        compare(lambda a, op=op: Unary(op, a), {"x": inside}, 2e-6)
    for op in ("pow", "atan2"):
        compare(lambda a, b, op=op: Binary(op, a, b), {"x": positive.astype(dtype), "y": x}, 2e-6)
    compare(lambda a, b: Fma(a, b, a), {"x": x, "y": samples(dtype, 2)}, 1e-6)


@pytest.mark.parametrize("source", [*INTS, *FLOATS, "bool"])
def test_casts(source: str) -> None:
    x = samples(source, 0)
    for target in [*INTS, *FLOATS, "bool", "float16", "bfloat16"]:
        if source in FLOATS and target.startswith("uint"):
            x = np.abs(x)
        if "float16" in target and source not in ("float32", "bool", "int8", "uint8"):
            continue  # through float32: rounds twice
        i = {"x": x}
        if "float16" in target:
            compare(lambda a, t=target: Cast(Cast(a, t), "float32"), i)
        else:
            compare(lambda a, t=target: Cast(a, t), i)


def test_half_types_round_as_numpy() -> None:
    x = np.concatenate(
        [samples("float32", 0)[:20], np.array([1e-7, 6e-8, 70000, np.inf, np.nan, 0.1, 1 / 3], np.float32)]
    )
    for target in ("float16", "bfloat16"):
        compare(lambda a, t=target: Cast(Cast(a, t), "float32"), {"x": x})


def test_select_and_bits() -> None:
    x, y = samples("float32", 0), samples("float32", 3)
    compare(lambda a, b: Select(Binary("lt", a, b), a, constant(1.5, "float32")), {"x": x, "y": y})
    compare(lambda a: Bitcast(a, "int32"), {"x": x})
    compare(lambda a, b: Binary("and", a, Unary("not", b)), {"x": samples("bool", 0), "y": samples("bool", 1)})


def test_shuffle() -> None:
    b = Builder("k")
    x, out = b.param("x", "float32", (16,)), b.param("out", "float32", (4,))
    first, second = Load(x, (ix.const(0),), 8), Load(x, (ix.const(8),), 8)
    b.store(out, (0,), Shuffle(first, second, (15, 0, 7, 8)))
    data, want, got = np.arange(16, dtype=np.float32), np.zeros(4, np.float32), np.zeros(4, np.float32)
    made = b.finish()
    interp.run(made, {"x": data, "out": want})
    Compiled(made, MACHINE)([data, got])
    assert want.tolist() == got.tolist() == [15, 0, 7, 8]


def test_masks_and_gathers() -> None:
    b = Builder("k")
    x, places = b.param("x", "float32", (COUNT,)), b.param("places", "int64", (COUNT,))
    out = b.param("out", "float32", (COUNT,))
    i = Var("i", COUNT)
    at = Load(places, (i,))
    inside = Binary("and", Binary("ge", at, ix.const(0)), Binary("lt", at, ix.const(COUNT)))
    body = (Store(out, (i,), Load(x, (at,), 1, inside), Binary("ne", at, ix.const(3))),)
    for base in (0, 8, 16):
        b.emit(vectorize(body, i, ix.const(base), 8))
    made = b.finish()
    verify(made)
    data = samples("float32", 0)
    index = np.arange(COUNT)[::-1].copy() - 6
    index[5] = 10_000_000
    want, got = np.full(COUNT, 9, np.float32), np.full(COUNT, 9, np.float32)
    interp.run(made, {"x": data, "places": index, "out": want})
    Compiled(made, MACHINE)([data, index, got])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("counts", [[0, 3, 1, 5], [5, 5, 9, -2], [0, 0, 0, 0]])
@pytest.mark.parametrize("changes", [False, True])
def test_loops_that_run_below_a_limit(counts: list[int], changes: bool) -> None:
    """Such a loop ends at its limit, which may be nothing; but not if the body moves the limit."""
    b = Builder("k")
    limits, out = b.param("limits", "int64", (4,)), b.param("out", "int64", (4, 5))
    with b.loop("r", 4) as r, b.loop("e", 5) as e, b.when(less(e, load(limits, r))):
        b.store(out, (r, e), ix.add(ix.mul(e, 10), r))
        if changes:
            b.store(limits, (r,), ix.add(e, -1))
    made = b.finish()
    verify(made)
    found: list[Array] = []
    for run in (lambda arrays: interp.run(made, dict(zip(("limits", "out"), arrays))), Compiled(made, MACHINE)):
        arrays = [np.array(counts, np.int64), np.full((4, 5), -1, np.int64)]
        run(arrays)
        found.append(arrays[1])
    np.testing.assert_array_equal(found[0], found[1])
    if not changes:
        assert (found[1] >= 0).sum(axis=1).tolist() == [min(5, max(0, count)) for count in counts]


def test_verifier_names_what_is_wrong() -> None:
    b = Builder("k")
    x, out = b.param("x", "float32", (8,)), b.param("out", "float32", (8,))
    with b.loop("i", 9) as i:
        b.store(out, (ix.const(0),), Load(x, (i,)))
    with pytest.raises(Error, match=r"index 0 of x runs over \[0, 8\], outside its extent 8"):
        verify(b.finish())
    b = Builder("k")
    out = b.param("out", "float32", (8,))
    with b.parallel("p", 8) as (p,):
        b.store(out, (ix.floordiv(p, 2),), constant(0, "float32"))
    with pytest.raises(Error, match="iterations 0 and 1 of p both write out"):
        verify(b.finish())
    b = Builder("k")
    out = b.param("out", "float32", (8,))
    with b.parallel("p", 8) as (p,), b.when(Binary("eq", p, ix.const(7))):
        b.store(out, (ix.const(0),), constant(0, "float32"))
    verify(b.finish())


@pytest.mark.parametrize("step, wrong", [(128, False), (127, True)])
def test_verifier_looks_at_single_places_where_ranges_do_not_tell(step: int, wrong: bool) -> None:
    b = Builder("k")
    out = b.param("out", "float32", (2, 16, 28))
    with b.parallel("p", 7) as (p,), b.loop("row", 128) as row:
        at = Binary("add", Binary("mul", p, ix.const(step)), row)
        inner = Binary("floordiv", at, ix.const(28))
        place = (
            Binary("floordiv", at, ix.const(448)),
            Binary("mod", inner, ix.const(16)),
            Binary("mod", at, ix.const(28)),
        )
        b.store(out, place, constant(0, "float32"))
    if not wrong:
        verify(b.finish())
        return
    with pytest.raises(Error, match="both write out"):
        verify(b.finish())
