"""Where a network can be cut: hubs, through which everything passes, and the segments between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nestc.partition.network import Border, Link, Network

PART = 8
"""Tasks from one hub to the next that are worth cutting further although tensors pass over the cut."""


@dataclass(frozen=True)
class Segment:
    """The tasks (ascending) from one hub to the next, both included, as a network of their own.

    ``head`` and ``tail`` say whether the first and the last task is a hub. The head costs nothing here (it is counted
    in the segment that it ends); what leaves the tail is counted in the segment that it begins.
    """

    members: tuple[int, ...]
    head: bool
    tail: bool
    network: Network


def hubs(network: Network) -> list[int]:
    """Tasks, ascending, that come before or after every other task, and where the network is cut.

    When the stage of such a task begins, everything before it that is not in this stage has ended, and nothing after
    it can begin before the stage has ended: all tasks before are its ancestors, all after its descendants. So time
    before and after adds up. Those that no tensor passes over are taken, and where these leave parts of more than
    `PART` tasks some that few tensors pass over.
    """
    count = len(network.tasks)
    passing = _passing(network.links, count)
    found: list[int] = []
    weak: list[int] = []
    for task in [*comparable(network), count]:
        if task < count and passing[task]:
            weak.append(task)
            continue
        last = found[-1] if found else -1
        while task - last > PART and weak:
            near = [each for each in weak if each - last <= PART and 2 * (each - last) > PART] or weak[:1]
            last = min(near, key=lambda each: (passing[each], -each))
            found.append(last)
            weak = [each for each in weak if each > last]
        if task < count:
            found.append(task)
        weak = []
    return found


def comparable(network: Network) -> list[int]:
    """Tasks that come before or after every other task, ascending."""
    count = len(network.tasks)
    before = [0] * count
    after = [0] * count
    for task in range(count):
        for link in network.links_into[task]:
            before[task] |= before[link.source] | 1 << link.source
    for task in reversed(range(count)):
        for link in network.links_from[task]:
            after[task] |= after[link.destination] | 1 << link.destination
    return [task for task in range(count) if (before[task] | after[task]).bit_count() == count - 1]


def _passing(links: Iterable[Link], count: int) -> list[int]:
    # How many links pass over each task.
    change = [0] * (count + 1)
    for link in links:
        change[link.source + 1] += 1
        change[link.destination] -= 1
    return list(itertools.accumulate(change))


def segments(network: Network, hubs: Sequence[int]) -> list[Segment]:
    """The parts of a network between hubs; at least one.

    Left out of them, so that the sum of their least times bounds that of the whole from below: tensors that pass over
    a hub (their gains are taken as made), graph inputs that tasks of several segments take, and the way of outputs that
    the last segment does not make.
    """
    count = len(network.tasks)
    borders = [-1, *hubs, count]
    bounds = list(itertools.pairwise(borders))
    return [_segment(network, a, b, last=index == len(bounds) - 1) for index, (a, b) in enumerate(bounds)]


def _segment(network: Network, first: int, end: int, *, last: bool) -> Segment:
    count = len(network.tasks)
    members = tuple(range(max(first, 0), min(end + 1, count)))
    head, tail = first >= 0, end < count
    inside = {task: index for index, task in enumerate(members)}
    tensors: dict[int, int] = {}

    def renumbered(tensor: int) -> int:
        return tensors.setdefault(tensor, len(tensors))

    takers: dict[int, set[int]] = {}
    for border in network.inputs:
        takers.setdefault(border.tensor, set()).add(border.task)
    here = set(members[1:] if head else members)
    links: list[Link] = []
    inputs: list[Border] = []
    outputs: list[Border] = []
    for task in members:
        at = inside[task]
        for border in network.inputs_of[task] if task in here else ():
            if takers[border.tensor] <= here:
                # When an input arrives is known from the begin of the whole only; later it is most likely there.
                wire = (0.0,) * len(border.wire) if head else border.wire
                inputs.append(replace(border, task=at, tensor=renumbered(border.tensor), wire=wire))
        if tail and task == members[-1]:
            continue
        for link in network.links_from[task]:
            if link.destination in inside:
                links.append(
                    replace(link, source=at, destination=inside[link.destination], tensor=renumbered(link.tensor))
                )
        for border in network.outputs_of[task]:
            wire = border.wire if last else (0.0,) * len(border.wire)
            outputs.append(replace(border, task=at, tensor=renumbered(border.tensor), wire=wire))
    cost = [network.cost[task] for task in members]
    if head:
        cost[0] = tuple(0.0 if u in network.allowed[members[0]] else c for u, c in enumerate(cost[0]))
    for at, task in enumerate(members):
        passing = [link for link in network.links_into[task] if link.source not in inside] if task in here else []
        for link in passing:
            cost[at] = tuple(max(c - gain, 0.0) for c, gain in zip(cost[at], link.gains, strict=True))
    part = replace(
        network,
        # Memories bind the whole, so segments must not count them apart.
        memory=(0,) * len(network.memory),
        tasks=tuple(network.tasks[task] for task in members),
        cost=tuple(cost),
        joules=tuple(network.joules[task] for task in members),
        bytes=tuple(network.bytes[task] for task in members),
        links=tuple(links),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )
    return Segment(members, head, tail, part)
