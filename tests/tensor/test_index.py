"""Index arithmetic: whatever is simplified keeps its value, and bounds hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod

from hypothesis import given, settings
from hypothesis import strategies as st

from nestc.tensor import index as ix
from nestc.tensor.ir import Binary, Buffer, Const, Expr, Var
from nestc.tensor.rewrite import substitute

VARS = (Var("i", 5), Var("j", 7), Var("k", 3))


def value(e: Expr, at: dict[Var, int]) -> int:
    """An index expression evaluated in Python."""
    if isinstance(e, Const):
        return int(e.value)
    if isinstance(e, Var):
        return at[e]
    assert isinstance(e, Binary)
    a, b = value(e.a, at), value(e.b, at)
    return {"add": a + b, "sub": a - b, "mul": a * b, "floordiv": a // b if b else 0, "mod": a % b if b else 0}[e.op]


def everywhere() -> Iterator[dict[Var, int]]:
    """Every assignment of the variables."""
    for values in product(*(range(v.extent) for v in VARS)):
        yield dict(zip(VARS, values))


@st.composite
def expressions(draw: st.DrawFn) -> tuple[Expr, Expr]:
    """An expression as the builder simplifies it, and as it was meant."""
    simple: Expr = draw(st.sampled_from(VARS))
    plain = simple
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["add", "sub", "mul", "floordiv", "mod", "var"]))
        n = draw(st.integers(1, 9))
        if kind == "var":
            other, factor = draw(st.sampled_from(VARS)), draw(st.integers(-4, 8))
            simple = ix.add(simple, ix.mul(other, factor))
            plain = Binary("add", plain, Binary("mul", other, ix.const(factor)))
            continue
        operation = {"add": ix.add, "sub": ix.sub, "mul": ix.mul, "floordiv": ix.floordiv, "mod": ix.mod}[kind]
        simple, plain = operation(simple, n), Binary(kind, plain, ix.const(n))
    return simple, plain


@settings(deadline=None, max_examples=150)
@given(expressions())
def test_simplification_keeps_the_value(pair: tuple[Expr, Expr]) -> None:
    simple, plain = pair
    low, high = ix.bounds(simple)
    for at in everywhere():
        want = value(plain, at)
        assert value(simple, at) == want
        assert low <= want <= high


@settings(deadline=None, max_examples=60)
@given(expressions(), st.integers(0, 4))
def test_substitution_keeps_the_value(pair: tuple[Expr, Expr], k: int) -> None:
    simple, plain = pair
    i = VARS[0]
    moved = substitute(simple, {i: ix.const(k)})
    for at in everywhere():
        if at[i] == k:
            assert value(moved, at) == value(plain, at)
    if ix.depends(simple, i) and (step := ix.coefficient(simple, i)) is not None:
        base, after = dict.fromkeys(VARS, 0), {**dict.fromkeys(VARS, 0), i: 1}
        assert value(simple, after) - value(simple, base) == step


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_flatten_and_unflatten_are_inverse(shape: list[int]) -> None:
    extents = tuple(shape)
    axes = tuple(Var(f"a{d}", n) for d, n in enumerate(extents))
    assert ix.unflatten(ix.flatten(axes, extents), extents) == tuple(
        a if n > 1 else ix.const(0) for a, n in zip(axes, extents)
    ) or all(
        ix.bounds(ix.sub(p, a)) == (0, 0)
        for p, a in zip(ix.unflatten(ix.flatten(axes, extents), extents), axes)
        if a.extent > 1
    )
    whole = Var("w", prod(extents))
    assert ix.flatten(ix.unflatten(whole, extents), extents) == whole


def test_in_bounds_counts_lanes() -> None:
    buffer = Buffer("b", "float32", (4, 10))
    i, j = Var("i", 4), Var("j", 3)
    assert ix.in_bounds((i, j), buffer, 8) is None
    assert "outside its extent 10" in str(ix.in_bounds((i, ix.add(j, 1)), buffer, 8))
    assert "runs over [1, 4]" in str(ix.in_bounds((ix.add(i, 1), j), buffer))
