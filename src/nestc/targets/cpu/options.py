"""The layouts that each region of a partition could be computed in, and what they are modelled to cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from nestc.graph.region import Region, TensorType
from nestc.kernels import generic
from nestc.kernels.api import PLAIN, CpuMachine, Family, Layout
from nestc.targets.cpu.address import addressable
from nestc.targets.cpu.cost import layout_seconds, seconds
from nestc.targets.cpu.layout import Option, view_layouts
from nestc.targets.cpu.ways import Way

Pair = tuple[Region, Family | None]
"""A region with the family that computes it; None for a view."""

_COMBINATIONS = 8
"""Combinations of input layouts of one region that a family is asked about."""

_GENERIC = frozenset({"generic", "moves"})


def greedy_options(
    pairs: Sequence[Pair], inputs: Sequence[str], types: Mapping[str, TensorType], machine: CpuMachine
) -> list[Option]:
    """What a walk over the regions takes, where each answers to the layouts in which its inputs are made."""
    block = machine.lanes("float32")
    last: dict[str, Layout] = dict.fromkeys(inputs, PLAIN)
    made = dict(last)
    found: list[Option] = []
    for region, family in pairs:
        if family is None:
            source, output = region.inputs[0], region.outputs[0]
            known = {last[source], made[source]}
            free = [each for each in view_layouts(region, types, block) if each[source] in known]
            layouts: Mapping[str, Layout] = next(
                (each for each in free if each[output] == PLAIN), {source: PLAIN, output: PLAIN}
            )
        else:
            layouts = _full(region, family.layouts(region, machine, {name: last[name] for name in region.inputs}))
        last.update(layouts)
        made.update({name: layouts[name] for name in region.outputs})
        found.append(Option(region, family, layouts))
    return found


Memo: TypeAlias = "dict[tuple[str, tuple[str, ...], tuple[str, ...]], list[Option]]"
"""The options of a region by its name, the inputs that may be had in blocks, and the outputs that are wanted so."""


def all_options(
    pairs: Sequence[Pair],
    inputs: Sequence[str],
    types: Mapping[str, TensorType],
    machine: CpuMachine,
    greedy: Sequence[Option],
    memo: Memo | None = None,
) -> list[list[Option]]:
    """The options of each region, those of `greedy` first, with their modelled seconds. `memo` is filled."""
    return _Options(types, machine, {}, {} if memo is None else memo).run(pairs, inputs, greedy)


def joint_options(
    pairs: Sequence[Pair],
    inputs: Sequence[str],
    types: Mapping[str, TensorType],
    machine: CpuMachine,
    alone: Sequence[Sequence[Option]],
    ways: Mapping[str, Sequence[Way]],
    memo: Memo,
) -> list[list[Option]]:
    """The options `alone`, in their order, and behind them those of other `ways` to compute the regions of these names,
    and what the others then could have in other layouts. The first way of each is that of `pairs`; `memo` is what
    `all_options` has filled."""
    found = _Options(types, machine, ways, memo).run(pairs, inputs, [each[0] for each in alone])
    result: list[list[Option]] = []
    for before, after in zip(alone, found, strict=True):
        known = [(option.family, option.layouts) for option in before]
        of_region = ways.get(before[0].region.name)
        same = before if of_region is None else [replace(each, seconds=of_region[0].seconds) for each in before]
        result.append([*same, *(each for each in after if (each.family, each.layouts) not in known)])
    return result


def _full(region: Region, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    return {name: layouts.get(name, PLAIN) for name in (*region.inputs, *region.outputs)}


class _Options:
    def __init__(
        self, types: Mapping[str, TensorType], machine: CpuMachine, ways: Mapping[str, Sequence[Way]], memo: Memo
    ) -> None:
        self.types = types
        self.ways = ways
        self.memo = memo
        self.machine = machine
        self.block = machine.lanes("float32")
        self.wanted: set[str] = set()  # values that somebody downstream wants in blocks
        self.blocked: set[str] = set()  # values that may be had in blocks

    def run(self, pairs: Sequence[Pair], inputs: Sequence[str], greedy: Sequence[Option]) -> list[list[Option]]:
        if self.block > 1:
            for region, family in reversed(pairs):
                self.want(region, family)
                for way in self.others(region):
                    self.want(region, way.family)
        self.blocked.update(name for name in inputs if name in self.wanted)
        found: list[list[Option]] = []
        for (region, family), first in zip(pairs, greedy, strict=True):
            state = region.name, tuple(self.open(region)), tuple(self.asked(region))
            if state not in self.memo:
                self.memo[state] = self.priced(region, family, self.layouts(region, family, first.layouts))
            options = list(self.memo[state])
            for way in self.others(region):
                options += [
                    Option(region, way.family, each, way.seconds) for each in self.layouts(region, way.family, None)
                ]
            self.blocked.update(name for each in options for name in region.outputs if each.layout(name).block)
            self.blocked.update(name for name in region.outputs if name in self.wanted)
            found.append(options)
        return found

    def open(self, region: Region) -> list[str]:
        """Inputs that may be had in blocks."""
        return [name for name in region.inputs if name in self.blocked and self.deep(name)]

    def asked(self, region: Region) -> list[str]:
        """Outputs that somebody wants in blocks."""
        return [name for name in region.outputs if name in self.wanted and self.deep(name)]

    def others(self, region: Region) -> Sequence[Way]:
        """The ways beside the first one."""
        return self.ways.get(region.name, ())[1:]

    def deep(self, name: str) -> bool:
        """Whether a value has channels and places."""
        shape = self.types[name].shape
        return len(shape) > 2 and 0 not in shape

    def want(self, region: Region, family: Family | None) -> None:
        """Note which inputs are wanted in blocks, by this region or by those after it."""
        block = Layout(self.block)
        asked = [name for name in region.outputs if name in self.wanted]
        if family is None:
            source = region.inputs[0]
            keeps = any(each[source].block and each[region.outputs[0]].block for each in self.views(region))
            if asked and keeps:
                self.wanted.add(source)
            return
        if not any(map(self.deep, region.inputs)):
            return
        if family.name in _GENERIC:
            if not asked:
                return
            incoming = {name: block if self.deep(name) else PLAIN for name in region.inputs}
            kept = generic.blocked_layouts(region, self.block, incoming) or {}
            self.wanted.update(name for name in region.inputs if kept.get(name, PLAIN).block)
            return
        answer = family.layouts(region, self.machine, dict.fromkeys(region.inputs, PLAIN))
        self.wanted.update(name for name in region.inputs if answer.get(name, PLAIN).block)
        if asked:
            answer = family.layouts(
                region, self.machine, {name: block if self.deep(name) else PLAIN for name in region.inputs}
            )
            self.wanted.update(name for name in region.inputs if answer.get(name, PLAIN).block)

    def views(self, region: Region) -> list[dict[str, Layout]]:
        return view_layouts(region, self.types, self.block)

    def layouts(
        self, region: Region, family: Family | None, first: Mapping[str, Layout] | None
    ) -> list[dict[str, Layout]]:
        """Every choice of layouts, the first one first, if there is one."""
        found = [] if first is None else [dict(first)]
        if self.block == 1:
            return found
        block = Layout(self.block)
        open_ = self.open(region)
        if family is None:
            found += [each for each in self.views(region) if not each[region.inputs[0]].block or open_]
        elif family.name in _GENERIC:
            asked = self.asked(region)
            if open_ or asked:
                found += generic.layout_options(region, self.block, open_, asked)
        else:
            for some in _subsets(open_):
                incoming = {name: block if name in some else PLAIN for name in region.inputs}
                found.append(_full(region, family.layouts(region, self.machine, incoming)))
        return [each for number, each in enumerate(found) if each not in found[:number]]

    def priced(self, region: Region, family: Family | None, layouts: Sequence[dict[str, Layout]]) -> list[Option]:
        if family is None:
            return [Option(region, None, each) for each in layouts]
        base = seconds(region)
        if len(layouts) == 1:
            took = 0.0 if addressable(region, layouts[0], self.types) else base
            return [Option(region, family, layouts[0], took)]
        return [
            Option(
                region,
                family,
                each,
                0.0
                if addressable(region, each, self.types)
                else layout_seconds(region, family.name, each, self.machine, base),
            )
            for each in layouts
        ]


def _subsets(names: Sequence[str]) -> list[set[str]]:
    """Subsets of a few names: all of them, else all at once, none, and each alone."""
    if 2 ** len(names) <= _COMBINATIONS:
        chosen = itertools.product((True, False), repeat=len(names))
        return [{name for name, taken in zip(names, each, strict=True) if taken} for each in chosen]
    return [set(names), set(), *({name} for name in names[: _COMBINATIONS - 2])]


__all__ = ["Pair", "all_options", "greedy_options", "joint_options"]
