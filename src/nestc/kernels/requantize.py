"""The tail of an integer kernel: int32 sums become the region's outputs, in registers and by one multiplication."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.elementwise import integer_range
from nestc.kernels.operands import Index, Operands
from nestc.kernels.tail import Tail, after
from nestc.tensor import index as ix
from nestc.tensor.build import constant, splat
from nestc.tensor.ir import Binary, Buffer, Cast, Expr, Load, Shuffle, Stmt, Unary

_PADDING = 256  # channels behind the last one that a ragged tile of the widest machine may read
_BYTES = frozenset({"int8", "uint8"})


@dataclass(frozen=True)
class _Fold:
    """A tail of Relu and Clip that ends in QuantizeLinear: q = clamp(rint(v / scale), low, high) + zero."""

    scale: float
    low: float
    high: float
    zero: float


class Requantize:
    """Turns the int32 sum of an anchor at an index into stores of the region's outputs.

    The anchor's real value is ``acc * scale[c] + bias[c]``, where c is the index along `channel_axis` (or nothing is
    indexed: a `scale` of one element holds everywhere). Where only Relu and Clip stand before a QuantizeLinear, scale
    and clamps are folded into it: ``q = clamp(rint(acc * (scale / q_scale)))``, which rounds once where the literal
    definition rounds twice, so that an exact tie may fall to the other side. Any other tail is computed in float32
    registers, where QuantizeLinear and DequantizeLinear with one scale multiply by a reciprocal.

    All numbers come from constant parameters, so that layers of one shape share a kernel.
    """

    def __init__(
        self,
        operands: Operands,
        region: Region,
        anchor: Op,
        scale: np.ndarray,
        channel_axis: int | None = None,
        bias: np.ndarray | None = None,
    ) -> None:
        self.operands = operands
        self.region = region
        self.anchor = anchor
        self.axis = channel_axis
        self.tail = _Tail(operands, anchor)
        self.fold = _fold(region, anchor)
        # In float32, as ONNX Runtime divides: with the same factor the same sums round to the same integers.
        divisor = np.float32(1.0 if self.fold is None else self.fold.scale)
        self.multiplier = self._constant("multiplier", np.asarray(scale, np.float32) / divisor)
        self.bias = None if bias is None else self._constant("offset", np.asarray(bias, np.float32) / divisor)
        self.output = operands.region.outputs[0]
        if self.fold is not None:
            clamps = np.array([self.fold.low, self.fold.high, self.fold.zero], np.float32)
            self.clamps = self._define("clamps", clamps)
            self.limits = self._limits(self.fold)

    def declare(self) -> None:
        """Declare constants and outputs as parameters now, so that their order does not depend on the loops."""
        for name in (self.multiplier, self.bias, self.clamps if self.fold is not None else None):
            if name is not None:
                self.operands.buffer(name)
        self.tail.declare()

    def stores(self, index: Index, acc: Expr, mask: Expr | None = None) -> tuple[Stmt, ...]:
        """Scalar stores of every output at logical `index` (see `tail.Tail.stores`), where the sum is `acc` (int32)."""
        value: Expr = Binary("mul", Cast(acc, "float32"), self._channel(self.multiplier, index))
        if self.bias is not None:
            value = Binary("add", value, self._channel(self.bias, index))
        if self.fold is None:
            return self.tail.stores(index, value, mask)
        low, high, zero = (Load(self.operands.buffer(self.clamps), (ix.const(i),)) for i in range(3))
        name = self.region.outputs[0]
        rounded = Unary("rint", Binary("min", Binary("max", value, low), high))
        q = Cast(Binary("add", rounded, zero), self.region.types[name].dtype)
        return self.operands.stores(name, index, q, mask)

    def narrow(self, channel: Expr, sums: Sequence[Expr]) -> Expr:
        """The bytes of some pixels, one after another, as one vector: `sums` are int32 vectors, each of one pixel and
        the channels from `channel` on. Only where `fold` is not None.

        Written so that saturating to bytes is the clamp of QuantizeLinear, which machines do while they pack.
        """
        assert self.fold is not None
        parts = [self._rounded(channel, each) for each in sums]
        while len(parts) > 1:
            both = range(2 * parts[0].lanes)
            parts = [Shuffle(a, b, tuple(both)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        dtype = self.region.types[self.output].dtype
        low, high = (constant(bound, "int32", parts[0].lanes) for bound in integer_range(dtype))
        return Cast(Binary("min", Binary("max", parts[0], low), high), dtype)

    def _rounded(self, channel: Expr, total: Expr) -> Expr:
        """Quotients of one pixel, rounded, with the zero point: int32, not yet limited to the output's range."""
        lanes = total.lanes
        multiplier, clamps = (self.operands.buffer(name) for name in (self.multiplier, self.clamps))
        along = ix.const(0) if self.axis is None else channel

        def channels(buffer: Buffer) -> Expr:
            return splat(Load(buffer, (along,), 1 if self.axis is None else lanes), lanes)

        value: Expr = Binary("mul", Cast(total, "float32"), channels(multiplier))
        if self.bias is not None:
            value = Binary("add", value, channels(self.operands.buffer(self.bias)))
        for needed, op, place in zip(self.limits, ("max", "min"), (0, 1), strict=True):
            if needed:
                value = Binary(op, value, splat(Load(clamps, (ix.const(place),)), lanes))
        zero = splat(Load(self.operands.buffer(self.zero), (ix.const(0),)), lanes)
        return Binary("add", Cast(Unary("rint", value), "int32"), zero)

    def _limits(self, fold: _Fold) -> tuple[bool, bool]:
        """Whether quotients have to be clamped below and above before they are rounded to int32: where the bound is
        not the output's own, or a quotient may not fit."""
        self.zero = f"{self.anchor.outputs[0]}.zero"
        self.operands.define(self.zero, TensorType("int32", (1,)))
        self.operands.constants[self.zero] = np.array([fold.zero], np.int32)
        numbers = self.operands.constants
        fits = np.abs(numbers[self.multiplier]).max() <= 0.25
        fits = fits and (self.bias is None or bool(np.abs(numbers[self.bias]).max() < 1 << 28))
        bottom, top = integer_range(self.region.types[self.output].dtype)
        return (not fits or fold.low > bottom - fold.zero), (not fits or fold.high < top - fold.zero)

    def _constant(self, label: str, values: np.ndarray) -> str:
        """A vector over channels, padded so that whole vectors may be read, or one number."""
        flat = values.astype(np.float32).reshape(-1)
        if flat.size > 1 and self.axis is None:
            raise ValueError(f"region {self.region.name}: {flat.size} scales and no axis that they follow")
        if self.axis is not None:
            channels = self.region.types[self.anchor.outputs[0]].shape[self.axis]
            flat = np.concatenate([np.broadcast_to(flat, channels), np.zeros(_PADDING, np.float32)])
        return self._define(label, flat)

    def _define(self, label: str, array: np.ndarray) -> str:
        name = f"{self.anchor.outputs[0]}.{label}"
        self.operands.define(name, TensorType("float32", array.shape))
        self.operands.constants[name] = array
        return name

    def _channel(self, name: str, index: Index) -> Expr:
        return Load(self.operands.buffer(name), (ix.const(0) if self.axis is None else index[self.axis],))


class _Tail(Tail):
    """A tail whose QuantizeLinear and DequantizeLinear with one scale read their numbers from a constant parameter."""

    def __init__(self, operands: Operands, anchor: Op) -> None:
        super().__init__(operands, anchor)
        self.numbers: dict[str, str] = {}
        for op in after(operands.region, anchor):
            known = _one_scale(op, operands.region)
            if known is None:
                continue
            scale, zero = known
            narrow = operands.region.types[op.outputs[0] if op.op_type == "QuantizeLinear" else op.inputs[0]].dtype
            low, high = integer_range(narrow)
            factor = 1.0 / scale if op.op_type == "QuantizeLinear" else scale
            array = np.array([factor, zero, low - zero, high - zero], np.float32)
            name = f"{op.outputs[0]}.numbers"
            operands.define(name, TensorType("float32", array.shape))
            operands.constants[name] = array
            self.numbers[op.outputs[0]] = name

    def apply(self, op: Op, arguments: list[Expr | None]) -> Expr:
        name = self.numbers.get(op.outputs[0])
        value = arguments[0]
        if name is None or value is None or (op.op_type == "QuantizeLinear" and value.dtype != "float32"):
            return super().apply(op, arguments)
        factor, zero, low, high = (Load(self.operands.buffer(name), (ix.const(i),)) for i in range(4))
        if op.op_type == "DequantizeLinear":
            return Binary("mul", Binary("sub", Cast(value, "float32"), zero), factor)
        limited = Binary("min", Binary("max", Binary("mul", value, factor), low), high)
        return Cast(Binary("add", Unary("rint", limited), zero), self.region.types[op.outputs[0]].dtype)


def _one_scale(op: Op, region: Region) -> tuple[float, int] | None:
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


def _fold(region: Region, anchor: Op) -> _Fold | None:
    """The tail as one quantization, if it is Relu and Clip with constant bounds, then QuantizeLinear of one scale."""
    chain = after(region, anchor)
    if not chain or chain[-1].op_type != "QuantizeLinear" or region.outputs != chain[-1].outputs[:1]:
        return None
    known = _one_scale(chain[-1], region)
    if known is None:
        return None
    scale, zero = known
    bottom, top = integer_range(region.types[chain[-1].outputs[0]].dtype)
    low, high = float(bottom - zero), float(top - zero)
    value = anchor.outputs[0]
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
    return _Fold(scale, low, high, float(zero))


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
