"""Print a Tensor IR kernel as LLVM IR text. This module takes no decisions: every loop and vector is already there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from nestc.codegen import narrow
from nestc.codegen.arithmetic import NARROW_INTEGERS, Arithmetic
from nestc.codegen.llvm_types import literal, memory_type, scalar_type, suffix, vector_type, width
from nestc.codegen.lookups import Lookup, table_index
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
    Dot,
    Expr,
    Fma,
    For,
    If,
    Kernel,
    Load,
    PairSum,
    Ramp,
    Reduce,
    Repeat,
    Select,
    Shuffle,
    Stmt,
    Store,
    Unary,
    Var,
    loads,
    statements,
)

_CACHE_LINE = 64
_HOISTED = {"int64": frozenset("lt le gt ge eq ne min max".split()), "bool": frozenset(("and", "or"))}  # of scalars


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


class _Printer(Arithmetic):
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
                    kind = vector_type(scalar_type(b.dtype), lanes)
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
        body = s.body
        var, following = self.fresh(f"{s.var.name}."), self.fresh("next")
        first, head, latch, done = (f"L{self.count}.{part}" for part in ("first", "head", "latch", "done"))
        guarded = _limited(s)
        if guarded is None:
            self.enter()
        else:
            # A body that runs while the variable is below a limit: the loop ends there, and may not run at all.
            limit, body = guarded
            stop = self.value(Binary("min", limit, Const(s.var.extent, "int64")))
            some = self.emit(f"icmp sgt i64 {stop}, 0")
            hoisted: _Lines = []
            self.lines.append(hoisted)
            self.do(f"br i1 {some}, label %{first}, label %{done}")
            self.label(first)
            self.scopes.append(_Scope(before=hoisted))
        self.do(f"br label %{head}")
        before = self.block
        self.label(head)
        self.do(f"{var} = phi i64 [ {start}, %{before} ], [ {following}, %{latch} ]")
        self.env[s.var.name] = var
        self.depth[var] = len(self.scopes) - 1
        self.statements(body)
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
        kind = vector_type(scalar_type(s.buffer.dtype), lanes)
        if s.buffer.memory == "regs":
            if s.mask is not None:
                raise Error(f"kernel {self.kernel.name}: masked store to registers {s.buffer.name}")
            self.do(f"store {kind} {value}, ptr {self.register(s.buffer, s.index)}")
            return
        if s.buffer.dtype == "bool":
            value = self.emit(f"zext {kind} {value} to {vector_type('i8', lanes)}")
        element = memory_type(s.buffer.dtype)
        kind = vector_type(element, lanes)
        align = max(1, width(s.buffer.dtype) // 8)
        if any(i.lanes > 1 for i in s.index):
            mask = self.mask(s.mask, lanes)
            places = self.addresses(s.buffer, s.index, lanes)
            name = f"llvm.masked.scatter.{suffix(element, lanes)}.v{lanes}p0"
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
        name = f"llvm.masked.store.{suffix(element, lanes)}.p0"
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
        return self.known_terms(*ix.linear(e))

    def known_terms(self, c: int, terms: Mapping[Expr, int]) -> tuple[int, list[tuple[str, int]]]:
        """The same of a linear form."""
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
        c, parts = self.known_terms(*ix.position(index, buffer.shape))
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
        c, parts = self.known_terms(*ix.position(index, buffer.shape))
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
        if isinstance(e, Binary) and e.lanes == 1 and e.op in _HOISTED.get(e.a.dtype, ()):
            return self.hoisted(e)
        if isinstance(e, Binary):
            return self.binary(e)
        if isinstance(e, Unary):
            return self.unary(e)
        if isinstance(e, Select):
            kind = vector_type(scalar_type(e.dtype), e.lanes)
            cond, a, b = self.value(e.cond), self.value(e.a), self.value(e.b)
            if cond in ("true", "false"):
                return a if cond == "true" else b
            return self.emit(f"select {vector_type('i1', e.cond.lanes)} {cond}, {kind} {a}, {kind} {b}")
        if isinstance(e, Cast):
            wide = narrow.saturated(e, self.machine)
            if wide is not None:
                return narrow.packed(self.emit, self.declare, self.value(wide), e.dtype)
            if isinstance(e.x, Unary) and e.x.op == "rint" and e.x.dtype == "float32" and e.dtype in NARROW_INTEGERS:
                return self.cast(self.rounded(e.x), "int32", e.dtype, e.lanes)
            return self.cast(self.value(e.x), e.x.dtype, e.dtype, e.lanes)
        if isinstance(e, Bitcast):
            source, target = (vector_type(scalar_type(d), e.lanes) for d in (e.x.dtype, e.dtype))
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
            kind = vector_type(scalar_type(e.dtype), e.a.lanes)
            a, b = self.value(e.a), self.value(e.b)
            picks = ", ".join(f"i32 {p}" for p in e.picks)
            return self.emit(f"shufflevector {kind} {a}, {kind} {b}, <{len(e.picks)} x i32> <{picks}>")
        if isinstance(e, Reduce):
            return self.reduce(e)
        if isinstance(e, Repeat):
            return self.repeat(e)
        if isinstance(e, Dot):
            return self.dot(e)
        if isinstance(e, PairSum):
            return self.pair_sum(e)
        raise Error(f"kernel {self.kernel.name}: cannot print {type(e).__name__}")

    def hoisted(self, e: Binary) -> str:
        """A comparison, limit or condition of indices, in the outermost scope it can be."""
        a, b = self.value(e.a), self.value(e.b)
        key = (e.op, a, b)
        known = self.known(key)
        if known is not None:
            return known
        at = self.level(a, b)
        if e.a.dtype == "bool":
            return self.remember(key, self.emit(f"{e.op} i1 {a}, {b}", at))
        if e.op not in ("min", "max"):
            return self.remember(key, self.emit(f"icmp {'' if e.op in ('eq', 'ne') else 's'}{e.op} i64 {a}, {b}", at))
        chosen = self.emit(f"icmp s{'lt' if e.op == 'min' else 'gt'} i64 {a}, {b}", at)
        return self.remember(key, self.emit(f"select i1 {chosen}, i64 {a}, i64 {b}", at))

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
        kind = vector_type(element, e.lanes)
        if e.buffer.memory == "regs":
            return self.emit(
                f"load {vector_type(scalar_type(e.dtype), e.lanes)}, ptr {self.register(e.buffer, e.index)}"
            )
        align = max(1, width(e.dtype) // 8)
        if any(i.lanes > 1 for i in e.index):
            entry = table_index(e, self.machine)
            if entry is not None:
                lookup = Lookup(self.emit, self.declare, self.bases[e.buffer.name], self.machine)
                return lookup.run(self.value(entry), e.lanes)
            places = self.addresses(e.buffer, e.index, e.lanes)
            mask = self.mask(e.mask, e.lanes)
            name = f"llvm.masked.gather.{suffix(element, e.lanes)}.v{e.lanes}p0"
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
        name = f"llvm.masked.load.{suffix(element, e.lanes)}.p0"
        self.declare(name, f"{kind} @{name}(ptr, i32, <{e.lanes} x i1>, {kind})")
        operands = f"ptr {place}, i32 {align}, <{e.lanes} x i1> {cond}, {kind} zeroinitializer"
        return self.from_memory(self.emit(f"call {kind} @{name}({operands})"), e.dtype, e.lanes)

    def from_memory(self, value: str, dtype: str, lanes: int) -> str:
        if dtype != "bool":
            return value
        zero = "zeroinitializer" if lanes > 1 else "0"
        return self.emit(f"icmp ne {vector_type('i8', lanes)} {value}, {zero}")


def _limited(s: For) -> tuple[Expr, Block] | None:
    """The limit and the body of a serial loop all of which runs only while its variable is below a limit that stays the
    same; None if it is another kind of loop."""
    if s.kind != "serial" or len(s.body) != 1:
        return None
    only = s.body[0]
    if not isinstance(only, If) or only.orelse or not isinstance(only.cond, Binary):
        return None
    cond = only.cond
    if cond.op != "lt" or cond.a != s.var or ix.depends(cond.b, s.var):
        return None
    stored = {each.buffer.name for each in statements(only.then) if isinstance(each, Store)}
    if any(each.buffer.name in stored for each in loads(cond.b)):
        return None
    return cond.b, only.then


def _flat(lines: _Lines) -> Iterator[str]:
    """The lines in order, hoisted ones included."""
    for line in lines:
        if isinstance(line, str):
            yield line
        else:
            yield from _flat(line)
