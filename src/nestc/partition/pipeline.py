"""The least period of a pipeline of requests: no resource may be busy longer a request than necessary.

The bound is the Lagrangian dual: for any weights of the resources that sum to 1, the least weighted load
(`bounds.load`) is no more than the load of the busiest one. Weights are raised where the best placement for them is
busy (multiplicative weights: Arora, Hazan, Kale, Theory of Computing 8, 2012), and each of those placements is tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from nestc.partition import bounds
from nestc.partition.network import Network

ROUNDS = 60


def spread(network: Network, *, rounds: int = ROUNDS) -> tuple[list[list[int]], float]:
    """Placements that balance the resources, and the greatest bound of the period found on the way."""
    count = network.resources
    weight = [1 / count] * count
    bound = 0.0
    found: list[list[int]] = []
    for number in range(rounds if count > 1 else 1):
        labelling = bounds.load(network, weight)
        bound = max(bound, labelling.bound)
        found.append(labelling.labels)
        load = loads(network, labelling.labels)
        top = max(load) or 1.0
        # Steps get shorter, so that weights come to rest.
        pace = 1.0 / math.sqrt(number + 1)
        raised = [w * math.exp(pace * seconds / top) for w, seconds in zip(weight, load, strict=True)]
        weight = [w / sum(raised) for w in raised]
    return found, bound


def loads(network: Network, units: Sequence[int]) -> list[float]:
    """Seconds of the tasks themselves, and of what crosses, by resource; launches apart."""
    total = [0.0] * network.resources
    for task, unit in enumerate(units):
        total[network.resource[unit]] += network.cost[task][unit]
    for link in network.links:
        a, b = units[link.source], units[link.destination]
        if a != b:
            total[network.resource[a]] += link.out[a][b]
            total[network.resource[b]] += link.into[a][b]
    return total
