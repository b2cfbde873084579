"""``nestc targets``: the installed targets, their machine data and offers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from nestc.commands import common
from nestc.errors import TargetError

if TYPE_CHECKING:
    from nestc.targets.api import Offer, Target


def targets(json: common.Json = False, verbose: common.Verbose = False, debug: common.Debug = False) -> None:
    """List the installed targets, what they know of their machine, and what they offer.

    Example: `nestc targets --json`
    """
    from nestc.targets import entries, make

    described: dict[str, Any] = {}
    for name in entries():
        try:
            described[name] = describe(make(name))
        except TargetError as error:
            described[name] = {"unavailable": str(error)}
    if json:
        common.print_json({"targets": described})
        return
    for name, entry in described.items():
        show(name, entry)


def describe(target: Target) -> dict[str, Any]:
    """A target's machine data and offers as JSON values."""
    machine = target.machine
    return {
        "machine": {
            "name": machine.name,
            "memories": [dataclasses.asdict(memory) for memory in machine.memories],
            "dtypes": list(machine.dtypes),
            "facts": {
                key: value if isinstance(value, int | float | bool) else str(value)
                for key, value in machine.facts.items()
            },
            "link": dataclasses.asdict(machine.link),
            "resource": machine.resource or target.name,
            "watts": machine.watts,
        },
        "offers": [describe_offer(offer) for offer in target.offers],
    }


def describe_offer(offer: Offer) -> dict[str, Any]:
    """An offer as JSON values; ``null`` among the anchors is a region that has none."""
    return {
        "name": offer.name,
        "ops": sorted(offer.ops),
        "anchors": None if offer.anchors is None else sorted(offer.anchors, key=str),
        "where": [rule.reason for rule in offer.where],
        "quant": None if offer.quant is None else offer.quant.scheme,
    }


def show(name: str, entry: dict[str, Any]) -> None:
    """Print a target for people."""
    if "unavailable" in entry:
        print(f"{name}: not available here: {entry['unavailable']}")
        return
    machine = entry["machine"]
    print(f"{name}: {machine['name']}")
    for key, value in machine["facts"].items():
        print(f"  {key}: {value}")
    print(f"  runs on: {machine['resource']}{_power(machine['watts'])}")
    print(f"  border to the host: {_border(machine['link'])}")
    for memory in machine["memories"]:
        print(f"  memory {memory['name']}: {memory['bytes'] or 'as much as there is'}")
    print(f"  element types: {', '.join(machine['dtypes'])}")
    for offer in entry["offers"]:
        print(f"  offer {offer['name']}: {len(offer['ops'])} operators")
        for reason in offer["where"]:
            print(f"    where {reason}")


def _power(watts: float) -> str:
    return f", {watts:g} W (for energies that are estimated)" if watts else ""


def _border(link: dict[str, Any]) -> str:
    """A link in words."""
    parts = [f"{link['launch_seconds'] * 1e6:g} us a launch"] if link["launch_seconds"] else []
    if link["latency_seconds"]:
        parts.append(f"{link['latency_seconds'] * 1e6:g} us a tensor")
    if link["bytes_per_second"]:
        parts.append(f"{link['bytes_per_second'] / 1e6:g} MB/s")
    if link["joules_per_byte"]:
        parts.append(f"{link['joules_per_byte'] * 1e12:g} pJ a byte")
    return f"{', '.join(parts)} ({link['kind']})" if parts else "none, it works in the host's memory"
