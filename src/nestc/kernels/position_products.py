"""Products of matrices at many positions at once: what is left of a convolution or product after its transforms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import NamedTuple

from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, constant, load
from nestc.tensor.ir import Buffer, Expr, Load

_CACHE_LINE = 64
_SLACK = 16  # elements of M between tiles, so that they do not fall into the same sets of the cache


@dataclass(frozen=True)
class Plan:
    """``mr`` tiles and ``nr`` vectors of outputs a register tile; ``groups`` register tiles' tiles and ``columns``
    register columns of outputs an item. ``fused``: an item transforms its tiles' inputs itself and loops over the
    chunks of outputs; else the items are all pairs, those of one chunk of outputs together if ``outputs_first``."""

    mr: int
    nr: int
    groups: int
    columns: int
    fused: bool
    outputs_first: bool = False


Fetch = Callable[[Buffer, Expr, Expr], None]
"""Fills registers with the weights of a step: registers, block of inputs, place in the block."""


class Place(NamedTuple):
    """Chunk of outputs, position, register column of the chunk, and group of the item."""

    o: Expr
    p: Expr
    g: Expr
    q: Expr


class _Registers(NamedTuple):
    """Sums of a register tile, weights of a step, and a factor in all lanes."""

    acc: Buffer
    w: Buffer
    x: Buffer


class PositionProducts(ABC):
    """Multiplies V[tiles][inputs] by U[inputs][outputs] at each of `positions`; `groups` register tiles' tiles in all.

    ``factor``, ``total``: dtypes of factors and sums. ``depth``: steps of inputs, each of `wide` factors.

    - V[position][group][step][mr][wide];
    - U[chunk of outputs][position][register column][step][lane][nr * wide];
    - M[register column][tile][position][nr * lanes], scratch memory.
    """

    factor: str
    total: str

    def __init__(self, cut: Plan, lanes: int, positions: int, groups: int, depth: int, wide: int) -> None:
        self.cut, self.lanes, self.positions, self.groups = cut, lanes, positions, groups
        self.depth, self.wide = depth, wide
        self.chunks = ceil(groups / cut.groups)
        self.bytes = 2 if self.factor == "int16" else 4
        self.ahead = 1  # register columns whose weights are asked for early
        self.last = lanes  # inputs of the last block that are not padding

    @abstractmethod
    def broadcast(self, v: Buffer, p: Expr, place: Expr, j: int, c: Expr) -> Expr:
        """The factors of step `c` of tile `j` in all lanes; the block of its register tile begins at `place`."""

    @abstractmethod
    def added(self, acc: Expr, x: Expr, w: Expr) -> Expr:
        """``acc + x * w``."""

    def items(
        self, k: Builder, steps: int, prepare: Callable[[Expr, Expr], None], outputs: Callable[[Expr, Expr], None]
    ) -> None:
        """The parallel loop. `prepare` makes a step of V for a chunk of groups, where that is fused into the items;
        `outputs` multiplies and stores a chunk of groups and one of the `steps` chunks of outputs."""
        if self.cut.fused:
            with k.parallel("item", self.chunks) as (chunk,):
                with k.loop("ib", self.depth) as block:
                    prepare(chunk, block)
                with k.loop("o", steps) as o:
                    outputs(chunk, o)
            return
        major, minor = (steps, self.chunks) if self.cut.outputs_first else (self.chunks, steps)
        with k.parallel("item", major, minor) as (first, second):
            o, chunk = (first, second) if self.cut.outputs_first else (second, first)
            outputs(chunk, o)

    def block(self) -> int:
        """Elements of V of one group and position."""
        return self.depth * self.cut.mr * self.wide

    def lines(self, elements: int) -> int:
        """At least `elements` factors that fill an odd number of cache lines: positions of V lie so far apart, since a
        transform touches all of them at once."""
        line = _CACHE_LINE // self.bytes
        return (ceil(elements / line) | 1) * line

    def products(self, k: Builder) -> Buffer:
        """M[register column][tile][position][nr * lanes], scratch memory of an item."""
        cut = self.cut
        width = self.positions * cut.nr * self.lanes + _SLACK
        return k.scratch("m", (cut.columns, cut.groups * cut.mr, width), self.total)

    def multiply(self, k: Builder, u: Buffer, v: Buffer, m: Buffer, chunk: Expr, o: Expr) -> None:
        """M = V U at all positions, for a chunk of tiles and a chunk of outputs."""
        cut, lanes, wide = self.cut, self.lanes, self.wide
        acc = k.regs("acc", (cut.mr, cut.nr), lanes, self.total)
        wreg, xreg = k.regs("w", (cut.nr,), wide, self.factor), k.regs("x", (), wide, self.factor)
        with self.walk(k) as (p, g), k.loop("q", cut.groups) as q:
            group = ix.add(ix.mul(chunk, cut.groups), q)
            with k.when(binary("lt", group, ix.const(self.groups))):
                # Limited as the condition says, so that it is known to lie inside.
                own = q if cut.fused else binary("min", group, ix.const(self.groups - 1))
                first = ix.mul(own, self.depth)
                for j in range(cut.mr):
                    for i in range(cut.nr):
                        k.store(acc, (j, i, 0), constant(0 if self.bytes == 2 else 0.0, self.total, lanes))
                at = Place(o, p, g, q)
                self.sum_up(k, u, at, partial(self.steps, k, _Registers(acc, wreg, xreg), u, v, at, first))
                for j in range(cut.mr):
                    for i in range(cut.nr):
                        place = ix.add(ix.mul(p, cut.nr * lanes), i * lanes)
                        k.store(m, (g, ix.add(ix.mul(q, cut.mr), j), place), load(acc, j, i, 0, lanes=lanes))

    def steps(self, k: Builder, r: _Registers, u: Buffer, v: Buffer, at: Place, first: Expr, fetch: Fetch) -> None:
        """The multiply-adds of a register tile, whose first step is `first` of V; padding is left out."""
        cut, lanes, wide = self.cut, self.lanes, self.wide

        def inputs(block: Expr, count: int) -> None:
            self.prefetch(k, u, at, block)
            place = ix.mul(ix.add(first, block), cut.mr * wide)
            with k.unroll("l", count) as c:
                fetch(r.w, block, c)
                for j in range(cut.mr):
                    k.store(r.x, (0,), self.broadcast(v, at.p, place, j, c))
                    for i in range(cut.nr):
                        x, w = Load(r.x, (ix.const(0),), wide), load(r.w, i, 0, lanes=wide)
                        k.store(r.acc, (j, i, 0), self.added(load(r.acc, j, i, 0, lanes=lanes), x, w))

        whole = self.depth if self.last == lanes else self.depth - 1
        with k.loop("c", whole) as block:
            inputs(block, lanes)
        if whole < self.depth:
            inputs(ix.const(whole), self.last)

    @contextmanager
    def walk(self, k: Builder) -> Iterator[tuple[Expr, Expr]]:
        """The loops over positions and over the register columns of an item."""
        with k.loop("p", self.positions) as p, k.loop("g", self.cut.columns) as g:
            yield p, g

    def sum_up(self, k: Builder, u: Buffer, at: Place, sums: Callable[[Fetch], None]) -> None:
        """Emit `sums`, the multiply-adds of a register tile, with code that brings the weights of a step."""

        def fetch(registers: Buffer, block: Expr, c: Expr) -> None:
            for i in range(self.cut.nr):
                weights = load(u, at.o, at.p, at.g, block, c, i * self.wide, lanes=self.wide)
                k.store(registers, (i, 0), weights)

        sums(fetch)

    def prefetch(self, k: Builder, u: Buffer, at: Place, block: Expr) -> None:
        """Ask for the weights of a later register column, or position, while these are used: each group of tiles for
        its share of the cache lines."""
        line = _CACHE_LINE // self.bytes
        lines = self.column_lines()
        share = ceil(lines / self.cut.groups)
        for each in range(share):
            number = ix.mod(ix.add(ix.mul(at.q, share), each), lines)
            k.prefetch(u, at.o, at.p, ix.add(at.g, self.ahead), block, 0, ix.mul(number, line))

    def column_lines(self) -> int:
        """Cache lines of the weights of a register column and one step of input channels."""
        return self.lanes * self.cut.nr * self.wide * self.bytes // _CACHE_LINE
