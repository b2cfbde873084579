"""Depthwise convolution over channel-blocked maps: every vector is one block of channels, multiplied lane by lane."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import CpuMachine, Layout, Lowered, to_layout
from nestc.kernels.conv_shape import ConvShape, Tile, cut_row
from nestc.kernels.operands import Operands
from nestc.kernels.tail import Tail
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, load, within
from nestc.tensor.ir import Expr, Fma, Load, Var
from nestc.tensor.rewrite import cast
from nestc.tensor.vectorize import vectorize

_ITEM_FLOPS = 100_000  # depthwise kernels are bound by memory: an item of some 4 us
_UNROLLED_TAPS = 7  # wider kernels loop over their columns


def lower_depthwise(
    region: Region, op: Op, shape: ConvShape, machine: CpuMachine, layouts: Mapping[str, Layout]
) -> Lowered:
    """One kernel for a depthwise Conv whose input and output are blocked by ``machine.lanes('float32')``.

    An input of bfloat16 is widened as it is read, once for all taps of a row.

    Items of the parallel loop are (batch, channel block, chunk of output rows). A tile holds as many neighbouring
    outputs of a row as registers allow; each input column is loaded once for every tap that reads it.
    """
    return Depthwise(Operands(Builder("depthwise"), region, layouts), op, shape, machine).lower()


class Depthwise:
    """Builds the kernel of one depthwise convolution, or rows of it within another kernel."""

    def __init__(self, operands: Operands, op: Op, shape: ConvShape, machine: CpuMachine) -> None:
        self.operands, self.builder = operands, operands.builder
        self.region = region = operands.region
        self.op, self.shape = op, shape.squeezed()
        self.trailing = (ix.const(0),) * (len(shape.out) - len(self.shape.out))
        shape = self.shape
        self.lanes = machine.lanes("float32")
        self.dtype = region.types[op.outputs[0]].dtype
        self.columns = shape.kernel[-1]
        registers = machine.vector_registers if self.dtype == "float32" else machine.vector_registers // 2
        # Weights of one kernel row stay in registers beside the accumulators and one input.
        self.widest = max(2, min(8, registers - min(self.columns, _UNROLLED_TAPS) - 2))

    def lower(self) -> Lowered:
        """The kernel and its packed weights."""
        s, k = self.shape, self.builder
        constants = self.declare()
        rows = prod(s.out[:-1])
        chunk = min(rows, max(1, _ITEM_FLOPS // (2 * s.out[-1] * self.lanes * prod(s.kernel))))
        while rows % chunk:
            chunk -= 1
        with k.parallel("item", s.batch, self.blocks, rows // chunk) as (n, block, part):
            with k.loop("r", chunk) as r:
                self.one_row(n, block, ix.add(ix.mul(part, chunk), r))
        return Lowered((self.operands.launch(),), constants={**self.operands.constants, **constants})

    @property
    def blocks(self) -> int:
        """Blocks of channels."""
        return ceil(self.shape.out_channels / self.lanes)

    def declare(self) -> dict[str, np.ndarray]:
        """Declare parameters and registers; gives the packed weights and bias."""
        s, k, lanes = self.shape, self.builder, self.lanes
        x = self.op.inputs[0]
        constants = self.pack()
        self.weights = self.operands.buffer(f"{self.op.inputs[1]}.packed")
        bias = self.op.input(2)
        self.bias = self.operands.buffer(f"{self.op.inputs[1]}.bias") if bias else None
        self.input = self.operands.buffer(x)
        self.tail = Tail(self.operands, self.op)
        self.tail.declare()
        self.tiles = cut_row(
            s.out[-1], s.size[-1], self.columns, s.strides[-1], s.dilations[-1], s.pads_begin[-1], self.widest
        )
        self.acc = k.regs("acc", (max(t.width for t in self.tiles),), lanes, self.dtype)
        self.wreg = k.regs("w", (min(self.columns, _UNROLLED_TAPS),), lanes, self.dtype)
        self.xreg = k.regs("x", (), lanes, self.dtype)
        return constants

    def one_row(self, n: Expr, block: Expr, row: Expr) -> None:
        """Row number `row` of the outputs of a block of channels."""
        outer = ix.unflatten(row, self.shape.out[:-1])
        for tile in self.tiles:
            with self.builder.loop("t", tile.count) as t:
                self.tile(tile, n, block, outer, ix.add(ix.mul(t, tile.width), tile.start))

    def pack(self) -> dict[str, np.ndarray]:
        """Weights [C, 1, *kernel] -> [C/lanes][*kernel][lanes] and bias [C] -> [C/lanes][lanes], zero-padded."""
        name = self.op.inputs[1]
        weights = self.region.constant(name)
        assert weights is not None
        block = Layout(self.lanes)
        arrays = {f"{name}.packed": to_layout(weights.swapaxes(0, 1).reshape(1, -1, *self.shape.kernel), block)[0]}
        bias_name = self.op.input(2)
        if bias_name:
            bias = self.region.constant(bias_name)
            assert bias is not None
            arrays[f"{name}.bias"] = to_layout(bias.reshape(1, -1), block)[0]
        for key, array in arrays.items():
            self.operands.define(key, TensorType(self.dtype, array.shape))
        return arrays

    def tile(self, tile: Tile, n: Expr, block: Expr, outer: tuple[Expr, ...], start: Expr) -> None:
        k, lanes = self.builder, self.lanes
        for j in range(tile.width):
            first = constant(0.0, self.dtype, lanes) if self.bias is None else load(self.bias, block, 0, lanes=lanes)
            k.store(self.acc, (j, 0), first)
        self.rows(0, tile, n, block, outer, start, (), ())
        for j in range(tile.width):
            lane = Var(f"lane{j}", lanes)
            index = (n, ix.add(ix.mul(block, lanes), lane), *outer, ix.add(start, j), *self.trailing)
            value = Load(self.acc, (ix.const(j), lane))
            k.emit(vectorize(self.tail.stores(index, value), lane, ix.const(0), lanes))

    def rows(
        self,
        axis: int,
        tile: Tile,
        n: Expr,
        block: Expr,
        outer: tuple[Expr, ...],
        start: Expr,
        taps: tuple[Expr, ...],
        places: tuple[Expr, ...],
    ) -> None:
        """Kernel rows that lie inside the input."""
        s, k = self.shape, self.builder
        if axis == len(outer):
            self.row(tile, n, block, start, taps, places)
            return
        with k.loop("kh", s.kernel[axis]) as kh:
            place = ix.add(ix.mul(outer[axis], s.strides[axis]), ix.mul(kh, s.dilations[axis]), -s.pads_begin[axis])
            with k.when(within(place, s.size[axis])):
                self.rows(axis + 1, tile, n, block, outer, start, (*taps, kh), (*places, place))

    def row(
        self,
        tile: Tile,
        n: Expr,
        block: Expr,
        start: Expr,
        taps: tuple[Expr, ...],
        places: tuple[Expr, ...],
    ) -> None:
        """One kernel row: each input column is loaded once and multiplied into every output that it reaches."""
        s, k, lanes = self.shape, self.builder, self.lanes
        stride, dilation = s.strides[-1], s.dilations[-1]
        first = ix.add(ix.mul(start, stride), -s.pads_begin[-1])
        if self.columns > _UNROLLED_TAPS:
            with k.loop("kw", self.columns) as kw:
                k.store(self.wreg, (0, 0), load(self.weights, block, *taps, kw, 0, lanes=lanes))
                for j in range(tile.width):
                    w = ix.add(first, j * stride, ix.mul(kw, dilation))
                    mask = None if tile.taps is None else within(w, s.size[-1])
                    value = load(self.input, n, block, *places, w, *self.trailing, 0, lanes=lanes, mask=mask)
                    k.store(self.xreg, (0,), cast(value, self.dtype))
                    self.multiply(j, 0)
            return
        for kw in range(self.columns):
            k.store(self.wreg, (kw, 0), load(self.weights, block, *taps, kw, 0, lanes=lanes))
        reach: dict[int, list[tuple[int, int]]] = {}
        for kw in range(self.columns):
            for j in range(tile.width) if tile.taps is None else tile.taps[kw]:
                reach.setdefault(j * stride + kw * dilation, []).append((j, kw))
        for column in sorted(reach):
            value = load(self.input, n, block, *places, ix.add(first, column), *self.trailing, 0, lanes=lanes)
            k.store(self.xreg, (0,), cast(value, self.dtype))
            for j, kw in reach[column]:
                self.multiply(j, kw)

    def multiply(self, j: int, kw: int) -> None:
        lanes = self.lanes
        product = Fma(
            Load(self.xreg, (ix.const(0),), lanes),
            load(self.wreg, kw, 0, lanes=lanes),
            load(self.acc, j, 0, lanes=lanes),
        )
        self.builder.store(self.acc, (j, 0), product)
