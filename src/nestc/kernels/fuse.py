"""Fusion of a body's stages: producers are substituted into their readers unless that would repeat too much work."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import prod

from nestc.kernels.compute import Body, Compute, Native, Stage, Value, accumulator, cost, inline, loads
from nestc.tensor import index as ix
from nestc.tensor.ir import Buffer, Expr, Load, Var
from nestc.tensor.rewrite import substitute, transform

CHEAP = 6
"""Cost (see `compute.cost`) of an expression that is rather computed again than stored and read."""

LARGEST = 240
"""Cost of the largest expression that fusion makes: LLVM's time grows faster than the kernel."""


@dataclass
class _Fusion:
    body: Body
    outputs: frozenset[str]

    def __post_init__(self) -> None:
        self.virtual: dict[str, Value] = {}
        self.emitted: dict[str, Value] = {}
        self.result: list[Stage] = []
        self.uses: Counter[str] = Counter()
        for stage in self.body.stages:
            if isinstance(stage, Native):
                self.uses.update(set(stage.args))
                continue
            self.uses.update({x.buffer.name for piece in stage.pieces for x in loads(piece.expr)})

    def run(self) -> list[Stage]:
        for stage in self.body.stages:
            if isinstance(stage, Native):
                for name in stage.args:
                    self.force(name)
                self.result.append(stage)
                for name in stage.outputs:
                    self.emitted.pop(name, None)  # it may have changed a value in place
                continue
            value = self.expand(stage)
            if value.name in self.outputs:
                self.emit(value)
            else:
                self.virtual[value.name] = value
        return self.result

    def force(self, name: str) -> None:
        """Make sure that a value is in memory."""
        value = self.virtual.pop(name, None)
        if value is not None:
            self.emit(value)

    def emit(self, value: Value) -> None:
        self.emitted[value.name] = value
        self.result.append(value)

    def expand(self, value: Value) -> Value:
        """`value` with its producers substituted, as far as that is worth it."""
        only = value.simple
        if only is not None:
            merged = self.after_reduction(value, only) or self.into_parts(value, only)
            if merged is not None:
                return merged
        return replace(value, pieces=tuple(self.expand_piece(value, piece) for piece in value.pieces))

    def expand_piece(self, value: Value, piece: Compute) -> Compute:
        chosen: dict[str, Compute] = {}
        total = cost(piece.expr)
        by_name: dict[str, list[Load]] = {}
        for x in loads(piece.expr):
            by_name.setdefault(x.buffer.name, []).append(x)
        for name, places in by_name.items():
            producer = self.producer(name, piece, places)
            if producer is None:
                self.force(name)
                continue
            added = cost(producer.expr) * len(places)
            if total + added > LARGEST:
                self.force(name)
                continue
            total += added
            chosen[name] = producer
        if not chosen:
            return piece

        def visit(e: Expr) -> Expr | None:
            if isinstance(e, Load) and e.buffer.name in chosen:
                return inline(e, chosen[e.buffer.name])
            return None

        return replace(piece, expr=transform(piece.expr, visit))

    def producer(self, name: str, reader: Compute, places: list[Load]) -> Compute | None:
        """The Compute of `name` if it should be substituted at `places`, else None."""
        value = self.virtual.get(name) or self.emitted.get(name)
        if value is None or value.simple is None:
            return None
        producer = value.simple
        weight = cost(producer.expr)
        if name in self.emitted:
            # Stored anyway: a reader over the same elements shares the kernel, others read it back.
            same = len(places) == 1 and places[0].index == reader.axes and not reader.reduce
            return producer if same and value.type.shape == tuple(a.extent for a in reader.axes) else None
        if weight <= CHEAP:
            return producer
        work = prod(a.extent for a in (*reader.axes, *reader.reduce)) * len(places)
        once = self.uses[name] <= 1 and work <= prod(value.type.shape)
        return producer if once else None

    def after_reduction(self, value: Value, reader: Compute) -> Value | None:
        """`value` as the finish of the one reduction that it reads element by element; None if it is not like that."""
        for x in loads(reader.expr):
            source = self.virtual.get(x.buffer.name)
            if source is None or len(source.pieces) != 1 or not source.pieces[0].reduce or self.uses[source.name] != 1:
                continue
            if sum(y.buffer.name == source.name for y in loads(reader.expr)) != 1 or x.mask is not None:
                continue
            reduction = source.pieces[0]
            moved = _bijection(reduction, x, reader)
            if moved is None or cost(reader.expr) + cost(reduction.expr) > LARGEST:
                continue
            rest = self.expand_piece(value, replace(reader, expr=_hide(reader.expr, x)))
            done = reduction.finish if reduction.finish is not None else accumulator(reduction.expr.dtype)
            done = substitute(done, moved)
            finish = transform(rest.expr, lambda e, x=x, done=done: done if e == _hidden(x) else None)
            del self.virtual[source.name]
            return replace(
                value,
                pieces=(replace(reduction, axes=reader.axes, expr=substitute(reduction.expr, moved), finish=finish),),
            )
        return None

    def into_parts(self, value: Value, reader: Compute) -> Value | None:
        """`value` in the parts of the one value in parts that it reads element by element; None if not like that."""
        for x in loads(reader.expr):
            source = self.virtual.get(x.buffer.name)
            if source is None or len(source.pieces) == 1 or self.uses[source.name] != 1 or x.mask is not None:
                continue
            same = all(i == a or a.extent == 1 for i, a in zip(x.index, reader.axes, strict=True))
            if source.type.shape != value.type.shape or not same:
                continue
            del self.virtual[source.name]
            pieces: list[Compute] = []
            for piece in source.pieces:
                axes = tuple(Var(f"{a.name}_{o}", b.extent) for a, b, o in zip(reader.axes, piece.axes, piece.offset))
                shifted = dict(zip(reader.axes, (ix.add(a, o) for a, o in zip(axes, piece.offset))))
                local = substitute(_hide(reader.expr, x), shifted)
                inner = substitute(piece.expr, dict(zip(piece.axes, axes)))
                expr = transform(local, lambda e, inner=inner, x=x: inner if e == _hidden(x) else None)
                pieces.append(self.expand_piece(value, Compute(axes, expr, offset=piece.offset)))
            return replace(value, pieces=tuple(pieces))
        return None


_HIDDEN = "$hidden"


def _hidden(x: Load) -> Load:
    """A stand-in for a load while the rest of its expression is worked on."""
    return Load(Buffer(_HIDDEN, x.dtype, ()), ())


def _hide(e: Expr, x: Load) -> Expr:
    return transform(e, lambda n: _hidden(x) if n == x else None)


def _bijection(reduction: Compute, x: Load, reader: Compute) -> dict[Var, Expr] | None:
    """How the reduction's axes are named by its reader, if the reader reads every element exactly once."""
    moved: dict[Var, Expr] = {}
    seen: set[Var] = set()
    for axis, place in zip(reduction.axes, x.index):
        moved[axis] = place
        if axis.extent == 1:
            continue
        if not isinstance(place, Var) or place in seen or place.extent != axis.extent:
            return None
        seen.add(place)
    return moved if all(a in seen or a.extent == 1 for a in reader.axes) else None


def fuse(body: Body) -> list[Stage]:
    """The stages that are left, in order; a Value among them is stored in memory."""
    return _Fusion(body, frozenset(body.region.outputs)).run()
