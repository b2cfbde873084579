"""A convolution by Winograd's algorithm and a pool of 2x2 windows, which the tiles cover exactly, as one kernel."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod

from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine, Family, Layout, Lowered
from nestc.kernels.conv_shape import conv_shape
from nestc.kernels.fused import BARRIER_SECONDS, STREAM_RATE, Pair, element_bytes, joined_layouts, parts, rate
from nestc.kernels.operands import Index, Operands
from nestc.kernels.pool import POOL, WINDOWED, Pooling, pooling_of, windows
from nestc.kernels.position_products import Plan
from nestc.kernels.tail import Tail
from nestc.kernels.winograd import WINOGRAD, WinogradFamily, WinogradKernel
from nestc.kernels.winograd_matrices import Transform
from nestc.kernels.winograd_plan import Tiling, plan
from nestc.kernels.winograd_tiles import Code
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, clamp, constant, less
from nestc.tensor.ir import Buffer, Expr, Load, Var
from nestc.tensor.vectorize import vectorize


class WinogradPool:
    """Conv of stride 1 in tiles of an even number of outputs by `winograd`, its tail, and a MaxPool or AveragePool of
    2x2 windows side by side. Results are those of the two kernels to the bit."""

    exact = True

    def __init__(self, winograd: WinogradFamily = WINOGRAD[0]) -> None:
        self.winograd = winograd
        self.name = f"{winograd.name}_pool"

    def replacing(self, first: Family, second: Family) -> WinogradPool | None:
        """This family with the tiles of the convolution if that would be computed in even ones, else None."""
        return WinogradPool(first) if isinstance(first, WinogradFamily) and first.m % 2 == 0 else None

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        pair = parts(region)
        if pair is None:
            return "it is not two regions"
        if pair.first.ops[0].op_type != "Conv" or pair.anchor.op_type not in WINDOWED:
            return "they are not a convolution and a pool"
        reason = self.winograd.refusal(pair.first) or POOL.refusal(pair.second)
        if reason is not None:
            return reason
        axes = windows(pair.anchor, pair.second)
        if len(axes) != 2 or min(conv_shape(pair.first.ops[0], pair.first).kernel) == 1:
            return "only tiles of rows and columns are pooled"
        if any((w.kernel, w.stride, w.dilation, w.begin) != (2, 2, 1, 0) or 2 * w.out > w.size for w in axes):
            return "windows other than 2x2 side by side lie in several tiles"
        if pair.anchor.output(1) and pair.anchor.output(1) in region.outputs:
            return "places of maxima are not computed here"
        return None

    def gain(self, region: Region, machine: CpuMachine, threads: int) -> float:
        """Modelled seconds that are saved: the map between the two is not written and read."""
        pair = parts(region)
        assert pair is not None
        type_ = region.types[pair.between]
        between = 2 * element_bytes(type_) * prod(type_.shape)
        spared = between / min(STREAM_RATE, rate(machine, between // type_.shape[0]))
        return spared / threads + (BARRIER_SECONDS if threads > 1 else 0.0)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """As both want them, with blocks between them."""
        pair = parts(region)
        assert pair is not None
        before = self.winograd.layouts(pair.first, machine, {name: incoming[name] for name in pair.first.inputs})
        return joined_layouts(pair, before, POOL, machine, incoming)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """The kernels of the convolution, whose output transform pools."""
        pair = parts(region)
        assert pair is not None
        both = {**layouts, pair.between: Layout(machine.lanes("float32"))}
        tiling = self.winograd.tiling(pair.first, machine)
        return _Pooled(region, pair, both, tiling, plan(tiling, self.winograd.fused)).lower()


class _Pooled(WinogradKernel):
    """Builds the kernels: outputs of a tile lie in a small array until they are pooled."""

    pooling: Pooling
    tile: Buffer

    def __init__(self, region: Region, pair: Pair, layouts: Mapping[str, Layout], tiling: Tiling, cut: Plan) -> None:
        super().__init__(region, pair.first.ops[0], layouts, tiling, cut)
        self.pair = pair
        self.top: Expr = ix.const(0)
        self.across = 0

    def output_tail(self, operands: Operands) -> Tail:
        """Outputs go into the array."""
        shape = (self.vertical.m, self.horizontal.m, self.lanes)
        self.tile = operands.builder.stack("tile", shape)
        operands.hold(self.pair.between, self.tile, self.place)
        self.pooling = pooling_of(self.pair.anchor, operands.part(self.pair.second))
        self.pooling.declare()
        return Tail(operands.part(self.pair.first), self.op)

    def place(self, index: Index) -> Index:
        """Place of an output in the array."""
        row = clamp(ix.sub(index[2], self.top), 0, self.vertical.m - 1)
        return row, ix.const(self.across), ix.mod(index[1], self.lanes)

    def finish(self, k: Builder, result: Buffer, i: int, n: Expr, vector: Expr, row: Expr, column: Expr) -> None:
        """Store output `i` of a row through the tail."""
        self.across = i
        super().finish(k, result, i, n, vector, row, column)

    def output_tile(
        self, k: Builder, code: Code[Transform], half: Buffer, vector: Expr, corner: tuple[Expr, Expr, Expr]
    ) -> None:
        """Transform the rows of a tile back, and store what its windows give."""
        n, top, left = corner
        rows, columns = self.vertical.m // 2, self.horizontal.m // 2
        self.top = ix.mul(top, self.vertical.m)
        super().output_tile(k, code, half, vector, corner)
        out = self.region.types[self.pair.anchor.outputs[0]].shape[2:]
        combine = self.pooling.combine
        scale = constant(1 / 4, combine.dtype) if combine.kind == "mean" else None
        with k.loop("p", rows) as p:
            row = ix.add(ix.mul(top, rows), p)
            for q in range(columns):
                column = ix.add(ix.mul(left, columns), q)
                with k.when(binary("and", less(row, out[0]), less(column, out[1]))):
                    lane = Var(f"lane_of_{q}", self.lanes)
                    taps = [
                        Load(self.tile, (ix.add(ix.mul(p, 2), i), ix.const(2 * q + j), lane))
                        for i, j in product(range(2), repeat=2)
                    ]
                    total = combine.pre(taps[0])
                    for tap in taps[1:]:
                        total = combine.two(total, combine.pre(tap))
                    place = (binary("min", row, ix.const(out[0] - 1)), binary("min", column, ix.const(out[1] - 1)))
                    index = (n, ix.add(ix.mul(vector, self.lanes), lane), *place)
                    k.emit(vectorize(self.pooling.stores(index, total, scale), lane, ix.const(0), self.lanes))


WINOGRAD_POOL = WinogradPool()
