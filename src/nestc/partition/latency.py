"""The least latency of a network: what is easily known first, then the exact method that suits its size."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence

from nestc.partition import bounds, branch, cpsat
from nestc.partition.arrange import arranged
from nestc.partition.branch import Found
from nestc.partition.heft import by_rank
from nestc.partition.labelling import Array
from nestc.partition.network import Group, Network, timeline, units_of

SMALL = 12
"""Tasks up to which branch and bound is faster than CP-SAT."""


def known(network: Network, *, serial: Collection[int] = (), tries: int = 40) -> Found:
    """The best of what costs little to find, with a bound: all on one unit, HEFT, and the least weighted loads."""
    assignments: list[list[int]] = [by_rank(network)]
    for unit in range(len(network.units)):
        if all(unit in allowed for allowed in network.allowed):
            assignments.append([unit] * len(network.tasks))
    bound = longest(bounds.along_paths(network), network)
    for weight in bounds.weights(network.resources):
        labelling = bounds.load(network, weight, serial)
        bound = max(bound, labelling.bound)
        assignments.append(labelling.labels)
    groups, latency = cheapest(network, assignments, tries)
    return Found(groups, latency, min(bound, latency))


def longest(paths: Sequence[Array], network: Network) -> float:
    """The bound that `bounds.along_paths` gives for the latency: every task must be done, and outputs sent."""
    bound = 0.0
    for task, table in enumerate(paths):
        after = [
            max((b.work[u] + b.wire[u] for b in network.outputs_of[task]), default=0.0)
            for u in range(len(network.units))
        ]
        bound = max(bound, float((table.min(axis=0) + after).min()))
    return bound


def cheapest(network: Network, assignments: Iterable[Sequence[int]], tries: int) -> tuple[tuple[Group, ...], float]:
    """The stages of the assignment with the least latency among those that fit the memories, if any does."""
    best: tuple[tuple[Group, ...], float] | None = None
    distinct = list(dict.fromkeys(tuple(units) for units in assignments))
    fitting = [units for units in distinct if network.fits(units)]
    for units in fitting or distinct[:1]:
        groups = arranged(network, units, tries=tries)
        latency = timeline(network, groups)[2]
        if best is None or latency < best[1]:
            best = groups, latency
    assert best is not None
    return best


def whole(network: Network, start: Found, *, serial: Collection[int] = (), seconds: float) -> Found:
    """Better than what is known, or proof that nothing is, as far as time allows."""
    count = len(network.tasks)
    if start.exact or not network.fits(units_of(network, start.groups)):
        return start
    if count <= SMALL and not any(network.memory):
        return branch.best(network, start, serial=serial, deadline=time.monotonic() + seconds)
    if count <= cpsat.TASKS and cpsat.installed():
        return cpsat.best(network, start, seconds=seconds)
    return start
