"""What Winograd kernels of every number format share: tiles, the walk over them, and the products at each position."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from typing import Generic, Protocol, TypeVar

from nestc.graph.region import Region
from nestc.kernels.api import CpuMachine, Layout
from nestc.kernels.conv_shape import ConvShape
from nestc.kernels.position_products import Plan, PositionProducts
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, clamp, constant, load, within
from nestc.tensor.ir import Buffer, Const, Expr

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


class TileKernel(PositionProducts, Generic[S]):
    """Builds the kernels of one convolution; what the numbers are is the subclass's business."""

    def __init__(
        self, region: Region, layouts: Mapping[str, Layout], tiling: Tiles[S], cut: Plan, depth: int, wide: int
    ) -> None:
        super().__init__(cut, tiling.lanes, tiling.positions, tiling.groups(cut), depth, wide)
        self.region, self.layouts = region, layouts
        self.tiles, self.shape = tiling, tiling.shape
        self.vertical, self.horizontal = tiling.axes
        self.rank = len(self.shape.out)
        # A missing axis counts as one pixel.
        self.size, self.pads = (
            (axis[0], axis[1]) if self.rank == 2 else (lone, axis[0])
            for axis, lone in ((self.shape.size, 1), (self.shape.pads_begin, 0))
        )
        self.out = tiling.out

    # -- what a subclass supplies

    @abstractmethod
    def column(self, code: Code[S], x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr) -> list[Expr]:
        """The named inputs of a tile in column `w` from row `h` on, all inside the map."""

    @abstractmethod
    def ragged_column(
        self, code: Code[S], x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr, rows: Sequence[Expr], here: Expr
    ) -> list[Expr]:
        """The same where the map ends: `rows` say which of them are inside, `here` that the column is."""

    def prefetch_inputs(self, k: Builder, x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr) -> None:
        """Ask for inputs that a tile needs next, where that pays."""

    # -- the input transform

    def input_block(
        self, k: Builder, code: Code[S], x: Buffer, v: Buffer, chunk: Expr, block: Expr, local: bool
    ) -> None:
        """Transform one step of input channels of the tiles of a chunk; `local`: V holds this chunk only."""
        cut, wide = self.cut, self.wide
        rows, columns = self.vertical, self.horizontal
        half = k.stack("half", (rows.n, columns.n, wide), self.factor)
        last = ix.const(self.groups - 1)
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
