"""DynamicQuantizeLinear: smallest and largest value in one pass by all workers, then the quantization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from itertools import product
from math import prod

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered
from nestc.kernels.elementwise import quantize
from nestc.kernels.operands import Operands
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, clamp, constant, less, load
from nestc.tensor.ir import Binary, Cast, Expr, Load, Reduce, Select, Store, Unary, Var
from nestc.tensor.vectorize import vectorize

_SIDES = ("min", "max")
_ITEM = 1 << 13  # elements of a parallel item: some 5 us
_ITEMS = 64  # partial results that every item of the second pass reads
_UNROLL = 4


class DynamicQuantizeFamily:
    """DynamicQuantizeLinear of float32; without a tail, since its results have several shapes."""

    name = "dynamic_quantize"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        op = region.ops[0]
        if len(region.ops) != 1 or op.op_type != "DynamicQuantizeLinear" or op.domain:
            return "it is not a DynamicQuantizeLinear alone"
        if prod(region.types[op.inputs[0]].shape) == 0 or op.inputs[0] in region.constants:
            return f"{op.op_type} (node {op.name!r}) is of no elements or of a constant"
        if len(op.outputs) != 3 or set(op.outputs) != set(region.outputs):
            return f"a result of {op.op_type} (node {op.name!r}) is not wanted"
        return None

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything row-major."""
        return dict.fromkeys((*region.inputs, *region.outputs), PLAIN)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """Two launches; between them the extremes of every item."""
        return _DynamicQuantize(region, region.ops[0], machine).lower()


class _DynamicQuantize:
    """Both kernels work on the tensor as one row of elements, cut in equal items but for the last one."""

    def __init__(self, region: Region, op: Op, machine: CpuMachine) -> None:
        self.region, self.op = region, op
        self.n = prod(region.types[op.inputs[0]].shape)
        self.lanes = machine.lanes("float32")
        step = self.lanes * _UNROLL
        wanted = max(1, min(_ITEMS, self.n // _ITEM))
        self.size = max(step, -(-self.n // wanted // step) * step)
        self.items = -(-self.n // self.size)
        self.ranges = f"{op.inputs[0]}.ranges"

    def lower(self) -> Lowered:
        """The launches and the temporary."""
        type_ = TensorType("float32", (self.items, 2))
        return Lowered((self.extremes(type_), self.quantization(type_)), {self.ranges: type_})

    def operands(self, name: str, type_: TensorType) -> Operands:
        """Operands of a kernel on the flat tensor."""
        operands = Operands(Builder(name), self.region, {})
        for value in (self.op.inputs[0], self.op.outputs[0]):
            operands.define(value, TensorType(self.region.types[value].dtype, (self.n,)))
        operands.define(self.ranges, type_)
        return operands

    def cases(self, k: Builder, item: Expr, body: Callable[[Expr, int], None]) -> None:
        """``body(first, count)`` for the elements of an item; the last one may have fewer."""
        whole, rest = divmod(self.n, self.size)
        if not rest:
            body(ix.mul(item, self.size), self.size)
            return
        if whole:
            with k.when(less(item, whole)):
                body(ix.mul(clamp(item, 0, whole - 1), self.size), self.size)
        with k.when(less(whole - 1, item)):
            body(ix.const(whole * self.size), rest)

    def extremes(self, type_: TensorType) -> Launch:
        """Smallest and largest value of every item, and 0."""
        operands = self.operands("extremes", type_)
        k, lanes, step = operands.builder, self.lanes, self.lanes * _UNROLL
        x, out = operands.buffer(self.op.inputs[0]), operands.buffer(self.ranges)
        kept = k.regs("kept", (2, _UNROLL), lanes)
        found = k.regs("found", (2,), 1)

        def body(first: Expr, count: int) -> None:
            for side, u in product(range(2), range(_UNROLL)):
                k.store(kept, (side, u, 0), constant(0, "float32", lanes))
            with k.loop("vectors", count // step) as i:
                for u in range(_UNROLL):
                    value = load(x, ix.add(first, ix.mul(i, step), u * lanes), lanes=lanes)
                    for side, op in enumerate(_SIDES):
                        k.store(kept, (side, u, 0), Binary(op, load(kept, side, u, 0, lanes=lanes), value))
            for side, op in enumerate(_SIDES):
                parts: list[Expr] = [load(kept, side, u, 0, lanes=lanes) for u in range(_UNROLL)]
                k.store(found, (side, 0), Reduce(op, reduce(partial(Binary, op), parts)))
            with k.loop("rest", count % step) as i:
                value = load(x, ix.add(first, count - count % step, i))
                for side, op in enumerate(_SIDES):
                    k.store(found, (side, 0), Binary(op, load(found, side, 0), value))

        with k.parallel("item", self.items) as (item,):
            self.cases(k, item, body)
            for side in range(2):
                k.store(out, (item, side), load(found, side, 0))
        return operands.launch()

    def quantization(self, type_: TensorType) -> Launch:
        """Scale and zero point, which every item computes for itself, and the elements."""
        operands = self.operands("quantize_dynamically", type_)
        k, lanes = operands.builder, self.lanes * _UNROLL
        x, ranges = operands.buffer(self.op.inputs[0]), operands.buffer(self.ranges)
        y, scale_out, zero_out = (operands.buffer(name) for name in self.op.outputs)
        found = k.regs("found", (2,), 1)
        numbers = k.regs("numbers", (2,), 1)

        def element(place: Expr) -> Store:
            scale, zero = (load(numbers, i, 0) for i in range(2))
            return Store(y, (place,), quantize(Load(x, (place,)), scale, zero, "uint8"))

        def body(first: Expr, count: int) -> None:
            with k.loop("vectors", count // lanes) as i:
                lane = Var("lane", lanes)
                place = ix.add(first, ix.mul(i, lanes), lane)
                k.emit(vectorize((element(place),), lane, ix.const(0), lanes))
            with k.loop("rest", count % lanes) as i:
                k.emit((element(ix.add(first, count - count % lanes, i)),))

        with k.parallel("item", self.items) as (item,):
            for side in range(2):
                k.store(found, (side, 0), constant(0, "float32"))
            with k.loop("range", self.items) as i:
                for side, op in enumerate(_SIDES):
                    k.store(found, (side, 0), Binary(op, load(found, side, 0), load(ranges, i, side)))
            low, high = (load(found, side, 0) for side in range(2))
            # Of a tensor of zeros the range counts as 1, as in ONNX Runtime.
            span = Select(Binary("eq", low, high), constant(1, "float32"), Binary("sub", high, low))
            k.store(numbers, (0, 0), Binary("div", span, constant(255, "float32")))
            exact = Binary("div", Unary("neg", low), load(numbers, 0, 0))
            rounded = Unary(
                "rint", Binary("min", Binary("max", exact, constant(0, "float32")), constant(255, "float32"))
            )
            k.store(numbers, (1, 0), rounded)
            with k.when(less(item, 1)):
                k.store(scale_out, (), load(numbers, 0, 0))
                k.store(zero_out, (), Cast(load(numbers, 1, 0), "uint8"))
            self.cases(k, item, body)
        return operands.launch()


DYNAMIC_QUANTIZE = DynamicQuantizeFamily()
