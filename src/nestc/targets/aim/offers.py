"""What AiM offers: a constant matrix of 16-bit floats times a few vectors, with what follows element by element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nestc.graph.region import Region
from nestc.runtime.aim.host import OPERATORS
from nestc.runtime.aim.machine import AimMachine, preset
from nestc.targets.aim.cost import rows_needed
from nestc.targets.aim.gates import read_elements
from nestc.targets.aim.recurrent import RECURRENT, read_region
from nestc.targets.aim.regions import ANCHORS, NUMBERS, Refused
from nestc.targets.api import Constraint, Offer, QuantSpec

SCHEME = "bf16"


def narrow(rounded: str | None) -> Constraint:
    """Whether something in a region has 16 bits, or may be rounded."""

    def holds(region: Region) -> bool:
        dtypes = {region.types[name].dtype for op in region.ops for name in op.inputs if name}
        return bool(dtypes & {*NUMBERS}) or (rounded is not None and "float32" in dtypes)

    wanted = "bfloat16, which the scheme bf16 makes, or float16"
    return Constraint(holds, f"operands have 16 bits: {wanted}" + (f", or are rounded to {rounded}" if rounded else ""))


def few(rounded: str | None) -> Constraint:
    """Whether a region is made of products of a constant matrix with a few vectors."""

    def holds(region: Region) -> bool:
        try:
            read_region(region, rounded)
        except Refused:
            return False
        return True

    return Constraint(holds, "a matrix is constant and the vectors that it is multiplied with are few")


@dataclass(frozen=True)
class AimOffer(Offer):
    """An offer that says of the region at hand what is wrong. ``rounded``: the format float32 is rounded to, if any."""

    machine: AimMachine = field(default_factory=lambda: preset("gddr6_aim"))
    number: str = "bfloat16"
    rounded: str | None = None

    def refusal(self, region: Region) -> str | None:
        """Why the offer does not take `region`, in words; None if it does."""
        general = super().refusal(region)
        if general is not None and self.anchors is not None and region.anchor not in self.anchors:
            return general
        try:
            found = read_region(region, self.rounded)
        except Refused as reason:
            return str(reason)
        where = f"{found[0].anchor.op_type} (node {found[0].anchor.name!r})"
        if found[0].number != self.number:
            return (
                f"{where} is in {found[0].number}, and this AiM was asked to hold {self.number}; write "
                f"aim:number={found[0].number}"
            )
        rows = max(rows_needed(product.m, product.k, self.machine) for product in found)
        if rows > self.machine.rows:
            name, most = self.machine.name, self.machine.rows
            return f"the matrix of {where} takes {rows} rows of every bank, and {name} has {most}"
        return None


@dataclass(frozen=True)
class ElementOffer(AimOffer):
    """An offer for regions without an anchor: sums and products of values, element by element."""

    def refusal(self, region: Region) -> str | None:
        """Why the offer does not take `region`, in words; None if it does."""
        if region.anchor is not None:
            return f"offer {self.name} is not for {region.anchor} regions"
        try:
            found = read_elements(region, self.rounded)
        except Refused as reason:
            return str(reason)
        if found[0].number != self.number:
            return (
                f"the region is in {found[0].number}, and this AiM was asked to hold {self.number}; write "
                f"aim:number={found[0].number}"
            )
        return None


def offers(
    machine: AimMachine,
    number: str = "bfloat16",
    cost: Callable[[Region], float] | None = None,
    rounded: bool = False,
) -> tuple[Offer, ...]:
    """The offers of a machine; ``cost`` gives the modelled seconds of a region that was not refused. If ``rounded``,
    float32 regions are taken, too."""
    kind = number if rounded else None
    rules, scheme = (narrow(kind), few(kind)), QuantSpec(SCHEME) if number == "bfloat16" else None

    def offer(name: str, ops: frozenset[str], anchors: frozenset[str]) -> AimOffer:
        wanted = frozenset[str | None](anchors)
        return AimOffer(name, ops, wanted, rules, scheme, cost, machine, number, kind)

    return (
        offer("matrix-vector", frozenset({*ANCHORS, *OPERATORS}), ANCHORS),
        offer("recurrent", frozenset({*RECURRENT, "Cast"}), RECURRENT),
        ElementOffer("elementwise", frozenset(OPERATORS), frozenset({None}), (), scheme, cost, machine, number, kind),
    )
