"""A modelled cost of a region from its shapes alone: the ticks of the mapping that it would get, compiled by itself.

Plans are made with it. A compiled partition may take less: matrices with the same vectors become one launch.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from math import ceil

import numpy as np

from nestc.graph.region import Region
from nestc.runtime.aim.commands import Eoc
from nestc.runtime.aim.machine import AimMachine
from nestc.runtime.aim.timing import simulate_timing
from nestc.targets.aim import elementwise
from nestc.targets.aim.elementwise import Elementwise
from nestc.targets.aim.emit import Addresses, emit
from nestc.targets.aim.gates import Part, read_parts
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.lower import lower
from nestc.targets.aim.mapping import plan
from nestc.targets.aim.search import best
from nestc.targets.aim.timed import HOST_BYTES_PER_SECOND, seconds_of_host


def seconds(region: Region, machine: AimMachine, rounded: str | None = None) -> float:
    """Modelled seconds of a region that is taken: of its launches, and of what the host does between them."""
    total, host = 0, 0.0
    for part in read_parts(region, rounded):
        host += seconds_of_host(part.host)
        if isinstance(part, Part):
            total += 0 if part.layer is None else element_ticks(part.layer, part.number, machine)
            continue
        bias, activation = part.bias is not None, part.activation
        mapped, inside = _ticks(part.m, part.k, part.rows, bias, activation, machine, part.number)
        total += mapped
        host += 0.0 if inside or activation is None else 8 * part.rows * part.m / HOST_BYTES_PER_SECOND
    return machine.seconds(total) + host


def ticks(m: int, k: int, vectors: int, machine: AimMachine, number: str = "bfloat16") -> int:
    """Ticks of a product of a matrix (m, k) with `vectors` vectors, with the mapping that the search finds."""
    return _ticks(m, k, vectors, False, None, machine, number)[0]


@lru_cache(maxsize=1024)
def _ticks(
    m: int, k: int, vectors: int, bias: bool, activation: str | None, machine: AimMachine, number: str
) -> tuple[int, bool]:
    """Ticks, and whether the banks apply the activation. Each vector after the first takes as much as the second."""
    weights = np.broadcast_to(np.float32(0), (m, k))  # only its shape counts
    layer = MatrixVector("", weights, np.zeros(m, np.float32) if bias else None, activation, "x", "y", vectors)
    mapping = best(layer, machine, number)
    counted: list[int] = []
    for count in range(1, min(vectors, 2) + 1):
        one = replace(layer, vectors=count)
        kernel = lower(one, plan(one, mapping, machine, number), machine)
        counted.append(simulate_timing([*emit(kernel, Addresses(0, 0, 0), machine).commands, Eoc()], machine).ticks)
    return counted[0] + (vectors - 1) * (counted[-1] - counted[0]), mapping.inside


def element_ticks(layer: Elementwise, number: str, machine: AimMachine) -> int:
    """Ticks of sums and products of values: of the first chunk, times how many there are."""
    steps = tuple((step.op, step.left, step.right, step.result) for step in layer.steps)
    facts = (steps, layer.inputs, tuple(layer.constants), layer.outputs, layer.elements)
    return _element_ticks(facts, number, machine)


@lru_cache(maxsize=1024)
def _element_ticks(facts: _Facts, number: str, machine: AimMachine) -> int:
    steps, inputs, constants, outputs, elements = facts
    fixed = {name: np.broadcast_to(np.float32(0), elements) for name in constants}
    layer = Elementwise("", tuple(elementwise.Step(*step) for step in steps), inputs, fixed, outputs, elements)
    found = elementwise.plan(layer, machine, number, machine.gprs)
    return elementwise.ticks(layer, found, machine) * found.layout.chunks


_Facts = tuple[tuple[tuple[str, str, str, str], ...], tuple[str, ...], tuple[str, ...], tuple[str, ...], int]


def rows_needed(m: int, k: int, machine: AimMachine) -> int:
    """Rows of every bank that a matrix takes at least."""
    return ceil(ceil(m / machine.outputs) * ceil(k / machine.lanes) / machine.columns)
