"""What makes a map row by row and the 1x1 convolution that reads it, as one kernel by bands of rows that stay in L2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, prod
from typing import Protocol

import numpy as np

from nestc.graph.region import Op, Region
from nestc.kernels.api import CpuMachine, Family, Layout, Lowered
from nestc.kernels.choices import CONV_BY_RULE, ConvChoice, below
from nestc.kernels.conv import CONV, ConvFamily, depthwise
from nestc.kernels.conv_shape import ConvShape, conv_shape
from nestc.kernels.depthwise import Depthwise
from nestc.kernels.fused import (
    BARRIER_SECONDS,
    FLOPS_PER_SECOND,
    Pair,
    element_bytes,
    idle,
    joined_layouts,
    parts,
    rate,
)
from nestc.kernels.fused_rows import RowsOf
from nestc.kernels.operands import Index, Operands
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder
from nestc.tensor.ir import Expr, Var
from nestc.tensor.vectorize import vectorize

_CACHE_LINE = 64

_BAND_PIXELS, _BANDS = 192, 8
"""Pixels of a band at least, where there are as many, since each group of outputs reads its weights once a band; then
as many bands of an image. Longer runs of rows are read faster."""

_SLOWER = 0.1
"""What products may take longer than in a kernel of their own, which has the tile and order that was measured for them
and reads ahead from its first pixel to its last."""


class _Maker(Protocol):
    """What makes rows of the map."""

    def declare(self) -> Mapping[str, np.ndarray]:
        """Declare parameters and registers; gives packed constants."""
        ...

    def one_row(self, n: Expr, block: Expr, row: Expr) -> None:
        """A row of a block of channels."""
        ...


class DepthwisePointwise:
    """Conv with a channel a group, its tail, and a Conv 1x1 of stride 1 with its tail, in float32 or float64.

    What the first makes lies in scratch memory, a band of rows at a time. Products are added in the same order as by
    the two kernels, so the results are the same to the bit.
    """

    exact = True

    def __init__(self, choice: ConvChoice = CONV_BY_RULE) -> None:
        self.choice = choice
        self.name = f"depthwise_pointwise{choice.text}"

    def replacing(self, first: Family, second: Family) -> DepthwisePointwise | None:
        """This family with the tile of the second if both would be computed directly, else None."""
        if not isinstance(first, ConvFamily) or not isinstance(second, ConvFamily):
            return None
        return DepthwisePointwise(second.choice)

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        pair = parts(region)
        if pair is None or pair.first.ops[0].op_type != "Conv":
            return "it is not a convolution and something after it"
        reason = CONV.refusal(pair.first) or _pointwise_refusal(pair)
        if reason is not None:
            return reason
        return None if depthwise(_shape_of_first(pair)) else "the first convolution is not depthwise"

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """As both convolutions want them."""
        pair = _pair(region)
        before = CONV.layouts(pair.first, machine, {name: incoming[name] for name in pair.first.inputs})
        return joined_layouts(pair, before, CONV, machine, incoming)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel; an item of its parallel loop is a band of rows of an image."""
        pair = _pair(region)
        operands = Operands(Builder("depthwise_pointwise"), region, layouts)
        shape = _shape_of_first(pair)
        first = Depthwise(operands.part(pair.first), pair.first.ops[0], shape, machine)
        return _Banded(pair, operands, machine, layouts, self.choice, first).lower()

    def gain(self, region: Region, machine: CpuMachine, threads: int) -> float:
        """Modelled seconds that one kernel saves: the map between the two is neither written nor read, and threads meet
        once less; but each band reads the weights again, and bands may be too few for the threads. Of a batch the maps
        of one image count: a program may compute it image by image."""
        pair = _pair(region)
        first = _shape_of_first(pair)
        element = element_bytes(region.types[pair.between])
        between = element * prod(region.types[pair.between].shape)
        source = element * first.batch * first.in_channels * prod(first.size)
        spared = 2 * between / rate(machine, (between + source) // first.batch)
        return spared / threads - _price(pair, machine, threads, first.flops)


class ElementwisePointwise:
    """Elementwise operators on a map, and a Conv 1x1 of stride 1 with its tail, in float32 or float64: the product with
    the scales of squeeze-and-excite, normalisation and activation before a convolution. Results are those of two
    kernels to the bit."""

    exact = True

    def __init__(self, choice: ConvChoice = CONV_BY_RULE) -> None:
        self.choice = choice
        self.name = f"elementwise_pointwise{choice.text}"

    def replacing(self, first: Family, second: Family) -> ElementwisePointwise | None:
        """This family with the tile of the convolution if that would be computed directly, else None."""
        return ElementwisePointwise(second.choice) if isinstance(second, ConvFamily) else None

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        pair = parts(region)
        if pair is None:
            return "it is not two regions"
        reason = _pointwise_refusal(pair)
        if reason is not None:
            return reason
        source = _source(pair)
        if source is None:
            return "the first reads no map like the one that it makes"
        first = _after(source, pair.first)
        return tail_refusal(first, first.ops[0])

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Blocks for maps, the rest as it comes."""
        pair = _pair(region)
        block, shape = Layout(machine.lanes("float32")), region.types[pair.between].shape
        own = {name: block if region.types[name].shape == shape else incoming[name] for name in pair.first.inputs}
        return joined_layouts(pair, own, CONV, machine, incoming)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel; an item of its parallel loop is a band of rows of an image."""
        pair = _pair(region)
        source = _source(pair)
        assert source is not None
        operands = Operands(Builder("elementwise_pointwise"), region, layouts)
        first = _Elementwise(operands.part(_after(source, pair.first)), source, machine.lanes("float32"))
        return _Banded(pair, operands, machine, layouts, self.choice, first).lower()

    def gain(self, region: Region, machine: CpuMachine, threads: int) -> float:
        """Modelled seconds that one kernel saves, as of a depthwise convolution: what a kernel of its own reads takes
        as long here, since nothing is multiplied meanwhile."""
        pair = _pair(region)
        type_ = region.types[pair.between]
        between = element_bytes(type_) * prod(type_.shape)
        return 2 * between / rate(machine, 2 * between // type_.shape[0]) / threads - _price(pair, machine, threads, 0)


def _pair(region: Region) -> Pair:
    pair = parts(region)
    assert pair is not None
    return pair


def _shape_of_first(pair: Pair) -> ConvShape:
    return conv_shape(pair.first.ops[0], pair.first)


def _pointwise_refusal(pair: Pair) -> str | None:
    """Why the second region is no convolution that can be computed by bands; None if it is one."""
    if pair.anchor.op_type != "Conv":
        return "no convolution follows"
    reason = CONV.refusal(pair.second)
    if reason is not None:
        return reason
    shape = conv_shape(pair.anchor, pair.second)
    if not shape.pointwise or shape.group != 1:
        return "the convolution that follows is not pointwise"
    return None if len(shape.squeezed().out) == 2 else "only maps of rows and columns are cut into bands"


def _price(pair: Pair, machine: CpuMachine, threads: int, flops: int) -> float:
    """Modelled seconds that bands cost, where the first part computes so many `flops`."""
    second = conv_shape(pair.anchor, pair.second)
    element = element_bytes(pair.second.types[pair.between])
    rows = band_rows(second, element, machine)
    bands = second.batch * (second.size[0] // rows)
    weights = element * second.in_channels * second.out_channels
    band = element * second.in_channels * rows * second.size[1]
    work = second.flops / FLOPS_PER_SECOND / threads
    again = (bands - 1) * weights / rate(machine, weights + band) / threads
    waits = idle(bands, threads) * (work + flops / FLOPS_PER_SECOND / threads)
    return _SLOWER * work + again + waits - (BARRIER_SECONDS if threads > 1 else 0.0)


def band_rows(shape: ConvShape, element: int, machine: CpuMachine) -> int:
    """Rows of a band of the inputs of a pointwise convolution: a divisor of their number whose band takes at most half
    of L2."""
    rows, length = shape.size
    lines = max(ceil(_BAND_PIXELS / length), rows // _BANDS)
    room = machine.l2_bytes // 2 // (shape.in_channels * length * element)
    return below(rows, max(1, min(lines, room)))


def _source(pair: Pair) -> str | None:
    """The first operand that is a map like the one that is made."""
    type_ = pair.first.types[pair.between]
    return next((name for name in pair.first.inputs if pair.first.types[name] == type_), None)


def _after(source: str, region: Region) -> Region:
    """The region behind an operator that gives `source` as it is, so that it is the tail of that."""
    return replace(region, ops=(Op("Identity", (source,), (source,)), *region.ops))


class _Elementwise:
    """Makes rows of a map from those of another by the operators after it."""

    def __init__(self, operands: Operands, source: str, lanes: int) -> None:
        self.operands, self.builder, self.source, self.lanes = operands, operands.builder, source, lanes
        self.tail = Tail(operands, operands.region.ops[0])

    def declare(self) -> Mapping[str, np.ndarray]:
        """Declare the parameters."""
        self.operands.buffer(self.source)
        self.tail.declare()
        return {}

    def one_row(self, n: Expr, block: Expr, row: Expr) -> None:
        """A row of a block of channels, a pixel at a time."""
        with self.builder.loop("x", self.operands.type(self.source).shape[3]) as column:
            lane = Var("lane", self.lanes)
            index = (n, ix.add(ix.mul(block, self.lanes), lane), row, column)
            stores = self.tail.stores(index, self.operands.load(self.source, index))
            self.builder.emit(vectorize(stores, lane, ix.const(0), self.lanes))


class _Banded:
    """Builds the kernel. An item computes a band of rows of the map, all channels, into scratch memory
    [block of channels][pixel][lanes], then every group of outputs from it."""

    def __init__(
        self,
        pair: Pair,
        operands: Operands,
        machine: CpuMachine,
        layouts: Mapping[str, Layout],
        choice: ConvChoice,
        first: _Maker,
    ) -> None:
        self.operands, self.first = operands, first
        self.shape = shape = conv_shape(pair.anchor, pair.second)
        self.lanes = machine.lanes("float32")
        element = element_bytes(operands.type(pair.between))
        self.rows = band_rows(shape, element, machine)
        self.blocks = ceil(shape.in_channels / self.lanes)
        # A band's first row, known within the parallel loop.
        self.start: Expr = ix.const(0)
        # An odd number of cache lines: blocks at a power of two apart would share the same sets of the cache.
        each = max(1, _CACHE_LINE // (self.lanes * element))
        stride = each * (ceil(self.rows * shape.size[1] / each) | 1)
        band = operands.builder.scratch("band", (self.blocks, stride, self.lanes), operands.type(pair.between).dtype)
        operands.hold(pair.between, band, self.place)
        # A line of products is a band.
        self.bands = shape.size[0] // self.rows
        self.products = RowsOf(operands.part(pair.second), pair.anchor, machine, layouts, choice, self.bands)

    def place(self, index: Index) -> Index:
        """Place in the band of an element of the map."""
        _, channel, row, column = index
        pixel = ix.add(ix.mul(ix.sub(row, self.start), self.shape.size[1]), column)
        return ix.floordiv(channel, self.lanes), pixel, ix.mod(channel, self.lanes)

    def lower(self) -> Lowered:
        """The kernel and its packed constants."""
        k = self.operands.builder
        constants = {**self.first.declare(), **self.products.declare()}
        with k.parallel("band", self.shape.batch, self.bands) as (n, band):
            self.start = ix.mul(band, self.rows)
            with k.loop("b", self.blocks) as block, k.loop("y", self.rows) as row:
                self.first.one_row(n, block, ix.add(self.start, row))
            with k.loop("oc", self.products.group_chunks) as oc:
                self.products.rows(n, oc, band, 1)
        return Lowered((self.operands.launch(),), constants={**self.operands.constants, **constants})


DEPTHWISE_POINTWISE = DepthwisePointwise()
ELEMENTWISE_POINTWISE = ElementwisePointwise()
