"""Tensor IR (L2): typed buffers, index and value expressions, and loop nests, all frozen data on one page.

An index is an ordinary int64 expression, kept simple by `nestc.tensor.index`. A value with ``lanes > 1`` is a vector.
`nestc.tensor.interp` is the definition of every node; `nestc.tensor.verify` states what a kernel must satisfy.
float16 and bfloat16 exist only in memory and in `Cast`: arithmetic on them is done in float32 and rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any, Literal

Memory = Literal[
    "param", "regs", "stack", "scratch", "vta.inp", "vta.wgt", "vta.acc", "aim.gb", "aim.mac", "aim.af", "aim.gpr"
]
LoopKind = Literal["serial", "parallel", "unroll"]

UNARY = frozenset(
    "neg abs not bitnot exp log sqrt sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf"
    " floor ceil rint trunc isnan".split()
)
# floordiv and mod round towards minus infinity, div and rem towards zero (integers) or are exact (floats).
# max(a, b) is `a if a > b else b`, min(a, b) is `a if a < b else b`: if `b` is NaN the result is NaN.
ARITHMETIC = frozenset("add sub mul div rem floordiv mod pow min max atan2 and or xor shl shr".split())
COMPARE = frozenset("eq ne lt le gt ge".split())
REDUCE = frozenset("add mul min max".split())
# Neighbouring products that `Dot` adds to one lane, by the dtypes of its factors.
DOT_GROUPS = {
    ("uint8", "int8"): 4,
    ("int8", "uint8"): 4,
    ("int8", "int8"): 4,
    ("uint8", "uint8"): 4,
    ("int16", "int16"): 2,
    ("bfloat16", "bfloat16"): 2,
}


@dataclass(frozen=True)
class Buffer:
    """A typed array in row-major order. ``memory``: ``param`` (a kernel argument), ``regs`` (indexed by constants once
    loops are unrolled, so that it lives in registers), ``stack``, or ``scratch`` (private to one worker).

    A ``regs`` buffer holds vectors: its last dimension is the number of lanes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    memory: Memory = "param"

    @property
    def size(self) -> int:
        """Number of elements."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    """Names of the fields that tell nodes of a kind apart (asked for every node that is hashed)."""
    return tuple(f.name for f in fields(kind) if f.compare)


class Node:
    """Frozen, compared by structure, with its hash computed once (expressions share subtrees heavily)."""

    _hash: int

    def _key(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in _field_names(type(self))])

    def __hash__(self) -> int:
        # Asked for a million times in a network's compilation: what is known costs one look.
        try:
            return self._hash
        except AttributeError:
            value = hash((type(self).__name__, self._key()))
            self.__dict__["_hash"] = value
            return value

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(self) is type(other) and hash(self) == hash(other) and self._key() == other._key()  # type: ignore[attr-defined]


class Expr(Node):
    """A pure value of one dtype and a number of lanes."""

    dtype: str
    lanes: int

    def children(self) -> tuple[Expr, ...]:
        """Operand expressions."""
        return ()


def _set(node: Expr, dtype: str, lanes: int) -> None:
    node.__dict__["dtype"] = dtype
    node.__dict__["lanes"] = lanes


def _same(op: str, *values: Expr) -> None:
    """Operands of one operation agree in dtype and lanes."""
    first = values[0]
    for value in values[1:]:
        if value.dtype != first.dtype or value.lanes != first.lanes:
            shown = ", ".join(f"{v.dtype}x{v.lanes}" for v in values)
            raise TypeError(f"{op}: operands differ in type: {shown}")


@dataclass(frozen=True, eq=False)
class Const(Expr):
    """A scalar constant."""

    value: int | float | bool
    dtype: str = "float32"
    lanes: int = field(default=1, init=False)

    def _key(self) -> tuple[Any, ...]:
        return (repr(self.value), self.dtype)  # repr: NaN equals itself, 0.0 differs from -0.0


@dataclass(frozen=True, eq=False)
class Var(Expr):
    """A loop variable: int64, 0 <= var < extent. Its name is unique in its kernel."""

    name: str
    extent: int
    dtype: str = field(default="int64", init=False)
    lanes: int = field(default=1, init=False)


@dataclass(frozen=True, eq=False)
class Load(Expr):
    """``lanes`` neighbours along the last dimension from scalar ``index``; or, if an index is a vector, a gather.

    Where ``mask`` is false the result is 0 and nothing is read, so the index may then be outside the buffer.
    """

    buffer: Buffer
    index: tuple[Expr, ...]
    lanes: int = 1
    mask: Expr | None = None

    def __post_init__(self) -> None:
        if len(self.index) != len(self.buffer.shape):
            raise TypeError(f"load of {self.buffer.name}: {len(self.index)} indices for shape {self.buffer.shape}")
        object.__setattr__(self, "dtype", self.buffer.dtype)

    def children(self) -> tuple[Expr, ...]:
        return self.index if self.mask is None else (*self.index, self.mask)


@dataclass(frozen=True, eq=False)
class Unary(Expr):
    """One of `UNARY`; ``isnan`` and ``not`` give bool."""

    op: str
    x: Expr

    def __post_init__(self) -> None:
        if self.op not in UNARY:
            raise TypeError(f"unknown unary operation {self.op!r}")
        _set(self, "bool" if self.op in ("isnan", "not") else self.x.dtype, self.x.lanes)

    def children(self) -> tuple[Expr, ...]:
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Binary(Expr):
    """One of `ARITHMETIC` or `COMPARE` (which gives bool); operands have one dtype and lane count."""

    op: str
    a: Expr
    b: Expr

    def __post_init__(self) -> None:
        a, b = self.a, self.b
        if a.dtype != b.dtype or a.lanes != b.lanes:
            _same(self.op, a, b)
        if self.op in ARITHMETIC:
            _set(self, a.dtype, a.lanes)
        elif self.op in COMPARE:
            _set(self, "bool", a.lanes)
        else:
            raise TypeError(f"unknown binary operation {self.op!r}")

    def children(self) -> tuple[Expr, ...]:
        return (self.a, self.b)


@dataclass(frozen=True, eq=False)
class Select(Expr):
    """``a`` where ``cond`` (bool) holds, else ``b``. Both sides are evaluated; ``cond`` may be scalar for vectors."""

    cond: Expr
    a: Expr
    b: Expr

    def __post_init__(self) -> None:
        _same("select", self.a, self.b)
        if self.cond.dtype != "bool" or self.cond.lanes not in (1, self.a.lanes):
            raise TypeError(f"select: condition is {self.cond.dtype}x{self.cond.lanes}")
        _set(self, self.a.dtype, self.a.lanes)

    def children(self) -> tuple[Expr, ...]:
        return (self.cond, self.a, self.b)


@dataclass(frozen=True, eq=False)
class Cast(Expr):
    """Conversion by value: to integers truncates towards zero, between integers wraps, to bool is ``x != 0``,
    to narrower floats rounds to nearest even."""

    x: Expr
    dtype: str

    def __post_init__(self) -> None:
        _set(self, self.dtype, self.x.lanes)

    def children(self) -> tuple[Expr, ...]:
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Bitcast(Expr):
    """The same bits as another dtype of equal width."""

    x: Expr
    dtype: str

    def __post_init__(self) -> None:
        _set(self, self.dtype, self.x.lanes)

    def children(self) -> tuple[Expr, ...]:
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Broadcast(Expr):
    """A scalar repeated in every lane."""

    x: Expr
    lanes: int

    def __post_init__(self) -> None:
        if self.x.lanes != 1:
            raise TypeError("broadcast of a vector")
        _set(self, self.x.dtype, self.lanes)

    def children(self) -> tuple[Expr, ...]:
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Ramp(Expr):
    """int64 lanes ``base, base + stride, base + 2 * stride ...``."""

    base: Expr
    stride: int
    lanes: int

    def __post_init__(self) -> None:
        _set(self, "int64", self.lanes)

    def children(self) -> tuple[Expr, ...]:
        return (self.base,)


@dataclass(frozen=True, eq=False)
class Fma(Expr):
    """``a * b + c`` with one rounding where the machine has it (two elsewhere)."""

    a: Expr
    b: Expr
    c: Expr

    def __post_init__(self) -> None:
        _same("fma", self.a, self.b, self.c)
        _set(self, self.a.dtype, self.a.lanes)

    def children(self) -> tuple[Expr, ...]:
        return (self.a, self.b, self.c)


@dataclass(frozen=True, eq=False)
class Shuffle(Expr):
    """Lanes picked from two vectors of one type: lane i is lane ``picks[i]`` of ``a`` followed by ``b``."""

    a: Expr
    b: Expr
    picks: tuple[int, ...]

    def __post_init__(self) -> None:
        _same("shuffle", self.a, self.b)
        if any(not 0 <= p < 2 * self.a.lanes for p in self.picks):
            raise TypeError(f"shuffle: picks {self.picks} of two vectors of {self.a.lanes} lanes")
        _set(self, self.a.dtype, len(self.picks))

    def children(self) -> tuple[Expr, ...]:
        return (self.a, self.b)


@dataclass(frozen=True, eq=False)
class Reduce(Expr):
    """All lanes of a vector combined with one of `REDUCE`, in any order."""

    op: str
    x: Expr

    def __post_init__(self) -> None:
        if self.op not in REDUCE:
            raise TypeError(f"unknown reduction {self.op!r}")
        _set(self, self.x.dtype, 1)

    def children(self) -> tuple[Expr, ...]:
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Repeat(Expr):
    """All lanes of a short vector, ``times`` times over."""

    x: Expr
    times: int

    def __post_init__(self) -> None:
        _set(self, self.x.dtype, self.x.lanes * self.times)

    def children(self) -> tuple[Expr, ...]:
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Dot(Expr):
    """Lane l is ``acc[l] + sum of a[g * l + j] * b[g * l + j] for j < g``; `DOT_GROUPS` has g.

    Integer factors give int32, exact but for wrapping of the sum. bfloat16 factors give float32, whose order of
    additions, rounding between them and treatment of subnormal numbers are the machine's.
    """

    acc: Expr
    a: Expr
    b: Expr

    def __post_init__(self) -> None:
        group = DOT_GROUPS.get((self.a.dtype, self.b.dtype))
        if group is None:
            raise TypeError(f"dot: no sum of products of {self.a.dtype} and {self.b.dtype}")
        dtype = "float32" if self.a.dtype == "bfloat16" else "int32"
        if self.acc.dtype != dtype or not self.a.lanes == self.b.lanes == group * self.acc.lanes:
            shown = ", ".join(f"{v.dtype}x{v.lanes}" for v in (self.acc, self.a, self.b))
            raise TypeError(f"dot: operands do not fit: {shown}")
        _set(self, dtype, self.acc.lanes)

    @property
    def group(self) -> int:
        """Products added to one lane."""
        return DOT_GROUPS[self.a.dtype, self.b.dtype]

    def children(self) -> tuple[Expr, ...]:
        return (self.acc, self.a, self.b)


@dataclass(frozen=True, eq=False)
class PairSum(Expr):
    """Lane l is ``a[2l] * b[2l] + a[2l + 1] * b[2l + 1]`` for uint8 `a` and int8 `b`, saturated to int16.

    That is x86's pmaddubsw, twice as many products an instruction as `Dot` of int16. Whoever uses it sees to it that
    nothing saturates: by ``255 * (b[2l] + b[2l + 1])`` of known `b`.
    """

    a: Expr
    b: Expr

    def __post_init__(self) -> None:
        if (self.a.dtype, self.b.dtype) != ("uint8", "int8") or self.a.lanes != self.b.lanes or self.a.lanes % 2:
            raise TypeError(
                f"pair sum: operands do not fit: {self.a.dtype}x{self.a.lanes}, {self.b.dtype}x{self.b.lanes}"
            )
        _set(self, "int16", self.a.lanes // 2)

    def children(self) -> tuple[Expr, ...]:
        return (self.a, self.b)


class Stmt(Node):
    """An effect on buffers."""


Block = tuple[Stmt, ...]


@dataclass(frozen=True, eq=False)
class For(Stmt):
    """``body`` for var = 0 .. extent-1. ``unroll`` is expanded by the code generator; ``parallel`` only at the top."""

    var: Var
    body: Block
    kind: LoopKind = "serial"


@dataclass(frozen=True, eq=False)
class Store(Stmt):
    """Write ``value`` (its lanes lie next to each other along the last dimension, or scatter if an index is a vector).

    Where ``mask`` is false nothing is written.
    """

    buffer: Buffer
    index: tuple[Expr, ...]
    value: Expr
    mask: Expr | None = None

    def __post_init__(self) -> None:
        if len(self.index) != len(self.buffer.shape):
            raise TypeError(f"store to {self.buffer.name}: {len(self.index)} indices for shape {self.buffer.shape}")
        if self.value.dtype != self.buffer.dtype:
            raise TypeError(f"store of {self.value.dtype} to {self.buffer.name}, which is {self.buffer.dtype}")


@dataclass(frozen=True, eq=False)
class If(Stmt):
    """A branch on a scalar bool."""

    cond: Expr
    then: Block
    orelse: Block = ()


@dataclass(frozen=True, eq=False)
class Window:
    """A place in a buffer, as an operand of an intrinsic: the element at ``index`` and what follows it."""

    buffer: Buffer
    index: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Intrinsic:
    """A device's instruction as a library function: ``body`` over ``params`` is its meaning."""

    name: str
    params: tuple[Buffer, ...]
    body: Block = ()


@dataclass(frozen=True, eq=False)
class Call(Stmt):
    """Issue an intrinsic on windows of buffers."""

    intrinsic: Intrinsic
    operands: tuple[Window, ...]


@dataclass(frozen=True, eq=False)
class Kernel:
    """One function of device code. ``body`` is either one parallel loop or a serial block.

    ``locals`` are its regs, stack and scratch buffers; ``origin`` names the ONNX nodes it computes.
    """

    name: str
    params: tuple[Buffer, ...]
    body: Block
    locals: tuple[Buffer, ...] = ()
    origin: tuple[str, ...] = ()

    @property
    def parallel(self) -> Var | None:
        """The variable of the top-level parallel loop, or None for a serial kernel."""
        first = self.body[0] if len(self.body) == 1 else None
        return first.var if isinstance(first, For) and first.kind == "parallel" else None


PREFETCH = Intrinsic("prefetch", (Buffer("address", "int8", (1,)),))


def statements(block: Block) -> Iterator[Stmt]:
    """Every statement of a block, outer before inner."""
    for statement in block:
        yield statement
        if isinstance(statement, For):
            yield from statements(statement.body)
        elif isinstance(statement, If):
            yield from statements(statement.then)
            yield from statements(statement.orelse)


def loads(e: Expr) -> list[Load]:
    """Every load in an expression, inner before outer, each once."""
    found: list[Load] = []
    _collect_loads(e, set(), found)
    return found


def _has_loads(e: Expr) -> bool:
    """Whether there is a load in an expression; most indices have none, and are looked at again and again."""
    known: bool | None = e.__dict__.get("_loads")
    if known is None:
        known = isinstance(e, Load) or any(map(_has_loads, e.children()))
        e.__dict__["_loads"] = known
    return known


def _collect_loads(e: Expr, seen: set[int], found: list[Load]) -> None:
    if not _has_loads(e) or id(e) in seen:
        return
    seen.add(id(e))
    for child in e.children():
        _collect_loads(child, seen, found)
    if isinstance(e, Load):
        found.append(e)


def expressions(s: Stmt) -> tuple[Expr, ...]:
    """The expressions that stand in a statement itself, not in its blocks."""
    if isinstance(s, Store):
        return (*s.index, s.value) if s.mask is None else (*s.index, s.value, s.mask)
    if isinstance(s, If):
        return (s.cond,)
    if isinstance(s, Call):
        return tuple(i for w in s.operands for i in w.index)
    return ()


@cache
def effects(intrinsic: Intrinsic) -> tuple[tuple[bool, bool], ...]:
    """For each parameter of an intrinsic: whether its body reads it, and whether its body stores to it."""
    within = list(statements(intrinsic.body))
    read = {access.buffer.name for s in within for e in expressions(s) for access in loads(e)}
    stored = {s.buffer.name for s in within if isinstance(s, Store)}
    return tuple((p.name in read, p.name in stored) for p in intrinsic.params)


def written(kernel: Kernel) -> frozenset[str]:
    """Names of the parameters that the kernel stores to."""
    names: set[str] = set()
    for s in statements(kernel.body):
        if isinstance(s, Store):
            names.add(s.buffer.name)
        elif isinstance(s, Call):
            names.update(w.buffer.name for w, (_, stored) in zip(s.operands, effects(s.intrinsic)) if stored)
    return frozenset(p.name for p in kernel.params if p.name in names)
