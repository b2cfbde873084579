"""Input rows of an integer convolution in scratch memory: as wide as its `Dot` takes them, padded, strides resolved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, prod

import numpy as np

from nestc.kernels.api import Layout
from nestc.kernels.conv_shape import ConvShape
from nestc.kernels.operands import Operands
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, constant, load, splat, within
from nestc.tensor.ir import Binary, Buffer, Cast, Const, Expr, Shuffle
from nestc.tensor.rewrite import cast

_CACHE_LINE = 64


@dataclass(frozen=True)
class Axis:
    """How staged places along one axis map to the input: place p is input ``p * step - pad``; output o with tap t reads
    place ``o * stride + t * dilation``."""

    step: int
    pad: int
    stride: int
    dilation: int
    size: int
    kernel: int

    @staticmethod
    def of(shape: ConvShape, axis: int) -> Axis:
        """An axis of the convolution; where the kernel has one tap, only what is read is staged."""
        stride, dilation = shape.strides[axis], shape.dilations[axis]
        pad, size, kernel = shape.pads_begin[axis], shape.size[axis], shape.kernel[axis]
        if kernel == 1:
            return Axis(stride, pad, 1, 1, size, 1)
        return Axis(1, pad, stride, dilation, size, kernel)

    def reach(self, outputs: int) -> int:
        """Staged places that `outputs` neighbouring outputs read."""
        return (outputs - 1) * self.stride + (self.kernel - 1) * self.dilation + 1

    def inside(self, places: int) -> tuple[int, int]:
        """First place, and one past the last of `places`, that lies inside the input."""
        first = min(places, max(0, ceil(self.pad / self.step)))
        end = min(places, (self.size - 1 + self.pad) // self.step + 1)
        return first, max(first, end)


class Stage:
    """Scratch ``[block of channels][plane][row][column][channel]`` of one item, and the code that fills it.

    A plane is one combination of taps on the axes before the last two. Blocks start on different cache sets, since a
    tile reads all of them at the same place.
    """

    def __init__(
        self,
        operands: Operands,
        name: str,
        shape: ConvShape,
        rows: int,
        channels: int,
        block: int,
        dtype: str,
        group: int,
        registers_bytes: int,
    ) -> None:
        """For `rows` output rows of `channels` input channels (one group's) in blocks of `block`, as `dtype`; `group`
        channels are read at once."""
        self.operands, self.name, self.shape = operands, name, shape
        self.builder: Builder = operands.builder
        self.block, self.channels, self.dtype = block, channels, dtype
        self.blocks = ceil(channels / block)
        self.source_dtype = operands.type(name).dtype
        self.axes = tuple(Axis.of(shape, d) for d in range(len(shape.out)))
        self.row_axis, self.column_axis = self.axes[-2], self.axes[-1]
        self.rows_in = self.row_axis.reach(rows)
        self.columns = self.column_axis.reach(shape.out[-1])
        self.planes = prod(axis.kernel for axis in self.axes[:-2])
        self.element = 2 if dtype == "int16" else 1
        self.lanes = registers_bytes // self.element
        # Two vectors of slack: ragged vectors and the last group of a row may run past it.
        self.line = self.columns * block
        elements = self.planes * self.rows_in * self.line + max(2 * self.lanes, group)
        per_line = _CACHE_LINE // self.element
        self.stride = (ceil(elements / per_line) | 1) * per_line
        layout = operands.layout(name)
        self.blocked = layout.block != 0
        if self.blocked and layout.block != block:
            raise ValueError(f"{name} lies in blocks of {layout.block} channels, not {block}")
        self.source = self._source(layout)

    def _source(self, layout: Layout) -> Buffer:
        s = self.shape
        channels = self.operands.type(self.name).shape[1]
        if not self.blocked:
            return self.operands.view(self.name, (s.batch, channels, *s.size))
        blocks = ceil(channels / layout.block)
        return self.operands.view(self.name, (s.batch, blocks, *s.size[:-1], s.size[-1] * layout.block))

    @property
    def bytes(self) -> int:
        """Scratch that the stage takes."""
        return self.blocks * self.stride * self.element

    def declare(self, beyond: int = 0) -> None:
        """Reserve the scratch memory, and `beyond` elements that are not filled (nor touched) behind it."""
        self.buffer = self.builder.scratch("staged", (self.blocks * self.stride + beyond,), self.dtype)

    def place(self, block: Expr, plane: Expr, row: Expr, column: Expr) -> Expr:
        """Place of the first channel of a staged pixel."""
        line = ix.add(ix.mul(plane, self.rows_in), row)
        return ix.add(ix.mul(block, self.stride), ix.mul(line, self.line), ix.mul(column, self.block))

    def fill(self, n: Expr, first_channel: Expr, outer: tuple[Expr, ...], row: Expr, zero: Expr, shift: int) -> None:
        """Stage what the output rows from `row` on read; `outer` are their places on the axes before.

        Values are shifted by `shift` (-128, 0 or 128, to change between signed and unsigned); `zero` (of the staged
        dtype, shifted) stands outside the input.
        """
        k = self.builder
        with k.loop("sb", self.blocks) as block, k.loop("sp", self.planes) as plane:
            taps = ix.unflatten(plane, tuple(axis.kernel for axis in self.axes[:-2]))
            with k.loop("sr", self.rows_in) as staged_row:
                sources = [
                    ix.add(ix.mul(o, a.step * a.stride), ix.mul(t, a.step * a.dilation), -a.pad)
                    for o, t, a in zip(outer, taps, self.axes[:-2])
                ]
                sources.append(
                    ix.add(
                        ix.mul(ix.add(ix.mul(row, self.row_axis.stride), staged_row), self.row_axis.step),
                        -self.row_axis.pad,
                    )
                )
                inside: Expr = Const(True, "bool")
                for source, axis in zip(sources, self.axes[:-1]):
                    inside = binary("and", inside, within(source, axis.size))
                base = self.place(block, plane, staged_row, ix.const(0))

                def copy(sources: list[Expr] = sources, block: Expr = block, base: Expr = base) -> None:
                    self._row(n, ix.add(first_channel, ix.mul(block, self.block)), sources, base, zero, shift)

                self._branch(inside, copy, lambda: self._blank(base, 0, self.columns, zero))

    def _branch(self, cond: Expr, then: Callable[[], None], orelse: Callable[[], None]) -> None:
        k = self.builder
        if isinstance(cond, Const):
            (then if cond.value else orelse)()
            return
        with k.when(cond):
            then()
        with k.otherwise():
            orelse()

    def _blank(self, base: Expr, first: int, end: int, zero: Expr) -> None:
        """Columns outside the input."""
        count = (end - first) * self.block
        self._runs(count, lambda at, lanes: self._put(ix.add(base, first * self.block, at), splat(zero, lanes)))

    def _runs(self, count: int, body: Callable[[Expr, int], None]) -> None:
        """`count` neighbouring elements in vectors, then shorter vectors, by powers of two."""
        k, done, lanes = self.builder, 0, self.lanes
        while done < count:
            whole = (count - done) // lanes
            with k.loop("sv", whole) as v:
                if whole:
                    body(ix.add(ix.mul(v, lanes), done), lanes)
            done += whole * lanes
            lanes //= 2

    def _put(self, place: Expr, value: Expr) -> None:
        self.builder.store(self.buffer, (place,), value)

    def _row(self, n: Expr, channel: Expr, sources: list[Expr], base: Expr, zero: Expr, shift: int) -> None:
        """One row of one block of channels, with what lies left and right of the input."""
        axis = self.column_axis
        first, end = axis.inside(self.columns)
        self._blank(base, 0, first, zero)
        start = ix.add(base, first * self.block)
        column = first * axis.step - axis.pad
        if not self.blocked:
            self._interleave(n, channel, sources, start, column, end - first, shift)
        elif axis.step == 1:
            rest = (n, ix.floordiv(channel, self.block), *sources)

            def copy(at: Expr, lanes: int) -> None:
                value = load(self.source, *rest, ix.add(at, column * self.block), lanes=lanes)
                self._put(ix.add(start, at), self._converted(value, shift))

            self._runs((end - first) * self.block, copy)
        else:
            with self.builder.loop("sc", end - first) as c:
                place = ix.mul(ix.add(ix.mul(c, axis.step), column), self.block)
                value = load(self.source, n, ix.floordiv(channel, self.block), *sources, place, lanes=self.block)
                self._put(ix.add(start, ix.mul(c, self.block)), self._converted(value, shift))
        self._blank(base, end, self.columns, zero)

    def _interleave(
        self,
        n: Expr,
        channel: Expr,
        sources: list[Expr],
        start: Expr,
        column: int,
        count: int,
        shift: int,
    ) -> None:
        """A row of a plain input: its channels are planes, which come to lie next to each other."""
        k, axis = self.builder, self.column_axis
        done = 0
        if axis.step == 1 and 1 < self.block <= 4 and self.blocks == 1:
            lanes = min(16, self.lanes)
            done = count // lanes * lanes
            with k.loop("sv", count // lanes) as v:
                if done:
                    at = ix.mul(v, lanes)
                    rows = [
                        load(self.source, n, ix.add(channel, c), *sources, ix.add(at, column), lanes=lanes)
                        for c in range(self.block)
                    ]
                    for i, vector in enumerate(_interleaved(rows)):
                        place = ix.add(start, ix.mul(at, self.block), i * lanes)
                        self._put(place, self._converted(vector, shift))
        with k.loop("sc", count - done) as c, k.loop("si", self.block) as i:
            if count - done:
                at = ix.add(c, done)
                source = ix.add(channel, i)
                place = (n, source, *sources, ix.add(ix.mul(at, axis.step), column))
                inside = within(source, self.source.shape[1])
                value = load(self.source, *place, mask=None if isinstance(inside, Const) else inside)
                self._put(ix.add(start, ix.mul(at, self.block), i), self._converted(value, shift))

    def _converted(self, value: Expr, shift: int) -> Expr:
        """Input values as the staged dtype, shifted."""
        if shift == 0:
            return cast(value, self.dtype)
        if self.element == 1:
            flipped = Binary("xor", value, constant(-128 if value.dtype == "int8" else 128, value.dtype, value.lanes))
            return Cast(flipped, self.dtype)
        return Binary("add", cast(value, self.dtype), constant(shift, self.dtype, value.lanes))


def _interleaved(rows: Sequence[Expr]) -> list[Expr]:
    """Vectors of n lanes, lane by lane: as many vectors, the first with the first lanes of all."""
    count, lanes = len(rows), rows[0].lanes
    width = 1 << (count - 1).bit_length()
    padded = [*rows, *[rows[-1]] * (width - count)]
    while len(padded) > 1:
        both = range(2 * padded[0].lanes)
        padded = [Shuffle(a, b, tuple(both)) for a, b in zip(padded[::2], padded[1::2])]
    joined = padded[0]
    order = np.arange(count * lanes)
    picks = (order % count) * lanes + order // count
    return [Shuffle(joined, joined, tuple(int(p) for p in picks[i * lanes : (i + 1) * lanes])) for i in range(count)]
