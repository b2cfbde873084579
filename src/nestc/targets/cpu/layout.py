"""The layout of every value of a partition: blocked values stay blocked from kernel to kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Family, Layout

VIEW = "view"
"""Anchor of a region that only names the same elements differently (Reshape, Squeeze, Flatten ...)."""


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
    """A region whose output has the bytes of its input (which is then plain, or as good as plain)."""

    region: Region
    source: str
    output: str
    layout: Layout


Action = Lower | Convert | View


def stored(value: str, layout: Layout) -> str:
    """Name of the buffer that holds `value` in `layout`."""
    return value if layout == PLAIN else f"{value}@{layout.block}"


def same_bytes(type_: TensorType, a: Layout, b: Layout) -> bool:
    """Whether a value lies byte for byte equal in both layouts: one pixel, and whole blocks of channels."""
    if a == b:
        return True
    if len(type_.shape) < 2 or any(n != 1 for n in type_.shape[2:]):
        return False
    blocks = [layout.block for layout in (a, b) if layout.block]
    return all(type_.shape[1] % block == 0 for block in blocks)


def plan_layouts(
    regions: Sequence[tuple[Region, Family | None]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    types: Mapping[str, TensorType],
    machine: CpuMachine,
) -> list[Action]:
    """Actions in order. Border values are plain; each conversion is done once, where it is first needed."""
    return _Planner(types, machine).run(regions, inputs, outputs)


class _Planner:
    def __init__(self, types: Mapping[str, TensorType], machine: CpuMachine) -> None:
        self.types = types
        self.machine = machine
        self.actions: list[Action] = []
        # The layouts in which a value is there; the first is the one it was made in.
        self.available: dict[str, list[Layout]] = {}

    def run(
        self, regions: Sequence[tuple[Region, Family | None]], inputs: Sequence[str], outputs: Sequence[str]
    ) -> list[Action]:
        for name in inputs:
            self.available[name] = [PLAIN]
        for region, family in regions:
            if family is None:
                self.view(region)
                continue
            incoming = {name: self.available[name][-1] for name in region.inputs}
            layouts = family.layouts(region, self.machine, incoming)
            for name in region.inputs:
                self.need(name, layouts.get(name, PLAIN))
            self.actions.append(Lower(region, family, layouts))
            for name in region.outputs:
                self.available[name] = [layouts.get(name, PLAIN)]
        for name in outputs:
            self.need(name, PLAIN)
        return self.actions

    def need(self, name: str, layout: Layout) -> None:
        have = self.available[name]
        if layout in have:
            return
        self.actions.append(Convert(name, have[0], layout))
        have.append(layout)

    def view(self, region: Region) -> None:
        """A view of a blocked value works if its bytes are those of the plain one; otherwise it is converted first."""
        source, output = region.inputs[0], region.outputs[0]
        if not any(same_bytes(self.types[source], layout, PLAIN) for layout in self.available[source]):
            self.need(source, PLAIN)
        layout = next(each for each in self.available[source] if same_bytes(self.types[source], each, PLAIN))
        self.actions.append(View(region, stored(source, layout), output, layout))
        self.available[output] = [PLAIN]
