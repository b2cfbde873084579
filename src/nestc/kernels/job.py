"""Loop nests of the generic lowering as data: axes in normal form, and what vectors along one of them would cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from nestc.kernels.api import CpuMachine
from nestc.kernels.compute import cost, is_lookup, nodes
from nestc.tensor import index as ix
from nestc.tensor.ir import Binary, Const, Expr, Load, Store, Var
from nestc.tensor.rewrite import substitute

UNROLLED_COST = 160
"""Instructions (by `compute.cost`) that one unrolled body may have."""

BYTES = ("int8", "uint8")
_BYTE_COST = 32  # instructions on each of the vectors of int32 and float32 that a vector of bytes becomes


@dataclass(frozen=True)
class Job:
    """Stores over loop axes. Buffers are one-dimensional parameters of the kernel; expressions are scalar.

    With ``reduce``, ``value`` is combined with ``op`` over these axes into the accumulator, and ``stores`` are in terms
    of ``holder``, the load that stands for it.
    """

    axes: tuple[Var, ...]
    stores: tuple[Store, ...]
    reduce: tuple[Var, ...] = ()
    op: str = "add"
    value: Expr | None = None
    holder: Load | None = None

    def expressions(self) -> list[Expr]:
        """Everything that depends on the axes."""
        found = [e for s in self.stores for e in (*s.index, s.value, *(() if s.mask is None else (s.mask,)))]
        return found if self.value is None else [*found, self.value]

    def positions(self) -> list[Expr]:
        """The flat positions of all accesses."""
        found = [s.index[0] for s in self.stores]
        return found + [n.index[0] for e in self.expressions() for n in nodes(e) if isinstance(n, Load) and n.index]

    def renamed(self, values: dict[Var, Expr], axes: Sequence[Var], reduce: Sequence[Var]) -> Job:
        """The job over other axes."""

        def visit(e: Expr) -> Expr:
            return substitute(e, values)

        stores = tuple(
            Store(s.buffer, tuple(map(visit, s.index)), visit(s.value), None if s.mask is None else visit(s.mask))
            for s in self.stores
        )
        value = None if self.value is None else visit(self.value)
        return replace(self, axes=tuple(axes), reduce=tuple(reduce), stores=stores, value=value)

    @property
    def cost(self) -> int:
        """Cost of one element (one step of a reduction)."""
        return sum(cost(e) for e in ([s.value for s in self.stores] if self.value is None else [self.value])) + 1


# -- normal form of the axes


def normalized(job: Job) -> Job:
    """The job without axes of extent 1, with axes split where accesses need it and merged where they do not."""
    unit = {v: ix.const(0) for v in (*job.axes, *job.reduce) if v.extent == 1}
    job = job.renamed(dict(unit), [v for v in job.axes if v not in unit], [v for v in job.reduce if v not in unit])
    job = _split(job)
    return _merged(_merged(job, "reduce"), "axes")


def _quotients(job: Job) -> Iterator[Binary]:
    for e in job.expressions():
        for n in nodes(e):
            if isinstance(n, Binary) and n.op in ("floordiv", "mod") and n.dtype == "int64" and isinstance(n.b, Const):
                yield n


def _split(job: Job) -> Job:
    """Axes that are only met as quotient and remainder by a divisor of their extent become two axes."""
    for _ in range(8):
        chosen: tuple[Var, int] | None = None
        for n in _quotients(job):
            k = int(n.b.value)  # type: ignore[attr-defined]
            if isinstance(n.a, Var) and n.a.extent % k == 0 and 1 < k < n.a.extent and n.a in (*job.axes, *job.reduce):
                chosen = (n.a, k)
                break
        if chosen is None:
            return job
        v, k = chosen
        outer, inner = Var(f"{v.name}o", v.extent // k), Var(f"{v.name}i", k)
        whole = ix.add(ix.mul(outer, k), inner)
        spread = {name: tuple(w for a in axes for w in ((outer, inner) if a == v else (a,)))
                  for name, axes in (("axes", job.axes), ("reduce", job.reduce))}  # fmt: skip
        job = job.renamed({v: whole}, spread["axes"], spread["reduce"])
    return job


def _mergeable(job: Job, a: Var, b: Var) -> bool:
    """Whether every access moves b.extent times as far for `a` as for `b`, so that both are one axis."""
    for position in job.positions():
        ca, cb = ix.coefficient(position, a), ix.coefficient(position, b)
        if ca is None or cb is None:
            if ca is not None and cb is None and ca == 0:
                return False
            continue
        if ca != cb * b.extent:
            return False
    return True


def _merged(job: Job, which: str) -> Job:
    """Neighbouring axes that all accesses walk in one go become one."""
    i = len(getattr(job, which)) - 2
    while i >= 0:
        axes: tuple[Var, ...] = getattr(job, which)
        a, b = axes[i], axes[i + 1]
        if _mergeable(job, a, b):
            both = Var(f"{a.name}_{b.name}"[-40:], a.extent * b.extent)
            rest = (*axes[:i], both, *axes[i + 2 :])
            values: dict[Var, Expr] = {a: ix.floordiv(both, b.extent), b: ix.mod(both, b.extent)}
            new = job.renamed(values, rest if which == "axes" else job.axes, rest if which == "reduce" else job.reduce)
            before = sum(not ix.variables(n).isdisjoint((a, b)) for n in set(_quotients(job)))
            after = sum(both in ix.variables(n) for n in set(_quotients(new)))
            if after <= before:
                job = new
        i -= 1
    return job


# -- vectors


def vector_lanes(job: Job, machine: CpuMachine) -> int:
    """Lanes of the widest dtype that the job's values have (indices do not count)."""
    lanes = [machine.lanes(s.buffer.dtype) for s in job.stores]
    roots = [s.value for s in job.stores] + ([] if job.value is None else [job.value])
    seen: set[int] = set()
    while roots:
        e = roots.pop()
        if id(e) in seen or isinstance(e, (Const, Var)):
            continue
        seen.add(id(e))
        if isinstance(e, Load):
            lanes.append(machine.lanes(e.dtype))
            continue
        if e.dtype not in ("bool", "int64"):
            lanes.append(machine.lanes(e.dtype))
        roots.extend(e.children())
    return min(lanes)


def byte_lanes(job: Job, extent: int, machine: CpuMachine) -> int:
    """Lanes of bytes where a job reads bytes or float32, computes little and writes bytes, so that whole vectors are
    narrowed and written; 0 where that is not so, or where `extent` has no room for such a vector."""
    read = [n for e in job.expressions() for n in nodes(e) if isinstance(n, Load) and n.index]
    lanes = machine.lanes("uint8")
    if any(n.dtype not in (*BYTES, "float32") for n in read) or any(s.buffer.dtype not in BYTES for s in job.stores):
        return 0
    return lanes if not job.reduce and extent >= lanes and job.cost <= _BYTE_COST else 0


def _cycles(job: Job, v: Var, lanes: int) -> tuple[float, float]:
    """Rough cycles of `lanes` elements along `v` as one vector (infinite if impossible), and one by one."""
    vector = scalar = 0.0
    if v.extent < lanes or (v in job.axes and any(ix.coefficient(s.index[0], v) != 1 for s in job.stores)):
        vector = float("inf")
    for e in job.expressions():
        for n in nodes(e):
            if isinstance(n, Load) and is_lookup(n):
                vector += lanes  # a byte a cycle, see `codegen.lookups`
                scalar += 2 * lanes
            elif isinstance(n, Load) and n.index:
                stride = ix.coefficient(n.index[0], v)
                vector += 1 if stride in (0, 1) else 3 * lanes
                scalar += lanes
            elif isinstance(n, Binary) and n.op in ("floordiv", "mod", "rem", "div") and "float" not in n.dtype:
                vector += 3 * lanes if ix.depends(n, v) else 0
                scalar += 2 * lanes
    return vector + job.cost, scalar + job.cost * lanes


def vector_gain(job: Job, v: Var, lanes: int) -> bool:
    """Whether vectors along `v` are worth it: gathers and divided indices must not outweigh the arithmetic."""
    vector, scalar = _cycles(job, v, lanes)
    return vector < scalar


def estimate(job: Job, machine: CpuMachine) -> float:
    """Rough cycles of a job on one core, to compare layouts by."""
    count = prod(v.extent for v in (*job.axes, *job.reduce))
    if not count:
        return 0.0
    job = normalized(job)
    lanes = vector_lanes(job, machine)
    candidates = list(job.axes[-1:])
    if job.value is not None and (inner := contiguous_reduction(job)) is not None:
        candidates.append(inner)
    best = min((min(_cycles(job, v, lanes)) for v in candidates), default=float(job.cost * lanes))
    return count * best / lanes


def unrolling(job: Job, steps: int) -> int:
    """How many vectors one body should handle."""
    count = 4
    while count > 1 and (count > steps or count * job.cost > UNROLLED_COST):
        count //= 2
    return count


def contiguous_reduction(job: Job) -> Var | None:
    """The reduced axis along which most loads are contiguous (or fixed)."""
    assert job.value is not None
    places = [n.index[0] for n in nodes(job.value) if isinstance(n, Load) and n.index]
    best: tuple[int, Var] | None = None
    for r in job.reduce:
        strides = [ix.coefficient(p, r) for p in places]
        if any(s not in (0, 1) for s in strides) or 1 not in strides:
            continue
        if best is None or r.extent > best[0]:
            best = (r.extent, r)
    return None if best is None else best[1]
