"""What VTA offers: int8 regions with power-of-two scales that have a form of products, maxima, shifts and bounds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nestc.graph.kinds import VIEWS
from nestc.graph.region import Region
from nestc.runtime.vta.config import VtaConfig
from nestc.targets.api import Constraint, Offer, QuantSpec, constraint
from nestc.targets.vta.layers import OPERATORS, refusal

SCHEME = "int8-pow2"


@constraint
def integer(region: Region) -> bool:
    """VTA computes on int8: quantize the model with scheme int8-pow2"""
    return any(region.types[name].dtype == "int8" for name in (*region.inputs, *region.outputs))


@constraint
def stored(region: Region) -> bool:
    """VTA reads and stores only int8, and a value that goes in or out is not quantized"""
    return all(region.types[name].dtype == "int8" for name in (*region.inputs, *region.outputs))


def expressible(config: VtaConfig) -> Constraint:
    """Whether a machine has layers for a region."""

    def holds(region: Region) -> bool:
        return refusal(region, config) is None

    return Constraint(
        holds,
        "scales are powers of two and zero points 0, weights are constant, sums fit 32 bits, and what is computed is"
        " made of products, maxima, shifts and bounds",
    )


@dataclass(frozen=True)
class VtaOffer(Offer):
    """An offer that says of the region at hand what is wrong: which scale, shape, constant or operator."""

    config: VtaConfig = field(default_factory=VtaConfig)

    def refusal(self, region: Region) -> str | None:
        """Why the offer does not take `region`, in words; None if it does."""
        return refusal(region, self.config)


def offers(config: VtaConfig, cost: Callable[[Region], float] | None = None) -> tuple[Offer, ...]:
    """The offers of a VTA; ``cost`` gives the modelled seconds of a region that was not refused."""
    rules = (integer, stored, expressible(config))
    return (VtaOffer("layers", OPERATORS | VIEWS, None, rules, QuantSpec(SCHEME), cost, config),)
