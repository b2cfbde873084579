"""The generic family: every operator that is "out[i] = expression over loads", lowered by one schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from nestc.errors import UnsupportedOp
from nestc.graph.region import Op, Region, TensorType
from nestc.kernels.api import PLAIN, CpuMachine, Launch, Layout, Lowered, physical_shape
from nestc.kernels.compute import (
    Body,
    Compute,
    Native,
    Value,
    accumulator,
    cost,
    identity_of,
    loads,
    truth,
)
from nestc.kernels.elementwise import DTYPES, STORED, apply_elementwise, is_elementwise, operand_index
from nestc.kernels.fold_scales import folded
from nestc.kernels.fuse import LARGEST, fuse
from nestc.kernels.job import Job, estimate
from nestc.kernels.loops import emit
from nestc.kernels.ops import RULES, move, select
from nestc.kernels.small import SMALL, storage
from nestc.tensor import index as ix
from nestc.tensor import rewrite
from nestc.tensor.build import Builder, binary, constant, within
from nestc.tensor.ir import Buffer, Const, Expr, If, Kernel, Load, Store, Var
from nestc.tensor.rewrite import substitute, transform

SUPPORTED_OPS: frozenset[str] = frozenset(RULES)
"""Operators of ONNX's own domain that the generic family has a rule for."""

_MOVES = frozenset(move.RULES) | frozenset(select.RULES) | {"QuantizeLinear", "DequantizeLinear"}
"""Operators that take elements of 8 bits and fewer as well."""

_PARTS = 16  # parts (of a Concat) that one kernel may hold


def supported(op: Op) -> bool:
    """Whether there is a rule for the operator; its form may still be refused (see `Generic.refusal`)."""
    return op.domain in ("", "ai.onnx") and op.op_type in SUPPORTED_OPS


def define(region: Region) -> Body:
    """The region as values defined by expressions. Raises UnsupportedOp for what no rule covers."""
    body = Body(region)
    for op in region.ops:
        if not supported(op):
            raise UnsupportedOp(f"{op.op_type} (node {op.name!r}) has no generated code")
        for name in (*op.inputs, *op.outputs):
            if not name:
                continue
            type_ = region.types[name]
            accepted = STORED if op.op_type in _MOVES or is_elementwise(op) else DTYPES
            if type_.dtype not in accepted and name not in region.constants:
                raise UnsupportedOp(f"{op.op_type} (node {op.name!r}) works on {type_.dtype}")
            if any(n < 0 for n in type_.shape):
                raise UnsupportedOp(f"{op.op_type} (node {op.name!r}): the shape of {name!r} is only known at run time")
        if is_elementwise(op):
            _elementwise(body, op)
        else:
            RULES[op.op_type](body, op)
    return body


def _elementwise(body: Body, op: Op) -> None:
    def value(axes: tuple[Var, ...]) -> Expr:
        arguments: list[Expr | None] = []
        for position, name in enumerate(op.inputs):
            place = operand_index(op, position, axes, body.region)
            arguments.append(None if place is None else body.read(name, place))
        return apply_elementwise(op, arguments, body.region)

    body.map(op.outputs[0], value)


class _Params:
    """The flat parameters of one kernel, in order of first use, and how values map to them."""

    def __init__(self, builder: Builder, body: Body, layouts: Mapping[str, Layout]) -> None:
        self.builder = builder
        self.body = body
        self.layouts = layouts
        self.args: list[str] = []
        self.buffers: dict[str, Buffer] = {}
        self.names: dict[str, str] = {}  # parameter -> value

    def layout(self, name: str) -> Layout:
        return self.layouts.get(name, PLAIN)

    def buffer(self, name: str) -> Buffer:
        """The parameter that holds a value, as one dimension."""
        known = self.buffers.get(name)
        if known is None:
            type_ = self.body.type(name)
            size = prod(physical_shape(type_, self.layout(name)))
            known = self.buffers[name] = self.builder.param(f"a{len(self.args)}", storage(type_.dtype), (size,))
            self.names[known.name] = name
            self.args.append(name)
        return known

    def position(self, name: str, index: Sequence[Expr]) -> tuple[Expr, bool]:
        """Flat place of a logical index, and whether it is certainly inside the buffer."""
        type_, layout = self.body.type(name), self.layout(name)
        place = tuple(index)
        if layout.block:
            n, channel, *spatial = place
            place = (n, ix.floordiv(channel, layout.block), *spatial, ix.mod(channel, layout.block))
        shape = physical_shape(type_, layout)
        inside = all(ix.bounds(i)[0] >= 0 and ix.bounds(i)[1] < n for i, n in zip(place, shape))
        return ix.flatten(place, shape), inside

    def resolve(self, e: Expr, valid: Expr | None) -> Expr:
        """`e` with loads of values turned into loads of parameters; `valid` guards what may run past a shape."""

        def visit(n: Expr) -> Expr | None:
            if not isinstance(n, Load) or (n.buffer.shape == () and n.buffer.name.startswith("$")):
                return None
            name = n.buffer.name
            if n.buffer is self.buffers.get(self.names.get(name, "")):
                return None  # a node around it was simplified to a load that is done
            literal = self.literal(name)
            if literal is not None:
                if n.mask is None:
                    return literal
                return rewrite.select(n.mask, literal, constant(0, literal.dtype))
            place, inside = self.position(name, n.index)
            mask = n.mask
            if not inside and valid is not None:
                mask = valid if mask is None else binary("and", mask, valid)
            return Load(self.buffer(name), (place,), 1, truth(mask))

        return transform(e, visit)

    def literal(self, name: str) -> Expr | None:
        """Constants of one element are written into the code."""
        body = self.body
        if any(n != 1 for n in body.shape(name)) or body.type(name).dtype in SMALL | {"float16", "bfloat16"}:
            return None
        array = body.constants.get(name)
        if array is None:
            array = body.region.constant(name)
        return None if array is None else constant(np.asarray(array).reshape(-1)[0].item(), body.dtype(name))


class _Lowering:
    def __init__(self, body: Body, machine: CpuMachine, layouts: Mapping[str, Layout]) -> None:
        self.region = body.region
        self.machine = machine
        self.body = body
        self.layouts = dict(layouts)
        self.launches: list[Launch] = []
        self.temporaries: dict[str, TensorType] = {}
        self.cycles: float | None = None  # a number: only estimate, see `estimated`
        # QuantizeLinear alone divides, as its definition says.
        self.folds = any(op.op_type == "QuantizeLinear" for op in self.region.ops)
        self.exact = len(self.region.ops) == 1

    def estimated(self) -> float:
        """Rough cycles of the region in these layouts; kernels written by hand know plain values only."""
        self.cycles = 0.0
        if any(isinstance(stage, Native) for stage in self.body.stages):
            return float("inf")
        self.run()
        return self.cycles

    def run(self) -> Lowered:
        stages = fuse(self.body)
        pending: list[Value] = []
        for stage in stages:
            if isinstance(stage, Native):
                self.kernels(pending)
                pending = []
                for name in stage.outputs:
                    self.place(name)
                self.launches.append(Launch(stage.kernel, stage.args))
                continue
            self.place(stage.name)
            if 0 in stage.type.shape:
                self.launches.append(self.nothing(stage.name))
                continue
            if pending and not self.together(pending, stage):
                self.kernels(pending)
                pending = []
            pending.append(stage)
        self.kernels(pending)
        return Lowered(tuple(self.launches), self.temporaries, self.used_constants())

    def nothing(self, name: str) -> Launch:
        """A kernel that is seen to write a value of no elements, and does nothing."""
        buffer = Buffer("a0", storage(self.body.type(name).dtype), (0,))
        never = Const(False, "bool")
        store = Store(buffer, (ix.const(0),), constant(0, buffer.dtype), never)
        kernel = Kernel(
            f"{self.region.name}_{len(self.launches)}", (buffer,), (If(never, (store,)),), (), self.region.origin
        )
        return Launch(kernel, (name,))

    def used_constants(self) -> dict[str, np.ndarray]:
        """The constants that launches read."""
        result: dict[str, np.ndarray] = {}
        for name in dict.fromkeys(a for launch in self.launches for a in launch.args):
            array = self.body.constants.get(name)
            if array is None and name in self.region.constants:
                array = self.region.constant(name)
            if array is not None:
                result[name] = np.ascontiguousarray(array)
        return result

    def place(self, name: str) -> None:
        """Decide where a stored value lies; temporaries follow the outputs they have the shape of."""
        if name in self.region.outputs or name in self.region.inputs:
            return
        type_ = self.body.type(name)
        for output in self.region.outputs:
            layout = self.layouts.get(output, PLAIN)
            if layout.block and self.body.shape(output) == type_.shape:
                self.layouts[name] = layout
        shape = physical_shape(type_, self.layouts.get(name, PLAIN))
        self.temporaries[name] = TensorType(type_.dtype, shape)

    def together(self, pending: list[Value], value: Value) -> bool:
        """Whether `value` can be computed in the loops of the values before it."""
        first = pending[0]
        if value.simple is None or any(p.simple is None for p in pending) or value.type.shape != first.type.shape:
            return False
        if self.layouts.get(value.name, PLAIN) != self.layouts.get(first.name, PLAIN):
            return False
        names = {p.name for p in pending}
        if any(x.buffer.name in names for x in loads(value.pieces[0].expr)):
            return False
        return sum(cost(p.pieces[0].expr) for p in (*pending, value)) <= LARGEST

    def kernels(self, values: list[Value]) -> None:
        """Kernels for values that share one loop nest, or for one value in parts."""
        if not values:
            return
        if len(values) == 1:
            pieces = values[0].pieces
            for start in range(0, len(pieces), _PARTS):
                self.kernel([[(values[0], piece)] for piece in pieces[start : start + _PARTS]])
            return
        self.kernel([[(v, v.pieces[0]) for v in values]])

    def kernel(self, groups: list[list[tuple[Value, Compute]]]) -> None:
        """One kernel with a loop nest for each group."""
        builder = Builder(f"{self.region.name}_{len(self.launches)}")
        params = _Params(builder, self.body, self.layouts)
        alone = len(groups) == 1
        if self.cycles is not None:
            self.cycles += sum(estimate(self.job(params, group), self.machine) for group in groups)
            return
        if not alone and prod(groups[0][0][0].type.shape) >= 1 << 16:
            # Large parts get kernels of their own, since only a kernel's single loop nest can be parallel.
            for group in groups:
                self.kernel([group])
            return
        for group in groups:
            emit(builder, self.job(params, group), self.machine, alone)
        self.launches.append(Launch(builder.finish(self.region.origin), tuple(params.args)))

    def job(self, params: _Params, group: list[tuple[Value, Compute]]) -> Job:
        """The loops of computes of one shape; all follow the physical axes of the first value."""
        first, piece = group[0]
        layout = params.layout(first.name)
        extents = tuple(a.extent for a in piece.axes)
        offset = piece.offset or (0,) * len(extents)
        physical = physical_shape(TensorType("", extents), layout)
        axes = tuple(Var(f"x{d}", n) for d, n in enumerate(physical))
        logical: tuple[Expr, ...] = axes
        valid: Expr | None = None
        if layout.block:
            n, channels, *spatial, lane = axes
            channel = ix.add(ix.mul(channels, layout.block), lane)
            logical = (n, channel, *spatial)
            valid = truth(within(channel, extents[1]))
        stores: list[Store] = []
        reduction: Compute | None = None
        holder: Load | None = None
        combined: Expr | None = None
        for value, compute in group:
            names: dict[Var, Expr] = dict(zip(compute.axes, logical))
            result = compute.expr
            if compute.reduce:
                reduction = compute
                combined = params.resolve(substitute(compute.expr, names), valid)
                if valid is not None:
                    combined = rewrite.select(valid, combined, identity_of(compute.op, combined.dtype))
                holder = accumulator(combined.dtype)
                result = holder if compute.finish is None else compute.finish
            result = params.resolve(substitute(result, names), valid)
            if self.folds:
                result = folded(result, self.exact)
            if valid is not None:
                result = rewrite.select(valid, result, constant(0, result.dtype))
            place, _ = params.position(value.name, [ix.add(i, o) for i, o in zip(logical, offset)])
            stores.append(Store(params.buffer(value.name), (place,), result))
        if reduction is None:
            return Job(axes, tuple(stores))
        return Job(axes, tuple(stores), reduction.reduce, reduction.op, combined, holder)


def lower_body(body: Body, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
    """Kernels for the values that `body` defines."""
    return _Lowering(body, machine, layouts).run()


class Generic:
    """The last of the families: it takes whatever `kernels.ops.RULES` can express."""

    name = "generic"

    def refusal(self, region: Region) -> str | None:
        """None if every operator of the region has a rule and the rules accept their forms, else why not."""
        try:
            define(region)
        except UnsupportedOp as error:
            return str(error)
        return None

    def layouts(self, region: Region, machine: CpuMachine, incoming: Mapping[str, Layout]) -> Mapping[str, Layout]:
        """Blocked where blocked inputs meet operators that do not care; else what is cheapest, conversions included."""
        names = (*region.inputs, *region.outputs)
        block = max((layout.block for layout in incoming.values()), default=0)
        if not block:
            return dict.fromkeys(names, PLAIN)
        chosen = blocked_layouts(region, block, incoming)
        if chosen is None:
            return _cheapest(region, machine, incoming, Layout(block))
        return {name: chosen.get(name, PLAIN) for name in names}

    def lower(self, region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> Lowered:
        """Kernels for the region."""
        return lower_body(define(region), machine, layouts)


def layout_options(region: Region, block: int, blocked: Sequence[str], asked: Sequence[str]) -> list[dict[str, Layout]]:
    """Layouts that the generic family could work in. `blocked`: inputs that may come in blocks; `asked`: outputs that
    are wanted in blocks."""
    names = (*region.inputs, *region.outputs)
    plain = dict.fromkeys(names, PLAIN)
    comes = {name: Layout(block) if name in blocked else PLAIN for name in region.inputs}
    found = [plain]
    if blocked:
        chosen = blocked_layouts(region, block, comes)
        if chosen is not None:
            found.append({name: chosen.get(name, PLAIN) for name in names})
    if len(region.ops) > _WEIGHED_OPS or any(0 in region.types[name].shape for name in names):
        return found
    given = [plain, {**plain, **comes}] if blocked else [plain]
    for each in given:
        found.append(each)
        if asked:
            found.append({**each, **dict.fromkeys(asked, Layout(block))})
    return found


def estimated_cycles(region: Region, machine: CpuMachine, layouts: Mapping[str, Layout]) -> float | None:
    """Rough cycles of a region in these layouts; None of a region that is too large to be estimated quickly."""
    if len(region.ops) > _WEIGHED_OPS or any(0 in type_.shape for type_ in region.types.values()):
        return None
    return _Lowering(define(region), machine, dict(layouts)).estimated()


def blocked_layouts(region: Region, block: int, incoming: Mapping[str, Layout]) -> dict[str, Layout] | None:
    """Layouts with values of the blocked shape blocked; None if an operator would have to gather."""
    blocked: set[str] = {name for name in region.inputs if incoming.get(name, PLAIN).block == block}
    rank = max((len(region.types[name].shape) for name in blocked), default=0)
    for op in region.ops:
        shape = region.types[op.outputs[0]].shape
        if is_elementwise(op):
            for name in op.inputs:
                other = region.types[name].shape if name else ()
                if name and len(other) == rank and other == shape:
                    if name in region.inputs:
                        blocked.add(name)
                elif name in blocked and prod(other[2:]) > 1:
                    return None
            if len(shape) != rank or op.op_type == "BitCast":
                return None
        elif move.keeps_blocks(op, region, block):
            if len(shape) != rank:
                return None
            blocked.update(n for n in (op.inputs if op.op_type == "Concat" else op.inputs[:1]) if n in region.inputs)
        else:
            return None
        blocked.update(op.outputs)
    result = {name: Layout(block) for name in blocked if len(region.types[name].shape) == rank}
    if any(name not in result for name in region.outputs):
        return None
    return result


_CONVERSION = 1.5
"""Cycles to bring one element from one layout to the other."""

_WEIGHED_OPS = 12
"""Operators of the largest region for which layouts are compared by estimates."""


def _cheapest(region: Region, machine: CpuMachine, incoming: Mapping[str, Layout], block: Layout) -> dict[str, Layout]:
    """Everything plain, or blocked inputs as they come with plain or blocked outputs, by estimated cycles."""
    plain = dict.fromkeys((*region.inputs, *region.outputs), PLAIN)
    if len(region.ops) > _WEIGHED_OPS or 0 in (n for name in plain for n in region.types[name].shape):
        return plain
    kept = {**plain, **{name: incoming.get(name, PLAIN) for name in region.inputs}}
    channels = {region.types[n].shape[1] for n in region.inputs if kept[n].block}
    # An output with the channels of a blocked input is likely to be wanted blocked by its readers.
    alike = [n for n in region.outputs if len(region.types[n].shape) > 2 and region.types[n].shape[1] in channels]

    def converted(names: Sequence[str]) -> float:
        return _CONVERSION * sum(prod(region.types[n].shape) for n in names)

    def total(layouts: dict[str, Layout], changed: Sequence[str]) -> float:
        return _Lowering(define(region), machine, layouts).estimated() + converted(changed)

    options = [(total(plain, [n for n in region.inputs if kept[n].block] + alike), plain)]
    options.append((total(kept, alike), kept))
    if alike:
        both = {**kept, **dict.fromkeys(alike, block)}
        options.append((total(both, []), both))
    return min(options, key=lambda option: option[0])[1]


def convert(type_: TensorType, source: Layout, target: Layout, machine: CpuMachine) -> Lowered:
    """A kernel that copies the value ``source`` (lying in layout `source`) to ``target`` (in layout `target`)."""
    name = f"layout_{source.block}_{target.block}"
    op = Op("Identity", ("source",), ("target",), name=name)
    region = Region(name, None, (op,), ("source",), ("target",), {"source": type_, "target": type_}, {})
    return Generic().lower(region, machine, {"source": source, "target": target})


__all__ = [
    "SUPPORTED_OPS",
    "Generic",
    "blocked_layouts",
    "convert",
    "define",
    "estimated_cycles",
    "layout_options",
    "lower_body",
    "supported",
]
