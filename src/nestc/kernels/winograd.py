"""Winograd convolution over channel-blocked maps: fewer multiplications for small kernels of stride 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import CpuMachine, Launch, Layout, Lowered
from nestc.kernels.conv_shape import conv_shape
from nestc.kernels.operands import Operands
from nestc.kernels.position_products import Plan
from nestc.kernels.tail import Tail, tail_refusal
from nestc.kernels.winograd_matrices import Transform, strided, transform
from nestc.kernels.winograd_plan import Tiling, cycles, direct_cycles, plan
from nestc.kernels.winograd_tiles import Code, TileKernel, otherwise
from nestc.kernels.winograd_transform import Transforms
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, load, splat
from nestc.tensor.ir import Binary, Buffer, Const, Expr, Fma, Load, Var
from nestc.tensor.vectorize import vectorize

_CACHE_LINE = 64
# Of inputs and of outputs: below that the transforms cost more than they save; with stride 2 they save less.
_LEAST_CHANNELS, _LEAST_STRIDED = 8, 32


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
        reason = untransformable(region)
        if reason is not None:
            return reason
        op = anchor_of(region)
        assert op is not None
        s = conv_shape(op, region)
        if self.m % 2 and (any(k != 3 for k in s.kernel) or any(stride != 2 for stride in s.strides)):
            return f"tiles of {self.m} outputs are of kernels of 3 with stride 2"
        if self.m % 2 == 0 and max(s.strides) > 1:
            return f"tiles of {self.m} outputs are of stride 1"
        if self.m % 2 == 0 and (max(s.kernel) == 1 or any(k > 1 and self.points(k) is None for k in s.kernel)):
            return f"F({self.m}, r) of kernel {s.kernel} is not among the transforms"
        least = _LEAST_CHANNELS if max(s.strides) == 1 else _LEAST_STRIDED
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

        op = anchor_of(region)
        assert op is not None
        return {**CONV.layouts(region, machine, incoming), op.inputs[0]: Layout(machine.lanes("float32"))}

    def tiling(self, region: Region, machine: CpuMachine) -> Tiling:
        """How the region's output is cut into tiles."""
        op = anchor_of(region)
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
        op = anchor_of(region)
        assert op is not None
        return WinogradKernel(region, op, layouts, self.tiling(region, machine), cut).lower()


def untransformable(region: Region) -> str | None:
    """Why no family of transformed convolutions lowers `region`; None where the kernel's shape decides."""
    op = anchor_of(region)
    if op is None:
        return "its anchor is not Conv"
    if region.types[op.inputs[0]].dtype != "float32":
        return "only float32 is transformed"
    if any(name not in region.constants for name in op.inputs[1:] if name):
        return f"the weights of {op.name!r} are not constant"
    if len(region.types[op.inputs[0]].shape) not in (3, 4):
        return "only one or two spatial axes are transformed"
    if 0 in region.types[op.outputs[0]].shape or 0 in region.types[op.inputs[0]].shape:
        return "an axis is empty"
    s = conv_shape(op, region)
    if s.group != 1 or max(s.dilations) > 1:
        return "groups and dilations are not transformed"
    return None


def anchor_of(region: Region) -> Op | None:
    """The convolution of the region."""
    return next((op for op in region.ops if op.op_type == "Conv" and not op.domain), None)


class WinogradKernel(TileKernel[Transform]):
    """Builds the kernels of one convolution.

    Tiles (image, tile row, tile column) are numbered row-major, `mr` of them are a group: the rows of a register tile.
    Of each tile, n x n positions are products of matrices over channels, for each of them V[tiles][inputs] times
    U[inputs][outputs]. An item of the parallel loop is a chunk of groups, and a chunk of outputs unless the input
    transform is fused into it:

    - V[position][group][block of inputs][mr][lanes], scratch memory of the item or a temporary;
    - U[chunk of outputs][position][register column][block of inputs][lane][nr * lanes], constant;
    - M[register column][tile][position][nr * lanes], scratch memory.
    """

    factor = total = "float32"

    def __init__(self, region: Region, op: Op, layouts: Mapping[str, Layout], tiling: Tiling, cut: Plan) -> None:
        super().__init__(region, layouts, tiling, cut, tiling.blocks, tiling.lanes)
        self.op, self.tiling = op, tiling
        self.last = (tiling.shape.in_channels - 1) % tiling.lanes + 1

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
        if not cut.fused:
            elements = self.lines(self.tiling.groups(cut) * self.block())
            temporaries[v_name] = TensorType("float32", (self.positions, elements))
            launches.append(self.transform_kernel(x, v_name, temporaries[v_name]))
            types[v_name] = temporaries[v_name]
        k = Builder("winograd")
        operands = Operands(k, self.region, self.layouts)
        for name, type_ in types.items():
            operands.define(name, type_)
        u = operands.buffer(weights)
        self.bias = operands.buffer(bias_name) if bias_name in types else None
        source = operands.buffer(x if cut.fused else v_name)
        self.tail = self.output_tail(operands)
        self.tail.declare()
        m = self.products(k)
        v = k.scratch("v", (self.positions, self.lines(cut.groups * self.block()))) if cut.fused else source
        code = Transforms(k, lanes)

        def outputs(chunk: Expr, o: Expr) -> None:
            self.multiply(k, u, v, m, chunk, o)
            self.output_tiles(k, code, m, chunk, o)

        prepare = partial(self.input_block, k, code, source, v, local=True)
        self.items(k, self.tiling.steps(cut), prepare, outputs)
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

    def prefetch_inputs(self, k: Builder, x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr) -> None:
        """Ask for the next block of channels of a tile, where a map is too large to wait in L2: the rows of a tile are
        streams so short that the hardware does not follow them. (Maps in L2 gain nothing.)"""
        if 4 * self.shape.in_channels * self.size[0] * self.size[1] <= self.tiling.machine.l2_bytes:
            return
        pixels = max(1, _CACHE_LINE // (4 * self.lanes))
        for i in range(self.vertical.n):
            for j in range(0, self.horizontal.stride * self.horizontal.m, pixels):
                k.prefetch(x, n, ix.add(block, 1), *self.pixel(ix.add(h, i), ix.add(w, j)), 0)

    def column(self, code: Code[Transform], x: Buffer, n: Expr, block: Expr, h: Expr, w: Expr) -> list[Expr]:
        """The named inputs of a tile in column `w` from row `h` on, all inside the map."""
        rows = range(self.vertical.n)
        found = [load(x, n, block, *self.pixel(ix.add(h, i), w), 0, lanes=self.lanes) for i in rows]
        return [code.name(each) for each in found]

    def ragged_column(
        self,
        code: Code[Transform],
        x: Buffer,
        n: Expr,
        block: Expr,
        h: Expr,
        w: Expr,
        rows: Sequence[Expr],
        here: Expr,
    ) -> list[Expr]:
        """The same where the map ends: `rows` say which of them are inside, `here` that the column is."""
        # The mask says all that there is to say, since it stands alone where the column is inside.
        masks = [binary("and", row, here) if isinstance(row, Const) else row for row in rows]
        found = [
            load(x, n, block, *self.pixel(ix.add(h, i), w), 0, lanes=self.lanes, mask=mask)
            for i, mask in enumerate(masks)
        ]
        return [code.name(each) for each in found]

    def broadcast(self, v: Buffer, p: Expr, place: Expr, j: int, c: Expr) -> Expr:
        """The factor of channel `c` of tile `j` in all lanes."""
        return splat(load(v, p, ix.add(place, j * self.lanes, c)), self.lanes)

    def added(self, acc: Expr, x: Expr, w: Expr) -> Expr:
        """``acc + x * w``."""
        return Fma(x, w, acc)

    # -- the output transform

    def output_tail(self, operands: Operands) -> Tail:
        """What becomes of an output."""
        return Tail(operands, self.op)

    def output_tile(
        self, k: Builder, code: Code[Transform], half: Buffer, vector: Expr, corner: tuple[Expr, Expr, Expr]
    ) -> None:
        """Transform the rows of a tile back, too, and store its outputs."""
        rows, columns, lanes = self.vertical, self.horizontal, self.lanes
        n, top, left = corner
        h, w = ix.mul(top, rows.m), ix.mul(left, columns.m)
        result = k.regs("y", (columns.m,), lanes)
        with k.loop("a", rows.m) as a:
            row = ix.add(h, a)
            with k.when(binary("lt", row, ix.const(self.out[0]))):
                row = binary("min", row, ix.const(self.out[0] - 1))
                found = [code.name(load(half, a, i, 0, lanes=lanes)) for i in range(columns.n)]
                for i, value in enumerate(code.outputs(columns, found)):
                    if self.bias is not None:
                        value = Binary("add", value, load(self.bias, vector, 0, lanes=lanes))
                    k.store(result, (i, 0), value)
                # An output row narrower than a tile has no whole tiles; as it is, `whole` is then known to be false.
                whole = binary("le", w, ix.const(self.out[1] - columns.m))
                with k.when(whole):
                    start = binary("min", w, ix.const(max(0, self.out[1] - columns.m)))
                    for i in range(columns.m):
                        self.finish(k, result, i, n, vector, row, ix.add(start, i))
                with otherwise(k, whole):
                    self.ragged(k, result, n, vector, row, w)

    def ragged(self, k: Builder, result: Buffer, n: Expr, vector: Expr, row: Expr, w: Expr) -> None:
        """The outputs of a row of a tile that lie inside the map."""
        last = ix.const(self.out[1] - 1)
        for i in range(self.horizontal.m):
            column = ix.add(w, i)
            with k.when(binary("le", column, last)):
                self.finish(k, result, i, n, vector, row, binary("min", column, last))

    def finish(self, k: Builder, result: Buffer, i: int, n: Expr, vector: Expr, row: Expr, column: Expr) -> None:
        """Store output `i` of a row through the tail."""
        lane = Var(f"lane{i}", self.lanes)
        index = (n, ix.add(ix.mul(vector, self.lanes), lane), *self.pixel(row, column))
        k.emit(vectorize(self.tail.stores(index, Load(result, (ix.const(i), lane))), lane, ix.const(0), self.lanes))


WINOGRAD = tuple(WinogradFamily(m) for m in (2, 4, 6, 3))
