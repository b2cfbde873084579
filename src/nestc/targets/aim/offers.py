"""What AiM offers: a constant matrix of 16-bit floats times a few vectors, with what follows element by element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nestc.graph.region import Region
from nestc.runtime.aim.host import OPERATORS
from nestc.runtime.aim.machine import AimMachine, preset
from nestc.targets.aim.cost import rows_needed
from nestc.targets.aim.regions import ANCHORS, NUMBERS, Refused, read
from nestc.targets.api import Offer, QuantSpec, constraint

SCHEME = "bf16"


@constraint
def narrow(region: Region) -> bool:
    """operands have 16 bits: bfloat16, which the scheme bf16 makes, or float16"""
    return any(region.types[name].dtype in NUMBERS for op in region.ops for name in op.inputs if name)


@constraint
def few(region: Region) -> bool:
    """a matrix is constant and the vectors that it is multiplied with are few"""
    try:
        read(region)
    except Refused:
        return False
    return True


@dataclass(frozen=True)
class AimOffer(Offer):
    """An offer that says of the region at hand what is wrong."""

    machine: AimMachine = field(default_factory=lambda: preset("gddr6_aim"))
    number: str = "bfloat16"

    def refusal(self, region: Region) -> str | None:
        """Why the offer does not take `region`, in words; None if it does."""
        general = super().refusal(region)
        if general is not None and region.anchor not in ANCHORS:
            return general
        try:
            found = read(region)
        except Refused as reason:
            return str(reason)
        if found.number != self.number:
            return (
                f"{found.anchor.op_type} (node {found.anchor.name!r}) is in {found.number}, and this AiM was asked to "
                f"hold {self.number}; write aim:number={found.number}"
            )
        rows = rows_needed(found.m, found.k, self.machine)
        if rows > self.machine.rows:
            return (
                f"the matrix of {found.anchor.op_type} (node {found.anchor.name!r}) takes {rows} rows of every bank, "
                f"and {self.machine.name} has {self.machine.rows}"
            )
        return None


def offers(
    machine: AimMachine, number: str = "bfloat16", cost: Callable[[Region], float] | None = None
) -> tuple[Offer, ...]:
    """The offers of a machine; ``cost`` gives the modelled seconds of a region that was not refused."""
    operators = frozenset({*ANCHORS, *OPERATORS})
    return (
        AimOffer(
            "matrix-vector", operators, frozenset(ANCHORS), (narrow, few), QuantSpec(SCHEME), cost, machine, number
        ),
    )
