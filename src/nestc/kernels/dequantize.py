"""Regions with narrow operands that no special kernel takes: operands are widened first, then a float kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Family, Launch, Layout, Lowered, physical_shape
from nestc.kernels.generic import Generic
from nestc.kernels.quantized import float_region, prologue, readable

Choose = Callable[[Region], "tuple[Family | None, Mapping[str, str]]"]


class DequantizeFamily:
    """A prologue in kernels of its own, and the region without it by the family that `choose` names."""

    name = "dequantize"

    def __init__(self, choose: Choose) -> None:
        self.choose = choose

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        before = prologue(region)
        if not before:
            return "its operands need not be widened"
        for op in before:
            if op.inputs[0] in region.constants and not readable(op, region):
                return f"the constant operand of {op.op_type} (node {op.name!r}) is not known in float32"
            refusal = Generic().refusal(_single(op, region))
            if refusal is not None:
                return refusal
        family, refusals = self.choose(float_region(region))
        return None if family is not None else "; ".join(refusals.values())

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """What the float kernel wants; a narrow operand lies as its wide form."""
        inner = float_region(region)
        family = self._family(inner)
        narrow = _narrow(region)
        known = {name: incoming[narrow.get(name, name)] for name in inner.inputs}
        wanted = family.layouts(inner, machine, known)
        return {
            **incoming,
            **{narrow.get(name, name): layout for name, layout in wanted.items() if narrow.get(name, name) in incoming},
            **{name: wanted.get(name, PLAIN) for name in region.outputs},
        }

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """The launches of the prologue, then those of the float kernel."""
        inner = float_region(region)
        narrow = _narrow(region)
        given = {**layouts, **{wide: layouts.get(name, PLAIN) for wide, name in narrow.items()}}
        launches: list[Launch] = []
        temporaries: dict[str, TensorType] = {}
        constants = {}
        for op in prologue(region):
            wide = op.outputs[0]
            if wide in inner.constants:
                continue
            lowered = Generic().lower(_single(op, region), machine, given)
            launches += lowered.launches
            constants.update(lowered.constants)
            temporaries[wide] = TensorType(region.types[wide].dtype, physical_shape(region.types[wide], given[wide]))
        rest = self._family(inner).lower(inner, machine, given)
        return Lowered(
            (*launches, *rest.launches), {**temporaries, **rest.temporaries}, {**constants, **rest.constants}
        )

    def _family(self, inner: Region) -> Family:
        family = self.choose(inner)[0]
        assert family is not None
        return family


def _narrow(region: Region) -> dict[str, str]:
    """Wide name -> narrow name of each operand that comes from outside."""
    return {op.outputs[0]: op.inputs[0] for op in prologue(region) if op.inputs[0] not in region.constants}


def _single(op: Op, region: Region) -> Region:
    """A region of one operator."""
    names = [name for name in op.inputs if name]
    return Region(
        name=region.name,
        anchor=None,
        ops=(op,),
        inputs=tuple(dict.fromkeys(name for name in names if name not in region.constants)),
        outputs=op.outputs[:1],
        types=region.types,
        constants={name: region.constants[name] for name in names if name in region.constants},
    )
