"""Offering each region to the targets in order: who takes it, and in words why the others did not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nestc.graph.region import Region
from nestc.targets.api import Offer, Target

DYNAMIC = "dynamic_shapes"
"""A machine fact: true for a target that takes values whose sizes are known only at run time, and sequences."""


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
        answer = ask(region, target)
        if isinstance(answer, Offer):
            return Claim(region, target.name, answer, tuple(refusals))
        refusals.append((target.name, answer))
    return Claim(region, None, None, tuple(refusals))


def ask(region: Region, target: Target) -> Offer | str:
    """The offer with which a target takes a region, or in words why it does not."""
    unsized = unknown_at_compile_time(region)
    if unsized is not None and not target.machine.facts.get(DYNAMIC):
        return unsized
    reasons: list[str] = []
    for offer in target.offers:
        reason = offer.refusal(region)
        if reason is None:
            return offer
        reasons.append(reason)
    return best_reason(reasons)


def takes(target: Target, region: Region) -> bool:
    """Whether a target has an offer for a region."""
    return isinstance(ask(region, target), Offer)


def refused(each: Claim) -> str:
    """Why nobody takes a region: its operators, where they stand, and each target's reason."""
    ops = ", ".join(
        dict.fromkeys(op.op_type if not op.domain else f"{op.domain}::{op.op_type}" for op in each.region.ops)
    )
    node = each.region.ops[0].name
    reasons = "; ".join(f"{target}: {reason}" for target, reason in each.refusals)
    return f"no target runs {ops} (node {node!r}): {reasons}"


def unknown_at_compile_time(region: Region) -> str | None:
    """Why a region cannot be compiled ahead, if a value of it has no fixed size or is not a tensor."""
    for name, type_ in region.types.items():
        if "(" in type_.dtype or type_.dtype == "undefined":
            return f"value {name!r} is a {type_.dtype}, not a tensor"
        if any(size < 0 for size in type_.shape):
            return f"value {name!r} has a size that is known only at run time"
    return None


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
