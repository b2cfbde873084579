"""Layouts and ways chosen over a whole partition: the least sum of what kernels and conversions are modelled to cost.

Each region has a few options (`options`); a value that is read in another layout than it is made in is converted once,
for all its readers. Where conversions are left, regions may also be computed in other ways that want other layouts. The
sum is minimised by bucket elimination (`partition.labelling`): exact where the graph is narrow, which is nearly always;
else the best of that guess and of the greedy walk, improved one region at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from math import inf

import numpy as np

from nestc.graph.region import TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Family, Layout
from nestc.partition.labelling import Factor, minimise
from nestc.targets.cpu.cost import conversion_seconds
from nestc.targets.cpu.layout import Option, same_bytes
from nestc.targets.cpu.options import Memo, Pair, all_options, greedy_options, joint_options
from nestc.targets.cpu.ways import Way, distinct_ways

_SAME = 1e-9
"""Relative difference below which two sums count as equal: the greedy choice is kept."""

_ROUNDS = 20
"""Of the local search at most: each goes over all regions."""


@dataclass(frozen=True)
class Assignment:
    """The chosen option of each region, and what they are modelled to cost with their conversions, in seconds.

    ``optimal``: nothing else costs less by this model. The same numbers are given of the greedy walk. ``other_ways``:
    regions that are computed in another way than they would be alone.
    """

    options: tuple[Option, ...]
    seconds: float
    conversions: int
    greedy_seconds: float
    greedy_conversions: int
    optimal: bool
    other_ways: int = 0

    def report(self) -> dict[str, float | int | bool]:
        """What to tell of it, as JSON values; seconds are modelled."""
        return {
            "conversions": self.conversions,
            "modelled_seconds": self.seconds,
            "greedy_conversions": self.greedy_conversions,
            "greedy_modelled_seconds": self.greedy_seconds,
            "optimal": self.optimal,
            "other_ways": self.other_ways,
        }


def assign(
    pairs: Sequence[Pair],
    inputs: Sequence[str],
    outputs: Sequence[str],
    types: Mapping[str, TensorType],
    machine: CpuMachine,
    others: Mapping[str, Sequence[Family]] | None = None,
) -> Assignment:
    """Choose the layouts of all values; those of `inputs` and `outputs` are plain.

    `others` gives, by the name of a region, the families that could compute it instead of the one in `pairs`; one of
    them is taken where that saves more conversions than it costs.
    """
    greedy = greedy_options(pairs, inputs, types, machine)
    memo: Memo = {}
    options = all_options(pairs, inputs, types, machine, greedy, memo)
    alone = cheapest(options, inputs, outputs, types)
    # Each region alone is computed in the way that costs least, so another one can save conversions only.
    reach = alone.seconds - sum(option.seconds for option in alone.options)
    if not others or reach <= _SAME * alone.seconds:
        return alone
    ways: dict[str, Sequence[Way]] = {}
    for region, family in pairs:
        more = others.get(region.name, ())
        if family is None or not more:
            continue
        block = Layout(machine.lanes("float32"))
        deep = [types[name] for name in (*region.inputs, *region.outputs) if len(types[name].shape) > 2]
        near = 2 * sum(conversion_seconds(type_, PLAIN, block) for type_ in deep)
        found = distinct_ways(region, family, more, machine, min(reach, near))
        if len(found) > 1:
            ways[region.name] = found
    if not ways:
        return alone
    start = [_place(each, known) for each, known in zip(alone.options, options, strict=True)]
    joint = cheapest(joint_options(pairs, inputs, types, machine, options, ways, memo), inputs, outputs, types, start)
    taken = sum(option.family is not family for option, (_, family) in zip(joint.options, pairs, strict=True))
    return replace(joint, other_ways=taken) if taken else alone


def _place(option: Option, options: Sequence[Option]) -> int:
    return next(number for number, each in enumerate(options) if each is option)


def cheapest(
    options: Sequence[Sequence[Option]],
    inputs: Sequence[str],
    outputs: Sequence[str],
    types: Mapping[str, TensorType],
    start: Sequence[int] | None = None,
) -> Assignment:
    """The options, one of each region's, that cost least together; the first of each are the greedy ones.

    Those numbered `start` (the greedy ones) are kept where nothing costs less.
    """
    problem = _Problem(options, inputs, outputs, types)
    greedy = [0] * len(options)
    kept = greedy if start is None else list(start)
    least, optimal = problem.total(kept), True
    best = kept
    if any(len(each) > 1 for each in options):
        sizes, factors = problem.factors()
        found = minimise(sizes, factors)
        best, optimal = found.labels[: len(options)], found.exact
        if not optimal:
            best = min((problem.improved(each) for each in (kept, best)), key=problem.total)
        if problem.total(best) >= least * (1 - _SAME):
            best = kept
    return Assignment(
        tuple(each[label] for each, label in zip(options, best, strict=True)),
        problem.total(best),
        len(problem.conversions(best)),
        problem.total(greedy),
        len(problem.conversions(greedy)),
        optimal,
    )


class _Problem:
    def __init__(
        self,
        options: Sequence[Sequence[Option]],
        inputs: Sequence[str],
        outputs: Sequence[str],
        types: Mapping[str, TensorType],
    ) -> None:
        self.options = options
        self.types = types
        self.outputs = frozenset(outputs)
        self.maker: dict[str, int | None] = dict.fromkeys(inputs)
        self.readers: dict[str, list[int]] = {name: [] for name in outputs}
        for number, each in enumerate(options):
            region = each[0].region
            self.maker.update(dict.fromkeys(region.outputs, number))
            for name in region.inputs:
                self.readers.setdefault(name, []).append(number)
        self._costs: dict[tuple[str, Layout, Layout], float] = {}

    def cost(self, name: str, source: Layout, target: Layout) -> float:
        """Modelled seconds of a conversion; nothing where the bytes are the same."""
        if source == target or same_bytes(self.types[name], source, target):
            return 0.0
        key = name, source, target
        if key not in self._costs:
            self._costs[key] = conversion_seconds(self.types[name], source, target)
        return self._costs[key]

    def made(self, name: str, labels: Sequence[int]) -> Layout:
        maker = self.maker[name]
        return PLAIN if maker is None else self.options[maker][labels[maker]].layout(name)

    def needed(self, name: str, labels: Sequence[int]) -> set[Layout]:
        found = {self.options[reader][labels[reader]].layout(name) for reader in self.readers[name]}
        return found | {PLAIN} if name in self.outputs else found

    def of_value(self, name: str, labels: Sequence[int]) -> float:
        made = self.made(name, labels)
        return sum(self.cost(name, made, each) for each in self.needed(name, labels))

    def total(self, labels: Sequence[int]) -> float:
        """Modelled seconds of all kernels and conversions."""
        kernels = sum(each[label].seconds for each, label in zip(self.options, labels, strict=True))
        return kernels + sum(self.of_value(name, labels) for name in self.readers)

    def conversions(self, labels: Sequence[int]) -> list[tuple[str, Layout]]:
        """The conversions that take time."""
        return [
            (name, each)
            for name in self.readers
            for each in self.needed(name, labels)
            if self.cost(name, self.made(name, labels), each) > 0
        ]

    def factors(self) -> tuple[list[int], list[Factor]]:
        """The same sum as tables over one variable for each region, and over one for each value with several readers:
        the layouts in which it is there."""
        sizes = [len(each) for each in self.options]
        factors = [
            Factor((number,), np.array([option.seconds for option in each])) for number, each in enumerate(self.options)
        ]
        for name, readers in self.readers.items():
            maker = self.maker[name]
            around = list(dict.fromkeys(([] if maker is None else [maker]) + readers))
            used = {option.layout(name) for number in around for option in self.options[number]}
            if maker is None or name in self.outputs:
                used.add(PLAIN)
            if len(used) == 1:
                continue
            if len(around) <= 2:
                factors.append(self.direct(name, sorted(around), sizes))
                continue
            states = [frozenset(each) for each in _nonempty(sorted(used, key=lambda layout: layout.block))]
            there = len(sizes)
            sizes.append(len(states))
            if maker is None:
                factors.append(Factor((there,), np.array([self.to_all(name, PLAIN, each) for each in states])))
            else:
                table = [[self.to_all(name, o.layout(name), s) for s in states] for o in self.options[maker]]
                factors.append(Factor((maker, there), np.array(table)))
            if name in self.outputs:
                factors.append(Factor((there,), np.array([0.0 if PLAIN in each else inf for each in states])))
            for reader in dict.fromkeys(readers):
                table = [[0.0 if o.layout(name) in s else inf for s in states] for o in self.options[reader]]
                factors.append(Factor((reader, there), np.array(table)))
        return sizes, factors

    def direct(self, name: str, around: Sequence[int], sizes: Sequence[int]) -> Factor:
        """What the conversions of a value cost, over the one or two regions that make and read it."""
        table = np.zeros([sizes[number] for number in around])
        labels = [0] * len(self.options)
        for place in np.ndindex(*table.shape):
            for number, label in zip(around, place, strict=True):
                labels[number] = label
            table[place] = self.of_value(name, labels)
        return Factor(tuple(around), table)

    def to_all(self, name: str, made: Layout, state: frozenset[Layout]) -> float:
        """What it costs to have a value in some layouts; infinite if they lack the one it is made in."""
        return sum(self.cost(name, made, each) for each in sorted(state, key=hash)) if made in state else inf

    def improved(self, labels: Sequence[int]) -> list[int]:
        """Labels that no change of one region alone makes better."""
        best = list(labels)
        for _ in range(_ROUNDS):
            before = list(best)
            for number, each in enumerate(self.options):
                if len(each) > 1:
                    best[number] = min(range(len(each)), key=lambda label: self.around(number, label, best))
            if best == before:
                break
        return best

    def around(self, number: int, label: int, labels: Sequence[int]) -> float:
        """The part of the sum that the choice for one region changes."""
        changed = list(labels)
        changed[number] = label
        region = self.options[number][0].region
        values = dict.fromkeys((*region.inputs, *(name for name in region.outputs if name in self.readers)))
        return self.options[number][label].seconds + sum(self.of_value(name, changed) for name in values)


def _nonempty(layouts: Sequence[Layout]) -> list[tuple[Layout, ...]]:
    return list(chain.from_iterable(combinations(layouts, count) for count in range(1, len(layouts) + 1)))
