"""A small builder for kernels: loops are `with` blocks, and every helper checks types as it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

from nestc.tensor import index as ix
from nestc.tensor.ir import (
    PREFETCH,
    Block,
    Broadcast,
    Buffer,
    Call,
    Const,
    Expr,
    For,
    If,
    Kernel,
    Load,
    LoopKind,
    Stmt,
    Store,
    Var,
    Window,
)
from nestc.tensor.rewrite import binary, select

IndexLike = Expr | int


def as_index(i: IndexLike) -> Expr:
    """An int as an index constant."""
    return ix.const(i) if isinstance(i, int) else i


def splat(x: Expr, lanes: int) -> Expr:
    """`x` in every lane; nothing to do if it has them already."""
    return x if x.lanes == lanes else Broadcast(x, lanes)


def constant(value: float, dtype: str, lanes: int = 1) -> Expr:
    """A constant of any dtype and number of lanes."""
    if dtype == "bool":
        scalar = Const(bool(value), dtype)
    elif "float" in dtype:
        scalar = Const(float(value), dtype)
    else:
        scalar = Const(int(value), dtype)
    return splat(scalar, lanes)


def load(buffer: Buffer, *index: IndexLike, lanes: int = 1, mask: Expr | None = None) -> Load:
    """Read `lanes` neighbours from `index`."""
    return Load(buffer, tuple(map(as_index, index)), lanes, mask)


class Builder:
    """Collects the statements of one kernel."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._params: list[Buffer] = []
        self._locals: list[Buffer] = []
        self._open: list[list[Stmt]] = [[]]
        self._names: dict[str, int] = {}

    def _fresh(self, name: str) -> str:
        count = self._names.get(name, 0)
        self._names[name] = count + 1
        return name if count == 0 else f"{name}_{count}"

    def param(self, name: str, dtype: str, shape: Sequence[int]) -> Buffer:
        """An argument of the kernel; arguments are passed in the order of these calls and never overlap."""
        buffer = Buffer(self._fresh(name), dtype, tuple(shape))
        self._params.append(buffer)
        return buffer

    def regs(self, name: str, shape: Sequence[int], lanes: int, dtype: str = "float32") -> Buffer:
        """Registers of `lanes` lanes, indexed by constants (after unrolling) and then a 0 for the lane."""
        buffer = Buffer(self._fresh(name), dtype, (*shape, lanes), "regs")
        self._locals.append(buffer)
        return buffer

    def stack(self, name: str, shape: Sequence[int], dtype: str = "float32") -> Buffer:
        """A small array of this call (at most 64 KiB a kernel in all)."""
        buffer = Buffer(self._fresh(name), dtype, tuple(shape), "stack")
        self._locals.append(buffer)
        return buffer

    def scratch(self, name: str, shape: Sequence[int], dtype: str = "float32") -> Buffer:
        """A larger array private to the worker that runs this call; its contents do not survive the call."""
        buffer = Buffer(self._fresh(name), dtype, tuple(shape), "scratch")
        self._locals.append(buffer)
        return buffer

    @contextmanager
    def _loop(self, name: str, extent: int, kind: LoopKind) -> Iterator[Var]:
        var = Var(self._fresh(name), extent)
        self._open.append([])
        yield var
        body = tuple(self._open.pop())
        if extent > 0 and body:
            self._open[-1].append(For(var, body, kind))

    @contextmanager
    def loop(self, name: str, extent: int) -> Iterator[Expr]:
        """A serial loop; of one iteration, just its body."""
        if extent == 1:
            yield ix.const(0)
            return
        with self._loop(name, extent, "serial") as var:
            yield var

    @contextmanager
    def unroll(self, name: str, extent: int) -> Iterator[Var]:
        """A loop that the code generator writes out."""
        with self._loop(name, extent, "unroll") as var:
            yield var

    @contextmanager
    def parallel(self, name: str, *extents: int) -> Iterator[tuple[Expr, ...]]:
        """The kernel's top-level parallel loop over one or several axes (row-major); gives their indices."""
        with self._loop(name, prod(extents), "parallel") as var:
            yield ix.unflatten(var, extents)

    @contextmanager
    def when(self, cond: Expr) -> Iterator[None]:
        """Statements under a scalar condition; decided now where it is a constant."""
        self._open.append([])
        yield
        body = tuple(self._open.pop())
        if isinstance(cond, Const):
            if cond.value:
                self._open[-1].extend(body)
        elif body:
            self._open[-1].append(If(cond, body))

    @contextmanager
    def otherwise(self) -> Iterator[None]:
        """The other branch of the `when` just closed (whose condition is not a constant)."""
        last = self._open[-1][-1]
        if not isinstance(last, If) or last.orelse:
            raise TypeError("otherwise() must follow a when() that was kept")
        self._open.append([])
        yield
        body = tuple(self._open.pop())
        self._open[-1][-1] = If(last.cond, last.then, body)

    def store(self, buffer: Buffer, index: Sequence[IndexLike], value: Expr, mask: Expr | None = None) -> None:
        """Write `value` at `index`."""
        self._open[-1].append(Store(buffer, tuple(map(as_index, index)), value, mask))

    def emit(self, statements: Block) -> None:
        """Append statements built elsewhere."""
        self._open[-1].extend(statements)

    def prefetch(self, buffer: Buffer, *index: IndexLike) -> None:
        """Hint that the place will be read soon."""
        self._open[-1].append(Call(PREFETCH, (Window(buffer, tuple(map(as_index, index))),)))

    def finish(self, origin: Sequence[str] = ()) -> Kernel:
        """The finished kernel."""
        if len(self._open) != 1:
            raise TypeError(f"kernel {self.name}: a loop is still open")
        return Kernel(self.name, tuple(self._params), tuple(self._open[0]), tuple(self._locals), tuple(origin))


def less(a: IndexLike, b: IndexLike) -> Expr:
    """a < b on indices, decided now where intervals allow."""
    return binary("lt", as_index(a), as_index(b))


def within(i: Expr, extent: int) -> Expr:
    """0 <= i < extent, decided now where intervals allow."""
    return binary("and", binary("ge", i, ix.const(0)), binary("lt", i, ix.const(extent)))


def clamp(i: Expr, low: int, high: int) -> Expr:
    """An index limited to [low, high]."""
    return binary("min", binary("max", i, ix.const(low)), ix.const(high))


__all__ = ["Builder", "as_index", "binary", "clamp", "constant", "less", "load", "select", "splat", "within"]
