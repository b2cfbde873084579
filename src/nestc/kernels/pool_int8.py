"""Pools of 8-bit integers: means as exact int32 sums, maxima of the integers themselves; one quantization each."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np

from nestc.graph.region import Op, Region
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered
from nestc.kernels.operands import Operands
from nestc.kernels.pool import GLOBAL, WINDOWED, Combine, Pooling, lower_pool, reduces_space, windows
from nestc.kernels.quantized import quantized_anchor
from nestc.kernels.requantize import Requantize
from nestc.kernels.tail import tail_refusal
from nestc.tensor.build import Builder, constant
from nestc.tensor.ir import Block, Expr
from nestc.tensor.rewrite import binary, cast

_BYTES = ("int8", "uint8")
_MOST_TAPS = 1 << 22  # more bytes than that may not fit an int32 sum


class PoolInt8Family:
    """MaxPool, AveragePool, Global*Pool, and ReduceMean and ReduceMax over space, of dequantized bytes."""

    name = "pool_int8"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        found = quantized_anchor(region)
        kind = None if found is None else _kind(found.op)
        if found is None or kind is None:
            return "its anchor is not a pool of quantized values"
        op, x = found.op, found.operand(0)
        where = f"{op.op_type} (node {op.name!r})"
        if x is None or x.dtype not in _BYTES or x.scale.ndim or x.name in region.constants:
            return f"{where} does not read 8-bit integers of one scale"
        shape, out = region.types[op.inputs[0]].shape, region.types[op.outputs[0]].shape
        if len(shape) < 3 or 0 in shape or 0 in out:
            return f"{where} has no spatial axes, or an empty one"
        if op.op_type.startswith("Reduce") and not reduces_space(op, region):
            return f"{where} does not go over the spatial axes of an image"
        if kind == "mean" and _taps(op, region) is None:
            return f"the windows of {where} have different numbers of taps"
        if op.op_type in WINDOWED and op.output(1) and op.output(1) in region.outputs:
            return f"{where} gives indices as well"
        if any(op.inputs[0] in other.inputs for other in found.tail):
            return f"what follows {where} reads its input"
        return tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """NCHWc where the input comes so; else ONNX's order."""
        found = quantized_anchor(region)
        assert found is not None
        x = found.operand(0)
        assert x is not None
        block = machine.lanes("float32")
        own = Layout(block) if incoming.get(x.name, PLAIN).block == block > 1 else PLAIN
        shape = region.types[found.op.outputs[0]].shape
        chosen = {name: incoming.get(name, PLAIN) for name in region.inputs}
        for name in (*region.inputs, *region.outputs):
            if region.types[name].shape == shape:
                chosen[name] = own if len(shape) > 2 else PLAIN
        return {**chosen, x.name: own}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel, parallel over images or rows."""
        found = quantized_anchor(region)
        assert found is not None
        op, x = found.op, found.operand(0)
        assert x is not None
        operands = Operands(Builder(f"{op.op_type.lower()}_int8"), region, layouts)
        zero, taps = int(x.zero_point), 1
        if _kind(op) == "mean":
            taps = _taps(op, region)
            assert taps is not None
            # Where windows leave the input, a tap outside is a real zero, so the zero point goes from each tap.
            outside = op.op_type in WINDOWED and any(min(w.counts(False)) < w.kernel for w in windows(op, region))
            combine = Combine("mean", "int32", 2, zero if outside else 0)
            rest = 0 if outside else taps * zero
        else:
            combine = Combine("max", x.dtype, 2)
            rest = zero
        tail = Requantize(operands, region, op, np.asarray(x.scale, np.float64) / taps)

        def stores(index: tuple[Expr, ...], total: Expr, scale: Expr | None) -> Block:
            total = cast(total, "int32")
            return tail.stores(index, binary("sub", total, constant(rest, "int32")) if rest else total)

        lower_pool(Pooling(op, x.name, combine, tail.declare, stores), operands, machine)
        return Lowered((operands.launch(),), {}, operands.constants)


def _kind(op: Op) -> str | None:
    """How the operator combines taps; None if it is no pool of this family."""
    kind = None if op.domain else GLOBAL.get(op.op_type) or WINDOWED.get(op.op_type)
    return kind if kind in ("mean", "max") else None


def _taps(op: Op, region: Region) -> int | None:
    """The number by which every sum of a mean is divided; None if it is not the same everywhere, or too large."""
    if op.op_type in GLOBAL:
        count = prod(region.types[op.inputs[0]].shape[2:])
        return count if count <= _MOST_TAPS else None
    padding = bool(op.attributes.get("count_include_pad", 0))
    counts = [set(w.counts(padding)) for w in windows(op, region)]
    return prod(next(iter(c)) for c in counts) if all(len(c) == 1 for c in counts) else None


POOL_INT8 = PoolInt8Family()
