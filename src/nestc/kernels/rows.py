"""What the kernels that work row by row share: merged axes, walks over a row by vectors, and rows per parallel item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, select, splat
from nestc.tensor.ir import Binary, Buffer, Expr, Load, Ramp, Reduce
from nestc.tensor.rewrite import cast

HALVES = frozenset({"float16", "bfloat16"})
FLOATS = HALVES | {"float32", "float64"}
_ITEM_COST = 16_000  # least work of a parallel item, in elements times passes: some 5 us
_ITEMS = 128


def work_dtype(dtype: str) -> str:
    """The type in which values of `dtype` are computed."""
    return "float32" if dtype in HALVES else dtype


def merge_axes(region: Region, anchor: Op, fixed: Sequence[str], groups: Sequence[Sequence[int]]) -> Region | str:
    """The region with axes of the anchor's output merged, or why that cannot be.

    `groups` lists the axes of each new axis, in order. Operands of the tail (all but the `fixed` ones, which only the
    anchor reads) must be whole or broadcast along every group. Data stays where it is: only the types change.
    """
    full = region.types[anchor.outputs[0]].shape
    types: dict[str, TensorType] = {}
    for name, type_ in region.types.items():
        if name in fixed:
            types[name] = type_
            continue
        shape = (1,) * (len(full) - len(type_.shape)) + type_.shape
        merged: list[int] = []
        for axes in groups:
            own, whole = [shape[a] for a in axes], [full[a] for a in axes]
            if own != whole and any(n != 1 for n in own):
                return f"{name!r} of shape {type_.shape} is broadcast along some of the axes that are merged"
            merged.append(prod(own))
        types[name] = TensorType(type_.dtype, tuple(merged))
    if any(op.op_type in ("QuantizeLinear", "DequantizeLinear") and op is not anchor for op in region.ops):
        return "a quantization in its tail names an axis"

    def reader(name: str) -> Callable[[], np.ndarray]:
        return lambda: region.constants[name]().reshape(types[name].shape)

    return replace(region, types=types, constants={name: reader(name) for name in region.constants})


def rows_per_item(rows: int, cost: int) -> int:
    """A divisor of `rows`: how many of them, at `cost` each, make a parallel item."""
    wanted = max(1, min(_ITEMS, rows * cost // _ITEM_COST))
    return max((d for d in range(1, rows // wanted + 1) if rows % d == 0), default=1)


class Row:
    """Walks over n elements by vectors: groups of `unroll` accumulators, single vectors, and one that is cut short.

    A row may have several segments of n elements; while it is walked, `segment` is the number of the one at hand.
    """

    def __init__(self, builder: Builder, n: int, lanes: int, dtype: str, unroll: int = 4, segments: int = 1) -> None:
        self.k, self.n, self.lanes, self.dtype = builder, n, lanes, dtype
        self.segments = segments
        self.segment: Expr = ix.const(0)
        self.unroll = max(1, min(unroll, n // lanes))

    def walk(self, body: Callable[[Expr, int, Expr | None], None], unroll: int = 0) -> None:
        """Emit ``body(start, accumulator, mask)`` for every vector; the mask is None for whole ones."""
        with self.k.loop("segment", self.segments) as self.segment:
            self._walk(body, unroll or self.unroll)

    def _walk(self, body: Callable[[Expr, int, Expr | None], None], wide: int) -> None:
        full = self.n // self.lanes
        with self.k.loop("i", full // wide) as i:
            for u in range(wide):
                body(ix.add(ix.mul(i, wide * self.lanes), u * self.lanes), u, None)
        for u in range(full % wide):
            body(ix.const((full - full % wide + u) * self.lanes), u, None)
        if self.n % self.lanes:
            start = full * self.lanes
            inside = Binary("lt", Ramp(ix.const(start), 1, self.lanes), splat(ix.const(self.n), self.lanes))
            body(ix.const(start), full % wide, inside)

    def reduce(self, op: str, value: Callable[[Expr, Expr | None], Expr], identity: float) -> Expr:
        """`op` over ``value(start, mask)`` of all vectors, as a scalar; what a mask cuts off counts as `identity`."""
        k, lanes, dtype = self.k, self.lanes, self.dtype
        acc = k.regs(op, (self.unroll,), lanes, dtype)
        for u in range(self.unroll):
            k.store(acc, (u, 0), constant(identity, dtype, lanes))

        def body(start: Expr, u: int, mask: Expr | None) -> None:
            x = value(start, mask)
            x = x if mask is None else select(mask, x, constant(identity, dtype, lanes))
            k.store(acc, (u % self.unroll, 0), Binary(op, load_register(acc, u % self.unroll, lanes), x))

        self.walk(body)
        total = load_register(acc, 0, lanes)
        for u in range(1, self.unroll):
            total = Binary(op, total, load_register(acc, u, lanes))
        result = k.regs(f"{op}_of_row", (), 1, dtype)
        k.store(result, (0,), Reduce(op, total))
        return Load(result, (ix.const(0),))


def load_register(buffer: Buffer, i: int, lanes: int) -> Expr:
    """One of the vectors of a register buffer."""
    return Load(buffer, (ix.const(i), ix.const(0)), lanes)


def widen(value: Expr) -> Expr:
    """A value in its work dtype."""
    return cast(value, work_dtype(value.dtype))
