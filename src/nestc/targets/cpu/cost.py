"""Modelled costs on one core: of a region its arithmetic or its traffic, whichever takes longer; of layouts how they
differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Protocol, runtime_checkable

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels import generic
from nestc.kernels.api import CpuMachine, Family, Layout

# Rates of one core of a current server CPU; they decide chunk sizes and whether a step is worth sharing, no more.
FLOPS_PER_SECOND = 60e9
BYTES_PER_SECOND = 10e9
CYCLES_PER_SECOND = 3.4e9
"""Of the kernels whose cycles are estimated. All of these rates were seen on Zen 3."""

CONVERSION_SECONDS = 0.4e-6
WHOLE_BLOCKS_PER_SECOND, INTO_BLOCKS_PER_SECOND, OUT_OF_BLOCKS_PER_SECOND = 3.5e9, 1.2e9, 1.8e9
"""What conversions take at least, and elements that they move: where channels fill whole blocks, and into and out of
blocks the last of which is filled in part. In L2 and L3 4.0e9 to 5.6e9, 0.9e9 to 1.6e9 and 1.6e9 to 2.1e9 of float32
were measured, in networks 3.5e9 of whole blocks."""

_PLAIN_WINDOWS = 2.0
"""What pooling and resizing over rows of pixels take of what they take over vectors of channels."""

_BYTES = {"float64": 8, "int64": 8, "uint64": 8, "float16": 2, "bfloat16": 2, "int16": 2, "uint16": 2}
_BYTES.update({"int8": 1, "uint8": 1, "bool": 1})


def seconds(region: Region) -> float:
    """Modelled seconds."""
    names = {*region.inputs, *region.outputs, *region.constants}
    traffic = sum(max(0, prod(t.shape)) * _BYTES.get(t.dtype, 4) for n in names if (t := region.types.get(n)))
    work = sum(flops(op, region) for op in region.ops)
    return max(work / FLOPS_PER_SECOND, traffic / BYTES_PER_SECOND)


@runtime_checkable
class Estimated(Protocol):
    """A family that models its cycles, and those of the direct kernel on the same terms."""

    def cycles(self, region: Region, machine: CpuMachine) -> tuple[float, float]: ...


def way_seconds(region: Region, family: Family, known: Sequence[Family], machine: CpuMachine) -> float:
    """Modelled seconds of a region computed by `family`, to be compared with those of the others that are `known` to
    compute it: the cycles that it models, or that one of those does of the direct kernel, which `family` is then."""
    for each in (family, *known):
        if isinstance(each, Estimated):
            own, direct = each.cycles(region, machine)
            return (own if each is family else direct) / CYCLES_PER_SECOND
    return seconds(region)


def conversion_seconds(type_: TensorType, source: Layout, target: Layout) -> float:
    """Modelled seconds to bring a value from one layout into another."""
    if all(type_.shape[1] % each.block == 0 for each in (source, target) if each.block):
        rate = WHOLE_BLOCKS_PER_SECOND
    else:
        rate = INTO_BLOCKS_PER_SECOND if target.block else OUT_OF_BLOCKS_PER_SECOND
    return CONVERSION_SECONDS + prod(type_.shape) / rate


def layout_seconds(
    region: Region, family: str, layouts: Mapping[str, Layout], machine: CpuMachine, base: float
) -> float:
    """Modelled seconds of a region in these layouts. `base`: what is modelled without them.

    Convolutions read either layout equally fast where they take both; the generic family estimates its cycles.
    """
    if family in ("generic", "moves"):
        cycles = generic.estimated_cycles(region, machine, layouts)
        return base if cycles is None else cycles / CYCLES_PER_SECOND
    if family.startswith(("pool", "resize")):
        return base if any(layout.block for layout in layouts.values()) else _PLAIN_WINDOWS * base
    return base


def flops(op: Op, region: Region) -> float:
    """Multiplications and additions of an operator; one for each output element where nothing is known."""
    outputs = sum(prod(region.types[name].shape) for name in op.outputs if name in region.types)
    shapes: list[tuple[int, ...]] = [region.types[name].shape if name in region.types else () for name in op.inputs]
    if op.op_type in ("Conv", "ConvInteger", "QLinearConv"):
        weight = shapes[1 if op.op_type != "QLinearConv" else 3]
        return 2.0 * outputs * prod(weight[1:])
    if op.op_type == "ConvTranspose":
        return 2.0 * prod(shapes[0]) * prod(shapes[1][1:])
    if op.op_type in ("MatMul", "Gemm") and shapes[0]:
        inner = shapes[0][-1] if op.op_type == "MatMul" or not op.attributes.get("transA") else shapes[0][0]
        return 2.0 * outputs * inner
    if op.op_type in ("LSTM", "GRU", "RNN"):
        return 2.0 * shapes[0][0] * shapes[0][1] * (prod(shapes[1]) + prod(shapes[2]))
    if op.op_type == "Attention":
        return 4.0 * outputs * shapes[1][-2]
    kind = op.op_type
    if kind.endswith("Pool") or kind.startswith("Reduce") or "Norm" in kind or "Softmax" in kind:
        return 4.0 * max(outputs, prod(shapes[0]) if shapes else 0)
    return float(outputs)
