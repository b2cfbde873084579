"""A map times a number a channel, then a convolution (squeeze-and-excite): the weights are scaled instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Family, Launch, Layout, Lowered
from nestc.kernels.choices import CONV_BY_RULE, ConvChoice
from nestc.kernels.conv import CONV, ConvFamily, Direct, lower_dense
from nestc.kernels.conv_shape import conv_shape
from nestc.kernels.fused import STREAM_RATE, Pair, element_bytes, parts, rate
from nestc.kernels.operands import Operands
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, load, splat, within
from nestc.tensor.ir import Binary, Const


class ScaledWeights:
    """Mul of a map [1, C, ...] and scales [1, C, 1, ...], and a pointwise Conv that alone reads the product.

    A small kernel multiplies the packed weights by the scales at run time, and the convolution, with the tile and
    order of `choice`, reads the map itself. Products are rounded in another order: (w * s) * x for w * (s * x).
    """

    exact = False

    def __init__(self, choice: ConvChoice = CONV_BY_RULE) -> None:
        self.choice = choice
        self.name = f"scaled_weights{choice.text}"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        pair = parts(region)
        if pair is None:
            return "it is not two regions"
        if pair.anchor.op_type != "Conv":
            return "no convolution follows"
        reason = _factors(pair)[1] or CONV.refusal(pair.second)
        if reason is not None:
            return reason
        shape = conv_shape(pair.anchor, pair.second)
        if not shape.pointwise or shape.group != 1 or shape.batch != 1:
            return "only the weights of a pointwise convolution of one image are scaled"
        return None

    def replacing(self, first: Family, second: Family) -> ScaledWeights | None:
        """This family with the parameters of the way that was chosen for the convolution alone; None if it is another
        algorithm."""
        return ScaledWeights(second.choice) if isinstance(second, ConvFamily) else None

    def gain(self, region: Region, machine: CpuMachine, threads: int) -> float:
        """Modelled seconds that are saved: the map is not read and written once more, but the weights are."""
        pair = parts(region)
        assert pair is not None
        shape, type_ = conv_shape(pair.anchor, pair.second), region.types[pair.between]
        pixel = 2 * element_bytes(type_) * shape.in_channels
        speed = min(STREAM_RATE, rate(machine, pixel * prod(shape.out)))
        return pixel * (prod(shape.out) - shape.out_channels) / speed / threads

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """As the convolution wants them; scales as they come."""
        inner, scales = _inner(region)
        known = {name: incoming[name] for name in inner.inputs}
        return {scales: incoming[scales], **CONV.layouts(inner, machine, known)}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """The kernel that scales the weights, and the convolution."""
        inner, scales = _inner(region)
        op = inner.ops[0]
        rest = lower_dense(inner, op, conv_shape(op, inner), machine, layouts, Direct, self.choice)
        packed = f"{op.inputs[1]}.packed"
        scaled = f"{op.inputs[1]}.scaled"
        weights = TensorType(region.types[op.inputs[1]].dtype, rest.constants[packed].shape)
        first = _scale(region, scales, packed, scaled, weights, layouts)
        read = tuple(
            replace(launch, args=tuple(scaled if name == packed else name for name in launch.args))
            for launch in rest.launches
        )
        return Lowered((first, *read), {**rest.temporaries, scaled: weights}, rest.constants)


def _factors(pair: Pair) -> tuple[tuple[str, str], str | None]:
    """The map and its scales, or why there are none."""
    op, types = pair.first.ops[0], pair.first.types
    if len(pair.first.ops) != 1 or op.op_type != "Mul" or op.domain:
        return ("", ""), "the first is not one product"
    whole = types[op.outputs[0]].shape
    for a, b in (op.inputs, op.inputs[::-1]):
        ones = (*whole[:2], *(1 for _ in whole[2:]))
        if types[a].shape == whole and types[b].shape == ones and {a, b} <= set(pair.first.inputs) and a != b:
            return (a, b), None
    return ("", ""), "the first does not multiply a map by one number a channel"


def _inner(region: Region) -> tuple[Region, str]:
    """The convolution on the map itself, and the scales."""
    pair = parts(region)
    assert pair is not None
    (source, scales), _ = _factors(pair)
    op = replace(pair.anchor, inputs=(source, *pair.anchor.inputs[1:]))
    inputs = dict.fromkeys((source, *(name for name in pair.second.inputs if name != pair.between)))
    return replace(pair.second, ops=(op, *pair.second.ops[1:]), inputs=tuple(inputs)), scales


def _scale(
    region: Region, scales: str, packed: str, scaled: str, type_: TensorType, layouts: Mapping[str, Layout]
) -> Launch:
    """A kernel that multiplies weights [group of outputs][block][1][..][channel][outputs] by the scales of their
    channels."""
    pair = parts(region)
    assert pair is not None
    operands = Operands(Builder("scale_weights"), pair.first, {scales: layouts.get(scales, PLAIN)})
    for name in (packed, scaled):
        operands.define(name, type_)
    k, source, target = operands.builder, operands.buffer(packed), operands.buffer(scaled)
    groups, blocks, *taps, step, wide = type_.shape
    zeros = [ix.const(0) for _ in taps]
    channels = region.types[scales].shape[1]
    with k.parallel("item", groups, blocks) as (group, block):
        with k.loop("c", step) as c:
            channel = ix.add(ix.mul(block, step), c)
            inside = within(channel, channels)
            index = (ix.const(0), channel, *(ix.const(0) for _ in region.types[scales].shape[2:]))
            factor = operands.load(scales, index, None if isinstance(inside, Const) else inside)
            place = (group, block, *zeros, c, 0)
            value = load(source, *place, lanes=wide)
            k.store(target, place, Binary("mul", value, splat(factor, wide)))
    return operands.launch(pair.first.origin)


SCALED_WEIGHTS = ScaledWeights()
