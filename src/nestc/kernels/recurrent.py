"""LSTM, GRU and RNN: one product for the inputs of all time steps, then one kernel that loops over time natively."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nestc.graph.region import Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered
from nestc.kernels.operands import Operands
from nestc.kernels.recurrent_network import Network, activations_of, anchor, like, network
from nestc.kernels.tail import Tail, tail_refusal
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, clamp, constant, load
from nestc.tensor.ir import Block, Broadcast, Buffer, Expr, Fma, Load, Store, Var
from nestc.tensor.rewrite import binary, cast, select
from nestc.tensor.vectorize import vectorize

_IN_FLIGHT = 8  # multiply-adds under way at once: two a cycle, four cycles each
_UNROLL = 4


class Recurrent:
    """The recurrent operators, all directions, with weights that are constant or come at run time."""

    name = "recurrent"

    def refusal(self, region: Region) -> str | None:
        """Why the region cannot be lowered here."""
        op = anchor(region)
        if op is None:
            return "no recurrent operator"
        where = f"{op.op_type} (node {op.name!r})"
        x, w = region.types[op.inputs[0]], region.types[op.inputs[1]]
        if x.dtype not in ("float32", "float64", "float16", "bfloat16"):
            return f"{where} on {x.dtype}"
        if 0 in x.shape or 0 in w.shape:
            return f"{where} works on an empty tensor"
        activations = activations_of(op, w.shape[0])
        if isinstance(activations, str):
            return activations
        if len(region.ops) == 1:
            return None
        if not op.output(0) or set(op.outputs[1:]) & set(region.outputs):
            return f"what follows {where} would be computed where several outputs are stored"
        if any(op.inputs[0] in other.inputs for other in region.ops if other is not op):
            return f"what follows {where} reads its input"
        return tail_refusal(region, op)

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Everything in ONNX's order."""
        return dict.fromkeys((*region.inputs, *region.outputs), PLAIN)

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """Launches: packing of weights that are not constant, the inputs' product, the loop over time."""
        op = anchor(region)
        assert op is not None
        return _Lowering(network(op, region, machine), region, machine).run()


class _Lowering:
    """Collects the launches of one node and what they share."""

    def __init__(self, net: Network, region: Region, machine: CpuMachine) -> None:
        self.net = net
        self.region = region
        self.machine = machine
        self.launches: list[Launch] = []
        self.temporaries: dict[str, TensorType] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.packed: dict[str, TensorType] = {}

    def run(self) -> Lowered:
        """All launches in order."""
        net = self.net
        stem = next(name for name in net.op.outputs if name)
        names = (f"{stem}.{part}" for part in ("w", "r", "r2", "b", "rb", "xw"))
        self.w, self.r, self.r2, self.b, self.rb, self.xw = names
        self.pack(self.w, net.op.inputs[1], net.inputs)
        # What is read in separate sweeps is packed apart, so that each sweep reads whole cache lines.
        self.pack(self.r, net.op.inputs[2], net.hidden, range(2) if net.reset_first else None)
        if net.reset_first:
            self.pack(self.r2, net.op.inputs[2], net.hidden, range(2, 3))
        self.pack_bias()
        shape = (net.directions, net.steps * net.batch, net.chunks, net.gates, net.lanes)
        self.temporaries[self.xw] = self.packed[self.xw] = TensorType(net.dtype, shape)
        self.project()
        _Loop(self).build()
        return Lowered(tuple(self.launches), self.temporaries, self.constants)

    def operands(self, name: str) -> Operands:
        """A new kernel that knows the packed values."""
        operands = Operands(Builder(name), self.region, {})
        for packed, type_ in self.packed.items():
            operands.define(packed, type_)
        return operands

    def finish(self, operands: Operands) -> None:
        """Close a kernel."""
        self.launches.append(operands.launch())
        self.constants.update(operands.constants)

    def chunked(self, array: np.ndarray) -> np.ndarray:
        """(D, G, H, *rest) with hidden units padded and cut: (D, chunks, G, lanes, *rest)."""
        net = self.net
        wide = np.zeros((*array.shape[:2], net.chunks * net.lanes, *array.shape[3:]), net.dtype)
        wide[:, :, : net.hidden] = array
        return np.moveaxis(wide.reshape(*array.shape[:2], net.chunks, net.lanes, *array.shape[3:]), 2, 1)

    def pack(self, name: str, source: str, depth: int, gates: range | None = None) -> None:
        """Weights (D, G * H, depth) as (D, chunks, depth, gates, lanes): a chunk reads them in this order."""
        net = self.net
        gates = range(net.gates) if gates is None else gates
        self.packed[name] = TensorType(net.dtype, (net.directions, net.chunks, depth, len(gates), net.lanes))
        array = self.region.constant(source)
        if array is not None:
            split = array.reshape(net.directions, net.gates, net.hidden, depth)[:, gates.start : gates.stop]
            self.constants[name] = np.ascontiguousarray(np.moveaxis(self.chunked(split), -1, 2))
            return
        self.temporaries[name] = self.packed[name]
        operands = self.operands(f"{net.op.op_type.lower()}_pack")
        builder, target = operands.builder, operands.buffer(name)
        with builder.parallel("chunk", net.directions, net.chunks) as (d, c), builder.loop("k", depth) as k:
            for place, gate in enumerate(gates):
                at = lambda unit, gate=gate: (d, ix.add(unit, gate * net.hidden), k)  # noqa: E731
                builder.emit(self.vector(target, (d, c, k, ix.const(place)), c, operands, source, at))
        self.finish(operands)

    def pack_bias(self) -> None:
        """Both biases of the input side as (D, chunks, G, lanes); a GRU's recurrent bias stays apart where it must."""
        net, source = self.net, self.net.op.input(3)
        self.packed[self.b] = TensorType(net.dtype, (net.directions, net.chunks, net.gates, net.lanes))
        self.packed[self.rb] = TensorType(net.dtype, (net.directions, net.chunks, net.lanes))
        array = self.region.constant(source) if source else np.zeros((net.directions, 2 * net.gates * net.hidden))
        if array is not None:
            both = array.astype(net.dtype).reshape(net.directions, 2, net.gates, net.hidden)
            total = both.sum(axis=1)
            if net.linear_before_reset:
                total[:, 2] = both[:, 0, 2]
                self.constants[self.rb] = np.ascontiguousarray(self.chunked(both[:, 1, 2:])[:, :, 0])
            self.constants[self.b] = np.ascontiguousarray(self.chunked(total))
            return
        self.temporaries[self.b] = self.packed[self.b]
        operands = self.operands(f"{net.op.op_type.lower()}_pack_bias")
        builder, target = operands.builder, operands.buffer(self.b)
        apart = operands.buffer(self.rb) if net.linear_before_reset else None
        if apart is not None:
            self.temporaries[self.rb] = self.packed[self.rb]
        with builder.parallel("chunk", net.directions, net.chunks) as (d, c):
            for gate in range(net.gates):
                own = lambda unit, gate=gate: (d, ix.add(unit, gate * net.hidden))  # noqa: E731
                other = lambda unit, gate=gate: (d, ix.add(unit, (net.gates + gate) * net.hidden))  # noqa: E731
                place = (d, c, ix.const(gate))
                if apart is not None and gate == 2:
                    builder.emit(self.vector(target, place, c, operands, source, own))
                    builder.emit(self.vector(apart, (d, c), c, operands, source, other))
                else:
                    builder.emit(self.vector(target, place, c, operands, source, own, other))
        self.finish(operands)

    def vector(
        self,
        target: Buffer,
        place: tuple[Expr, ...],
        chunk: Expr,
        operands: Operands,
        source: str,
        *indices: Callable[[Expr], tuple[Expr, ...]],
    ) -> Block:
        """Store one chunk of hidden units of `source` (the sum over `indices` of a unit), zero in the padding."""
        net = self.net
        lane = Var("lane", net.lanes)
        unit = ix.add(ix.mul(chunk, net.lanes), lane)
        inside = binary("lt", unit, ix.const(net.hidden))
        value: Expr | None = None
        for index in indices:
            part = cast(operands.load(source, index(unit), inside), net.dtype)
            value = part if value is None else binary("add", value, part)
        assert value is not None
        return vectorize((Store(target, (*place, lane), value),), lane, ix.const(0), net.lanes)

    def project(self) -> None:
        """X times the packed W plus bias, for all steps: a register tile of a few rows and one chunk's gates."""
        net = self.net
        rows = net.steps * net.batch
        operands = self.operands(f"{net.op.op_type.lower()}_inputs")
        builder, source = operands.builder, net.op.inputs[0]
        operands.define(source, TensorType(self.region.types[source].dtype, (rows, net.inputs)))
        operands.buffer(source)
        w, bias, target = (operands.buffer(name) for name in (self.w, self.b, self.xw))
        tall = row_tile(net.gates, self.machine.vector_registers)
        tiles = [(0, min(tall, rows), rows // min(tall, rows))]
        if rows % tiles[0][1]:
            tiles.append((tiles[0][1] * tiles[0][2], rows % tiles[0][1], 1))
        products = [Products(builder, net, count) for _, count, _ in tiles]
        with builder.parallel("chunk", net.directions, net.chunks) as (d, c):
            for (start, count, turns), product in zip(tiles, products):
                with builder.loop("rows", turns) as turn:
                    first = ix.add(ix.mul(turn, count), start)
                    product.start(lambda _, gate: load(bias, d, c, gate, 0, lanes=net.lanes))
                    product.run(
                        net.inputs,
                        lambda k, gate: load(w, d, c, k, gate, 0, lanes=net.lanes),
                        lambda row, k, first=first: cast(operands.load(source, (ix.add(first, row), k)), net.dtype),
                    )
                    for row in range(count):
                        for gate in range(net.gates):
                            builder.store(target, (d, ix.add(first, row), c, gate, 0), product.value(row, gate))
        self.finish(operands)


def row_tile(gates: int, registers: int) -> int:
    """Most rows whose accumulators, one broadcast each and one weight vector fit the registers."""
    return max(1, (registers - 1) // (gates + 1))


class Products:
    """Accumulators acc[row][gate] += x[row][k] * weight[k][gate] in registers.

    With few rows each is split over several k, so that enough multiply-adds are in flight.
    """

    def __init__(self, builder: Builder, net: Network, rows: int, gates: Sequence[int] | None = None) -> None:
        self.builder = builder
        self.net = net
        self.rows = rows
        self.gates = list(range(net.gates)) if gates is None else list(gates)
        self.splits = max(1, -(-_IN_FLIGHT // (rows * len(self.gates))))
        self.total = builder.regs("total", (rows, len(self.gates), self.splits), net.lanes, net.dtype)

    def start(self, initial: Callable[[int, int], Expr]) -> None:
        """Set the accumulators to `initial(row, gate)`."""
        for row in range(self.rows):
            for i, gate in enumerate(self.gates):
                self.builder.store(self.total, (row, i, 0, 0), initial(row, gate))
                for split in range(1, self.splits):
                    zero = constant(0, self.net.dtype, self.net.lanes)
                    self.builder.store(self.total, (row, i, split, 0), zero)

    def run(self, depth: int, weight: Callable[[Expr, int], Expr], x: Callable[[int, Expr], Expr]) -> None:
        """Add the products over k = 0 .. depth-1, then merge the splits."""
        lanes = self.net.lanes
        step = self.splits * max(1, _UNROLL // self.splits)

        def one(k: Expr, split: int) -> None:
            for row in range(self.rows):
                value = Broadcast(x(row, k), lanes) if lanes > 1 else x(row, k)
                for i, gate in enumerate(self.gates):
                    at = (row, i, split, 0)
                    self.builder.store(self.total, at, Fma(value, weight(k, gate), load(self.total, *at, lanes=lanes)))

        with self.builder.loop("k", depth // step) as turn:
            for i in range(step):
                one(ix.add(ix.mul(turn, step), i), i % self.splits)
        for i in range(depth % step):
            one(ix.const(depth - depth % step + i), i % self.splits)
        for row in range(self.rows):
            for i in range(len(self.gates)):
                parts: list[Expr] = [load(self.total, row, i, split, 0, lanes=lanes) for split in range(self.splits)]
                while len(parts) > 1:
                    pairs = [binary("add", a, b) for a, b in zip(parts[::2], parts[1::2])]
                    parts = [*pairs, *parts[len(pairs) * 2 :]]
                if self.splits > 1:
                    self.builder.store(self.total, (row, i, 0, 0), parts[0])

    def value(self, row: int, gate: int) -> Expr:
        """An accumulator."""
        return load(self.total, row, self.gates.index(gate), 0, 0, lanes=self.net.lanes)


class _Loop:
    """The kernel that walks over time. Parallel over directions and tiles of sequences; states live in scratch."""

    def __init__(self, lowering: _Lowering) -> None:
        self.lowering = lowering
        net = self.net = lowering.net
        op = net.op
        self.operands = lowering.operands(op.op_type.lower())
        self.builder = self.operands.builder
        self.lengths = op.input(4)
        # Sequences of different lengths do not go in step, so each is a tile of its own.
        limit = 1 if self.lengths else row_tile(net.gates, lowering.machine.vector_registers)
        self.rows = max(n for n in range(1, min(limit, net.batch) + 1) if net.batch % n == 0)
        wide = net.chunks * net.lanes
        self.r = self.operands.buffer(lowering.r)
        self.xw = self.operands.buffer(lowering.xw)
        self.h = self.builder.scratch("h", (2, self.rows, wide), net.dtype)
        self.value = self.builder.regs("value", (2,), net.lanes, net.dtype)
        self.tail = Tail(self.operands, op) if len(lowering.region.ops) > 1 else None
        for name in lowering.region.outputs:
            self.operands.buffer(name)
        if op.op_type == "LSTM":
            self.c = self.builder.scratch("c", (self.rows, wide), net.dtype)
        if op.op_type == "GRU":
            self.rb = self.operands.buffer(lowering.rb) if net.linear_before_reset else None
            self.z = self.builder.scratch("z", (self.rows, wide), net.dtype)
            self.reset = self.builder.scratch("reset", (self.rows, wide), net.dtype)
        self.products = Products(self.builder, net, self.rows, [0, 1] if net.reset_first else None)
        if net.reset_first:
            self.r2 = self.operands.buffer(lowering.r2)
            self.second = Products(self.builder, net, self.rows, [2])

    def build(self) -> None:
        """The whole kernel."""
        net, builder, op = self.net, self.builder, self.net.op
        region = self.lowering.region
        with builder.parallel("sequences", net.directions, net.batch // self.rows) as (d, tile):
            self.d = d
            self.batch = [ix.add(ix.mul(tile, self.rows), row) for row in range(self.rows)]
            with builder.loop("unit", net.chunks) as c:
                for row in range(self.rows):
                    self.initial(self.h, (ix.const(0), ix.const(row)), op.input(5), row, c)
                    if op.op_type == "LSTM":
                        self.initial(self.c, (ix.const(row),), op.input(6), row, c)
            with builder.loop("step", net.steps) as step:
                self.step(step)
            with builder.loop("unit", net.chunks) as c:
                for row in range(self.rows):
                    for name, state in ((op.output(1), self.hidden(net.steps % 2, row, c)), (op.output(2), None)):
                        if not name or name not in region.outputs:
                            continue
                        value = self.cell(row, c) if state is None else state
                        builder.store(self.value, (0, 0), value)
                        self.output(name, lambda unit, row=row: net.state(self.d, self.batch[row], unit), c)
        self.lowering.finish(self.operands)

    # -- places

    def at(self, chunk: Expr) -> Expr:
        """First hidden unit of a chunk."""
        return ix.mul(chunk, self.net.lanes)

    def hidden(self, parity: Expr | int, row: int, chunk: Expr) -> Expr:
        """A chunk of the hidden state."""
        return load(self.h, parity, row, self.at(chunk), lanes=self.net.lanes)

    def cell(self, row: int, chunk: Expr) -> Expr:
        """A chunk of the cell state."""
        return load(self.c, row, self.at(chunk), lanes=self.net.lanes)

    def initial(self, state: Buffer, place: tuple[Expr, ...], source: str, row: int, chunk: Expr) -> None:
        """Copy a chunk of an initial state, or zeros."""
        net = self.net
        if not source:
            self.builder.store(state, (*place, self.at(chunk)), constant(0, net.dtype, net.lanes))
            return
        self.parameter(source, lambda unit: net.state(self.d, self.batch[row], unit), chunk, 0)
        self.builder.store(state, (*place, self.at(chunk)), load(self.value, 0, 0, lanes=net.lanes))

    def parameter(self, source: str, index: Callable[[Expr], tuple[Expr, ...]], chunk: Expr, slot: int) -> None:
        """Bring a chunk of an operand into a register of `value`."""
        place = (ix.const(slot),)
        self.builder.emit(self.lowering.vector(self.value, place, chunk, self.operands, source, index))

    def output(self, name: str, index: Callable[[Expr], tuple[Expr, ...]], chunk: Expr) -> None:
        """Store register 0 of `value` as a chunk of an output; Y goes through the region's tail."""
        net = self.net
        lane = Var("lane", net.lanes)
        at = index(ix.add(self.at(chunk), lane))
        value = cast(Load(self.value, (ix.const(0), lane)), self.operands.type(name).dtype)
        if self.tail is not None and name == net.op.output(0):
            block = self.tail.stores(at, value)
        else:
            block = self.operands.stores(name, at, value)
        self.builder.emit(vectorize(block, lane, ix.const(0), net.lanes))

    # -- one step

    def step(self, step: Expr) -> None:
        """One time step of all rows; behind a sequence's end its state is handed on and Y is zero."""
        net, builder = self.net, self.builder
        length: Expr = ix.const(net.steps)
        if self.lengths:
            length = cast(self.operands.load(self.lengths, (self.batch[0],)), "int64")
        backwards = clamp(ix.sub(ix.add(length, -1), step), 0, net.steps - 1)
        time = step
        if net.directions == 2:
            time = select(binary("eq", self.d, ix.const(1)), backwards, step)
        elif net.reverse:
            time = backwards
        if not self.lengths:
            self.advance(step, time)
            return
        with builder.when(binary("lt", step, length)):
            self.advance(step, time)
        with builder.otherwise(), builder.loop("unit", net.chunks) as c:
            kept = self.hidden(ix.mod(step, 2), 0, c)
            builder.store(self.h, (ix.mod(ix.add(step, 1), 2), 0, self.at(c)), kept)
            self.write(step, 0, c, constant(0, net.dtype, net.lanes))

    def advance(self, step: Expr, time: Expr) -> None:
        """New states from the old ones and the projected input at `time`."""
        net, builder = self.net, self.builder
        self.old, self.new = ix.mod(step, 2), ix.mod(ix.add(step, 1), 2)
        self.time = time
        if net.reset_first:
            self.gru_reset_first()
            return
        with builder.loop("unit", net.chunks) as c:
            self.multiply(self.products, self.r, c, lambda row, k: load(self.h, self.old, row, k))
            for row in range(self.rows):
                {"LSTM": self.lstm, "GRU": self.gru, "RNN": self.rnn}[net.op.op_type](row, c)

    def multiply(self, products: Products, r: Buffer, c: Expr, x: Callable[[int, Expr], Expr]) -> None:
        """Recurrent products of a chunk's gates, started with the projected input."""
        net = self.net
        rb = self.rb if net.op.op_type == "GRU" else None

        def initial(row: int, gate: int) -> Expr:
            if rb is not None and gate == 2:
                return load(rb, self.d, c, 0, lanes=net.lanes)
            return self.projected(row, c, gate)

        products.start(initial)
        first = products.gates[0]
        products.run(net.hidden, lambda k, gate: load(r, self.d, c, k, gate - first, 0, lanes=net.lanes), x)

    def projected(self, row: int, c: Expr, gate: int) -> Expr:
        """The input's share of a gate."""
        sample = self.net.sample(self.time, self.batch[row])
        return load(self.xw, self.d, sample, c, gate, 0, lanes=self.net.lanes)

    def write(self, time: Expr, row: int, c: Expr, value: Expr) -> None:
        """Store a chunk of Y, if it is wanted."""
        name = self.net.op.output(0)
        if not name or (self.tail is None and name not in self.lowering.region.outputs):
            return
        self.builder.store(self.value, (0, 0), value)
        self.output(name, lambda unit: self.net.place(time, self.d, self.batch[row], unit), c)

    def finish_unit(self, row: int, c: Expr, value: Expr) -> None:
        """Store a chunk of the new hidden state, and of Y."""
        self.builder.store(self.h, (self.new, row, self.at(c)), value)
        self.write(self.time, row, c, load(self.h, self.new, row, self.at(c), lanes=self.net.lanes))

    def rnn(self, row: int, c: Expr) -> None:
        """H = f(X W + H R + B)."""
        self.finish_unit(row, c, self.net.activate(0, self.products.value(row, 0)))

    def lstm(self, row: int, c: Expr) -> None:
        """Gates in ONNX's order i, o, f, c; peepholes in the order i, o, f."""
        net, builder, source = self.net, self.builder, self.net.op.input(7)
        old = self.cell(row, c)

        def peeped(gate: int, state: Expr) -> Expr:
            value = self.products.value(row, gate)
            if not source:
                return value
            self.parameter(source, lambda unit: (self.d, ix.add(unit, gate * net.hidden)), c, 1)
            return Fma(load(self.value, 1, 0, lanes=net.lanes), state, value)

        builder.store(self.products.total, (row, 0, 0, 0), net.activate(0, peeped(0, old)))
        let_in = self.products.value(row, 0)
        if net.input_forget:
            kept = binary("sub", like(1, let_in), let_in)
        else:
            kept = net.activate(0, peeped(2, old))
        state = Fma(kept, old, binary("mul", let_in, net.activate(1, self.products.value(row, 3))))
        builder.store(self.c, (row, self.at(c)), state)
        new = self.cell(row, c)
        let_out = net.activate(0, peeped(1, new))
        self.finish_unit(row, c, binary("mul", let_out, net.bare(2, new)))

    def gru(self, row: int, c: Expr) -> None:
        """Gates z, r, h; the reset is applied to the product (`linear_before_reset`)."""
        net = self.net
        update = net.activate(0, self.products.value(row, 0))
        reset = net.activate(0, self.products.value(row, 1))
        candidate = net.activate(1, Fma(reset, self.products.value(row, 2), self.projected(row, c, 2)))
        self.finish_unit(row, c, self.mixed(update, candidate, row, c))

    def mixed(self, update: Expr, candidate: Expr, row: int, c: Expr) -> Expr:
        """(1 - z) * candidate + z * old, as candidate + z * (old - candidate)."""
        return Fma(update, binary("sub", self.hidden(self.old, row, c), candidate), candidate)

    def gru_reset_first(self) -> None:
        """The reset is applied to the state before its product, so all of it must be known first."""
        net, builder = self.net, self.builder
        with builder.loop("unit", net.chunks) as c:
            self.multiply(self.products, self.r, c, lambda row, k: load(self.h, self.old, row, k))
            for row in range(self.rows):
                builder.store(self.z, (row, self.at(c)), net.activate(0, self.products.value(row, 0)))
                reset = net.activate(0, self.products.value(row, 1))
                builder.store(self.reset, (row, self.at(c)), binary("mul", reset, self.hidden(self.old, row, c)))
        with builder.loop("unit", net.chunks) as c:
            self.multiply(self.second, self.r2, c, lambda row, k: load(self.reset, row, k))
            for row in range(self.rows):
                candidate = net.activate(1, self.second.value(row, 2))
                update = load(self.z, row, self.at(c), lanes=net.lanes)
                builder.store(self.second.total, (row, 0, 0, 0), candidate)
                self.finish_unit(row, c, self.mixed(update, self.second.value(row, 2), row, c))


RECURRENT = Recurrent()
