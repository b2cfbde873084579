"""Strided 1x1 convolutions: the pixels that are read are copied together first."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import Launch, Layout
from nestc.kernels.conv_shape import ConvShape
from nestc.kernels.operands import Operands
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, load


def strided_pointwise(shape: ConvShape) -> bool:
    """A 1x1 convolution that leaves pixels out."""
    return shape.group == 1 and prod(shape.kernel) == 1 and max(shape.strides) > 1 and not any(shape.pads_begin)


class Picked(NamedTuple):
    """The copy of the pixels that are read, and the plain 1x1 convolution that is left."""

    launch: Launch
    temporaries: Mapping[str, TensorType]
    region: Region
    op: Op
    layouts: Mapping[str, Layout]


def pick_pixels(region: Region, op: Op, shape: ConvShape, layouts: Mapping[str, Layout]) -> Picked:
    """The pixels that are read are copied together first: a plain 1x1 convolution has long rows, and the copy is read
    from the cache for every group of outputs."""
    x, picked = op.inputs[0], f"{op.inputs[0]}.picked"
    dtype = region.types[x].dtype
    type_ = TensorType(dtype, (shape.batch, shape.in_channels, *shape.out))
    types = {**region.types, picked: type_}
    both = {**layouts, picked: layouts[x]}
    copying = Operands(Builder("conv_pick"), Region(region.name, None, (), (x,), (picked,), types, {}), both)
    source, target = copying.buffer(x), copying.buffer(picked)
    block = layouts[x].block
    with copying.builder.parallel("item", *target.shape[:-2]) as outer:
        with copying.builder.loop("w", shape.out[-1]) as w:
            place = tuple(ix.mul(i, s) for i, s in zip((*outer[2:], w), shape.strides))
            value = load(source, *outer[:2], *place, 0, lanes=block)
            copying.builder.store(target, (*outer, w, 0), value)
    first = copying.launch(region.origin)
    dense = Op(op.op_type, (picked, *op.inputs[1:]), op.outputs, {**op.attributes, "strides": None}, op.domain, op.name)
    ops = tuple(dense if each is op else each for each in region.ops)
    inner = Region(region.name, region.anchor, ops, region.inputs, region.outputs, types, region.constants)
    return Picked(first, {picked: TensorType(dtype, target.shape)}, inner, dense, both)
