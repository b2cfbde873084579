"""Products of narrow numbers: what kernels on packed integers, 4-bit weights and bfloat16 share, which is the loops.

The scheme is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008): rows of `a` are
widened once into scratch memory, a part of a panel of `b` at a time is widened into scratch that stays in L1, and
register tiles run over both. Weights stay narrow in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import CpuMachine, Launch, Lowered
from nestc.kernels.gemm_shape import ITEMS, Product, Tile, divisors
from nestc.kernels.operands import Operands
from nestc.kernels.rows import rows_per_item
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, clamp, constant, less, load, splat
from nestc.tensor.ir import Buffer, Const, Dot, Expr, Fma, Load, Repeat, Stmt, Store, Var
from nestc.tensor.vectorize import vectorize

UNROLL = 8  # steps of k written out; k is padded to a multiple of them
_PART = 256  # steps of k whose piece of a panel stays in L1 (16 KiB of 32, with vectors of 32 bytes)
AHEAD = 1024  # bytes of a stream of weights that are asked for before they are used
_ITEM_PRODUCTS = 1 << 20  # multiply-adds of a parallel item that is worth a claim: some 10 us
_ITEM_WEIGHTS = 1 << 17  # likewise, where weights are used once and come from memory
_SIZES = {"int8": 1, "uint8": 1, "int16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Numbers:
    """The factors of a kernel's multiply-adds as they lie in scratch memory, `group` of them summed an instruction.

    Rows are of dtype `a`, panels of `b`, sums of `acc`. ``uops``: vector instructions that a multiply-add takes;
    ``latency``: cycles until its accumulator can be used again.
    """

    a: str
    b: str
    group: int
    acc: str
    uops: int
    latency: int


PAIRS = Numbers("int16", "int16", 2, "int32", 2, 1)
"""8-bit integers widened to 16 bits: pmaddwd and an addition (whose latency is all that an accumulator sees)."""
SINGLES = Numbers("float32", "float32", 1, "float32", 1, 4)


def choose_tile(m: int, n: int, lanes: int, numbers: Numbers, machine: CpuMachine) -> Tile:
    """The register tile with the least modelled cycles for an m x n product.

    A step of an r x v tile issues r * v multiply-adds of `uops` vector instructions (four a cycle if there are two,
    else two), and r + v loads (two a cycle); six instructions in all are taken in a cycle.
    """
    vectors, registers = ceil(n / lanes), machine.tile_registers
    best: tuple[tuple[float, int], Tile] | None = None
    for rows in range(1, min(m, registers) + 1):
        for wide in range(1, min(vectors, 8) + 1):
            # Accumulators, the operand kept for a step, what streams by, and products on their way to their sums.
            if rows * wide + min(rows, wide) + (1 if numbers.uops == 1 else 3) > registers:
                continue
            full, rest = divmod(m, rows)
            tiles = full * _cycles(rows, wide, numbers) + (_cycles(rest, wide, numbers) if rest else 0.0)
            key = (ceil(vectors / wide) * tiles, -rows * wide)
            if best is None or key < best[0]:
                best = (key, Tile(rows, wide))
    assert best is not None
    return best[1]


def _cycles(rows: int, vectors: int, numbers: Numbers) -> float:
    """Cycles of one step; what is widened when read (one row) takes an instruction or two more."""
    vector = rows * vectors * numbers.uops + (vectors * 2 if rows == 1 else 0)
    issue = (rows * vectors * numbers.uops + rows + vectors) / 6
    return max(vector / (2 * numbers.uops), (rows + vectors) / 2, issue, float(numbers.latency)) + 0.1 * vectors


class Panels(ABC):
    """Builds the kernel of one product; what the numbers are is the subclass's business.

    Rows of `a` are widened first, by a launch of its own or, if they make one tile, by every item:
    [row][k], padded with zeros to whole steps. Parallel items are (batch, group of panels, group of row tiles). For
    each panel and part of k an item widens that piece of the panel into scratch (``staged``; otherwise panels are read
    where they lie), and runs its row tiles; sums over parts wait in scratch.
    """

    b: Buffer

    def __init__(
        self,
        name: str,
        region: Region,
        op: Op,
        product: Product,
        machine: CpuMachine,
        numbers: Numbers,
        tile: Tile | None = None,
    ) -> None:
        self.region, self.op, self.product, self.machine, self.numbers = region, op, product, machine, numbers
        self.lanes = machine.lanes(numbers.acc)
        self.tile = tile or choose_tile(product.m, product.n, self.lanes, numbers, machine)
        self.width = self.tile.vectors * self.lanes
        self.panels = ceil(product.n / self.width)
        self.staged = self.apart = product.m > self.tile.rows
        steps = ceil(product.k / numbers.group)
        parts = ceil(steps / _PART)
        self.cut(parts, ceil(ceil(steps / parts) / UNROLL) * UNROLL)
        self.k = Builder(name)
        self.operands = Operands(self.k, region, {})

    def cut(self, parts: int, steps: int) -> None:
        """Sum over k in `parts` of `steps` each."""
        self.parts, self.steps = parts, steps
        self.depth = parts * steps * self.numbers.group
        # A little more than whole lines, so that rows do not fall into one set of the cache.
        self.stride = self.depth + 64 // _SIZES[self.numbers.a]

    # -- what a subclass supplies; `b` holds the panels, (matrices * panels, steps, width * group)

    @abstractmethod
    def declare(self) -> tuple[tuple[Launch, ...], Mapping[str, TensorType]]:
        """Declare parameters and the tail, constants in `operands`. Gives launches that come first, and temporaries."""

    @abstractmethod
    def declare_a(self, operands: Operands) -> None:
        """Declare what `a_value` reads."""

    @abstractmethod
    def a_value(self, operands: Operands, batch: tuple[Expr, ...], row: Expr, k: Expr) -> Expr:
        """An element of `a` as a factor (scalar)."""

    @abstractmethod
    def b_vector(self, batch: tuple[Expr, ...], panel: Expr, step: Expr, c: int) -> Expr:
        """Vector `c` of step `step` (counted over all parts) of a panel, as factors."""

    @abstractmethod
    def stores(self, batch: tuple[Expr, ...], row: Expr, column: Expr, value: Expr) -> tuple[Stmt, ...]:
        """Scalar stores of the element of the output whose sum is `value`."""

    def added(self, acc: Expr, a: Expr, b: Expr) -> Expr:
        """`acc` and the products of a row's numbers in every lane with a column's."""
        return Fma(a, b, acc) if self.numbers.group == 1 else Dot(acc, a, b)

    def start(self, batch: tuple[Expr, ...], row: Expr, panel: Expr, c: int) -> Expr:
        """What the sums of vector `c` of a row start from."""
        return constant(0, self.numbers.acc, self.lanes)

    # -- the loops

    def lower(self) -> Lowered:
        """The launches, temporaries and packed constants."""
        launches: tuple[Launch, ...] = ()
        temporaries: dict[str, TensorType] = {}
        constants: dict[str, np.ndarray] = {}
        if self.apart:
            name = f"{self.product.a}.rows"
            first, temporaries[name] = self.rows_launch(name, constants)
            launches = (first,)
            self.operands.define(name, temporaries[name])
            self.a = self.operands.buffer(name)
        else:
            self.declare_a(self.operands)
            self.a = self.k.scratch("rows", (self.product.m, self.stride), self.numbers.a)
        more, others = self.declare()
        self.build()
        constants.update(self.operands.constants)
        return Lowered((*launches, *more, self.operands.launch()), {**temporaries, **others}, constants)

    def rows_launch(self, name: str, constants: dict[str, np.ndarray]) -> tuple[Launch, TensorType]:
        """The launch that widens all rows of `a` into the temporary `name`: (rows of all its matrices, stride)."""
        p = self.product
        builder = Builder("widen_rows")
        operands = Operands(builder, self.region, {})
        matrices = prod(p.a_batch)
        type_ = TensorType(self.numbers.a, (matrices * p.m, self.stride))
        operands.define(name, type_)
        self.declare_a(operands)
        out = operands.buffer(name)
        together = rows_per_item(p.m, p.k // 8)
        with builder.parallel("item", matrices, p.m // together) as (n, group):
            with builder.loop("row", together) as r:
                row = ix.add(ix.mul(group, together), r)
                self.prepare(operands, out, ix.unflatten(n, p.a_batch), row, ix.add(ix.mul(n, p.m), row))
        constants.update(operands.constants)
        return operands.launch(), type_

    def items(self) -> tuple[int, int]:
        """Row tiles and panels of an item: enough items to share, and then the least preparation."""
        p, full = self.product, max(1, self.product.m // self.tile.rows)
        batch = prod(p.batch)
        products = batch * p.m * p.n * p.k
        least = _ITEM_PRODUCTS if self.apart else p.m * _ITEM_WEIGHTS
        wanted = max(1, min(ITEMS, products // least))
        # Rows stream by for every panel, slowly enough to come from beyond L2, but not from memory.
        most = max(1, 2 * self.machine.l2_bytes // (self.stride * _SIZES[self.numbers.a] * self.tile.rows))
        best: tuple[tuple[int, bool, float, int], tuple[int, int]] | None = None
        for down in divisors(full):
            for across in divisors(self.panels):
                groups = (full // down, self.panels // across)
                few = max(0, wanted - batch * prod(groups))
                # Cycles for each element of k, a panel or a row.
                widening = groups[0] * self.panels if self.staged else 0.0
                if not self.apart:
                    widening += 0.1 * p.m * groups[1]
                key = (few, down > most, widening, across)
                if best is None or key < best[0]:
                    best = (key, (down, across))
        assert best is not None
        return best[1]

    def build(self) -> None:
        """The parallel loop: preparation, then panels, parts of k and row tiles."""
        k, p, t, numbers = self.k, self.product, self.tile, self.numbers
        wide = self.lanes * numbers.group
        full, rest = divmod(p.m, t.rows)
        self.down, across = self.items()
        groups = max(1, full) // self.down
        self.acc = k.regs("acc", (t.rows, t.vectors), self.lanes, numbers.acc)
        self.row = k.regs("a", (t.rows,), wide, numbers.a)
        self.column = k.regs("b", (t.vectors,), wide, numbers.b)
        self.done = k.stack("done", (t.rows, self.width), numbers.acc)
        if self.staged:
            self.piece = k.scratch("piece", (self.steps, t.vectors * wide), numbers.b)
        if self.parts > 1:
            self.partial = k.scratch("partial", (self.down + 1, t.rows, self.width), numbers.acc)
        with k.parallel("item", prod(p.batch), self.panels // across, groups) as (n, jb, ib):
            batch = ix.unflatten(n, p.batch)
            last = less(ix.const(groups - 2), ib)
            first = ix.mul(ib, self.down * t.rows)
            if not self.apart:
                with k.loop("prepared", p.m) as r:
                    self.prepare(self.operands, self.a, batch, r, r)
            with k.loop("panel", across) as pj, k.loop("part", self.parts) as part:
                panel = ix.add(ix.mul(jb, across), pj)
                if self.staged:
                    self.stage(batch, panel, part)
                if full:
                    with k.loop("tile", self.down) as ti:
                        self.row_tile(batch, panel, part, ix.add(first, ix.mul(ti, t.rows)), ti, t.rows)
                if rest:
                    with k.when(last):
                        self.row_tile(batch, panel, part, ix.const(full * t.rows), ix.const(self.down), rest)

    def prepare(self, operands: Operands, out: Buffer, batch: tuple[Expr, ...], row: Expr, slot: Expr) -> None:
        """A row of `a` into row `slot` of `out`, with zeros behind it."""
        k, p, factor = operands.builder, self.product, self.numbers.a
        lanes = 1 if p.transposed_a else self.machine.lanes(factor)
        whole = p.k - p.k % lanes
        with k.loop("widened", whole // lanes) as i:
            if lanes == 1:
                k.store(out, (slot, i), self.a_value(operands, batch, row, i))
            else:
                lane, start = Var("lane", lanes), ix.mul(i, lanes)
                value = self.a_value(operands, batch, row, ix.add(start, lane))
                k.emit(vectorize((Store(out, (slot, ix.add(start, lane)), value),), lane, ix.const(0), lanes))
        with k.loop("widened_one", p.k - whole) as i:
            place = ix.add(i, whole)
            k.store(out, (slot, place), self.a_value(operands, batch, row, place))
        with k.loop("padded", self.depth - p.k) as i:
            k.store(out, (slot, ix.add(i, p.k)), constant(0, factor))

    def stage(self, batch: tuple[Expr, ...], panel: Expr, part: Expr) -> None:
        """A part of a panel into scratch."""
        wide = self.lanes * self.numbers.group
        with self.k.loop("staged", self.steps) as s:
            step = ix.add(ix.mul(part, self.steps), s)
            for c in range(self.tile.vectors):
                self.k.store(self.piece, (s, c * wide), self.b_vector(batch, panel, step, c))

    def row_tile(self, batch: tuple[Expr, ...], panel: Expr, part: Expr, row: Expr, slot: Expr, rows: int) -> None:
        """The sums of `rows` rows from `row` on over one part of k, kept for the next part or stored."""
        k, lanes = self.k, self.lanes
        places = [(r, c) for r in range(rows) for c in range(self.tile.vectors)]
        for r, c in places:
            k.store(self.acc, (r, c, 0), self.start(batch, ix.add(row, r), panel, c))
        if self.parts > 1:
            with k.when(less(0, part)):
                for r, c in places:
                    k.store(self.acc, (r, c, 0), load(self.partial, slot, r, c * lanes, lanes=lanes))
        with k.loop("step", self.steps // UNROLL) as s:
            for u in range(UNROLL):
                step = ix.add(ix.mul(s, UNROLL), u)
                if not self.apart:
                    self.ask_ahead(self.matrix_panel(batch, panel), ix.add(ix.mul(part, self.steps), step))
                self.step(batch, panel, part, step, row, rows)
        if self.parts > 1:
            with k.when(less(part, self.parts - 1)):
                for r, c in places:
                    k.store(self.partial, (slot, r, c * lanes), load(self.acc, r, c, 0, lanes=lanes))
        with k.when(less(self.parts - 2, part)):
            for r, c in places:
                k.store(self.done, (r, c * lanes), load(self.acc, r, c, 0, lanes=lanes))
            self.finish(batch, panel, row, rows)

    def step(self, batch: tuple[Expr, ...], panel: Expr, part: Expr, step: Expr, row: Expr, rows: int) -> None:
        """One step of k: the shorter side of the tile is kept in registers, the longer one streams."""
        k, lanes, group = self.k, self.lanes, self.numbers.group
        wide = lanes * group
        at = ix.add(ix.mul(part, self.steps), step)
        base = ix.add(ix.mul(self.a_matrix(batch), self.product.m), row) if self.apart else ix.const(0)

        def fetch_row(r: int) -> None:
            few = load(self.a, ix.add(base, r), ix.mul(at, group), lanes=group)
            k.store(self.row, (r, 0), splat(few, lanes) if group == 1 else Repeat(few, lanes))

        def fetch_column(c: int) -> None:
            staged = self.staged
            value = load(self.piece, step, c * wide, lanes=wide) if staged else self.b_vector(batch, panel, at, c)
            k.store(self.column, (c, 0), value)

        def multiply(r: int, c: int) -> None:
            acc = load(self.acc, r, c, 0, lanes=lanes)
            a, b = load(self.row, r, 0, lanes=wide), load(self.column, c, 0, lanes=wide)
            k.store(self.acc, (r, c, 0), self.added(acc, a, b))

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

    def ask_ahead(self, which: Expr, row: Expr, count: int = 1) -> None:
        """Prefetch `count` rows of a stored panel that follow `AHEAD` bytes after `row`: what is read once comes from
        memory, and faster if it is asked for."""
        size = _SIZES.get(self.b.dtype, 1)
        line = self.b.shape[-1] * size
        for ahead in range(AHEAD, AHEAD + count * line, 64):
            self.k.prefetch(self.b, which, ix.add(row, ahead // line), ahead % line // size)

    def matrix_panel(self, batch: tuple[Expr, ...], panel: Expr) -> Expr:
        """Number of a panel among those of all matrices of `b`."""
        return ix.add(ix.mul(self.product.b_matrix(batch), self.panels), panel)

    def a_matrix(self, batch: tuple[Expr, ...]) -> Expr:
        """Which of the matrices of `a` an index over the batch means."""
        own = tuple(ix.const(0) if n == 1 else i for n, i in zip(self.product.a_batch, batch))
        return ix.flatten(own, self.product.a_batch)

    def finish(self, batch: tuple[Expr, ...], panel: Expr, row: Expr, rows: int) -> None:
        """Run the tail on the sums in `done`, row by row; a panel that is not full has code of its own."""
        k, n, last = self.k, self.product.n, ix.const(self.panels - 1)
        if n == 1:  # the output may have no axis of columns to store vectors along
            with k.loop("done_row", rows) as r:
                k.emit(self.stores(batch, ix.add(row, r), ix.const(0), load(self.done, r, 0)))
            return
        cases: list[tuple[Expr, Expr]] = [(Const(True, "bool"), panel)]
        if n % self.width and self.panels > 1:
            inside = less(panel, last)
            cases = [(inside, clamp(panel, 0, self.panels - 2)), (less(self.panels - 2, panel), last)]
        # Two vectors at once, so that narrow results are stored in longer pieces.
        lanes = self.lanes * (2 if self.tile.vectors % 2 == 0 else 1)
        for case, exact in cases:
            with k.when(case), k.loop("done_row", rows) as r:
                for start in range(0, self.width, lanes):
                    column = ix.add(ix.mul(exact, self.width), start)
                    if ix.bounds(column)[0] >= n:
                        continue
                    lane = Var("lane", lanes)
                    value = Load(self.done, (r, ix.add(lane, start)))
                    statements = self.stores(batch, ix.add(row, r), ix.add(column, lane), value)
                    k.emit(vectorize(statements, lane, ix.const(0), lanes))


def to_panels(matrices: np.ndarray, width: int, group: int, depth: int) -> np.ndarray:
    """Matrices (batch, k, n) as (batch * panels, depth / group, width * group): `group` neighbours along k of a column
    lie together. Padding is zero."""
    batch, k, n = matrices.shape
    panels = ceil(n / width)
    padded = np.zeros((batch, depth, panels * width), matrices.dtype)
    padded[:, :k, :n] = matrices
    split = padded.reshape(batch, depth // group, group, panels, width)
    ordered = split.transpose(0, 3, 1, 4, 2)
    return np.ascontiguousarray(ordered).reshape(batch * panels, depth // group, width * group)
