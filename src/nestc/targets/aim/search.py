"""Which mapping a layer gets: mappings are enumerated, ranked by a closed form, and the best ones are timed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from nestc.cache import TuningStore
from nestc.errors import TargetError
from nestc.runtime.aim.commands import Eoc
from nestc.runtime.aim.machine import AimMachine
from nestc.runtime.aim.timing import simulate_timing
from nestc.targets.aim import lower as lowering
from nestc.targets.aim.emit import Addresses, emit
from nestc.targets.aim.layer import MatrixVector
from nestc.targets.aim.mapping import Mapping, Plan, plan

TIMED = 6
"""Mappings that are timed at most, of those that the closed form puts first."""

MARGIN, SLACK = 1.02, 40
"""A mapping is timed if its estimate is within that factor, or as many ticks, of the best one's."""


@dataclass(frozen=True)
class Found:
    """A mapping and the modelled ticks of one vector's stream, with the host's accesses to registers."""

    mapping: Mapping
    ticks: int


def best(layer: MatrixVector, machine: AimMachine, number: str = "bfloat16") -> Mapping:
    """The mapping with the fewest modelled ticks; found before in another process, it is taken from the store."""
    store = TuningStore()
    key = _key(layer, machine, number)
    text = store.get(key)
    if text is not None:
        try:
            return Mapping(**json.loads(text))
        except (ValueError, TypeError):
            pass  # written by something else: search anew
    mapping = search(layer, machine, number)[0].mapping
    store.put(key, json.dumps(mapping.to_json()))
    return mapping


def search(layer: MatrixVector, machine: AimMachine, number: str = "bfloat16", timed: int = TIMED) -> list[Found]:
    """The timed mappings of a layer, the best first; of equals, the one with the smaller estimate.

    Raises:
        TargetError: there is no mapping.
    """
    plans = sorted(_plans(layer, machine, number), key=lambda pair: pair[0])
    if not plans:
        raise TargetError(f"{layer.name}: no mapping of {layer.m} x {layer.k} suits {machine.name}")
    one = replace(layer, vectors=1)  # vectors follow one another in the same way
    found: list[Found] = []
    for ticks, each in plans[:timed]:
        if ticks > max(MARGIN * plans[0][0], plans[0][0] + SLACK):
            break
        kernel = lowering.lower(one, plan(one, each.mapping, machine, number), machine)
        commands = [*emit(kernel, Addresses(0, 0, 0), machine).commands, Eoc()]
        found.append(Found(each.mapping, simulate_timing(commands, machine).ticks))
    return sorted(found, key=lambda each: each.ticks)


def mappings(layer: MatrixVector, machine: AimMachine) -> Iterator[Mapping]:
    """Every mapping that is worth an estimate; not all suit the layer."""
    buffer = min(machine.columns, machine.global_buffer_columns)
    columns = math.ceil(layer.k / machine.lanes)
    widths = sorted({math.ceil(columns / slices) for slices in range(1, columns + 1)}, reverse=True)
    for width in (w for w in widths if w <= buffer):
        slices = math.ceil(columns / width)
        for pack in sorted({1, *(p for p in (2, 4, 8) if p * width <= buffer), buffer // width}):
            for even in (True, False):
                for opener in (True, False):
                    yield Mapping(slices, pack, even, opener)
                if slices == 1 and layer.activation is not None:
                    yield Mapping(slices, pack, even, inside=True)


def estimate(found: Plan, machine: AimMachine) -> float:
    """Ticks of one vector in closed form, about.

    A row's first item waits for precharge and activation, every read of sums for two changes of mode; with an opener
    the former is hidden in part. Fills come on top. Derived from the rules in `runtime.aim.constraints`.
    """
    t = machine.timing
    layout, mapping = found.layout, found.mapping
    mode = 2 * t["nMODCH"] + t["nCLREG"] + t["nBL"] + 4
    change = t["nRTP"] + t["nRP"]
    gap = change + t["nRCDRDMAC"] + mode - t["nRTP"] + 2
    if mapping.opener:
        gap = change + t["nRCDEWMUL"] + mode
    if mapping.inside:
        gap = change + t["nRCDRDAF"] + change + t["nRCDRDMAC"] + mode
    rows = math.ceil(found.items / mapping.pack)
    same = 0 if rows == found.items else (found.items - rows) * (gap if mapping.inside else mode)
    items = found.items * (layout.width - 1) * t["nCCDS"] + rows * gap + same + layout.spares * (gap + 8)
    changes = {end for channel in layout.segments for end in accumulate(s[2] for s in channel[:-1])}
    copies = min(mapping.pack, found.items)
    fills = (1 + len(changes)) * layout.width * copies * t["nCCDS"] + layout.inputs
    return items + fills


def _plans(layer: MatrixVector, machine: AimMachine, number: str) -> Iterator[tuple[float, Plan]]:
    """Estimates and plans, each plan once; a dense plan only where channels do less than in an even one."""
    items: dict[tuple[int, int], int] = {}
    for mapping in mappings(layer, machine):
        try:
            found = plan(layer, mapping, machine, number)
        except TargetError:
            continue  # this mapping does not suit; others do
        if mapping.pack > found.items:
            continue  # no row has that many
        cut = (mapping.slices, mapping.pack)
        if mapping.even:
            items[cut] = found.items
        elif found.items >= items.get(cut, found.items + 1):
            continue
        yield estimate(found, machine), found


def _key(layer: MatrixVector, machine: AimMachine, number: str) -> str:
    """What decides the search: shapes, not values."""
    facts = (layer.m, layer.k, layer.vectors, layer.activation, layer.bias is not None, number)
    geometry = (machine.channels, machine.bank_groups, machine.banks_per_group, machine.columns, machine.lanes)
    limits = (machine.global_buffer_columns, machine.queue, machine.timings)
    return f"aim {lowering.VERSION} {facts} {geometry} {limits}"
