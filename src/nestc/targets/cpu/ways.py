"""The ways to compute a region that differ in the layouts they want, with costs that compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nestc.graph.region import Region
from nestc.kernels.api import PLAIN, CpuMachine, Family, Layout
from nestc.kernels.ways import parametrised
from nestc.targets.cpu.cost import Estimated, way_seconds

MARGIN = 1.4
"""Factor on what another way than the chosen one is modelled to take. Direct kernels that read 8 to 12 channels of rows
of pixels took 1.0 to 2.0 (half of them more than 1.3) times as long beside Winograd's as the two estimates say
(measured on Zen 3)."""


@dataclass(frozen=True)
class Way:
    """A family that computes a region, and the modelled seconds that it takes on one core."""

    family: Family
    seconds: float


def distinct_ways(
    region: Region, chosen: Family, others: Sequence[Family], machine: CpuMachine, reach: float
) -> list[Way]:
    """`chosen`, and behind it those of `others` that take less than `reach` seconds longer and answer other layouts.

    Of each algorithm the first one counts, which is the one that is modelled to be fastest, and its usual parameters;
    algorithms whose costs do not compare are left out, and those that answer nothing that a faster one would not.
    """
    known = [chosen, *others]
    if not any(isinstance(family, Estimated) for family in known):
        return [Way(chosen, 0.0)]
    kinds: dict[type[Family], Family] = {}
    for family in others:
        if type(family) is not type(chosen) and not parametrised(family):
            kinds.setdefault(type(family), family)
    answered = _answers(region, chosen, machine)
    found: list[Way] = []
    ways = [Way(family, MARGIN * way_seconds(region, family, known, machine)) for family in kinds.values()]
    for way in sorted(ways, key=lambda way: way.seconds):
        layouts = _answers(region, way.family, machine)
        if any(each not in answered for each in layouts):
            found.append(way)
            answered += layouts
    first = Way(chosen, way_seconds(region, chosen, known, machine))
    return [first, *(way for way in found if way.seconds - first.seconds < reach)]


def _answers(region: Region, family: Family, machine: CpuMachine) -> list[dict[str, Layout]]:
    """The layouts that a family answers to inputs of either layout."""
    block = Layout(machine.lanes("float32"))
    names = (*region.inputs, *region.outputs)
    answers: list[dict[str, Layout]] = []
    for layout in (PLAIN, block):
        incoming = {name: layout if len(region.types[name].shape) > 2 else PLAIN for name in region.inputs}
        answer = family.layouts(region, machine, incoming)
        answers.append({name: answer.get(name, PLAIN) for name in names})
    return answers
