"""The cheapest choice of a label for each variable, where costs hang on single variables and on small groups of them.

Mini-bucket elimination (Dechter and Rish, "Mini-buckets: a general scheme for bounded inference", J. ACM 50(2), 2003):
exact on chains, trees and everything narrow (bucket elimination, i.e. dynamic programming); where a table would grow
beyond a limit its parts are minimised apart, which makes the value a lower bound and the choice a good guess.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ENTRIES = 20_000
"""Of the largest table: six variables of five labels."""


@dataclass(frozen=True)
class Factor:
    """What some variables (ascending) cost together: one axis each."""

    variables: tuple[int, ...]
    table: Array


@dataclass(frozen=True)
class Labelling:
    """``table``: the least cost by label of the variables kept (0-dimensional if none); ``labels`` by variable.

    ``exact`` says that the table is the least cost itself, not only below it.
    """

    table: Array
    labels: list[int]
    exact: bool

    @property
    def bound(self) -> float:
        """No labelling costs less."""
        return float(self.table.min())


def minimise(sizes: Sequence[int], factors: Sequence[Factor], keep: tuple[int, ...] = ()) -> Labelling:
    """The least sum of factors over all labellings; ``sizes``: how many labels each variable has.

    ``keep``: variables that become the axes of the result's table instead of being minimised over.
    """
    variables = len(sizes)
    buckets: list[list[Factor]] = [[] for _ in range(variables)]
    neighbours: list[set[int]] = [set() for _ in range(variables)]
    constant = 0.0
    for factor in factors:
        if not factor.variables:
            constant += float(factor.table)
            continue
        for variable in factor.variables:
            neighbours[variable].update(factor.variables)
    alive: list[Factor | None] = [factor for factor in factors if factor.variables]
    touching: list[list[int]] = [[] for _ in range(variables)]
    for index, factor in enumerate(alive):
        assert factor is not None
        for variable in factor.variables:
            touching[variable].append(index)
    # The variable with the fewest neighbours goes first; a chain is eaten from its ends, so tables stay small.
    order: list[int] = []
    kept = set(keep)
    heap = [(len(neighbours[v]), v) for v in range(variables) if v not in kept]
    heapq.heapify(heap)
    gone: set[int] = set()
    exact = True
    while heap:
        degree, variable = heapq.heappop(heap)
        if variable in gone or degree != len(neighbours[variable]):
            continue
        gone.add(variable)
        order.append(variable)
        mine: list[Factor] = []
        for index in touching[variable]:
            factor = alive[index]
            if factor is not None:
                mine.append(factor)
                alive[index] = None
        buckets[variable] = mine
        parts = _parts(mine, sizes)
        exact = exact and len(parts) <= 1
        for part in parts:
            made = _without(variable, _sum(part))
            if not made.variables:
                constant += float(made.table)
                continue
            for other in made.variables:
                touching[other].append(len(alive))
            alive.append(made)
        around = neighbours[variable] - {variable}
        for other in around:
            neighbours[other].discard(variable)
            if exact or len(around) < 12:
                neighbours[other] |= around
            if other not in kept:
                heapq.heappush(heap, (len(neighbours[other]), other))
    # Axes come in the order of `keep`; labels of those kept are the best ones.
    ascending = tuple(sorted(keep))
    rest = [factor for factor in alive if factor is not None]
    base = Factor(ascending, np.full(tuple(sizes[v] for v in ascending), constant))
    table = _sum([base, *rest]).table
    chosen = [0] * variables
    best = np.unravel_index(int(table.argmin()), table.shape) if ascending else ()
    for variable, label in zip(ascending, best, strict=True):
        chosen[variable] = int(label)
    for variable in reversed(order):
        chosen[variable] = _best(variable, buckets[variable], chosen, sizes[variable])
    return Labelling(np.transpose(table, [ascending.index(v) for v in keep]), chosen, exact)


def remaining(sizes: Sequence[int], factors: Sequence[Factor], keep: int) -> list[list[Factor]]:
    """What labels chosen so far still cost, at least, when variables are chosen in ascending order.

    Item v holds tables over variables below v, and over ``keep`` (never minimised over): their sum at the labels of
    those is a bound of all factors that some variable from v on takes part in (Kask and Dechter, "A general scheme
    for automatic generation of search heuristics from specification dependencies", Artificial Intelligence 129, 2001).
    """
    buckets: list[list[Factor]] = [[] for _ in sizes]
    for factor in factors:
        own = [v for v in factor.variables if v != keep]
        if own:
            buckets[max(own)].append(factor)
    found: list[list[Factor]] = [[] for _ in range(len(sizes) + 1)]
    for variable in reversed(range(len(sizes))):
        if variable == keep:
            continue
        for part in _parts(buckets[variable], sizes):
            made = _without(variable, _sum(part))
            own = [v for v in made.variables if v != keep]
            home = max(own, default=-1)
            if home >= 0:
                buckets[home].append(made)
            # It stands for its variables until the last of those left is chosen.
            for depth in range(home + 1, variable + 1):
                found[depth].append(made)
    return found


def _parts(factors: Sequence[Factor], sizes: Sequence[int]) -> list[list[Factor]]:
    # Largest first, each into the first part in which the table stays small enough.
    parts: list[tuple[set[int], list[Factor]]] = []
    for factor in sorted(factors, key=lambda f: -len(f.variables)):
        for scope, part in parts:
            if math.prod(sizes[v] for v in scope | set(factor.variables)) <= ENTRIES:
                scope.update(factor.variables)
                part.append(factor)
                break
        else:
            parts.append((set(factor.variables), [factor]))
    return [part for _, part in parts]


def _sum(factors: Sequence[Factor]) -> Factor:
    scope = tuple(sorted({variable for factor in factors for variable in factor.variables}))
    total: Array | None = None
    for factor in factors:
        sizes = iter(factor.table.shape)
        shape = [next(sizes) if variable in factor.variables else 1 for variable in scope]
        table = factor.table.reshape(shape)
        total = table if total is None else total + table
    assert total is not None
    return Factor(scope, total)


def _without(variable: int, factor: Factor) -> Factor:
    axis = factor.variables.index(variable)
    return Factor(factor.variables[:axis] + factor.variables[axis + 1 :], factor.table.min(axis=axis))


def _best(variable: int, factors: Sequence[Factor], chosen: Sequence[int], labels: int) -> int:
    total = np.zeros(labels)
    for factor in factors:
        index = tuple(slice(None) if v == variable else chosen[v] for v in factor.variables)
        total = total + factor.table[index]
    return int(total.argmin())
