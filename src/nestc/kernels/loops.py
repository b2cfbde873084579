"""The schedule of the generic lowering: loop nests are spread over workers, tiled and vectorised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod

from nestc.kernels.api import CpuMachine
from nestc.kernels.compute import identity_of, nodes
from nestc.kernels.job import Job, byte_lanes, contiguous_reduction, normalized, unrolling, vector_gain, vector_lanes
from nestc.tensor import index as ix
from nestc.tensor.build import Builder, binary, splat
from nestc.tensor.ir import Binary, Block, Buffer, Expr, Fma, Load, Reduce, Select, Shuffle, Store, Unary, Var
from nestc.tensor.rewrite import map_statements, substitute, transform
from nestc.tensor.vectorize import vectorize

PARALLEL_COST = 20_000
"""Work (elements times `compute.cost`) below which a kernel is not worth waking workers for."""

CHUNKS = 64
"""Iterations that a parallel loop should have: enough for many workers, few enough that claiming costs nothing."""

TILE = 16
"""Edge of the square tiles in which a transposing copy runs: a cache line of float32."""


def run(builder: Builder, block: Block, v: Var, start: Expr, extent: int, lanes: int, unroll: int) -> None:
    """Iterations start .. start + extent - 1 of a loop over `v` with body `block`, which only writes what it owns.

    A ragged end is done by a vector that overlaps the one before it, so the stores must be idempotent.
    """
    step = lanes * unroll
    full, rest = divmod(extent, step)
    if full:
        with builder.loop("i", full) as i:
            if unroll == 1:
                _emit(builder, block, v, ix.add(start, ix.mul(i, step)), lanes)
            else:
                with builder.unroll("u", unroll) as u:
                    _emit(builder, block, v, ix.add(start, ix.mul(i, step), ix.mul(u, lanes)), lanes)
    vectors, rest = divmod(rest, lanes)
    if vectors:
        with builder.loop("i", vectors) as i:
            _emit(builder, block, v, ix.add(start, full * step, ix.mul(i, lanes)), lanes)
    if rest and extent >= lanes:
        _emit(builder, block, v, ix.add(start, extent - lanes), lanes)
    elif rest:
        with builder.loop("i", rest) as i:
            _emit(builder, block, v, ix.add(start, full * step + vectors * lanes, i), 1)


def _emit(builder: Builder, block: Block, v: Var, base: Expr, lanes: int) -> None:
    if lanes == 1:
        builder.emit(tuple(_moved(s, {v: base}) for s in block))
    else:
        builder.emit(vectorize(block, v, base, lanes))


def _moved(s: object, values: dict[Var, Expr]) -> Store:
    assert isinstance(s, Store)
    mask = None if s.mask is None else substitute(s.mask, values)
    return Store(s.buffer, tuple(substitute(i, values) for i in s.index), substitute(s.value, values), mask)


# -- kernels


@dataclass(frozen=True)
class _Spread:
    """How a job is cut for workers: the axes (and chunks of the last one) of the parallel loop, and what is left."""

    outer: tuple[Var, ...]
    inner: tuple[Var, ...]
    chunks: int = 1
    chunk: int = 0


def _spread(axes: tuple[Var, ...], work: int, step: int) -> _Spread:
    """Cut `axes` so that the parallel loop has about CHUNKS iterations, each worth waking a worker for.

    ``work`` is the cost of one iteration of all axes; ``step`` the elements of the last axis handled at a time.
    """
    total = prod(a.extent for a in axes) * work
    wanted = min(CHUNKS, total // (PARALLEL_COST // 4))
    if total < PARALLEL_COST or wanted < 2:
        return _Spread((), axes)
    count, taken = 1, 0
    while taken < len(axes) - 1 and count < wanted:
        count *= axes[taken].extent
        taken += 1
    last = axes[-1]
    if count >= wanted // 2 or taken < len(axes) - 1:
        return _Spread(axes[:taken], axes[taken:])
    chunks = min(-(-wanted // count), max(1, last.extent // (4 * step)))
    return _Spread(axes[:taken], axes[taken:], chunks, last.extent // chunks // step * step)


@contextmanager
def _parallel(builder: Builder, spread: _Spread, values: dict[Var, Expr]) -> Iterator[Expr | None]:
    """Open the parallel loop; fills in the outer axes and gives the number of the chunk (None: there are none)."""
    extents = [a.extent for a in spread.outer] + ([spread.chunks] if spread.chunks > 1 else [])
    if not extents:
        yield None
        return
    with builder.parallel("p", *extents) as index:
        values.update(zip(spread.outer, index))
        yield index[-1] if spread.chunks > 1 else None


def _nest(builder: Builder, axes: Sequence[Var], values: dict[Var, Expr], body: Callable[[], None]) -> None:
    """Serial loops over `axes` around `body`."""
    if not axes:
        body()
        return
    with builder.loop(axes[0].name, axes[0].extent) as i:
        values[axes[0]] = i
        _nest(builder, axes[1:], values, body)


def emit(builder: Builder, job: Job, machine: CpuMachine, allow_parallel: bool = True) -> None:
    """Append the loops of `job`; a parallel loop must be the kernel's only statement, so several jobs forbid it."""
    if any(v.extent == 0 for v in job.axes):
        return
    job = normalized(job)
    if job.value is not None:
        _emit_reduction(builder, job, machine, allow_parallel)
    else:
        _emit_map(builder, job, machine, allow_parallel)


def _emit_map(builder: Builder, job: Job, machine: CpuMachine, allow_parallel: bool) -> None:
    lanes = vector_lanes(job, machine)
    if not job.axes:
        builder.emit(job.stores)
        return
    last = job.axes[-1]
    bytes_ = byte_lanes(job, last.extent, machine)
    lanes = bytes_ or lanes
    if not vector_gain(job, last, lanes):
        lanes = 1
        other = _transposing(job)
        if other is not None and _copied(job, other, machine) is not None:
            _emit_shuffled(builder, job, other, machine, allow_parallel)
            return
        if other is not None:
            _emit_transposing(builder, job, other, allow_parallel)
            return
    unroll = 1 if bytes_ else unrolling(job, last.extent // lanes)
    spread = _spread(job.axes, job.cost, lanes * unroll) if allow_parallel else _Spread((), job.axes)
    values: dict[Var, Expr] = {}

    def inner(start: Expr, extent: int) -> None:
        block = tuple(_moved(s, values) for s in job.stores)
        run(builder, block, last, start, extent, lanes, unroll)

    with _parallel(builder, spread, values) as chunk:
        if chunk is None:
            _nest(builder, spread.inner[:-1], values, lambda: inner(ix.const(0), last.extent))
            return
        _nest(builder, spread.inner[:-1], values, lambda: inner(ix.mul(chunk, spread.chunk), spread.chunk))
        rest = last.extent - spread.chunks * spread.chunk
        if rest:
            with builder.when(binary("eq", chunk, ix.const(spread.chunks - 1))):
                start = ix.const(spread.chunks * spread.chunk)
                _nest(builder, spread.inner[:-1], values, lambda: inner(start, rest))


def _transposing(job: Job) -> Var | None:
    """The axis along which the loads are contiguous, where that is not the last axis."""
    for position in job.positions()[len(job.stores) :]:
        for axis in job.axes[:-1]:
            if ix.coefficient(position, axis) == 1 and axis.extent >= 4:
                return axis
    return None


def _emit_transposing(builder: Builder, job: Job, other: Var, allow_parallel: bool) -> None:
    """Tiles of `other` and the last axis, so that both the lines read and the lines written are used while cached."""
    last = job.axes[-1]
    tile_a, tile_b = min(TILE, other.extent), min(TILE, last.extent)
    full, rest = divmod(other.extent, tile_a)
    blocks = Var(f"{other.name}t", full)
    axes = tuple(blocks if a == other else a for a in job.axes[:-1])
    # Beyond the tiled axis, what one worker writes would lie between what others write.
    cut = axes.index(blocks) + 1
    work = job.cost * tile_a * last.extent * prod(a.extent for a in axes[cut:])
    spread = _spread(axes[:cut], work, 1) if allow_parallel else _Spread((), axes[:cut])
    if spread.chunks > 1:
        spread = _Spread((*spread.outer, *spread.inner), ())
    spread = replace(spread, inner=(*spread.inner, *axes[cut:]))
    values: dict[Var, Expr] = {}

    def tile(rows: int, first: Expr) -> None:
        full, rest = divmod(last.extent, tile_b)
        for begin, count, width in ((0, full, tile_b), (full * tile_b, 1, rest)):
            if not width:
                continue
            with builder.loop("t", count) as t, builder.loop("r", rows) as r, builder.unroll("c", width) as c:
                values[other] = ix.add(first, r)
                values[last] = ix.add(begin, ix.mul(t, tile_b), c)
                builder.emit(tuple(_moved(s, values) for s in job.stores))

    def body() -> None:
        at = values[blocks]
        tile(tile_a, ix.mul(at, tile_a))
        if rest:
            with builder.when(binary("eq", at, ix.const(full - 1))):
                tile(rest, ix.const(full * tile_a))

    with _parallel(builder, spread, values):
        _nest(builder, spread.inner, values, body)


def _copied(job: Job, other: Var, machine: CpuMachine) -> Load | None:
    """The load that the job merely copies, where vectors along `other` can be transposed in registers."""
    value = job.stores[0].value
    if len(job.stores) != 1 or job.stores[0].mask is not None or not isinstance(value, Load) or value.mask is not None:
        return None
    lanes = _square(value.dtype, machine)
    if value.dtype == "bool" or lanes < 4 or min(other.extent, job.axes[-1].extent) < lanes:
        return None
    straight = ix.coefficient(value.index[0], other) == 1 and ix.coefficient(job.stores[0].index[0], job.axes[-1]) == 1
    return value if straight else None


def _square(dtype: str, machine: CpuMachine) -> int:
    """Edge of the squares that are transposed in registers."""
    return min(8, machine.lanes(dtype))


def transposed(rows: Sequence[Expr]) -> list[Expr]:
    """A square of vectors with rows and columns exchanged, in log2(lanes) rounds of pairwise exchanges.

    J. O. Eklundh, "A Fast Computer Method for Matrix Transposing" (1972).
    """
    result, lanes, step = list(rows), len(rows), 1
    while step < lanes:
        first = tuple(i if not i & step else lanes + i - step for i in range(lanes))
        second = tuple(i + step if not i & step else lanes + i for i in range(lanes))
        for i in range(lanes):
            if not i & step:
                a, b = result[i], result[i + step]
                result[i], result[i + step] = Shuffle(a, b, first), Shuffle(a, b, second)
        step *= 2
    return result


def _emit_shuffled(builder: Builder, job: Job, other: Var, machine: CpuMachine, allow_parallel: bool) -> None:
    """A transposing copy by squares: vectors are loaded along `other` and stored along the last axis."""
    store, last = job.stores[0], job.axes[-1]
    source = store.value
    assert isinstance(source, Load)
    lanes = _square(source.dtype, machine)
    # Two squares side by side use the whole of a cache line that is read.
    rows = 2 * lanes if other.extent >= 2 * lanes else lanes
    full, rest = divmod(other.extent, rows)
    blocks = Var(f"{other.name}t", full)
    axes = tuple(blocks if a == other else a for a in job.axes[:-1])
    cut = axes.index(blocks) + 1
    work = rows * last.extent * prod(a.extent for a in axes[cut:])
    spread = _spread(axes[:cut], work, 1) if allow_parallel else _Spread((), axes[:cut])
    if spread.chunks > 1:
        spread = _Spread((*spread.outer, *spread.inner), ())
    spread = replace(spread, inner=(*spread.inner, *axes[cut:]))
    values: dict[Var, Expr] = {}

    def square(row: Expr, column: Expr) -> None:
        index = source.index[0]
        found: list[Expr] = []
        for k in range(lanes):
            place = substitute(index, {**values, other: row, last: ix.add(column, k)})
            found.append(Load(source.buffer, (place,), lanes))
        for k, vector in enumerate(transposed(found)):
            place = substitute(store.index[0], {**values, other: ix.add(row, k), last: column})
            builder.store(store.buffer, (place,), vector)

    def band(row: Expr, count: int) -> None:
        """Rows from `row` on; a ragged end is covered by squares that overlap the ones before."""
        starts = [*range(0, count - lanes + 1, lanes)]
        if count % lanes:
            starts.append(count - lanes)
        with builder.loop("t", last.extent // lanes) as t:
            for start in starts:
                square(ix.add(row, start), ix.mul(t, lanes))
        if last.extent % lanes:
            for start in starts:
                square(ix.add(row, start), ix.const(last.extent - lanes))

    def body() -> None:
        at = values[blocks]
        band(ix.mul(at, rows), rows)
        if rest:
            with builder.when(binary("eq", at, ix.const(full - 1))):
                count = max(rest, lanes)
                band(ix.const(other.extent - count), count)

    with _parallel(builder, spread, values):
        _nest(builder, spread.inner, values, body)


def _combined(op: str, a: Expr, b: Expr) -> Expr:
    """a op b; min and max hand NaN on from either side; on bool they are and / or."""
    if a.dtype == "bool":
        return Binary("or" if op in ("max", "add") else "and", a, b)
    if op in ("min", "max") and "float" in a.dtype:
        # `a op b` is b if b is NaN; a NaN in the accumulator has to be kept by hand.
        return Select(Unary("isnan", a), a, Binary(op, a, b))
    if op == "add" and isinstance(b, Binary) and b.op == "mul" and "float" in b.dtype:
        return Fma(b.a, b.b, a)
    return binary(op, a, b)


def _finished(job: Job, result: Expr, values: dict[Var, Expr]) -> Block:
    """The stores of a reduction, with its result in place of the holder."""
    found: list[Store] = []
    for s in job.stores:
        value = transform(s.value, lambda e: result if e == job.holder else None)
        found.append(_moved(Store(s.buffer, s.index, value, s.mask), values))
    return tuple(found)


def _emit_reduction(builder: Builder, job: Job, machine: CpuMachine, allow_parallel: bool) -> None:
    assert job.value is not None
    steps = prod(r.extent for r in job.reduce)
    lanes = vector_lanes(job, machine)
    inner = contiguous_reduction(job)
    along_reduction = inner is not None and inner.extent >= lanes > 1
    along_output = bool(job.axes) and vector_gain(job, job.axes[-1], lanes)
    if along_output and along_reduction:
        along_reduction = not _contiguous(job, job.axes[-1])
        along_output = not along_reduction
    step = lanes if along_output else 1
    spread = _spread(job.axes, job.cost * max(1, steps), step) if allow_parallel and job.axes else _Spread((), job.axes)
    values: dict[Var, Expr] = {}

    def over(start: Expr, extent: int) -> None:
        """All results of the last output axis from `start` on."""
        if not job.axes:
            one(values)
            return
        last = job.axes[-1]
        if along_output:
            _columns(builder, job, values, last, start, extent, lanes)
            return
        with builder.loop("o", extent) as o:
            one({**values, last: ix.add(start, o)})

    def one(at: dict[Var, Expr]) -> None:
        if along_reduction:
            assert inner is not None
            _vector_reduction(builder, job, at, inner, lanes)
        else:
            _scalar_reduction(builder, job, at)

    with _parallel(builder, spread, values) as chunk:
        if chunk is None:
            whole = job.axes[-1].extent if job.axes and job.axes[-1] in spread.inner else 1
            if job.axes and job.axes[-1] not in spread.inner:
                one(values)
                return
            _nest(builder, spread.inner[:-1], values, lambda: over(ix.const(0), whole))
            return
        _nest(builder, spread.inner[:-1], values, lambda: over(ix.mul(chunk, spread.chunk), spread.chunk))
        rest = job.axes[-1].extent - spread.chunks * spread.chunk
        if rest:
            with builder.when(binary("eq", chunk, ix.const(spread.chunks - 1))):
                start = ix.const(spread.chunks * spread.chunk)
                _nest(builder, spread.inner[:-1], values, lambda: over(start, rest))


def _contiguous(job: Job, v: Var) -> bool:
    """Whether no load strides along `v`."""
    assert job.value is not None
    return all(ix.coefficient(n.index[0], v) in (0, 1) for n in nodes(job.value) if isinstance(n, Load) and n.index)


def _scalar_reduction(builder: Builder, job: Job, at: dict[Var, Expr]) -> None:
    assert job.value is not None
    dtype = job.value.dtype
    acc = builder.regs("acc", (1,), 1, dtype)
    here = (ix.const(0), ix.const(0))
    builder.store(acc, here, identity_of(job.op, dtype))

    def step() -> None:
        assert job.value is not None
        builder.store(acc, here, _combined(job.op, Load(acc, here), substitute(job.value, at)))

    at = dict(at)
    _nest(builder, job.reduce, at, step)
    builder.emit(_finished(job, Load(acc, here), at))


def _vector_reduction(builder: Builder, job: Job, at: dict[Var, Expr], inner: Var, lanes: int) -> None:
    """Vector accumulators along a reduced axis, combined at the end; what does not fill a vector is added singly."""
    assert job.value is not None
    value, dtype = job.value, job.value.dtype
    unroll = unrolling(job, inner.extent // lanes)
    acc = builder.regs("acc", (unroll,), lanes, dtype)
    single = builder.regs("single", (1,), 1, dtype)
    zero = ix.const(0)
    start = identity_of(job.op, dtype)
    with builder.unroll("u", unroll) as u:
        builder.store(acc, (u, zero), splat(start, lanes))
    builder.store(single, (zero, zero), start)
    at = dict(at)

    def add(i: Expr, base: Expr) -> None:
        vector = _vector(substitute(value, at), inner, base, lanes)
        builder.store(acc, (i, zero), _combined(job.op, Load(acc, (i, zero), lanes), vector))

    def row() -> None:
        full, rest = divmod(inner.extent, lanes * unroll)
        with builder.loop("i", full) as i, builder.unroll("u", unroll) as u:
            add(u, ix.add(ix.mul(i, lanes * unroll), ix.mul(u, lanes)))
        vectors, rest = divmod(rest, lanes)
        for k in range(vectors):
            add(ix.const(k % unroll), ix.const(full * lanes * unroll + k * lanes))
        with builder.loop("i", rest) as i:
            scalar = substitute(value, {**at, inner: ix.add(inner.extent - rest, i)})
            builder.store(single, (zero, zero), _combined(job.op, Load(single, (zero, zero)), scalar))

    _nest(builder, [r for r in job.reduce if r != inner], at, row)
    total: Expr = Load(acc, (zero, zero), lanes)
    for k in range(1, unroll):
        total = _combined(job.op, total, Load(acc, (ix.const(k), zero), lanes))
    # NaN is lost by the lanes' min and max, so those are combined one by one through memory.
    if job.op in ("min", "max") and "float" in dtype:
        line = builder.stack("line", (lanes,), dtype)
        builder.store(line, (zero,), total)
        with builder.loop("l", lanes) as k:
            builder.store(single, (zero, zero), _combined(job.op, Load(single, (zero, zero)), Load(line, (k,))))
        result: Expr = Load(single, (zero, zero))
    else:
        op = job.op if dtype != "bool" else "max" if job.op in ("max", "add") else "min"
        result = _combined(job.op, Load(single, (zero, zero)), Reduce(op, total))
    builder.emit(_finished(job, result, at))


def _columns(builder: Builder, job: Job, at: dict[Var, Expr], last: Var, start: Expr, extent: int, lanes: int) -> None:
    """Vectors of neighbouring results, each with its accumulator in a register, over all reduction steps."""
    assert job.value is not None
    value, dtype = job.value, job.value.dtype
    zero = ix.const(0)

    def tile(base: Expr, count: int) -> None:
        """`count` vectors of results from `base` on."""
        acc = builder.regs("acc", (count,), lanes, dtype)
        inner = dict(at)
        with builder.unroll("u", count) as u:
            builder.store(acc, (u, zero), splat(identity_of(job.op, dtype), lanes))

        def step() -> None:
            with builder.unroll("u", count) as u:
                vector = _vector(substitute(value, inner), last, ix.add(base, ix.mul(u, lanes)), lanes)
                builder.store(acc, (u, zero), _combined(job.op, Load(acc, (u, zero), lanes), vector))

        _nest(builder, job.reduce, inner, step)
        # To `vectorize` the results are a buffer along the axis; then its load becomes the register.
        place = Load(Buffer(_LINE, dtype, (last.extent,)), (last,))
        with builder.unroll("u", count) as u:
            block = vectorize(_finished(job, place, at), last, ix.add(base, ix.mul(u, lanes)), lanes)
            builder.emit(map_statements(block, lambda e: transform(e, lambda n: _register(n, acc, u))))

    count = unrolling(job, extent // lanes)
    full, rest = divmod(extent, lanes * count)
    with builder.loop("i", full) as i:
        tile(ix.add(start, ix.mul(i, lanes * count)), count)
    vectors, rest = divmod(rest, lanes)
    with builder.loop("i", vectors) as i:
        tile(ix.add(start, full * lanes * count, ix.mul(i, lanes)), 1)
    if rest and extent >= lanes:
        tile(ix.add(start, extent - lanes), 1)
    elif rest:
        with builder.loop("i", rest) as i:
            _scalar_reduction(builder, job, {**at, last: ix.add(start, full * lanes * count + vectors * lanes, i)})


_LINE = "$line"


def _register(e: Expr, acc: Buffer, i: Expr) -> Expr | None:
    """The accumulator in place of a load of the pretended buffer of results."""
    if not isinstance(e, Load) or e.buffer.name != _LINE:
        return None
    return Load(acc, (i, ix.const(0)), e.lanes)


def _vector(e: Expr, v: Var, base: Expr, lanes: int) -> Expr:
    """`e` for `lanes` iterations of `v` from `base` on."""
    (store,) = vectorize((Store(Buffer(_LINE, e.dtype, (v.extent,)), (v,), e),), v, base, lanes)
    assert isinstance(store, Store)
    return store.value


__all__ = ["emit"]
