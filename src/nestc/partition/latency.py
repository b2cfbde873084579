"""The least latency of a network: what is easily known first, then the exact method that suits its size."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence

from nestc.partition import bounds, branch, cpsat, pipeline
from nestc.partition.arrange import arranged
from nestc.partition.branch import Found
from nestc.partition.heft import by_rank
from nestc.partition.labelling import Array
from nestc.partition.network import Group, Network, timeline, units_of

SMALL = 12
"""Tasks up to which branch and bound is faster than CP-SAT."""


def known(network: Network, *, serial: Collection[int] = (), tries: int = 100) -> Found:
    """The best of what costs little to find, with a bound: all on one unit, HEFT, and the least weighted loads."""
    found, bound, _ = pipeline.spread(network, serial, rounds=16)
    bound = max(bound, longest(bounds.along_paths(network), network))
    groups, latency = cheapest(network, [by_rank(network), *alone(network), *found], tries)
    return Found(groups, latency, min(bound, latency))


def alone(network: Network) -> list[list[int]]:
    """Each unit that takes all tasks, taking them."""
    units = [u for u in range(len(network.units)) if all(u in allowed for allowed in network.allowed)]
    return [[unit] * len(network.tasks) for unit in units]


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
    """The stages of the assignment with the least latency among those that fit the memories, if any does.

    With ``tries`` the best of them is arranged with that effort.
    """
    distinct = list(dict.fromkeys(tuple(units) for units in assignments))
    fitting = [units for units in distinct if network.fits(units)] or distinct[:1]
    found = min((arranged(network, units, tries=0) for units in fitting), key=lambda g: timeline(network, g)[2])
    if tries:
        more = arranged(network, units_of(network, found), tries=tries)
        found = min(found, more, key=lambda g: timeline(network, g)[2])
    return found, timeline(network, found)[2]


def whole(
    network: Network,
    start: Found,
    *,
    weights: Sequence[Sequence[float]] = (),
    serial: Collection[int] = (),
    seconds: float,
) -> Found:
    """Better than what is known, or proof that nothing is, as far as time allows."""
    count = len(network.tasks)
    if start.exact or not network.fits(units_of(network, start.groups)):
        return start
    if count <= SMALL:
        return branch.best(network, start, weights=weights, serial=serial, deadline=time.thread_time() + seconds)
    if count <= cpsat.TASKS and cpsat.installed():
        return cpsat.best(network, start, seconds=seconds)
    return start
