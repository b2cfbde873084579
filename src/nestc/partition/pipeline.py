"""The least period of a pipeline of requests: no resource may be busy longer a request than necessary.

The bound is the Lagrangian dual: for any weights of the resources that sum to 1, the least weighted load
(`bounds.load`) is no more than the load of the busiest one. Weights are raised where the best placement for them is
busy (multiplicative weights: Arora, Hazan, Kale, Theory of Computing 8, 2012), and each of those placements is tried.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from nestc.partition import bounds
from nestc.partition.labelling import Factor, minimise
from nestc.partition.network import Network

ROUNDS = 60


def spread(
    network: Network, serial: Collection[int] = (), *, rounds: int = ROUNDS
) -> tuple[list[list[int]], float, list[float]]:
    """Placements that balance the resources, the greatest bound found on the way, and the weights that gave it.

    ``serial``: as in `bounds.loads`, if the bound is to be of the latency.
    """
    count = network.resources
    parallel = [task for task in range(len(network.tasks)) if task not in serial]
    weight = best = [1 / count] * count
    bound = 0.0
    found: list[list[int]] = []
    # Weighted work is linear in the weights: that of no weights (serial tasks), and more for each resource.
    sizes = [len(network.units)] * len(network.tasks)
    unit_weights = [[float(r == other) for other in range(count)] for r in range(count)]
    factors = bounds.loads(network, [[0.0] * count, *unit_weights], serial)
    finite = [np.where(np.isinf(f.table), 0.0, f.table) for f in factors]
    rows = [table - table[..., :1] for table in finite]
    for number in range(rounds if count > 1 else 1):
        mixed = [
            Factor(f.variables[:-1], f.table[..., 0] + row[..., 1:] @ np.array(weight))
            for f, row in zip(factors, rows, strict=True)
        ]
        labelling = minimise(sizes, mixed)
        if labelling.bound > bound:
            bound, best = labelling.bound, weight
        found.append(labelling.labels)
        load = loads(network, labelling.labels, parallel)
        top = max(load) or 1.0
        # Steps get shorter, so that weights come to rest.
        pace = 1.0 / math.sqrt(number + 1)
        raised = [w * math.exp(pace * seconds / top) for w, seconds in zip(weight, load, strict=True)]
        weight = [w / sum(raised) for w in raised]
    return found, bound, best


def loads(network: Network, units: Sequence[int], tasks: Iterable[int]) -> list[float]:
    """Seconds of some tasks, and of what crosses to and from them, by resource; launches apart."""
    total = [0.0] * network.resources
    for task in tasks:
        unit = units[task]
        total[network.resource[unit]] += network.cost[task][unit]
        for link in network.links_from[task]:
            total[network.resource[unit]] += link.out[unit][units[link.destination]]
        for link in network.links_into[task]:
            total[network.resource[unit]] += link.into[units[link.source]][unit]
    return total
