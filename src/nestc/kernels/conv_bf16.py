"""Convolution of bfloat16 with float32 sums, two channels a multiplication, where the machine has that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import ml_dtypes
import numpy as np

from nestc.graph.region import Op, Region
from nestc.kernels.api import CpuMachine, Layout, Lowered
from nestc.kernels.conv import CONV, Direct, depthwise, lower_dense
from nestc.kernels.conv_shape import conv_shape
from nestc.kernels.depthwise import lower_depthwise
from nestc.kernels.quantized import float_region, prologue
from nestc.tensor import index as ix
from nestc.tensor.ir import Dot, Expr, Load, Repeat

_LEAST_CHANNELS = 16  # lanes of the widest vectors: a block is full, and made of pairs of neighbours


class ConvBfloat16Family:
    """Conv on a bfloat16 input that the prologue widens, with constant weights that are bfloat16 numbers.

    Only for machines with products of bfloat16 (``machine.bf16``); others widen the input in a kernel of its own
    and compute in float32. What comes after the sums is float32 here as well. Depthwise kernels, which have no
    channels to add, widen what they read in registers.
    """

    name = "conv_bf16"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        found = _narrow_region(region)
        if isinstance(found, str):
            return found
        inner, op = found
        shape = conv_shape(op, inner)
        if not 1 <= len(shape.size) <= 3:
            return "only 1 to 3 spatial axes are blocked"
        refusal = CONV.refusal(float_region(region))
        if refusal is not None or depthwise(shape):
            return refusal
        if shape.in_channels < _LEAST_CHANNELS or (shape.group > 1 and shape.in_channels // shape.group % 2):
            return f"Conv (node {op.name!r}) has few input channels, or an odd number of them a group"
        return _inexact(op, inner)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Blocked input and output."""
        inner, op = _read(region)
        return {**CONV.layouts(inner, machine, incoming), op.inputs[0]: Layout(machine.lanes("float32"))}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel, after one that picks the pixels of a strided pointwise convolution."""
        inner, op = _read(region)
        shape = conv_shape(op, inner)
        if depthwise(shape):
            return lower_depthwise(inner, op, shape, machine, layouts)
        return lower_dense(inner, op, shape, machine, layouts, _Pairs)


def _read(region: Region) -> tuple[Region, Op]:
    found = _narrow_region(region)
    assert not isinstance(found, str)
    return found


def _narrow_region(region: Region) -> tuple[Region, Op] | str:
    """The region with a convolution that reads the bfloat16 input itself, and that convolution; or why it is none."""
    before = prologue(region)
    if region.anchor != "Conv" or not before:
        return "its anchor is not a Conv on narrow operands"
    op = region.ops[len(before)]
    widened = {each.outputs[0]: each for each in before if each.inputs[0] not in region.constants}
    cast = widened.pop(op.inputs[0], None)
    if op.domain or cast is None or cast.op_type != "Cast" or region.types[cast.inputs[0]].dtype != "bfloat16":
        return f"the input of {op.op_type} (node {op.name!r}) is not bfloat16"
    wide = float_region(region)
    after = wide.ops[1:]
    if widened or any(op.inputs[0] in each.inputs for each in after):
        return f"more than the input of {op.op_type} (node {op.name!r}) is widened"
    if region.types[op.outputs[0]].dtype != "float32":
        return f"{op.op_type} (node {op.name!r}) is not on float32"
    narrow = replace(op, inputs=(cast.inputs[0], *op.inputs[1:]))
    inputs = tuple(cast.inputs[0] if name == op.inputs[0] else name for name in wide.inputs)
    return replace(wide, ops=(narrow, *after), inputs=tuple(dict.fromkeys(inputs))), narrow


def _inexact(op: Op, region: Region) -> str | None:
    """Why the weights cannot be used as bfloat16; None if they can: the constant folder may have widened them."""
    weights = region.constant(op.inputs[1])
    if weights is None or (np.ascontiguousarray(weights, np.float32).view(np.uint32) & 0xFFFF).any():
        return f"the weights of {op.op_type} (node {op.name!r}) are not bfloat16 numbers"
    return None


class _Pairs(Direct):
    """The direct kernel with pairs of channels: weights ``[..][step / 2][nr * lanes][2]``, inputs broadcast in twos."""

    together = 2

    def pack_weights(self) -> np.ndarray:
        packed = super().pack_weights()
        *outer, step, wide = packed.shape
        pairs = packed.reshape(*outer, step // 2, 2, wide).swapaxes(-1, -2)
        return pairs.astype(ml_dtypes.bfloat16).reshape(*outer, step // 2, 2 * wide)

    def broadcast(self, place: tuple[Expr, ...], mask: Expr | None) -> Expr:
        x = self.op.inputs[0]
        n, channel, *spatial = place
        # Said in pairs, so that it is plain that both lie in one block.
        pair, pairs = ix.floordiv(channel, 2), self.lanes // 2
        index = (n, ix.floordiv(pair, pairs), *spatial, ix.mul(ix.mod(pair, pairs), 2))
        return Repeat(Load(self.operands.buffer(x), index, 2, mask), self.lanes)

    def added(self, total: Expr, x: Expr, w: Expr) -> Expr:
        return Dot(total, x, w)


CONV_BF16 = ConvBfloat16Family()
