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

from nestc.partition import bounds, latency
from nestc.partition.branch import Found
from nestc.partition.labelling import Array
from nestc.partition.network import Group, Network
from nestc.partition.segments import Segment, segments


@dataclass
class Steps:
    """A segment's least times by (unit of head, unit of tail): bounds from below and above, and the stages found.

    Axes without a hub have one entry.
    """

    network: Network
    head: bool
    tail: bool
    below: Array
    above: Array
    groups: dict[tuple[int, int], tuple[Group, ...]] = field(default_factory=dict[tuple[int, int], tuple[Group, ...]])

    def solve(self, pair: tuple[int, int], seconds: float) -> None:
        """Find the least time of one pair."""
        held: dict[int, int] = {}
        if self.head:
            held[0] = pair[0]
        if self.tail:
            held[len(self.network.tasks) - 1] = pair[1]
        network = self.network.only(held)
        # The stage of the head is launched in the segment before.
        launched = network.launch[pair[0]] if self.head else 0.0
        if len(network.tasks) <= 4:
            start = _first(network)
        else:
            start = latency.known(network, serial=tuple(held))
        start = Found(start.groups, start.latency, min(max(start.bound, self.below[pair] + launched), start.latency))
        found = latency.whole(network, start, serial=tuple(held), seconds=seconds)
        bound = found.latency if found.exact else found.bound
        self.below[pair] = max(self.below[pair], bound - launched)
        self.above[pair] = found.latency - launched
        self.groups[pair] = found.groups


def _first(network: Network) -> Found:
    # Something to begin with, for networks so small that branch and bound is done at once.
    units = [allowed[0] for allowed in network.allowed]
    groups, least = latency.cheapest(network, [units], 0)
    return Found(groups, least, 0.0)


def solve(network: Network, hubs: Sequence[int], *, seconds: float) -> Found:
    """The least latency over hubs. What passes over hubs is left out of the bound (see `segments`).

    The latency returned is the sum over segments; the caller times the stages as a whole.
    """
    deadline = time.monotonic() + seconds
    parts = segments(network, hubs)
    tables: dict[tuple[object, ...], Steps] = {}
    steps: list[Steps] = []
    for part in parts:
        key = part.head, part.tail, part.network.key
        if key not in tables:
            tables[key] = _steps(part)
        steps.append(tables[key])
    large = sum(len(table.network.tasks) > latency.SMALL for table in tables.values())
    share = seconds / 2 / max(3 * large, 1)
    while True:
        path, bound = _shortest([table.below for table in steps])
        open_pairs = {
            (id(table), pair): table for table, pair in zip(steps, path, strict=True) if pair not in table.groups
        }
        if not open_pairs:
            break
        for (_, pair), table in open_pairs.items():
            left = deadline - time.monotonic()
            table.solve(pair, min(share, left) if left > 0 else 0.0)
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
    if last > 1 or not part.tail:
        keep = (0, last) if last else (0,)
        load = bounds.least_load(network, bounds.weights(network.resources), serial, keep)
        table = np.maximum(table, load if last else np.diag(load) + np.where(np.eye(units) > 0, 0.0, np.inf))
    table = table - launch[:, None]
    if not part.head:
        table = table.min(axis=0, keepdims=True)
    if not part.tail:
        table = table.min(axis=1, keepdims=True)
    return Steps(network, part.head, part.tail, table, np.full(table.shape, np.inf))


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
