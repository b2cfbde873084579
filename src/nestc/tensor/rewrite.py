"""Rebuild expressions and statements with parts replaced; index arithmetic is simplified again on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nestc.tensor import index as ix
from nestc.tensor.ir import (
    Binary,
    Bitcast,
    Block,
    Broadcast,
    Call,
    Cast,
    Const,
    Dot,
    Expr,
    Fma,
    For,
    If,
    Load,
    PairSum,
    Ramp,
    Reduce,
    Repeat,
    Select,
    Shuffle,
    Stmt,
    Store,
    Unary,
    Var,
    Window,
)


def rebuild(e: Expr, children: tuple[Expr, ...]) -> Expr:
    """`e` with other operands (in the order of `children()`)."""
    if isinstance(e, (Const, Var)):
        return e
    if isinstance(e, Load):
        n = len(e.index)
        return Load(e.buffer, children[:n], e.lanes, children[n] if e.mask is not None else None)
    if isinstance(e, Binary):
        return binary(e.op, *children)
    if isinstance(e, Unary):
        return Unary(e.op, *children)
    if isinstance(e, Select):
        return select(*children)
    if isinstance(e, Cast):
        return cast(children[0], e.dtype)
    if isinstance(e, Bitcast):
        return Bitcast(children[0], e.dtype)
    if isinstance(e, Broadcast):
        return Broadcast(children[0], e.lanes)
    if isinstance(e, Ramp):
        return Ramp(children[0], e.stride, e.lanes)
    if isinstance(e, Fma):
        return Fma(*children)
    if isinstance(e, Shuffle):
        return Shuffle(children[0], children[1], e.picks)
    if isinstance(e, Reduce):
        return Reduce(e.op, children[0])
    if isinstance(e, Repeat):
        return Repeat(children[0], e.times)
    if isinstance(e, Dot):
        return Dot(*children)
    if isinstance(e, PairSum):
        return PairSum(*children)
    raise TypeError(f"cannot rebuild {type(e).__name__}")


def binary(op: str, a: Expr, b: Expr) -> Expr:
    """A binary operation; scalar int64 sums, products, quotients and comparisons, and small powers, are simplified."""
    if a.dtype == "int64" and b.dtype == "int64" and a.lanes == 1 and b.lanes == 1:
        if op == "add":
            return ix.add(a, b)
        if op == "sub":
            return ix.sub(a, b)
        if op == "mul" and isinstance(b, Const):
            return ix.mul(a, int(b.value))
        if op == "mul" and isinstance(a, Const):
            return ix.mul(b, int(a.value))
        if op in ("floordiv", "mod") and isinstance(b, Const) and int(b.value) > 0:
            return (ix.floordiv if op == "floordiv" else ix.mod)(a, int(b.value))
        if op in ("lt", "le", "gt", "ge", "eq"):
            known = compare(op, a, b)
            if known is not None:
                return Const(known, "bool")
        if op in ("min", "max"):
            (low_a, high_a), (low_b, high_b) = ix.bounds(a), ix.bounds(b)
            if high_a <= low_b:
                return a if op == "min" else b
            if high_b <= low_a:
                return b if op == "min" else a
    if op in ("and", "or") and a.dtype == "bool":
        for x, y in ((a, b), (b, a)):
            if isinstance(x, Const) and x.lanes == y.lanes:
                return y if bool(x.value) == (op == "and") else x
    if op == "pow" and "float" in a.dtype and isinstance(b, Const) and b.value in (1, 2, 3):
        power = a
        for _ in range(int(b.value) - 1):
            power = Binary("mul", power, a)
        return power
    return Binary(op, a, b)


def compare(op: str, a: Expr, b: Expr) -> bool | None:
    """The outcome of an index comparison if the intervals decide it."""
    (low_a, high_a), (low_b, high_b) = ix.bounds(a), ix.bounds(b)
    if op == "gt":
        return compare("lt", b, a)
    if op == "ge":
        return compare("le", b, a)
    if op == "lt":
        return True if high_a < low_b else False if low_a >= high_b else None
    if op == "le":
        return True if high_a <= low_b else False if low_a > high_b else None
    if low_a == high_a == low_b == high_b:
        return True
    return False if high_a < low_b or high_b < low_a else None


def select(cond: Expr, a: Expr, b: Expr) -> Expr:
    """`a` if `cond` else `b`, decided now where `cond` is a constant."""
    if isinstance(cond, Const):
        return a if cond.value else b
    return a if a == b else Select(cond, a, b)


def cast(x: Expr, dtype: str) -> Expr:
    """Conversion by value; nothing for the same dtype, done now for constants that stay exact."""
    if x.dtype == dtype:
        return x
    if isinstance(x, Const) and dtype in ("float32", "float64", "int32", "int64") and x.dtype != "float64":
        if dtype.startswith("float") and x.dtype in ("int8", "uint8", "int16", "uint16", "bool", "float32"):
            return Const(float(x.value), dtype)
        if dtype.startswith("int") and x.dtype in ("int8", "uint8", "int16", "uint16", "bool"):
            return Const(int(x.value), dtype)
    return Cast(x, dtype)


def transform(e: Expr, visit: Callable[[Expr], Expr | None], memo: dict[Expr, Expr] | None = None) -> Expr:
    """Rewrite from the leaves up: `visit` sees each node with its new operands and may replace it (None: keep)."""
    memo = {} if memo is None else memo
    done = memo.get(e)
    if done is not None:
        return done
    old = e.children()
    new = tuple(transform(c, visit, memo) for c in old)
    node = e if all(a is b for a, b in zip(old, new)) else rebuild(e, new)
    replaced = visit(node)
    result = node if replaced is None else replaced
    memo[e] = result
    return result


def substitute(e: Expr, values: Mapping[Var, Expr]) -> Expr:
    """`e` with loop variables replaced."""
    if not values or ix.variables(e).isdisjoint(values):
        return e
    return _substituted(e, values, {})


def _substituted(e: Expr, values: Mapping[Var, Expr], memo: dict[int, Expr]) -> Expr:
    """The same, without a walk through what holds none of the variables."""
    if isinstance(e, Var):
        return values.get(e, e)
    if ix.variables(e).isdisjoint(values):
        return e
    done = memo.get(id(e))
    if done is None:
        done = memo[id(e)] = rebuild(e, tuple([_substituted(child, values, memo) for child in e.children()]))
    return done


def map_statements(block: Block, visit: Callable[[Expr], Expr]) -> Block:
    """The block with every expression passed through `visit`."""
    return tuple(_map_statement(s, visit) for s in block)


def _map_statement(s: Stmt, visit: Callable[[Expr], Expr]) -> Stmt:
    if isinstance(s, For):
        return For(s.var, map_statements(s.body, visit), s.kind)
    if isinstance(s, Store):
        mask = None if s.mask is None else visit(s.mask)
        return Store(s.buffer, tuple(visit(i) for i in s.index), visit(s.value), mask)
    if isinstance(s, If):
        return If(visit(s.cond), map_statements(s.then, visit), map_statements(s.orelse, visit))
    if isinstance(s, Call):
        return Call(s.intrinsic, tuple(Window(w.buffer, tuple(visit(i) for i in w.index)) for w in s.operands))
    raise TypeError(f"unknown statement {type(s).__name__}")


def substitute_block(block: Block, values: Mapping[Var, Expr]) -> Block:
    """The block with loop variables replaced."""
    return map_statements(block, lambda e: substitute(e, values))
