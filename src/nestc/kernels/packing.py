"""Wide stores of requantized maps: vectors of neighbouring pixels are narrowed to bytes together and stored at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nestc.graph.region import TensorType
from nestc.kernels.api import PLAIN
from nestc.kernels.elementwise import integer_range
from nestc.kernels.operands import Operands
from nestc.kernels.requantize import Requantize
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, load
from nestc.tensor.ir import Binary, Broadcast, Buffer, Cast, Const, Expr, Load, Shuffle, Unary
from nestc.tensor.rewrite import binary

_LARGEST = 1 << 30
"""Values up to here keep their sign when they are rounded to int32."""


class PackedRows:
    """Stores of a blocked 8-bit output (NCHWc) whose tail is one quantization (``Requantize.fold``).

    Narrowing four vectors of int32 to bytes at once costs hardly more than narrowing one. The output is declared flat,
    as rows of bytes, so nothing else may store to it. The result is that of `Requantize.stores`.
    """

    def __init__(self, tail: Requantize, operands: Operands, block: int) -> None:
        self.tail, self.operands, self.block = tail, operands, block
        self.name = tail.region.outputs[0]
        type_ = tail.region.types[self.name]
        n, channels, *spatial = type_.shape
        operands.layouts = {**operands.layouts, self.name: PLAIN}
        operands.define(self.name, TensorType(type_.dtype, (n, channels // block, *spatial[:-1], spatial[-1] * block)))
        assert tail.fold is not None
        low, high, self.zero = (int(x) for x in (tail.fold.low, tail.fold.high, tail.fold.zero))
        self.dtype = type_.dtype
        # The clamps that narrowing does not do by itself.
        self.clamps: str | None = None
        if (low + self.zero, high + self.zero) != integer_range(self.dtype):
            self.clamps = f"{self.name}.range"
            operands.define(self.clamps, TensorType(self.dtype, (2,)))
            operands.constants[self.clamps] = np.array([low + self.zero, high + self.zero]).astype(self.dtype)
        self.point = f"{self.name}.zero"
        if self.zero:
            operands.define(self.point, TensorType("int32", (1,)))
            operands.constants[self.point] = np.array([self.zero], np.int32)
        scales = operands.constants[tail.multiplier]
        offsets = 0.0 if tail.bias is None else operands.constants[tail.bias]
        self.safe = bool(np.max(np.abs(scales) * 2.0**31 + np.abs(offsets)) <= _LARGEST * 2.0)

    @staticmethod
    def fits(tail: Requantize, block: int) -> bool:
        """Whether the tail is one quantization to whole blocks of 8-bit channels."""
        region = tail.region
        shape = region.types[region.outputs[0]].shape
        return tail.fold is not None and block > 1 and shape[1] % block == 0 and tail.axis in (None, 1)

    def declare(self) -> None:
        """Declare constants and the output as parameters now."""
        names = (self.tail.multiplier, self.tail.bias, self.clamps, self.point if self.zero else None, self.name)
        for name in names:
            if name is not None:
                self.operands.buffer(name)

    def emit(self, builder: Builder, row: Sequence[Expr], first: Expr, sums: Buffer, count: int) -> None:
        """Store the int32 vectors ``sums[0 .. count-1]`` (registers, one block each), which are changed, as pixels
        `first`, `first` + 1 ... of a row. `row` is (batch, channel block, *outer spatial axes)."""
        for j in range(count):
            builder.store(sums, (j, 0), self.rounded(load(sums, j, 0, lanes=self.block), row[1]))
        step = next(c for c in (4, 2, 1) if c <= count)
        starts = [*range(0, count - step + 1, step), count - step]  # the last ones may be stored twice
        for start in dict.fromkeys(starts):
            value = self.narrowed([load(sums, start + j, 0, lanes=self.block) for j in range(step)])
            place = ix.mul(ix.add(first, start), self.block)
            builder.store(self.operands.buffer(self.name), (*row, place), value)

    def rounded(self, acc: Expr, block: Expr) -> Expr:
        """One vector of sums, scaled and rounded to int32."""
        value: Expr = Binary("mul", Cast(acc, "float32"), self.channel(self.tail.multiplier, block))
        if self.tail.bias is not None:
            value = Binary("add", value, self.channel(self.tail.bias, block))
        if not self.safe:
            value = binary("min", value, constant(_LARGEST, "float32", value.lanes))
        return Cast(Unary("rint", value), "int32")

    def channel(self, name: str, block: Expr) -> Expr:
        """The numbers of a block of channels."""
        buffer = self.operands.buffer(name)
        if self.tail.axis is None:
            return Broadcast(Load(buffer, (ix.const(0),)), self.block)
        return load(buffer, ix.mul(block, self.block), lanes=self.block)

    def narrowed(self, parts: Sequence[Expr]) -> Expr:
        """Vectors of rounded values, side by side, as bytes."""
        while len(parts) > 1:
            parts = [_joined(a, b) for a, b in zip(parts[::2], parts[1::2])]
        value = parts[0]
        lanes = value.lanes
        if self.zero:
            value = Binary("add", value, Broadcast(load(self.operands.buffer(self.point), 0), lanes))
        low, high = (Broadcast(Const(limit, "int32"), lanes) for limit in integer_range(self.dtype))
        value = Cast(Binary("min", Binary("max", value, low), high), self.dtype)
        if self.clamps is None:
            return value
        buffer: Buffer = self.operands.buffer(self.clamps)
        low, high = (Broadcast(load(buffer, i), lanes) for i in range(2))
        return Binary("min", Binary("max", value, low), high)


def _joined(a: Expr, b: Expr) -> Expr:
    """Two vectors side by side."""
    return Shuffle(a, b, tuple(range(2 * a.lanes)))
