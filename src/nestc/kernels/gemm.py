"""MatMul and Gemm as one register-tiled kernel over panels of `b`, with the elementwise tail at the store.

The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008), without packing
`a`: its rows are broadcast from where they lie, and a tile of them stays in L1 while panels of `b` come from L2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered
from nestc.kernels.choices import GEMM_BY_RULE, GemmChoice, below
from nestc.kernels.gemm_pack import pack_constant, pack_launch
from nestc.kernels.gemm_shape import (
    Blocks,
    Product,
    Tile,
    accumulation_dtype,
    choose_blocks,
    choose_parts,
    choose_tile,
    choose_tiles,
    lanes_below,
    product_of,
    scaled_stores,
    split_of,
)
from nestc.kernels.gemv import dot_refusal, lower_dot
from nestc.kernels.operands import Operands
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, clamp, constant, less, load, splat
from nestc.tensor.ir import Binary, Const, Expr, Fma, Load, Stmt, Var
from nestc.tensor.rewrite import binary, cast
from nestc.tensor.vectorize import vectorize

_FLOATS = frozenset({"float32", "float64", "float16", "bfloat16"})
_INTEGERS = frozenset({"int32", "int64", "uint32", "uint64"})
_CACHE_LINE = 64
_UNROLL = 8  # steps of k written out in the inner loop where k has that many factors; half as many else
_LONG_SUM = 512  # products of a sum that may be worth cutting, to be measured
_OTHER_TILES = 3  # worth measuring
_HEAVY = frozenset("Celu Cos Elu Erf Exp Gelu Log Mish Pow Selu Sigmoid Sin Softplus Swish Tanh".split())


class GemmFamily:
    """MatMul and Gemm of any rank and broadcasting, on floats (half types computed in float32) and wide integers.

    What `choice` leaves open goes by rule; products with a vector have no such parameters.
    """

    def __init__(self, choice: GemmChoice = GEMM_BY_RULE) -> None:
        self.choice = choice
        self.name = f"gemm{choice.text}"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        op = _anchor(region)
        if op is None:
            return "its anchor is neither MatMul nor Gemm"
        dtype = region.types[op.inputs[0]].dtype
        if dtype not in _FLOATS | _INTEGERS:
            return f"{op.op_type} (node {op.name!r}) on {dtype} is not for this family"
        if dtype in _INTEGERS and op.op_type == "Gemm":
            return f"Gemm (node {op.name!r}) on {dtype} is not for this family"
        if any(0 in region.types[name].shape for name in (*op.inputs[:2], op.outputs[0])):
            return f"{op.op_type} (node {op.name!r}) has an axis of size 0"
        return tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything row-major."""
        return dict.fromkeys((*region.inputs, *region.outputs), PLAIN)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One launch, after one that packs `b` where that is needed while running."""
        op = _anchor(region)
        assert op is not None
        product = product_of(op, region)
        if dot_refusal(product, region, machine) is None:
            return lower_dot(region, op, product, machine)
        return _Gemm(region, op, product, machine, self.choice).lower()


def _anchor(region: Region) -> Op | None:
    return next((op for op in region.ops if op.op_type in ("MatMul", "Gemm") and not op.domain), None)


def _beside_constants(machine: CpuMachine) -> CpuMachine:
    """The machine with fewer registers for a tile: where there are many, LLVM keeps constants of a heavy tail in some
    through the whole kernel."""
    return replace(machine, vector_registers=machine.vector_registers - 6) if machine.vector_registers > 16 else machine


@dataclass(frozen=True)
class _Place:
    """Which rows a piece of code is about: `rows` of them from `row`, for one part of k; `slot` numbers the tile."""

    batch: tuple[Expr, ...]
    part: Expr
    ib: Expr
    slot: Expr
    row: Expr
    rows: int


class _Gemm:
    """Builds the kernel of one product.

    Parallel items are (batch, group of panels, group of row tiles), the rows moving fastest, so that the next item of a
    worker finds its panels in L2.
    """

    def __init__(
        self, region: Region, op: Op, product: Product, machine: CpuMachine, choice: GemmChoice = GEMM_BY_RULE
    ) -> None:
        self.region, self.op, self.product, self.machine = region, op, product, machine
        self.dtype = accumulation_dtype(region.types[product.a].dtype)
        self.lanes = machine.lanes(self.dtype)
        self.size = {"float64": 8, "int64": 8, "uint64": 8}.get(self.dtype, 4)
        self.heavy = any(op.op_type in _HEAVY for op in region.ops) or len(region.ops) > 5
        self.roomy = _beside_constants(machine) if self.heavy else machine
        self.tile = self.register_tile(choice)
        self.width = self.tile.vectors * self.lanes
        self.panels = ceil(product.n / self.width)
        self.blocks = self.item_blocks(choice)
        self.direct = self.reads_b_directly()
        self.parts = self.parts_of_k(choice)
        self.ahead = self.reads_ahead()
        self.k = Builder("gemm")
        self.operands = Operands(self.k, region, {})

    def register_tile(self, choice: GemmChoice) -> Tile:
        """The tile that was chosen, no larger than what there is; else by rule."""
        p, machine = self.product, self.roomy
        if choice.tile is None:
            return choose_tile(p.m, p.n, self.lanes, machine)
        rows, vectors = min(choice.tile[0], p.m, machine.tile_registers), min(choice.tile[1], ceil(p.n / self.lanes))
        return Tile(rows, vectors, split_of(rows, vectors, machine))

    def item_blocks(self, choice: GemmChoice) -> Blocks:
        """Tiles and panels of a parallel item."""
        p = self.product
        if choice.items is None:
            return choose_blocks(p, self.tile, self.lanes, self.size, self.machine)
        return Blocks(below(max(1, p.m // self.tile.rows), choice.items[0]), below(self.panels, choice.items[1]))

    def parts_of_k(self, choice: GemmChoice) -> int:
        """How many parts k is summed in, each of whole steps."""
        p, step = self.product, _UNROLL // 2
        if choice.parts is None:
            return 1 if p.m <= 2 * self.tile.rows else choose_parts(p.k, step)
        fitting = (d for d in range(min(p.k, choice.parts), 1, -1) if p.k % d == 0 and p.k // d % step == 0)
        return next(fitting, 1)

    def reads_b_directly(self) -> bool:
        """Whether the rows of a `b` that is not constant are read where they lie.

        Packing costs about as much as two row tiles. Long rows make the panel's lines fall into few sets of the caches.
        """
        p = self.product
        if p.b in self.region.constants or p.transposed_b or p.vector_b:
            return False
        if self.region.types[p.b].dtype != self.dtype:
            return False
        small = p.n * self.size <= 1024 and p.n * p.k * self.size <= self.machine.l2_bytes // 2
        return small or p.m <= 2 * self.tile.rows

    def reads_ahead(self) -> bool:
        """Whether the next panels are asked for in time: where all of them do not fit L2, and are used often enough."""
        p = self.product
        constant_bytes = prod(p.b_batch) * p.n * p.k * self.size if p.b in self.region.constants else 0
        return constant_bytes > self.machine.l2_bytes // 2 and p.m >= 4 * self.tile.rows

    def lower(self) -> Lowered:
        """The launches, the packed weights, and the temporary for panels packed while running."""
        p, operands = self.product, self.operands
        launches: list[Launch] = []
        temporaries: dict[str, TensorType] = {}
        constants: dict[str, np.ndarray] = {}
        operands.buffer(p.a)
        self.scale = p.alpha
        if self.direct:
            self.b = operands.buffer(p.b)
        else:
            name = f"{p.b}.panels"
            if p.b in self.region.constants:
                constants[name] = pack_constant(p, self.region, self.width, self.dtype)
                type_ = TensorType(self.dtype, constants[name].shape)
                self.scale = 1.0
            else:
                launch, type_ = pack_launch(p, self.region, self.width, self.lanes, self.dtype, name)
                launches.append(launch)
                temporaries[name] = type_
            operands.define(name, type_)
            self.b = operands.buffer(name)
        self.tail = Tail(operands, self.op)
        self.tail.declare()
        self.build()
        launches.append(operands.launch())
        return Lowered(tuple(launches), temporaries, {**operands.constants, **constants})

    def build(self) -> None:
        """The parallel loop and, within an item, its row tiles."""
        k, p, t = self.k, self.product, self.tile
        self.acc = k.regs("acc", (t.split, t.rows, t.vectors), self.lanes, self.dtype)
        self.row = k.regs("a", (t.rows,), self.lanes, self.dtype)
        self.column = k.regs("b", (t.vectors,), self.lanes, self.dtype)
        if self.heavy or p.n == 1:
            self.finished = k.stack("tile", (t.rows, self.width), self.dtype)
        full, rest = divmod(p.m, t.rows)
        down, across = self.blocks.tiles, self.blocks.panels
        groups = max(1, full) // down
        if self.parts > 1:
            self.partial = k.scratch("partial", (down + 1, t.rows, across * self.width), self.dtype)
        with k.parallel("item", prod(p.batch), self.panels // across, groups) as (n, jb, ib):
            batch = ix.unflatten(n, p.batch)
            with k.loop("part", self.parts) as part:
                if full:
                    with k.loop("tile_row", down) as ti:
                        row = ix.mul(ix.add(ix.mul(ib, down), ti), t.rows)
                        self.row_tile(_Place(batch, part, ib, ti, row, t.rows), jb)
                if rest:
                    with k.when(binary("eq", ib, ix.const(groups - 1))):
                        row = ix.const(full * t.rows)
                        self.row_tile(_Place(batch, part, ib, ix.const(down), row, rest), jb)

    def row_tile(self, at: _Place, jb: Expr) -> None:
        """The item's panels for one tile of rows; a panel that reaches past the last column has code of its own."""
        k, p = self.k, self.product
        last, always = ix.const(self.panels - 1), Const(True, "bool")
        with k.loop("panel", self.blocks.panels) as pj:
            panel = ix.add(ix.mul(jb, self.blocks.panels), pj)
            cases = [(always, panel)]
            if p.n % self.width and self.panels > 1:
                cases = [(less(panel, last), clamp(panel, 0, self.panels - 2)), (binary("eq", panel, last), last)]
            if not self.direct:
                self.sum_over_k(at, panel, pj)
            for case, exact in cases:
                with k.when(case):
                    if self.direct:
                        self.sum_over_k(at, exact, pj)
                    with k.when(binary("eq", at.part, ix.const(self.parts - 1))):
                        self.finish(at, exact)
            if self.parts > 1:
                with k.when(less(at.part, self.parts - 1)):
                    self.keep(at, pj)

    def keep(self, at: _Place, pj: Expr) -> None:
        """Put the sums so far aside."""
        for r in range(at.rows):
            for c in range(self.tile.vectors):
                place = (at.slot, r, ix.add(ix.mul(pj, self.width), c * self.lanes))
                self.k.store(self.partial, place, load(self.acc, 0, r, c, 0, lanes=self.lanes))

    def clear(self, at: _Place, pj: Expr) -> None:
        """Accumulators to zero, or to the sums over the parts of k that are done."""
        k, t, lanes = self.k, self.tile, self.lanes
        places = [(s, r, c) for s in range(t.split) for r in range(at.rows) for c in range(t.vectors)]
        for place in places:
            k.store(self.acc, (*place, 0), constant(0, self.dtype, lanes))
        if self.parts == 1:
            return
        with k.when(less(0, at.part)):
            for r in range(at.rows):
                for c in range(t.vectors):
                    done = load(self.partial, at.slot, r, ix.add(ix.mul(pj, self.width), c * lanes), lanes=lanes)
                    k.store(self.acc, (0, r, c, 0), done)

    def sum_over_k(self, at: _Place, panel: Expr, pj: Expr) -> None:
        """Leave the tile's sums over one part of k in the accumulators."""
        k, t, depth, rows = self.k, self.tile, self.product.k // self.parts, at.rows
        first = ix.mul(at.part, depth)
        self.clear(at, pj)
        step = _UNROLL if depth % _UNROLL == 0 and depth > 8 * _UNROLL else max(_UNROLL // 2, t.split)
        with k.loop("k", depth // step) as p:
            start = ix.add(first, ix.mul(p, step))
            for u in range(step):
                self.step(at, panel, ix.add(start, u), u % t.split)
            if self.ahead:
                self.prefetch(at, panel, start, step)
        for u in range(depth - depth % step, depth):
            self.step(at, panel, ix.const(u), u % t.split)
        for s in range(1, t.split):
            for r in range(rows):
                for c in range(t.vectors):
                    one, other = (load(self.acc, i, r, c, 0, lanes=self.lanes) for i in (0, s))
                    k.store(self.acc, (0, r, c, 0), Binary("add", one, other))

    def prefetch(self, at: _Place, panel: Expr, start: Expr, step: int) -> None:
        """Ask for a share of the cache lines of the panels that come next, so that their first tile does not wait.

        The tiles of a panel divide what `step` rows of the next one hold among themselves.
        """
        line = _CACHE_LINE // self.size
        lines = step * self.width // line
        number = ix.add(ix.mul(at.ib, self.blocks.tiles), at.slot)
        following = ix.mod(ix.add(panel, self.blocks.panels), self.panels)
        share = ceil(lines / (self.product.m // self.tile.rows))
        for s in range(share):
            which = ix.mod(ix.add(ix.mul(number, share), s), lines)
            self.k.prefetch(self.b, self.product.b_matrix(at.batch), following, start, ix.mul(which, line))

    def step(self, at: _Place, panel: Expr, depth: Expr, s: int) -> None:
        """One k: the shorter side of the tile is kept in registers, the longer one streams."""
        k, p, lanes, rows = self.k, self.product, self.lanes, at.rows

        def fetch_row(r: int) -> None:
            value = cast(self.operands.load(p.a, p.a_index(at.batch, ix.add(at.row, r), depth)), self.dtype)
            k.store(self.row, (r, 0), splat(value, lanes))

        def fetch_column(c: int) -> None:
            k.store(self.column, (c, 0), self.b_vector(at.batch, panel, depth, c))

        def multiply(r: int, c: int) -> None:
            a, b, acc = load(self.row, r, 0, lanes=lanes), load(self.column, c, 0, lanes=lanes), (s, r, c, 0)
            k.store(self.acc, acc, Fma(a, b, load(self.acc, *acc, lanes=lanes)))

        if rows < self.tile.vectors:
            for r in range(rows):
                fetch_row(r)
            for c in range(self.tile.vectors):
                fetch_column(c)
                for r in range(rows):
                    multiply(r, c)
            return
        for c in range(self.tile.vectors):
            fetch_column(c)
        for r in range(rows):
            fetch_row(r)
            for c in range(self.tile.vectors):
                multiply(r, c)

    def b_vector(self, batch: tuple[Expr, ...], panel: Expr, at: Expr, c: int) -> Expr:
        """Vector `c` of row `at` of a panel."""
        p, lanes = self.product, self.lanes
        if not self.direct:
            return load(self.b, self.product.b_matrix(batch), panel, at, c * lanes, lanes=lanes)
        start = ix.add(ix.mul(panel, self.width), c * lanes)
        low, high = ix.bounds(start)
        if high + lanes <= p.n:
            return load(self.b, *p.b_index(batch, at, start), lanes=lanes)
        if low >= p.n:
            return constant(0, self.dtype, lanes)
        lanes_inside = lanes_below(start, p.n, lanes)
        return load(self.b, *p.b_index(batch, at, start), lanes=lanes, mask=lanes_inside)

    def finish(self, at: _Place, panel: Expr) -> None:
        """Scale, add, run the tail and store."""
        k, lanes, rows = self.k, self.lanes, at.rows
        start = ix.mul(panel, self.width)
        if not self.heavy and self.product.n > 1:
            for r in range(rows):
                for c in range(self.tile.vectors):
                    lane = Var(f"lane{r}_{c}", lanes)
                    value = Load(self.acc, (ix.const(0), ix.const(r), ix.const(c), lane))
                    column = ix.add(start, c * lanes, lane)
                    k.emit(vectorize(self.stores(at.batch, ix.add(at.row, r), column, value), lane, ix.const(0), lanes))
            return
        for r in range(rows):
            for c in range(self.tile.vectors):
                k.store(self.finished, (r, c * lanes), load(self.acc, 0, r, c, 0, lanes=lanes))
        if self.product.n == 1:  # the output may have no axis of columns to store vectors along
            with k.loop("done_row", rows) as r:
                k.emit(self.stores(at.batch, ix.add(at.row, r), ix.const(0), load(self.finished, r, 0)))
            return
        with k.loop("done_row", rows) as r, k.loop("done_vector", self.tile.vectors) as c:
            lane = Var("lane", lanes)
            place = ix.add(ix.mul(c, lanes), lane)
            value = Load(self.finished, (r, place))
            statements = self.stores(at.batch, ix.add(at.row, r), ix.add(start, place), value)
            k.emit(vectorize(statements, lane, ix.const(0), lanes))

    def stores(self, batch: tuple[Expr, ...], row: Expr, column: Expr, value: Expr) -> tuple[Stmt, ...]:
        """Scalar stores of one element of the product."""
        return scaled_stores(self.product, self.operands, self.tail, (batch, row, column), value, self.scale)


GEMM = GemmFamily()


def gemm_ways(region: Region, machine: CpuMachine, around: GemmFamily = GEMM) -> tuple[GemmFamily, ...]:
    """`around`, and families that differ from it in one parameter; the other register tiles by their modelled cycles.

    Only `around` where there is nothing to choose: of a product with a vector, or of a region without product.
    """
    op = _anchor(region)
    product = None if op is None else product_of(op, region)
    if op is None or product is None or dot_refusal(product, region, machine) is None:
        return (around,)
    given = around.choice
    gemm = _Gemm(region, op, product, machine, given)
    choices: list[GemmChoice] = []
    if given.tile is None:
        tiles = choose_tiles(product.m, product.n, gemm.lanes, gemm.roomy)
        other = [(tile.rows, tile.vectors) for tile in tiles if tile != gemm.tile]
        choices += [replace(given, tile=tile) for tile in other[:_OTHER_TILES]]
    down, across = gemm.blocks.tiles, gemm.blocks.panels
    rows = max(1, product.m // gemm.tile.rows)
    for wanted in ((2 * down, across), (down // 2, across), (down, 2 * across), (down, across // 2)):
        items = (below(rows, wanted[0]), below(gemm.panels, wanted[1]))
        if items != (down, across):
            choices.append(replace(given, items=items))
    for parts in (1, 2 * gemm.parts) if product.k >= _LONG_SUM else ():
        fitting = gemm.parts_of_k(replace(given, parts=parts))
        if fitting != gemm.parts:
            choices.append(replace(given, parts=fitting))
    return (around, *(GemmFamily(choice) for choice in dict.fromkeys(choices)))
