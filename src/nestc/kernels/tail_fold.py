"""Tails of integer kernels that are one quantization: with clamps, after a sum with an 8-bit map, before a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nestc.graph.region import Op, Region
from nestc.kernels.elementwise import integer_range
from nestc.kernels.lookup import LOOKUP
from nestc.kernels.tail import after

_BYTES = frozenset({"int8", "uint8"})


@dataclass(frozen=True)
class Fold:
    """Relu and Clip, then QuantizeLinear of one scale: q = clamp(rint(v / scale), low, high) + zero."""

    scale: float
    low: float
    high: float
    zero: float


@dataclass(frozen=True)
class Residual:
    """A sum with another map x of 8 bits: q = last(inner(v) + (x - other_zero) * other_scale).

    `inner` is `first` and the DequantizeLinear after it, with ``scale`` and ``zero``; if `first` is None, the value.
    """

    other: str
    other_scale: float
    other_zero: int
    first: Fold | None
    scale: float
    zero: int
    last: Fold

    @property
    def numbers(self) -> tuple[float, float, float]:
        """a, b, c of the quotient ``r * a + x * b + c``, where r is what `first` rounds (its zero point not yet added),
        or the value in units of the last scale."""
        a = 1.0 if self.first is None else self.scale / self.last.scale
        b = self.other_scale / self.last.scale
        moved = 0.0 if self.first is None else self.first.zero - self.zero
        return a, b, moved * a - self.other_zero * b


def one_scale(op: Op, region: Region) -> tuple[float, int] | None:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear between float32 and 8 bits, if constant and one."""
    if op.op_type not in ("QuantizeLinear", "DequantizeLinear") or op.domain:
        return None
    wide, narrow = op.inputs[0], op.outputs[0]
    if op.op_type == "DequantizeLinear":
        wide, narrow = narrow, wide
    if region.types[wide].dtype != "float32" or region.types[narrow].dtype not in _BYTES:
        return None
    scale, zero = region.constant(op.inputs[1]), region.constant(op.input(2))
    if scale is None or scale.size != 1 or (op.input(2) and zero is None):
        return None
    return float(scale.reshape(-1)[0]), 0 if zero is None else int(zero.reshape(-1)[0])


def fold_of(region: Region, anchor: Op) -> Fold | None:
    """The tail as one quantization, if it is Relu and Clip with constant bounds, then QuantizeLinear of one scale."""
    chain = after(region, anchor)
    if not chain or region.outputs != chain[-1].outputs[:1]:
        return None
    return _fold(chain, anchor.outputs[0], region)


def lookup_of(region: Region, anchor: Op) -> tuple[Fold, Region] | None:
    """The tail as one quantization to 8 bits and a function of that one value (a region of its own), if it is that."""
    chain = after(region, anchor)
    for place, op in enumerate(chain[:-1]):
        fold = _fold(chain[: place + 1], anchor.outputs[0], region) if op.op_type == "QuantizeLinear" else None
        if fold is None:
            continue
        rest = chain[place + 1 :]
        made = {name for each in rest for name in each.outputs}
        read = dict.fromkeys(name for each in rest for name in each.inputs if name and name not in made)
        constants = {name: region.constants[name] for name in read if name in region.constants}
        inputs = tuple(name for name in read if name not in constants)
        function = Region(region.name, None, rest, inputs, region.outputs, region.types, constants)
        if inputs == op.outputs[:1] and LOOKUP.refusal(function) is None:
            return fold, function
    return None


def residual_of(region: Region, anchor: Op) -> Residual | None:
    """The tail as a sum with another map, if it is that: perhaps a quantization to 8 bits and back, then Add of a
    dequantized value of the same shape, then a quantization."""
    chain = after(region, anchor)
    made = {name for op in chain for name in op.outputs}
    widening = [op for op in chain if op.op_type == "DequantizeLinear" and op.inputs[0] not in made]
    steps = [op for op in chain if op not in widening]
    sums = [i for i, op in enumerate(steps) if op.op_type == "Add" and not op.domain]
    if len(widening) != 1 or len(sums) != 1 or region.outputs != steps[-1].outputs[:1]:
        return None
    before, total, behind = steps[: sums[0]], steps[sums[0]], steps[sums[0] + 1 :]
    (other,) = widening
    added = one_scale(other, region)
    last = _fold(behind, total.outputs[0], region)
    if added is None or last is None or region.types[other.inputs[0]].shape != region.types[anchor.outputs[0]].shape:
        return None
    first, scale, zero, value = None, 1.0, 0, anchor.outputs[0]
    if before:
        first, back = _fold(before[:-1], value, region), one_scale(before[-1], region)
        joined = len(before) > 1 and before[-1].inputs[0] == before[-2].outputs[0]
        if first is None or back is None or before[-1].op_type != "DequantizeLinear" or not joined:
            return None
        (scale, zero), value = back, before[-1].outputs[0]
    if sorted(total.inputs) != sorted((value, other.outputs[0])):
        return None
    return Residual(other.inputs[0], *added, first, scale, zero, last)


def _fold(chain: Sequence[Op], value: str, region: Region) -> Fold | None:
    """Operators that follow each other from `value` on as one quantization."""
    if not chain or chain[-1].op_type != "QuantizeLinear":
        return None
    known = one_scale(chain[-1], region)
    if known is None:
        return None
    scale, zero = known
    bottom, top = integer_range(region.types[chain[-1].outputs[0]].dtype)
    low, high = float(bottom - zero), float(top - zero)
    for op in chain:
        if op.inputs[0] != value:
            return None
        value = op.outputs[0]
        if op is chain[-1]:
            break
        bounds = _bounds(op, region)
        if bounds is None:
            return None
        # Rounding is monotone, so a clamp before it is a clamp to the rounded bounds after it.
        below, above = (float(np.rint(np.float32(b) / np.float32(scale))) for b in bounds)
        low, high = min(max(low, below), above), min(max(high, below), above)
    # Both bounds of a clamp may lie on one side of what the output can be.
    least, most = float(bottom - zero), float(top - zero)
    return Fold(scale, min(max(low, least), most), min(max(high, least), most), float(zero))


def _bounds(op: Op, region: Region) -> tuple[float, float] | None:
    """Lower and upper bound that the operator clamps to; None if it does anything else."""
    if op.domain:
        return None
    if op.op_type == "Relu":
        return 0.0, np.inf
    if op.op_type != "Clip":
        return None
    found: list[float] = []
    for position, missing in ((1, -np.inf), (2, np.inf)):
        bound = region.constant(op.input(position))
        if op.input(position) and (bound is None or bound.size != 1):
            return None
        found.append(float(missing) if bound is None else float(bound.reshape(-1)[0]))
    return found[0], found[1]
