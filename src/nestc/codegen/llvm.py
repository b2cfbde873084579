"""Print a Tensor IR kernel as LLVM IR text. This module takes no decisions: every loop and vector is already there."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import isinf, isnan

from nestc.codegen.halves import Halves
from nestc.errors import Error
from nestc.kernels.api import CpuMachine
from nestc.tensor import index as ix
from nestc.tensor.ir import (
    Binary,
    Bitcast,
    Block,
    Broadcast,
    Buffer,
    Call,
    Cast,
    Const,
    Expr,
    Fma,
    For,
    If,
    Kernel,
    Load,
    Ramp,
    Reduce,
    Select,
    Shuffle,
    Stmt,
    Store,
    Unary,
    Var,
)

_FLOAT = {"float32": "float", "float64": "double"}
_BITS = {"bool": 8, "bfloat16": 16, "float16": 16, "float32": 32, "float64": 64}
_COMPARE = {"eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge"}
_FLOAT_OPS = {"add": "fadd", "sub": "fsub", "mul": "fmul", "div": "fdiv", "rem": "frem"}
_INT_OPS = {"add": "add", "sub": "sub", "mul": "mul", "and": "and", "or": "or", "xor": "xor", "shl": "shl"}
_INTRINSICS = {"sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "rint": "rint", "trunc": "trunc", "abs": "fabs"}
# Called for each lane: libm, which every process that runs Python has loaded.
_LIBM = frozenset("exp log sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh erf pow atan2".split())
_CACHE_LINE = 64


def width(dtype: str) -> int:
    """Bits of one element in memory."""
    return _BITS.get(dtype) or int(dtype.lstrip("uint"))


def unsigned(dtype: str) -> bool:
    """Whether integers of this dtype are unsigned."""
    return dtype.startswith("uint") or dtype == "bool"


def scalar_type(dtype: str) -> str:
    """LLVM type of a value; bool is i1, float16 and bfloat16 are their 16 bits."""
    if dtype == "bool":
        return "i1"
    return _FLOAT.get(dtype) or f"i{width(dtype)}"


def memory_type(dtype: str) -> str:
    """LLVM type of an element in memory; bool takes a byte."""
    return "i8" if dtype == "bool" else scalar_type(dtype)


def _vector(element: str, lanes: int) -> str:
    return element if lanes == 1 else f"<{lanes} x {element}>"


def _suffix(element: str, lanes: int) -> str:
    short = {"float": "f32", "double": "f64"}.get(element, element)
    return short if lanes == 1 else f"v{lanes}{short}"


@dataclass(frozen=True)
class Code:
    """LLVM IR of one kernel: `symbol` as `void (ptr args..., ptr scratch, i64 begin, i64 end)`."""

    symbol: str
    text: str
    scratch_bytes: int


def print_kernel(kernel: Kernel, symbol: str, machine: CpuMachine) -> Code:
    """LLVM IR for `kernel` on `machine`. Raises nestc.Error for what cannot be expressed there."""
    return _Printer(kernel, symbol, machine).run()


_Lines = list["str | _Lines"]


@dataclass
class _Scope:
    """The body of a loop or branch: values computed there, which dominate everything emitted inside it later, and the
    lines that stand before it is entered, where index arithmetic of outer loops is hoisted to."""

    values: dict[object, str] = field(default_factory=dict)
    before: _Lines = field(default_factory=list)


class _Printer:
    def __init__(self, kernel: Kernel, symbol: str, machine: CpuMachine) -> None:
        self.kernel = kernel
        self.symbol = symbol
        self.machine = machine
        self.entry: list[str] = []
        self.lines: _Lines = []
        self.depth: dict[str, int] = {}
        self.block = "entry"
        self.count = 0
        self.env: dict[str, int | str] = {}
        self.scopes = [_Scope()]
        self.memo: dict[Expr, str] = {}
        self.declared: dict[str, str] = {}
        self.bases: dict[str, str] = {}

    # -- plumbing

    def fresh(self, hint: str = "v") -> str:
        self.count += 1
        return f"%{hint}{self.count}"

    def emit(self, text: str, level: int | None = None) -> str:
        """An instruction here, or hoisted to the scope of number `level`."""
        name = self.fresh()
        current = len(self.scopes) - 1
        level = current if level is None else level
        (self.lines if level == current else self.scopes[level + 1].before).append(f"  {name} = {text}")
        self.depth[name] = level
        return name

    def enter(self) -> None:
        """Open a scope at this point; the branch into it is emitted next."""
        scope = _Scope()
        self.lines.append(scope.before)
        self.scopes.append(scope)

    def leave(self) -> None:
        """Close the innermost scope."""
        self.scopes.pop()

    def do(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def label(self, name: str) -> None:
        self.lines.append(f"{name}:")
        self.block = name

    def declare(self, name: str, signature: str) -> str:
        """Declare an external function once; `signature` is 'ret @name(args)'."""
        self.declared[name] = f"declare {signature}"
        return name

    def known(self, key: object) -> str | None:
        for scope in reversed(self.scopes):
            value = scope.values.get(key)
            if value is not None:
                return value
        return None

    def remember(self, key: object, value: str) -> str:
        """Keep a value for later uses, as long as the scope that it was emitted in is open."""
        self.scopes[self.depth.get(value, 0)].values[key] = value
        return value

    # -- the function

    def run(self) -> Code:
        params = ", ".join(f"ptr noalias %p.{b.name}" for b in self.kernel.params)
        scratch = self.storage()
        for b in self.kernel.params:
            self.bases[b.name] = f"%p.{b.name}"
        self.statements(self.kernel.body)
        origin = [f"; {node}" for node in self.kernel.origin]
        head = f"define void @{self.symbol}({params}{', ' if params else ''}ptr noalias %scratch, i64 %begin, i64 %end)"
        vector_bits = self.machine.vector_bytes * 8
        attributes = (
            'attributes #0 = { nounwind "no-builtins" '
            f'"min-legal-vector-width"="{vector_bits}" "prefer-vector-width"="{vector_bits}" }}'
        )
        text = "\n".join(
            [
                *origin,
                f'target triple = "{self.machine.triple}"',
                f"{head} #0 {{",
                "entry:",
                *self.entry,
                *_flat(self.lines),
                "  ret void",
                "}",
                *self.declared.values(),
                attributes,
                "",
            ]
        )
        return Code(self.symbol, text, scratch)

    def storage(self) -> int:
        """Registers and stack become allocas; scratch buffers get offsets. Returns the bytes of scratch."""
        offset = 0
        for b in self.kernel.locals:
            if b.memory == "regs":
                lanes = b.shape[-1]
                for i in range(b.size // lanes):
                    kind = _vector(scalar_type(b.dtype), lanes)
                    self.entry.append(f"  %r.{b.name}.{i} = alloca {kind}, align {_CACHE_LINE}")
            elif b.memory == "stack":
                kind = f"[{max(1, b.size)} x {memory_type(b.dtype)}]"
                self.entry.append(f"  %s.{b.name} = alloca {kind}, align {_CACHE_LINE}")
                self.bases[b.name] = f"%s.{b.name}"
            else:
                self.entry.append(f"  %t.{b.name} = getelementptr i8, ptr %scratch, i64 {offset}")
                self.bases[b.name] = f"%t.{b.name}"
                offset += -(-b.size * width(b.dtype) // 8 // _CACHE_LINE) * _CACHE_LINE
        return offset

    # -- statements

    def statements(self, block: Block) -> None:
        for s in block:
            self.statement(s)

    def statement(self, s: Stmt) -> None:
        self.memo = {}
        if isinstance(s, For):
            self.loop(s)
        elif isinstance(s, Store):
            self.store(s)
        elif isinstance(s, If):
            self.branch(s)
        elif isinstance(s, Call):
            if s.intrinsic.name != "prefetch":
                raise Error(f"kernel {self.kernel.name}: the CPU has no instruction {s.intrinsic.name!r}")
            window = s.operands[0]
            place = self.address(window.buffer, window.index)
            self.declare("llvm.prefetch.p0", "void @llvm.prefetch.p0(ptr, i32, i32, i32)")
            self.do(f"call void @llvm.prefetch.p0(ptr {place}, i32 0, i32 2, i32 1)")

    def loop(self, s: For) -> None:
        if s.kind == "unroll":
            for i in range(s.var.extent):
                self.env[s.var.name] = i
                self.statements(s.body)
            del self.env[s.var.name]
            return
        start, stop = ("%begin", "%end") if s.kind == "parallel" else ("0", str(s.var.extent))
        var, following = self.fresh(f"{s.var.name}."), self.fresh("next")
        head, latch, done = (f"L{self.count}.{part}" for part in ("head", "latch", "done"))
        self.enter()
        self.do(f"br label %{head}")
        before = self.block
        self.label(head)
        self.do(f"{var} = phi i64 [ {start}, %{before} ], [ {following}, %{latch} ]")
        self.env[s.var.name] = var
        self.depth[var] = len(self.scopes) - 1
        self.statements(s.body)
        self.leave()
        del self.env[s.var.name]
        self.do(f"br label %{latch}")
        self.label(latch)
        self.do(f"{following} = add nuw nsw i64 {var}, 1")
        again = self.emit(f"icmp slt i64 {following}, {stop}")
        self.do(f"br i1 {again}, label %{head}, label %{done}")
        self.label(done)

    def branch(self, s: If) -> None:
        cond = self.value(s.cond)
        if cond in ("true", "false"):
            self.statements(s.then if cond == "true" else s.orelse)
            return
        self.count += 1
        then, orelse, done = (f"I{self.count}.{part}" for part in ("then", "else", "done"))
        before: _Lines = []
        self.lines.append(before)
        self.do(f"br i1 {cond}, label %{then}, label %{orelse if s.orelse else done}")
        for name, block in ((then, s.then), (orelse, s.orelse)):
            if not block:
                continue
            self.label(name)
            self.scopes.append(_Scope(before=before))
            self.statements(block)
            self.leave()
            self.do(f"br label %{done}")
        self.label(done)

    def store(self, s: Store) -> None:
        lanes = s.value.lanes
        value = self.value(s.value)
        kind = _vector(scalar_type(s.buffer.dtype), lanes)
        if s.buffer.memory == "regs":
            if s.mask is not None:
                raise Error(f"kernel {self.kernel.name}: masked store to registers {s.buffer.name}")
            self.do(f"store {kind} {value}, ptr {self.register(s.buffer, s.index)}")
            return
        if s.buffer.dtype == "bool":
            value = self.emit(f"zext {kind} {value} to {_vector('i8', lanes)}")
        element = memory_type(s.buffer.dtype)
        kind = _vector(element, lanes)
        align = max(1, width(s.buffer.dtype) // 8)
        if any(i.lanes > 1 for i in s.index):
            mask = self.mask(s.mask, lanes)
            places = self.addresses(s.buffer, s.index, lanes)
            name = f"llvm.masked.scatter.{_suffix(element, lanes)}.v{lanes}p0"
            self.declare(name, f"void @{name}({kind}, <{lanes} x ptr>, i32, <{lanes} x i1>)")
            self.do(f"call void @{name}({kind} {value}, <{lanes} x ptr> {places}, i32 {align}, <{lanes} x i1> {mask})")
            return
        if s.mask is None:
            self.do(f"store {kind} {value}, ptr {self.address(s.buffer, s.index)}, align {align}")
            return
        if s.mask.lanes == 1:
            self.guarded(self.value(s.mask), lambda: self.plain_store(s, kind, value, align))
            return
        mask = self.value(s.mask)
        place = self.address(s.buffer, s.index)
        name = f"llvm.masked.store.{_suffix(element, lanes)}.p0"
        self.declare(name, f"void @{name}({kind}, ptr, i32, <{lanes} x i1>)")
        self.do(f"call void @{name}({kind} {value}, ptr {place}, i32 {align}, <{lanes} x i1> {mask})")

    def plain_store(self, s: Store, kind: str, value: str, align: int) -> None:
        self.do(f"store {kind} {value}, ptr {self.address(s.buffer, s.index)}, align {align}")

    def guarded(self, cond: str, body: Callable[[], None]) -> None:
        """Run `body` (which emits code) only where `cond` holds."""
        self.count += 1
        then, done = f"G{self.count}.then", f"G{self.count}.done"
        self.enter()
        self.do(f"br i1 {cond}, label %{then}, label %{done}")
        self.label(then)
        body()
        self.leave()
        self.do(f"br label %{done}")
        self.label(done)

    # -- places

    def sum(self, e: Expr) -> tuple[int, list[tuple[str, int]]]:
        """An index as a constant plus SSA terms with coefficients, unrolled variables folded in."""
        c, terms = ix.linear(e)
        parts: list[tuple[str, int]] = []
        for term, coefficient in terms.items():
            value = self.atom(term)
            if isinstance(value, int):
                c += value * coefficient
            else:
                parts.append((value, coefficient))
        return c, parts

    def atom(self, e: Expr) -> int | str:
        """A term of an index: an int if it is known now, else an SSA name."""
        if isinstance(e, Var):
            return self.env[e.name]
        if isinstance(e, Binary) and e.op in ("floordiv", "mod") and isinstance(e.b, Const):
            k = int(e.b.value)
            c, parts = self.sum(e.a)
            if not parts:
                return c // k if e.op == "floordiv" else c % k
            key = (e.op, k, c, tuple(parts))
            known = self.known(key)
            if known is not None:
                return known
            inner = self.total(c, parts)
            return self.remember(key, self.divide(e.op, inner, k, ix.bounds(e.a)[0] >= 0))
        if isinstance(e, Const):
            return int(e.value)
        return self.value(e)

    def level(self, *names: str) -> int:
        """Number of the innermost scope that one of the values belongs to."""
        return max((self.depth.get(name, 0) for name in names), default=0)

    def divide(self, op: str, x: str, k: int, positive: bool) -> str:
        """x // k or x % k on i64, rounded towards minus infinity."""
        at = self.level(x)
        if k & (k - 1) == 0:
            shift = k.bit_length() - 1
            return self.emit(f"ashr i64 {x}, {shift}" if op == "floordiv" else f"and i64 {x}, {k - 1}", at)
        if positive:
            return self.emit(f"{'udiv' if op == 'floordiv' else 'urem'} i64 {x}, {k}", at)
        remainder = self.emit(f"srem i64 {x}, {k}", at)
        negative = self.emit(f"icmp slt i64 {remainder}, 0", at)
        if op == "mod":
            return self.emit(f"add i64 {remainder}, {self.emit(f'select i1 {negative}, i64 {k}, i64 0', at)}", at)
        quotient = self.emit(f"sdiv i64 {x}, {k}", at)
        return self.emit(f"add i64 {quotient}, {self.emit(f'sext i1 {negative} to i64', at)}", at)

    def total(self, c: int, parts: list[tuple[str, int]]) -> str:
        """The sum as an i64 operand: outer loops' parts first, each partial sum in the outermost scope it can be."""
        if not parts:
            return str(c)
        ordered = sorted(parts, key=lambda part: self.level(part[0]))
        value: str | None = None
        for i, (name, coefficient) in enumerate(ordered):
            key = ("sum", tuple(ordered[: i + 1]))
            known = self.known(key)
            if known is None:
                part = name
                if coefficient != 1:
                    scaled = ("scaled", name, coefficient)
                    part = self.known(scaled) or self.remember(
                        scaled, self.emit(f"mul nsw i64 {name}, {coefficient}", self.level(name))
                    )
                known = part if value is None else self.emit(f"add nsw i64 {value}, {part}", self.level(value, part))
                self.remember(key, known)
            value = known
        assert value is not None
        return self.emit(f"add nsw i64 {value}, {c}", self.level(value)) if c else value

    def address(self, buffer: Buffer, index: tuple[Expr, ...]) -> str:
        """Pointer to an element: a base moved once in each loop that it depends on, then a constant offset."""
        if buffer.memory == "regs":
            return self.register(buffer, index)
        c, parts = self.sum(ix.flatten(index, buffer.shape))
        place = self.bases[buffer.name]
        kind = memory_type(buffer.dtype)
        levels = sorted({self.level(name) for name, _ in parts})
        for level in levels:
            offset = self.total(0, [part for part in parts if self.level(part[0]) == level])
            key = ("place", place, offset, kind)
            place = self.known(key) or self.remember(
                key, self.emit(f"getelementptr inbounds {kind}, ptr {place}, i64 {offset}", self.level(place, offset))
            )
        if c == 0:
            return place
        offset_bytes = c * (width(buffer.dtype) // 8)
        key = ("offset", place, offset_bytes)
        known = self.known(key)
        return known or self.remember(key, self.emit(f"getelementptr i8, ptr {place}, i64 {offset_bytes}"))

    def addresses(self, buffer: Buffer, index: tuple[Expr, ...], lanes: int) -> str:
        """A vector of pointers for a gather or scatter."""
        kind = f"<{lanes} x i64>"
        position: str | None = None
        stride = buffer.size
        for i, extent in zip(index, buffer.shape):
            stride = stride // max(1, extent)
            part = self.value(i) if i.lanes == lanes else self.splat(self.value(i), "i64", lanes)
            if stride != 1:
                part = self.emit(f"mul {kind} {part}, {self.splat(str(stride), 'i64', lanes)}")
            position = part if position is None else self.emit(f"add {kind} {position}, {part}")
        element = memory_type(buffer.dtype)
        return self.emit(f"getelementptr {element}, ptr {self.bases[buffer.name]}, {kind} {position}")

    def register(self, buffer: Buffer, index: tuple[Expr, ...]) -> str:
        lanes = buffer.shape[-1]
        c, parts = self.sum(ix.flatten(index, buffer.shape))
        if parts or c % lanes:
            raise Error(f"kernel {self.kernel.name}: registers {buffer.name} need constant indices")
        return f"%r.{buffer.name}.{c // lanes}"

    # -- values

    def value(self, e: Expr) -> str:
        """SSA name or literal of an expression."""
        if isinstance(e, Const):
            return literal(e)
        done = self.memo.get(e)
        if done is None:
            done = self.memo[e] = self.compute(e)
        return done

    def compute(self, e: Expr) -> str:
        if e.dtype == "int64" and e.lanes == 1 and isinstance(e, (Var, Binary)):
            if isinstance(e, Var) or (e.op in ("add", "sub", "mul", "floordiv", "mod") and self.is_sum(e)):
                c, parts = self.sum(e)
                return self.total(c, parts)
        if isinstance(e, Load):
            return self.load(e)
        if isinstance(e, Binary):
            return self.binary(e)
        if isinstance(e, Unary):
            return self.unary(e)
        if isinstance(e, Select):
            kind = _vector(scalar_type(e.dtype), e.lanes)
            cond, a, b = self.value(e.cond), self.value(e.a), self.value(e.b)
            if cond in ("true", "false"):
                return a if cond == "true" else b
            return self.emit(f"select {_vector('i1', e.cond.lanes)} {cond}, {kind} {a}, {kind} {b}")
        if isinstance(e, Cast):
            return self.cast(self.value(e.x), e.x.dtype, e.dtype, e.lanes)
        if isinstance(e, Bitcast):
            source, target = (_vector(scalar_type(d), e.lanes) for d in (e.x.dtype, e.dtype))
            value = self.value(e.x)
            return value if source == target else self.emit(f"bitcast {source} {value} to {target}")
        if isinstance(e, Broadcast):
            return self.splat(self.value(e.x), scalar_type(e.dtype), e.lanes)
        if isinstance(e, Ramp):
            base = self.splat(self.value(e.base), "i64", e.lanes)
            steps = ", ".join(f"i64 {i * e.stride}" for i in range(e.lanes))
            return self.emit(f"add <{e.lanes} x i64> {base}, <{steps}>")
        if isinstance(e, Fma):
            return self.fma(e)
        if isinstance(e, Shuffle):
            kind = _vector(scalar_type(e.dtype), e.a.lanes)
            a, b = self.value(e.a), self.value(e.b)
            picks = ", ".join(f"i32 {p}" for p in e.picks)
            return self.emit(f"shufflevector {kind} {a}, {kind} {b}, <{len(e.picks)} x i32> <{picks}>")
        if isinstance(e, Reduce):
            return self.reduce(e)
        raise Error(f"kernel {self.kernel.name}: cannot print {type(e).__name__}")

    def is_sum(self, e: Binary) -> bool:
        """Whether linear form makes progress on `e` (else it would be its own only term)."""
        if e.op in ("floordiv", "mod"):
            return isinstance(e.b, Const)
        return list(ix.linear(e)[1]) != [e]

    def splat(self, value: str, element: str, lanes: int) -> str:
        if lanes == 1:
            return value
        if not value.startswith("%"):
            return f"<{', '.join([f'{element} {value}'] * lanes)}>"
        key = ("splat", value, element, lanes)
        known = self.known(key)
        if known is not None:
            return known
        kind = f"<{lanes} x {element}>"
        first = self.emit(f"insertelement {kind} poison, {element} {value}, i64 0")
        zeros = f"<{lanes} x i32> zeroinitializer"
        return self.remember(key, self.emit(f"shufflevector {kind} {first}, {kind} poison, {zeros}"))

    def mask(self, mask: Expr | None, lanes: int) -> str:
        value = "true" if mask is None else self.value(mask)
        return value if mask is not None and mask.lanes == lanes else self.splat(value, "i1", lanes)

    def load(self, e: Load) -> str:
        element = memory_type(e.buffer.dtype)
        kind = _vector(element, e.lanes)
        if e.buffer.memory == "regs":
            return self.emit(f"load {_vector(scalar_type(e.dtype), e.lanes)}, ptr {self.register(e.buffer, e.index)}")
        align = max(1, width(e.dtype) // 8)
        if any(i.lanes > 1 for i in e.index):
            places = self.addresses(e.buffer, e.index, e.lanes)
            mask = self.mask(e.mask, e.lanes)
            name = f"llvm.masked.gather.{_suffix(element, e.lanes)}.v{e.lanes}p0"
            self.declare(name, f"{kind} @{name}(<{e.lanes} x ptr>, i32, <{e.lanes} x i1>, {kind})")
            operands = f"<{e.lanes} x ptr> {places}, i32 {align}, <{e.lanes} x i1> {mask}, {kind} zeroinitializer"
            return self.from_memory(self.emit(f"call {kind} @{name}({operands})"), e.dtype, e.lanes)
        place = self.address(e.buffer, e.index)
        if e.mask is None:
            return self.from_memory(self.emit(f"load {kind}, ptr {place}, align {align}"), e.dtype, e.lanes)
        cond = self.value(e.mask)
        if cond == "true":
            return self.from_memory(self.emit(f"load {kind}, ptr {place}, align {align}"), e.dtype, e.lanes)
        if e.mask.lanes == 1:
            # A zero vector on the stack stands in for the place, so that nothing outside the buffer is touched.
            zero = f"%z.{element}.{e.lanes}"
            line = f"  {zero} = alloca {kind}, align {_CACHE_LINE}"
            if line not in self.entry:
                self.entry += [line, f"  store {kind} zeroinitializer, ptr {zero}"]
            safe = self.emit(f"select i1 {cond}, ptr {place}, ptr {zero}")
            return self.from_memory(self.emit(f"load {kind}, ptr {safe}, align {align}"), e.dtype, e.lanes)
        name = f"llvm.masked.load.{_suffix(element, e.lanes)}.p0"
        self.declare(name, f"{kind} @{name}(ptr, i32, <{e.lanes} x i1>, {kind})")
        operands = f"ptr {place}, i32 {align}, <{e.lanes} x i1> {cond}, {kind} zeroinitializer"
        return self.from_memory(self.emit(f"call {kind} @{name}({operands})"), e.dtype, e.lanes)

    def from_memory(self, value: str, dtype: str, lanes: int) -> str:
        if dtype != "bool":
            return value
        zero = "zeroinitializer" if lanes > 1 else "0"
        return self.emit(f"icmp ne {_vector('i8', lanes)} {value}, {zero}")

    def fma(self, e: Fma) -> str:
        a, b, c = self.value(e.a), self.value(e.b), self.value(e.c)
        element = scalar_type(e.dtype)
        kind = _vector(element, e.lanes)
        if element not in ("float", "double"):
            return self.emit(f"add {kind} {self.emit(f'mul {kind} {a}, {b}')}, {c}")
        if not self.machine.fma:
            return self.emit(f"fadd {kind} {self.emit(f'fmul {kind} {a}, {b}')}, {c}")
        name = f"llvm.fma.{_suffix(element, e.lanes)}"
        self.declare(name, f"{kind} @{name}({kind}, {kind}, {kind})")
        return self.emit(f"call {kind} @{name}({kind} {a}, {kind} {b}, {kind} {c})")

    def reduce(self, e: Reduce) -> str:
        value = self.value(e.x)
        if e.x.lanes == 1:
            return value
        element = scalar_type(e.dtype)
        kind = _vector(element, e.x.lanes)
        suffix = _suffix(element, e.x.lanes)
        if element in ("float", "double"):
            if e.op in ("min", "max"):
                return self.halves(e.op, value, e.dtype, e.x.lanes)
            name = f"llvm.vector.reduce.f{e.op}.{suffix}"
            start = literal(Const(-0.0 if e.op == "add" else 1.0, e.dtype))
            self.declare(name, f"{element} @{name}({element}, {kind})")
            return self.emit(f"call reassoc {element} @{name}({element} {start}, {kind} {value})")
        elif element == "i1":
            name = f"llvm.vector.reduce.{'or' if e.op in ('max', 'add') else 'and'}.{suffix}"
        else:
            sign = "u" if unsigned(e.dtype) else "s"
            name = f"llvm.vector.reduce.{e.op if e.op in ('add', 'mul') else sign + e.op}.{suffix}"
        self.declare(name, f"{element} @{name}({kind})")
        return self.emit(f"call {element} @{name}({kind} {value})")

    def halves(self, op: str, value: str, dtype: str, lanes: int) -> str:
        """min or max over floating lanes, half against half; LLVM's own reduction keeps to an order, lane by lane."""
        element = scalar_type(dtype)
        while lanes > 1:
            kind, rest = _vector(element, lanes), (lanes + 1) // 2
            parts: list[str] = []
            for start in (0, lanes - rest):
                picks = ", ".join(f"i32 {start + i}" for i in range(rest))
                parts.append(self.emit(f"shufflevector {kind} {value}, {kind} poison, <{rest} x i32> <{picks}>"))
            low, high = parts
            half = f"<{rest} x {element}>"
            chosen = self.emit(f"fcmp {'olt' if op == 'min' else 'ogt'} {half} {low}, {high}")
            value = self.emit(f"select <{rest} x i1> {chosen}, {half} {low}, {half} {high}")
            if rest == 1:
                return self.emit(f"extractelement {half} {value}, i64 0")
            lanes = rest
        return value

    def binary(self, e: Binary) -> str:
        a, b = self.value(e.a), self.value(e.b)
        element = scalar_type(e.a.dtype)
        kind = _vector(element, e.lanes)
        floating = element in ("float", "double")
        if e.a.dtype in ("float16", "bfloat16"):
            raise Error(f"kernel {self.kernel.name}: {e.op} on {e.a.dtype}; compute in float32 and cast")
        if e.op in _COMPARE:
            return self.compare(_COMPARE[e.op], a, b, kind, e.a.dtype, floating)
        if e.op in ("min", "max"):
            chosen = self.compare("lt" if e.op == "min" else "gt", a, b, kind, e.a.dtype, floating)
            return self.emit(f"select {_vector('i1', e.lanes)} {chosen}, {kind} {a}, {kind} {b}")
        if e.op in _LIBM:
            if not floating:
                raise Error(f"kernel {self.kernel.name}: {e.op} on {e.dtype}")
            return self.libm(e.op, (a, b), element, e.lanes)
        if floating:
            if e.op in ("floordiv", "mod"):
                return self.float_floor(e.op, a, b, element, e.lanes)
            if e.op not in _FLOAT_OPS:
                raise Error(f"kernel {self.kernel.name}: {e.op} on {e.dtype}")
            if e.op == "rem":
                return self.libm("fmod", (a, b), element, e.lanes)
            return self.emit(f"{_FLOAT_OPS[e.op]} {kind} {a}, {b}")
        if e.op == "shr":
            return self.emit(f"{'lshr' if unsigned(e.dtype) else 'ashr'} {kind} {a}, {b}")
        if e.op in ("div", "rem", "floordiv", "mod"):
            return self.int_divide(e, a, b, kind)
        return self.emit(f"{_INT_OPS[e.op]} {kind} {a}, {b}")

    def compare(self, op: str, a: str, b: str, kind: str, dtype: str, floating: bool) -> str:
        if floating:
            return self.emit(f"fcmp {'une' if op == 'ne' else 'o' + op} {kind} {a}, {b}")
        sign = "" if op in ("eq", "ne") else "u" if unsigned(dtype) else "s"
        return self.emit(f"icmp {sign}{op} {kind} {a}, {b}")

    def float_floor(self, op: str, a: str, b: str, element: str, lanes: int) -> str:
        """floor(a / b), or a - floor(a / b) * b computed through fmod so that it is exact."""
        kind = _vector(element, lanes)
        if op == "floordiv":
            return self.intrinsic("floor", self.emit(f"fdiv {kind} {a}, {b}"), element, lanes)
        remainder = self.libm("fmod", (a, b), element, lanes)
        zero = "zeroinitializer" if lanes > 1 else "0.0"
        flag = _vector("i1", lanes)
        unequal = self.emit(f"fcmp une {kind} {remainder}, {zero}")
        negative, divisor = (self.emit(f"fcmp olt {kind} {x}, {zero}") for x in (remainder, b))
        fix = self.emit(f"and {flag} {unequal}, {self.emit(f'xor {flag} {negative}, {divisor}')}")
        fixed = self.emit(f"fadd {kind} {remainder}, {b}")
        return self.emit(f"select {flag} {fix}, {kind} {fixed}, {kind} {remainder}")

    def int_divide(self, e: Binary, a: str, b: str, kind: str) -> str:
        """Integer division that cannot trap: x / 0 is x, x % 0 is 0, and min / -1 wraps."""
        lanes = e.lanes
        flag = _vector("i1", lanes)
        one = self.splat("1", scalar_type(e.dtype), lanes)
        zero = "zeroinitializer" if lanes > 1 else "0"
        if not isinstance(e.b, Const):
            b = self.emit(f"select {flag} {self.emit(f'icmp eq {kind} {b}, {zero}')}, {kind} {one}, {kind} {b}")
        if unsigned(e.dtype):
            return self.emit(f"{'udiv' if e.op in ('div', 'floordiv') else 'urem'} {kind} {a}, {b}")
        minus = self.splat("-1", scalar_type(e.dtype), lanes)
        is_minus = self.emit(f"icmp eq {kind} {b}, {minus}")
        safe = self.emit(f"select {flag} {is_minus}, {kind} {one}, {kind} {b}")
        quotient = self.emit(f"sdiv {kind} {a}, {safe}")
        quotient = self.emit(
            f"select {flag} {is_minus}, {kind} {self.emit(f'sub {kind} {zero}, {a}')}, {kind} {quotient}"
        )
        if e.op == "div":
            return quotient
        product = self.emit(f"mul {kind} {quotient}, {b}")
        remainder = self.emit(f"sub {kind} {a}, {product}")
        if e.op == "rem":
            return remainder
        unequal = self.emit(f"icmp ne {kind} {remainder}, {zero}")
        differs = self.emit(f"icmp slt {kind} {self.emit(f'xor {kind} {remainder}, {b}')}, {zero}")
        fix = self.emit(f"and {flag} {unequal}, {differs}")
        if e.op == "floordiv":
            return self.emit(f"add {kind} {quotient}, {self.emit(f'sext {flag} {fix} to {kind}')}")
        return self.emit(f"add {kind} {remainder}, {self.emit(f'select {flag} {fix}, {kind} {b}, {kind} {zero}')}")

    def unary(self, e: Unary) -> str:
        x = self.value(e.x)
        element = scalar_type(e.x.dtype)
        kind = _vector(element, e.lanes)
        floating = element in ("float", "double")
        if e.x.dtype in ("float16", "bfloat16"):
            raise Error(f"kernel {self.kernel.name}: {e.op} on {e.x.dtype}; compute in float32 and cast")
        if e.op == "neg":
            zero = "zeroinitializer" if e.lanes > 1 else "0"
            return self.emit(f"fneg {kind} {x}" if floating else f"sub {kind} {zero}, {x}")
        if e.op in ("not", "bitnot"):
            ones = self.splat("true" if element == "i1" else "-1", element, e.lanes)
            return self.emit(f"xor {kind} {x}, {ones}")
        if e.op == "isnan":
            return self.emit(f"fcmp uno {kind} {x}, {x}")
        if e.op == "abs" and not floating:
            if unsigned(e.dtype):
                return x
            name = f"llvm.abs.{_suffix(element, e.lanes)}"
            self.declare(name, f"{kind} @{name}({kind}, i1)")
            return self.emit(f"call {kind} @{name}({kind} {x}, i1 false)")
        if not floating:
            raise Error(f"kernel {self.kernel.name}: {e.op} on {e.dtype}")
        if e.op in _INTRINSICS:
            return self.intrinsic(_INTRINSICS[e.op], x, element, e.lanes)
        return self.libm(e.op, (x,), element, e.lanes)

    def intrinsic(self, op: str, x: str, element: str, lanes: int) -> str:
        kind = _vector(element, lanes)
        name = f"llvm.{op}.{_suffix(element, lanes)}"
        self.declare(name, f"{kind} @{name}({kind})")
        return self.emit(f"call {kind} @{name}({kind} {x})")

    def libm(self, op: str, operands: tuple[str, ...], element: str, lanes: int) -> str:
        """A call of the C library for each lane."""
        name = op + ("f" if element == "float" else "")
        self.declare(name, f"{element} @{name}({', '.join([element] * len(operands))})")
        if lanes == 1:
            return self.emit(f"call {element} @{name}({', '.join(f'{element} {x}' for x in operands)})")
        kind = _vector(element, lanes)
        result = "poison"
        for lane in range(lanes):
            parts = [self.emit(f"extractelement {kind} {x}, i64 {lane}") for x in operands]
            one = self.emit(f"call {element} @{name}({', '.join(f'{element} {x}' for x in parts)})")
            result = self.emit(f"insertelement {kind} {result}, {element} {one}, i64 {lane}")
        return result

    # -- conversions

    def cast(self, x: str, source: str, target: str, lanes: int) -> str:
        """By value, see `tensor.ir.Cast`; half and bfloat16 go through float32."""
        if source == target:
            return x
        halves = Halves(self.emit, lanes, self.machine.f16c)
        if source in ("float16", "bfloat16"):
            single = halves.from_float16(x) if source == "float16" else halves.from_bfloat16(x)
            return self.cast(single, "float32", target, lanes)
        if target in ("float16", "bfloat16"):
            single = self.cast(x, source, "float32", lanes)
            return halves.to_float16(single) if target == "float16" else halves.to_bfloat16(single)
        s, t = scalar_type(source), scalar_type(target)
        from_kind, to_kind = _vector(s, lanes), _vector(t, lanes)
        s_float, t_float = source in _FLOAT, target in _FLOAT
        if target == "bool":
            zero = "zeroinitializer" if lanes > 1 else ("0.0" if s_float else "0")
            return self.emit(f"{'fcmp une' if s_float else 'icmp ne'} {from_kind} {x}, {zero}")
        if s_float and t_float:
            op = "fpext" if width(source) < width(target) else "fptrunc"
            return self.emit(f"{op} {from_kind} {x} to {to_kind}")
        if s_float:
            if target == "uint64":
                return self.emit(f"fptoui {from_kind} {x} to {to_kind}")
            wide = "i32" if width(target) < 32 or target == "int32" else "i64"
            value = self.emit(f"fptosi {from_kind} {x} to {_vector(wide, lanes)}")
            return value if wide == t else self.emit(f"trunc {_vector(wide, lanes)} {value} to {to_kind}")
        if t_float:
            return self.emit(f"{'uitofp' if unsigned(source) else 'sitofp'} {from_kind} {x} to {to_kind}")
        if s == t:
            return x
        from_bits = 1 if source == "bool" else width(source)
        if from_bits > width(target):
            return self.emit(f"trunc {from_kind} {x} to {to_kind}")
        return self.emit(f"{'zext' if unsigned(source) else 'sext'} {from_kind} {x} to {to_kind}")


def _flat(lines: _Lines) -> Iterator[str]:
    """The lines in order, hoisted ones included."""
    for line in lines:
        if isinstance(line, str):
            yield line
        else:
            yield from _flat(line)


def _float16_bits(value: float) -> int:
    """The bits of the nearest float16; infinity beyond the largest."""
    try:
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    except OverflowError:
        return 0x7C00 if value > 0 else 0xFC00


def literal(e: Const) -> str:
    """An LLVM literal; floats in hexadecimal so that every bit is kept."""
    if e.dtype == "bool":
        return "true" if e.value else "false"
    if e.dtype in ("float32", "float64"):
        value = float(e.value)
        if e.dtype == "float32" and not (isnan(value) or isinf(value)):
            try:
                value = struct.unpack("f", struct.pack("f", value))[0]
            except OverflowError:
                value = float("inf") if value > 0 else float("-inf")
        return f"0x{struct.unpack('<Q', struct.pack('<d', value))[0]:016X}"
    if e.dtype == "float16":
        return str(_float16_bits(float(e.value)))
    if e.dtype == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", float(e.value)))[0]
        return str((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return str(int(e.value))
