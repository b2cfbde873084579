"""Winograd for strided convolutions of few channels (the first layer of a vision model): strides become channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil, prod

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered, physical_shape
from nestc.kernels.conv import CONV
from nestc.kernels.conv_shape import ConvShape, conv_shape
from nestc.kernels.operands import Operands
from nestc.kernels.tail import tail_refusal
from nestc.kernels.winograd import WinogradKernel, anchor_of, untransformable
from nestc.kernels.winograd_matrices import Transform, transform
from nestc.kernels.winograd_plan import Tiling, cycles, direct_cycles, plan
from nestc.kernels.winograd_tiles import otherwise
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, load, within
from nestc.tensor.ir import Expr

_LARGEST_STRIDE = 4  # beyond that windows share little, and folded maps have many channels
_FEW_CHANNELS = 16  # maps of more are blocked already, and cost more to fold
_LEAST_OUTPUTS = 16
_MOST_POINTS = 8  # for the sake of accuracy
_COPY = 1.5  # cycles to move the neighbours that one output meets in a row


class FoldedWinogradFamily:
    """Conv on float32 with one group and a stride above 1, of few channels: F(m, r) along each axis.

    Inputs whose places are equal modulo the stride s become channels of their own (space to depth), which leaves a
    convolution of stride 1 with ``r = ceil(kernel / s)`` taps, some of them zero: 7x7 with stride 2 of 3 channels is
    4x4 of 12.
    """

    def __init__(self, m: int, fused: bool | None = None) -> None:
        """`fused` as in `WinogradFamily`."""
        self.m = m
        self.fused = fused
        self.name = f"winograd{m}_folded" + ("" if fused is None else "_fused" if fused else "_split")

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        reason = untransformable(region)
        if reason is not None:
            return reason
        op = anchor_of(region)
        assert op is not None
        s = conv_shape(op, region)
        if max(s.strides) == 1:
            return "there is no stride to fold"
        if max(s.strides) > _LARGEST_STRIDE:
            return f"strides above {_LARGEST_STRIDE} are not folded"
        taps = folded_taps(s)
        if max(taps) == 1 or any(r > 1 and not self._fits(r) for r in taps):
            return f"F({self.m}, r) of {taps} taps is not among the transforms"
        if s.in_channels >= _FEW_CHANNELS:
            return f"{_FEW_CHANNELS} channels or more are not folded"
        if s.out_channels < _LEAST_OUTPUTS:
            return f"fewer than {_LEAST_OUTPUTS} outputs are not worth transforming"
        return tail_refusal(region, op)

    def _fits(self, taps: int) -> bool:
        """Whether F(m, taps) is among the transforms, with few enough points."""
        points = self.m + taps - 1
        return points % 2 == 0 and points <= _MOST_POINTS

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """The map as it comes to the direct convolution of few channels, which is plain; the rest as there."""
        op = anchor_of(region)
        assert op is not None
        return {**CONV.layouts(region, machine, incoming), op.inputs[0]: PLAIN}

    def tiling(self, shape: ConvShape, machine: CpuMachine) -> Tiling:
        """How the output of the folded convolution is cut into tiles."""
        axes: list[Transform] = [transform(self.m if r > 1 else 1, r) for r in shape.kernel]
        both = axes if len(axes) == 2 else [transform(1, 1), *axes]
        return Tiling(shape, (both[0], both[1]), machine)

    def cycles(self, region: Region, machine: CpuMachine) -> tuple[float, float]:
        """Modelled cycles of this way, and of the direct kernel on the same terms."""
        op = anchor_of(region)
        assert op is not None
        shape = conv_shape(op, region)
        dense = folded_shape(shape)
        tiling = self.tiling(dense, machine)
        moved = dense.batch * prod(dense.size) * dense.in_channels / shape.strides[-1]
        took = cycles(tiling, plan(tiling, self.fused)) + _COPY * moved
        return took, direct_cycles(replace(tiling, shape=shape))

    def other(self, region: Region, machine: CpuMachine) -> FoldedWinogradFamily:
        """The same algorithm, its input transform in the kernel where this one has it apart, or the other way round."""
        op = anchor_of(region)
        assert op is not None
        tiling = self.tiling(folded_shape(conv_shape(op, region)), machine)
        return FoldedWinogradFamily(self.m, not plan(tiling, self.fused).fused)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """A kernel that folds the map, and those of the dense convolution."""
        op = anchor_of(region)
        assert op is not None
        shape = conv_shape(op, region)
        dense = folded_shape(shape)
        x, w = op.inputs[0], op.inputs[1]
        map_name, weight_name = f"{x}.folded", f"{w}.folded"
        weights = region.constant(w)
        assert weights is not None
        folded = fold_weights(weights, shape)
        block = Layout(machine.lanes("float32"))
        map_type = TensorType("float32", (dense.batch, dense.in_channels, *dense.size))
        types = {**region.types, map_name: map_type, weight_name: TensorType("float32", folded.shape)}
        both = {**layouts, map_name: block}
        constants = {**region.constants, weight_name: lambda: folded}
        attributes = {**op.attributes, "strides": None, "kernel_shape": None, "auto_pad": "NOTSET"}
        attributes["pads"] = (0,) * (2 * len(shape.out))
        inner_op = Op(op.op_type, (map_name, weight_name, *op.inputs[2:]), op.outputs, attributes, op.domain, op.name)
        ops = tuple(inner_op if each is op else each for each in region.ops)
        inner = Region(region.name, region.anchor, ops, region.inputs, region.outputs, types, constants)
        tiling = self.tiling(dense, machine)
        rest = WinogradKernel(inner, inner_op, both, tiling, plan(tiling, self.fused)).lower()
        first = _fold_kernel(Region(region.name, None, (), (x,), (map_name,), types, {}), shape, both)
        temporaries = {map_name: TensorType("float32", physical_shape(map_type, block)), **rest.temporaries}
        return Lowered((first, *rest.launches), temporaries, rest.constants)


def folded_taps(s: ConvShape) -> tuple[int, ...]:
    """Taps along each axis of the folded convolution."""
    return tuple(ceil(k / stride) for k, stride in zip(s.kernel, s.strides, strict=True))


def folded_shape(s: ConvShape) -> ConvShape:
    """The convolution of stride 1 that is left; its padding is part of its input."""
    taps = folded_taps(s)
    rank = len(s.out)
    size = tuple(n + r - 1 for n, r in zip(s.out, taps, strict=True))
    ones = (1,) * rank
    channels = s.in_channels * prod(s.strides)
    return ConvShape(s.batch, 1, channels, s.out_channels, size, s.out, taps, ones, ones, (0,) * rank)


def fold_weights(weights: np.ndarray, s: ConvShape) -> np.ndarray:
    """[O, C, *kernel] -> [O, C * strides, *taps]: channel (c, place modulo the stride), zero beyond the kernel."""
    taps = folded_taps(s)
    beyond = [(0, r * stride - k) for r, stride, k in zip(taps, s.strides, s.kernel, strict=True)]
    padded = np.pad(weights, [(0, 0), (0, 0), *beyond])
    split = padded.reshape(*weights.shape[:2], *(n for pair in zip(taps, s.strides, strict=True) for n in pair))
    rank = len(taps)
    order = (0, 1, *(3 + 2 * i for i in range(rank)), *(2 + 2 * i for i in range(rank)))
    return np.ascontiguousarray(split.transpose(order)).reshape(weights.shape[0], -1, *taps)


def _fold_kernel(region: Region, s: ConvShape, layouts: Mapping[str, Layout]) -> Launch:
    """Copies the plain map [N, C, *size] that is the region's input to [N, C * strides, *folded size] in blocks, zeros
    where padding is. Items are rows of the result."""
    return _Fold(region, s, layouts).launch()


class _Fold:
    """Neighbours of a row that one output meets become neighbouring channels, so that they move as a small vector: a
    *unit*, which is one element where the stride does not divide a block."""

    def __init__(self, region: Region, s: ConvShape, layouts: Mapping[str, Layout]) -> None:
        (x,), (y,) = region.inputs, region.outputs
        self.k = Builder("fold")
        self.operands = Operands(self.k, region, layouts)
        self.s, self.dense = s, folded_shape(s)
        self.x, self.y = self.operands.buffer(x), self.operands.buffer(y)
        self.lanes = layouts[y].block
        self.unit = s.strides[-1] if self.lanes % s.strides[-1] == 0 else 1

    def launch(self) -> Launch:
        """The kernel."""
        k, s = self.k, self.s
        phases = (*s.strides[:-1], s.strides[-1] // self.unit)
        units = s.in_channels * prod(phases)
        a_block = self.lanes // self.unit
        with k.parallel("row", s.batch, *self.dense.size[:-1]) as (n, *outer):
            with k.loop("u", units) as u:
                c, *phase = ix.unflatten(u, (s.in_channels, *phases))
                rows = tuple(
                    ix.add(ix.mul(i, stride), p, -pad)
                    for i, stride, p, pad in zip(outer, s.strides, phase, s.pads_begin, strict=False)
                )
                target = (n, ix.floordiv(u, a_block), *outer), ix.mul(ix.mod(u, a_block), self.unit)
                inside = within(rows[0], s.size[0]) if rows else constant(True, "bool")
                with k.when(inside):
                    self.row((n, c, *rows), phase[-1], *target)
                if rows:
                    with otherwise(k, inside):
                        self.zeros(*target, self.unit)
            channels = self.dense.in_channels
            if channels % self.lanes:
                beyond = (n, ix.const(channels // self.lanes), *outer), ix.const(channels % self.lanes)
                self.zeros(*beyond, self.lanes - channels % self.lanes)
        return self.operands.launch()

    def row(self, source: tuple[Expr, ...], phase: Expr, target: tuple[Expr, ...], lane: Expr) -> None:
        """Copy a row of units, the first of which lies `phase` beyond a multiple of the stride."""
        k, stride, pad = self.k, self.s.strides[-1], self.s.pads_begin[-1]
        length, width = self.dense.size[-1], self.s.size[-1]
        # Of these outputs all inputs of a stride are inside.
        first = min(length, -(-pad // stride))
        end = max(first, min(length, (width + pad) // stride))

        def start(w: Expr | int) -> Expr:
            return ix.add(ix.mul(w, stride), phase, -pad)

        with k.loop("w", end - first) as w:
            there = ix.add(w, first)
            k.store(self.y, (*target, there, lane), load(self.x, *source, start(there), lanes=self.unit))
        for w in (*range(first), *range(end, length)):
            for e in range(self.unit):
                place = ix.add(start(w), e)
                k.store(self.y, (*target, w, ix.add(lane, e)), load(self.x, *source, place, mask=within(place, width)))

    def zeros(self, target: tuple[Expr, ...], lane: Expr, lanes: int) -> None:
        """Write zeros to `lanes` channels of a row."""
        with self.k.loop("w", self.dense.size[-1]) as w:
            self.k.store(self.y, (*target, w, lane), constant(0.0, "float32", lanes))


WINOGRAD_FOLDED = tuple(FoldedWinogradFamily(m) for m in (2, 3, 4, 5))
