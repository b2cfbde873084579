"""What a region with quantized operands says: its prologue (DequantizeLinear), its anchor, and its tail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

from nestc.graph.region import Op, Region

_NARROW = frozenset({"int4", "uint4", "int8", "uint8", "int16", "uint16", "int32"})


@dataclass(frozen=True)
class Quantized:
    """An operand that comes through a DequantizeLinear: real value = (q - zero_point) * scale.

    ``name`` is the integer value (an input or a constant of the region). ``scale`` (float32) and ``zero_point``
    (int32) are scalars, or vectors along ``axis``; with ``block`` > 0 they have the operand's rank and hold for `block`
    elements along ``axis`` (ONNX DequantizeLinear-21).
    """

    name: str
    dtype: str
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int
    block: int = 0

    def values(self, array: np.ndarray) -> np.ndarray:
        """`array` (the operand's integers) as float32."""
        scale, zero = self.scale, self.zero_point
        if self.block:
            reach = array.shape[self.axis]
            scale, zero = (
                np.take(np.repeat(x, self.block, self.axis), np.arange(reach), self.axis) for x in (scale, zero)
            )
        elif scale.ndim:
            along = [1] * array.ndim
            along[self.axis] = -1
            scale, zero = scale.reshape(along), zero.reshape(along)
        return ((array.astype(np.int32) - zero).astype(np.float32) * scale).astype(np.float32)


@dataclass(frozen=True)
class QuantizedAnchor:
    """The anchor of a region with its quantized operands.

    ``operands`` is aligned with ``op.inputs``; None where an operand is absent or does not come through a
    DequantizeLinear of the prologue. ``tail`` are the operators after the anchor.
    """

    op: Op
    operands: tuple[Quantized | None, ...]
    tail: tuple[Op, ...]

    def operand(self, index: int) -> Quantized | None:
        """Operand `index`; None also where the anchor has fewer."""
        return self.operands[index] if index < len(self.operands) else None


def anchor_place(region: Region) -> int | None:
    """Where the anchor stands in ``region.ops``; None without one."""
    if region.anchor is None:
        return None
    return next((i for i, op in enumerate(region.ops) if op.op_type == region.anchor), None)


def prologue(region: Region) -> tuple[Op, ...]:
    """The operators before the anchor, which widen its operands; empty for a region without anchor."""
    return region.ops[: anchor_place(region) or 0]


def quantized_anchor(region: Region) -> QuantizedAnchor | None:
    """The anchor with its quantized operands; None if there is no prologue, or one with other operators in it or with
    parameters that are not constant."""
    place = anchor_place(region)
    if not place:
        return None
    found: dict[str, Quantized] = {}
    for op in region.ops[:place]:
        operand = _dequantized(op, region)
        if operand is None:
            return None
        found[op.outputs[0]] = operand
    anchor = region.ops[place]
    return QuantizedAnchor(anchor, tuple(found.get(name) for name in anchor.inputs), region.ops[place + 1 :])


def sums_fit(region: Region, x: Quantized, weights: Quantized, bias: np.ndarray | None = None) -> bool:
    """Whether 8-bit `x` times constant `weights`, summed over all axes but their first, and an integer `bias` added,
    always fit in int32. `x` has one zero point, `weights` one or one for each index of the first axis."""
    limits, zero = np.iinfo(x.dtype), int(x.zero_point)
    reach = max(limits.max - zero, zero - limits.min)
    room = (1 << 31) - 1
    if bias is not None and bias.size:
        room -= int(np.abs(bias.astype(np.int64)).max())
    if prod(region.types[weights.name].shape[1:]) * 255 * reach <= room:
        return True
    array = region.constant(weights.name)
    assert array is not None
    centred = array.astype(np.int64).reshape(array.shape[0], -1) - weights.zero_point.reshape(-1, 1)
    return int(np.abs(centred).sum(axis=1).max(initial=0)) * reach <= room


def _dequantized(op: Op, region: Region) -> Quantized | None:
    if op.op_type != "DequantizeLinear" or op.domain or region.types[op.outputs[0]].dtype != "float32":
        return None
    dtype = region.types[op.inputs[0]].dtype
    scale, zero = region.constant(op.inputs[1]), region.constant(op.input(2))
    if scale is None or (op.input(2) and zero is None) or dtype not in _NARROW:
        return None
    rank = len(region.types[op.inputs[0]].shape)
    axis, block = op.attributes.get("axis", 1), op.attributes.get("block_size", 0)
    assert isinstance(axis, int) and isinstance(block, int)
    scale = np.asarray(scale).astype(np.float32)
    zeros = np.zeros(scale.shape, np.int32) if zero is None else np.asarray(zero).astype(np.int32)
    if scale.size == 1 and not block:
        scale, zeros = scale.reshape(()), zeros.reshape(())
    return Quantized(op.inputs[0], dtype, scale, zeros, axis % rank if rank else 0, block)


def float_region(region: Region) -> Region:
    """The region without its prologue: what it widened comes in as values, or as constants where it was constant.

    Constants are widened when they are read. Prologue operators on constants may be DequantizeLinear with constant
    parameters or Cast; `quantized_anchor` or `prologue` tell what there is.
    """
    before = prologue(region)
    ops = region.ops[len(before) :]
    constants = dict(region.constants)
    for op in before:
        if op.inputs[0] in region.constants:
            constants[op.outputs[0]] = _widened(op, region)
    made = {name for op in ops for name in op.outputs}
    used = dict.fromkeys(name for op in ops for name in op.inputs if name and name not in made)
    return Region(
        name=region.name,
        anchor=region.anchor,
        ops=ops,
        inputs=tuple(name for name in used if name not in constants),
        outputs=region.outputs,
        types=region.types,
        constants={name: constants[name] for name in used if name in constants},
    )


def readable(op: Op, region: Region) -> bool:
    """Whether a prologue operator on a constant can be computed when compiling: its parameters are constant too, and
    it gives float32."""
    return op.op_type == "Cast" or _dequantized(op, region) is not None


def _widened(op: Op, region: Region) -> Callable[[], np.ndarray]:
    """Reader of a constant that the prologue widens."""

    def read() -> np.ndarray:
        array = region.constant(op.inputs[0])
        assert array is not None
        if op.op_type == "Cast":
            return array.astype(np.float32)
        operand = _dequantized(op, region)
        assert operand is not None
        return operand.values(array)

    return read
