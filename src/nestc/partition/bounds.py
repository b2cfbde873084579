"""Lower bounds on what any stages cost, quickly: along paths, by the load of the resources, and in joules.

Each is a relaxation of the rules in `problem.py`; its docstring says why no stages can do better.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from nestc.partition.labelling import Array, Factor, Labelling, minimise
from nestc.partition.network import Link, Network

TAKERS = 3
"""Of a tensor, up to which it is told exactly which of them share a unit."""


def along_paths(network: Network) -> list[Array]:
    """For every task [unit of task 0, unit of the task]: no sooner can its part of its stage be done.

    Inside a stage, tasks run one after another, so a task is done no sooner than a task before it in the same stage
    plus its own cost less all gains; and than one in another stage plus that one's work to send, the way, the launch
    of its own stage and the work to receive. Of several predecessors the latest counts, and each may be on the unit
    that suits this task best, although it suits others worse: that only lowers the value. Work shared with other
    tasks (tensors received once for several) is left out.
    """
    units = len(network.units)
    launch = np.array(network.launch)
    cost = np.array(network.cost)
    alone = _inputs_alone(network)
    found: list[Array] = []
    for task in range(len(network.tasks)):
        launched = launch + np.array(network.arrives[task])
        gains = np.zeros(units)
        for link in network.links_into[task]:
            gains = gains + np.array(link.gains)
        base = cost[task] + alone[task] - gains
        if task == 0:
            # Everything of other first units is unreachable, so the axis stays separate along all paths.
            start = np.full((units, units), np.inf)
            np.fill_diagonal(start, launched + base)
            found.append(start)
            continue
        best = np.broadcast_to(launched + base, (units, units)).copy()
        for link in network.links_into[task]:
            before = found[link.source]
            step = _step(network, link)
            reached = (before[:, :, None] + step[None, :, :]).min(axis=1)
            best = np.maximum(best, reached + base)
        found.append(best)
    return found


def _step(network: Network, link: Link) -> Array:
    units = len(network.units)
    step = np.array(link.out) + np.array(link.wire) + np.array(link.into) + np.array(network.launch)[None, :]
    step = step + np.array(link.gains)[None, :]  # all gains were taken off; apart, this one is not made
    step[np.arange(units), np.arange(units)] = 0.0
    return step


def _inputs_alone(network: Network) -> Array:
    # Work to receive graph inputs that no other task takes.
    takers = _takers(network)
    found = np.zeros((len(network.tasks), len(network.units)))
    for border in network.inputs:
        if takers[border.tensor] == 1:
            found[border.task] += np.array(border.work)
    return found


def _takers(network: Network) -> dict[int, int]:
    count: dict[int, set[int]] = {}
    for border in network.inputs:
        count.setdefault(border.tensor, set()).add(border.task)
    return {tensor: len(tasks) for tensor, tasks in count.items()}


def weights(resources: int) -> list[tuple[float, ...]]:
    """Ways to weigh resources, summing to 1: evenly over each subset of them."""
    found: list[tuple[float, ...]] = []
    for size in range(1, resources + 1):
        for subset in itertools.combinations(range(resources), size):
            found.append(tuple(1 / size if r in subset else 0.0 for r in range(resources)))
    return found


def load(
    network: Network, weight: Sequence[float], serial: Collection[int] = (), keep: tuple[int, ...] = ()
) -> Labelling:
    """The least weighted seconds of work over all placements; ``keep``: tasks whose units are axes of the result."""
    sizes = [len(network.units)] * len(network.tasks)
    factors = [_squeezed(factor) for factor in loads(network, [weight], serial)]
    return minimise(sizes, factors, keep)


def least_load(
    network: Network, weights: Sequence[Sequence[float]], serial: Collection[int], keep: tuple[int, ...]
) -> Array:
    """The greatest of the least weighted loads over several weights, by the units of the tasks to ``keep``."""
    count = len(network.tasks)
    sizes = [len(network.units)] * count + [len(weights)]
    return minimise(sizes, loads(network, weights, serial), (*keep, count)).table.max(axis=-1)


def loads(network: Network, weights: Sequence[Sequence[float]], serial: Collection[int] = ()) -> list[Factor]:
    """Weighted seconds of work as factors over tasks and (the last variable) which weights: a bound of all stages.

    No latency or period is less, if weights sum to 1: every resource is busy at most the whole time, hence any weighted
    mean of their work is no more than that. Tasks in ``serial`` come before or after every other (`segments.hubs`):
    while the stage of one runs nothing else does, so what it costs (its launch, work to send and receive included)
    weighs 1. Shared work is counted at its least (`_once`): a tensor is received once by all takers on one unit (they
    may be of one stage) and sent once. Launches are counted along one
    path only: two runs of tasks on one unit with something else between them on the path cannot be one stage, as that
    would be cyclic.
    """
    count, units = len(network.tasks), len(network.units)
    per_unit = np.array([[weight[r] for r in network.resource] for weight in weights])
    ones = np.ones_like(per_unit)
    of = [ones if task in serial else per_unit for task in range(count)]
    launch = np.array(network.launch)
    takers = _takers(network)
    senders = Counter(link.tensor for link in network.links) + Counter(border.tensor for border in network.outputs)
    work: list[Array] = []
    for task, row in enumerate(network.cost):
        seconds = np.where(np.isinf(row), 0.0, row)
        for border in network.inputs_of[task]:
            seconds = seconds + np.array(border.work) / takers[border.tensor]
        for border in network.outputs_of[task]:
            seconds = seconds + np.array(border.work) / senders[border.tensor]
        work.append(seconds)
    spine = longest_path(network)
    if spine:
        work[spine[0]] = work[spine[0]] + launch
    # An infinite cost stays infinite where the weight is 0.
    factors = [
        Factor((task, count), np.where(np.isinf(row), np.inf, seconds * of[task]).T)
        for task, (row, seconds) in enumerate(zip(network.cost, work, strict=True))
    ]
    following = set(itertools.pairwise(spine))
    diagonal = np.eye(units, dtype=bool)
    for link in network.links:
        before, after = of[link.source], of[link.destination]
        # Sending costs the most of all ways, which is no less than their mean.
        table = np.array(link.out)[None] * before[:, :, None] / senders[link.tensor]
        if any(link.gains):
            # Made by tasks of one stage, whose time weighs at most 1.
            table = table - diagonal[None] * (np.array(link.gains) * np.maximum(before, after))[:, None, :]
        if (link.source, link.destination) in following:
            following.discard((link.source, link.destination))
            table = table + np.where(diagonal[None], 0.0, (launch * after)[:, None, :])
        if table.any():
            factors.append(Factor((link.source, link.destination, count), np.moveaxis(table, 0, -1)))
    for links in _by_tensor(network):
        tables = [np.array(link.into)[:, :, None] * of[link.destination].T[None] for link in links]
        factors += [Factor((*scope, count), table) for scope, table in _once(links, tables)]
    return factors


def _by_tensor(network: Network) -> list[list[Link]]:
    # Links of one tensor, to different tasks.
    found: dict[int, dict[int, Link]] = {}
    for link in network.links:
        found.setdefault(link.tensor, {}).setdefault(link.destination, link)
    return [[links[task] for task in sorted(links)] for links in found.values()]


def _once(links: Sequence[Link], tables: Sequence[Array]) -> list[tuple[tuple[int, ...], Array]]:
    """What takers of a tensor pay, as tables over (source, takers) and more axes, if those on one unit pay once.

    A taker pays unless one before it is on the same unit. Beyond `TAKERS` all pay an equal part instead, which is no
    more.
    """
    if len(links) > TAKERS:
        return [
            ((link.source, link.destination), table / len(links))
            for link, table in zip(links, tables, strict=True)
            if table.any()
        ]
    found: list[tuple[tuple[int, ...], Array]] = []
    for number, (link, table) in enumerate(zip(links, tables, strict=True)):
        if not table.any():
            continue
        units = table.shape[0]
        # Axes: source, the takers before this one, this one, the rest of the table.
        full = table.reshape(units, *(1,) * number, *table.shape[1:])
        own = np.arange(units).reshape(1, *(1,) * number, units, *(1,) * (table.ndim - 2))
        for before in range(number):
            other = np.arange(units).reshape(
                1, *(units if b == before else 1 for b in range(number)), 1, *(1,) * (table.ndim - 2)
            )
            full = np.where(own == other, 0.0, full)
        found.append(((link.source, *(each.destination for each in links[: number + 1])), full))
    return found


def _squeezed(factor: Factor) -> Factor:
    return Factor(factor.variables[:-1], factor.table[..., 0])


def energy(network: Network) -> Labelling:
    """The least joules of any placement; exact where the network is narrow and no tensor has more than `TAKERS`."""
    return minimise([len(network.units)] * len(network.tasks), joules(network))


def joules(network: Network) -> list[Factor]:
    """Joules as factors over tasks, never more than they are."""
    takers = _takers(network)
    cost = np.array(network.joules)
    cost[np.isinf(np.array(network.cost))] = np.inf
    for border in network.inputs:
        cost[border.task] += np.array(border.joules) / takers[border.tensor]
    for border in network.outputs:
        cost[border.task] += np.array(border.joules)
    factors = [Factor((task,), row) for task, row in enumerate(cost)]
    for links in _by_tensor(network):
        factors += [Factor(*each) for each in _once(links, [np.array(link.joules) for link in links])]
    return factors


def longest_path(network: Network) -> list[int]:
    """A path with the most tasks."""
    if not network.tasks:
        return []
    length = [1] * len(network.tasks)
    before = [-1] * len(network.tasks)
    for task in range(len(network.tasks)):
        for link in network.links_into[task]:
            if length[link.source] + 1 > length[task]:
                length[task] = length[link.source] + 1
                before[task] = link.source
    task = max(range(len(network.tasks)), key=lambda t: length[t])
    path = [task]
    while before[path[-1]] >= 0:
        path.append(before[path[-1]])
    return path[::-1]
