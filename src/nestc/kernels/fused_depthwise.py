"""A depthwise convolution and the 1x1 convolution that reads it, as one kernel by bands of rows that stay in L2."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod

from nestc.graph.region import Op, Region
from nestc.kernels.api import CpuMachine, Family, Layout, Lowered
from nestc.kernels.choices import CONV_BY_RULE, below
from nestc.kernels.conv import CONV, ConvFamily, Direct, depthwise
from nestc.kernels.conv_shape import ConvShape, conv_shape, register_tiles
from nestc.kernels.depthwise import Depthwise
from nestc.kernels.fused import BARRIER_SECONDS, FLOPS_PER_SECOND, Pair, element_bytes, idle, parts, rate
from nestc.kernels.operands import Index, Operands
from nestc.tensor import index as ix
from nestc.tensor.build import Builder
from nestc.tensor.ir import Expr

_CACHE_LINE = 64

_BAND_PIXELS, _BANDS = 192, 8
"""Pixels of a band at least, where there are as many, since each group of outputs reads its weights once a band; then
as many bands of an image. Longer runs of rows are read faster."""

_SPARE, _MOST_VECTORS = 2, 4
"""Registers that a tile leaves free, and vectors of outputs that it has at most."""

_SLOWER = 0.05
"""What the products take longer than in a kernel of their own, with the tile and order that was measured for them."""


class DepthwisePointwise:
    """Conv with a channel a group, its tail, and a Conv 1x1 of stride 1 with its tail, in float32 or float64.

    What the first makes lies in scratch memory, a band of rows at a time. Products are added in the same order as by
    the two kernels, so the results are the same to the bit.
    """

    name = "depthwise_pointwise"
    exact = True

    def replacing(self, first: Family, second: Family) -> DepthwisePointwise | None:
        """This family if both would be computed directly, else None."""
        return self if isinstance(first, ConvFamily) and isinstance(second, ConvFamily) else None

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        pair = parts(region)
        if pair is None:
            return "it is not two regions"
        if pair.first.ops[0].op_type != "Conv" or pair.anchor.op_type != "Conv":
            return "they are not two convolutions"
        reason = CONV.refusal(pair.first) or CONV.refusal(pair.second)
        if reason is not None:
            return reason
        first, second = _shapes(pair)
        if not depthwise(first) or not second.pointwise or second.group != 1:
            return "they are not a depthwise convolution and a pointwise one"
        if len(first.squeezed().out) != 2:
            return "only maps of rows and columns are cut into bands"
        return None

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """As both convolutions want them."""
        pair = parts(region)
        assert pair is not None
        block = Layout(machine.lanes("float32"))
        before = CONV.layouts(pair.first, machine, {name: incoming[name] for name in pair.first.inputs})
        after = CONV.layouts(pair.second, machine, {n: incoming.get(n, block) for n in pair.second.inputs})
        both = {**after, **before}
        return {name: both[name] for name in (*region.inputs, *region.outputs)}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel; an item of its parallel loop is a band of rows of an image."""
        pair = parts(region)
        assert pair is not None
        operands = Operands(Builder("depthwise_pointwise"), region, layouts)
        return _Banded(pair, operands, machine, layouts).lower()

    def gain(self, region: Region, machine: CpuMachine, threads: int) -> float:
        """Modelled seconds that one kernel saves: the map between the two is neither written nor read, and threads meet
        once less; but each band reads the weights again, and bands may be too few for the threads."""
        pair = parts(region)
        assert pair is not None
        first, second = _shapes(pair)
        element = element_bytes(region.types[pair.between])
        rows = band_rows(first, element, machine)
        bands = first.batch * (first.squeezed().out[0] // rows)
        between = element * first.batch * first.out_channels * prod(first.out)
        source = element * first.batch * first.in_channels * prod(first.size)
        weights = element * second.in_channels * second.out_channels
        band = between // bands
        saved = 2 * between / rate(machine, between + source) + (BARRIER_SECONDS if threads > 1 else 0.0)
        work = second.flops / FLOPS_PER_SECOND
        again = (bands - 1) * weights / rate(machine, weights + band)
        return saved - _SLOWER * work - again - idle(bands, threads) * (work + first.flops / FLOPS_PER_SECOND)


def _shapes(pair: Pair) -> tuple[ConvShape, ConvShape]:
    return conv_shape(pair.first.ops[0], pair.first), conv_shape(pair.anchor, pair.second)


def band_rows(shape: ConvShape, element: int, machine: CpuMachine) -> int:
    """Rows of a band of the depthwise outputs: a divisor of their number whose band takes at most half of L2."""
    rows, length = shape.squeezed().out
    lines = max(ceil(_BAND_PIXELS / length), rows // _BANDS)
    room = machine.l2_bytes // 2 // (shape.out_channels * length * element)
    return below(rows, max(1, min(lines, room)))


class _Products(Direct):
    """The 1x1 convolution of one band at a time: a band is a row of pixels."""

    def __init__(
        self, region: Region, op: Op, machine: CpuMachine, layouts: Mapping[str, Layout], bands: int, operands: Operands
    ) -> None:
        self.bands = bands
        super().__init__(region, op, conv_shape(op, region), machine, layouts, 1, CONV_BY_RULE)
        self.operands, self.builder = operands, operands.builder
        self.row_chunk = 1

    def register_tile(self, vectors: int, pixels: int, registers: int) -> tuple[int, int]:
        # LLVM keeps constants of the first tail in registers here, too; a tile that fills all spills its weights.
        tiles = register_tiles(vectors, pixels, registers - _SPARE)
        return next((tile for tile in tiles if tile[1] <= _MOST_VECTORS), tiles[0])

    def fold(self, pixels: int, widest: int) -> tuple[int, int]:
        return self.bands, pixels // self.bands


class _Banded:
    """Builds the kernel. An item computes its band of depthwise rows, all channels, into scratch memory
    [block of channels][pixel][lanes], then every group of outputs from it."""

    def __init__(self, pair: Pair, operands: Operands, machine: CpuMachine, layouts: Mapping[str, Layout]) -> None:
        self.pair, self.operands = pair, operands
        shape, _ = _shapes(pair)
        self.shape = shape
        self.lanes = machine.lanes("float32")
        self.dtype = operands.type(pair.between).dtype
        element = element_bytes(operands.type(pair.between))
        self.rows = band_rows(shape, element, machine)
        self.bands = shape.out[0] // self.rows
        # A band's first row, known within the parallel loop.
        self.start: Expr = ix.const(0)
        pixels = self.rows * shape.out[1]
        blocks = ceil(shape.out_channels / self.lanes)
        # An odd number of cache lines: blocks at a power of two apart would share the same sets of the cache.
        each = max(1, _CACHE_LINE // (self.lanes * element))
        stride = each * (ceil(pixels / each) | 1)
        band = operands.builder.scratch("band", (blocks, stride, self.lanes), self.dtype)
        operands.hold(pair.between, band, self.place)
        self.depthwise = Depthwise(operands.part(pair.first), pair.first.ops[0], shape, machine)
        part = operands.part(pair.second)
        self.products = _Products(pair.second, pair.anchor, machine, layouts, self.bands, part)

    def place(self, index: Index) -> Index:
        _, channel, row, column = index
        pixel = ix.add(ix.mul(ix.sub(row, self.start), self.shape.out[1]), column)
        return ix.floordiv(channel, self.lanes), pixel, ix.mod(channel, self.lanes)

    def lower(self) -> Lowered:
        k, s = self.operands.builder, self.shape
        constants = {**self.depthwise.declare(), **self.products.declare()}
        with k.parallel("band", s.batch, self.bands) as (n, band):
            self.start = ix.mul(band, self.rows)
            with k.loop("b", self.depthwise.blocks) as block, k.loop("y", self.rows) as row:
                self.depthwise.one_row(n, block, ix.add(self.start, row))
            with k.loop("oc", self.products.group_chunks) as oc:
                self.products.rows(n, oc, band, 1)
        return Lowered((self.operands.launch(),), constants={**self.operands.constants, **constants})


DEPTHWISE_POINTWISE = DepthwisePointwise()
