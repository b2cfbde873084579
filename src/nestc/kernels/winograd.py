"""Winograd convolution over channel-blocked maps: fewer multiplications for small kernels of stride 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import ceil

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import CpuMachine, Launch, Layout, Lowered
from nestc.kernels.conv_shape import ConvShape, conv_shape
from nestc.kernels.operands import Operands
from nestc.kernels.tail import Tail, tail_refusal
from nestc.kernels.winograd_matrices import strided, transform
from nestc.kernels.winograd_plan import Plan, Tiling, cycles, direct_cycles, plan
from nestc.kernels.winograd_transform import Transforms
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, clamp, constant, load, splat, within
from nestc.tensor.ir import Binary, Buffer, Const, Expr, Fma, Load, Var
from nestc.tensor.vectorize import vectorize

_CACHE_LINE = 64
_LEAST_CHANNELS = 16  # of inputs and of outputs: below that the transforms cost more than they save


class WinogradFamily:
    """Conv on float32 with one group, computed in tiles of `m` outputs along each axis: kernels of 3, 5 or 7 (or 1)
    along one or two axes with stride 1 if `m` is even, kernels of 3 with stride 2 along all axes if it is odd."""

    def __init__(self, m: int, fused: bool | None = None) -> None:
        """`fused`: whether an item of the parallel loop transforms its inputs itself; None: as `plan` decides."""
        self.m = m
        self.fused = fused
        self.name = f"winograd{m}" + ("" if fused is None else "_fused" if fused else "_split")

    def refusal(self, region: Region) -> str | None:
        """Why this family does not lower `region`; None if it does."""
        op = _anchor(region)
        if op is None:
            return "its anchor is not Conv"
        if region.types[op.inputs[0]].dtype != "float32":
            return "only float32 is transformed"
        fixed = [name for name in op.inputs[1:] if name]
        if any(name not in region.constants for name in fixed):
            return f"the weights of {op.name!r} are not constant"
        if len(region.types[op.inputs[0]].shape) not in (3, 4):
            return "only one or two spatial axes are transformed"
        if 0 in region.types[op.outputs[0]].shape or 0 in region.types[op.inputs[0]].shape:
            return "an axis is empty"
        s = conv_shape(op, region)
        if s.group != 1 or max(s.dilations) > 1:
            return "groups and dilations are not transformed"
        if self.m % 2 and (any(k != 3 for k in s.kernel) or any(stride != 2 for stride in s.strides)):
            return f"tiles of {self.m} outputs are of kernels of 3 with stride 2"
        if self.m % 2 == 0 and max(s.strides) > 1:
            return f"tiles of {self.m} outputs are of stride 1"
        if self.m % 2 == 0 and (max(s.kernel) == 1 or any(k > 1 and self.points(k) is None for k in s.kernel)):
            return f"F({self.m}, r) of kernel {s.kernel} is not among the transforms"
        least = _LEAST_CHANNELS * max(s.strides)  # with stride 2 less is saved
        if min(s.in_channels, s.out_channels) < least:
            return f"fewer than {least} channels are not worth transforming"
        return tail_refusal(region, op)

    def points(self, kernel: int) -> int | None:
        """Points of F(m, kernel), at most 8 for the sake of accuracy; None if it is not among the transforms."""
        n = self.m + kernel - 1
        return n if n % 2 == 0 and n <= 8 else None

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Blocked input and output, and operands of the tail as the direct convolution wants them."""
        from nestc.kernels.conv import CONV

        op = _anchor(region)
        assert op is not None
        return {**CONV.layouts(region, machine, incoming), op.inputs[0]: Layout(machine.lanes("float32"))}

    def tiling(self, region: Region, machine: CpuMachine) -> Tiling:
        """How the region's output is cut into tiles."""
        op = _anchor(region)
        assert op is not None
        shape = conv_shape(op, region)
        if self.m % 2:
            axes = tuple(strided(self.m, k) for k in shape.kernel)
        else:
            axes = tuple(transform(self.m if k > 1 else 1, k) for k in shape.kernel)
        both = axes if len(axes) == 2 else (transform(1, 1), *axes)
        return Tiling(shape, (both[0], both[1]), machine)

    def cycles(self, region: Region, machine: CpuMachine) -> tuple[float, float]:
        """Modelled cycles of this way, and of the direct kernel on the same terms."""
        tiling = self.tiling(region, machine)
        return cycles(tiling, plan(tiling, self.fused)), direct_cycles(tiling)

    def other(self, region: Region, machine: CpuMachine) -> WinogradFamily:
        """The same algorithm, the input transform in the kernel where this one has it apart, or the other way round."""
        return WinogradFamily(self.m, not plan(self.tiling(region, machine), self.fused).fused)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """One or two kernels; the weights are transformed and packed in the order in which they are read."""
        return self.lower_with(region, machine, layouts, plan(self.tiling(region, machine), self.fused))

    def lower_with(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout], cut: Plan) -> Lowered:
        """`lower` under a given plan."""
        op = _anchor(region)
        assert op is not None
        return _Winograd(region, op, layouts, self.tiling(region, machine), cut).lower()


def _anchor(region: Region) -> Op | None:
    return next((op for op in region.ops if op.op_type == "Conv" and not op.domain), None)


class _Winograd:
    """Builds the kernels of one convolution.

    Tiles (image, tile row, tile column) are numbered row-major, `mr` of them are a group: the rows of a register tile.
    Of each tile, n x n positions are products of matrices over channels, for each of them V[tiles][inputs] times
    U[inputs][outputs]. An item of the parallel loop is a chunk of groups, and a chunk of outputs unless the input
    transform is fused into it:

    - V[position][group][block of inputs][mr][lanes], scratch memory of the item or a temporary;
    - U[chunk of outputs][position][register column][block of inputs][lane][nr * lanes], constant;
    - M[position][register column][group][mr][nr * lanes], scratch memory.

    Positions of V and M lie an odd number of cache lines apart, since a transform touches all of them at once.
    """

    def __init__(self, region: Region, op: Op, layouts: Mapping[str, Layout], tiling: Tiling, cut: Plan) -> None:
        self.region, self.op, self.layouts = region, op, layouts
        self.tiling, self.cut = tiling, cut
        self.shape: ConvShape = tiling.shape
        self.lanes = tiling.machine.lanes("float32")
        self.vertical, self.horizontal = tiling.axes
        self.positions = self.vertical.n * self.horizontal.n
        self.rank = len(self.shape.out)
        # A missing axis counts as one pixel.
        self.size, self.out, self.pads = (
            (axis[0], axis[1]) if self.rank == 2 else (lone, axis[0])
            for axis, lone in ((self.shape.size, 1), (self.shape.out, 1), (self.shape.pads_begin, 0))
        )
        self.slack = 16
        self.chunks = ceil(tiling.groups(cut) / cut.groups)

    def lower(self) -> Lowered:
        """The launches, the packed weights, and V where it is a temporary."""
        x, w = self.op.inputs[0], self.op.inputs[1]
        cut, lanes = self.cut, self.lanes
        weights, v_name, bias_name = f"{w}.winograd", f"{x}.winograd", f"{w}.bias"
        packed = self.pack_weights()
        constants = {weights: packed}
        types = {weights: TensorType("float32", packed.shape)}
        if self.op.input(2):
            constants[bias_name] = self.pack_bias()
            types[bias_name] = TensorType("float32", constants[bias_name].shape)
        launches: list[Launch] = []
        temporaries: dict[str, TensorType] = {}
        block = self.tiling.blocks * cut.mr * lanes  # elements of V of one group and position
        if not cut.fused:
            temporaries[v_name] = TensorType("float32", (self.positions, _odd_lines(self.tiling.groups(cut) * block)))
            launches.append(self.transform_kernel(x, v_name, temporaries[v_name]))
            types[v_name] = temporaries[v_name]
        k = Builder("winograd")
        operands = Operands(k, self.region, self.layouts)
        for name, type_ in types.items():
            operands.define(name, type_)
        u = operands.buffer(weights)
        bias = operands.buffer(bias_name) if bias_name in types else None
        source = operands.buffer(x if cut.fused else v_name)
        tail = Tail(operands, self.op)
        tail.declare()
        m = k.scratch("m", (cut.columns, cut.groups * cut.mr, self.positions * cut.nr * lanes + self.slack))
        v = k.scratch("v", (self.positions, _odd_lines(cut.groups * block))) if cut.fused else source
        code = Transforms(k, lanes)
        steps = self.tiling.steps(cut)
        if cut.fused:
            with k.parallel("item", self.chunks) as (chunk,):
                self.input_tiles(k, code, source, v, chunk, True)
                with k.loop("o", steps) as o:
                    self.multiply(k, u, v, m, chunk, o)
                    self.output_tiles(k, code, m, bias, tail, chunk, o)
        else:
            major, minor = (steps, self.chunks) if cut.outputs_first else (self.chunks, steps)
            with k.parallel("item", major, minor) as (first, second):
                o, chunk = (first, second) if cut.outputs_first else (second, first)
                self.multiply(k, u, v, m, chunk, o)
                self.output_tiles(k, code, m, bias, tail, chunk, o)
        launches.append(operands.launch())
        return Lowered(tuple(launches), temporaries, {**operands.constants, **constants})

    # -- constants

    def pack_weights(self) -> np.ndarray:
        """U = G g G^T, computed in float64, in the order in which it is read."""
        s, cut, lanes = self.shape, self.cut, self.lanes
        weights = self.region.constant(self.op.inputs[1])
        assert weights is not None
        steps, blocks = self.tiling.steps(cut), self.tiling.blocks
        taps = self.vertical.r * self.horizontal.r
        padded = np.zeros((steps * cut.columns * cut.nr * lanes, blocks * lanes, taps), np.float32)
        padded[: s.out_channels, : s.in_channels] = weights.reshape(s.out_channels, s.in_channels, taps)
        # In the order of the result first, while there is least of it; then it is one product a step.
        split = padded.reshape(steps, cut.columns, cut.nr * lanes, blocks * lanes, taps).transpose(0, 4, 1, 3, 2)
        both = np.kron(*(np.array(t.g, np.float64) for t in (self.vertical, self.horizontal)))
        packed = np.empty((steps, self.positions, cut.columns, blocks, lanes, cut.nr * lanes), np.float32)
        for target, source in zip(packed, split):
            kernel = source.astype(np.float64, order="C").reshape(taps, -1)
            target[...] = (both @ kernel).reshape(target.shape)
        return packed

    def pack_bias(self) -> np.ndarray:
        """[O] -> [vectors of outputs][lanes], zero-padded."""
        bias = self.region.constant(self.op.input(2))
        assert bias is not None
        padded = np.zeros((self.tiling.vectors, self.lanes), np.float32)
        padded.reshape(-1)[: bias.size] = bias
        return padded

    # -- the input transform

    def transform_kernel(self, x: str, target: str, type_: TensorType) -> Launch:
        """The input transform as a kernel of its own."""
        k = Builder("winograd_input")
        operands = Operands(k, self.region, self.layouts)
        operands.define(target, type_)
        source, v = operands.buffer(x), operands.buffer(target)
        code = Transforms(k, self.lanes)
        with k.parallel("item", self.chunks, self.tiling.blocks) as (chunk, block):
            self.input_block(k, code, source, v, chunk, block, False)
        return operands.launch()

    def input_tiles(self, k: Builder, code: Transforms, x: Buffer, v: Buffer, chunk: Expr, local: bool) -> None:
        """Transform all input channels of the tiles of a chunk."""
        with k.loop("ib", self.tiling.blocks) as block:
            self.input_block(k, code, x, v, chunk, block, local)

    def input_block(
        self, k: Builder, code: Transforms, x: Buffer, v: Buffer, chunk: Expr, block: Expr, local: bool
    ) -> None:
        """Transform one block of input channels of the tiles of a chunk; `local`: V holds this chunk only."""
        cut, lanes = self.cut, self.lanes
        rows, columns = self.vertical, self.horizontal
        half = k.stack("half", (rows.n, columns.n, lanes))
        last = ix.const(self.tiling.groups(cut) - 1)
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
                place = ix.add(ix.mul(q if local else group, self.tiling.blocks), block)
                offset = ix.mul(ix.add(ix.mul(place, cut.mr), j), lanes)
                with k.loop("a", rows.n) as a:
                    d = [code.name(load(half, a, i, 0, lanes=lanes)) for i in range(columns.n)]
                    for i, value in enumerate(code.inputs(columns, d)):
                        k.store(v, (ix.add(ix.mul(a, columns.n), i), offset), value)

    def prefetch_inputs(self, k: Builder, x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr) -> None:
        """Ask for the next block of channels of a tile, where a map is too large to wait in L2: the rows of a tile are
        streams so short that the hardware does not follow them. (Maps in L2 gain nothing.)"""
        if 4 * self.shape.in_channels * self.size[0] * self.size[1] <= self.tiling.machine.l2_bytes:
            return
        pixels = max(1, _CACHE_LINE // (4 * self.lanes))
        for i in range(self.vertical.n):
            for j in range(0, self.horizontal.stride * self.horizontal.m, pixels):
                k.prefetch(x, n, ix.add(block, 1), *self.pixel(ix.add(h, i), ix.add(w, j)), 0)

    def corner(self, group: Expr, j: Expr) -> tuple[Expr, Expr, Expr]:
        """Image, tile row and tile column of a tile; of tiles past the last one, that one."""
        t = self.tiling
        number = ix.mod(ix.add(ix.mul(group, self.cut.mr), j), t.count)
        n, top, left = ix.unflatten(number, (self.shape.batch, *t.grid))
        return n, top, left

    def load_tile(
        self, k: Builder, code: Transforms, x: Buffer, half: Buffer, n: Expr, block: Expr, h: Expr, w: Expr
    ) -> None:
        """A tile of inputs, zeros outside the map, transformed along its columns."""
        rows, columns, lanes = self.vertical.n, self.horizontal.n, self.lanes
        height, width = self.size

        def transformed(b: Expr, d: list[Expr]) -> None:
            for i, value in enumerate(code.inputs(self.vertical, [code.name(each) for each in d])):
                k.store(half, (i, b, 0), value)

        def ragged() -> None:
            known = [within(ix.add(h, i), height) for i in range(rows)]
            with k.loop("b", columns) as b:
                across = ix.add(w, b)
                here = within(across, width)
                with k.when(here):
                    places = [self.pixel(ix.add(h, i), across) for i in range(rows)]
                    # The mask says all that there is to say, since it stands alone where the column is inside.
                    masks = [binary("and", row, here) if isinstance(row, Const) else row for row in known]
                    transformed(
                        b, [load(x, n, block, *at, 0, lanes=lanes, mask=mask) for at, mask in zip(places, masks)]
                    )
                with _otherwise(k, here):
                    for i in range(rows):
                        k.store(half, (i, b, 0), constant(0.0, "float32", lanes))

        if height < rows or width < columns:
            ragged()
            return
        inside = binary("and", _between(h, 0, height - rows), _between(w, 0, width - columns))
        with k.when(inside):
            # Both are as they were; limited, they are known to lie inside.
            top, left = clamp(h, 0, height - rows), clamp(w, 0, width - columns)
            with k.loop("b", columns) as b:
                transformed(
                    b,
                    [
                        load(x, n, block, *self.pixel(ix.add(top, i), ix.add(left, b)), 0, lanes=lanes)
                        for i in range(rows)
                    ],
                )
        with _otherwise(k, inside):
            ragged()

    def pixel(self, h: Expr, w: Expr) -> tuple[Expr, ...]:
        """Spatial index of a pixel in the tensor's own axes."""
        return (h, w) if self.rank == 2 else (w,)

    # -- the products

    def multiply(self, k: Builder, u: Buffer, v: Buffer, m: Buffer, chunk: Expr, o: Expr) -> None:
        """M = V U at all positions, for a chunk of tiles and a chunk of outputs."""
        cut, lanes, t = self.cut, self.lanes, self.tiling
        acc = k.regs("acc", (cut.mr, cut.nr), lanes)
        wreg, xreg = k.regs("w", (cut.nr,), lanes), k.regs("x", (), lanes)
        with k.loop("p", self.positions) as p, k.loop("g", cut.columns) as g, k.loop("q", cut.groups) as q:
            group = ix.add(ix.mul(chunk, cut.groups), q)
            with k.when(binary("lt", group, ix.const(t.groups(cut)))):
                # Limited as the condition says, so that it is known to lie inside.
                own = q if cut.fused else binary("min", group, ix.const(t.groups(cut) - 1))
                first = ix.mul(own, t.blocks)
                for j in range(cut.mr):
                    for i in range(cut.nr):
                        k.store(acc, (j, i, 0), constant(0.0, "float32", lanes))
                with k.loop("c", t.blocks) as block:
                    self.prefetch(k, u, o, p, g, block, q)
                    place = ix.mul(ix.add(first, block), cut.mr * lanes)
                    with k.unroll("l", lanes) as c:
                        for i in range(cut.nr):
                            k.store(wreg, (i, 0), load(u, o, p, g, block, c, i * lanes, lanes=lanes))
                        for j in range(cut.mr):
                            value = load(v, p, ix.add(place, j * lanes, c))
                            k.store(xreg, (0,), splat(value, lanes))
                            for i in range(cut.nr):
                                product = Fma(
                                    Load(xreg, (ix.const(0),), lanes),
                                    load(wreg, i, 0, lanes=lanes),
                                    load(acc, j, i, 0, lanes=lanes),
                                )
                                k.store(acc, (j, i, 0), product)
                for j in range(cut.mr):
                    for i in range(cut.nr):
                        place = ix.add(ix.mul(p, cut.nr * lanes), i * lanes)
                        k.store(m, (g, ix.add(ix.mul(q, cut.mr), j), place), load(acc, j, i, 0, lanes=lanes))

    def prefetch(self, k: Builder, u: Buffer, o: Expr, p: Expr, g: Expr, block: Expr, q: Expr) -> None:
        """Ask for the weights of the next register column, or position, while these are used: each group of tiles for
        its share of the cache lines."""
        line = _CACHE_LINE // 4
        lines = self.lanes * self.cut.nr * self.lanes // line
        share = ceil(lines / self.cut.groups)
        for each in range(share):
            number = ix.mod(ix.add(ix.mul(q, share), each), lines)
            k.prefetch(u, o, p, ix.add(g, 1), block, 0, ix.mul(number, line))

    # -- the output transform

    def output_tiles(
        self, k: Builder, code: Transforms, m: Buffer, bias: Buffer | None, tail: Tail, chunk: Expr, o: Expr
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
        code: Transforms,
        m: Buffer,
        bias: Buffer | None,
        tail: Tail,
        vector: Expr,
        corner: tuple[Expr, Expr, Expr],
        tile: tuple[Expr, Expr],
        within_column: Expr,
    ) -> None:
        """One vector of output channels of one tile."""
        rows, columns, lanes = self.vertical, self.horizontal, self.lanes
        n, top, left = corner
        half = k.stack("back", (rows.m, columns.n, lanes))
        with k.loop("b", columns.n) as b:
            places = [
                ix.add(ix.mul(ix.add(b, i * columns.n), self.cut.nr * lanes), ix.mul(within_column, lanes))
                for i in range(rows.n)
            ]
            found = [code.name(load(m, *tile, place, lanes=lanes)) for place in places]
            for i, value in enumerate(code.outputs(rows, found)):
                k.store(half, (i, b, 0), value)
        h, w = ix.mul(top, rows.m), ix.mul(left, columns.m)
        result = k.regs("y", (columns.m,), lanes)
        with k.loop("a", rows.m) as a:
            row = ix.add(h, a)
            with k.when(binary("lt", row, ix.const(self.out[0]))):
                row = binary("min", row, ix.const(self.out[0] - 1))
                found = [code.name(load(half, a, i, 0, lanes=lanes)) for i in range(columns.n)]
                for i, value in enumerate(code.outputs(columns, found)):
                    if bias is not None:
                        value = Binary("add", value, load(bias, vector, 0, lanes=lanes))
                    k.store(result, (i, 0), value)
                # An output row narrower than a tile has no whole tiles; as it is, `whole` is then known to be false.
                whole = binary("le", w, ix.const(self.out[1] - columns.m))
                with k.when(whole):
                    start = binary("min", w, ix.const(max(0, self.out[1] - columns.m)))
                    for i in range(columns.m):
                        self.finish(k, tail, result, i, n, vector, row, ix.add(start, i))
                with _otherwise(k, whole):
                    self.ragged(k, tail, result, n, vector, row, w)

    def ragged(self, k: Builder, tail: Tail, result: Buffer, n: Expr, vector: Expr, row: Expr, w: Expr) -> None:
        """The outputs of a row of a tile that lie inside the map."""
        last = ix.const(self.out[1] - 1)
        for i in range(self.horizontal.m):
            column = ix.add(w, i)
            with k.when(binary("le", column, last)):
                self.finish(k, tail, result, i, n, vector, row, binary("min", column, last))

    def finish(
        self, k: Builder, tail: Tail, result: Buffer, i: int, n: Expr, vector: Expr, row: Expr, column: Expr
    ) -> None:
        """Store output `i` of a row through the tail."""
        lane = Var(f"lane{i}", self.lanes)
        index = (n, ix.add(ix.mul(vector, self.lanes), lane), *self.pixel(row, column))
        k.emit(vectorize(tail.stores(index, Load(result, (ix.const(i), lane))), lane, ix.const(0), self.lanes))


def _between(i: Expr, low: int, high: int) -> Expr:
    """low <= i <= high, decided now where intervals allow."""
    return binary("and", binary("ge", i, ix.const(low)), binary("le", i, ix.const(high)))


@contextmanager
def _otherwise(k: Builder, condition: Expr) -> Iterator[None]:
    """Statements for where the condition of the `when` just closed does not hold."""
    with k.when(Const(not condition.value, "bool")) if isinstance(condition, Const) else k.otherwise():
        yield


def _odd_lines(elements: int) -> int:
    """At least `elements` float32 that fill an odd number of cache lines."""
    return (ceil(elements / 16) | 1) * 16


WINOGRAD = tuple(WinogradFamily(m) for m in (2, 4, 6, 3))
