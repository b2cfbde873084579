"""Dynamic programming over hubs: the state is the hub's unit, a step is a segment between two units.

Time before and after the stage of a hub adds up (`segments.hubs`), and a stage that goes over several hubs contains
all between them, so the best of the whole is the shortest path over the least times of segments. Those are found
lazily: a step begins with a quick lower bound and is only solved when it lies on the shortest path.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nestc.partition import bounds, cpsat, latency, pipeline
from nestc.partition.branch import Found
from nestc.partition.heft import by_rank
from nestc.partition.labelling import Array
from nestc.partition.network import Group, Network
from nestc.partition.segments import Segment, segments

FEW = 4
"""Tasks up to which a segment is solved as quickly as it is bounded by loads."""

PATIENCE = 0.5
"""Seconds for a segment at first, before others have been tried."""


@dataclass
class Steps:
    """A segment's least times by (unit of head, unit of tail): bounds from below and above, and the stages found.

    Axes without a hub have one entry. ``weights`` of the resources that bound its load well, and units of its tasks
    that balance them, to begin with.
    """

    network: Network
    head: bool
    tail: bool
    below: Array
    above: Array
    weights: list[tuple[float, ...]]
    balanced: list[list[int]]
    groups: dict[tuple[int, int], tuple[Group, ...]] = field(default_factory=dict[tuple[int, int], tuple[Group, ...]])

    def gap(self, pair: tuple[int, int]) -> float:
        """How far the bounds of a pair are apart."""
        return float(self.above[pair] - self.below[pair])

    def solve(self, pair: tuple[int, int], seconds: float) -> None:
        """Find the least time of one pair; in no time at all, some time."""
        last = len(self.network.tasks) - 1
        held: dict[int, int] = {}
        if self.head:
            held[0] = pair[0]
        if self.tail:
            held[last] = pair[1]
        network = self.network.only(held)
        # The stage of the head is launched in the segment before.
        launched = network.launch[pair[0]] if self.head else 0.0
        first = [allowed[0] for allowed in network.allowed]
        likely = [[held.get(task, unit) for task, unit in enumerate(units)] for units in self.balanced]
        middle = [
            [unit if unit in allowed else allowed[0] for allowed in network.allowed] for unit in set(held.values())
        ]
        ranked = [by_rank(network)] if last >= FEW else []
        groups, least = latency.cheapest(network, [first, *likely, *middle, *ranked], 0)
        if self.above[pair] + launched < least:
            groups, least = self.groups[pair], float(self.above[pair]) + launched
        start = Found(groups, least, min(self.below[pair] + launched, least))
        if seconds > 0:
            start = latency.whole(network, start, weights=self.weights, serial=tuple(held), seconds=seconds)
        self.below[pair] = max(self.below[pair], (start.latency if start.exact else start.bound) - launched)
        self.above[pair] = start.latency - launched
        self.groups[pair] = start.groups


def solve(network: Network, hubs: Sequence[int], *, seconds: float) -> Found:
    """The least latency over hubs. What passes over hubs is left out of the bound (see `segments`).

    The latency returned is the sum over segments; the caller times the stages as a whole.
    """
    deadline = time.thread_time() + seconds
    parts = segments(network, hubs)
    tables: dict[tuple[object, ...], Steps] = {}
    steps: list[Steps] = []
    for part in parts:
        key = part.head, part.tail, part.network.key
        if key not in tables:
            tables[key] = _steps(part)
        steps.append(tables[key])
    spent: dict[tuple[int, tuple[int, int]], float] = {}
    while True:
        path, bound = _shortest([table.below for table in steps])
        _, total = _shortest([table.above for table in steps])
        if total * (1 - 1e-9) <= bound:
            break
        # Of the steps on the path those not solved yet; if all are, those whose bounds are apart, with more patience.
        places = {(id(table), pair): table for table, pair in zip(steps, path, strict=True)}
        todo = [key for key, table in places.items() if key[1] not in table.groups]
        left = deadline - time.thread_time()
        if not todo:
            todo = [key for key, table in places.items() if table.gap(key[1]) > 1e-9 * bound]
            if left <= 0 or not todo:
                break
        for key in todo:
            left = deadline - time.thread_time()
            spent[key] = 4 * spent[key] if key in spent else PATIENCE
            places[key].solve(key[1], max(min(spent[key], left), 0.0))
    chosen, total = _shortest([table.above for table in steps])
    groups = joined(parts, [table.groups[pair] for table, pair in zip(steps, chosen, strict=True)])
    return Found(groups, total, min(bound, total))


def _steps(part: Segment) -> Steps:
    network = part.network
    units = len(network.units)
    last = len(network.tasks) - 1
    paths = bounds.along_paths(network)
    launch = np.array(network.launch) if part.head else np.zeros(units)
    table = paths[last] if part.tail else np.full((units, units), latency.longest(paths, network))
    if part.head and not part.tail:
        table = np.stack(
            [np.full(units, latency.longest([p[unit : unit + 1] for p in paths], network)) for unit in range(units)]
        )
    serial = [task for task, hub in ((0, part.head), (last, part.tail)) if hub]
    weights: list[tuple[float, ...]] = []
    balanced: list[list[int]] = []
    if last >= FEW:
        # In large segments each round takes long, and exact methods have no use for weights.
        large = last >= cpsat.TASKS
        balanced, _, best = pipeline.spread(network, serial, rounds=4 if large else 16)
        weights = [tuple(best), *([] if large else bounds.weights(network.resources))]
        table = np.maximum(table, bounds.least_load(network, weights, serial, (0, last)))
    table = table - launch[:, None]
    if not part.head:
        table = table.min(axis=0, keepdims=True)
    if not part.tail:
        table = table.min(axis=1, keepdims=True)
    return Steps(network, part.head, part.tail, table, np.full(table.shape, np.inf), weights, balanced)


def _shortest(tables: Sequence[Array]) -> tuple[list[tuple[int, int]], float]:
    # The path through a row of tables, and its length.
    reached = np.zeros(tables[0].shape[0])
    back: list[Array] = []
    for table in tables:
        total = reached[:, None] + table
        back.append(total.argmin(axis=0).astype(np.float64))
        reached = total.min(axis=0)
    at = int(reached.argmin())
    length = float(reached[at])
    path: list[tuple[int, int]] = []
    for row in reversed(back):
        before = int(row[at])
        path.append((before, at))
        at = before
    return path[::-1], length


def joined(parts: Sequence[Segment], found: Sequence[tuple[Group, ...]]) -> tuple[Group, ...]:
    """Stages of segments as stages of the whole: the two of a hub, in the segment before and after it, are one."""
    groups: list[Group] = []
    for part, local in zip(parts, found, strict=True):
        mapped = [(unit, tuple(part.members[task] for task in tasks)) for unit, tasks in local]
        if part.head:
            # The hub's stage is the last before and the first after: everything else comes before, or after, it.
            unit, tasks = groups.pop()
            assert unit == mapped[0][0]
            mapped[0] = unit, tuple(sorted({*tasks, *mapped[0][1]}))
        groups += mapped
    return tuple(groups)
