"""Convolution of 8-bit integers with exact int32 sums: Conv on quantized operands, and ConvInteger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from nestc.graph.region import Op, Region
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered
from nestc.kernels.conv_integer import IntegerConvolution
from nestc.kernels.conv_shape import ConvShape, conv_shape
from nestc.kernels.quantized import Quantized, QuantizedAnchor, quantized_anchor, sums_fit
from nestc.kernels.tail import tail_refusal

_BYTES = frozenset({"int8", "uint8"})
_WEIGHTS = frozenset({"int8", "uint8", "int4", "uint4"})
_FEW_CHANNELS = 4  # read as they come, interleaved while they are staged


@dataclass(frozen=True)
class IntegerConv:
    """One convolution of integers, as numbers.

    ``x`` names the 8-bit input, ``zero`` is its zero point or the name of a value that holds it; ``read_weights``
    gives int32 [O, I/group, *kernel] with their own zero points subtracted; ``bias`` is int32 (O,) and part of the sum.
    ``scale`` (float64, O or 1 elements) makes a real number of the sum, to which ``offset`` (O,) is added; both None
    where the int32 sum is itself the result.
    """

    op: Op
    x: str
    zero: int | str
    read_weights: Callable[[], np.ndarray]
    bias: np.ndarray | None
    scale: np.ndarray | None
    offset: np.ndarray | None


class ConvInt8Family:
    """Conv with quantized input and constant quantized weights, and ConvInteger: dense, or grouped with more than one
    input channel a group."""

    name = "conv_int8"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        found = read_convolution(region)
        if isinstance(found, str):
            return found
        op, shape = found.op, conv_shape(found.op, region)
        if not 1 <= len(shape.size) <= 3:
            return "only 1 to 3 spatial axes are blocked"
        if 0 in region.types[op.outputs[0]].shape or 0 in region.types[op.inputs[0]].shape:
            return "an axis is empty"
        if shape.group == shape.in_channels == shape.out_channels > 1:
            return f"{op.op_type} (node {op.name!r}) is depthwise"
        return tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Blocked output, and blocked input unless it has few channels."""
        found = read_convolution(region)
        assert isinstance(found, IntegerConv)
        block = Layout(machine.lanes("float32"))
        output = region.types[found.op.outputs[0]].shape
        result = dict(incoming)
        for name in region.inputs:
            if region.types[name].shape == output:
                result[name] = block
            elif len(region.types[name].shape) != len(output):
                result[name] = PLAIN
        result[found.x] = PLAIN if region.types[found.x].shape[1] <= _FEW_CHANNELS else block
        result.update(dict.fromkeys(region.outputs, block))
        return result

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel and its packed weights."""
        found = read_convolution(region)
        assert isinstance(found, IntegerConv)
        shape = conv_shape(found.op, region)
        lanes = machine.lanes("float32")
        together = _merged_groups(shape, lanes, layouts[found.x].block != 0)
        weights = _spread_groups(found.read_weights(), shape.group, together)
        merged = replace(shape, group=shape.group // together)
        return IntegerConvolution(region, found, merged, weights, machine, layouts).lower()


def read_convolution(region: Region) -> IntegerConv | str:
    """The numbers of the region's convolution, or why it is none of integers that this family computes."""
    anchor = quantized_anchor(region)
    if anchor is not None and anchor.op.op_type == "Conv" and not anchor.op.domain:
        return _read_conv(region, anchor)
    first = region.ops[0]
    if region.anchor == first.op_type == "ConvInteger" and not first.domain:
        return _read_integer(region, first)
    return "its anchor is neither Conv on quantized operands nor ConvInteger"


def _read_conv(region: Region, anchor: QuantizedAnchor) -> IntegerConv | str:
    op, x, w = anchor.op, anchor.operand(0), anchor.operand(1)
    if x is None or w is None:
        return f"an operand of {op.name!r} is not quantized"
    if x.dtype not in _BYTES or w.dtype not in _WEIGHTS:
        return f"{op.op_type} (node {op.name!r}) multiplies {x.dtype} by {w.dtype}"
    if x.scale.ndim:
        return f"the input of {op.name!r} has a scale a channel"
    if w.block or (w.scale.ndim and w.axis != 0):
        return f"the weights of {op.name!r} have scales within an output channel"
    if x.name in region.constants:
        return f"the input of {op.name!r} is constant"
    if w.name not in region.constants:
        return f"the weights of {op.name!r} are not constant"
    if not sums_fit(region, x, w):
        return f"sums of {op.op_type} (node {op.name!r}) do not fit in 32 bits"
    rank = len(region.types[op.inputs[1]].shape)
    zeros = w.zero_point.reshape(-1, *(1,) * (rank - 1)) if w.zero_point.ndim else w.zero_point
    scale = x.scale.astype(np.float64) * w.scale.astype(np.float64)
    bias = _read_bias(region, op, anchor.operand(2), scale)
    if isinstance(bias, str):
        return bias
    if bias[0] is not None and not sums_fit(region, x, w, bias[0]):
        bias = None, bias[0] * np.broadcast_to(scale, bias[0].shape)
    read = _centred(region, w.name, zeros)
    return IntegerConv(op, x.name, int(x.zero_point), read, bias[0], scale.reshape(-1), bias[1])


def _centred(region: Region, name: str, zeros: np.ndarray) -> Callable[[], np.ndarray]:
    """Reader of a constant less its zero points."""

    def read() -> np.ndarray:
        array = region.constant(name)
        assert array is not None
        return array.astype(np.int32) - zeros

    return read


def _read_bias(
    region: Region, op: Op, quantized: Quantized | None, scale: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None] | str:
    """The bias as integers in the unit of the sum, or as real numbers if it is not given in that unit."""
    name = op.input(2)
    if not name:
        return None, None
    if quantized is None:
        real = region.constant(name)
        return f"the bias of {op.name!r} is not constant" if real is None else (None, real.astype(np.float64))
    integers = region.constant(quantized.name)
    if integers is None:
        return f"the bias of {op.name!r} is not constant"
    same = quantized.dtype == "int32" and not quantized.zero_point.any() and not quantized.block
    if same and np.allclose(quantized.scale.astype(np.float64), scale, rtol=1e-6, atol=0):
        return integers.astype(np.int32), None
    return None, quantized.values(integers).astype(np.float64)


def _read_integer(region: Region, op: Op) -> IntegerConv | str:
    x, w = op.inputs[0], op.inputs[1]
    if w not in region.constants:
        return f"the weights of {op.name!r} are not constant"
    zeros = np.zeros((), np.int32)
    if op.input(3):
        given = region.constant(op.input(3))
        if given is None:
            return f"the zero point of the weights of {op.name!r} is not constant"
        zeros = given.astype(np.int32)
        zeros = zeros.reshape(()) if zeros.size == 1 else zeros.reshape(-1, *(1,) * (len(region.types[w].shape) - 1))
    zero: int | str = 0
    if op.input(2):
        if region.types[op.input(2)].shape not in ((), (1,)):
            return f"the input of {op.name!r} has more than one zero point"
        given = region.constant(op.input(2))
        zero = op.input(2) if given is None else int(given.reshape(-1)[0])
    return IntegerConv(op, x, zero, _centred(region, w, zeros), None, None, None)


def _merged_groups(shape: ConvShape, lanes: int, blocked: bool) -> int:
    """How many groups are computed as one dense convolution (with zeros between them), so that whole vectors of
    outputs and whole blocks of a blocked input belong to it."""
    if shape.group == 1:
        return 1
    outputs, inputs = shape.out_channels // shape.group, shape.in_channels // shape.group
    for together in range(1, shape.group + 1):
        if shape.group % together or (outputs * together) % lanes:
            continue
        if not blocked or (inputs * together) % lanes == 0:
            return together
    return shape.group


def _spread_groups(weights: np.ndarray, groups: int, together: int) -> np.ndarray:
    """Weights [O, I/groups, ...] as those of groups/together groups, zero between the groups that are merged."""
    out, per_group = weights.shape[:2]
    if together == 1:
        return weights
    wide = np.zeros((out, per_group * together, *weights.shape[2:]), weights.dtype)
    size = out // groups
    for g in range(groups):
        first = g % together * per_group
        wide[g * size : (g + 1) * size, first : first + per_group] = weights[g * size : (g + 1) * size]
    return wide


CONV_INT8 = ConvInt8Family()
