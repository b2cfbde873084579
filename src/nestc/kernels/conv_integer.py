"""The kernel of a convolution of integers: staged inputs, streamed weights, sums of products in int32 registers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import TYPE_CHECKING

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import CpuMachine, Layout, Lowered
from nestc.kernels.conv_shape import ConvShape, Tile, cut_row, fold_pixels, register_tile
from nestc.kernels.conv_stage import Stage
from nestc.kernels.operands import Operands
from nestc.kernels.requantize import Requantize
from nestc.kernels.tail import Tail
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, constant, less, load, splat
from nestc.tensor.ir import DOT_GROUPS, Cast, Dot, Expr, Load, Repeat, Var
from nestc.tensor.vectorize import vectorize

if TYPE_CHECKING:
    from nestc.kernels.conv_int8 import IntegerConv

_ITEM_PRODUCTS = 1_500_000  # least work of one parallel item: some 15 us
_LEAST_ITEMS = 16  # items that a large layer leaves for the workers to share
_UNROLLED = 4  # groups of channels that the inner loop writes out
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
    first output of the row, chunk of input blocks."""

    n: Expr
    group: Expr
    chunk: Expr
    outer: tuple[Expr, ...]
    item_row: Expr
    row: Expr
    start: Expr
    blocks: Expr


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
        fits = weights.size == 0 or (weights.min() >= -128 and weights.max() <= 127)
        self.pair = machine.dot_dtypes if fits else ("int16", "int16")
        self.group = DOT_GROUPS[self.pair]
        self.element = 2 if self.pair[0] == "int16" else 1
        self.original = shape
        self.flat = shape.pointwise and len(shape.out) > 1
        self.shape, self.trailing = _canonical(shape)
        self.vectors = ceil(shape.out_channels // shape.group / self.lanes)
        if self.flat:
            pixels = prod(shape.out)
            self.mr, self.nr = self.tile_size(min(pixels, 96))
            rows = fold_pixels(pixels, self.mr)
            self.shape = ConvShape(
                shape.batch, shape.group, shape.in_channels, shape.out_channels, rows, rows, *_UNIT_KERNEL
            )
        self.mr, self.nr = self.tile_size(self.shape.out[-1])
        self.builder = Builder("conv_integer")
        self.operands = Operands(self.builder, region, layouts)

    def tile_size(self, pixels: int) -> tuple[int, int]:
        """Outputs and vectors of outputs of a register tile."""
        registers = self.machine.vector_registers
        if self.pair[0] != "int16" or self.machine.vnni:
            return register_tile(self.vectors, pixels, registers)
        return pair_tile(self.vectors, pixels, registers)

    def lower(self) -> Lowered:
        """The launch and its constants."""
        s, k = self.shape, self.builder
        self.column_chunks = ceil(self.vectors / self.nr)
        channels = s.in_channels // s.group
        blocked = self.layouts[self.conv.x].block != 0
        self.block = self.lanes if blocked or channels > self.lanes else channels
        self.cut = self.cut_work(channels)
        self.stage = Stage(
            self.operands,
            self.conv.x,
            s,
            self.cut.rows,
            channels,
            self.block,
            self.pair[0],
            self.group,
            self.machine.vector_bytes,
        )
        # With dilation the kernel columns are apart in the staged row, and each has steps of its own.
        joined = self.stage.column_axis.dilation == 1
        self.taps = 1 if joined else s.kernel[-1]
        window = self.block * (s.kernel[-1] if joined else 1)
        self.steps = ceil(window / self.group)
        self.kernel_rows = s.kernel[-2]
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
        self.tail.declare()
        self.stage.declare()
        self.tiles = cut_row(s.out[-1], s.out[-1], 1, 1, 1, 0, self.mr)
        width = max(t.width for t in self.tiles)
        self.acc = k.regs("acc", (width, self.nr), self.lanes, "int32")
        self.wreg = k.regs("w", (self.nr,), self.lanes * self.group, self.pair[1])
        self.xreg = k.regs("x", (), self.lanes * self.group, self.pair[0])
        self.block_chunk = self.blocks_per_chunk()
        self.block_chunks = self.stage.blocks // self.block_chunk
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
                        with k.when(less(row, s.out[-2])):
                            for tile in self.tiles:
                                with k.loop("t", tile.count) as t:
                                    start = ix.add(ix.mul(t, tile.width), tile.start)
                                    self.tile(tile, _At(n, group, chunk, outer, r, row, start, ic))
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
        name = self.conv.op.inputs[1]
        s, g = self.shape, self.group
        per_group = s.out_channels // s.group
        wide = self.column_chunks * self.nr * self.lanes
        blocks, planes = self.stage.blocks, self.stage.planes
        columns, channels = s.kernel[-1], s.in_channels // s.group
        padded = np.zeros((s.group, wide, blocks * self.block, planes, self.kernel_rows, columns), np.int32)
        padded[:, :per_group, :channels] = self.weights.reshape(
            s.group, per_group, channels, planes, self.kernel_rows, columns
        )
        # [group][outputs][block][channel][plane][row][column] -> ... [plane][row][tap][window of the tap]
        split = padded.reshape(s.group, wide, blocks, self.block, planes, self.kernel_rows, columns)
        split = split.transpose(0, 1, 2, 4, 5, 6, 3)
        window = columns // self.taps * self.block
        split = split.reshape(s.group, wide, blocks, planes, self.kernel_rows, self.taps, window)
        whole = np.zeros((*split.shape[:-1], self.steps * g), np.int32)
        whole[..., :window] = split
        whole = whole.reshape(
            s.group,
            self.column_chunks,
            self.nr * self.lanes,
            blocks,
            planes,
            self.kernel_rows,
            self.taps,
            self.steps,
            g,
        )
        packed = np.ascontiguousarray(whole.transpose(0, 1, 3, 4, 5, 6, 7, 2, 8).astype(self.pair[1]))
        packed = packed.reshape(
            s.group * self.column_chunks, blocks, planes, self.kernel_rows, self.taps, self.steps, -1
        )
        sums = padded.sum(axis=(2, 3, 4, 5), dtype=np.int64)
        initial = np.zeros((s.group, wide), np.int64)
        if self.conv.bias is not None:
            initial[:, :per_group] = self.conv.bias.reshape(s.group, per_group)
        known = self.shift + (self.conv.zero if isinstance(self.conv.zero, int) else 0)
        initial -= known * sums
        # Sums wrap as int32 additions do; only the result has to fit.
        arrays = {f"{name}.packed": packed, f"{name}.initial": initial.astype(np.int32)}
        if isinstance(self.conv.zero, str):
            arrays[f"{name}.sums"] = sums.astype(np.int32)
        for key, array in arrays.items():
            if not key.endswith(".packed"):
                arrays[key] = array = array.reshape(s.group * self.column_chunks, self.nr * self.lanes)
            self.operands.define(key, TensorType(str(array.dtype), array.shape))
            self.operands.constants[key] = array
        self.packed = self.operands.buffer(f"{name}.packed")
        self.initial = self.operands.buffer(f"{name}.initial")
        self.sums = self.operands.buffer(f"{name}.sums") if isinstance(self.conv.zero, str) else None

    # -- how the work is cut

    def cut_work(self, channels: int) -> _Cut:
        """Rows and output channels of an item: the cheapest cut whose staged rows leave room in L2 for weights, with
        items enough to share."""
        s = self.shape
        rows, length = s.out[-2], s.out[-1]
        products = s.batch * s.out_channels * prod(s.out) * channels * prod(s.kernel)
        wanted = min(_LEAST_ITEMS, max(1, products // _ITEM_PRODUCTS))
        given = s.batch * s.group * prod(s.out[:-2])
        blocks = ceil(channels / self.block)
        halo = (s.kernel[-2] - 1) * s.dilations[-2] + 1
        weight_bytes = self.weights.size // s.group * self.element
        compute = products / given / (2 * self.lanes * self.group)
        best, best_cost = None, float("inf")
        for parts in range(1, rows + 1):
            each = ceil(rows / parts)
            if ceil(rows / each) != parts:
                continue
            staged = ((each - 1) * s.strides[-2] + halo) * blocks * prod(s.kernel[:-2])
            pixel_bytes = self.block * self.element
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
        per_block = self.stage.planes * self.kernel_rows * self.taps * self.steps
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
        with k.loop("ib", self.block_chunk) as ib:
            self.block_sum(tile, at, column, ix.add(ix.mul(at.blocks, self.block_chunk), ib))
        if self.block_chunks > 1:
            with k.when(binary("lt", at.blocks, ix.const(self.block_chunks - 1))):
                for j, i in places:
                    value = load(self.acc, j, i, 0, lanes=lanes)
                    k.store(self.partial, (at.item_row, ix.add(at.start, j), i * lanes), value)
        with k.when(binary("eq", at.blocks, ix.const(self.block_chunks - 1))):
            for j, i in places:
                self.finish(j, i, at)

    def block_sum(self, tile: Tile, at: _At, column: Expr, block: Expr) -> None:
        """The sum over one block of channels, all taps."""
        k, stage = self.builder, self.stage
        rows, columns = stage.row_axis, stage.column_axis
        with k.loop("kp", stage.planes) as plane, k.loop("kh", self.kernel_rows) as kh:
            row = ix.add(ix.mul(at.item_row, rows.stride), ix.mul(kh, rows.dilation))
            with k.loop("kw", self.taps) as tap:
                first = ix.add(ix.mul(at.start, columns.stride), ix.mul(tap, columns.dilation))
                place = stage.place(plane, row, first)
                index = (column, block, plane, kh, tap)
                whole, rest = divmod(self.steps, _UNROLLED)
                with k.loop("s", whole) as s:
                    if whole:
                        self.multiply(tile, index, ix.mul(s, _UNROLLED), _UNROLLED, block, place)
                if rest:
                    self.multiply(tile, index, ix.const(whole * _UNROLLED), rest, block, place)

    def multiply(self, tile: Tile, index: tuple[Expr, ...], first: Expr, count: int, block: Expr, place: Expr) -> None:
        """`count` steps: load nr vectors of weights, broadcast a group of channels of each output, mr * nr dots."""
        k, lanes, group = self.builder, self.lanes, self.group
        wide = lanes * group
        pixel = self.stage.column_axis.stride * self.block
        with k.unroll("u", count) as u:
            step = ix.add(first, u)
            for i in range(self.nr):
                k.store(self.wreg, (i, 0), load(self.packed, *index, step, i * wide, lanes=wide))
            for j in range(tile.width):
                at = ix.add(place, j * pixel, ix.mul(step, group))
                k.store(self.xreg, (0,), Repeat(load(self.stage.buffer, block, at, lanes=group), lanes))
                for i in range(self.nr):
                    total = Dot(
                        load(self.acc, j, i, 0, lanes=lanes),
                        load(self.xreg, 0, lanes=wide),
                        load(self.wreg, i, 0, lanes=wide),
                    )
                    k.store(self.acc, (j, i, 0), total)

    def finish(self, j: int, i: int, at: _At) -> None:
        """Store one vector of output channels through the tail."""
        k, lanes, s = self.builder, self.lanes, self.shape
        vector = ix.add(ix.mul(at.chunk, self.nr), i)
        lane = Var(f"lane{j}_{i}", lanes)
        channel = ix.add(ix.mul(at.group, s.out_channels // s.group), ix.mul(vector, lanes), lane)
        pixel = self.pixel((*at.outer, at.row, ix.add(at.start, j)))
        value = Load(self.acc, (ix.const(j), ix.const(i), lane))
        with k.when(less(vector, self.vectors)):
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


def pair_tile(vectors: int, pixels: int, registers: int) -> tuple[int, int]:
    """Outputs and vectors of outputs of a register tile whose multiplication and addition are two instructions.

    A step loads ``nr`` weights and broadcasts ``mr`` inputs for ``mr * nr`` multiplications (two a cycle) and as many
    additions; the processor takes six operations a cycle. Beside accumulators and weights there is one input and one
    product in a register (and of more than 16 registers LLVM uses some for the weights of the next step). Additions take one cycle, so that few accumulators are enough.
    """
    best, best_cost = (1, 1), float("inf")
    for nr in range(1, min(4, vectors) + 1):
        groups = ceil(vectors / nr)
        for mr in range(1, min(pixels, registers) + 1):
            if mr * nr + (nr if registers <= 16 else 2 * nr) + 2 > registers:
                break
            tiles = ceil(pixels / mr)
            base, longer = divmod(pixels, tiles)
            cost = groups * (longer * _pair_cycles(base + 1, nr) + (tiles - longer) * _pair_cycles(base, nr))
            if cost < best_cost - 1e-9:
                best, best_cost = (mr, nr), cost
    return best


def _pair_cycles(width: int, nr: int) -> float:
    """Cycles of one step: multiplications, or all operations; a tile has an overhead."""
    return max(width * nr / 2, (2 * width * nr + width + nr) / 5.7) + 0.1
