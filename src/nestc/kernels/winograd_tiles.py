"""What Winograd kernels of every number format share: tiles, the walk over them, and the products at each position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from typing import Generic, Protocol, TypeVar

from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine, Layout
from nestc.kernels.conv_shape import ConvShape
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, clamp, constant, load, within
from nestc.tensor.ir import Buffer, Const, Expr, Load

_CACHE_LINE = 64
_SLOTS = 64  # values that the transforms of one kernel name
_SLACK = 16  # elements of M between tiles, so that they do not fall into the same sets of the cache


class Side(Protocol):
    """A transform along one axis: ``m`` outputs of a tile from ``n`` inputs, ``stride`` inputs apart."""

    @property
    def m(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def stride(self) -> int: ...


S = TypeVar("S", bound=Side)


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


@dataclass(frozen=True)
class Tiles(Generic[S]):
    """The tiles of a convolution: `axes` are the transforms along rows (vertical) and columns (horizontal)."""

    shape: ConvShape
    axes: tuple[S, S]
    machine: CpuMachine

    @property
    def lanes(self) -> int:
        """Channels of a block."""
        return self.machine.lanes("float32")

    @property
    def out(self) -> tuple[int, int]:
        """Outputs along both axes; a missing one counts as one pixel."""
        out = self.shape.out if len(self.shape.out) == 2 else (1, *self.shape.out)
        return out[0], out[1]

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along each axis of an image."""
        return ceil(self.out[0] / self.axes[0].m), ceil(self.out[1] / self.axes[1].m)

    @property
    def count(self) -> int:
        """Tiles of all images."""
        return self.shape.batch * prod(self.grid)

    @property
    def positions(self) -> int:
        """Products of a tile and a pair of channels."""
        return self.axes[0].n * self.axes[1].n

    @property
    def blocks(self) -> int:
        """Blocks of input channels."""
        return ceil(self.shape.in_channels / self.lanes)

    @property
    def vectors(self) -> int:
        """Vectors of output channels."""
        return ceil(self.shape.out_channels / self.lanes)

    def groups(self, cut: Plan) -> int:
        """Register tiles' tiles in all."""
        return ceil(self.count / cut.mr)

    def steps(self, cut: Plan) -> int:
        """Chunks of outputs."""
        return ceil(ceil(self.vectors / cut.nr) / cut.columns)


class Named:
    """Names values of a kernel, so that each is computed once."""

    def __init__(self, builder: Builder, lanes: int, dtype: str) -> None:
        self.builder = builder
        self.lanes, self.dtype = lanes, dtype
        self.values = builder.regs("v", (_SLOTS,), lanes, dtype)
        self.next = 0

    def name(self, value: Expr) -> Expr:
        """Compute `value` here, once."""
        slot = self.next % _SLOTS
        self.next += 1
        self.builder.store(self.values, (slot, 0), value)
        return load(self.values, slot, 0, lanes=self.lanes)


S_contra = TypeVar("S_contra", bound=Side, contravariant=True)


class Code(Protocol[S_contra]):
    """Emits transforms along one axis, of vectors of channels."""

    def name(self, value: Expr) -> Expr:
        """`value` under a name."""
        ...

    def inputs(self, t: S_contra, d: Sequence[Expr]) -> list[Expr]:
        """The input transform."""
        ...

    def outputs(self, t: S_contra, m: Sequence[Expr]) -> list[Expr]:
        """The output transform."""
        ...


class TileKernel(ABC, Generic[S]):
    """Builds the kernels of one convolution; what the numbers are is the subclass's business.

    ``factor``, ``total``: dtypes of factors and sums. ``depth``: steps of input channels, each of `wide` factors.
    """

    factor: str
    total: str

    def __init__(
        self, region: Region, layouts: Mapping[str, Layout], tiling: Tiles[S], cut: Plan, depth: int, wide: int
    ) -> None:
        self.region, self.layouts, self.cut = region, layouts, cut
        self.tiles, self.shape, self.lanes = tiling, tiling.shape, tiling.lanes
        self.depth, self.wide = depth, wide
        self.vertical, self.horizontal = tiling.axes
        self.positions = tiling.positions
        self.rank = len(self.shape.out)
        # A missing axis counts as one pixel.
        self.size, self.pads = (
            (axis[0], axis[1]) if self.rank == 2 else (lone, axis[0])
            for axis, lone in ((self.shape.size, 1), (self.shape.pads_begin, 0))
        )
        self.out = tiling.out
        self.chunks = ceil(tiling.groups(cut) / cut.groups)
        self.bytes = 2 if self.factor == "int16" else 4
        self.ahead = 1  # register columns whose weights are asked for early

    # -- what a subclass supplies

    @abstractmethod
    def column(self, code: Code[S], x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr) -> list[Expr]:
        """The named inputs of a tile in column `w` from row `h` on, all inside the map."""

    @abstractmethod
    def ragged_column(
        self, code: Code[S], x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr, rows: Sequence[Expr], here: Expr
    ) -> list[Expr]:
        """The same where the map ends: `rows` say which of them are inside, `here` that the column is."""

    @abstractmethod
    def broadcast(self, v: Buffer, p: Expr, place: Expr, j: int, c: Expr) -> Expr:
        """The factors of step `c` of tile `j` in all lanes; the block of its register tile begins at `place`."""

    @abstractmethod
    def added(self, acc: Expr, x: Expr, w: Expr) -> Expr:
        """``acc + x * w``."""

    def prefetch_inputs(self, k: Builder, x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr) -> None:
        """Ask for inputs that a tile needs next, where that pays."""

    # -- buffers

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

    # -- the input transform

    def input_block(
        self, k: Builder, code: Code[S], x: Buffer, v: Buffer, chunk: Expr, block: Expr, local: bool
    ) -> None:
        """Transform one step of input channels of the tiles of a chunk; `local`: V holds this chunk only."""
        cut, wide = self.cut, self.wide
        rows, columns = self.vertical, self.horizontal
        half = k.stack("half", (rows.n, columns.n, wide), self.factor)
        last = ix.const(self.tiles.groups(cut) - 1)
        with k.loop("q", cut.groups) as q, k.loop("j", cut.mr) as j:
            group = ix.add(ix.mul(chunk, cut.groups), q)
            with k.when(binary("le", group, last)):
                group = binary("min", group, last)
                n, top, left = self.corner(group, j)
                h = ix.add(ix.mul(top, rows.stride * rows.m), -self.pads[0])
                w = ix.add(ix.mul(left, columns.stride * columns.m), -self.pads[1])
                if local:
                    self.prefetch_inputs(k, x, n, block, h, w)
                self.load_tile(k, code, x, half, n, block, h, w)
                place = ix.add(ix.mul(q if local else group, self.depth), block)
                offset = ix.mul(ix.add(ix.mul(place, cut.mr), j), wide)
                with k.loop("a", rows.n) as a:
                    d = [code.name(load(half, a, i, 0, lanes=wide)) for i in range(columns.n)]
                    for i, value in enumerate(code.inputs(columns, d)):
                        k.store(v, (ix.add(ix.mul(a, columns.n), i), offset), value)

    def corner(self, group: Expr, j: Expr) -> tuple[Expr, Expr, Expr]:
        """Image, tile row and tile column of a tile; of tiles past the last one, the first ones."""
        t = self.tiles
        number = ix.mod(ix.add(ix.mul(group, self.cut.mr), j), t.count)
        n, top, left = ix.unflatten(number, (self.shape.batch, *t.grid))
        return n, top, left

    def load_tile(
        self, k: Builder, code: Code[S], x: Buffer, half: Buffer, n: Expr, block: Expr, h: Expr, w: Expr
    ) -> None:
        """A tile of inputs, zeros outside the map, transformed along its columns."""
        rows, columns = self.vertical.n, self.horizontal.n
        height, width = self.size
        nothing = constant(0 if self.bytes == 2 else 0.0, self.factor, self.wide)

        def transformed(b: Expr, d: Sequence[Expr]) -> None:
            for i, value in enumerate(code.inputs(self.vertical, d)):
                k.store(half, (i, b, 0), value)

        def ragged() -> None:
            known = [within(ix.add(h, i), height) for i in range(rows)]
            with k.loop("b", columns) as b:
                across = ix.add(w, b)
                here = within(across, width)
                with k.when(here):
                    transformed(b, self.ragged_column(code, x, n, block, h, across, known, here))
                with otherwise(k, here):
                    for i in range(rows):
                        k.store(half, (i, b, 0), nothing)

        if height < rows or width < columns:
            ragged()
            return
        inside = binary("and", _between(h, 0, height - rows), _between(w, 0, width - columns))
        with k.when(inside):
            # Both are as they were; limited, they are known to lie inside.
            top, left = clamp(h, 0, height - rows), clamp(w, 0, width - columns)
            with k.loop("b", columns) as b:
                transformed(b, self.column(code, x, n, block, top, ix.add(left, b)))
        with otherwise(k, inside):
            ragged()

    def pixel(self, h: Expr, w: Expr) -> tuple[Expr, ...]:
        """Spatial index of a pixel in the tensor's own axes."""
        return (h, w) if self.rank == 2 else (w,)

    # -- the products

    def multiply(self, k: Builder, u: Buffer, v: Buffer, m: Buffer, chunk: Expr, o: Expr) -> None:
        """M = V U at all positions, for a chunk of tiles and a chunk of outputs."""
        cut, lanes, wide, t = self.cut, self.lanes, self.wide, self.tiles
        acc = k.regs("acc", (cut.mr, cut.nr), lanes, self.total)
        wreg, xreg = k.regs("w", (cut.nr,), wide, self.factor), k.regs("x", (), wide, self.factor)
        with k.loop("p", self.positions) as p, k.loop("g", cut.columns) as g, k.loop("q", cut.groups) as q:
            group = ix.add(ix.mul(chunk, cut.groups), q)
            with k.when(binary("lt", group, ix.const(t.groups(cut)))):
                # Limited as the condition says, so that it is known to lie inside.
                own = q if cut.fused else binary("min", group, ix.const(t.groups(cut) - 1))
                first = ix.mul(own, self.depth)
                for j in range(cut.mr):
                    for i in range(cut.nr):
                        k.store(acc, (j, i, 0), constant(0 if self.bytes == 2 else 0.0, self.total, lanes))
                with k.loop("c", self.depth) as block:
                    self.prefetch(k, u, o, p, g, block, q)
                    place = ix.mul(ix.add(first, block), cut.mr * wide)
                    with k.unroll("l", lanes) as c:
                        for i in range(cut.nr):
                            k.store(wreg, (i, 0), load(u, o, p, g, block, c, i * wide, lanes=wide))
                        for j in range(cut.mr):
                            k.store(xreg, (0,), self.broadcast(v, p, place, j, c))
                            for i in range(cut.nr):
                                x, w = Load(xreg, (ix.const(0),), wide), load(wreg, i, 0, lanes=wide)
                                k.store(acc, (j, i, 0), self.added(load(acc, j, i, 0, lanes=lanes), x, w))
                for j in range(cut.mr):
                    for i in range(cut.nr):
                        place = ix.add(ix.mul(p, cut.nr * lanes), i * lanes)
                        k.store(m, (g, ix.add(ix.mul(q, cut.mr), j), place), load(acc, j, i, 0, lanes=lanes))

    def prefetch(self, k: Builder, u: Buffer, o: Expr, p: Expr, g: Expr, block: Expr, q: Expr) -> None:
        """Ask for the weights of a later register column, or position, while these are used: each group of tiles for
        its share of the cache lines."""
        line = _CACHE_LINE // self.bytes
        lines = self.column_lines()
        share = ceil(lines / self.cut.groups)
        for each in range(share):
            number = ix.mod(ix.add(ix.mul(q, share), each), lines)
            k.prefetch(u, o, p, ix.add(g, self.ahead), block, 0, ix.mul(number, line))

    def column_lines(self) -> int:
        """Cache lines of the weights of a register column and one step of input channels."""
        return self.lanes * self.cut.nr * self.wide * self.bytes // _CACHE_LINE

    # -- the output transform

    def output_tiles(self, k: Builder, code: Code[S], m: Buffer, chunk: Expr, o: Expr) -> None:
        """Transform the products of a chunk of tiles and outputs back and store them."""
        cut, t = self.cut, self.tiles
        with k.loop("g", cut.columns) as g, k.loop("i", cut.nr) as i:
            column = ix.add(ix.mul(o, cut.columns), g)
            vector = ix.add(ix.mul(column, cut.nr), i)
            with k.when(binary("lt", vector, ix.const(t.vectors))):
                vector = binary("min", vector, ix.const(t.vectors - 1))
                with k.loop("q", cut.groups) as q, k.loop("j", cut.mr) as j:
                    group = ix.add(ix.mul(chunk, cut.groups), q)
                    with k.when(binary("lt", ix.add(ix.mul(group, cut.mr), j), ix.const(t.count))):
                        half = self.back(k, code, m, (g, ix.add(ix.mul(q, cut.mr), j)), i)
                        self.output_tile(k, code, half, vector, self.corner(group, j))

    def back(self, k: Builder, code: Code[S], m: Buffer, tile: tuple[Expr, Expr], within_column: Expr) -> Buffer:
        """The products of a tile and a vector of outputs, transformed back along the tile's columns."""
        rows, columns, lanes = self.vertical, self.horizontal, self.lanes
        half = k.stack("back", (rows.m, columns.n, lanes), self.total)
        with k.loop("b", columns.n) as b:
            places = [
                ix.add(ix.mul(ix.add(b, i * columns.n), self.cut.nr * lanes), ix.mul(within_column, lanes))
                for i in range(rows.n)
            ]
            found = [code.name(load(m, *tile, place, lanes=lanes)) for place in places]
            for i, value in enumerate(code.outputs(rows, found)):
                k.store(half, (i, b, 0), value)
        return half

    @abstractmethod
    def output_tile(
        self, k: Builder, code: Code[S], half: Buffer, vector: Expr, corner: tuple[Expr, Expr, Expr]
    ) -> None:
        """Transform the rows of a tile back, too, and store its outputs."""


def _between(i: Expr, low: int, high: int) -> Expr:
    """low <= i <= high, decided now where intervals allow."""
    return binary("and", binary("ge", i, ix.const(low)), binary("le", i, ix.const(high)))


@contextmanager
def otherwise(k: Builder, condition: Expr) -> Iterator[None]:
    """Statements for where the condition of the `when` just closed does not hold."""
    with k.when(Const(not condition.value, "bool")) if isinstance(condition, Const) else k.otherwise():
        yield
