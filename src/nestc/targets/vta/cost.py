"""A modelled cost of a region from its shapes alone, before anything is tiled: its micro-ops or its traffic.

Plans are made with it; once a partition is compiled, the timing simulator knows better.
"""

from __future__ import annotations

from math import prod

from nestc.graph.region import Op, Region
from nestc.runtime.vta.config import VtaConfig
from nestc.targets.vta.layers_linear import integers

OVERHEAD = 1.1
"""What starting instructions and filling SRAMs adds to the micro-ops of a well tiled layer."""

ALU_CYCLES = 3
"""ALU micro-ops an output element takes to be requantized: a shift and two bounds."""


def seconds(region: Region, config: VtaConfig, count: int = 1) -> float:
    """Modelled seconds on `count` devices."""
    traffic = sum(_bytes(name, region, config) for name in {*region.inputs, *region.outputs, *region.constants})
    work = sum(micro_ops(op, region, config) for op in region.ops)
    cycles = max(work * OVERHEAD / count, traffic / (config.bus_bits // 8))
    return cycles / config.clock_hz


def micro_ops(op: Op, region: Region, config: VtaConfig) -> int:
    """Cycles of the compute engine that an operator takes, as a layer of VTA expresses it; 0 for what it folds."""
    shapes = [region.types[name].shape for name in op.inputs if name]
    out = region.types[op.outputs[0]].shape
    elements = _elements(out, config)
    if op.op_type == "Conv" and len(shapes) > 1:
        outs, ins, groups = out[1], shapes[1][1], op.attributes.get("group") or 1
        assert isinstance(groups, int)
        each = outs // groups
        pairs = _blocks(outs, config) * _blocks(ins, config)
        if groups > 1:  # blocks on the diagonal, and beside it where groups are wider than a block
            pairs = _blocks(outs, config) * _blocks(max(ins, min(config.block, outs) * ins // max(each, 1)), config)
        return pairs * -(-out[0] // config.batch) * _taps(op, shapes[0][2:], shapes[1][2:], out[2:])
    if op.op_type in ("Gemm", "MatMul"):
        return elements * _blocks(prod(shapes[0]) // max(prod(out[:-1]), 1), config)
    if op.op_type == "AveragePool" or op.op_type == "MaxPool":
        taps = prod(integers(op, "kernel_shape", (1, 1)))
        # A maximum takes the ALU two cycles; its inputs are copied there first.
        return (
            elements * taps if op.op_type == "AveragePool" else 2 * elements * taps + 2 * _elements(shapes[0], config)
        )
    if op.op_type in ("GlobalAveragePool", "ReduceMean"):
        return _elements(shapes[0], config)
    if op.op_type == "QuantizeLinear":
        return ALU_CYCLES * elements
    return elements if op.op_type in ("Add", "Sub", "Concat", "Mul") else 0


def _taps(op: Op, source: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...]) -> int:
    """Pairs of an output position and a tap whose pixel exists: those on padding cost nothing."""
    axes = len(kernel)
    strides, dilations = (integers(op, name, (1,) * axes) for name in ("strides", "dilations"))
    pads = integers(op, "pads", (0,) * (2 * axes))
    return prod(
        sum(
            0 <= place * strides[axis] + tap * dilations[axis] - pads[axis] < source[axis]
            for place in range(out[axis])
            for tap in range(kernel[axis])
        )
        for axis in range(axes)
    )


def _blocks(channels: int, config: VtaConfig) -> int:
    return -(-channels // config.block)


def _elements(shape: tuple[int, ...], config: VtaConfig) -> int:
    """Elements of a value, a matrix's last axis being its channels."""
    if len(shape) < 3:
        return prod(shape[:-1]) * _blocks(shape[-1] if shape else 1, config)
    return -(-shape[0] // config.batch) * _blocks(shape[1], config) * prod(shape[2:])


def _bytes(name: str, region: Region, config: VtaConfig) -> int:
    """Bytes of a value in memory, in whole blocks."""
    type_ = region.types.get(name)
    if type_ is None or type_.dtype != "int8" or not type_.shape:
        return 0
    return _elements(type_.shape, config) * config.inp_bytes
