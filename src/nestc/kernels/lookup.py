"""Functions of one 8-bit value as tables: a chain from DequantizeLinear to QuantizeLinear has 256 results."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nestc.graph.region import Op, Region
from nestc.kernels.api import PLAIN, CpuMachine, Layout, Lowered
from nestc.kernels.compute import Body
from nestc.kernels.elementwise import apply_elementwise, elementwise_refusal, operand_index
from nestc.kernels.generic import lower_body
from nestc.kernels.small import SMALL
from nestc.tensor import index as ix
from nestc.tensor.build import constant
from nestc.tensor.interp import evaluate, numpy_dtype
from nestc.tensor.ir import Bitcast, Cast, Expr, Var

_BYTES = ("int8", "uint8")


class LookupFamily:
    """Elementwise operators from one tensor of 8-bit integers to another, all other operands being single constants.

    The table is made by the definition of the operators (`tensor.interp`), so it is what kernels in float32 would give,
    up to their approximations of transcendental functions.
    """

    name = "lookup"

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        if len(region.inputs) != 1 or len(region.outputs) != 1 or region.anchor is not None or len(region.ops) < 2:
            return "it is not a chain of elementwise operators from one value to another"
        source, result = region.inputs[0], region.outputs[0]
        shape = region.types[source].shape
        if region.types[source].dtype not in _BYTES or region.types[result].dtype not in _BYTES:
            return "it is not a function from 8-bit integers to 8-bit integers"
        if 0 in shape:
            return "an axis is empty"
        for op in region.ops:
            reason = elementwise_refusal(op, region)
            if reason is not None:
                return reason
            if region.types[op.outputs[0]].shape != shape:
                return f"{op.op_type} (node {op.name!r}) changes the shape"
            for name in op.inputs:
                if name in region.constants and (region.types[name].dtype in SMALL or not _single(name, region)):
                    return f"an operand of {op.op_type} (node {op.name!r}) is not one number"
        return None

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Any layout, the same for input and output."""
        source = region.inputs[0]
        return {source: incoming.get(source, PLAIN), region.outputs[0]: incoming.get(source, PLAIN)}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One kernel that replaces every element by its entry."""
        body = Body(region)
        entries = body.literal(table(region))
        source = region.inputs[0]

        def entry(axes: tuple[Var, ...]) -> Expr:
            x = body.read(source, axes)
            code = x if x.dtype == "uint8" else Bitcast(x, "uint8")
            return body.read(entries, (Cast(code, "int64"),))

        body.map(region.outputs[0], entry)
        return lower_body(body, machine, layouts)


def _single(name: str, region: Region) -> bool:
    return all(n == 1 for n in region.types[name].shape)


def table(region: Region) -> np.ndarray:
    """The results for the 256 codes of the input, by the bits of the code as an unsigned number."""
    code = Var("code", 256)
    x: Expr = Cast(code, "uint8")
    if region.types[region.inputs[0]].dtype == "int8":
        x = Bitcast(x, "int8")
    values: dict[str, Expr] = {region.inputs[0]: x}
    for op in region.ops:
        values[op.outputs[0]] = apply_elementwise(op, _arguments(op, region, values), region)
    result = values[region.outputs[0]]
    return evaluate(result, {"code": np.arange(256)}).astype(numpy_dtype(region.types[region.outputs[0]].dtype))


def _arguments(op: Op, region: Region, values: Mapping[str, Expr]) -> list[Expr | None]:
    """Operands as expressions; constants as literals."""
    found: list[Expr | None] = []
    rank = len(region.types[op.outputs[0]].shape)
    for position, name in enumerate(op.inputs):
        if operand_index(op, position, (ix.const(0),) * rank, region) is None:
            found.append(None)
            continue
        known = values.get(name)
        if known is None:
            array = region.constant(name)
            assert array is not None
            known = constant(np.asarray(array).reshape(-1)[0].item(), region.types[name].dtype)
        found.append(known)
    return found


LOOKUP = LookupFamily()
