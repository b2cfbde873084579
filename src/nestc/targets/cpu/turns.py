"""Runs of actions that are executed slice by slice: what they are for one slice, and what of them others see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Layout
from nestc.targets.cpu.address import nbytes
from nestc.targets.cpu.images import types_of
from nestc.targets.cpu.layout import Action, Convert, Lower, Program, Turns, stored
from nestc.targets.cpu.slices import Slices


def in_turns(
    actions: Sequence[Action],
    slices: Sequence[Slices],
    regions: Sequence[Region],
    outputs: Sequence[str],
    types: Mapping[str, TensorType],
) -> Program:
    """Put the actions for the regions of each run together. `outputs` are those of the partition."""
    program: list[Action | Turns] = []
    number = 0
    for each in slices:
        names = {region.name for region in regions[each.first : each.end]}
        places = [place for place, action in enumerate(actions) if _region(action) in names]
        first, end = places[0], places[-1] + 1
        # What the first regions read may be brought into their layouts slice by slice, too.
        while first > number and _converts(actions[first - 1], each.values):
            first -= 1
        program += actions[number:first]
        later = {name for action in actions[end:] for name in _reads(action)}
        run = actions[first:end]
        # What is the same for all slices is converted once, before them.
        once = [action for action in run if isinstance(action, Convert) and not _converts(action, each.values)]
        small = each.small(regions)
        program += once
        turned = [_small(action, small) for action in run if action not in once]
        program.append(_turns(turned, each, later.union(outputs), types))
        number = end
    return [*program, *actions[number:]]


def fits(action: Lower, machine: CpuMachine) -> bool:
    """Whether the kernels of an action's region take exactly its layouts."""
    region = action.region
    if action.family.refusal(region) is not None:
        return False
    wanted = {name: action.layouts.get(name, PLAIN) for name in (*region.inputs, *region.outputs)}
    found = action.family.layouts(region, machine, {name: wanted[name] for name in region.inputs})
    return all(found.get(name, PLAIN) == layout for name, layout in wanted.items())


def _region(action: Action) -> str:
    return "" if isinstance(action, Convert) else action.region.name


def _converts(action: Action, values: frozenset[str]) -> bool:
    return isinstance(action, Convert) and action.value in values


def _reads(action: Action) -> list[str]:
    """The buffers that an action reads."""
    if isinstance(action, Lower):
        return [stored(name, action.layouts.get(name, PLAIN)) for name in action.region.inputs]
    return [stored(action.value, action.source)] if isinstance(action, Convert) else [action.source]


def _writes(action: Action) -> list[tuple[str, str, Layout]]:
    """The buffers that an action makes: buffer, value and layout."""
    if isinstance(action, Convert):
        made = [(action.value, action.target)]
    elif isinstance(action, Lower):
        made = [(name, action.layouts.get(name, PLAIN)) for name in action.region.outputs]
    else:
        made = [(action.output, action.made)]
    return [(stored(name, layout), name, layout) for name, layout in made]


def _read_values(action: Action) -> list[tuple[str, str, Layout]]:
    """The buffers that an action reads: buffer, value and layout."""
    if isinstance(action, Lower):
        read = [(name, action.layouts.get(name, PLAIN)) for name in action.region.inputs]
    elif isinstance(action, Convert):
        read = [(action.value, action.source)]
    else:
        read = [(action.region.inputs[0], action.layout)]
    return [(stored(name, layout), name, layout) for name, layout in read]


def _small(action: Action, small: Mapping[str, Region]) -> Action:
    if isinstance(action, Lower):
        return Lower(small[action.region.name], action.family, action.layouts)
    return action


def _turns(actions: Sequence[Action], slices: Slices, later: set[str], types: Mapping[str, TensorType]) -> Turns:
    made = {buffer: (name, layout) for action in actions for buffer, name, layout in _writes(action)}
    read = {buffer: (name, layout) for action in actions for buffer, name, layout in _read_values(action)}
    inputs = tuple(buffer for buffer in read if buffer not in made)
    outputs = tuple(buffer for buffer in made if buffer in later)
    sliced = types_of(types, slices.values, slices.images)
    border = {buffer: read[buffer] for buffer in inputs} | {buffer: made[buffer] for buffer in outputs}
    parts = {buffer: nbytes(sliced[name], layout) for buffer, (name, layout) in border.items() if name in slices.values}
    sizes = {buffer: nbytes(types[made[buffer][0]], made[buffer][1]) for buffer in outputs}
    return Turns(slices.turns, tuple(actions), sliced, inputs, outputs, parts, sizes)
