"""Depthwise convolution of 8-bit maps: rows are widened to 16 bits in pairs, so that one multiply-add does two taps.

Every multiply-add takes the same channel of two neighbouring kernel rows: 2 * lanes products of 16 bits become lanes
sums of 32 bits (x86 pmaddwd), which is exact. A 3x3 kernel is six of them for one vector of outputs. A kernel of one
tap has no second row, and multiplies what it loads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered, to_layout
from nestc.kernels.conv_shape import ConvShape, Tile, conv_shape, cut_row
from nestc.kernels.operands import Operands
from nestc.kernels.quantized import Quantized, QuantizedAnchor, quantized_anchor, sums_fit
from nestc.kernels.requantize import Requantize
from nestc.kernels.tail import tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, constant, load, within
from nestc.tensor.ir import Buffer, Cast, Const, Dot, Expr, Load, Shuffle, Var
from nestc.tensor.vectorize import vectorize

BYTES = ("int8", "uint8")
_STAGED_BYTES = 16 << 10  # widened rows of one item: half of the smallest L1
_UNROLLED_TAPS = 7  # wider kernels loop over their columns
_WIDEST = 8  # outputs of one register tile
_COPIED = 4  # pairs of pixels that one step of widening handles


class DepthwiseInt8Family:
    """Depthwise Conv (multiplier 1, one or two spatial axes) of int8 or uint8 maps and weights."""

    name = "depthwise_int8"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        found = quantized_anchor(region)
        if found is None or found.op.op_type != "Conv":
            return "its anchor is not a Conv with quantized operands"
        op = found.op
        x, w = found.operand(0), found.operand(1)
        if x is None or w is None or x.dtype not in BYTES or w.dtype not in BYTES:
            return f"Conv (node {op.name!r}) does not multiply 8-bit integers"
        if x.scale.ndim or w.block or (w.scale.ndim and w.axis != 0):
            return f"the scales of Conv (node {op.name!r}) do not belong to the input or to output channels"
        if w.name not in region.constants or (op.input(2) and bias_values(found, region) is None):
            return f"the weights of Conv (node {op.name!r}) are not constant"
        if not 3 <= len(region.types[op.inputs[0]].shape) <= 4:
            return "only 1 or 2 spatial axes are taken"
        if 0 in region.types[op.outputs[0]].shape or 0 in region.types[op.inputs[0]].shape:
            return "an axis is empty"
        shape = conv_shape(op, region)
        if not shape.group == shape.in_channels == shape.out_channels > 1:
            return f"Conv (node {op.name!r}) is not depthwise"
        if not sums_fit(region, x, w):
            return f"sums of Conv (node {op.name!r}) do not fit in 32 bits"
        return tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything blocked that has the shape of a map."""
        found = quantized_anchor(region)
        assert found is not None
        x = found.operand(0)
        assert x is not None
        block = Layout(machine.lanes("float32"))
        shape = region.types[found.op.outputs[0]].shape
        result = {**incoming, x.name: block}
        for name in region.inputs:
            if name != x.name:
                result[name] = block if region.types[name].shape == shape else PLAIN
        return {**result, **dict.fromkeys(region.outputs, block)}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel: each item widens the rows that it needs and sums over them."""
        found = quantized_anchor(region)
        assert found is not None
        return _Depthwise(region, found, machine, layouts).lower()


def bias_values(found: QuantizedAnchor, region: Region) -> np.ndarray | None:
    """The bias (operand 2) as float64 real values; None if it is not constant. Call it where there is one."""
    name, quantized = found.op.input(2), found.operand(2)
    array = region.constant(name if quantized is None else quantized.name)
    if array is None:
        return None
    return (array if quantized is None else quantized.values(array)).astype(np.float64)


def int32_bias(found: QuantizedAnchor, region: Region, scale: np.ndarray) -> np.ndarray | None:
    """The bias (operand 2) in units of `scale` (float64, one or a channel) if it is one of int32 in these units, small
    enough to be part of the sum."""
    x, w, quantized = (found.operand(i) for i in range(3))
    if quantized is None or quantized.dtype != "int32" or np.any(quantized.zero_point):
        return None
    if not np.allclose(quantized.scale.astype(np.float64), scale, rtol=1e-5, atol=0):
        return None
    bias = region.constant(quantized.name)
    assert x is not None and w is not None
    return bias if bias is not None and sums_fit(region, x, w, bias) else None


class _Depthwise:
    def __init__(
        self, region: Region, found: QuantizedAnchor, machine: CpuMachine, layouts: Mapping[str, Layout]
    ) -> None:
        self.region, self.found, self.op = region, found, found.op
        x, w = found.operand(0), found.operand(1)
        assert x is not None and w is not None
        self.x: Quantized = x
        self.w: Quantized = w
        self.shape = _two_axes(conv_shape(found.op, region))
        self.rank = len(region.types[found.op.outputs[0]].shape) - 2
        self.lanes = machine.lanes("float32")
        self.builder = Builder("depthwise_int8")
        self.operands = Operands(self.builder, region, layouts)
        self._plan(machine)

    def _plan(self, machine: CpuMachine) -> None:
        """How many rows an item has, and the widened rows that they need.

        Rows a dilation apart are neighbours to a kernel, so staged rows are grouped by their remainder. Pair j of
        remainder c holds rows ``2 * j * dilation + c`` and one dilation below, counted from the item's first row.
        Outputs whose first row is the second of a pair use weights that are shifted by one row.
        """
        s = self.shape
        dilation, stride = s.dilations[0], s.strides[0]
        self.columns = s.kernel[1]
        reach = [(out - 1) * step < size for out, step, size in zip(s.out, s.strides, s.size, strict=True)]
        self.single = s.kernel == (1, 1) and not any(s.pads_begin) and all(reach)
        self.width = (s.out[1] - 1) * s.strides[1] + (s.kernel[1] - 1) * s.dilations[1] + 1
        self.parities = 1 if dilation == 1 and stride % 2 == 0 else 2
        self.pairs = (s.kernel[0] + self.parities) // 2
        row_bytes = self.width * self.lanes * 2
        most = max(1, (_STAGED_BYTES // row_bytes - (s.kernel[0] - 1) * dilation) // stride)
        parts = ceil(s.out[0] / min(most, s.out[0]))
        self.rows = ceil(s.out[0] / parts)
        self.parts = ceil(s.out[0] / self.rows)
        self.staged_pairs = (self.rows - 1) * stride // dilation // 2 + self.pairs
        registers = machine.vector_registers - min(self.columns, _UNROLLED_TAPS) - 2
        self.widest = max(2, min(_WIDEST, registers))

    def lower(self) -> Lowered:
        s, k, lanes = self.shape, self.builder, self.lanes
        scale = np.float64(self.x.scale) * self.w.scale.astype(np.float64)
        integers = int32_bias(self.found, self.region, scale) if self.op.input(2) else None
        real = bias_values(self.found, self.region) if self.op.input(2) and integers is None else None
        constants = self.pack(integers)
        self.weights = self.operands.buffer(f"{self.w.name}.packed")
        self.start = self.operands.buffer(f"{self.w.name}.start")
        # The input is read as rows of bytes, whatever the pixels in them; the tail may read the same map as it is.
        rows = (s.batch, ceil(s.out_channels / lanes), s.size[0], s.size[1] * lanes)
        self.input = self.operands.view(self.x.name, rows)
        self.tail = Requantize(self.operands, self.region, self.op, scale, 1, real)
        self.bytes_out, self.bytes_in = self.narrow_views()
        if self.bytes_out is None:
            self.tail.declare()
        tiles = cut_row(s.out[1], self.width, self.columns, s.strides[1], s.dilations[1], 0, self.widest)
        self.acc = k.regs("acc", (max(t.width for t in tiles),), lanes, "int32")
        if not self.single:
            self.wreg = k.regs("w", (min(self.columns, _UNROLLED_TAPS),), 2 * lanes, "int16")
            self.xreg = k.regs("x", (), 2 * lanes, "int16")
            self.staged = k.scratch("staged", (s.dilations[0], self.staged_pairs, self.width, 2 * lanes), "int16")
        with k.parallel("item", s.batch, ceil(s.out_channels / lanes), self.parts) as (n, block, part):
            first = ix.add(ix.mul(part, self.rows * s.strides[0]), -s.pads_begin[0])
            if not self.single:
                with k.loop("c", s.dilations[0]) as c, k.loop("j", self.staged_pairs) as j:
                    self.stage(n, block, first, c, j)
            with k.loop("r", self.rows) as r:
                row = ix.add(ix.mul(part, self.rows), r)
                with k.when(binary("lt", row, ix.const(s.out[0]))):
                    for tile in tiles:
                        with k.loop("t", tile.count) as t:
                            self.tile(tile, n, block, row, r, ix.add(ix.mul(t, tile.width), tile.start))
        return Lowered((self.operands.launch(),), constants={**self.operands.constants, **constants})

    def pack(self, bias: np.ndarray | None) -> dict[str, np.ndarray]:
        """Weights [C, 1, KH, KW] -> int16 [C/lanes][parity][pair][KW][lane][2], or int32 [C/lanes][lanes] of a single
        tap; int32 sums to start from, the bias less what the input's zero point adds, [C/lanes][lanes]."""
        s, lanes = self.shape, self.lanes
        weights = self.region.constant(self.w.name)
        assert weights is not None
        zero = self.w.zero_point.reshape(-1, 1, 1) if self.w.zero_point.ndim else self.w.zero_point
        taps = (weights.reshape(-1, *s.kernel).astype(np.int32) - zero).astype(np.int16)
        blocked = to_layout(taps[None], Layout(lanes))[0]
        blocks = blocked.shape[0]
        packed = np.zeros((blocks, self.parities, self.pairs, s.kernel[1], lanes, 2), np.int16)
        for parity in range(self.parities):
            for tap in range(s.kernel[0]):
                pair, half = divmod(tap + parity, 2)
                packed[:, parity, pair, :, :, half] = blocked[:, tap]
        start = -int(self.x.zero_point) * taps.astype(np.int64).sum((1, 2)) + (0 if bias is None else bias)
        arrays: dict[str, np.ndarray] = {
            f"{self.w.name}.packed": blocked.reshape(blocks, lanes).astype(np.int32)
            if self.single
            else packed.reshape(*packed.shape[:4], 2 * lanes),
            f"{self.w.name}.start": to_layout(start.astype(np.int32).reshape(1, -1), Layout(lanes))[0],
        }
        for name, array in arrays.items():
            self.operands.define(name, TensorType(str(array.dtype), array.shape))
        return arrays

    # -- widening

    def stage(self, n: Expr, block: Expr, first: Expr, c: Expr, j: Expr) -> None:
        """One pair of rows as 16-bit integers, their pixels interleaved; the zero point outside."""
        s, k, lanes = self.shape, self.builder, self.lanes
        dilation, begin = s.dilations[0], s.pads_begin[1]
        above = ix.add(first, ix.mul(j, 2 * dilation), c)
        below = ix.add(above, dilation)
        stop = max(begin, min(begin + s.size[1], self.width))
        nothing = constant(int(self.x.zero_point), "int16", 2 * lanes)
        for start, count in ((0, min(begin, self.width)), (stop, self.width - stop)):
            with k.loop("outside", count) as i:
                k.store(self.staged, (c, j, ix.add(i, start), 0), nothing)
        rows = [(n, block, row) for row in (above, below)]
        tests = [within(row, s.size[0]) for row in (above, below)]

        def copied(halves: Sequence[bool]) -> None:
            given = [row if inside else None for row, inside in zip(rows, halves)]
            self.copy_pair(given, (c, j), begin, stop - begin, _COPIED if all(halves) else 1)

        def decided(halves: tuple[bool, ...]) -> None:
            """Branch on which rows are inside."""
            if len(halves) == 2:
                copied(halves)
                return
            test = tests[len(halves)]
            with k.when(test):
                decided((*halves, True))
            if isinstance(test, Const):
                if not test.value:
                    decided((*halves, False))
                return
            with k.otherwise():
                decided((*halves, False))

        decided(())

    def copy_pair(
        self, rows: Sequence[tuple[Expr, ...] | None], at: tuple[Expr, Expr], begin: int, count: int, unroll: int
    ) -> None:
        """Pixels of two rows, two at a time: bytes are interleaved, then widened. None is a row of zero points."""
        k, lanes = self.builder, self.lanes

        def pixels(column: Expr, step: int) -> None:
            a, b = (self.bytes(row, column, step * lanes) for row in rows)
            for p in range(step):
                picks = tuple(half * step * lanes + p * lanes + lane for lane in range(lanes) for half in (0, 1))
                k.store(self.staged, (*at, ix.add(column, begin + p), 0), Cast(Shuffle(a, b, picks), "int16"))

        full = count // (2 * unroll)
        with k.loop("col", full) as i, k.unroll("u", unroll) as u:
            pixels(ix.add(ix.mul(i, 2 * unroll), ix.mul(u, 2)), 2)
        with k.loop("col", count // 2 - full * unroll) as i:
            pixels(ix.add(ix.mul(i, 2), full * 2 * unroll), 2)
        if count % 2:
            pixels(ix.const(count - 1), 1)

    def bytes(self, row: tuple[Expr, ...] | None, column: Expr, count: int) -> Expr:
        """Neighbouring channels and pixels of a row."""
        if row is None:
            return constant(int(self.x.zero_point), self.x.dtype, count)
        return load(self.input, *row, ix.mul(column, self.lanes), lanes=count)

    # -- sums

    def tile(self, tile: Tile, n: Expr, block: Expr, row: Expr, r: Expr, start: Expr) -> None:
        """Neighbouring outputs of a row, each in a register."""
        k, lanes = self.builder, self.lanes
        if self.single:
            self.scaled(tile, n, block, row, start)
        else:
            self.sums(tile, block, r, start)
        outer = (row,) if self.rank == 2 else ()
        if self.bytes_out is not None:
            self.finish_row(tile, self.bytes_out, (n, block, *outer), start)
            return
        for j in range(tile.width):
            lane = Var(f"lane{j}", lanes)
            index = (n, ix.add(ix.mul(block, lanes), lane), *outer, ix.add(start, j))
            value = Load(self.acc, (ix.const(j), lane))
            k.emit(vectorize(self.tail.stores(index, value), lane, ix.const(0), lanes))

    def scaled(self, tile: Tile, n: Expr, block: Expr, row: Expr, start: Expr) -> None:
        """Outputs of a single tap: bytes are widened and multiplied as they come."""
        s, k, lanes = self.shape, self.builder, self.lanes
        source = (n, block, ix.mul(row, s.strides[0]))
        for j in range(tile.width):
            pixel = self.bytes(source, ix.mul(ix.add(start, j), s.strides[1]), lanes)
            product = binary("mul", Cast(pixel, "int32"), load(self.weights, block, 0, lanes=lanes))
            k.store(self.acc, (j, 0), binary("add", product, load(self.start, block, 0, lanes=lanes)))

    def sums(self, tile: Tile, block: Expr, r: Expr, start: Expr) -> None:
        """Outputs as sums over pairs of staged rows."""
        s, k, lanes = self.shape, self.builder, self.lanes
        for j in range(tile.width):
            k.store(self.acc, (j, 0), load(self.start, block, 0, lanes=lanes))
        place = ix.mul(r, s.strides[0])
        remainder, above = ix.mod(place, s.dilations[0]), ix.floordiv(place, s.dilations[0])
        parity = ix.const(0) if self.parities == 1 else ix.mod(above, 2)
        pair = ix.floordiv(above, 2)
        for p in range(self.pairs):
            self.row(tile, (block, parity, ix.const(p)), (remainder, ix.add(pair, p)), start)

    def narrow_views(self) -> tuple[Buffer | None, Buffer | None]:
        """The output as (image, block of channels, outer axis, bytes of a row), if the tail ends in one quantization
        and every block is full; and the map that the tail adds, in the same way."""
        s, lanes = self.shape, self.lanes
        other = None if self.tail.residual is None else self.tail.residual.other
        names = [self.region.outputs[0], *([] if other is None else [other])]
        if not self.tail.narrows or s.out_channels % lanes:
            return None, None
        if any(self.operands.layout(name).block != lanes for name in names):
            return None, None
        rows = s.out[:-1] if self.rank == 2 else ()
        shape = (s.batch, s.out_channels // lanes, *rows, s.out[-1] * lanes)
        views = [self.operands.view(name, shape) for name in names]
        return views[0], None if other is None else views[1]

    def finish_row(self, tile: Tile, out: Buffer, row: tuple[Expr, ...], start: Expr) -> None:
        """Store a tile, four neighbouring pixels together; the last ones may be stored twice."""
        k, lanes = self.builder, self.lanes
        step = next(count for count in (4, 2, 1) if count <= tile.width)
        for done in dict.fromkeys([*range(0, tile.width - step + 1, step), tile.width - step]):
            places = [ix.mul(ix.add(start, done + j), lanes) for j in range(step)]
            sums = [load(self.acc, done + j, 0, lanes=lanes) for j in range(step)]
            others = [] if self.bytes_in is None else [load(self.bytes_in, *row, at, lanes=lanes) for at in places]
            k.store(out, (*row, places[0]), self.tail.narrow(ix.mul(row[1], lanes), sums, others))

    def row(self, tile: Tile, taps: tuple[Expr, ...], staged: tuple[Expr, Expr], start: Expr) -> None:
        """One pair of kernel rows: each staged column is loaded once and multiplied into every output it reaches."""
        s, k, lanes = self.shape, self.builder, self.lanes
        stride, dilation = s.strides[1], s.dilations[1]
        first = ix.mul(start, stride)
        if self.columns > _UNROLLED_TAPS:
            with k.loop("kw", self.columns) as kw:
                k.store(self.wreg, (0, 0), load(self.weights, *taps, kw, 0, lanes=2 * lanes))
                for j in range(tile.width):
                    column = ix.add(first, j * stride, ix.mul(kw, dilation))
                    k.store(self.xreg, (0,), load(self.staged, *staged, column, 0, lanes=2 * lanes))
                    self.multiply(j, 0)
            return
        for kw in range(self.columns):
            k.store(self.wreg, (kw, 0), load(self.weights, *taps, kw, 0, lanes=2 * lanes))
        reach: dict[int, list[tuple[int, int]]] = {}
        for kw in range(self.columns):
            for j in range(tile.width):
                reach.setdefault(j * stride + kw * dilation, []).append((j, kw))
        for column in sorted(reach):
            k.store(self.xreg, (0,), load(self.staged, *staged, ix.add(first, column), 0, lanes=2 * lanes))
            for j, kw in reach[column]:
                self.multiply(j, kw)

    def multiply(self, j: int, kw: int) -> None:
        lanes = self.lanes
        x, w = Load(self.xreg, (ix.const(0),), 2 * lanes), load(self.wreg, kw, 0, lanes=2 * lanes)
        self.builder.store(self.acc, (j, 0), Dot(load(self.acc, j, 0, lanes=lanes), x, w))


def _two_axes(shape: ConvShape) -> ConvShape:
    """The same convolution with two spatial axes."""
    if len(shape.size) == 2:
        return shape
    one, none = (1,), (0,)
    return ConvShape(
        shape.batch,
        shape.group,
        shape.in_channels,
        shape.out_channels,
        one + shape.size,
        one + shape.out,
        one + shape.kernel,
        one + shape.strides,
        one + shape.dilations,
        none + shape.pads_begin,
    )


DEPTHWISE_INT8 = DepthwiseInt8Family()
