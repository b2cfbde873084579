"""Code of the inner loops over the steps of `byte_pairs`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nestc.kernels.byte_pairs import UNITS, VECTORS, PairedUnits
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, constant, less, load
from nestc.tensor.ir import Binary, Bitcast, Buffer, Cast, Dot, Expr, PairSum, Repeat

CACHE_LINE = 64
FREE_REACH = 1 << 16  # what a number of 16 bits is below anyway
_BYTES = 4  # of a unit


class PairedSteps:
    """The loops for register tiles of some outputs and `nr` vectors; accumulators are ``[output][vector][lanes]``.

    ``reach`` is a power of two above all places of units in the input: as places are known only while running, inputs
    are addressed modulo that, and there have to be as many behind the first place of a tile.
    """

    def __init__(
        self,
        builder: Builder,
        paired: PairedUnits,
        nr: int,
        places: np.ndarray,
        farthest: int,
        define: Callable[[str, np.ndarray], Buffer],
    ) -> None:
        """`places` ([columns][chunks][units], up to `farthest`) says where the inputs of `paired.numbers` lie, counted
        in bytes; `define` makes a constant of the kernel."""
        self.builder, self.paired, self.nr = builder, paired, nr
        self.wide = paired.vectors.shape[-1] // nr
        self.lanes = self.wide // _BYTES
        self.reach = 1 << farthest.bit_length()
        self.counts = define("counts", paired.counts)
        self.places = define("places", places.astype(np.uint16 if self.reach <= FREE_REACH else np.uint32))
        self.vectors = define("steps", paired.vectors)

    def declare(self) -> None:
        """Reserve registers."""
        k = self.builder
        self.weights = k.regs("w", (max(VECTORS), self.nr), self.wide, "int8")
        self.inputs = k.regs("x", (max(UNITS),), self.wide, "uint8")

    def add(
        self, column: Expr, chunk: Expr, outputs: int, acc: Buffer, load_input: Callable[[int, Expr], Expr]
    ) -> None:
        """Add a chunk of a column's products to the accumulators of `outputs` outputs; ``load_input(j, place)`` reads
        the four bytes of output j at a place."""
        k, wide = self.builder, self.wide
        for kind, most in enumerate(self.paired.most):
            if not most:
                continue
            unit_line, vector_line = self.paired.places(kind)
            with k.loop("e", most) as e, k.when(less(e, load(self.counts, column, chunk, kind))):
                unit, vector = (ix.add(ix.mul(e, a), b) for a, b in (unit_line, vector_line))
                numbers = [load(self.places, column, chunk, ix.add(unit, d)) for d in range(UNITS[kind])]
                places = [ix.mod(Cast(number, "int64"), self.reach) for number in numbers]
                for d in range(VECTORS[kind]):
                    for i in range(self.nr):
                        value = load(self.vectors, column, chunk, ix.add(vector, d), i * wide, lanes=wide)
                        k.store(self.weights, (d, i, 0), value)
                for j in range(outputs):
                    for d, place in enumerate(places):
                        k.store(self.inputs, (d, 0), Repeat(load_input(j, place), self.lanes))
                    for i in range(self.nr):
                        total = load(acc, j, i, 0, lanes=self.lanes)
                        k.store(acc, (j, i, 0), self._added(total, i, len(places), flips=kind > 0))

    def _added(self, total: Expr, i: int, units: int, flips: bool) -> Expr:
        """`total` and the products of the inputs with vector `i` of the weights of the units."""
        sums: Expr | None = None
        for d in range(units):
            x: Expr = load(self.inputs, d, 0, lanes=self.wide)
            if flips and d == units - 1:
                x = Binary("xor", x, Bitcast(load(self.weights, units, i, 0, lanes=self.wide), "uint8"))
            pair = PairSum(x, load(self.weights, d, i, 0, lanes=self.wide))
            sums = pair if sums is None else Binary("add", sums, pair)
        assert sums is not None
        return Dot(total, sums, constant(1, "int16", sums.lanes))

    def prefetch(self, column: Expr, chunk: Expr, number: Expr, tiles: int) -> None:
        """Ask for the constants of the next chunk or column while this one is used: tile number `number` of `tiles` for
        its share of their cache lines. Otherwise the first tile waits for memory at every step."""
        lines = -(-self.vectors.shape[2] * self.vectors.shape[3] // CACHE_LINE)
        share = -(-lines // tiles)
        for i in range(share):
            line = ix.mod(ix.add(ix.mul(number, share), i), lines)
            self.builder.prefetch(self.vectors, column, ix.add(chunk, 1), 0, ix.mul(line, CACHE_LINE))
