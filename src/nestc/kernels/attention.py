"""Attention in one pass over the keys: scores of a few queries and a block of keys stay in L1 and are never all there.

The running maximum and sum are those of Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); the
blocking is that of Dao et al., "FlashAttention" (2022), with register tiles for both products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import ceil

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered
from nestc.kernels.attention_shape import AttentionShape, attention_shape
from nestc.kernels.gemm_shape import ITEM_PRODUCTS, ITEMS, divisors
from nestc.kernels.operands import Operands
from nestc.kernels.rows import Row
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, less, load, select, splat
from nestc.tensor.ir import Binary, Expr, Fma, Load, Ramp, Reduce, Store, Unary, Var
from nestc.tensor.math import exp_below
from nestc.tensor.rewrite import binary, cast
from nestc.tensor.vectorize import vectorize

_BLOCK = 512  # keys of a block: with five rows of float32 scores 10 KiB
_VECTORS = 2  # vectors of a register tile
_UNROLL = 4
_FEW = 4  # up to so many queries, packing the keys would cost more than it saves
_INFINITY = float("inf")


class AttentionFamily:
    """Attention without a cache, on floating-point tensors (half types are computed in float32)."""

    name = "attention"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        op = _anchor(region)
        if op is None:
            return "its anchor is not Attention"
        shape = attention_shape(op, region)
        return shape if isinstance(shape, str) else tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything row-major."""
        return dict.fromkeys((*region.inputs, *region.outputs), PLAIN)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """A launch that transposes the keys in panels (not for few queries), and the attention."""
        op = _anchor(region)
        assert op is not None
        shape = attention_shape(op, region)
        assert not isinstance(shape, str)
        return _Attention(region, op, shape, machine).lower()


def _anchor(region: Region) -> Op | None:
    return next((op for op in region.ops if op.op_type == "Attention" and not op.domain), None)


class _Attention:
    """Parallel items are (batch, head, group of query tiles); the last group takes the queries that are left over."""

    def __init__(self, region: Region, op: Op, shape: AttentionShape, machine: CpuMachine) -> None:
        self.region, self.op, self.s = region, op, shape
        self.lanes = machine.lanes(shape.dtype)
        self.width = _VECTORS * self.lanes
        # As in convolutions, beside the accumulators there is room for the right vectors of two steps.
        self.rows = max(1, min(shape.length, (machine.vector_registers - 1 - 2 * _VECTORS) // _VECTORS))
        self.few = shape.length <= _FEW
        self.block = min(_BLOCK, shape.keys)
        self.padded = ceil(self.block / self.width) * self.width
        self.k = Builder("attention")
        self.operands = Operands(self.k, region, {})

    def lower(self) -> Lowered:
        """The launches and the temporary for the packed keys."""
        s, operands = self.s, self.operands
        launches: list[Launch] = []
        temporaries: dict[str, TensorType] = {}
        query, key, value = self.op.inputs[:3]
        self.q = operands.buffer(query)
        if self.few:
            self.keys = operands.buffer(key)
        else:
            name = f"{key}.panels"
            launch, temporaries[name] = self.pack(key, name)
            launches.append(launch)
            operands.define(name, temporaries[name])
            self.keys = operands.buffer(name)
        self.v = operands.buffer(value)
        if s.mask:
            operands.buffer(s.mask)
        self.tail = Tail(operands, self.op)
        self.tail.declare()
        self.build()
        launches.append(operands.launch())
        return Lowered(tuple(launches), temporaries, operands.constants)

    def pack(self, key: str, name: str) -> tuple[Launch, TensorType]:
        """k as panels [batch][head][panel][size][width] with zeros past the last key."""
        s, k, width = self.s, Builder("pack_keys"), self.width
        operands = Operands(k, self.region, {})
        panels = ceil(s.keys / width)
        type_ = TensorType(s.dtype, (s.batch, s.kv_heads, panels, s.size, width))
        operands.define(name, type_)
        operands.buffer(key)
        out = operands.buffer(name)
        with (
            k.parallel("item", s.batch, s.kv_heads, panels) as (b, head, panel),
            k.loop("d", s.size) as d,
            k.unroll("j", width) as j,
        ):
            position = ix.add(ix.mul(panel, width), j)
            inside = None if s.keys % width == 0 else less(position, s.keys)
            value = operands.load(key, s.place(b, head, position, d, s.size), inside)
            k.emit((Store(out, (b, head, panel, d, j), cast(value, s.dtype)),))
        return operands.launch(), type_

    def build(self) -> None:
        """The parallel loop and, within an item, its query tiles."""
        s, k = self.s, self.k
        dtype, lanes = s.dtype, self.lanes
        self.scores = k.scratch("scores", (self.rows, self.padded), dtype)
        self.sums = k.scratch("sums", (self.rows, ceil(s.v_size / lanes) * lanes), dtype)
        self.top, self.total, self.fade = (k.stack(n, (self.rows,), dtype) for n in ("top", "total", "fade"))
        self.acc = k.regs("acc", (self.rows, _VECTORS), lanes, dtype)
        self.left = k.regs("left", (), lanes, dtype)
        self.right = k.regs("right", (_VECTORS,), lanes, dtype)
        full, rest = divmod(s.length, self.rows)
        wanted = min(ITEMS, 1 + s.batch * s.heads * s.length * s.keys * (s.size + s.v_size) // ITEM_PRODUCTS)
        tiles = max(d for d in divisors(full) if d == 1 or s.batch * s.heads * (full // d) >= wanted)
        groups = full // tiles
        with k.parallel("item", s.batch, s.heads, groups) as (b, head, group):
            with k.loop("tile", tiles) as t:
                self.tile(b, head, ix.mul(ix.add(ix.mul(group, tiles), t), self.rows), self.rows)
            if rest:
                with k.when(binary("eq", group, ix.const(groups - 1))):
                    self.tile(b, head, ix.const(full * self.rows), rest)

    def tile(self, b: Expr, head: Expr, row: Expr, rows: int) -> None:
        """All keys for one tile of queries."""
        s, k, dtype = self.s, self.k, self.s.dtype
        with k.loop("start_row", rows) as r:
            k.store(self.top, (r,), constant(-_INFINITY, dtype))
            k.store(self.total, (r,), constant(0, dtype))
            with k.loop("start_vector", self.sums.shape[1] // self.lanes) as c:
                k.store(self.sums, (r, ix.mul(c, self.lanes)), constant(0, dtype, self.lanes))
        full, rest = divmod(s.keys, self.block)
        with k.loop("block", full) as i:
            first = ix.mul(i, self.block)
            if not s.causal:
                self.key_block(b, head, row, rows, first, self.block)
            else:  # later keys are of no concern to these queries
                with k.when(binary("le", first, ix.add(row, rows - 1))):
                    self.key_block(b, head, row, rows, first, self.block)
        if rest:
            self.key_block(b, head, row, rows, ix.const(full * self.block), rest)
        self.finish(b, head, row, rows)

    def key_block(self, b: Expr, head: Expr, row: Expr, rows: int, first: Expr, count: int) -> None:
        """Scores of the tile with `count` keys from `first` on, their exponentials, and the weighted values."""
        if self.few:
            self.dot_scores(b, head, row, rows, first, count)
        else:
            self.tile_scores(b, head, row, rows, first, count)
        self.mask_scores(b, head, row, rows, first, count)
        self.exponentials(rows, count)
        full, rest = divmod(ceil(self.s.v_size / self.lanes), _VECTORS)
        with self.k.loop("columns", full) as c:
            self.add_values(b, head, rows, first, count, ix.mul(c, self.width), _VECTORS)
        if rest:
            self.add_values(b, head, rows, first, count, ix.const(full * self.width), rest)

    def tile_scores(self, b: Expr, head: Expr, row: Expr, rows: int, first: Expr, count: int) -> None:
        """q k^T by register tiles over packed keys."""
        s, k, lanes = self.s, self.k, self.lanes
        kv = s.kv_head(head)

        def step(panel: Expr, d: Expr) -> None:
            for c in range(_VECTORS):
                k.store(self.right, (c, 0), load(self.keys, b, kv, panel, d, c * lanes, lanes=lanes))
            for r in range(rows):
                q = cast(Load(self.q, s.place(b, head, ix.add(row, r), d, s.size)), s.dtype)
                self.multiply(r, q, _VECTORS)

        with k.loop("panel", ceil(count / self.width)) as p:
            panel = ix.add(ix.floordiv(first, self.width), p)
            self.clear(rows, _VECTORS)
            self.steps(s.size, lambda d: step(panel, d))
            for r in range(rows):
                for c in range(_VECTORS):
                    place = ix.add(ix.mul(p, self.width), c * lanes)
                    scaled = Binary("mul", load(self.acc, r, c, 0, lanes=lanes), constant(s.scale, s.dtype, lanes))
                    k.store(self.scores, (r, place), scaled)

    def dot_scores(self, b: Expr, head: Expr, row: Expr, rows: int, first: Expr, count: int) -> None:
        """q k^T as dot products along contiguous heads, for few queries."""
        s, k, lanes = self.s, self.k, self.lanes
        kv = s.kv_head(head)
        dots = Row(k, s.size, lanes, s.dtype, 2)
        for place in range(count, self.padded):
            for r in range(rows):
                k.store(self.scores, (r, place), constant(0, s.dtype))
        with k.loop("key", count) as j:
            position = ix.add(first, j)
            acc = k.regs("dot", (rows, dots.unroll), lanes, s.dtype)
            for r in range(rows):
                for u in range(dots.unroll):
                    k.store(acc, (r, u, 0), constant(0, s.dtype, lanes))

            def multiply(d: Expr, u: int, mask: Expr | None) -> None:
                u = u % dots.unroll
                other = cast(Load(self.keys, s.place(b, kv, position, d, s.size), lanes, mask), s.dtype)
                for r in range(rows):
                    q = cast(Load(self.q, s.place(b, head, ix.add(row, r), d, s.size), lanes, mask), s.dtype)
                    k.store(acc, (r, u, 0), Fma(q, other, load(acc, r, u, 0, lanes=lanes)))

            dots.walk(multiply)
            for r in range(rows):
                total: Expr = load(acc, r, 0, 0, lanes=lanes)
                for u in range(1, dots.unroll):
                    total = Binary("add", total, load(acc, r, u, 0, lanes=lanes))
                k.store(self.scores, (r, j), Binary("mul", Reduce("add", total), constant(s.scale, s.dtype)))

    def mask_scores(self, b: Expr, head: Expr, row: Expr, rows: int, first: Expr, count: int) -> None:
        """Cap and mask the scores in place; what lies past the last key becomes minus infinity."""
        s, k, lanes = self.s, self.k, self.lanes
        lane = Var("lane", lanes)

        def masked(r: Expr, start: Expr, cut: bool) -> None:
            place = ix.add(start, lane)
            key, low = ix.add(first, place), constant(-_INFINITY, s.dtype)
            value: Expr = Load(self.scores, (r, place))
            if s.softcap:
                capped = Unary("tanh", Binary("div", value, constant(s.softcap, s.dtype)))
                value = Binary("mul", capped, constant(s.softcap, s.dtype))
            inside = less(place, count) if cut else None
            if s.mask:
                index = (b, head, ix.add(row, r), key)
                mask = self.operands.broadcast(s.mask, index, inside)
                value = select(mask, value, low) if mask.dtype == "bool" else Binary("add", value, cast(mask, s.dtype))
            if s.causal:
                value = select(Binary("le", key, ix.add(row, r)), value, low)
            if inside is not None:
                value = select(inside, value, low)
            k.emit(vectorize((Store(self.scores, (r, place), value),), lane, ix.const(0), lanes))

        whole = count // lanes
        changed = bool(s.softcap or s.mask or s.causal)
        with k.loop("mask_row", rows) as r:
            with k.loop("mask_vector", whole if changed else 0) as c:
                masked(r, ix.mul(c, lanes), False)
            for c in range(whole, ceil(count / self.width) * _VECTORS):
                masked(r, ix.const(c * lanes), True)

    def exponentials(self, rows: int, count: int) -> None:
        """Scores become exp(score - maximum); the sums so far are scaled when the maximum grows."""
        s, k, lanes = self.s, self.k, self.lanes
        with k.loop("exp_row", rows) as r:
            row = Row(k, ceil(count / self.width) * self.width, lanes, s.dtype)
            here = row.reduce("max", lambda start, _: Load(self.scores, (r, start), lanes), -_INFINITY)
            before = k.regs("before", (), 1, s.dtype)
            k.store(before, (0,), load(self.top, r))
            after = Binary("max", load(before, 0), here)
            k.store(self.top, (r,), after)
            # Where every key is masked the maximum is minus infinity; any finite one then gives exponentials of 0.
            safe = k.regs("safe", (), 1, s.dtype)
            nothing = Binary("eq", after, constant(-_INFINITY, s.dtype))
            k.store(safe, (0,), select(nothing, constant(0, s.dtype), after))
            k.store(self.fade, (r,), exp_below(Binary("sub", load(before, 0), load(safe, 0))))

            def exponential(start: Expr, _: Expr | None) -> Expr:
                place = (r, start)
                e = exp_below(Binary("sub", Load(self.scores, place, lanes), splat(load(safe, 0), lanes)))
                k.store(self.scores, place, e)
                return Load(self.scores, place, lanes)

            added = row.reduce("add", exponential, 0.0)
            k.store(self.total, (r,), Fma(load(self.total, r), load(self.fade, r), added))

    def add_values(self, b: Expr, head: Expr, rows: int, first: Expr, count: int, start: Expr, vectors: int) -> None:
        """sums = sums * fade + exponentials v, for a few vectors of columns."""
        s, k, lanes = self.s, self.k, self.lanes
        kv = s.kv_head(head)
        for r in range(rows):
            for c in range(vectors):
                old = load(self.sums, r, ix.add(start, c * lanes), lanes=lanes)
                k.store(self.acc, (r, c, 0), Binary("mul", old, splat(load(self.fade, r), lanes)))

        def step(j: Expr) -> None:
            for c in range(vectors):
                column = ix.add(start, c * lanes)
                inside = None
                if ix.bounds(column)[1] + lanes > s.v_size:
                    inside = Binary("lt", Ramp(column, 1, lanes), splat(ix.const(s.v_size), lanes))
                index = s.place(b, kv, ix.add(first, j), column, s.v_size)
                k.store(self.right, (c, 0), cast(Load(self.v, index, lanes, inside), s.dtype))
            for r in range(rows):
                self.multiply(r, load(self.scores, r, j), vectors)

        self.steps(count, step)
        for r in range(rows):
            for c in range(vectors):
                k.store(self.sums, (r, ix.add(start, c * lanes)), load(self.acc, r, c, 0, lanes=lanes))

    def clear(self, rows: int, vectors: int) -> None:
        """Accumulators to zero."""
        for r in range(rows):
            for c in range(vectors):
                self.k.store(self.acc, (r, c, 0), constant(0, self.s.dtype, self.lanes))

    def multiply(self, r: int, left: Expr, vectors: int) -> None:
        """Row r of the accumulators plus `left` times the right vectors."""
        k, lanes = self.k, self.lanes
        k.store(self.left, (0,), splat(left, lanes))
        for c in range(vectors):
            a, right, acc = load(self.left, 0, lanes=lanes), load(self.right, c, 0, lanes=lanes), (r, c, 0)
            k.store(self.acc, acc, Fma(a, right, load(self.acc, *acc, lanes=lanes)))

    def steps(self, count: int, step: Callable[[Expr], None]) -> None:
        """`step` for 0 .. count - 1, some of them written out."""
        with self.k.loop("s", count // _UNROLL) as i:
            for u in range(_UNROLL):
                step(ix.add(ix.mul(i, _UNROLL), u))
        for u in range(count - count % _UNROLL, count):
            step(ix.const(u))

    def finish(self, b: Expr, head: Expr, row: Expr, rows: int) -> None:
        """Divide by the sums of the exponentials (rows without any key give 0) and store through the tail."""
        s, k, lanes = self.s, self.k, self.lanes
        dtype = self.operands.type(self.op.outputs[0]).dtype
        with k.loop("done_row", rows) as r:
            total = load(self.total, r)
            nothing = Binary("eq", total, constant(0, s.dtype))
            quotient = Binary("div", constant(1, s.dtype), total)
            k.store(self.fade, (r,), select(nothing, constant(0, s.dtype), quotient))
            full, rest = divmod(s.v_size, lanes)

            def finished(start: Expr) -> None:
                lane = Var("lane", lanes)
                column = ix.add(start, lane)
                value = Binary("mul", Load(self.sums, (r, column)), load(self.fade, r))
                index = s.place(b, head, ix.add(row, r), column, s.v_size)
                inside = None if ix.bounds(column)[1] < s.v_size else less(column, s.v_size)
                k.emit(vectorize(self.tail.stores(index, cast(value, dtype), inside), lane, ix.const(0), lanes))

            with k.loop("done_vector", full) as c:
                finished(ix.mul(c, lanes))
            if rest:
                finished(ix.const(full * lanes))


ATTENTION = AttentionFamily()
