"""Offering each region to the targets in order: who takes it, and in words why the others did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nestc.graph.region import Region
from nestc.targets.api import Offer, Target


@dataclass(frozen=True)
class Claim:
    """A region, the target and offer that take it (None: nobody), and the refusals of the targets asked before."""

    region: Region
    target: str | None
    offer: Offer | None
    refusals: tuple[tuple[str, str], ...]


def claim(region: Region, targets: Sequence[Target]) -> Claim:
    """The first target, in the order given, with an offer for `region`."""
    refusals: list[tuple[str, str]] = []
    for target in targets:
        reasons: list[str] = []
        for offer in target.offers:
            reason = offer.refusal(region)
            if reason is None:
                return Claim(region, target.name, offer, tuple(refusals))
            reasons.append(reason)
        refusals.append((target.name, best_reason(reasons)))
    return Claim(region, None, None, tuple(refusals))


def best_reason(reasons: Sequence[str]) -> str:
    """The refusal worth showing: one about the region itself rather than an offer that was meant for others.

    An offer whose anchor or operators do not fit says nothing of interest when another came nearer.
    """
    if not reasons:
        return "it offers nothing"
    nearer = [reason for reason in reasons if not reason.startswith("offer ") and not reason.endswith("is not offered")]
    if nearer:
        return nearer[0]
    unknown = [reason for reason in reasons if reason.endswith("is not offered")]
    return (unknown or list(reasons))[0]
