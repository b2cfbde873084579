"""What the timing simulator says of a partition, as the JSON values that its artifact carries: all of it modelled."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from nestc.runtime.aim.commands import Command, count_kinds
from nestc.runtime.aim.elements import ElementLayout
from nestc.runtime.aim.energy import joules
from nestc.runtime.aim.host import HostOp
from nestc.runtime.aim.layout import Layout
from nestc.runtime.aim.machine import AimMachine
from nestc.runtime.aim.timing import simulate_timing

HOST_BYTES_PER_SECOND = 50e9
"""Assumed, not measured: operators of the processor beside the memory (those that the banks do not have) count as the
bytes that they read and write over this: some 16 bytes a cycle, vectors being so short that they stay in its first
cache. Partial sums cost nothing more: it adds a register in the tick in which it reads it."""

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def timed(
    launches: Sequence[tuple[str, Sequence[Command], Layout | ElementLayout]],
    host: Sequence[HostOp],
    machine: AimMachine,
) -> dict[str, Any]:
    """Ticks, seconds, energy and the fraction of internal bandwidth of launches that run one after the other.

    ``bandwidth_fraction``: bytes of weights that the matrices have (no padding), once a vector, over what the banks
    could deliver in the ticks. ``launches``: names, streams and layouts; ``host``: operators between them.
    """
    layers: list[dict[str, Any]] = []
    parts: dict[str, float] = {}
    for name, commands, layout in launches:
        report = simulate_timing(commands, machine)
        spent = joules(report)
        for part, value in spent.items():
            parts[part] = parts.get(part, 0.0) + value
        if isinstance(layout, ElementLayout):
            shape = {"elements": layout.elements}
        else:
            additions = layout.vectors * layout.additions
            shape = {"m": layout.m, "k": layout.k, "vectors": layout.vectors, "host_additions": additions}
        layers.append(
            {
                "name": name,
                **shape,
                "ticks": report.ticks,
                "energy_joules": spent["total"],
                "bandwidth_fraction": useful(layout, machine) / max(report.ticks, 1),
                "commands": count_kinds(commands),
            }
        )
    ticks = sum(layer["ticks"] for layer in layers)
    products = [layout for _, _, layout in launches if isinstance(layout, Layout)]
    activated = sum(layout.vectors * layout.m for layout in products if layout.activation is not None)
    host_seconds = seconds_of_host(host) + 8 * activated / HOST_BYTES_PER_SECOND
    every = sum(useful(layout, machine) for layout in products)
    total = parts.pop("total", 0.0)
    return {
        "kind": "modelled",
        "ticks": ticks,
        "seconds": machine.seconds(ticks) + host_seconds,
        "memory_seconds": machine.seconds(ticks),
        "host_seconds": host_seconds,
        "energy_joules": total,
        "energy_parts": parts,
        "bandwidth_fraction": every / max(ticks, 1),
        "layers": layers,
    }


def seconds_of_host(operators: Sequence[HostOp]) -> float:
    """Estimated time of the host's operators (see `HOST_BYTES_PER_SECOND`)."""
    return sum(_moved(op) for op in operators) / HOST_BYTES_PER_SECOND


def useful(layout: Layout | ElementLayout, machine: AimMachine) -> float:
    """Ticks in which all banks together could deliver the weights of a layer once for each vector."""
    if isinstance(layout, ElementLayout):
        return 0.0
    a_tick = machine.outputs * machine.lanes / machine.timing["nCCDS"]
    return layout.vectors * layout.m * layout.k / a_tick


def _moved(op: HostOp) -> int:
    """Bytes that an operator of the host reads and writes, operands taken as large as its result."""
    return prod(op.shape) * _BYTES[op.dtype] * (1 + len(op.inputs))
