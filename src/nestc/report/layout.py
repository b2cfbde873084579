"""Places a graph in layers for drawing: longest paths, dummies for long edges, fewer crossings, wrapped into columns.

The method is the usual one of K. Sugiyama, S. Tagawa, M. Toda, "Methods for Visual Understanding of Hierarchical System
Structures", IEEE Trans. SMC 11 (1981), with barycentres; places within a layer are least squares under a least distance
(pool adjacent violators). Wrapping long graphs into columns is ours.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 168.0, 42.0
"""Of a node, in the units of the drawing."""
GAP_X, GAP_Y, GUTTER = 22.0, 30.0, 46.0
DUMMY = 14.0
"""Room of a long edge that passes a layer."""
SWEEPS = 12
LEAST_ROWS = 6
"""Of a column, about."""
ASPECT = 1.7
"""Width over height that wrapping aims at."""


@dataclass(frozen=True)
class Drawing:
    """Where everything is. ``places``: the middle of each node; ``paths``: an SVG path for each edge, in order."""

    width: float
    height: float
    places: Mapping[str, tuple[float, float]]
    paths: tuple[str, ...]


def draw(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> Drawing:
    """Lay out nodes (in a topological order) and edges between them."""
    if not nodes:
        return Drawing(WIDTH, HEIGHT, {}, ())
    ranks = _ranks(nodes, edges)
    layers, chains = _with_dummies(nodes, edges, ranks)
    _order(layers, chains)
    places = _columns(layers, chains)
    return _wrap(layers, chains, places, nodes, edges)


def _ranks(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The layer of each node: the longest path to it; what has nothing before it stands right above its first user."""
    rank = dict.fromkeys(nodes, 0)
    users: dict[str, list[str]] = {node: [] for node in nodes}
    sources: dict[str, int] = dict.fromkeys(nodes, 0)
    for source, destination in edges:
        users[source].append(destination)
        sources[destination] += 1
    for node in nodes:
        for user in users[node]:
            rank[user] = max(rank[user], rank[node] + 1)
    for node in nodes:
        if not sources[node] and users[node]:
            rank[node] = min(rank[user] for user in users[node]) - 1
    return rank


def _with_dummies(
    nodes: Sequence[str], edges: Sequence[tuple[str, str]], ranks: Mapping[str, int]
) -> tuple[list[list[str]], list[list[str]]]:
    """Layers with a dummy wherever an edge passes one, and for each edge the chain of names from end to end.

    Edges of one source share their dummies, so that they are one line as far as they go together.
    """
    layers: list[dict[str, None]] = [{} for _ in range(max(ranks.values()) + 1)]
    numbers = {node: number for number, node in enumerate(nodes)}
    for node in nodes:
        layers[ranks[node]][node] = None
    chains: list[list[str]] = []
    for source, destination in edges:
        chain = [source]
        for rank in range(ranks[source] + 1, ranks[destination]):
            chain.append(f"\0{numbers[source]}.{rank}")  # no region has such a name
            layers[rank][chain[-1]] = None
        chains.append([*chain, destination])
    return [list(layer) for layer in layers], chains


def _links(chains: Sequence[Sequence[str]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Neighbours above and below of everything that a chain goes through, each once."""
    above: dict[str, dict[str, None]] = {}
    below: dict[str, dict[str, None]] = {}
    for chain in chains:
        for first, second in itertools.pairwise(chain):
            below.setdefault(first, {})[second] = None
            above.setdefault(second, {})[first] = None
    return {name: list(found) for name, found in above.items()}, {name: list(found) for name, found in below.items()}


def _order(layers: list[list[str]], chains: Sequence[Sequence[str]]) -> None:
    """Order each layer so that few edges cross: barycentre sweeps down and up, the best order seen is kept."""
    above, below = _links(chains)
    best = [list(layer) for layer in layers]
    fewest = _crossings(layers, below)
    for sweep in range(SWEEPS):
        if not fewest:
            break
        down = sweep % 2 == 0
        neighbours = above if down else below
        order = range(1, len(layers)) if down else range(len(layers) - 2, -1, -1)
        for rank in order:
            fixed = {name: place for place, name in enumerate(layers[rank - 1 if down else rank + 1])}
            here = {name: place for place, name in enumerate(layers[rank])}

            def weight(
                name: str, fixed: Mapping[str, int] = fixed, here: Mapping[str, int] = here
            ) -> tuple[float, int]:
                found = [fixed[other] for other in neighbours.get(name, ()) if other in fixed]  # noqa: B023
                return (sum(found) / len(found) if found else float(here[name]), here[name])

            layers[rank].sort(key=weight)
        crossings = _crossings(layers, below)
        if crossings < fewest:
            fewest, best = crossings, [list(layer) for layer in layers]
    layers[:] = best


def _crossings(layers: Sequence[Sequence[str]], below: Mapping[str, Sequence[str]]) -> int:
    """Crossings between neighbouring layers: inversions among the lower ends, upper ends in order."""
    total = 0
    for upper, lower in itertools.pairwise(layers):
        place = {name: number for number, name in enumerate(lower)}
        ends = [end for name in upper for end in sorted(place[other] for other in below.get(name, ()))]
        seen: list[int] = []
        for end in ends:
            total += len(seen) - bisect_left(seen, end + 1)
            insort(seen, end)
    return total


def _room(name: str) -> float:
    return DUMMY if name.startswith("\0") else WIDTH


def _columns(layers: Sequence[Sequence[str]], chains: Sequence[Sequence[str]]) -> dict[str, float]:
    """The x of everything: near its neighbours, in order, and not overlapping."""
    above, below = _links(chains)
    x: dict[str, float] = {}
    for layer in layers:
        wide = sum(_room(name) + GAP_X for name in layer)
        at = -wide / 2
        for name in layer:
            x[name] = at + _room(name) / 2
            at += _room(name) + GAP_X
    for sweep in range(2 * SWEEPS):
        down = sweep % 2 == 0
        for layer in layers if down else reversed(layers):
            wanted: list[float] = []
            for name in layer:
                near = (above if down else below).get(name) or (below if down else above).get(name) or [name]
                wanted.append(sum(x[other] for other in near) / len(near))
            for name, value in zip(layer, _apart(layer, wanted)):
                x[name] = value
    return x


def _apart(layer: Sequence[str], wanted: Sequence[float]) -> list[float]:
    """The places nearest to those wanted (least squares) that keep the order and do not overlap."""
    offsets = [0.0]
    for first, second in itertools.pairwise(layer):
        offsets.append(offsets[-1] + (_room(first) + _room(second)) / 2 + GAP_X)
    blocks: list[tuple[float, float]] = []  # mean and weight of what moves together
    sizes: list[int] = []
    for name, value, offset in zip(layer, wanted, offsets):
        # Straight long edges are worth more than a node in the middle of its neighbours.
        mean, weight, size = value - offset, 3.0 if name.startswith("\0") else 1.0, 1
        while blocks and blocks[-1][0] > mean:
            other, heavy = blocks.pop()
            mean, weight = (mean * weight + other * heavy) / (weight + heavy), weight + heavy
            size += sizes.pop()
        blocks.append((mean, weight))
        sizes.append(size)
    flat = [mean for (mean, _), size in zip(blocks, sizes) for _ in range(size)]
    return [value + offset for value, offset in zip(flat, offsets)]


def _wrap(
    layers: Sequence[Sequence[str]],
    chains: Sequence[Sequence[str]],
    x: Mapping[str, float],
    nodes: Sequence[str],
    edges: Sequence[tuple[str, str]],
) -> Drawing:
    """Cut the layers into columns of about equal height, beside each other, and draw the edges."""
    row = HEIGHT + GAP_Y
    lefts = [min((x[name] - _room(name) / 2 for name in layer), default=0.0) for layer in layers]
    rights = [max((x[name] + _room(name) / 2 for name in layer), default=0.0) for layer in layers]
    wide = max(rights) - min(lefts)
    count = round(math.sqrt(ASPECT * len(layers) * row / (wide + GUTTER)))
    cuts = _cuts(layers, chains, max(1, min(count, len(layers) // LEAST_ROWS)))
    column_of: list[int] = []
    for column, (begin, end) in enumerate(itertools.pairwise(cuts)):
        column_of += [column] * (end - begin)
    rank_of = {name: rank for rank, layer in enumerate(layers) for name in layer}
    # Each column is as wide as it needs to be, and its gutter as wide as the lines that pass it: one for each source.
    steps = [step for chain in chains for step in itertools.pairwise(chain)]
    passing: list[dict[str, int]] = [{} for _ in cuts[1:]]
    for first, second in steps:
        if column_of[rank_of[first]] != column_of[rank_of[second]]:
            lanes = passing[column_of[rank_of[first]]]
            lanes.setdefault(first, len(lanes))
    shift: list[float] = []
    border: list[float] = []
    at = 0.0
    for column, (begin, end) in enumerate(itertools.pairwise(cuts)):
        shift.append(at - min(lefts[begin:end]))
        at += max(rights[begin:end]) - min(lefts[begin:end])
        border.append(at)
        at += GUTTER + 6 * len(passing[column])
    place = {
        name: (x[name] + shift[column_of[rank]], (rank - cuts[column_of[rank]]) * row + HEIGHT / 2 + GAP_Y)
        for name, rank in rank_of.items()
    }
    bottom = max(y for _, y in place.values()) + HEIGHT / 2
    paths: list[str] = []
    for chain in chains:
        parts: list[str] = []
        for first, second in itertools.pairwise(chain):
            begin, end = place[first], place[second]
            y0 = begin[1] + (0 if first.startswith("\0") else HEIGHT / 2)
            y1 = end[1] - (0 if second.startswith("\0") else HEIGHT / 2)
            move = f"M{begin[0]:.1f} {y0:.1f}" if not parts else f"L{begin[0]:.1f} {y0:.1f}"
            column, other = column_of[rank_of[first]], column_of[rank_of[second]]
            if column == other:
                middle = (y0 + y1) / 2
                curve = f"C{begin[0]:.1f} {middle:.1f} {end[0]:.1f} {middle:.1f} {end[0]:.1f} {y1:.1f}"
                parts.append(move + curve)
                continue
            lane = passing[column][first]
            gutter = border[column] + GUTTER / 2 + 6 * lane
            parts.append(
                f"{move}L{begin[0]:.1f} {bottom + 8 + 4 * lane:.1f}L{gutter:.1f} {bottom + 8 + 4 * lane:.1f}"
                f"L{gutter:.1f} {8 + 2 * lane:.1f}L{end[0]:.1f} {8 + 2 * lane:.1f}L{end[0]:.1f} {y1:.1f}"
            )
        paths.append("".join(parts))
    height = bottom + GAP_Y + 4 * max(map(len, passing))
    return Drawing(border[-1], height, {node: place[node] for node in nodes}, tuple(paths))


def _cuts(layers: Sequence[Sequence[str]], chains: Sequence[Sequence[str]], count: int) -> list[int]:
    """First layers of `count` columns (and the end): where few edges pass, not far from equal heights."""
    rank_of = {name: rank for rank, layer in enumerate(layers) for name in layer}
    passing = [0] * (len(layers) + 1)
    for _, second in {step for chain in chains for step in itertools.pairwise(chain)}:
        passing[rank_of[second]] += 1
    cuts = [0]
    for number in range(1, count):
        middle = round(number * len(layers) / count)
        slack = max(1, len(layers) // (4 * count))
        allowed = [at for at in range(middle - slack, middle + slack + 1) if cuts[-1] < at < len(layers)]
        if allowed:
            cuts.append(min(allowed, key=lambda at: (passing[at], abs(at - middle))))
    return [*cuts, len(layers)]
