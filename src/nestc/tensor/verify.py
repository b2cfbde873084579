"""What every kernel must satisfy before code is generated from it; each rule yields a sentence where it is broken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from math import prod

import numpy as np

from nestc.errors import Error
from nestc.tensor import index as ix
from nestc.tensor.interp import evaluate
from nestc.tensor.ir import (
    Binary,
    Block,
    Buffer,
    Call,
    Const,
    Expr,
    For,
    If,
    Kernel,
    Stmt,
    Store,
    Var,
    effects,
    expressions,
    loads,
    statements,
)
from nestc.tensor.rewrite import substitute

MOST_PLACES = 1 << 20
"""Stores of one iteration of a parallel loop that are looked at one by one where the ranges of indices overlap."""

_MOST_MARKS = 1 << 26  # bytes of a table of places, above which sorting them is cheaper


def verify(kernel: Kernel) -> None:
    """Raise nestc.Error with every violation found in `kernel`.

    Rules: names are unique; buffers are declared; types of stores and masks agree; unmasked accesses and operands of
    intrinsics stay inside their buffers (interval arithmetic); local buffers are written before they are read;
    registers are indexed by constants and unrolled loops only; a parallel loop stands alone at the top; its iterations
    write disjoint places.
    """
    problems = [*_declarations(kernel), *_accesses(kernel), *_loops(kernel), *_races(kernel)]
    if problems:
        shown = "; ".join(dict.fromkeys(problems))
        raise Error(f"kernel {kernel.name} is not valid: {shown}")


def _declarations(kernel: Kernel) -> Iterator[str]:
    seen: set[str] = set()
    for buffer in (*kernel.params, *kernel.locals):
        if buffer.name in seen:
            yield f"buffer {buffer.name} is declared twice"
        seen.add(buffer.name)
        if (buffer.memory == "param") != (buffer in kernel.params):
            yield f"buffer {buffer.name} in {buffer.memory} stands in the wrong list"
    names: set[str] = set()
    for s in statements(kernel.body):
        if isinstance(s, For):
            if s.var.name in names:
                yield f"two loops use the variable {s.var.name}"
            names.add(s.var.name)


Facts = Mapping[Expr, tuple[int, int]]  # what the conditions around a statement say of an index


def _accesses(kernel: Kernel) -> Iterator[str]:
    declared = {b.name: b for b in (*kernel.params, *kernel.locals)}
    # A loop may leave partial sums in memory for its next iteration, so there the order in the text does not tell.
    stored = {s.buffer.name for s in statements(kernel.body) if isinstance(s, Store) and s.buffer.memory != "regs"}
    yield from _block_accesses(kernel.body, declared, stored, {})


def _block_accesses(block: Block, declared: Mapping[str, Buffer], stored: set[str], facts: Facts) -> Iterator[str]:
    for s in block:
        yield from _reads(s, declared, stored, facts)
        if isinstance(s, For):
            yield from _block_accesses(s.body, declared, stored, facts)
        elif isinstance(s, If):
            yield from _block_accesses(s.then, declared, stored, {**facts, **_facts(s.cond)})
            yield from _block_accesses(s.orelse, declared, stored, facts)
        elif isinstance(s, Call):
            yield from _operands(s, declared, stored)
        elif isinstance(s, Store):
            if declared.get(s.buffer.name) != s.buffer:
                yield f"{s.buffer.name} is written but not declared"
            if s.mask is None:
                yield from _outside(s.index, s.buffer, s.value.lanes, facts)
            elif s.mask.lanes not in (1, s.value.lanes):
                yield f"mask of a store to {s.buffer.name} has {s.mask.lanes} lanes for {s.value.lanes}"
            stored.add(s.buffer.name)


def _reads(s: Stmt, declared: Mapping[str, Buffer], stored: set[str], facts: Facts) -> Iterator[str]:
    for e in expressions(s):
        for access in loads(e):
            if declared.get(access.buffer.name) != access.buffer:
                yield f"{access.buffer.name} is read but not declared"
            elif access.mask is None:
                yield from _outside(access.index, access.buffer, access.lanes, facts)
            elif access.mask.dtype != "bool":
                yield f"mask of a load of {access.buffer.name} is {access.mask.dtype}"
            if access.buffer.memory != "param" and access.buffer.name not in stored:
                yield f"{access.buffer.name} is read before it is written"


def _operands(s: Call, declared: Mapping[str, Buffer], stored: set[str]) -> Iterator[str]:
    """Windows as their intrinsic's body uses them; where it does nothing (a prefetch) any place will do."""
    name = s.intrinsic.name
    if len(s.operands) != len(s.intrinsic.params):
        yield f"{name} takes {len(s.intrinsic.params)} operands, not {len(s.operands)}"
        return
    for window, param, (read, write) in zip(s.operands, s.intrinsic.params, effects(s.intrinsic)):
        buffer = window.buffer
        if not read and not write:
            continue
        if declared.get(buffer.name) != buffer:
            yield f"{buffer.name} is an operand of {name} but not declared"
        elif buffer.dtype != param.dtype or buffer.shape[1:] != param.shape[1:]:
            yield f"{buffer.name} has not the elements that {name} takes"
        elif problem := ix.in_bounds(window.index, buffer) or _behind(window.index, buffer, param):
            yield f"{name}: {problem}"
        if read and buffer.memory != "param" and buffer.name not in stored:
            yield f"{buffer.name} is read before it is written"
    stored.update(w.buffer.name for w, (_, write) in zip(s.operands, effects(s.intrinsic)) if write)


def _behind(index: tuple[Expr, ...], buffer: Buffer, param: Buffer) -> str | None:
    """None if as many elements as `param` has lie in the buffer from `index` on, else a sentence."""
    last = 0
    for i, extent in zip(index, buffer.shape):
        last = last * extent + ix.bounds(i)[1]
    if last + param.size <= buffer.size:
        return None
    return f"{param.size} elements from position {last} of {buffer.name} end behind its {buffer.size}"


def _outside(index: tuple[Expr, ...], buffer: Buffer, lanes: int, facts: Facts) -> Iterator[str]:
    """The access, with every index that a condition limits replaced by one of its extremes."""
    if not any(i in facts for i in index):
        problem = ix.in_bounds(index, buffer, lanes)
        if problem:
            yield problem
        return
    for end in (0, 1):
        limited = tuple(ix.const(facts[i][end]) if i in facts else i for i in index)
        problem = ix.in_bounds(limited, buffer, lanes)
        if problem:
            yield problem


def _facts(cond: Expr) -> dict[Expr, tuple[int, int]]:
    """Bounds of indices that hold where `cond` does."""
    if not isinstance(cond, Binary):
        return {}
    if cond.op == "and" and cond.lanes == 1:
        result = _facts(cond.a)
        for e, (low, high) in _facts(cond.b).items():
            known_low, known_high = result.get(e, ix.bounds(e))
            result[e] = (max(low, known_low), min(high, known_high))
        return result
    if isinstance(cond.b, Const) and cond.a.dtype == "int64" and cond.op in ("lt", "le", "gt", "ge"):
        low, high = ix.bounds(cond.a)
        limit = int(cond.b.value)
        if cond.op in ("lt", "le"):
            return {cond.a: (low, min(high, limit - (cond.op == "lt")))}
        return {cond.a: (max(low, limit + (cond.op == "gt")), high)}
    return {}


def _loops(kernel: Kernel) -> Iterator[str]:
    for s in statements(kernel.body):
        if isinstance(s, For) and s.kind == "parallel" and not (len(kernel.body) == 1 and kernel.body[0] is s):
            yield f"parallel loop {s.var.name} does not stand alone at the top"
    if any(b.memory == "regs" for b in kernel.locals):
        yield from _registers(kernel.body, frozenset())


def _registers(block: Block, unrolled: frozenset[Var]) -> Iterator[str]:
    for s in block:
        if isinstance(s, For):
            yield from _registers(s.body, unrolled | {s.var} if s.kind == "unroll" else unrolled)
            continue
        if isinstance(s, If):
            yield from _registers((*s.then, *s.orelse), unrolled)
        accesses = [(a.buffer, a.index) for e in expressions(s) for a in loads(e)]
        if isinstance(s, Store):
            accesses.append((s.buffer, s.index))
        for buffer, index in accesses:
            if buffer.memory == "regs" and any(ix.variables(i) - unrolled for i in index):
                yield f"registers {buffer.name} are indexed by a loop that is not unrolled"


Boxes = dict[tuple[int, int], tuple[int, int]]  # the bounds of an index (its identity) in an iteration


def _races(kernel: Kernel) -> Iterator[str]:
    var = kernel.parallel
    if var is None or var.extent < 2:
        return
    # The first iterations, the border of a row where the loop is folded, the middle and the end.
    starts = {0, 1, var.extent // 2, var.extent - 2}
    picks = sorted({p + d for p in starts for d in (0, 1) if 0 <= p + d < var.extent})
    known: Boxes = {}
    for s, conditions in _guarded_stores(kernel.body, ()):
        if s.buffer.memory != "param" or s.mask is not None:
            continue
        if any(i.lanes > 1 for i in s.index):
            continue  # a scatter: the lowering that makes one answers for it
        run = [p for p in picks if not _excluded(conditions, var, p)]
        if all(not _meet(_box(s, var, p, known), _box(s, var, q, known)) for p, q in pairwise(run)):
            continue
        flat = ix.flatten(s.index, s.buffer.shape)
        for p, q in pairwise(run):
            # One index that does not meet settles it, or flat positions that do not; else every single place decides.
            if not _meet(_box(s, var, p, known), _box(s, var, q, known)):
                continue
            if not _meet([_span(flat, s, var, p)], [_span(flat, s, var, q)]):
                continue
            if _share([_places(flat, s, conditions, var, at) for at in (p, q)]):
                yield f"iterations {p} and {q} of {var.name} both write {s.buffer.name}"
                break


def _meet(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> bool:
    """Whether two boxes of ranges overlap."""
    return all(low <= other_high and other_low <= high for (low, high), (other_low, other_high) in zip(a, b))


def _guarded_stores(block: Block, conditions: tuple[Expr, ...]) -> Iterator[tuple[Store, tuple[Expr, ...]]]:
    """Every store with the conditions that hold where it stands."""
    for s in block:
        if isinstance(s, Store):
            yield s, conditions
        elif isinstance(s, For):
            yield from _guarded_stores(s.body, conditions)
        elif isinstance(s, If):
            yield from _guarded_stores(s.then, (*conditions, s.cond))
            yield from _guarded_stores(s.orelse, conditions)


def _excluded(conditions: tuple[Expr, ...], var: Var, at: int) -> bool:
    """Whether one of the conditions is known not to hold in one iteration."""
    known = (substitute(c, {var: ix.const(at)}) for c in conditions)
    return any(isinstance(c, Const) and not c.value for c in known)


def _places(flat: Expr, s: Store, conditions: tuple[Expr, ...], var: Var, at: int) -> np.ndarray | None:
    """Every flat position that a store writes in one iteration of the parallel loop; None if there are too many."""
    here = substitute(flat, {var: ix.const(at)})
    if loads(here):
        return None
    known = [substitute(c, {var: ix.const(at)}) for c in conditions if not loads(c)]
    names = sorted(ix.variables(here).union(*(ix.variables(c) for c in known)), key=lambda v: v.name)
    count = prod(v.extent for v in names)
    if count > MOST_PLACES:
        return None
    grid = np.meshgrid(*(np.arange(v.extent) for v in names), indexing="ij")
    values = {v.name: part.reshape(-1) for v, part in zip(names, grid)}
    held = np.ones(count, bool)
    for c in known:
        held &= evaluate(c, values)
    places = np.broadcast_to(evaluate(here, values), (count,))[held]
    return (places[:, None] + np.arange(s.value.lanes)).reshape(-1)


def _share(sets: list[np.ndarray | None]) -> bool:
    """Whether two sets of places have one in common, or one of them is not known."""
    known = [places for places in sets if places is not None]
    if len(known) < len(sets):
        return True
    if any(not places.size for places in known):
        return False
    first, last = min(int(places.min()) for places in known), max(int(places.max()) for places in known)
    if last - first > _MOST_MARKS:
        return bool(np.intersect1d(known[0], known[1]).size)
    taken = np.zeros(last - first + 1, bool)
    taken[known[0] - first] = True
    return bool(taken[known[1] - first].any())


def _span(flat: Expr, s: Store, var: Var, at: int) -> tuple[int, int]:
    """The range of the flat position of a store in one iteration of the parallel loop."""
    low, high = ix.bounds(substitute(flat, {var: ix.const(at)}))
    return low, high + s.value.lanes - 1


def _box(s: Store, var: Var, at: int, known: Boxes) -> list[tuple[int, int]]:
    """The range of each index of a store in one iteration of the parallel loop; the stores of a tile share most."""
    box: list[tuple[int, int]] = []
    for i in s.index:
        bounds = known.get((id(i), at))
        if bounds is None:
            bounds = known[id(i), at] = ix.bounds(substitute(i, {var: ix.const(at)}))
        box.append(bounds)
    if box:
        low, high = box[-1]
        box[-1] = (low, high + s.value.lanes - 1)
    return box
