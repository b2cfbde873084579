"""Direct convolution over channel-blocked maps: any kernel, stride, dilation, padding and number of spatial axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered
from nestc.kernels.choices import CONV_BY_RULE, ConvChoice, below
from nestc.kernels.conv_pick import pick_pixels, strided_pointwise
from nestc.kernels.conv_shape import (
    ConvShape,
    Tile,
    columns_pay,
    conv_shape,
    cut_row,
    fold_pixels,
    met,
    register_tile,
    register_tiles,
)
from nestc.kernels.operands import Operands
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, constant, load, splat, within
from nestc.tensor.ir import Buffer, Expr, Fma, Load, Var
from nestc.tensor.vectorize import vectorize

_CACHE_LINE = 64
_ITEM_FLOPS = 1_000_000  # least work of one parallel item: some 10 us
_LEAST_ITEMS = 16  # items that large weights leave for the workers to share
_LONG_SUM = 512  # products of a sum that may be worth cutting, to be measured
_OTHER_TILES = 3  # worth measuring
_COLUMNS_TOGETHER = 4  # kernel columns that are written out; all 128 of a long stride are slower to fetch and decode


class ConvFamily:
    """Conv on floating-point tensors: dense, grouped with whole channel blocks a group, and depthwise.

    What `choice` leaves open goes by rule; depthwise kernels have no such parameters.
    """

    def __init__(self, choice: ConvChoice = CONV_BY_RULE) -> None:
        self.choice = choice
        self.name = f"conv{choice.text}"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        op = _anchor(region)
        if op is None:
            return "its anchor is not Conv"
        dtype = region.types[op.inputs[0]].dtype
        if dtype not in ("float32", "float64"):
            return f"Conv on {dtype} is not for this family"
        if op.inputs[1] not in region.constants:
            return f"the weights of {op.name!r} are not constant"
        if not 3 <= len(region.types[op.inputs[0]].shape) <= 5:
            return "only 1 to 3 spatial axes are blocked"
        if 0 in region.types[op.outputs[0]].shape or 0 in region.types[op.inputs[0]].shape:
            return "an axis is empty"
        return tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Blocked output, and blocked input unless it has few channels."""
        op = _anchor(region)
        assert op is not None
        block = Layout(machine.lanes("float32"))
        shape = conv_shape(op, region)
        result = dict(incoming)
        # Few channels are read as they come (the first layer of a vision model); planes of many channels would be
        # a cache line each, and often all in the same cache set.
        if depthwise(shape) or shape.in_channels >= 2 * block.block:
            result[op.inputs[0]] = block
        rank = len(region.types[op.outputs[0]].shape)
        for name in region.inputs:
            if name != op.inputs[0] and region.types[name].shape == region.types[op.outputs[0]].shape:
                result[name] = block
            elif name != op.inputs[0] and len(region.types[name].shape) != rank:
                result[name] = PLAIN
        result.update(dict.fromkeys(region.outputs, block))
        return result

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel; the weights are packed so that it reads them in one stream."""
        op = _anchor(region)
        assert op is not None
        shape = conv_shape(op, region)
        if depthwise(shape):
            from nestc.kernels.depthwise import lower_depthwise

            return lower_depthwise(region, op, shape, machine, layouts)
        return lower_dense(region, op, shape, machine, layouts, Direct, self.choice)


def lower_dense(
    region: Region,
    op: Op,
    shape: ConvShape,
    machine: CpuMachine,
    layouts: Mapping[str, Layout],
    kernel: type[Direct],
    choice: ConvChoice = CONV_BY_RULE,
) -> Lowered:
    """A convolution that is not depthwise, by `kernel`."""
    if not _blocked_groups(shape, machine.lanes("float32")):
        return kernel(region, op, _merge_groups(shape), machine, layouts, shape.group, choice).lower()
    if strided_pointwise(shape) and layouts[op.inputs[0]].block:
        picked = pick_pixels(region, op, shape, layouts)
        inner = conv_shape(picked.op, picked.region)
        rest = kernel(picked.region, picked.op, inner, machine, picked.layouts, 1, choice).lower()
        return Lowered((picked.launch, *rest.launches), picked.temporaries, rest.constants)
    return kernel(region, op, shape, machine, layouts, 1, choice).lower()


def _anchor(region: Region) -> Op | None:
    return next((op for op in region.ops if op.op_type == "Conv" and not op.domain), None)


def depthwise(shape: ConvShape) -> bool:
    """Whether every channel is a group of its own."""
    return shape.group == shape.in_channels == shape.out_channels and shape.group > 1


def _blocked_groups(shape: ConvShape, lanes: int) -> bool:
    """Whether every vector of output channels lies in one group."""
    return shape.group == 1 or (shape.out_channels // shape.group) % lanes == 0


def _merge_groups(shape: ConvShape) -> ConvShape:
    """The same convolution as a dense one, whose weights are zero across groups."""
    return ConvShape(
        shape.batch,
        1,
        shape.in_channels,
        shape.out_channels,
        shape.size,
        shape.out,
        shape.kernel,
        shape.strides,
        shape.dilations,
        shape.pads_begin,
    )


@dataclass(frozen=True)
class _At:
    """Where a tile stands: image, group of output vectors, outer output axes, first output along the row, the row
    within the item, the chunk of input blocks, and how many tiles of the chunk came before it."""

    n: Expr
    oc: Expr
    outer: tuple[Expr, ...]
    start: Expr
    row: Expr
    chunk: Expr
    number: Expr


class Direct:
    """Builds the kernel of one dense (or block-grouped) convolution.

    Items of the parallel loop are (batch, group of output vectors, chunk of output rows). An item walks its rows and
    register tiles; for each tile it sums over input blocks, kernel rows and columns with ``mr * nr`` vector
    accumulators, broadcasting inputs against streamed weights
    [group of outputs][input block][kernel][lane][nr * lanes].
    Where the weights of an item are larger than half of L1, input blocks are taken in chunks that are not: all tiles of
    the item use a chunk before the next one, and partial sums wait in scratch memory.

    A multiplication takes `together` neighbouring input channels (one, but for kernels on narrower factors).
    """

    together = 1

    def __init__(
        self,
        region: Region,
        op: Op,
        shape: ConvShape,
        machine: CpuMachine,
        layouts: Mapping[str, Layout],
        zero_groups: int,
        choice: ConvChoice,
    ) -> None:
        self.region = region
        self.op = op
        self.zero_groups = zero_groups
        self.choice = choice
        self.machine = machine
        self.dtype = region.types[op.outputs[0]].dtype
        self.factor = region.types[op.inputs[0]].dtype
        self.element = {"float64": 8, "float32": 4}.get(self.factor, 2)
        self.lanes = machine.lanes("float32")
        registers = machine.tile_registers if self.dtype == "float32" else machine.tile_registers // 2
        self.registers = registers
        # Of few channels the loops around are written out: a tile that is spilled is so all the time (a first layer of
        # 3 channels then takes 1.4 to 2 times as long). Long kernels stream their weights, which wide tiles use more.
        taps = prod(shape.kernel) * (shape.in_channels // shape.group)
        self.few = min(shape.in_channels // shape.group, self.lanes) <= self.lanes // 2 and prod(shape.kernel) > 1
        self.few = self.few and 2 * taps * self.lanes * self.element < machine.l1_bytes // 2
        self.columns = 0  # kernel columns whose weights are in registers at once
        if self.few and self.together == 1 and columns_pay(shape, self.lanes, registers):
            self.columns = shape.kernel[-1]
            registers -= self.columns - 2
        group_vectors = ceil(shape.out_channels // shape.group / self.lanes)
        self.flat = shape.pointwise and len(shape.out) > 1
        self.original = shape
        shape = shape.squeezed()
        self.trailing = len(self.original.out) - len(shape.out)
        if self.flat:
            pixels = prod(shape.out)
            mr, nr = self.register_tile(group_vectors, min(pixels, 96), registers)
            rows = self.fold(pixels, mr)
            self.shape = ConvShape(
                shape.batch,
                shape.group,
                shape.in_channels,
                shape.out_channels,
                rows,
                rows,
                (1, 1),
                (1, 1),
                (1, 1),
                (0, 0),
            )
            if rows[1] < mr:
                mr, nr = self.register_tile(group_vectors, rows[1], registers)
        else:
            self.shape = shape
            mr, nr = self.register_tile(group_vectors, shape.out[-1], registers)
        self.mr, self.nr = mr, nr
        self.group_chunks = ceil(group_vectors / nr)
        self.in_per_group = shape.in_channels // shape.group
        self.step = min(self.lanes, self.in_per_group)
        self.blocks = ceil(self.in_per_group / self.step)
        self.block_chunk = self.blocks_per_chunk()
        self.row_chunk = self.rows_per_item(prod(self.shape.out[:-1]), self.shape.out[-1])
        self.builder = Builder("conv")
        self.operands = Operands(self.builder, region, layouts)

    def fold(self, pixels: int, widest: int) -> tuple[int, int]:
        """Rows, and their length, that the pixels of a pointwise convolution are taken as."""
        return fold_pixels(pixels, widest)

    def register_tile(self, vectors: int, pixels: int, registers: int) -> tuple[int, int]:
        """The tile that was chosen, no larger than what there is; else by rule."""
        if self.choice.tile is None:
            return register_tile(vectors, pixels, registers, self.few)
        mr, nr = self.choice.tile
        return min(mr, pixels, registers), min(nr, vectors)

    def tiles_beside(self) -> list[tuple[int, int]]:
        """Other register tiles than this one's, for each number of vectors the one with the least modelled cycles."""
        vectors = ceil(self.shape.out_channels // self.shape.group / self.lanes)
        tiles = register_tiles(vectors, min(self.shape.out[-1], 96), self.registers, self.few)
        return [tile for tile in tiles if tile != (self.mr, self.nr)][:_OTHER_TILES]

    def lower(self) -> Lowered:
        """The launch and the packed weights."""
        s, k = self.shape, self.builder
        constants = self.declare()
        groups, parts = s.group * self.group_chunks, prod(s.out[:-1]) // self.row_chunk
        rows_first = self.rows_first(constants[f"{self.op.inputs[1]}.packed"].nbytes, parts)
        with k.parallel("item", s.batch, *((parts, groups) if rows_first else (groups, parts))) as (n, major, minor):
            part, oc = (major, minor) if rows_first else (minor, major)
            self.rows(n, oc, ix.mul(part, self.row_chunk), self.row_chunk)
        launch = self.operands.launch()
        return Lowered((launch,), constants={**self.operands.constants, **constants})

    def declare(self) -> dict[str, np.ndarray]:
        """Declare parameters and registers; gives the packed weights and bias."""
        s, k = self.shape, self.builder
        x, w = self.op.inputs[0], self.op.inputs[1]
        lanes, nr = self.lanes, self.nr
        packed_name, bias_name = f"{w}.packed", f"{w}.bias"
        packed = self.pack_weights()
        self.operands.define(packed_name, TensorType(self.factor, packed.shape))
        self.weights = self.operands.buffer(packed_name)
        constants = {packed_name: packed}
        bias = self.op.input(2)
        self.bias: Buffer | None = None
        if bias and bias in self.region.constants:
            constants[bias_name] = self.pack_bias(bias)
            self.operands.define(bias_name, TensorType(self.dtype, constants[bias_name].shape))
            self.bias = self.operands.buffer(bias_name)
        self.operands.buffer(x)
        self.tail = Tail(self.operands, self.op)
        self.tail.declare()
        self.tiles = cut_row(
            s.out[-1], s.size[-1], s.kernel[-1], s.strides[-1], s.dilations[-1], s.pads_begin[-1], self.mr
        )
        self.row_tiles = sum(t.count for t in self.tiles)
        self.item_tiles = self.row_tiles * self.row_chunk
        self.acc = k.regs("acc", (max(t.width for t in self.tiles), nr), lanes, self.dtype)
        self.wreg = k.regs("w", (max(nr, self.columns),), lanes * self.together, self.factor)
        self.xreg = k.regs("x", (), lanes * self.together, self.factor)
        self.block_chunks = self.blocks // self.block_chunk
        if self.block_chunks > 1:
            self.partial = k.scratch("partial", (self.row_chunk, s.out[-1], nr * lanes), self.dtype)
        return constants

    def rows(self, n: Expr, oc: Expr, first: Expr, count: int) -> None:
        """The outputs of group `oc` in `count` (at most `row_chunk`) rows from `first` on."""
        k = self.builder
        with k.loop("ic", self.block_chunks) as ic:
            with k.loop("r", count) as r:
                outer = ix.unflatten(ix.add(first, r), self.shape.out[:-1])
                before = ix.mul(r, self.row_tiles)
                for tile in self.tiles:
                    with k.loop("t", tile.count) as t:
                        start = ix.add(ix.mul(t, tile.width), tile.start)
                        self.tile(tile, _At(n, oc, outer, start, r, ic, ix.add(before, t)))
                    before = ix.add(before, tile.count)

    def rows_first(self, weight_bytes: int, parts: int) -> bool:
        """Whether the items of one part of the rows follow each other, rather than those of one group of outputs.

        What the outer order walks over is read from L2 if it fits, from memory once for every outer step if not; the
        order with less traffic wins.
        """
        s = self.shape
        image_bytes = s.in_channels // s.group * prod(s.size) * self.element
        capacity = self.machine.l2_bytes * 5 // 8
        groups_first = image_bytes * self.group_chunks if image_bytes > capacity else 0
        return (weight_bytes * parts if weight_bytes > capacity else 0) < groups_first

    def rows_per_item(self, rows: int, length: int) -> int:
        """Output rows of a parallel item: enough work to be worth a claim, few enough to balance.

        Weights that do not stay in L2 from item to item are read from memory by each: then an item takes all rows, as
        long as there are some items for every core.
        """
        if self.choice.rows is not None:
            return below(rows, self.choice.rows)
        s = self.shape
        outputs = self.nr * self.lanes
        taps = self.in_per_group * prod(s.kernel)
        chunk = min(rows, max(1, _ITEM_FLOPS // (2 * length * outputs * taps)))
        if outputs * taps * self.element > self.machine.l2_bytes // 2:
            groups = s.batch * s.group * self.group_chunks
            chunk = max(chunk, min(rows, rows * groups // _LEAST_ITEMS))
        return below(rows, chunk)

    def pack_weights(self) -> np.ndarray:
        """[O, I/group, *kernel] -> [groups * chunks][input block][*kernel][step][nr * lanes], zero-padded."""
        s = self.shape
        weights = self.region.constant(self.op.inputs[1])
        assert weights is not None
        if self.zero_groups > 1:
            weights = _spread_groups(weights, self.zero_groups)
        per_group = s.out_channels // s.group
        wide = self.group_chunks * self.nr * self.lanes
        kernel = self.original.kernel
        padded = np.zeros((s.group, wide, self.blocks * self.step, *kernel), weights.dtype)
        padded[:, :per_group, : self.in_per_group] = weights.reshape(s.group, per_group, self.in_per_group, *kernel)
        split = padded.reshape(s.group * self.group_chunks, self.nr * self.lanes, self.blocks, self.step, prod(kernel))
        packed = np.ascontiguousarray(split.transpose(0, 2, 4, 3, 1))
        shape = (s.group * self.group_chunks, self.blocks, *s.kernel, self.step, self.nr * self.lanes)
        return packed.reshape(shape)

    def pack_bias(self, name: str) -> np.ndarray:
        """[O] -> [groups * chunks][nr * lanes], zero-padded."""
        s = self.shape
        bias = self.region.constant(name)
        assert bias is not None
        padded = np.zeros((s.group, self.group_chunks * self.nr * self.lanes), bias.dtype)
        padded[:, : s.out_channels // s.group] = bias.reshape(s.group, -1)
        return padded.reshape(s.group * self.group_chunks, self.nr * self.lanes)

    def blocks_per_chunk(self) -> int:
        """Input blocks whose weights take half of L1: a divisor of their number."""
        if self.choice.blocks is not None:
            return below(self.blocks, self.choice.blocks) if self.in_per_group % self.step == 0 else self.blocks
        block_bytes = prod(self.shape.kernel) * self.step * self.nr * self.lanes * self.element
        if self.blocks * block_bytes <= self.machine.l1_bytes * 3 // 4 or self.in_per_group % self.step:
            return self.blocks
        chunk = below(self.blocks, self.machine.l1_bytes // 2 // block_bytes)
        # Partial sums are read and written once a chunk: not worth it for short sums.
        return chunk if chunk * self.step * prod(self.shape.kernel) >= 64 else self.blocks

    def tile(self, tile: Tile, at: _At) -> None:
        """One register tile: accumulators from the bias or partial sums, the sum, the tail or partial sums again."""
        k, lanes = self.builder, self.lanes
        places = [(j, i) for j in range(tile.width) for i in range(self.nr)]
        with k.when(binary("eq", at.chunk, ix.const(0))):
            for j, i in places:
                bias = None if self.bias is None else load(self.bias, at.oc, i * lanes, lanes=lanes)
                k.store(self.acc, (j, i, 0), bias or constant(0.0, self.dtype, lanes))
        if self.block_chunks > 1:
            with k.when(binary("gt", at.chunk, ix.const(0))):
                for j, i in places:
                    done = load(self.partial, at.row, ix.add(at.start, j), i * lanes, lanes=lanes)
                    k.store(self.acc, (j, i, 0), done)
        whole = self.in_per_group % self.step == 0
        with k.loop("ib", self.block_chunk if whole else self.blocks - 1) as ib:
            self.kernel_rows(tile, at, ix.add(ix.mul(at.chunk, self.block_chunk), ib), self.step, (), ())
        if not whole:
            last = ix.const(self.blocks - 1)
            self.kernel_rows(tile, at, last, self.in_per_group % self.step, (), ())
        if self.block_chunks > 1:
            with k.when(binary("lt", at.chunk, ix.const(self.block_chunks - 1))):
                for j, i in places:
                    value = load(self.acc, j, i, 0, lanes=lanes)
                    k.store(self.partial, (at.row, ix.add(at.start, j), i * lanes), value)
        with k.when(binary("eq", at.chunk, ix.const(self.block_chunks - 1))):
            for i in range(self.nr):
                self.finish(tile, i, at)

    def kernel_rows(
        self, tile: Tile, at: _At, ib: Expr, step: int, taps: tuple[Expr, ...], places: tuple[Expr, ...]
    ) -> None:
        """Sum over the kernel for one block of `step` input channels; kernel rows outside the input are skipped.

        The columns are a loop even where they could be written out: neighbouring columns read the same inputs, and a
        compiler that sees both keeps them all in registers until it has to spill.
        """
        s, k = self.shape, self.builder
        axis = len(taps)
        if axis == len(at.outer):
            if self.columns:
                self.kernel_columns(tile, at, ib, step, taps, places)
                return
            if self.flat:
                self.prefetch_inputs(tile, at, ib, places)
            # Of a strided convolution neighbouring columns share no inputs: few channels make such a loop longer.
            most = min(s.strides[-1], s.kernel[-1], _COLUMNS_TOGETHER)
            together = most if step <= self.lanes // 2 and s.dilations[-1] == 1 else 1
            whole = s.kernel[-1] // together
            with k.loop("kw", whole) as kw:
                for each in range(together):
                    column = ix.add(ix.mul(kw, together), each)
                    self.multiply(tile, at, ib, step, (*taps, column), places)
            for column in range(whole * together, s.kernel[-1]):
                self.multiply(tile, at, ib, step, (*taps, ix.const(column)), places)
            return
        with k.loop("kh", s.kernel[axis]) as kh:
            place = ix.add(ix.mul(at.outer[axis], s.strides[axis]), ix.mul(kh, s.dilations[axis]), -s.pads_begin[axis])
            with k.when(within(place, s.size[axis])):
                self.kernel_rows(tile, at, ib, step, (*taps, kh), (*places, place))

    def kernel_columns(
        self, tile: Tile, at: _At, ib: Expr, step: int, taps: tuple[Expr, ...], places: tuple[Expr, ...]
    ) -> None:
        """A kernel row whose weights are all in registers: an input is broadcast once for all outputs that meet it."""
        k, lanes, channel = self.builder, self.lanes, self.channel(at, ib)
        first = ix.add(ix.mul(at.start, self.shape.strides[-1]), -self.shape.pads_begin[-1])
        for c in range(step):
            for kw in range(self.columns):
                k.store(self.wreg, (kw, 0), load(self.weights, at.oc, ib, *taps, kw, c, 0, lanes=lanes))
            for column, products in met(tile, self.shape).items():
                place = (at.n, ix.add(channel, c), *self.pixel((*places, ix.add(first, column))))
                k.store(self.xreg, (0,), self.broadcast(place, None))
                for j, kw in products:
                    factors = Load(self.xreg, (ix.const(0),), lanes), load(self.wreg, kw, 0, lanes=lanes)
                    k.store(self.acc, (j, 0, 0), self.added(load(self.acc, j, 0, 0, lanes=lanes), *factors))

    def multiply(
        self, tile: Tile, at: _At, ib: Expr, step: int, taps: tuple[Expr, ...], places: tuple[Expr, ...]
    ) -> None:
        """The inner kernel: for each input channel, load nr weights, broadcast each input, mr * nr multiply-adds."""
        s, k, lanes = self.shape, self.builder, self.lanes
        wide = lanes * self.together
        channel = self.channel(at, ib)
        column = ix.add(ix.mul(at.start, s.strides[-1]), ix.mul(taps[-1], s.dilations[-1]), -s.pads_begin[-1])
        self.prefetch(at, ib, taps)
        with k.unroll("c", ceil(step / self.together)) as c:
            for i in range(self.nr):
                k.store(self.wreg, (i, 0), load(self.weights, at.oc, ib, *taps, c, i * wide, lanes=wide))
            for j in range(tile.width):
                w = ix.add(column, j * s.strides[-1])
                mask = within(w, s.size[-1]) if j in tile.ragged else None
                place = (at.n, ix.add(channel, ix.mul(c, self.together)), *self.pixel((*places, w)))
                k.store(self.xreg, (0,), self.broadcast(place, mask))
                for i in range(self.nr):
                    factors = Load(self.xreg, (ix.const(0),), wide), load(self.wreg, i, 0, lanes=wide)
                    k.store(self.acc, (j, i, 0), self.added(load(self.acc, j, i, 0, lanes=lanes), *factors))

    def broadcast(self, place: tuple[Expr, ...], mask: Expr | None) -> Expr:
        """The input at `place` and the channels behind it that are multiplied together, for every output channel."""
        return splat(self.operands.load(self.op.inputs[0], place, mask), self.lanes)

    def added(self, total: Expr, x: Expr, w: Expr) -> Expr:
        """`total` and the products of inputs and weights."""
        return Fma(x, w, total)

    def prefetch(self, at: _At, ib: Expr, taps: tuple[Expr, ...]) -> None:
        """Ask for the weights of the next chunk while this one is used: each tile for its share of their cache lines.

        Otherwise the first tile of a chunk waits for memory at every step. After the last chunk of an item come the
        weights of the next group of outputs, which lie behind it.
        """
        line = _CACHE_LINE // self.element
        wide = self.nr * self.lanes
        lines = self.step * wide // line
        for share in range(ceil(lines / self.item_tiles)):
            number = ix.mod(ix.add(ix.mul(at.number, ceil(lines / self.item_tiles)), share), lines)
            self.builder.prefetch(self.weights, at.oc, ix.add(ib, self.block_chunk), *taps, 0, ix.mul(number, line))

    def channel(self, at: _At, ib: Expr) -> Expr:
        """First input channel of block `ib` of a tile."""
        first = ix.mul(ix.floordiv(at.oc, self.group_chunks), self.in_per_group)
        return ix.add(first, ix.mul(ib, self.step))

    def prefetch_inputs(self, tile: Tile, at: _At, ib: Expr, places: tuple[Expr, ...]) -> None:
        """Ask for the inputs of the next tile along the row: each block of channels is a stream of its own, and there
        are more of them than the hardware follows. (Wider kernels read them again and again; there it costs more than
        it brings.)"""
        x = self.op.inputs[0]
        pixels = max(1, _CACHE_LINE // (self.lanes * self.element))
        for first in range(0, tile.width, pixels):
            place = self.pixel((*places, ix.add(at.start, tile.width + first)))
            index = self.operands.place(x, (at.n, self.channel(at, ib), *place))
            self.builder.prefetch(self.operands.buffer(x), *index)

    def pixel(self, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """Spatial index in the tensor's own axes (a pointwise convolution folds them into rows)."""
        if not self.flat:
            return (*index, *(ix.const(0),) * self.trailing)
        position = ix.add(ix.mul(index[0], self.shape.out[1]), index[1])
        return ix.unflatten(position, self.original.out)

    def finish(self, tile: Tile, i: int, at: _At) -> None:
        """Store one vector of output channels of every output of the tile through the tail."""
        k, lanes = self.builder, self.lanes
        per_group = self.shape.out_channels // self.shape.group
        vectors = ceil(per_group / lanes)
        group, chunk = ix.floordiv(at.oc, self.group_chunks), ix.mod(at.oc, self.group_chunks)
        vector = ix.add(ix.mul(chunk, self.nr), i)
        # Of a ragged chunk only what is there: with the limit said, no lane of full blocks needs a mask.
        there = binary("min", vector, ix.const(vectors - 1))
        with k.when(binary("lt", vector, ix.const(vectors))):
            for j in range(tile.width):
                lane = Var(f"lane{j}_{i}", lanes)
                index = (
                    at.n,
                    ix.add(ix.mul(group, per_group), ix.mul(there, lanes), lane),
                    *self.pixel((*at.outer, ix.add(at.start, j))),
                )
                value = Load(self.acc, (ix.const(j), ix.const(i), lane))
                k.emit(vectorize(self.tail.stores(index, value), lane, ix.const(0), lanes))


def _spread_groups(weights: np.ndarray, groups: int) -> np.ndarray:
    """Dense weights [O, I, ...] of a grouped convolution [O, I/groups, ...], zero across groups."""
    out, per_group = weights.shape[:2]
    dense = np.zeros((out, per_group * groups, *weights.shape[2:]), weights.dtype)
    size = out // groups
    for g in range(groups):
        dense[g * size : (g + 1) * size, g * per_group : (g + 1) * per_group] = weights[g * size : (g + 1) * size]
    return dense


CONV = ConvFamily()


def conv_ways(region: Region, machine: CpuMachine, around: ConvFamily = CONV) -> tuple[ConvFamily, ...]:
    """`around`, and families that differ from it in one parameter; the other register tiles by their modelled cycles.

    Only `around` where there is nothing to choose: of a depthwise convolution, or of a region without Conv.
    """
    op = _anchor(region)
    shape = None if op is None else conv_shape(op, region)
    if op is None or shape is None or depthwise(shape):
        return (around,)
    groups = 1
    if not _blocked_groups(shape, machine.lanes("float32")):
        groups, shape = shape.group, _merge_groups(shape)
    if strided_pointwise(shape):
        shape = replace(shape, size=shape.out, strides=(1,) * len(shape.out))
    given = around.choice
    direct = Direct(region, op, shape, machine, {}, groups, given)
    rows, blocks = prod(direct.shape.out[:-1]), direct.blocks
    choices = [replace(given, tile=tile) for tile in direct.tiles_beside() if given.tile is None]
    for wanted in (2 * direct.row_chunk, direct.row_chunk // 2):
        if below(rows, wanted) != direct.row_chunk:
            choices.append(replace(given, rows=below(rows, wanted)))
    chunks = (blocks, direct.block_chunk // 2, 2 * direct.block_chunk) if direct.in_per_group % direct.step == 0 else ()
    if prod(shape.kernel) * direct.in_per_group >= _LONG_SUM:
        for wanted in dict.fromkeys(below(blocks, most) for most in chunks):
            if wanted != direct.block_chunk:
                choices.append(replace(given, blocks=wanted))
    return (around, *(ConvFamily(choice) for choice in choices))
