"""Computes: "out[i] = expression over loads at indices, maybe reduced", as data, and the body of a region made of them.

The idea is that of pytato's IndexLambda: every operator that is not special becomes one of these, and fusion is
substitution. Expressions are scalar Tensor IR; their loads name values of the region in ONNX's own axes ("logical"
buffers), whatever their layout in memory will be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from nestc.errors import UnsupportedOp
from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.small import storage
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant
from nestc.tensor.ir import Binary, Buffer, Cast, Const, Expr, Kernel, Load, Select, Unary, Var
from nestc.tensor.rewrite import binary, select, substitute, transform

Index: TypeAlias = tuple[Expr, ...]

TRANSCENDENTAL = frozenset("exp log sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf pow atan2".split())


@dataclass(frozen=True)
class Compute:
    """Elements ``offset + axes`` of a value: ``expr``, combined over ``reduce`` with ``op`` (add, mul, min, max).

    ``finish`` is the value of an element in terms of `accumulator(dtype)`, the combined expression; None if it is that.
    """

    axes: tuple[Var, ...]
    expr: Expr
    reduce: tuple[Var, ...] = ()
    op: str = "add"
    finish: Expr | None = None
    offset: tuple[int, ...] = ()


@dataclass(frozen=True)
class Value:
    """A value given by one Compute, or by several that cover disjoint parts of it (Concat)."""

    name: str
    type: TensorType
    pieces: tuple[Compute, ...]

    @property
    def simple(self) -> Compute | None:
        """The Compute if it is the only one and reduces nothing, so that it may be substituted into readers."""
        piece = self.pieces[0]
        return piece if len(self.pieces) == 1 and not piece.reduce else None


@dataclass(frozen=True)
class Native:
    """A kernel written by hand over plain values: ``args[i]`` is the value that ``kernel.params[i]`` stands for."""

    kernel: Kernel
    args: tuple[str, ...]
    outputs: tuple[str, ...]


Stage: TypeAlias = Value | Native


def accumulator(dtype: str) -> Load:
    """Stands for the combined value in `Compute.finish`."""
    return Load(Buffer("$accumulator", dtype, ()), ())


def identity_of(op: str, dtype: str) -> Const:
    """What a reduction starts from."""
    if op in ("add", "mul"):
        value = constant(int(op == "mul"), dtype)
    elif dtype == "bool":
        value = Const(op == "min", dtype)
    elif "float" in dtype:
        value = Const(float("-inf") if op == "max" else float("inf"), dtype)
    else:
        bits = int(dtype.lstrip("uint"))
        low, high = (0, (1 << bits) - 1) if dtype.startswith("u") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        value = Const(low if op == "max" else high, dtype)
    assert isinstance(value, Const)
    return value


def nodes(e: Expr) -> Iterator[Expr]:
    """Every distinct node of an expression, operands first."""
    seen: set[int] = set()

    def walk(x: Expr) -> Iterator[Expr]:
        if id(x) in seen:
            return
        seen.add(id(x))
        for child in x.children():
            yield from walk(child)
        yield x

    return walk(e)


def loads(e: Expr) -> list[Load]:
    """The distinct loads of an expression."""
    return list(dict.fromkeys(n for n in nodes(e) if isinstance(n, Load)))


def is_lookup(e: Load) -> bool:
    """Whether a load takes an entry of a table of 256 bytes, which code generators do for many lanes at once."""
    index = e.index[0] if len(e.index) == 1 else None
    table = e.buffer.shape == (256,) and e.buffer.dtype in ("int8", "uint8")
    return table and isinstance(index, Cast) and index.x.dtype == "uint8"


def cost(e: Expr) -> int:
    """A rough number of instructions for one element (or one vector); what moves data by a plain load is free."""
    total = 0
    for n in nodes(e):
        if isinstance(n, Load):
            total += 1
        elif isinstance(n, (Unary, Binary)) and n.op in TRANSCENDENTAL:
            total += 20
        elif isinstance(n, Binary) and n.dtype == "int64" and n.op in ("add", "sub", "mul"):
            continue  # nearly always an address
        elif isinstance(n, Binary) and n.op in ("div", "rem", "mod", "floordiv"):
            total += 4
        elif isinstance(n, (Unary, Binary, Select, Cast)):
            total += 1
    return total


def mask_loads(e: Expr, mask: Expr) -> Expr:
    """`e` with every load done only where `mask` holds."""

    def visit(n: Expr) -> Expr | None:
        if not isinstance(n, Load) or n.buffer.shape == ():
            return None
        return Load(n.buffer, n.index, n.lanes, mask if n.mask is None else binary("and", mask, n.mask))

    return transform(e, visit)


def inline(target: Load, producer: Compute) -> Expr:
    """The producer's expression at the place that `target` reads, 0 where its mask does not hold."""
    value = substitute(producer.expr, dict(zip(producer.axes, target.index)))
    if target.mask is None:
        return value
    return select(target.mask, mask_loads(value, target.mask), constant(0, value.dtype))


def truth(e: Expr | None) -> Expr | None:
    """None for a mask that always holds."""
    return None if isinstance(e, Const) and e.value else e


def clamped(index: Expr, extent: int) -> Expr:
    """An index that comes from data: counted from the end if negative, then limited to the extent."""
    wrapped = select(binary("lt", index, ix.const(0)), binary("add", index, ix.const(extent)), index)
    return binary("min", binary("max", wrapped, ix.const(0)), ix.const(max(0, extent - 1)))


@dataclass
class Body:
    """The values of a region as they are being defined by the operators' rules."""

    region: Region
    stages: list[Stage] = field(default_factory=list)
    types: dict[str, TensorType] = field(default_factory=dict)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    _count: int = 0

    def __post_init__(self) -> None:
        self.types.update(self.region.types)

    # -- what rules ask

    def type(self, name: str) -> TensorType:
        """Type of a value."""
        return self.types[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a value."""
        return self.types[name].shape

    def dtype(self, name: str) -> str:
        """Element type of a value, as kernels see it in memory."""
        return storage(self.types[name].dtype)

    def constant(self, op: Op, position: int) -> np.ndarray:
        """A constant operand. Raises UnsupportedOp if it is not one."""
        array = self.region.constant(op.input(position))
        if array is None:
            where = f"{op.op_type} (node {op.name!r})"
            raise UnsupportedOp(f"{where}: input {position} ({op.input(position)!r}) must be known when compiling")
        return np.asarray(array)

    def read(self, name: str, index: Sequence[Expr], mask: Expr | None = None) -> Expr:
        """An element of a value; where `mask` is false it is 0 and the index does not matter."""
        type_ = self.types[name]
        return Load(Buffer(name, storage(type_.dtype), type_.shape), tuple(index), 1, truth(mask))

    def axes(self, shape: Sequence[int]) -> tuple[Var, ...]:
        """New loop variables."""
        self._count += 1
        return tuple(Var(f"c{self._count}_{d}", extent) for d, extent in enumerate(shape))

    # -- what rules define

    def temporary(self, dtype: str, shape: Sequence[int]) -> str:
        """The name of a new value that no operator of the region has."""
        self._count += 1
        name = f"{self.region.name}.t{self._count}"
        self.types[name] = TensorType(dtype, tuple(shape))
        return name

    def literal(self, array: np.ndarray) -> str:
        """The name of a new constant."""
        name = self.temporary(str(array.dtype), array.shape)
        self.constants[name] = array
        return name

    def map(self, name: str, function: Callable[[tuple[Var, ...]], Expr]) -> None:
        """Define a value by an expression of its index."""
        axes = self.axes(self.shape(name))
        self._define(name, (Compute(axes, function(axes)),))

    def combine(
        self,
        name: str,
        extents: Sequence[int],
        op: str,
        function: Callable[[tuple[Var, ...], tuple[Var, ...]], Expr],
        finish: Callable[[Expr], Expr] | None = None,
    ) -> None:
        """Define a value as the combination of `function(axes, reduced)` over `extents`, then `finish` of it."""
        axes, reduced = self.axes(self.shape(name)), self.axes(extents)
        expr = function(axes, reduced)
        final = None if finish is None else finish(accumulator(expr.dtype))
        if not reduced:  # nothing to combine
            done = expr if final is None else transform(final, lambda n: expr if n == accumulator(expr.dtype) else None)
            self._define(name, (Compute(axes, done),))
            return
        self._define(name, (Compute(axes, expr, reduced, op, final),))

    def parts(
        self, name: str, parts: Sequence[tuple[Sequence[int], Sequence[int], Callable[[tuple[Var, ...]], Expr]]]
    ) -> None:
        """Define a value by parts (offset, shape, expression of the index within the part) that cover it."""
        pieces: list[Compute] = []
        for offset, shape, function in parts:
            if 0 in shape:
                continue
            axes = self.axes(shape)
            pieces.append(Compute(axes, function(axes), offset=tuple(offset)))
        if len(pieces) == 1:
            pieces = [Compute(pieces[0].axes, pieces[0].expr)]
        if not pieces:
            self.map(name, lambda axes: constant(0, self.dtype(name)))
            return
        self._define(name, tuple(pieces))

    def alias(self, name: str, source: str) -> None:
        """Define a value as another one of the same shape."""
        self.map(name, lambda axes: self.read(source, axes))

    def kernel(self, builder: Builder, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
        """Add a kernel written by hand; `inputs` and `outputs` map its parameters to values."""
        kernel = builder.finish(self.region.origin)
        names = {**inputs, **outputs}
        self.stages.append(Native(kernel, tuple(names[p.name] for p in kernel.params), tuple(outputs.values())))

    def _define(self, name: str, pieces: tuple[Compute, ...]) -> None:
        type_ = self.types[name]
        for piece in pieces:
            result = piece.expr if piece.finish is None else piece.finish
            if result.dtype != storage(type_.dtype):
                where = f"region {self.region.name}: {name!r}"
                raise UnsupportedOp(f"{where} is {type_.dtype} but was computed as {result.dtype}")
        self.stages.append(Value(name, type_, pieces))


__all__ = [
    "TRANSCENDENTAL",
    "Body",
    "Compute",
    "Index",
    "Native",
    "Stage",
    "Value",
    "accumulator",
    "clamped",
    "cost",
    "identity_of",
    "inline",
    "is_lookup",
    "loads",
    "mask_loads",
    "nodes",
    "truth",
]
