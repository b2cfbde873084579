"""The layout of every value of a partition: what has to be done for the regions, each with chosen layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import PLAIN, Family, Layout

VIEW = "view"
"""Anchor of a region that only names the same elements differently (Reshape, Squeeze, Flatten ...)."""


@dataclass(frozen=True)
class Option:
    """One way to compute a region, with the layouts of its inputs and outputs; a view has no family.

    ``seconds`` are modelled, on one core, conversions not included.
    """

    region: Region
    family: Family | None
    layouts: Mapping[str, Layout]
    seconds: float = 0.0

    def layout(self, name: str) -> Layout:
        """The layout of an input or output."""
        return self.layouts.get(name, PLAIN)


@dataclass(frozen=True)
class Lower:
    """Lower a region with these layouts of its inputs and outputs."""

    region: Region
    family: Family
    layouts: Mapping[str, Layout]


@dataclass(frozen=True)
class Convert:
    """Bring a value from one layout into another."""

    value: str
    source: Layout
    target: Layout


@dataclass(frozen=True)
class View:
    """A region whose output, in layout `made`, has the bytes of its input in `layout` (buffer `source`)."""

    region: Region
    source: str
    output: str
    layout: Layout
    made: Layout


Action: TypeAlias = Lower | Convert | View


@dataclass(frozen=True)
class Turns:
    """Actions that are executed `count` times, each time for one slice of the batch.

    ``types`` are those of one slice. ``inputs`` and ``outputs`` are the buffers that actions outside make and read;
    ``parts`` gives, of those that hold the whole batch, the bytes of one slice, and ``sizes`` what each of the outputs
    takes as a whole.
    """

    count: int
    actions: tuple[Action, ...]
    types: Mapping[str, TensorType]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parts: Mapping[str, int]
    sizes: Mapping[str, int]


Program: TypeAlias = Sequence[Action | Turns]


def lowered(program: Program) -> list[Lower]:
    """All regions that kernels compute, those of loops for one turn."""
    inner = [each for action in program for each in (action.actions if isinstance(action, Turns) else (action,))]
    return [action for action in inner if isinstance(action, Lower)]


def stored(value: str, layout: Layout) -> str:
    """Name of the buffer that holds `value` in `layout`."""
    return value if layout == PLAIN else f"{value}@{layout.block}"


def same_bytes(type_: TensorType, source: Layout, target: Layout) -> bool:
    """Whether the buffer of a value in layout `source` begins with what it is in `target`: of one pixel, and whole
    blocks of channels, or one vector of channels whose padding is not needed."""
    if source == target:
        return True
    if len(type_.shape) < 2 or any(n != 1 for n in type_.shape[2:]):
        return False
    whole = all(type_.shape[1] % layout.block == 0 for layout in (source, target) if layout.block)
    return whole or (target == PLAIN and type_.shape[0] == 1)


def view_layouts(region: Region, types: Mapping[str, TensorType], block: int) -> list[dict[str, Layout]]:
    """The layouts in which a view costs nothing: plain, blocked where it keeps batch and channels, and from blocked to
    plain where both are the same bytes."""
    source, output = region.inputs[0], region.outputs[0]
    before, after = types[source], types[output]
    found = [{source: PLAIN, output: PLAIN}]
    if len(before.shape) < 2:
        return found
    blocked = Layout(block)
    if len(before.shape) > 2 and len(after.shape) > 2 and before.shape[:2] == after.shape[:2]:
        found.append({source: blocked, output: blocked})
    if len(before.shape) > 2 and same_bytes(before, blocked, PLAIN):
        found.append({source: blocked, output: PLAIN})
    return found


def actions_of(options: Sequence[Option], inputs: Sequence[str], outputs: Sequence[str]) -> list[Action]:
    """What is to be done, in order. Border values are plain; each conversion is done once, where it is first needed."""
    actions: list[Action] = []
    # The layouts in which a value is there; the first is the one it was made in.
    available: dict[str, list[Layout]] = {name: [PLAIN] for name in inputs}

    def need(name: str, layout: Layout) -> None:
        have = available[name]
        if layout not in have:
            actions.append(Convert(name, have[0], layout))
            have.append(layout)

    for option in options:
        region = option.region
        for name in region.inputs:
            need(name, option.layout(name))
        if option.family is None:
            source, output = region.inputs[0], region.outputs[0]
            before = option.layout(source)
            actions.append(View(region, stored(source, before), output, before, option.layout(output)))
        else:
            actions.append(Lower(region, option.family, option.layouts))
        for name in region.outputs:
            available[name] = [option.layout(name)]
    for name in outputs:
        need(name, PLAIN)
    return actions
