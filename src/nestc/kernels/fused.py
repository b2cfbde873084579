"""Two neighbouring regions as one, the second the only reader of what the first makes: joined and taken apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import CpuMachine, Family, Layout

ANCHOR = "fused"
"""The anchor of a region that was joined."""

_SECOND = frozenset({"Conv", "MaxPool", "AveragePool"})
"""Operators with which a second region begins; a tail has none of them."""


FLOPS_PER_SECOND = 80e9
BARRIER_SECONDS = 2e-6
"""Of float32 multiply-adds in these kernels on one core, and what threads lose where they wait for each other."""

STREAM_RATE = 45e9
"""Bytes a second that a kernel reads and writes which does little else (1.6 MB multiplied in 74 us on a Zen 3)."""

_L2_RATE, _L3_RATE, _MEMORY_RATE = 800e9, 200e9, 10e9
"""Bytes a second of what is read and written in streams, as far as the time shows: on a Zen 3 nearly all of the way to
L3 is hidden behind arithmetic (inverted residuals ran as fast beyond L2 as within)."""


class FusedFamily(Family, Protocol):
    """A family for joined regions. ``exact``: its results are those of the two regions to the bit."""

    @property
    def exact(self) -> bool: ...

    def replacing(self, first: Family, second: Family) -> FusedFamily | None:
        """This family with what was chosen for the two regions alone; None if those ways are ones that it cannot
        stand for."""
        ...

    def gain(self, region: Region, machine: CpuMachine, threads: int) -> float:
        """Modelled seconds that a region takes less in one kernel than in two, on `threads` threads."""
        ...


@dataclass(frozen=True)
class Pair:
    """The two regions that were joined."""

    first: Region
    second: Region

    @property
    def between(self) -> str:
        """The output of the first, which is the first operand of the second's anchor."""
        return self.first.outputs[0]

    @property
    def anchor(self) -> Op:
        """The operator with which the second begins."""
        return self.second.ops[0]


def element_bytes(type_: TensorType) -> int:
    """Bytes of an element of float32 or float64."""
    return 8 if type_.dtype == "float64" else 4


def rate(machine: CpuMachine, nbytes: int) -> float:
    """Modelled bytes a second of streams over data of `nbytes`, of which other data leave half of a cache."""
    if nbytes <= machine.l2_bytes // 2:
        return _L2_RATE
    return _L3_RATE if nbytes <= machine.l3_bytes // 2 else _MEMORY_RATE


def idle(items: int, threads: int) -> float:
    """How much longer `threads` take for so many equal items than if they could be divided at will."""
    return ceil(items / threads) * threads / items - 1


def join(first: Region, second: Region) -> Region | None:
    """Both as one region with the name of the second; None if `second` does not begin with an operator on the only
    output of `first`, or reads that in another place as well."""
    if len(first.outputs) != 1 or second.ops[0].op_type not in _SECOND or second.ops[0].domain:
        return None
    between = first.outputs[0]
    reads = [name for op in second.ops for name in op.inputs]
    if second.ops[0].inputs[0] != between or reads.count(between) != 1 or between in second.outputs:
        return None
    inputs = dict.fromkeys((*first.inputs, *(name for name in second.inputs if name != between)))
    types, constants = {**first.types, **second.types}, {**first.constants, **second.constants}
    ops = (*first.ops, *second.ops)
    return Region(second.name, ANCHOR, ops, tuple(inputs), second.outputs, types, constants)


def parts(region: Region) -> Pair | None:
    """The regions that `region` was joined of; None if it was not."""
    if region.anchor != ANCHOR:
        return None
    at = max(number for number, op in enumerate(region.ops) if op.op_type in _SECOND and not op.domain)
    before, after = region.ops[:at], region.ops[at:]
    between = after[0].inputs[0]
    first = _part(region, before, (), (between,))
    return Pair(first, _part(region, after, (between,), region.outputs))


def joined_layouts(
    pair: Pair, before: Mapping[str, Layout], second: Family, machine: CpuMachine, incoming: Mapping[str, Layout]
) -> Mapping[str, Layout]:
    """Layouts at the border of a joined region: those of its first part, and what `second` wants behind a map in blocks
    of channels."""
    block = Layout(machine.lanes("float32"))
    after = second.layouts(pair.second, machine, {name: incoming.get(name, block) for name in pair.second.inputs})
    return {name: layout for name, layout in {**after, **before}.items() if name != pair.between}


def _part(region: Region, ops: Sequence[Op], more: tuple[str, ...], outputs: tuple[str, ...]) -> Region:
    reads = {name for op in ops for name in op.inputs}
    inputs = (*more, *(name for name in region.inputs if name in reads))
    return Region(region.name, None, tuple(ops), inputs, outputs, region.types, region.constants)
