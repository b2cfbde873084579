"""The tail of an integer kernel: int32 sums become the region's outputs, in registers and by one multiplication."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial, reduce

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.elementwise import integer_range, operand_index
from nestc.kernels.lookup import table
from nestc.kernels.operands import Index, Operands
from nestc.kernels.tail import Tail, after
from nestc.kernels.tail_fold import Fold, fold_of, lookup_of, one_scale, residual_of
from nestc.tensor import index as ix
from nestc.tensor.build import constant, splat, within
from nestc.tensor.ir import Binary, Bitcast, Buffer, Cast, Const, Expr, Fma, Load, Shuffle, Stmt, Store, Unary, Var
from nestc.tensor.rewrite import binary, transform
from nestc.tensor.vectorize import vectorize

_BYTES = ("int8", "uint8")
_PADDING = 256  # channels behind the last one that a ragged tile of the widest machine may read


class Requantize:
    """Turns the int32 sum of an anchor at an index into stores of the region's outputs.

    The anchor's real value is ``acc * scale[c] + bias[c]``, where c is the index along `channel_axis` (or nothing is
    indexed: a `scale` of one element holds everywhere). Where only Relu and Clip stand before a QuantizeLinear, scale
    and clamps are folded into it: ``q = clamp(rint(acc * (scale / q_scale)))``, which rounds once where the literal
    definition rounds twice, so that an exact tie may fall to the other side. A sum with another 8-bit map is folded in
    the same way (`tail_fold.Residual`); what is a function of the quantized value alone becomes a table. Any other tail
    is computed in float32 registers, where QuantizeLinear and DequantizeLinear with one scale multiply by a reciprocal;
    if it takes constants only and ends in one quantization to 8 bits, several pixels are still written together.

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
        self.fold = fold_of(region, anchor)
        self.residual = None if self.fold is not None else residual_of(region, anchor)
        self.chain: tuple[Op, ...] = ()
        self.output = operands.region.outputs[0]
        self.bytes, self.table = region.types[self.output].dtype, ""
        looked_up = None if self.narrows else lookup_of(region, anchor)
        if looked_up is not None:
            self.fold, function = looked_up
            self.bytes = region.types[function.inputs[0]].dtype
            self.table = self._define("table", table(function))
        first = self.fold if self.residual is None else self.residual.first or self.residual.last
        # In float32, as ONNX Runtime divides: with the same factor the same sums round to the same integers.
        divisor = np.float32(1.0 if first is None else first.scale)
        self.multiplier = self._constant("multiplier", np.asarray(scale, np.float32) / divisor)
        self.bias = None if bias is None else self._constant("offset", np.asarray(bias, np.float32) / divisor)
        if self.residual is not None:
            self._prepare_sum()
        last = self.fold if self.residual is None else self.residual.last
        if last is not None:
            self._prepare_bytes(last)
        self.chain = () if last is not None else self._chain()
        self._known_steps: dict[Expr, tuple[Expr, Expr]] = {}
        if self.chain:
            known = one_scale(self.chain[-1], region)
            assert known is not None
            self.zero = self._define("zero", np.array([known[1]], np.int32))

    @property
    def narrows(self) -> bool:
        """Whether `narrow` may be called: everything after the sum ends in one quantization to 8 bits."""
        return self.fold is not None or self.residual is not None or bool(self.chain)

    def declare(self) -> None:
        """Declare constants and outputs as parameters now, so that their order does not depend on the loops."""
        named = [self.multiplier, *([] if self.bias is None else [self.bias])]
        if self.chain:
            named += [self.zero, self.tail.numbers[self.chain[-1].outputs[0]]]
        elif self.narrows:
            named += [self.clamps, self.zero, self.range, *([] if self.residual is None else [self.sum])]
            named += [self.table] if self.table else []
        for name in named:
            self.operands.buffer(name)
        self.tail.declare()

    def stores(self, index: Index, acc: Expr, mask: Expr | None = None) -> tuple[Stmt, ...]:
        """Scalar stores of every output at logical `index` (see `tail.Tail.stores`), where the sum is `acc` (int32)."""
        value: Expr = Binary("mul", Cast(acc, "float32"), self._channel(self.multiplier, index))
        if self.bias is not None:
            value = Binary("add", value, self._channel(self.bias, index))
        if not self.narrows or self.chain:
            return self.tail.stores(index, value, mask)
        other = None
        if self.residual is not None:
            shape = self.region.types[self.output].shape
            valid = reduce(partial(binary, "and"), map(within, index, shape), mask or Const(True, "bool"))
            other = self.operands.load(self.residual.other, index, valid)
        return self.operands.stores(self.output, index, self._saturated(self._rounded(value, other)), mask)

    def narrow(self, channel: Expr, sums: Sequence[Expr], others: Sequence[Expr] = ()) -> Expr:
        """The bytes of some pixels, one after another, as one vector: `sums` are int32 vectors, each of one pixel and
        the channels from `channel` on. Only where `narrows`; `others` are the same places of ``residual.other``.

        Written so that saturating to bytes is the clamp of QuantizeLinear, which machines do while they pack.
        """
        assert self.narrows
        given = others or [None] * len(sums)
        if self.chain:
            parts = [self._through(self._scaled(channel, x), channel) for x in sums]
        else:
            parts = [self._rounded(self._scaled(channel, x), other) for x, other in zip(sums, given, strict=True)]
        while len(parts) > 1:
            both = range(2 * parts[0].lanes)
            parts = [Shuffle(a, b, tuple(both)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return self._saturated(parts[0])

    def _scaled(self, channel: Expr, total: Expr) -> Expr:
        """The sums of one pixel times their scales, with the bias."""
        lanes = total.lanes
        along = ix.const(0) if self.axis is None else channel

        def channels(name: str) -> Expr:
            return splat(Load(self.operands.buffer(name), (along,), 1 if self.axis is None else lanes), lanes)

        value: Expr = Binary("mul", Cast(total, "float32"), channels(self.multiplier))
        return value if self.bias is None else Binary("add", value, channels(self.bias))

    def _rounded(self, value: Expr, other: Expr | None) -> Expr:
        """Quotients, rounded, with the zero point: int32, not yet limited to the output's range."""
        lanes = value.lanes
        if other is not None:
            assert self.residual is not None
            low, high, a, b, c = (self._number(self.sum, i, lanes) for i in range(5))
            moved = Fma(Cast(Cast(other, "int32"), "float32"), b, c)
            if self.residual.first is None:
                value = Binary("add", value, moved)
            else:
                value = Fma(Unary("rint", Binary("min", Binary("max", value, low), high)), a, moved)
        if not self.fits:
            low, high = (self._number(self.clamps, i, lanes) for i in range(2))
            value = Binary("min", Binary("max", value, low), high)
        return Binary("add", Cast(Unary("rint", value), "int32"), self._number(self.zero, 0, lanes))

    def _saturated(self, value: Expr) -> Expr:
        """int32 as bytes, limited to what the clamps leave of the output's range."""
        low, high = (constant(bound, "int32", value.lanes) for bound in integer_range(self.bytes))
        result: Expr = Cast(Binary("min", Binary("max", value, low), high), self.bytes)
        if not self.chain and self.limited:
            low, high = (self._number(self.range, i, value.lanes) for i in range(2))
            result = Binary("min", Binary("max", result, low), high)
        if not self.table:
            return result
        code = result if self.bytes == "uint8" else Bitcast(result, "uint8")
        return Load(self.operands.buffer(self.table), (Cast(code, "int64"),), code.lanes)

    def _chain(self) -> tuple[Op, ...]:
        """The tail as operators on the sum and constants of one number or one a channel, before one quantization to 8
        bits, which is the output; empty if it is anything else."""
        chain = after(self.region, self.anchor)
        if not chain or chain[-1].outputs[0] not in self.tail.numbers or self.region.outputs != chain[-1].outputs[:1]:
            return ()
        if chain[-1].op_type != "QuantizeLinear" or self.bytes not in _BYTES:
            return ()
        rank = len(self.region.types[self.anchor.outputs[0]].shape)
        made = {self.anchor.outputs[0]}
        for op in chain:
            for name in op.inputs:
                if not name or name in made:
                    continue
                shape = self.region.types[name].shape if name in self.region.constants else (2,) * rank
                axis = len(shape) - rank + (self.axis or 0)
                if any(n != 1 for d, n in enumerate(shape) if self.axis is None or d != axis):
                    return ()
            made.update(op.outputs)
        return chain

    def _through(self, value: Expr, channel: Expr) -> Expr:
        """The quotients of `chain`, rounded, with the zero point: int32, within the output's range. `value` holds the
        channels from `channel` on."""
        lanes, last = value.lanes, self.chain[-1]
        sum_, steps = self._steps(channel, lanes)
        wide = transform(steps, lambda e: value if e == sum_ else None)
        factor, _, low, high = (self._number(self.tail.numbers[last.outputs[0]], i, lanes) for i in range(4))
        limited = Binary("min", Binary("max", Binary("mul", wide, factor), low), high)
        return Binary("add", Cast(Unary("rint", limited), "int32"), self._number(self.zero, 0, lanes))

    def _steps(self, channel: Expr, lanes: int) -> tuple[Expr, Expr]:
        """What stands for the anchor's value at the channels from `channel` on, and what `chain` makes of it before it
        is quantized. The operators are written for one element and made vectors of."""
        if channel in self._known_steps:
            return self._known_steps[channel]
        lane, place = Var("narrow", lanes), Buffer("narrow", "float32", (lanes,))
        rank = len(self.region.types[self.anchor.outputs[0]].shape)
        index = tuple(ix.add(channel, lane) if d == self.axis else ix.const(0) for d in range(rank))
        values: dict[str, Expr] = {self.anchor.outputs[0]: Load(place, (lane,))}
        for op in self.chain[:-1]:
            arguments: list[Expr | None] = []
            for position, name in enumerate(op.inputs):
                own = operand_index(op, position, index, self.region)
                known = None if own is None else values.get(name)
                arguments.append(known if own is None or known is not None else self.operands.load(name, own))
            values[op.outputs[0]] = self.tail.apply(op, arguments)
        result = values[self.chain[-1].inputs[0]]
        parts = vectorize(
            (Store(place, (lane,), values[self.anchor.outputs[0]]), Store(place, (lane,), result)),
            lane,
            ix.const(0),
            lanes,
        )
        sum_, steps = (part.value for part in parts if isinstance(part, Store))
        self._known_steps[channel] = sum_, steps
        return sum_, steps

    def _number(self, name: str, place: int, lanes: int) -> Expr:
        return splat(Load(self.operands.buffer(name), (ix.const(place),)), lanes)

    def _prepare_sum(self) -> None:
        """The numbers of a residual: what its first quantization is limited to, and the coefficients of the sum."""
        assert self.residual is not None
        first = self.residual.first
        limits = (0.0, 0.0) if first is None else (first.low, first.high)
        self.sum = self._define("sum", np.array([*limits, *self.residual.numbers], np.float32))

    def _prepare_bytes(self, last: Fold) -> None:
        """The numbers of the last quantization; whether its quotients fit int32 before they are limited, and whether it
        is limited further than to the output's own range."""
        numbers = self.operands.constants
        self.clamps = self._define("clamps", np.array([last.low, last.high], np.float32))
        self.zero = self._define("zero", np.array([last.zero], np.int32))
        bounds = np.array([last.low + last.zero, last.high + last.zero])
        self.range = self._define("range", bounds.astype(self.bytes))
        fits = np.abs(numbers[self.multiplier]).max() <= 0.25
        fits = fits and (self.bias is None or bool(np.abs(numbers[self.bias]).max() < 1 << 28))
        if self.residual is not None:
            a, b, c = np.abs(self.residual.numbers)
            fits = (fits or self.residual.first is not None) and bool(256 * (a + b) + c < 1 << 27)
        self.fits = bool(fits)
        self.limited = self.fits and tuple(bounds) != integer_range(self.bytes)

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
        self.operands.define(name, TensorType(str(array.dtype), array.shape))
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
            known = one_scale(op, operands.region)
            if known is None:
                continue
            scale, zero = known
            if scale * float(np.finfo(np.float32).max) < 1.0:
                continue  # its reciprocal is no float32
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
