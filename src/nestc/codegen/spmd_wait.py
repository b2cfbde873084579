"""How workers of a native partition wait for each other and wake each other, as LLVM IR; and where their words lie.

Waiters spin with a pause, then sleep on a futex where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, cast

from llvmlite import ir

# The shared context, in bytes. Words that different workers write lie on different cache lines (64 bytes).
GENERATION, IDLE = 0, 4  # number of runs started (workers wait for it to change); workers asleep
DONE = 64  # number of the run, chunks of it that are done: 32 bits each, the count in the lower ones
ASLEEP = 128  # workers asleep until a phase is done
CONTEXT_THREADS, TABLE, STOP, CONTEXT_TRACE, CONTEXT_SPINS, IDLE_SPINS = 192, 200, 208, 216, 224, 232
CONTEXT_BYTES = 256  # here the first worker's claims begin: a word a step, as DONE, that counts the chunks claimed

_FUTEX = {"x86_64": 202, "aarch64": 98, "arm64": 98, "riscv64": 98}  # system call numbers on Linux
_WAIT_PRIVATE, _WAKE_PRIVATE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE with FUTEX_PRIVATE_FLAG (linux/futex.h)

I32, I64, PTR, VOID = ir.IntType(32), ir.IntType(64), ir.PointerType(), ir.VoidType()
I8, BOOL = ir.IntType(8), ir.IntType(1)
LOW = (1 << 32) - 1

_EmitWait: TypeAlias = Callable[[ir.IRBuilder, ir.Value, ir.Value], None]
_EmitWake: TypeAlias = Callable[[ir.IRBuilder, ir.Value], None]


class Waiting:
    """A module with the functions that wait and wake."""

    def __init__(self, triple: str, prefix: str) -> None:
        self.prefix = prefix
        self.arch, _, system = triple.partition("-")
        self.linux = "linux" in system
        self.windows = "windows" in system
        self.module = ir.Module(name=prefix)
        self.module.triple = triple
        self.pause = self._pause()
        self.sleep = self._sleep()
        self.wait = self._wait()
        self.signal = self._signal()
        self.ready = self._ready()
        self.finish = self._finish()

    def function(
        self, name: str, result: ir.Type, arguments: Sequence[ir.Type], *, external: bool = False
    ) -> tuple[ir.Function, ir.IRBuilder]:
        """A new function ``<prefix>_<name>``, and a builder at its beginning; only an external one can be called from
        outside."""
        function = ir.Function(self.module, ir.FunctionType(result, arguments), f"{self.prefix}_{name}")
        function.attributes.add("nounwind")
        if not external:
            function.linkage = "internal"
            function.attributes.add("noinline")
        return function, ir.IRBuilder(function.append_basic_block("entry"))

    def _pause(self) -> Callable[[ir.IRBuilder], None]:
        """What a spinning worker does between two looks."""
        if self.arch == "x86_64":
            return self._hint("llvm.x86.sse2.pause")
        if self.arch in ("aarch64", "arm64"):
            return self._hint("llvm.aarch64.isb", 15)  # waits some 10 ns, where `yield` does nothing on most cores
        return lambda b: None

    def _hint(self, name: str, *operands: int) -> Callable[[ir.IRBuilder], None]:
        intrinsic = ir.Function(self.module, ir.FunctionType(VOID, [I32] * len(operands)), name)

        def call(b: ir.IRBuilder) -> None:
            b.call(intrinsic, [i32(operand) for operand in operands])

        return call

    def _sleep(self) -> tuple[_EmitWait, _EmitWake]:
        """How a worker sleeps while a word has a value, and how the others wake it."""
        if self.linux and self.arch in _FUTEX:
            syscall = ir.Function(self.module, ir.FunctionType(I64, [I64], var_arg=True), "syscall")
            number = i64(_FUTEX[self.arch])

            def futex_wait(b: ir.IRBuilder, word: ir.Value, old: ir.Value) -> None:
                b.call(syscall, [number, word, i64(_WAIT_PRIVATE), b.zext(old, I64), ir.Constant(PTR, None)])

            def futex_wake(b: ir.IRBuilder, word: ir.Value) -> None:
                b.call(syscall, [number, word, i64(_WAKE_PRIVATE), i64(0x7FFFFFFF)])

            return futex_wait, futex_wake
        # Elsewhere a sleeper looks again every 50 us (1 ms on Windows), and nobody needs to wake it.
        name, amount = ("Sleep", 1) if self.windows else ("usleep", 50)
        function = ir.Function(self.module, ir.FunctionType(I32, [I32]), name)

        def doze(b: ir.IRBuilder, word: ir.Value, old: ir.Value) -> None:
            b.call(function, [i32(amount)])

        return doze, lambda b, word: None

    def _wait(self) -> ir.Function:
        """``(word, sleepers, old, spins)``: return once `word` is not `old`; acquires what was written before."""
        function, b = self.function("wait", VOID, [PTR, PTR, I32, I64])
        word, sleepers, old, spins = function.args
        spin, again, sleep, check, doze, done = (
            function.append_basic_block(name) for name in ("spin", "again", "sleep", "check", "doze", "done")
        )
        entry = b.block
        b.branch(spin)
        b.position_at_end(spin)
        left = b.phi(I64)
        left.add_incoming(spins, entry)
        same = b.icmp_signed("==", b.load_atomic(word, "acquire", 4, typ=I32), old)
        b.cbranch(same, again, done)
        b.position_at_end(again)
        self.pause(b)
        left.add_incoming(b.sub(left, i64(1)), again)
        b.cbranch(b.icmp_signed(">", left, i64(0)), spin, sleep)
        # Say that we sleep, then look once more: the waker changes the word, then looks for sleepers. Both are
        # sequentially consistent, so one of the two sees the other, and the futex itself compares the word again.
        b.position_at_end(sleep)
        b.atomic_rmw("add", sleepers, i32(1), "seq_cst")
        b.branch(check)
        b.position_at_end(check)
        still = b.icmp_signed("==", b.load_atomic(word, "seq_cst", 4, typ=I32), old)
        awake = function.append_basic_block("awake")
        b.cbranch(still, doze, awake)
        b.position_at_end(doze)
        self.sleep[0](b, word, old)
        b.branch(check)
        b.position_at_end(awake)
        b.atomic_rmw("sub", sleepers, i32(1), "seq_cst")
        b.branch(done)
        b.position_at_end(done)
        b.ret_void()
        return function

    def _signal(self) -> ir.Function:
        """``(word, sleepers)``: change `word` (releasing what was written before) and wake whoever sleeps on it."""
        function, b = self.function("signal", VOID, [PTR, PTR])
        word, sleepers = function.args
        b.atomic_rmw("add", word, i32(1), "seq_cst")
        asleep = b.icmp_signed("!=", b.load_atomic(sleepers, "seq_cst", 4, typ=I32), i32(0))
        with b.if_then(asleep, likely=False):
            self.sleep[1](b, word)
        b.ret_void()
        return function

    def _ready(self) -> ir.Function:
        """``(ctx, run, chunks) -> i1``: wait until so many chunks are done; false if another run has begun since."""
        function, b = self.function("ready", BOOL, [PTR, I64, I64])
        ctx, run, chunks = function.args
        spin, again, sleep, check, doze, leave = (
            function.append_basic_block(name) for name in ("spin", "again", "sleep", "check", "doze", "leave")
        )
        word, asleep = at(b, ctx, DONE), at(b, ctx, ASLEEP)
        spins = b.load(at(b, ctx, CONTEXT_SPINS), typ=I64)
        entry = b.block

        def waiting(order: str) -> tuple[ir.Value, ir.Value]:
            """The word, and whether this run goes on and the chunks are not yet done."""
            value = b.load_atomic(word, order, 8, typ=I64)
            same = b.icmp_unsigned("==", b.lshr(value, i64(32)), run)
            fewer = b.icmp_unsigned("<", b.and_(value, i64(LOW)), chunks)
            return value, cast(ir.Value, b.and_(same, fewer))

        def answer() -> None:
            value = b.load_atomic(word, "acquire", 8, typ=I64)
            b.ret(b.icmp_unsigned("==", b.lshr(value, i64(32)), run))

        b.branch(spin)
        b.position_at_end(spin)
        left = b.phi(I64)
        left.add_incoming(spins, entry)
        done = function.append_basic_block("done")
        b.cbranch(waiting("acquire")[1], again, done)
        b.position_at_end(again)
        self.pause(b)
        left.add_incoming(b.sub(left, i64(1)), again)
        b.cbranch(b.icmp_signed(">", left, i64(0)), spin, sleep)
        b.position_at_end(done)
        answer()
        # Say that we sleep, then look once more: whoever ends a phase changes the word, then looks for sleepers. Both
        # are sequentially consistent, so one of the two sees the other, and the futex itself compares the word again.
        b.position_at_end(sleep)
        b.atomic_rmw("add", asleep, i32(1), "seq_cst")
        b.branch(check)
        b.position_at_end(check)
        value, still = waiting("seq_cst")
        b.cbranch(still, doze, leave)
        b.position_at_end(doze)
        self.sleep[0](b, word, cast(ir.Value, b.trunc(value, I32)))
        b.branch(check)
        b.position_at_end(leave)
        b.atomic_rmw("sub", asleep, i32(1), "seq_cst")
        answer()
        return function

    def _finish(self) -> ir.Function:
        """``(ctx, count, chunks)``: count chunks as done (releasing what they wrote) and wake whoever sleeps until
        `chunks` are."""
        function, b = self.function("finish", VOID, [PTR, I64, I64])
        ctx, count, chunks = function.args
        word = at(b, ctx, DONE)
        before = b.atomic_rmw("add", word, count, "seq_cst")
        last = b.icmp_unsigned("==", b.and_(b.add(before, count), i64(LOW)), chunks)
        with b.if_then(last):
            asleep = b.load_atomic(at(b, ctx, ASLEEP), "seq_cst", 4, typ=I32)
            with b.if_then(b.icmp_signed("!=", asleep, i32(0)), likely=False):
                self.sleep[1](b, word)
        b.ret_void()
        return function


@contextmanager
def counted(b: ir.IRBuilder, count: ir.Value) -> Iterator[ir.Value]:
    """Emit ``for (i = 0; i < count; ++i)`` around the code emitted in the body; `count` may be 0."""
    function: Any = b.function
    entry = b.block
    head, body, done = (function.append_basic_block(name) for name in ("head", "body", "done"))
    b.branch(head)
    b.position_at_end(head)
    number = b.phi(I64)
    number.add_incoming(i64(0), entry)
    b.cbranch(b.icmp_unsigned("<", number, count), body, done)
    b.position_at_end(body)
    yield number
    number.add_incoming(b.add(number, i64(1)), b.block)
    b.branch(head)
    b.position_at_end(done)


def at(b: ir.IRBuilder, ctx: ir.Value, offset: int) -> ir.Value:
    """The address `offset` bytes into the context."""
    return b.gep(ctx, [i64(offset)], source_etype=I8)


def i64(value: int) -> ir.Constant:
    """A constant of 64 bits."""
    return ir.Constant(I64, value)


def i32(value: int) -> ir.Constant:
    """A constant of 32 bits."""
    return ir.Constant(I32, value)
