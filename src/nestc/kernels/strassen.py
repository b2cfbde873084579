"""Strassen's algorithm for large products by constant matrices: seven products of halves instead of eight.

V. Strassen, "Gaussian Elimination is not Optimal", Numerische Mathematik 13 (1969), in S. Winograd's form with fewer
sums (`strassen_plan`). One level: even and odd rows of `a`, halves of the columns of `b` and of k. For MatMul and Gemm,
and convolutions of one tap, which are such products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import ceil, inf, prod
from typing import Protocol

import numpy as np

from nestc.errors import UnsupportedOp
from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import CpuMachine, Launch, Layout, Lowered
from nestc.kernels.conv_shape import ConvShape, conv_shape
from nestc.kernels.gemm_pack import constant_matrices
from nestc.kernels.gemm_shape import Product, product_of, scaled_stores
from nestc.kernels.operands import Operands
from nestc.kernels.position_products import Fetch, Place, Plan, PositionProducts
from nestc.kernels.strassen_plan import INPUTS, OUTPUTS, POSITIONS, WEIGHTS, Halves, cycles, direct_cycles, plan
from nestc.kernels.tail import Tail, tail_refusal
from nestc.kernels.winograd_tiles import Named, otherwise
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, clamp, load, splat
from nestc.tensor.ir import Binary, Buffer, Expr, Fma, Load, Stmt, Var
from nestc.tensor.vectorize import vectorize

_CACHE_LINE = 64


Row = tuple[Expr, Expr]
"""Image (or sequence, or other item of a batch), and row in it."""


class Source(Protocol):
    """A product as Strassen's kernel sees it: rows of inputs, a constant matrix, and where results go."""

    op: Op
    value: str
    halves: Halves

    def matrix(self) -> np.ndarray:
        """The constant, (inputs, outputs) float32."""
        ...

    def view(self, operands: Operands) -> Buffer:
        """The parameter that holds the inputs."""
        ...

    def inputs(self, x: Buffer, row: Row, block: Expr) -> Expr:
        """A vector of neighbouring inputs of a row."""
        ...

    def stores(self, operands: Operands, tail: Tail, row: Row, column: Expr, value: Expr) -> tuple[Stmt, ...]:
        """Scalar stores of an output whose sum is `value`."""
        ...


class ProductSource:
    """MatMul or Gemm with rows in one piece."""

    def __init__(self, region: Region, op: Op, machine: CpuMachine) -> None:
        self.region, self.op = region, op
        self.product = product_of(op, region)
        p = self.product
        self.value = p.a
        items = prod(p.fold[:-1])
        self.halves = Halves(items, p.m // items, p.k, p.n, machine)

    @staticmethod
    def refusal(region: Region, product: Product) -> str | None:
        """Why the product is not one of this kind; None if it is."""
        if product.b not in region.constants:
            return "the right operand is not constant"
        if product.batch or product.transposed_a or product.vector_a or product.vector_b:
            return "only a matrix by a matrix is halved"
        return None

    def matrix(self) -> np.ndarray:
        """`b` times alpha."""
        return constant_matrices(self.product, self.region)[0] * np.float32(self.product.alpha)

    def view(self, operands: Operands) -> Buffer:
        """`a` as a matrix."""
        return operands.view(self.value, (self.product.m, self.product.k))

    def inputs(self, x: Buffer, row: Row, block: Expr) -> Expr:
        """Neighbours along k."""
        lanes = self.halves.lanes
        return load(x, self.flat(row), ix.mul(block, lanes), lanes=lanes)

    def stores(self, operands: Operands, tail: Tail, row: Row, column: Expr, value: Expr) -> tuple[Stmt, ...]:
        """Through Gemm's addend and the tail."""
        return scaled_stores(self.product, operands, tail, ((), self.flat(row), column), value, 1.0)

    def flat(self, row: Row) -> Expr:
        """A row among all rows."""
        return ix.flatten(row, (self.halves.items, self.halves.rows))


class PointwiseSource:
    """A convolution of one tap; pixels are rows, and channels lie in blocks."""

    def __init__(self, region: Region, op: Op, machine: CpuMachine) -> None:
        self.region, self.op = region, op
        self.shape: ConvShape = conv_shape(op, region)
        s = self.shape
        self.value = op.inputs[0]
        self.pixels = prod(s.out)
        self.halves = Halves(s.batch, self.pixels, s.in_channels, s.out_channels, machine)

    def matrix(self) -> np.ndarray:
        """The weights."""
        weights = self.region.constant(self.op.inputs[1])
        assert weights is not None
        return weights.reshape(self.shape.out_channels, self.shape.in_channels).T

    def view(self, operands: Operands) -> Buffer:
        """The map, its pixels in one piece."""
        s, lanes = self.shape, self.halves.lanes
        return operands.view(self.value, (s.batch, s.in_channels // lanes, prod(s.size) * lanes))

    def inputs(self, x: Buffer, row: Row, block: Expr) -> Expr:
        """A block of channels of the pixel that an output pixel is made of."""
        n, pixel = row
        s, lanes = self.shape, self.halves.lanes
        if max(s.strides) > 1:
            places = (ix.mul(place, stride) for place, stride in zip(ix.unflatten(pixel, s.out), s.strides))
            pixel = ix.flatten(tuple(places), s.size)
        return load(x, n, block, ix.mul(pixel, lanes), lanes=lanes)

    def stores(self, operands: Operands, tail: Tail, row: Row, column: Expr, value: Expr) -> tuple[Stmt, ...]:
        """With the bias, through the tail."""
        n, pixel = row
        if self.op.input(2):
            value = Binary("add", value, operands.load(self.op.inputs[2], (column,)))
        return tail.stores((n, column, *ix.unflatten(pixel, self.shape.out)), value)


class StrassenFamily:
    """MatMul, Gemm and convolutions of one tap on float32, by constants whose sizes have two whole vectors as factors.

    Sums are of sums, so that errors are relative to the largest elements of two neighbouring rows, and an infinity in
    one of them reaches the other. Items of a batch do not meet, as far as the shapes tell them apart.
    """

    def __init__(self, fused: bool | None = None) -> None:
        """`fused`: whether an item of the parallel loop adds up its inputs itself; None: as `plan` decides."""
        self.fused = fused
        self.name = "strassen" + ("" if fused is None else "_fused" if fused else "_split")

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does (where halves are whole vectors)."""
        op = _anchor(region)
        if op is None:
            return "its anchor is neither a product nor a convolution"
        if any(region.types[name].dtype != "float32" for name in (*op.inputs, *op.outputs) if name):
            return "only float32 is added up before products"
        if any(0 in region.types[name].shape for name in (*op.inputs, *op.outputs) if name):
            return "an axis is empty"
        if op.op_type != "Conv":
            reason = ProductSource.refusal(region, product_of(op, region))
        elif any(name not in region.constants for name in op.inputs[1:] if name):
            reason = f"the weights of {op.name!r} are not constant"
        else:
            shape = conv_shape(op, region)
            one_tap = prod(shape.kernel) == 1 and not any(shape.pads_begin) and shape.group == 1
            inside = all(s * (n - 1) < size for s, n, size in zip(shape.strides, shape.out, shape.size))
            reason = None if one_tap and inside else "only convolutions of one tap without padding are products"
        return reason or tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """As the direct kernels want them."""
        from nestc.kernels.conv import CONV
        from nestc.kernels.gemm import GEMM

        op = _anchor(region)
        assert op is not None
        if op.op_type != "Conv":
            return GEMM.layouts(region, machine, incoming)
        return {**CONV.layouts(region, machine, incoming), op.inputs[0]: Layout(machine.lanes("float32"))}

    def source(self, region: Region, machine: CpuMachine) -> Source:
        """The product of the region."""
        op = _anchor(region)
        assert op is not None
        return (PointwiseSource if op.op_type == "Conv" else ProductSource)(region, op, machine)

    def cycles(self, region: Region, machine: CpuMachine) -> tuple[float, float]:
        """Modelled cycles of this way (infinite where halves are no whole vectors), and of the direct kernel."""
        halves = self.source(region, machine).halves
        if not halves.whole:
            return inf, direct_cycles(halves)
        return cycles(halves, plan(halves, self.fused)), direct_cycles(halves)

    def other(self, region: Region, machine: CpuMachine) -> StrassenFamily:
        """The same algorithm, the sums of inputs in the kernel where this one has them apart, or the other way."""
        return StrassenFamily(not plan(self.source(region, machine).halves, self.fused).fused)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One or two kernels; the weights are packed in the order in which they are read."""
        halves = self.source(region, machine).halves
        return self.lower_with(region, machine, layouts, plan(halves, self.fused), halves.stored)

    def lower_with(
        self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout], cut: Plan, stored: int
    ) -> Lowered:
        """`lower` under a given plan, with 4 or all 7 of the sums of weights stored."""
        source = self.source(region, machine)
        if not source.halves.whole:
            raise UnsupportedOp(f"region {region.name}: its halves are no whole vectors of {source.halves.lanes}")
        return _Strassen(region, source, layouts, cut, stored).lower()


def _anchor(region: Region) -> Op | None:
    return next((op for op in region.ops if op.op_type in ("Conv", "MatMul", "Gemm") and not op.domain), None)


class _Strassen(PositionProducts):
    """Builds the kernels of one product.

    A *tile* is a pair of neighbouring rows. An item of the parallel loop is a chunk of groups of them, and a chunk
    of columns unless the sums of inputs are fused into it. U is [chunk of outputs][register column][stored sum][block
    of inputs][lane][nr * lanes]; a sum that is not stored is computed by the first group of an item that uses it, and
    kept in scratch memory for the others.
    """

    factor = total = "float32"

    def __init__(self, region: Region, source: Source, layouts: Mapping[str, Layout], cut: Plan, stored: int) -> None:
        h = source.halves
        super().__init__(cut, h.lanes, POSITIONS, h.groups(cut), h.blocks, h.lanes)
        self.region, self.source, self.layouts, self.halves, self.stored = region, source, layouts, h, stored

    def lower(self) -> Lowered:
        """The launches, the packed weights, and V where it is a temporary."""
        x, cut = self.source.value, self.cut
        weights, v_name = f"{self.source.op.inputs[1]}.strassen", f"{x}.strassen"
        packed = self.pack_weights()
        types = {weights: TensorType("float32", packed.shape)}
        launches: list[Launch] = []
        temporaries: dict[str, TensorType] = {}
        if not cut.fused:
            temporaries[v_name] = TensorType("float32", (POSITIONS, self.lines(self.groups * self.block())))
            launches.append(self.inputs_kernel(v_name, temporaries[v_name]))
            types |= temporaries
        k = Builder("strassen")
        operands = Operands(k, self.region, self.layouts)
        for name, type_ in types.items():
            operands.define(name, type_)
        u = operands.buffer(weights)
        x_or_v = self.source.view(operands) if cut.fused else operands.buffer(v_name)
        self.operands, self.tail = operands, Tail(operands, self.source.op)
        self.tail.declare()
        m = self.products(k)
        if self.stored < POSITIONS:
            self.sums = k.scratch("sums", (self.depth, self.lanes, cut.nr * self.lanes))
        v = k.scratch("v", (POSITIONS, self.lines(cut.groups * self.block()))) if cut.fused else x_or_v

        def outputs(chunk: Expr, o: Expr) -> None:
            self.multiply(k, u, v, m, chunk, o)
            self.add_products(k, m, chunk, o)

        self.items(k, self.halves.steps(cut), partial(self.add_inputs, k, x_or_v, v, local=True), outputs)
        launches.append(operands.launch())
        return Lowered(tuple(launches), temporaries, {**operands.constants, weights: packed})

    # -- weights

    def pack_weights(self) -> np.ndarray:
        """The stored sums of quarters of the constant, in the order in which they are read."""
        h, cut, lanes = self.halves, self.cut, self.lanes
        b = self.source.matrix().reshape(2, h.inputs // 2, 2, h.outputs // 2)
        quarters = [b[i, :, j] for i in (0, 1) for j in (0, 1)]
        steps, width = h.steps(cut), cut.nr * lanes
        padded = np.zeros((self.stored, h.inputs // 2, steps * cut.columns * width), np.float32)
        for target, signs in zip(padded[:, :, : h.outputs // 2], WEIGHTS):
            for sign, quarter in zip(signs, quarters):
                if sign:
                    target += sign * quarter
        split = padded.reshape(self.stored, h.blocks, lanes, steps, cut.columns, width)
        return np.ascontiguousarray(split.transpose(3, 4, 0, 1, 2, 5))

    @contextmanager
    def walk(self, k: Builder) -> Iterator[tuple[Expr, Expr]]:
        """All positions of a register column before the next, whose weights come from memory meanwhile."""
        with k.loop("g", self.cut.columns) as g, k.loop("p", self.positions) as p:
            yield p, g

    def sum_up(self, k: Builder, u: Buffer, at: Place, sums: Callable[[Fetch], None]) -> None:
        """Emit `sums` with weights as they are stored, or as sums of those."""
        lanes = self.lanes

        def stored(which: Expr | int, block: Expr, c: Expr, i: int) -> Expr:
            return load(u, at.o, at.g, which, block, c, i * lanes, lanes=lanes)

        def as_stored(registers: Buffer, block: Expr, c: Expr) -> None:
            which = binary("min", at.p, ix.const(self.stored - 1))
            for i in range(self.cut.nr):
                k.store(registers, (i, 0), stored(which, block, c, i))

        if self.stored == POSITIONS:
            sums(as_stored)
            return

        # WEIGHTS has 4 as 2 - 3, and 5 and 6 as that less 0 and 1.
        def difference(registers: Buffer, block: Expr, c: Expr, less: Expr | None = None) -> None:
            for i in range(self.cut.nr):
                value = Binary("sub", stored(2, block, c, i), stored(3, block, c, i))
                value = value if less is None else Binary("sub", value, stored(less, block, c, i))
                k.store(registers, (i, 0), value)
                k.store(self.sums, (block, c, i * lanes), load(registers, i, 0, lanes=lanes))

        def as_kept(registers: Buffer, block: Expr, c: Expr) -> None:
            for i in range(self.cut.nr):
                k.store(registers, (i, 0), load(self.sums, block, c, i * lanes, lanes=lanes))

        with k.when(binary("lt", at.p, ix.const(self.stored))):
            sums(as_stored)
        with k.otherwise():
            first = binary("eq", at.q, ix.const(0))
            with k.when(first):
                with k.when(binary("eq", at.p, ix.const(4))):
                    sums(difference)
                with k.otherwise():
                    subtracted = clamp(ix.add(at.p, -5), 0, 1)
                    sums(lambda registers, block, c: difference(registers, block, c, subtracted))
            with otherwise(k, first):
                sums(as_kept)

    def prefetch(self, k: Builder, u: Buffer, at: Place, block: Expr) -> None:
        """Ask for the stored sums that come next, each group for its share of the cache lines: not earlier, since V
        streams through L2 meanwhile."""
        line = _CACHE_LINE // self.bytes
        lines = self.column_lines()
        share = ceil(lines / self.cut.groups)
        following = binary("min", ix.add(at.p, 1), ix.const(self.stored))
        for each in range(share):
            number = ix.mod(ix.add(ix.mul(at.q, share), each), lines)
            k.prefetch(u, at.o, at.g, following, block, 0, ix.mul(number, line))

    def broadcast(self, v: Buffer, p: Expr, place: Expr, j: int, c: Expr) -> Expr:
        """The sum of inputs of step `c` of tile `j` in all lanes."""
        return splat(load(v, p, ix.add(place, j * self.lanes, c)), self.lanes)

    def added(self, acc: Expr, x: Expr, w: Expr) -> Expr:
        """``acc + x * w``."""
        return Fma(x, w, acc)

    # -- sums of inputs

    def inputs_kernel(self, target: str, type_: TensorType) -> Launch:
        """The sums of inputs as a kernel of its own."""
        k = Builder("strassen_inputs")
        operands = Operands(k, self.region, self.layouts)
        operands.define(target, type_)
        x, v = self.source.view(operands), operands.buffer(target)
        with k.parallel("item", self.chunks, self.depth) as (chunk, block):
            self.add_inputs(k, x, v, chunk, block, False)
        return operands.launch()

    def add_inputs(self, k: Builder, x: Buffer, v: Buffer, chunk: Expr, block: Expr, local: bool) -> None:
        """V of a chunk of groups and a block of inputs; `local`: V holds this chunk only."""
        cut, h, lanes = self.cut, self.halves, self.lanes
        last = ix.const(self.groups - 1)
        code = Named(k, lanes, "float32")
        with k.loop("q", cut.groups) as q, k.loop("j", cut.mr) as j:
            group = ix.add(ix.mul(chunk, cut.groups), q)
            with k.when(binary("le", group, last)):
                group = binary("min", group, last)
                # Past the last pair, and where there is no second row, one is multiplied once more, and not stored.
                pair = binary("min", ix.add(ix.mul(group, cut.mr), j), ix.const(h.pairs - 1))
                item, first = self.rows(pair)
                rows = first, binary("min", ix.add(first, 1), ix.const(h.rows - 1))
                quarters = [
                    code.name(self.source.inputs(x, (item, row), ix.add(block, half * h.blocks)))
                    for row in rows
                    for half in (0, 1)
                ]
                place = ix.add(ix.mul(q if local else group, self.depth), block)
                offset = ix.mul(ix.add(ix.mul(place, cut.mr), j), lanes)
                for position, signs in enumerate(INPUTS):
                    k.store(v, (position, offset), _sum(signs, quarters))

    def rows(self, pair: Expr) -> Row:
        """The first row of a pair."""
        item, number = ix.unflatten(pair, (self.halves.items, self.halves.pairs // self.halves.items))
        return item, ix.mul(number, 2)

    # -- sums of products

    def add_products(self, k: Builder, m: Buffer, chunk: Expr, o: Expr) -> None:
        """The outputs of a chunk of pairs of rows and a chunk of columns, stored through the tail."""
        cut, h, lanes = self.cut, self.halves, self.lanes
        code = Named(k, lanes, "float32")
        done = k.stack("done", (2, 2, lanes))
        with k.loop("g", cut.columns) as g, k.loop("i", cut.nr) as i:
            vector = ix.add(ix.mul(ix.add(ix.mul(o, cut.columns), g), cut.nr), i)
            with k.when(binary("lt", vector, ix.const(h.vectors))):
                vector = binary("min", vector, ix.const(h.vectors - 1))
                with k.loop("q", cut.groups) as q, k.loop("j", cut.mr) as j:
                    pair = ix.add(ix.mul(ix.add(ix.mul(chunk, cut.groups), q), cut.mr), j)
                    tile = (g, ix.add(ix.mul(q, cut.mr), j))
                    with k.when(binary("lt", pair, ix.const(h.pairs))):
                        places = [ix.add(p * cut.nr * lanes, ix.mul(i, lanes)) for p in range(POSITIONS)]
                        found = [code.name(load(m, *tile, place, lanes=lanes)) for place in places]
                        for number, signs in enumerate(OUTPUTS):
                            k.store(done, (*divmod(number, 2), 0), _sum(signs, found))
                        item, first = self.rows(binary("min", pair, ix.const(h.pairs - 1)))
                        with k.loop("r", 2) as r:
                            row = ix.add(first, r)
                            with k.when(binary("lt", row, ix.const(h.rows))):
                                self.finish(k, done, r, (item, binary("min", row, ix.const(h.rows - 1))), vector)

    def finish(self, k: Builder, done: Buffer, r: Expr, row: Row, vector: Expr) -> None:
        """Store a vector of outputs of both halves of a row."""
        for half in (0, 1):
            lane = Var(f"lane{half}", self.lanes)
            column = ix.add(ix.mul(ix.add(vector, half * self.halves.vectors), self.lanes), lane)
            value = Load(done, (r, ix.const(half), lane))
            statements = self.source.stores(self.operands, self.tail, row, column, value)
            k.emit(vectorize(statements, lane, ix.const(0), self.lanes))


def _sum(signs: Sequence[int], values: Sequence[Expr]) -> Expr:
    """The values whose sign is 1, added up, less those whose sign is -1."""
    positive, negative = ([value for s, value in zip(signs, values) if s == sign] for sign in (1, -1))
    result = positive[0]
    for value in positive[1:]:
        result = Binary("add", result, value)
    for value in negative:
        result = Binary("sub", result, value)
    return result


STRASSEN = StrassenFamily()
