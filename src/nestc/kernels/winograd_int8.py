"""Winograd convolution of 8-bit integers with exact sums: fewer multiplications for small kernels of stride 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import CpuMachine, Launch, Layout, Lowered
from nestc.kernels.conv_int8 import CONV_INT8, IntegerConv, read_convolution
from nestc.kernels.conv_shape import ConvShape, conv_shape
from nestc.kernels.operands import Operands
from nestc.kernels.position_products import Plan
from nestc.kernels.requantize import Requantize
from nestc.kernels.tail import Tail
from nestc.kernels.winograd_int8_plan import IntegerTiling, cycles, direct_cycles, plan
from nestc.kernels.winograd_int8_transform import IntegerTransform, IntegerTransforms, integer_transform
from nestc.kernels.winograd_tiles import Code, TileKernel, otherwise
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, clamp, constant, load, select, splat
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


class _Winograd(TileKernel[IntegerTransform]):
    """Builds the kernels of one convolution, laid out as those of `winograd._Winograd`.

    - V[position][group][pair of blocks][mr][2 * lanes] int16, scratch memory of the item or a temporary;
    - U[chunk of outputs][position][register column][pair of blocks][two channels][nr * lanes * 2] int16, constant;
    - M[register column][tile][position][nr * lanes] int32, scratch memory.
    """

    factor, total = "int16", "int32"

    def __init__(
        self, region: Region, conv: IntegerConv, layouts: Mapping[str, Layout], tiling: IntegerTiling, cut: Plan
    ) -> None:
        super().__init__(region, layouts, tiling, cut, tiling.pairs, 2 * tiling.lanes)
        self.conv, self.tiling = conv, tiling
        self.ahead = max(1, _AHEAD // (tiling.pairs * self.column_lines() * _CACHE_LINE))
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
        if not cut.fused:
            elements = self.lines(self.tiling.groups(cut) * self.block())
            temporaries[v_name] = TensorType("int16", (self.positions, elements))
            launches.append(self.transform_kernel(v_name, temporaries[v_name]))
            types[v_name] = temporaries[v_name]
        k = Builder("winograd_int8")
        operands = Operands(k, self.region, self.layouts)
        for name, type_ in types.items():
            operands.define(name, type_)
        u = operands.buffer(weights)
        self.bias = operands.buffer(bias_name) if bias_name in types else None
        if cut.fused:
            source = self.declare_input(operands)
        else:
            source = operands.buffer(v_name)
        self.tail: Tail | Requantize = (
            Tail(operands, self.conv.op)
            if self.conv.scale is None
            else Requantize(operands, self.region, self.conv.op, self.conv.scale, 1, self.conv.offset)
        )
        self.narrow_view(operands, self.tail)
        if self.bytes_out is None:
            self.tail.declare()
        m = self.products(k)
        v = k.scratch("v", (self.positions, self.lines(cut.groups * self.block())), "int16") if cut.fused else source
        back = IntegerTransforms(k, lanes, "int32")
        code = IntegerTransforms(k, self.wide, "int16") if cut.fused else back

        def outputs(chunk: Expr, o: Expr) -> None:
            self.multiply(k, u, v, m, chunk, o)
            self.output_tiles(k, back, m, chunk, o)

        prepare = partial(self.input_block, k, code, source, v, local=True)
        self.items(k, self.tiling.steps(cut), prepare, outputs)
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
            self.input_block(k, code, source, v, chunk, pair, False)
        return operands.launch()

    def column(self, code: Code[IntegerTransform], x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr) -> list[Expr]:
        """The named inputs of a tile in column `w` from row `h` on, all inside the map."""
        return [self.pixels(code, x, n, block, ix.add(h, i), w) for i in range(self.vertical.n)]

    def ragged_column(
        self,
        code: Code[IntegerTransform],
        x: Buffer,
        n: Expr,
        block: Expr,
        h: Expr,
        w: Expr,
        rows: Sequence[Expr],
        here: Expr,
    ) -> list[Expr]:
        """The same where the map ends: `rows` say which of them are inside, `here` that the column is."""
        height, width = self.size
        nothing = constant(0, "int16", self.wide)
        column = clamp(w, 0, width - 1)
        found: list[Expr] = []
        for i, inside in enumerate(rows):
            if isinstance(inside, Const) and not inside.value:
                found.append(nothing)
                continue
            value = self.pixels(code, x, n, block, clamp(ix.add(h, i), 0, height - 1), column)
            found.append(code.name(select(inside, value, nothing)))
        return found

    def pixels(self, code: Code[IntegerTransform], x: Buffer, n: Expr, pair: Expr, h: Expr, w: Expr) -> Expr:
        """A pair of blocks of channels of one pixel, less the zero point. Where the last pair has one block only, that
        one twice: the weights of the other are zero."""
        first = ix.mul(pair, 2)
        second = ix.add(first, 1)
        if self.tiling.blocks % 2:
            second = binary("min", second, ix.const(self.tiling.blocks - 1))
        a, b = (load(x, n, block, *self.pixel(h, w), 0, lanes=self.lanes) for block in (first, second))
        value: Expr = Cast(Shuffle(a, b, tuple(range(self.wide))), "int16")
        return code.name(value if self.zero is None else Binary("sub", value, self.zero))

    def broadcast(self, v: Buffer, p: Expr, place: Expr, j: int, c: Expr) -> Expr:
        """The factors of two channels of tile `j` in all lanes."""
        both = load(v, p, ix.add(place, j * self.wide, ix.mul(c, 2)), lanes=2)
        return Repeat(both, self.lanes)

    def added(self, acc: Expr, x: Expr, w: Expr) -> Expr:
        """``acc + x * w``, of two channels."""
        return Dot(acc, x, w)

    # -- the output transform

    def output_tile(
        self, k: Builder, code: Code[IntegerTransform], half: Buffer, vector: Expr, corner: tuple[Expr, Expr, Expr]
    ) -> None:
        """Transform the rows of a tile back, too, and store its outputs."""
        rows, columns, lanes = self.vertical, self.horizontal, self.lanes
        n, top, left = corner
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
                    if self.bias is not None:
                        value = Binary("add", value, load(self.bias, vector, 0, lanes=lanes))
                    k.store(result, (i, 0), value)
                # An output row narrower than a tile has no whole tiles; as it is, `whole` is then known to be false.
                whole = binary("le", w, ix.const(self.out[1] - columns.m))
                with k.when(whole):
                    start = binary("min", w, ix.const(max(0, self.out[1] - columns.m)))
                    self.finish(k, result, n, vector, row, start, columns.m)
                if rest:
                    with otherwise(k, whole):
                        self.finish(k, result, n, vector, row, binary("min", w, ix.const(self.out[1] - rest)), rest)

    def exact(self, value: Expr, shift: int) -> Expr:
        """An output of the last transform as the sum that it stands for."""
        odd = self.vertical.odd * self.horizontal.odd
        if odd != 1:
            inverse = pow(odd, -1, 1 << 32)
            inverse -= (inverse >> 31) << 32
            value = Binary("mul", value, constant(inverse, "int32", self.lanes))
        return Binary("shr", value, constant(shift, "int32", self.lanes)) if shift else value

    def finish(self, k: Builder, result: Buffer, n: Expr, vector: Expr, row: Expr, column: Expr, count: int) -> None:
        """Store `count` neighbouring outputs of a row through the tail."""
        lanes, tail = self.lanes, self.tail
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


WINOGRAD_INT8 = tuple(WinogradInt8Family(m) for m in (2, 4))
