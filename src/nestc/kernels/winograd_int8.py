"""Winograd convolution of 8-bit integers with exact sums: fewer multiplications for small kernels of stride 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil, prod

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import CpuMachine, Launch, Layout, Lowered
from nestc.kernels.conv_int8 import CONV_INT8, IntegerConv, read_convolution
from nestc.kernels.conv_shape import ConvShape, conv_shape
from nestc.kernels.operands import Operands
from nestc.kernels.requantize import Requantize
from nestc.kernels.tail import Tail
from nestc.kernels.winograd_int8_plan import IntegerTiling, cycles, direct_cycles, plan
from nestc.kernels.winograd_int8_transform import IntegerTransform, IntegerTransforms, integer_transform
from nestc.kernels.winograd_plan import Plan
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, clamp, constant, load, select, splat, within
from nestc.tensor.ir import Binary, Buffer, Cast, Const, Dot, Expr, Load, Repeat, Shuffle, Var
from nestc.tensor.vectorize import vectorize

_CACHE_LINE = 64
_AHEAD = 32 << 10  # bytes of weights that are asked for early, as far as memory is away
_LEAST_CHANNELS = 16  # of inputs and of outputs: below that the transforms cost more than they save
_INT16 = (1 << 15) - 1
_REACH = 255  # largest difference of a byte and its zero point, of inputs and of weights


class WinogradInt8Family:
    """Convolutions as `ConvInt8Family` takes them, with stride 1, one group and kernels of 3 (or 1; along a single axis
    also of 5), computed in tiles of `m` outputs along each such axis.

    Transformed inputs and weights fit int16, products are summed in int32, which may wrap on the way: the result is
    that of the direct kernel bit for bit (`winograd_int8_transform`).
    """

    def __init__(self, m: int, fused: bool | None = None) -> None:
        """`fused`: whether an item of the parallel loop transforms its inputs itself; None: as `plan` decides."""
        self.m = m
        self.fused = fused
        self.name = f"winograd{m}_int8" + ("" if fused is None else "_fused" if fused else "_split")

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        known = CONV_INT8.refusal(region)
        if known is not None:
            return known
        conv = _read(region)
        s = conv_shape(conv.op, region)
        if len(s.out) > 2:
            return "only one or two spatial axes are transformed"
        if s.group != 1 or max(s.strides) > 1 or max(s.dilations) > 1:
            return "groups, strides and dilations are not transformed"
        axes = self.axes(s)
        if max(s.kernel) == 1 or axes is None:
            return f"F({self.m}, r) of kernel {s.kernel} is not among the transforms in integers"
        if min(s.in_channels, s.out_channels) < _LEAST_CHANNELS:
            return f"fewer than {_LEAST_CHANNELS} channels are not worth transforming"
        if prod(max(t.input_growth, t.weight_growth) for t in axes) * _REACH > _INT16:
            return f"transformed values of a kernel {s.kernel} do not fit in 16 bits"
        if not _sums_fit(region, conv, s, axes):
            return f"sums of {conv.op.name!r} have no {sum(max(t.shifts) for t in axes)} bits left of 32"
        return None

    def axes(self, s: ConvShape) -> tuple[IntegerTransform, IntegerTransform] | None:
        """The transforms along rows and columns, if there are such."""
        found = [integer_transform(self.m if k > 1 else 1, k) for k in ((1,) * (2 - len(s.kernel))) + s.kernel]
        vertical, horizontal = found
        return None if vertical is None or horizontal is None else (vertical, horizontal)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """As the direct convolution of integers wants them; with so many channels its input is blocked, too."""
        return CONV_INT8.layouts(region, machine, incoming)

    def tiling(self, region: Region, machine: CpuMachine) -> IntegerTiling:
        """How the region's output is cut into tiles."""
        shape = conv_shape(_read(region).op, region)
        axes = self.axes(shape)
        assert axes is not None
        return IntegerTiling(shape, axes, machine)

    def cycles(self, region: Region, machine: CpuMachine) -> tuple[float, float]:
        """Modelled cycles of this way, and of the direct kernel on the same terms."""
        tiling = self.tiling(region, machine)
        seven = bool(np.abs(_read(region).read_weights()).max(initial=0) <= 64)
        return cycles(tiling, plan(tiling, self.fused)), direct_cycles(tiling, seven)

    def other(self, region: Region, machine: CpuMachine) -> WinogradInt8Family:
        """The same algorithm, the input transform in the kernel where this one has it apart, or the other way round."""
        return WinogradInt8Family(self.m, not plan(self.tiling(region, machine), self.fused).fused)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One or two kernels; the weights are transformed and packed in the order in which they are read."""
        return self.lower_with(region, machine, layouts, plan(self.tiling(region, machine), self.fused))

    def lower_with(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout], cut: Plan) -> Lowered:
        """`lower` under a given plan."""
        return _Winograd(region, _read(region), layouts, self.tiling(region, machine), cut).lower()


def _read(region: Region) -> IntegerConv:
    found = read_convolution(region)
    assert isinstance(found, IntegerConv)
    return found


def _sums_fit(region: Region, conv: IntegerConv, s: ConvShape, axes: tuple[IntegerTransform, IntegerTransform]) -> bool:
    """Whether what is shifted away after the last transform is all that was too large: sums of inputs less their zero
    point times weights, shifted as far as any output is, fit in 32 bits."""
    room = (1 << (31 - sum(max(t.shifts) for t in axes))) - 1
    dtype = region.types[conv.x].dtype
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    below, above = (_REACH, _REACH) if isinstance(conv.zero, str) else (conv.zero - low, high - conv.zero)
    if prod(s.kernel) * s.in_channels * _REACH * max(below, above) <= room:
        return True
    weights = conv.read_weights().reshape(s.out_channels, -1)
    positive = np.maximum(weights, 0).sum(axis=1, dtype=np.int64)
    negative = positive - weights.sum(axis=1, dtype=np.int64)
    most = np.maximum(above * positive + below * negative, above * negative + below * positive)
    return int(most.max(initial=0)) <= room


class _Winograd:
    """Builds the kernels of one convolution, laid out as those of `winograd._Winograd`.

    - V[position][group][pair of blocks][mr][2 * lanes] int16, scratch memory of the item or a temporary;
    - U[chunk of outputs][position][register column][pair of blocks][two channels][nr * lanes * 2] int16, constant;
    - M[register column][tile][position][nr * lanes] int32, scratch memory.

    Positions of V lie an odd number of cache lines apart, since a transform touches all of them at once.
    """

    def __init__(
        self, region: Region, conv: IntegerConv, layouts: Mapping[str, Layout], tiling: IntegerTiling, cut: Plan
    ) -> None:
        self.region, self.conv, self.layouts = region, conv, layouts
        self.tiling, self.cut = tiling, cut
        self.shape = tiling.shape
        self.lanes = tiling.lanes
        self.wide = 2 * self.lanes
        self.vertical, self.horizontal = tiling.axes
        self.positions = tiling.positions
        self.rank = len(self.shape.out)
        # A missing axis counts as one pixel.
        self.size, self.pads = (
            (axis[0], axis[1]) if self.rank == 2 else (lone, axis[0])
            for axis, lone in ((self.shape.size, 1), (self.shape.pads_begin, 0))
        )
        self.out = tiling.out
        self.slack = 16
        self.chunks = ceil(tiling.groups(cut) / cut.groups)
        self.zero: Expr | None = None
        self.bytes_out: Buffer | None = None
        self.bytes_added: Buffer | None = None

    def lower(self) -> Lowered:
        """The launches, the packed weights, and V where it is a temporary."""
        w = self.conv.op.inputs[1]
        cut, lanes = self.cut, self.lanes
        weights, v_name, bias_name = f"{w}.winograd", f"{self.conv.x}.winograd", f"{w}.initial"
        constants = {weights: self.pack_weights()}
        if self.conv.bias is not None:
            padded = np.zeros((self.tiling.vectors, lanes), np.int32)
            padded.reshape(-1)[: self.shape.out_channels] = self.conv.bias
            constants[bias_name] = padded
        types = {name: TensorType(str(array.dtype), array.shape) for name, array in constants.items()}
        launches: list[Launch] = []
        temporaries: dict[str, TensorType] = {}
        block = self.tiling.pairs * cut.mr * self.wide  # elements of V of one group and position
        if not cut.fused:
            temporaries[v_name] = TensorType("int16", (self.positions, _odd_lines(self.tiling.groups(cut) * block)))
            launches.append(self.transform_kernel(v_name, temporaries[v_name]))
            types[v_name] = temporaries[v_name]
        k = Builder("winograd_int8")
        operands = Operands(k, self.region, self.layouts)
        for name, type_ in types.items():
            operands.define(name, type_)
        u = operands.buffer(weights)
        bias = operands.buffer(bias_name) if bias_name in types else None
        if cut.fused:
            source = self.declare_input(operands)
        else:
            source = operands.buffer(v_name)
        tail: Tail | Requantize = (
            Tail(operands, self.conv.op)
            if self.conv.scale is None
            else Requantize(operands, self.region, self.conv.op, self.conv.scale, 1, self.conv.offset)
        )
        self.narrow_view(operands, tail)
        if self.bytes_out is None:
            tail.declare()
        m = k.scratch("m", (cut.columns, cut.groups * cut.mr, self.positions * cut.nr * lanes + self.slack), "int32")
        v = k.scratch("v", (self.positions, _odd_lines(cut.groups * block)), "int16") if cut.fused else source
        back = IntegerTransforms(k, lanes, "int32")
        steps = self.tiling.steps(cut)
        if cut.fused:
            code = IntegerTransforms(k, self.wide, "int16")
            with k.parallel("item", self.chunks) as (chunk,):
                with k.loop("ib", self.tiling.pairs) as pair:
                    self.input_pair(k, code, source, v, chunk, pair, True)
                with k.loop("o", steps) as o:
                    self.multiply(k, u, v, m, chunk, o)
                    self.output_tiles(k, back, m, bias, tail, chunk, o)
        else:
            with k.parallel("item", self.chunks, steps) as (chunk, o):
                self.multiply(k, u, v, m, chunk, o)
                self.output_tiles(k, back, m, bias, tail, chunk, o)
        launches.append(operands.launch())
        return Lowered(tuple(launches), temporaries, {**operands.constants, **constants})

    def declare_input(self, operands: Operands) -> Buffer:
        """The parameter of the input, and its zero point where only the run knows it."""
        source = operands.buffer(self.conv.x)
        zero = self.conv.zero
        if isinstance(zero, str):
            place = (ix.const(0),) * len(self.region.types[zero].shape)
            self.zero = splat(Cast(operands.load(zero, place), "int16"), self.wide)
        elif zero:
            self.zero = constant(zero, "int16", self.wide)
        return source

    def narrow_view(self, operands: Operands, tail: Tail | Requantize) -> None:
        """The output as (image, block of channels, row, bytes of a row), if it is one QuantizeLinear and every block is
        full: then several pixels are requantized and written together."""
        if not isinstance(tail, Requantize) or not tail.narrows:
            return
        added = [] if tail.residual is None else [tail.residual.other]
        names = [self.region.outputs[0], *added]
        if self.shape.out_channels % self.lanes or any(self.layouts[name].block != self.lanes for name in names):
            return
        shape = (self.shape.batch, self.tiling.vectors, self.out[0], self.out[1] * self.lanes)
        self.bytes_out, *others = (operands.view(name, shape) for name in names)
        self.bytes_added = others[0] if others else None

    # -- constants

    def pack_weights(self) -> np.ndarray:
        """U = G g G^T in the order in which it is read; float32 holds all of its sums exactly."""
        s, cut, lanes, t = self.shape, self.cut, self.lanes, self.tiling
        weights = self.conv.read_weights()
        steps, wide = t.steps(cut), cut.nr * self.lanes
        taps = self.vertical.r * self.horizontal.r
        padded = np.zeros((taps, steps * cut.columns * wide, t.pairs * self.wide), np.float32)
        padded[:, : s.out_channels, : s.in_channels] = np.moveaxis(
            weights.reshape(s.out_channels, s.in_channels, taps), 2, 0
        )
        split = padded.reshape(taps, steps, cut.columns, wide, t.pairs, lanes, 2)
        both = np.kron(*(np.array(axis.g, np.float32) for axis in (self.vertical, self.horizontal)))
        packed = np.empty((steps, self.positions, cut.columns, t.pairs, lanes, wide * 2), np.int16)
        # In the order of the result first, while there is least of it; then it is one product a register column.
        for step, column in np.ndindex(steps, cut.columns):
            kernel = np.ascontiguousarray(split[:, step, column].transpose(0, 2, 3, 1, 4)).reshape(taps, -1)
            packed[step, :, column] = (both @ kernel).reshape(self.positions, t.pairs, lanes, wide * 2)
        return packed

    # -- the input transform

    def transform_kernel(self, target: str, type_: TensorType) -> Launch:
        """The input transform as a kernel of its own."""
        k = Builder("winograd_int8_input")
        operands = Operands(k, self.region, self.layouts)
        operands.define(target, type_)
        source, v = self.declare_input(operands), operands.buffer(target)
        code = IntegerTransforms(k, self.wide, "int16")
        with k.parallel("item", self.chunks, self.tiling.pairs) as (chunk, pair):
            self.input_pair(k, code, source, v, chunk, pair, False)
        return operands.launch()

    def input_pair(
        self, k: Builder, code: IntegerTransforms, x: Buffer, v: Buffer, chunk: Expr, pair: Expr, local: bool
    ) -> None:
        """Transform a pair of blocks of input channels of the tiles of a chunk; `local`: V holds this chunk only."""
        cut, wide = self.cut, self.wide
        rows, columns = self.vertical, self.horizontal
        half = k.stack("half", (rows.n, columns.n, wide), "int16")
        last = ix.const(self.tiling.groups(cut) - 1)
        with k.loop("q", cut.groups) as q, k.loop("j", cut.mr) as j:
            group = ix.add(ix.mul(chunk, cut.groups), q)
            with k.when(binary("le", group, last)):
                group = binary("min", group, last)
                n, top, left = self.corner(group, j)
                h, w = ix.add(ix.mul(top, rows.m), -self.pads[0]), ix.add(ix.mul(left, columns.m), -self.pads[1])
                self.load_tile(k, code, x, half, n, pair, h, w)
                place = ix.add(ix.mul(q if local else group, self.tiling.pairs), pair)
                offset = ix.mul(ix.add(ix.mul(place, cut.mr), j), wide)
                with k.loop("a", rows.n) as a:
                    d = [code.name(load(half, a, i, 0, lanes=wide)) for i in range(columns.n)]
                    for i, value in enumerate(code.inputs(columns, d)):
                        k.store(v, (ix.add(ix.mul(a, columns.n), i), offset), value)

    def corner(self, group: Expr, j: Expr) -> tuple[Expr, Expr, Expr]:
        """Image, tile row and tile column of a tile; of tiles past the last one, the first ones."""
        t = self.tiling
        number = ix.mod(ix.add(ix.mul(group, self.cut.mr), j), t.count)
        n, top, left = ix.unflatten(number, (self.shape.batch, *t.grid))
        return n, top, left

    def load_tile(
        self, k: Builder, code: IntegerTransforms, x: Buffer, half: Buffer, n: Expr, pair: Expr, h: Expr, w: Expr
    ) -> None:
        """A tile of inputs less their zero point, zeros outside the map, transformed along its columns."""
        rows, columns, wide = self.vertical.n, self.horizontal.n, self.wide
        height, width = self.size

        def transformed(b: Expr, d: Sequence[Expr]) -> None:
            for i, value in enumerate(code.inputs(self.vertical, d)):
                k.store(half, (i, b, 0), value)

        def ragged() -> None:
            known = [within(ix.add(h, i), height) for i in range(rows)]
            nothing = constant(0, "int16", wide)
            with k.loop("b", columns) as b:
                across = ix.add(w, b)
                here = within(across, width)
                with k.when(here):
                    column = clamp(across, 0, width - 1)
                    found: list[Expr] = []
                    for i, inside in enumerate(known):
                        if isinstance(inside, Const) and not inside.value:
                            found.append(nothing)
                            continue
                        value = self.pixels(code, x, n, pair, clamp(ix.add(h, i), 0, height - 1), column)
                        found.append(code.name(select(inside, value, nothing)))
                    transformed(b, found)
                with _otherwise(k, here):
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
                transformed(b, [self.pixels(code, x, n, pair, ix.add(top, i), ix.add(left, b)) for i in range(rows)])
        with _otherwise(k, inside):
            ragged()

    def pixels(self, code: IntegerTransforms, x: Buffer, n: Expr, pair: Expr, h: Expr, w: Expr) -> Expr:
        """A pair of blocks of channels of one pixel, less the zero point. Where the last pair has one block only, that
        one twice: the weights of the other are zero."""
        first = ix.mul(pair, 2)
        second = ix.add(first, 1)
        if self.tiling.blocks % 2:
            second = binary("min", second, ix.const(self.tiling.blocks - 1))
        a, b = (load(x, n, block, *self.pixel(h, w), 0, lanes=self.lanes) for block in (first, second))
        value: Expr = Cast(Shuffle(a, b, tuple(range(self.wide))), "int16")
        return code.name(value if self.zero is None else Binary("sub", value, self.zero))

    def pixel(self, h: Expr, w: Expr) -> tuple[Expr, ...]:
        """Spatial index of a pixel in the tensor's own axes."""
        return (h, w) if self.rank == 2 else (w,)

    # -- the products

    def multiply(self, k: Builder, u: Buffer, v: Buffer, m: Buffer, chunk: Expr, o: Expr) -> None:
        """M = V U at all positions, for a chunk of tiles and a chunk of outputs."""
        cut, lanes, wide, t = self.cut, self.lanes, self.wide, self.tiling
        acc = k.regs("acc", (cut.mr, cut.nr), lanes, "int32")
        wreg, xreg = k.regs("w", (cut.nr,), wide, "int16"), k.regs("x", (), wide, "int16")
        with k.loop("p", self.positions) as p, k.loop("g", cut.columns) as g, k.loop("q", cut.groups) as q:
            group = ix.add(ix.mul(chunk, cut.groups), q)
            with k.when(binary("lt", group, ix.const(t.groups(cut)))):
                # Limited as the condition says, so that it is known to lie inside.
                own = q if cut.fused else binary("min", group, ix.const(t.groups(cut) - 1))
                first = ix.mul(own, t.pairs)
                for j in range(cut.mr):
                    for i in range(cut.nr):
                        k.store(acc, (j, i, 0), constant(0, "int32", lanes))
                with k.loop("c", t.pairs) as pair:
                    self.prefetch(k, u, o, p, g, pair, q)
                    place = ix.mul(ix.add(first, pair), cut.mr * wide)
                    with k.unroll("l", lanes) as c:
                        for i in range(cut.nr):
                            k.store(wreg, (i, 0), load(u, o, p, g, pair, c, i * wide, lanes=wide))
                        for j in range(cut.mr):
                            both = load(v, p, ix.add(place, j * wide, ix.mul(c, 2)), lanes=2)
                            k.store(xreg, (0,), Repeat(both, lanes))
                            for i in range(cut.nr):
                                total = Dot(
                                    load(acc, j, i, 0, lanes=lanes),
                                    Load(xreg, (ix.const(0),), wide),
                                    load(wreg, i, 0, lanes=wide),
                                )
                                k.store(acc, (j, i, 0), total)
                for j in range(cut.mr):
                    for i in range(cut.nr):
                        place = ix.add(ix.mul(p, cut.nr * lanes), i * lanes)
                        k.store(m, (g, ix.add(ix.mul(q, cut.mr), j), place), load(acc, j, i, 0, lanes=lanes))

    def prefetch(self, k: Builder, u: Buffer, o: Expr, p: Expr, g: Expr, pair: Expr, q: Expr) -> None:
        """Ask for the weights of a later register column, or position, while these are used: each group of tiles for
        its share of the cache lines."""
        line = _CACHE_LINE // 2
        lines = self.lanes * self.cut.nr * self.wide // line
        share = ceil(lines / self.cut.groups)
        ahead = max(1, _AHEAD // (self.tiling.pairs * lines * _CACHE_LINE))
        for each in range(share):
            number = ix.mod(ix.add(ix.mul(q, share), each), lines)
            k.prefetch(u, o, p, ix.add(g, ahead), pair, 0, ix.mul(number, line))

    # -- the output transform

    def output_tiles(
        self,
        k: Builder,
        code: IntegerTransforms,
        m: Buffer,
        bias: Buffer | None,
        tail: Tail | Requantize,
        chunk: Expr,
        o: Expr,
    ) -> None:
        """Transform the products of a chunk of tiles and outputs back and store them through the tail."""
        cut, t = self.cut, self.tiling
        with k.loop("g", cut.columns) as g, k.loop("i", cut.nr) as i:
            column = ix.add(ix.mul(o, cut.columns), g)
            vector = ix.add(ix.mul(column, cut.nr), i)
            with k.when(binary("lt", vector, ix.const(t.vectors))):
                vector = binary("min", vector, ix.const(t.vectors - 1))
                with k.loop("q", cut.groups) as q, k.loop("j", cut.mr) as j:
                    group = ix.add(ix.mul(chunk, cut.groups), q)
                    with k.when(binary("lt", ix.add(ix.mul(group, cut.mr), j), ix.const(t.count))):
                        tile = (g, ix.add(ix.mul(q, cut.mr), j))
                        self.output_tile(k, code, m, bias, tail, vector, self.corner(group, j), tile, i)

    def output_tile(
        self,
        k: Builder,
        code: IntegerTransforms,
        m: Buffer,
        bias: Buffer | None,
        tail: Tail | Requantize,
        vector: Expr,
        corner: tuple[Expr, Expr, Expr],
        tile: tuple[Expr, Expr],
        within_column: Expr,
    ) -> None:
        """One vector of output channels of one tile."""
        rows, columns, lanes = self.vertical, self.horizontal, self.lanes
        n, top, left = corner
        half = k.stack("back", (rows.m, columns.n, lanes), "int32")
        with k.loop("b", columns.n) as b:
            places = [
                ix.add(ix.mul(ix.add(b, i * columns.n), self.cut.nr * lanes), ix.mul(within_column, lanes))
                for i in range(rows.n)
            ]
            found = [code.name(load(m, *tile, place, lanes=lanes)) for place in places]
            for i, value in enumerate(code.outputs(rows, found)):
                k.store(half, (i, b, 0), value)
        h, w = ix.mul(top, rows.m), ix.mul(left, columns.m)
        result = k.regs("y", (columns.m,), lanes, "int32")
        # Where the map ends within a tile, what is left of it.
        rest = self.out[1] % columns.m
        for a in range(rows.m):
            row = ix.add(h, a)
            with k.when(binary("lt", row, ix.const(self.out[0]))):
                row = binary("min", row, ix.const(self.out[0] - 1))
                found = [code.name(load(half, a, i, 0, lanes=lanes)) for i in range(columns.n)]
                for i, value in enumerate(code.outputs(columns, found)):
                    value = self.exact(value, rows.shifts[a] + columns.shifts[i])
                    if bias is not None:
                        value = Binary("add", value, load(bias, vector, 0, lanes=lanes))
                    k.store(result, (i, 0), value)
                # An output row narrower than a tile has no whole tiles; as it is, `whole` is then known to be false.
                whole = binary("le", w, ix.const(self.out[1] - columns.m))
                with k.when(whole):
                    start = binary("min", w, ix.const(max(0, self.out[1] - columns.m)))
                    self.finish(k, tail, result, n, vector, row, start, columns.m)
                if rest:
                    with _otherwise(k, whole):
                        self.finish(
                            k, tail, result, n, vector, row, binary("min", w, ix.const(self.out[1] - rest)), rest
                        )

    def exact(self, value: Expr, shift: int) -> Expr:
        """An output of the last transform as the sum that it stands for."""
        odd = self.vertical.odd * self.horizontal.odd
        if odd != 1:
            inverse = pow(odd, -1, 1 << 32)
            inverse -= (inverse >> 31) << 32
            value = Binary("mul", value, constant(inverse, "int32", self.lanes))
        return Binary("shr", value, constant(shift, "int32", self.lanes)) if shift else value

    def finish(
        self,
        k: Builder,
        tail: Tail | Requantize,
        result: Buffer,
        n: Expr,
        vector: Expr,
        row: Expr,
        column: Expr,
        count: int,
    ) -> None:
        """Store `count` neighbouring outputs of a row through the tail."""
        lanes = self.lanes
        if self.bytes_out is None:
            for i in range(count):
                lane = Var(f"lane{i}", lanes)
                index = (n, ix.add(ix.mul(vector, lanes), lane), *self.pixel(row, ix.add(column, i)))
                k.emit(vectorize(tail.stores(index, Load(result, (ix.const(i), lane))), lane, ix.const(0), lanes))
            return
        assert isinstance(tail, Requantize)
        done = 0
        while done < count:
            # As many as one vector of bytes holds, and powers of two of what is left.
            together = min(4, 1 << ((count - done).bit_length() - 1))
            columns = [ix.mul(ix.add(column, done + j), lanes) for j in range(together)]
            sums = [load(result, done + j, 0, lanes=lanes) for j in range(together)]
            added = self.bytes_added
            others = [] if added is None else [load(added, n, vector, row, each, lanes=lanes) for each in columns]
            k.store(self.bytes_out, (n, vector, row, columns[0]), tail.narrow(ix.mul(vector, lanes), sums, others))
            done += together


def _between(i: Expr, low: int, high: int) -> Expr:
    """low <= i <= high, decided now where intervals allow."""
    return binary("and", binary("ge", i, ix.const(low)), binary("le", i, ix.const(high)))


@contextmanager
def _otherwise(k: Builder, condition: Expr) -> Iterator[None]:
    """Statements for where the condition of the `when` just closed does not hold."""
    with k.when(Const(not condition.value, "bool")) if isinstance(condition, Const) else k.otherwise():
        yield


def _odd_lines(elements: int) -> int:
    """At least `elements` int16 that fill an odd number of cache lines."""
    return (ceil(elements / 32) | 1) * 32


WINOGRAD_INT8 = tuple(WinogradInt8Family(m) for m in (2, 4))
