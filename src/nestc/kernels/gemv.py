"""Products with few columns (or few rows) and long k: every output is a dot product of two contiguous vectors."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import CpuMachine, Lowered
from nestc.kernels.gemm_pack import pack_columns
from nestc.kernels.gemm_shape import (
    ITEM_PRODUCTS,
    ITEMS,
    Product,
    accumulation_dtype,
    divisors,
    lanes_below,
    scaled_stores,
)
from nestc.kernels.operands import Operands
from nestc.kernels.tail import Tail
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, load
from nestc.tensor.ir import Binary, Expr, Fma, Load, Reduce
from nestc.tensor.rewrite import binary, cast

_FEW = 4  # vectors that are kept beside each row
_ACCUMULATORS = 12


def dot_refusal(product: Product, region: Region, machine: CpuMachine) -> str | None:
    """Why a product is better computed in tiles; None if as dot products."""
    p = product
    if p.transposed_a:
        return "the rows of its left operand are not contiguous"
    if p.k < 4 * machine.lanes(accumulation_dtype(region.types[p.a].dtype)):
        return "its dot products are short"
    if p.n <= _FEW:
        if p.b in region.constants or p.transposed_b or p.vector_b:
            return None
        return "the columns of its right operand are not contiguous"
    if p.m <= _FEW and p.transposed_b and p.b not in region.constants:
        return None
    return "it has many rows and columns"


def lower_dot(region: Region, op: Op, product: Product, machine: CpuMachine) -> Lowered:
    """One launch; parallel items are (batch, group of rows)."""
    return _Dot(region, op, product, machine).lower()


class _Dot:
    """`rows` x `few` dot products: the long side is the rows of `a`, or the columns of `b` if `a` has few rows."""

    def __init__(self, region: Region, op: Op, product: Product, machine: CpuMachine) -> None:
        self.region, self.op, self.product = region, op, product
        self.dtype = accumulation_dtype(region.types[product.a].dtype)
        self.lanes = machine.lanes(self.dtype)
        self.by_rows = product.n <= _FEW
        self.few, self.many = (product.n, product.m) if self.by_rows else (product.m, product.n)
        self.tile = min(self.many, 4, _ACCUMULATORS // self.few)
        self.split = max(1, min(4, 8 // (self.tile * self.few), product.k // self.lanes))
        self.k = Builder("dot")
        self.operands = Operands(self.k, region, {})

    def lower(self) -> Lowered:
        """The launch, and the columns of a constant `b`."""
        p, operands = self.product, self.operands
        constants: dict[str, np.ndarray] = {}
        operands.buffer(p.a)
        self.scale, self.columns = p.alpha, ""
        if p.b in self.region.constants:
            self.scale, self.columns = 1.0, f"{p.b}.columns"
            constants[self.columns] = pack_columns(p, self.region, self.dtype)
            operands.define(self.columns, TensorType(self.dtype, constants[self.columns].shape))
        operands.buffer(self.columns or p.b)
        self.tail = Tail(operands, self.op)
        self.tail.declare()
        self.build()
        return Lowered((operands.launch(),), constants={**self.named_constants(), **constants})

    def named_constants(self) -> Mapping[str, np.ndarray]:
        """Constants of the region that the tail reads."""
        return self.operands.constants

    def build(self) -> None:
        """The parallel loop over groups of rows; the last group takes the rows that are left over."""
        k, p = self.k, self.product
        shape = (self.split, self.tile, self.few)
        self.acc = k.regs("acc", shape, self.lanes, self.dtype)
        self.kept = k.regs("kept", (self.few,), self.lanes, self.dtype)
        full, rest = divmod(self.many, self.tile)
        items = max(1, min(ITEMS, prod(p.batch) * p.m * p.n * p.k // ITEM_PRODUCTS))
        groups = next((d for d in divisors(full) if d * prod(p.batch) >= items), full)
        with k.parallel("item", prod(p.batch), groups) as (n, group):
            batch = ix.unflatten(n, p.batch)
            with k.loop("tile_row", full // groups) as t:
                row = ix.mul(ix.add(ix.mul(group, full // groups), t), self.tile)
                self.rows(batch, row, self.tile)
            if rest:
                with k.when(binary("eq", group, ix.const(groups - 1))):
                    self.rows(batch, ix.const(full * self.tile), rest)

    def rows(self, batch: tuple[Expr, ...], row: Expr, count: int) -> None:
        """The dot products of `count` neighbours of the long side with all of the short one."""
        k, lanes, depth = self.k, self.lanes, self.product.k
        places = [(s, r, c) for s in range(self.split) for r in range(count) for c in range(self.few)]
        for place in places:
            k.store(self.acc, (*place, 0), constant(0, self.dtype, lanes))
        step = lanes * self.split
        with k.loop("k", depth // step) as p:
            for s in range(self.split):
                self.step(batch, row, count, ix.add(ix.mul(p, step), s * lanes), s, None)
        for s, start in enumerate(range(depth - depth % step, depth, lanes)):
            inside = None if start + lanes <= depth else lanes_below(ix.const(start), depth, lanes)
            self.step(batch, row, count, ix.const(start), s, inside)
        for r in range(count):
            for c in range(self.few):
                total: Expr = load(self.acc, 0, r, c, 0, lanes=lanes)
                for s in range(1, self.split):
                    total = Binary("add", total, load(self.acc, s, r, c, 0, lanes=lanes))
                long, short = ix.add(row, r), ix.const(c)
                place = (batch, long, short) if self.by_rows else (batch, short, long)
                product = self.product
                k.emit(scaled_stores(product, self.operands, self.tail, place, Reduce("add", total), self.scale))

    def step(self, batch: tuple[Expr, ...], row: Expr, count: int, at: Expr, s: int, mask: Expr | None) -> None:
        """One vector of k."""
        k, lanes = self.k, self.lanes
        fetch_long, fetch_short = (self.a, self.b) if self.by_rows else (self.b, self.a)
        for c in range(self.few):
            k.store(self.kept, (c, 0), fetch_short(batch, ix.const(c), at, mask))
        for r in range(count):
            value = fetch_long(batch, ix.add(row, r), at, mask)
            for c in range(self.few):
                acc = (s, r, c, 0)
                k.store(
                    self.acc, acc, Fma(value, load(self.kept, c, 0, lanes=lanes), load(self.acc, *acc, lanes=lanes))
                )

    def a(self, batch: tuple[Expr, ...], row: Expr, at: Expr, mask: Expr | None) -> Expr:
        """A vector of a row of `a`."""
        index = self.product.a_index(batch, row, at)
        return cast(Load(self.operands.buffer(self.product.a), index, self.lanes, mask), self.dtype)

    def b(self, batch: tuple[Expr, ...], column: Expr, at: Expr, mask: Expr | None) -> Expr:
        """A vector of a column of `b`."""
        p = self.product
        if self.columns:
            return Load(self.operands.buffer(self.columns), (p.b_matrix(batch), column, at), self.lanes, mask)
        index = p.b_index(batch, at, column)
        return cast(Load(self.operands.buffer(p.b), index, self.lanes, mask), self.dtype)
