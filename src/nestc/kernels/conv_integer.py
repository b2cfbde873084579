"""The kernel of a convolution of integers: staged inputs, streamed weights, sums of products in int32 registers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import CpuMachine, Layout, Lowered
from nestc.kernels.conv_pack import Window, pack
from nestc.kernels.conv_shape import ConvShape, Tile, cut_row, fold_pixels
from nestc.kernels.conv_stage import Stage
from nestc.kernels.operands import Operands
from nestc.kernels.paired_steps import FREE_REACH, PairedSteps
from nestc.kernels.requantize import Requantize
from nestc.kernels.tail import Tail
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, clamp, constant, less, load, splat
from nestc.tensor.ir import Binary, Buffer, Cast, Dot, Expr, Load, PairSum, Repeat, Var
from nestc.tensor.vectorize import vectorize

if TYPE_CHECKING:
    from nestc.kernels.conv_int8 import IntegerConv

_ITEM_PRODUCTS = 1_500_000  # least work of one parallel item: some 15 us
_LEAST_ITEMS = 16  # items that a large layer leaves for the workers to share
_UNROLLED = 4  # most units that the inner loop writes out
# Rough cycles on a machine with two multiplications a cycle, to choose how work is cut.
_STAGE_CYCLES = 1.0  # one block of channels of one pixel
_MEMORY_BYTES = 8  # a cycle, from the last level cache


@dataclass(frozen=True)
class _Cut:
    """How the work is shared: `parts` of `rows` output rows each, times `splits` of `chunks` register columns."""

    parts: int
    rows: int
    splits: int
    chunks: int


@dataclass(frozen=True)
class _At:
    """Where a tile stands: image, group, register column of the group, outer axes, row of the item and of the image,
    first output of the row, chunk of input blocks; number of the tile among those of an item and chunk."""

    n: Expr
    group: Expr
    chunk: Expr
    outer: tuple[Expr, ...]
    item_row: Expr
    row: Expr
    start: Expr
    blocks: Expr
    number: Expr


class IntegerConvolution:
    """Builds the kernel.

    Items of the parallel loop are (image, group, split of the output channels, outer output axes, part of the output
    rows). An item stages its input rows once (`Stage`), then walks ``nr`` vectors of outputs at a time: tiles of
    ``mr`` outputs of a row, summed over blocks of channels and taps with ``mr * nr`` accumulators. Each step
    broadcasts the group of neighbouring channels that one `Dot` multiplies, against packed weights
    ``[group and register column][block][plane][kernel row][tap][step][nr * lanes * dot group]``.
    Neighbouring kernel columns are neighbours in the staged row, so that their channels are one run of steps: few
    channels (the first layer) waste nothing but the last step.

    What stands outside the input is staged as its zero point; ``zero * sum(weights)`` is taken off in the initial
    accumulators, which also hold the integer bias.
    """

    def __init__(
        self,
        region: Region,
        conv: IntegerConv,
        shape: ConvShape,
        weights: np.ndarray,
        machine: CpuMachine,
        layouts: Mapping[str, Layout],
    ) -> None:
        self.region, self.conv, self.machine = region, conv, machine
        self.layouts = layouts
        self.lanes = machine.lanes("int32")
        self.weights = weights
        self.original = shape
        self.flat = shape.pointwise and len(shape.out) > 1
        self.shape, self.trailing = _canonical(shape)
        channels = shape.in_channels // shape.group
        blocked = layouts[conv.x].block != 0
        # With dilation the kernel columns are apart in the staged row, and each is a run of its own.
        *planes, rows, columns = self.shape.kernel
        joined = columns == 1 or self.shape.dilations[-1] == 1
        block = self.lanes if blocked or channels > self.lanes else channels
        self.window = Window(
            channels=channels,
            block=block,
            planes=prod(planes),
            rows=rows,
            taps=1 if joined else columns,
            length=block * (columns if joined else 1),
        )
        pixels = min(prod(shape.out), 96) if self.flat else self.shape.out[-1]
        self.packed = pack(weights, shape, self.window, pixels, machine)
        if self.flat:
            folded = fold_pixels(prod(shape.out), self.packed.mr)
            self.shape = ConvShape(
                shape.batch, shape.group, shape.in_channels, shape.out_channels, folded, folded, *_UNIT_KERNEL
            )
        self.mr, self.nr = min(self.packed.mr, self.shape.out[-1]), self.packed.nr
        self.pair, self.group, self.units = self.packed.pair, self.packed.group, self.packed.units
        self.element = 2 if self.pair[0] == "int16" else 1
        self.column_chunks = self.packed.columns // shape.group
        self.vectors = ceil(shape.out_channels // shape.group / self.lanes)
        self.builder = Builder("conv_integer")
        self.operands = Operands(self.builder, region, layouts)

    def lower(self) -> Lowered:
        """The launch and its constants."""
        s, k = self.shape, self.builder
        channels = self.window.channels
        self.cut = self.cut_work(channels)
        self.stage = Stage(
            self.operands,
            self.conv.x,
            s,
            self.cut.rows,
            channels,
            self.window.block,
            self.pair[0],
            self.group,
            self.machine.vector_bytes,
        )
        self.declare_constants()
        zero = self.conv.zero
        self.zero = (
            self.operands.load(zero, (ix.const(0),) * len(self.region.types[zero].shape))
            if isinstance(zero, str)
            else None
        )
        if self.conv.scale is None:
            self.tail: Tail | Requantize = Tail(self.operands, self.conv.op)
        else:
            self.tail = Requantize(self.operands, self.region, self.conv.op, self.conv.scale, 1, self.conv.offset)
        self.bytes_out = self.narrow_view()
        if self.bytes_out is None:
            self.tail.declare()
        self.stage.declare(0 if self.steps is None else self.steps.reach)
        self.tiles = cut_row(s.out[-1], s.out[-1], 1, 1, 1, 0, self.mr)
        width = max(t.width for t in self.tiles)
        self.acc = k.regs("acc", (width, self.nr), self.lanes, "int32")
        if self.steps is None:
            depth = max(1, self.packed.depth)
            self.wreg = k.regs("w", (depth, self.nr), self.lanes * self.group, self.pair[1])
            self.xreg = k.regs("x", (depth,), self.lanes * self.group, self.pair[0])
            self.block_chunk = self.blocks_per_chunk()
            self.block_chunks = self.stage.blocks // self.block_chunk
        else:
            self.steps.declare()
            self.block_chunks = self.steps.paired.chunks
        if self.block_chunks > 1:
            self.partial = k.scratch("partial", (self.cut.rows, s.out[-1], self.nr * self.lanes), "int32")
        outer_axes = s.out[:-2]
        cut = self.cut
        with k.parallel("item", s.batch, s.group, cut.splits, *outer_axes, cut.parts) as (n, group, split, *rest):
            outer, part = tuple(rest[:-1]), rest[-1]
            first = ix.mul(part, cut.rows)
            self.stage.fill(n, ix.mul(group, channels), outer, first, self.padding(), self.shift)
            with k.loop("oc", cut.chunks) as c:
                chunk = ix.add(ix.mul(split, cut.chunks), c)
                with k.when(less(chunk, self.column_chunks)), k.loop("ic", self.block_chunks) as ic:
                    with k.loop("r", cut.rows) as r:
                        row = ix.add(first, r)
                        number = ix.mul(r, sum(tile.count for tile in self.tiles))
                        with k.when(less(row, s.out[-2])):
                            for tile in self.tiles:
                                with k.loop("t", tile.count) as t:
                                    start = ix.add(ix.mul(t, tile.width), tile.start)
                                    self.tile(tile, _At(n, group, chunk, outer, r, row, start, ic, ix.add(number, t)))
                                number = ix.add(number, tile.count)
        return Lowered((self.operands.launch(),), constants=self.operands.constants)

    # -- numbers

    @property
    def shift(self) -> int:
        """What is added to inputs so that they fit the factor of the `Dot`."""
        source = self.region.types[self.conv.x].dtype
        if self.pair[0] == "int16" or self.pair[0] == source:
            return 0
        return 128 if source == "int8" else -128

    def padding(self) -> Expr:
        """The staged value that stands for zero."""
        if self.zero is None:
            assert isinstance(self.conv.zero, int)
            return constant(self.conv.zero + self.shift, self.pair[0])
        shifted = binary("add", Cast(self.zero, "int16"), constant(self.shift, "int16"))
        return Cast(shifted, self.pair[0])

    def declare_constants(self) -> None:
        """Packed weights, initial accumulators, and the sums of weights where the zero point is not known yet."""
        s = self.shape
        per_group = s.out_channels // s.group
        wide = self.column_chunks * self.nr * self.lanes
        sums = np.zeros((s.group, wide), np.int64)
        sums[:, :per_group] = self.weights.sum(axis=tuple(range(1, self.weights.ndim)), dtype=np.int64).reshape(
            s.group, per_group
        )
        initial = np.zeros((s.group, wide), np.int64)
        if self.conv.bias is not None:
            initial[:, :per_group] = self.conv.bias.reshape(s.group, per_group)
        known = self.shift + (self.conv.zero if isinstance(self.conv.zero, int) else 0)
        initial -= known * sums
        # Sums wrap as int32 additions do; only the result has to fit.
        rows = (s.group * self.column_chunks, self.nr * self.lanes)
        initial = initial.reshape(rows)
        packed, paired = self.packed, self.packed.paired
        self.extra = self.offsets = self.steps = None
        if paired is None:
            self.weights_buffer = self.define("packed", packed.weights)
        else:
            initial += paired.offset
            places = self.unit_offsets(paired.numbers)
            farthest = max(self.farthest, FREE_REACH - 1)
            self.steps = PairedSteps(self.builder, paired, self.nr, places, farthest, self.define)
        self.initial = self.define("initial", initial.astype(np.int32))
        known_now = isinstance(self.conv.zero, int)
        self.sums = None if known_now else self.define("sums", sums.astype(np.int32).reshape(rows))
        if packed.extra_units is not None and packed.extra_weights is not None:
            self.extra = self.define("extra", packed.extra_weights)
            self.offsets = self.define("offsets", self.unit_offsets(packed.extra_units))

    def define(self, label: str, array: np.ndarray) -> Buffer:
        """A constant of this kernel."""
        name = f"{self.conv.op.inputs[1]}.{label}"
        self.operands.define(name, TensorType(str(array.dtype), array.shape))
        self.operands.constants[name] = array
        return self.operands.buffer(name)

    def unit_offsets(self, numbers: np.ndarray) -> np.ndarray:
        """Where the units of these numbers lie in the stage, from the first pixel of a tile on."""
        w, stage = self.window, self.stage
        shape = (w.blocks, w.planes, w.rows, w.taps, self.units)
        # The last unit of all lies farthest; it is asked for so that layers of one shape have one kernel.
        block, plane, row, tap, unit = np.unravel_index(np.append(numbers, prod(shape) - 1), shape)
        line = plane * stage.rows_in + row * stage.row_axis.dilation
        column = tap * stage.column_axis.dilation * w.block
        offsets = block * stage.stride + line * stage.line + column + unit * self.group
        self.farthest = int(offsets[-1])
        return offsets[:-1].reshape(numbers.shape).astype(np.int64)

    # -- how the work is cut

    def cut_work(self, channels: int) -> _Cut:
        """Rows and output channels of an item: the cheapest cut whose staged rows leave room in L2 for weights, with
        items enough to share."""
        s = self.shape
        rows, length = s.out[-2], s.out[-1]
        products = s.batch * s.out_channels * prod(s.out) * channels * prod(s.kernel)
        wanted = min(_LEAST_ITEMS, max(1, products // _ITEM_PRODUCTS))
        given = s.batch * s.group * prod(s.out[:-2])
        blocks = self.window.blocks
        halo = (s.kernel[-2] - 1) * s.dilations[-2] + 1
        weight_bytes = self.weights.size // s.group * self.element
        compute = products / given / (2 * self.lanes * self.group)
        best, best_cost = None, float("inf")
        for parts in range(1, rows + 1):
            each = ceil(rows / parts)
            if ceil(rows / each) != parts:
                continue
            staged = ((each - 1) * s.strides[-2] + halo) * blocks * prod(s.kernel[:-2])
            pixel_bytes = self.window.block * self.element
            width = (length - 1) * s.strides[-1] + s.kernel[-1] if s.kernel[-1] > 1 else length
            too_large = staged * width * pixel_bytes > self.machine.l2_bytes // 3
            if too_large and each > 1:
                continue
            for chunks in range(1, self.column_chunks + 1):
                splits = ceil(self.column_chunks / chunks)
                if ceil(self.column_chunks / splits) != chunks:
                    continue
                cost = parts * splits * (staged * width * _STAGE_CYCLES + 200)
                again = parts if weight_bytes / splits > self.machine.l2_bytes // 2 else 1
                cost += again * weight_bytes / _MEMORY_BYTES
                items = given * parts * splits
                if items < wanted:
                    # Workers that wait for the others: as if the time of some of them were lost.
                    cost += compute * (wanted / items - 1) / 4
                if cost < best_cost:
                    best, best_cost = _Cut(parts, each, splits, chunks), cost
        assert best is not None
        return best

    def blocks_per_chunk(self) -> int:
        """Blocks of input channels whose weights take half of L1: a divisor of their number."""
        per_block = self.window.planes * self.window.rows * self.window.taps * self.units
        block_bytes = per_block * self.nr * self.lanes * self.group * self.element
        blocks = self.stage.blocks
        if blocks * block_bytes <= self.machine.l1_bytes * 3 // 4:
            return blocks
        chunk = max(1, self.machine.l1_bytes * 5 // 8 // block_bytes)
        while blocks % chunk:
            chunk -= 1
        # Partial sums are read and written once a chunk: not worth it for short sums.
        return chunk if chunk * per_block >= 32 else blocks

    # -- tiles

    def tile(self, tile: Tile, at: _At) -> None:
        """One register tile: accumulators from constants or partial sums, the sum, the tail or partial sums again."""
        k, lanes = self.builder, self.lanes
        places = [(j, i) for j in range(tile.width) for i in range(self.nr)]
        column = ix.add(ix.mul(at.group, self.column_chunks), at.chunk)
        with k.when(binary("eq", at.blocks, ix.const(0))):
            for i in range(self.nr):
                first: Expr = load(self.initial, column, i * lanes, lanes=lanes)
                if self.sums is not None:
                    assert self.zero is not None
                    zero = splat(Cast(self.zero, "int32"), lanes)
                    product = binary("mul", load(self.sums, column, i * lanes, lanes=lanes), zero)
                    first = binary("sub", first, product)
                for j in range(tile.width):
                    k.store(self.acc, (j, i, 0), first)
        if self.block_chunks > 1:
            with k.when(binary("gt", at.blocks, ix.const(0))):
                for j, i in places:
                    done = load(self.partial, at.item_row, ix.add(at.start, j), i * lanes, lanes=lanes)
                    k.store(self.acc, (j, i, 0), done)
        if self.steps is not None:
            pixel = self.stage.column_axis.stride * self.window.block
            start = self.tile_place(at)
            self.steps.prefetch(column, at.blocks, at.number, self.cut.rows * sum(each.count for each in self.tiles))
            self.steps.add(
                column,
                at.blocks,
                tile.width,
                self.acc,
                lambda j, place: load(self.stage.buffer, ix.add(start, place, j * pixel), lanes=self.group),
            )
        else:
            with k.loop("ib", self.block_chunk) as ib:
                self.block_sum(tile, at, column, ix.add(ix.mul(at.blocks, self.block_chunk), ib))
        if self.extra is not None:
            with k.when(binary("eq", at.blocks, ix.const(self.block_chunks - 1))):
                self.extra_sum(tile, at, column)
        if self.block_chunks > 1:
            with k.when(binary("lt", at.blocks, ix.const(self.block_chunks - 1))):
                for j, i in places:
                    value = load(self.acc, j, i, 0, lanes=lanes)
                    k.store(self.partial, (at.item_row, ix.add(at.start, j), i * lanes), value)
        with k.when(binary("eq", at.blocks, ix.const(self.block_chunks - 1))):
            self.finish_tile(tile, at)

    def block_sum(self, tile: Tile, at: _At, column: Expr, block: Expr) -> None:
        """The sum over one block of channels, all taps."""
        k, stage, w = self.builder, self.stage, self.window
        rows, columns = stage.row_axis, stage.column_axis
        with k.loop("kp", w.planes) as plane, k.loop("kh", w.rows) as kh:
            row = ix.add(ix.mul(at.item_row, rows.stride), ix.mul(kh, rows.dilation))
            with k.loop("kw", w.taps) as tap:
                first = ix.add(ix.mul(at.start, columns.stride), ix.mul(tap, columns.dilation))
                place = stage.place(block, plane, row, first)
                index = (column, block, plane, kh, tap)
                together = self.units_together()
                whole, rest = divmod(self.units, together)
                with k.loop("s", whole) as s:
                    if whole:
                        self.run(tile, index, ix.mul(s, together), together, place)
                if rest:
                    self.run(tile, index, ix.const(whole * together), rest, place)

    def units_together(self) -> int:
        """Units that the inner loop writes out: no more than lie between one output's channels and the next one's.

        Beyond that outputs share inputs, and LLVM keeps all that are shared in registers until it spills.
        """
        depth = max(1, self.packed.depth)
        apart = self.stage.column_axis.stride * self.window.block // self.group
        return max(depth, min(apart, _UNROLLED, self.units) // depth * depth)

    def run(self, tile: Tile, index: tuple[Expr, ...], first: Expr, count: int, place: Expr) -> None:
        """`count` units written out, those that are added in 16 bits together."""
        depth = max(1, self.packed.depth)
        wide = self.lanes * self.group
        with self.builder.unroll("u", count // depth) as u:
            unit = ix.add(first, ix.mul(u, depth))
            weights = [
                [load(self.weights_buffer, *index, ix.add(unit, d), i * wide, lanes=wide) for i in range(self.nr)]
                for d in range(depth)
            ]
            self.multiply(tile, weights, ix.add(place, ix.mul(unit, self.group)))

    def extra_sum(self, tile: Tile, at: _At, column: Expr) -> None:
        """What was taken off the weights lest a sum saturate."""
        assert self.extra is not None and self.offsets is not None
        k, wide = self.builder, self.lanes * self.group
        tile_place = self.tile_place(at)
        with k.loop("e", self.extra.shape[1]) as e:
            offset = clamp(load(self.offsets, column, e), 0, self.farthest)
            weights = [[load(self.extra, column, e, i * wide, lanes=wide) for i in range(self.nr)]]
            self.multiply(tile, weights, ix.add(tile_place, offset))

    def tile_place(self, at: _At) -> Expr:
        """Where the inputs of a tile begin in the stage."""
        row = ix.mul(at.item_row, self.stage.row_axis.stride)
        return self.stage.place(ix.const(0), ix.const(0), row, ix.mul(at.start, self.stage.column_axis.stride))

    def multiply(self, tile: Tile, weights: Sequence[Sequence[Expr]], place: Expr) -> None:
        """Broadcast each output's unit of channels (or the units of `weights`, which are summed together) from `place`
        on, and add its products with nr vectors of weights."""
        k, lanes, group = self.builder, self.lanes, self.group
        wide = lanes * group
        pixel = self.stage.column_axis.stride * self.window.block
        for d, vectors in enumerate(weights):
            for i, vector in enumerate(vectors):
                k.store(self.wreg, (d, i, 0), vector)
        for j in range(tile.width):
            for d in range(len(weights)):
                at = ix.add(place, j * pixel + d * group)
                k.store(self.xreg, (d, 0), Repeat(load(self.stage.buffer, at, lanes=group), lanes))
            for i in range(self.nr):
                factors = [
                    (load(self.xreg, d, 0, lanes=wide), load(self.wreg, d, i, 0, lanes=wide))
                    for d in range(len(weights))
                ]
                k.store(self.acc, (j, i, 0), self.added(load(self.acc, j, i, 0, lanes=lanes), factors))

    def added(self, total: Expr, factors: Sequence[tuple[Expr, Expr]]) -> Expr:
        """`total` and the products of the factors' neighbouring channels."""
        if not self.packed.depth:
            ((x, w),) = factors
            return Dot(total, x, w)
        sums: Expr = PairSum(*factors[0])
        for x, w in factors[1:]:
            sums = Binary("add", sums, PairSum(x, w))
        return Dot(total, sums, constant(1, "int16", sums.lanes))

    def narrow_view(self) -> Buffer | None:
        """The output as (image, block of channels, outer axes, bytes of a row), if it is one QuantizeLinear and every
        block is full: then several pixels are requantized and written together."""
        channels = self.shape.out_channels
        if not isinstance(self.tail, Requantize) or not self.tail.narrows:
            return None
        added = [] if self.tail.residual is None else [self.tail.residual.other]
        names = [self.region.outputs[0], *added]
        if any(self.layouts[name].block != self.lanes for name in names) or channels % self.lanes:
            return None
        s = self.shape
        shape = (s.batch, channels // self.lanes, *s.out[:-1], s.out[-1] * self.lanes)
        out, *others = (self.operands.view(name, shape) for name in names)
        self.bytes_added = others[0] if others else None
        return out

    def finish_tile(self, tile: Tile, at: _At) -> None:
        """Store the tile's outputs, neighbouring pixels of a block together where they lie so."""
        k, lanes = self.builder, self.lanes
        for i in range(self.nr):
            vector = ix.add(ix.mul(at.chunk, self.nr), i)
            # Of a ragged chunk only what is there: with the limit said, no lane of full blocks needs a mask.
            there = binary("min", vector, ix.const(self.vectors - 1))
            with k.when(less(vector, self.vectors)):
                if self.bytes_out is None:
                    for j in range(tile.width):
                        self.finish(j, i, there, at)
                    continue
                assert isinstance(self.tail, Requantize)
                block = ix.add(ix.mul(at.group, self.vectors), there)
                done = 0
                while done < tile.width:
                    # As many as one vector of bytes holds, and powers of two of what is left.
                    count = min(4, 1 << ((tile.width - done).bit_length() - 1))
                    sums = [load(self.acc, done + j, i, 0, lanes=lanes) for j in range(count)]
                    columns = [ix.mul(ix.add(at.start, done + j), lanes) for j in range(count)]
                    row = (at.n, block, *at.outer, at.row)
                    added = self.bytes_added
                    others = [] if added is None else [load(added, *row, column, lanes=lanes) for column in columns]
                    value = self.tail.narrow(ix.mul(block, lanes), sums, others)
                    k.store(self.bytes_out, (*row, columns[0]), value)
                    done += count

    def finish(self, j: int, i: int, vector: Expr, at: _At) -> None:
        """Store one vector of output channels through the tail."""
        k, lanes, s = self.builder, self.lanes, self.shape
        lane = Var(f"lane{j}_{i}", lanes)
        channel = ix.add(ix.mul(at.group, s.out_channels // s.group), ix.mul(vector, lanes), lane)
        pixel = self.pixel((*at.outer, at.row, ix.add(at.start, j)))
        value = Load(self.acc, (ix.const(j), ix.const(i), lane))
        k.emit(vectorize(self.tail.stores((at.n, channel, *pixel), value), lane, ix.const(0), lanes))

    def pixel(self, index: tuple[Expr, ...]) -> tuple[Expr, ...]:
        """Spatial index in the tensor's own axes."""
        if self.flat:
            return ix.unflatten(ix.add(ix.mul(index[0], self.shape.out[1]), index[1]), self.original.out)
        own = index[1:] if len(index) + self.trailing > len(self.original.out) else index
        return (*own, *(ix.const(0),) * self.trailing)


_UNIT_KERNEL = ((1, 1), (1, 1), (1, 1), (0, 0))


def _canonical(shape: ConvShape) -> tuple[ConvShape, int]:
    """The convolution with at least two spatial axes and without innermost ones of one pixel, and how many of these
    were left out."""
    cut = shape.squeezed()
    trailing = len(shape.out) - len(cut.out)
    if len(cut.out) > 1:
        return cut, trailing
    whole = ConvShape(
        batch=cut.batch,
        group=cut.group,
        in_channels=cut.in_channels,
        out_channels=cut.out_channels,
        size=(1, *cut.size),
        out=(1, *cut.out),
        kernel=(1, *cut.kernel),
        strides=(1, *cut.strides),
        dilations=(1, *cut.dilations),
        pads_begin=(0, *cut.pads_begin),
    )
    return whole, trailing
