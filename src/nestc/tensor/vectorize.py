"""Turn one loop of a block into vector statements: loads become contiguous, broadcast or gathered by their stride."""

from __future__ import annotations

from nestc.tensor import index as ix
from nestc.tensor.ir import (
    Binary,
    Bitcast,
    Block,
    Broadcast,
    Cast,
    Const,
    Expr,
    Fma,
    For,
    If,
    Load,
    Ramp,
    Select,
    Stmt,
    Store,
    Unary,
    Var,
)
from nestc.tensor.rewrite import substitute


def vectorize(block: Block, var: Var, base: Expr, lanes: int) -> Block:
    """The effect of iterations ``base .. base + lanes - 1`` of the loop over `var` whose body is `block`.

    `base` is the index of the first lane. Branches must not depend on `var`. Raises TypeError where a statement cannot
    be vectorised (a store whose place does not move with `var`).
    """
    return tuple(_statement(s, var, base, lanes) for s in block)


def _statement(s: Stmt, var: Var, base: Expr, lanes: int) -> Stmt:
    if isinstance(s, For):
        return For(s.var, vectorize(s.body, var, base, lanes), s.kind)
    if isinstance(s, If):
        if ix.depends(s.cond, var):
            raise TypeError(f"a branch on {var.name} cannot be vectorised")
        return If(
            substitute(s.cond, {var: base}),
            vectorize(s.then, var, base, lanes),
            vectorize(s.orelse, var, base, lanes),
        )
    if not isinstance(s, Store):
        raise TypeError(f"{type(s).__name__} cannot be vectorised")
    v = _Vectorizer(var, base, lanes)
    value = v.vector(s.value)
    mask = None if s.mask is None else v.visit(s.mask)
    index = v.index(s.index, s.buffer.shape)
    if index is None:
        raise TypeError(f"every iteration of {var.name} stores to the same place of {s.buffer.name}")
    return Store(s.buffer, index, value, mask)


class _Vectorizer:
    """Evaluates expressions for all lanes at once; what does not depend on the loop stays scalar."""

    def __init__(self, var: Var, base: Expr, lanes: int) -> None:
        self.var = var
        self.base = base
        self.lanes = lanes
        self.memo: dict[Expr, Expr] = {}

    def vector(self, e: Expr) -> Expr:
        """`e` with all its lanes."""
        x = self.visit(e)
        return x if x.lanes == self.lanes else Broadcast(x, self.lanes)

    def visit(self, e: Expr) -> Expr:
        """`e` as a scalar if it is the same in every lane, else as a vector."""
        if e.lanes != 1:
            raise TypeError("already a vector")
        done = self.memo.get(e)
        if done is None:
            done = self.memo[e] = self._visit(e)
        return done

    def _visit(self, e: Expr) -> Expr:
        if not ix.depends(e, self.var):
            return e
        if e.dtype == "int64" and not isinstance(e, Load):
            stride = ix.coefficient(e, self.var)
            if stride is not None:
                return Ramp(substitute(e, {self.var: self.base}), stride, self.lanes)
        if isinstance(e, Load):
            return self._load(e)
        if isinstance(e, Unary):
            return Unary(e.op, self.vector(e.x))
        if isinstance(e, Binary):
            return Binary(e.op, self.vector(e.a), self.vector(e.b))
        if isinstance(e, Select):
            return Select(self.visit(e.cond), self.vector(e.a), self.vector(e.b))
        if isinstance(e, Cast):
            return Cast(self.vector(e.x), e.dtype)
        if isinstance(e, Bitcast):
            return Bitcast(self.vector(e.x), e.dtype)
        if isinstance(e, Fma):
            return Fma(self.vector(e.a), self.vector(e.b), self.vector(e.c))
        raise TypeError(f"{type(e).__name__} cannot be vectorised")

    def _load(self, e: Load) -> Expr:
        mask = None if e.mask is None else self.visit(e.mask)
        index = self.index(e.index, e.buffer.shape)
        if index is None:  # one place, but the mask may differ by lane
            scalar = Load(e.buffer, self.scalar_index(e.index), 1, mask if mask is None or mask.lanes == 1 else None)
            if mask is None or mask.lanes == 1:
                return scalar
            safe = Load(e.buffer, self.scalar_index(e.index), 1, _any(mask))
            zero = Broadcast(Const(False if e.dtype == "bool" else 0, e.dtype), self.lanes)
            return Select(mask, Broadcast(safe, self.lanes), zero)
        return Load(e.buffer, index, self.lanes, mask)

    def scalar_index(self, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """The index of the first lane."""
        return tuple(substitute(i, {self.var: self.base}) for i in index)

    def index(self, index: tuple[Expr, ...], shape: tuple[int, ...]) -> tuple[Expr, ...] | None:
        """The access for `index`: scalar indices if lanes are neighbours, else a gather; None if it is one place."""
        if not any(ix.depends(i, self.var) for i in index):
            return None
        outer_fixed = not any(ix.depends(i, self.var) for i in index[:-1])
        if outer_fixed and ix.coefficient(index[-1], self.var) == 1:
            return self.scalar_index(index)
        return tuple(self.vector(i) for i in index)


def _any(mask: Expr) -> Expr:
    """Whether a lane of a bool vector holds."""
    from nestc.tensor.ir import Reduce

    return Reduce("max", mask)
